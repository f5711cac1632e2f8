//! The command `lifl-daemon`.

fn main() {}
