//! Between bytes, of updates and of images, and candle's tensors.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use lifl_common::update::{Tensors, TensorsMut};
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::network::Parameter;
use crate::data::Samples;

/// Copies the parameters out of `model`, in the order given. candle owns its memory, so this is one copy of the
/// model: the only one that a trainer makes.
///
/// # Errors
/// If the model lacks a parameter or has it in another size.
pub(super) fn lift(model: Tensors<'_>, parameters: &[Parameter]) -> Result<Vec<Tensor>> {
    let lift_one = |parameter: &Parameter| {
        let Some(Ok(bytes)) = model.bytes(parameter.name).map(<[F32]>::ref_from_bytes) else {
            bail!("the model has no 32-bit tensor called {}", parameter.name);
        };
        let values: Vec<f32> = bytes.iter().map(|value| value.get()).collect();
        Tensor::from_vec(values, parameter.shape.as_slice(), &Device::Cpu)
    };
    parameters.iter().map(lift_one).collect()
}

/// Copies the parameters' new values to where they belong in `weights`.
///
/// # Errors
/// If the weights lack a parameter or have it in another size.
pub(super) fn lower(values: &[Tensor], parameters: &[Parameter], weights: &mut TensorsMut<'_>) -> Result<()> {
    for (value, parameter) in values.iter().zip(parameters) {
        let (storage, layout) = value.storage_and_layout();
        let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        else {
            bail!("{} is not in the CPU's memory in one piece", parameter.name);
        };
        let values = &values[start..end];
        let out = weights
            .bytes(parameter.name)
            .filter(|out| out.len() == size_of_val(values));
        let Some(Ok(out)) = out.map(<[F32]>::mut_from_bytes) else {
            bail!("the weights have no 32-bit tensor called {}", parameter.name);
        };
        for (out, value) in out.iter_mut().zip(values) {
            out.set(*value);
        }
    }
    Ok(())
}

/// Those samples' images `[n, pixels]`, from 0 for black to 1 for white, and labels `[n]`.
///
/// # Panics
/// If there is no such sample.
pub(super) fn batch(samples: &Samples, which: &[usize]) -> Result<(Tensor, Tensor)> {
    let each = samples.shape().pixels();
    let mut pixels = Vec::with_capacity(which.len() * each);
    for &sample in which {
        pixels.extend(
            samples
                .image(sample)
                .iter()
                .map(|&pixel| f32::from(pixel) * (1.0 / 255.0)),
        );
    }
    let labels: Vec<u32> = which.iter().map(|&sample| samples.label(sample).into()).collect();
    let images = Tensor::from_vec(pixels, (which.len(), each), &Device::Cpu)?;
    Ok((images, Tensor::from_vec(labels, which.len(), &Device::Cpu)?))
}
