//! `lifl run --detach`: a run in the background, in a session of its own.
//!
//! ```text
//!   lifl run --detach          lifl run --detached: a session of its own; standard input is a pipe from here
//!     │ starts ───────────────▶│ reads the job, finds a daemon, starts the workers; its lines still go where ours do
//!     │◀── {"run", "pid"} ─────┤ the first round begins: its lines go to run.log in its folder from now on
//!     ▼ exit 0                 ▼ goes on
//! ```
//!
//! If it ends before that, it has said why, and its exit code is ours.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;

use anyhow::Context;
use lifl_daemon::signals::{self, Ending};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

use super::{ALONE, runtime};
use crate::cli::Report;
use crate::clock;
use crate::dir::Dir;
use crate::exit::{Because, Cause, Outcome};
use crate::output::{self, outln};
use crate::program;

/// Where a detached run's lines go, in its folder.
pub(crate) const LOG: &str = "run.log";

/// What each run's part of that file begins with.
pub(crate) const BEGUN: &str = "-- lifl run, process ";

/// The option by which this program starts itself, and the one that asked for it.
const DETACH: &str = "--detach";
const DETACHED: &str = "--detached";

/// What the run says when it has begun.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    run: String,
    pid: u32,
}

/// Starts the run in the background, and waits until it has begun. Gives the exit code.
///
/// # Errors
/// If it cannot be started at all.
pub(crate) fn start(report: Report) -> Outcome<u8> {
    let runtime = runtime(ALONE)?;
    runtime.block_on(async {
        let mut ending = Ending::watch().because(Cause::Machine)?;
        let (begun, pipe) = io::pipe().context("pipe").because(Cause::Machine)?;
        let mut command = program::command().because(Cause::Machine)?;
        let mut options = true;
        for argument in std::env::args_os().skip(1) {
            options &= argument != "--";
            match options && argument == DETACH {
                true => command.arg(DETACHED),
                false => command.arg(argument),
            };
        }
        command.stdin(pipe);
        let mut command = tokio::process::Command::from(command);
        let child = command.spawn().context("the run cannot be started");
        let mut child = child.because(Cause::Machine)?;
        // The pipe ends with the child, and not with this process's copy of its end.
        drop(command);
        let begun = Receiver::from_owned_fd(begun.into());
        let mut begun = begun.context("pipe").because(Cause::Machine)?;
        let mut text = Vec::new();
        loop {
            tokio::select! {
                read = begun.read_to_end(&mut text) => {
                    read.context("pipe").because(Cause::Machine)?;
                    break;
                }
                // In its own session it does not hear of what the terminal's hear.
                _ = ending.asked() => if let Some(pid) = child.id() {
                    // It may have ended by itself.
                    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
                },
            }
        }
        let Ok(Begun { run, pid }) = serde_json::from_slice(&text) else {
            // It has said why.
            let status = child
                .wait()
                .await
                .context("the run is lost")
                .because(Cause::Machine)?;
            let signal = status.signal().map(|signal| 128 + signal);
            let code = status.code().or(signal).and_then(|code| u8::try_from(code).ok());
            return Ok(code.unwrap_or(Cause::Job as u8));
        };
        if report.json {
            outln!(
                "{}",
                serde_json::json!({ "event": "detached", "run": run, "pid": pid })
            )?;
        } else {
            outln!("runs in the background (process {pid}); its lines go to {run}/{LOG}")?;
            outln!("follow it   lifl attach {run}")?;
            outln!("stop it     lifl stop {run}")?;
        }
        Ok(0)
    })
}

/// A run that is to go to the background.
#[derive(Debug)]
pub(crate) struct Detachment {
    /// Descriptors that whoever started this program had open, and did not mean for it.
    inherited: Vec<RawFd>,
}

impl Detachment {
    /// Makes this process, which [`start`] has started, a session of its own. To be called before anything is opened.
    pub(crate) fn prepare() -> Self {
        // It fails for a process group's leader only, whom a shell has started: then there is a session already.
        let _ = setsid();
        // However it was started, `lifl stop` is to reach it.
        signals::accept_termination();
        let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let listed = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let numbers: Vec<RawFd> = listed.filter(|&fd| fd > libc::STDERR_FILENO).collect();
        // Workers are not to have them either.
        // SAFETY: three numbers; the descriptors stay open.
        unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        };
        let is_open = |fd: &RawFd| {
            // SAFETY: for the length of this call, which fails if it is not open: the one that the list was read by.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
            fcntl(fd, FcntlArg::F_GETFD).is_ok()
        };
        Self {
            inherited: numbers.into_iter().filter(is_open).collect(),
        }
    }

    /// The run has begun: sends lines to its folder's [`LOG`] from now on, lets go of the terminal and of whatever else was
    /// inherited, and tells who waits. What fails of that is no reason to end the run.
    pub(crate) fn complete(self, folder: &Dir) {
        output::flush_told();
        output::flush_log();
        let null = File::options().read(true).write(true).open("/dev/null");
        let (log, failed) = match folder.append(LOG) {
            Ok(log) => (Some(log), None),
            Err(error) => (
                null.as_ref().ok().and_then(|null| null.try_clone().ok()),
                Some(error),
            ),
        };
        if let Some(error) = failed {
            output::log().line(format!("{LOG} cannot be written: {error}\n"));
            output::flush_log();
        }
        if let Some(log) = log {
            // They fail for a descriptor that is not open only.
            let _ = dup2_stdout(&log).and_then(|()| dup2_stderr(&log));
        }
        let pid = std::process::id();
        let now = clock::utc();
        output::log().line(format!("{BEGUN}{pid}, {now}\n"));
        let run = folder.path().display().to_string();
        let told = serde_json::to_vec(&Begun { run, pid });
        // Who waited may have gone.
        if let (Ok(told), Ok(pipe)) = (told, io::stdin().as_fd().try_clone_to_owned()) {
            let _ = File::from(pipe).write_all(&told);
        }
        // The pipe's end is what tells that this was all.
        if let Ok(null) = null {
            let _ = dup2_stdin(&null);
        }
        for fd in self.inherited {
            // SAFETY: it was open before this program opened anything, so nothing in it uses this number as its own.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
