//! The run's worker processes: started, watched, ended.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::id::JobId;
use lifl_common::limits;
use lifl_common::session::{SECRET_VARIABLE, Secret};
use nix::sys::signal::Signal;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::folder::RunFolder;
use super::gateway::Gateway;
use crate::program;
use crate::requirements;
use crate::task::Tasks;

/// How long workers have to leave when the job has ended.
const GRACE: Duration = Duration::from_secs(5);

/// The exit status of a Rust program that has panicked.
const PANICKED: i32 = 101;

/// The processes of a run, each played by this very program.
pub(super) struct Workers {
    socket: PathBuf,
    job_id: JobId,
    folder: RunFolder,
    specs: Vec<WorkerSpec>,
    /// How each gets in that comes through the gateway.
    access: Vec<Option<(String, Secret)>>,
    /// Whether the way there may lead unencrypted beyond private networks.
    insecure: bool,
    /// The round of the checkpoint that the top begins from.
    start: Option<u32>,
    /// Threads that each trainer computes on.
    trainer_threads: String,
    processes: JoinSet<(usize, std::io::Result<ExitStatus>)>,
    oom: OomKills,
    /// By worker: the process, and what kills it.
    running: HashMap<usize, (u32, CancellationToken)>,
}

impl Workers {
    /// Starts them all, the top from that checkpoint if there is one; each logs into the run's folder.
    ///
    /// # Errors
    /// If a process cannot be started; those that were are killed.
    pub(super) fn start(
        job: &JobSpec,
        job_id: JobId,
        socket: &Path,
        folder: &RunFolder,
        gateway: &Gateway,
        start: Option<u32>,
    ) -> anyhow::Result<Self> {
        let mut workers = Self {
            socket: socket.to_owned(),
            job_id,
            folder: folder.clone(),
            specs: job.workers.clone(),
            access: job.workers.iter().map(|spec| gateway.access(spec)).collect(),
            insecure: gateway.is_insecure(),
            start,
            trainer_threads: requirements::trainer_threads(job, limits::cpus()).to_string(),
            processes: JoinSet::new(),
            oom: OomKills::so_far(),
            running: HashMap::new(),
        };
        Tasks::of(job).write_into(folder.dir())?;
        for index in 0..workers.specs.len() {
            workers.start_one(index)?;
        }
        Ok(workers)
    }

    /// Starts one, which must not run already.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(super) fn start_one(&mut self, index: usize) -> anyhow::Result<()> {
        let spec = &self.specs[index];
        // Without a log, as where the disk has no room for one, it is of use all the same.
        let log = self.folder.open_log(&spec.name).map_or_else(
            |error| {
                tracing::warn!("{} has no log: {error:#}", spec.name);
                Stdio::null()
            },
            Stdio::from,
        );
        let run = self.folder.dir().descriptor();
        let mut command = Command::from(program::command()?);
        command
            .arg("worker")
            .arg("--socket")
            .arg(&self.socket)
            .arg("--job")
            .arg(self.job_id.0.to_string());
        command
            .arg("--blocking")
            .arg(requirements::blocking(spec).to_string());
        command
            .arg("--run")
            .arg(self.folder.dir().path())
            .arg("--name")
            .arg(&spec.name);
        if let Some(round) = self.start.filter(|_| spec.kind == Kind::Top) {
            command.arg("--start").arg(round.to_string());
        }
        if let Some((address, secret)) = &self.access[index] {
            command.arg("--gateway").arg(address);
            if self.insecure {
                command.arg("--insecure");
            }
            // Others can read a command line, and nobody else's an environment.
            command.env(SECRET_VARIABLE, secret.to_text());
        }
        if spec.kind == Kind::Trainer {
            command.env(lifl_learn::threads::VARIABLE, &self.trainer_threads);
        }
        // The folder itself: whatever is at its path by now.
        command.stdin(run.context("the run's folder cannot be handed on")?);
        command.stdout(Stdio::null()).stderr(log);
        // Out of the terminal's process group: Ctrl-C is for the coordinator, which ends the job in order.
        command.process_group(0).kill_on_drop(true);
        let child = command.spawn().map_err(|error| {
            let limit = limits::explain_refusal(&error);
            let limit = limit.map_or_else(String::new, |limit| format!(": {limit}"));
            anyhow::Error::new(error).context(format!("cannot start {}{limit}", spec.name))
        })?;
        self.watch(index, child);
        Ok(())
    }

    fn watch(&mut self, index: usize, mut child: Child) {
        let kill = CancellationToken::new();
        self.running
            .insert(index, (child.id().unwrap_or(0), kill.clone()));
        self.processes.spawn(async move {
            let status = tokio::select! {
                status = child.wait() => status,
                () = kill.cancelled() => match child.kill().await {
                    Ok(()) => child.wait().await,
                    Err(error) => Err(error),
                },
            };
            (index, status)
        });
    }

    /// Waits for the next process to end: its index, and what its end was; for ever when none is left. Cancel-safe.
    pub(super) async fn exited(&mut self) -> (usize, Exit) {
        loop {
            match self.processes.join_next().await {
                Some(Ok((index, status))) => {
                    let by_us = self
                        .running
                        .remove(&index)
                        .is_some_and(|(_, kill)| kill.is_cancelled());
                    let code = status.as_ref().ok().and_then(ExitStatus::code);
                    let how = match status {
                        Ok(status) if by_us && status.signal() == Some(Signal::SIGKILL as i32) => None,
                        Ok(status) => Some(explain(status) + self.oom.explain(status, &OomKills::so_far())),
                        Err(error) => Some(error.to_string()),
                    };
                    return (index, Exit { how, code });
                }
                Some(Err(error)) => tracing::error!("a process's watcher failed: {error}"),
                None => std::future::pending().await,
            }
        }
    }

    /// The processes that run.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> {
        self.running.values().map(|(pid, _)| *pid)
    }

    /// Has the next top begin from that round's checkpoint.
    pub(super) fn begin_from(&mut self, round: u32) {
        self.start = Some(round);
    }

    /// Kills one, if it runs; that it has ended is told as of any other.
    pub(super) fn kill(&self, index: usize) {
        if let Some((_, kill)) = self.running.get(&index) {
            kill.cancel();
        }
    }

    /// Waits until all have left, which the job's end tells them to; kills those that do not. Says how many.
    pub(super) async fn end(mut self) -> usize {
        let all_left = async { while self.processes.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, all_left).await.is_ok() {
            return 0;
        }
        let left = self.processes.len();
        for (_, kill) in self.running.values() {
            kill.cancel();
        }
        while self.processes.join_next().await.is_some() {}
        left
    }
}

/// A process's end.
pub(super) struct Exit {
    /// In words; `None` if it was [killed](Workers::kill).
    pub(super) how: Option<String>,
    /// Its exit code, if it has left by itself.
    pub(super) code: Option<i32>,
}

/// What the end of a process was.
fn explain(status: ExitStatus) -> String {
    let Some(number) = status.signal() else {
        return match status.code() {
            Some(0) => "it left by itself, exit status 0".to_owned(),
            Some(PANICKED) => format!("it panicked, exit status {PANICKED}"),
            _ => status.to_string(),
        };
    };
    let signal = match Signal::try_from(number) {
        Ok(signal) => signal.as_str().to_owned(),
        Err(_) => format!("signal {number}"),
    };
    let core = if status.core_dumped() { ", core dumped" } else { "" };
    format!("it was killed by {signal}{core}")
}

/// How often the kernel has killed for lack of memory: in this process's control group, and on the machine.
struct OomKills {
    group: u64,
    machine: u64,
}

impl OomKills {
    fn so_far() -> Self {
        Self {
            group: limits::oom_kills().unwrap_or(0),
            machine: on_machine(),
        }
    }

    /// Whether a process that has ended so was one of them, as far as can be told by the counts as they are now.
    fn explain(&mut self, status: ExitStatus, now: &Self) -> &'static str {
        if status.signal() != Some(Signal::SIGKILL as i32) {
            return "";
        }
        // One at a time: others who were killed with it are told of next.
        if now.group > self.group {
            self.group += 1;
            self.machine = now.machine.min(self.machine + 1);
            return ": out of memory, the kernel took it (`lifl plan` says what a job takes; see the limit of its cgroup)";
        }
        if now.machine > self.machine {
            self.machine += 1;
            return ": out of memory as it seems, the kernel has just killed a process of this machine for that";
        }
        ""
    }
}

/// The kernel's count for the whole machine.
fn on_machine() -> u64 {
    let counts = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let count = counts.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(raw: i32) -> String {
        explain(ExitStatus::from_raw(raw))
    }

    #[test]
    fn ends_are_told_by_name() {
        assert_eq!(ended(9), "it was killed by SIGKILL");
        assert_eq!(ended(11 | 0x80), "it was killed by SIGSEGV, core dumped");
        assert_eq!(ended(64), "it was killed by signal 64");
        assert_eq!(ended(101 << 8), "it panicked, exit status 101");
        assert_eq!(ended(0), "it left by itself, exit status 0");
        assert_eq!(ended(4 << 8), "exit status: 4");
    }

    #[test]
    fn a_kill_is_for_lack_of_memory_if_the_kernel_has_counted_one() {
        let (killed, crashed) = (ExitStatus::from_raw(9), ExitStatus::from_raw(11));
        let mut kills = OomKills { group: 5, machine: 8 };
        let now = OomKills {
            group: 7,
            machine: 11,
        };
        assert_eq!(kills.explain(crashed, &now), "");
        let mut said = || kills.explain(killed, &now);
        assert!(
            [said(), said()]
                .iter()
                .all(|said| said.starts_with(": out of memory, the kernel"))
        );
        assert!(said().starts_with(": out of memory as it seems"));
        assert_eq!(said(), "", "each counts once");
    }
}
