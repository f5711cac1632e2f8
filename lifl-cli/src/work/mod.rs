//! The worker processes: what all roles share, the aggregator, the trainer.

mod aggregator;
mod join;
mod remote_trainer;
mod trainer;

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::Context;
use lifl_common::config::{Kind, Transport, WorkerSpec};
use lifl_common::id::JobId;
use lifl_common::session::{SECRET_VARIABLE, Secret};
use lifl_worker::gateway_link::{GatewayAddress, GatewayLink};

use crate::dir::Dir;
use crate::task::Task;

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
        Kind::Trainer => match gateway_link(&place, &task.worker)? {
            Some(gateway) => remote_trainer::play(gateway, task, schema).await,
            None => trainer::play(place, task, schema).await,
        },
        Kind::Top | Kind::Aggregator => aggregator::play(place, &run, task, schema).await,
    }
}

/// The link of a worker beyond the node's shared memory; `None` for any other.
fn gateway_link(place: &Place, spec: &WorkerSpec) -> anyhow::Result<Option<GatewayLink>> {
    if spec.transport == Transport::Shm {
        return Ok(None);
    }
    let address = place.gateway.as_deref().context("--gateway is missing")?;
    let secret = std::env::var(SECRET_VARIABLE).with_context(|| format!("{SECRET_VARIABLE} is not set"))?;
    let secret = Secret::from_text(&secret).with_context(|| format!("{SECRET_VARIABLE} is no secret"))?;
    let address = GatewayAddress::new(spec.transport, address, place.insecure)?;
    Ok(Some(GatewayLink::new(address, secret, &spec.name)))
}
