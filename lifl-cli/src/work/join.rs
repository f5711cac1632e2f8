//! How a worker's process joins its job on the node.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use lifl_common::arena::{Layout, OwnedArena};
use lifl_common::client::{Client, ClientError};
use lifl_common::config::WorkerSpec;
use lifl_common::id::JobId;
use lifl_common::update::Schema;
use lifl_worker::node_link::{Incoming, NodeLink};

use super::Place;
use crate::memory;
use crate::task::Task;

/// How long a worker that is being started waits for a daemon that is being started anew.
const JOIN: Duration = Duration::from_secs(15);

/// A worker's connections and memory.
pub(super) struct Joined {
    pub(super) link: NodeLink,
    pub(super) arena: OwnedArena,
    /// The top's second arena, for its optimizer's state.
    pub(super) state_arena: Option<OwnedArena>,
}

/// Registers with the daemon and makes the arenas.
pub(super) async fn join(place: &Place, task: &Task, schema: &Schema) -> anyhow::Result<Joined> {
    let (job, spec) = (&task.job, &task.worker);
    let layout = Layout::for_objects(task.slots, memory::object_bytes(schema));
    let layout = layout.context("the model is larger than this machine's address space")?;
    let given_up = Instant::now() + JOIN;
    let mut link = loop {
        match register(&place.socket, place.job, spec).await {
            Ok(link) => break link,
            Err(error) if error.is_passing() && Instant::now() < given_up => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => return Err(error).context("cannot register"),
        }
    };
    let created = link.create_arena(layout).await.context("cannot have an arena")?;
    if let Some(note) = created.note {
        tracing::info!("the arena has ordinary pages: {note}");
    }
    let state_arena = match memory::state_layout(job, spec, schema) {
        Some(layout) => {
            let created = link.create_arena(layout).await;
            Some(
                created
                    .context("cannot have an arena for the optimizer's state")?
                    .arena,
            )
        }
        None => None,
    };
    // Here, where all workers do it at a time, and not in the first round, where each waits for those below.
    for arena in [Some(&created.arena), state_arena.as_ref()].into_iter().flatten() {
        arena
            .touch()
            .context("this machine has not the memory for the arena: `lifl plan` says what the job takes")?;
    }
    link.set_spin(Duration::from_micros(job.spin_us.into()));
    Ok(Joined {
        link,
        arena: created.arena,
        state_arena,
    })
}

async fn register(socket: &Path, job: JobId, spec: &WorkerSpec) -> Result<NodeLink, ClientError> {
    let client = Client::connect(socket).await?;
    NodeLink::register(client, job, &spec.role, &spec.name).await
}

/// The log tells of what is no frame.
pub(super) fn log(incoming: &Incoming) {
    match incoming {
        Incoming::Frame(_) => {}
        Incoming::Lost { worker, name } => match name {
            Some(name) => tracing::info!(%worker, %name, "peer lost"),
            None => tracing::info!(%worker, "peer lost while the daemon was away"),
        },
        Incoming::Undelivered(letter) => {
            let to = letter.to_name.as_deref().unwrap_or("a worker that is gone");
            tracing::warn!(%to, kind = letter.kind, "not delivered: {}", letter.refusal);
        }
        Incoming::Ended(reason) => tracing::info!("the job has ended: {reason}"),
    }
}
