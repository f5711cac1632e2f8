//! What is said of an update beside its numbers, in one type, and the three forms in which it is said: the [`Frame`] that lends
//! it, the [header](UpdateHeader) that announces it in a session, the [`Metadata`] of its image.

use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{Generation, Key};
use lifl_common::session::{Object, UpdateHeader};
use lifl_common::update::{Cover, Metadata, Schema, image};

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
    /// When the last object of each level in it was made, as in [`Metadata::made`].
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
            value: self.loss.unwrap_or(f64::NAN).to_bits(),
            covers: self.cover.count(),
            ..Frame::default()
        }
    }

    /// The message that announces it in a session.
    pub fn header(&self, round: u32, schema: &Schema) -> UpdateHeader {
        UpdateHeader {
            object: object(round, schema),
            samples: self.samples,
            cover: self.cover.clone(),
            loss: self.loss.unwrap_or(f64::NAN),
            folded: self.folded,
            bytes_copied: self.bytes_copied,
        }
    }

    /// What its image says.
    pub fn metadata(&self, maker: &str, round: u32, generation: Generation) -> Metadata {
        Metadata {
            maker: maker.to_owned(),
            round,
            generation,
            samples: self.samples,
            cover: self.cover.clone(),
            loss: self.loss,
            folded: self.folded,
            bytes_copied: self.bytes_copied,
            made: self.made.clone(),
        }
    }
}

impl From<UpdateHeader> for UpdateInfo {
    /// Without times: those of another machine's clock mean nothing here.
    fn from(header: UpdateHeader) -> Self {
        Self {
            samples: header.samples,
            cover: header.cover,
            loss: Some(header.loss).filter(|loss| loss.is_finite()),
            folded: header.folded,
            bytes_copied: header.bytes_copied,
            made: Vec::new(),
        }
    }
}

impl From<Metadata> for UpdateInfo {
    fn from(metadata: Metadata) -> Self {
        Self {
            samples: metadata.samples,
            cover: metadata.cover,
            loss: metadata.loss,
            folded: metadata.folded,
            bytes_copied: metadata.bytes_copied,
            made: metadata.made,
        }
    }
}

/// How a session announces a model or an update of that round.
pub fn object(round: u32, schema: &Schema) -> Object {
    Object {
        round,
        length: schema.data_bytes() as u64,
        schema: schema.digest(),
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::id::ArenaId;
    use lifl_common::update::{DType, TensorSpec};

    use super::*;

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
    fn frame_header_and_metadata_say_the_same_of_an_update() {
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

            let header = info.header(7, &schema);
            assert_eq!(header.object, object(7, &schema));
            let without_times = UpdateInfo {
                made: Vec::new(),
                ..info.clone()
            };
            assert_eq!(UpdateInfo::from(header), without_times);

            let metadata = info.metadata("leaf-1", 7, generation);
            assert_eq!((metadata.maker.as_str(), metadata.round), ("leaf-1", 7));
            assert_eq!(metadata.generation, generation);
            assert_eq!(UpdateInfo::from(metadata), info);
        }
    }

    #[test]
    fn a_loss_of_another_machine_that_is_no_number_is_none() {
        for loss in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let header = UpdateHeader {
                loss,
                ..info(None).header(1, &schema())
            };
            assert_eq!(UpdateInfo::from(header).loss, None);
        }
    }
}
