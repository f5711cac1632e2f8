//! What can be wrong with a learner before it trains.

use lifl_common::config::SampleShape;
use lifl_common::update::{DType, SchemaError};

/// Why there is no learner or evaluator for a model.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// A network without data.
    #[error("the model learns from samples and was given none")]
    NoSamples,
    /// A model that has nothing to be tested on.
    #[error("a synthetic model has no samples, so it cannot be evaluated")]
    NothingToEvaluate,
    /// Images that two convolutions and poolings leave nothing of.
    #[error(
        "images of {0} pixels are too small for the model cnn, which needs {least} × {least}: set lifl.model to mlp or softmax",
        least = crate::CNN_LEAST
    )]
    SmallImages(SampleShape),
    /// Samples of another shape or of more classes than the job's model is for.
    #[error(
        "the samples are of {found} pixels and {} classes, the job's model is for {model} pixels and {} classes: the data set has \
         changed since the job began",
        found.classes,
        model.classes
    )]
    OtherSamples {
        /// The samples'.
        found: SampleShape,
        /// The model's.
        model: SampleShape,
    },
    /// Steps of no samples.
    #[error("batchSize is 0, expected at least 1")]
    EmptyBatch,
    /// A synthetic model of integers.
    #[error("a synthetic model of {0}: expected F32, F64, F16 or BF16")]
    NotFloat(DType),
    /// The tensors do not make a model.
    #[error("the model cannot be laid out")]
    Schema(#[from] SchemaError),
    /// The system refuses the threads that learners compute on.
    #[error("no thread to compute on can be made ({why}): {limit}")]
    Threads {
        /// The system's answer.
        why: String,
        /// The limit, and how to raise it.
        limit: String,
    },
    /// A model, or the memory for one, that lacks a tensor or has it in another size.
    #[error("the model has no 32-bit tensor {0} of the size that the job's model has: it is of another job")]
    OtherModel(&'static str),
    /// Built without learning.
    #[error(
        "this lifl was built without the network {0}: build it with the cargo feature learn, or set lifl.model to a synthetic one"
    )]
    NotBuiltIn(&'static str),
    /// Training went to infinity.
    #[error(
        "the training loss of share {share} in round {round} is {loss}: a lower learningRate than {learning_rate:?} may help"
    )]
    Diverged {
        /// The trainer's share.
        share: u32,
        /// The round.
        round: u32,
        /// The loss.
        loss: f64,
        /// What it was trained with.
        learning_rate: f64,
    },
}
