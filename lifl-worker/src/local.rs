//! The local shell: many workers of a job in one process and one thread, over a network in memory with a virtual clock.
//!
//! ```text
//!   worker ── sends ──▶ its stream ── carried frame by frame ──▶ the receiver's inbox ── read in batches ──▶ receiver
//!                          (a frame to nobody comes back: undelivered)
//!   kill ─────────────────────────────────────────────────────── heard of later, by each at another time ──▶ everybody
//! ```
//!
//! Whatever happens takes some time, drawn from the seed: so that streams overtake each other, news overtake frames, and what
//! is ready at once differs. The frames of one worker keep their order and come once, as on a socket. Of what a dead worker
//! has sent, some may be lost; what it was sent is. Equal seeds give equal runs.

mod aggregator;
mod trainer;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use lifl_common::arena::{ArenaError, Layout, OwnedArena, PeerArena, memfd};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::update::{Schema, image};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::node_link::sending_order;

pub(crate) use self::aggregator::LocalAggregator;
pub(crate) use self::trainer::{Learner, LocalTrainer};

/// What happens to a worker.
#[derive(Debug)]
pub(crate) enum Event {
    /// It begins.
    Start,
    /// A frame has come.
    Frame(Frame),
    /// Another worker is gone.
    PeerLost(WorkerId),
    /// A frame to that worker was not delivered.
    Undelivered(WorkerId, Refusal),
    /// An arena that was [asked for](Requests::open_arena); `None` if its owner is gone.
    ArenaOpened(ArenaId, Option<Arc<PeerArena>>),
    /// The work that was [asked for](Requests::work) takes place now.
    Work,
    /// No other event is ready, and the worker's [timeout](Worker::timeout) has come.
    Timeout,
}

/// What a worker asks of the network.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    /// Frames to send.
    pub(crate) frames: Vec<Frame>,
    /// Arenas to open.
    pub(crate) open_arena: Vec<ArenaId>,
    /// An arena to open before anything else is handled.
    pub(crate) open_now: Option<ArenaId>,
    /// Whether it has work to do that takes a while.
    pub(crate) work: bool,
}

/// Why a worker cannot go on.
pub(crate) type WorkerError = Box<dyn std::error::Error + Send + Sync>;

/// What goes wrong here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A worker cannot go on.
    #[error("{worker} cannot go on")]
    Worker {
        /// Which one.
        worker: WorkerId,
        /// Why.
        #[source]
        source: WorkerError,
    },
    /// An arena cannot be made or read.
    #[error("no memory for an arena")]
    Arena(#[from] ArenaError),
    /// The kernel refused the memory of an arena.
    #[error("no memory for arena {arena}")]
    Memory {
        /// Which one.
        arena: ArenaId,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A model larger than the address space.
    #[error("a model of {bytes} bytes has no room on this machine")]
    TooLarge {
        /// Bytes of the model's image.
        bytes: u64,
    },
}

/// A worker's machine with what it needs to run here.
pub(crate) trait Worker {
    /// Handles one event.
    ///
    /// # Errors
    /// If the worker cannot go on.
    fn handle(&mut self, now: Duration, event: Event, requests: &mut Requests) -> Result<(), WorkerError>;

    /// When it wants [`Event::Timeout`], if at all.
    fn timeout(&self) -> Option<Duration>;

    /// Whether it waits for nobody, and nobody has anything of its.
    fn is_idle(&mut self) -> bool;
}

/// How long things take at most. Most take much less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delays {
    /// A frame on its way, and in the inbox.
    pub(crate) frame: Duration,
    /// Until somebody hears of a death, or of a frame that was not delivered.
    pub(crate) news: Duration,
    /// An arena to be opened.
    pub(crate) open: Duration,
    /// Training.
    pub(crate) work: Duration,
}

/// Something that happens at a time.
#[derive(Debug)]
enum Due {
    /// The next frame of a worker's stream arrives.
    Carry(WorkerId),
    /// A worker reads all of its inbox.
    Read(WorkerId),
    Tell(WorkerId, Event),
    Open(WorkerId, ArenaId),
    /// A worker's timeout may have come.
    Wake(WorkerId),
}

/// What one worker has to do with the network.
#[derive(Debug, Default)]
struct Mailbox {
    /// Frames that it has sent.
    sent: u64,
    /// Frames that it has sent and that are not there yet.
    stream: VecDeque<Frame>,
    /// When the last of them will be.
    stream_ends: Duration,
    /// Frames that are there and not read.
    inbox: Vec<Frame>,
    /// When the last of its news will be there.
    news_end: Duration,
    /// When it is woken next.
    wakes: Option<Duration>,
}

/// See the [module](self).
pub(crate) struct LocalNetwork {
    coordinator: WorkerId,
    random: ChaCha8Rng,
    delays: Delays,
    now: Duration,
    /// By time, and in the order in which they were decided on.
    due: BTreeMap<(Duration, u64), Due>,
    decided: u64,
    workers: BTreeMap<WorkerId, Box<dyn Worker>>,
    mailboxes: BTreeMap<WorkerId, Mailbox>,
    arenas: BTreeMap<ArenaId, (File, Layout)>,
}

impl LocalNetwork {
    /// An empty network. Its coordinator reads what a dead worker has sent before it hears of the death.
    pub(crate) fn new(coordinator: WorkerId, seed: u64, delays: Delays) -> Self {
        Self {
            coordinator,
            random: ChaCha8Rng::seed_from_u64(seed),
            delays,
            now: Duration::ZERO,
            due: BTreeMap::new(),
            decided: 0,
            workers: BTreeMap::new(),
            mailboxes: BTreeMap::new(),
            arenas: BTreeMap::new(),
        }
    }

    /// The virtual time.
    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    /// The network's random numbers, for who decides on deaths.
    pub(crate) fn random(&mut self) -> &mut ChaCha8Rng {
        &mut self.random
    }

    /// A worker's arena of that number, with so many slots for objects of a schema.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(crate) fn make_arena(
        &mut self,
        id: ArenaId,
        slots: u32,
        schema: &Schema,
    ) -> Result<OwnedArena, Error> {
        let bytes = image::image_bytes(schema) as u64;
        let layout = Layout::for_objects(slots, bytes);
        let layout = layout.and_then(|layout| Some((layout, layout.memfd_bytes(false)?)));
        let (layout, bytes) = layout.ok_or(Error::TooLarge { bytes })?;
        let memory = |source| Error::Memory { arena: id, source };
        let file = memfd::create("lifl-local", bytes, false).map_err(memory)?;
        let arena = OwnedArena::new(&file, id, layout)?;
        memfd::seal(file.as_fd()).map_err(memory)?;
        self.arenas.insert(id, (file, layout));
        Ok(arena)
    }

    /// An arena, for a reader; `None` if its owner is gone.
    ///
    /// # Errors
    /// If it cannot be mapped.
    pub(crate) fn open_arena(&self, id: ArenaId) -> Result<Option<Arc<PeerArena>>, ArenaError> {
        open(&self.arenas, id)
    }

    /// Lets a worker begin.
    ///
    /// # Errors
    /// If it cannot.
    pub(crate) fn start(&mut self, id: WorkerId, worker: Box<dyn Worker>) -> Result<(), Error> {
        self.workers.insert(id, worker);
        self.deliver(id, [Event::Start])
    }

    /// How many frames a worker has sent.
    pub(crate) fn sent(&self, id: WorkerId) -> u64 {
        self.mailboxes.get(&id).map_or(0, |mailbox| mailbox.sent)
    }

    /// Those that live.
    pub(crate) fn workers(&mut self) -> impl Iterator<Item = (WorkerId, &mut Box<dyn Worker>)> {
        self.workers.iter_mut().map(|(&id, worker)| (id, worker))
    }

    /// Has a frame carried to its receiver.
    pub(crate) fn send(&mut self, frame: Frame) {
        let delay = self.delay(self.delays.frame);
        let mailbox = self.mailboxes.entry(frame.from).or_default();
        mailbox.stream.push_back(frame);
        mailbox.sent += 1;
        mailbox.stream_ends = mailbox.stream_ends.max(self.now + delay);
        let at = mailbox.stream_ends;
        self.decide(at, Due::Carry(frame.from));
    }

    /// A worker dies.
    pub(crate) fn kill(&mut self, id: WorkerId) {
        if self.workers.remove(&id).is_none() {
            return;
        }
        self.arenas.retain(|arena, _| arena.owner() != id);
        let sent = self.mailboxes.get(&id).map_or(0, |mailbox| mailbox.stream.len());
        for _ in 0..self.random.random_range(0..=sent) {
            self.carry(id);
        }
        self.mailboxes.remove(&id);
        let others: Vec<WorkerId> = self.workers.keys().copied().collect();
        for other in others {
            self.tell(other, Event::PeerLost(id));
        }
    }

    /// The next thing happens; `false` if nothing is to happen any more.
    ///
    /// # Errors
    /// If a worker cannot go on.
    pub(crate) fn step(&mut self) -> Result<bool, Error> {
        let Some(((at, _), due)) = self.due.pop_first() else {
            return Ok(false);
        };
        self.now = at;
        match due {
            Due::Carry(from) => self.carry(from),
            Due::Read(to) => {
                let events = self.read(to);
                self.deliver(to, events)?;
            }
            Due::Tell(to, event) => {
                let mut events = if to == self.coordinator {
                    self.read(to)
                } else {
                    Vec::new()
                };
                events.push(event);
                self.deliver(to, events)?;
            }
            Due::Wake(to) => self.deliver(to, [])?,
            Due::Open(to, arena) => {
                let opened = self.open_arena(arena)?;
                self.deliver(to, [Event::ArenaOpened(arena, opened)])?;
            }
        }
        Ok(true)
    }

    /// What is in a worker's inbox.
    fn read(&mut self, to: WorkerId) -> Vec<Event> {
        let inbox = self.mailboxes.get_mut(&to);
        let frames = inbox.map(|mailbox| std::mem::take(&mut mailbox.inbox));
        frames.unwrap_or_default().into_iter().map(Event::Frame).collect()
    }

    /// Gives a worker all of these events, then its timeout, and does what it asks for.
    fn deliver(&mut self, to: WorkerId, events: impl IntoIterator<Item = Event>) -> Result<(), Error> {
        let Some(worker) = self.workers.get_mut(&to) else {
            return Ok(());
        };
        let mut requests = Requests::default();
        let failed = |source| Error::Worker { worker: to, source };
        for event in events {
            worker.handle(self.now, event, &mut requests).map_err(failed)?;
            while let Some(arena) = requests.open_now.take() {
                let opened = open(&self.arenas, arena)?;
                let opened = Event::ArenaOpened(arena, opened);
                worker.handle(self.now, opened, &mut requests).map_err(failed)?;
            }
        }
        while worker.timeout().is_some_and(|at| at <= self.now) {
            let handled = worker.handle(self.now, Event::Timeout, &mut requests);
            handled.map_err(failed)?;
        }
        let (wake, mailbox) = (worker.timeout(), self.mailboxes.entry(to).or_default());
        if let Some(at) = wake
            && mailbox.wakes.is_none_or(|wakes| wakes <= self.now || at < wakes)
        {
            mailbox.wakes = Some(at);
            self.decide(at, Due::Wake(to));
        }
        // The coordinator's are sent as it has ordered them: whom it tells first must know before the others act on it.
        if to != self.coordinator {
            sending_order(&mut requests.frames, self.coordinator);
        }
        for frame in requests.frames {
            self.send(frame);
        }
        for arena in requests.open_arena {
            let at = self.now + self.delay(self.delays.open);
            self.decide(at, Due::Open(to, arena));
        }
        if requests.work {
            let at = self.now + self.delay(self.delays.work);
            self.decide(at, Due::Tell(to, Event::Work));
        }
        Ok(())
    }

    /// The next frame that a worker has sent arrives; one to nobody comes back.
    fn carry(&mut self, from: WorkerId) {
        let stream = self.mailboxes.get_mut(&from);
        let Some(frame) = stream.and_then(|mailbox| mailbox.stream.pop_front()) else {
            return;
        };
        if !self.workers.contains_key(&frame.to) {
            return self.tell(from, Event::Undelivered(frame.to, Refusal::WorkerGone));
        }
        let inbox = &mut self.mailboxes.entry(frame.to).or_default().inbox;
        inbox.push(frame);
        if inbox.len() == 1 {
            let at = self.now + self.delay(self.delays.frame);
            self.decide(at, Due::Read(frame.to));
        }
    }

    /// A worker hears something from the daemon, after what it hears already.
    fn tell(&mut self, to: WorkerId, event: Event) {
        let delay = self.delay(self.delays.news);
        let mailbox = self.mailboxes.entry(to).or_default();
        mailbox.news_end = mailbox.news_end.max(self.now + delay);
        let at = mailbox.news_end;
        self.decide(at, Due::Tell(to, event));
    }

    fn decide(&mut self, at: Duration, due: Due) {
        self.decided += 1;
        self.due.insert((at, self.decided), due);
    }

    /// How long something takes: as a rule a small part of the longest, now and then all of it.
    fn delay(&mut self, longest: Duration) -> Duration {
        let part = self.random.random_range(0.0..1.0_f64);
        longest.mul_f64(part * part * part)
    }
}

fn open(
    arenas: &BTreeMap<ArenaId, (File, Layout)>,
    id: ArenaId,
) -> Result<Option<Arc<PeerArena>>, ArenaError> {
    let arena = arenas.get(&id);
    let peer = arena.map(|(file, layout)| PeerArena::new(file, id, id.owner(), *layout));
    Ok(peer.transpose()?.map(Arc::new))
}

#[cfg(test)]
mod simulation;
