//! What a trainer learns with: a model, its data, and the steps of one round.
//!
//! [`build`] makes the [`Learner`] that a trainer process drives, [`schema`] and [`initial`] what the coordinator
//! needs to start a job, [`Evaluator`] what judges a model. Networks and data sets are the cargo feature `learn`, data sets
//! from URLs the feature `download`; a synthetic model (`synthetic`) is always there.

#[cfg(not(feature = "learn"))]
#[path = "absent.rs"]
mod networks;
#[cfg(feature = "learn")]
mod networks;

#[cfg(feature = "learn")]
pub mod data;
#[cfg(not(feature = "learn"))]
#[path = "data/absent.rs"]
pub mod data;
mod error;
mod job;
mod synthetic;
pub mod threads;

use lifl_common::config::{JobSpec, ModelSpec, SampleShape, TrainingSpec};
use lifl_common::update::{Schema, Tensors, TensorsMut};

pub use self::error::LearnError;
pub use self::job::{Known, evaluator, for_trainer, known};
pub use self::networks::Evaluator;
use self::synthetic::SyntheticLearner;
use crate::data::Samples;

/// Pixels down and across the smallest images that leave the convolution network anything after its second pooling.
const CNN_LEAST: u32 = 10;

/// What a trainer did in one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trained {
    /// Samples trained on: the update's weight.
    pub samples: u64,
    /// Mean training loss over them; `None` when there is no such thing.
    pub loss: Option<f64>,
    /// Bytes of the model that were copied out of shared memory to train on.
    pub bytes_copied: u64,
}

/// How good a model is on the test set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean loss.
    pub loss: f64,
    /// Share of samples classified right, 0 to 1.
    pub accuracy: f64,
    /// Samples in the test set.
    pub samples: u64,
}

/// One trainer's model and data.
pub trait Learner: Send {
    /// The model's tensors.
    fn schema(&self) -> &Schema;

    /// Writes the job's first model; the same seed gives the same bytes.
    fn initial(&self, seed: u64, model: TensorsMut<'_>);

    /// Trains from `model` on this trainer's data and writes the new weights to `weights`.
    ///
    /// The same seed, share, round, model and data give the same bytes, with any number of threads.
    ///
    /// # Errors
    /// If the model is of another schema, or the loss stops being a number.
    fn train(&mut self, round: u32, model: Tensors<'_>, weights: TensorsMut<'_>) -> anyhow::Result<Trained>;
}

/// A model and what it takes in and gives out: [28 × 28 grey pixels and ten classes](SampleShape::default), if only the model
/// is given.
#[derive(Clone, Copy, Debug)]
pub struct ModelOf<'a> {
    spec: &'a ModelSpec,
    #[cfg_attr(not(feature = "learn"), expect(dead_code, reason = "of networks only"))]
    samples: SampleShape,
}

impl<'a> From<&'a ModelSpec> for ModelOf<'a> {
    fn from(spec: &'a ModelSpec) -> Self {
        Self {
            spec,
            samples: SampleShape::default(),
        }
    }
}

impl<'a> From<&'a JobSpec> for ModelOf<'a> {
    fn from(job: &'a JobSpec) -> Self {
        Self {
            spec: &job.model,
            samples: job.samples,
        }
    }
}

/// The learner of the trainer whose share of the data is `share`, which holds `data`.
///
/// # Errors
/// If a network is given no data, data of another shape or steps of no samples, or the model has no schema.
pub fn build<'a>(
    model: impl Into<ModelOf<'a>>,
    training: &TrainingSpec,
    data: Option<Samples>,
    share: u32,
    seed: u64,
) -> Result<Box<dyn Learner>, LearnError> {
    let model = model.into();
    match model.spec {
        ModelSpec::Synthetic { .. } => Ok(Box::new(SyntheticLearner::new(schema(model)?, share, seed))),
        _ => networks::learner(model, training, data, share, seed),
    }
}

/// The tensors of such a model.
///
/// # Errors
/// If it is too large, of a type that cannot be averaged, or not for so small images.
pub fn schema<'a>(model: impl Into<ModelOf<'a>>) -> Result<Schema, LearnError> {
    let model = model.into();
    match model.spec {
        ModelSpec::Synthetic { parameters, dtype } => synthetic::schema(*parameters, *dtype),
        _ => networks::schema(model),
    }
}

/// Writes a fresh model of that sort; the same seed gives the same bytes.
///
/// # Panics
/// If `weights` is not of the model's schema.
pub fn initial<'a>(model: impl Into<ModelOf<'a>>, seed: u64, weights: TensorsMut<'_>) {
    let model = model.into();
    match model.spec {
        ModelSpec::Synthetic { .. } => synthetic::initial(seed, weights),
        _ => networks::initial(model, seed, weights),
    }
}

#[cfg(all(test, feature = "learn"))]
mod tests;
