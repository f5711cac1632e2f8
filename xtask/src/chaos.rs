//! The chaos test for longer than among the tests: `lifl-cli/tests/chaos.rs` says what it does.

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::ci::cargo;

/// How long, and what.
#[derive(Args)]
pub(crate) struct Options {
    /// Seconds on each plane; jobs that run by then are run to their end.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What jobs and blows are drawn from; another one each time when it is not given. Blows strike processes that run by
    /// themselves: the same seed need not find the same fault at once.
    #[arg(long)]
    seed: Option<u64>,
    /// Only there.
    #[arg(long, value_parser = ["sockmap", "relay"])]
    plane: Option<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut command = cargo(["test", "--release", "--package", "lifl-cli", "--test", "chaos"]);
    command
        .args(options.plane.as_deref())
        .args(["--", "--nocapture"])
        .env("LIFL_CHAOS_SECONDS", options.seconds.to_string())
        // Asked for by name, so not to be passed over.
        .env("LIFL_REQUIRE_KERNEL", "1");
    match options.seed {
        Some(seed) => command.env("LIFL_CHAOS_SEED", seed.to_string()),
        None => command.env_remove("LIFL_CHAOS_SEED"),
    };
    let status = command.status().context("cannot start cargo")?;
    ensure!(
        status.success(),
        "something was lost, or left: the failed job's folder is named above"
    );
    Ok(())
}
