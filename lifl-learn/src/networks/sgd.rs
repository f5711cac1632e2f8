//! Minibatch gradient descent on one trainer's samples: what a round is for every network.
//!
//! All that is random is drawn here, in order, on the calling thread, from streams keyed by seed, share and round.

use lifl_common::config::TrainingSpec;
use lifl_common::update::{Schema, Tensors, TensorsMut};
use rand::seq::SliceRandom;

use super::model::Model;
use super::network::Network;
use super::weights;
use crate::data::Samples;
use crate::{LearnError, Learner, Trained};
use lifl_common::random::{Stream, stream};

/// A network, a share of the data, and how to learn from it.
pub(super) struct SgdLearner {
    network: Network,
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
    ) -> Result<Self, LearnError> {
        if training.batch_size == 0 {
            return Err(LearnError::EmptyBatch);
        }
        Ok(Self {
            network,
            schema,
            training,
            samples,
            share,
            seed,
        })
    }

    /// Learns for a round; gives the mean loss over all samples seen.
    fn run(&self, round: u32, model: &mut Model) -> f64 {
        let anchors = self.anchors(&model.weights);
        let mut shuffle = stream(self.seed, Stream::Shuffle, self.share, round.into());
        let mut dropout = stream(self.seed, Stream::Dropout, self.share, round.into());
        let mut order: Vec<usize> = (0..self.samples.len()).collect();
        let mut loss_sum = 0.0;
        for _ in 0..self.training.epochs {
            order.shuffle(&mut shuffle);
            for batch in order.chunks(self.training.batch_size as usize) {
                model.draw(batch.len(), &mut dropout);
                model.forward(&self.samples, batch);
                loss_sum += model.backward(&self.samples, batch) * batch.len() as f64;
                self.step(&mut model.weights, &model.gradients, anchors.as_deref());
            }
        }
        loss_sum / (self.samples.len() as f64 * f64::from(self.training.epochs))
    }

    /// `rate·μ` times the round's model, which FedProx holds the weights to; `None` without it.
    fn anchors(&self, model: &[Vec<f32>]) -> Option<Vec<Vec<f32>>> {
        let pull = (self.training.learning_rate * self.training.proximal_mu) as f32;
        let anchor = |tensor: &Vec<f32>| tensor.iter().map(|weight| pull * weight).collect();
        (pull != 0.0).then(|| model.iter().map(anchor).collect())
    }

    /// `w ← (1 - rate·decay)·w - rate·gradient`: plain SGD with the penalty's gradient in it (as PyTorch has it, on
    /// biases too). With FedProx, less `rate·μ·(w - model)`, the gradient of `μ/2·‖w - model‖²` (Li et al. 2020,
    /// equation 2).
    fn step(&self, weights: &mut [Vec<f32>], gradients: &[Vec<f32>], anchors: Option<&[Vec<f32>]>) {
        let rate = self.training.learning_rate;
        let keep = (1.0 - rate * (self.training.weight_decay + self.training.proximal_mu)) as f32;
        let rate = rate as f32;
        for (i, (weights, gradients)) in weights.iter_mut().zip(gradients).enumerate() {
            let steps = weights.iter_mut().zip(gradients);
            match anchors {
                None => steps.for_each(|(weight, gradient)| *weight = keep * *weight - rate * gradient),
                Some(anchors) => steps.zip(&anchors[i]).for_each(|((weight, gradient), anchor)| {
                    *weight = keep * *weight + anchor - rate * gradient;
                }),
            }
        }
    }
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
        mut trained: TensorsMut<'_>,
    ) -> anyhow::Result<Trained> {
        let parameters = self.network.parameters();
        let mut model = Model::new(self.network.layers(), weights::read(model, &parameters)?);
        let loss = self.run(round, &mut model);
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
        weights::write(&model.weights, &parameters, &mut trained)?;
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
        let model = [1.0, -2.0];
        let mut weights = [model.to_vec()];
        let anchors = learner.anchors(&weights);
        // The gradient is constant, so that every step can be told beforehand.
        let gradient = [3.0, 1.0];
        let mut expected = model;
        for _ in 0..3 {
            learner.step(&mut weights, &[gradient.to_vec()], anchors.as_deref());
            for ((w, g), model) in expected.iter_mut().zip(gradient).zip(model) {
                *w -= 0.5 * (g + 0.25 * *w + 0.5 * (*w - model));
            }
            assert!(
                weights[0].iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6),
                "{weights:?}, {expected:?}"
            );
        }
    }
}
