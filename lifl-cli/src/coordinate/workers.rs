//! The run's worker processes: started, watched, ended.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::id::JobId;
use lifl_common::session::{SECRET_VARIABLE, Secret};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::folder::RunFolder;
use super::gateway::Gateway;
use crate::program;
use crate::task::Tasks;

/// How long workers have to leave when the job has ended.
const GRACE: Duration = Duration::from_secs(5);

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
    /// Trainers work all at once: between them they get each core about once.
    trainer_threads: String,
    processes: JoinSet<(usize, std::io::Result<ExitStatus>)>,
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
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let trainers = job.trainers().count();
        let mut workers = Self {
            socket: socket.to_owned(),
            job_id,
            folder: folder.clone(),
            specs: job.workers.clone(),
            access: job.workers.iter().map(|spec| gateway.access(spec)).collect(),
            insecure: gateway.is_insecure(),
            start,
            trainer_threads: (cores / trainers.max(1)).max(1).to_string(),
            processes: JoinSet::new(),
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
            command.env("RAYON_NUM_THREADS", &self.trainer_threads);
        }
        // The folder itself: whatever is at its path by now.
        command.stdin(run.context("the run's folder cannot be handed on")?);
        command.stdout(Stdio::null()).stderr(log);
        // Out of the terminal's process group: Ctrl-C is for the coordinator, which ends the job in order.
        command.process_group(0).kill_on_drop(true);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", spec.name))?;
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

    /// Waits for the next process to end, by its index; for ever when none is left. Cancel-safe.
    pub(super) async fn exited(&mut self) -> (usize, String) {
        loop {
            match self.processes.join_next().await {
                Some(Ok((index, status))) => {
                    self.running.remove(&index);
                    return (
                        index,
                        status.map_or_else(|error| error.to_string(), |status| status.to_string()),
                    );
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
