//! A safetensors image in a slot: header, then the tensors' data, aligned to 64 bytes.
//!
//! ```text
//! 0          8                                  data (multiple of 64)        length
//! ├ u64 n ───┼ n bytes of JSON, space-padded ───┼ tensors, schema order ─────┤
//! ```
//!
//! The format is safetensors' (README of huggingface/safetensors, "Format"). A slot that is written out is a
//! checkpoint as it stands. What the maker knows of the object travels in `__metadata__` ([`Metadata`]), whose room
//! is the same for every image of a schema, so that it can be written after the data.

use std::collections::BTreeMap;

use super::cover::{Cover, MAX_TRAINERS};
use super::schema::{DType, Schema, TensorSpec, TensorsMut};
use crate::id::Generation;

/// The data's alignment within the image, and so in memory: slots are page-aligned.
pub const DATA_ALIGN: usize = 64;

/// Room for `__metadata__` in an image of ours: a [`Cover`] of all trainers that a job may have, four of them a digit, and
/// the rest, of which the longest has 1105 bytes: 128 of a maker that JSON makes six of each, 24 digits of loss, the largest
/// numbers, and the keys. The cover's key takes 11.
const METADATA_ROOM: usize = 1152 + MAX_TRAINERS as usize / 4;

/// Levels that a job may have, the trainers' among them.
const MOST_LEVELS: usize = 4;

/// The largest header that is read from another worker's image.
const MAX_HEADER_BYTES: usize = 16 << 20;

/// What an image says of itself in `__metadata__`; there every value is a string.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    /// Who wrote it, at most 128 bytes of it are kept.
    pub maker: String,
    /// The round it was made in; for a model the round that it is the result of, 0 for the first.
    pub round: u32,
    /// The slot's generation.
    pub generation: Generation,
    /// Training samples behind it.
    pub samples: u64,
    /// Trainers whose updates it contains.
    pub cover: Cover,
    /// Sample-weighted mean training loss, when there is one.
    pub loss: Option<f64>,
    /// Updates that have been folded in its making, on all levels below and in itself.
    pub folded: u64,
    /// Bytes of lent objects that were copied in its making, on all levels below and in itself.
    pub bytes_copied: u64,
    /// When the last object of each level that is in it was made, from the trainers' up to this one's own: nanoseconds of the
    /// node's `CLOCK_MONOTONIC`. Empty if some of that was made elsewhere.
    pub made: Vec<u64>,
}

/// Why bytes are not an image of the job's schema.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The object is shorter than a header, or its header than it says.
    #[error("the image ends within its header: {have} bytes, {need} needed")]
    HeaderCut {
        /// Bytes there.
        have: usize,
        /// Bytes needed.
        need: u64,
    },
    /// A header that nobody needs.
    #[error("the header is {0} bytes, more than {MAX_HEADER_BYTES}")]
    HeaderTooLarge(u64),
    /// Not safetensors' JSON.
    #[error("the header is not safetensors' JSON")]
    HeaderSyntax(#[source] serde_json::Error),
    /// Data that vector code cannot read in place.
    #[error("the data begins at byte {0}, which is not a multiple of {DATA_ALIGN}")]
    Misaligned(usize),
    /// Tensors other than the job's.
    #[error("tensor {name:?}: {found}, but the job has {expected}")]
    OtherTensor {
        /// The first tensor that differs.
        name: String,
        /// What the image has.
        found: String,
        /// What the job's schema has.
        expected: String,
    },
    /// Too few or too many bytes behind the header.
    #[error("{found} bytes of data, the job's tensors have {expected}")]
    DataLength {
        /// Bytes there.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// Not a safetensors file.
    #[error("not a safetensors file")]
    Format(#[from] safetensors::SafeTensorError),
    /// Tensors that no job can have.
    #[error("the tensors are no model's")]
    Schema(#[from] super::schema::SchemaError),
    /// An element type that is not known here.
    #[error("tensor {0:?} has an element type that is not supported")]
    ElementType(String),
    /// `__metadata__` without what LIFL needs.
    #[error("__metadata__.{0} is missing or not what it should be")]
    Metadata(&'static str),
}

/// Where the data begins in images that [`write_header`] makes for this schema.
pub fn data_offset(schema: &Schema) -> usize {
    (8 + tensors_json(schema).len() + METADATA_ROOM).next_multiple_of(DATA_ALIGN)
}

/// Bytes of an image of this schema, and so of a slot for it.
pub fn image_bytes(schema: &Schema) -> usize {
    data_offset(schema) + schema.data_bytes()
}

/// Writes the header in front of the data.
///
/// # Panics
/// If `image` is shorter than [`image_bytes`].
pub fn write_header(image: &mut [u8], schema: &Schema, metadata: &Metadata) {
    let header = header(schema, metadata);
    assert!(
        image.len() >= header.len() + schema.data_bytes(),
        "slot too small for the schema"
    );
    image[..header.len()].copy_from_slice(&header);
}

/// The header that stands in front of the data, [`data_offset`] bytes.
pub fn header(schema: &Schema, metadata: &Metadata) -> Vec<u8> {
    let tensors = tensors_json(schema);
    let offset = (8 + tensors.len() + METADATA_ROOM).next_multiple_of(DATA_ALIGN);
    let mut maker = metadata.maker.clone();
    while maker.len() > 128 {
        maker.pop();
    }
    let mut fields = BTreeMap::from([
        ("format", "lifl".to_owned()),
        ("maker", maker),
        ("round", metadata.round.to_string()),
        ("generation", metadata.generation.0.to_string()),
        ("samples", metadata.samples.to_string()),
        ("folded", metadata.folded.to_string()),
        ("bytes_copied", metadata.bytes_copied.to_string()),
    ]);
    if !metadata.cover.is_empty() {
        fields.insert("cover", metadata.cover.to_string());
    }
    if !metadata.made.is_empty() {
        let times = metadata.made.iter().take(MOST_LEVELS);
        fields.insert("made", times.map(u64::to_string).collect::<Vec<_>>().join(" "));
    }
    if let Some(loss) = metadata.loss {
        // Written out, a tiny one has 300 digits: for such the exponent's form, which is as exact and has 24 at most.
        let digits = loss.to_string();
        let short = digits.len() <= 24;
        fields.insert("loss", if short { digits } else { format!("{loss:e}") });
    }
    let fields = serde_json::to_string(&fields).expect("strings are JSON");
    let mut header = vec![b' '; offset];
    header[..8].copy_from_slice(&((offset - 8) as u64).to_le_bytes());
    // `tensors` is a JSON object: its opening brace gives way to the metadata.
    let json = [r#"{"__metadata__":"#, &fields, ",", &tensors[1..]].concat();
    header[8..8 + json.len()].copy_from_slice(json.as_bytes());
    header
}

/// Checks that `image` holds exactly the schema's tensors, laid out as the schema lays them out, and gives its
/// metadata and where its data begins.
///
/// The image may lie in memory that another process writes: the header is copied out before it is looked at, and
/// nothing read later depends on a value that is still out there.
///
/// # Errors
/// If it is not a safetensors image of this schema.
pub fn check(image: &[u8], schema: &Schema) -> Result<(Metadata, usize), ImageError> {
    let (header, offset) = read_header(image)?;
    check_tensors(&header, schema)?;
    let found = image.len() - offset;
    if found != schema.data_bytes() {
        return Err(ImageError::DataLength {
            found,
            expected: schema.data_bytes(),
        });
    }
    let fields = header.metadata().as_ref();
    let text = |name: &'static str| fields.and_then(|fields| fields.get(name));
    let number = |name: &'static str| -> Result<u64, ImageError> {
        text(name)
            .and_then(|n| n.parse().ok())
            .ok_or(ImageError::Metadata(name))
    };
    let metadata = Metadata {
        maker: text("maker").cloned().unwrap_or_default(),
        round: u32::try_from(number("round")?).map_err(|_| ImageError::Metadata("round"))?,
        generation: Generation(number("generation")?),
        samples: number("samples")?,
        cover: match text("cover") {
            None => Cover::default(),
            Some(cover) => cover.parse().map_err(|_| ImageError::Metadata("cover"))?,
        },
        loss: text("loss")
            .and_then(|loss| loss.parse().ok())
            .filter(|loss: &f64| loss.is_finite()),
        folded: number("folded")?,
        bytes_copied: number("bytes_copied")?,
        made: text("made").map_or(Ok(Vec::new()), |times| made(times))?,
    };
    Ok((metadata, offset))
}

fn made(times: &str) -> Result<Vec<u64>, ImageError> {
    let times: Result<Vec<u64>, _> = times.split(' ').take(MOST_LEVELS + 1).map(str::parse).collect();
    let times = times.map_err(|_| ImageError::Metadata("made"))?;
    if times.len() > MOST_LEVELS {
        return Err(ImageError::Metadata("made"));
    }
    Ok(times)
}

/// The schema of an image of ours, for who has not been told the job's. Whoever reads data by it has the image
/// [checked](check) against it too.
///
/// # Errors
/// If it is not a safetensors image, or none that a job could have.
pub fn schema(image: &[u8]) -> Result<Schema, ImageError> {
    let (header, _) = read_header(image)?;
    let tensors = header.tensors().into_iter().map(|(name, info)| {
        let dtype = DType::from_safetensors(info.dtype);
        let dtype = dtype.ok_or_else(|| ImageError::ElementType(name.clone()))?;
        Ok(TensorSpec::new(name, dtype, info.shape.clone()))
    });
    Ok(Schema::new(tensors.collect::<Result<_, ImageError>>()?)?)
}

/// Copies the header out and reads it; gives it with where the data begins.
fn read_header(image: &[u8]) -> Result<(safetensors::tensor::Metadata, usize), ImageError> {
    let have = image.len();
    let length = image
        .first_chunk::<8>()
        .ok_or(ImageError::HeaderCut { have, need: 8 })?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(ImageError::HeaderTooLarge(length));
    }
    let offset = 8 + length as usize;
    let header = image
        .get(8..offset)
        .ok_or(ImageError::HeaderCut {
            have,
            need: offset as u64,
        })?
        .to_vec();
    if !offset.is_multiple_of(DATA_ALIGN) {
        return Err(ImageError::Misaligned(offset));
    }
    let header: safetensors::tensor::Metadata =
        serde_json::from_slice(&header).map_err(ImageError::HeaderSyntax)?;
    Ok((header, offset))
}

/// Copies the tensors of any safetensors file into a model: in whatever order they lie there, with or without our
/// metadata.
///
/// # Errors
/// If it is no such file, or has not just the schema's tensors.
pub fn import(file: &[u8], mut model: TensorsMut<'_>) -> Result<(), ImageError> {
    let theirs = safetensors::SafeTensors::deserialize(file)?;
    let schema = model.schema().clone();
    for (tensor, range) in schema.iter() {
        let differs = |found: String| ImageError::OtherTensor {
            name: tensor.name.clone(),
            found,
            expected: format!("{} {:?}", tensor.dtype, tensor.shape),
        };
        let view = theirs
            .tensor(&tensor.name)
            .map_err(|_| differs("missing".to_owned()))?;
        if view.dtype() != tensor.dtype.to_safetensors() || view.shape() != tensor.shape {
            return Err(differs(format!("{:?} {:?}", view.dtype(), view.shape())));
        }
        model.data()[range].copy_from_slice(view.data());
    }
    match theirs.names().into_iter().find(|name| schema.get(name).is_none()) {
        Some(name) => {
            let name = name.to_owned();
            Err(ImageError::OtherTensor {
                name,
                found: "present".to_owned(),
                expected: "none".to_owned(),
            })
        }
        None => Ok(()),
    }
}

fn check_tensors(header: &safetensors::tensor::Metadata, schema: &Schema) -> Result<(), ImageError> {
    for (tensor, range) in schema.iter() {
        let expected = || format!("{} {:?} at byte {}", tensor.dtype, tensor.shape, range.start);
        let differs = |found| ImageError::OtherTensor {
            name: tensor.name.clone(),
            found,
            expected: expected(),
        };
        let info = header
            .info(&tensor.name)
            .ok_or_else(|| differs("missing".to_owned()))?;
        let same = info.dtype == tensor.dtype.to_safetensors()
            && info.shape == tensor.shape
            && info.data_offsets == (range.start, range.end);
        if !same {
            return Err(differs(format!(
                "{:?} {:?} at byte {}",
                info.dtype, info.shape, info.data_offsets.0
            )));
        }
    }
    let names = header.offset_keys();
    if let Some(name) = names.into_iter().find(|name| schema.get(name).is_none()) {
        return Err(ImageError::OtherTensor {
            name,
            found: "present".to_owned(),
            expected: "none".to_owned(),
        });
    }
    Ok(())
}

/// The tensors' part of the header as a JSON object.
fn tensors_json(schema: &Schema) -> String {
    let mut json = String::from("{");
    for (tensor, range) in schema.iter() {
        if json.len() > 1 {
            json.push(',');
        }
        let info = safetensors::tensor::TensorInfo {
            dtype: tensor.dtype.to_safetensors(),
            shape: tensor.shape.clone(),
            data_offsets: (range.start, range.end),
        };
        json.push_str(&serde_json::to_string(&tensor.name).expect("a string is JSON"));
        json.push(':');
        json.push_str(&serde_json::to_string(&info).expect("a tensor's place is JSON"));
    }
    json.push('}');
    json
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::update::{DType, TensorSpec};

    fn schema() -> Schema {
        Schema::new(vec![
            TensorSpec::new("dense.weight", DType::F32, [3, 2]),
            TensorSpec::new("steps", DType::I64, []),
        ])
        .expect("a schema")
    }

    fn metadata() -> Metadata {
        Metadata {
            maker: "leaf-aggregator-1".into(),
            round: 3,
            generation: Generation(9),
            samples: 600,
            cover: Cover::of(70),
            loss: Some(0.25),
            folded: 4,
            bytes_copied: 0,
            made: vec![7, 9],
        }
    }

    fn image(schema: &Schema) -> Vec<u8> {
        let mut image = vec![0; image_bytes(schema)];
        write_header(&mut image, schema, &metadata());
        image
    }

    #[test]
    fn an_image_is_read_back_by_us_and_by_safetensors() {
        let schema = schema();
        let image = image(&schema);
        let (read, offset) = check(&image, &schema).expect("our own image");
        assert_eq!((read, offset), (metadata(), data_offset(&schema)));
        assert_eq!(offset % DATA_ALIGN, 0);
        let theirs = safetensors::SafeTensors::deserialize(&image).expect("safetensors reads it");
        assert_eq!(theirs.tensor("dense.weight").expect("there").shape(), [3, 2]);
    }

    #[test]
    fn the_longest_metadata_has_room() {
        let schema = schema();
        let mut everybody = Cover::default();
        (0..MAX_TRAINERS as usize / 64).for_each(|word| everybody.set_word(word, u64::MAX));
        let longest = Metadata {
            cover: everybody,
            maker: "\u{1}".repeat(200),
            round: u32::MAX,
            generation: Generation(u64::MAX),
            samples: u64::MAX,
            loss: Some(-f64::MIN_POSITIVE),
            folded: u64::MAX,
            bytes_copied: u64::MAX,
            made: vec![u64::MAX; MOST_LEVELS],
        };
        for loss in [-f64::MIN_POSITIVE, -5e-324, f64::MAX, -1.0 / 3.0, 1e300] {
            let metadata = Metadata {
                loss: Some(loss),
                ..longest.clone()
            };
            let mut image = vec![0; image_bytes(&schema)];
            write_header(&mut image, &schema, &metadata);
            let (read, _) = check(&image, &schema).expect("our own image");
            assert_eq!((read.loss, read.maker.len()), (Some(loss), 128));
        }
    }

    #[test]
    fn another_shape_is_named() {
        let other = Schema::new(vec![
            TensorSpec::new("dense.weight", DType::F32, [2, 3]),
            TensorSpec::new("steps", DType::I64, []),
        ]);
        let error = check(&image(&schema()), &other.expect("a schema")).expect_err("shapes differ");
        assert!(error.to_string().contains("dense.weight"), "{error}");
    }

    #[test]
    fn a_tensor_too_many_is_named() {
        let fewer = Schema::new(vec![TensorSpec::new("steps", DType::I64, [])]).expect("a schema");
        let error = check(&image(&schema()), &fewer).expect_err("one tensor more");
        assert!(error.to_string().contains("dense.weight"), "{error}");
    }

    #[test]
    fn a_cut_image_is_refused() {
        let schema = schema();
        let image = image(&schema);
        for length in [0, 7, 8, 100, image.len() - 1] {
            assert!(check(&image[..length], &schema).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn changed_bytes_never_panic(at in 0_usize..1200, byte in any::<u8>(), cut in 0_usize..1400) {
            let schema = schema();
            let mut image = image(&schema);
            let at = at % image.len();
            image[at] = byte;
            let end = cut.min(image.len());
            let _ = check(&image[..end], &schema);
            let _ = check(&image, &schema);
        }
    }
}
