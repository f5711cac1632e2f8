//! The aggregator: the parent's half of the protocol, and its way up. Top, middle and leaf are this one state machine in
//! different places of the tree.
//!
//! ```text
//!            Child×n, Begin (coordinator)          Model (parent; the top has its own), a free slot
//!   silent ─────────────────────────────▶ announced ──────────────────────────────────────────▶ folding
//!                                          │     ▲                                                │
//!                   Taken×n (parent): it   │     │ the parent whose predecessor       each child: Update, Nothing,
//!                   has the aggregate of   │     │ took that is gone too              or not waited for any more
//!                   our predecessor        │     │                                                │
//!                                          ▼     │          the aggregate, or Nothing, goes up    ▼
//!                                          over ◀─┴─────────────────────────────── all have answered, or aggGoal came
//! ```
//!
//! A round that is announced begins anew with every number. What was sent up is kept until the parent has decided on it,
//! beside the next round (`pending_aggregates`); a model that was handed down, until it comes back (`model_leases`). Who
//! reaches its parent through the gateway says and hears the same over a session (`as_child`).
//!
//! **Failover.** When a worker dies, the coordinator announces the round again as it stands now, with successors in the places
//! of the dead (`children`). Whoever hears that says again what is not settled. Replay is idempotent: what comes again is
//! known by its key, is answered as before, and changes nothing.
//!
//! **How a shell drives it.** Every input that is ready goes to [`handle`](Aggregator::handle). When none is, and
//! [`timeout`](Aggregator::timeout) has come, [`Input::Timeout`] follows: only then the machine folds, all that has come in
//! one pass, and gives the frames of the whole batch, which the shell sends at once, [those to the coordinator
//! first](crate::node_link). To every [`Output::OpenArena`] and [`Output::LoadModel`] there is an answer.

mod as_child;
mod children;
mod early_frames;
mod model_leases;

mod pending_aggregates;
mod restore;
mod round;
mod round_fold;
mod server_optimizer;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lifl_aggregate::{FoldError, Rule, ServerOptimizer, Threads};
use lifl_common::arena::{ArenaError, OwnedArena, PeerArena, SlotError, WritableSlot};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, Key, WorkerId};
use lifl_common::session::Object;
use lifl_common::update::{Metadata, Schema, UpdateInfo, image};

use self::early_frames::EarlyFrames;
use self::model_leases::ModelLease;
use self::pending_aggregates::PendingAggregate;
use self::round::{Round, Stage};
use self::round_fold::RoundFold;
use self::server_optimizer::OptimizerState;
use crate::parent::{LentModel, OfferedModels};

/// Where the numbers of refusals begin among what the log [tells once](Aggregator::log_once); below are kinds of frames.
const FIRST_REFUSAL: u16 = 1 << 8;

/// What an aggregator is told of its job and its place.
#[derive(Debug)]
pub struct Config {
    /// The worker's name, which stands in what it makes.
    pub name: String,
    /// Its number.
    pub worker: WorkerId,
    /// Who announces rounds.
    pub coordinator: WorkerId,
    /// The job's tensors.
    pub schema: Arc<Schema>,
    /// Updates after which a round is done; `None` for all of its children's.
    pub goal: Option<u32>,
    /// How many models of rounds that are over a child may hold and still be lent a new one; `None` where rounds wait for
    /// all, and nobody holds any.
    pub most_held: Option<u32>,
    /// Whether the parent is reached through the gateway. In frames and lists it is [`WorkerId::NONE`] then, as the top's is.
    pub via_gateway: bool,
    /// What the top's arithmetic beside the rule's is cut into.
    pub threads: Threads,
}

/// What the top has beside other aggregators.
#[derive(Debug)]
pub struct Top {
    /// Makes the mean the model.
    pub optimizer: ServerOptimizer,
    /// The second arena, where the optimizer's state lies, if it has one.
    pub state_arena: Option<OwnedArena>,
    /// Trainers whose work a new model needs.
    pub quorum: u32,
    /// The job's last round.
    pub rounds: u32,
}

/// What happens to an aggregator.
#[derive(Debug)]
pub enum Input {
    /// What it needs is there: the coordinator may count on it.
    Ready,
    /// A frame has come.
    Frame(Frame),
    /// Another worker of the job is gone.
    PeerLost(WorkerId),
    /// A frame to that worker was not delivered.
    Undelivered(WorkerId, Refusal),
    /// The answer to [`Output::OpenArena`].
    ArenaOpened {
        /// Which arena.
        arena: ArenaId,
        /// The arena; `None` if the job has none of that number, as a rule because its owner is gone. The error is why it
        /// cannot be read.
        opened: Result<Option<Arc<PeerArena>>, String>,
    },
    /// The answer to [`Output::LoadModel`].
    ModelLoaded(Box<LoadedModel>),
    /// Behind the gateway, a model waits to be received.
    ModelOffered,
    /// A model has come from the gateway, its data at its [place](image::data_range) in the slot of
    /// [`Output::ReceiveModel`].
    ModelReceived(Object, WritableSlot),
    /// The parent behind the gateway has decided on the aggregate of a round; `None`: it was accepted.
    Verdict {
        /// The round.
        round: u32,
        /// Why the aggregate was refused.
        refusal: Option<Refusal>,
    },
    /// [`Aggregator::timeout`] has come, and no other input is ready.
    Timeout,
}

/// The model that a top begins with, each object's data at its [place](image::data_range) in its slot.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model's slot.
    pub slot: WritableSlot,
    /// What is known of it: round 0 is the job's first.
    pub metadata: Metadata,
    /// The optimizer's state, of a checkpoint that has one.
    pub state: Option<(WritableSlot, Metadata)>,
}

/// What an aggregator asks of its shell.
#[derive(Debug)]
pub enum Output {
    /// To send a frame.
    Send(Frame),
    /// To map another worker's arena; answered by [`Input::ArenaOpened`].
    OpenArena(ArenaId),
    /// To put a model's data into a slot: the job's first, or a checkpoint's with the optimizer's state. Answered by
    /// [`Input::ModelLoaded`], without which no round begins.
    LoadModel {
        /// For the model.
        model: WritableSlot,
        /// For the optimizer's state, if the optimizer has one.
        state: Option<WritableSlot>,
    },
    /// To receive the model that [waits](Input::ModelOffered). The slot is free again if it is dropped.
    ReceiveModel(WritableSlot),
    /// To send a round's aggregate to the gateway from its slot, where it stays until the verdict.
    SendAggregate(u32, UpdateInfo, Key),
    /// To tell the gateway that nothing comes of a round.
    SendNothing {
        /// The round.
        round: u32,
    },
}

/// Why an aggregator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arena is too small for its first object.
    #[error("a new arena has no free slot")]
    NoFreeSlot,
    /// The coordinator named a worker of a number that none has.
    #[error("the coordinator named an impossible worker, {0}")]
    ImpossibleWorker(u64),
    /// An object of its own is not in the state in which it must be.
    #[error("an object of this worker cannot be lent")]
    Slot(#[from] SlotError),
    /// An update that was checked lies outside its arena.
    #[error("an update cannot be read")]
    Arena(#[from] ArenaError),
    /// The rule, or the optimizer, was used wrongly.
    #[error("the updates cannot be aggregated")]
    Aggregation(#[from] FoldError),
    /// No memory for a private copy.
    #[error("no memory for a copy of an update of {bytes} bytes")]
    Memory {
        /// Bytes of the update.
        bytes: usize,
        /// What the allocator says.
        #[source]
        source: std::collections::TryReserveError,
    },
    /// The first model cannot be averaged.
    #[error(
        "the job's first model holds NaN, infinity or a number too large to be averaged: begin with another baseModel"
    )]
    FirstModelNotFinite,
    /// A checkpoint's parts are of different rounds.
    #[error("the optimizer's state is of round {state}, its model of {model}")]
    StateOfOtherRound {
        /// The round of the state.
        state: u32,
        /// That of the model.
        model: u32,
    },
    /// A checkpoint of a job with another optimizer.
    #[error("the checkpoint has a state, this job's optimizer has none")]
    UnexpectedState,
    /// A checkpoint without what the optimizer needs.
    #[error("the checkpoint lacks the optimizer's state")]
    MissingState,
    /// A model from the gateway of another length or schema.
    #[error("the model that came is not the job's")]
    OtherModel,
    /// The round's model is gone from the top's own arena.
    #[error("the top has not the round's model any more")]
    ModelGone,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Aggregator {
    config: Config,
    /// What the top has beside other aggregators.
    top: Option<TopState>,
    arena: OwnedArena,
    rule: Box<dyn Rule>,
    /// When [`handle`](Self::handle) was called last.
    now: Duration,
    /// Whether something has come since [`Input::Timeout`].
    batch_open: bool,
    /// Frames of the batch, in the order in which they were posted.
    outbox: Vec<Frame>,
    outputs: VecDeque<Output>,
    round: Round,
    /// The last round in which the parent has had an answer by frame.
    answered: u32,
    /// What is folded and not published: its time is that of the next [`handle`](Self::handle).
    unpublished: Option<RoundFold>,
    /// Models that were handed down and not given back by all who hold them.
    leases: Vec<ModelLease>,
    /// Models of rounds that are not announced yet.
    offered: OfferedModels,
    /// Aggregates that the parent has not decided on, and the last that it has.
    pending: Vec<PendingAggregate>,
    /// Updates whose arenas are being opened.
    unopened: EarlyFrames,
    /// The arenas that are being opened.
    opening: BTreeSet<ArenaId>,
    /// Whether the gateway has a model to give.
    model_offered: bool,
    /// Who is gone: frames of theirs may still come.
    gone: BTreeSet<WorkerId>,
    /// Whose frames of which kind the log has told of in this round, so that nobody can fill it.
    logged: BTreeSet<(WorkerId, u16)>,
}

/// The top's part.
#[derive(Debug)]
struct TopState {
    optimizer: OptimizerState,
    quorum: u32,
    rounds: u32,
    /// The current model; `None` before it is loaded.
    current: Option<LentModel>,
}

impl Aggregator {
    /// An aggregator before its first round, with the arena that its shell has mapped for it.
    ///
    /// # Errors
    /// If the arena has no slot.
    pub fn new(
        config: Config,
        top: Option<Top>,
        rule: Box<dyn Rule>,
        arena: OwnedArena,
    ) -> Result<Self, Error> {
        let top = top.map(|top| TopState {
            optimizer: OptimizerState::new(top.optimizer, top.state_arena),
            quorum: top.quorum,
            rounds: top.rounds,
            current: None,
        });
        let mut aggregator = Self {
            config,
            top,
            arena,
            rule,
            now: Duration::ZERO,
            batch_open: false,
            outbox: Vec::new(),
            outputs: VecDeque::new(),
            round: Round::default(),
            answered: 0,
            unpublished: None,
            leases: Vec::new(),
            offered: OfferedModels::default(),
            pending: Vec::new(),
            unopened: EarlyFrames::default(),
            opening: BTreeSet::new(),
            model_offered: false,
            gone: BTreeSet::new(),
            logged: BTreeSet::new(),
        };
        aggregator.load_model()?;
        Ok(aggregator)
    }

    /// Handles one input. `now` is nanoseconds of the node's monotonic clock, in which what is made is dated.
    ///
    /// # Errors
    /// If the aggregator cannot go on. Nothing that another worker sends makes it so.
    pub fn handle(&mut self, now: Duration, input: Input) -> Result<(), Error> {
        self.now = now;
        if let Some(folded) = self.unpublished.take() {
            self.publish(folded)?;
        }
        self.batch_open = true;
        match input {
            Input::Ready => self.post(self.config.coordinator, FrameKind::Ready, Frame::default()),
            Input::Frame(frame) => self.frame(frame)?,
            Input::PeerLost(worker) => {
                self.gone.insert(worker);
                self.offered.lost(worker);
                self.peer_lost(worker);
            }
            Input::Undelivered(to, refusal) => {
                // Who did not get it has it no longer: as good as gone, until the coordinator names a successor.
                self.peer_lost(to);
                if refusal == Refusal::ReceiverFull
                    && let Stage::Folding(fold) = &mut self.round.stage
                {
                    fold.children.nothing(to);
                }
            }
            Input::ArenaOpened { arena, opened } => self.arena_opened(arena, &opened)?,
            Input::ModelLoaded(loaded) => self.model_loaded(*loaded)?,
            Input::ModelOffered => self.model_offered = true,
            Input::ModelReceived(object, slot) => self.model_received(object, slot)?,
            Input::Verdict { round, refusal } => self.gateway_verdict(round, refusal),
            Input::Timeout => self.end_batch()?,
        }
        Ok(())
    }

    /// The next thing that the shell is asked for.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`Input::Timeout`] is due, as soon as no other input is ready; `None` if there is nothing to do.
    pub fn timeout(&self) -> Option<Duration> {
        self.batch_open.then_some(self.now)
    }

    /// Whether it waits for nobody and nobody has anything of its: no model is out, no aggregate undecided, a slot free.
    #[cfg(test)]
    pub(crate) fn is_idle(&mut self) -> bool {
        self.leases.is_empty()
            && self.pending.iter().all(|pending| pending.verdict.is_some())
            && self.arena.begin().is_some()
    }

    fn is_top(&self) -> bool {
        self.top.is_some()
    }

    fn frame(&mut self, frame: Frame) -> Result<(), Error> {
        let Some(kind) = FrameKind::from_number(frame.kind) else {
            return Ok(());
        };
        let coordinator = frame.from == self.config.coordinator;
        match kind {
            FrameKind::Child if coordinator => {
                self.announce(frame.round);
                if frame.round == self.round.number {
                    self.round.list_child(&frame)?;
                }
            }
            FrameKind::Begin if coordinator => {
                self.announce(frame.round);
                if frame.round == self.round.number {
                    self.begin(worker_id(&frame)?)?;
                }
            }
            FrameKind::Close if coordinator => {
                self.round.closing |= frame.round == self.round.number;
            }
            FrameKind::Model => self.model(LentModel::of(&frame))?,
            FrameKind::Taken => self.taken(&frame)?,
            FrameKind::Update | FrameKind::Nothing => self.answer(frame, None)?,
            FrameKind::Release => self.released(&frame),
            FrameKind::Refuse => self.decided(&frame),
            FrameKind::Ping if coordinator => {
                let pong = Frame {
                    round: self.answered,
                    ..Frame::default()
                };
                self.post(frame.from, FrameKind::Pong, pong);
            }
            FrameKind::Child
            | FrameKind::Begin
            | FrameKind::Close
            | FrameKind::Ready
            | FrameKind::State
            | FrameKind::Ping
            | FrameKind::Pong => {
                if self.log_once(frame.from, frame.kind) {
                    tracing::warn!(?kind, from = %frame.from, "not for an aggregator, or not from the coordinator");
                }
            }
        }
        Ok(())
    }

    /// A peer is gone, or as good as gone: it holds no model any more, and decides on no aggregate. What becomes of its
    /// place among the children the coordinator says.
    fn peer_lost(&mut self, worker: WorkerId) {
        self.arena.take_back(worker);
        if let Some(top) = &mut self.top {
            top.optimizer.take_back(worker);
        }
        self.end_leases(worker, |_| true);
        for pending in &mut self.pending {
            pending.lent.lost(worker);
        }
        self.give_up_orphans();
    }

    /// Nothing more is ready: what can begin begins, what has come is folded, if it is its time, and the batch's frames go.
    fn end_batch(&mut self) -> Result<(), Error> {
        self.start_round()?;
        self.receive_offered_model();
        self.hand_down_deferred()?;
        self.fold()?;
        self.batch_open = self.unpublished.is_some();
        if !self.batch_open {
            self.outputs.extend(self.outbox.drain(..).map(Output::Send));
        }
        Ok(())
    }

    /// Has a frame sent when the batch is over.
    fn post(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) {
        if matches!(kind, FrameKind::Update | FrameKind::Nothing) {
            self.answered = self.answered.max(frame.round);
        }
        let kind = kind as u16;
        self.send(Frame { to, kind, ..frame });
    }

    fn send(&mut self, frame: Frame) {
        let from = self.config.worker;
        self.outbox.push(Frame { from, ..frame });
    }

    /// Whether the log is to tell of something that a worker did: once a round.
    fn log_once(&mut self, worker: WorkerId, what: u16) -> bool {
        self.logged.insert((worker, what))
    }

    /// A model in its own arena, for that round's training.
    fn own_model(&self, round: u32, key: Key) -> LentModel {
        LentModel {
            round,
            key,
            length: image::image_bytes(&self.config.schema) as u64,
            lender: WorkerId::NONE,
        }
    }
}

/// The worker that a frame from the coordinator names.
fn worker_id(frame: &Frame) -> Result<WorkerId, Error> {
    let id = u32::try_from(frame.value).map_err(|_| Error::ImpossibleWorker(frame.value))?;
    Ok(WorkerId(id))
}

#[cfg(test)]
mod tests;
