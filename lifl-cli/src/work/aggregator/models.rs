//! The models that an aggregator hands down: to whom, and when its lender, or its own slot, gets one back.
//!
//! A model is one object, the top's, whoever hands it on; a new top's is another object with the same bytes. An aggregator
//! gives a model back when the last of its children has, and keeps it as long as it collects: a successor of a child may
//! still want it.

use std::collections::{HashMap, HashSet};

use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{Key, WorkerId};

use super::{Aggregator, Stage};
use crate::work::ground::Ground;

/// A model that this aggregator was lent, or has in its own arena: the top's, and what came over a wire.
#[derive(Clone, Copy)]
pub(super) struct Lent {
    pub(super) key: Key,
    pub(super) length: u64,
    pub(super) by: WorkerId,
}

impl<G: Ground> Aggregator<G> {
    /// A round's model has come.
    pub(super) fn model(&mut self, number: u32, lent: Lent) -> anyhow::Result<()> {
        if self.at_top() || number < self.round.number {
            if self.tell(lent.by, FrameKind::Model as u16) {
                tracing::warn!(from = %lent.by, round = number, "a model that was not expected");
            }
            self.release_model(lent, number);
            return Ok(());
        }
        if number > self.round.number || matches!(self.round.stage, Stage::Silent) {
            // Whether its lender is the parent, the coordinator will say: anybody can send one.
            let before = self.early_models.insert(lent.by, (number, lent));
            if let Some((number, before)) = before.filter(|(_, before)| before.key != lent.key) {
                self.release_model(before, number);
            }
            return Ok(());
        }
        if lent.by != self.round.parent {
            if self.tell(lent.by, FrameKind::Model as u16) {
                tracing::warn!(from = %lent.by, parent = %self.round.parent, "a model from somebody else than the parent");
            }
            self.release_model(lent, number);
            return Ok(());
        }
        match &mut self.round.stage {
            Stage::Silent | Stage::Announced => {
                let before = self.round.model.replace(lent);
                if let Some(before) = before.filter(|before| before.key != lent.key) {
                    self.release_model(before, number);
                }
            }
            // The parent's successor hands down what its predecessor had.
            Stage::Collecting(collecting) if collecting.model.key == lent.key => {
                collecting.model.by = lent.by;
                if let Some((model, _)) = self.models.get_mut(&lent.key) {
                    model.by = lent.by;
                }
            }
            // A new top's, with the same bytes. Children that work on the old one keep to it; whoever had not looked at it yet
            // cannot have it any more.
            Stage::Collecting(collecting) => {
                let before = std::mem::replace(&mut collecting.model, lent);
                let own = self.ground.id();
                self.models
                    .entry(lent.key)
                    .or_insert((lent, Vec::new()))
                    .1
                    .push(own);
                let children = self.round.places.iter().copied();
                let waiting: Vec<WorkerId> = children
                    .filter(|child| {
                        collecting.children.is_waiting(*child) && !collecting.owed.contains(child)
                    })
                    .collect();
                self.hand_down(lent, number, &waiting)?;
                self.let_go(before.key, number);
            }
            Stage::Over => self.release_model(lent, number),
        }
        Ok(())
    }

    /// The round has been announced: of the models that came before that, its parent's is its.
    pub(super) fn choose_model(&mut self) -> anyhow::Result<()> {
        let (number, parent) = (self.round.number, self.round.parent);
        let early = self.early_models.extract_if(|_, (round, _)| *round <= number);
        let early: Vec<(u32, Lent)> = early.map(|(_, early)| early).collect();
        for (round, lent) in early {
            if round == number && lent.by == parent {
                self.model(round, lent)?;
            } else {
                self.release_model(lent, round);
            }
        }
        Ok(())
    }

    /// Hands a model down to children.
    pub(super) fn hand_down(&mut self, model: Lent, round: u32, children: &[WorkerId]) -> anyhow::Result<()> {
        for &child in children {
            if model.by == WorkerId::NONE {
                self.ground.arena().lend(model.key, child)?;
            }
            let lent = Frame {
                round,
                key: model.key,
                length: model.length,
                ..Frame::default()
            };
            self.ground.post(child, FrameKind::Model, lent);
        }
        let holders = &mut self.models.entry(model.key).or_insert((model, Vec::new())).1;
        holders.extend(children);
        Ok(())
    }

    /// Hands the round's model down to those who had to finish an older round first and have, meanwhile.
    pub(super) fn hand_down_owed(&mut self) -> anyhow::Result<()> {
        let Stage::Collecting(collecting) = &self.round.stage else {
            return Ok(());
        };
        if collecting.owed.is_empty() {
            return Ok(());
        }
        let (model, round) = (collecting.model, collecting.round);
        let busy = self.busy(&model);
        let waiting = collecting.owed.iter();
        let (owed, free): (Vec<_>, Vec<_>) = waiting
            .filter(|child| collecting.children.is_waiting(**child))
            .partition(|child| busy.contains(child));
        if let Stage::Collecting(collecting) = &mut self.round.stage {
            collecting.owed = owed;
        }
        self.hand_down(model, round, &free)
    }

    /// The round's model is not kept for children any more.
    pub(super) fn let_go(&mut self, key: Key, round: u32) {
        let own = self.ground.id();
        self.no_longer_held(own, round, |held| held == key);
    }

    /// Somebody reads no model any more, of those that are asked for.
    fn no_longer_held(&mut self, by: WorkerId, round: u32, which: impl Fn(Key) -> bool) {
        let mut unread = Vec::new();
        for (key, (model, holders)) in &mut self.models {
            let held = which(*key) && holders.contains(&by);
            if held {
                holders.retain(|holder| *holder != by);
            }
            if held && holders.is_empty() {
                unread.push(*model);
            }
        }
        for model in unread {
            self.models.remove(&model.key);
            self.release_model(model, round);
        }
    }

    /// Who still holds so many models of rounds that are over that it is not lent another before it gives one back, so
    /// that one that is late, or hangs, cannot take all of the top's slots. Nobody, where rounds wait for all.
    pub(super) fn busy(&self, model: &Lent) -> HashSet<WorkerId> {
        let Some(most) = self.shared.most_held else {
            return HashSet::new();
        };
        let mut held: HashMap<WorkerId, u32> = HashMap::new();
        let old = self.models.iter().filter(|(key, _)| **key != model.key);
        for holder in old.flat_map(|(_, (_, holders))| holders) {
            *held.entry(*holder).or_default() += 1;
        }
        held.into_iter()
            .filter(|&(_, count)| count > most)
            .map(|(holder, _)| holder)
            .collect()
    }

    /// Somebody gives something back: a child or the coordinator a model, the parent an aggregate.
    pub(super) fn released(&mut self, frame: &Frame) {
        if let Some(server) = &self.server
            && server.released(&mut self.ground, frame)
        {
            return;
        }
        if self.models.contains_key(&frame.key) {
            return self.model_given_back(frame);
        }
        if self
            .sent
            .iter()
            .any(|sent| sent.key == frame.key && sent.verdict.is_none())
        {
            return self.settle(frame.key, frame.from, (FrameKind::Release, 0));
        }
        if frame.key.arena != self.ground.arena().id() {
            // Given back twice: once to the predecessor of who lent it.
            return tracing::debug!(from = %frame.from, key = %frame.key, "released what is not lent");
        }
        // The coordinator, done with a model that no child has any more.
        if let Err(error) = self.ground.arena().release(frame.key, frame.from) {
            if self.tell(frame.from, frame.kind) {
                tracing::warn!(from = %frame.from, "released what was not lent: {error}");
            }
            return;
        }
        self.retire(frame.key);
    }

    fn model_given_back(&mut self, frame: &Frame) {
        let own = self
            .models
            .get(&frame.key)
            .is_some_and(|(model, _)| model.by == WorkerId::NONE);
        if own
            && let Err(error) = self.ground.arena().release(frame.key, frame.from)
            && self.tell(frame.from, frame.kind)
        {
            tracing::warn!(from = %frame.from, "released what was not lent: {error}");
        }
        self.no_longer_held(frame.from, frame.round, |key| key == frame.key);
    }

    pub(super) fn release_model(&mut self, model: Lent, round: u32) {
        if model.by == WorkerId::NONE {
            return self.retire(model.key);
        }
        let back = Frame {
            round,
            key: model.key,
            ..Frame::default()
        };
        self.ground.post(model.by, FrameKind::Release, back);
    }

    /// The own slot of a model that is not the top's current one and that nobody reads is free again.
    pub(super) fn retire(&mut self, key: Key) {
        let current = self.current.is_some_and(|current| current.key == key);
        if !current && !self.models.contains_key(&key) {
            self.ground.arena().free(key);
        }
    }

    /// A peer is gone, or as good as gone: it reads no model any more, and decides on no aggregate. What becomes of its place
    /// among the children the coordinator says.
    pub(super) fn lost(&mut self, worker: WorkerId) {
        self.no_longer_held(worker, self.round.number, |_| true);
        for sent in &mut self.sent {
            if sent.verdict.is_none() && sent.holder == Some(worker) {
                sent.holder = None;
            }
        }
        self.give_up_orphans();
    }
}
