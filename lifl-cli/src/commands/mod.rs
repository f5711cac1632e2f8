//! One file a command, but for the smallest.

mod attach;
mod bench;
pub(crate) mod detach;
mod job;
mod run;
mod status;
mod stop;

pub(crate) use attach::attach;
pub(crate) use bench::{bench, echo};
pub(crate) use job::{plan, schema, validate};
pub(crate) use run::run;
pub(crate) use status::status;
pub(crate) use stop::stop;

use anyhow::anyhow;
use lifl_common::runtime::{self, Threads};
use lifl_daemon::logging::filter;
use serde_json::json;
use tokio::runtime::Runtime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Report;
use crate::doctor::{self, State};
use crate::exit::{Because, Cause, Failure, Outcome, cause_of};
use crate::output::{self, outln};
use crate::work::{self, Place};

/// Logs go to standard error, as far as they can be written there; `RUST_LOG` chooses which.
fn log(default: &str) {
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(output::log().clone())
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(filter(default))
        .with(lines)
        .init();
}

/// A command that needs no more than its own thread.
const ALONE: Threads = Threads {
    workers: 0,
    blocking: 0,
    most_blocking: 1,
    spare: 0,
};

/// A command that needs no more than its own thread, and one to look up names on.
const SMALL: Threads = Threads {
    workers: 0,
    blocking: 1,
    most_blocking: 1,
    spare: 0,
};

fn runtime(threads: Threads) -> Outcome<Runtime> {
    runtime::start(threads, || {}).because(Cause::Machine)
}

/// Plays a role; its log is standard error, which `lifl run` sends to a file.
///
/// `blocking` is how many threads it has for work that blocks.
pub(crate) fn worker(place: Place, blocking: usize) -> Outcome {
    log("info");
    let runtime = runtime(Threads {
        workers: 0,
        blocking,
        most_blocking: blocking,
        spare: 0,
    })?;
    let played = runtime.block_on(work::play(place));
    let played = played.map_err(|error| Failure::new(cause_of(&error), error));
    // A training that is under way when the job ends is of no use to anybody.
    runtime.shutdown_background();
    played
}

/// What the machine can do. Fails if it cannot run a job at all.
pub(crate) fn doctor(report: Report) -> Outcome {
    log("error");
    let checks = doctor::run();
    let said = match report.json {
        true => checks
            .iter()
            .try_for_each(|check| outln!("{}", json!({ "event": "check", "check": check }))),
        false => outln!("{}", doctor::render(&checks).trim_end()),
    };
    let missing: Vec<&str> = checks
        .iter()
        .filter(|check| check.state == State::Missing)
        .map(|check| check.name)
        .collect();
    if missing.is_empty() {
        return said;
    }
    Err(Failure::new(
        Cause::Machine,
        anyhow!("this machine lacks: {}", missing.join(", ")),
    ))
}
