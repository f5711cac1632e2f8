//! What can be wrong with a dataset.

use std::io;
#[cfg(feature = "learn")]
use std::path::Path;
use std::path::PathBuf;

use lifl_common::config::Dataset;

/// Why there are no samples.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder that cannot be read or written.
    #[error("{path}: cannot {what}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nothing there.
    #[error(
        "{path}: no such dataset: expected an MNIST folder, an IDX images file, a .npz file, an http(s) URL or builtin:digits",
        path = path.display()
    )]
    Missing {
        /// Where.
        path: PathBuf,
    },
    /// A folder without the usual files.
    #[error(
        "{path}: no dataset in this folder, found {found}: expected train-images-idx3-ubyte and train-labels-idx1-ubyte, \
         the t10k pair, or both, plain or with .gz, or {remedy}",
        path = path.display()
    )]
    EmptyFolder {
        /// The folder.
        path: PathBuf,
        /// What is in it, shortened.
        found: String,
        /// What else would do.
        remedy: &'static str,
    },
    /// An images file whose labels are not beside it.
    #[error("{images}: its labels are not beside it: expected {labels}", images = images.display(), labels = labels.display())]
    NoLabels {
        /// The images file.
        images: PathBuf,
        /// Where labels were looked for.
        labels: PathBuf,
    },
    /// A file that is not what it should be.
    #[error("{path}: found {found}, expected {expected}", path = path.display())]
    Format {
        /// The file, and for an archive the entry in it.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
    /// Fewer samples than the job asks for.
    #[error(
        "the dataset has {have} {part} samples, the job asks for {asked}: lower lifl.{}, or leave it out to take all",
        if *part == "test" { "testSamples" } else { "trainSamples" }
    )]
    TooFew {
        /// `training` or `test`.
        part: &'static str,
        /// What the job asks for.
        asked: u64,
        /// What there is.
        have: u64,
    },
    /// More trainers than samples.
    #[error(
        "{samples} training samples cannot be divided among {trainers} trainers, of whom each needs at least one: use fewer \
         trainers, or raise lifl.trainSamples"
    )]
    TooManyTrainers {
        /// Samples to divide.
        samples: usize,
        /// Trainers to divide them among.
        trainers: u32,
    },
    /// A division that is none.
    #[error("lifl.partition: the {what} is {found}, expected {expected}")]
    Partition {
        /// Which number.
        what: &'static str,
        /// The number.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A share that no trainer has.
    #[error("share {share} of {trainers}")]
    NoSuchShare {
        /// Which was asked for.
        share: u32,
        /// How many there are.
        trainers: u32,
    },
    /// A download that failed.
    #[error(
        "cannot download {url}: check this machine's network, or download it elsewhere and name the file with --data PATH"
    )]
    Download {
        /// From where.
        url: Dataset,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A download that is no data set; it is not kept.
    #[error(
        "what {url} gave is no data set: found {found}: open the URL in a browser to see what it is, or download the data set \
         elsewhere and name the file with --data PATH"
    )]
    NoDataSet {
        /// From where.
        url: Dataset,
        /// What came.
        found: String,
    },
    /// A download that is not the file that the job names.
    #[error(
        "{url} has the SHA-256 {found}, the job expects {expected} (lifl.sha256): the file has changed, or the job is wrong"
    )]
    Checksum {
        /// From where.
        url: Dataset,
        /// The downloaded file's.
        found: String,
        /// The job's.
        expected: String,
    },
    /// A folder of downloads that cannot be written to.
    #[error("{path}: cannot {what}: {remedy}", path = path.display())]
    Cache {
        /// Which file or folder.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What helps.
        remedy: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Built without downloads.
    #[error(
        "cannot download {0}: this lifl was built without downloads: build it with the cargo feature download, or download the \
         file elsewhere and name it with --data PATH"
    )]
    NoDownloads(Dataset),
    /// Built without learning.
    #[error(
        "this lifl was built without data sets and the networks that learn from them: build it with the cargo feature learn, or \
         set lifl.model to a synthetic one"
    )]
    NotBuiltIn,
    /// No folder to download to.
    #[error("nowhere to keep downloads: set XDG_CACHE_HOME or HOME")]
    NoCache,
}

#[cfg(feature = "learn")]
impl DataError {
    /// For `map_err` on what was tried with a path.
    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, what, source }
    }

    /// For `map_err` on what was tried with the folder of downloads or a file in it.
    #[cfg(feature = "download")]
    pub(super) fn cache(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Cache {
            path,
            what,
            remedy: match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    "make room there, or set XDG_CACHE_HOME to a folder where there is some"
                }
                _ => {
                    "set XDG_CACHE_HOME to a folder that this user can write to, or download the file elsewhere and name it with \
                     --data PATH"
                }
            },
            source,
        }
    }

    /// For a file that is not what it should be.
    pub(super) fn format(path: &Path, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Format {
            path: path.to_owned(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}
