//! What ties a worker to its job: the daemon, the frames, its arena, the arenas that it reads.
//!
//! The daemon may go and another come: frames flow meanwhile, and what it would have said is made up for when the worker
//! is back ([`Client`]). What the kernel returns because there was no daemon is an undelivered letter like any other.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use lifl_common::arena::{Layout, OwnedArena, PeerArena};
use lifl_common::client::{Client, ClientError, FrameSocket, Registration};
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
    /// The coordinator has asked whether this worker stirs; the answer has been [posted](Ground::post).
    Asked,
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
    /// The top's second arena, for what its optimizer remembers.
    state: Option<OwnedArena>,
    arena_note: Option<String>,
    peers: HashMap<ArenaId, Arc<PeerArena>>,
    own: Option<Arc<PeerArena>>,
    /// Whom it has had to do with, and who has not been reported lost.
    known: HashSet<WorkerId>,
    /// Lost, and not yet reported.
    lost: Vec<WorkerId>,
    /// The last round in which it has answered its parent.
    answered: u32,
}

/// How long a worker that is being started waits for a daemon that is being started anew.
const JOIN: Duration = Duration::from_secs(15);

impl Link {
    pub(super) async fn join(
        socket: &Path,
        job: JobId,
        spec: &WorkerSpec,
        layout: Layout,
        state: Option<Layout>,
    ) -> anyhow::Result<Self> {
        let given_up = Instant::now() + JOIN;
        let (mut client, registration) = loop {
            match Self::register(socket, job, spec).await {
                Ok(registered) => break registered,
                Err(error) if error.is_passing() && Instant::now() < given_up => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error).context("cannot register"),
            }
        };
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
        // Here, where all workers do it at a time, and not in the first round, where each waits for those below.
        for arena in [Some(&created.arena), state.as_ref()].into_iter().flatten() {
            arena.touch().context(
                "this machine has not the memory for the arena: `lifl plan` says what the job takes",
            )?;
        }
        Ok(Self {
            client,
            frames: registration.frames,
            outbox: Vec::new(),
            id: registration.worker,
            coordinator: registration.owner,
            arena: created.arena,
            state,
            arena_note: created.note,
            peers: HashMap::new(),
            own: None,
            known: HashSet::new(),
            lost: Vec::new(),
            answered: 0,
        })
    }

    async fn register(
        socket: &Path,
        job: JobId,
        spec: &WorkerSpec,
    ) -> Result<(Client, Registration), ClientError> {
        let mut client = Client::connect(socket).await?;
        let registration = client.register(job, &spec.role, &spec.name).await?;
        Ok((client, registration))
    }

    pub(super) fn arena_note(&self) -> Option<&str> {
        self.arena_note.as_deref()
    }

    /// How long to look for frames before sleeping.
    pub(super) fn set_spin(&mut self, spin: Duration) {
        self.frames.set_spin(spin);
    }

    /// Waits for whatever comes next. Cancel-safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<Incoming> {
        loop {
            if let Some(worker) = self.lost.pop() {
                return Ok(Incoming::Lost(worker));
            }
            tokio::select! {
                frame = self.frames.recv() => {
                    let frame = frame.context("the frame socket failed")?.context("the frame socket was closed")?;
                    if let Some(letter) = DeadLetter::returned(&frame, self.id) {
                        return Ok(undelivered(letter));
                    }
                    self.known.insert(frame.from);
                    match FrameKind::from_number(frame.kind) {
                        Some(FrameKind::Ping) if frame.from == self.coordinator => {
                            let round = self.answered;
                            self.post(self.coordinator, FrameKind::Pong, Frame { round, ..Frame::default() });
                            return Ok(Incoming::Asked);
                        }
                        Some(kind) => return Ok(Incoming::Frame(kind, frame)),
                        None => tracing::warn!(from = %frame.from, kind = frame.kind, "a frame of no known kind"),
                    }
                }
                event = self.client.event() => match event.context("the daemon is gone")? {
                    Event::PeerLost(lost) => {
                        tracing::info!(worker = %lost.worker, name = %lost.name, "peer lost");
                        self.lose(lost.worker);
                    }
                    Event::Living { first, last, workers } => {
                        tracing::info!("the daemon is back");
                        let gone = |id: &WorkerId| {
                            (first..=last).contains(id) && workers.binary_search(id).is_err()
                        };
                        let gone: Vec<WorkerId> = self.known.iter().copied().filter(gone).collect();
                        for worker in gone {
                            tracing::info!(%worker, "peer lost while the daemon was away");
                            self.lose(worker);
                        }
                    }
                    Event::DeadLetter(letter) => return Ok(undelivered(letter)),
                    Event::JobEnded { reason } => return Ok(Incoming::Ended(reason)),
                    Event::PeerJoined { .. } => {}
                },
            }
        }
    }

    /// Takes back what a worker that is gone held; it is reported next.
    fn lose(&mut self, worker: WorkerId) {
        self.take_back(worker);
        // What of it is still to be read is held by its readers.
        self.peers.retain(|_, peer| peer.owner() != worker);
        self.known.remove(&worker);
        self.lost.push(worker);
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
        self.order();
        self.known.extend(self.outbox.iter().map(|frame| frame.to));
        let answers = [FrameKind::Update as u16, FrameKind::Nothing as u16];
        let answers = self.outbox.iter().filter(|frame| answers.contains(&frame.kind));
        self.answered = answers.map(|frame| frame.round).fold(self.answered, u32::max);
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

    fn arenas(&mut self) -> (&mut OwnedArena, Option<&mut OwnedArena>) {
        (&mut self.arena, self.state.as_mut())
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

fn undelivered(letter: DeadLetter) -> Incoming {
    let to = letter.to_name.as_deref().unwrap_or("a worker that is gone");
    tracing::warn!(%to, kind = letter.kind, "not delivered: {}", letter.refusal);
    Incoming::Undelivered(letter)
}
