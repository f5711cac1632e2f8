//! The mean of one region: which arithmetic its element type needs, and its private memory.

use half::{bf16, f16};
use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::{DType, Region};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::element::{Element, Weighted, is_good};
use super::place::{self, Fold};
use super::threads::Threads;
use super::wide::{self, Wide};
use super::{Input, elements, elements_mut};

/// One region of an aggregate in the making.
#[derive(Debug)]
pub(super) struct RegionMean {
    /// Where it lies, and what its elements are averaged as.
    region: Region,
    kept: Kept,
}

/// What is kept of a region beside the slot.
#[derive(Debug)]
enum Kept {
    /// Nothing.
    Nothing,
    /// What rounding took from an `f32`.
    Guards(Vec<i8>),
    /// Means of types of up to 11 significant bits.
    Single(Vec<f32>),
    /// Means of integers of 16 and 32 bits.
    Double(Vec<f64>),
    /// Sums of samples times values.
    Signed(Vec<i128>),
    /// The same of unsigned values.
    Unsigned(Vec<u128>),
}

/// Bytes kept beside each element.
pub(super) const fn kept_bytes(dtype: DType, timing: Timing) -> usize {
    match (timing, dtype) {
        (Timing::Lazy, _) | (_, DType::F64) => 0,
        (_, DType::F32) => size_of::<i8>(),
        (_, DType::F16 | DType::BF16 | DType::I8 | DType::U8) => size_of::<f32>(),
        (_, DType::I16 | DType::U16 | DType::I32 | DType::U32) => size_of::<f64>(),
        (_, DType::I64 | DType::U64) => size_of::<i128>(),
    }
}

/// One call's inputs and what they are weighed by.
pub(super) struct Weights<'a> {
    /// Samples folded before.
    pub(super) before: u64,
    /// All samples, with those of the inputs.
    pub(super) samples: u64,
    /// The inputs, checked against the schema.
    pub(super) inputs: &'a [Input<'a>],
}

impl<'a> Weights<'a> {
    fn fold<E: FromBytes + Immutable>(&self, region: &Region) -> Fold<'a, E> {
        let share = |samples: u64| samples as f64 / self.samples as f64;
        let weighted = |input: &Input<'a>| Weighted {
            values: elements(input.data, &region.range),
            weight: share(input.samples),
            samples: input.samples,
        };
        Fold {
            before: self.before,
            weight: share(self.before),
            samples: self.samples,
            inputs: self.inputs.iter().map(weighted).collect(),
        }
    }
}

impl RegionMean {
    /// Takes the private memory.
    pub(super) fn new(region: Region, updates: UpdateKind, timing: Timing) -> Self {
        let elements = region.range.len() / region.dtype.bytes();
        // An unsigned delta is a signed number in two's complement.
        let dtype = match (updates, region.dtype) {
            (UpdateKind::Deltas, DType::U8) => DType::I8,
            (UpdateKind::Deltas, DType::U16) => DType::I16,
            (UpdateKind::Deltas, DType::U32) => DType::I32,
            (UpdateKind::Deltas, DType::U64) => DType::I64,
            (_, dtype) => dtype,
        };
        let kept = match (timing, dtype) {
            (Timing::Lazy, _) | (_, DType::F64) => Kept::Nothing,
            (_, DType::F32) => Kept::Guards(vec![0; elements]),
            (_, DType::I16 | DType::U16 | DType::I32 | DType::U32) => Kept::Double(vec![0.0; elements]),
            (_, DType::I64) => Kept::Signed(vec![0; elements]),
            (_, DType::U64) => Kept::Unsigned(vec![0; elements]),
            _ => Kept::Single(vec![0.0; elements]),
        };
        Self {
            region: Region { dtype, ..region },
            kept,
        }
    }

    /// Folds the inputs' regions; `false` if one is not finite, and then what is kept is rubbish.
    pub(super) fn fold(&mut self, threads: &Threads, out: &mut [u8], weights: &Weights<'_>) -> bool {
        let call = Call {
            threads,
            region: &self.region,
            out,
            weights,
        };
        match (self.region.dtype, &mut self.kept) {
            (DType::F64, _) => call.clamped(),
            (DType::F32, Kept::Guards(guards)) => call.guarded::<false>(guards),
            (DType::F32, _) => call.slot::<f32>(),
            (DType::F16, Kept::Single(means)) => call.private::<f16, _>(means),
            (DType::F16, _) => call.slot::<f16>(),
            (DType::BF16, Kept::Single(means)) => call.private::<bf16, _>(means),
            (DType::BF16, _) => call.slot::<bf16>(),
            (DType::I8, Kept::Single(means)) => call.private::<i8, _>(means),
            (DType::I8, _) => call.slot::<i8>(),
            (DType::U8, Kept::Single(means)) => call.private::<u8, _>(means),
            (DType::U8, _) => call.slot::<u8>(),
            (DType::I16, Kept::Double(means)) => call.private::<i16, _>(means),
            (DType::I16, _) => call.slot::<i16>(),
            (DType::U16, Kept::Double(means)) => call.private::<u16, _>(means),
            (DType::U16, _) => call.slot::<u16>(),
            (DType::I32, Kept::Double(means)) => call.private::<i32, _>(means),
            (DType::I32, _) => call.slot::<i32>(),
            (DType::U32, Kept::Double(means)) => call.private::<u32, _>(means),
            (DType::U32, _) => call.slot::<u32>(),
            (DType::I64, Kept::Signed(sums)) => call.exact::<i64>(sums),
            (DType::I64, _) => call.exact_slot::<i64>(),
            (DType::U64, Kept::Unsigned(sums)) => call.exact::<u64>(sums),
            (DType::U64, _) => call.exact_slot::<u64>(),
        }
    }

    /// Folds the last inputs' regions to the slot alone: what was kept beside it is stale afterwards. `false` as in
    /// [`fold`](Self::fold).
    pub(super) fn fold_last(&mut self, threads: &Threads, out: &mut [u8], weights: &Weights<'_>) -> bool {
        if weights.before == 0 {
            // Nothing is kept yet.
            let kept = std::mem::replace(&mut self.kept, Kept::Nothing);
            let good = self.fold(threads, out, weights);
            self.kept = kept;
            return good;
        }
        let call = Call {
            threads,
            region: &self.region,
            out: &mut *out,
            weights,
        };
        match (self.region.dtype, &mut self.kept) {
            (DType::F32, Kept::Guards(guards)) => call.guarded::<true>(guards),
            (DType::F16, Kept::Single(means)) => call.rounded::<f16, _>(means),
            (DType::BF16, Kept::Single(means)) => call.rounded::<bf16, _>(means),
            (DType::I8, Kept::Single(means)) => call.rounded::<i8, _>(means),
            (DType::U8, Kept::Single(means)) => call.rounded::<u8, _>(means),
            (DType::I16, Kept::Double(means)) => call.rounded::<i16, _>(means),
            (DType::U16, Kept::Double(means)) => call.rounded::<u16, _>(means),
            (DType::I32, Kept::Double(means)) => call.rounded::<i32, _>(means),
            (DType::U32, Kept::Double(means)) => call.rounded::<u32, _>(means),
            _ => {
                let good = self.fold(threads, out, weights);
                self.finish(threads, out, weights.samples);
                good
            }
        }
    }

    /// Writes what is kept beside the slot, rounded, to the slot.
    pub(super) fn finish(&self, threads: &Threads, out: &mut [u8], samples: u64) {
        let range = &self.region.range;
        match (self.region.dtype, &self.kept) {
            (_, Kept::Nothing | Kept::Guards(_)) => {}
            (DType::F16, Kept::Single(means)) => write::<f16, _>(threads, elements_mut(out, range), means),
            (DType::BF16, Kept::Single(means)) => write::<bf16, _>(threads, elements_mut(out, range), means),
            (DType::I8, Kept::Single(means)) => write::<i8, _>(threads, elements_mut(out, range), means),
            (_, Kept::Single(means)) => write::<u8, _>(threads, elements_mut(out, range), means),
            (DType::I16, Kept::Double(means)) => write::<i16, _>(threads, elements_mut(out, range), means),
            (DType::U16, Kept::Double(means)) => write::<u16, _>(threads, elements_mut(out, range), means),
            (DType::I32, Kept::Double(means)) => write::<i32, _>(threads, elements_mut(out, range), means),
            (_, Kept::Double(means)) => write::<u32, _>(threads, elements_mut(out, range), means),
            (_, Kept::Signed(sums)) => write_exact::<i64>(threads, elements_mut(out, range), sums, samples),
            (_, Kept::Unsigned(sums)) => write_exact::<u64>(threads, elements_mut(out, range), sums, samples),
        }
    }

    /// Whether an input's region holds neither NaN nor infinity, nor what is as good as that.
    pub(super) fn is_finite(&self, threads: &Threads, data: &[u8]) -> bool {
        let range = &self.region.range;
        match self.region.dtype {
            DType::F64 => threads.all(elements(data, range), |_, part| all_finite::<f64>(part)),
            DType::F32 => threads.all(elements(data, range), |_, part| all_finite::<f32>(part)),
            DType::F16 => threads.all(elements(data, range), |_, part| all_finite::<f16>(part)),
            DType::BF16 => threads.all(elements(data, range), |_, part| all_finite::<bf16>(part)),
            _ => true,
        }
    }
}

/// One region in one call; its methods hand the chunks of a [`place`] to the threads.
struct Call<'a> {
    threads: &'a Threads,
    region: &'a Region,
    out: &'a mut [u8],
    weights: &'a Weights<'a>,
}

impl Call<'_> {
    fn clamped(self) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            elements_mut(self.out, &self.region.range),
            #[inline(always)]
            |start, out| place::clamped(out, start, &fold),
        )
    }

    fn guarded<const LAST: bool>(self, guards: &mut [i8]) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            (elements_mut(self.out, &self.region.range), guards),
            #[inline(always)]
            |start, (out, guards)| place::guarded::<LAST>(out, guards, start, &fold),
        )
    }

    fn slot<E: Element>(self) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            elements_mut::<E>(self.out, &self.region.range),
            #[inline(always)]
            |start, out| place::slot(out, start, &fold),
        )
    }

    fn private<E: Element, C: Element>(self, means: &mut [C]) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            means,
            #[inline(always)]
            |start, means| place::private(means, start, &fold),
        )
    }

    fn rounded<E: Element, C: Element>(self, means: &[C]) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            (elements_mut(self.out, &self.region.range), means),
            #[inline(always)]
            |start, (out, means)| place::rounded(out, means, start, &fold),
        )
    }

    fn exact_slot<E: Wide + FromBytes + IntoBytes + Immutable>(self) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            elements_mut::<E>(self.out, &self.region.range),
            #[inline(always)]
            |start, out| place::exact_slot(out, start, &fold),
        )
    }

    fn exact<E: Wide + FromBytes + Immutable>(self, sums: &mut [E::Sum]) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            sums,
            #[inline(always)]
            |start, sums| place::exact(sums, start, &fold),
        )
    }
}

fn write<E: Element, C: Element>(threads: &Threads, out: &mut [E], means: &[C]) {
    threads.all(
        (out, means),
        #[inline(always)]
        |_, (out, means)| {
            place::finish(out, means);
            true
        },
    );
}

fn write_exact<E: Wide>(threads: &Threads, out: &mut [E], sums: &[E::Sum], samples: u64) {
    threads.all(
        (out, sums),
        #[inline(always)]
        |_, (out, sums)| {
            wide::round(sums, samples, out);
            true
        },
    );
}

fn all_finite<E: Element>(part: &[E]) -> bool {
    part.iter().all(|&value| is_good(value))
}
