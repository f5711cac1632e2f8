//! Deltas: trained weights minus the model they were trained from, and the model plus an averaged delta.
//!
//! Floats are subtracted and added in their own type (16-bit ones by way of `f32`), so model + (weights − model) may
//! miss the weights by a rounding. Integers wrap: there the same sum gives the weights exactly. A wrapped delta of an
//! unsigned type is a signed number in two's complement, and so it is averaged
//! ([`UpdateKind::Deltas`](lifl_common::config::UpdateKind::Deltas)): that is right as long as a weight is less
//! than half its type's range away from the model's.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lifl_common::update::{DType, Schema};

use super::element::{BLOCK, bf16_nearest, bf16_wide};
use super::threads::Threads;
use super::{FoldError, Operand, check, elements, elements_mut};

/// Runs the body for each region, with `E` for its type; integers by their width, for the sign does not matter.
macro_rules! for_regions {
    ($schema:expr, |$range:ident, $type:ident| $body:expr) => {
        for region in $schema.regions() {
            let $range = &region.range;
            for_regions!(@arms region.dtype, $type, $body,
                F64: f64, F32: f32, F16: f16, BF16: bf16,
                I64 | U64: u64, I32 | U32: u32, I16 | U16: u16, I8 | U8: u8);
        }
    };
    (@arms $dtype:expr, $type:ident, $body:expr, $($($name:ident)|+: $of:ty),+) => {
        match $dtype {
            $($(DType::$name)|+ => {
                type $type = $of;
                $body
            })+
        }
    };
}
/// `out ← weights − model`.
///
/// # Errors
/// If one of them is not the schema's; `weights` is [`Operand::Input`] 0 and `model` is 1.
pub fn subtract(
    threads: &Threads,
    schema: &Schema,
    weights: &[u8],
    model: &[u8],
    out: &mut [u8],
) -> Result<(), FoldError> {
    check(schema, Operand::Input(0), weights)?;
    check(schema, Operand::Input(1), model)?;
    check(schema, Operand::Out, out)?;
    for_regions!(schema, |range, E| {
        let work = (
            elements_mut::<E>(out, range),
            (elements::<E>(weights, range), elements::<E>(model, range)),
        );
        threads.all(
            work,
            #[inline(always)]
            |_, (out, (weights, model))| {
                E::minus(out, weights, model);
                true
            },
        );
    });
    Ok(())
}

/// `delta ← model + delta`: the new model, where the averaged delta lies.
///
/// # Errors
/// If one of them is not the schema's; `model` is [`Operand::Input`] 0.
pub fn add(threads: &Threads, schema: &Schema, model: &[u8], delta: &mut [u8]) -> Result<(), FoldError> {
    check(schema, Operand::Input(0), model)?;
    check(schema, Operand::Out, delta)?;
    for_regions!(schema, |range, E| {
        threads.all(
            (elements_mut::<E>(delta, range), elements::<E>(model, range)),
            #[inline(always)]
            |_, (delta, model)| {
                E::plus(delta, model);
                true
            },
        );
    });
    Ok(())
}

/// An element type whose values have differences.
trait Difference: Sized {
    /// `out ← a − b`.
    fn minus(out: &mut [Self], a: &[Self], b: &[Self]);

    /// `to ← a + to`.
    fn plus(to: &mut [Self], a: &[Self]);
}

macro_rules! differences {
    ($($type:ty: |$a:ident, $b:ident| $minus:expr, $plus:expr;)*) => {$(
        impl Difference for $type {
            #[inline(always)]
            fn minus(out: &mut [Self], a: &[Self], b: &[Self]) {
                for ((out, &$a), &$b) in out.iter_mut().zip(a).zip(b) {
                    *out = $minus;
                }
            }

            #[inline(always)]
            fn plus(to: &mut [Self], a: &[Self]) {
                for (to, &$a) in to.iter_mut().zip(a) {
                    let $b = *to;
                    *to = $plus;
                }
            }
        }
    )*};
}

differences! {
    f64: |a, b| a - b, a + b;
    f32: |a, b| a - b, a + b;
    bf16: |a, b| bf16_nearest(bf16_wide(a) - bf16_wide(b)), bf16_nearest(bf16_wide(a) + bf16_wide(b));
    u64: |a, b| a.wrapping_sub(b), a.wrapping_add(b);
    u32: |a, b| a.wrapping_sub(b), a.wrapping_add(b);
    u16: |a, b| a.wrapping_sub(b), a.wrapping_add(b);
    u8: |a, b| a.wrapping_sub(b), a.wrapping_add(b);
}

/// In blocks of `f32`, which `half` converts with the machine's own instructions.
impl Difference for f16 {
    #[inline(always)]
    fn minus(out: &mut [Self], a: &[Self], b: &[Self]) {
        let (mut wide_a, mut wide_b) = ([0_f32; BLOCK], [0_f32; BLOCK]);
        for ((out, a), b) in out.chunks_mut(BLOCK).zip(a.chunks(BLOCK)).zip(b.chunks(BLOCK)) {
            let (wide_a, wide_b) = (&mut wide_a[..out.len()], &mut wide_b[..out.len()]);
            a.convert_to_f32_slice(wide_a);
            b.convert_to_f32_slice(wide_b);
            for (a, b) in wide_a.iter_mut().zip(wide_b.iter()) {
                *a -= b;
            }
            out.convert_from_f32_slice(wide_a);
        }
    }

    #[inline(always)]
    fn plus(to: &mut [Self], a: &[Self]) {
        let (mut wide_to, mut wide_a) = ([0_f32; BLOCK], [0_f32; BLOCK]);
        for (to, a) in to.chunks_mut(BLOCK).zip(a.chunks(BLOCK)) {
            let (wide_to, wide_a) = (&mut wide_to[..to.len()], &mut wide_a[..to.len()]);
            to.convert_to_f32_slice(wide_to);
            a.convert_to_f32_slice(wide_a);
            f32::plus(wide_to, wide_a);
            to.convert_from_f32_slice(wide_to);
        }
    }
}
