//! Arrays of numbers, as NumPy and IDX files hold them, to images and labels.
//!
//! Data sets come in many clothes: labels of any width of integer, or as whole floats, or one of a row set to 1; images with
//! their channels first, last or not at all, as bytes or as floats. What is meant is told by shape and range; what cannot be
//! told is refused by name. An array's header is a stranger's word: memory grows as bytes arrive, never by what it says.

use std::io::Read;
use std::path::Path;

use half::f16;
use lifl_common::config::SampleShape;

use super::error::DataError;
use super::idx::{MOST_SAMPLES, bytes};
use super::samples::{PIXELS, Samples};

/// Numbers in all images of one file: a million images of MNIST's size, 0.8 GB.
pub(super) const MOST_PIXELS: usize = MOST_SAMPLES * PIXELS;

/// Pixels down or across the largest image.
const MOST_SIDE: usize = 4096;

/// Classes that a byte can tell apart.
const MOST_CLASSES: usize = 256;

/// Elements that are read at a time.
const PIECE: usize = 8192;

/// QMNIST's labels have so many columns, of which the first is the digit (Yadav and Bottou 2019, "Cold Case: the Lost MNIST
/// Digits").
const QMNIST_COLUMNS: usize = 8;

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    Bool,
    Signed(u8),
    Unsigned(u8),
    Float(u8),
}

impl Element {
    /// Bytes of one element.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Bool => 1,
            Self::Signed(bytes) | Self::Unsigned(bytes) | Self::Float(bytes) => bytes.into(),
        }
    }
}

/// What a header says of an array.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) shape: Vec<usize>,
    pub(super) element: Element,
    pub(super) big_endian: bool,
    /// The first index changes fastest, and not the last.
    pub(super) fortran: bool,
}

impl Header {
    /// How many elements there are; `None` if that overflows.
    pub(super) fn elements(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(1_usize, |n, &side| n.checked_mul(side))
    }

    /// One element's number. Whole numbers of 64 bits may lose their last digits, and are out of every range that is asked for.
    fn number(&self, bytes: &[u8]) -> f64 {
        let mut wide = [0; 8];
        for (to, from) in wide.iter_mut().zip(bytes) {
            *to = *from;
        }
        if self.big_endian {
            wide[..bytes.len().min(8)].reverse();
        }
        let unsigned = u64::from_le_bytes(wide);
        match (self.element, bytes.len()) {
            (Element::Bool, _) => f64::from(u8::from(unsigned != 0)),
            (Element::Unsigned(_), _) => unsigned as f64,
            (Element::Signed(_), length) => {
                let unused = 64 - 8 * length.min(8) as u32;
                ((unsigned << unused) as i64 >> unused) as f64
            }
            (Element::Float(_), 2) => f16::from_bits(unsigned as u16).into(),
            (Element::Float(_), 4) => f32::from_bits(unsigned as u32).into(),
            (Element::Float(_), _) => f64::from_bits(unsigned),
        }
    }
}

/// An array that can be read as often as it must be.
pub(super) trait Array {
    /// Where it is, for a message: its file, and for an archive the entry in it.
    fn path(&self) -> &Path;

    fn header(&self) -> &Header;

    /// Its elements from the first on.
    ///
    /// # Errors
    /// If it cannot be read.
    fn open(&mut self) -> Result<Box<dyn Read + '_>, DataError>;
}

/// Hands over every element in the order of the file.
///
/// # Errors
/// If there are more or fewer than the header says, or what `each` finds.
fn for_each(
    array: &mut dyn Array,
    mut each: impl FnMut(usize, f64) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let (path, header) = (array.path().to_owned(), array.header().clone());
    let (size, count) = (header.element.bytes(), count(&path, &header)?);
    let mut reader = array.open()?;
    let mut at = 0;
    while at < count {
        let wanted = PIECE.min(count - at) * size;
        let piece = bytes(&path, &mut reader, wanted)?;
        if piece.len() < wanted {
            return Err(short(&path, &header, at * size + piece.len()));
        }
        for element in piece.chunks_exact(size) {
            each(at, header.number(element))?;
            at += 1;
        }
    }
    ends(&path, &mut reader, &header)
}

fn short(path: &Path, header: &Header, found: usize) -> DataError {
    let promised = header
        .elements()
        .unwrap_or(usize::MAX)
        .saturating_mul(header.element.bytes());
    let found = format!("{found} bytes of data: the file is cut off or its header is wrong");
    DataError::format(
        path,
        found,
        format!("{promised} for its shape {:?}", header.shape),
    )
}

/// Makes sure that nothing is left.
fn ends(path: &Path, reader: &mut dyn Read, header: &Header) -> Result<(), DataError> {
    if bytes(path, reader, 1)?.is_empty() {
        return Ok(());
    }
    let expected = format!(
        "{} for its shape {:?}",
        header.elements().unwrap_or(0),
        header.shape
    );
    Err(DataError::format(
        path,
        "more bytes than its header promises",
        expected,
    ))
}

/// The header's number of elements, if memory may have so many.
fn count(path: &Path, header: &Header) -> Result<usize, DataError> {
    let count = header.elements().filter(|&count| count <= MOST_PIXELS);
    count.ok_or_else(|| {
        let found = format!("an array of shape {:?}", header.shape);
        DataError::format(
            path,
            found,
            format!("at most {MOST_SAMPLES} samples and {MOST_PIXELS} numbers"),
        )
    })
}

/// Shapes that arrays of images have.
const IMAGE_SHAPES: &str = "images of shape (n, height, width), (n, height, width, channels) or (n, channels, height, width) with 1, \
                            3 or 4 channels, or squares in a row (n, pixels)";

/// Where the channels of an image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channels {
    Last,
    First,
}

/// How many images an array of that shape has, of what shape, and where their channels are; `None` if it is none of images.
fn images_of(shape: &[usize]) -> Option<(usize, SampleShape, Channels)> {
    let few = |side: usize| matches!(side, 1 | 3 | 4);
    let (n, height, width, channels, place) = match *shape {
        // One channel first rather than images of one row.
        [n, height, width, channels] if few(channels) && height > 1 => {
            (n, height, width, channels, Channels::Last)
        }
        [n, channels, height, width] if few(channels) => (n, height, width, channels, Channels::First),
        [n, height, width] => (n, height, width, 1, Channels::Last),
        [n, pixels] => {
            let side = pixels.isqrt();
            if side < 2 || side * side != pixels {
                return None;
            }
            (n, side, side, 1, Channels::Last)
        }
        _ => return None,
    };
    if height == 0 || width == 0 || height > MOST_SIDE || width > MOST_SIDE {
        return None;
    }
    let image = SampleShape {
        height: height as u32,
        width: width as u32,
        channels: channels as u32,
        ..SampleShape::default()
    };
    Some((n, image, place))
}

/// What numbers of a pixel mean.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scale {
    /// 0 to 255.
    Bytes,
    /// 0 to 1.
    Unit,
    /// -1 to 1.
    Signed,
}

impl Scale {
    /// A pixel's byte.
    fn byte(self, number: f64) -> u8 {
        // `as` rounds towards 0 and stops at 0 and 255.
        (match self {
            Self::Bytes => number,
            Self::Unit => number * 255.0,
            Self::Signed => (number + 1.0) * 127.5,
        } + 0.5) as u8
    }
}

/// The least and the greatest number of an array.
#[derive(Clone, Copy, Debug)]
struct Range {
    least: f64,
    greatest: f64,
}

/// Only floats can mean something else than bytes, so only they are read for it.
fn range(array: &mut dyn Array) -> Result<Option<Range>, DataError> {
    match array.header().element {
        Element::Float(_) => {}
        Element::Bool => {
            return Ok(Some(Range {
                least: 0.0,
                greatest: 1.0,
            }));
        }
        Element::Signed(_) | Element::Unsigned(_) => return Ok(None),
    }
    let path = array.path().to_owned();
    let mut range = Range {
        least: f64::INFINITY,
        greatest: f64::NEG_INFINITY,
    };
    for_each(array, |at, number| {
        if !number.is_finite() {
            return Err(DataError::format(
                &path,
                format!("the number {number} at {at}"),
                "numbers that are finite",
            ));
        }
        range.least = range.least.min(number);
        range.greatest = range.greatest.max(number);
        Ok(())
    })?;
    Ok(Some(range))
}

impl Range {
    /// Of both.
    fn with(self, other: Self) -> Self {
        Self {
            least: self.least.min(other.least),
            greatest: self.greatest.max(other.greatest),
        }
    }

    /// What pixels of that range mean, all those of one data set; `None` if nothing that is known.
    fn scale(self) -> Option<Scale> {
        let Self { least, greatest } = self;
        if least >= 0.0 && greatest <= 1.0 {
            Some(Scale::Unit)
        } else if least >= -1.0 && greatest <= 1.0 {
            Some(Scale::Signed)
        } else if least >= 0.0 && greatest <= 255.0 {
            Some(Scale::Bytes)
        } else {
            None
        }
    }
}

/// The images of an array, as bytes, row after row, channels last.
fn images(array: &mut dyn Array, scale: Scale) -> Result<(SampleShape, Vec<u8>), DataError> {
    let (path, header) = (array.path().to_owned(), array.header().clone());
    let Some((_, image, channels)) = images_of(&header.shape) else {
        let found = format!("an array of shape {:?}", header.shape);
        return Err(DataError::format(&path, found, IMAGE_SHAPES));
    };
    let count = count(&path, &header)?;
    let mut pixels = Vec::new();
    if header.element == Element::Unsigned(1) {
        let mut reader = array.open()?;
        pixels = bytes(&path, &mut reader, count)?;
        if pixels.len() < count {
            return Err(short(&path, &header, pixels.len()));
        }
        ends(&path, &mut reader, &header)?;
    } else {
        let whole = !matches!(header.element, Element::Float(_) | Element::Bool);
        for_each(array, |at, number| {
            if whole && !(0.0..=255.0).contains(&number) {
                return Err(DataError::format(
                    &path,
                    format!("the pixel {number} at {at}"),
                    "0 to 255",
                ));
            }
            pixels.push(scale.byte(number));
            Ok(())
        })?;
    }
    // In which order the indices count, from the one that changes slowest, and which place each has in an image of ours.
    let sides = &header.shape;
    let fastest_last = |place: Channels| match (sides.len(), place) {
        (4, Channels::First) => vec![0, 2, 3, 1],
        (n, _) => (0..n).collect(),
    };
    let order = fastest_last(channels);
    let plain = !header.fortran && order.windows(2).all(|pair| pair[0] < pair[1]);
    // A channel of its own moves nothing.
    let moves_nothing = !header.fortran && image.channels == 1;
    Ok((
        image,
        if plain || moves_nothing {
            pixels
        } else {
            rearranged(&pixels, sides, header.fortran, &order)
        },
    ))
}

/// The numbers of an array with its indices in that order, the last changing fastest.
fn rearranged(numbers: &[u8], sides: &[usize], fortran: bool, order: &[usize]) -> Vec<u8> {
    let mut strides = vec![1; sides.len()];
    if fortran {
        for i in 1..sides.len() {
            strides[i] = strides[i - 1] * sides[i - 1];
        }
    } else {
        for i in (1..sides.len()).rev() {
            strides[i - 1] = strides[i] * sides[i];
        }
    }
    let mut out = Vec::with_capacity(numbers.len());
    let mut index = vec![0; order.len()];
    for _ in 0..numbers.len() {
        let at: usize = order
            .iter()
            .zip(&index)
            .map(|(&axis, &i)| strides[axis] * i)
            .sum();
        out.push(numbers[at]);
        for (i, &axis) in index.iter_mut().zip(order).rev() {
            *i += 1;
            if *i < sides[axis] {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// The labels of an array: numbers in a row or a column, or rows of which one number is 1.
fn labels(array: &mut dyn Array) -> Result<Vec<u8>, DataError> {
    let (path, header) = (array.path().to_owned(), array.header().clone());
    let refused = |expected: &str| {
        let found = format!("an array of shape {:?}", header.shape);
        Err(DataError::format(&path, found, expected))
    };
    let columns = match header.shape[..] {
        [_, ref ones @ ..] if ones.iter().all(|&side| side == 1) => 1,
        [_, columns] if columns <= MOST_CLASSES => columns,
        _ => {
            return refused("one label for each image: (n,), (n, 1), or (n, classes) with a 1 for the class");
        }
    };
    if columns == 0 {
        return refused("one label for each image");
    }
    let mut numbers = Vec::new();
    for_each(array, |at, number| {
        if number.fract() != 0.0 || !(0.0..MOST_CLASSES as f64).contains(&number) {
            // Of several columns only the first may be a label.
            if columns == 1 || at % columns == 0 {
                return Err(DataError::format(
                    &path,
                    format!("the label {number} at {}", at / columns),
                    format!("whole numbers from 0 to {}", MOST_CLASSES - 1),
                ));
            }
            numbers.push(u8::MAX);
        } else {
            numbers.push(number as u8);
        }
        Ok(())
    })?;
    if columns == 1 {
        return Ok(numbers);
    }
    let rows = numbers.len() / columns;
    if header.fortran {
        numbers = rearranged(&numbers, &[rows, columns], true, &[0, 1]);
    }
    let class = |row: &[u8]| {
        let mut set = row.iter().enumerate().filter(|(_, value)| **value != 0);
        let (class, one) = set.next()?;
        (*one == 1 && set.next().is_none()).then_some(class as u8)
    };
    let one_hot: Option<Vec<u8>> = numbers.chunks_exact(columns).map(class).collect();
    match one_hot {
        Some(labels) => Ok(labels),
        None if columns == QMNIST_COLUMNS && header.element == Element::Signed(4) => {
            Ok(numbers.chunks_exact(columns).map(|row| row[0]).collect())
        }
        None => refused("one label for each image; with several, pick one and save it as (n,)"),
    }
}

/// The samples of pairs of images and labels, which are of one data set.
///
/// # Errors
/// If an array is not what it should be, or a pair not of the same samples.
pub(super) fn samples<const N: usize>(
    mut pairs: [(&mut dyn Array, &mut dyn Array); N],
) -> Result<[Samples; N], DataError> {
    for (images, _) in &pairs {
        // The shape first: numbers of another array may take long to read.
        let (path, header) = (images.path(), images.header());
        count(path, header)?;
        if images_of(&header.shape).is_none_or(|(n, ..)| n == 0 || n > MOST_SAMPLES) {
            let found = format!("an array of shape {:?}", header.shape);
            let expected = format!("1 to {MOST_SAMPLES} images: {IMAGE_SHAPES}");
            return Err(DataError::format(path, found, expected));
        }
    }
    let mut all: Option<Range> = None;
    for (images, _) in &mut pairs {
        let next = range(&mut **images)?;
        all = match (all, next) {
            (Some(all), Some(next)) => Some(all.with(next)),
            (all, next) => all.or(next),
        };
    }
    let scale = match all {
        None => Scale::Bytes,
        Some(range) => range.scale().ok_or_else(|| {
            let path = pairs.first().map_or(Path::new(""), |(images, _)| images.path());
            DataError::format(
                path,
                format!("pixels from {} to {}", range.least, range.greatest),
                "0 to 255, 0 to 1 or -1 to 1: save the images before they are standardised",
            )
        })?,
    };
    let mut read = Vec::new();
    let mut first: Option<(SampleShape, std::path::PathBuf)> = None;
    for (image_array, label_array) in &mut pairs {
        let (image, pixels) = images(&mut **image_array, scale)?;
        let values = labels(&mut **label_array)?;
        let n = pixels.len() / image.pixels();
        if values.len() != n {
            let expected = format!("{n}, one for each image");
            return Err(DataError::format(
                label_array.path(),
                format!("{} labels", values.len()),
                expected,
            ));
        }
        let (shape, of) = first.get_or_insert_with(|| (image, image_array.path().to_owned()));
        if !shape.same_image(&image) {
            let expected = format!("{shape}, as those of {} are", of.display());
            return Err(DataError::format(
                image_array.path(),
                format!("images of {image} pixels"),
                expected,
            ));
        }
        read.push(Samples::new(image, pixels, values));
    }
    Ok(read
        .try_into()
        .unwrap_or_else(|_| unreachable!("as many as there are pairs")))
}
