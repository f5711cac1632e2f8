//! An aggregator's way up, in two forms: frames to a parent on the node, or sessions with the gateway.

use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{Key, WorkerId};
use lifl_common::session::{Object, Room, Source, UpdateHeader};
use lifl_common::update::{Metadata, image};

use super::Aggregator;
use crate::work::ground::Ground;
use crate::work::uplink::{FromAbove, Uplink};

/// How an aggregator reaches its parent.
pub(super) enum Up {
    /// By frames; the top, which has no parent, too.
    Plane,
    /// Through the gateway. In frames and lists the parent is [`WorkerId::NONE`].
    Wire(Box<Uplink>),
}

impl Up {
    pub(super) fn new(uplink: Option<Uplink>) -> Self {
        uplink.map_or(Self::Plane, |uplink| Self::Wire(Box::new(uplink)))
    }

    pub(super) fn ready(&mut self) {
        if let Self::Wire(uplink) = self {
            uplink.ready();
        }
    }

    /// Whether the parent is beyond a wire.
    pub(super) fn is_wire(&self) -> bool {
        matches!(self, Self::Wire(_))
    }

    /// Waits for what comes over the wire; for ever without one. Cancel-safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<FromAbove> {
        match self {
            Self::Plane => std::future::pending().await,
            Self::Wire(uplink) => uplink.next().await,
        }
    }
}

impl<G: Ground> Aggregator<G> {
    /// Deals with what came over the wire; says whether it was the job's end.
    pub(super) fn above(&mut self, above: FromAbove) -> anyhow::Result<bool> {
        match above {
            // `make_room` sees to it.
            FromAbove::Offered => {}
            FromAbove::Model(object, room) => self.model_received(object, room)?,
            FromAbove::Verdict(round, refusal) => {
                let undecided = self
                    .sent
                    .iter()
                    .find(|sent| sent.round == round && sent.verdict.is_none());
                if let Some(key) = undecided.map(|sent| sent.key) {
                    let (kind, number) = match refusal {
                        None => (FrameKind::Release, 0),
                        Some(refusal) => (FrameKind::Refuse, refusal as u16),
                    };
                    self.settle(key, WorkerId::NONE, (kind, number));
                }
            }
            FromAbove::Ended(reason) => {
                tracing::info!("the job has ended: {reason}");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lets a model that is offered come, if a slot is free for it.
    pub(super) fn make_room(&mut self) {
        let Up::Wire(uplink) = &mut self.up else { return };
        if uplink.offered().is_none() {
            return;
        }
        if let Some(slot) = self.ground.arena().begin() {
            uplink.accept(Room::Slot {
                slot,
                start: image::data_offset(&self.shared.schema),
                bytes: self.shared.schema.data_bytes(),
            });
        }
    }

    /// A model's data is in a slot: it is made an image.
    fn model_received(&mut self, object: Object, room: Room) -> anyhow::Result<()> {
        let schema = &self.shared.schema;
        let ours = (schema.data_bytes() as u64, schema.digest());
        anyhow::ensure!(
            (object.length, object.schema) == ours,
            "the model that came is not the job's"
        );
        let Room::Slot { mut slot, .. } = room else {
            anyhow::bail!("a model came into memory that is not a slot");
        };
        let metadata = Metadata {
            maker: self.shared.name.clone(),
            round: object.round.saturating_sub(1),
            generation: slot.key().generation,
            ..Metadata::default()
        };
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.ground.arena().publish(slot);
        let lent = self.own(key);
        self.model(object.round, lent)
    }

    /// Gives the parent an aggregate.
    pub(super) async fn send_up(&mut self, key: Key) -> anyhow::Result<()> {
        let Some(sent) = self.sent.iter().find(|sent| sent.key == key) else {
            return Ok(());
        };
        let (Some((update, metadata)), parent) = (&sent.own, sent.holder.unwrap_or(WorkerId::NONE)) else {
            return Ok(());
        };
        let Up::Wire(uplink) = &mut self.up else {
            self.ground.arena().lend(key, parent)?;
            self.ground.post(parent, FrameKind::Update, *update);
            return Ok(());
        };
        let schema = &self.shared.schema;
        let header = UpdateHeader {
            object: Object {
                round: update.round,
                length: schema.data_bytes() as u64,
                schema: schema.digest(),
            },
            samples: update.samples,
            cover: metadata.cover.clone(),
            loss: f64::from_bits(update.value),
            folded: metadata.folded,
            bytes_copied: metadata.bytes_copied,
        };
        let source = Source::Arena {
            arena: self.ground.own().await?,
            key,
            start: image::data_offset(schema),
            bytes: schema.data_bytes(),
        };
        uplink.update(header, source);
        Ok(())
    }

    /// Tells the parent that nothing comes.
    pub(super) fn send_nothing(&mut self, round: u32, parent: WorkerId) {
        if let Up::Wire(uplink) = &mut self.up {
            return uplink.nothing(round);
        }
        let nothing = Frame {
            round,
            ..Frame::default()
        };
        self.ground.post(parent, FrameKind::Nothing, nothing);
    }
}
