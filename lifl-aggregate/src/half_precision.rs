//! Runs of `f16`, widened and rounded by the machine's own instructions where it has them.
//!
//! `half` has them too, but behind a call for every eight values; here they are compiled into the loop.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::element::{f16_wide, weighted_sum};

/// Makes `sums` the values' weighted sums, added up in the order given. All have one length. They are read side by side, since
/// one stream alone does not keep the memory busy.
#[inline(always)]
pub(super) fn weighted_sums<const N: usize>(weights: &[f32; N], values: &[&[f16]; N], sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if x86::has_f16c() {
        let values = values.map(|values| values.reinterpret_cast());
        // SAFETY: the machine has the instructions.
        return unsafe { x86::weighted_sums(weights, &values, sums) };
    }
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = weighted_sum(weights, |n| f16_wide(values[n][i]));
    }
}

/// Makes `values` the nearest, halves to the even one.
#[inline(always)]
pub(super) fn narrow(wide: &[f32], values: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if x86::has_f16c() {
        // SAFETY: the machine has the instructions.
        return unsafe { x86::narrow(wide, values.reinterpret_cast_mut()) };
    }
    values.convert_from_f32_slice(wide);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph};

    use half::f16;

    use super::super::element::{f16_wide, weighted_sum};

    pub(super) fn has_f16c() -> bool {
        is_x86_feature_detected!("avx") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx,f16c")]
    pub(super) fn weighted_sums<const N: usize>(weights: &[f32; N], values: &[&[u16]; N], sums: &mut [f32]) {
        let len = sums.len();
        let values = values.map(|values| &values[..len]);
        let (eights, last) = sums.as_chunks_mut::<8>();
        let first_last = eights.len() * 8;
        let by_eights = values.map(|values| values.as_chunks::<8>().0);
        let by_eights = by_eights.map(|values| &values[..eights.len()]);
        for (i, sums) in eights.iter_mut().enumerate() {
            let wide = |n: usize| -> [f32; 8] { pulp::cast(_mm256_cvtph_ps(pulp::cast(by_eights[n][i]))) };
            let mut total = wide(0).map(|value| weights[0] * value);
            for (n, weight) in weights.iter().enumerate().skip(1) {
                for (total, value) in total.iter_mut().zip(wide(n)) {
                    *total += weight * value;
                }
            }
            *sums = total;
        }
        for (i, sum) in (first_last..).zip(last) {
            *sum = weighted_sum(weights, |n| f16_wide(f16::from_bits(values[n][i])));
        }
    }

    #[target_feature(enable = "avx,f16c")]
    pub(super) fn narrow(wide: &[f32], values: &mut [u16]) {
        let ((wide, last_wide), (values, last)) = (wide.as_chunks::<8>(), values.as_chunks_mut::<8>());
        for (values, &wide) in values.iter_mut().zip(wide) {
            let wide: __m256 = pulp::cast(wide);
            let nearest: __m128i = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(wide);
            *values = pulp::cast(nearest);
        }
        for (value, &wide) in last.iter_mut().zip(last_wide) {
            *value = f16::from_f32(wide).to_bits();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_values() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut turned = all.clone();
        turned.rotate_left(12_345);
        let weights = [0.25, 0.75];
        // A run that ends with less than a vector.
        for len in [all.len(), 1003] {
            let mut sums = vec![0.0; len];
            weighted_sums(&weights, &[&all[..len], &turned[..len]], &mut sums);
            for ((sum, a), b) in sums.iter().zip(&all).zip(&turned) {
                let expected = weights[0] * a.to_f32() + weights[1] * b.to_f32();
                let same = sum.to_bits() == expected.to_bits();
                assert!(
                    same || sum.is_nan() && expected.is_nan(),
                    "{a:?} and {b:?}: {sum:e}"
                );
            }
        }
    }

    #[test]
    fn narrows_as_half_does() {
        // Around each value, and halfway to the next.
        let wide: Vec<f32> = (0..=u16::MAX)
            .map(|bits| f16::from_bits(bits).to_f32())
            .filter(|wide| !wide.is_nan())
            .flat_map(|wide| [0, 1, 0xFFF, 0x1000, 0x1001].map(|low| f32::from_bits(wide.to_bits() ^ low)))
            .collect();
        let mut values = vec![f16::ZERO; wide.len()];
        narrow(&wide, &mut values);
        for (&wide, value) in wide.iter().zip(values) {
            let expected = f16::from_f32(wide);
            let same = value.to_bits() == expected.to_bits();
            assert!(
                same || value.is_nan() && expected.is_nan(),
                "{wide:e} became {value:?}"
            );
        }
    }
}
