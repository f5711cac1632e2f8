//! The way up: this worker as its parent's child, by frames or through the gateway.
//!
//! A parent behind the gateway is told the same over a session: its model comes into a slot of this worker's own arena and
//! is handed down from there, and the aggregate is sent from its slot.

use lifl_common::arena::WritableSlot;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::session::Object;
use lifl_common::update::{Metadata, UpdateInfo, image};

use super::pending_aggregates::{PendingAggregate, ROUND_OVER};
use super::round::Stage;
use super::{Aggregator, Error, Output};
use crate::parent::PendingUpdate;

impl Aggregator {
    /// Gives the parent an aggregate.
    pub(super) fn send_up(&mut self, lent: &PendingUpdate, info: &UpdateInfo) {
        if self.config.via_gateway {
            let (round, key) = (lent.round(), lent.key());
            let aggregate = Output::SendAggregate(round, info.clone(), key);
            self.outputs.push_back(aggregate);
        } else {
            let update = lent.frame();
            self.post(update.to, FrameKind::Update, update);
        }
    }

    /// Tells the parent that nothing comes.
    pub(super) fn send_nothing(&mut self, round: u32, parent: WorkerId) {
        if self.config.via_gateway {
            return self.outputs.push_back(Output::SendNothing { round });
        }
        let nothing = Frame {
            round,
            ..Frame::default()
        };
        self.post(parent, FrameKind::Nothing, nothing);
    }

    /// The round is announced again, perhaps with the parent's successor: it hears what its predecessor may have heard.
    pub(super) fn resend(&mut self) {
        let (number, parent) = (self.round.number, self.round.parent);
        if !matches!(self.round.stage, Stage::Over) || self.config.via_gateway {
            return;
        }
        let at = self
            .pending
            .iter()
            .position(|pending| pending.lent.round() == number);
        let undecided = |&at: &usize| self.pending[at].verdict.is_none() || parent == WorkerId::NONE;
        let Some(at) = at.filter(undecided) else {
            if parent != WorkerId::NONE {
                self.send_nothing(number, parent);
            }
            return;
        };
        let pending = &mut self.pending[at];
        if !pending.own {
            if pending.lent.holder() != Some(parent) {
                self.fold_anew(at);
            }
            return;
        }
        let update = pending.lent.lend_again(parent);
        if parent == WorkerId::NONE {
            self.post(self.config.coordinator, FrameKind::Model, update);
        } else {
            self.post(parent, FrameKind::Update, update);
        }
    }

    /// The predecessor's aggregate went with the parent: it has to be made anew.
    pub(super) fn fold_anew(&mut self, at: usize) {
        let pending = self.pending.remove(at);
        self.round.stage = Stage::Announced;
        for update in pending.updates() {
            self.round.early.keep(update);
        }
    }

    /// A piece of what a predecessor's aggregate covers, which the parent has.
    pub(super) fn taken(&mut self, frame: &Frame) -> Result<(), Error> {
        if self.gone.contains(&frame.from) {
            // Nobody will pass the verdict on any more: its successor says anew how the round stands.
            return Ok(());
        }
        let expected = frame.from == self.round.parent
            && frame.round == self.round.number
            && matches!(self.round.stage, Stage::Announced);
        if !expected {
            if self.log_once(frame.from, frame.kind) {
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
        let inherited = Frame {
            round: frame.round,
            key: frame.key,
            ..Frame::default()
        };
        self.pending.push(PendingAggregate {
            lent: PendingUpdate::new(inherited, frame.from),
            own: false,
            cover,
            children: Vec::new(),
            verdict,
            deferred: false,
        });
        self.answer_early()
    }

    /// The parent behind the gateway has decided on a round's aggregate.
    pub(super) fn gateway_verdict(&mut self, round: u32, refusal: Option<Refusal>) {
        let undecided =
            |pending: &&PendingAggregate| pending.lent.round() == round && pending.verdict.is_none();
        let Some(pending) = self.pending.iter().find(undecided) else {
            return;
        };
        let kind = match refusal {
            None => FrameKind::Release,
            Some(_) => FrameKind::Refuse,
        };
        self.decided(&Frame {
            from: WorkerId::NONE,
            kind: kind as u16,
            refusal: refusal.map_or(0, |refusal| refusal as u16),
            key: pending.lent.key(),
            ..Frame::default()
        });
    }

    /// Receives the model that the gateway has, if a slot is free for it.
    pub(super) fn receive_offered_model(&mut self) {
        if self.model_offered
            && let Some(slot) = self.arena.begin()
        {
            self.model_offered = false;
            self.outputs.push_back(Output::ReceiveModel(slot));
        }
    }

    /// A model's data has come from the gateway: it is made an image.
    pub(super) fn model_received(&mut self, object: Object, mut slot: WritableSlot) -> Result<(), Error> {
        let schema = &self.config.schema;
        if object != Object::of(object.round, schema) {
            return Err(Error::OtherModel);
        }
        let metadata = Metadata {
            maker: self.config.name.clone(),
            round: object.round.saturating_sub(1),
            generation: slot.key().generation,
            ..Metadata::default()
        };
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.arena.publish(slot);
        self.model(self.own_model(object.round, key))
    }
}
