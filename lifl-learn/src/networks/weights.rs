//! Between an update's bytes and the numbers that networks compute with.

use lifl_common::update::{Tensors, TensorsMut};
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::layers::Parameter;
use crate::LearnError;

/// Copies the parameters out of `model`, in the order given: the only copy of it that a trainer makes, since it changes them.
///
/// # Errors
/// If the model lacks a parameter or has it in another size.
pub(super) fn read(model: Tensors<'_>, parameters: &[Parameter]) -> Result<Vec<Vec<f32>>, LearnError> {
    let read_one = |parameter: &Parameter| match model.bytes(parameter.name).map(<[F32]>::ref_from_bytes) {
        Some(Ok(values)) if values.len() == parameter.len() => {
            Ok(values.iter().map(|value| value.get()).collect())
        }
        _ => Err(LearnError::OtherModel(parameter.name)),
    };
    parameters.iter().map(read_one).collect()
}

/// Copies the parameters' new values to where they belong in `weights`.
///
/// # Errors
/// If the weights lack a parameter or have it in another size.
pub(super) fn write(
    values: &[Vec<f32>],
    parameters: &[Parameter],
    weights: &mut TensorsMut<'_>,
) -> Result<(), LearnError> {
    for (values, parameter) in values.iter().zip(parameters) {
        match weights.bytes(parameter.name).map(<[F32]>::mut_from_bytes) {
            Some(Ok(out)) if out.len() == values.len() => {
                for (out, value) in out.iter_mut().zip(values) {
                    out.set(*value);
                }
            }
            _ => return Err(LearnError::OtherModel(parameter.name)),
        }
    }
    Ok(())
}
