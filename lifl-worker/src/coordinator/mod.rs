//! The coordinator: decides who takes part in each round, what each worker is told, who is replaced, and when the job is over.
//!
//! A state machine without I/O. Whoever drives it passes [`Input`]s to [`handle`](Coordinator::handle), does what
//! [`poll_output`](Coordinator::poll_output) gives, in order, and calls `handle` with [`Input::Timeout`] when the time that
//! [`timeout`](Coordinator::timeout) gives has come. Time is since some beginning of the driver's; it counts only while the driver
//! runs, so that nobody is held to have been silent while the machine, or only the coordinator, was suspended. All workers'
//! processes have been started when it is made.
//!
//! ```text
//!   starting ─ all ready ─▶ planning ─ enough trainers, all aggregators ─▶ running ─ the top's model is decided ─▶ draining
//!                              ▲                                                                                     │
//!                              └───────────────────────────────── another round ─────────────────────────────────────┤
//!                                                         done ◀── the last model is examined ── finishing ◀─────────┘
//! ```
//!
//! A round is decided when the top's `Model` frame has come and its image has been held against what is known, whatever happens
//! to the top then: until that frame nobody's update has been given back, so that a successor can make the round anew. While
//! draining, the model before is still being examined; each is evaluated, told of, written out and given back in this order, so
//! that a run which is killed at any moment and resumed has told of every round.
//!
//! The coordinator alone decides what becomes of a worker that dies or hangs (`failures`). A dead aggregator's place is kept for
//! its successor, which gets the references that its children still lend; a dead trainer's is empty until the next round.
//!
//! Any process of the job's user can register and send frames. Whose frame decides anything is looked up in the
//! `membership`, and what the top says of its model is held against what is known of the trainers.

mod failures;
mod io;
mod liveness;
mod membership;
mod pairing;
mod policy;
mod rounds;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use lifl_common::config::{JobSpec, Kind};
use lifl_common::control::{self, DeadLetter};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;

use self::failures::Failures;
pub use self::failures::{KillReason, MOST_DEATHS};
pub use self::io::{Event, Failure, Input, LentModel, Output, WorkerEvent};
use self::liveness::Liveness;
use self::membership::Membership;
pub use self::pairing::{Pair, pair};
pub use self::policy::{Admission, RoundPolicy, Synchronous};
use self::rounds::{Examination, Phase, RoundClock};

/// The coordinator of one job.
#[derive(Debug)]
pub struct Coordinator {
    id: WorkerId,
    job: Arc<JobSpec>,
    policy: Box<dyn RoundPolicy>,
    membership: Membership,
    failures: Failures,
    liveness: Liveness,
    phase: Phase,
    /// Which round runs, or is next; 0 before the first.
    round: u32,
    first_round: u32,
    clock: RoundClock,
    /// Who has said that it is ready before the daemon has told of it: the two ways are not in step.
    early: BTreeSet<WorkerId>,
    /// Who is the top, and who was.
    tops: BTreeSet<WorkerId>,
    /// Whose frames of which kind have been told of in the round that runs: what was not expected, and failures.
    told: BTreeSet<(WorkerId, u16)>,
    /// The last [`State`](FrameKind::State) frame of the round, until a model comes after it.
    state: Option<Frame>,
    /// Models of the round that are to be checked, one for each top; the first is being checked if `checking`.
    candidates: VecDeque<LentModel>,
    checking: bool,
    /// The model that was decided last, until the one before has been examined.
    decided: Option<Examination>,
    examining: Option<Examination>,
    /// Whether an update has gone into the model, in this run or in those that it goes on from.
    anything_folded: bool,
    /// The loss of the last model that was evaluated.
    loss: Option<f64>,
    outputs: VecDeque<Output>,
}

impl Coordinator {
    /// The coordinator of a job whose workers' processes have just been started. `samples` is how many training samples each
    /// worker has, 0 for an aggregator; `first_round` is from 1, the one after the checkpoint in a run that goes on.
    pub fn new(
        id: WorkerId,
        job: Arc<JobSpec>,
        policy: Box<dyn RoundPolicy>,
        samples: Vec<u64>,
        first_round: u32,
    ) -> Self {
        let remote = job.workers.iter().map(|spec| spec.is_remote());
        Self {
            id,
            policy,
            membership: Membership::new(id, Arc::clone(&job), samples),
            failures: Failures::new(remote, Duration::from_secs_f64(job.grace_time_s)),
            liveness: Liveness::default(),
            phase: Phase::Starting,
            round: 0,
            first_round,
            clock: RoundClock::default(),
            early: BTreeSet::new(),
            tops: BTreeSet::new(),
            told: BTreeSet::new(),
            state: None,
            candidates: VecDeque::new(),
            checking: false,
            decided: None,
            examining: None,
            anything_folded: false,
            loss: None,
            outputs: VecDeque::new(),
            job,
        }
    }

    /// Takes an input, at a time that is not before any that was given.
    pub fn handle(&mut self, now: Duration, input: Input) {
        if self.phase == Phase::Done {
            return;
        }
        match input {
            Input::Frame(frame) => self.frame(now, frame),
            Input::Daemon(event) => self.daemon_event(now, event),
            Input::Started { worker, result } => match result {
                Ok(()) => self.failures.started(worker, now),
                Err(error) => self.not_started(now, worker, error),
            },
            Input::Exited { worker, how } => {
                if self.failures.process_ended(worker, now) {
                    self.lost(worker);
                }
                self.tell_of_loss(worker, how);
            }
            Input::NameTaken { worker, holder } => self.name_taken(now, worker, holder),
            Input::Status(counters) => self.status(now, counters),
            Input::Checked(checked) => self.checked(checked),
            Input::Evaluated { loss } => self.evaluated(loss),
            Input::Written { error } => self.written(error),
            // Whoever was suspended with this process has had no time to answer.
            Input::Suspended => self.liveness.reset(),
            Input::Timeout => {}
        }
        self.advance(now);
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When [`handle`](Self::handle) is to be called with [`Input::Timeout`] at the latest; never once the job is over.
    pub fn timeout(&self) -> Option<Duration> {
        if self.phase == Phase::Done {
            return None;
        }
        let deadlines = [self.failures.next_deadline(), self.next_look()];
        deadlines.into_iter().flatten().min()
    }

    /// Registrations that are ready, of as many as there [are to be](JobSpec::registrations) without the coordinator.
    pub fn ready_count(&self) -> usize {
        self.membership.ready_count()
    }

    /// Which round runs, or is next; 0 before the first.
    pub fn round(&self) -> u32 {
        self.round
    }

    fn send(&mut self, frames: impl IntoIterator<Item = Frame>) {
        self.outputs.extend(frames.into_iter().map(Output::Send));
    }

    fn report(&mut self, event: Event) {
        self.outputs.push_back(Output::Report(event));
    }

    fn report_of(&mut self, worker: usize, what: WorkerEvent) {
        let round = self.round;
        self.report(Event::Worker { worker, round, what });
    }

    fn done(&mut self, result: Result<(), Failure>) {
        if self.phase != Phase::Done {
            self.phase = Phase::Done;
            self.outputs.push_back(Output::Done(result));
        }
    }

    fn frame(&mut self, now: Duration, frame: Frame) {
        if let Some(letter) = DeadLetter::returned(&frame, self.id) {
            return self.daemon_event(now, control::Event::DeadLetter(letter));
        }
        match FrameKind::from_number(frame.kind) {
            Some(FrameKind::Ready) => self.ready(now, frame.from),
            Some(FrameKind::Pong) => {
                if self.membership.index(frame.from).is_some() {
                    self.liveness.heard(frame.from, frame.round);
                }
            }
            Some(FrameKind::Nothing) => self.trainer_failed(&frame),
            Some(FrameKind::Refuse) => self.update_refused(&frame),
            Some(kind @ (FrameKind::Model | FrameKind::State)) if self.tops.contains(&frame.from) => {
                self.lent(kind, frame);
            }
            kind => {
                if self.told.insert((frame.from, kind.map_or(0, |kind| kind as u16))) {
                    tracing::warn!(?kind, from = %frame.from, "not expected");
                }
            }
        }
    }

    /// A trainer, or its proxy, says that it has nothing to give in the round.
    fn trainer_failed(&mut self, frame: &Frame) {
        let index = self.membership.index(frame.from);
        let trainer = index.filter(|&index| self.job.workers[index].kind == Kind::Trainer);
        if let Some(worker) = trainer
            && frame.round == self.round
            && self.told.insert((frame.from, frame.kind))
        {
            self.report_of(worker, WorkerEvent::Failed);
        }
    }

    /// A parent says that it has refused a child's update.
    fn update_refused(&mut self, frame: &Frame) {
        let refusal = Refusal::from_number(frame.refusal).filter(|refusal| refusal.is_senders_fault());
        let child = u32::try_from(frame.value).ok().map(WorkerId);
        let worker = child.and_then(|child| self.membership.index(child));
        let (Some(refusal), Some(child), Some(worker)) = (refusal, child, worker) else {
            return;
        };
        let parent = self.membership.parent(worker);
        if frame.round == self.round
            && parent.is_some()
            && parent == self.membership.index(frame.from)
            && self.told.insert((child, frame.kind))
        {
            self.report_of(worker, WorkerEvent::UpdateRefused(refusal));
        }
    }

    fn daemon_event(&mut self, now: Duration, event: control::Event) {
        match event {
            control::Event::PeerJoined { worker: id, name } => {
                match self.membership.joined(id, &name) {
                    Some(worker) => self.failures.registered(worker),
                    None => {
                        tracing::warn!(%id, name, "registered as what the job has no place for: it takes no part")
                    }
                }
                if self.early.remove(&id) {
                    self.ready(now, id);
                }
            }
            control::Event::PeerLost(lost) => {
                self.early.remove(&lost.worker);
                self.left(now, [lost.worker]);
            }
            control::Event::Living { first, last, workers } => {
                tracing::info!("the daemon is back");
                self.liveness.reset();
                let gone = self.membership.ids(first, last).into_iter();
                let gone = gone.filter(|id| workers.binary_search(id).is_err());
                self.left(now, gone);
            }
            control::Event::DeadLetter(letter) => {
                tracing::debug!(to = %letter.to, kind = letter.kind, "not delivered: {}", letter.refusal);
            }
            control::Event::JobEnded { reason } => self.done(Err(Failure::JobEnded { reason })),
        }
    }

    /// A worker can begin.
    fn ready(&mut self, now: Duration, id: WorkerId) {
        if self.membership.index(id).is_none() {
            self.early.insert(id);
            return;
        }
        let Some(worker) = self.membership.ready(id) else {
            return;
        };
        if self.job.workers[worker].kind == Kind::Top {
            self.tops.insert(id);
            self.outputs.push_back(Output::MapArenas(id));
        }
        if self.round == 0 {
            return;
        }
        self.failures.ready(worker);
        self.succeeded(now, worker);
        self.report_of(worker, WorkerEvent::Replaced);
    }

    /// Workers' connections to the daemon, or their proxies', are closed.
    fn left(&mut self, now: Duration, ids: impl IntoIterator<Item = WorkerId>) {
        // All of them first: none of them is told of another.
        let workers = ids.into_iter().filter_map(|id| self.membership.left(id));
        for worker in workers.collect::<Vec<_>>() {
            if self.failures.connection_closed(worker, now) {
                self.lost(worker);
            } else if self.job.workers[worker].kind == Kind::Trainer {
                // Its process had ended before, and a round has begun since.
                self.vacate(worker);
            }
        }
    }

    /// A worker is dead: nobody waits for it any more.
    fn lost(&mut self, worker: usize) {
        let spec = &self.job.workers[worker];
        if spec.is_remote() {
            self.outputs.push_back(Output::DropProxy(worker));
        }
        if self.failures.is_given_up(worker) {
            self.give_up(worker);
        } else if spec.kind == Kind::Trainer {
            self.vacate(worker);
        }
    }

    /// The job goes on without a worker.
    fn give_up(&mut self, worker: usize) {
        self.membership.give_up(worker);
        self.vacate(worker);
    }

    /// Nobody is waited for in that place in the round that runs.
    fn vacate(&mut self, worker: usize) {
        if self.phase == Phase::Running {
            let frames = self.membership.vacated(worker);
            self.send(frames);
        }
    }

    /// A worker that is dead has said its last words. Before the first round that ends the job.
    fn tell_of_loss(&mut self, worker: usize, how: Option<String>) {
        let how = self.failures.cause_of_death(worker, how);
        let (round, restarting) = (self.round, !self.failures.is_given_up(worker));
        if round == 0 || (self.job.workers[worker].kind == Kind::Top && !restarting) {
            return self.done(Err(Failure::WorkerGone { worker, round, how }));
        }
        self.report_of(worker, WorkerEvent::Lost { how, restarting });
    }

    /// A dead worker's name stays registered, so that no successor can have it: the job goes on without a trainer, and cannot
    /// without an aggregator.
    fn name_taken(&mut self, now: Duration, worker: usize, holder: Option<u32>) {
        if !self.failures.is_name_held(worker) {
            return;
        }
        let Some(holder) = holder else {
            return self.failures.look_up_again(worker, now);
        };
        if self.job.workers[worker].kind != Kind::Trainer {
            return self.done(Err(Failure::NameTaken { worker, holder }));
        }
        self.failures.give_up(worker);
        self.give_up(worker);
        let how = format!("process {holder}, which is not of this run, has registered under its name");
        let restarting = false;
        self.report_of(worker, WorkerEvent::Lost { how, restarting });
    }

    /// A successor's process cannot be started. It is tried again a few times; then the job goes on without it, unless it is
    /// the top's.
    fn not_started(&mut self, now: Duration, worker: usize, error: String) {
        self.failures.not_started(worker, now);
        let given_up = self.failures.is_given_up(worker);
        if given_up && self.job.workers[worker].kind == Kind::Top {
            return self.done(Err(Failure::TopNotStarted { error }));
        }
        self.report_of(worker, WorkerEvent::NotStarted { error, given_up });
        if given_up {
            self.give_up(worker);
        }
    }

    /// Kills a worker that is of no use any more. Of those who have left already, their death is told.
    fn kill(&mut self, worker: usize, reason: KillReason) {
        if !self.failures.kill(worker, reason) {
            return;
        }
        if !matches!(reason, KillReason::Disconnected | KillReason::SessionOver) {
            self.report_of(worker, WorkerEvent::Killed(reason));
        }
        self.outputs.push_back(Output::Kill(worker));
    }

    /// Starts successors in the places of those who are wholly gone.
    fn restart_lost(&mut self, now: Duration) {
        // A round that is decided is not begun anew.
        if !self.candidates.is_empty() {
            return;
        }
        for worker in self.failures.startable(now) {
            // Its successor begins with what is just being written.
            let top = self.job.workers[worker].kind == Kind::Top;
            if !(top && (self.examining.is_some() || self.decided.is_some())) {
                self.failures.starting(worker);
                self.outputs.push_back(Output::Start(worker));
            }
        }
    }
}
