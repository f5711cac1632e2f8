//! Folding eight updates into one, beside the speed of the memory it is read from.
//!
//! Each line's throughput counts the bytes that the operation must move at least: what it reads and what it writes.
//! `memory/*` in the same run is what the machine can do; compare ratios within one run only.
//!
//! `LIFL_BENCH_MB` sets an update's megabytes (232, a ResNet-152, unless told), `LIFL_BENCH_THREADS` the threads (the
//! machine's).

mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifl_aggregate::{Input, Rule, Threads, WeightedMean};
use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::{DType, Schema, TensorSpec};
use memmap2::{Advice, MmapMut};
use rayon::prelude::*;
use zerocopy::FromBytes;

use support::{number, threads};

/// Updates folded into one.
const UPDATES: usize = 8;

/// Memory such as arenas have it: in large pages where the machine gives them, and touched.
fn buffer(bytes: usize, fill: impl Fn(usize) -> u8) -> MmapMut {
    let mut map = MmapMut::map_anon(bytes).expect("memory for the benchmark");
    // Refused on kernels without them: the benchmark runs all the same.
    if let Err(error) = map.advise(Advice::HugePage) {
        eprintln!("no huge pages: {error}");
    }
    for (i, byte) in map.iter_mut().enumerate() {
        *byte = fill(i);
    }
    map
}

struct Bench {
    updates: Vec<MmapMut>,
    out: MmapMut,
    threads: usize,
}

impl Bench {
    fn new() -> Self {
        let bytes = number("LIFL_BENCH_MB", 232) * 1_000_000;
        // 0x3D.. and 0x3E.. in the high bytes: small numbers as floats of 16 and 32 bits, and some integers.
        let fill = |update: usize| {
            move |i: usize| {
                if i % 2 == 1 {
                    0x3D + (update & 1) as u8
                } else {
                    (i / 7) as u8
                }
            }
        };
        Self {
            updates: (0..UPDATES).map(|update| buffer(bytes, fill(update))).collect(),
            out: buffer(bytes, |_| 0),
            threads: threads(),
        }
    }

    fn bytes(&self) -> usize {
        self.out.len()
    }

    /// An empty aggregate of that type.
    fn accumulator(&self, dtype: DType, timing: Timing) -> WeightedMean {
        let tensor = TensorSpec::new("weights", dtype, [self.bytes() / dtype.bytes()]);
        let schema = Arc::new(Schema::new(vec![tensor]).expect("one tensor"));
        let threads = Threads::new(self.threads).expect("threads");
        WeightedMean::new(schema, UpdateKind::Weights, timing, threads)
    }
}

fn memory(criterion: &mut Criterion, bench: &mut Bench) {
    let mut group = criterion.benchmark_group("memory");
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(bench.threads)
        .build()
        .expect("threads");
    group.throughput(Throughput::Bytes((UPDATES * bench.bytes()) as u64));
    group.bench_function("read", |b| {
        let sum = |chunk: &[u8]| {
            let words = <[u64]>::ref_from_bytes(chunk).expect("whole words");
            words.iter().fold(0_u64, |sum, &word| sum.wrapping_add(word))
        };
        let read = || {
            bench
                .updates
                .par_iter()
                .map(|u| u.par_chunks(1 << 20).map(sum).max())
                .max()
        };
        b.iter(|| black_box(pool.install(read)));
    });
    group.throughput(Throughput::Bytes((2 * bench.bytes()) as u64));
    let (out, update) = (&mut bench.out, &bench.updates[0]);
    group.bench_function("copy", |b| {
        let copy = |(to, from): (&mut [u8], &[u8])| to.copy_from_slice(from);
        b.iter(|| {
            pool.install(|| {
                out.par_chunks_mut(1 << 20)
                    .zip(update.par_chunks(1 << 20))
                    .for_each(copy)
            })
        });
    });
    group.finish();
}

fn folds(criterion: &mut Criterion, bench: &mut Bench) {
    let bytes = bench.bytes();
    let mut group = criterion.benchmark_group("fold");
    for dtype in [DType::F32, DType::BF16, DType::F16, DType::I32, DType::F64] {
        let mut lazy = bench.accumulator(dtype, Timing::Lazy);
        let mut eager = bench.accumulator(dtype, Timing::Eager);
        // The reads, and the one write.
        group.throughput(Throughput::Bytes(((UPDATES + 1) * bytes) as u64));
        let inputs: Vec<_> = bench
            .updates
            .iter()
            .map(|data| Input { data, samples: 600 })
            .collect();
        let out = &mut bench.out;
        group.bench_function(format!("{dtype}/lazy"), |b| {
            b.iter(|| {
                lazy.reset();
                lazy.finish(out, &inputs).expect("finite updates")
            });
        });
        // Each input; what is kept, written with the first two and with each but the last, and read with each after the
        // first two; the slot, written with the last.
        let kept = match dtype {
            DType::F64 => bytes,
            DType::F32 => bytes + bytes / 4,
            _ => lifl_aggregate::scratch_bytes(lazy.schema(), Timing::Eager),
        };
        group.throughput(Throughput::Bytes(
            (UPDATES * bytes + 2 * (UPDATES - 2) * kept + bytes) as u64,
        ));
        group.bench_function(format!("{dtype}/eager"), |b| {
            b.iter(|| {
                eager.reset();
                let (first, others) = inputs.split_at(2);
                let (last, between) = others.split_at(UPDATES - 3);
                eager.fold(out, first).expect("finite updates");
                for one in between.chunks(1) {
                    eager.fold(out, one).expect("finite updates");
                }
                eager.finish(out, last).expect("finite updates")
            });
        });
    }
    group.finish();
}

fn all(criterion: &mut Criterion) {
    let mut bench = Bench::new();
    memory(criterion, &mut bench);
    folds(criterion, &mut bench);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = all
}
criterion_main!(benches);
