//! `mnist.npz` as Keras publishes it: a zip of four NumPy arrays of bytes.
//!
//! Only what such a file has is read: an array of unsigned bytes in C order (NEP 1). What else NumPy could have
//! written is named in the error.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

use super::error::DataError;
use super::idx::{MOST_SAMPLES, bytes, check_labels, pair};
use super::samples::{SIDE, Samples};

/// A longer array header than any of a sound file.
const MOST_HEADER_BYTES: usize = 4096;

type Archive = ZipArchive<BufReader<File>>;

/// The training and the test samples of the archive.
///
/// # Errors
/// If it cannot be read, or lacks one of `x_train`, `y_train`, `x_test`, `y_test` as bytes.
pub(super) fn read(path: &Path) -> Result<(Samples, Samples), DataError> {
    let file = File::open(path).map_err(DataError::io(path, "open it"))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| match e {
        ZipError::Io(e) if e.kind() != std::io::ErrorKind::UnexpectedEof => DataError::io(path, "read it")(e),
        e => DataError::format(path, format!("no sound zip archive ({e})"), "a whole .npz file"),
    })?;
    let train = samples(path, &mut archive, "x_train", "y_train")?;
    let test = samples(path, &mut archive, "x_test", "y_test")?;
    Ok((train, test))
}

fn samples(path: &Path, archive: &mut Archive, x: &str, y: &str) -> Result<Samples, DataError> {
    let (shape, pixels) = array(path, archive, x)?;
    if !matches!(shape[..], [_, SIDE, SIDE]) {
        let expected = format!("(n, {SIDE}, {SIDE})");
        return Err(DataError::format(
            &path.join(x),
            format!("an array of shape {shape:?}"),
            expected,
        ));
    }
    let (shape, labels) = array(path, archive, y)?;
    let path = path.join(y);
    if shape.len() != 1 {
        return Err(DataError::format(
            &path,
            format!("an array of shape {shape:?}"),
            "(n,)",
        ));
    }
    check_labels(&path, &labels)?;
    pair(&path, pixels, labels)
}

/// An entry's shape and bytes.
fn array(path: &Path, archive: &mut Archive, name: &str) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let entry_name = format!("{name}.npy");
    if archive.index_for_name(&entry_name).is_none() {
        let names: Vec<String> = archive.file_names().flatten().map(String::from).collect();
        return Err(DataError::format(
            path,
            format!("the entries [{}]", names.join(", ")),
            entry_name,
        ));
    }
    let path = path.join(name);
    let mut entry = archive.by_name(&entry_name).map_err(|e| {
        DataError::format(
            &path,
            format!("an unreadable entry ({e})"),
            "one stored or deflated",
        )
    })?;
    let shape = header(&path, &mut entry)?;
    let len = shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d));
    let Some(len) = len.filter(|&len| len <= MOST_SAMPLES * SIDE * SIDE) else {
        let expected = format!("at most {MOST_SAMPLES} samples");
        return Err(DataError::format(
            &path,
            format!("an array of shape {shape:?}"),
            expected,
        ));
    };
    let data = bytes(&path, &mut entry, len + 1)?;
    if data.len() != len {
        let found = if data.len() < len {
            format!("{} bytes", data.len())
        } else {
            "more bytes".into()
        };
        return Err(DataError::format(
            &path,
            found,
            format!("{len} for its shape {shape:?}"),
        ));
    }
    Ok((shape, data))
}

/// The shape that an array's header gives, if it is one of bytes.
fn header(path: &Path, file: &mut impl Read) -> Result<Vec<usize>, DataError> {
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
    if !["'|u1'", "'<u1'", "'u1'"].iter().any(|u1| descr.starts_with(u1)) {
        return Err(wrong("an array of unsigned bytes: 'descr': '|u1'"));
    }
    if !field(&text, "fortran_order").is_some_and(|order| order.starts_with("False")) {
        return Err(wrong("an array in C order: 'fortran_order': False"));
    }
    field(&text, "shape")
        .and_then(tuple)
        .ok_or_else(|| wrong("one with 'shape': (…)"))
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
    use crate::data::samples::PIXELS;

    /// A NumPy array of that type and shape.
    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", length.as_slice(), header.as_bytes(), data].concat()
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

    #[test]
    fn reads_what_keras_publishes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        write_samples(&path, 12, 5);
        let (train, test) = read(&path).expect("samples");
        assert_eq!(
            (train.len(), test.len(), train.label(11), test.image(4)[783]),
            (12, 5, 1, 9)
        );
    }

    #[test]
    fn says_what_is_wrong_with_an_archive() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        let says = |entries: &[(&str, Vec<u8>)], what: &str| {
            write(&path, entries);
            let error = read(&path).expect_err("not a sound file").to_string();
            assert!(error.contains(what) && error.contains("mnist.npz"), "{error}");
        };
        says(&[], "the entries [], expected x_train.npy");
        says(
            &[("x_train.npy", npy("<f4", "(1, 28, 28)", &[]))],
            "unsigned bytes",
        );
        says(
            &[("x_train.npy", npy("|u1", "(1, 28, 28)", &[0; 5]))],
            "found 5 bytes",
        );
        says(
            &[("x_train.npy", npy("|u1", "(1, 32, 32)", &[0; 1024]))],
            "[1, 32, 32]",
        );
        says(
            &[("x_train.npy", npy("|u1", "(18446744073709551615, 28, 28)", &[]))],
            "at most",
        );
        says(&[("x_train.npy", b"hello".to_vec())], "NumPy");
        let x = ("x_train.npy", npy("|u1", "(1, 28, 28)", &[0; PIXELS]));
        says(std::slice::from_ref(&x), "expected y_train.npy");
        says(
            &[x.clone(), ("y_train.npy", npy("|u1", "(2,)", &[1, 2]))],
            "2 labels",
        );
        says(&[x, ("y_train.npy", npy("|u1", "(1,)", &[12]))], "label 12");
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
            match read(&path) {
                Err(DataError::Format { path, expected, .. }) => {
                    assert!(path.ends_with("mnist.npz/x_train"), "{}", path.display());
                    assert_eq!(expected, "one stored or deflated");
                }
                other => assert!(signature == b"PK\x03\x04" && other.is_ok(), "{other:?}"),
            }
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
            assert!(read(&path).is_err(), "{keep} of {} bytes", whole.len());
        }
    }
}
