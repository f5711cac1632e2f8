//! The run's worker processes: started, watched, ended.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use lifl_common::config::{JobSpec, Kind};
use lifl_common::id::JobId;
use lifl_common::session::TOKEN_VARIABLE;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::folder::RunFolder;
use super::gateway::Gateway;

/// How long workers have to leave when the job has ended.
const GRACE: Duration = Duration::from_secs(5);

/// The processes of a run, each played by this very program.
pub(super) struct Workers {
    processes: JoinSet<(usize, std::io::Result<ExitStatus>)>,
    pids: HashMap<usize, u32>,
    kill: CancellationToken,
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
        start: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let trainers = job
            .workers
            .iter()
            .filter(|worker| worker.kind == Kind::Trainer)
            .count();
        // Trainers work all at once: between them they get each core about once.
        let trainer_threads = (cores / trainers.max(1)).max(1).to_string();
        let mut workers = Self {
            processes: JoinSet::new(),
            pids: HashMap::new(),
            kill: CancellationToken::new(),
        };
        for (index, spec) in job.workers.iter().enumerate() {
            let log = folder.log(&spec.name);
            // A run that goes on adds to what was said before.
            let opened = File::options().create(true).append(true).open(&log);
            let log = opened.with_context(|| format!("cannot make {}", log.display()))?;
            let mut command = Command::new(&program);
            command
                .arg("worker")
                .arg("--socket")
                .arg(socket)
                .arg("--job")
                .arg(job_id.0.to_string());
            command
                .arg("--run")
                .arg(folder.path())
                .arg("--name")
                .arg(&spec.name);
            if let Some(checkpoint) = start.filter(|_| spec.kind == Kind::Top) {
                command.arg("--start").arg(checkpoint);
            }
            if let Some((address, token)) = gateway.access(spec) {
                command.arg("--gateway").arg(address);
                command.env(TOKEN_VARIABLE, token.to_hex());
            }
            if spec.kind == Kind::Trainer {
                command.env("RAYON_NUM_THREADS", &trainer_threads);
            }
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
            // Out of the terminal's process group: Ctrl-C is for the coordinator, which ends the job in order.
            command.process_group(0).kill_on_drop(true);
            let child = command
                .spawn()
                .with_context(|| format!("cannot start {}", spec.name))?;
            workers.watch(index, child);
        }
        Ok(workers)
    }

    fn watch(&mut self, index: usize, mut child: Child) {
        self.pids.insert(index, child.id().unwrap_or(0));
        let kill = self.kill.clone();
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
                    self.pids.remove(&index);
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
        self.pids.values().copied()
    }

    /// Waits until all have left, which the job's end tells them to; kills those that do not. Says how many.
    pub(super) async fn end(mut self) -> usize {
        let all_left = async { while self.processes.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, all_left).await.is_ok() {
            return 0;
        }
        let left = self.processes.len();
        self.kill.cancel();
        while self.processes.join_next().await.is_some() {}
        left
    }
}
