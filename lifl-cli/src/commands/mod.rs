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

use std::io;

use anyhow::anyhow;
use lifl_common::arena::ArenaError;
use lifl_common::client::ClientError;
use lifl_common::control::ErrorCode;
use lifl_common::limits;
use lifl_common::runtime::{self, Threads};
use lifl_daemon::logging::filter;
use lifl_learn::LearnError;
use serde_json::json;
use tokio::runtime::Runtime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::Report;
use crate::doctor::{self, State};
use crate::exit::{Because, Cause, Failure, Outcome};
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

/// Why a worker has failed: the machine, where it or its daemon lacks something that a job needs, else the job.
fn cause_of(error: &anyhow::Error) -> Cause {
    let lacks = |cause: &(dyn std::error::Error + 'static)| {
        let of_daemon = cause.downcast_ref::<ClientError>().is_some_and(|error| {
            matches!(
                error,
                ClientError::Refused {
                    code: ErrorCode::Full,
                    ..
                } | ClientError::HugePages { .. }
                    | ClientError::Silent { .. }
                    | ClientError::Busy { .. }
            )
        });
        let of_data = matches!(cause.downcast_ref(), Some(LearnError::Threads { .. }));
        let of_memory = matches!(cause.downcast_ref(), Some(ArenaError::System { .. }));
        let of_system = cause
            .downcast_ref::<io::Error>()
            .and_then(limits::explain_refusal);
        of_daemon || of_data || of_memory || of_system.is_some()
    };
    match error.chain().any(lacks) {
        true => Cause::Machine,
        false => Cause::Job,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_is_refused_memory_lacks_something_of_the_machine_and_one_that_is_refused_a_name_does_not()
     {
        let refused = |code| ClientError::Refused {
            code,
            message: String::new(),
        };
        let wrapped = |error: ClientError| anyhow::Error::new(error).context("cannot have an arena");
        assert_eq!(cause_of(&wrapped(refused(ErrorCode::Full))), Cause::Machine);
        assert_eq!(cause_of(&wrapped(refused(ErrorCode::Denied))), Cause::Job);
        let no_pages = ClientError::HugePages {
            why: String::new(),
            source: Box::new(refused(ErrorCode::Failed)),
        };
        assert_eq!(cause_of(&wrapped(no_pages)), Cause::Machine);
        let no_memory = io::Error::from_raw_os_error(nix::libc::ENOMEM);
        assert_eq!(cause_of(&no_memory.into()), Cause::Machine);
        assert_eq!(cause_of(&anyhow!("the top said nothing")), Cause::Job);
    }
}
