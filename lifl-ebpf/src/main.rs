//! LIFL's SK_MSG program.

fn main() {}
