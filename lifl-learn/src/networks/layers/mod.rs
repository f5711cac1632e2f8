//! The layers that networks are made of, each with its forward and its backward pass side by side.
//!
//! Images lie as Keras has them, `[batch, height, width, channels]`: a row of a patch is then one run of memory, and a loop over
//! channels is one over neighbours. A layer gets the numbers of a whole batch, sample after sample. Work on samples is divided
//! among the threads, and a sum never is: any number of threads gives the same bits.

mod conv;
mod dense;
mod dropout;
mod pool;
mod product;
mod relu;

use std::sync::OnceLock;

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

pub(super) use conv::Conv;
pub(super) use dense::Dense;
pub(super) use dropout::Dropout;
pub(super) use pool::MaxPoolRelu;
pub(super) use relu::Relu;

use crate::threads;

/// One tensor of a network.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) shape: Vec<usize>,
}

impl Parameter {
    pub(super) fn new(name: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name,
            shape: shape.into(),
        }
    }

    /// Its numbers.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A function of numbers and weights, and its derivative.
pub(super) trait Layer {
    /// Numbers in, for each sample.
    fn inputs(&self) -> usize;

    /// Numbers out, for each sample.
    fn outputs(&self) -> usize;

    /// The weights that it has, in the order in which the passes take them.
    fn parameters(&self) -> Vec<Parameter> {
        Vec::new()
    }

    /// Draws what the next forward pass of so many samples leaves to chance; a layer that is never told leaves nothing.
    fn draw(&mut self, _samples: usize, _random: &mut ChaCha8Rng) {}

    /// Writes `output` `[batch, outputs]` of `input` `[batch, inputs]`.
    fn forward(&self, weights: &[Vec<f32>], input: &[f32], output: &mut [f32]);

    /// Writes the loss's gradients by the weights, and by the input unless that is the network's.
    fn backward(&self, weights: &[Vec<f32>], pass: Backward<'_>, gradients: &mut [Vec<f32>]);
}

/// What a backward pass is given: the numbers of the forward pass, and where the loss's gradients by them are.
pub(super) struct Backward<'a> {
    /// `[batch, inputs]`.
    pub(super) input: &'a [f32],
    /// `[batch, outputs]`.
    pub(super) output: &'a [f32],
    /// `[batch, outputs]`.
    pub(super) output_gradient: &'a [f32],
    /// `[batch, inputs]`, to be written; `None` where nobody wants it.
    pub(super) input_gradient: Option<&'a mut [f32]>,
}

/// Threads that a layer's work is divided among.
fn threads() -> usize {
    static ALLOWED: OnceLock<usize> = OnceLock::new();
    // Asked for its number, rayon starts them; on one thread there are to be none.
    match ALLOWED.get_or_init(threads::allowed) {
        1 => 1,
        _ => rayon::current_num_threads(),
    }
}

/// Fewer numbers than these are sooner written than divided among threads.
const WORTH_DIVIDING: usize = 1 << 14;

/// Calls `work` for parts of `out`, each with the number of its first unit; a unit is `unit` numbers that stay together.
fn in_parts(out: &mut [f32], unit: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let threads = threads();
    if threads == 1 || out.len() < WORTH_DIVIDING {
        return work(0, out);
    }
    let part = (out.len() / unit).div_ceil(threads);
    out.par_chunks_mut(part * unit)
        .enumerate()
        .for_each(|(i, out)| work(i * part, out));
}

/// What the layers' tests share: a layer is held against its definition in double precision.
#[cfg(test)]
mod testing {
    use lifl_common::random::{Stream, stream};
    use rand::Rng;

    use super::{Backward, Layer};

    /// Numbers in -1 to 1, the same ones each time.
    pub(super) fn numbers(n: usize, which: u64) -> Vec<f32> {
        let mut random = stream(7, Stream::Initial, 0, which);
        (0..n).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    fn wide(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&value| value.into()).collect()
    }

    fn assert_close(found: &[f32], expected: &[f64], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(*found) - expected).abs();
            assert!(
                error < 2e-5 * expected.abs().max(1.0),
                "{what} {i}: {found} and not {expected}"
            );
        }
    }

    /// The gradient of `f` at `at`, by central differences.
    fn numeric_gradient(at: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        const STEP: f64 = 1e-5;
        let shifted = |i: usize, by: f64| {
            let mut at = at.to_vec();
            at[i] += by;
            f(&at)
        };
        (0..at.len())
            .map(|i| (shifted(i, STEP) - shifted(i, -STEP)) / (2.0 * STEP))
            .collect()
    }

    /// Asserts that the layer's output is that of `definition`, a function of weights and input, and its gradients are those of
    /// finite differences of it.
    pub(super) fn assert_is(
        layer: &dyn Layer,
        weights: &[Vec<f32>],
        input: &[f32],
        definition: impl Fn(&[Vec<f64>], &[f64]) -> Vec<f64>,
    ) {
        let samples = input.len() / layer.inputs();
        let lens: Vec<usize> = layer.parameters().iter().map(super::Parameter::len).collect();
        assert_eq!(lens, weights.iter().map(Vec::len).collect::<Vec<_>>());
        let (exact_weights, exact_input) = (weights.iter().map(|w| wide(w)).collect::<Vec<_>>(), wide(input));

        // What was in the memory before must not matter.
        let mut output = vec![f32::NAN; samples * layer.outputs()];
        layer.forward(weights, input, &mut output);
        assert_close(&output, &definition(&exact_weights, &exact_input), "output");

        // The loss is a weighted sum of the outputs.
        let output_gradient = numbers(output.len(), 99);
        let loss = |weights: &[Vec<f64>], input: &[f64]| -> f64 {
            let output = definition(weights, input);
            output
                .iter()
                .zip(&output_gradient)
                .map(|(y, &g)| y * f64::from(g))
                .sum()
        };
        let mut gradients: Vec<Vec<f32>> = weights.iter().map(|w| vec![f32::NAN; w.len()]).collect();
        let mut input_gradient = vec![f32::NAN; input.len()];
        layer.backward(
            weights,
            Backward {
                input,
                output: &output,
                output_gradient: &output_gradient,
                input_gradient: Some(&mut input_gradient),
            },
            &mut gradients,
        );
        let by_input = numeric_gradient(&exact_input, |input| loss(&exact_weights, input));
        assert_close(&input_gradient, &by_input, "gradient by the input");
        for (which, gradient) in gradients.iter().enumerate() {
            let by_weights = numeric_gradient(&exact_weights[which], |values| {
                let mut weights = exact_weights.clone();
                weights[which] = values.to_vec();
                loss(&weights, &exact_input)
            });
            assert_close(gradient, &by_weights, &format!("gradient by parameter {which}"));
        }
    }
}
