//! Pending aggregates: what was sent up and is not decided, and what became of what was; for each round, at most one.
//!
//! ```text
//!                   made, lent to the parent                         the parent's Release or Refuse
//!   (folding) ──────────────────────────────▶ with the parent ───────────────────────────────────▶ decided: the children
//!        ▲                                     │  ▲    │                                            hear the same
//!        │                    the parent is gone  │    └── inherited, and the parent is gone ─┐
//!        │                                     ▼  │ its successor: lent again                 │
//!        │                                   held ── the next round is announced ──▶ decided: RoundOver
//!        └────────────────── the successor has to fold it anew ◀──────────────────────────────┘
//! ```
//!
//! What the top makes is decided at once. Its children hear that with the next round's model, in the same moment, so that
//! each worker below is woken once a round for both; after the last round they hear it without.
//!
//! *Inherited* is an aggregate that a predecessor of this worker made and the parent has ([`FrameKind::Taken`]): this worker
//! takes its children's updates only to pass the verdict on.

use std::sync::Arc;

use lifl_common::arena::PeerArena;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::Cover;

use super::Aggregator;
use super::children::TakenUpdate;
use super::round_fold::check_update;
use crate::parent::PendingUpdate;

/// A parent's decision on an aggregate: [`FrameKind::Release`], or [`FrameKind::Refuse`] with a reason.
pub(super) type Verdict = (FrameKind, u16);

/// What children hear whose aggregator's round went on without it.
pub(super) const ROUND_OVER: Verdict = (FrameKind::Refuse, Refusal::RoundOver as u16);

/// Updates that are taken for part of a predecessor's aggregate, for each trainer in it.
const MOST_INHERITED: usize = 8;

/// One round's aggregate, on its way.
#[derive(Debug)]
pub(super) struct PendingAggregate {
    /// The parent has it: [`WorkerId::NONE`] for one behind the gateway and for the top's none.
    pub(super) lent: PendingUpdate,
    /// Whether this worker made it.
    pub(super) own: bool,
    /// The trainers whose work is in it.
    pub(super) cover: Cover,
    /// The updates in it, each from who is to hear the verdict, and the trainers in that.
    pub(super) children: Vec<(Frame, Cover)>,
    pub(super) verdict: Option<Verdict>,
    /// Whether the verdict is still to be passed on when the next round [begins](Aggregator::send_deferred_verdicts).
    pub(super) deferred: bool,
}

impl PendingAggregate {
    /// The verdict, where children have heard it.
    fn passed_on(&self) -> Option<Verdict> {
        self.verdict.filter(|_| !self.deferred)
    }

    pub(super) fn updates(&self) -> Vec<Frame> {
        self.children.iter().map(|(frame, _)| *frame).collect()
    }
}

impl Aggregator {
    /// The parent has decided on an aggregate: the children whose updates it contains hear the same.
    pub(super) fn decided(&mut self, frame: &Frame) {
        let undecided =
            |pending: &&mut PendingAggregate| pending.verdict.is_none() && pending.lent.is_judged_by(frame);
        let Some(pending) = self.pending.iter_mut().find(undecided) else {
            if self.log_once(frame.from, frame.kind) {
                tracing::warn!(from = %frame.from, key = %frame.key, "a verdict on what that worker does not have");
            }
            return;
        };
        let verdict = if frame.kind == FrameKind::Release as u16 {
            (FrameKind::Release, 0)
        } else {
            let refusal = Refusal::from_number(frame.refusal).unwrap_or(Refusal::BadKey);
            tracing::warn!(
                round = pending.lent.round(),
                "the parent refused our aggregate: {refusal}"
            );
            (FrameKind::Refuse, frame.refusal)
        };
        pending.verdict = Some(verdict);
        let (own, updates) = (pending.own, pending.updates());
        if own {
            self.arena.free(frame.key);
        }
        self.send_verdicts(&updates, verdict);
        self.forget_old();
    }

    /// Aggregates whose parent is gone, of rounds that are over: nobody will decide on them any more. Whether they count,
    /// the model of their round says.
    pub(super) fn give_up_orphans(&mut self) {
        let number = self.round.number;
        let mut updates = Vec::new();
        for pending in &mut self.pending {
            if pending.verdict.is_some() || !pending.lent.is_orphaned(number) {
                continue;
            }
            pending.verdict = Some(ROUND_OVER);
            updates.extend(pending.updates());
            if pending.own {
                self.arena.free(pending.lent.key());
            }
        }
        self.send_verdicts(&updates, ROUND_OVER);
        self.forget_old();
    }

    /// Of what is decided, only the last round's may be asked about again.
    fn forget_old(&mut self) {
        let number = self.round.number;
        self.pending
            .retain(|pending| pending.passed_on().is_none() || pending.lent.round() + 1 >= number);
    }

    /// Passes on what was deferred to the next round.
    pub(super) fn send_deferred_verdicts(&mut self) {
        let mut untold = Vec::new();
        for pending in self.pending.iter_mut().filter(|pending| pending.deferred) {
            pending.deferred = false;
            untold.extend(pending.verdict.map(|verdict| (pending.updates(), verdict)));
        }
        for (updates, verdict) in untold {
            self.send_verdicts(&updates, verdict);
        }
    }

    pub(super) fn send_verdicts(&mut self, updates: &[Frame], (kind, refusal): Verdict) {
        for &Frame { from, round, key, .. } in updates {
            let verdict = Frame {
                round,
                key,
                refusal,
                ..Frame::default()
            };
            self.post(from, kind, verdict);
        }
    }

    /// A child's update of a round whose aggregate is above.
    pub(super) fn answer_to_pending(
        &mut self,
        at: usize,
        frame: Frame,
        opened: Option<&Result<Option<Arc<PeerArena>>, String>>,
    ) {
        let pending = &self.pending[at];
        let verdict = pending.passed_on();
        let identity = |update: &Frame| (update.from, update.key);
        if pending
            .children
            .iter()
            .any(|(update, _)| identity(update) == identity(&frame))
        {
            // A replay: so is what is known of it.
            if let Some(verdict) = verdict {
                self.send_verdicts(&[frame], verdict);
            }
            return;
        }
        if pending.own {
            return self.refuse(&frame, Refusal::Late);
        }
        let Some(opened) = opened else {
            if let Err(refusal) = self.open_arena_of(frame) {
                self.refuse(&frame, refusal);
            }
            return;
        };
        match check_update(&self.config.schema, &frame, opened) {
            Ok(update) if self.is_inherited(at, &update) => {
                self.pending[at]
                    .children
                    .push((frame, update.metadata.info.cover));
                if let Some(verdict) = verdict {
                    self.send_verdicts(&[frame], verdict);
                }
            }
            Ok(_) => self.refuse(&frame, Refusal::Late),
            Err(refusal) => self.refuse(&frame, refusal),
        }
    }

    /// Whether a child's update is part of the aggregate that a predecessor sent up, and of what stands below that child. A
    /// child's successor may make it again.
    fn is_inherited(&self, at: usize, update: &TakenUpdate) -> bool {
        let (pending, cover) = (&self.pending[at], &update.metadata.info.cover);
        let round = &self.round;
        let place = round.places.iter().position(|child| *child == update.frame.from);
        let own = || place.is_some_and(|place| round.bounds[place].cover.contains_all(cover));
        let more = pending.children.len() < MOST_INHERITED * pending.cover.count() as usize;
        more && pending.cover.contains_all(cover) && (pending.lent.round() != round.number || own())
    }

    /// A successor has taken a child's place in a round that is over here.
    pub(super) fn child_succeeded(&mut self, old: WorkerId, new: WorkerId) {
        let number = self.round.number;
        let pending = self
            .pending
            .iter_mut()
            .find(|pending| pending.lent.round() == number);
        let taken = pending.and_then(|pending| {
            let verdict = pending.passed_on();
            let mut children = pending.children.iter_mut();
            let (update, cover) = children.find(|(update, _)| update.from == old)?;
            update.from = new;
            Some((*update, cover.clone(), verdict))
        });
        let Some((update, cover, verdict)) = taken else {
            return self.post_taken(new, Key::NONE, &Cover::default());
        };
        self.post_taken(new, update.key, &cover);
        if let Some(verdict) = verdict {
            self.send_verdicts(&[update], verdict);
        }
    }

    /// Tells a child's successor whose work of its predecessor's has been taken.
    pub(super) fn post_taken(&mut self, to: WorkerId, key: Key, cover: &Cover) {
        let round = self.round.number;
        let mut words: Vec<(usize, u64)> = cover.words().collect();
        if words.is_empty() {
            words.push((0, 0));
        }
        let covers = words.len() as u32;
        for (at, value) in words {
            let taken = Frame {
                round,
                key,
                samples: at as u64,
                value,
                covers,
                ..Frame::default()
            };
            self.post(to, FrameKind::Taken, taken);
        }
    }
}
