//! The simulation for longer than among the tests: `lifl-worker/src/local/simulation.rs` says what it does.

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::ci::cargo;

/// How long, and what.
#[derive(Args)]
pub(crate) struct Options {
    /// Seconds for which jobs are simulated, one after the other; at least one is.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// The first job's number, from which all of it is drawn, and when everything happens; the next has the next. Another one
    /// each time when it is not given.
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut command = cargo(["test", "--release", "--package", "lifl-worker", "--lib"]);
    command
        .args(["--", "--ignored", "--nocapture", "--exact"])
        .arg("local::simulation::cases::for_as_long_as_one_likes")
        .env("LIFL_SIMULATE_SECONDS", options.seconds.to_string());
    match options.seed {
        Some(seed) => command.env("LIFL_SIMULATE_SEED", seed.to_string()),
        None => command.env_remove("LIFL_SIMULATE_SEED"),
    };
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "a job went wrong: its seed is named above");
    Ok(())
}
