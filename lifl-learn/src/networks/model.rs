//! A network at work: its layers, their weights, and what one batch leaves between them.
//!
//! ```text
//!   images ──layer 0──▶ activations 1 ──layer 1──▶ … ──▶ logits        forward
//!            gradients 1 ◀──layer 1── … ◀── gradient by the logits     backward
//! ```

use rand_chacha::ChaCha8Rng;

use super::layers::{Backward, Layer, Parameter};
use super::loss;
use crate::data::Samples;

/// The memory of the last batch is kept for the next.
pub(super) struct Model {
    layers: Vec<Box<dyn Layer>>,
    /// The weights of all layers, one after the other.
    pub(super) weights: Vec<Vec<f32>>,
    /// The loss's gradients by them, of the last [`backward`](Self::backward); empty until there was one, for who only
    /// evaluates.
    pub(super) gradients: Vec<Vec<f32>>,
    /// What each layer was given, and the logits at the end.
    activations: Vec<Vec<f32>>,
    /// The loss's gradients by these; none by the images, for nobody asks how those should have been.
    activation_gradients: Vec<Vec<f32>>,
}

impl Model {
    /// The layers with weights of the sizes that they ask for.
    pub(super) fn new(layers: Vec<Box<dyn Layer>>, weights: Vec<Vec<f32>>) -> Self {
        let buffers = || vec![Vec::new(); layers.len() + 1];
        Self {
            gradients: vec![Vec::new(); weights.len()],
            activations: buffers(),
            activation_gradients: buffers(),
            weights,
            layers,
        }
    }

    /// The tensors that such layers have, in the order of the weights.
    pub(super) fn parameters(layers: &[Box<dyn Layer>]) -> Vec<Parameter> {
        layers.iter().flat_map(|layer| layer.parameters()).collect()
    }

    /// Draws what the next forward pass, of so many samples, leaves to chance.
    pub(super) fn draw(&mut self, samples: usize, random: &mut ChaCha8Rng) {
        for layer in &mut self.layers {
            layer.draw(samples, random);
        }
    }

    /// The logits `[batch, classes]` of those samples. Pixels go from 0 for black to 1 for white.
    ///
    /// # Panics
    /// If there is no such sample.
    pub(super) fn forward(&mut self, samples: &Samples, batch: &[usize]) -> &[f32] {
        let images = &mut self.activations[0];
        images.clear();
        for &sample in batch {
            let pixels = samples.image(sample).iter();
            images.extend(pixels.map(|&pixel| f32::from(pixel) * (1.0 / 255.0)));
        }
        let mut weights = self.weights.as_slice();
        for (i, layer) in self.layers.iter().enumerate() {
            let (given, made) = self.activations.split_at_mut(i + 1);
            let own = weights.split_off(..layer.parameters().len()).unwrap_or_default();
            made[0].resize(batch.len() * layer.outputs(), 0.0);
            layer.forward(own, &given[i], &mut made[0]);
        }
        &self.activations[self.layers.len()]
    }

    /// After [`forward`](Self::forward) of the same batch: makes the gradients of the mean loss, and gives that.
    pub(super) fn backward(&mut self, samples: &Samples, batch: &[usize]) -> f64 {
        let (layers, logits) = (self.layers.len(), &self.activations[self.layers.len()]);
        self.activation_gradients[layers].resize(logits.len(), 0.0);
        let loss = loss::mean_cross_entropy(
            logits,
            batch.iter().map(|&sample| usize::from(samples.label(sample))),
            logits.len() / batch.len(),
            &mut self.activation_gradients[layers],
        );
        let (mut weights, mut gradients) = (self.weights.as_slice(), self.gradients.as_mut_slice());
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let others = weights.len() - layer.parameters().len();
            let own = weights.split_off(others..).unwrap_or_default();
            let own_gradients = gradients.split_off_mut(others..).unwrap_or_default();
            for (gradients, weights) in own_gradients.iter_mut().zip(own) {
                gradients.resize(weights.len(), 0.0);
            }
            let (below, above) = self.activation_gradients.split_at_mut(i + 1);
            let below = (i > 0).then(|| {
                below[i].resize(self.activations[i].len(), 0.0);
                below[i].as_mut_slice()
            });
            let pass = Backward {
                input: &self.activations[i],
                output: &self.activations[i + 1],
                output_gradient: &above[0],
                input_gradient: below,
            };
            layer.backward(own, pass, own_gradients);
        }
        loss
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::config::{ModelSpec, SampleShape};
    use lifl_common::random::{Stream, stream};
    use rand::Rng;

    use super::super::network::Network;
    use super::*;
    use crate::{ModelOf, data};

    /// The whole chain: a step against the gradient makes the loss less by its length, squared.
    #[test]
    fn the_loss_falls_along_the_gradient() {
        let shape = SampleShape {
            height: 12,
            width: 11,
            channels: 2,
            classes: 10,
        };
        let mut random = stream(5, Stream::TrainDigit, 0, 0);
        let pixels = (0..6 * shape.pixels()).map(|_| random.random()).collect();
        let samples = data::Samples::new(shape, pixels, vec![0, 3, 9, 3, 1, 5]);
        let batch = [0, 1, 2, 3, 4, 5];
        for spec in [ModelSpec::Softmax, ModelSpec::Mlp { hidden: 7 }, ModelSpec::Cnn] {
            let network = Network::of(ModelOf {
                spec: &spec,
                samples: shape,
            })
            .expect("a network");
            let parameters = network.parameters();
            let weights = parameters.iter().map(|parameter| {
                let bound = 0.5 / (parameter.shape[0] as f32).sqrt();
                (0..parameter.len())
                    .map(|_| random.random_range(-bound..bound))
                    .collect()
            });
            let mut model = Model::new(network.layers(), weights.collect());
            model.forward(&samples, &batch);
            model.backward(&samples, &batch);
            let (weights, gradients) = (model.weights.clone(), model.gradients.clone());
            // Each tensor alone, so that none hides behind another.
            for (which, gradient) in gradients.iter().enumerate() {
                let squared: f64 = gradient.iter().map(|&g| f64::from(g).powi(2)).sum();
                assert!(squared > 0.0, "{spec:?}: parameter {which} has no gradient");
                let step = 1e-3 / squared.sqrt();
                let mut loss_at = |by: f64| {
                    model.weights.clone_from(&weights);
                    for (weight, &gradient) in model.weights[which].iter_mut().zip(gradient) {
                        *weight += (by * f64::from(gradient)) as f32;
                    }
                    model.forward(&samples, &batch);
                    model.backward(&samples, &batch)
                };
                let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
                assert!(
                    (slope / squared - 1.0).abs() < 0.02,
                    "{spec:?}, parameter {which}: {slope} and not {squared}"
                );
            }
        }
    }
}
