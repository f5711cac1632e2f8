//! Runs as others than themselves see them: whether one works in a folder, by which process, and how it has ended.
//!
//! ```text
//!   nobody has the folder's lock ──────────────▶ ended; how, its last event says, or nobody: it was killed
//!   somebody has ── the lock names a process, which has the lock's file open ──▶ lives, and can be stopped
//! ```
//!
//! A process's number alone proves nothing, since numbers come round: a signal goes to a descriptor of the process
//! ([`Coordinator`]) that was looked at after that was had.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::coordinate::report::METRICS;
use crate::coordinate::{JOB, LOCK};
use crate::dir::{Dir, Trust};
use crate::exit::{Because, Cause, Failure, Outcome};

/// Where runs lie that were given no folder.
const RUNS: &str = "runs";

/// What stands for the run that began last of those in that folder.
pub(crate) const LATEST: &str = "latest";

/// How much of the end of a run's events its last one is looked for in.
const LAST_EVENT_BYTES: u64 = 1 << 20;

/// How long a run may take to write down its process after it has taken the lock.
const WRITING_DOWN: Duration = Duration::from_secs(1);

/// How often it is looked whether something has changed.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A run's folder.
#[derive(Debug)]
pub(crate) struct RunAt {
    dir: Dir,
}

/// The process of a run.
#[derive(Debug)]
pub(crate) struct Coordinator {
    pub(crate) pid: u32,
    pidfd: OwnedFd,
}

impl RunAt {
    /// The run in that folder, or the latest in `runs`.
    ///
    /// # Errors
    /// If there is none, or it is another user's.
    pub(crate) fn find(named: Option<&Path>) -> Outcome<Self> {
        match named.filter(|path| *path != Path::new(LATEST)) {
            Some(path) => Self::open(path).because(Cause::Config),
            None => {
                let all = all().because(Cause::Config)?;
                let latest = all.into_iter().max_by_key(|(began, _)| *began);
                let (_, run) = latest.ok_or_else(none)?;
                Ok(run)
            }
        }
    }

    /// The one that is meant where none is named: the only one in `runs` that lives, or, if none does, the latest.
    ///
    /// # Errors
    /// If several live, or there is none at all.
    pub(crate) fn only() -> Outcome<Self> {
        let mut living = Vec::new();
        for (_, run) in all().because(Cause::Config)? {
            if run.is_live().because(Cause::Config)? {
                living.push(run);
            }
        }
        if living.len() > 1 {
            let names: Vec<_> = living
                .iter()
                .map(|run| run.path().display().to_string())
                .collect();
            let error = anyhow!("several runs are under way, name one: {}", names.join(", "));
            return Err(Failure::new(Cause::Config, error));
        }
        match living.pop() {
            Some(run) => Ok(run),
            None => Self::find(None),
        }
    }

    fn open(path: &Path) -> anyhow::Result<Self> {
        // Root may look at everybody's, and follows none of their links in doing so.
        let owner = fs::metadata(path).map(|found| found.uid()).ok();
        let root = nix::unistd::geteuid().is_root();
        let trust = Trust::new(owner.filter(|_| root).as_slice());
        let dir = trust.open(path)?;
        if dir.length(JOB).is_none() || dir.length(LOCK).is_none() {
            bail!(
                "{} is not the folder of a run: give the one that the run named as \"run folder\"",
                dir.path().display()
            );
        }
        Ok(Self { dir })
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The folder itself.
    pub(crate) fn dir(&self) -> &Dir {
        &self.dir
    }

    fn lock(&self) -> anyhow::Result<File> {
        let lock = self.dir.open(LOCK);
        lock.with_context(|| format!("cannot open {}", self.path().join(LOCK).display()))
    }

    /// Whether a run works in it.
    ///
    /// # Errors
    /// If that cannot be found out.
    pub(crate) fn is_live(&self) -> anyhow::Result<bool> {
        match Flock::lock(self.lock()?, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(false),
            Err((_, Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("cannot look at {}", self.path().join(LOCK).display()))
            }
        }
    }

    /// The process that works in it; `None` if none does.
    ///
    /// # Errors
    /// If one does and cannot be found: it is on another machine or in another container, or the file was changed.
    pub(crate) fn coordinator(&self) -> anyhow::Result<Option<Coordinator>> {
        let begun = Instant::now();
        loop {
            if !self.is_live()? {
                return Ok(None);
            }
            let mut lock = self.lock()?;
            let mut text = String::new();
            let _ = (&mut lock).take(20).read_to_string(&mut text);
            let named = text.trim().parse::<i32>().ok().filter(|pid| *pid > 0);
            let found = named.map(|pid| Coordinator::with_open(pid, &lock)).transpose()?;
            if let Some(coordinator) = found.flatten() {
                return Ok(Some(coordinator));
            }
            if begun.elapsed() > WRITING_DOWN {
                bail!(
                    "a run works in {}, but process {:?}, which its lock names, is not it: it runs on another machine or in \
                     another container, stop it there",
                    self.path().display(),
                    text.trim()
                );
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Its last event, if it has written a whole one.
    pub(crate) fn last_event(&self) -> Option<Value> {
        let text = self.dir.tail(METRICS, LAST_EVENT_BYTES).ok()?;
        let text = String::from_utf8_lossy(&text);
        let whole = &text[..=text.rfind('\n')?];
        serde_json::from_str(whole.lines().last()?).ok()
    }

    /// How it has ended, if its last event says so.
    pub(crate) fn ending(&self) -> Option<Ending> {
        Ending::of(&self.last_event()?)
    }
}

/// How a run has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) exit_code: u8,
    pub(crate) error: Option<String>,
}

impl Ending {
    fn of(event: &Value) -> Option<Self> {
        match event["event"].as_str()? {
            "job_finished" => Some(Self {
                exit_code: 0,
                error: None,
            }),
            "job_failed" => Some(Self {
                exit_code: event["exit_code"].as_u64()?.try_into().ok()?,
                error: Some(event["error"].as_str()?.to_owned()),
            }),
            _ => None,
        }
    }
}

/// The runs in `runs`, with when each began.
fn all() -> anyhow::Result<Vec<(std::time::SystemTime, RunAt)>> {
    let entries = match fs::read_dir(RUNS) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("cannot read the folder runs"),
    };
    let paths = entries.flatten().map(|entry| entry.path());
    // What is no run's folder, or another user's, is not meant.
    let runs = paths.filter_map(|path: PathBuf| RunAt::open(&path).ok());
    let with_time = runs.filter_map(|run| {
        // Whoever takes the lock writes to it.
        let began = run.lock().ok()?.metadata().ok()?.modified().ok()?;
        Some((began, run))
    });
    Ok(with_time.collect())
}

fn none() -> Failure {
    let error = anyhow!("there is no run of yours in the folder runs here: give the run's folder");
    Failure::new(Cause::Config, error)
}

impl Coordinator {
    /// That process, if it has that file open.
    fn with_open(pid: i32, file: &File) -> anyhow::Result<Option<Self>> {
        let Some(pidfd) = pidfd_open(pid)? else {
            return Ok(None);
        };
        let coordinator = Self {
            pid: pid.unsigned_abs(),
            pidfd,
        };
        let wanted = file.metadata()?;
        let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("process {pid} is said to work there and cannot be looked at"));
            }
        };
        let is_it = |path: PathBuf| {
            fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
        };
        let has_it = entries.flatten().any(|entry| is_it(entry.path()));
        // Alive still, so what was looked at was this process and none that has its number since.
        Ok((has_it && !coordinator.has_ended(Duration::ZERO)).then_some(coordinator))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If this user may not. That it has ended is none.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, the others are numbers and a null pointer, which is allowed.
        let status = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal as libc::c_int,
                no_info,
                0,
            )
        };
        match Errno::result(status) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno).with_context(|| format!("cannot send {signal} to process {}", self.pid)),
        }
    }

    /// Waits for its end. Says whether it has come.
    pub(crate) fn has_ended(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut polled = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, timeout) {
                Ok(0) | Err(Errno::EINTR) if left.is_zero() => return false,
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return true,
                Err(_) => return false,
            }
        }
    }
}

/// A descriptor of a process; `None` if there is no such process.
fn pidfd_open(pid: i32) -> anyhow::Result<Option<OwnedFd>> {
    // SAFETY: two numbers, and no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match Errno::result(fd) {
        Ok(fd) => {
            let fd = i32::try_from(fd).context("pidfd_open")?;
            // SAFETY: the call has just made this descriptor, and nobody else knows it.
            Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        }
        // No such process, or the number of a thread that is none.
        Err(Errno::ESRCH | Errno::EINVAL | Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("pidfd_open({pid})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_that_has_the_file_open_is_taken_for_the_run() {
        let file = tempfile::tempfile().expect("a file");
        let me = std::process::id() as i32;
        let found = Coordinator::with_open(me, &file)
            .expect("looked at")
            .expect("this one");
        assert_eq!(found.pid, std::process::id());
        assert!(!found.has_ended(Duration::ZERO));
        // Another process that lives, and a number that none has.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("started");
        let pid = child.id() as i32;
        assert!(Coordinator::with_open(pid, &file).expect("looked at").is_none());
        let it = pidfd_open(pid).expect("opened").expect("lives");
        let it = Coordinator {
            pid: pid.unsigned_abs(),
            pidfd: it,
        };
        it.signal(Signal::SIGKILL).expect("its own child");
        assert!(it.has_ended(Duration::from_secs(30)));
        child.wait().expect("a child");
        it.signal(Signal::SIGKILL)
            .expect("it has ended, which is no error");
        assert!(pidfd_open(pid).expect("looked for").is_none());
    }

    #[test]
    fn the_last_event_says_how_a_run_has_ended() {
        let ending = |text| Ending::of(&serde_json::from_str(text).expect("JSON"));
        let failed = ending(r#"{"event":"job_failed","exit_code":130,"error":"interrupted"}"#);
        assert_eq!(failed.expect("an end").exit_code, 130);
        let finished = ending(r#"{"event":"job_finished","rounds":3}"#);
        assert_eq!(finished.expect("an end").exit_code, 0);
        assert!(ending(r#"{"event":"round","round":3}"#).is_none());
    }
}
