//! Minibatch gradient descent on one trainer's samples: what a round is for every network.
//!
//! All that is random is drawn here, in order, on the calling thread, from streams keyed by seed, share and round;
//! candle draws nothing. Its products give the same bits with any number of threads, because they split the result
//! and never a sum.

use candle_core::{Device, Result, Tensor, Var};
use candle_nn::loss::cross_entropy;
use lifl_common::config::TrainingSpec;
use lifl_common::update::{Schema, Tensors, TensorsMut};
use rand::RngCore;
use rand::seq::SliceRandom;

use super::lift;
use super::network::{Network, Parameter};
use super::{LearnError, Learner, Trained};
use crate::data::Samples;
use crate::random::{Stream, stream};

/// A network, a share of the data, and how to learn from it.
pub(super) struct SgdLearner {
    network: Network,
    parameters: Vec<Parameter>,
    schema: Schema,
    training: TrainingSpec,
    samples: Samples,
    share: u32,
    seed: u64,
}

impl SgdLearner {
    pub(super) fn new(
        network: Network,
        schema: Schema,
        training: TrainingSpec,
        samples: Samples,
        share: u32,
        seed: u64,
    ) -> std::result::Result<Self, LearnError> {
        if training.batch_size == 0 {
            return Err(LearnError::EmptyBatch);
        }
        Ok(Self {
            network,
            parameters: network.parameters(),
            schema,
            training,
            samples,
            share,
            seed,
        })
    }

    /// Learns for a round; gives the mean loss over all samples seen.
    fn run(&self, round: u32, vars: &[Var]) -> Result<f64> {
        let mut shuffle = stream(self.seed, Stream::Shuffle, self.share, round.into());
        let mut dropout = stream(self.seed, Stream::Dropout, self.share, round.into());
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        let weights = tensors(vars);
        let mut loss_sum = 0.0;
        for _ in 0..self.training.epochs {
            order.shuffle(&mut shuffle);
            for batch in order.chunks(self.training.batch_size as usize) {
                let mask = self
                    .network
                    .dropped()
                    .map(|n| dropout_mask(&mut dropout, batch.len(), n))
                    .transpose()?;
                let (images, labels) = lift::batch(&self.samples, batch)?;
                let logits = self.network.forward(&weights, &images, mask.as_ref())?;
                let loss = cross_entropy(&logits, &labels)?;
                self.step(vars, &loss)?;
                loss_sum += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;
            }
        }
        Ok(loss_sum / (self.samples.len() as f64 * f64::from(self.training.epochs)))
    }

    /// `w ← (1 - rate·decay)·w - rate·gradient`: plain SGD with the penalty's gradient in it (as PyTorch has it, on
    /// biases too).
    fn step(&self, weights: &[Var], loss: &Tensor) -> Result<()> {
        let rate = self.training.learning_rate;
        let keep = 1.0 - rate * self.training.weight_decay;
        let gradients = loss.backward()?;
        for weight in weights {
            if let Some(gradient) = gradients.get(weight) {
                let kept = if keep == 1.0 {
                    weight.as_tensor().clone()
                } else {
                    weight.affine(keep, 0.0)?
                };
                weight.set(&(kept - gradient.affine(rate, 0.0)?)?)?;
            }
        }
        Ok(())
    }
}

/// The variables as the tensors that they are; both see what is set.
fn tensors(vars: &[Var]) -> Vec<Tensor> {
    vars.iter().map(|var| var.as_tensor().clone()).collect()
}

/// 0 or 2 with even odds for each activation: dropout of one half that keeps the mean (Srivastava et al. 2014).
fn dropout_mask(random: &mut impl RngCore, samples: usize, activations: usize) -> Result<Tensor> {
    let mut mask = Vec::with_capacity((samples * activations).next_multiple_of(64));
    while mask.len() < samples * activations {
        let bits = random.next_u64();
        mask.extend((0..64).map(|bit| if bits >> bit & 1 == 1 { 2.0_f32 } else { 0.0 }));
    }
    mask.truncate(samples * activations);
    Tensor::from_vec(mask, (samples, activations), &Device::Cpu)
}

impl Learner for SgdLearner {
    fn schema(&self) -> &Schema {
        &self.schema
    }

    fn initial(&self, seed: u64, model: TensorsMut<'_>) {
        self.network.initial(seed, model);
    }

    fn train(
        &mut self,
        round: u32,
        model: Tensors<'_>,
        mut weights: TensorsMut<'_>,
    ) -> anyhow::Result<Trained> {
        let lifted = lift::lift(model, &self.parameters)?;
        let vars = lifted
            .iter()
            .map(Var::from_tensor)
            .collect::<Result<Vec<Var>>>()?;
        let loss = self.run(round, &vars)?;
        if !loss.is_finite() {
            let learning_rate = self.training.learning_rate;
            return Err(LearnError::Diverged {
                share: self.share,
                round,
                loss,
                learning_rate,
            }
            .into());
        }
        lift::lower(&tensors(&vars), &self.parameters, &mut weights)?;
        let bytes_copied = self.schema.data_bytes() as u64;
        Ok(Trained {
            samples: self.samples.len() as u64,
            loss: Some(loss),
            bytes_copied,
        })
    }
}
