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

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::cover::MAX_TRAINERS;
use super::info::UpdateInfo;
use super::schema::{DType, MAX_TENSORS, Schema, SchemaError, TensorSpec, TensorsMut};
use crate::arena::copy_once;
use crate::id::Generation;

/// The data's alignment within the image, and so in memory: slots are page-aligned.
pub const DATA_ALIGN: usize = 64;

/// Room for `__metadata__` in an image of ours: a [cover](super::Cover) of all trainers that a job may have, four of them a digit, and
/// the rest, of which the longest has 1105 bytes: 128 of a maker that JSON makes six of each, 24 digits of loss, the largest
/// numbers, and the keys. The cover's key takes 11.
const METADATA_ROOM: usize = 1152 + MAX_TRAINERS as usize / 4;

/// Levels that a job may have, the trainers' among them.
const MOST_LEVELS: usize = 4;

/// What a header has for each tensor.
const DTYPE: &[u8] = b"\"dtype\"";

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
    /// What it says of itself beside.
    pub info: UpdateInfo,
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

/// `__metadata__` as it stands in a header; what is empty is not there.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fields<'a> {
    #[serde(borrow)]
    bytes_copied: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "str::is_empty")]
    cover: Cow<'a, str>,
    #[serde(borrow)]
    folded: Cow<'a, str>,
    #[serde(borrow)]
    format: Cow<'a, str>,
    #[serde(borrow)]
    generation: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "str::is_empty")]
    loss: Cow<'a, str>,
    #[serde(borrow, skip_serializing_if = "str::is_empty")]
    made: Cow<'a, str>,
    #[serde(borrow)]
    maker: Cow<'a, str>,
    #[serde(borrow)]
    round: Cow<'a, str>,
    #[serde(borrow)]
    samples: Cow<'a, str>,
}

/// What a header of ours has in front of its metadata. Behind it come the [tensors](Schema::header).
const BEFORE_FIELDS: &str = r#"{"__metadata__":"#;

/// Where the data begins in images that [`write_header`] makes for this schema.
pub fn data_offset(schema: &Schema) -> usize {
    (8 + schema.header().len() + METADATA_ROOM).next_multiple_of(DATA_ALIGN)
}

/// Where the data lies in images that [`write_header`] makes for this schema.
pub fn data_range(schema: &Schema) -> Range<usize> {
    data_offset(schema)..image_bytes(schema)
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
    assert!(
        image.len() >= image_bytes(schema),
        "slot too small for the schema"
    );
    write(&mut image[..data_offset(schema)], schema, metadata);
}

/// The header that stands in front of the data, [`data_offset`] bytes.
pub fn header(schema: &Schema, metadata: &Metadata) -> Vec<u8> {
    let mut header = vec![0; data_offset(schema)];
    write(&mut header, schema, metadata);
    header
}

fn write(header: &mut [u8], schema: &Schema, metadata: &Metadata) {
    let fields = serde_json::to_string(&Fields::of(metadata)).expect("strings are JSON");
    let (length, mut room) = header.split_at_mut(8);
    length.copy_from_slice(&(room.len() as u64).to_le_bytes());
    for part in [BEFORE_FIELDS, &fields, schema.header()] {
        let place = room.split_off_mut(..part.len());
        place
            .expect("metadata has its room")
            .copy_from_slice(part.as_bytes());
    }
    room.fill(b' ');
}

impl<'a> Fields<'a> {
    fn of(metadata: &'a Metadata) -> Self {
        let info = &metadata.info;
        let mut kept = metadata.maker.len().min(128);
        while !metadata.maker.is_char_boundary(kept) {
            kept -= 1;
        }
        // Written out, a tiny one has 300 digits: for such the exponent's form, which is as exact and has 24 at most.
        let loss = |loss: f64| {
            Some(loss.to_string())
                .filter(|digits| digits.len() <= 24)
                .unwrap_or_else(|| format!("{loss:e}"))
        };
        let made = info.made.iter().take(MOST_LEVELS);
        Self {
            bytes_copied: info.bytes_copied.to_string().into(),
            cover: info.cover.to_string().into(),
            folded: info.folded.to_string().into(),
            format: "lifl".into(),
            generation: metadata.generation.0.to_string().into(),
            loss: info.loss.map_or(Cow::default(), |value| loss(value).into()),
            made: made.map(u64::to_string).collect::<Vec<_>>().join(" ").into(),
            maker: metadata.maker[..kept].into(),
            round: metadata.round.to_string().into(),
            samples: info.samples.to_string().into(),
        }
    }

    /// Of a header that may have other keys beside these.
    fn among(all: &'a HashMap<String, String>) -> Self {
        let text = |name: &str| Cow::from(all.get(name).map_or("", String::as_str));
        Self {
            bytes_copied: text("bytes_copied"),
            cover: text("cover"),
            folded: text("folded"),
            format: text("format"),
            generation: text("generation"),
            loss: text("loss"),
            made: text("made"),
            maker: text("maker"),
            round: text("round"),
            samples: text("samples"),
        }
    }

    fn read(self) -> Result<Metadata, ImageError> {
        fn number<N: FromStr>(text: &str, name: &'static str) -> Result<N, ImageError> {
            text.parse().map_err(|_| ImageError::Metadata(name))
        }
        let loss: Option<f64> = self.loss.parse().ok();
        let made = self.made.split_terminator(' ').take(MOST_LEVELS + 1);
        let made = made
            .map(|time| number(time, "made"))
            .collect::<Result<Vec<_>, _>>()?;
        if made.len() > MOST_LEVELS {
            return Err(ImageError::Metadata("made"));
        }
        Ok(Metadata {
            round: number(&self.round, "round")?,
            generation: Generation(number(&self.generation, "generation")?),
            info: UpdateInfo {
                samples: number(&self.samples, "samples")?,
                cover: number(&self.cover, "cover")?,
                loss: loss.filter(|loss| loss.is_finite()),
                folded: number(&self.folded, "folded")?,
                bytes_copied: number(&self.bytes_copied, "bytes_copied")?,
                made,
            },
            maker: self.maker.into_owned(),
        })
    }
}

/// Checks that `image` holds exactly the schema's tensors, laid out as the schema lays them out, and gives its
/// metadata and where its data lies.
///
/// The image may lie in memory that another process writes: what is read of the header is a copy, and nothing read later
/// depends on a value that is still out there.
///
/// # Errors
/// If it is not a safetensors image of this schema.
pub fn check(image: &[u8], schema: &Schema) -> Result<(Metadata, Range<usize>), ImageError> {
    let (text, offset) = copy_header(image)?;
    let found = image.len() - offset;
    let expected = schema.data_bytes();
    // A header of ours is known by its bytes: only what it says of itself is read.
    let ours = text
        .strip_prefix(BEFORE_FIELDS.as_bytes())
        .and_then(|text| text.strip_suffix(schema.header().as_bytes()))
        .and_then(|fields| serde_json::from_slice::<Fields<'_>>(fields).ok());
    if let Some(fields) = ours
        && found == expected
    {
        return Ok((fields.read()?, offset..image.len()));
    }
    let header = parse(&text)?;
    check_tensors(&header, schema)?;
    if found != expected {
        return Err(ImageError::DataLength { found, expected });
    }
    let fields = header.metadata().as_ref().map(Fields::among).unwrap_or_default();
    Ok((fields.read()?, offset..image.len()))
}

/// The schema of an image of ours, for who has not been told the job's. Whoever reads data by it has the image
/// [checked](check) against it too.
///
/// # Errors
/// If it is not a safetensors image, or none that a job could have.
pub fn schema(image: &[u8]) -> Result<Schema, ImageError> {
    let (text, _) = copy_header(image)?;
    let header = parse(&text)?;
    let tensors = header.tensors().into_iter().map(|(name, info)| {
        let dtype = DType::from_safetensors(info.dtype);
        let dtype = dtype.ok_or_else(|| ImageError::ElementType(name.clone()))?;
        Ok(TensorSpec::new(name, dtype, info.shape.clone()))
    });
    Ok(Schema::new(tensors.collect::<Result<_, ImageError>>()?)?)
}

/// Copies the header's JSON out, without the spaces behind it; gives it with where the data begins. Each byte is read
/// once.
fn copy_header(image: &[u8]) -> Result<(Vec<u8>, usize), ImageError> {
    let have = image.len();
    let length = image.get(..8).ok_or(ImageError::HeaderCut { have, need: 8 })?;
    let mut bytes = [0; 8];
    copy_once(length, &mut bytes);
    let length = u64::from_le_bytes(bytes);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(ImageError::HeaderTooLarge(length));
    }
    let offset = 8 + length as usize;
    let need = offset as u64;
    let header = image.get(8..offset).ok_or(ImageError::HeaderCut { have, need })?;
    if !offset.is_multiple_of(DATA_ALIGN) {
        return Err(ImageError::Misaligned(offset));
    }
    // As a rule most of it is room, which is not kept.
    let (first, mut lines) = header.as_rchunks::<DATA_ALIGN>();
    let mut last = [b' '; DATA_ALIGN];
    while let [before @ .., line] = lines
        && last == [b' '; DATA_ALIGN]
    {
        copy_once(line, &mut last);
        lines = before;
    }
    let before = first.len() + lines.as_flattened().len();
    let mut text = vec![0; before + DATA_ALIGN];
    let (text_before, text_last) = text.split_at_mut(before);
    copy_once(&header[..before], text_before);
    text_last.copy_from_slice(&last);
    let spaces = text.iter().rev().take_while(|byte| **byte == b' ').count();
    text.truncate(text.len() - spaces);
    Ok((text, offset))
}

fn parse(header: &[u8]) -> Result<safetensors::tensor::Metadata, ImageError> {
    // Before they are all made: each takes many times its bytes in the header.
    let tensors = header
        .windows(DTYPE.len())
        .filter(|window| *window == DTYPE)
        .count();
    if tensors > MAX_TENSORS {
        return Err(SchemaError::TooMany(tensors).into());
    }
    serde_json::from_slice(header).map_err(ImageError::HeaderSyntax)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::update::{Cover, DType, TensorSpec};

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
            info: UpdateInfo {
                samples: 600,
                cover: Cover::of(70),
                loss: Some(0.25),
                folded: 4,
                bytes_copied: 0,
                made: vec![7, 9],
            },
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
        let (read, data) = check(&image, &schema).expect("our own image");
        let offset = data.start;
        assert_eq!((read, data), (metadata(), data_range(&schema)));
        assert_eq!(offset % DATA_ALIGN, 0);
        let theirs = safetensors::SafeTensors::deserialize(&image).expect("safetensors reads it");
        assert_eq!(theirs.tensor("dense.weight").expect("there").shape(), [3, 2]);
    }

    #[test]
    fn a_header_in_another_order_and_with_more_in_it_says_the_same() {
        let schema = schema();
        let image = image(&schema);
        let (json, offset) = copy_header(&image).expect("a header");
        let mut header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&json).expect("JSON");
        header["__metadata__"]["colour"] = "blue".into();
        let header = header.into_iter().rev();
        let header: Vec<String> = header.map(|(key, value)| format!("{key:?} : {value}")).collect();
        let header = format!("{{ {} }}\t", header.join(" , "));
        let mut other = image.clone();
        other[8..offset].fill(b' ');
        other[8..][..header.len()].copy_from_slice(header.as_bytes());
        assert_eq!(
            check(&other, &schema).expect("an image"),
            (metadata(), data_range(&schema))
        );
        // What is not JSON stays so, whatever stands around it.
        for (at, byte) in [(8, b'['), (offset - 1, b'}'), (offset - 1, 0xc)] {
            let mut spoilt = image.clone();
            spoilt[at] = byte;
            assert!(
                matches!(check(&spoilt, &schema), Err(ImageError::HeaderSyntax(_))),
                "{byte} at {at}"
            );
        }
    }

    #[test]
    fn headers_of_all_lengths_are_copied_without_their_room() {
        for lines in 1..5 {
            let room = lines * DATA_ALIGN - 8;
            for text in 0..=room {
                let mut image = vec![b' '; 8 + room];
                image[..8].copy_from_slice(&(room as u64).to_le_bytes());
                image[8..][..text].fill(b'x');
                let copied = copy_header(&image).expect("a header");
                assert_eq!(copied, (vec![b'x'; text], 8 + room), "{text} of {room}");
            }
        }
    }

    #[test]
    fn the_longest_metadata_has_room() {
        let schema = schema();
        let mut everybody = Cover::default();
        (0..MAX_TRAINERS as usize / 64).for_each(|word| everybody.set_word(word, u64::MAX));
        let longest = UpdateInfo {
            cover: everybody,
            samples: u64::MAX,
            loss: None,
            folded: u64::MAX,
            bytes_copied: u64::MAX,
            made: vec![u64::MAX; MOST_LEVELS],
        };
        for loss in [-f64::MIN_POSITIVE, -5e-324, f64::MAX, -1.0 / 3.0, 1e300] {
            let info = UpdateInfo {
                loss: Some(loss),
                ..longest.clone()
            };
            let metadata = info.metadata(&"\u{1}".repeat(200), u32::MAX, Generation(u64::MAX));
            let mut image = vec![0; image_bytes(&schema)];
            write_header(&mut image, &schema, &metadata);
            let (read, _) = check(&image, &schema).expect("our own image");
            assert_eq!((read.info.loss, read.maker.len()), (Some(loss), 128));
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
