//! Convolution without padding at stride 1, as one product of the patches with the kernel ("im2col": Chellapilla,
//! Puri, Simard 2006).
//!
//! The patches are nine times the input, so they are not kept for the backward pass but made again: that reads less
//! memory than keeping them would.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::floats;

/// Convolves `images` `[batch, height, width, in]` with `kernel` `[rows, columns, in, out]`.
///
/// `input_gradient` says whether the backward pass goes on below `images`; the first layer saves a third of its
/// work without.
///
/// # Errors
/// If the shapes do not fit or candle fails.
pub(crate) fn conv2d(images: &Tensor, kernel: &Tensor, input_gradient: bool) -> Result<Tensor> {
    let (batch, height, width, channels) = images.dims4()?;
    let (rows, columns, kernel_in, out) = kernel.dims4()?;
    if kernel_in != channels || rows > height || columns > width {
        candle_core::bail!(
            "a kernel of {:?} does not fit images of {:?}",
            kernel.shape(),
            images.shape()
        );
    }
    let window = Window {
        batch,
        height,
        width,
        channels,
        rows,
        columns,
    };
    let kernel = kernel.reshape((window.patch(), out))?;
    let product = images.apply_op2(
        &kernel,
        Convolve {
            window,
            input_gradient,
        },
    )?;
    product.reshape((batch, window.out_height(), window.out_width(), out))
}

/// What slides over what.
#[derive(Clone, Copy)]
struct Window {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    rows: usize,
    columns: usize,
}

impl Window {
    fn out_height(self) -> usize {
        self.height - self.rows + 1
    }

    fn out_width(self) -> usize {
        self.width - self.columns + 1
    }

    /// Elements in a patch.
    fn patch(self) -> usize {
        self.rows * self.columns * self.channels
    }

    /// Patches in the whole batch.
    fn patches(self) -> usize {
        self.batch * self.out_height() * self.out_width()
    }

    fn images_len(self) -> usize {
        self.batch * self.height * self.width * self.channels
    }

    /// Calls `f` for each row of each patch, in memory order of the patches, with where it starts in the images.
    #[inline(always)]
    fn for_each_run(self, mut f: impl FnMut(usize)) {
        for image in 0..self.batch {
            for y in 0..self.out_height() {
                for x in 0..self.out_width() {
                    for row in 0..self.rows {
                        f(((image * self.height + y + row) * self.width + x) * self.channels);
                    }
                }
            }
        }
    }

    /// The patches, one after the other.
    fn gather(self, images: &[f32]) -> Vec<f32> {
        let run = self.columns * self.channels;
        let mut patches = Vec::with_capacity(self.patches() * self.patch());
        self.for_each_run(|at| patches.extend_from_slice(&images[at..at + run]));
        patches
    }

    /// Adds each patch to where it came from.
    fn scatter(self, patches: &[f32]) -> Vec<f32> {
        let run = self.columns * self.channels;
        let mut images = vec![0.0; self.images_len()];
        let mut runs = patches.chunks_exact(run);
        self.for_each_run(|at| {
            let patch = runs.next().unwrap_or_default();
            for (pixel, value) in images[at..at + run].iter_mut().zip(patch) {
                *pixel += value;
            }
        });
        images
    }
}

struct Convolve {
    window: Window,
    input_gradient: bool,
}

impl CustomOp2 for Convolve {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        images_layout: &Layout,
        kernel: &CpuStorage,
        kernel_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (m, k) = (self.window.patches(), self.window.patch());
        let n = kernel_layout.shape().dims2()?.1;
        let patches = CpuStorage::F32(self.window.gather(floats(images, images_layout)?));
        let patches_layout = Layout::contiguous((m, k));
        let product = patches.matmul(kernel, (1, m, n, k), &patches_layout, kernel_layout)?;
        Ok((product, Shape::from((m, n))))
    }

    fn bwd(
        &self,
        images: &Tensor,
        kernel: &Tensor,
        _product: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let patches = images.apply_op1_no_bwd(&Gather(self.window))?;
        let kernel_gradient = patches.t()?.matmul(gradient)?;
        drop(patches);
        let images_gradient = if self.input_gradient {
            Some(
                gradient
                    .matmul(&kernel.t()?)?
                    .apply_op1_no_bwd(&Scatter(self.window))?,
            )
        } else {
            None
        };
        Ok((images_gradient, Some(kernel_gradient)))
    }
}

/// Images to patches.
struct Gather(Window);

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "gather-patches"
    }

    fn cpu_fwd(&self, images: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let patches = self.0.gather(floats(images, layout)?);
        Ok((
            CpuStorage::F32(patches),
            Shape::from((self.0.patches(), self.0.patch())),
        ))
    }
}

/// Patches to images: [`Gather`]'s transpose.
struct Scatter(Window);

impl CustomOp1 for Scatter {
    fn name(&self) -> &'static str {
        "scatter-patches"
    }

    fn cpu_fwd(&self, patches: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let images = self.0.scatter(floats(patches, layout)?);
        let Window {
            batch,
            height,
            width,
            channels,
            ..
        } = self.0;
        Ok((
            CpuStorage::F32(images),
            Shape::from((batch, height, width, channels)),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;

    const IMAGES: [usize; 4] = [2, 6, 5, 3];
    const KERNEL: [usize; 4] = [3, 2, 3, 4];

    fn weighed(images: &Tensor, kernel: &Tensor) -> Result<Tensor> {
        let y = conv2d(images, kernel, true)?;
        let weights = testing::floats(y.dims(), 2)?;
        y * weights
    }

    #[test]
    fn agrees_with_candles_own_convolution() {
        let images = testing::floats(&IMAGES, 0).expect("images");
        let kernel = testing::floats(&KERNEL, 1).expect("a kernel");
        let ours = conv2d(&images, &kernel, true).expect("a convolution");
        let theirs = images
            .permute((0, 3, 1, 2))
            .and_then(|x| x.conv2d(&kernel.permute((3, 2, 0, 1))?.contiguous()?, 0, 1, 1, 1))
            .and_then(|y| y.permute((0, 2, 3, 1)))
            .expect("candle's convolution");
        assert_eq!(ours.dims(), [2, 4, 4, 4]);
        let error = (ours - theirs)
            .and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>())
            .expect("a difference");
        assert!(error < 1e-5, "differs by {error}");
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let images = testing::floats(&IMAGES, 0).expect("images");
        let kernel = testing::floats(&KERNEL, 1).expect("a kernel");
        testing::assert_gradient(&images, |images| weighed(images, &kernel));
        testing::assert_gradient(&kernel, |kernel| weighed(&images, kernel));
    }

    #[test]
    fn refuses_a_kernel_that_does_not_fit() {
        let images = testing::floats(&[1, 4, 4, 2], 0).expect("images");
        for shape in [[5, 1, 2, 1], [1, 5, 2, 1], [1, 1, 3, 1]] {
            let kernel = testing::floats(&shape, 1).expect("a kernel");
            assert!(conv2d(&images, &kernel, false).is_err(), "{shape:?}");
        }
    }
}
