//! 2×2 max-pooling, bias and ReLU in one pass.
//!
//! Keras' order is bias, ReLU, pooling. A bias is the same for all four values and ReLU never falls, so the maximum
//! may be taken first: the result is the same, and so is the gradient, at a quarter of the additions. Where several
//! of the four are greatest the first one has the gradient, as in cuDNN.

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use pulp::{Arch, NullaryFnOnce};

use super::floats;

/// `relu(max over each 2×2 window of images + bias)`, for `images` `[batch, height, width, channels]` and `bias`
/// `[channels]`. An odd last row or column is left out, as Keras does.
///
/// # Errors
/// If the shapes do not fit or candle fails.
pub(crate) fn max_pool_relu(images: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = images.dims4()?;
    if bias.dims() != [channels] {
        bail!(
            "a bias of {:?} does not fit images of {:?}",
            bias.shape(),
            images.shape()
        );
    }
    images.apply_op2(
        bias,
        Pool(Grid {
            batch,
            height,
            width,
            channels,
        }),
    )
}

/// Channels worked on at once.
const LANES: usize = 16;

#[derive(Clone, Copy)]
struct Grid {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
}

impl Grid {
    fn pooled(self) -> (usize, usize, usize, usize) {
        (self.batch, self.height / 2, self.width / 2, self.channels)
    }

    /// Elements in a row of an image.
    fn row(self) -> usize {
        self.width * self.channels
    }

    /// Elements in an image.
    fn image(self) -> usize {
        self.height * self.row()
    }

    /// Elements in a row of a pooled image.
    fn pooled_row(self) -> usize {
        self.width / 2 * self.channels
    }

    /// Elements in a pooled image.
    fn pooled_image(self) -> usize {
        self.height / 2 * self.pooled_row()
    }
}

/// The forward pass, compiled for each vector width that the machine may have.
struct Forward<'a> {
    grid: Grid,
    images: &'a [f32],
    bias: &'a [f32],
}

impl NullaryFnOnce for Forward<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn call(self) -> Vec<f32> {
        let Self { grid, images, bias } = self;
        let mut pooled = vec![0.0; grid.batch * grid.pooled_image()];
        for (pooled, image) in pooled
            .chunks_exact_mut(grid.pooled_image())
            .zip(images.chunks_exact(grid.image()))
        {
            let rows = pooled.chunks_exact_mut(grid.pooled_row());
            for (pooled, pair) in rows.zip(image.chunks_exact(2 * grid.row())) {
                forward_row(grid, pooled, pair, bias);
            }
        }
        pooled
    }
}

/// Pools two rows of an image into one.
#[inline(always)]
fn forward_row(grid: Grid, pooled: &mut [f32], pair: &[f32], bias: &[f32]) {
    let c = grid.channels;
    let (above, under) = pair.split_at(grid.row());
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

/// The gradient of the images, from that of the pooled pixels where ReLU let them through.
struct Backward<'a> {
    grid: Grid,
    images: &'a [f32],
    pooled: &'a [f32],
    gradient: &'a [f32],
}

impl NullaryFnOnce for Backward<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn call(self) -> Vec<f32> {
        let Self {
            grid,
            images,
            pooled,
            gradient,
        } = self;
        let mut out = vec![0.0; images.len()];
        let outs = out
            .chunks_exact_mut(grid.image())
            .zip(images.chunks_exact(grid.image()));
        let pixels = pooled
            .chunks_exact(grid.pooled_image())
            .zip(gradient.chunks_exact(grid.pooled_image()));
        for ((out, image), (pooled, gradient)) in outs.zip(pixels) {
            let outs = out
                .chunks_exact_mut(2 * grid.row())
                .zip(image.chunks_exact(2 * grid.row()));
            let pixels = pooled
                .chunks_exact(grid.pooled_row())
                .zip(gradient.chunks_exact(grid.pooled_row()));
            for ((out, pair), (pooled, gradient)) in outs.zip(pixels) {
                backward_row(grid, out, pair, pooled, gradient);
            }
        }
        out
    }
}

/// The gradient of two rows of an image from that of the row that they were pooled into.
#[inline(always)]
fn backward_row(grid: Grid, out: &mut [f32], pair: &[f32], pooled: &[f32], gradient: &[f32]) {
    let c = grid.channels;
    let (above, under) = pair.split_at(grid.row());
    let (out_above, out_under) = out.split_at_mut(grid.row());
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

struct Pool(Grid);

impl CustomOp2 for Pool {
    fn name(&self) -> &'static str {
        "max-pool-relu"
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        images_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (images, bias) = (floats(images, images_layout)?, floats(bias, bias_layout)?);
        let pooled = Arch::new().dispatch(Forward {
            grid: self.0,
            images,
            bias,
        });
        Ok((CpuStorage::F32(pooled), Shape::from(self.0.pooled())))
    }

    fn bwd(
        &self,
        images: &Tensor,
        _bias: &Tensor,
        pooled: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let images_gradient = images.apply_op3_no_bwd(pooled, &gradient, &Unpool(self.0))?;
        let bias_gradient = pooled.apply_op2_no_bwd(&gradient, &BiasGradient(self.0.channels))?;
        Ok((Some(images_gradient), Some(bias_gradient)))
    }
}

/// The gradient of the images.
struct Unpool(Grid);

impl CustomOp3 for Unpool {
    fn name(&self) -> &'static str {
        "max-pool-relu-gradient"
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        images_layout: &Layout,
        pooled: &CpuStorage,
        pooled_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (images, pooled) = (floats(images, images_layout)?, floats(pooled, pooled_layout)?);
        let gradient = floats(gradient, gradient_layout)?;
        let out = Arch::new().dispatch(Backward {
            grid: self.0,
            images,
            pooled,
            gradient,
        });
        Ok((CpuStorage::F32(out), images_layout.shape().clone()))
    }
}

/// The gradient of the bias: the sum over all pixels that ReLU let through.
struct BiasGradient(usize);

impl CustomOp2 for BiasGradient {
    fn name(&self) -> &'static str {
        "bias-gradient"
    }

    fn cpu_fwd(
        &self,
        pooled: &CpuStorage,
        pooled_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let mut sums = vec![0.0; self.0];
        let pooled = floats(pooled, pooled_layout)?.chunks_exact(self.0);
        let gradient = floats(gradient, gradient_layout)?.chunks_exact(self.0);
        for (pixel, gradient) in pooled.zip(gradient) {
            for ((sum, pixel), gradient) in sums.iter_mut().zip(pixel).zip(gradient) {
                *sum += if *pixel > 0.0 { *gradient } else { 0.0 };
            }
        }
        Ok((CpuStorage::F32(sums), Shape::from(self.0)))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::testing;
    use super::*;

    #[test]
    fn is_bias_then_relu_then_pooling() {
        let images = testing::floats(&[2, 5, 6, 3], 0).expect("images");
        let bias = testing::floats(&[3], 1).expect("a bias");
        let ours = max_pool_relu(&images, &bias).and_then(|t| t.flatten_all()?.to_vec1::<f32>());
        let theirs = images
            .broadcast_add(&bias)
            .and_then(|x| x.relu()?.permute((0, 3, 1, 2))?.max_pool2d(2))
            .and_then(|x| x.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1::<f32>());
        assert_eq!(ours.expect("pooled"), theirs.expect("pooled by candle"));
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        // Values far enough apart that a step of the differences changes no maximum and crosses no zero.
        let spread: Vec<f32> = (0..2 * 4 * 4 * 2)
            .map(|i| ((i * 37) % 64) as f32 / 16.0 - 2.03)
            .collect();
        let images = Tensor::from_slice(&spread, (2, 4, 4, 2), &Device::Cpu).expect("images");
        let bias = Tensor::from_slice(&[0.0_f32, -1.0], 2, &Device::Cpu).expect("a bias");
        let weighed = |images: &Tensor, bias: &Tensor| {
            let y = max_pool_relu(images, bias)?;
            let weights = testing::floats(y.dims(), 2)?;
            y * weights
        };
        testing::assert_gradient(&images, |images| weighed(images, &bias));
        testing::assert_gradient(&bias, |bias| weighed(&images, bias));
    }

    #[test]
    fn one_of_equal_values_has_the_gradient() {
        let images =
            candle_core::Var::ones((1, 2, 2, 1), candle_core::DType::F32, &Device::Cpu).expect("images");
        let bias = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).expect("a bias");
        let store = max_pool_relu(&images, &bias)
            .and_then(|y| y.sum_all()?.backward())
            .expect("a backward pass");
        let gradient = store
            .get(&images)
            .expect("a gradient")
            .flatten_all()
            .and_then(|g| g.to_vec1::<f32>());
        assert_eq!(gradient.expect("floats"), [1.0, 0.0, 0.0, 0.0]);
    }
}
