//! What is said of an update beside its numbers, in one type. It goes by three ways: in the [`Frame`] that lends the update, in
//! the [message](crate::session::Message::Update) that announces it in a session, in the [`Metadata`] of its image.

use super::cover::Cover;
use super::image::{self, Metadata};
use super::schema::Schema;
use crate::frame::{Frame, FrameKind};
use crate::id::{Generation, Key};

/// What an update, or an aggregate, says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UpdateInfo {
    /// Training samples behind it.
    pub samples: u64,
    /// Trainers whose updates it contains.
    pub cover: Cover,
    /// Sample-weighted mean training loss; `None` if no trainer has a finite one.
    pub loss: Option<f64>,
    /// Updates folded in its making, on all levels below and in itself.
    pub folded: u64,
    /// Bytes of lent objects copied in its making, on all levels below and in itself.
    pub bytes_copied: u64,
    /// When the last object of each level that is in it was made, from the trainers' up to this one's own: nanoseconds of the
    /// node's `CLOCK_MONOTONIC`. Empty if some of that was made elsewhere, and so in a session.
    pub made: Vec<u64>,
}

impl UpdateInfo {
    /// The frame that lends it, without sender and receiver.
    pub fn frame(&self, round: u32, key: Key, schema: &Schema) -> Frame {
        Frame {
            kind: FrameKind::Update as u16,
            round,
            key,
            length: image::image_bytes(schema) as u64,
            samples: self.samples,
            value: loss_bits(self.loss),
            covers: self.cover.count(),
            ..Frame::default()
        }
    }

    /// What its image says.
    pub fn metadata(&self, maker: &str, round: u32, generation: Generation) -> Metadata {
        Metadata {
            maker: maker.to_owned(),
            round,
            generation,
            info: self.clone(),
        }
    }
}

/// A loss in 64 bits, those of NaN for none.
pub(crate) fn loss_bits(loss: Option<f64>) -> u64 {
    loss.unwrap_or(f64::NAN).to_bits()
}

/// The loss of those bits; none, if that is no number.
pub(crate) fn loss_of_bits(bits: u64) -> Option<f64> {
    Some(f64::from_bits(bits)).filter(|loss| loss.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ArenaId;
    use crate::session::{Message, Object};
    use crate::update::{DType, TensorSpec};

    fn schema() -> Schema {
        Schema::new(vec![TensorSpec::new("weights", DType::F32, [12])]).expect("a schema")
    }

    fn info(loss: Option<f64>) -> UpdateInfo {
        let mut cover = Cover::of(3);
        cover.add(&Cover::of(70));
        UpdateInfo {
            samples: 600,
            cover,
            loss,
            folded: 4,
            bytes_copied: 96,
            made: vec![5, 9],
        }
    }

    #[test]
    fn frame_message_and_metadata_say_the_same_of_an_update() {
        let (schema, generation) = (schema(), Generation(8));
        let key = Key {
            arena: ArenaId(4),
            slot: 0,
            generation,
        };
        for loss in [Some(0.25), None] {
            let info = info(loss);
            let frame = info.frame(7, key, &schema);
            assert_eq!((frame.round, frame.key), (7, key));
            assert_eq!(frame.kind, FrameKind::Update as u16);
            assert_eq!(frame.length, image::image_bytes(&schema) as u64);
            assert_eq!((frame.samples, frame.covers), (600, 2));
            let said = f64::from_bits(frame.value);
            assert_eq!(Some(said).filter(|loss| !loss.is_nan()), loss);

            let object = Object::of(7, &schema);
            let message = Message::Update(object, info.clone()).encode();
            let without_times = UpdateInfo {
                made: Vec::new(),
                ..info.clone()
            };
            assert_eq!(
                Message::decode(&message),
                Ok(Message::Update(object, without_times))
            );

            let metadata = info.metadata("leaf-1", 7, generation);
            assert_eq!((metadata.maker.as_str(), metadata.round), ("leaf-1", 7));
            assert_eq!(metadata.generation, generation);
            assert_eq!(metadata.info, info);
        }
    }

    #[test]
    fn a_loss_of_another_machine_that_is_no_number_is_none() {
        for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let object = Object::of(1, &schema());
            let message = Message::Update(object, info(Some(loss))).encode();
            let Ok(Message::Update(_, heard)) = Message::decode(&message) else {
                panic!("it is one");
            };
            assert_eq!(heard.loss, None);
        }
    }
}
