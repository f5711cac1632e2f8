//! The command `lifl`, as a library so that tests and benchmarks reach its parts.

pub mod doctor;
pub mod learn;
