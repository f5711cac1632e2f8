//! The worker processes: what all roles share, the aggregator, the trainer.

mod aggregator;
mod link;
mod trainer;

use std::path::{Path, PathBuf};

use anyhow::Context;
use lifl_common::arena::Layout;
use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::JobId;
use lifl_common::update::Schema;

use crate::memory;
use crate::work::link::Link;

/// Where a worker of a run belongs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The daemon's control socket.
    pub socket: PathBuf,
    /// The job, as the daemon numbers it.
    pub job: JobId,
    /// The run's folder, with the job in `job.json`.
    pub run: PathBuf,
    /// The worker's name in the job.
    pub name: String,
}

/// Plays one worker's role until the job ends.
///
/// # Errors
/// If the job cannot be read, the daemon is gone, or the role cannot be played.
pub async fn play(place: Place) -> anyhow::Result<()> {
    let job = read_job(&place.run)?;
    let spec = job.workers.iter().find(|worker| worker.name == place.name);
    let spec = spec
        .with_context(|| format!("{} has no worker called {}", place.run.display(), place.name))?
        .clone();
    let schema = crate::learn::schema(&job.model)?;
    match spec.kind {
        Kind::Trainer => trainer::play(place, job, spec, schema).await,
        Kind::Top | Kind::Aggregator => aggregator::play(place, job, spec, schema).await,
    }
}

fn read_job(run: &Path) -> anyhow::Result<JobSpec> {
    let path = run.join("job.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is not a job as `lifl run` writes it", path.display()))
}

/// Registers with the daemon and makes the arena.
async fn join(place: &Place, job: &JobSpec, spec: &WorkerSpec, schema: &Schema) -> anyhow::Result<Link> {
    let layout = Layout::for_objects(memory::slots(job, spec), memory::object_bytes(schema));
    let layout = layout.context("the model is larger than this machine's address space")?;
    let link = Link::join(&place.socket, place.job, spec, layout).await?;
    if let Some(note) = link.arena_note() {
        tracing::info!("the arena has ordinary pages: {note}");
    }
    Ok(link)
}

/// Tells the coordinator that this worker can begin.
async fn ready(link: &mut Link) -> anyhow::Result<()> {
    let coordinator = link.coordinator();
    link.send(coordinator, FrameKind::Ready, Frame::default()).await
}
