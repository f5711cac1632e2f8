//! One round's life: announced by the coordinator, begun when its model is there, folded, over.

use std::sync::Arc;

use lifl_common::arena::PeerArena;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, Key, WorkerId};
use lifl_common::update::{Cover, UpdateInfo, image};

use super::children::{Bound, Children, InPlace};
use super::early_frames::EarlyFrames;
use super::pending_aggregates::PendingAggregate;
use super::round_fold::{Folded, RoundFold, check_update, combined};
use super::{Aggregator, Error, FIRST_REFUSAL, Output, worker_id};
use crate::parent::{LentModel, PendingUpdate};

/// Where a round stands.
#[derive(Debug, Default)]
pub(super) enum Stage {
    /// Not announced.
    #[default]
    Silent,
    /// Announced, without its model or a slot.
    Announced,
    /// The aggregate is in the making.
    Folding(Box<RoundFold>),
    /// Everything has been said about it.
    Over,
}

/// The round that the coordinator has announced last, or that something has come of.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub(super) number: u32,
    pub(super) parent: WorkerId,
    /// The children in folding order; [`WorkerId::NONE`] for one that is not waited for.
    pub(super) places: Vec<WorkerId>,
    /// What an update from each place may say at most.
    pub(super) bounds: Arc<[Bound]>,
    /// Places and bounds as they are being listed, until `Begin`.
    listed: Vec<(WorkerId, Bound)>,
    /// Frames that are still to come of the place listed last.
    unlisted: u32,
    pub(super) stage: Stage,
    /// The model to hand down.
    pub(super) model: Option<LentModel>,
    /// Those who have not answered are not waited for any more.
    pub(super) closing: bool,
    /// Answers that came before they could be taken, those of later rounds too.
    pub(super) early: EarlyFrames,
    /// What a predecessor's aggregate covers, as far as it has been said, and in how many pieces.
    pub(super) inherited: (Cover, u32),
}

impl Round {
    /// The coordinator names a child, or says more of the one that it named last.
    pub(super) fn list_child(&mut self, frame: &Frame) -> Result<(), Error> {
        let (at, word) = frame.cover_word();
        if self.unlisted == 0 {
            let bound = Bound {
                samples: frame.samples,
                ..Bound::default()
            };
            self.listed.push((worker_id(frame)?, bound));
        }
        self.unlisted = frame.covers;
        if let Some((_, bound)) = self.listed.last_mut() {
            bound.cover.set_word(at as usize, word);
        }
        Ok(())
    }
}

impl Aggregator {
    /// Something of a round has come; a new number ends what was left of the round before.
    pub(super) fn announce(&mut self, number: u32) {
        if number <= self.round.number {
            return;
        }
        let mut left = std::mem::take(&mut self.round);
        self.round.number = number;
        self.logged.clear();
        if let Some(model) = left.model {
            self.release_model(model);
        }
        if let Stage::Folding(fold) = left.stage {
            tracing::warn!(round = left.number, "ended without having been finished");
            self.end_own_lease(&fold.model);
            let taken: Vec<Frame> = fold.children.taken().map(|update| update.frame).collect();
            self.send_verdicts(&taken, (FrameKind::Refuse, Refusal::Late as u16));
        }
        for early in left.early.take() {
            if early.round < number {
                self.refuse(&early, Refusal::Late);
            } else {
                self.round.early.keep(early);
            }
        }
        self.give_up_orphans();
    }

    /// The coordinator has said how the round stands: for the first time, or again.
    pub(super) fn begin(&mut self, parent: WorkerId) -> Result<(), Error> {
        let listed = std::mem::take(&mut self.round.listed);
        let (listed, bounds): (Vec<_>, Vec<_>) = listed.into_iter().unzip();
        self.round.parent = parent;
        if matches!(self.round.stage, Stage::Silent) {
            self.send_deferred_verdicts();
            self.round.places = listed;
            self.round.bounds = bounds.into();
            self.round.stage = Stage::Announced;
            return self.choose_early_model();
        }
        self.resend();
        if listed.len() != self.round.places.len() {
            tracing::error!(
                round = self.round.number,
                "announced again with another number of children"
            );
            return Ok(());
        }
        let before = std::mem::replace(&mut self.round.places, listed.clone());
        for (old, new) in before.into_iter().zip(listed) {
            if old != new {
                self.replace_child(old, new)?;
            }
        }
        Ok(())
    }

    /// A successor has a child's place; [`WorkerId::NONE`]: nobody has.
    fn replace_child(&mut self, old: WorkerId, new: WorkerId) -> Result<(), Error> {
        match &mut self.round.stage {
            Stage::Over if new != WorkerId::NONE => self.child_succeeded(old, new),
            Stage::Silent | Stage::Announced | Stage::Over => {}
            Stage::Folding(fold) => {
                let found = fold.children.replace(old, new);
                let deferred = fold.without_model.iter_mut().find(|child| **child == old);
                let model = fold.model;
                match found {
                    _ if new == WorkerId::NONE => {}
                    InPlace::Waiting => match deferred {
                        Some(child) => *child = new,
                        None => self.hand_down(model, &[new])?,
                    },
                    InPlace::Taken(update, cover) => self.post_taken(new, update.key, &cover),
                    InPlace::Gone => self.post_taken(new, Key::NONE, &Cover::default()),
                }
            }
        }
        Ok(())
    }

    /// Begins to fold when the round is announced, the model is there, a slot is free. Who is late with a round before is
    /// handed the model [later](Self::hand_down_deferred).
    pub(super) fn start_round(&mut self) -> Result<(), Error> {
        if !matches!(self.round.stage, Stage::Announced) {
            return Ok(());
        }
        let number = self.round.number;
        let model = match &self.top {
            // The same for every round that leaves it as it was.
            Some(top) => top.current.map(|model| LentModel {
                round: number,
                ..model
            }),
            None => self.round.model,
        };
        let Some(model) = model else { return Ok(()) };
        if model.lender != self.round.parent {
            tracing::warn!(from = %model.lender, parent = %self.round.parent, "a model from somebody else than the parent");
            self.round.model = None;
            self.release_model(model);
            return Ok(());
        }
        let room = self.top.as_mut().is_none_or(|top| top.optimizer.has_room());
        let Some(slot) = room.then(|| self.arena.begin()).flatten() else {
            return Ok(());
        };
        let busy = self.busy(&model);
        let children = self.round.places.iter().filter(|child| **child != WorkerId::NONE);
        let (busy, free): (Vec<_>, Vec<_>) = children.partition(|child| busy.contains(child));
        tracing::info!(
            round = number,
            children = self.round.places.len(),
            busy = busy.len(),
            "round begun"
        );
        self.round.model = None;
        self.rule.reset();
        let children = Children::new(&self.round.places, Arc::clone(&self.round.bounds));
        let mut fold = RoundFold::new(number, children, self.config.goal, slot, model);
        fold.without_model = busy;
        self.hold_own_lease(model);
        self.round.stage = Stage::Folding(Box::new(fold));
        self.hand_down(model, &free)?;
        self.answer_early()
    }

    /// Answers that came before the round could take them.
    pub(super) fn answer_early(&mut self) -> Result<(), Error> {
        let early = self.round.early.take();
        early.into_iter().try_for_each(|frame| self.answer(frame, None))
    }

    /// A child's answer; `opened` is the arena that an update lies in, as soon as the shell has answered for it.
    pub(super) fn answer(
        &mut self,
        frame: Frame,
        opened: Option<&Result<Option<Arc<PeerArena>>, String>>,
    ) -> Result<(), Error> {
        let nothing = frame.kind == FrameKind::Nothing as u16;
        let pending = |pending: &PendingAggregate| pending.lent.round() == frame.round;
        if let Some(at) = self.pending.iter().position(pending) {
            if !nothing {
                self.answer_to_pending(at, frame, opened);
            }
            return Ok(());
        }
        let number = self.round.number;
        match &mut self.round.stage {
            Stage::Folding(fold) if frame.round == number => {
                if nothing {
                    fold.children.nothing(frame.from);
                } else if fold.children.has(&frame) {
                    // A replay.
                } else if !fold.children.is_waiting(frame.from) {
                    self.refuse(&frame, Refusal::NotExpected);
                } else if let Some(opened) = opened {
                    let checked = check_update(&self.config.schema, &frame, opened);
                    if let Err(refusal) = checked.and_then(|update| fold.children.take(update)) {
                        // Whose maker is gone may still come from its successor.
                        if refusal != Refusal::NoArena {
                            fold.children.refuse(frame.from);
                        }
                        self.refuse(&frame, refusal);
                    }
                } else if let Err(refusal) = self.open_arena_of(frame) {
                    if let Stage::Folding(fold) = &mut self.round.stage
                        && refusal == Refusal::BadKey
                    {
                        fold.children.refuse(frame.from);
                    }
                    self.refuse(&frame, refusal);
                }
            }
            Stage::Over if frame.round == number => self.refuse(&frame, Refusal::Late),
            _ if frame.round < number => self.refuse(&frame, Refusal::Late),
            _ => {
                if !self.round.early.keep(frame) {
                    self.refuse(&frame, Refusal::NotExpected);
                }
            }
        }
        Ok(())
    }

    /// Keeps an update until the arena in which it lies is open.
    pub(super) fn open_arena_of(&mut self, update: Frame) -> Result<(), Refusal> {
        let arena = update.key.arena;
        if arena.owner() != update.from {
            tracing::warn!(from = %update.from, key = %update.key, "not of its own arena");
            return Err(Refusal::BadKey);
        }
        if !self.unopened.keep(update) {
            return Err(Refusal::NotExpected);
        }
        if self.opening.insert(arena) {
            self.outputs.push_back(Output::OpenArena(arena));
        }
        Ok(())
    }

    /// The shell has opened an arena, or could not: updates that lie there are looked at.
    pub(super) fn arena_opened(
        &mut self,
        arena: ArenaId,
        opened: &Result<Option<Arc<PeerArena>>, String>,
    ) -> Result<(), Error> {
        self.opening.remove(&arena);
        for update in self.unopened.take() {
            if update.key.arena == arena {
                self.answer(update, Some(opened))?;
            } else {
                self.unopened.keep(update);
            }
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, update: &Frame, refusal: Refusal) {
        if update.kind == FrameKind::Nothing as u16 {
            return;
        }
        let Frame { from, round, .. } = *update;
        if self.log_once(from, FIRST_REFUSAL + refusal as u16) {
            tracing::warn!(%from, round, "update refused: {refusal}");
            if refusal.is_senders_fault() {
                let refused = Frame {
                    round,
                    refusal: refusal as u16,
                    value: u64::from(from.0),
                    ..Frame::default()
                };
                self.post(self.config.coordinator, FrameKind::Refuse, refused);
            }
        }
        self.send_verdicts(&[*update], (FrameKind::Refuse, refusal as u16));
    }

    /// Folds what has come, if it is its time; if the round is complete, makes its aggregate, at the top its model.
    pub(super) fn fold(&mut self) -> Result<(), Error> {
        loop {
            let Stage::Folding(fold) = &mut self.round.stage else {
                return Ok(());
            };
            if self.round.closing {
                fold.children.close();
            }
            if !self.unopened.is_empty() {
                // Their answers are on the way: they are folded in the same pass as the others.
                return Ok(());
            }
            let refused = fold.fold(&self.config.schema, &mut *self.rule)?;
            let complete = fold.is_complete();
            for (frame, refusal) in refused {
                self.refuse(&frame, refusal);
            }
            if !complete {
                return Ok(());
            }
            let Stage::Folding(mut fold) = std::mem::replace(&mut self.round.stage, Stage::Over) else {
                return Ok(());
            };
            match self.make(&mut fold)? {
                Folded::Diverged(culprits) if !culprits.is_empty() => {
                    // As if they had been found out when they were folded: what has come beside them may count in their
                    // place, and with a goal more updates are awaited.
                    fold.remove(&culprits, &mut *self.rule);
                    self.round.stage = Stage::Folding(fold);
                    for culprit in &culprits {
                        self.refuse(culprit, Refusal::NotFinite);
                    }
                }
                made => return self.end_round(*fold, &made),
            }
        }
    }

    /// The round is decided: whoever is still without a verdict and is not in its aggregate hears one.
    fn end_round(&mut self, fold: RoundFold, made: &Folded) -> Result<(), Error> {
        // What came in the same moment as the last update that was needed; whatever comes from now on meets no round that it
        // belongs to.
        let late: Vec<Frame> = fold.children.unfolded().map(|update| update.frame).collect();
        for late in late {
            self.refuse(&late, Refusal::Late);
        }
        let refusal = match made {
            Folded::Whole => {
                self.unpublished = Some(fold);
                return Ok(());
            }
            Folded::TooFew => Refusal::NoQuorum,
            Folded::Diverged(_) => Refusal::Diverged,
        };
        let updates: Vec<Frame> = fold.children.folded().map(|update| update.frame).collect();
        self.send_verdicts(&updates, (FrameKind::Refuse, refusal as u16));
        self.nothing(fold.round)?;
        self.end_own_lease(&fold.model);
        Ok(())
    }

    /// Makes the aggregate, at the top the model.
    fn make(&mut self, fold: &mut RoundFold) -> Result<Folded, Error> {
        if !self.has_quorum(fold) {
            return Ok(Folded::TooFew);
        }
        let step = self.top.as_mut().map(|top| top.optimizer.step());
        let arena = &self.arena;
        fold.make(&self.config, &mut *self.rule, step, |key| arena.object(key))
    }

    /// Whether enough trainers' work came for a new model. Only the top counts.
    fn has_quorum(&self, fold: &RoundFold) -> bool {
        let Some(quorum) = self.top.as_ref().map(|top| top.quorum) else {
            return true;
        };
        let mut cover = Cover::default();
        for update in fold.children.folded() {
            cover.add(&update.metadata.info.cover);
        }
        let came = cover.count();
        if came < quorum {
            tracing::warn!(round = fold.round, came, quorum, "no quorum");
        }
        came >= quorum
    }

    /// Dates what has been folded, and gives it to the parent; the top, whose model it is, to the coordinator.
    pub(super) fn publish(&mut self, fold: RoundFold) -> Result<(), Error> {
        // Whoever is the parent now: it may have changed since the round began.
        let (number, parent) = (fold.round, self.round.parent);
        let now = u64::try_from(self.now.as_nanos()).unwrap_or(u64::MAX);
        let schema = &self.config.schema;
        let RoundFold {
            mut slot,
            children,
            model,
            ..
        } = fold;
        let info = UpdateInfo {
            samples: self.rule.samples(),
            ..combined(children.folded().map(|update| &update.metadata.info), schema, now)
        };
        let metadata = info.metadata(&self.config.name, number, slot.key().generation);
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.arena.publish(slot);
        let update = info.frame(number, key, schema);
        let next = self.own_model(number + 1, key);
        let mut pending = PendingAggregate {
            lent: PendingUpdate::new(update, parent),
            own: true,
            cover: info.cover.clone(),
            children: children
                .folded()
                .map(|update| (update.frame, update.metadata.info.cover.clone()))
                .collect(),
            verdict: None,
            deferred: false,
        };
        if let Some(top) = &mut self.top {
            // What the top has made is accepted: nobody is above it. The coordinator hears of the new model before
            // anybody's update is given back, so that a top which dies in between has either decided or not.
            pending.verdict = Some((FrameKind::Release, 0));
            pending.deferred = true;
            top.optimizer.publish(&metadata);
            top.current = Some(next);
            let last = number >= top.rounds;
            self.pending.push(pending);
            self.lend_model(update)?;
            if last {
                self.send_deferred_verdicts();
            }
        } else {
            self.send_up(&pending.lent, &info);
            self.pending.push(pending);
        }
        self.end_own_lease(&model);
        Ok(())
    }

    /// No child gave anything, or too few did: the round leaves the model as it was.
    fn nothing(&mut self, round: u32) -> Result<(), Error> {
        let Some(top) = &self.top else {
            self.send_nothing(round, self.round.parent);
            return Ok(());
        };
        let LentModel { key, length, .. } = top.current.ok_or(Error::ModelGone)?;
        self.lend_model(Frame {
            round,
            key,
            length,
            ..Frame::default()
        })
    }

    /// Lends the coordinator the top's model, and in front of it what the optimizer remembers with it.
    fn lend_model(&mut self, model: Frame) -> Result<(), Error> {
        let coordinator = self.config.coordinator;
        self.arena.lend(model.key, coordinator)?;
        let state = match &mut self.top {
            Some(top) => top.optimizer.lend(coordinator)?,
            None => None,
        };
        if let Some((key, length)) = state {
            let state = Frame {
                round: model.round,
                key,
                length,
                ..Frame::default()
            };
            self.post(coordinator, FrameKind::State, state);
        }
        self.post(coordinator, FrameKind::Model, model);
        Ok(())
    }
}
