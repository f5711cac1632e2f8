//! The tree against the flat average in `f64`.

use std::sync::Arc;

use half::{bf16, f16};
use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::{DType, Schema, TensorSpec};
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

const TYPES: [DType; 12] = [
    DType::F64,
    DType::I64,
    DType::U64,
    DType::F32,
    DType::I32,
    DType::U32,
    DType::F16,
    DType::BF16,
    DType::I16,
    DType::U16,
    DType::I8,
    DType::U8,
];

/// Data aligned as a slot's is.
#[derive(Clone)]
struct Data {
    words: Vec<u64>,
    bytes: usize,
}

impl Data {
    /// Full of NaN, which nobody may read before it is written.
    fn unwritten(bytes: usize) -> Self {
        Self {
            words: vec![u64::MAX; bytes.div_ceil(8)],
            bytes,
        }
    }

    fn get(&self) -> &[u8] {
        &self.words.as_bytes()[..self.bytes]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.words.as_mut_bytes()[..self.bytes]
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// From −1 to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// An element as any number, and back.
fn read(dtype: DType, bytes: &[u8]) -> f64 {
    macro_rules! read {
        ($type:ty) => {
            <$type>::from_le_bytes(bytes.try_into().expect("one element"))
        };
    }
    match dtype {
        DType::F64 => read!(f64),
        DType::I64 => read!(i64) as f64,
        DType::U64 => read!(u64) as f64,
        DType::F32 => read!(f32).into(),
        DType::I32 => read!(i32).into(),
        DType::U32 => read!(u32).into(),
        DType::F16 => read!(f16).into(),
        DType::BF16 => read!(bf16).into(),
        DType::I16 => read!(i16).into(),
        DType::U16 => read!(u16).into(),
        DType::I8 => read!(i8).into(),
        DType::U8 => read!(u8).into(),
    }
}

fn write(dtype: DType, value: f64, bytes: &mut [u8]) {
    match dtype {
        DType::F64 => bytes.copy_from_slice(&value.to_le_bytes()),
        DType::F32 => bytes.copy_from_slice(&(value as f32).to_le_bytes()),
        DType::F16 => bytes.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        DType::BF16 => bytes.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        _ => unreachable!("integers are any bits"),
    }
}

/// What one ulp of that type is at that magnitude.
fn ulp(dtype: DType, magnitude: f64) -> f64 {
    let (digits, least) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        DType::F32 => (23, -126),
        DType::F64 => (52, -1022),
        _ => return 1.0,
    };
    let exponent = if magnitude > 0.0 {
        magnitude.log2().floor() as i32
    } else {
        least
    };
    2_f64.powi(exponent.max(least) - digits)
}

/// One tensor of each type.
fn schema(types: &[DType], elements: usize) -> Arc<Schema> {
    let tensors = types
        .iter()
        .map(|dtype| TensorSpec::new(dtype.to_string(), *dtype, [elements]))
        .collect();
    Arc::new(Schema::new(tensors).expect("names differ"))
}

/// A trainer's update: floats of a few magnitudes, integers of any bits.
fn update(schema: &Schema, random: &mut Random, scale: f64, offset: f64) -> Data {
    let mut data = Data::unwritten(schema.data_bytes());
    for (tensor, range) in schema.iter() {
        for element in data.get_mut()[range].chunks_exact_mut(tensor.dtype.bytes()) {
            if tensor.dtype.is_float() {
                let value = match random.below(8) {
                    0 => 0.0,
                    1 => random.unit() * 1e-3,
                    _ => random.unit(),
                };
                write(tensor.dtype, offset + scale * value, element);
            } else {
                element.copy_from_slice(&random.next().to_le_bytes()[..tensor.dtype.bytes()]);
            }
        }
    }
    data
}

/// FedAvg of all at once, in `f64`: for each element its mean and the largest magnitude among the inputs.
fn flat(schema: &Schema, inputs: &[(Data, u64)]) -> Vec<(DType, Vec<(f64, f64)>)> {
    let all: f64 = inputs.iter().map(|(_, samples)| *samples as f64).sum();
    let mean = |dtype: DType, at: usize| {
        let read = |data: &Data| read(dtype, &data.get()[at..at + dtype.bytes()]);
        let sum: f64 = inputs
            .iter()
            .map(|(data, samples)| read(data) * *samples as f64)
            .sum();
        let largest = inputs
            .iter()
            .map(|(data, _)| read(data).abs())
            .fold(0.0, f64::max);
        (sum / all, largest)
    };
    let tensors = schema.iter().map(|(tensor, range)| {
        (
            tensor.dtype,
            range
                .step_by(tensor.dtype.bytes())
                .map(|at| mean(tensor.dtype, at))
                .collect(),
        )
    });
    tensors.collect()
}

/// Holds an aggregate that has passed so many levels against the flat average.
fn assert_is_average(schema: &Schema, aggregate: &Data, inputs: &[(Data, u64)], levels: usize) {
    for ((dtype, elements), (_, range)) in flat(schema, inputs).into_iter().zip(schema.iter()) {
        let largest = elements.iter().map(|(_, largest)| *largest).fold(0.0, f64::max);
        let got = aggregate.get()[range].chunks_exact(dtype.bytes());
        for (i, ((mean, magnitude), got)) in elements.into_iter().zip(got).enumerate() {
            let got = read(dtype, got);
            let bound = match dtype {
                DType::F32 => 1e-6 * largest,
                DType::F64 => 1e-14 * largest,
                // The reference is an f64 itself.
                _ => 0.51 * levels as f64 * ulp(dtype, magnitude) + 1e-14 * largest,
            };
            assert!(
                (got - mean).abs() <= bound,
                "{dtype}[{i}]: {got:e}, not {mean:e} within {bound:e}"
            );
        }
    }
}

fn threads(count: usize) -> Threads {
    Threads::new(count).expect("threads")
}

/// One aggregator's work: all at once when lazy, in batches as they come when eager.
fn aggregate(
    schema: &Arc<Schema>,
    timing: Timing,
    inputs: &[(Data, u64)],
    threads: &Threads,
    mut batch: impl FnMut() -> usize,
) -> (Data, u64) {
    let mut accumulator = WeightedMean::new(schema.clone(), UpdateKind::Weights, timing, threads.clone());
    let mut slot = Data::unwritten(schema.data_bytes());
    let inputs: Vec<_> = inputs
        .iter()
        .map(|(data, samples)| Input {
            data: data.get(),
            samples: *samples,
        })
        .collect();
    let mut rest = &inputs[..];
    // What came last is known to be the last, or nothing comes after it in the end.
    let known = timing == Timing::Lazy || batch().is_multiple_of(2);
    let samples = loop {
        let count = match timing {
            Timing::Lazy => rest.len(),
            Timing::Eager => batch().clamp(1, rest.len()),
        };
        let (now, later) = rest.split_at(count);
        if later.is_empty() && known {
            break accumulator.finish(slot.get_mut(), now);
        }
        accumulator.fold(slot.get_mut(), now).expect("finite inputs");
        rest = later;
        if rest.is_empty() {
            break accumulator.finish(slot.get_mut(), &[]);
        }
    };
    let samples = samples.expect("finite inputs");
    (slot, samples)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_tree_gives_the_flat_average(
        seed in any::<u64>(),
        types in proptest::sample::subsequence(TYPES.to_vec(), 1..4),
        elements in prop_oneof![1_usize..40, 2000_usize..2100],
        trainers in 1_usize..24,
        levels in 2_usize..4,
        scale in prop_oneof![Just(1.0), Just(3e-5), Just(1e4)],
    ) {
        let schema = schema(&types, elements);
        let mut random = Random(seed);
        let threads = threads(1);
        let trainers: Vec<_> = (0..trainers)
            .map(|_| (update(&schema, &mut random, scale, 0.0), 1 + random.next() % 10_000))
            .collect();
        let mut level = trainers.clone();
        for above in (0..levels).rev() {
            // Who reports to whom is random, and so is who comes first.
            random.shuffle(&mut level);
            let parents = if above == 0 { 1 } else { 1 + random.below(level.len()) };
            let mut groups = vec![Vec::new(); parents];
            for child in level {
                groups[random.below(parents)].push(child);
            }
            groups.retain(|group| !group.is_empty());
            level = groups.iter().map(|group| {
                let timing = if random.below(2) == 0 { Timing::Eager } else { Timing::Lazy };
                aggregate(&schema, timing, group, &threads, || 1 + random.below(group.len()))
            }).collect();
        }
        let (top, samples) = level.pop().expect("one top");
        prop_assert_eq!(samples, trainers.iter().map(|(_, samples)| samples).sum::<u64>());
        assert_is_average(&schema, &top, &trainers, levels);
    }

    #[test]
    fn the_mean_of_equal_values_is_that_value(
        seed in any::<u64>(), trainers in 1_usize..20, big in any::<bool>(), eager in any::<bool>(),
    ) {
        let schema = schema(&TYPES, 50);
        let mut random = Random(seed);
        // Any bits, but for the exponents of what is refused.
        let mut data = Data::unwritten(schema.data_bytes());
        data.get_mut().iter_mut().for_each(|byte| *byte = random.next() as u8);
        for (tensor, range) in schema.iter().filter(|(tensor, _)| tensor.dtype.is_float()) {
            for element in data.get_mut()[range].chunks_exact_mut(tensor.dtype.bytes()) {
                let refused = |value: f64| value.is_nan() || value.abs() >= super::element::LARGEST / 2.0;
                while refused(read(tensor.dtype, element)) {
                    element.fill_with(|| random.next() as u8);
                }
            }
        }
        let most = if big { u64::MAX / 20 } else { 100 };
        let inputs: Vec<_> = (0..trainers).map(|_| (data.clone(), 1 + random.next() % most)).collect();
        let timing = if eager { Timing::Eager } else { Timing::Lazy };
        let (mean, _) = aggregate(&schema, timing, &inputs, &threads(1), || 1 + random.below(3));
        for (tensor, range) in schema.iter() {
            let bytes = tensor.dtype.bytes();
            let pairs = mean.get()[range.clone()].chunks(bytes).zip(data.get()[range].chunks(bytes));
            for (got, want) in pairs {
                // Zero may lose its sign.
                let zero = tensor.dtype.is_float() && read(tensor.dtype, want) == 0.0;
                prop_assert!(got == want || zero && read(tensor.dtype, got) == 0.0, "{}", tensor.dtype);
            }
        }
    }
}

#[test]
fn two_hundred_children_add_up_no_rounding() {
    let types = [
        DType::F64,
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::I64,
        DType::I32,
        DType::U16,
        DType::I8,
    ];
    let schema = schema(&types, 5000);
    let mut random = Random(7);
    // Near 1, where an f32 has few bits to spare: folded into plain f32 slots, these would miss by about 1e-6.
    let inputs: Vec<_> = (0..200)
        .map(|_| {
            (
                update(&schema, &mut random, 0.01, 1.01),
                600 + random.next() % 100,
            )
        })
        .collect();
    for timing in [Timing::Eager, Timing::Lazy] {
        let (mean, samples) = aggregate(&schema, timing, &inputs, &threads(2), || 1);
        assert_eq!(samples, inputs.iter().map(|(_, samples)| samples).sum::<u64>());
        assert_is_average(&schema, &mean, &inputs, 1);
    }
}

#[test]
fn lazy_folds_in_several_calls_round_each_time_and_no_more() {
    let schema = schema(&[DType::F32, DType::BF16, DType::I64, DType::U8], 100);
    let mut random = Random(11);
    let inputs: Vec<_> = (0..6)
        .map(|_| (update(&schema, &mut random, 1.0, 0.0), 1 + random.next() % 9))
        .collect();
    let mut accumulator = WeightedMean::new(schema.clone(), UpdateKind::Weights, Timing::Lazy, threads(1));
    let mut slot = Data::unwritten(schema.data_bytes());
    for (data, samples) in &inputs {
        accumulator
            .fold(
                slot.get_mut(),
                &[Input {
                    data: data.get(),
                    samples: *samples,
                }],
            )
            .expect("finite");
    }
    accumulator.finish(slot.get_mut(), &[]).expect("an aggregate");
    assert_is_average(&schema, &slot, &inputs, inputs.len());
}

#[test]
fn neither_threads_nor_vectors_change_a_bit() {
    let schema = schema(
        &[DType::F64, DType::F32, DType::BF16, DType::I32, DType::U64],
        300_001,
    );
    let mut random = Random(3);
    let inputs: Vec<_> = (0..3)
        .map(|_| (update(&schema, &mut random, 1.0, 0.0), 1 + random.next() % 999))
        .collect();
    for timing in [Timing::Eager, Timing::Lazy] {
        let (alone, _) = aggregate(&schema, timing, &inputs, &threads(1), || 2);
        for threads in [threads(2), threads(3), threads(3).without_vectors()] {
            let (together, _) = aggregate(&schema, timing, &inputs, &threads, || 2);
            assert!(alone.get() == together.get(), "{threads:?}, {timing:?}");
        }
    }
}

#[test]
fn integers_are_exact_however_they_come() {
    let types: Vec<DType> = TYPES.into_iter().filter(|dtype| !dtype.is_float()).collect();
    let schema = schema(&types, 3001);
    let mut random = Random(13);
    let inputs: Vec<_> = (0..7)
        .map(|_| {
            (
                update(&schema, &mut random, 0.0, 0.0),
                1 + random.next() % (1 << 60),
            )
        })
        .collect();
    let (lazy, samples) = aggregate(&schema, Timing::Lazy, &inputs, &threads(1), || 7);
    for batch in 1..5 {
        let (eager, _) = aggregate(&schema, Timing::Eager, &inputs, &threads(2), || batch);
        assert!(eager.get() == lazy.get(), "{batch} at a time");
    }
    let (_, range) = schema.get("I32").expect("there");
    let read = |data: &Data, at: usize| {
        let bytes = &data.get()[range.clone()][4 * at..][..4];
        i128::from(i32::from_le_bytes(bytes.try_into().expect("four bytes")))
    };
    for at in 0..3001 {
        let weighted = inputs
            .iter()
            .map(|(data, samples)| read(data, at) * i128::from(*samples));
        let off = read(&lazy, at) * i128::from(samples) - weighted.sum::<i128>();
        assert!(
            2 * off.abs() <= i128::from(samples),
            "element {at} is {off} / {samples} off"
        );
    }
}

#[test]
fn halves_go_to_the_even_integer() {
    for dtype in [DType::I8, DType::I16, DType::I32, DType::I64] {
        let schema = schema(&[dtype], 4);
        let data = |values: [i64; 4]| {
            let mut data = Data::unwritten(schema.data_bytes());
            for (to, value) in data.get_mut().chunks_mut(dtype.bytes()).zip(values) {
                to.copy_from_slice(&value.to_le_bytes()[..dtype.bytes()]);
            }
            (data, 5)
        };
        let inputs = [data([1, 2, -1, -2]), data([2, 3, -2, -3])];
        for timing in [Timing::Eager, Timing::Lazy] {
            let (mean, _) = aggregate(&schema, timing, &inputs, &threads(1), || 1);
            assert_eq!(mean.get(), data([2, 2, -2, -2]).0.get(), "{dtype} {timing:?}");
        }
    }
}

#[test]
fn what_is_finite_never_overflows() {
    let schema = schema(&[DType::F64, DType::F32, DType::F16, DType::BF16], 3);
    let mut data = Data::unwritten(schema.data_bytes());
    for (tensor, range) in schema.iter() {
        let most = match tensor.dtype {
            DType::F16 => f16::MAX.into(),
            // The largest that nobody is blamed for, with as many bits as the type has.
            DType::F64 => (super::element::LARGEST / 2.0).next_down(),
            DType::F32 => f64::from(((super::element::LARGEST / 2.0) as f32).next_down()),
            _ => super::element::LARGEST * (0.5 - 1.0 / 512.0),
        };
        for element in data.get_mut()[range].chunks_exact_mut(tensor.dtype.bytes()) {
            write(tensor.dtype, most, element);
        }
    }
    for count in 1..60 {
        let inputs = vec![(data.clone(), 1); count];
        for timing in [Timing::Eager, Timing::Lazy] {
            let (mean, _) = aggregate(&schema, timing, &inputs, &threads(1), || 1);
            assert_eq!(mean.get(), data.get(), "{count} {timing:?}");
        }
    }
}

#[test]
fn what_is_not_finite_is_named_and_spoils() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let schema = schema(&[dtype, DType::I8], 3000);
        let mut random = Random(5);
        let good: Vec<_> = (0..4).map(|_| update(&schema, &mut random, 1.0, 0.0)).collect();
        let too_large = super::element::LARGEST * 64.0;
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, too_large, -too_large] {
            let mut rotten = good.clone();
            for (input, at) in [(1, 2999), (3, 0)] {
                let at = at * dtype.bytes();
                write(dtype, bad, &mut rotten[input].get_mut()[at..at + dtype.bytes()]);
            }
            for timing in [Timing::Eager, Timing::Lazy] {
                let mut accumulator =
                    WeightedMean::new(schema.clone(), UpdateKind::Weights, timing, threads(2));
                let mut slot = Data::unwritten(schema.data_bytes());
                let out = slot.get_mut();
                let all = |data: &[Data], accumulator: &mut WeightedMean, out: &mut [u8]| {
                    let inputs: Vec<_> = data
                        .iter()
                        .map(|data| Input {
                            data: data.get(),
                            samples: 3,
                        })
                        .collect();
                    accumulator.fold(out, &inputs)
                };
                all(&good[..1], &mut accumulator, out).expect("finite");
                let error = all(&rotten, &mut accumulator, out).expect_err("not finite");
                assert!(
                    matches!(&error, FoldError::NotFinite { inputs } if inputs == &[1, 3]),
                    "{error}"
                );
                assert!(matches!(
                    all(&good, &mut accumulator, out),
                    Err(FoldError::Spoilt)
                ));
                assert!(matches!(accumulator.finish(out, &[]), Err(FoldError::Spoilt)));
                accumulator.reset();
                all(&good, &mut accumulator, out).expect("finite");
                assert_eq!(accumulator.finish(out, &[]).expect("an aggregate"), 12);
                assert!(matches!(
                    all(&good, &mut accumulator, out),
                    Err(FoldError::Finished)
                ));
                assert_eq!(accumulator.finish(out, &[]).expect("the same aggregate"), 12);
                let inputs: Vec<_> = good.iter().map(|data| (data.clone(), 3)).collect();
                assert_is_average(&schema, &slot, &inputs, 1);
            }
        }
    }
}

#[test]
fn what_cannot_be_folded_changes_nothing() {
    let schema = schema(&[DType::F32], 4);
    let mut random = Random(1);
    let (a, b) = (
        update(&schema, &mut random, 1.0, 0.0),
        update(&schema, &mut random, 1.0, 0.0),
    );
    let mut accumulator = WeightedMean::new(schema.clone(), UpdateKind::Weights, Timing::Eager, threads(1));
    let mut slot = Data::unwritten(schema.data_bytes());
    let out = slot.get_mut();
    assert!(matches!(accumulator.finish(out, &[]), Err(FoldError::Empty)));
    let input = |data, samples| Input { data, samples };
    accumulator
        .fold(out, &[input(a.get(), u64::MAX - 1)])
        .expect("as many samples as there can be");
    let before = out.to_vec();
    let long = [0_u64; 3];
    let refused = [
        accumulator.fold(out, &[input(b.get(), 0)]),
        accumulator.fold(out, &[input(b.get(), 1), input(b.get(), 1)]),
        accumulator.fold(out, &[input(&b.get()[..12], 1)]),
        accumulator.fold(out, &[input(&long.as_bytes()[1..17], 1)]),
    ]
    .map(|result| result.expect_err("refused").to_string());
    let expected = [
        "input 0 has 0 samples".to_owned(),
        format!("the samples of input 1 overflow their sum, {} so far", u64::MAX),
        "input 0 has 12 bytes, the job's tensors have 16".to_owned(),
        "input 0 is not aligned to 4 bytes".to_owned(),
    ];
    assert_eq!(refused, expected);
    accumulator.fold(out, &[]).expect("nothing to do");
    assert_eq!((out.to_vec(), accumulator.samples()), (before, u64::MAX - 1));
}

#[test]
fn private_memory_is_what_eager_needs() {
    assert_eq!(scratch_bytes(&schema(&TYPES, 10), Timing::Lazy), 0);
    let each: usize = [0, 16, 16, 1, 16, 16, 4, 4, 16, 16, 16, 16].iter().sum();
    assert_eq!(scratch_bytes(&schema(&TYPES, 10), Timing::Eager), 10 * each);
}
