//! Archives of NumPy arrays: `mnist.npz` as Keras publishes it, MedMNIST's, and what people save with `numpy.savez`.
//!
//! An array is read from what its header says of it (NEP 1). Pickled objects are refused by name: reading them can run code.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::array::{self, Array, Element, Header};
use super::error::DataError;
use super::files::{Files, Spooled};
use super::idx::{bytes, open_file};

/// A longer array header than any of a sound file.
const MOST_HEADER_BYTES: usize = 4096;

/// What arrays of images and of their labels are called, whatever the case: Keras's names first, then MedMNIST's.
const TRAIN: [(&str, &str); 5] = [
    ("x_train", "y_train"),
    ("train_images", "train_labels"),
    ("train_x", "train_y"),
    ("train_data", "train_labels"),
    ("train_data", "train_targets"),
];
const TEST: [(&str, &str); 5] = [
    ("x_test", "y_test"),
    ("test_images", "test_labels"),
    ("test_x", "test_y"),
    ("test_data", "test_labels"),
    ("test_data", "test_targets"),
];
/// One lot: scikit-learn's names among them, and those that `numpy.savez` gives.
const WHOLE: [(&str, &str); 7] = [
    ("x", "y"),
    ("data", "target"),
    ("data", "labels"),
    ("images", "labels"),
    ("image", "label"),
    ("features", "labels"),
    ("arr_0", "arr_1"),
];

/// What an archive is read from: its file, or what was unpacked of that where it was packed once more.
pub(super) enum Source {
    File,
    Spooled(Arc<File>),
}

trait ReadSeek: Read + Seek {}

impl<R: Read + Seek> ReadSeek for R {}

type Archive = ZipArchive<Box<dyn ReadSeek>>;

fn archive(path: &Path, source: &Source) -> Result<Archive, DataError> {
    let reader: Box<dyn ReadSeek> = match source {
        Source::File => Box::new(BufReader::<File>::new(open_file(path)?.0)),
        Source::Spooled(file) => Box::new(BufReader::new(Spooled::new(Arc::clone(file)))),
    };
    ZipArchive::new(reader).map_err(|e| match e {
        ZipError::Io(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => DataError::io(path, "read it")(e),
        e => DataError::format(path, format!("no sound zip archive ({e})"), "a whole .npz file"),
    })
}

/// The samples of the archive: training and test ones, or one lot.
///
/// # Errors
/// If it cannot be read, or lacks arrays of such names.
pub(super) fn read(path: &Path, source: &Source) -> Result<Files, DataError> {
    let archive = archive(path, source)?;
    let names: Vec<String> = archive.file_names().flatten().map(String::from).collect();
    let lacks = |expected: String| {
        let listed: Vec<&str> = names.iter().take(8).map(String::as_str).collect();
        let more = if names.len() > listed.len() { ", …" } else { "" };
        Err(DataError::format(
            path,
            format!("the entries [{}{more}]", listed.join(", ")),
            expected,
        ))
    };
    let entry = |name: &str| {
        names
            .iter()
            .find(|entry| is_array(entry, name))
            .map(String::as_str)
    };
    let pair = |pairs: &[(&str, &str)]| {
        let mut both = pairs.iter().filter_map(|&(x, y)| Some((entry(x)?, entry(y)?)));
        both.next()
    };
    let open = |(x, y): (&str, &str)| {
        let x = Entry::open(path, source, x)?;
        Ok::<_, DataError>((x, Entry::open(path, source, y)?))
    };
    match (pair(&TRAIN), pair(&TEST)) {
        (Some(train), Some(test)) => {
            let (mut train, mut test) = (open(train)?, open(test)?);
            let pairs = [
                (&mut train.0 as &mut dyn Array, &mut train.1 as &mut dyn Array),
                (&mut test.0, &mut test.1),
            ];
            let [train, test] = array::samples(pairs)?;
            Ok(Files::Divided { train, test })
        }
        (Some(only), None) | (None, Some(only)) if !half_a_pair(&names) => whole(open(only)?),
        _ if pair(&WHOLE).is_some() => whole(open(pair(&WHOLE).unwrap_or_default())?),
        _ => {
            // Half of a pair tells what is missing.
            for &(x, y) in TRAIN.iter().chain(&TEST).chain(&WHOLE) {
                if entry(x).is_some() != entry(y).is_some() && (entry(x).is_some() || x != "data") {
                    return lacks(format!("{}.npy too", if entry(x).is_some() { y } else { x }));
                }
            }
            let idx = names.iter().any(|name| name.to_ascii_lowercase().contains("idx"));
            lacks(if idx {
                "x_train.npy and its like: these are IDX files, unpack the archive (`unzip`) and name the folder".to_owned()
            } else {
                "x_train.npy and y_train.npy, x_test.npy and y_test.npy, as numpy.savez(\"data.npz\", x_train=…, y_train=…, \
                 x_test=…, y_test=…) writes them (or MedMNIST's train_images and so on, or one lot x and y)"
                    .to_owned()
            })
        }
    }
}

/// Whether one array of the other part's pair is there, so that the part is not left out on purpose.
fn half_a_pair(names: &[String]) -> bool {
    let there = |array: &str| names.iter().any(|entry| is_array(entry, array));
    TRAIN
        .iter()
        .zip(&TEST)
        .take(2)
        .any(|(train, test)| [train, test].into_iter().any(|(x, y)| there(x) != there(y)))
}

fn whole((mut x, mut y): (Entry, Entry)) -> Result<Files, DataError> {
    let [samples] = array::samples([(&mut x as &mut dyn Array, &mut y as &mut dyn Array)])?;
    Ok(Files::Whole(samples))
}

/// Whether an entry is the array of that name; archives made by hand have a folder in front, on Windows perhaps with `\`.
fn is_array(entry: &str, name: &str) -> bool {
    let last = entry.rsplit(['/', '\\']).next().unwrap_or_default();
    last.len() == name.len() + 4
        && last.is_char_boundary(name.len())
        && last[..name.len()].eq_ignore_ascii_case(name)
        && last[name.len()..].eq_ignore_ascii_case(".npy")
        && !entry.starts_with("__MACOSX/")
}

/// An array of the archive whose header has been read.
struct Entry {
    /// The archive, and behind it the array's name.
    path: PathBuf,
    name: String,
    archive: Archive,
    header: Header,
}

impl Entry {
    fn open(path: &Path, source: &Source, name: &str) -> Result<Self, DataError> {
        let mut archive = archive(path, source)?;
        let array = name.rsplit(['/', '\\']).next().unwrap_or_default();
        let path = path.join(&array[..array.len().saturating_sub(4)]);
        check_packing(&path, &mut archive, name)?;
        let mut entry = by_name(&path, &mut archive, name)?;
        let header = header(&path, &mut entry)?;
        drop(entry);
        Ok(Self {
            path,
            name: name.to_owned(),
            archive,
            header,
        })
    }
}

impl Array for Entry {
    fn path(&self) -> &Path {
        &self.path
    }

    fn header(&self) -> &Header {
        &self.header
    }

    fn open(&mut self) -> Result<Box<dyn Read + '_>, DataError> {
        let mut entry = by_name(&self.path, &mut self.archive, &self.name)?;
        header(&self.path, &mut entry)?;
        Ok(Box::new(entry))
    }
}

const PACKING: &str = "one stored or deflated, as numpy.savez and numpy.savez_compressed write them";

/// Names a way of packing that is not read here.
fn check_packing(path: &Path, archive: &mut Archive, name: &str) -> Result<(), DataError> {
    let index = archive.index_for_name(name);
    let Some(Ok(entry)) = index.map(|index| archive.by_index_raw(index)) else {
        return Ok(());
    };
    let found = if entry.encrypted() {
        "an encrypted entry".to_owned()
    } else {
        match entry.compression() {
            CompressionMethod::Stored | CompressionMethod::Deflated => return Ok(()),
            // PKZIP's APPNOTE, 4.4.5.
            other => match format!("{other:?}").as_str() {
                "Unsupported(9)" | "Deflate64" => {
                    "an entry packed with Deflate64, as Windows does with large files".to_owned()
                }
                "Unsupported(12)" | "Bzip2" => "an entry packed with bzip2".to_owned(),
                "Unsupported(14)" | "Lzma" => "an entry packed with LZMA".to_owned(),
                "Unsupported(93)" | "Zstd" => "an entry packed with zstd".to_owned(),
                other => format!("an entry packed in a way that is not known ({other})"),
            },
        }
    };
    Err(DataError::format(path, found, PACKING))
}

fn by_name<'a>(
    path: &Path,
    archive: &'a mut Archive,
    name: &str,
) -> Result<zip::read::ZipFile<'a, Box<dyn ReadSeek>>, DataError> {
    archive
        .by_name(name)
        .map_err(|e| DataError::format(path, format!("an unreadable entry ({e})"), PACKING))
}

/// What an array's header says.
fn header(path: &Path, file: &mut impl Read) -> Result<Header, DataError> {
    let start = bytes(path, file, 8)?;
    let [0x93, b'N', b'U', b'M', b'P', b'Y', version, _] = start[..] else {
        return Err(DataError::format(path, "something else", "a NumPy array"));
    };
    // Version 1 has 16 bits for the header's length, later ones 32.
    let length = bytes(path, file, if version == 1 { 2 } else { 4 })?;
    let length = length
        .iter()
        .rev()
        .fold(0_usize, |n, &byte| n << 8 | usize::from(byte));
    if length > MOST_HEADER_BYTES {
        let expected = format!("at most {MOST_HEADER_BYTES}");
        return Err(DataError::format(
            path,
            format!("a header of {length} bytes"),
            expected,
        ));
    }
    let text = bytes(path, file, length)?;
    let text = String::from_utf8_lossy(&text);
    let wrong = |expected| DataError::format(path, format!("the header {}", text.trim()), expected);
    let descr = field(&text, "descr").ok_or_else(|| wrong("one with 'descr'"))?;
    let quoted = descr
        .strip_prefix(['\'', '"'])
        .and_then(|rest| rest.split_once(['\'', '"']))
        .map(|(descr, _)| descr);
    let numbers = "an array of whole numbers or floats, like 'descr': '|u1'";
    let Some(descr) = quoted else {
        return Err(wrong(numbers));
    };
    if descr.trim_start_matches(['|', '<', '>', '=']).starts_with('O') {
        let found = "Python objects (a pickle), which are not read because that can run code";
        return Err(DataError::format(
            path,
            found,
            "numbers: save the array with a type of its own, as in numpy.asarray(x, dtype=\"uint8\")",
        ));
    }
    let (element, big_endian) = element(descr).ok_or_else(|| wrong(numbers))?;
    let order = field(&text, "fortran_order").ok_or_else(|| wrong("one with 'fortran_order'"))?;
    let shape = field(&text, "shape")
        .and_then(tuple)
        .ok_or_else(|| wrong("one with 'shape': (…)"))?;
    Ok(Header {
        shape,
        element,
        big_endian,
        fortran: order.starts_with("True"),
    })
}

/// The type that a `descr` names, and whether its high bytes come first.
fn element(descr: &str) -> Option<(Element, bool)> {
    let big_endian = descr.starts_with('>');
    let kind = descr.strip_prefix(['|', '<', '>', '=']).unwrap_or(descr);
    let element = match kind {
        "b1" | "?" => Element::Bool,
        "i1" => Element::Signed(1),
        "i2" => Element::Signed(2),
        "i4" => Element::Signed(4),
        "i8" => Element::Signed(8),
        "u1" => Element::Unsigned(1),
        "u2" => Element::Unsigned(2),
        "u4" => Element::Unsigned(4),
        "u8" => Element::Unsigned(8),
        "f2" => Element::Float(2),
        "f4" => Element::Float(4),
        "f8" => Element::Float(8),
        _ => return None,
    };
    Some((element, big_endian))
}

/// What follows a key of the header, a Python dictionary in text.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("'{key}'"))?;
    Some(rest.trim_start().strip_prefix(':')?.trim_start())
}

/// The numbers in a Python tuple.
fn tuple(text: &str) -> Option<Vec<usize>> {
    let (inside, _) = text.strip_prefix('(')?.split_once(')')?;
    inside
        .split(',')
        .map(str::trim)
        .filter(|n| !n.is_empty())
        .map(|n| n.parse().ok())
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;
    use crate::data::samples::{PIXELS, Samples};

    /// A NumPy array of that type and shape.
    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        array(descr, "False", shape, data)
    }

    /// The same, with its order.
    fn array(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", length.as_slice(), header.as_bytes(), data].concat()
    }

    /// An array's header.
    fn shown(array: &[u8]) -> String {
        let end = array
            .iter()
            .position(|byte| *byte == b'\n')
            .unwrap_or(array.len());
        String::from_utf8_lossy(&array[10..end]).into_owned()
    }

    /// A zip archive of those entries, deflated.
    fn write(path: &Path, entries: &[(&str, Vec<u8>)]) {
        let mut zip = ZipWriter::new(File::create(path).expect("a file"));
        for (name, data) in entries {
            zip.start_file(*name, SimpleFileOptions::default())
                .expect("an entry");
            zip.write_all(data).expect("its data");
        }
        zip.finish().expect("an archive");
    }

    /// An archive of `train` and `test` samples.
    pub(in crate::data) fn write_samples(path: &Path, train: usize, test: usize) {
        let x = |n: usize| npy("|u1", &format!("({n}, 28, 28)"), &vec![9; n * PIXELS]);
        let y = |n: usize| {
            npy(
                "|u1",
                &format!("({n},)"),
                &(0..n).map(|i| (i % 10) as u8).collect::<Vec<u8>>(),
            )
        };
        let entries = [
            ("x_train.npy", x(train)),
            ("y_train.npy", y(train)),
            ("x_test.npy", x(test)),
            ("y_test.npy", y(test)),
        ];
        write(path, &entries);
    }

    fn divided(path: &Path) -> Result<(Samples, Samples), DataError> {
        match super::read(path, &Source::File)? {
            Files::Divided { train, test } => Ok((train, test)),
            Files::Whole(_) => panic!("one lot"),
        }
    }

    /// One lot of an archive of `x` and `y`.
    fn lot(x: Vec<u8>, y: Vec<u8>) -> Result<Samples, DataError> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lot.npz");
        write(&path, &[("x.npy", x), ("y.npy", y)]);
        match super::read(&path, &Source::File)? {
            Files::Whole(samples) => Ok(samples),
            Files::Divided { .. } => panic!("two parts"),
        }
    }

    #[test]
    fn reads_what_keras_publishes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        write_samples(&path, 12, 5);
        let (train, test) = divided(&path).expect("samples");
        assert_eq!(
            (train.len(), test.len(), train.label(11), test.image(4)[783]),
            (12, 5, 1, 9)
        );
    }

    /// Three grey images of 2 × 3 pixels.
    const PIXELS_OF_THREE: [u8; 18] = [0, 51, 102, 153, 204, 255, 1, 2, 3, 4, 5, 6, 0, 0, 0, 9, 9, 9];

    fn three() -> Samples {
        lot(
            npy("|u1", "(3, 2, 3)", &PIXELS_OF_THREE),
            npy("|u1", "(3,)", &[2, 0, 1]),
        )
        .expect("samples")
    }

    #[test]
    fn labels_of_every_type_and_shape_are_the_same_labels() {
        let x = || npy("|u1", "(3, 2, 3)", &PIXELS_OF_THREE);
        let little = |bytes: usize| {
            [2_u64, 0, 1]
                .iter()
                .flat_map(|n| n.to_le_bytes()[..bytes].to_vec())
                .collect::<Vec<u8>>()
        };
        let big = |bytes: usize| {
            [2_u64, 0, 1]
                .iter()
                .flat_map(|n| n.to_be_bytes()[8 - bytes..].to_vec())
                .collect::<Vec<u8>>()
        };
        let mut clothes = vec![
            npy("|u1", "(3, 1)", &[2, 0, 1]),
            npy("|u1", "(3, 1, 1)", &[2, 0, 1]),
            npy("<f4", "(3,)", &[2_f32, 0.0, 1.0].map(f32::to_le_bytes).concat()),
            npy(">f8", "(3,)", &[2_f64, 0.0, 1.0].map(f64::to_be_bytes).concat()),
            npy("<f2", "(3, 1)", &[0, 0x40, 0, 0, 0, 0x3c]),
            npy("|b1", "(3, 3)", &[0, 0, 1, 1, 0, 0, 0, 1, 0]),
            npy(
                "<f4",
                "(3, 3)",
                &[0_f32, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
                    .map(f32::to_le_bytes)
                    .concat(),
            ),
            array("|u1", "True", "(3, 3)", &[0, 1, 0, 0, 0, 1, 1, 0, 0]),
        ];
        for bytes in [1, 2, 4, 8] {
            for kind in ["i", "u"] {
                clothes.push(npy(&format!("<{kind}{bytes}"), "(3,)", &little(bytes)));
                clothes.push(npy(&format!(">{kind}{bytes}"), "(3,)", &big(bytes)));
            }
        }
        for y in clothes {
            let header = shown(&y);
            assert_eq!(lot(x(), y).expect(&header), three(), "{header}");
        }
        for (y, what) in [
            (
                npy("<i8", "(3,)", &[[0xff; 8], [0; 8], [0; 8]].concat()),
                "label -1 at 0",
            ),
            (npy("<u8", "(3,)", &[[0xff; 8], [0; 8], [0; 8]].concat()), "at 0"),
            (npy("<u2", "(3,)", &[0, 0, 0, 1, 0, 0]), "label 256 at 1"),
            (
                npy("<f4", "(3,)", &[0_f32, 0.5, 1.0].map(f32::to_le_bytes).concat()),
                "label 0.5 at 1",
            ),
            (
                npy(
                    "<f4",
                    "(3,)",
                    &[0_f32, f32::NAN, 1.0].map(f32::to_le_bytes).concat(),
                ),
                "label NaN at 1",
            ),
            (npy("|u1", "(3, 3)", &[0, 0, 1, 1, 0, 1, 0, 1, 0]), "several"),
            (npy("<U1", "(3,)", &[0; 12]), "whole numbers or floats"),
            (npy("|O", "(3,)", b"\x80\x04"), "can run code"),
            (npy("|u1", "(4,)", &[0; 4]), "4 labels, expected 3"),
            (npy("|u1", "(3, 1000)", &[0; 3000]), "one label for each image"),
            (npy("|u1", "()", &[0]), "one label for each image"),
        ] {
            let error = lot(x(), y).expect_err(what).to_string();
            assert!(
                error.contains(what) && error.contains("lot.npz/y"),
                "{error}, not {what}"
            );
        }
    }

    #[test]
    fn images_of_every_type_and_shape_are_the_same_images() {
        let y = || npy("|u1", "(3,)", &[2, 0, 1]);
        let wide = |scale: fn(f64) -> f64| PIXELS_OF_THREE.map(|pixel| scale(f64::from(pixel)));
        let f8 = |values: [f64; 18]| values.map(f64::to_le_bytes).concat();
        let f4 = |values: [f64; 18]| values.map(|value| (value as f32).to_le_bytes()).concat();
        // Column-major: the first index changes fastest.
        let at = |n: usize, row: usize, column: usize| PIXELS_OF_THREE[6 * n + 3 * row + column];
        let fortran: Vec<u8> = (0..18).map(|i| at(i % 3, i / 3 % 2, i / 6)).collect();
        for x in [
            npy("|u1", "(3, 2, 3, 1)", &PIXELS_OF_THREE),
            npy("|u1", "(3, 1, 2, 3)", &PIXELS_OF_THREE),
            npy(
                "<i8",
                "(3, 2, 3)",
                &PIXELS_OF_THREE.map(i64::from).map(i64::to_le_bytes).concat(),
            ),
            npy(
                ">u2",
                "(3, 2, 3)",
                &PIXELS_OF_THREE.map(u16::from).map(u16::to_be_bytes).concat(),
            ),
            npy("<f8", "(3, 2, 3)", &f8(wide(|pixel| pixel / 255.0))),
            npy("<f4", "(3, 2, 3, 1)", &f4(wide(|pixel| pixel / 255.0))),
            npy("<f4", "(3, 2, 3)", &f4(wide(|pixel| pixel))),
            npy("<f4", "(3, 2, 3)", &f4(wide(|pixel| pixel / 127.5 - 1.0))),
            array("|u1", "True", "(3, 2, 3)", &fortran),
            array("|u1", "True", "(3, 2, 3, 1)", &fortran),
        ] {
            let header = shown(&x);
            let samples = lot(x, y()).expect(&header);
            assert_eq!(samples, three(), "{header}");
        }
        let shape = three().shape();
        assert_eq!(
            (shape.height, shape.width, shape.channels, shape.classes),
            (2, 3, 1, 10)
        );
        let half: Vec<u8> = PIXELS_OF_THREE
            .iter()
            .flat_map(|&pixel| half::f16::from_f32(f32::from(pixel)).to_le_bytes())
            .collect();
        assert_eq!(
            lot(npy("<f2", "(3, 2, 3)", &half), y()).expect("samples"),
            three()
        );
        for (x, what) in [
            (
                npy("<f4", "(3, 2, 3)", &f4(wide(|pixel| pixel / 100.0 - 1.1))),
                "standardised",
            ),
            (npy("<f4", "(3, 2, 3)", &f4(wide(|_| f64::NAN))), "finite"),
            (npy("<u2", "(3, 2, 3)", &[0xff; 36]), "pixel 65535 at 0"),
            (npy("|u1", "(3, 6)", &PIXELS_OF_THREE), "squares"),
            (npy("|u1", "(3, 0, 3)", &[]), "[3, 0, 3]"),
            (npy("|u1", "(18,)", &PIXELS_OF_THREE), "[18]"),
        ] {
            let error = lot(x, y()).expect_err(what).to_string();
            assert!(
                error.contains(what) && error.contains("lot.npz/x"),
                "{error}, not {what}"
            );
        }
    }

    #[test]
    fn colours_come_last_wherever_they_were() {
        let image = |n: u8| (0..12).map(|i| 20 * n + i).collect::<Vec<u8>>();
        let last = [image(0), image(1)].concat();
        // Of 2 × 2 pixels, three planes.
        let first: Vec<u8> = (0..24)
            .map(|i| last[12 * (i / 12) + 3 * (i % 4) + i % 12 / 4])
            .collect();
        let y = || npy("<i8", "(2, 1)", &[0; 16]);
        let plain = lot(npy("|u1", "(2, 2, 2, 3)", &last), y()).expect("samples");
        assert_eq!((plain.shape().channels, plain.image(1)), (3, &last[12..]));
        assert_eq!(
            lot(npy("|u1", "(2, 3, 2, 2)", &first), y()).expect("samples"),
            plain
        );
    }

    #[test]
    fn squares_in_a_row_are_squares() {
        let x = npy("<f8", "(2, 64)", &[16_f64; 128].map(f64::to_le_bytes).concat());
        let shape = lot(x, npy("<i8", "(2,)", &[0; 16])).expect("samples").shape();
        assert_eq!((shape.height, shape.width, shape.channels), (8, 8, 1));
    }

    #[test]
    fn arrays_go_by_many_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.npz");
        let x = || npy("|u1", "(2, 28, 28)", &[0; 2 * PIXELS]);
        let y = || npy("<i8", "(2, 1)", &[0; 16]);
        for names in [
            ["x_train", "y_train", "x_test", "y_test"],
            ["X_train", "y_train", "X_test", "y_test"],
            ["train_images", "train_labels", "test_images", "test_labels"],
            ["data/x_train", "data/y_train", "data/x_test", "data/y_test"],
            ["data\\x_train", "data\\y_train", "data\\x_test", "data\\y_test"],
        ] {
            let entries = names.map(|name| format!("{name}.npy"));
            let mut entries: Vec<(&str, Vec<u8>)> = entries
                .iter()
                .map(String::as_str)
                .zip([x(), y(), x(), y()])
                .collect();
            entries.extend([("val_images.npy", x()), ("val_labels.npy", y())]);
            write(&path, &entries);
            let (train, test) = divided(&path).expect(names[0]);
            assert_eq!((train.len(), test.len()), (2, 2));
        }
        for names in [
            ["x", "y"],
            ["X", "y"],
            ["data", "target"],
            ["arr_0", "arr_1"],
            ["x_train", "y_train"],
        ] {
            let entries = names.map(|name| format!("{name}.npy"));
            let entries: Vec<(&str, Vec<u8>)> = entries.iter().map(String::as_str).zip([x(), y()]).collect();
            write(&path, &entries);
            assert!(
                matches!(super::read(&path, &Source::File), Ok(Files::Whole(_))),
                "{names:?}"
            );
        }
    }

    #[test]
    fn more_classes_than_ten_are_counted() {
        let y: Vec<u8> = (0..3_i64).flat_map(|n| (n * 23).to_le_bytes()).collect();
        let samples =
            lot(npy("|u1", "(3, 2, 3)", &PIXELS_OF_THREE), npy("<i8", "(3,)", &y)).expect("samples");
        assert_eq!((samples.shape().classes, samples.label(2)), (47, 46));
    }

    #[test]
    fn says_what_is_wrong_with_an_archive() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        let says = |entries: &[(&str, Vec<u8>)], what: &str| {
            write(&path, entries);
            let error = divided(&path).expect_err("not a sound file").to_string();
            assert!(error.contains(what) && error.contains("mnist.npz"), "{error}");
        };
        let y = || ("y_train.npy", npy("|u1", "(1,)", &[1]));
        says(&[], "the entries [], expected x_train.npy");
        says(
            &[("train-images-idx3-ubyte.gz", vec![0])],
            "these are IDX files, unpack",
        );
        says(
            &[("x_train.npy", npy("<c8", "(1, 28, 28)", &[])), y()],
            "whole numbers or floats",
        );
        says(
            &[("x_train.npy", npy("|O", "(1, 28, 28)", &[])), y()],
            "can run code",
        );
        says(
            &[("x_train.npy", npy("|u1", "(1, 28, 28)", &[0; 5])), y()],
            "found 5 bytes",
        );
        says(
            &[("x_train.npy", npy("|u1", "(1, 28, 28)", &[0; PIXELS + 1])), y()],
            "more bytes",
        );
        says(
            &[
                ("x_train.npy", npy("|u1", "(18446744073709551615, 28, 28)", &[])),
                y(),
            ],
            "at most",
        );
        says(&[("x_train.npy", b"hello".to_vec()), y()], "NumPy");
        let x = ("x_train.npy", npy("|u1", "(1, 28, 28)", &[0; PIXELS]));
        says(std::slice::from_ref(&x), "expected y_train.npy");
        says(
            &[x.clone(), y(), ("x_test.npy", x.1.clone())],
            "expected y_test.npy",
        );
        says(
            &[x.clone(), ("y_train.npy", npy("|u1", "(2,)", &[1, 2]))],
            "2 labels",
        );
        let small = npy("|u1", "(1, 14, 14)", &[0; 196]);
        says(
            &[x, y(), ("x_test.npy", small), ("y_test.npy", y().1)],
            "images of 14 × 14 pixels, expected 28 × 28",
        );
    }

    #[test]
    fn an_entry_packed_in_another_way_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        write_samples(&path, 2, 1);
        let whole = std::fs::read(&path).expect("the archive");
        // The method stands in the entry's own header and in the directory at the end: PKZIP's APPNOTE, 4.3.7 and 4.3.12.
        for (signature, at) in [(b"PK\x03\x04", 8), (b"PK\x01\x02", 10)] {
            let mut changed = whole.clone();
            let entry = changed
                .windows(4)
                .position(|window| window == signature)
                .expect("an entry");
            changed[entry + at..][..2].copy_from_slice(&8200_u16.to_le_bytes());
            std::fs::write(&path, &changed).expect("a file");
            match divided(&path) {
                Err(DataError::Format { path, expected, .. }) => {
                    assert!(path.ends_with("mnist.npz/x_train"), "{}", path.display());
                    assert!(expected.starts_with("one stored or deflated"), "{expected}");
                }
                other => assert!(signature == b"PK\x03\x04" && other.is_ok(), "{other:?}"),
            }
        }
        // In the directory, which is what counts: Deflate64, and the flag of an encrypted entry.
        for (at, value, what) in [(10, 9_u16, "Deflate64"), (8, 1, "encrypted")] {
            let mut changed = whole.clone();
            let entry = changed
                .windows(4)
                .position(|window| window == b"PK\x01\x02")
                .expect("an entry");
            changed[entry + at..][..2].copy_from_slice(&value.to_le_bytes());
            std::fs::write(&path, &changed).expect("a file");
            let error = divided(&path).expect_err(what).to_string();
            assert!(error.contains(what) && error.contains("savez"), "{error}");
        }
    }

    #[test]
    fn a_cut_off_archive_is_an_error() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        write_samples(&path, 12, 5);
        let whole = std::fs::read(&path).expect("the archive");
        for keep in [0, 3, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&path, &whole[..keep]).expect("a file");
            assert!(divided(&path).is_err(), "{keep} of {} bytes", whole.len());
        }
    }
}
