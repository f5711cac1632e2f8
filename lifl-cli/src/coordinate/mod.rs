//! The coordinator's process: finds a daemon, starts the workers, does what the [coordinator](lifl_worker::coordinator) decides,
//! ends the job.
//!
//! ```text
//!   find or start the daemon ─▶ check that everything fits ─▶ make the job, register ─▶ start the workers
//!     ─▶ drive the coordinator to its end ─▶ end the job ─▶ workers leave ─▶ own daemon stops
//! ```

pub mod daemon;
mod driver;
mod folder;
mod gateway;
mod memory_peak;
mod models;
pub mod report;
mod resume;
mod running_clock;
mod workers;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use lifl_common::client::{Client, FrameSocket};
use lifl_common::config::{Dataset, JobSpec, SampleShape};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::update::Schema;
use tokio_util::sync::CancellationToken;

use self::daemon::{Node, NodeOptions};
use self::driver::Driver;
use self::folder::RunFolder;
pub(crate) use self::folder::{JOB, LOCK};
use self::gateway::Gateway;
use self::report::{Level, Reporter, human_bytes};
pub use self::resume::Resumed;
use self::workers::Workers;
use crate::base_model;
use crate::dir::Trust;
use crate::exit::{Because, Cause, Failure, Outcome, cause_of};
use crate::inputs;
use crate::memory;
use crate::privileges::Privileges;
use crate::requirements;
use lifl_learn::data::{self, Progress};

/// How to run a job.
#[derive(Debug)]
pub struct RunOptions {
    /// The daemon.
    pub node: NodeOptions,
    /// The run's folder.
    pub destination: Destination,
    /// Whose folders may be used for it.
    pub trust: Trust,
    /// What this process keeps of root's rights once the plane is loaded and the folder is there.
    pub privileges: Privileges,
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
    inputs::check_transports(job)?;
    gateway::check_reach(job, options.node.insecure, reporter).await?;
    let samples = in_time(job, started, shutdown, prepare_data(job, reporter)).await;
    // A download that was given up leaves its bar.
    reporter.end();
    let samples = samples?;
    let job = &match &options.destination {
        // As it was when the run began, though its data may have changed since.
        Destination::Resumed(_)
            if job.samples.same_image(&samples) && samples.classes <= job.samples.classes =>
        {
            job.clone()
        }
        Destination::Resumed(_) => {
            let error = anyhow!(
                "the data set has images of {samples} pixels and {} classes now, it had {} and {} when the run began: put it back as \
                 it was",
                samples.classes,
                job.samples,
                job.samples.classes
            );
            return Err(Failure::new(Cause::Config, error));
        }
        Destination::New(_) => JobSpec {
            samples,
            ..job.clone()
        },
    };
    let schema = lifl_learn::schema(job).because(Cause::Config)?;
    if !matches!(&options.destination, Destination::Resumed(resumed) if resumed.from.is_some()) {
        in_time(job, started, shutdown, check_base_model(job, &schema, reporter)).await?;
    }
    let node = Node::find(&options.node).await?;
    let outcome = with_node(job, schema, options, &node, started, reporter, shutdown).await;
    reporter.end();
    // Only now, with all workers gone, the daemon may go.
    let stopped = node.stop().await.because(Cause::Job);
    outcome.and(stopped)
}

/// Makes sure that the data is there before anything starts. Gives what the job's networks take in and give out.
async fn prepare_data(job: &JobSpec, reporter: &mut Reporter) -> Outcome<SampleShape> {
    let mut found = Vec::new();
    for (source, trainers) in inputs::sources(job) {
        if data::is_url(&source.dataset) {
            reporter.say(&format!("dataset {}", source.dataset));
        }
        let progress = Arc::new(Progress::default());
        let (data, watched) = (source.clone(), Arc::clone(&progress));
        let mut prepared = tokio::task::spawn_blocking(move || data::prepare(&data, trainers, &watched));
        let mut shown = Shown::default();
        let mut ticks = tokio::time::interval(TICK);
        let prepared = loop {
            tokio::select! {
                prepared = &mut prepared => break prepared,
                _ = ticks.tick() => shown.show(&source.dataset, &progress, reporter),
            }
        };
        shown.show(&source.dataset, &progress, reporter);
        reporter.end();
        let prepared = prepared
            .context("the data could not be looked at")
            .because(Cause::Job)?
            .map_err(|error| {
                reporter.problem(&inputs::event("dataset", source.dataset.as_str(), &error));
                inputs::data_failure(error)
            })?;
        found.push((source, prepared.shape));
    }
    inputs::shape(job, &found)
}

/// How often a download's progress is looked at.
const TICK: Duration = Duration::from_millis(250);

/// How often it is told where there is no terminal.
const TOLD_EVERY: Duration = Duration::from_secs(10);

/// What has been shown of a download.
#[derive(Default)]
struct Shown {
    bar: bool,
    waiting: bool,
    told: Option<Instant>,
}

impl Shown {
    fn show(&mut self, dataset: &Dataset, progress: &Progress, reporter: &mut Reporter) {
        for note in progress.notes() {
            reporter.say(&note);
        }
        if progress.is_waiting() && !self.waiting {
            reporter.say(&format!("another lifl downloads {dataset}: waiting for it"));
            self.waiting = true;
        }
        let Some((received, total)) = progress.downloaded() else {
            return;
        };
        if !self.bar {
            reporter.begin("download", total.unwrap_or(0));
            self.bar = true;
        }
        let of = total.map_or_else(String::new, |total| format!(" of {}", human_bytes(total)));
        let text = format!("{}{of}", human_bytes(received));
        reporter.position(received, text.clone());
        let told = self.told.get_or_insert_with(Instant::now);
        if told.elapsed() >= TOLD_EVERY && !reporter.has_bar() {
            reporter.say(&format!("dataset {dataset}: {text}"));
            *told = Instant::now();
        }
    }
}

/// Makes sure that the model to start from is one, before anything starts.
async fn check_base_model(job: &JobSpec, schema: &Schema, reporter: &Reporter) -> Outcome {
    let Some(path) = job.base_model.clone() else {
        return Ok(());
    };
    let schema = schema.clone();
    let checked = tokio::task::spawn_blocking(move || base_model::check(&path, &schema)).await;
    let checked = checked
        .context("the base model could not be looked at")
        .because(Cause::Job)?;
    checked.map_err(|error| {
        reporter.problem(&error.event());
        Failure::new(Cause::Config, error)
    })
}

/// Does it, unless the job's time is up first, or somebody stops it.
async fn in_time<T>(
    job: &JobSpec,
    started: Instant,
    shutdown: &CancellationToken,
    work: impl Future<Output = Outcome<T>>,
) -> Outcome<T> {
    let limit = Duration::from_secs(job.max_run_time_s);
    tokio::select! {
        outcome = work => outcome,
        () = shutdown.cancelled() => Err(interrupted()),
        () = after(started, limit) => Err(out_of_time(limit)),
    }
}

/// Waits until so long after the start; a time that the clock cannot count never comes.
async fn after(started: Instant, limit: Duration) {
    match started.checked_add(limit) {
        Some(end) => tokio::time::sleep_until(end.into()).await,
        None => std::future::pending().await,
    }
}

fn out_of_time(limit: Duration) -> Failure {
    let error = anyhow!(
        "the job ran past maxRunTime ({} s): raise it in the job file",
        limit.as_secs()
    );
    Failure::new(Cause::Timeout, error)
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
            reporter.keep_metrics(&folder).because(Cause::Config)?;
            (folder, None)
        }
        Destination::Resumed(resumed) => {
            let folder = resumed.folder.clone();
            reporter.keep_metrics(&folder).because(Cause::Config)?;
            reporter.event(&resumed.event()).because(Cause::Job)?;
            (folder, resumed.from)
        }
    };
    options.privileges.give_up_last();
    if let Some(note) = &node.passed_over {
        reporter.say(note);
    }
    let mut client = Client::connect(&node.socket).await.because(Cause::Machine)?;
    let job_id = client.create_job(&job.name).await.because(Cause::Machine)?;
    let registration = client
        .register(job_id, COORDINATOR, COORDINATOR)
        .await
        .because(Cause::Machine)?;
    let gateway = Gateway::open(job, &schema, &mut client, options.node.insecure).await?;
    let workers = Workers::start(job, job_id, &node.socket, &folder, &gateway, from)
        .map_err(|error| Failure::new(cause_of(&error), error))?;
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
    let started = run.started;
    let known = in_time(run.job, started, shutdown, known(run.job)).await;
    let known = match known {
        Ok(known) => known,
        Err(failure) => return (Err(failure), workers),
    };
    let mut driver = Driver::new(run, node, workers, reporter, known);
    let outcome = tokio::select! {
        outcome = driver.all() => outcome,
        () = shutdown.cancelled() => Err(interrupted()),
        () = after(started, limit) => Err(out_of_time(limit)),
    };
    (outcome, driver.into_workers())
}

/// What the coordinator knows of the job's data: how many samples each trainer has, and what models are evaluated on.
async fn known(job: &JobSpec) -> Outcome<lifl_learn::Known> {
    let job = job.clone();
    let known = tokio::task::spawn_blocking(move || lifl_learn::known(&job)).await;
    let known = known.context("the data could not be read").because(Cause::Job)?;
    known.map_err(|error| match cause_of(&error) {
        Cause::Machine => Failure::new(Cause::Machine, error),
        _ => Failure::new(Cause::Config, error),
    })
}

fn interrupted() -> Failure {
    Failure::new(Cause::Interrupted, anyhow!("interrupted"))
}

/// Refuses a job that the daemon has no room for, before anything starts.
fn check_room(job: &JobSpec, schema: &Schema, node: &Node) -> Outcome {
    let daemon = node.client.welcome();
    let machine = |error| Err(Failure::new(Cause::Machine, error));
    let plan = memory::Plan::new(job, schema, daemon.huge_pages);
    requirements::check_memory(&plan)?;
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
    let (needed, taken) = (job.registrations(), daemon.workers);
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
