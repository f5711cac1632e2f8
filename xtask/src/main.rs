//! Tasks of LIFL's developers.

fn main() {}
