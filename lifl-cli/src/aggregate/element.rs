//! The arithmetic of one element type: blocks of `f64` sums, what is added to them, and how they are rounded.
//!
//! A block's sums stay in the first cache level while the inputs stream past, each once.
//!
//! Why a rounded mean never leaves its type's range: the weights are `f64` quotients whose sum is 1 within
//! (k + 1)·2⁻⁵³ for k inputs, and each multiplication and addition adds at most 2⁻⁵³ of the largest magnitude M among
//! the inputs; so the sum is at most M·(1 + 2⁻²⁸) for any k up to 2²⁰. The next value of a float type of p bits that
//! would round beyond M is at M·(1 + 2⁻ᵖ⁻¹), and p is 24 at most; the next integer is at M + ½, where M is below 2³².
//! Hence the sum of finite inputs is finite, rounds to M at most, and the mean of equal values is that value. The
//! types for which this argument is too weak have their own ways: `f64` in [`clamped`](super::place::clamped), 64-bit
//! integers in [`wide`](super::wide).

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements in a block: 16 KiB of sums.
pub(super) const BLOCK: usize = 2048;

/// One region of an input, with its weight.
#[derive(Clone, Copy)]
pub(super) struct Weighted<'a, E> {
    /// Its elements.
    pub(super) values: &'a [E],
    /// Its share of all samples folded so far.
    pub(super) weight: f64,
    /// Its samples.
    pub(super) samples: u64,
}

/// An element type whose mean is computed in `f64`.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// The same value.
    fn to_f64(self) -> f64;

    /// The nearest value.
    fn nearest(mean: f64) -> Self;

    /// Adds the inputs' elements from `start` on, times their weights.
    #[inline(always)]
    fn add(sums: &mut [f64], inputs: &[Weighted<'_, Self>], start: usize) {
        let end = start + sums.len();
        let mut groups = inputs.chunks_exact(4);
        for group in &mut groups {
            let values = [0, 1, 2, 3].map(|i| &group[i].values[start..end]);
            add_group(sums, values, [0, 1, 2, 3].map(|i| group[i].weight));
        }
        for input in groups.remainder() {
            add_group(sums, [&input.values[start..end]], [input.weight]);
        }
    }

    /// Rounds the sums.
    #[inline(always)]
    fn write(sums: &[f64], out: &mut [Self]) {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = Self::nearest(sum);
        }
    }

    /// Makes the sums the values times a weight.
    #[inline(always)]
    fn scale(sums: &mut [f64], values: &[Self], weight: f64) {
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum = weight * value.to_f64();
        }
    }
}

/// Adds several inputs in one pass over the sums, in their order.
#[inline(always)]
fn add_group<E: Element, const N: usize>(sums: &mut [f64], values: [&[E]; N], weights: [f64; N]) {
    let values = values.map(|values| &values[..sums.len()]);
    for (i, sum) in sums.iter_mut().enumerate() {
        let mut total = *sum;
        for (values, weight) in values.iter().zip(weights) {
            total += weight * values[i].to_f64();
        }
        *sum = total;
    }
}

/// Whether all sums are finite.
#[inline(always)]
pub(super) fn finite(sums: &[f64]) -> bool {
    const EXPONENT: u64 = 0x7FF << 52;
    // Zero times a finite value has no exponent bit; times any other, all of them.
    sums.iter().fold(0, |bits, sum| bits | (sum * 0.0).to_bits()) & EXPONENT == 0
}

impl Element for f64 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        mean
    }
}

impl Element for f32 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        mean as f32
    }
}

/// By way of `f32`: the mean of a few values of 8 bits has more bits than that only when it is rounded twice either
/// way, and the error stays below 0.51 ulp.
impl Element for bf16 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        bf16_wide(self).into()
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        bf16_nearest(mean as f32)
    }
}

/// The same value; unlike `half`'s conversion without a branch.
#[inline(always)]
pub(super) fn bf16_wide(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// As `half` rounds (to even), without a branch that keeps the loop from being vectorised.
#[inline(always)]
pub(super) fn bf16_nearest(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    // A NaN must not be carried into an infinity.
    let bits = if value.is_nan() { bits | 1 << 22 } else { rounded };
    bf16::from_bits((bits >> 16) as u16)
}

/// By way of blocks of `f32`, which `half` converts with the machine's own instructions. Rounded twice: the error
/// stays below 0.51 ulp.
impl Element for f16 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        Self::from_f32(mean as f32)
    }

    #[inline(always)]
    fn add(sums: &mut [f64], inputs: &[Weighted<'_, Self>], start: usize) {
        let mut wide = [0_f32; BLOCK];
        let wide = &mut wide[..sums.len()];
        for input in inputs {
            input.values[start..start + sums.len()].convert_to_f32_slice(wide);
            add_group(sums, [&*wide], [input.weight]);
        }
    }

    #[inline(always)]
    fn write(sums: &[f64], out: &mut [Self]) {
        let mut wide = [0_f32; BLOCK];
        let wide = &mut wide[..sums.len()];
        f32::write(sums, wide);
        out.convert_from_f32_slice(wide);
    }

    #[inline(always)]
    fn scale(sums: &mut [f64], values: &[Self], weight: f64) {
        sums.fill(0.0);
        Self::add(
            sums,
            &[Weighted {
                values,
                weight,
                samples: 0,
            }],
            0,
        );
    }
}

/// Integers of up to 32 bits, rounded to the nearest, halves to the even one.
macro_rules! integers {
    ($($type:ty)*) => {$(
        impl Element for $type {
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.into()
            }

            #[inline(always)]
            fn nearest(mean: f64) -> Self {
                // 1.5·2⁵² has an ulp of 1: the addition rounds, to even, and leaves the integer in the low bits.
                (mean + 6_755_399_441_055_744.0).to_bits() as Self
            }
        }
    )*};
}

integers!(i8 i16 i32 u8 u16 u32);
