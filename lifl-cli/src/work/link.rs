//! What ties a worker to its job: the daemon, the frames, its arena, the arenas that it reads.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use lifl_common::arena::{Layout, OwnedArena, PeerArena};
use lifl_common::client::{Client, ClientError, FrameSocket};
use lifl_common::config::WorkerSpec;
use lifl_common::control::{DeadLetter, ErrorCode, Event};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, JobId, WorkerId};

use super::ground::Ground;

/// What comes to a worker.
#[derive(Debug)]
pub(super) enum Incoming {
    /// A frame of a kind that there is.
    Frame(FrameKind, Frame),
    /// A peer is gone.
    Lost(WorkerId),
    /// One of our frames was not delivered.
    Undelivered(DeadLetter),
    /// The job is over.
    Ended(String),
}

/// A worker's connections.
#[derive(Debug)]
pub(super) struct Link {
    client: Client,
    frames: FrameSocket,
    outbox: Vec<Frame>,
    id: WorkerId,
    coordinator: WorkerId,
    arena: OwnedArena,
    arena_note: Option<String>,
    peers: HashMap<ArenaId, Arc<PeerArena>>,
    own: Option<Arc<PeerArena>>,
}

impl Link {
    pub(super) async fn join(
        socket: &Path,
        job: JobId,
        spec: &WorkerSpec,
        layout: Layout,
    ) -> anyhow::Result<Self> {
        let mut client = Client::connect(socket).await?;
        let registration = client
            .register(job, &spec.role, &spec.name)
            .await
            .context("cannot register")?;
        let created = client
            .create_arena(layout)
            .await
            .context("cannot have an arena")?;
        Ok(Self {
            client,
            frames: registration.frames,
            outbox: Vec::new(),
            id: registration.worker,
            coordinator: registration.owner,
            arena: created.arena,
            arena_note: created.note,
            peers: HashMap::new(),
            own: None,
        })
    }

    pub(super) fn arena_note(&self) -> Option<&str> {
        self.arena_note.as_deref()
    }

    /// Waits for whatever comes next. Cancel-safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<Incoming> {
        loop {
            tokio::select! {
                frame = self.frames.recv() => {
                    let frame = frame.context("the frame socket failed")?.context("the frame socket was closed")?;
                    match FrameKind::from_number(frame.kind) {
                        Some(kind) => return Ok(Incoming::Frame(kind, frame)),
                        None => tracing::warn!(from = %frame.from, kind = frame.kind, "a frame of no known kind"),
                    }
                }
                event = self.client.event() => match event.context("the daemon is gone")? {
                    Event::PeerLost(lost) => {
                        tracing::info!(worker = %lost.worker, name = %lost.name, "peer lost");
                        self.arena.take_back(lost.worker);
                        // What of it is still to be read is held by its readers.
                        self.peers.retain(|_, peer| peer.owner() != lost.worker);
                        return Ok(Incoming::Lost(lost.worker));
                    }
                    Event::DeadLetter(letter) => {
                        let to = letter.to_name.as_deref().unwrap_or("a worker that is gone");
                        tracing::warn!(%to, kind = letter.kind, "not delivered: {}", letter.refusal);
                        return Ok(Incoming::Undelivered(letter));
                    }
                    Event::JobEnded { reason } => return Ok(Incoming::Ended(reason)),
                    Event::PeerJoined { .. } => {}
                },
            }
        }
    }

    /// What has come already, if anything has.
    pub(super) async fn ready(&mut self) -> anyhow::Result<Option<Incoming>> {
        tokio::select! {
            biased;
            incoming = self.next() => incoming.map(Some),
            () = std::future::ready(()) => Ok(None),
        }
    }

    /// Sends what has been [posted](Ground::post), in one call.
    pub(super) async fn flush(&mut self) -> anyhow::Result<()> {
        let sent = self.frames.send(&self.outbox).await;
        self.outbox.clear();
        sent.context("the frame socket failed")
    }
}

impl Ground for Link {
    fn id(&self) -> WorkerId {
        self.id
    }

    fn coordinator(&self) -> WorkerId {
        self.coordinator
    }

    fn arena(&mut self) -> &mut OwnedArena {
        &mut self.arena
    }

    fn outbox(&mut self) -> &mut Vec<Frame> {
        &mut self.outbox
    }

    async fn own(&mut self) -> anyhow::Result<Arc<PeerArena>> {
        if let Some(own) = &self.own {
            return Ok(Arc::clone(own));
        }
        let own = self.client.open_arena(self.arena.id()).await;
        let own = own.context("cannot read the own arena")?;
        Ok(Arc::clone(self.own.insert(Arc::new(own))))
    }

    /// Mapped at the first use.
    async fn peer(&mut self, arena: ArenaId) -> anyhow::Result<Option<Arc<PeerArena>>> {
        if arena == self.arena.id() {
            bail!("{arena} is this worker's own arena");
        }
        if let Some(peer) = self.peers.get(&arena) {
            return Ok(Some(Arc::clone(peer)));
        }
        let peer = match self.client.open_arena(arena).await {
            Err(ClientError::Refused {
                code: ErrorCode::NotFound,
                ..
            }) => return Ok(None),
            opened => Arc::new(opened?),
        };
        self.peers.insert(arena, Arc::clone(&peer));
        Ok(Some(peer))
    }
}
