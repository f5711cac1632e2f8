//! The arithmetic of one type of floats: blocks of `f64` sums, what is added to them, and how they are rounded.
//!
//! A block's sums stay in the first cache level while the inputs stream past, each once.
//!
//! Values of at most 11 significant bits are multiplied and added up in `f32` within a group of up to eight inputs
//! (measured on bf16: a quarter to a half faster), all others in `f64`; what groups add up to is always summed in `f64`.
//!
//! Numbers of [`LARGEST`] and beyond count as infinite. Why: a model that holds one cannot be trained on, and a server
//! optimizer squares what it is given; one such update would spoil every later round for all.
//!
//! Why a rounded mean never leaves its type's range. Let M be the largest magnitude among k inputs. The weights are
//! quotients that sum to 1 within (k + 1)·2⁻⁵³, and each product and each addition errs by 2⁻⁵³·M at most, so that a
//! sum is at most M·(1 + 2⁻³⁵) for k up to 2¹⁶. What a rounding to `f32` carries past M begins at M·(1 + 2⁻²⁵). With
//! products in `f32` a sum is at most M·(1 + 2⁻²⁰) whatever k is, since each group errs only in its own share, and where
//! means are kept in `f32` each fold adds 2⁻²⁵; what a rounding to 16 bits carries past M begins at M·(1 + 2⁻¹²). Hence
//! the sum of finite inputs is finite, rounds to M at most, and the mean of equal values is that value. `f64`, for which
//! this argument is too weak, has bounds instead ([`f64_in_slot`](super::fold::f64_in_slot)).

use std::ops::{Add, BitOr, Mul};

use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::half_precision;

/// A mean of this magnitude is refused as an infinite one is. Its square is far from what an `f32` holds, and so is that of
/// a difference of two that are smaller.
pub(super) const LARGEST: f64 = (1_u64 << 60) as f64;

/// An input of this magnitude is the cause of a mean that is refused: as a mean is between its inputs, one of them is at
/// least as large, but for a rounding.
const LARGEST_INPUT: f64 = LARGEST / 2.0;

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

/// A type of floats.
pub(super) trait Element: FromBytes + IntoBytes + Immutable + Copy + Send + Sync + 'static {
    /// What a group's weighted values are added up in before they go to the `f64` sums.
    type Sum: Sum;

    /// Whether [`nearest`](Self::nearest) is vectorised within any loop; where not, [`write`](Self::write) is faster.
    const ROUNDS_INLINE: bool = true;

    /// Whether [`widen`](Self::widen) is fast within any loop; where not, [`weighted_sums`](Self::weighted_sums) is faster.
    const WIDENS_INLINE: bool = true;

    /// The same value.
    fn widen(self) -> Self::Sum;

    /// Makes `sums` the weighted sums of values, added up in the order given.
    #[inline(always)]
    fn weighted_sums<const N: usize>(
        weights: &[Self::Sum; N],
        values: &[&[Self]; N],
        sums: &mut [Self::Sum],
    ) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = weighted_sum(weights, |n| values[n][i].widen());
        }
    }

    /// The same value.
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.widen().to_f64()
    }

    /// The nearest value.
    fn nearest(mean: f64) -> Self;

    /// Adds the inputs' elements from `start` on, times their weights.
    #[inline(always)]
    fn add(sums: &mut [f64], inputs: &[Weighted<'_, Self>], start: usize) {
        let (eights, rest) = inputs.as_chunks::<8>();
        let (fours, rest) = rest.as_chunks::<4>();
        let (twos, ones) = rest.as_chunks::<2>();
        for group in eights {
            add_group(sums, group, start);
        }
        for group in fours {
            add_group(sums, group, start);
        }
        for group in twos {
            add_group(sums, group, start);
        }
        for one in ones {
            add_group(sums, std::array::from_ref(one), start);
        }
    }

    /// Rounds the sums.
    #[inline(always)]
    fn write<P: Sum>(sums: &[P], out: &mut [Self]) {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = Self::nearest(sum.to_f64());
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

/// A float that weighted values are added up in.
pub(super) trait Sum: Element + Mul<Output = Self> + Add<Output = Self> {
    const ZERO: Self;

    /// As wide as the float, so that one loop has vectors of one length.
    type Bits: Copy + Default + BitOr<Output = Self::Bits>;

    /// What tells of one sum whether it is below [`LARGEST`]; that of several is put together by `|`.
    fn exponent(self) -> Self::Bits;

    /// Whether all are below that of whose [`exponent`](Self::exponent)s that is put together.
    fn all_finite(exponents: Self::Bits) -> bool;
}

impl Sum for f32 {
    const ZERO: Self = 0.0;
    type Bits = u32;

    /// What is too large is made infinite. Zero times a finite value has no exponent bit; times any other, all of them. (Made
    /// smaller, as with `f64`, a small value would become subnormal, which some machines are slow at.)
    #[inline(always)]
    fn exponent(self) -> u32 {
        const TO_INFINITY: f32 = (1_u128 << (128 - 60)) as f32;
        (self * TO_INFINITY * 0.0).to_bits()
    }

    #[inline(always)]
    fn all_finite(exponents: u32) -> bool {
        exponents & f32::INFINITY.to_bits() == 0
    }
}

impl Sum for f64 {
    const ZERO: Self = 0.0;
    type Bits = u64;

    /// What is too large is made 2 or more: the highest bit of the exponent says so.
    #[inline(always)]
    fn exponent(self) -> u64 {
        (self * (2.0 / LARGEST)).to_bits()
    }

    #[inline(always)]
    fn all_finite(exponents: u64) -> bool {
        exponents & 2_f64.to_bits() == 0
    }
}

/// Several inputs that are read in one pass, in their order. Eight streams at once is what keeps the memory busy: one alone
/// reaches half of its speed.
pub(super) struct Group<'a, E: Element, const N: usize> {
    values: [&'a [E]; N],
    weights: [E::Sum; N],
}

impl<'a, E: Element, const N: usize> Group<'a, E, N> {
    /// Their elements from `start` on, so many.
    #[inline(always)]
    pub(super) fn new(inputs: &[Weighted<'a, E>; N], start: usize, len: usize) -> Self {
        Self {
            values: inputs.each_ref().map(|input| &input.values[start..start + len]),
            weights: inputs.each_ref().map(|input| E::Sum::nearest(input.weight)),
        }
    }

    /// What the `i`-th elements add up to, each times its weight.
    #[inline(always)]
    pub(super) fn sum(&self, i: usize) -> E::Sum {
        weighted_sum(&self.weights, |n| self.values[n][i].widen())
    }

    /// The same as the first sum of all, which is added to nothing, with its exponent in `bits`.
    #[inline(always)]
    pub(super) fn first(&self, i: usize, bits: &mut <E::Sum as Sum>::Bits) -> E::Sum {
        let sum = E::Sum::ZERO + self.sum(i);
        *bits = *bits | sum.exponent();
        sum
    }

    /// All [sums](Self::sum).
    #[inline(always)]
    pub(super) fn sums(&self, sums: &mut [E::Sum]) {
        E::weighted_sums(&self.weights, &self.values, sums);
    }
}

/// The products' sum, in their order.
#[inline(always)]
pub(super) fn weighted_sum<P: Sum, const N: usize>(weights: &[P; N], value: impl Fn(usize) -> P) -> P {
    let mut sum = weights[0] * value(0);
    for (n, &weight) in weights.iter().enumerate().skip(1) {
        sum = sum + weight * value(n);
    }
    sum
}

/// Adds several inputs to sums in memory.
#[inline(always)]
fn add_group<E: Element, const N: usize>(sums: &mut [f64], group: &[Weighted<'_, E>; N], start: usize) {
    let group = Group::new(group, start, sums.len());
    if E::WIDENS_INLINE {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += group.sum(i).to_f64();
        }
    } else {
        let mut block = [E::Sum::ZERO; BLOCK];
        group.sums(&mut block[..sums.len()]);
        for (sum, more) in sums.iter_mut().zip(block) {
            *sum += more.to_f64();
        }
    }
}

/// Whether a value is none that a mean may be refused for.
#[inline(always)]
pub(super) fn is_valid<E: Element>(value: E) -> bool {
    value.to_f64().abs() < LARGEST_INPUT
}

/// Whether all sums are finite, and below [`LARGEST`].
#[inline(always)]
pub(super) fn finite(sums: &[f64]) -> bool {
    let mut bits = 0;
    for &sum in sums {
        bits |= sum.exponent();
    }
    f64::all_finite(bits)
}

impl Element for f64 {
    type Sum = Self;

    #[inline(always)]
    fn widen(self) -> Self {
        self
    }

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
    type Sum = f64;

    #[inline(always)]
    fn widen(self) -> f64 {
        self.into()
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        mean as f32
    }
}

/// Rounded by way of `f32`: twice, so that the error is below 0.51 ulp rather than 0.5.
impl Element for bf16 {
    type Sum = f32;

    #[inline(always)]
    fn widen(self) -> f32 {
        bf16_wide(self)
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

/// Rounded by way of `f32` too, with the machine's own instruction.
impl Element for f16 {
    type Sum = f32;
    const ROUNDS_INLINE: bool = false;
    const WIDENS_INLINE: bool = false;

    #[inline(always)]
    fn widen(self) -> f32 {
        f16_wide(self)
    }

    #[inline(always)]
    fn nearest(mean: f64) -> Self {
        Self::from_f32(mean as f32)
    }

    #[inline(always)]
    fn write<P: Sum>(sums: &[P], out: &mut [Self]) {
        let mut wide = [0_f32; BLOCK];
        let wide = &mut wide[..sums.len()];
        f32::write(sums, wide);
        half_precision::narrow(wide, out);
    }

    #[inline(always)]
    fn weighted_sums<const N: usize>(weights: &[f32; N], values: &[&[Self]; N], sums: &mut [f32]) {
        half_precision::weighted_sums(weights, values, sums);
    }
}

/// The same value, where there is no [instruction](super::half_precision) for it: inlined and vectorised with the loop around it,
/// and without a subnormal `f32`, which some machines are slow at.
#[inline(always)]
pub(super) fn f16_wide(value: f16) -> f32 {
    const EXPONENT: u32 = 0x1F << 23;
    let bits = u32::from(value.to_bits());
    let magnitude = (bits & 0x7FFF) << 13;
    // The exponents' biases are 15 and 127; all ones stays all ones.
    let normal = f32::from_bits(magnitude + (112 << 23));
    let infinite = f32::from_bits(magnitude + (224 << 23));
    // 2⁻¹⁴ times 1.m, less 2⁻¹⁴: what 0.m means in a subnormal.
    let subnormal = f32::from_bits(magnitude + (113 << 23)) - f32::from_bits(113 << 23);
    // Two selections rather than a match, which would be a branch.
    let finite = if magnitude & EXPONENT == 0 {
        subnormal
    } else {
        normal
    };
    let value = if magnitude & EXPONENT == EXPONENT {
        infinite
    } else {
        finite
    };
    f32::from_bits(value.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_finite_below_the_largest() {
        fn of<S: Sum>(values: &[S]) -> bool {
            let exponents = values.iter().map(|value| value.exponent());
            S::all_finite(exponents.fold(S::Bits::default(), |all, more| all | more))
        }
        let single = LARGEST as f32;
        for sign in [1.0, -1.0] {
            let good = [0.0, f64::MIN_POSITIVE, 5e-324, 1.0, 2.0, LARGEST.next_down()];
            assert!(of(&good.map(|value| sign * value)));
            for bad in [LARGEST, LARGEST.next_up(), f64::MAX, f64::INFINITY, f64::NAN] {
                assert!(!of(&[0.5, sign * bad, 1.0]), "{bad:e}");
            }
            let sign = sign as f32;
            let good = [0.0, f32::MIN_POSITIVE, 1e-45, 1.0, 2.0, single.next_down()];
            assert!(of(&good.map(|value| sign * value)));
            for bad in [single, single.next_up(), f32::MAX, f32::INFINITY, f32::NAN] {
                assert!(!of(&[0.5, sign * bad, 1.0]), "{bad:e}");
            }
        }
    }

    /// Every value of 16 bits.
    fn all() -> impl Iterator<Item = u16> {
        0..=u16::MAX
    }

    #[test]
    fn widens_as_half_does() {
        for bits in all() {
            let (brain, ieee) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(
                bf16_wide(brain) == brain.to_f32() || brain.is_nan() && bf16_wide(brain).is_nan(),
                "{bits:#x}"
            );
            assert!(
                f16_wide(ieee) == ieee.to_f32() || ieee.is_nan() && f16_wide(ieee).is_nan(),
                "{bits:#x}"
            );
            assert_eq!(f16_wide(ieee).is_sign_negative(), ieee.is_sign_negative());
        }
    }

    #[test]
    fn narrows_as_half_does() {
        for bits in all()
            .flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| u32::from(high) << 16 | low))
        {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (bf16_nearest(value), bf16::from_f32(value));
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{value:e}"
            );
        }
    }
}
