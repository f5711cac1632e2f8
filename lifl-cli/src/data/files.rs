//! Finds what a path means: a folder of IDX files, one pair of them, or an `.npz`.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::error::DataError;
use super::samples::Samples;
use super::{idx, npz};

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
    let Ok(metadata) = fs::metadata(path) else {
        return Err(DataError::Missing {
            path: path.to_owned(),
        });
    };
    if metadata.is_dir() {
        return read_folder(path);
    }
    let mut start = Vec::new();
    let file = File::open(path).map_err(DataError::io(path, "open it"))?;
    file.take(2)
        .read_to_end(&mut start)
        .map_err(DataError::io(path, "read it"))?;
    if start == b"PK" || path.extension().is_some_and(|extension| extension == "npz") {
        let (train, test) = npz::read(path)?;
        return Ok(Files::Divided { train, test });
    }
    let labels = labels_beside(path)?;
    Ok(Files::Whole(idx::read_pair(path, &labels)?))
}

fn read_folder(folder: &Path) -> Result<Files, DataError> {
    let images = |stem: &str| {
        let names = [
            "images-idx3-ubyte",
            "images-idx3-ubyte.gz",
            "images.idx3-ubyte",
            "images.idx3-ubyte.gz",
        ];
        names
            .into_iter()
            .map(|name| folder.join(format!("{stem}-{name}")))
            .find(|path| path.is_file())
    };
    let pair = |images: PathBuf| idx::read_pair(&images, &labels_beside(&images)?);
    match (images("train"), images("t10k")) {
        (Some(train), Some(test)) => Ok(Files::Divided {
            train: pair(train)?,
            test: pair(test)?,
        }),
        (Some(only), None) | (None, Some(only)) => Ok(Files::Whole(pair(only)?)),
        (None, None) => Err(DataError::EmptyFolder {
            path: folder.to_owned(),
        }),
    }
}

/// The labels file of an images file: the same name with `labels` for `images` and `idx1` for `idx3`, zipped or not.
fn labels_beside(images: &Path) -> Result<PathBuf, DataError> {
    let name = images.file_name().unwrap_or_default().to_string_lossy();
    let labels = name.replace("images", "labels").replace("idx3", "idx1");
    let expected = images.with_file_name(&labels);
    let other = match labels.strip_suffix(".gz") {
        Some(plain) => images.with_file_name(plain),
        None => images.with_file_name(format!("{labels}.gz")),
    };
    // A file without `images` in its name would be its own labels.
    let found = [&expected, &other]
        .into_iter()
        .find(|path| labels != name && path.is_file())
        .cloned();
    found.ok_or_else(|| DataError::NoLabels {
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
}
