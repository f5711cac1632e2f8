//! Tensors of integers: their means are computed exactly, as 128-bit sums of samples times values.
//!
//! Few tensors hold integers, and those are counters: so one loop serves all eight types, which reads and writes them in
//! blocks of `i64` and is compiled once.
//!
//! A `u64` is read as the `i64` that is 2⁶³ less; the mean is as much less, and since 2⁶³ is even, a half still goes to the
//! even integer. No sum overflows: the samples together are below 2⁶⁴ and a value's magnitude is at most 2⁶³, so the sums
//! stay within `i128`. A mean is between the least and the greatest input, hence in its type's range. `f64`, with its 53
//! bits, could miss the value that all inputs share.

use lifl_common::update::DType;

use super::fold::Fold;
use super::threads::{Part, Threads};

/// Elements in a block: 24 KiB of values and sums.
const BLOCK: usize = 1024;

/// Integers of a slot that are written, as bytes.
struct Slot<'a> {
    dtype: DType,
    bytes: &'a mut [u8],
}

impl Part for Slot<'_> {
    fn len(&self) -> usize {
        self.bytes.len() / self.dtype.bytes()
    }

    fn split_at(self, mid: usize) -> (Self, Self) {
        let dtype = self.dtype;
        let (first, second) = self.bytes.split_at_mut(mid * dtype.bytes());
        (Self { dtype, bytes: first }, Self { dtype, bytes: second })
    }
}

/// Folds inputs into the mean in the slot, which is rounded in each call.
pub(super) fn fold_in_slot(threads: &Threads, dtype: DType, out: &mut [u8], fold: &Fold<'_, u8>) {
    threads.each(Slot { dtype, bytes: out }, |start, out| {
        let block_bytes = BLOCK * dtype.bytes();
        for (i, out) in out.bytes.chunks_mut(block_bytes).enumerate() {
            let mut block = [0; BLOCK];
            let sums = &mut block[..out.len() / dtype.bytes()];
            if fold.before > 0 {
                add(sums, dtype, out, fold.before);
            }
            add_inputs(sums, dtype, start + i * BLOCK, fold);
            write_means(sums, fold.samples, dtype, out);
        }
    });
}

/// Adds inputs to sums in private memory.
pub(super) fn fold_in_sums(threads: &Threads, dtype: DType, sums: &mut [i128], fold: &Fold<'_, u8>) {
    threads.each(sums, |start, sums| {
        for (i, sums) in sums.chunks_mut(BLOCK).enumerate() {
            if fold.before == 0 {
                sums.fill(0);
            }
            add_inputs(sums, dtype, start + i * BLOCK, fold);
        }
    });
}

/// Writes the means of sums over so many samples to the slot.
pub(super) fn finish(threads: &Threads, dtype: DType, out: &mut [u8], sums: &[i128], samples: u64) {
    threads.each((Slot { dtype, bytes: out }, sums), |_, (out, sums)| {
        let blocks = out.bytes.chunks_mut(BLOCK * dtype.bytes());
        for (out, sums) in blocks.zip(sums.chunks(BLOCK)) {
            write_means(sums, samples, dtype, out);
        }
    });
}

/// Adds the inputs' elements from `start` on, times their samples.
fn add_inputs(sums: &mut [i128], dtype: DType, start: usize, fold: &Fold<'_, u8>) {
    let bytes = start * dtype.bytes()..(start + sums.len()) * dtype.bytes();
    for input in &fold.inputs {
        add(sums, dtype, &input.values[bytes.clone()], input.samples);
    }
}

/// Adds a block's values, times so many samples.
fn add(sums: &mut [i128], dtype: DType, bytes: &[u8], samples: u64) {
    let mut block = [0; BLOCK];
    let values = &mut block[..sums.len()];
    read(dtype, bytes, values);
    for (sum, &mut value) in sums.iter_mut().zip(values) {
        *sum += i128::from(value) * i128::from(samples);
    }
}

/// Writes a block of the nearest integers to the means, halves to the even one.
fn write_means(sums: &[i128], samples: u64, dtype: DType, out: &mut [u8]) {
    let mut block = [0; BLOCK];
    let means = &mut block[..sums.len()];
    for (mean, &sum) in means.iter_mut().zip(sums) {
        *mean = nearest_mean(sum, samples);
    }
    write(dtype, means, out);
}

fn nearest_mean(sum: i128, samples: u64) -> i64 {
    let samples = i128::from(samples);
    let floor = sum.div_euclid(samples);
    let doubled = (sum - floor * samples) * 2;
    let up = doubled > samples || (doubled == samples && floor % 2 != 0);
    (floor + i128::from(up)) as i64
}

/// How far a `u64` is moved to be an `i64`.
const MIDDLE: u64 = 1 << 63;

fn read(dtype: DType, bytes: &[u8], values: &mut [i64]) {
    macro_rules! read {
        ($type:ty, $widened:expr) => {{
            let (elements, _) = bytes.as_chunks::<{ size_of::<$type>() }>();
            for (value, &element) in values.iter_mut().zip(elements) {
                *value = $widened(<$type>::from_ne_bytes(element));
            }
        }};
    }
    match dtype {
        DType::I8 => read!(i8, i64::from),
        DType::U8 => read!(u8, i64::from),
        DType::I16 => read!(i16, i64::from),
        DType::U16 => read!(u16, i64::from),
        DType::I32 => read!(i32, i64::from),
        DType::U32 => read!(u32, i64::from),
        DType::U64 => read!(u64, |value: u64| (value ^ MIDDLE) as i64),
        _ => read!(i64, |value: i64| value),
    }
}

fn write(dtype: DType, values: &[i64], bytes: &mut [u8]) {
    macro_rules! write {
        ($type:ty, $narrowed:expr) => {{
            let (elements, _) = bytes.as_chunks_mut::<{ size_of::<$type>() }>();
            for (element, &value) in elements.iter_mut().zip(values) {
                *element = <$type>::to_ne_bytes($narrowed(value));
            }
        }};
    }
    match dtype {
        DType::I8 | DType::U8 => write!(u8, |value: i64| value as u8),
        DType::I16 | DType::U16 => write!(u16, |value: i64| value as u16),
        DType::I32 | DType::U32 => write!(u32, |value: i64| value as u32),
        DType::U64 => write!(u64, |value: i64| value as u64 ^ MIDDLE),
        _ => write!(i64, |value: i64| value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_rounded_to_the_nearest_and_halves_to_the_even_one() {
        let means = [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5].map(|sum| nearest_mean(sum, 2));
        assert_eq!(means, [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]);
        assert_eq!(
            nearest_mean(i128::from(i64::MIN) * i128::from(u64::MAX), u64::MAX),
            i64::MIN
        );
        assert_eq!(
            nearest_mean(i128::from(i64::MAX) * i128::from(u64::MAX), u64::MAX),
            i64::MAX
        );
    }

    #[test]
    fn every_type_comes_back_as_it_was_read() {
        let types = [
            DType::I8,
            DType::U8,
            DType::I16,
            DType::U16,
            DType::I32,
            DType::U32,
            DType::I64,
            DType::U64,
        ];
        let bytes: Vec<u8> = (0..=255).map(|i: u8| i.reverse_bits().wrapping_mul(77)).collect();
        for dtype in types {
            let mut values = vec![0; bytes.len() / dtype.bytes()];
            read(dtype, &bytes, &mut values);
            let mut back = vec![0; bytes.len()];
            write(dtype, &values, &mut back);
            assert_eq!(back, bytes, "{dtype}");
        }
        let ends = |dtype, bytes: &[u8]| {
            let mut value = [0];
            read(dtype, bytes, &mut value);
            value[0]
        };
        assert_eq!(ends(DType::I8, &[0xFF]), -1);
        assert_eq!(ends(DType::U8, &[0xFF]), 255);
        assert_eq!(ends(DType::U64, &[0; 8]), i64::MIN);
        assert_eq!(ends(DType::U64, &[0xFF; 8]), i64::MAX);
    }
}
