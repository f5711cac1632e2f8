//! IDX files (LeCun's MNIST page): a big-endian header of magic and dimensions, then bytes. Plain or gzipped.
//!
//! A header is a stranger's word: memory grows as bytes arrive, never by what the header says.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::error::DataError;
use super::samples::{CLASSES, PIXELS, SIDE, Samples};

/// The first word of a file of bytes in three dimensions.
const IMAGES_MAGIC: u32 = 0x0803;

/// The first word of a file of bytes in one.
const LABELS_MAGIC: u32 = 0x0801;

/// More samples than this in one file are taken for a broken header: 0.8 GB of images.
pub(super) const MOST_SAMPLES: usize = 1_000_000;

/// Reads an images file and its labels file.
///
/// # Errors
/// If either cannot be read, is not what it should be, or they are not of the same samples.
pub(super) fn read_pair(images: &Path, labels: &Path) -> Result<Samples, DataError> {
    let pixels = parse_images(images, open(images)?)?;
    let values = parse_labels(labels, open(labels)?)?;
    pair(labels, pixels, values)
}

/// Puts images and labels together; `labels` names where the labels are from.
///
/// # Errors
/// If there are not as many labels as images.
pub(super) fn pair(labels: &Path, pixels: Vec<u8>, values: Vec<u8>) -> Result<Samples, DataError> {
    let images = pixels.len() / PIXELS;
    if values.len() != images {
        let expected = format!("{images}, one for each image");
        return Err(DataError::format(
            labels,
            format!("{} labels", values.len()),
            expected,
        ));
    }
    Ok(Samples::new(pixels, values))
}

/// The file's bytes, unpacked when they begin as gzip's do.
fn open(path: &Path) -> Result<Box<dyn Read>, DataError> {
    let mut file = File::open(path).map_err(DataError::io(path, "open it"))?;
    let mut magic = Vec::new();
    (&mut file)
        .take(2)
        .read_to_end(&mut magic)
        .map_err(DataError::io(path, "read it"))?;
    let zipped = magic == [0x1f, 0x8b];
    let whole = BufReader::new(io::Cursor::new(magic).chain(file));
    Ok(if zipped {
        Box::new(MultiGzDecoder::new(whole))
    } else {
        Box::new(whole)
    })
}

/// The pixels of an images file.
fn parse_images(path: &Path, mut file: impl Read) -> Result<Vec<u8>, DataError> {
    check_magic(path, &mut file, IMAGES_MAGIC, "images")?;
    let [count, rows, columns] = words(path, &mut file)?;
    if (rows as usize, columns as usize) != (SIDE, SIDE) {
        let found = format!("images of {rows} × {columns} pixels");
        return Err(DataError::format(path, found, format!("{SIDE} × {SIDE}")));
    }
    body(path, file, count, PIXELS)
}

/// The labels of a labels file.
fn parse_labels(path: &Path, mut file: impl Read) -> Result<Vec<u8>, DataError> {
    check_magic(path, &mut file, LABELS_MAGIC, "labels")?;
    let [count] = words(path, &mut file)?;
    let labels = body(path, file, count, 1)?;
    check_labels(path, &labels)?;
    Ok(labels)
}

/// Asserts that all are digits.
pub(super) fn check_labels(path: &Path, labels: &[u8]) -> Result<(), DataError> {
    match labels.iter().position(|&label| usize::from(label) >= CLASSES) {
        Some(at) => Err(DataError::format(
            path,
            format!("the label {} at {at}", labels[at]),
            "0 to 9",
        )),
        None => Ok(()),
    }
}

fn check_magic(path: &Path, file: &mut impl Read, expected: u32, of: &str) -> Result<(), DataError> {
    let [found] = words(path, file)?;
    if found == expected {
        return Ok(());
    }
    let found = format!("a file that begins with {found:#010x}");
    Err(DataError::format(
        path,
        found,
        format!("{expected:#010x}, the start of an IDX file of {of}"),
    ))
}

fn words<const N: usize>(path: &Path, file: &mut impl Read) -> Result<[u32; N], DataError> {
    let header = bytes(path, file, 4 * N)?;
    if header.len() < 4 * N {
        return Err(DataError::format(
            path,
            "a file that ends in its header",
            "an IDX file",
        ));
    }
    Ok(std::array::from_fn(|i| {
        u32::from_be_bytes(std::array::from_fn(|byte| header[4 * i + byte]))
    }))
}

/// The rest of the file, which has to be `count` samples of `each` bytes.
fn body(path: &Path, mut file: impl Read, count: u32, each: usize) -> Result<Vec<u8>, DataError> {
    let count = count as usize;
    if count == 0 || count > MOST_SAMPLES {
        let expected = format!("1 to {MOST_SAMPLES}");
        return Err(DataError::format(
            path,
            format!("a header that promises {count} samples"),
            expected,
        ));
    }
    let data = bytes(path, &mut file, count * each + 1)?;
    match data.len() {
        len if len == count * each => Ok(data),
        len if len > count * each => {
            let found = "more bytes than its header promises";
            Err(DataError::format(
                path,
                found,
                format!("{count} samples of {each} bytes"),
            ))
        }
        len => {
            let found = format!("{len} bytes of data: the file is cut off or its header is wrong");
            Err(DataError::format(
                path,
                found,
                format!("{count} samples of {each} bytes, {}", count * each),
            ))
        }
    }
}

/// At most so many bytes. A stream that breaks off is the file's fault and said so.
pub(super) fn bytes(path: &Path, file: &mut impl Read, most: usize) -> Result<Vec<u8>, DataError> {
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

    fn parse_error(images: &[u8]) -> String {
        parse_images(Path::new("f"), images)
            .expect_err("not a sound file")
            .to_string()
    }

    #[test]
    fn reads_plain_and_gzipped_files_alike() {
        let folder = tempfile::tempdir().expect("a folder");
        let (images, labels) = pair_of(12);
        let write = |name: &str, data: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, data).expect("a file");
            path
        };
        let plain = read_pair(&write("i", &images), &write("l", &labels)).expect("samples");
        let zipped =
            read_pair(&write("i.gz", &gzip(&images)), &write("l.gz", &gzip(&labels))).expect("samples");
        assert_eq!(plain, zipped);
        assert_eq!(
            (plain.len(), plain.label(11), plain.image(1)[0]),
            (12, 1, (PIXELS % 251) as u8)
        );
    }

    #[test]
    fn a_cut_off_gzip_file_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("images.gz");
        let zipped = gzip(&pair_of(12).0);
        std::fs::write(&path, &zipped[..zipped.len() / 2]).expect("a file");
        let error = open(&path)
            .and_then(|file| parse_images(&path, file))
            .expect_err("cut off")
            .to_string();
        assert!(
            error.contains("images.gz") && error.contains("cut off"),
            "{error}"
        );
    }

    #[test]
    fn says_what_is_wrong_with_a_file() {
        let (images, labels) = pair_of(3);
        let says = |images: &[u8], what: &str| {
            let error = parse_error(images);
            assert!(error.contains(what), "{error}");
        };
        says(&[], "ends in its header");
        says(&images[..10], "ends in its header");
        says(&labels, "0x00000801");
        says(&images[..images.len() - 1], "cut off");
        says(&[images.as_slice(), &[0]].concat(), "more bytes");
        says(
            &file(&[IMAGES_MAGIC, 1, u32::MAX, u32::MAX], &[]),
            "4294967295 × 4294967295",
        );
        says(
            &file(&[IMAGES_MAGIC, u32::MAX, 28, 28], &[]),
            "promises 4294967295",
        );
        says(&file(&[IMAGES_MAGIC, 0, 28, 28], &[]), "promises 0");
        let bad = file(&[LABELS_MAGIC, 2], &[3, 10]);
        let error = parse_labels(Path::new("f"), bad.as_slice())
            .expect_err("a label of 10")
            .to_string();
        assert!(error.contains("label 10 at 1"), "{error}");
        assert!(pair(Path::new("f"), vec![0; 2 * PIXELS], vec![1]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_give_samples_or_an_error(
            header in prop::collection::vec(prop_oneof![Just(IMAGES_MAGIC), Just(28), 0_u32..4, any::<u32>()], 4),
            body in prop::collection::vec(any::<u8>(), 0..3 * PIXELS),
        ) {
            let bytes = file(&header, &body);
            if let Ok(pixels) = parse_images(Path::new("f"), bytes.as_slice()) {
                prop_assert_eq!(pixels, body);
            }
            if let Ok(labels) = parse_labels(Path::new("f"), bytes.as_slice()) {
                prop_assert!(labels.iter().all(|&label| label < 10));
            }
        }

        #[test]
        fn what_is_written_is_read(n in 1_u32..4, cut in 0_usize..PIXELS) {
            let (images, _) = pair_of(n);
            prop_assert_eq!(parse_images(Path::new("f"), images.as_slice()).ok(), Some(images[16..].to_vec()));
            prop_assert_eq!(parse_images(Path::new("f"), &images[..images.len() - cut]).is_ok(), cut == 0);
        }
    }
}
