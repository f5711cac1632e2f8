//! How good a model is on samples that no trainer has.

use lifl_common::update::Tensors;

use super::loss::cross_entropy;
use super::model::Model;
use super::network::Network;
use super::{check_samples, weights};
use crate::data::Samples;
use crate::{Evaluation, LearnError, ModelOf};

/// Samples judged at once: enough for full-sized products, few enough to stay in the cache.
const BATCH: usize = 128;

/// A network and the samples that its models are judged on.
pub struct Evaluator {
    network: Network,
    samples: Samples,
}

impl Evaluator {
    /// Judges models of that sort on `test`.
    ///
    /// # Errors
    /// If there are no samples or they are of another shape, or the model is synthetic.
    pub fn new<'a>(model: impl Into<ModelOf<'a>>, test: Samples) -> Result<Self, LearnError> {
        let network = Network::of(model.into()).ok_or(LearnError::NothingToEvaluate)?;
        if test.is_empty() {
            return Err(LearnError::NoSamples);
        }
        check_samples(network, &test)?;
        Ok(Self {
            network,
            samples: test,
        })
    }

    /// The mean cross-entropy and the share of samples whose greatest output is their label's.
    ///
    /// # Errors
    /// If the model is of another schema.
    pub fn evaluate(&self, model: Tensors<'_>) -> Result<Evaluation, LearnError> {
        let weights = weights::read(model, &self.network.parameters())?;
        let mut model = Model::new(self.network.layers(), weights);
        let classes = self.network.samples().classes as usize;
        let (mut loss, mut right) = (0.0, 0_u64);
        for start in (0..self.samples.len()).step_by(BATCH) {
            let batch: Vec<usize> = (start..self.samples.len().min(start + BATCH)).collect();
            let logits = model.forward(&self.samples, &batch).chunks_exact(classes);
            for (sample, logits) in batch.iter().zip(logits) {
                let label = usize::from(self.samples.label(*sample));
                loss += cross_entropy(logits, label);
                right += u64::from(greatest(logits) == Some(label));
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

fn greatest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}
