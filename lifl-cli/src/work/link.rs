//! What ties a worker to its job: the daemon, the frames, its arena, the arenas that it reads.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use lifl_common::arena::{Layout, OwnedArena, PeerArena};
use lifl_common::client::{Client, FrameSocket};
use lifl_common::config::WorkerSpec;
use lifl_common::control::{DeadLetter, Event};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, JobId, WorkerId};

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
    id: WorkerId,
    coordinator: WorkerId,
    pub(super) arena: OwnedArena,
    /// The top's second arena, for what its optimizer remembers.
    pub(super) state: Option<OwnedArena>,
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
        state: Option<Layout>,
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
        let state = match state {
            Some(layout) => {
                let created = client.create_arena(layout).await;
                Some(
                    created
                        .context("cannot have an arena for the optimizer's state")?
                        .arena,
                )
            }
            None => None,
        };
        Ok(Self {
            client,
            frames: registration.frames,
            id: registration.worker,
            coordinator: registration.owner,
            arena: created.arena,
            state,
            arena_note: created.note,
            peers: HashMap::new(),
            own: None,
        })
    }

    pub(super) fn id(&self) -> WorkerId {
        self.id
    }

    pub(super) fn coordinator(&self) -> WorkerId {
        self.coordinator
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
                        self.take_back(lost.worker);
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

    /// Takes back everything that is lent to a worker that is gone.
    pub(super) fn take_back(&mut self, from: WorkerId) {
        self.arena.take_back(from);
        if let Some(state) = &mut self.state {
            state.take_back(from);
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

    /// Sends one frame of that kind.
    pub(super) async fn send(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) -> anyhow::Result<()> {
        self.send_all(&[self.frame(to, kind, frame)]).await
    }

    /// The frame with its address filled in.
    pub(super) fn frame(&self, to: WorkerId, kind: FrameKind, frame: Frame) -> Frame {
        Frame {
            to,
            from: self.id,
            kind: kind as u16,
            ..frame
        }
    }

    /// Sends frames in one call.
    pub(super) async fn send_all(&mut self, frames: &[Frame]) -> anyhow::Result<()> {
        self.frames.send(frames).await.context("the frame socket failed")
    }

    /// The own arena as others see it, for what is sent from it.
    pub(super) async fn own(&mut self) -> anyhow::Result<Arc<PeerArena>> {
        if let Some(own) = &self.own {
            return Ok(Arc::clone(own));
        }
        let own = self.client.open_arena(self.arena.id()).await;
        let own = own.context("cannot read the own arena")?;
        Ok(Arc::clone(self.own.insert(Arc::new(own))))
    }

    /// Another worker's arena, mapped at the first use.
    pub(super) async fn peer(&mut self, arena: ArenaId) -> anyhow::Result<Arc<PeerArena>> {
        if arena == self.arena.id() {
            bail!("{arena} is this worker's own arena");
        }
        if let Some(peer) = self.peers.get(&arena) {
            return Ok(Arc::clone(peer));
        }
        let peer = Arc::new(self.client.open_arena(arena).await?);
        self.peers.insert(arena, Arc::clone(&peer));
        Ok(peer)
    }
}
