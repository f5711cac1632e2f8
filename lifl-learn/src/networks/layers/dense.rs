//! A dense layer: `output = input · kernel + bias`.

use super::product::{Left, Right, Steps, Store, product};
use super::{Backward, Layer, Parameter, in_parts};

/// `[batch, inputs]` to `[batch, outputs]`, by a kernel `[inputs, outputs]` and a bias `[outputs]`.
pub(crate) struct Dense {
    pub(crate) kernel: &'static str,
    pub(crate) bias: &'static str,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

/// Where `count` rows of `len` begin.
fn rows(count: usize, len: usize) -> Vec<usize> {
    (0..count).map(|row| row * len).collect()
}

impl Layer for Dense {
    fn inputs(&self) -> usize {
        self.inputs
    }

    fn outputs(&self) -> usize {
        self.outputs
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![
            Parameter::new(self.kernel, [self.inputs, self.outputs]),
            Parameter::new(self.bias, [self.outputs]),
        ]
    }

    fn forward(&self, weights: &[Vec<f32>], input: &[f32], output: &mut [f32]) {
        let [kernel, bias] = weights else {
            panic!("a kernel and a bias")
        };
        let kernel = Right::new(kernel, self.outputs);
        in_parts(output, self.outputs, |first, output| {
            let samples = output.len() / self.outputs;
            for output in output.chunks_exact_mut(self.outputs) {
                output.copy_from_slice(bias);
            }
            let left = Left {
                values: &input[first * self.inputs..],
                rows: &rows(samples, self.inputs),
                runs: Steps::ONE,
                elements: Steps::neighbours(self.inputs),
            };
            product(left, &kernel, output, &rows(samples, self.outputs), Store::Add);
        });
    }

    fn backward(&self, weights: &[Vec<f32>], pass: Backward<'_>, gradients: &mut [Vec<f32>]) {
        let [kernel_gradient, bias_gradient] = gradients else {
            panic!("a kernel and a bias")
        };
        let samples = pass.input.len() / self.inputs;
        let (input, gradient) = (pass.input, pass.output_gradient);

        // kernel_gradient = inputᵀ · gradient: a row of inputᵀ is one number of every sample.
        let right = Right::new(gradient, self.outputs);
        in_parts(kernel_gradient, self.outputs, |first, out| {
            let count = out.len() / self.outputs;
            let left = Left {
                values: &input[first..],
                rows: &rows(count, 1),
                runs: Steps::ONE,
                elements: Steps {
                    count: samples,
                    step: self.inputs,
                },
            };
            product(left, &right, out, &rows(count, self.outputs), Store::Replace);
        });

        bias_gradient.fill(0.0);
        for gradient in gradient.chunks_exact(self.outputs) {
            for (sum, gradient) in bias_gradient.iter_mut().zip(gradient) {
                *sum += gradient;
            }
        }

        // input_gradient = gradient · kernelᵀ.
        if let Some(out) = pass.input_gradient {
            let kernel = Right::transposed(&weights[0], self.outputs);
            in_parts(out, self.inputs, |first, out| {
                let samples = out.len() / self.inputs;
                let left = Left {
                    values: &gradient[first * self.outputs..],
                    rows: &rows(samples, self.outputs),
                    runs: Steps::ONE,
                    elements: Steps::neighbours(self.outputs),
                };
                product(left, &kernel, out, &rows(samples, self.inputs), Store::Replace);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_is, numbers};
    use super::*;

    #[test]
    fn is_a_product_and_a_sum() {
        for (samples, inputs, outputs) in [(1, 1, 1), (3, 5, 4), (13, 9, 17), (14, 33, 10)] {
            let layer = Dense {
                kernel: "kernel",
                bias: "bias",
                inputs,
                outputs,
            };
            let weights = [numbers(inputs * outputs, 0), numbers(outputs, 1)];
            assert_is(
                &layer,
                &weights,
                &numbers(samples * inputs, 2),
                |weights, input| {
                    let mut output = Vec::new();
                    for input in input.chunks(inputs) {
                        for column in 0..outputs {
                            let products = (0..inputs).map(|i| input[i] * weights[0][i * outputs + column]);
                            output.push(products.sum::<f64>() + weights[1][column]);
                        }
                    }
                    output
                },
            );
        }
    }
}
