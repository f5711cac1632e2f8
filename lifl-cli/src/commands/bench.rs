//! `lifl bench`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use lifl_daemon::signals::Ending;

use super::{SMALL, log, runtime};
use crate::bench::{self, EchoArgs, Scene};
use crate::cli::BenchArgs;
use crate::exit::{Because, Cause, Failure, Outcome};

/// How long a step may take after an interruption.
const PATIENCE: Duration = Duration::from_secs(20);

/// Measures until it is done or interrupted; nothing is left either way.
pub(crate) fn bench(args: BenchArgs) -> Outcome {
    log("error");
    lifl_daemon::raise_open_files();
    let scene = Arc::new(Scene::new().because(Cause::Machine)?);
    let runtime = runtime(SMALL)?;
    let outcome = runtime.block_on(async {
        let mut ending = Ending::watch().because(Cause::Machine)?;
        // The bench has runtimes of its own: a thread where none is.
        let mut measuring = tokio::task::spawn_blocking({
            let scene = Arc::clone(&scene);
            move || bench::run(&args.bench, args.json, &scene)
        });
        let measured = tokio::select! {
            measured = &mut measuring => Some(measured),
            _ = ending.asked() => None,
        };
        if let Some(measured) = measured {
            return measured.context("the bench panicked").because(Cause::Machine)?;
        }
        scene.cut();
        // It notices at its next step. One that takes longer is left alone: its children have been told.
        let _ = tokio::time::timeout(PATIENCE, measuring).await;
        Err(Failure::new(Cause::Interrupted, anyhow!("interrupted")))
    });
    runtime.shutdown_background();
    outcome
}

/// Is the other process.
pub(crate) fn echo(args: &EchoArgs) -> Outcome {
    log("error");
    bench::echo(args).because(Cause::Job)
}
