//! What becomes of those who die or hang: a successor is started in their place, or the job goes on without them.
//!
//! ```text
//!                its process ends, or its connection             both have ended
//!   at work ─────────────────────────────────────────▶ lost ───────────────────────▶ another is started ── ready ──▶ at work
//!      ▲                                                 └── too often since it finished a round, or remote ──▶ given up
//!      └── hangs: it is killed
//! ```
//!
//! The coordinator alone decides. A dead aggregator's place is kept for its successor, which gets the references that its
//! children still lend; a dead trainer's is empty until the next round.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use lifl_common::config::Kind;
use lifl_common::control::Status;
use lifl_common::id::WorkerId;

use super::report::Event;
use super::rounds::Rounds;
use super::watch::Looked;
use crate::clock::monotonic_ns;
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::memory;

/// How long to wait before a process is started again that could not be.
const START_AGAIN: Duration = Duration::from_secs(1);

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
    given_up: bool,
    deaths: u32,
    started: Option<Instant>,
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
    /// When trainers ceased to be waited for, by the plane's clock.
    closed_ns: Option<u64>,
    /// Aggregators that took over after that: when they are told.
    to_close: Vec<(Instant, usize)>,
    looked: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self {
            begun: Instant::now(),
            begun_ns: monotonic_ns(),
            closed_ns: None,
            to_close: Vec::new(),
            looked: Instant::now(),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }
}

fn nanos(seconds: f64) -> u64 {
    (seconds * 1e9) as u64
}

impl Rounds<'_, '_> {
    /// A worker's connection to the daemon, or its proxy's, is closed.
    pub(super) fn connection_closed(&mut self, index: usize) -> Outcome {
        self.lives[index].registered = false;
        let remote = memory::is_remote(&self.run.job.workers[index]);
        let how = if remote {
            "its session with the gateway is over"
        } else {
            "its connection to the daemon closed"
        };
        self.is_lost(index, how)?;
        // Without the connection it is of no use.
        self.workers.kill(index);
        Ok(())
    }

    /// A worker's process has ended.
    pub(super) fn process_ended(&mut self, index: usize, status: &str) -> Outcome {
        self.lives[index].running = false;
        self.is_lost(index, status)
    }

    /// A worker is dead. Before the first round that ends the job.
    fn is_lost(&mut self, index: usize, how: &str) -> Outcome {
        let life = &mut self.lives[index];
        if std::mem::replace(&mut life.lost, true) {
            return Ok(());
        }
        life.deaths += 1;
        life.started = None;
        let spec = &self.run.job.workers[index];
        let remote = memory::is_remote(spec);
        if remote {
            self.to_drop.push(index);
        }
        let too_often = life.deaths > MOST_DEATHS;
        if self.round == 0 || (spec.kind == Kind::Top && too_often) {
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
        let restarting = !remote && !too_often;
        if !restarting {
            life.given_up = true;
            self.roster.give_up(index);
        }
        if spec.kind == Kind::Trainer || !restarting {
            self.outgoing.extend(self.roster.vacated(index));
        }
        let event = Event::WorkerLost {
            worker: spec.name.clone(),
            round: self.round,
            how: how.to_owned(),
            last_words: self.run.folder.log_tail(&spec.name, 1),
            restarting,
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
            life.lost = false;
            life.running = true;
            life.started = Some(Instant::now());
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
        if self.clock.closed_ns.is_some() && self.roster.takes_part(index) {
            self.clock.to_close.push((Instant::now() + SAY_AGAIN, index));
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
        for index in 0..self.lives.len() {
            let started = self.lives[index].started;
            if started.is_some_and(|started| started.elapsed() > START_TIME.max(grace)) {
                self.end_stuck(index, "it did not become ready");
            }
        }
        if !in_round {
            return Ok(());
        }
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = self
            .clock
            .to_close
            .iter()
            .copied()
            .partition(|(when, _)| *when <= now);
        self.clock.to_close = later;
        self.outgoing
            .extend(due.into_iter().filter_map(|(_, index)| self.roster.close(index)));
        let elapsed = self.clock.begun.elapsed();
        let timeout = self.run.job.round_timeout_s.map(Duration::from_secs_f64);
        // Those who are to be left out are asked before that.
        let to_be_closed =
            self.clock.closed_ns.is_none() && timeout.is_some_and(|timeout| elapsed + LOOK_EVERY > timeout);
        let every = if to_be_closed {
            LOOK_EVERY
        } else {
            grace / LOOKS_A_GRACE_TIME
        };
        if !(to_be_closed || elapsed > grace) || self.clock.looked.elapsed() < every {
            return Ok(());
        }
        self.clock.looked = now;
        // While the daemon is away, nobody can be told to hang.
        if let Some(status) = self.status_now().await? {
            let last = last_frames(&status);
            if to_be_closed && timeout.is_some_and(|timeout| elapsed > timeout) {
                self.close_round(&last);
            }
            self.end_who_hangs(&last);
            if timeout.is_some_and(|timeout| elapsed > timeout + grace) {
                self.end_late_trainers(&last);
            }
        }
        Ok(())
    }

    /// The trainers that were told of the round, are still there and, for all that is known, have not answered.
    fn unanswered(&self, last: &HashMap<WorkerId, u64>) -> Vec<usize> {
        let has_answered = |&trainer: &usize| {
            let Some(id) = self.roster.takes_part_as(trainer) else {
                return true;
            };
            if memory::is_remote(&self.run.job.workers[trainer]) {
                // Its proxy sends nothing but answers.
                return last.get(&id).is_some_and(|&last| last >= self.clock.begun_ns);
            }
            self.watch.has_answered(id, self.round)
        };
        let trainers = self.roster.trainers();
        trainers.filter(|trainer| !has_answered(trainer)).collect()
    }

    /// The round's time is over: once there is a quorum, whoever has not answered is left out.
    fn close_round(&mut self, last: &HashMap<WorkerId, u64>) {
        let there = self
            .roster
            .trainers()
            .filter(|&trainer| self.roster.takes_part_as(trainer).is_some());
        let answered = there.count() - self.unanswered(last).len();
        if (answered as u32) < self.run.job.quorum {
            return;
        }
        self.clock.closed_ns = Some(monotonic_ns());
        let job = self.run.job;
        let above_trainers = self.roster.aggregators().filter(|(_, pair)| {
            pair.children
                .iter()
                .any(|&child| job.workers[child].kind == Kind::Trainer)
        });
        let frames: Vec<_> = above_trainers
            .filter_map(|(index, _)| self.roster.close(index))
            .collect();
        self.outgoing.extend(frames);
    }

    /// Asks all who can be asked whether they stir; ends those who have not since they were asked before.
    fn end_who_hangs(&mut self, last: &HashMap<WorkerId, u64>) {
        let workers: Vec<WorkerId> = self.roster.present_here().collect();
        let grace = nanos(self.run.job.grace_time_s);
        let last = |id| last.get(&id).copied();
        let Looked { ask, hang } = self.watch.look(&workers, last, monotonic_ns(), grace);
        self.outgoing
            .extend(ask.into_iter().map(|id| self.roster.ping(id)));
        for id in hang {
            if let Some(index) = self.roster.index(id) {
                self.end_stuck(index, "it does not stir");
            }
        }
    }

    /// Ends trainers that have not come to an end, long after they ceased to be waited for.
    fn end_late_trainers(&mut self, last: &HashMap<WorkerId, u64>) {
        for index in self.unanswered(last) {
            self.end_stuck(index, "it owes an update");
        }
    }

    fn end_stuck(&mut self, index: usize, why: &str) {
        let name = &self.run.job.workers[index].name;
        self.reporter
            .say(&format!("round {}: {name} is ended: {why}", self.round));
        self.lives[index].started = None;
        self.workers.kill(index);
    }
}

/// When each worker sent its last frame.
fn last_frames(status: &Status) -> HashMap<WorkerId, u64> {
    let workers = status.workers.iter();
    workers
        .map(|worker| (worker.worker, worker.counters.last_ns))
        .collect()
}
