//! What was sent up and is not settled, and what became of what was: for each round, at most one aggregate.
//!
//! ```text
//!                   made, lent to the parent                         the parent's Release or Refuse
//!   (collecting) ───────────────────────────▶ with the parent ───────────────────────────────────▶ settled: the children hear
//!        ▲                                     │  ▲    │                                            the same
//!        │                    the parent is gone  │    └── inherited, and the parent is gone ─┐
//!        │                                     ▼  │ its successor: lent again                 │
//!        │                                   held ── the next round is announced ──▶ settled: RoundOver
//!        └────────────────── the successor has to collect it anew ◀─────────────────────────────┘
//! ```
//!
//! What the top makes is settled at once. Its children hear that with the next round's model, in the same moment, so that
//! each worker below is woken once a round for both; after the last round they hear it without.
//!
//! *Inherited* is an aggregate that a predecessor of this worker made and the parent has ([`FrameKind::Taken`]): this worker
//! collects its children's updates only to pass the verdict on.

use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Cover, Metadata};

use super::{Aggregator, Stage};
use crate::work::ground::Ground;

/// A parent's decision on an aggregate: [`FrameKind::Release`], or [`FrameKind::Refuse`] with a reason.
pub(super) type Verdict = (FrameKind, u16);

/// What children hear whose aggregator's round went on without it.
const ROUND_OVER: Verdict = (FrameKind::Refuse, Refusal::RoundOver as u16);

/// One round's aggregate, on its way.
pub(super) struct Sent {
    pub(super) round: u32,
    pub(super) key: Key,
    /// Who has it: the parent, [`WorkerId::NONE`] for one beyond a wire and for the top's none; `None` if it is gone.
    pub(super) holder: Option<WorkerId>,
    /// Whose work is in it.
    pub(super) cover: Cover,
    /// Where it is this worker's own: the frame that it went up with, and what its image says.
    pub(super) own: Option<(Frame, Metadata)>,
    /// The updates in it, each from who is to hear the verdict, and whose work is in that.
    pub(super) children: Vec<(Frame, Cover)>,
    pub(super) verdict: Option<Verdict>,
    /// Whether the verdict is still to be passed on when the next round [begins](Aggregator::tell_held).
    pub(super) held: bool,
}

impl Sent {
    /// The verdict, where children have heard it.
    pub(super) fn told(&self) -> Option<Verdict> {
        self.verdict.filter(|_| !self.held)
    }
}

impl<G: Ground> Aggregator<G> {
    /// The parent has decided on an aggregate: the children whose updates it contains learn the same.
    pub(super) fn settle(&mut self, key: Key, by: WorkerId, verdict: Verdict) {
        let undecided =
            |sent: &&mut Sent| sent.key == key && sent.holder == Some(by) && sent.verdict.is_none();
        let Some(sent) = self.sent.iter_mut().find(undecided) else {
            if self.tell(by, verdict.0 as u16) {
                tracing::warn!(from = %by, %key, "a verdict on what that worker does not have");
            }
            return;
        };
        if let (FrameKind::Refuse, number) = verdict {
            let refusal = Refusal::from_number(number).unwrap_or(Refusal::BadKey);
            tracing::warn!(round = sent.round, "the parent refused our aggregate: {refusal}");
        }
        sent.verdict = Some(verdict);
        let own = sent.own.is_some();
        let children = frames(&sent.children);
        if own {
            // After a death the arena has taken it back already.
            let _ = self.ground.arena().release(key, by);
            self.ground.arena().free(key);
        }
        self.give_back(&children, verdict);
        self.forget_old();
    }

    /// Aggregates whose parent is gone, of rounds that are over: nobody will decide on them any more. Whether they count,
    /// the model of their round says.
    pub(super) fn give_up_orphans(&mut self) {
        let number = self.round.number;
        let orphan =
            |sent: &&mut Sent| sent.verdict.is_none() && sent.holder.is_none() && sent.round < number;
        let mut orphans = Vec::new();
        for sent in self.sent.iter_mut().filter(orphan) {
            sent.verdict = Some(ROUND_OVER);
            orphans.push((sent.key, sent.own.is_some(), frames(&sent.children)));
        }
        for (key, own, children) in orphans {
            if own {
                self.ground.arena().free(key);
            }
            self.give_back(&children, ROUND_OVER);
        }
        self.forget_old();
    }

    /// Of what is settled, only the last round's may be asked about again.
    fn forget_old(&mut self) {
        let number = self.round.number;
        self.sent
            .retain(|sent| sent.told().is_none() || sent.round + 1 >= number);
    }

    /// Passes on what was held back for the next round.
    pub(super) fn tell_held(&mut self) {
        let mut untold = Vec::new();
        for sent in self.sent.iter_mut().filter(|sent| sent.held) {
            sent.held = false;
            untold.extend(sent.verdict.map(|verdict| (frames(&sent.children), verdict)));
        }
        for (updates, verdict) in untold {
            self.give_back(&updates, verdict);
        }
    }

    pub(super) fn give_back(&mut self, updates: &[Frame], (kind, refusal): Verdict) {
        for &Frame { from, round, key, .. } in updates {
            let verdict = Frame {
                round,
                key,
                refusal,
                ..Frame::default()
            };
            self.ground.post(from, kind, verdict);
        }
    }

    /// The round is announced again, perhaps with the parent's successor: it hears what its predecessor may have heard.
    pub(super) fn say_again(&mut self) {
        let (number, parent) = (self.round.number, self.round.parent);
        if !matches!(self.round.stage, Stage::Over) || self.up.is_wire() {
            return;
        }
        let at = self.sent.iter().position(|sent| sent.round == number);
        let Some(at) = at.filter(|&at| self.sent[at].verdict.is_none() || parent == WorkerId::NONE) else {
            if parent != WorkerId::NONE {
                self.send_nothing(number, parent);
            }
            return;
        };
        let sent = &mut self.sent[at];
        let Some((up, _)) = sent.own else {
            if sent.holder != Some(parent) {
                // The predecessor's aggregate went with the parent: it has to be made anew.
                let sent = self.sent.remove(at);
                self.round.stage = Stage::Announced;
                for update in frames(&sent.children) {
                    self.round.early.keep(update);
                }
            }
            return;
        };
        if parent == WorkerId::NONE {
            let coordinator = self.ground.coordinator();
            return self.ground.post(coordinator, FrameKind::Model, up);
        }
        if sent.holder != Some(parent) {
            let arena = self.ground.arena();
            if let Some(before) = sent.holder.replace(parent) {
                // Where its end is known already, the arena has taken it back.
                let _ = arena.release(sent.key, before);
            }
            if let Err(error) = arena.lend(sent.key, parent) {
                return tracing::error!(key = %sent.key, "cannot be lent again: {error}");
            }
        }
        self.ground.post(parent, FrameKind::Update, up);
    }

    /// A successor has taken a child's place in a round that is over here.
    pub(super) fn succeeded(&mut self, old: WorkerId, new: WorkerId) {
        let number = self.round.number;
        let mut found = None;
        if let Some(sent) = self.sent.iter_mut().find(|sent| sent.round == number)
            && let verdict = sent.told()
            && let Some((update, cover)) = sent.children.iter_mut().find(|(update, _)| update.from == old)
        {
            update.from = new;
            found = Some((*update, cover.clone(), verdict));
        }
        match found {
            None => self.post_taken(new, Key::NONE, &Cover::default()),
            Some((update, cover, verdict)) => {
                self.post_taken(new, update.key, &cover);
                if let Some(verdict) = verdict {
                    self.give_back(&[update], verdict);
                }
            }
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
            self.ground.post(to, FrameKind::Taken, taken);
        }
    }

    /// A piece of what a predecessor's aggregate covers, which the parent has.
    pub(super) async fn taken(&mut self, frame: &Frame) -> anyhow::Result<()> {
        if self.gone.contains(&frame.from) {
            // Nobody will pass the verdict on any more: its successor says anew how the round stands.
            return Ok(());
        }
        let expected = frame.from == self.round.parent
            && frame.round == self.round.number
            && matches!(self.round.stage, Stage::Announced);
        if !expected {
            if self.tell(frame.from, frame.kind) {
                tracing::warn!(from = %frame.from, round = frame.round, "a predecessor's aggregate, where none is expected");
            }
            return Ok(());
        }
        let (cover, pieces) = &mut self.round.inherited;
        cover.set_word(usize::try_from(frame.samples).unwrap_or(usize::MAX), frame.value);
        *pieces += 1;
        if *pieces < frame.covers {
            return Ok(());
        }
        let (cover, _) = std::mem::take(&mut self.round.inherited);
        tracing::info!(
            round = frame.round,
            trainers = cover.count(),
            "a predecessor's aggregate is above"
        );
        self.round.stage = Stage::Over;
        let verdict = cover.is_empty().then_some(ROUND_OVER);
        self.sent.push(Sent {
            round: frame.round,
            key: frame.key,
            holder: Some(frame.from),
            cover,
            own: None,
            children: Vec::new(),
            verdict,
            held: false,
        });
        for early in self.round.early.take() {
            self.answer(early).await?;
        }
        Ok(())
    }
}

fn frames(children: &[(Frame, Cover)]) -> Vec<Frame> {
    children.iter().map(|(frame, _)| *frame).collect()
}
