//! The service manager that has started this process, if one has: systemd, or whoever speaks its protocol
//! (`sd_listen_fds(3)`, `sd_notify(3)`).
//!
//! ```text
//!   started ── READY=1 ──▶ running ── SIGTERM: STOPPING=1 ──▶ ended
//!                            │ ▲
//!                            └─┘ WATCHDOG=1 and STATUS=, by the registry's task
//! ```
//!
//! Without one nothing here does anything.

use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, ensure};
use lifl_daemon::{Vitals, Watch};
use sd_notify::NotifyState;

/// How often the status is told where no watchdog asks for more.
const STATUS: Duration = Duration::from_secs(10);

/// The socket that was handed over, if one was.
pub(crate) fn listener() -> anyhow::Result<Option<OwnedFd>> {
    let mut handed = sd_notify::listen_fds().context("LISTEN_FDS")?;
    ensure!(
        handed.len() <= 1,
        "the service manager hands over {} sockets: the daemon listens at one",
        handed.len()
    );
    // SAFETY: the descriptor was handed to this process for this, and this is called once, before any other is opened
    // or closed under its number.
    Ok(handed.next().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Tells that the daemon serves.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Tells that the daemon ends.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
}

/// Who tells how the daemon is, often enough for the watchdog. `None` if nobody wants to know.
pub(crate) fn watch() -> Option<Watch> {
    std::env::var_os("NOTIFY_SOCKET")?;
    let watchdog = sd_notify::watchdog_enabled();
    // Twice in its time is what sd_watchdog_enabled(3) recommends; once more, so that one that comes late is no end.
    let every = watchdog.map_or(STATUS, |limit| (limit / 3).min(STATUS));
    let mut last = String::new();
    let tell_of = move |vitals: &Vitals| {
        let status = vitals.to_string();
        let mut states = Vec::new();
        if watchdog.is_some() {
            states.push(NotifyState::Watchdog);
        }
        if status != last {
            states.push(NotifyState::Status(&status));
        }
        tell(&states);
        last = status;
    };
    Some(Watch {
        every,
        tell: Box::new(tell_of),
    })
}

fn tell(states: &[NotifyState<'_>]) {
    if !states.is_empty()
        && let Err(error) = sd_notify::notify(states)
    {
        tracing::warn!("the service manager cannot be told: {error}");
    }
}
