//! Dropout of one half (Srivastava et al. 2014): in training each number is 0 or twice itself with even odds, which keeps the mean.

use rand::RngCore;
use rand_chacha::ChaCha8Rng;

use super::{Backward, Layer};

/// `[batch, numbers]` to the same; outside training, unchanged.
pub(crate) struct Dropout {
    numbers: usize,
    /// What each number is multiplied by; empty outside training.
    factors: Vec<f32>,
}

impl Dropout {
    pub(crate) fn new(numbers: usize) -> Self {
        Self {
            numbers,
            factors: Vec::new(),
        }
    }

    fn multiply(&self, from: &[f32], to: &mut [f32]) {
        if self.factors.is_empty() {
            return to.copy_from_slice(from);
        }
        for (to, (from, factor)) in to.iter_mut().zip(from.iter().zip(&self.factors)) {
            *to = from * factor;
        }
    }
}

impl Layer for Dropout {
    fn inputs(&self) -> usize {
        self.numbers
    }

    fn outputs(&self) -> usize {
        self.numbers
    }

    /// Takes 64 numbers' worth of bits at a time.
    fn draw(&mut self, samples: usize, random: &mut ChaCha8Rng) {
        let drawn = samples * self.numbers;
        self.factors.clear();
        self.factors.reserve(drawn.next_multiple_of(64));
        while self.factors.len() < drawn {
            let bits = random.next_u64();
            self.factors
                .extend((0..64).map(|bit| (bits >> bit & 1) as f32 * 2.0));
        }
        self.factors.truncate(drawn);
    }

    fn forward(&self, _weights: &[Vec<f32>], input: &[f32], output: &mut [f32]) {
        self.multiply(input, output);
    }

    fn backward(&self, _weights: &[Vec<f32>], pass: Backward<'_>, _gradients: &mut [Vec<f32>]) {
        if let Some(out) = pass.input_gradient {
            self.multiply(pass.output_gradient, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::random::{Stream, stream};

    use super::super::testing::{assert_is, numbers};
    use super::*;

    #[test]
    fn leaves_out_half_and_only_in_training() {
        const SAMPLES: usize = 40;
        let mut layer = Dropout::new(50);
        let input = numbers(SAMPLES * 50, 0);
        assert_is(&layer, &[], &input, |_, input| input.to_vec());

        layer.draw(SAMPLES, &mut stream(1, Stream::Dropout, 0, 0));
        let factors = layer.factors.clone();
        assert!(factors.iter().all(|&factor| factor == 0.0 || factor == 2.0));
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        assert_is(&layer, &[], &input, |_, input| {
            input
                .iter()
                .zip(&factors)
                .map(|(x, &factor)| x * f64::from(factor))
                .collect()
        });
    }
}
