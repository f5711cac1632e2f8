//! The mean of one region: which arithmetic its element type needs, and its private memory.

use half::{bf16, f16};
use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::{DType, Region};
use zerocopy::{FromBytes, Immutable};

use super::element::{Element, Weighted, is_valid};
use super::fold::{self, Fold};
use super::integers;
use super::threads::Threads;
use super::{Input, elements, elements_mut};

/// One region of an aggregate.
#[derive(Debug)]
pub(super) struct RegionMean {
    /// Where it lies, and what its elements are averaged as.
    region: Region,
    memory: PrivateMemory,
}

/// What is kept of a region beside the slot.
#[derive(Debug)]
enum PrivateMemory {
    Nothing,
    /// What rounding took from an `f32`.
    Guards(Vec<i8>),
    /// Means of 16-bit floats.
    Means(Vec<f32>),
    /// Sums of samples times integers.
    Sums(Vec<i128>),
}

/// Bytes of private memory for each element.
pub(super) const fn private_bytes(dtype: DType, timing: Timing) -> usize {
    match (timing, dtype) {
        (Timing::Lazy, _) | (_, DType::F64) => 0,
        (_, DType::F32) => size_of::<i8>(),
        (_, DType::F16 | DType::BF16) => size_of::<f32>(),
        _ => size_of::<i128>(),
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
        let memory = match (timing, dtype) {
            (Timing::Lazy, _) | (_, DType::F64) => PrivateMemory::Nothing,
            (_, DType::F32) => PrivateMemory::Guards(vec![0; elements]),
            (_, DType::F16 | DType::BF16) => PrivateMemory::Means(vec![0.0; elements]),
            _ => PrivateMemory::Sums(vec![0; elements]),
        };
        Self {
            region: Region { dtype, ..region },
            memory,
        }
    }

    /// Folds the inputs' regions; `false` if one is not finite, and then the mean is rubbish.
    pub(super) fn fold(&mut self, threads: &Threads, out: &mut [u8], weights: &Weights<'_>) -> bool {
        let call = Call {
            threads,
            region: &self.region,
            out,
            weights,
        };
        match (self.region.dtype, &mut self.memory) {
            (DType::F64, _) => call.f64_in_slot(),
            (DType::F32, PrivateMemory::Guards(guards)) => call.guarded::<false>(guards),
            (DType::F32, _) => call.in_slot::<f32>(),
            (DType::F16, PrivateMemory::Means(means)) => call.in_means::<f16>(means),
            (DType::F16, _) => call.in_slot::<f16>(),
            (DType::BF16, PrivateMemory::Means(means)) => call.in_means::<bf16>(means),
            (DType::BF16, _) => call.in_slot::<bf16>(),
            (_, PrivateMemory::Sums(sums)) => call.in_sums(sums),
            (_, _) => call.integers_in_slot(),
        }
    }

    /// Folds the last inputs' regions to the slot alone: what is kept beside it is stale afterwards. `false` as in
    /// [`fold`](Self::fold).
    pub(super) fn fold_last(&mut self, threads: &Threads, out: &mut [u8], weights: &Weights<'_>) -> bool {
        if weights.before == 0 {
            // Nothing is kept yet.
            let memory = std::mem::replace(&mut self.memory, PrivateMemory::Nothing);
            let finite = self.fold(threads, out, weights);
            self.memory = memory;
            return finite;
        }
        let call = Call {
            threads,
            region: &self.region,
            out: &mut *out,
            weights,
        };
        match (self.region.dtype, &mut self.memory) {
            (DType::F32, PrivateMemory::Guards(guards)) => call.guarded::<true>(guards),
            (DType::F16, PrivateMemory::Means(means)) => call.last::<f16>(means),
            (DType::BF16, PrivateMemory::Means(means)) => call.last::<bf16>(means),
            _ => {
                let finite = self.fold(threads, out, weights);
                self.finish(threads, out, weights.samples);
                finite
            }
        }
    }

    /// Writes the mean that is kept beside the slot, rounded, to the slot.
    pub(super) fn finish(&self, threads: &Threads, out: &mut [u8], samples: u64) {
        let Region { dtype, range, .. } = &self.region;
        match (dtype, &self.memory) {
            (_, PrivateMemory::Nothing | PrivateMemory::Guards(_)) => {}
            (DType::F16, PrivateMemory::Means(means)) => {
                write::<f16>(threads, elements_mut(out, range), means)
            }
            (_, PrivateMemory::Means(means)) => write::<bf16>(threads, elements_mut(out, range), means),
            (_, PrivateMemory::Sums(sums)) => {
                integers::finish(threads, *dtype, &mut out[range.clone()], sums, samples);
            }
        }
    }

    /// Whether an input's region holds neither NaN nor infinity, nor what is as good as that.
    pub(super) fn is_finite(&self, threads: &Threads, data: &[u8]) -> bool {
        let range = &self.region.range;
        match self.region.dtype {
            DType::F64 => threads.all(elements(data, range), |_, part| all_valid::<f64>(part)),
            DType::F32 => threads.all(elements(data, range), |_, part| all_valid::<f32>(part)),
            DType::F16 => threads.all(elements(data, range), |_, part| all_valid::<f16>(part)),
            DType::BF16 => threads.all(elements(data, range), |_, part| all_valid::<bf16>(part)),
            _ => true,
        }
    }
}

/// One region in one call; its methods hand chunks of it to the threads.
struct Call<'a> {
    threads: &'a Threads,
    region: &'a Region,
    out: &'a mut [u8],
    weights: &'a Weights<'a>,
}

impl Call<'_> {
    fn f64_in_slot(self) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            elements_mut(self.out, &self.region.range),
            #[inline(always)]
            |start, out| fold::f64_in_slot(out, start, &fold),
        )
    }

    fn guarded<const LAST: bool>(self, guards: &mut [i8]) -> bool {
        let fold = self.weights.fold(self.region);
        self.threads.all(
            (elements_mut(self.out, &self.region.range), guards),
            #[inline(always)]
            |start, (out, guards)| fold::guarded::<LAST>(out, guards, start, &fold),
        )
    }

    fn in_slot<E: Element>(self) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            elements_mut::<E>(self.out, &self.region.range),
            #[inline(always)]
            |start, out| fold::rounded(out, start, &fold),
        )
    }

    fn in_means<E: Element>(self, means: &mut [f32]) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            means,
            #[inline(always)]
            |start, means| fold::rounded(means, start, &fold),
        )
    }

    fn last<E: Element>(self, means: &[f32]) -> bool {
        let fold = self.weights.fold::<E>(self.region);
        self.threads.all(
            (elements_mut(self.out, &self.region.range), means),
            #[inline(always)]
            |start, (out, means)| fold::last(out, means, start, &fold),
        )
    }

    fn integers_in_slot(self) -> bool {
        let Region { dtype, range, .. } = self.region;
        let fold = self.weights.fold(self.region);
        integers::fold_in_slot(self.threads, *dtype, &mut self.out[range.clone()], &fold);
        true
    }

    fn in_sums(self, sums: &mut [i128]) -> bool {
        let fold = self.weights.fold(self.region);
        integers::fold_in_sums(self.threads, self.region.dtype, sums, &fold);
        true
    }
}

fn write<E: Element>(threads: &Threads, out: &mut [E], means: &[f32]) {
    threads.all(
        (out, means),
        #[inline(always)]
        |_, (out, means)| {
            fold::finish(out, means);
            true
        },
    );
}

fn all_valid<E: Element>(part: &[E]) -> bool {
    part.iter().all(|&value| is_valid(value))
}
