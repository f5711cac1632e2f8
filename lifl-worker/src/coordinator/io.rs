//! What goes into the [coordinator](super::Coordinator) and what comes out: plain data.

use lifl_common::control;
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::kernel::Counters;
use lifl_common::update::Metadata;

use super::failures::KillReason;

/// What the coordinator is told. Workers are given by their index in the job, registrations by their number.
#[derive(Debug)]
pub enum Input {
    /// From the coordinator's frame socket. Whatever a worker has sent before it died must come before its loss or its end:
    /// whoever drives the coordinator reads the socket empty before it passes those on.
    Frame(Frame),
    /// From the daemon, unasked. [`Living`](control::Event::Living) says that it is back after it was away; nothing says that
    /// it is away, but that there is [no status](Input::Status).
    Daemon(control::Event),
    /// The answer to [`Output::Start`].
    Started {
        /// The worker.
        worker: usize,
        /// What is wrong, if its process cannot be started.
        result: Result<(), String>,
    },
    /// A worker's process has ended, and has been reaped.
    Exited {
        /// The worker.
        worker: usize,
        /// What its end was; `None` if [`Output::Kill`] was.
        how: Option<String>,
    },
    /// The answer to [`Output::AskStatus`]: what each registration has sent, as the plane counts it; `None` while there is no
    /// daemon that knows.
    Status(Option<Vec<(WorkerId, Counters)>>),
    /// The answer to [`Output::FindHolder`].
    NameTaken {
        /// The worker.
        worker: usize,
        /// The process that is registered under its name; `None` if no daemon can say.
        holder: Option<u32>,
    },
    /// The answer to [`Output::CheckModel`]: what the image says of itself, or why it cannot be read or is not of the job's
    /// schema.
    Checked(Result<Metadata, String>),
    /// The answer to [`Output::Evaluate`].
    Evaluated {
        /// The mean loss on the test set, if the job has one.
        loss: Option<f64>,
    },
    /// The answer to [`Output::Write`].
    Written {
        /// Why the checkpoint could not be written; the job goes on without it.
        error: Option<String>,
    },
    /// This process was suspended for a while, and the workers perhaps with it: nobody's silence in that time counts.
    Suspended,
    /// It is the [time](super::Coordinator::timeout).
    Timeout,
}

/// What the coordinator wants done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a frame on the coordinator's frame socket.
    Send(Frame),
    /// Start a successor's process. The top's begins with the model that was [decided](Self::Decided) last, if there is one.
    /// Answered by [`Input::Started`].
    Start(usize),
    /// Kill a worker's process, if it still runs; that it has ended is told as any other's end is.
    Kill(usize),
    /// Have the gateway give up a remote worker that is dead: its proxy leaves.
    DropProxy(usize),
    /// Ask the daemon for the counters of all that is registered, without waiting for a daemon that is away. Answered by
    /// [`Input::Status`].
    AskStatus,
    /// Look up which process is registered under that worker's name, without waiting for a daemon that is away. Answered by
    /// [`Input::NameTaken`].
    FindHolder(usize),
    /// Map a new top's arenas while it lives: what it makes may be wanted when it does not.
    MapArenas(WorkerId),
    /// Check that a model is an image of the job's schema, and read what it says of itself. Answered by [`Input::Checked`].
    /// The next is not asked for before.
    CheckModel(LentModel),
    /// The model that was checked last is its round's: it is kept, with what its metadata said then, until the next is decided.
    Decided {
        /// The round.
        round: u32,
        /// Whether its metadata is of this round: a model that no update changed is the round's before.
        changed: bool,
        /// The trainers that could have taken part and are not in it.
        left_out: Vec<usize>,
    },
    /// Evaluate the model that was decided last. Answered by [`Input::Evaluated`].
    Evaluate(u32),
    /// Write that round's model out, if it is time to. Answered by [`Input::Written`]; only then is it given back.
    Write {
        /// The round.
        round: u32,
        /// Whether it is worth keeping: an update has gone into it and, at the end, it is of use.
        useful: bool,
    },
    /// Tell of something.
    Report(Event),
    /// The job is over: all rounds are done, or it has failed. Nothing comes after it.
    Done(Result<(), Failure>),
}

/// A model that a top has lent to the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LentModel {
    /// The frame that lends it. Its key is of an arena of its sender.
    pub model: Frame,
    /// The frame that lends what the optimizer remembers with it, of the same sender.
    pub state: Option<Frame>,
}

/// What happens in a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// All workers are ready: the first round is next.
    AllReady,
    /// A round begins: its number, from 1.
    RoundBegins(u32),
    /// That round's model has been evaluated.
    RoundDone(u32),
    /// That round has no checkpoint, and why.
    CheckpointFailed(u32, String),
    /// Something happens to a worker.
    Worker {
        /// Its index.
        worker: usize,
        /// In which round.
        round: u32,
        /// What.
        what: WorkerEvent,
    },
}

/// What happens to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerEvent {
    /// It has died.
    Lost {
        /// What its end was.
        how: String,
        /// Whether another is started in its place.
        restarting: bool,
    },
    /// It is killed because it is of no use any more.
    Killed(KillReason),
    /// Its successor could not be started.
    NotStarted {
        /// Why.
        error: String,
        /// Whether the job goes on without it; else it is tried again.
        given_up: bool,
    },
    /// Its successor is ready.
    Replaced,
    /// A trainer: it has nothing to give in the round.
    Failed,
    /// Its update was refused by its own fault.
    UpdateRefused(Refusal),
}

/// Why a job has failed.
#[derive(Clone, Debug, PartialEq)]
pub enum Failure {
    /// A worker has died before the first round, or the top too often.
    WorkerGone {
        /// Its index.
        worker: usize,
        /// In which round; 0 before the first.
        round: u32,
        /// What its end was.
        how: String,
    },
    /// A process that is not of this run holds a dead aggregator's name.
    NameTaken {
        /// The aggregator's index.
        worker: usize,
        /// That process.
        holder: u32,
    },
    /// The top's successor cannot be started.
    TopNotStarted {
        /// Why.
        error: String,
    },
    /// There are fewer trainers than a round needs, and no more are awaited.
    TooFewTrainers {
        /// From 1.
        round: u32,
        /// Trainers that could take part.
        trainers: u32,
    },
    /// No update has been folded in any round.
    NothingFolded,
    /// The last model's loss on the test set is not finite.
    NotFinite {
        /// That loss.
        loss: f64,
    },
    /// The daemon has ended the job.
    JobEnded {
        /// Why.
        reason: String,
    },
}
