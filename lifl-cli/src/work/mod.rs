//! The worker processes: what all roles share, the aggregator, the trainer.

mod aggregator;
mod ground;
mod link;
mod remote_trainer;
mod trainer;
mod uplink;

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use lifl_common::arena::Layout;
use lifl_common::config::{Kind, Transport, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::JobId;
use lifl_common::session::{SECRET_VARIABLE, Secret};
use lifl_common::update::Schema;

use crate::dir::Dir;
use crate::memory;
use crate::task::Task;
use crate::work::ground::Ground;
use crate::work::link::Link;
use crate::work::uplink::{Dial, Uplink};

/// Where a worker of a run belongs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The daemon's control socket.
    pub socket: PathBuf,
    /// The job, as the daemon numbers it.
    pub job: JobId,
    /// The run's folder, with the worker's task: standard input is the folder itself where `lifl run` has started the
    /// worker, and this is its name in messages.
    pub run: PathBuf,
    /// The worker's name in the job.
    pub name: String,
    /// Where the gateway is, for a worker whose way up leaves the node.
    pub gateway: Option<String>,
    /// Whether the way there may lead unencrypted beyond private networks.
    pub insecure: bool,
    /// The round of the checkpoint that the top begins from; without it, from the job's first model.
    pub start: Option<u32>,
}

impl Place {
    fn folder(&self) -> io::Result<Dir> {
        let given = io::stdin().as_fd().try_clone_to_owned();
        given
            .and_then(|given| Dir::of(given, &self.run))
            .or_else(|_| Dir::at(&self.run))
    }
}

/// Plays one worker's role until the job ends.
///
/// # Errors
/// If the task cannot be read, the daemon is gone, or the role cannot be played.
pub async fn play(place: Place) -> anyhow::Result<()> {
    let run = place
        .folder()
        .with_context(|| format!("cannot open {}", place.run.display()))?;
    let task = Task::read(&run, &place.name)?;
    let schema = lifl_learn::schema(&task.job)?;
    match task.worker.kind {
        Kind::Trainer => match uplink(&place, &task.worker)? {
            Some(up) => remote_trainer::play(up, task, schema).await,
            None => trainer::play(place, task, schema).await,
        },
        Kind::Top | Kind::Aggregator => aggregator::play(place, &run, task, schema).await,
    }
}

/// The way up of a worker beyond the node's shared memory; `None` for any other.
fn uplink(place: &Place, spec: &WorkerSpec) -> anyhow::Result<Option<Uplink>> {
    if spec.transport == Transport::Shm {
        return Ok(None);
    }
    let address = place.gateway.as_deref().context("--gateway is missing")?;
    let secret = std::env::var(SECRET_VARIABLE).with_context(|| format!("{SECRET_VARIABLE} is not set"))?;
    let secret = Secret::from_text(&secret).with_context(|| format!("{SECRET_VARIABLE} is no secret"))?;
    let dial = Dial::new(spec.transport, address, place.insecure)?;
    Ok(Some(Uplink::new(dial, secret, &spec.name)))
}

/// Registers with the daemon and makes the arena.
async fn join(place: &Place, task: &Task, schema: &Schema) -> anyhow::Result<Link> {
    let (job, spec) = (&task.job, &task.worker);
    let layout = Layout::for_objects(task.slots, memory::object_bytes(schema));
    let layout = layout.context("the model is larger than this machine's address space")?;
    let state = memory::state_layout(job, spec, schema);
    let mut link = Link::join(&place.socket, place.job, spec, layout, state).await?;
    link.set_spin(Duration::from_micros(job.spin_us.into()));
    if let Some(note) = link.arena_note() {
        tracing::info!("the arena has ordinary pages: {note}");
    }
    Ok(link)
}

/// Tells the coordinator that this worker can begin.
async fn ready(link: &mut Link) -> anyhow::Result<()> {
    let coordinator = link.coordinator();
    link.post(coordinator, FrameKind::Ready, Frame::default());
    link.flush().await
}
