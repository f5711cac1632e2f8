//! What becomes of those who die or hang: a successor is started in their place, or the job goes on without them.
//!
//! ```text
//!                its process ends, or its connection             both have ended
//!   at work ─────────────────────────────────────────▶ lost ───────────────────────▶ another is started ── ready ──▶ at work
//!      ▲                                                 └── too often since it finished a round, or remote ──▶ given up
//!      └── hangs: it is killed
//! ```
//!
//! What follows from a death follows at once; it is told when the process has been reaped, so that all it had to say is in its
//! log. A process that has closed its connection and does not end is killed.
//!
//! Times are those in which this process [was running](super::awake::Awake), so that nobody is held to have been silent while
//! the machine, or only the coordinator, was suspended.
//!
//! The coordinator alone decides. A dead aggregator's place is kept for its successor, which gets the references that its
//! children still lend; a dead trainer's is empty until the next round.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use lifl_common::config::Kind;
use lifl_common::control::Status;
use lifl_common::id::WorkerId;
use lifl_common::kernel::Counters;
use lifl_worker::coordinator::liveness::Verdicts;

use super::report::Event;
use super::rounds::Rounds;
use crate::clock::monotonic_ns;
use crate::exit::{Because, Cause, Failure, Outcome};

/// How long to wait before a process is started again that could not be.
const START_AGAIN: Duration = Duration::from_secs(1);

/// How long a process may take to end whose connection is closed.
const LEAVE: Duration = Duration::from_secs(2);

/// How often a worker may die without having finished a round in between before it is given up.
const MOST_DEATHS: u32 = 3;

/// How long a worker may take from its start until it is ready, at the least.
const START_TIME: Duration = Duration::from_secs(30);

/// How long the children of an aggregator that has just taken over have to say again what they have, when the round's time is
/// over.
const SAY_AGAIN: Duration = Duration::from_secs(1);

/// How often the plane's counters are looked at, once there is a reason to: while a round is to be closed; to see who hangs, so
/// many times in the grace time.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const LOOKS_A_GRACE_TIME: u32 = 10;

/// One worker's process and connection.
#[derive(Debug, Default)]
pub(super) struct Life {
    pub(super) running: bool,
    pub(super) registered: bool,
    /// It is dead and what follows from that has been done, but for the successor's start.
    lost: bool,
    /// That has been told.
    told: bool,
    given_up: bool,
    deaths: u32,
    /// When it was started, until it is ready.
    started: Option<Duration>,
    /// When its connection was closed, while its process runs.
    closed: Option<Duration>,
    /// Why it was killed by us.
    ended: Option<&'static str>,
    /// No successor is started before that: the last attempt has failed.
    not_before: Option<Instant>,
}

impl Life {
    /// Of a process that has just been started.
    pub(super) fn started() -> Self {
        Self {
            running: true,
            ..Self::default()
        }
    }
}

/// When a round began, and what its clock has done.
#[derive(Debug)]
pub(super) struct Clock {
    begun: Instant,
    pub(super) begun_ns: u64,
    begun_awake: Duration,
    /// Trainers are not waited for any more.
    closed: bool,
    /// Aggregators that took over after that: when they are told.
    to_close: Vec<(Duration, usize)>,
    looked: Duration,
}

impl Clock {
    pub(super) fn start(awake: Duration) -> Self {
        Self {
            begun: Instant::now(),
            begun_ns: monotonic_ns(),
            begun_awake: awake,
            closed: false,
            to_close: Vec::new(),
            looked: awake,
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }
}

impl Rounds<'_, '_> {
    /// A worker's connection to the daemon, or its proxy's, is closed.
    pub(super) fn connection_closed(&mut self, index: usize) -> Outcome {
        let life = &mut self.lives[index];
        life.registered = false;
        if life.running {
            life.closed.get_or_insert(self.awake.time());
        }
        self.gone(index);
        Ok(())
    }

    /// A worker's process has ended, and has been reaped.
    pub(super) fn process_ended(&mut self, index: usize, how: &str) -> Outcome {
        let life = &mut self.lives[index];
        life.running = false;
        life.closed = None;
        self.gone(index);
        self.tell_of_death(index, how)
    }

    /// A worker is dead: nobody waits for it any more.
    fn gone(&mut self, index: usize) {
        let life = &mut self.lives[index];
        if std::mem::replace(&mut life.lost, true) {
            return;
        }
        life.deaths += 1;
        life.started = None;
        let spec = &self.run.job.workers[index];
        let remote = spec.is_remote();
        if remote {
            self.to_drop.push(index);
        }
        let restarting = !remote && life.deaths <= MOST_DEATHS;
        if !restarting {
            life.given_up = true;
            self.roster.give_up(index);
        }
        if spec.kind == Kind::Trainer || !restarting {
            self.outgoing.extend(self.roster.vacated(index));
        }
    }

    /// A worker that is dead has said its last words. Before the first round that ends the job.
    fn tell_of_death(&mut self, index: usize, how: &str) -> Outcome {
        let life = &mut self.lives[index];
        if std::mem::replace(&mut life.told, true) {
            return Ok(());
        }
        let how = match life.ended.take() {
            Some(why) => format!("{why}, so it was ended"),
            None => how.to_owned(),
        };
        let spec = &self.run.job.workers[index];
        if self.round == 0 || (spec.kind == Kind::Top && life.given_up) {
            let log = self.run.folder.log_tail(&spec.name, 5);
            let when = if self.round == 0 {
                "before the first round".to_owned()
            } else {
                format!(
                    "in round {}, {MOST_DEATHS} times without having finished one",
                    self.round
                )
            };
            let error = anyhow!("{} is gone {when} ({how}); the end of its log:\n{log}", spec.name);
            return Err(Failure::new(Cause::Job, error));
        }
        let event = Event::WorkerLost {
            worker: spec.name.clone(),
            round: self.round,
            how,
            last_words: self.run.folder.last_words(&spec.name),
            restarting: !life.given_up,
        };
        self.reporter.event(&event).because(Cause::Job)
    }

    /// Starts successors for those who are wholly gone.
    pub(super) async fn restart_lost(&mut self) -> Outcome {
        for index in 0..self.lives.len() {
            let life = &self.lives[index];
            if !life.lost || life.given_up || life.running || life.registered {
                continue;
            }
            // Its successor begins with what is just being written.
            if self.is_examining() && self.run.job.workers[index].kind == Kind::Top {
                continue;
            }
            if life.not_before.is_some_and(|when| Instant::now() < when) {
                continue;
            }
            if let Err(failure) = self.start_successor(index).await {
                self.not_started(index, failure)?;
                continue;
            }
            let life = &mut self.lives[index];
            (life.lost, life.told, life.running) = (false, false, true);
            life.started = Some(self.awake.time());
        }
        Ok(())
    }

    /// A successor's process cannot be started. It is tried again a few times; then the job goes on without it, unless it is
    /// the top's.
    fn not_started(&mut self, index: usize, failure: Failure) -> Outcome {
        let spec = &self.run.job.workers[index];
        let life = &mut self.lives[index];
        life.deaths += 1;
        life.not_before = Some(Instant::now() + START_AGAIN);
        let too_often = life.deaths > MOST_DEATHS;
        if too_often && spec.kind == Kind::Top {
            return Err(failure);
        }
        let then = if too_often {
            "going on without it"
        } else {
            "trying again"
        };
        let (round, name) = (self.round, &spec.name);
        self.reporter
            .say(&format!("round {round}: {name}: {:#}; {then}", failure.error));
        if too_often {
            life.given_up = true;
            self.roster.give_up(index);
            self.outgoing.extend(self.roster.vacated(index));
        }
        Ok(())
    }

    /// A successor can begin.
    pub(super) fn successor_ready(&mut self, index: usize) -> Outcome {
        self.lives[index].started = None;
        let frames = self.roster.succeeds(index);
        self.outgoing.extend(frames);
        if self.clock.closed && self.roster.takes_part(index) {
            self.clock.to_close.push((self.awake.time() + SAY_AGAIN, index));
        }
        let event = Event::WorkerReplaced {
            worker: self.run.job.workers[index].name.clone(),
            round: self.round,
        };
        self.reporter.event(&event).because(Cause::Job)
    }

    /// Whoever finished the round may die anew.
    pub(super) fn round_finished(&mut self) {
        for (index, life) in self.lives.iter_mut().enumerate() {
            if self.roster.is_present(index) {
                life.deaths = 0;
            }
        }
    }

    /// Looks at the clock: closes a round whose time is over, ends workers that hang.
    pub(super) async fn look(&mut self, in_round: bool) -> Outcome {
        let grace = Duration::from_secs_f64(self.run.job.grace_time_s);
        let most = (self.pause() * 3 / 2).max(grace / 4);
        if self.awake.tick(most) {
            // Whoever was suspended with this process has had no time to answer.
            self.watch.reset();
        }
        let now = self.awake.time();
        for index in 0..self.lives.len() {
            let Life { started, closed, .. } = self.lives[index];
            if started.is_some_and(|started| now - started > START_TIME.max(grace)) {
                self.end_stuck(index, "it did not become ready");
            }
            if closed.is_some_and(|closed| now - closed > LEAVE) {
                let remote = self.run.job.workers[index].is_remote();
                let why = if remote {
                    "its session with the gateway was over"
                } else {
                    "its connection to the daemon was closed"
                };
                self.lives[index].closed = None;
                self.end(index, why);
            }
        }
        if !in_round {
            return Ok(());
        }
        let (due, later): (Vec<_>, Vec<_>) = self
            .clock
            .to_close
            .iter()
            .copied()
            .partition(|(when, _)| *when <= now);
        self.clock.to_close = later;
        self.outgoing
            .extend(due.into_iter().filter_map(|(_, index)| self.roster.close(index)));
        let elapsed = now - self.clock.begun_awake;
        let timeout = self.run.job.round_timeout_s.map(Duration::from_secs_f64);
        // Those who are to be left out are asked before that.
        let to_be_closed =
            !self.clock.closed && timeout.is_some_and(|timeout| elapsed + LOOK_EVERY > timeout);
        let every = if to_be_closed {
            LOOK_EVERY
        } else {
            grace / LOOKS_A_GRACE_TIME
        };
        if !(to_be_closed || elapsed > grace) || now - self.clock.looked < every {
            return Ok(());
        }
        self.clock.looked = now;
        // While the daemon is away, nobody can be told to hang.
        if let Some(status) = self.status_now().await? {
            if to_be_closed && timeout.is_some_and(|timeout| elapsed > timeout) {
                self.close_round();
            }
            self.end_who_hangs(&status);
            if timeout.is_some_and(|timeout| elapsed > timeout + grace) {
                self.end_late_trainers();
            }
        }
        Ok(())
    }

    /// The trainers that were told of the round, are still there and, for all that is known, have not answered.
    fn unanswered(&self) -> Vec<usize> {
        let has_answered = |&trainer: &usize| {
            let id = self.roster.participant(trainer);
            id.is_none_or(|id| self.watch.has_answered(id, self.round))
        };
        let trainers = self.roster.trainers();
        trainers.filter(|trainer| !has_answered(trainer)).collect()
    }

    /// The round's time is over: once there is a quorum, whoever has not answered is left out.
    fn close_round(&mut self) {
        let there = self
            .roster
            .trainers()
            .filter(|&trainer| self.roster.participant(trainer).is_some());
        let answered = there.count() - self.unanswered().len();
        if (answered as u32) < self.run.job.quorum {
            return;
        }
        self.clock.closed = true;
        let above_trainers = self.roster.parents_of_trainers();
        let frames: Vec<_> = above_trainers
            .filter_map(|index| self.roster.close(index))
            .collect();
        self.outgoing.extend(frames);
    }

    /// Asks all who can be asked whether they stir; ends those who have not since they were asked before. Proxies are asked
    /// too, for what they have answered; they live as long as their sessions.
    fn end_who_hangs(&mut self, status: &Status) {
        let (workers, proxies): (Vec<WorkerId>, Vec<bool>) = self.roster.connected().unzip();
        let grace = Duration::from_secs_f64(self.run.job.grace_time_s);
        let sent = status.workers.iter();
        let sent: HashMap<WorkerId, Counters> = sent.map(|worker| (worker.worker, worker.counters)).collect();
        let sent = |id| sent.get(&id).copied();
        let Verdicts { ask, hang } = self.watch.look(&workers, sent, self.awake.time(), grace);
        self.outgoing
            .extend(ask.into_iter().map(|id| self.roster.ping(id)));
        let is_proxy = |id: &WorkerId| workers.binary_search(id).is_ok_and(|at| proxies[at]);
        for id in hang.into_iter().filter(|id| !is_proxy(id)) {
            if let Some(index) = self.roster.index(id) {
                self.end_stuck(index, "it does not stir");
            }
        }
    }

    /// Ends trainers that have not come to an end, long after they ceased to be waited for.
    fn end_late_trainers(&mut self) {
        for index in self.unanswered() {
            self.end_stuck(index, "it owes an update");
        }
    }

    /// Ends a worker that is of no use any more.
    pub(super) fn end_stuck(&mut self, index: usize, why: &'static str) {
        let name = &self.run.job.workers[index].name;
        self.reporter
            .say(&format!("round {}: {name} is ended: {why}", self.round));
        self.lives[index].started = None;
        self.end(index, why);
    }

    /// Kills a worker's process; that it has ended is told with that reason.
    fn end(&mut self, index: usize, why: &'static str) {
        if self.workers.kill(index) {
            self.lives[index].ended = Some(why);
        }
    }
}
