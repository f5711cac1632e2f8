//! The command `lifl`, as a library so that tests and benchmarks reach its parts.

pub mod data;
pub mod learn;
mod random;
