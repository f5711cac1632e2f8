//! What a trainer learns with: a model, its data, and the steps of one round.

use lifl_common::update::{Schema, Tensors, TensorsMut};

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
    /// # Errors
    /// If the arithmetic library fails.
    fn train(&mut self, round: u32, model: Tensors<'_>, weights: TensorsMut<'_>) -> anyhow::Result<Trained>;
}
