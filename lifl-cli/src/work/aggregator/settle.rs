//! What an aggregator gives back and gets back: models it handed down, updates it folded, aggregates it sent up; and
//! what becomes of them when somebody dies.

use std::collections::{HashMap, HashSet};

use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};

use super::{Aggregator, Lent};

impl Aggregator {
    /// Somebody gives something back: a child or the coordinator a model, the parent an aggregate.
    pub(super) async fn released(&mut self, frame: Frame) -> anyhow::Result<()> {
        if let Some(server) = &self.server
            && server.released(&mut self.link, &frame)
        {
            return Ok(());
        }
        if frame.key.arena != self.link.arena.id() || self.models.contains_key(&frame.key) {
            return self.model_given_back(frame).await;
        }
        if self.outstanding.contains_key(&frame.key) {
            return self.settle(frame.key, frame.from, FrameKind::Release, 0).await;
        }
        // The coordinator, done with a model that no child has any more.
        if let Err(error) = self.link.arena.release(frame.key, frame.from) {
            tracing::warn!(from = %frame.from, "released what was not lent: {error}");
        }
        self.retire(frame.key);
        Ok(())
    }

    async fn model_given_back(&mut self, frame: Frame) -> anyhow::Result<()> {
        let Some((lent, holders)) = self.models.get_mut(&frame.key) else {
            tracing::warn!(from = %frame.from, key = %frame.key, "released what was not lent");
            return Ok(());
        };
        let lent = *lent;
        if let Some(at) = holders.iter().position(|holder| *holder == frame.from) {
            holders.swap_remove(at);
        }
        let last = holders.is_empty();
        if lent.by == WorkerId::NONE
            && let Err(error) = self.link.arena.release(frame.key, frame.from)
        {
            tracing::warn!(from = %frame.from, "released what was not lent: {error}");
        }
        if last {
            self.model_done(lent, frame.round).await?;
        }
        Ok(())
    }

    /// Hands a model down to children.
    pub(super) async fn hand_down(
        &mut self,
        model: Lent,
        round: u32,
        children: &[WorkerId],
    ) -> anyhow::Result<()> {
        let mut frames = Vec::with_capacity(children.len());
        for &child in children {
            if model.by == WorkerId::NONE {
                self.link.arena.lend(model.key, child)?;
            }
            let lent = Frame {
                round,
                key: model.key,
                length: model.length,
                ..Frame::default()
            };
            frames.push(self.link.frame(child, FrameKind::Model, lent));
        }
        self.models
            .entry(model.key)
            .or_insert((model, Vec::new()))
            .1
            .extend(children);
        self.link.send_all(&frames).await
    }

    /// Hands the round's model down to those who had to finish an older round first and have, meanwhile.
    pub(super) async fn hand_down_owed(&mut self) -> anyhow::Result<()> {
        let collecting = self.round.collecting.as_ref();
        let Some(collecting) = collecting.filter(|collecting| !collecting.owed.is_empty()) else {
            return Ok(());
        };
        let (model, round) = (collecting.model, collecting.round);
        let busy = self.busy(&model);
        let (owed, free): (Vec<_>, Vec<_>) = collecting
            .owed
            .iter()
            .filter(|child| collecting.children.is_waiting(**child))
            .partition(|child| busy.contains(child));
        let none_left = owed.is_empty();
        if let Some(collecting) = &mut self.round.collecting {
            collecting.owed = owed;
        }
        self.hand_down(model, round, &free).await?;
        if none_left {
            self.let_go(model.key, round).await?;
        }
        Ok(())
    }

    /// The round's model is not kept for children any more who have not had it.
    pub(super) async fn let_go(&mut self, key: Key, round: u32) -> anyhow::Result<()> {
        let own = self.link.id();
        let Some((model, holders)) = self.models.get_mut(&key) else {
            return Ok(());
        };
        let model = *model;
        holders.retain(|holder| *holder != own);
        if holders.is_empty() {
            self.model_done(model, round).await?;
        }
        Ok(())
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

    /// No child reads the model any more.
    async fn model_done(&mut self, model: Lent, round: u32) -> anyhow::Result<()> {
        self.models.remove(&model.key);
        self.release_model(model, round).await
    }

    pub(super) async fn release_model(&mut self, model: Lent, round: u32) -> anyhow::Result<()> {
        if model.by == WorkerId::NONE {
            self.retire(model.key);
            return Ok(());
        }
        self.link
            .send(
                model.by,
                FrameKind::Release,
                Frame {
                    round,
                    key: model.key,
                    ..Frame::default()
                },
            )
            .await
    }

    /// The own slot of a model that is not the top's current one and that nobody reads is free again.
    pub(super) fn retire(&mut self, key: Key) {
        let current = self.current.is_some_and(|current| current.key == key);
        if !current && !self.models.contains_key(&key) {
            self.link.arena.free(key);
        }
    }

    /// The parent has decided on our aggregate: the children whose updates it contains learn the same.
    pub(super) async fn settle(
        &mut self,
        key: Key,
        by: WorkerId,
        verdict: FrameKind,
        refusal: u16,
    ) -> anyhow::Result<()> {
        let Some(outstanding) = self
            .outstanding
            .get(&key)
            .filter(|outstanding| outstanding.parent == by)
        else {
            tracing::warn!(from = %by, %key, "a verdict on what that worker does not have");
            return Ok(());
        };
        let children = outstanding.children.clone();
        self.outstanding.remove(&key);
        // After a death the arena has taken it back already.
        let _ = self.link.arena.release(key, by);
        self.link.arena.free(key);
        self.give_back(&children, verdict, refusal).await
    }

    pub(super) async fn give_back(
        &mut self,
        updates: &[(WorkerId, Frame)],
        verdict: FrameKind,
        refusal: u16,
    ) -> anyhow::Result<()> {
        let frames: Vec<Frame> = updates
            .iter()
            .map(|&(child, Frame { round, key, .. })| {
                self.link.frame(
                    child,
                    verdict,
                    Frame {
                        round,
                        key,
                        refusal,
                        ..Frame::default()
                    },
                )
            })
            .collect();
        self.link.send_all(&frames).await
    }

    /// A peer is gone: as a child it gives nothing, as a parent it decides nothing, and it reads no model any more.
    pub(super) async fn lost(&mut self, worker: WorkerId) -> anyhow::Result<()> {
        if let Some(collecting) = &mut self.round.collecting {
            collecting.children.lost(worker);
        }
        self.round.children.retain(|child| *child != worker);
        let unread: Vec<Lent> = self
            .models
            .values_mut()
            .filter_map(|(lent, holders)| {
                let held = holders.contains(&worker);
                holders.retain(|holder| *holder != worker);
                (held && holders.is_empty()).then_some(*lent)
            })
            .collect();
        for model in unread {
            self.model_done(model, self.round.number).await?;
        }
        let orphans: Vec<Key> = self
            .outstanding
            .iter()
            .filter(|(_, sent)| sent.parent == worker)
            .map(|(&key, _)| key)
            .collect();
        for key in orphans {
            self.settle(key, worker, FrameKind::Refuse, Refusal::WorkerGone as u16)
                .await?;
        }
        Ok(())
    }
}
