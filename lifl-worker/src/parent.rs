//! What is on loan between a worker and its parent, for every worker that has one: models that are lent to it, and the update
//! that it lends.
//!
//! ```text
//!   model:   offered ── the coordinator names its lender as the round's parent ──▶ taken
//!                └── another lender, an earlier round: given back
//!   update:  with the parent ── its verdict ──────────────────────────────────────▶ settled
//!                │  ▲      the parent dies                        a later round begins
//!                │  └── lent again to its successor ── with nobody ──▶ orphaned
//!                └──────────────────────────────────────────▲
//! ```

use std::collections::BTreeMap;

use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{Key, WorkerId};

/// A model that another worker lends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LentModel {
    /// The round that trains on it.
    pub round: u32,
    /// Where it lies.
    pub key: Key,
    /// Bytes of its image.
    pub length: u64,
    /// Who is to get it back.
    pub lender: WorkerId,
}

impl LentModel {
    /// The model that a [`FrameKind::Model`] lends.
    pub fn of(frame: &Frame) -> Self {
        Self {
            round: frame.round,
            key: frame.key,
            length: frame.length,
            lender: frame.from,
        }
    }

    /// The frame that gives it back, without its sender.
    pub fn release(&self) -> Frame {
        Frame {
            to: self.lender,
            kind: FrameKind::Release as u16,
            round: self.round,
            key: self.key,
            ..Frame::default()
        }
    }
}

/// Models that nobody works on yet: the last one of each lender, so that nobody can offer without end. Any worker of the job
/// can send one; which of them is the round's parent, the coordinator says.
#[derive(Clone, Debug, Default)]
pub struct OfferedModels(BTreeMap<WorkerId, LentModel>);

impl OfferedModels {
    /// Keeps a model; gives the one of the same lender that it replaces and that is to be given back.
    pub fn offer(&mut self, model: LentModel) -> Option<LentModel> {
        let before = self.0.insert(model.lender, model);
        // The same object for another round is another loan.
        before.filter(|before| (before.round, before.key) != (model.round, model.key))
    }

    /// Takes the model of that round which the parent lends.
    pub fn take(&mut self, round: u32, parent: WorkerId) -> Option<LentModel> {
        self.0.get(&parent).filter(|model| model.round == round)?;
        self.0.remove(&parent)
    }

    /// Takes the models that are to be given back: those of rounds that are over, and of this one those of others than the
    /// parent.
    pub fn take_useless(&mut self, round: u32, parent: WorkerId) -> Vec<LentModel> {
        let mut useless = Vec::new();
        self.0.retain(|lender, model| {
            let kept = model.round > round || (model.round == round && *lender == parent);
            if !kept {
                useless.push(*model);
            }
            kept
        });
        useless
    }

    /// A lender is gone, and its model with it.
    pub fn lost(&mut self, lender: WorkerId) {
        self.0.remove(&lender);
    }

    /// A model is given back otherwise: the same loan is not to go back from here, too.
    pub fn forget(&mut self, model: &LentModel) {
        let same = |known: &LentModel| (known.round, known.key) == (model.round, model.key);
        if self.0.get(&model.lender).is_some_and(same) {
            self.0.remove(&model.lender);
        }
    }
}

/// An update that the parent has not decided on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PendingUpdate {
    update: Frame,
    /// `None` once the parent is gone.
    holder: Option<WorkerId>,
}

impl PendingUpdate {
    /// Lends an update to the parent, as that [frame](lifl_common::update::UpdateInfo::frame) says.
    pub fn new(update: Frame, parent: WorkerId) -> Self {
        Self {
            update,
            holder: Some(parent),
        }
    }

    /// The frame that lends it, addressed to the parent, without its sender.
    pub fn frame(&self) -> Frame {
        let to = self.holder.unwrap_or(WorkerId::NONE);
        Frame { to, ..self.update }
    }

    /// The round that it belongs to.
    pub fn round(&self) -> u32 {
        self.update.round
    }

    /// Where it lies.
    pub fn key(&self) -> Key {
        self.update.key
    }

    /// Who has it; `None` once that worker is gone.
    pub fn holder(&self) -> Option<WorkerId> {
        self.holder
    }

    /// Lends it to the parent once more, or to the parent's successor: the frame says so.
    pub fn lend_again(&mut self, parent: WorkerId) -> Frame {
        self.holder = Some(parent);
        self.frame()
    }

    /// A worker is gone, or did not get what it was sent.
    pub fn lost(&mut self, worker: WorkerId) {
        self.holder.take_if(|holder| *holder == worker);
    }

    /// Whether a [`FrameKind::Release`] or [`FrameKind::Refuse`] is the verdict on it: of this very object, by who has it.
    pub fn is_judged_by(&self, verdict: &Frame) -> bool {
        (self.update.key, self.holder) == (verdict.key, Some(verdict.from))
    }

    /// Whether nobody will decide on it any more: its parent is gone, and the job is at a later round.
    pub fn is_orphaned(&self, round: u32) -> bool {
        self.holder.is_none() && self.update.round < round
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::id::{ArenaId, Generation};

    use super::*;

    const LEAF: WorkerId = WorkerId(5);
    const SUCCESSOR: WorkerId = WorkerId(6);
    const STRANGER: WorkerId = WorkerId(9);

    fn key(generation: u64) -> Key {
        Key {
            arena: ArenaId(8),
            slot: 0,
            generation: Generation(generation),
        }
    }

    fn model(round: u32, generation: u64, lender: WorkerId) -> LentModel {
        LentModel {
            round,
            key: key(generation),
            length: 64,
            lender,
        }
    }

    #[test]
    fn of_each_lenders_models_the_last_is_kept_and_the_parents_is_taken() {
        let mut offered = OfferedModels::default();
        assert_eq!(offered.offer(model(1, 1, LEAF)), None);
        assert_eq!(offered.offer(model(1, 2, STRANGER)), None);
        assert_eq!(offered.offer(model(2, 3, LEAF)), Some(model(1, 1, LEAF)));
        assert_eq!(
            offered.offer(model(2, 3, LEAF)),
            None,
            "the same object is one loan"
        );
        let unchanged = model(3, 3, LEAF);
        let again = OfferedModels::default().offer(unchanged);
        assert_eq!(again, None);
        let mut twice = offered.clone();
        assert_eq!(
            twice.offer(unchanged),
            Some(model(2, 3, LEAF)),
            "one loan a round"
        );
        assert_eq!(offered.take(1, LEAF), None, "it is the next round's");
        assert_eq!(offered.take(2, SUCCESSOR), None);
        assert_eq!(offered.take_useless(2, LEAF), [model(1, 2, STRANGER)]);
        assert_eq!(offered.take(2, LEAF), Some(model(2, 3, LEAF)));
        assert!(offered.0.is_empty());
    }

    #[test]
    fn a_rounds_models_of_others_than_its_parent_go_back_and_later_ones_stay() {
        let mut offered = OfferedModels::default();
        for (round, lender) in [(3, LEAF), (4, STRANGER), (3, SUCCESSOR)] {
            assert_eq!(offered.offer(model(round, 1, lender)), None);
        }
        assert_eq!(offered.take_useless(3, SUCCESSOR), [model(3, 1, LEAF)]);
        offered.lost(SUCCESSOR);
        assert_eq!(offered.take(3, SUCCESSOR), None, "it died with its lender");
        assert_eq!(offered.take_useless(5, LEAF), [model(4, 1, STRANGER)]);
        assert!(offered.0.is_empty());
    }

    #[test]
    fn a_model_goes_back_to_its_lender_under_its_own_name() {
        let lent = Frame {
            round: 3,
            key: key(7),
            length: 64,
            from: LEAF,
            ..Frame::default()
        };
        let back = LentModel::of(&lent).release();
        assert_eq!((back.to, back.round, back.key), (LEAF, 3, key(7)));
        assert_eq!(back.kind, FrameKind::Release as u16);
    }

    #[test]
    fn only_who_has_an_update_decides_on_it() {
        let update = Frame {
            round: 2,
            key: key(4),
            ..Frame::default()
        };
        let verdict = |from, generation| Frame {
            from,
            key: key(generation),
            ..Frame::default()
        };
        let mut pending = PendingUpdate::new(update, LEAF);
        assert_eq!(pending.frame().to, LEAF);
        assert!(pending.is_judged_by(&verdict(LEAF, 4)));
        assert!(!pending.is_judged_by(&verdict(LEAF, 3)), "another object");
        assert!(!pending.is_judged_by(&verdict(STRANGER, 4)));
        pending.lost(STRANGER);
        assert_eq!(pending.holder(), Some(LEAF));
        pending.lost(LEAF);
        assert!(!pending.is_judged_by(&verdict(LEAF, 4)), "it is gone");
        assert!(!pending.is_orphaned(2), "its successor may still come");
        assert!(pending.is_orphaned(3));
        assert_eq!(pending.lend_again(SUCCESSOR).to, SUCCESSOR);
        assert!(!pending.is_orphaned(3));
        assert!(!pending.is_judged_by(&verdict(LEAF, 4)));
        assert!(pending.is_judged_by(&verdict(SUCCESSOR, 4)));
    }
}
