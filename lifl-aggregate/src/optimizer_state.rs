//! What a server optimizer remembers from round to round: two moments of each weight, as tensors.
//!
//! A state is safetensors as a model is: `m.<name>` and `v.<name>` of each tensor of floats, in that tensor's shape,
//! `F64` beside `F64` and `F32` beside every other float; integers have none. It lies in a slot of the top's second
//! arena, and a checkpoint of it is that slot written to a file. There is none before the first step, which sets the
//! moments to 0: a job with an adaptive optimizer and no state has not made its first step.

use std::ops::Range;

use lifl_common::config::Optimizer;
use lifl_common::update::{DType, Schema, TensorSpec};

/// An optimizer's state in one step: the data of two images of its [schema](state_schema).
#[derive(Debug)]
pub struct State<'a> {
    /// As the step before left it; `None` in the first step.
    pub before: Option<&'a [u8]>,
    /// Where the next goes; all of it is written.
    pub after: &'a mut [u8],
}

/// The tensors of the state that such an optimizer has beside models of that schema; `None` if it has none: FedAvg, and
/// models without floats.
pub fn state_schema(schema: &Schema, optimizer: &Optimizer) -> Option<Schema> {
    if *optimizer == Optimizer::FedAvg {
        return None;
    }
    let floats = schema.iter().filter(|(tensor, _)| tensor.dtype.is_float());
    let moments = floats.flat_map(|(tensor, _)| {
        let dtype = match tensor.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        ["m", "v"]
            .map(|moment| TensorSpec::new(format!("{moment}.{}", tensor.name), dtype, tensor.shape.clone()))
    });
    // Names stay unique, and no tensor is larger than four of the model's. What overflows all the same has no room on
    // this machine, and the model's own arena will say so.
    Schema::new(moments.collect()).ok()
}

/// A run of weights whose moments are runs too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The weights' type.
    pub(super) dtype: DType,
    /// Their bytes in the model's data.
    pub(super) weights: Range<usize>,
    /// Their first moments' bytes in the state's.
    pub(super) m: Range<usize>,
    /// Their second moments'.
    pub(super) v: Range<usize>,
}

/// All weights that have moments, in as few runs as may be: one for a model of one type.
pub(super) fn runs(schema: &Schema, state: &Schema) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (tensor, weights) in schema.iter() {
        let moment = |moment| state.get(&format!("{moment}.{}", tensor.name));
        let (Some((_, m)), Some((_, v))) = (moment("m"), moment("v")) else {
            continue;
        };
        match runs.last_mut() {
            Some(last)
                if last.dtype == tensor.dtype
                    && (last.weights.end, last.m.end, last.v.end) == (weights.start, m.start, v.start) =>
            {
                (last.weights.end, last.m.end, last.v.end) = (weights.end, m.end, v.end);
            }
            _ => runs.push(Run {
                dtype: tensor.dtype,
                weights,
                m,
                v,
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use lifl_common::config::Adaptive;

    use super::*;

    fn schema(specs: &[(&str, DType, usize)]) -> Schema {
        let specs = specs
            .iter()
            .map(|&(name, dtype, n)| TensorSpec::new(name, dtype, [n]));
        Schema::new(specs.collect()).expect("a schema")
    }

    fn adam(schema: &Schema) -> Option<Schema> {
        state_schema(schema, &Optimizer::FedAdam(Adaptive::default()))
    }

    #[test]
    fn moments_are_as_wide_as_they_are_computed() {
        let model = schema(&[
            ("a", DType::F64, 10),
            ("b", DType::F32, 20),
            ("c", DType::BF16, 30),
            ("d", DType::I64, 40),
        ]);
        let state = adam(&model).expect("a state");
        assert_eq!(state.data_bytes(), 10 * 16 + 50 * 8);
        let shape = |name| state.get(name).map(|(tensor, _)| (tensor.dtype, tensor.shape[0]));
        assert_eq!(shape("m.a"), Some((DType::F64, 10)));
        assert_eq!(shape("v.c"), Some((DType::F32, 30)));
        assert_eq!(shape("m.d"), None);
    }

    #[test]
    fn who_remembers_nothing_has_no_state() {
        let floats = schema(&[("w", DType::F32, 1)]);
        assert_eq!(state_schema(&floats, &Optimizer::FedAvg), None);
        assert_eq!(adam(&schema(&[("n", DType::I32, 3)])), None);
    }

    #[test]
    fn a_model_of_one_type_is_one_run() {
        let model = schema(&[("b", DType::BF16, 3), ("n", DType::I32, 2), ("a", DType::BF16, 4)]);
        let state = adam(&model).expect("a state");
        let expected = Run {
            dtype: DType::BF16,
            weights: 8..22,
            m: 0..28,
            v: 28..56,
        };
        assert_eq!(runs(&model, &state), [expected]);
    }

    #[test]
    fn types_whose_moments_lie_mixed_are_several() {
        let model = schema(&[("a", DType::F16, 1), ("b", DType::F32, 1), ("c", DType::F16, 1)]);
        let state = adam(&model).expect("a state");
        let found: Vec<_> = runs(&model, &state)
            .into_iter()
            .map(|run| (run.weights, run.m, run.v))
            .collect();
        assert_eq!(
            found,
            [(0..4, 4..8, 16..20), (4..6, 0..4, 12..16), (6..8, 8..12, 20..24)]
        );
    }
}
