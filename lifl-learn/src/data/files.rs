//! Finds what a path means: a folder of IDX files, one pair of them, or an archive of NumPy arrays.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::DataError;
use super::samples::Samples;
use super::{idx, npz};
use lifl_common::file_kind::{self, FileKind};

/// How gzip data begins.
const GZIP: &[u8] = &[0x1f, 0x8b];

/// The largest archive that is unpacked because it was packed once more.
const MOST_UNPACKED_BYTES: u64 = 1 << 30;

/// How an array file is made of whatever somebody has.
const SAVE: &str = "IDX files or an archive of NumPy arrays: numpy.savez(\"data.npz\", x_train=…, y_train=…, x_test=…, y_test=…)";

/// What a dataset on disk holds.
#[derive(Debug)]
pub(super) enum Files {
    /// Training and test samples, as published.
    Divided { train: Samples, test: Samples },
    /// One lot, from whose end the test samples have to be taken.
    Whole(Samples),
}

/// Reads the dataset at `path`.
///
/// # Errors
/// If there is none, or it is not sound.
pub(super) fn read(path: &Path) -> Result<Files, DataError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return read_folder(path),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(DataError::io(path, "look at it, let this user read it (`chmod`)")(error));
        }
        Err(_) => {
            return Err(DataError::Missing {
                path: path.to_owned(),
            });
        }
    }
    let io = || DataError::io(path, "read it");
    let (mut file, _) = idx::open_file(path)?;
    let start = file_kind::start_of(&mut file).map_err(io())?;
    if start.starts_with(b"PK") {
        return npz::read(path, &npz::Source::File);
    }
    // What is within gzip, perhaps twice: a server may pack what is packed already. An archive is read from its end, so it is
    // unpacked first.
    let (packed, mut layer, mut inner) = (start.starts_with(GZIP), None, start);
    for _ in 0..2 {
        if !inner.starts_with(GZIP) {
            break;
        }
        let mut reader: Box<dyn Read> = match layer.take() {
            None => idx::open(path)?,
            Some(file) => idx::unpacked(BufReader::new(Spooled::new(file))).map_err(io())?,
        };
        inner = idx::bytes(path, &mut reader, file_kind::START_BYTES)?;
        if inner.starts_with(b"PK") || inner.starts_with(GZIP) {
            layer = Some(spool(path, &inner, &mut reader)?);
        }
    }
    if let Some(file) = layer.filter(|_| inner.starts_with(b"PK")) {
        return npz::read(path, &npz::Source::Spooled(file));
    }
    if !inner.starts_with(&[0, 0]) {
        return Err(other(path, &inner, packed));
    }
    let labels = labels_beside(path)?;
    Ok(Files::Whole(idx::read_pair(path, &labels)?))
}

/// Writes what is unpacked into a file without a name, which goes with its last user.
fn spool(path: &Path, start: &[u8], reader: &mut dyn Read) -> Result<Arc<File>, DataError> {
    let io = || DataError::io(path, "unpack it into a temporary file (TMPDIR names the folder)");
    let mut file = tempfile::tempfile().map_err(io())?;
    let (mut piece, mut length) = (start.to_vec(), 0);
    while !piece.is_empty() {
        length += piece.len() as u64;
        if length > MOST_UNPACKED_BYTES {
            return Err(DataError::format(
                path,
                "more than 1 GiB when it is unpacked",
                "a smaller data set, or this one unpacked (`gunzip`)",
            ));
        }
        file.write_all(&piece).map_err(io())?;
        piece = idx::bytes(path, reader, 1 << 20)?;
    }
    Ok(Arc::new(file))
}

/// A spooled file from its start; each reader has a place of its own in it.
pub(super) struct Spooled {
    file: Arc<File>,
    at: u64,
}

impl Spooled {
    pub(super) fn new(file: Arc<File>) -> Self {
        Self { file, at: 0 }
    }
}

impl Read for Spooled {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Spooled {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::other("a place before the file's start"))?;
        Ok(self.at)
    }
}

/// Names a file that is no data set.
fn other(path: &Path, start: &[u8], packed: bool) -> DataError {
    if start.is_empty() {
        return DataError::format(path, "an empty file", "a whole one: copy or download it again");
    }
    let foreign = file_kind::recognise(start);
    let found = match foreign {
        Some(foreign) => foreign.name().to_owned(),
        None => format!(
            "a file that begins with the bytes {:02x?}",
            &start[..start.len().min(8)]
        ),
    };
    let found = if packed {
        format!("{found}, gzipped")
    } else {
        found
    };
    let expected = match foreign {
        Some(FileKind::Npy) => {
            "images and labels in one archive: numpy.savez(\"data.npz\", x=images, y=labels)".to_owned()
        }
        Some(foreign) => match foreign.remedy() {
            Some(remedy) => format!("a data set: {remedy}"),
            None => SAVE.to_owned(),
        },
        None => SAVE.to_owned(),
    };
    DataError::format(path, found, expected)
}

/// The images files of a folder that belong together, by what their names have in front: `emnist-letters-`, `qmnist-`, nothing.
#[derive(Default)]
struct Pair {
    train: Option<PathBuf>,
    test: Option<PathBuf>,
}

/// What an images file's name says: what is in front of it, and whether its samples are for training.
fn images_name(name: &str) -> Option<(String, bool)> {
    let name = name.to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let stem = ["-ubyte", ".ubyte", ""]
        .into_iter()
        .find_map(|end| name.strip_suffix(end))?;
    let stem = ["images-idx3", "images.idx3", "images-idx4", "images.idx4"]
        .into_iter()
        .find_map(|end| stem.strip_suffix(end))?;
    let stem = stem.trim_end_matches(['-', '_', '.']);
    let parts = [("train", true), ("t10k", false), ("test", false)];
    parts
        .into_iter()
        .find_map(|(part, train)| Some((stem.strip_suffix(part)?.to_owned(), train)))
}

fn read_folder(folder: &Path) -> Result<Files, DataError> {
    let names = names_in(folder)?;
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for name in &names {
        if let Some((prefix, train)) = images_name(name) {
            let pair = pairs.entry(prefix).or_default();
            let place = if train { &mut pair.train } else { &mut pair.test };
            // Sorted: a plain file comes before the same one with .gz.
            place.get_or_insert_with(|| folder.join(name));
        }
    }
    let chosen = match pairs.len() {
        0 => return read_other_folder(folder, &names),
        1 => pairs.into_values().next(),
        _ if pairs.contains_key("") => pairs.remove(""),
        _ => {
            let prefixes: Vec<&str> = pairs.keys().map(|prefix| prefix.trim_end_matches('-')).collect();
            let found = format!("several data sets: {}", prefixes.join(", "));
            return Err(DataError::format(
                folder,
                found,
                "a folder with one of them, or the path of one images file",
            ));
        }
    };
    match chosen.unwrap_or_default() {
        Pair {
            train: Some(train),
            test: Some(test),
        } => {
            let labels = (labels_beside(&train)?, labels_beside(&test)?);
            let [train, test] = idx::read_pairs([(&train, &labels.0), (&test, &labels.1)])?;
            Ok(Files::Divided { train, test })
        }
        Pair { train: only, test } => {
            let only = only.or(test).unwrap_or_default();
            Ok(Files::Whole(idx::read_pair(&only, &labels_beside(&only)?)?))
        }
    }
}

/// The folder's files and folders that are not hidden, sorted.
fn names_in(folder: &Path) -> Result<Vec<String>, DataError> {
    let entries = fs::read_dir(folder).map_err(DataError::io(folder, "read this folder"))?;
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    Ok(names)
}

/// A folder without IDX files: with one archive, or what torchvision makes, or one that is told what it is.
fn read_other_folder(folder: &Path, names: &[String]) -> Result<Files, DataError> {
    let of = |ends: &[&str]| {
        let ends = |name: &&String| ends.iter().any(|end| name.to_ascii_lowercase().ends_with(end));
        names.iter().filter(ends).collect::<Vec<_>>()
    };
    let archives = of(&[".npz"]);
    if let [only] = archives[..] {
        return read(&folder.join(only));
    }
    // torchvision's root, and the folder in it.
    let raw = |name: &String| [folder.join(name), folder.join(name).join("raw")];
    let has_images = |path: &PathBuf| {
        names_in(path).is_ok_and(|names| names.iter().any(|name| images_name(name).is_some()))
    };
    let mut below = names
        .iter()
        .flat_map(raw)
        .filter(|path| path.ends_with("raw") && has_images(path));
    if let (Some(raw), None) = (below.next(), below.next()) {
        return read_folder(&raw);
    }
    let pictures = of(&[".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"]);
    let tables = of(&[".csv", ".tsv", ".parquet", ".arrow"]);
    let within = |name: &&String| folder.join(name).is_dir();
    let found = if !archives.is_empty() {
        format!("{} archives: {}", archives.len(), few(&archives))
    } else if !pictures.is_empty() {
        format!("{} single images: {}", pictures.len(), few(&pictures))
    } else if !tables.is_empty() {
        format!("tables: {}", few(&tables))
    } else if names.is_empty() {
        "nothing".to_owned()
    } else {
        let folders: Vec<&String> = names.iter().filter(within).collect();
        let what = if folders.len() == names.len() {
            "only folders, perhaps of images: "
        } else {
            ""
        };
        format!("{what}{}", few(&names.iter().collect::<Vec<_>>()))
    };
    let remedy = if archives.is_empty() {
        SAVE
    } else {
        "one of them: name it"
    };
    Err(DataError::EmptyFolder {
        path: folder.to_owned(),
        found,
        remedy,
    })
}

fn few(names: &[&String]) -> String {
    const FEW: usize = 3;
    let shown: Vec<&str> = names.iter().take(FEW).map(|name| name.as_str()).collect();
    let more = if names.len() > FEW { ", …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// The labels file of an images file: the same name with `labels` for `images` and `idx1` (or QMNIST's `idx2-int`) for `idx3`,
/// zipped or not.
fn labels_beside(images: &Path) -> Result<PathBuf, DataError> {
    let name = images.file_name().unwrap_or_default().to_string_lossy();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    let labels = plain.replace("images", "labels").replace("idx4", "idx3");
    let mut tried = Vec::new();
    for labels in [
        labels.replace("idx3", "idx1"),
        labels.replace("idx3-ubyte", "idx2-int"),
    ] {
        for labels in [
            labels.clone(),
            labels.replace("-idx", ".idx"),
            labels.replace(".idx", "-idx"),
        ] {
            tried.extend([labels.clone(), format!("{labels}.gz")]);
        }
    }
    // As the images file is, first.
    tried.sort_by_key(|labels| labels.ends_with(".gz") != name.ends_with(".gz"));
    let expected = images.with_file_name(&tried[0]);
    // A file without `images` in its name would be its own labels.
    let mut beside = tried.iter().map(|labels| images.with_file_name(labels));
    beside
        .find(|path| path != images && name.contains("images") && path.is_file())
        .ok_or_else(|| DataError::NoLabels {
            images: images.to_owned(),
            labels: expected,
        })
}

#[cfg(test)]
mod tests {
    use super::super::idx::tests::{gzip, pair_of};
    use super::super::npz::tests::write_samples;
    use super::*;

    fn put(folder: &Path, stem: &str, n: u32) {
        let (images, labels) = pair_of(n);
        fs::write(folder.join(format!("{stem}-images-idx3-ubyte")), images).expect("a file");
        fs::write(folder.join(format!("{stem}-labels-idx1-ubyte.gz")), gzip(&labels)).expect("a file");
    }

    fn sizes(path: &Path) -> (usize, Option<usize>) {
        match read(path).expect("samples") {
            Files::Divided { train, test } => (train.len(), Some(test.len())),
            Files::Whole(samples) => (samples.len(), None),
        }
    }

    #[test]
    fn finds_the_usual_files() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(read(folder.path()), Err(DataError::EmptyFolder { .. })));
        assert!(matches!(
            read(&folder.path().join("none")),
            Err(DataError::Missing { .. })
        ));
        put(folder.path(), "t10k", 4);
        assert_eq!(sizes(folder.path()), (4, None));
        put(folder.path(), "train", 6);
        assert_eq!(sizes(folder.path()), (6, Some(4)));
        assert_eq!(sizes(&folder.path().join("train-images-idx3-ubyte")), (6, None));
        // By its content: a download has whatever name.
        write_samples(&folder.path().join("download"), 3, 2);
        assert_eq!(sizes(&folder.path().join("download")), (3, Some(2)));
    }

    #[test]
    fn images_without_labels_say_which_file_is_missing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("train-images-idx3-ubyte");
        fs::write(&path, pair_of(1).0).expect("a file");
        let error = read(folder.path()).expect_err("no labels").to_string();
        assert!(error.contains("train-labels-idx1-ubyte"), "{error}");
        let other = folder.path().join("something");
        fs::write(&other, pair_of(1).0).expect("a file");
        assert!(matches!(read(&other), Err(DataError::NoLabels { .. })));
    }

    #[test]
    fn finds_what_emnist_qmnist_and_torchvision_call_their_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let (images, labels) = pair_of(4);
        for part in ["train", "test"] {
            let name = |what: &str| folder.path().join(format!("emnist-letters-{part}-{what}"));
            fs::write(name("images-idx3-ubyte.gz"), gzip(&images)).expect("a file");
            fs::write(name("labels-idx1-ubyte.gz"), gzip(&labels)).expect("a file");
        }
        assert_eq!(sizes(folder.path()), (4, Some(4)));
        let other = folder.path().join("emnist-digits-train-images-idx3-ubyte");
        fs::write(&other, &images).expect("a file");
        fs::write(
            folder.path().join("emnist-digits-train-labels-idx1-ubyte"),
            &labels,
        )
        .expect("a file");
        let error = read(folder.path()).expect_err("two data sets").to_string();
        assert!(error.contains("emnist-digits, emnist-letters"), "{error}");
        assert_eq!(sizes(&other), (4, None));

        let qmnist = folder.path().join("qmnist");
        fs::create_dir(&qmnist).expect("a folder");
        fs::write(qmnist.join("qmnist-train-images-idx3-ubyte"), &images).expect("a file");
        let rows: Vec<u8> = (0..4_i32)
            .flat_map(|n| [n, 4, 0, 0, 1, 2, 3, 4])
            .flat_map(i32::to_be_bytes)
            .collect();
        let labels_file = super::super::idx::tests::file(&[0x0c02, 4, 8], &rows);
        fs::write(qmnist.join("qmnist-train-labels-idx2-int.gz"), gzip(&labels_file)).expect("a file");
        assert_eq!(sizes(&qmnist), (4, None));

        let root = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(root.path().join("MNIST/raw")).expect("a folder");
        put(&root.path().join("MNIST/raw"), "train", 5);
        assert_eq!(sizes(root.path()), (5, None));
        assert_eq!(sizes(&root.path().join("MNIST")), (5, None));
        fs::create_dir_all(root.path().join("KMNIST/raw")).expect("a folder");
        put(&root.path().join("KMNIST/raw"), "train", 5);
        read(root.path()).expect_err("two data sets");
    }

    #[test]
    fn an_archive_may_be_packed_once_more() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("mnist.npz");
        write_samples(&path, 3, 2);
        assert_eq!(sizes(folder.path()), (3, Some(2)));
        let zipped = gzip(&fs::read(&path).expect("the archive"));
        fs::write(folder.path().join("mnist.npz.gz"), &zipped).expect("a file");
        assert_eq!(sizes(&folder.path().join("mnist.npz.gz")), (3, Some(2)));
        fs::write(folder.path().join("twice"), gzip(&zipped)).expect("a file");
        assert_eq!(sizes(&folder.path().join("twice")), (3, Some(2)));
        read_error(&folder.path().join("thrice"), &gzip(&gzip(&zipped)), "gzip");
    }

    fn read_error(path: &Path, bytes: &[u8], what: &str) {
        fs::write(path, bytes).expect("a file");
        let error = read(path).expect_err("no data set").to_string();
        assert!(
            error.contains(what) && error.contains(&*path.to_string_lossy()),
            "{error}, not {what}"
        );
    }

    #[test]
    fn other_files_are_called_by_their_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let says = |name: &str, bytes: &[u8], what: &str| read_error(&folder.path().join(name), bytes, what);
        says(
            "digits.csv",
            b"label,p0,p1\n5,0,0\n",
            "a table in text (CSV), expected IDX files or an archive of NumPy arrays",
        );
        says(
            "digits.csv.gz",
            &gzip(b"label,p0,p1\n5,0,0\n"),
            "a table in text (CSV), gzipped",
        );
        says(
            "mnist.parquet",
            b"PAR1\x15\0",
            "a Parquet file, expected IDX files or",
        );
        says("mnist.pkl", b"\x80\x04\x95", "a Python pickle");
        says("x.npy", b"\x93NUMPY\x01\0", "y=labels");
        says("mnist.npz", b"<!DOCTYPE html>", "HTML");
        says(
            "mnist.npz",
            b"version https://git-lfs.github.com/spec/v1\n",
            "git lfs pull",
        );
        says("mnist.h5", b"\x89HDF\r\n\x1a\n\0", "HDF5");
        says("mnist.npz", b"", "an empty file");
        says(
            "mnist.tar.xz",
            b"\xfd7zXZ\0\0",
            "xz data, expected a data set: unpack it",
        );
        let pictures = folder.path().join("pictures");
        fs::create_dir(&pictures).expect("a folder");
        for n in 0..5 {
            fs::write(pictures.join(format!("{n}.PNG")), b"\x89PNG").expect("a file");
        }
        let error = read(&pictures).expect_err("no data set").to_string();
        assert!(
            error.contains("5 single images: 0.PNG, 1.PNG, 2.PNG, …"),
            "{error}"
        );
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let error = read(&pipe).expect_err("no file").to_string();
        assert!(error.contains("a pipe"), "{error}");
    }
}
