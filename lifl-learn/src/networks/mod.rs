//! The networks that trainers learn, of layers with gradients of our own.
//!
//! A network is a list of layers (`network`, `layers`) that a batch passes forward and backward (`model`) at each step (`sgd`).

mod evaluate;
mod layers;
mod loss;
mod model;
mod network;
mod sgd;
mod weights;

use lifl_common::config::TrainingSpec;
use lifl_common::update::{Schema, TensorsMut};

pub use self::evaluate::Evaluator;
use self::network::Network;
use self::sgd::SgdLearner;
use crate::data::Samples;
use crate::{LearnError, Learner, ModelOf};

/// Makes sure that a network can take these samples in.
fn check_samples(network: Network, samples: &Samples) -> Result<(), LearnError> {
    let (found, model) = (samples.shape(), network.samples());
    if found.same_image(&model) && found.classes <= model.classes {
        return Ok(());
    }
    Err(LearnError::OtherSamples { found, model })
}

/// As [`build`](crate::build), of a network.
pub(crate) fn learner(
    model: ModelOf<'_>,
    training: &TrainingSpec,
    data: Option<Samples>,
    share: u32,
    seed: u64,
) -> Result<Box<dyn Learner>, LearnError> {
    let network = Network::of(model).ok_or(LearnError::NothingToEvaluate)?;
    let samples = data
        .filter(|data| !data.is_empty())
        .ok_or(LearnError::NoSamples)?;
    check_samples(network, &samples)?;
    let learner = SgdLearner::new(network, network.schema()?, *training, samples, share, seed)?;
    Ok(Box::new(learner))
}

/// As [`schema`](crate::schema), of a network.
pub(crate) fn schema(model: ModelOf<'_>) -> Result<Schema, LearnError> {
    Network::of(model).ok_or(LearnError::NothingToEvaluate)?.schema()
}

/// As [`initial`](crate::initial), of a network.
pub(crate) fn initial(model: ModelOf<'_>, seed: u64, weights: TensorsMut<'_>) {
    if let Some(network) = Network::of(model) {
        network.initial(seed, weights);
    }
}
