//! 2×2 max-pooling, bias and ReLU in one pass.
//!
//! Keras' order is bias, ReLU, pooling. A bias is the same for all four values and ReLU never falls, so the maximum
//! may be taken first: the result is the same, and so is the gradient, at a quarter of the additions. Where several
//! of the four are greatest the first one has the gradient, as in cuDNN.

use pulp::{Arch, NullaryFnOnce};

use super::{Layer, Parameter, in_parts};

/// `relu(max over each 2×2 window + bias)`: images `[batch, height, width, channels]` to `[batch, height / 2, width / 2,
/// channels]`, by a bias `[channels]`. An odd last row or column is left out, as Keras does.
#[derive(Clone, Copy)]
pub(crate) struct MaxPoolRelu {
    pub(crate) bias: &'static str,
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
}

impl MaxPoolRelu {
    /// Numbers in a row of an image.
    fn row(self) -> usize {
        self.width * self.channels
    }

    /// Numbers in a row of a pooled image.
    fn pooled_row(self) -> usize {
        self.width / 2 * self.channels
    }
}

impl Layer for MaxPoolRelu {
    fn inputs(&self) -> usize {
        self.height * self.row()
    }

    fn outputs(&self) -> usize {
        self.height / 2 * self.pooled_row()
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![Parameter::new(self.bias, [self.channels])]
    }

    fn forward(&self, weights: &[Vec<f32>], images: &[f32], output: &mut [f32]) {
        in_parts(output, self.outputs(), |first, pooled| {
            Arch::new().dispatch(Forward {
                pool: *self,
                images: &images[first * self.inputs()..],
                bias: &weights[0],
                pooled,
            });
        });
    }

    fn backward(&self, _weights: &[Vec<f32>], pass: super::Backward<'_>, gradients: &mut [Vec<f32>]) {
        let (pooled, gradient) = (pass.output, pass.output_gradient);
        Arch::new().dispatch(BiasGradient {
            pooled,
            gradient,
            sums: &mut gradients[0],
        });
        if let Some(out) = pass.input_gradient {
            in_parts(out, self.inputs(), |first, out| {
                Arch::new().dispatch(Backward {
                    pool: *self,
                    images: &pass.input[first * self.inputs()..],
                    pooled: &pooled[first * self.outputs()..],
                    gradient: &gradient[first * self.outputs()..],
                    out,
                });
            });
        }
    }
}

/// The forward pass, compiled for each vector width that the machine may have.
struct Forward<'a> {
    pool: MaxPoolRelu,
    images: &'a [f32],
    bias: &'a [f32],
    pooled: &'a mut [f32],
}

impl NullaryFnOnce for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            pool,
            images,
            bias,
            pooled,
        } = self;
        for (pooled, image) in pooled
            .chunks_exact_mut(pool.outputs())
            .zip(images.chunks_exact(pool.inputs()))
        {
            let rows = pooled.chunks_exact_mut(pool.pooled_row());
            for (pooled, pair) in rows.zip(image.chunks_exact(2 * pool.row())) {
                forward_row(pool, pooled, pair, bias);
            }
        }
    }
}

/// Pools two rows of an image into one.
#[inline(always)]
fn forward_row(pool: MaxPoolRelu, pooled: &mut [f32], pair: &[f32], bias: &[f32]) {
    let c = pool.channels;
    let (above, under) = pair.split_at(pool.row());
    let windows = above.chunks_exact(2 * c).zip(under.chunks_exact(2 * c));
    for (pixel, (above, under)) in pooled.chunks_exact_mut(c).zip(windows) {
        let ([a, b], [d, e]) = (halves(above, c), halves(under, c));
        let bias = &bias[..c];
        for i in 0..c {
            let most = greatest(a[i], b[i], d[i], e[i]) + bias[i];
            pixel[i] = if most > 0.0 { most } else { 0.0 };
        }
    }
}

/// The left and the right pixel of two.
#[inline(always)]
fn halves(two: &[f32], channels: usize) -> [&[f32]; 2] {
    [&two[..channels], &two[channels..][..channels]]
}

/// The gradient by the images, from that by the pooled pixels where ReLU let them through.
struct Backward<'a> {
    pool: MaxPoolRelu,
    images: &'a [f32],
    pooled: &'a [f32],
    gradient: &'a [f32],
    out: &'a mut [f32],
}

impl NullaryFnOnce for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            pool,
            images,
            pooled,
            gradient,
            out,
        } = self;
        if pool.height % 2 + pool.width % 2 > 0 {
            // What was left out has none.
            out.fill(0.0);
        }
        let outs = out
            .chunks_exact_mut(pool.inputs())
            .zip(images.chunks_exact(pool.inputs()));
        let pixels = pooled
            .chunks_exact(pool.outputs())
            .zip(gradient.chunks_exact(pool.outputs()));
        for ((out, image), (pooled, gradient)) in outs.zip(pixels) {
            let outs = out
                .chunks_exact_mut(2 * pool.row())
                .zip(image.chunks_exact(2 * pool.row()));
            let pixels = pooled
                .chunks_exact(pool.pooled_row())
                .zip(gradient.chunks_exact(pool.pooled_row()));
            for ((out, pair), (pooled, gradient)) in outs.zip(pixels) {
                backward_row(pool, out, pair, pooled, gradient);
            }
        }
    }
}

/// The gradient of two rows of an image from that of the row that they were pooled into.
#[inline(always)]
fn backward_row(pool: MaxPoolRelu, out: &mut [f32], pair: &[f32], pooled: &[f32], gradient: &[f32]) {
    let c = pool.channels;
    let (above, under) = pair.split_at(pool.row());
    let (out_above, out_under) = out.split_at_mut(pool.row());
    let windows = above.chunks_exact(2 * c).zip(under.chunks_exact(2 * c));
    let outs = out_above
        .chunks_exact_mut(2 * c)
        .zip(out_under.chunks_exact_mut(2 * c));
    let pixels = pooled.chunks_exact(c).zip(gradient.chunks_exact(c));
    for (((above, under), (out_above, out_under)), (pixel, gradient)) in windows.zip(outs).zip(pixels) {
        let window = [halves(above, c), halves(under, c)];
        let (to_a, to_b) = out_above.split_at_mut(c);
        let (to_d, to_e) = out_under.split_at_mut(c);
        let mut outs = [to_a, to_b, to_d, to_e];
        let whole = c - c % LANES;
        for i in (0..whole).step_by(LANES) {
            backward_lanes::<LANES>(&mut outs, window, pixel, gradient, i);
        }
        for i in whole..c {
            backward_lanes::<1>(&mut outs, window, pixel, gradient, i);
        }
    }
}

/// Channels whose gradients are worked out at once.
const LANES: usize = 16;

/// The gradients of `N` channels of a window, from the `i`-th on: loaded, worked out, stored, so that the compiler
/// need not know that nothing overlaps.
#[inline(always)]
fn backward_lanes<const N: usize>(
    outs: &mut [&mut [f32]; 4],
    [[a, b], [d, e]]: [[&[f32]; 2]; 2],
    pixel: &[f32],
    gradient: &[f32],
    i: usize,
) {
    let lanes = |from: &[f32]| -> [f32; N] { std::array::from_fn(|lane| from[i..i + N][lane]) };
    let (a, b, d, e) = (lanes(a), lanes(b), lanes(d), lanes(e));
    let (pixel, gradient) = (lanes(pixel), lanes(gradient));
    let mut results = [[0.0; N]; 4];
    for lane in 0..N {
        let most = greatest(a[lane], b[lane], d[lane], e[lane]);
        // What is left after each of the four has had its chance.
        let mut left = if pixel[lane] > 0.0 { gradient[lane] } else { 0.0 };
        for (result, value) in results.iter_mut().zip([a[lane], b[lane], d[lane], e[lane]]) {
            result[lane] = if value == most { left } else { 0.0 };
            left = if value == most { 0.0 } else { left };
        }
    }
    for (out, result) in outs.iter_mut().zip(&results) {
        out[i..i + N].copy_from_slice(result);
    }
}

/// A comparison for each, unlike `f32::max`, which also looks for NaN: these become one instruction each.
#[inline(always)]
fn greatest(a: f32, b: f32, c: f32, d: f32) -> f32 {
    let ab = if a > b { a } else { b };
    let cd = if c > d { c } else { d };
    if ab > cd { ab } else { cd }
}

/// The gradient by the bias: the sum over all pixels that ReLU let through.
struct BiasGradient<'a> {
    pooled: &'a [f32],
    gradient: &'a [f32],
    sums: &'a mut [f32],
}

impl NullaryFnOnce for BiasGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self {
            pooled,
            gradient,
            sums,
        } = self;
        sums.fill(0.0);
        let pixels = pooled.chunks_exact(sums.len());
        for (pixel, gradient) in pixels.zip(gradient.chunks_exact(sums.len())) {
            for ((sum, pixel), gradient) in sums.iter_mut().zip(pixel).zip(gradient) {
                *sum += if *pixel > 0.0 { *gradient } else { 0.0 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::assert_is;
    use super::*;

    #[test]
    fn is_bias_then_relu_then_pooling() {
        for (height, width, channels) in [(4, 4, 2), (5, 6, 3), (3, 2, 17)] {
            let layer = MaxPoolRelu {
                bias: "bias",
                height,
                width,
                channels,
            };
            // Values far enough apart that a step of the differences changes no maximum and crosses no zero.
            let numbers = 2 * height * width * channels;
            let images: Vec<f32> = (0..numbers)
                .map(|i| (i * 37 % 257) as f32 / 64.0 - 2.004)
                .collect();
            let bias = (0..channels).map(|c| -(c as f32) / 16.0).collect();
            assert_is(&layer, &[bias], &images, |weights, images| {
                let mut output = Vec::new();
                for image in images.chunks(height * width * channels) {
                    for (y, x) in (0..height / 2).flat_map(|y| (0..width / 2).map(move |x| (y, x))) {
                        for c in 0..channels {
                            let window = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(down, right)| {
                                let pixel = (2 * y + down) * width + 2 * x + right;
                                (image[pixel * channels + c] + weights[0][c]).max(0.0)
                            });
                            output.push(window.into_iter().fold(0.0, f64::max));
                        }
                    }
                }
                output
            });
        }
    }

    #[test]
    fn one_of_equal_values_has_the_gradient() {
        let layer = MaxPoolRelu {
            bias: "bias",
            height: 2,
            width: 2,
            channels: 1,
        };
        let mut gradient = [f32::NAN; 4];
        let pass = super::super::Backward {
            input: &[1.0; 4],
            output: &[1.0],
            output_gradient: &[1.0],
            input_gradient: Some(&mut gradient),
        };
        layer.backward(&[vec![0.0]], pass, &mut [vec![0.0]]);
        assert_eq!(gradient, [1.0, 0.0, 0.0, 0.0]);
    }
}
