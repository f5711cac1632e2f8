//! The command `lifl`, as a library so that tests and benchmarks reach its parts.
//!
//! A run's processes are all this one program: `lifl run` is the coordinator ([`coordinate`]), which starts
//! `lifl worker` once for each aggregator and trainer ([`work`]). Aggregators average with [`lifl_aggregate`], trainers
//! train with [`lifl_learn`].

// Such a macro panics, or waits for a reader: `logging` has what does neither.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod base_model;
mod bench;
mod checkpoint;
pub mod cli;
mod clock;
mod commands;
pub mod coordinate;
pub mod dir;
pub mod doctor;
pub mod exit;
mod exposure;
mod inputs;
pub mod memory;
mod output;
pub mod privileges;
mod program;
pub mod requirements;
mod runs;
pub mod task;
pub mod work;
