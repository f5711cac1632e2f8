//! Signals that ask a process to end, and those that must not end it.
//!
//! A signal that was ignored when this program was started stays ignored: `nohup` ignores SIGHUP, and a shell without job
//! control ignores SIGINT and SIGQUIT for `command &`. A handler would undo what whoever started the program asked for. One that
//! was blocked is another matter: nobody asks for that, a starter forgets it.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal as Number, signal as set_disposition};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGINT, SIGTERM and SIGHUP, each unless it was inherited as ignored.
#[derive(Debug)]
pub struct Ending {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
}

impl Ending {
    /// Watches for them from now on.
    ///
    /// # Errors
    /// If a handler cannot be installed.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn watch() -> io::Result<Self> {
        Ok(Self {
            interrupt: unless_ignored(SignalKind::interrupt())?,
            terminate: unless_ignored(SignalKind::terminate())?,
            hangup: unless_ignored(SignalKind::hangup())?,
        })
    }

    /// Waits for the first, and gives its name; for ever if all are ignored. Cancel-safe.
    pub async fn asked(&mut self) -> &'static str {
        tokio::select! {
            () = received(&mut self.interrupt) => "SIGINT",
            () = received(&mut self.terminate) => "SIGTERM",
            () = received(&mut self.hangup) => "SIGHUP",
        }
    }
}

/// A stream of that signal; `None` if it was inherited as ignored.
fn unless_ignored(kind: SignalKind) -> io::Result<Option<Signal>> {
    match is_ignored(kind.as_raw_value())? {
        true => Ok(None),
        false => signal(kind).map(Some),
    }
}

async fn received(signal: &mut Option<Signal>) {
    let came = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending::<()>().await;
    }
}

/// Whether this process ignores a signal.
fn is_ignored(number: libc::c_int) -> io::Result<bool> {
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action nothing changes; the old one is written into `current`, which has room for it.
    let status = unsafe { libc::sigaction(number, ptr::null(), current.as_mut_ptr()) };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all zeros is a valid value of the struct, and the call above has written it.
    let current = unsafe { current.assume_init() };
    Ok(current.sa_sigaction == libc::SIG_IGN)
}

/// Has what would end or stop this process for a write be an error of that write, or nothing: SIGXFSZ (a file larger than
/// `ulimit -f`, now EFBIG), SIGPIPE (a pipe without a reader, now EPIPE), SIGTTOU (a background process that writes to a
/// terminal with `stty tostop`). Programs that this one starts inherit it. To be called first in `main`.
pub fn survive_writes() {
    for number in [Number::SIGXFSZ, Number::SIGPIPE, Number::SIGTTOU] {
        // SAFETY: no handler is installed, so no code runs in one.
        // It fails for signals that cannot be ignored only.
        let _ = unsafe { set_disposition(number, SigHandler::SigIgn) };
    }
}

/// Unblocks the signals that this program handles: blocked by whoever started it, they would wait for ever, SIGCHLD and with it
/// the end of a child too. To be called first in `main`, before there are threads, which inherit that.
pub fn unblock() {
    let mut handled = SigSet::empty();
    for number in [Number::SIGINT, Number::SIGTERM, Number::SIGHUP, Number::SIGCHLD] {
        handled.add(number);
    }
    // It fails for a wrong argument only.
    let _ = handled.thread_unblock();
}

/// Has SIGTERM end this process, or be watched, though it was inherited as ignored.
pub fn accept_termination() {
    // SAFETY: no handler is installed, so no code runs in one.
    // It fails for signals that cannot be changed only.
    let _ = unsafe { set_disposition(Number::SIGTERM, SigHandler::SigDfl) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_that_was_ignored_is_not_watched() {
        // A signal that nothing else in this process uses.
        let number = Number::SIGUSR2;
        let kind = SignalKind::from_raw(number as i32);
        // SAFETY: no handler is installed.
        unsafe { set_disposition(number, SigHandler::SigIgn) }.expect("may be ignored");
        assert!(unless_ignored(kind).expect("looked at").is_none());
        // SAFETY: as above.
        unsafe { set_disposition(number, SigHandler::SigDfl) }.expect("may be put back");
        assert!(unless_ignored(kind).expect("looked at").is_some());
    }
}
