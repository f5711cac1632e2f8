//! In place of data sets, where they are not built in: whoever asks for one is told so.

#[path = "error.rs"]
mod error;
#[path = "names.rs"]
mod names;
#[path = "progress.rs"]
mod progress;
#[path = "samples.rs"]
mod samples;

use lifl_common::config::{DataSource, SampleShape};

pub use self::error::DataError;
pub use self::names::{BUILTIN_DIGITS, is_path, is_url};
pub use self::progress::Progress;
pub use self::samples::{CLASSES, PIXELS, SIDE, Samples};

/// How much a job has to learn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Training samples of all trainers together.
    pub train_samples: u64,
    /// Test samples.
    pub test_samples: u64,
    /// The images' shape, and how many classes all labels of the data set need.
    pub shape: SampleShape,
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn prepare(_source: &DataSource, _trainers: u32, _progress: &Progress) -> Result<Prepared, DataError> {
    Err(DataError::NotBuiltIn)
}

/// Whether the data can be had without a download: then it is looked at, which is refused.
pub fn is_here(_source: &DataSource) -> bool {
    true
}

/// Refuses.
///
/// # Errors
/// Always.
pub fn open(_source: &DataSource, _seed: u64) -> Result<Source, DataError> {
    Err(DataError::NotBuiltIn)
}

/// There is none.
#[derive(Clone, Debug)]
pub enum Source {}

impl Source {
    /// Cannot be called.
    ///
    /// # Errors
    /// None.
    pub fn share_lens(&self, _trainers: u32) -> Result<Vec<u64>, DataError> {
        match *self {}
    }

    /// Cannot be called.
    ///
    /// # Errors
    /// None.
    pub fn train_share(&self, _share: u32, _trainers: u32) -> Result<Samples, DataError> {
        match *self {}
    }

    /// Cannot be called.
    pub fn test(&self) -> Samples {
        match *self {}
    }
}
