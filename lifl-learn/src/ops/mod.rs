//! The convolution network's two expensive steps, as candle operations with their own gradients.
//!
//! candle's convolution on a CPU has no fast backward pass, and its pooling and ReLU each walk the activations
//! several times. Both operations here take images as Keras does, `[batch, height, width, channels]`: then a row of
//! a patch is one run of memory, and a loop over channels is one over neighbours. The products themselves are
//! candle's.

mod conv;
mod pool;

use candle_core::{CpuStorage, Layout, Result, bail};

pub(super) use conv::conv2d;
pub(super) use pool::max_pool_relu;

/// The floats of a tensor that lies in one piece.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("an operation of the convolution network needs tensors that lie in one piece"),
    }
}

/// What the tests of both operations share.
#[cfg(test)]
mod testing {
    use candle_core::{Device, Result, Tensor, Var};
    use rand::Rng;

    use lifl_common::random::{Stream, stream};

    /// Floats in -1 to 1, the same ones each time.
    pub(super) fn floats(shape: &[usize], which: u64) -> Result<Tensor> {
        let mut random = stream(7, Stream::Initial, 0, which);
        let n = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|_| random.random_range(-1.0..1.0)).collect();
        Tensor::from_slice(&values, shape, &Device::Cpu)
    }

    /// The gradient of `f` at `at` by central differences.
    pub(super) fn numeric_gradient(at: &Tensor, f: impl Fn(&Tensor) -> Result<f64>) -> Result<Vec<f64>> {
        const STEP: f32 = 1e-2;
        let values = at.flatten_all()?.to_vec1::<f32>()?;
        let shifted = |i: usize, by: f32| {
            let mut values = values.clone();
            values[i] += by;
            f(&Tensor::from_slice(&values, at.shape(), &Device::Cpu)?)
        };
        (0..values.len())
            .map(|i| Ok((shifted(i, STEP)? - shifted(i, -STEP)?) / (2.0 * f64::from(STEP))))
            .collect()
    }

    /// Asserts that backpropagation through `f` gives `at`'s numeric gradient.
    pub(super) fn assert_gradient(at: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
        let sum = |t: &Tensor| f(t)?.sum_all()?.to_scalar::<f32>().map(f64::from);
        let numeric = numeric_gradient(at, sum).expect("a forward pass");
        let var = Var::from_tensor(at).expect("a variable");
        let store = f(&var)
            .and_then(|y| y.sum_all()?.backward())
            .expect("a backward pass");
        let exact = store
            .get(&var)
            .expect("a gradient")
            .flatten_all()
            .and_then(|g| g.to_vec1::<f32>());
        for (i, (exact, numeric)) in exact.expect("floats").into_iter().zip(numeric).enumerate() {
            let error = (f64::from(exact) - numeric).abs();
            assert!(
                error < 2e-2 * numeric.abs().max(1.0),
                "element {i}: {exact} and not {numeric}"
            );
        }
    }
}
