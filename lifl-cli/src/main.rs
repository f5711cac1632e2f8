//! The command `lifl`.

fn main() {}
