//! The loops that fold floats into a mean: one function for each place where the mean is kept between folds.
//!
//! | function | types | private bytes per element | rounded |
//! | --- | --- | --- | --- |
//! | [`rounded`] into the slot | all but `f64`, when lazy | 0 | at each fold |
//! | [`rounded`] into `f32` in private memory | 16-bit floats, when eager | 4 | at each fold to `f32`; at the [`last`] to the type |
//! | [`guarded`] | `f32`, when eager | 1 | at each fold to 31 bits, 8 of them beside the slot; at the last to the type |
//! | [`f64_in_slot`] | `f64` | 0 | at each fold |
//!
//! Tensors of integers are averaged [elsewhere](super::integers).
//!
//! Each takes the chunk, the index of its first element in the region, and the fold; each gives `false` if an input
//! was not finite, and then the mean is rubbish.
//!
//! Why `f32` is guarded: two hundred folds into an `f32` slot add up two hundred roundings, and a tensor whose values
//! are all near 1 then misses the flat average by about 10⁻⁶ (0.97 · 10⁻⁶ in a simulation of 3,000 elements), which is
//! all that a job may be off. With eight more bits nothing adds up, for one byte read and one written beside the
//! twelve that the fold moves anyway.

use super::element::{BLOCK, Element, Group, Sum, Weighted, finite};

/// Returns what the call gives for inputs that are one group; goes on for any other number of them.
macro_rules! if_one_group {
    ($inputs:expr, |$group:ident| $call:expr) => {
        match &$inputs[..] {
            [a] => {
                let $group = &[*a];
                return $call;
            }
            [a, b] => {
                let $group = &[*a, *b];
                return $call;
            }
            [a, b, c, d] => {
                let $group = &[*a, *b, *c, *d];
                return $call;
            }
            [a, b, c, d, e, f, g, h] => {
                let $group = &[*a, *b, *c, *d, *e, *f, *g, *h];
                return $call;
            }
            _ => {}
        }
    };
}

/// One region's share in one call.
pub(super) struct Fold<'a, E> {
    /// Samples folded before; with none, the mean so far is never read.
    pub(super) before: u64,
    /// Their share of all samples.
    pub(super) weight: f64,
    /// All samples, with those of the inputs.
    pub(super) samples: u64,
    /// The inputs, in the order given.
    pub(super) inputs: Vec<Weighted<'a, E>>,
}

impl<E: Element> Fold<'_, E> {
    /// The mean of the elements from `start` on. `before` fills in the mean so far, if anything was folded.
    #[inline(always)]
    fn sum(&self, sums: &mut [f64], start: usize, before: impl Fn(&mut [f64])) {
        match self.before {
            0 => sums.fill(0.0),
            _ => before(sums),
        }
        E::add(sums, &self.inputs, start);
    }
}

/// Folds into a mean of type `M`, which is rounded to that.
#[inline(always)]
pub(super) fn rounded<E: Element, M: Element>(mean: &mut [M], start: usize, fold: &Fold<'_, E>) -> bool {
    if fold.before == 0 {
        if_one_group!(fold.inputs, |group| first_at_once(mean, start, group));
    } else if M::ROUNDS_INLINE {
        if_one_group!(fold.inputs, |group| next_at_once(mean, start, fold, group));
    }
    let mut block = [0.0; BLOCK];
    let mut good = true;
    for (i, mean) in mean.chunks_mut(BLOCK).enumerate() {
        let sums = &mut block[..mean.len()];
        fold.sum(
            sums,
            start + i * BLOCK,
            #[inline(always)]
            |sums| M::scale(sums, mean, fold.weight),
        );
        good &= finite(sums);
        M::write(sums, mean);
    }
    good
}

/// As [`rounded`], bit for bit, for the first inputs, if they are one group: neither have their sums to lie in memory nor
/// to be `f64`.
#[inline(always)]
fn first_at_once<E: Element, M: Element, const N: usize>(
    mean: &mut [M],
    start: usize,
    group: &[Weighted<'_, E>; N],
) -> bool {
    let mut block = [E::Sum::ZERO; BLOCK];
    let mut bits = Default::default();
    for (i, mean) in mean.chunks_mut(BLOCK).enumerate() {
        let group = Group::new(group, start + i * BLOCK, mean.len());
        if M::ROUNDS_INLINE && E::WIDENS_INLINE {
            for (i, mean) in mean.iter_mut().enumerate() {
                *mean = M::nearest(group.first(i, &mut bits).to_f64());
            }
        } else {
            let sums = &mut block[..mean.len()];
            group.sums(sums);
            for sum in &mut *sums {
                *sum = E::Sum::ZERO + *sum;
                bits = bits | sum.exponent();
            }
            M::write(sums, mean);
        }
    }
    E::Sum::all_finite(bits)
}

/// As [`rounded`], bit for bit, for further inputs, if they are one group.
#[inline(always)]
fn next_at_once<E: Element, M: Element, const N: usize>(
    mean: &mut [M],
    start: usize,
    fold: &Fold<'_, E>,
    group: &[Weighted<'_, E>; N],
) -> bool {
    let mut block = [E::Sum::ZERO; BLOCK];
    let mut bits = 0;
    let mut next = |mean: &mut M, more: E::Sum| {
        let sum = fold.weight * mean.to_f64() + more.to_f64();
        bits |= sum.exponent();
        *mean = M::nearest(sum);
    };
    for (i, mean) in mean.chunks_mut(BLOCK).enumerate() {
        let group = Group::new(group, start + i * BLOCK, mean.len());
        if E::WIDENS_INLINE {
            for (i, mean) in mean.iter_mut().enumerate() {
                next(mean, group.sum(i));
            }
        } else {
            let sums = &mut block[..mean.len()];
            group.sums(sums);
            for (mean, &more) in mean.iter_mut().zip(&*sums) {
                next(mean, more);
            }
        }
    }
    f64::all_finite(bits)
}

/// Folds the last inputs into means in private memory: the slot is written, and they are not.
#[inline(always)]
pub(super) fn last<E: Element>(out: &mut [E], means: &[f32], start: usize, fold: &Fold<'_, E>) -> bool {
    let mut block = [0.0; BLOCK];
    let mut good = true;
    for (i, (out, means)) in out.chunks_mut(BLOCK).zip(means.chunks(BLOCK)).enumerate() {
        let sums = &mut block[..out.len()];
        fold.sum(
            sums,
            start + i * BLOCK,
            #[inline(always)]
            |sums| f32::scale(sums, means, fold.weight),
        );
        good &= finite(sums);
        E::write(sums, out);
    }
    good
}

/// Rounds means in private memory to the slot.
#[inline(always)]
pub(super) fn finish<E: Element>(out: &mut [E], means: &[f32]) {
    let mut block = [0.0; BLOCK];
    for (out, means) in out.chunks_mut(BLOCK).zip(means.chunks(BLOCK)) {
        let sums = &mut block[..out.len()];
        f32::scale(sums, means, 1.0);
        E::write(sums, out);
    }
}

/// An `f64` slot. Rounded weights may sum to a hair more than 1, which `f64` itself would show: the mean is kept
/// between the least and the greatest input, so that equal values give that value and nothing overflows.
#[inline(always)]
pub(super) fn f64_in_slot(out: &mut [f64], start: usize, fold: &Fold<'_, f64>) -> bool {
    /// Three arrays of this, and the input, are less than a first cache level.
    const PART: usize = BLOCK / 4;
    let (mut sums, mut least, mut greatest) = ([0.0; PART], [0.0; PART], [0.0; PART]);
    let mut good = true;
    for (i, out) in out.chunks_mut(PART).enumerate() {
        let len = out.len();
        let (sums, least, greatest) = (&mut sums[..len], &mut least[..len], &mut greatest[..len]);
        if fold.before == 0 {
            sums.fill(0.0);
            least.fill(f64::INFINITY);
            greatest.fill(f64::NEG_INFINITY);
        } else {
            f64::scale(sums, out, fold.weight);
            least.copy_from_slice(out);
            greatest.copy_from_slice(out);
        }
        let (fours, ones) = fold.inputs.as_chunks::<4>();
        for group in fours {
            f64_group(sums, least, greatest, group, start + i * PART);
        }
        for one in ones {
            f64_group(sums, least, greatest, std::array::from_ref(one), start + i * PART);
        }
        for (i, out) in out.iter_mut().enumerate() {
            // Comparisons with NaN are false, so that a NaN stays; an infinite input is its own bound.
            let sum = if sums[i] < least[i] { least[i] } else { sums[i] };
            *out = if sum > greatest[i] { greatest[i] } else { sum };
        }
        good &= finite(out);
    }
    good
}

/// Adds several inputs in one pass, and widens the bounds to hold them.
#[inline(always)]
fn f64_group<const N: usize>(
    sums: &mut [f64],
    least: &mut [f64],
    greatest: &mut [f64],
    group: &[Weighted<'_, f64>; N],
    start: usize,
) {
    let len = sums.len();
    let (least, greatest) = (&mut least[..len], &mut greatest[..len]);
    let values = group.each_ref().map(|input| &input.values[start..start + len]);
    let weights = group.each_ref().map(|input| input.weight);
    for i in 0..len {
        let (mut sum, mut low, mut high) = (sums[i], least[i], greatest[i]);
        for n in 0..N {
            let value = values[n][i];
            sum += weights[n] * value;
            low = if value < low { value } else { low };
            high = if value > high { value } else { high };
        }
        (sums[i], least[i], greatest[i]) = (sum, low, high);
    }
}

/// An `f32` slot, always rounded to the nearest, and beside it what that rounding took away.
///
/// A mean is kept as 31 significant bits of an `f64`; as integers, those are the slot's value widened, plus the guard
/// times 2²¹. (The bits of floats of one sign are ordered as the floats are, so that holds across powers of two.)
///
/// The `LAST` fold rounds to the slot alone: its guards are stale afterwards.
#[inline(always)]
pub(super) fn guarded<const LAST: bool>(
    out: &mut [f32],
    guards: &mut [i8],
    start: usize,
    fold: &Fold<'_, f32>,
) -> bool {
    if_one_group!(fold.inputs, |group| guarded_at_once::<LAST, _>(
        out, guards, start, fold, group
    ));
    let mut block = [0.0; BLOCK];
    let mut good = true;
    for (i, (out, guards)) in out.chunks_mut(BLOCK).zip(guards.chunks_mut(BLOCK)).enumerate() {
        let sums = &mut block[..out.len()];
        fold.sum(
            sums,
            start + i * BLOCK,
            #[inline(always)]
            |sums| {
                for ((sum, &out), &guard) in sums.iter_mut().zip(out.iter()).zip(guards.iter()) {
                    *sum = fold.weight * join(out, guard);
                }
            },
        );
        good &= finite(sums);
        for ((out, guard), &sum) in out.iter_mut().zip(guards).zip(sums.iter()) {
            keep::<LAST>(sum, out, guard);
        }
    }
    good
}

/// As [`guarded`], bit for bit, for inputs that are one group.
#[inline(always)]
fn guarded_at_once<const LAST: bool, const N: usize>(
    out: &mut [f32],
    guards: &mut [i8],
    start: usize,
    fold: &Fold<'_, f32>,
    group: &[Weighted<'_, f32>; N],
) -> bool {
    let mut good = true;
    for (i, (out, guards)) in out.chunks_mut(BLOCK).zip(guards.chunks_mut(BLOCK)).enumerate() {
        let group = Group::new(group, start + i * BLOCK, out.len());
        let mut bits = 0;
        if fold.before == 0 {
            for (i, (out, guard)) in out.iter_mut().zip(guards).enumerate() {
                let sum = group.first(i, &mut bits);
                keep::<LAST>(sum, out, guard);
            }
        } else {
            for (i, (out, guard)) in out.iter_mut().zip(guards).enumerate() {
                let sum = fold.weight * join(*out, *guard) + group.sum(i);
                bits |= sum.exponent();
                keep::<LAST>(sum, out, guard);
            }
        }
        good &= f64::all_finite(bits);
    }
    good
}

/// Keeps a mean, if more is to be folded with its guard.
#[inline(always)]
fn keep<const LAST: bool>(mean: f64, out: &mut f32, guard: &mut i8) {
    if LAST {
        *out = f32::nearest(mean);
    } else {
        (*out, *guard) = split(mean);
    }
}

/// Where the guard's lowest bit stands in an `f64`.
const GUARD_SHIFT: u32 = 21;

/// The mean that a slot and its guard keep.
#[inline(always)]
fn join(out: f32, guard: i8) -> f64 {
    let guard = (i64::from(guard) << GUARD_SHIFT) as u64;
    f64::from_bits(f64::from(out).to_bits().wrapping_add(guard))
}

/// What the slot and its guard keep of a mean.
#[inline(always)]
fn split(mean: f64) -> (f32, i8) {
    let kept = mean.to_bits().wrapping_add(1 << (GUARD_SHIFT - 1)) >> GUARD_SHIFT;
    let nearest = kept.wrapping_add(1 << 7) >> 8;
    let out = f64::from_bits(nearest << (GUARD_SHIFT + 8));
    let guard = kept.wrapping_sub(nearest << 8) as i8;
    // Below `f32`'s normal range the slot has fewer bits than that: it stands alone there.
    let normal = out.abs() >= f64::from(f32::MIN_POSITIVE);
    (
        if normal { out } else { mean } as f32,
        if normal { guard } else { 0 },
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_guard_keeps_31_bits_and_the_slot_is_the_nearest(bits in any::<u64>()) {
            // Exponents that f32 has, and those around its least ones.
            let mean = f64::from_bits(bits & !(0x7FF << 52) | (860 + (bits >> 52) % 290) << 52);
            let (out, guard) = split(mean);
            let kept = join(out, guard);
            if out.abs() > f32::MIN_POSITIVE {
                prop_assert!((kept - mean).abs() <= mean.abs() * 2_f64.powi(-31), "{mean:e} became {kept:e}");
            } else {
                prop_assert!((kept - mean).abs() <= 2_f64.powi(-149), "{mean:e} became {kept:e}");
            }
            let ulp = f64::from(out.abs().next_up() - out.abs());
            prop_assert!((f64::from(out) - mean).abs() <= ulp * 0.502, "{mean:e} in the slot: {out:e}");
        }

        #[test]
        fn what_f32_has_is_kept_as_it_is(value in any::<f32>()) {
            let (out, guard) = split(value.into());
            prop_assert_eq!((out.to_bits(), guard), (value.to_bits(), 0));
        }
    }
}
