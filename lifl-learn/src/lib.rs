//! What a trainer learns with: a model, its data, and the steps of one round.
//!
//! [`build`] makes the [`Learner`] that a trainer process drives, [`schema`] and [`initial`] what the coordinator
//! needs to start a job, [`Evaluator`] what judges a model. A network is a list of layers (`network`, `layers`) that a batch
//! passes forward and backward (`model`) at each step (`sgd`); a synthetic model has none (`synthetic`).

pub mod data;
mod error;
mod evaluate;
mod job;
mod layers;
mod loss;
mod model;
mod network;
mod sgd;
mod synthetic;
pub mod threads;
mod weights;

use lifl_common::config::{JobSpec, ModelSpec, SampleShape, TrainingSpec};
use lifl_common::update::{Schema, Tensors, TensorsMut};

pub use self::error::LearnError;
pub use self::evaluate::Evaluator;
pub use self::job::{Known, evaluator, for_trainer, known};
use self::network::Network;
use self::sgd::SgdLearner;
use self::synthetic::SyntheticLearner;
use crate::data::Samples;

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

/// Makes sure that a network can take these samples in.
fn check_samples(network: Network, samples: &Samples) -> Result<(), LearnError> {
    let (found, model) = (samples.shape(), network.samples());
    if found.same_image(&model) && found.classes <= model.classes {
        return Ok(());
    }
    Err(LearnError::OtherSamples { found, model })
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
    let schema = schema(model)?;
    Ok(match Network::of(model) {
        Some(network) => {
            let samples = data
                .filter(|data| !data.is_empty())
                .ok_or(LearnError::NoSamples)?;
            check_samples(network, &samples)?;
            Box::new(SgdLearner::new(network, schema, *training, samples, share, seed)?)
        }
        None => Box::new(SyntheticLearner::new(schema, share, seed)),
    })
}

/// The tensors of such a model.
///
/// # Errors
/// If it is too large, of a type that cannot be averaged, or not for so small images.
pub fn schema<'a>(model: impl Into<ModelOf<'a>>) -> Result<Schema, LearnError> {
    let model = model.into();
    match (Network::of(model), model.spec) {
        (Some(network), _) => network.schema(),
        (None, ModelSpec::Synthetic { parameters, dtype }) => synthetic::schema(*parameters, *dtype),
        (None, _) => unreachable!("every model but the synthetic one is a network"),
    }
}

/// Writes a fresh model of that sort; the same seed gives the same bytes.
///
/// # Panics
/// If `weights` is not of the model's schema.
pub fn initial<'a>(model: impl Into<ModelOf<'a>>, seed: u64, weights: TensorsMut<'_>) {
    match Network::of(model.into()) {
        Some(network) => network.initial(seed, weights),
        None => synthetic::initial(seed, weights),
    }
}

#[cfg(test)]
mod tests;
