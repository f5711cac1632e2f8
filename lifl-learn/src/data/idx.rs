//! IDX files (LeCun's MNIST page): a big-endian header of magic and dimensions, then numbers. Plain or gzipped.
//!
//! A header is a stranger's word: memory grows as bytes arrive, never by what the header says.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::GzDecoder;

use super::array::{self, Array, Element, Header};
use super::error::DataError;
use super::samples::Samples;
use lifl_common::file_kind::{self, Unopened};

/// More samples than this in one file are taken for a broken header.
pub(super) const MOST_SAMPLES: usize = 1_000_000;

/// Dimensions that images and labels have at most.
const MOST_DIMENSIONS: u8 = 4;

/// Reads an images file and its labels file.
///
/// # Errors
/// If either cannot be read, is not what it should be, or they are not of the same samples.
pub(super) fn read_pair(images: &Path, labels: &Path) -> Result<Samples, DataError> {
    let [samples] = read_pairs([(images, labels)])?;
    Ok(samples)
}

/// Reads pairs of images files and labels files of one data set.
///
/// # Errors
/// As [`read_pair`], or if the images are not of one shape.
pub(super) fn read_pairs<const N: usize>(pairs: [(&Path, &Path); N]) -> Result<[Samples; N], DataError> {
    let mut files = Vec::new();
    for (images, labels) in pairs {
        files.push((IdxFile::images(images)?, IdxFile::open(labels)?));
    }
    let mut files = files.iter_mut();
    array::samples(pairs.map(|_| {
        let (images, labels) = files
            .next()
            .unwrap_or_else(|| unreachable!("as many as there are pairs"));
        (images as &mut dyn Array, labels as &mut dyn Array)
    }))
}

/// An IDX file whose header has been read.
struct IdxFile {
    path: PathBuf,
    header: Header,
}

impl IdxFile {
    /// Reads the header.
    fn open(path: &Path) -> Result<Self, DataError> {
        let header = header(path, &mut open(path)?)?;
        Ok(Self {
            path: path.to_owned(),
            header,
        })
    }

    /// The same of a file of images, which are no labels.
    fn images(path: &Path) -> Result<Self, DataError> {
        let file = Self::open(path)?;
        if file.header.shape.len() == 1 {
            let found = format!("an IDX file of labels (its magic is {:#06x}…)", 0x0801);
            return Err(DataError::format(
                path,
                found,
                "the images file that belongs to them",
            ));
        }
        Ok(file)
    }
}

impl Array for IdxFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn header(&self) -> &Header {
        &self.header
    }

    fn open(&mut self) -> Result<Box<dyn Read + '_>, DataError> {
        let mut file = open(&self.path)?;
        self.header = header(&self.path, &mut file)?;
        Ok(file)
    }
}

/// The file's bytes, unpacked when they begin as gzip's do.
///
/// # Errors
/// If it cannot be opened; a pipe is not waited for.
pub(super) fn open(path: &Path) -> Result<Box<dyn Read>, DataError> {
    let (file, _) = open_file(path)?;
    unpacked(BufReader::new(file)).map_err(DataError::io(path, "read it"))
}

/// Opens a file for reading, if it is one.
pub(super) fn open_file(path: &Path) -> Result<(File, std::fs::Metadata), DataError> {
    file_kind::open_file(path).map_err(|unopened| match unopened {
        Unopened::NoFile(what) => DataError::format(path, what, "a file, or a folder with the usual files"),
        Unopened::Io(error) => DataError::io(path, "open it")(error),
    })
}

/// A reader's bytes, unpacked when they begin as gzip's do.
///
/// # Errors
/// If it cannot be read.
pub(super) fn unpacked(mut reader: impl BufRead + 'static) -> io::Result<Box<dyn Read>> {
    let start = reader.fill_buf()?;
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        Box::new(Members::new(reader))
    } else {
        Box::new(reader)
    })
}

/// The members of a gzip file, one after the other, as gzip itself reads them: what follows the last one, as a rule zeros that
/// fill up a tape's or a disk's block, is passed over.
struct Members<R: BufRead> {
    decoder: Option<GzDecoder<R>>,
    /// Whether a member has ended, so that what follows need not be one.
    one_ended: bool,
}

impl<R: BufRead> Members<R> {
    fn new(reader: R) -> Self {
        Self {
            decoder: Some(GzDecoder::new(reader)),
            one_ended: false,
        }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while let Some(mut decoder) = self.decoder.take() {
            match decoder.read(buffer) {
                Ok(0) => {
                    self.one_ended = true;
                    let mut rest = decoder.into_inner();
                    if rest.fill_buf()?.first() == Some(&0x1f) {
                        self.decoder = Some(GzDecoder::new(rest));
                    }
                }
                Ok(n) => {
                    self.decoder = Some(decoder);
                    return Ok(n);
                }
                Err(_) if self.one_ended && decoder.header().is_none() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }
}

/// Reads the header: two zeros, the type, the number of dimensions, then each dimension as 32 bits.
fn header(path: &Path, file: &mut dyn Read) -> Result<Header, DataError> {
    let start = bytes(path, file, 4)?;
    let ends_early = || DataError::format(path, "a file that ends in its header", "an IDX file");
    let &[0, 0, kind, dimensions] = start.as_slice() else {
        if start.len() < 4 {
            return Err(ends_early());
        }
        let found = format!("a file that begins with the bytes {start:02x?}");
        return Err(DataError::format(
            path,
            found,
            "an IDX file, which begins with [00, 00]",
        ));
    };
    let element = match kind {
        0x08 => Element::Unsigned(1),
        0x09 => Element::Signed(1),
        0x0b => Element::Signed(2),
        0x0c => Element::Signed(4),
        0x0d => Element::Float(4),
        0x0e => Element::Float(8),
        _ => {
            let found = format!("elements of the type {kind:#04x}");
            return Err(DataError::format(
                path,
                found,
                "an IDX type: 0x08, 0x09 or 0x0b to 0x0e",
            ));
        }
    };
    if dimensions == 0 || dimensions > MOST_DIMENSIONS {
        let found = format!("{dimensions} dimensions");
        return Err(DataError::format(path, found, format!("1 to {MOST_DIMENSIONS}")));
    }
    let sides = bytes(path, file, 4 * usize::from(dimensions))?;
    if sides.len() < 4 * usize::from(dimensions) {
        return Err(ends_early());
    }
    let (sides, _) = sides.as_chunks::<4>();
    let shape: Vec<usize> = sides
        .iter()
        .map(|side| u32::from_be_bytes(*side) as usize)
        .collect();
    if shape[0] == 0 || shape[0] > MOST_SAMPLES {
        let found = format!("a header that promises {} samples", shape[0]);
        return Err(DataError::format(path, found, format!("1 to {MOST_SAMPLES}")));
    }
    Ok(Header {
        shape,
        element,
        big_endian: true,
        fortran: false,
    })
}

/// At most so many bytes. A stream that breaks off is the file's fault and said so.
pub(super) fn bytes(path: &Path, file: &mut (impl Read + ?Sized), most: usize) -> Result<Vec<u8>, DataError> {
    let mut data = Vec::new();
    match file.take(most as u64).read_to_end(&mut data) {
        Ok(_) => Ok(data),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            let found = format!(
                "a packed stream that is cut off after {} unpacked bytes",
                data.len()
            );
            Err(DataError::format(
                path,
                found,
                "a whole one: fetch the file again",
            ))
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => {
            let found = format!(
                "a packed stream that is broken after {} unpacked bytes ({e})",
                data.len()
            );
            Err(DataError::format(
                path,
                found,
                "a sound one: fetch the file again",
            ))
        }
        // An archive's entry whose way of packing is found out as it is read.
        Err(e) if e.kind() == io::ErrorKind::Unsupported => {
            let found = format!("a stream that cannot be unpacked here ({e})");
            Err(DataError::format(path, found, "one stored or deflated"))
        }
        Err(e) => Err(DataError::io(path, "read it")(e)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::data::samples::PIXELS;

    const IMAGES_MAGIC: u32 = 0x0803;
    const LABELS_MAGIC: u32 = 0x0801;

    /// An IDX file of that header and body.
    pub(in crate::data) fn file(header: &[u32], body: &[u8]) -> Vec<u8> {
        header
            .iter()
            .flat_map(|word| word.to_be_bytes())
            .chain(body.iter().copied())
            .collect()
    }

    /// Images and labels files of so many samples.
    pub(in crate::data) fn pair_of(n: u32) -> (Vec<u8>, Vec<u8>) {
        let pixels: Vec<u8> = (0..n as usize * PIXELS).map(|i| (i % 251) as u8).collect();
        let labels: Vec<u8> = (0..n).map(|i| (i % 10) as u8).collect();
        (
            file(&[IMAGES_MAGIC, n, 28, 28], &pixels),
            file(&[LABELS_MAGIC, n], &labels),
        )
    }

    /// What gzip makes of it.
    pub(in crate::data) fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder
            .write_all(data)
            .and_then(|()| encoder.finish())
            .expect("memory")
    }

    /// Reads files of those bytes.
    fn read(images: &[u8], labels: &[u8]) -> Result<Samples, DataError> {
        let folder = tempfile::tempdir().expect("a folder");
        let (i, l) = (folder.path().join("images"), folder.path().join("labels"));
        std::fs::write(&i, images).expect("a file");
        std::fs::write(&l, labels).expect("a file");
        read_pair(&i, &l)
    }

    #[test]
    fn reads_plain_and_gzipped_files_alike() {
        let (images, labels) = pair_of(12);
        let plain = read(&images, &labels).expect("samples");
        assert_eq!(plain, read(&gzip(&images), &gzip(&labels)).expect("samples"));
        assert_eq!(
            (plain.len(), plain.label(11), plain.image(1)[0]),
            (12, 1, (PIXELS % 251) as u8)
        );
    }

    #[test]
    fn gzip_is_read_as_gzip_reads_it() {
        let (images, labels) = pair_of(12);
        let plain = read(&images, &labels).expect("samples");
        let zipped = gzip(&images);
        // Members one after the other, zeros that fill up a block, and what else stands behind.
        let members = [gzip(&images[..100]), gzip(b""), gzip(&images[100..])].concat();
        for behind in [&b""[..], &[0; 1], &[0; 5000], b"garbage", b"\x1f", b"\x1f\x8bno"] {
            for packed in [&zipped, &members] {
                let images = [&packed[..], behind].concat();
                assert_eq!(
                    read(&images, &gzip(&labels)).expect("samples"),
                    plain,
                    "{behind:?}"
                );
            }
        }
        // A member that is broken is not what stands behind the last one.
        let mut broken = members.clone();
        let last = broken.len() - 20;
        broken[last] ^= 0xff;
        read(&broken, &labels).expect_err("a broken member");
        read(&members[..members.len() - 9], &labels).expect_err("a member that is cut off");
    }

    #[test]
    fn a_cut_off_gzip_file_is_named() {
        let (images, labels) = pair_of(12);
        let zipped = gzip(&images);
        let error = read(&zipped[..zipped.len() / 2], &labels)
            .expect_err("cut off")
            .to_string();
        assert!(error.contains("images") && error.contains("cut off"), "{error}");
    }

    #[test]
    fn says_what_is_wrong_with_a_file() {
        let (images, labels) = pair_of(3);
        let says = |images: &[u8], what: &str| {
            let error = read(images, &labels).expect_err("not a sound file").to_string();
            assert!(error.contains(what), "{error}");
        };
        says(&[], "ends in its header");
        says(&images[..10], "ends in its header");
        says(&labels, "IDX file of labels");
        says(b"hello, I am no IDX file", "begins with the bytes [68, 65");
        says(&images[..images.len() - 1], "cut off");
        says(&[images.as_slice(), &[0]].concat(), "more bytes");
        says(
            &file(&[IMAGES_MAGIC, 1, u32::MAX, u32::MAX], &[]),
            "[1, 4294967295, 4294967295]",
        );
        says(
            &file(&[IMAGES_MAGIC, u32::MAX, 28, 28], &[]),
            "promises 4294967295",
        );
        says(&file(&[IMAGES_MAGIC, 0, 28, 28], &[]), "promises 0");
        says(&file(&[0x0807, 1, 28, 28], &[]), "7 dimensions");
        says(&file(&[0x0703, 1, 28, 28], &[]), "type 0x07");
        let (two, _) = pair_of(2);
        let labels = |header: &[u32], body: &[u8], what: &str| {
            let error = read(&two, &file(header, body))
                .expect_err("no labels")
                .to_string();
            assert!(error.contains(what), "{error}");
        };
        labels(&[0x0901, 2], &[3, 0xff], "label -1 at 1");
        labels(&[0x0b01, 2], &[0, 3, 1, 0], "label 256 at 1");
        labels(&[LABELS_MAGIC, 1], &[3], "1 labels, expected 2");
        labels(&[0x0802, 2, 0], &[], "[2, 0]");
    }

    #[test]
    fn reads_every_type_of_the_format_and_qmnists_labels() {
        let (images, labels) = pair_of(3);
        let plain = read(&images, &labels).expect("samples");
        let wide = |kind: u32, labels: &[u8]| read(&images, &file(&[kind << 8 | 1, 3], labels));
        let int = [0_i32, 1, 2].map(i32::to_be_bytes).concat();
        let float = [0_f32, 1.0, 2.0].map(f32::to_be_bytes).concat();
        let double = [0_f64, 1.0, 2.0].map(f64::to_be_bytes).concat();
        for (kind, labels) in [
            (0x09, &[0, 1, 2][..]),
            (0x0b, &[0, 0, 0, 1, 0, 2]),
            (0x0c, &int),
            (0x0d, &float),
            (0x0e, &double),
        ] {
            assert_eq!(wide(kind, labels).expect("samples"), plain, "{kind:#x}");
        }
        // The digit, then where and by whom it was written.
        let rows = [
            [0, 4, 2100, 7, 1, 9, 50, 3],
            [1, 4, 2100, 7, 1, 9, 50, 3],
            [2, 4, 2100, 7, 1, 9, 50, 3],
        ];
        let body: Vec<u8> = rows.concat().into_iter().flat_map(i32::to_be_bytes).collect();
        assert_eq!(
            read(&images, &file(&[0x0c02, 3, 8], &body)).expect("samples"),
            plain
        );
    }

    proptest! {
        #[test]
        fn any_bytes_give_samples_or_an_error(
            header in prop::collection::vec(
                prop_oneof![Just(IMAGES_MAGIC), Just(0x0d02), Just(28), 0_u32..4, any::<u32>()],
                4,
            ),
            body in prop::collection::vec(any::<u8>(), 0..3 * PIXELS),
        ) {
            let bytes = file(&header, &body);
            for (images, labels) in [(&bytes, &pair_of(1).1), (&pair_of(2).0, &bytes)] {
                if let Ok(samples) = read(images, labels) {
                    let shape = samples.shape();
                    prop_assert!((0..samples.len()).all(|i| samples.image(i).len() == shape.pixels()));
                    prop_assert!(samples.labels().iter().all(|&label| u32::from(label) < shape.classes));
                }
            }
        }

        #[test]
        fn what_is_written_is_read(n in 1_u32..4, cut in 0_usize..PIXELS) {
            let (images, labels) = pair_of(n);
            let samples = read(&images, &labels).expect("samples");
            let pixels: Vec<u8> = (0..samples.len()).flat_map(|i| samples.image(i)).copied().collect();
            prop_assert_eq!(pixels, images[16..].to_vec());
            prop_assert_eq!(read(&images[..images.len() - cut], &labels).is_ok(), cut == 0);
        }
    }
}
