//! The threads that learners compute on: rayon's for the whole process.
//!
//! Rayon makes them when they are first used, and panics where the system refuses one. So they are made before, and fewer
//! where not all can be had: the results are the same.

use std::error::Error;
use std::io;
use std::sync::OnceLock;

use lifl_common::config::ModelSpec;
use lifl_common::limits;
use lifl_common::runtime::try_threads;
use rayon::ThreadPoolBuilder;

use super::LearnError;
use super::synthetic::is_one_piece;

/// The environment's word on how many there are to be, which rayon takes, too.
pub const VARIABLE: &str = "RAYON_NUM_THREADS";

/// How many threads a learner of that model makes where it may compute on `threads`: a network on one, and a small synthetic
/// model, computes where it is called.
pub fn made(model: &ModelSpec, threads: usize) -> usize {
    match model {
        ModelSpec::Synthetic { parameters, dtype } if is_one_piece(*parameters, *dtype) => 0,
        ModelSpec::Synthetic { .. } => threads,
        _ if threads == 1 => 0,
        _ => threads,
    }
}

/// Threads that learners of this process may compute on.
pub fn allowed() -> usize {
    let told = std::env::var(VARIABLE)
        .ok()
        .and_then(|threads| threads.parse().ok());
    told.filter(|&threads| threads > 0).unwrap_or_else(limits::cpus)
}

/// Makes the threads that a learner of that model needs, once.
///
/// # Errors
/// If the system refuses even one.
pub fn start(model: &ModelSpec) -> Result<(), LearnError> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let threads = made(model, allowed());
    if threads == 0 {
        return Ok(());
    }
    let started = STARTED.get_or_init(|| build(threads).map_err(|error| error.to_string()));
    started.clone().map_err(|why| LearnError::Threads {
        why,
        limit: limits::explain_threads(),
    })
}

fn build(mut threads: usize) -> io::Result<()> {
    // Once rayon has been refused it does not try again.
    while let Err(refused) = try_threads(threads) {
        threads /= 2;
        if threads == 0 {
            return Err(refused);
        }
        tracing::warn!(threads, "computing on fewer threads: {refused}");
    }
    match ThreadPoolBuilder::new().num_threads(threads).build_global() {
        // Without a cause it was there already.
        Err(error) if error.source().is_some() => Err(io::Error::other(error)),
        _ => Ok(()),
    }
}
