//! How good a model is on samples that no trainer has.

use candle_core::Result;
use lifl_common::update::Tensors;

use super::lift;
use super::network::{Network, Parameter};
use super::{Evaluation, LearnError, ModelOf, check_samples};
use crate::data::Samples;

/// Samples judged at once: enough for full-sized products, few enough to stay in the cache.
const BATCH: usize = 128;

/// A network and the samples that its models are judged on.
pub struct Evaluator {
    network: Network,
    parameters: Vec<Parameter>,
    samples: Samples,
}

impl Evaluator {
    /// Judges models of that sort on `test`.
    ///
    /// # Errors
    /// If there are no samples or they are of another shape, or the model is synthetic.
    pub fn new<'a>(model: impl Into<ModelOf<'a>>, test: Samples) -> std::result::Result<Self, LearnError> {
        let network = Network::of(model.into()).ok_or(LearnError::NothingToEvaluate)?;
        if test.is_empty() {
            return Err(LearnError::NoSamples);
        }
        check_samples(network, &test)?;
        Ok(Self {
            network,
            parameters: network.parameters(),
            samples: test,
        })
    }

    /// The mean cross-entropy and the share of samples whose greatest output is their label's.
    ///
    /// # Errors
    /// If the model is of another schema, or candle fails.
    pub fn evaluate(&self, model: Tensors<'_>) -> std::result::Result<Evaluation, LearnError> {
        let weights = lift::lift(model, &self.parameters)?;
        let (mut loss, mut right) = (0.0, 0_u64);
        for start in (0..self.samples.len()).step_by(BATCH) {
            let batch: Vec<usize> = (start..self.samples.len().min(start + BATCH)).collect();
            let (images, _) = lift::batch(&self.samples, &batch)?;
            let logits: Result<Vec<Vec<f32>>> = self.network.forward(&weights, &images, None)?.to_vec2();
            for (sample, logits) in batch.into_iter().zip(logits?) {
                let label = usize::from(self.samples.label(sample));
                loss += cross_entropy(&logits, label);
                right += u64::from(greatest(&logits) == Some(label));
            }
        }
        let samples = self.samples.len() as u64;
        Ok(Evaluation {
            loss: loss / samples as f64,
            accuracy: right as f64 / samples as f64,
            samples,
        })
    }
}

/// `-log softmax(logits)[label]`, with the greatest logit taken out first so that nothing overflows.
fn cross_entropy(logits: &[f32], label: usize) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[label] - most)
}

fn greatest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_is_that_of_the_softmax() {
        assert!((cross_entropy(&[0.0, 0.0], 1) - 2.0_f64.ln()).abs() < 1e-12);
        assert!((cross_entropy(&[1000.0, 0.0], 1) - 1000.0).abs() < 1e-9);
        assert!(cross_entropy(&[1000.0, 0.0], 0).abs() < 1e-12);
    }
}
