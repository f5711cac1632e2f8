//! Convolution without padding at stride 1: a product of the images' patches with the kernel.
//!
//! A patch is some runs of memory in its image, one for each of its rows, and is read there: patches are never copied out
//! ("im2col": Chellapilla, Puri, Simard 2006), which would write nine times the images.

use super::product::{Left, Right, Steps, Store, product};
use super::{Backward, Layer, Parameter, in_parts};

/// Images `[batch, height, width, channels]` to `[batch, height - rows + 1, width - columns + 1, outputs]`, by a kernel `[rows,
/// columns, channels, outputs]`.
pub(crate) struct Conv {
    kernel: &'static str,
    /// Rows, columns, channels, outputs.
    shape: [usize; 4],
    /// Numbers in a row of an image.
    row: usize,
    /// Numbers in an image.
    image: usize,
    /// Patches down and across an image.
    down: usize,
    across: usize,
    /// Where each patch of an image begins in it.
    patches: Vec<usize>,
    /// Where each number of a patch is from where the patch begins.
    elements: Vec<usize>,
    /// Where each patch's outputs are.
    outputs: Vec<usize>,
}

impl Conv {
    /// For images of `height` by `width` pixels. They are at least as large as the kernel, which is `[rows, columns, channels,
    /// outputs]`.
    pub(crate) fn new(kernel: &'static str, [height, width]: [usize; 2], shape: [usize; 4]) -> Self {
        let [rows, columns, channels, outputs] = shape;
        let row = width * channels;
        let (down, across) = (height + 1 - rows, width + 1 - columns);
        let patch = |i| i / across * row + i % across * channels;
        let run = columns * channels;
        Self {
            kernel,
            shape,
            row,
            image: height * row,
            down,
            across,
            patches: (0..down * across).map(patch).collect(),
            elements: (0..rows * run).map(|i| i / run * row + i % run).collect(),
            outputs: (0..down * across).map(|i| i * outputs).collect(),
        }
    }

    /// Pixels down and across that are left.
    pub(crate) fn sides(&self) -> [usize; 2] {
        [self.down, self.across]
    }
}

impl Layer for Conv {
    fn inputs(&self) -> usize {
        self.image
    }

    fn outputs(&self) -> usize {
        self.down * self.across * self.shape[3]
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![Parameter::new(self.kernel, self.shape)]
    }

    fn forward(&self, weights: &[Vec<f32>], input: &[f32], output: &mut [f32]) {
        let [rows, columns, channels, outputs] = self.shape;
        let kernel = Right::new(&weights[0], outputs);
        in_parts(output, self.outputs(), |first, output| {
            let images = input[first * self.image..].chunks_exact(self.image);
            for (image, output) in images.zip(output.chunks_exact_mut(self.outputs())) {
                let left = Left {
                    values: image,
                    rows: &self.patches,
                    runs: Steps {
                        count: rows,
                        step: self.row,
                    },
                    elements: Steps::neighbours(columns * channels),
                };
                product(left, &kernel, output, &self.outputs, Store::Replace);
            }
        });
    }

    fn backward(&self, weights: &[Vec<f32>], pass: Backward<'_>, gradients: &mut [Vec<f32>]) {
        let [_, columns, channels, outputs] = self.shape;
        let gradient = pass.output_gradient;

        // kernel_gradient = patchesᵀ · gradient: a row of patchesᵀ is one number of every patch.
        in_parts(&mut gradients[0], outputs, |first, out| {
            let count = out.len() / outputs;
            let rows: Vec<usize> = (0..count).map(|row| row * outputs).collect();
            out.fill(0.0);
            let images = pass.input.chunks_exact(self.image);
            for (image, gradient) in images.zip(gradient.chunks_exact(self.outputs())) {
                let left = Left {
                    values: image,
                    rows: &self.elements[first..first + count],
                    runs: Steps {
                        count: self.down,
                        step: self.row,
                    },
                    elements: Steps {
                        count: self.across,
                        step: channels,
                    },
                };
                product(left, &Right::new(gradient, outputs), out, &rows, Store::Add);
            }
        });

        // input_gradient: gradient · kernelᵀ is each patch's, and is added to where the patch is; row after row of the patches,
        // since each is one run of memory.
        if let Some(out) = pass.input_gradient {
            let run = columns * channels;
            let kernel_rows: Vec<Right<'_>> = weights[0]
                .chunks_exact(run * outputs)
                .map(|kernel_row| Right::transposed(kernel_row, outputs))
                .collect();
            in_parts(out, self.image, |first, out| {
                out.fill(0.0);
                let gradients = gradient[first * self.outputs()..].chunks_exact(self.outputs());
                for (image, gradient) in out.chunks_exact_mut(self.image).zip(gradients) {
                    let left = Left {
                        values: gradient,
                        rows: &self.outputs,
                        runs: Steps::ONE,
                        elements: Steps::neighbours(outputs),
                    };
                    for (kernel_row, begin) in kernel_rows.iter().zip((0..).step_by(self.row)) {
                        product(left, kernel_row, &mut image[begin..], &self.patches, Store::Add);
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_is, numbers};
    use super::*;

    #[test]
    fn is_what_it_is_called() {
        for (height, width, shape) in [
            (6, 5, [3, 2, 3, 4]),
            (3, 3, [3, 3, 1, 1]),
            (7, 8, [3, 3, 2, 17]),
            (5, 4, [1, 2, 16, 16]),
        ] {
            let [rows, columns, channels, outputs] = shape;
            let layer = Conv::new("kernel", [height, width], shape);
            assert_eq!(layer.sides(), [height - rows + 1, width - columns + 1]);
            let weights = [numbers(shape.iter().product(), 0)];
            let images = numbers(2 * height * width * channels, 1);
            assert_is(&layer, &weights, &images, |weights, images| {
                let mut output = Vec::new();
                for image in images.chunks(height * width * channels) {
                    for y in 0..=height - rows {
                        for x in 0..=width - columns {
                            for out in 0..outputs {
                                let mut sum = 0.0;
                                for (i, &weight) in weights[0].iter().enumerate() {
                                    if i % outputs == out {
                                        let i = i / outputs;
                                        let (row, column, channel) =
                                            (i / channels / columns, i / channels % columns, i % channels);
                                        sum += weight
                                            * image[((y + row) * width + x + column) * channels + channel];
                                    }
                                }
                                output.push(sum);
                            }
                        }
                    }
                }
                output
            });
        }
    }
}
