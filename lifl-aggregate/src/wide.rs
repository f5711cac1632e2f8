//! 64-bit integers: their means are computed exactly, as 128-bit sums of samples times values.
//!
//! `f64` has 53 bits, so a mean through it could miss the value that all inputs share. No sum overflows: the samples
//! together are below 2⁶⁴ and a value's magnitude is at most 2⁶³ (`i64`) or below 2⁶⁴ (`u64`), so the sums stay within
//! `i128` and `u128`. The price is a division for each element, which is bearable since such tensors are counters.

use super::element::Weighted;

/// An element type whose mean is computed in 128-bit integers.
pub(super) trait Wide: Copy + Send + Sync + 'static {
    /// A sum of samples times values.
    type Sum: Copy + Send + Sync + Default + 'static;

    /// Adds a value so many times.
    fn add(sum: &mut Self::Sum, value: Self, samples: u64);

    /// The nearest integer to the sum's mean over so many samples, halves to the even one.
    fn mean(sum: Self::Sum, samples: u64) -> Self;
}

macro_rules! wide {
    ($($type:ty: $sum:ty)*) => {$(
        impl Wide for $type {
            type Sum = $sum;

            #[inline(always)]
            fn add(sum: &mut $sum, value: Self, samples: u64) {
                *sum += <$sum>::from(value) * <$sum>::from(samples);
            }

            #[inline(always)]
            fn mean(sum: $sum, samples: u64) -> Self {
                let samples = <$sum>::from(samples);
                let floor = sum.div_euclid(samples);
                let doubled = (sum - floor * samples) * 2;
                let up = doubled > samples || (doubled == samples && floor % 2 != 0);
                // Between the least and the greatest input, hence in range.
                (floor + <$sum>::from(up)) as Self
            }
        }
    )*};
}

wide!(i64: i128 u64: u128);

/// Adds the inputs' elements from `start` on, as often as they have samples.
#[inline(always)]
pub(super) fn add<E: Wide>(sums: &mut [E::Sum], inputs: &[Weighted<'_, E>], start: usize) {
    for input in inputs {
        for (sum, &value) in sums.iter_mut().zip(&input.values[start..]) {
            E::add(sum, value, input.samples);
        }
    }
}

/// The means of the sums over so many samples.
#[inline(always)]
pub(super) fn round<E: Wide>(sums: &[E::Sum], samples: u64, out: &mut [E]) {
    for (out, &sum) in out.iter_mut().zip(sums) {
        *out = E::mean(sum, samples);
    }
}
