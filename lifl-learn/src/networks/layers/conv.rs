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
    /// Pixels down and across an image.
    image: [usize; 2],
    /// Rows, columns, channels, outputs.
    shape: [usize; 4],
}

impl Conv {
    /// For images of `height` by `width` pixels. They are at least as large as the kernel, which is `[rows, columns, channels,
    /// outputs]`.
    pub(crate) fn new(kernel: &'static str, image: [usize; 2], shape: [usize; 4]) -> Self {
        Self { kernel, image, shape }
    }

    /// Pixels down and across that are left.
    pub(crate) fn sides(&self) -> [usize; 2] {
        let left = |side: usize, kernel: usize| (side + 1).saturating_sub(kernel);
        [
            left(self.image[0], self.shape[0]),
            left(self.image[1], self.shape[1]),
        ]
    }

    /// Numbers in a row of an image.
    fn row(&self) -> usize {
        self.image[1] * self.shape[2]
    }

    /// Numbers in a row of a patch, which are neighbours.
    fn run(&self) -> usize {
        self.shape[1] * self.shape[2]
    }

    /// Where each patch of an image begins in it.
    fn patches(&self) -> Vec<usize> {
        let [down, across] = self.sides();
        let patches = (0..down).flat_map(|y| (0..across).map(move |x| (y, x)));
        patches.map(|(y, x)| y * self.row() + x * self.shape[2]).collect()
    }

    /// Where each number of a patch is, from where the patch begins.
    fn elements(&self) -> Vec<usize> {
        let elements = (0..self.shape[0]).flat_map(|row| (0..self.run()).map(move |i| (row, i)));
        elements.map(|(row, i)| row * self.row() + i).collect()
    }

    /// Where each patch's outputs are.
    fn places(&self) -> Vec<usize> {
        (0..self.outputs()).step_by(self.shape[3]).collect()
    }
}

impl Layer for Conv {
    fn inputs(&self) -> usize {
        self.image[0] * self.row()
    }

    fn outputs(&self) -> usize {
        let [down, across] = self.sides();
        down * across * self.shape[3]
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![Parameter::new(self.kernel, self.shape)]
    }

    fn forward(&self, weights: &[Vec<f32>], input: &[f32], output: &mut [f32]) {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        let kernel = Right::new(&weights[0], self.shape[3]);
        let (patches, places) = (self.patches(), self.places());
        in_parts(output, outputs, |first, output| {
            let images = input[first * inputs..].chunks_exact(inputs);
            for (image, output) in images.zip(output.chunks_exact_mut(outputs)) {
                let left = Left {
                    values: image,
                    rows: &patches,
                    runs: Steps {
                        count: self.shape[0],
                        step: self.row(),
                    },
                    elements: Steps::neighbours(self.run()),
                };
                product(left, &kernel, output, &places, Store::Replace);
            }
        });
    }

    fn backward(&self, weights: &[Vec<f32>], pass: Backward<'_>, gradients: &mut [Vec<f32>]) {
        let [_, _, channels, columns] = self.shape;
        let (inputs, outputs, [down, across]) = (self.inputs(), self.outputs(), self.sides());
        let gradient = pass.output_gradient;

        // kernel_gradient = patchesᵀ · gradient: a row of patchesᵀ is one number of every patch.
        let elements = self.elements();
        in_parts(&mut gradients[0], columns, |first, out| {
            let rows: Vec<usize> = (0..out.len()).step_by(columns).collect();
            out.fill(0.0);
            let images = pass.input.chunks_exact(inputs);
            for (image, gradient) in images.zip(gradient.chunks_exact(outputs)) {
                let left = Left {
                    values: image,
                    rows: &elements[first..first + rows.len()],
                    runs: Steps {
                        count: down,
                        step: self.row(),
                    },
                    elements: Steps {
                        count: across,
                        step: channels,
                    },
                };
                product(left, &Right::new(gradient, columns), out, &rows, Store::Add);
            }
        });

        // input_gradient: gradient · kernelᵀ is each patch's, and is added to where the patch is; row after row of the patches,
        // since each is one run of memory.
        if let Some(out) = pass.input_gradient {
            let kernel_rows: Vec<Right<'_>> = weights[0]
                .chunks_exact(self.run() * columns)
                .map(|kernel_row| Right::transposed(kernel_row, columns))
                .collect();
            let (patches, places) = (self.patches(), self.places());
            in_parts(out, inputs, |first, out| {
                out.fill(0.0);
                let gradients = gradient[first * outputs..].chunks_exact(outputs);
                for (image, gradient) in out.chunks_exact_mut(inputs).zip(gradients) {
                    let left = Left {
                        values: gradient,
                        rows: &places,
                        runs: Steps::ONE,
                        elements: Steps::neighbours(columns),
                    };
                    for (kernel_row, begin) in kernel_rows.iter().zip((0..).step_by(self.row())) {
                        product(left, kernel_row, &mut image[begin..], &patches, Store::Add);
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
