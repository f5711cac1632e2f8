//! The node link: what ties a worker to its job on this node. Frames through the plane, the daemon's news over the control
//! connection, other workers' arenas mapped for reading.
//!
//! The daemon may go and another come: frames flow meanwhile, and what it would have said is made up for when the worker has
//! reconnected ([`Client`]). What the kernel returns because there was no daemon is a dead letter like any other.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use lifl_common::arena::{Layout, PeerArena};
use lifl_common::client::{Client, ClientError, CreatedArena, FrameSocket};
use lifl_common::control::{DeadLetter, ErrorCode, Event};
use lifl_common::frame::Frame;
use lifl_common::id::{ArenaId, JobId, WorkerId};

/// What comes to a worker.
#[derive(Debug)]
pub enum Incoming {
    /// A frame.
    Frame(Frame),
    /// Another worker is gone.
    Lost {
        /// Which.
        worker: WorkerId,
        /// Its name, unless it went while the daemon was away.
        name: Option<String>,
    },
    /// One of this worker's frames was not delivered.
    Undelivered(DeadLetter),
    /// The job is over, and why.
    Ended(String),
}

/// Why a worker cannot go on, or an arena cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The frame socket failed.
    #[error("the frame socket failed")]
    Frames(#[source] io::Error),
    /// The other end of the frame socket is closed.
    #[error("the frame socket was closed")]
    FramesClosed,
    /// The control connection is over, and no other daemon has taken it up.
    #[error("the daemon is gone")]
    Daemon(#[source] ClientError),
    /// The daemon does not give the arena, or it cannot be mapped.
    #[error("the arena cannot be had")]
    Arena(#[source] ClientError),
    /// Another worker's arena was expected.
    #[error("{0} is this worker's own arena")]
    OwnArena(ArenaId),
}

/// A worker's connections.
#[derive(Debug)]
pub struct NodeLink {
    client: Client,
    frames: FrameSocket,
    outbox: Vec<Frame>,
    id: WorkerId,
    coordinator: WorkerId,
    arenas: HashMap<ArenaId, Arc<PeerArena>>,
    /// Whom it has had to do with, and who has not been reported lost.
    known: HashSet<WorkerId>,
    /// Lost, and not yet reported.
    lost: Vec<(WorkerId, Option<String>)>,
}

impl NodeLink {
    /// Registers a worker of that role and name.
    ///
    /// # Errors
    /// If the daemon refuses it, or is gone.
    pub async fn register(
        mut client: Client,
        job: JobId,
        role: &str,
        name: &str,
    ) -> Result<Self, ClientError> {
        let registration = client.register(job, role, name).await?;
        Ok(Self {
            client,
            frames: registration.frames,
            outbox: Vec::new(),
            id: registration.worker,
            coordinator: registration.owner,
            arenas: HashMap::new(),
            known: HashSet::new(),
            lost: Vec::new(),
        })
    }

    /// Who this worker is.
    pub fn id(&self) -> WorkerId {
        self.id
    }

    /// Who announces rounds.
    pub fn coordinator(&self) -> WorkerId {
        self.coordinator
    }

    /// How long to look for frames before sleeping.
    pub fn set_spin(&mut self, spin: Duration) {
        self.frames.set_spin(spin);
    }

    /// Has the daemon make an arena for this worker.
    ///
    /// # Errors
    /// If the daemon has not the memory or does not allow it, or the arena cannot be mapped.
    pub async fn create_arena(&mut self, layout: Layout) -> Result<CreatedArena, ClientError> {
        self.client.create_arena(layout).await
    }

    /// Waits for whatever comes next. Cancel-safe.
    ///
    /// # Errors
    /// If the plane or the daemon is lost.
    pub async fn next(&mut self) -> Result<Incoming, LinkError> {
        loop {
            if let Some((worker, name)) = self.lost.pop() {
                return Ok(Incoming::Lost { worker, name });
            }
            tokio::select! {
                frame = self.frames.recv() => {
                    let frame = frame.map_err(LinkError::Frames)?.ok_or(LinkError::FramesClosed)?;
                    if let Some(letter) = DeadLetter::returned(&frame, self.id) {
                        return Ok(Incoming::Undelivered(letter));
                    }
                    self.known.insert(frame.from);
                    return Ok(Incoming::Frame(frame));
                }
                event = self.client.event() => match event.map_err(LinkError::Daemon)? {
                    Event::PeerLost(lost) => self.lose(lost.worker, Some(lost.name)),
                    Event::Living { first, last, workers } => {
                        tracing::info!("the daemon is back");
                        let gone = |id: &WorkerId| {
                            (first..=last).contains(id) && workers.binary_search(id).is_err()
                        };
                        let gone: Vec<WorkerId> = self.known.iter().copied().filter(gone).collect();
                        for worker in gone {
                            self.lose(worker, None);
                        }
                    }
                    Event::DeadLetter(letter) => return Ok(Incoming::Undelivered(letter)),
                    Event::JobEnded { reason } => return Ok(Incoming::Ended(reason)),
                    Event::PeerJoined { .. } => {}
                },
            }
        }
    }

    /// What has come already, if anything has.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn ready(&mut self) -> Result<Option<Incoming>, LinkError> {
        tokio::select! {
            biased;
            incoming = self.next() => incoming.map(Some),
            () = std::future::ready(()) => Ok(None),
        }
    }

    /// A worker is gone; it is reported next.
    fn lose(&mut self, worker: WorkerId, name: Option<String>) {
        // What of it is still to be read is held by its readers.
        self.arenas.retain(|_, arena| arena.owner() != worker);
        self.known.remove(&worker);
        self.lost.push((worker, name));
    }

    /// Has a frame sent with the next [`flush`](Self::flush).
    pub fn post(&mut self, frame: Frame) {
        self.outbox.push(frame);
    }

    /// Sends what has been [posted](Self::post) in one call: to the coordinator first, then to each of the others all of its own.
    ///
    /// # Errors
    /// If the frame socket fails.
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        if self.outbox.is_empty() {
            return Ok(());
        }
        sending_order(&mut self.outbox, self.coordinator);
        self.known.extend(self.outbox.iter().map(|frame| frame.to));
        let sent = self.frames.send(&self.outbox).await;
        self.outbox.clear();
        sent.map_err(LinkError::Frames)
    }

    /// Another worker's arena, mapped at the first use; `None` if the job has none of that number, as a rule because its owner
    /// is gone.
    ///
    /// # Errors
    /// If it is this worker's own, or cannot be had.
    pub async fn peer_arena(&mut self, arena: ArenaId) -> Result<Option<Arc<PeerArena>>, LinkError> {
        if arena.owner() == self.id {
            return Err(LinkError::OwnArena(arena));
        }
        self.open(arena).await
    }

    /// Any arena of the job as its readers see it, this worker's own too.
    ///
    /// # Errors
    /// If it cannot be had.
    pub async fn open(&mut self, arena: ArenaId) -> Result<Option<Arc<PeerArena>>, LinkError> {
        if let Some(known) = self.arenas.get(&arena) {
            return Ok(Some(Arc::clone(known)));
        }
        let opened = match self.client.open_arena(arena).await {
            Err(ClientError::Refused {
                code: ErrorCode::NotFound,
                ..
            }) => return Ok(None),
            opened => Arc::new(opened.map_err(LinkError::Arena)?),
        };
        self.arenas.insert(arena, Arc::clone(&opened));
        Ok(Some(opened))
    }
}

/// Puts what a worker sends at once in order: to the coordinator first, since nobody else is to know what it decides on before
/// it does, and to each of the others everything at once, so that it wakes for all of it.
pub(crate) fn sending_order(frames: &mut [Frame], coordinator: WorkerId) {
    frames.sort_by_key(|frame| (frame.to != coordinator, frame.to));
}
