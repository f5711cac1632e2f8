//! The coordinator: finds a daemon, starts the workers, pairs children with parents, drives the rounds, ends the job.
//!
//! ```text
//!   find or start the daemon ─▶ check that everything fits ─▶ make the job, register ─▶ start the workers
//!     ─▶ all ready ─▶ round 1 … n ─▶ end the job ─▶ workers leave ─▶ own daemon stops
//! ```
//!
//! A round: each worker that takes part is told its children and its parent; the top lends the new model, which is
//! written out and evaluated while the next round runs.

mod deaths;
mod folder;
mod gateway;
pub mod node;
pub mod pairing;
mod peak;
pub mod report;
mod resume;
pub(crate) mod roster;
mod rounds;
mod watch;
mod workers;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use lifl_common::client::{Client, FrameSocket};
use lifl_common::config::JobSpec;
use lifl_common::id::{JobId, WorkerId};
use lifl_common::update::Schema;
use tokio_util::sync::CancellationToken;

use self::folder::RunFolder;
use self::gateway::Gateway;
use self::node::{Node, NodeOptions};
use self::report::{Level, Reporter, human_bytes};
pub use self::resume::Resumed;
use self::rounds::Rounds;
use self::workers::Workers;
use crate::base_model;
use crate::data::{self, DataError};
use crate::dir::Trust;
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::learn;
use crate::memory;

/// How to run a job.
#[derive(Debug)]
pub struct RunOptions {
    /// The daemon.
    pub node: NodeOptions,
    /// The run's folder.
    pub destination: Destination,
    /// Whose folders may be used for it.
    pub trust: Trust,
    /// A checkpoint every so many rounds, and of the last; 0 for the last model only.
    pub checkpoint_every: u32,
    /// How many checkpoints stay; all when not given.
    pub keep_checkpoints: Option<NonZeroU32>,
}

/// Where a run leaves what it leaves.
#[derive(Debug)]
pub enum Destination {
    /// In a new folder: this one, or one below the current one.
    New(Option<PathBuf>),
    /// In a run's that goes on.
    Resumed(Resumed),
}

/// The coordinator's own name and role.
const COORDINATOR: &str = "coordinator";

/// What a run works with once the job is made.
struct Run<'a> {
    job: &'a JobSpec,
    schema: Schema,
    folder: RunFolder,
    client: Client,
    job_id: JobId,
    frames: FrameSocket,
    id: WorkerId,
    started: Instant,
    /// The first round to run, from 1.
    first_round: u32,
    checkpoint_every: u32,
    keep_checkpoints: Option<NonZeroU32>,
}

/// Runs a job from its first to its last process.
///
/// # Errors
/// With the cause that decides the exit code; whatever was started is gone by then.
pub async fn run(
    job: &JobSpec,
    options: &RunOptions,
    reporter: &mut Reporter,
    shutdown: &CancellationToken,
) -> Outcome {
    let started = Instant::now();
    let schema = learn::schema(&job.model).because(Cause::Config)?;
    prepare_data(job, reporter, shutdown).await?;
    if !matches!(&options.destination, Destination::Resumed(resumed) if resumed.from.is_some()) {
        check_base_model(job, &schema, reporter, shutdown).await?;
    }
    let node = Node::find(&options.node).await?;
    let outcome = with_node(job, schema, options, &node, started, reporter, shutdown).await;
    reporter.end();
    // Only now, with all workers gone, the daemon may go.
    let stopped = node.stop().await.because(Cause::Job);
    outcome.and(stopped)
}

/// Makes sure that the data is there before anything starts.
async fn prepare_data(job: &JobSpec, reporter: &Reporter, shutdown: &CancellationToken) -> Outcome {
    let mut datasets = job.datasets();
    // Models are judged on its test samples, whether anybody trains on it or not.
    if let Some(data) = &job.data
        && !datasets.iter().any(|(known, _)| known == data)
    {
        datasets.push((data.clone(), 1));
    }
    for (data, trainers) in datasets {
        if data.dataset.starts_with("http") {
            reporter.say(&format!("dataset {}", data.dataset));
        }
        let prepared = tokio::task::spawn_blocking(move || data::prepare(&data, trainers));
        let prepared = tokio::select! {
            prepared = prepared => prepared.context("the data could not be looked at").because(Cause::Job)?,
            () = shutdown.cancelled() => return Err(interrupted()),
        };
        prepared.map_err(|error| {
            let no_network = matches!(error, DataError::Download { .. });
            Failure::new(if no_network { Cause::Machine } else { Cause::Config }, error)
        })?;
    }
    Ok(())
}

/// Makes sure that the model to start from is one, before anything starts.
async fn check_base_model(
    job: &JobSpec,
    schema: &Schema,
    reporter: &Reporter,
    shutdown: &CancellationToken,
) -> Outcome {
    let Some(path) = job.base_model.clone() else {
        return Ok(());
    };
    let schema = schema.clone();
    let checked = tokio::task::spawn_blocking(move || base_model::check(&path, &schema));
    let checked = tokio::select! {
        checked = checked => checked.context("the base model could not be looked at").because(Cause::Job)?,
        () = shutdown.cancelled() => return Err(interrupted()),
    };
    checked.map_err(|error| {
        reporter.problem(&error.event());
        Failure::new(Cause::Config, error)
    })
}

async fn with_node(
    job: &JobSpec,
    schema: Schema,
    options: &RunOptions,
    node: &Node,
    started: Instant,
    reporter: &mut Reporter,
    shutdown: &CancellationToken,
) -> Outcome {
    check_room(job, &schema, node)?;
    let (folder, from) = match &options.destination {
        Destination::New(out) => {
            let folder = RunFolder::create(out.as_deref(), job, &options.trust).because(Cause::Config)?;
            reporter.keep_metrics(folder.dir()).because(Cause::Config)?;
            (folder, None)
        }
        Destination::Resumed(resumed) => {
            let folder = resumed.folder.clone();
            reporter.keep_metrics(folder.dir()).because(Cause::Config)?;
            reporter.event(&resumed.event()).because(Cause::Job)?;
            (folder, resumed.from)
        }
    };
    if let Some(note) = &node.passed_over {
        reporter.say(note);
    }
    let mut client = Client::connect(&node.socket).await.because(Cause::Machine)?;
    let job_id = client.create_job(&job.name).await.because(Cause::Machine)?;
    let registration = client
        .register(job_id, COORDINATOR, COORDINATOR)
        .await
        .because(Cause::Machine)?;
    let gateway = Gateway::open(job, &schema, &mut client).await?;
    let workers = Workers::start(job, job_id, &node.socket, &folder, &gateway, from).because(Cause::Job)?;
    let mut run = Run {
        job,
        schema,
        folder,
        client,
        job_id,
        frames: registration.frames,
        id: registration.worker,
        started,
        first_round: from.map_or(1, |round| round + 1),
        checkpoint_every: options.checkpoint_every,
        keep_checkpoints: options.keep_checkpoints,
    };
    let (outcome, workers) = drive(&mut run, workers, node, reporter, shutdown).await;
    let reason = match &outcome {
        Ok(()) => "finished".to_owned(),
        Err(failure) => format!("{:#}", failure.error),
    };
    if let Err(error) = run.client.end_job(&reason).await {
        // Its connection closes all the same, which ends the job too.
        tracing::debug!("the daemon could not be told of the job's end: {error}");
    }
    let killed = workers.end().await;
    if killed > 0 {
        reporter.say(&format!("{killed} workers did not leave and were killed"));
    }
    outcome
}

/// All that can take time, under the deadline and the shutdown.
async fn drive(
    run: &mut Run<'_>,
    workers: Workers,
    node: &Node,
    reporter: &mut Reporter,
    shutdown: &CancellationToken,
) -> (Outcome, Workers) {
    let limit = Duration::from_secs(run.job.max_run_time_s);
    let deadline = tokio::time::Instant::from_std(run.started) + limit;
    let mut rounds = Rounds::new(run, workers, reporter);
    let outcome = tokio::select! {
        outcome = rounds.all(node) => outcome,
        () = shutdown.cancelled() => Err(interrupted()),
        () = tokio::time::sleep_until(deadline) => {
            let error = anyhow!("the job ran past maxRunTime ({} s): raise it in the job file", limit.as_secs());
            Err(Failure::new(Cause::Timeout, error))
        }
    };
    (outcome, rounds.into_workers())
}

fn interrupted() -> Failure {
    Failure::new(Cause::Interrupted, anyhow!("interrupted"))
}

/// Refuses a job that the daemon has no room for, before anything starts.
fn check_room(job: &JobSpec, schema: &Schema, node: &Node) -> Outcome {
    let daemon = node.client.welcome();
    let machine = |error| Err(Failure::new(Cause::Machine, error));
    let plan = memory::Plan::new(job, schema, daemon.huge_pages);
    let free = daemon.pool_bytes.saturating_sub(daemon.pool_used_bytes);
    if plan.pool_bytes > free {
        let how = if node.is_own() {
            "pass a larger --pool-mib"
        } else {
            "start lifl-daemon with a larger --pool-mib"
        };
        return machine(anyhow!(
            "the job's arenas need {}, the pool has {} left of {}: {how}, use fewer workers or a smaller model \
             (`lifl plan` shows the sum)",
            human_bytes(plan.pool_bytes),
            human_bytes(free),
            human_bytes(daemon.pool_bytes),
        ));
    }
    let (needed, taken) = (memory::registrations(job), daemon.workers);
    if needed > daemon.max_workers.saturating_sub(taken) {
        return machine(anyhow!(
            "the job has {needed} workers with its coordinator and proxies, the daemon takes {} and has {taken}: start it with a \
             larger --max-workers",
            daemon.max_workers,
        ));
    }
    Ok(())
}

/// The workers by role, from the top down.
pub fn levels(job: &JobSpec) -> Vec<Level> {
    let mut levels: Vec<Level> = Vec::new();
    for worker in &job.workers {
        match levels.iter_mut().find(|level| level.role == worker.role) {
            Some(level) => level.workers += 1,
            None => levels.push(Level {
                role: worker.role.clone(),
                workers: 1,
            }),
        }
    }
    levels
}
