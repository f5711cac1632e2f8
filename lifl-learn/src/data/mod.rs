//! Samples to learn from: where they come from and which trainer has which.
//!
//! The coordinator calls [`prepare`] before anything starts: it downloads what has to be and reads all of it, so that
//! a dataset that is missing or cut off is an error there. A trainer process calls [`open`] and keeps its
//! [`Source::train_share`]; whoever evaluates keeps [`Source::test`].
//!
//! ```text
//! https://…      ─fetch─▶ file ─┐
//! folder, file   ───────────────┴─files─▶ idx | npz ─▶ Samples ─┐
//! builtin:digits ─digits, only what is asked for──▶ Samples ────┴─partition─▶ a trainer's
//! ```

mod array;
mod digits;
mod error;
#[cfg(feature = "download")]
mod fetch;
mod files;
#[cfg(feature = "download")]
mod http;
mod idx;
mod names;
mod npz;
mod partition;
mod progress;
mod samples;

use std::path::Path;

use lifl_common::config::{DataSource, Partition, SampleShape};

pub use self::error::DataError;
use self::files::Files;
pub use self::names::{BUILTIN_DIGITS, is_path, is_url};
pub use self::progress::Progress;
pub use self::samples::{CLASSES, PIXELS, SIDE, Samples};

/// Generated training digits when the job gives no number.
const DIGITS_TRAIN: usize = 8000;

/// Generated test digits when the job gives no number.
const DIGITS_TEST: usize = 2000;

/// Of a dataset without a test set, one sample in so many is held out when the job gives no number.
const HELD_OUT: usize = 5;

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

/// Makes sure that the job's data is there, sound and enough for so many trainers; downloads it where it has to.
///
/// # Errors
/// If it is not.
pub fn prepare(source: &DataSource, trainers: u32, progress: &Progress) -> Result<Prepared, DataError> {
    // Neither number depends on the seed.
    let opened = open_watched(source, 0, progress)?;
    partition::check(opened.partition, opened.train_len(), trainers)?;
    Ok(Prepared {
        train_samples: opened.train_len() as u64,
        test_samples: opened.test_len() as u64,
        shape: opened.shape(),
    })
}

/// Whether the data can be had without a download.
pub fn is_here(source: &DataSource) -> bool {
    #[cfg(feature = "download")]
    let is_kept = fetch::is_kept(&source.dataset);
    // Whoever asks for it is told.
    #[cfg(not(feature = "download"))]
    let is_kept = true;
    !is_url(&source.dataset) || is_kept
}

/// Opens the job's data. Generated data, and who gets which samples, come from `seed`.
///
/// # Errors
/// If there is no such data, it is not sound, or it has fewer samples than the job asks for.
pub fn open(source: &DataSource, seed: u64) -> Result<Source, DataError> {
    open_watched(source, seed, &Progress::default())
}

#[cfg_attr(
    not(feature = "download"),
    expect(unused_variables, reason = "nothing takes long but downloads")
)]
fn open_watched(source: &DataSource, seed: u64, progress: &Progress) -> Result<Source, DataError> {
    let asked = Asked {
        train: source.train_samples,
        test: source.test_samples,
    };
    let kind = if source.dataset == *BUILTIN_DIGITS {
        let number = |asked: Option<u64>, default: usize| {
            asked.map_or(default, |n| usize::try_from(n).unwrap_or(usize::MAX))
        };
        let (train, test) = (number(asked.train, DIGITS_TRAIN), number(asked.test, DIGITS_TEST));
        limit("training", asked.train, idx::MOST_SAMPLES)?;
        limit("test", asked.test, idx::MOST_SAMPLES)?;
        Kind::Digits { train, test }
    } else {
        let files = if is_url(&source.dataset) {
            #[cfg(not(feature = "download"))]
            return Err(DataError::NoDownloads(source.dataset.clone()));
            #[cfg(feature = "download")]
            fetch::read(&source.dataset, source.sha256.as_deref(), progress)?
        } else {
            files::read(Path::new(source.dataset.reveal()))?
        };
        let (train, test) = asked.of(files)?;
        Kind::Loaded { train, test }
    };
    Ok(Source {
        kind,
        partition: source.partition,
        seed,
    })
}

/// A job's data, open.
#[derive(Clone, Debug)]
pub struct Source {
    kind: Kind,
    partition: Partition,
    seed: u64,
}

#[derive(Clone, Debug)]
enum Kind {
    Digits { train: usize, test: usize },
    Loaded { train: Samples, test: Samples },
}

impl Source {
    /// Training samples of all trainers together.
    pub fn train_len(&self) -> usize {
        match &self.kind {
            Kind::Digits { train, .. } => *train,
            Kind::Loaded { train, .. } => train.len(),
        }
    }

    /// The images' shape, and how many classes the labels of training and test samples need.
    pub fn shape(&self) -> SampleShape {
        match &self.kind {
            Kind::Digits { .. } => SampleShape::default(),
            Kind::Loaded { train, test } => SampleShape {
                classes: train.shape().classes.max(test.shape().classes),
                ..train.shape()
            },
        }
    }

    /// Test samples.
    pub fn test_len(&self) -> usize {
        match &self.kind {
            Kind::Digits { test, .. } => *test,
            Kind::Loaded { test, .. } => test.len(),
        }
    }

    /// How many training samples each of so many trainers has.
    ///
    /// # Errors
    /// If the samples cannot be divided among so many.
    pub fn share_lens(&self, trainers: u32) -> Result<Vec<u64>, DataError> {
        let shares = self.shares(trainers)?;
        Ok(shares.iter().map(|share| share.len() as u64).collect())
    }

    /// Which training samples each of so many trainers has.
    fn shares(&self, trainers: u32) -> Result<Vec<Vec<usize>>, DataError> {
        let generated;
        let labels = match &self.kind {
            Kind::Digits { train, .. } => {
                generated = digits::labels(*train);
                &generated
            }
            Kind::Loaded { train, .. } => train.labels(),
        };
        partition::divide(self.partition, labels, trainers, self.seed)
    }

    /// The training samples of one of so many trainers; `share` counts from 0.
    ///
    /// # Errors
    /// If the samples cannot be divided among so many, or there is no such share.
    pub fn train_share(&self, share: u32, trainers: u32) -> Result<Samples, DataError> {
        let mut shares = self.shares(trainers)?;
        if share >= trainers {
            return Err(DataError::NoSuchShare { share, trainers });
        }
        let mine = shares.swap_remove(share as usize);
        Ok(match &self.kind {
            Kind::Digits { .. } => digits::train(self.seed, mine),
            Kind::Loaded { train, .. } => train.select(mine),
        })
    }

    /// The test samples.
    pub fn test(&self) -> Samples {
        match &self.kind {
            Kind::Digits { test, .. } => digits::test(self.seed, *test),
            Kind::Loaded { test, .. } => test.clone(),
        }
    }
}

/// How many samples the job asks for.
#[derive(Clone, Copy)]
struct Asked {
    train: Option<u64>,
    test: Option<u64>,
}

impl Asked {
    /// The training and test samples of a dataset on disk.
    fn of(self, files: Files) -> Result<(Samples, Samples), DataError> {
        match files {
            Files::Divided { train, test } => {
                let n = limit("training", self.train, train.len())?;
                let m = limit("test", self.test, test.len())?;
                Ok((train.select(0..n), test.select(0..m)))
            }
            Files::Whole(all) => {
                // Something has to be left to learn from.
                let most = all.len() - 1;
                let test = limit("test", self.test.or(Some((all.len() / HELD_OUT) as u64)), most)?;
                let first_test = all.len() - test;
                let train = limit("training", self.train, first_test)?;
                Ok((all.select(0..train), all.select(first_test..all.len())))
            }
        }
    }
}

/// What is asked for, or all, of what there is.
fn limit(part: &'static str, asked: Option<u64>, have: usize) -> Result<usize, DataError> {
    match asked {
        Some(asked) if asked > have as u64 => Err(DataError::TooFew {
            part,
            asked,
            have: have as u64,
        }),
        Some(asked) => Ok(asked as usize),
        None => Ok(have),
    }
}

#[cfg(test)]
mod tests;
