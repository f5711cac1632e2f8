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
use lifl_common::random::{Stream, stream};

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
        let anchors = self.anchors(&tensors(vars))?;
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
                self.step(vars, anchors.as_deref(), &loss)?;
                loss_sum += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;
            }
        }
        Ok(loss_sum / (self.samples.len() as f64 * f64::from(self.training.epochs)))
    }

    /// `rate·μ` times the round's model, which FedProx holds the weights to; `None` without it.
    fn anchors(&self, model: &[Tensor]) -> Result<Option<Vec<Tensor>>> {
        let pull = self.training.learning_rate * self.training.proximal_mu;
        if pull == 0.0 {
            return Ok(None);
        }
        // Copies: a variable's own tensor sees what is set.
        model
            .iter()
            .map(|model| model.affine(pull, 0.0))
            .collect::<Result<_>>()
            .map(Some)
    }

    /// `w ← (1 - rate·decay)·w - rate·gradient`: plain SGD with the penalty's gradient in it (as PyTorch has it, on
    /// biases too). With FedProx, less `rate·μ·(w - model)`, the gradient of `μ/2·‖w - model‖²` (Li et al. 2020,
    /// equation 2).
    fn step(&self, weights: &[Var], anchors: Option<&[Tensor]>, loss: &Tensor) -> Result<()> {
        let rate = self.training.learning_rate;
        let keep = 1.0 - rate * (self.training.weight_decay + self.training.proximal_mu);
        let gradients = loss.backward()?;
        for (i, weight) in weights.iter().enumerate() {
            if let Some(gradient) = gradients.get(weight) {
                let mut kept = if keep == 1.0 {
                    weight.as_tensor().clone()
                } else {
                    weight.affine(keep, 0.0)?
                };
                if let Some(anchors) = anchors {
                    kept = (kept + &anchors[i])?;
                }
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

#[cfg(test)]
mod tests {
    use lifl_common::config::ModelSpec;

    use super::*;

    #[test]
    fn fedprox_pulls_towards_the_rounds_model() {
        let training = TrainingSpec {
            epochs: 1,
            batch_size: 1,
            learning_rate: 0.5,
            weight_decay: 0.25,
            proximal_mu: 0.5,
        };
        let network = Network::of((&ModelSpec::Softmax).into()).expect("a network");
        let schema = network.schema().expect("a schema");
        let learner =
            SgdLearner::new(network, schema, training, Samples::default(), 0, 1).expect("a learner");
        let tensor = |values: [f64; 2]| Tensor::new(&values, &Device::Cpu).expect("a tensor");
        let weights = [Var::from_tensor(&tensor([1.0, -2.0])).expect("a variable")];
        let anchors = learner.anchors(&tensors(&weights)).expect("anchors");
        // A loss whose gradient is constant, so that every step can be told beforehand.
        let gradient = [3.0, 1.0];
        let mut expected = [1.0, -2.0];
        for _ in 0..3 {
            let loss = (weights[0].as_tensor() * tensor(gradient)).and_then(|products| products.sum_all());
            learner
                .step(&weights, anchors.as_deref(), &loss.expect("a loss"))
                .expect("a step");
            for ((w, g), model) in expected.iter_mut().zip(gradient).zip([1.0, -2.0]) {
                *w -= 0.5 * (g + 0.25 * *w + 0.5 * (*w - model));
            }
            let found: Vec<f64> = weights[0].to_vec1().expect("numbers");
            assert!(
                found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12),
                "{found:?}, {expected:?}"
            );
        }
    }
}
