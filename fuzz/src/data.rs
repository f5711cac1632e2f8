//! Datasets: IDX files, plain and gzipped, and `.npz` archives.

use std::fs;
use std::io::{Cursor, Read, Write};
use std::path::Path;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use lifl_common::config::{DataSource, Partition};
use lifl_learn::data::{self, DataError, Samples};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::input::{folder, part};

/// A dataset of 1,000,000 samples is the largest that is read.
const MOST_SAMPLES: usize = 1_000_000;

/// The entries of an archive.
const ENTRIES: [&str; 4] = ["x_train", "y_train", "x_test", "y_test"];

/// A byte that says which of the two files is gzipped here, the images file with its length in front, then the labels
/// file. What is read of them is what they hold, and written down anew it is read again.
pub fn idx(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else {
        return;
    };
    let (images, labels) = part(rest);
    let folder = folder();
    let images_path = folder.path().join("train-images-idx3-ubyte");
    let packed = |yes: bool, bytes: &[u8]| if yes { gzip(bytes) } else { bytes.to_vec() };
    fs::write(&images_path, packed(how & 1 != 0, images)).expect("a file");
    fs::write(
        folder.path().join("train-labels-idx1-ubyte"),
        packed(how & 2 != 0, labels),
    )
    .expect("a file");

    let Some(read) = read(folder.path()) else { return };
    // The test samples are held out from the end: together they are the file's.
    let samples: Vec<Sample<'_>> = all(&read.train).chain(all(&read.test)).collect();
    if let (Some(images), Some(labels)) = (unpacked(images), unpacked(labels))
        && images.starts_with(&[0, 0, 8, 3])
        && labels.starts_with(&[0, 0, 8, 1])
    {
        let (pixels, values) = (&images[16..], &labels[8..]);
        let in_file = values
            .iter()
            .copied()
            .zip(pixels.chunks(pixels.len() / values.len()));
        assert_eq!(sorted(in_file.collect()), sorted(samples.clone()));
    }

    let again = folder.path().join("again");
    fs::create_dir(&again).expect("a folder");
    let shape = read.train.shape();
    let count = samples.len() as u32;
    let sides = [0x0804, count, shape.height, shape.width, shape.channels];
    let header: Vec<u8> = sides.into_iter().flat_map(u32::to_be_bytes).collect();
    let pixels: Vec<u8> = samples.iter().flat_map(|(_, image)| *image).copied().collect();
    let values: Vec<u8> = samples.iter().map(|(label, _)| *label).collect();
    let images = gzip(&[header, pixels].concat());
    fs::write(again.join("t10k-images.idx4-ubyte.gz"), images).expect("a file");
    let header = [0x0801_u32, count].map(u32::to_be_bytes).concat();
    fs::write(again.join("t10k-labels.idx1-ubyte"), [header, values].concat()).expect("a file");
    read.is(&self::read(&again).expect("the same samples"));
}

/// A byte: 0 for an archive as it stands; otherwise four arrays follow, each but the last with its length in front,
/// and are put into an archive here, stored or deflated. What is read of them is written down anew and read again.
pub fn npz(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else {
        return;
    };
    let folder = folder();
    let path = folder.path().join("samples.npz");
    let bytes = match how {
        0 => rest.to_vec(),
        1 => archive(CompressionMethod::Stored, &arrays(rest)),
        _ => archive(CompressionMethod::Deflated, &arrays(rest)),
    };
    fs::write(&path, bytes).expect("a file");
    let Some(read) = read(&path) else { return };
    if read.test.is_empty() {
        return;
    }
    let array = |shape: String, data: &[u8]| {
        let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    };
    let both = |samples: &Samples| {
        let pixels: Vec<u8> = all(samples).flat_map(|(_, image)| image).copied().collect();
        let n = samples.len();
        let labels = array(format!("({n},)"), samples.labels());
        let shape = samples.shape();
        let sides = format!("({n}, {}, {}, {})", shape.height, shape.width, shape.channels);
        (array(sides, &pixels), labels)
    };
    let (x_train, y_train) = both(&read.train);
    let (x_test, y_test) = both(&read.test);
    let bytes = archive(CompressionMethod::Deflated, &[x_train, y_train, x_test, y_test]);
    // By its content: a download has whatever name.
    let again = folder.path().join("again");
    fs::write(&again, bytes).expect("a file");
    read.is(&self::read(&again).expect("the same samples"));
}

/// A label and its image.
type Sample<'a> = (u8, &'a [u8]);

/// What a dataset holds.
struct Dataset {
    train: Samples,
    test: Samples,
}

impl Dataset {
    /// The same samples; those to train with come in an order that is drawn.
    fn is(&self, other: &Self) {
        assert_eq!(
            sorted(all(&self.train).collect()),
            sorted(all(&other.train).collect())
        );
        assert_eq!(self.test, other.test);
    }
}

/// The samples at a path, if they are sound and enough to learn from.
fn read(path: &Path) -> Option<Dataset> {
    let source = DataSource {
        dataset: path.to_str().expect("a name of ours").into(),
        sha256: None,
        train_samples: None,
        test_samples: None,
        partition: Partition::Iid,
    };
    let opened = match data::open(&source, 1) {
        Ok(opened) => opened,
        Err(error) => {
            assert!(!matches!(error, DataError::Io { .. }), "{error:?}");
            assert!(error.to_string().contains(source.dataset.as_str()), "{error}");
            return None;
        }
    };
    assert!(opened.train_len() <= MOST_SAMPLES && opened.test_len() <= MOST_SAMPLES);
    let test = opened.test();
    let train = match opened.train_share(0, 1) {
        Ok(train) => train,
        Err(error) => {
            assert_eq!(opened.train_len(), 0, "{error}");
            return None;
        }
    };
    assert_eq!((train.len(), test.len()), (opened.train_len(), opened.test_len()));
    for (label, image) in all(&train).chain(all(&test)) {
        let shape = opened.shape();
        assert!(u32::from(label) < shape.classes && image.len() == shape.pixels());
    }
    Some(Dataset { train, test })
}

fn all(samples: &Samples) -> impl Iterator<Item = Sample<'_>> {
    (0..samples.len()).map(|n| (samples.label(n), samples.image(n)))
}

fn sorted(mut samples: Vec<Sample<'_>>) -> Vec<Sample<'_>> {
    samples.sort_unstable();
    samples
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

/// What a file holds, read by the shortest way; `None` if something stands behind what gzip made of it.
fn unpacked(file: &[u8]) -> Option<Vec<u8>> {
    if !file.starts_with(&[0x1f, 0x8b]) {
        return Some(file.to_vec());
    }
    let mut bytes = Vec::new();
    MultiGzDecoder::new(file).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn arrays(mut input: &[u8]) -> [Vec<u8>; 4] {
    let mut next = || {
        let (array, rest) = part(input);
        input = rest;
        array.to_vec()
    };
    [next(), next(), next(), next()]
}

fn archive(method: CompressionMethod, arrays: &[Vec<u8>; 4]) -> Vec<u8> {
    let options = SimpleFileOptions::default().compression_method(method);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, array) in ENTRIES.iter().zip(arrays) {
        zip.start_file(format!("{name}.npy"), options).expect("an entry");
        zip.write_all(array).expect("memory");
    }
    zip.finish().expect("an archive").into_inner()
}
