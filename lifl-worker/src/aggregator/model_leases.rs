//! Model leases: who was handed which model, and when its lender, or the own slot, gets it back.
//!
//! A model is one object, the top's, whoever hands it on; a new top's is another object with the same bytes. An aggregator
//! gives a model back when the last of its children has, and keeps it as long as it folds: a successor of a child may
//! still want it. A round that changes nothing has the model of the round before: that is another lease of the same object,
//! and given back by itself.

use std::collections::{BTreeMap, BTreeSet};

use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{Key, WorkerId};

use super::pending_aggregates::PendingAggregate;
use super::round::Stage;
use super::{Aggregator, Error};
use crate::parent::LentModel;

/// A model and who has it; this worker is among them while it folds. The lender of a model in its own arena, the top's and
/// what came from the gateway, is [`WorkerId::NONE`].
#[derive(Debug)]
pub(super) struct ModelLease {
    model: LentModel,
    holders: BTreeSet<WorkerId>,
}

impl ModelLease {
    fn is_of(&self, round: u32, key: Key) -> bool {
        (self.model.round, self.model.key) == (round, key)
    }
}

impl Aggregator {
    /// A round's model has come.
    pub(super) fn model(&mut self, model: LentModel) -> Result<(), Error> {
        let number = model.round;
        if self.is_top() || number < self.round.number {
            if self.log_once(model.lender, FrameKind::Model as u16) {
                tracing::warn!(from = %model.lender, round = number, "a model that was not expected");
            }
            self.release_model(model);
            return Ok(());
        }
        if number > self.round.number || matches!(self.round.stage, Stage::Silent) {
            // Whether its lender is the parent, the coordinator will say: anybody can send one.
            if let Some(before) = self.offered.offer(model) {
                self.release_model(before);
            }
            return Ok(());
        }
        if model.lender != self.round.parent {
            if self.log_once(model.lender, FrameKind::Model as u16) {
                tracing::warn!(from = %model.lender, parent = %self.round.parent, "a model from somebody else than the parent");
            }
            self.release_model(model);
            return Ok(());
        }
        match &mut self.round.stage {
            Stage::Silent | Stage::Announced => {
                let before = self.round.model.replace(model);
                if let Some(before) = before.filter(|before| before.key != model.key) {
                    self.release_model(before);
                }
            }
            // The parent's successor hands down what its predecessor had.
            Stage::Folding(fold) if fold.model.key == model.key => {
                fold.model.lender = model.lender;
                if let Some(lease) = self.lease(&model) {
                    lease.model.lender = model.lender;
                }
            }
            // A new top's, with the same bytes. Children that work on the old one keep to it; who had not looked at it yet
            // cannot have it any more.
            Stage::Folding(fold) => {
                let before = std::mem::replace(&mut fold.model, model);
                let children = self.round.places.iter().copied();
                let waiting: Vec<WorkerId> = children
                    .filter(|child| fold.children.is_waiting(*child) && !fold.without_model.contains(child))
                    .collect();
                self.hold_own_lease(model);
                self.hand_down(model, &waiting)?;
                self.end_own_lease(&before);
            }
            Stage::Over => return self.begun_anew(model),
        }
        Ok(())
    }

    /// The parent hands down the model of a round that is over here: it begins that round anew, since what it had of it went
    /// with its own parent.
    fn begun_anew(&mut self, model: LentModel) -> Result<(), Error> {
        let of_round = |pending: &PendingAggregate| pending.lent.round() == model.round;
        let undecided = self.pending.iter().position(of_round);
        match undecided.filter(|&at| self.pending[at].verdict.is_none()) {
            Some(at) if !self.pending[at].own => {
                self.fold_anew(at);
                return self.model(model);
            }
            // Ours is with the parent, or will be.
            Some(_) => {}
            None if self.config.via_gateway => {}
            // What we had of it was refused: the parent need not wait.
            None => self.send_nothing(model.round, model.lender),
        }
        self.release_model(model);
        Ok(())
    }

    /// The round has been announced: of the models that came before that, its parent's is its.
    pub(super) fn choose_early_model(&mut self) -> Result<(), Error> {
        let (number, parent) = (self.round.number, self.round.parent);
        for model in self.offered.take_useless(number, parent) {
            self.release_model(model);
        }
        let model = self.offered.take(number, parent);
        model.map_or(Ok(()), |model| self.model(model))
    }

    /// Hands a model down to children.
    pub(super) fn hand_down(&mut self, model: LentModel, children: &[WorkerId]) -> Result<(), Error> {
        for &child in children {
            if model.lender == WorkerId::NONE {
                self.arena.lend(model.key, child)?;
            }
            let lent = Frame {
                round: model.round,
                key: model.key,
                length: model.length,
                ..Frame::default()
            };
            self.post(child, FrameKind::Model, lent);
        }
        self.add_holders(model, children);
        Ok(())
    }

    /// Hands the round's model down to those who had to finish an older round first and have, meanwhile.
    pub(super) fn hand_down_deferred(&mut self) -> Result<(), Error> {
        let Stage::Folding(fold) = &mut self.round.stage else {
            return Ok(());
        };
        if fold.without_model.is_empty() {
            return Ok(());
        }
        let model = fold.model;
        let mut waiting = std::mem::take(&mut fold.without_model);
        waiting.retain(|child| fold.children.is_waiting(*child));
        let busy = self.busy(&model);
        let (busy, free): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|child| busy.contains(child));
        if let Stage::Folding(fold) = &mut self.round.stage {
            fold.without_model = busy;
        }
        self.hand_down(model, &free)
    }

    fn lease(&mut self, model: &LentModel) -> Option<&mut ModelLease> {
        self.leases
            .iter_mut()
            .find(|lease| lease.is_of(model.round, model.key))
    }

    fn add_holders(&mut self, model: LentModel, holders: &[WorkerId]) {
        if let Some(lease) = self.lease(&model) {
            return lease.holders.extend(holders);
        }
        let holders = holders.iter().copied().collect();
        self.leases.push(ModelLease { model, holders });
    }

    /// As long as this worker folds, a successor of a child may want the model.
    pub(super) fn hold_own_lease(&mut self, model: LentModel) {
        self.add_holders(model, &[self.config.worker]);
    }

    /// The round's model is not kept for children any more.
    pub(super) fn end_own_lease(&mut self, model: &LentModel) {
        self.end_leases(self.config.worker, |lease| lease.is_of(model.round, model.key));
    }

    /// Somebody holds no model any more, of those that are asked for.
    pub(super) fn end_leases(&mut self, holder: WorkerId, which: impl Fn(&ModelLease) -> bool) {
        let mut unread = Vec::new();
        self.leases.retain_mut(|lease| {
            let ended = which(lease) && lease.holders.remove(&holder) && lease.holders.is_empty();
            if ended {
                unread.push(lease.model);
            }
            !ended
        });
        for model in unread {
            self.release_model(model);
        }
    }

    /// Who still holds so many models of rounds that are over that it is not lent another before it gives one back, so
    /// that one that is late, or hangs, cannot take all of the top's slots. Nobody, where rounds wait for all.
    pub(super) fn busy(&self, model: &LentModel) -> BTreeSet<WorkerId> {
        let Some(most) = self.config.most_held else {
            return BTreeSet::new();
        };
        let mut held: BTreeMap<WorkerId, u32> = BTreeMap::new();
        let old = self.leases.iter().filter(|lease| lease.model.key != model.key);
        for holder in old.flat_map(|lease| &lease.holders) {
            *held.entry(*holder).or_default() += 1;
        }
        let busy = held.into_iter().filter(|&(_, count)| count > most);
        busy.map(|(holder, _)| holder).collect()
    }

    /// Somebody gives something back: a child or the coordinator a model, the parent an aggregate.
    pub(super) fn released(&mut self, frame: &Frame) {
        if let Some(top) = &mut self.top
            && top.optimizer.released(frame)
        {
            return;
        }
        let lease = self
            .leases
            .iter()
            .find(|lease| lease.is_of(frame.round, frame.key));
        if let Some(own) = lease.map(|lease| lease.model.lender == WorkerId::NONE) {
            if own {
                self.release_own(frame);
            }
            return self.end_leases(frame.from, |lease| lease.is_of(frame.round, frame.key));
        }
        let undecided =
            |pending: &PendingAggregate| pending.lent.key() == frame.key && pending.verdict.is_none();
        if self.pending.iter().any(undecided) {
            return self.decided(frame);
        }
        if frame.key.arena != self.arena.id() {
            // Given back twice: once to the predecessor of who lent it.
            return tracing::debug!(from = %frame.from, key = %frame.key, "released what is not lent");
        }
        // The coordinator, done with a model that no child has any more.
        if self.release_own(frame) {
            self.free_model(frame.key);
        }
    }

    /// A holder of an object in the own arena has it no longer, if it had it.
    fn release_own(&mut self, frame: &Frame) -> bool {
        let released = self.arena.release(frame.key, frame.from);
        if let Err(error) = &released
            && self.log_once(frame.from, frame.kind)
        {
            tracing::warn!(from = %frame.from, "released what was not lent: {error}");
        }
        released.is_ok()
    }

    /// Gives a model back to its lender.
    pub(super) fn release_model(&mut self, model: LentModel) {
        if model.lender == WorkerId::NONE {
            return self.free_model(model.key);
        }
        self.send(model.release());
    }

    /// The own slot of a model that is not the top's current one and that nobody holds is free again.
    fn free_model(&mut self, key: Key) {
        let current = self.top.as_ref().and_then(|top| top.current);
        let current = current.is_some_and(|current| current.key == key);
        if !current && self.leases.iter().all(|lease| lease.model.key != key) {
            self.arena.free(key);
        }
    }
}
