//! What this program prints: every write is checked, and none ends the process by itself.
//!
//! - **What a command was asked for** goes to standard output, for whose reader it waits ([`print`](print()), `outln!`). If it cannot be
//!   written, the command fails with [`Cause::Output`], or quietly with [`Cause::Pipe`] if the reader has gone.
//! - **What a run tells of itself** ([`told`]) and **what it logs** ([`log`]) are lines that are dropped where they cannot be
//!   written: the run goes on, and its result is in its folder.

use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::anyhow;
use lifl_daemon::logging::{self, Sink};

use crate::exit::{Cause, Failure, Outcome};

/// Bytes of a run's lines that wait for a reader of standard output, at most.
const TOLD_BYTES: usize = 16 << 20;

/// How long the end of a run waits for that reader, while it reads nothing.
const READER: Duration = Duration::from_secs(10);

static OUT: OnceLock<Sink> = OnceLock::new();
static ERR: OnceLock<Sink> = OnceLock::new();

/// Standard output, for lines that nobody waits for.
pub(crate) fn told() -> &'static Sink {
    OUT.get_or_init(|| Sink::direct(io::stdout(), TOLD_BYTES, unwritten))
}

fn unwritten(lost: u64) -> String {
    format!("{lost} lines could not be written")
}

/// Has [`told`] be lines for people again.
pub(crate) fn tell_lines() {
    told().tell_by(unwritten);
}

/// Has [`told`] be a stream of events.
pub(crate) fn tell_events() {
    told().tell_by(|lost| format!(r#"{{"event":"events_lost","lines":{lost}}}"#));
}

/// Standard error.
pub(crate) fn log() -> &'static Sink {
    ERR.get_or_init(|| Sink::direct(io::stderr(), logging::LOG_BYTES, unwritten))
}

/// Waits until what was told is written, or cannot be.
pub(crate) fn flush_told() {
    let Some(told) = OUT.get() else { return };
    let all = told.flush(READER);
    let lost = told.lost();
    if lost > 0 {
        log().line(format!(
            "lifl: {lost} lines could not be written to standard output\n"
        ));
    } else if !all {
        let seconds = READER.as_secs();
        log().line(format!(
            "lifl: nobody has read standard output for {seconds} s: its end is lost\n"
        ));
    }
}

/// Waits until what was logged is written, or cannot be.
pub(crate) fn flush_log() {
    if let Some(log) = ERR.get() {
        log.flush(logging::LAST_LINES);
    }
}

/// Writes what was asked for to standard output.
///
/// # Errors
/// If it cannot be written.
pub(crate) fn print(text: &str) -> Outcome {
    logging::write_all(&io::stdout(), text.as_bytes()).map_err(failure)
}

/// What a command fails with whose answer cannot be written.
pub(crate) fn failure(error: io::Error) -> Failure {
    let cause = match error.kind() {
        io::ErrorKind::BrokenPipe => Cause::Pipe,
        _ => Cause::Output,
    };
    Failure::new(cause, anyhow!(error).context("standard output cannot be written"))
}

/// [`print`](print()) of a formatted line.
macro_rules! outln {
    ($($arg:tt)*) => {
        $crate::output::print(&(format!($($arg)*) + "\n"))
    };
}

pub(crate) use outln;
