//! The rounds: planned, announced, closed when their time is over, decided; each round's model examined while the next one
//! runs.

use std::collections::BTreeSet;
use std::time::Duration;

use lifl_common::config::Kind;
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::WorkerId;
use lifl_common::kernel::Counters;
use lifl_common::update::{Cover, Metadata};

use super::Coordinator;
use super::failures::{KillReason, Overdue};
use super::io::{Event, Failure, LentModel, Output};
use super::liveness::Verdicts;
use super::policy::Admission;

/// How long the children of an aggregator that has just taken over have to say again what they have, when the round is closed.
const SAY_AGAIN: Duration = Duration::from_secs(1);

/// How far the job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The workers are awaited.
    Starting,
    /// The round is to begin once all aggregators and enough trainers are there.
    Planning,
    /// The round runs.
    Running,
    /// The round is decided, the model before is still being examined.
    Draining,
    /// All rounds are decided, the last model is being examined.
    Finishing,
    /// It is over.
    Done,
}

/// When the round began, and what has been done about its end.
#[derive(Debug, Default)]
pub(super) struct RoundClock {
    begun: Duration,
    /// When the daemon's counters were looked at last.
    looked: Duration,
    /// They have been asked for.
    asked: bool,
    /// Trainers that have not answered are not waited for any more.
    closed: bool,
    /// Aggregators that took over after that, and when they are told.
    to_close: BTreeSet<(Duration, usize)>,
}

/// A decided round's model, which is being evaluated or written out.
#[derive(Debug)]
pub(super) struct Examination {
    lent: LentModel,
    /// Whether any update has ever gone into it.
    folded: bool,
}

impl Coordinator {
    /// Does what has become possible.
    pub(super) fn advance(&mut self, now: Duration) {
        if self.phase == Phase::Done {
            return;
        }
        self.restart_lost(now);
        for (worker, what) in self.failures.overdue(now) {
            match what {
                Overdue::Kill(why) => self.kill(worker, why),
                Overdue::NameHeld => self.outputs.push_back(Output::FindHolder(worker)),
            }
        }
        match self.phase {
            Phase::Starting if self.ready_count() + 1 == self.job.registrations() as usize => {
                self.report(Event::AllReady);
                self.next_round(now, self.first_round);
            }
            Phase::Planning => self.plan(now),
            Phase::Running => self.look(now),
            Phase::Draining if self.examining.is_none() => {
                self.examining = self.decided.take();
                self.outputs.push_back(Output::Evaluate(self.round));
                self.next_round(now, self.round + 1);
            }
            Phase::Finishing if self.examining.is_none() => {
                let result = match self.loss.filter(|loss| !loss.is_finite()) {
                    _ if !self.anything_folded => Err(Failure::NothingFolded),
                    Some(loss) => Err(Failure::NotFinite { loss }),
                    None => Ok(()),
                };
                self.done(result);
            }
            _ => {}
        }
    }

    /// Goes on to that round, or to the end.
    fn next_round(&mut self, now: Duration, round: u32) {
        if round > self.job.rounds {
            self.phase = Phase::Finishing;
        } else {
            self.round = round;
            self.phase = Phase::Planning;
        }
        self.advance(now);
    }

    /// Begins the round, if all aggregators are there and enough trainers.
    fn plan(&mut self, now: Duration) {
        if self.membership.awaited(|spec| spec.kind != Kind::Trainer) > 0 {
            return;
        }
        let (round, workers) = (self.round, &self.job.workers);
        let present = |index| self.membership.is_present(index);
        let pairs = self.policy.pair(round, workers, &present);
        let trainers = pairs
            .keys()
            .filter(|&&index| workers[index].kind == Kind::Trainer);
        let trainers = trainers.count() as u32;
        let awaited = self.membership.awaited(|spec| spec.kind == Kind::Trainer);
        match self.policy.admit(trainers, awaited) {
            Admission::Wait => return,
            // Those who die are told of first, with what they died of.
            Admission::Never if self.failures.is_anyone_dying() => return,
            Admission::Never => return self.done(Err(Failure::TooFewTrainers { round, trainers })),
            Admission::Begin => {}
        }
        self.membership.plan(round, pairs);
        self.phase = Phase::Running;
        self.clock = RoundClock {
            begun: now,
            asked: self.clock.asked,
            ..RoundClock::default()
        };
        self.told.clear();
        self.state = None;
        self.report(Event::RoundBegins(round));
        let frames = self.membership.announce();
        self.send(frames);
    }

    /// When the round that runs is to be looked at next.
    pub(super) fn next_look(&self) -> Option<Duration> {
        if self.phase != Phase::Running {
            return None;
        }
        let clock = &self.clock;
        let to_close = clock.to_close.first().map(|(when, _)| *when);
        let look = (!clock.asked).then(|| clock.begun + self.policy.next_look(clock.looked, clock.closed));
        to_close.into_iter().chain(look).min()
    }

    /// Looks at the clock of the round that runs.
    fn look(&mut self, now: Duration) {
        while let Some(&(when, worker)) = self.clock.to_close.first().filter(|(when, _)| *when <= now) {
            self.clock.to_close.remove(&(when, worker));
            let frame = self.membership.close(worker);
            self.send(frame);
        }
        if self.next_look().is_some_and(|when| when <= now) {
            self.clock.looked = now - self.clock.begun;
            self.clock.asked = true;
            self.outputs.push_back(Output::AskStatus);
        }
    }

    /// What each has sent, as the plane counts it: closes the round if its time is over, ends those who hang. While the daemon
    /// is away nobody can be said to hang.
    pub(super) fn status(&mut self, now: Duration, counters: Option<Vec<(WorkerId, Counters)>>) {
        self.clock.asked = false;
        let Some(mut counters) = counters.filter(|_| self.phase == Phase::Running) else {
            return;
        };
        counters.sort_unstable_by_key(|(id, _)| *id);
        let elapsed = now - self.clock.begun;
        if !self.clock.closed {
            let there = self.membership.trainers();
            let there = there.filter(|&trainer| self.membership.participant(trainer).is_some());
            let answered = there.count() - self.unanswered().len();
            if self.policy.closes(elapsed, answered as u32) {
                self.clock.closed = true;
                let parents = self.membership.parents_of_trainers();
                let frames: Vec<Frame> = parents.filter_map(|index| self.membership.close(index)).collect();
                self.send(frames);
            }
        }
        self.kill_who_hangs(now, &counters);
        if self.policy.kills_stragglers(elapsed) {
            for worker in self.unanswered() {
                self.kill(worker, KillReason::Straggles);
            }
        }
    }

    /// The trainers that were told of the round, are still there and, for all that is known, have not answered.
    fn unanswered(&self) -> Vec<usize> {
        let unanswered = |trainer: &usize| {
            let id = self.membership.participant(*trainer);
            id.is_some_and(|id| !self.liveness.has_answered(id, self.round))
        };
        self.membership.trainers().filter(unanswered).collect()
    }

    /// Asks all who can be asked for a sign of life; kills those who have given none since they were asked before. Proxies are
    /// asked too, for what they have answered; they live as long as their sessions.
    fn kill_who_hangs(&mut self, now: Duration, counters: &[(WorkerId, Counters)]) {
        let (workers, proxies): (Vec<WorkerId>, Vec<bool>) = self.membership.connected().unzip();
        let grace = Duration::from_secs_f64(self.job.grace_time_s);
        let sent = |id| {
            let at = counters.binary_search_by_key(&id, |(id, _)| *id).ok()?;
            Some(counters[at].1)
        };
        let Verdicts { ask, hang } = self.liveness.look(&workers, sent, now, grace);
        let pings: Vec<Frame> = ask.into_iter().map(|id| self.membership.ping(id)).collect();
        self.send(pings);
        for id in hang {
            let is_proxy = workers.binary_search(&id).is_ok_and(|at| proxies[at]);
            if let Some(worker) = self.membership.index(id).filter(|_| !is_proxy) {
                self.kill(worker, KillReason::Hangs);
            }
        }
    }

    /// A successor has taken over in the round that runs: one that is decided is not begun anew. If the round is closed, a
    /// successor above trainers is told when those below it have said again what they have.
    pub(super) fn succeeded(&mut self, now: Duration, worker: usize) {
        if self.phase != Phase::Running {
            return;
        }
        let frames = self.membership.succeeds(worker);
        self.send(frames);
        if self.clock.closed
            && self
                .membership
                .parents_of_trainers()
                .any(|parent| parent == worker)
        {
            self.clock.to_close.insert((now + SAY_AGAIN, worker));
        }
    }

    /// A top lends a model, or what its optimizer remembers with the model that follows.
    pub(super) fn lent(&mut self, kind: FrameKind, frame: Frame) {
        if self.phase != Phase::Running || frame.round != self.round {
            return;
        }
        if kind == FrameKind::State {
            self.state = Some(frame);
            return;
        }
        let state = self.state.take().filter(|state| state.from == frame.from);
        let owned = |frame: &Frame| frame.key.arena.owner() == frame.from;
        if !(owned(&frame) && state.as_ref().is_none_or(owned)) {
            return self.bad_model(&frame, "it is not in an arena of its own");
        }
        if self.candidates.iter().all(|known| known.model.from != frame.from) {
            self.candidates.push_back(LentModel { model: frame, state });
            self.check_next();
        }
    }

    fn check_next(&mut self) {
        if let Some(lent) = self.candidates.front().filter(|_| !self.checking) {
            self.checking = true;
            self.outputs.push_back(Output::CheckModel(*lent));
        }
    }

    /// A model has been checked. The first that is one of the round decides it.
    pub(super) fn checked(&mut self, checked: Result<Metadata, String>) {
        self.checking = false;
        let Some(lent) = self.candidates.pop_front() else {
            return;
        };
        match checked.and_then(|metadata| self.hold_against_known(&lent.model, metadata)) {
            Ok(metadata) => self.decide(lent, &metadata),
            Err(error) => {
                self.bad_model(&lent.model, &error);
                self.check_next();
            }
        }
    }

    /// Holds what a model says of itself, and what was said when it was lent, against what is known.
    fn hold_against_known(&self, frame: &Frame, metadata: Metadata) -> Result<Metadata, String> {
        if metadata.generation != frame.key.generation || metadata.round > frame.round {
            return Err(format!("it is of round {}", metadata.round));
        }
        let covers = match metadata.round == frame.round {
            true => metadata.info.cover.count(),
            false => 0,
        };
        let most = self.membership.samples_of(&metadata.info.cover);
        if frame.covers != covers || metadata.info.samples > most {
            return Err(format!(
                "it is said to be of {} trainers with {} samples, and is of {covers} with {most}",
                frame.covers, metadata.info.samples
            ));
        }
        Ok(metadata)
    }

    /// A top has lent what is no model of the round: it is of no use.
    fn bad_model(&mut self, frame: &Frame, error: &str) {
        tracing::warn!(from = %frame.from, round = frame.round, "a model that is none: {error}");
        // One that is dead has a successor, or will have.
        if let Some(worker) = self.membership.index(frame.from) {
            self.kill(worker, KillReason::BadModel);
        }
    }

    /// The round has its model.
    fn decide(&mut self, lent: LentModel, metadata: &Metadata) {
        let (round, workers) = (self.round, &self.job.workers);
        let changed = metadata.round == round;
        let nobody = Cover::default();
        let cover = if changed { &metadata.info.cover } else { &nobody };
        // All trainers, but for those that the selector did not take.
        let selects = workers.iter().any(|worker| worker.select.is_some());
        let is_left_out = |&index: &usize| {
            let asked = !selects || self.membership.takes_part(index) || !self.membership.is_present(index);
            let worker = &workers[index];
            worker.kind == Kind::Trainer && asked && worker.share.is_none_or(|share| !cover.contains(share))
        };
        let left_out = (0..workers.len()).filter(is_left_out).collect();
        for worker in 0..workers.len() {
            if self.membership.is_present(worker) {
                self.failures.round_finished(worker);
            }
        }
        // Others' models of the round are of no use any more.
        self.candidates.clear();
        self.phase = Phase::Draining;
        self.decided = Some(Examination {
            lent,
            folded: metadata.round > 0,
        });
        self.outputs.push_back(Output::Decided {
            round,
            changed,
            left_out,
        });
    }

    /// A model has been evaluated: it is told of, and written out.
    pub(super) fn evaluated(&mut self, loss: Option<f64>) {
        let Some(Examination { lent, folded }) = &self.examining else {
            return;
        };
        (self.loss, self.anything_folded) = (loss, *folded);
        let round = lent.model.round;
        let at_end = round == self.job.rounds;
        let useful = *folded && !(at_end && loss.is_some_and(|loss| !loss.is_finite()));
        self.report(Event::RoundDone(round));
        self.outputs.push_back(Output::Write { round, useful });
    }

    /// A model has been written out: it is given back.
    pub(super) fn written(&mut self, error: Option<String>) {
        let Some(Examination { lent, .. }) = self.examining.take() else {
            return;
        };
        let release = |lent: &Frame| Frame {
            to: lent.from,
            from: self.id,
            kind: FrameKind::Release as u16,
            round: lent.round,
            key: lent.key,
            ..Frame::default()
        };
        let releases = [Some(release(&lent.model)), lent.state.as_ref().map(release)];
        self.send(releases.into_iter().flatten());
        if let Some(error) = error {
            self.report(Event::CheckpointFailed(lent.model.round, error));
        }
    }
}
