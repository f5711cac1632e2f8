//! Deltas: trained weights minus the model they were trained from, and the model plus an averaged delta.
//!
//! Floats are subtracted and added in their own type (16-bit ones by way of `f32`), so model + (weights − model) may
//! miss the weights by a rounding. Integers wrap: there the same sum gives the weights exactly. A wrapped delta of an
//! unsigned type is a signed number in two's complement, and so it is averaged
//! ([`UpdateKind::Deltas`](lifl_common::config::UpdateKind::Deltas)): that is right as long as a weight is less
//! than half its type's range away from the model's.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lifl_common::update::{DType, Region, Schema};

use super::element::{BLOCK, bf16_nearest, bf16_wide, f16_wide};
use super::threads::Threads;
use super::{FoldError, Operand, check, elements, elements_mut};

/// Runs the body for a region, with `E` for its type; integers by their width, for the sign does not matter.
macro_rules! for_region {
    ($region:expr, |$range:ident, $type:ident| $body:expr) => {{
        let $range = &$region.range;
        for_region!(@arms $region.dtype, $type, $body,
            F64: f64, F32: f32, F16: f16, BF16: bf16,
            I64 | U64: u64, I32 | U32: u32, I16 | U16: u16, I8 | U8: u8)
    }};
    (@arms $dtype:expr, $type:ident, $body:expr, $($($name:ident)|+: $of:ty),+) => {
        match $dtype {
            $($(DType::$name)|+ => {
                type $type = $of;
                $body
            })+
        }
    };
}
/// `weights ← weights − model`: the delta, where the trained weights lay.
///
/// # Errors
/// If one of them is not the schema's; `model` is [`Operand::Input`] 0.
pub fn subtract(
    threads: &Threads,
    schema: &Schema,
    model: &[u8],
    weights: &mut [u8],
) -> Result<(), FoldError> {
    check(schema, Operand::Input(0), model)?;
    check(schema, Operand::Out, weights)?;
    for region in schema.regions() {
        for_region!(region, |range, E| {
            threads.all(
                (elements_mut::<E>(weights, range), elements::<E>(model, range)),
                #[inline(always)]
                |_, (weights, model)| {
                    E::minus(weights, model);
                    true
                },
            );
        });
    }
    Ok(())
}

/// `delta ← model + delta`: the new model, where the averaged delta lies.
///
/// # Errors
/// If one of them is not the schema's; `model` is [`Operand::Input`] 0. [`FoldError::Overflow`] if the new model is not
/// finite: what lies there is rubbish then.
pub fn add(threads: &Threads, schema: &Schema, model: &[u8], delta: &mut [u8]) -> Result<(), FoldError> {
    check(schema, Operand::Input(0), model)?;
    check(schema, Operand::Out, delta)?;
    for region in schema.regions() {
        if !add_region(threads, &region, model, delta) {
            return Err(FoldError::Overflow);
        }
    }
    Ok(())
}

/// [`add`] for one region of data that has been checked; says whether the new model is finite there.
pub(super) fn add_region(threads: &Threads, region: &Region, model: &[u8], delta: &mut [u8]) -> bool {
    for_region!(region, |range, E| {
        threads.all(
            (elements_mut::<E>(delta, range), elements::<E>(model, range)),
            #[inline(always)]
            |_, (delta, model)| E::plus(delta, model),
        )
    })
}

/// An element type whose values have differences.
trait Difference: Sized {
    /// `to ← to − a`.
    fn minus(to: &mut [Self], a: &[Self]);

    /// `to ← to + a`; says whether all of that is finite.
    fn plus(to: &mut [Self], a: &[Self]) -> bool;
}

macro_rules! differences {
    ($($type:ty: |$to:ident, $a:ident| $minus:expr, $plus:expr, $finite:expr;)*) => {$(
        impl Difference for $type {
            #[inline(always)]
            fn minus(to: &mut [Self], a: &[Self]) {
                for (to, &$a) in to.iter_mut().zip(a) {
                    let $to = *to;
                    *to = $minus;
                }
            }

            #[inline(always)]
            fn plus(to: &mut [Self], a: &[Self]) -> bool {
                let mut finite = true;
                for (to, &$a) in to.iter_mut().zip(a) {
                    let $to = *to;
                    let $to = $plus;
                    *to = $to;
                    finite &= $finite;
                }
                finite
            }
        }
    )*};
}

differences! {
    f64: |to, a| to - a, to + a, to.is_finite();
    f32: |to, a| to - a, to + a, to.is_finite();
    bf16: |to, a| bf16_nearest(bf16_wide(to) - bf16_wide(a)), bf16_nearest(bf16_wide(to) + bf16_wide(a)),
        bf16_wide(to).is_finite();
    u64: |to, a| to.wrapping_sub(a), to.wrapping_add(a), true;
    u32: |to, a| to.wrapping_sub(a), to.wrapping_add(a), true;
    u16: |to, a| to.wrapping_sub(a), to.wrapping_add(a), true;
    u8: |to, a| to.wrapping_sub(a), to.wrapping_add(a), true;
}

/// In blocks of `f32`, since `half` narrows slices with the machine's own instruction; says whether all is finite.
#[inline(always)]
fn by_blocks(to: &mut [f16], a: &[f16], each: impl Fn(f32, f32) -> f32) -> bool {
    let mut wide = [0_f32; BLOCK];
    let mut finite = true;
    for (to, a) in to.chunks_mut(BLOCK).zip(a.chunks(BLOCK)) {
        let wide = &mut wide[..to.len()];
        for ((wide, &to), &a) in wide.iter_mut().zip(&*to).zip(a) {
            *wide = each(f16_wide(to), f16_wide(a));
        }
        to.convert_from_f32_slice(wide);
        for &to in &*to {
            finite &= f16_wide(to).is_finite();
        }
    }
    finite
}

impl Difference for f16 {
    #[inline(always)]
    fn minus(to: &mut [Self], a: &[Self]) {
        by_blocks(to, a, |to, a| to - a);
    }

    #[inline(always)]
    fn plus(to: &mut [Self], a: &[Self]) -> bool {
        by_blocks(to, a, |to, a| to + a)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lifl_common::config::{Timing, UpdateKind};
    use lifl_common::update::TensorSpec;
    use zerocopy::{FromBytes, IntoBytes};

    use super::*;
    use crate::{Input, Rule, WeightedMean};

    fn schema(dtype: DType, elements: usize) -> Schema {
        Schema::new(vec![TensorSpec::new("w", dtype, [elements])]).expect("a schema")
    }

    /// The new model after one round with equal samples.
    fn round(schema: &Schema, model: &[u8], weights: &[&[u8]], timing: Timing) -> Vec<u64> {
        let threads = Threads::new(1).expect("threads");
        let mut aggregate = WeightedMean::new(
            Arc::new(schema.clone()),
            UpdateKind::Deltas,
            timing,
            threads.clone(),
        );
        let mut slot = vec![0_u64; model.len().div_ceil(8)];
        let out = &mut slot.as_mut_bytes()[..model.len()];
        for weights in weights {
            let mut delta = vec![0_u64; model.len().div_ceil(8)];
            let delta = &mut delta.as_mut_bytes()[..model.len()];
            delta.copy_from_slice(weights);
            subtract(&threads, schema, model, delta).expect("same schema");
            aggregate
                .fold(
                    out,
                    &[Input {
                        data: delta,
                        samples: 5,
                    }],
                )
                .expect("finite");
        }
        aggregate.finish(out, &[]).expect("an aggregate");
        add(&threads, schema, model, out).expect("same schema");
        slot
    }

    #[test]
    fn unsigned_deltas_are_averaged_as_signed() {
        for timing in [Timing::Eager, Timing::Lazy] {
            let (model, weights) = ([100_u8, 7], [[90_u8, 8], [110, 7], [70, 6]]);
            let weights: Vec<_> = weights.iter().map(IntoBytes::as_bytes).collect();
            let new = round(&schema(DType::U8, 2), &model, &weights, timing);
            assert_eq!(new.as_bytes()[..2], [90, 7]);
            let (model, weights) = ([1_u64 << 63], [[(1_u64 << 63) - 1], [(1 << 63) - 3]]);
            let weights: Vec<_> = weights.iter().map(IntoBytes::as_bytes).collect();
            assert_eq!(
                round(&schema(DType::U64, 1), model.as_bytes(), &weights, timing),
                [(1 << 63) - 2]
            );
        }
    }

    #[test]
    fn a_lone_trainers_weights_come_back() {
        const N: usize = 3 * BLOCK + 5;
        let model: Vec<f16> = (0..N).map(|i| f16::from_f32(i as f32 / 64.0 - 40.0)).collect();
        let weights: Vec<f16> = model.iter().map(|w| f16::from_f32(w.to_f32() * 0.5)).collect();
        let new = round(
            &schema(DType::F16, N),
            model.as_bytes(),
            &[weights.as_bytes()],
            Timing::Lazy,
        );
        let new = <[f16]>::ref_from_bytes(&new.as_bytes()[..2 * N]).expect("aligned");
        for ((new, weight), model) in new.iter().zip(&weights).zip(&model) {
            assert!(
                (new.to_f32() - weight.to_f32()).abs() <= model.to_f32().abs() * 1e-3,
                "{new} for {weight}"
            );
        }
    }

    #[test]
    fn wrapped_integers_come_back_exactly() {
        let (model, weights) = ([i32::MAX, i32::MIN, 0, -7], [i32::MIN, i32::MAX, -1, 9]);
        let new = round(
            &schema(DType::I32, 4),
            model.as_bytes(),
            &[weights.as_bytes()],
            Timing::Lazy,
        );
        assert_eq!(new.as_bytes(), weights.as_bytes());
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let threads = Threads::new(1).expect("threads");
        for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
            let (model, mut delta) = ([bf16::ONE], [bf16::from_f32(bad)]);
            let schema = schema(DType::BF16, 1);
            subtract(&threads, &schema, model.as_bytes(), delta.as_mut_bytes()).expect("fits");
            assert!(!delta[0].is_finite());
        }
    }
}
