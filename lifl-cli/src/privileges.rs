//! What `lifl run` of root gives up before it opens a port or starts a worker.
//!
//! Root's rights are for loading the plane and making the run's folder. What serves others and what trains keeps root's uid,
//! since files may be root's, but no capability, gets none by executing anything, and makes only the system calls that the
//! daemon's unit allows. As in `lifl-daemon` the main thread has the rights longest, and all other threads give theirs up
//! when they begin. Workers inherit what is left.
//!
//! Where that does not do, one capability stays: `CAP_DAC_READ_SEARCH` if there is data that root can read by it only (of a
//! user who called sudo, say), `CAP_DAC_OVERRIDE` if a run goes on in a folder of a user whom root trusts.

use std::path::Path;

use lifl_common::config::{Dataset, JobSpec};
use lifl_daemon::plane::support;
use lifl_daemon::privileges::{keep_only, no_more, restrict_system_calls, running};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::geteuid;

use lifl_learn::data;

/// The capabilities' bits (`include/uapi/linux/capability.h`).
const CAP_DAC_OVERRIDE: u64 = 1 << 1;
const CAP_DAC_READ_SEARCH: u64 = 1 << 2;

/// What this process keeps while a job runs.
#[derive(Clone, Copy, Debug)]
pub struct Privileges {
    /// A bit for each capability; `None` where there is nothing to give up.
    kept: Option<u64>,
}

impl Privileges {
    /// What that job takes, in a run's folder of that user if it goes on. From here on, nothing that this process executes
    /// gets more than it has.
    pub fn of(job: &JobSpec, folder_of: Option<u32>) -> Self {
        let privileged = geteuid().is_root() || support::effective_capabilities() != 0;
        if !privileged {
            return Self { kept: None };
        }
        if let Err(errno) = no_more() {
            tracing::warn!("prctl(PR_SET_NO_NEW_PRIVS): {errno}");
        }
        let mut kept = running(false);
        if only_by_capability(job) {
            kept |= CAP_DAC_READ_SEARCH;
        }
        if folder_of.is_some_and(|owner| owner != geteuid().as_raw()) {
            kept |= CAP_DAC_OVERRIDE;
        }
        Self { kept: Some(kept) }
    }

    /// Gives up the calling thread's capabilities but those that stay.
    pub fn give_up(self) {
        if let Some(kept) = self.kept
            && let Err(error) = keep_only(kept)
        {
            tracing::error!("capabilities that are not needed cannot be given up: {error}");
        }
    }

    /// As [`give_up`](Self::give_up), and restricts the system calls of the whole process; for the main thread, when all is
    /// done that takes rights.
    pub fn give_up_last(self) {
        self.give_up();
        if self.kept.is_some()
            && let Err(error) = restrict_system_calls(false)
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "system calls that are not needed stay open");
        }
    }
}

/// Whether there is a file of the job's data that this process can read, but not without capabilities.
fn only_by_capability(job: &JobSpec) -> bool {
    let own = job.data.iter().map(|data| &data.dataset);
    let datasets = job.workers.iter().filter_map(|worker| worker.dataset.as_ref());
    let datasets: Vec<&Path> = own
        .chain(datasets)
        .map(Dataset::reveal)
        .filter(|dataset| data::is_path(dataset))
        .map(Path::new)
        .chain(job.base_model.as_deref())
        .collect();
    let denied: Vec<bool> = std::thread::scope(|scope| {
        let tried = std::thread::Builder::new().spawn_scoped(scope, || {
            let given_up = keep_only(0).is_ok();
            datasets.iter().map(|path| given_up && is_denied(path)).collect()
        });
        // Where there can be no thread there is no run either.
        let Ok(tried) = tried else { return Vec::new() };
        tried.join().unwrap_or_default()
    });
    let denied = datasets.iter().zip(denied).filter(|(_, denied)| *denied);
    denied.into_iter().any(|(path, _)| !is_denied(path))
}

/// Whether the calling thread has not the right to read a file, or one that is in that folder.
fn is_denied(path: &Path) -> bool {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let denied = |path: &Path| open(path, flags, Mode::empty()).err() == Some(Errno::EACCES);
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    denied(path) || entries.map(|entry| entry.path()).any(|entry| denied(&entry))
}
