//! The rectifier: `output = max(input, 0)`.

use super::{Backward, Layer};

/// `[batch, numbers]` to the same.
pub(crate) struct Relu {
    pub(crate) numbers: usize,
}

impl Layer for Relu {
    fn inputs(&self) -> usize {
        self.numbers
    }

    fn outputs(&self) -> usize {
        self.numbers
    }

    fn forward(&self, _weights: &[Vec<f32>], input: &[f32], output: &mut [f32]) {
        for (output, input) in output.iter_mut().zip(input) {
            *output = if *input > 0.0 { *input } else { 0.0 };
        }
    }

    fn backward(&self, _weights: &[Vec<f32>], pass: Backward<'_>, _gradients: &mut [Vec<f32>]) {
        let Some(out) = pass.input_gradient else { return };
        let outputs = pass.output.iter().zip(pass.output_gradient);
        for (out, (output, gradient)) in out.iter_mut().zip(outputs) {
            *out = if *output > 0.0 { *gradient } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_is, numbers};
    use super::*;

    #[test]
    fn lets_through_what_is_positive() {
        let layer = Relu { numbers: 5 };
        assert_is(&layer, &[], &numbers(15, 0), |_, input| {
            input.iter().map(|x| x.max(0.0)).collect()
        });
    }
}
