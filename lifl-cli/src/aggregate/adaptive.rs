//! The server optimizers FedAdagrad, FedAdam and FedYogi: what the top makes of the round's mean before it becomes the
//! model (Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar and McMahan, "Adaptive Federated Optimization",
//! ICLR 2021, Algorithm 2), as Flame computes them:
//!
//! ```text
//! Δ ← mean of the round's weights − w            (or the mean of its deltas)
//! m ← β₁·m + (1 − β₁)·Δ
//! v ← v + Δ²                                     FedAdagrad
//!     v − (1 − β₂)·Δ²·sign(v − Δ²)               FedYogi
//!     β₂·v + (1 − β₂)·Δ²                         FedAdam
//! w ← w + η·m / (√v + τ)
//! ```
//!
//! with no bias correction, as in the paper. Where Flame departs from the paper, so does this: `m` and `v` begin at 0
//! (the paper has `v ≥ τ²`), and the first round's mean becomes the model as it is, for which Flame has no weights yet
//! to compare it with; the rule begins with the second round.
//!
//! One pass over the memory: each element of the mean, the model, `m` and `v` is read once, and of all but the model
//! written once. `m` and `v` lie in private memory: `f64` beside `F64`, `f32` beside every other float, and that is
//! also what is computed in. Tensors of integers are averaged only.

use std::ops::{Add, Div, Mul, Sub};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use lifl_common::config::{Adaptive, Optimizer, UpdateKind};
use lifl_common::update::{DType, Region, Schema};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::element::{BLOCK, bf16_nearest, bf16_wide, f16_wide};
use super::threads::Threads;
use super::{FoldError, Operand, add, check, elements, elements_mut};

/// Private memory that a [`ServerOptimizer`] takes, in bytes.
pub fn optimizer_bytes(schema: &Schema, optimizer: &Optimizer) -> usize {
    if *optimizer == Optimizer::FedAvg {
        return 0;
    }
    let of = |region: Region| {
        let elements = region.range.len() / region.dtype.bytes();
        match region.dtype {
            DType::F64 => elements * 2 * size_of::<f64>(),
            DType::F32 | DType::F16 | DType::BF16 => elements * 2 * size_of::<f32>(),
            _ => 0,
        }
    };
    schema.regions().into_iter().map(of).sum()
}

/// The moments of one region.
#[derive(Debug)]
enum Moments {
    /// Of integers.
    None,
    Single {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    Double {
        m: Vec<f64>,
        v: Vec<f64>,
    },
}

impl Moments {
    fn new(region: &Region) -> Self {
        let elements = region.range.len() / region.dtype.bytes();
        match region.dtype {
            DType::F64 => Self::Double {
                m: vec![0.0; elements],
                v: vec![0.0; elements],
            },
            DType::F32 | DType::F16 | DType::BF16 => Self::Single {
                m: vec![0.0; elements],
                v: vec![0.0; elements],
            },
            _ => Self::None,
        }
    }
}

/// A server optimizer with what it remembers of the rounds before.
#[derive(Debug)]
pub struct ServerOptimizer {
    optimizer: Optimizer,
    moments: Vec<Moments>,
    begun: bool,
}

impl ServerOptimizer {
    /// The optimizer at the start of a job. Its private memory is taken here, once.
    pub fn new(schema: &Schema, optimizer: Optimizer) -> Self {
        let moments = match optimizer {
            Optimizer::FedAvg => Vec::new(),
            _ => schema.regions().iter().map(Moments::new).collect(),
        };
        Self {
            optimizer,
            moments,
            begun: false,
        }
    }

    /// Makes `mean`, the round's mean of what `updates` says, the new model; `model` is the round's.
    ///
    /// # Errors
    /// If one of them is not the schema's (`model` is [`Operand::Input`] 0), or the new model is not finite, which
    /// spoils what the optimizer remembers.
    pub fn step(
        &mut self,
        threads: &Threads,
        schema: &Schema,
        updates: UpdateKind,
        model: &[u8],
        mean: &mut [u8],
    ) -> Result<(), FoldError> {
        check(schema, Operand::Input(0), model)?;
        check(schema, Operand::Out, mean)?;
        let deltas = updates == UpdateKind::Deltas;
        let averaged = |mean: &mut [u8]| {
            if deltas {
                add(threads, schema, model, mean)
            } else {
                Ok(())
            }
        };
        let (rates, eta) = match self.optimizer {
            Optimizer::FedAvg => return averaged(mean),
            _ if !self.begun => {
                self.begun = true;
                return averaged(mean);
            }
            Optimizer::FedAdagrad(rates) | Optimizer::FedAdam(rates) | Optimizer::FedYogi(rates) => {
                (rates, rates.eta)
            }
        };
        let mut finite = true;
        for (region, moments) in schema.regions().into_iter().zip(&mut self.moments) {
            let pass = Pass {
                threads,
                region: &region,
                mean: &mut *mean,
                model,
                rates: &rates,
                deltas,
            };
            finite &= match self.optimizer {
                Optimizer::FedAdagrad(_) => pass.of::<Adagrad>(moments),
                Optimizer::FedYogi(_) => pass.of::<Yogi>(moments),
                _ => pass.of::<Adam>(moments),
            };
        }
        if finite {
            Ok(())
        } else {
            Err(FoldError::Diverged { eta })
        }
    }
}

/// How `v` goes on.
trait Second {
    /// The next `v`, by the squared difference; `old` is β₂ and `new` 1 − β₂.
    fn next<R: Real>(v: R, square: R, old: R, new: R) -> R;
}

struct Adagrad;
struct Adam;
struct Yogi;

impl Second for Adagrad {
    #[inline(always)]
    fn next<R: Real>(v: R, square: R, _: R, _: R) -> R {
        v + square
    }
}

impl Second for Adam {
    #[inline(always)]
    fn next<R: Real>(v: R, square: R, old: R, new: R) -> R {
        old * v + new * square
    }
}

impl Second for Yogi {
    #[inline(always)]
    fn next<R: Real>(v: R, square: R, _: R, new: R) -> R {
        v - new * square * (v - square).sign()
    }
}

/// What is computed in.
trait Real:
    Copy
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    fn from_f64(value: f64) -> Self;
    fn sqrt(self) -> Self;
    /// -1, 0 or 1.
    fn sign(self) -> Self;
    fn finite(self) -> bool;
}

macro_rules! reals {
    ($($real:ty)*) => {$(
        impl Real for $real {
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }

            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }

            #[inline(always)]
            fn sign(self) -> Self {
                f32::from(i8::from(self > 0.0) - i8::from(self < 0.0)).into()
            }

            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }
        }
    )*};
}

reals!(f32 f64);

/// The rates in the type that is computed in.
#[derive(Clone, Copy)]
struct Rates<R> {
    old_1: R,
    new_1: R,
    old_2: R,
    new_2: R,
    eta: R,
    tau: R,
}

impl<R: Real> Rates<R> {
    fn new(rates: &Adaptive) -> Self {
        Self {
            old_1: R::from_f64(rates.beta_1),
            new_1: R::from_f64(1.0 - rates.beta_1),
            old_2: R::from_f64(rates.beta_2),
            new_2: R::from_f64(1.0 - rates.beta_2),
            eta: R::from_f64(rates.eta),
            tau: R::from_f64(rates.tau),
        }
    }
}

/// The rule for some elements; says whether the new weights are finite.
#[inline(always)]
fn adapt<R: Real, S: Second, const DELTAS: bool>(
    mean: &mut [R],
    model: &[R],
    m: &mut [R],
    v: &mut [R],
    rates: &Rates<R>,
) -> bool {
    let mut finite = true;
    for (((mean, &weight), m), v) in mean.iter_mut().zip(model).zip(m).zip(v) {
        let difference = if DELTAS { *mean } else { *mean - weight };
        *m = rates.old_1 * *m + rates.new_1 * difference;
        *v = S::next(*v, difference * difference, rates.old_2, rates.new_2);
        *mean = weight + rates.eta * *m / (v.sqrt() + rates.tau);
        finite &= mean.finite();
    }
    finite
}

/// A float as it lies in a slot, and as it is computed with.
trait Stored: Copy + Send + Sync + FromBytes + IntoBytes + Immutable + 'static {
    type Real: Real;

    fn adapt<S: Second, const DELTAS: bool>(
        mean: &mut [Self],
        model: &[Self],
        m: &mut [Self::Real],
        v: &mut [Self::Real],
        rates: &Rates<Self::Real>,
    ) -> bool;
}

macro_rules! stored_as_computed {
    ($($real:ty)*) => {$(
        impl Stored for $real {
            type Real = $real;

            #[inline(always)]
            fn adapt<S: Second, const DELTAS: bool>(
                mean: &mut [Self],
                model: &[Self],
                m: &mut [Self],
                v: &mut [Self],
                rates: &Rates<Self>,
            ) -> bool {
                adapt::<_, S, DELTAS>(mean, model, m, v, rates)
            }
        }
    )*};
}

stored_as_computed!(f32 f64);

/// A float of 16 bits, widened in blocks.
trait Short: Copy + Send + Sync + FromBytes + IntoBytes + Immutable + 'static {
    fn wide(self) -> f32;
    fn narrow(wide: &[f32], to: &mut [Self]);
    fn finite(self) -> bool;
}

impl Short for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        bf16_wide(self)
    }

    #[inline(always)]
    fn narrow(wide: &[f32], to: &mut [Self]) {
        for (to, &wide) in to.iter_mut().zip(wide) {
            *to = bf16_nearest(wide);
        }
    }

    #[inline(always)]
    fn finite(self) -> bool {
        bf16_wide(self).is_finite()
    }
}

impl Short for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f16_wide(self)
    }

    #[inline(always)]
    fn narrow(wide: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(wide);
    }

    #[inline(always)]
    fn finite(self) -> bool {
        f16_wide(self).is_finite()
    }
}

macro_rules! stored_short {
    ($($short:ty)*) => {$(
        impl Stored for $short {
            type Real = f32;

            #[inline(always)]
            fn adapt<S: Second, const DELTAS: bool>(
                mean: &mut [Self],
                model: &[Self],
                m: &mut [f32],
                v: &mut [f32],
                rates: &Rates<f32>,
            ) -> bool {
                let mut finite = true;
                let (mut wide_mean, mut wide_model) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
                let blocks = mean.chunks_mut(BLOCK).zip(model.chunks(BLOCK));
                for ((mean, model), (m, v)) in blocks.zip(m.chunks_mut(BLOCK).zip(v.chunks_mut(BLOCK))) {
                    let wide_mean = &mut wide_mean[..mean.len()];
                    let wide_model = &mut wide_model[..mean.len()];
                    for (wide, &short) in wide_mean.iter_mut().zip(&*mean) {
                        *wide = Short::wide(short);
                    }
                    for (wide, &short) in wide_model.iter_mut().zip(model) {
                        *wide = Short::wide(short);
                    }
                    finite &= adapt::<f32, S, DELTAS>(wide_mean, wide_model, m, v, rates);
                    Short::narrow(wide_mean, mean);
                    // What an f32 holds may be too much for 16 bits.
                    for &short in &*mean {
                        finite &= Short::finite(short);
                    }
                }
                finite
            }
        }
    )*};
}

stored_short!(bf16 f16);

/// One region's pass.
struct Pass<'a> {
    threads: &'a Threads,
    region: &'a Region,
    mean: &'a mut [u8],
    model: &'a [u8],
    rates: &'a Adaptive,
    deltas: bool,
}

impl Pass<'_> {
    /// By the rule `S`; says whether the new weights are finite.
    fn of<S: Second>(self, moments: &mut Moments) -> bool {
        match (self.region.dtype, moments) {
            (DType::F64, Moments::Double { m, v }) => self.typed::<f64, S>(m, v),
            (DType::F32, Moments::Single { m, v }) => self.typed::<f32, S>(m, v),
            (DType::BF16, Moments::Single { m, v }) => self.typed::<bf16, S>(m, v),
            (DType::F16, Moments::Single { m, v }) => self.typed::<f16, S>(m, v),
            _ => {
                self.integers();
                true
            }
        }
    }

    fn typed<E: Stored, S: Second>(self, m: &mut [E::Real], v: &mut [E::Real]) -> bool {
        if self.deltas {
            self.run::<E, S, true>(m, v)
        } else {
            self.run::<E, S, false>(m, v)
        }
    }

    fn run<E: Stored, S: Second, const DELTAS: bool>(self, m: &mut [E::Real], v: &mut [E::Real]) -> bool {
        let rates = Rates::new(self.rates);
        let range = &self.region.range;
        let mean = elements_mut::<E>(self.mean, range);
        let model = elements::<E>(self.model, range);
        self.threads.all(
            ((mean, model), (m, v)),
            #[inline(always)]
            |_, ((mean, model), (m, v))| E::adapt::<S, DELTAS>(mean, model, m, v, &rates),
        )
    }

    /// The mean is the model, or, of deltas, is added to it; integers wrap, whatever their sign.
    fn integers(self) {
        if self.deltas {
            super::delta::add_region(self.threads, self.region, self.model, self.mean);
        }
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::update::TensorSpec;

    use super::*;

    const RATES: Adaptive = Adaptive {
        beta_1: 0.8,
        beta_2: 0.95,
        eta: 0.05,
        tau: 1e-3,
    };

    /// More than a chunk of the threads' work, and no multiple of a block.
    const ELEMENTS: usize = (1 << 18) + 3 * BLOCK + 7;

    fn optimizers() -> [Optimizer; 3] {
        [
            Optimizer::FedAdagrad(RATES),
            Optimizer::FedAdam(RATES),
            Optimizer::FedYogi(RATES),
        ]
    }

    /// The rule for one element in `f64`, as the paper writes it.
    #[derive(Clone, Copy, Default)]
    struct Reference {
        m: f64,
        v: f64,
    }

    impl Reference {
        fn step(&mut self, optimizer: Optimizer, weight: f64, difference: f64) -> f64 {
            let square = difference * difference;
            self.m = RATES.beta_1 * self.m + (1.0 - RATES.beta_1) * difference;
            self.v = match optimizer {
                Optimizer::FedAvg => unreachable!("it has no moments"),
                Optimizer::FedAdagrad(_) => self.v + square,
                Optimizer::FedAdam(_) => RATES.beta_2 * self.v + (1.0 - RATES.beta_2) * square,
                Optimizer::FedYogi(_) => {
                    let sign = if self.v == square {
                        0.0
                    } else {
                        (self.v - square).signum()
                    };
                    self.v - (1.0 - RATES.beta_2) * square * sign
                }
            };
            weight + RATES.eta * self.m / (self.v.sqrt() + RATES.tau)
        }
    }

    /// A float of a slot.
    trait Number: Copy + IntoBytes + Immutable + FromBytes {
        const DTYPE: DType;
        /// Half a unit in the last place, relative, and of what is computed in.
        const ROUNDING: f64;
        fn of(value: f64) -> Self;
        fn value(self) -> f64;
    }

    macro_rules! numbers {
        ($($number:ty: $dtype:ident, $rounding:expr, $of:expr, $value:expr;)*) => {$(
            impl Number for $number {
                const DTYPE: DType = DType::$dtype;
                const ROUNDING: f64 = $rounding;
                fn of(value: f64) -> Self {
                    $of(value)
                }
                fn value(self) -> f64 {
                    $value(self)
                }
            }
        )*};
    }

    numbers! {
        f64: F64, 1e-13, |value| value, |number| number;
        f32: F32, 2e-6, |value| value as f32, f64::from;
        bf16: BF16, 1.0 / 256.0, bf16::from_f64, f64::from;
        f16: F16, 1.0 / 2048.0, f16::from_f64, f64::from;
    }

    /// The mean that the round's trainers come to, by element: it goes on towards 0, with turns and rests.
    fn mean(round: usize, element: usize, weight: f64) -> f64 {
        let turn = ((element * 31 + round * 17) % 13) as f64 / 13.0 - 0.4;
        if element.is_multiple_of(11) {
            weight
        } else {
            weight * 0.9 + turn * 0.3
        }
    }

    /// Runs some rounds, each from the model that came out, beside the reference from the same model.
    fn agrees<E: Number>(optimizer: Optimizer, updates: UpdateKind, threads: usize) {
        let schema = Schema::new(vec![TensorSpec::new("w", E::DTYPE, [ELEMENTS])]).expect("a schema");
        let threads = Threads::new(threads).expect("threads");
        let mut server = ServerOptimizer::new(&schema, optimizer);
        let mut reference = vec![Reference::default(); ELEMENTS];
        let mut model: Vec<E> = (0..ELEMENTS)
            .map(|i| E::of((i % 97) as f64 / 40.0 - 1.2))
            .collect();
        for round in 0..5 {
            let mut slot: Vec<E> = model
                .iter()
                .enumerate()
                .map(|(i, weight)| {
                    let weight = weight.value();
                    let mean = mean(round, i, weight);
                    E::of(if updates == UpdateKind::Deltas {
                        mean - weight
                    } else {
                        mean
                    })
                })
                .collect();
            let means = slot.clone();
            server
                .step(&threads, &schema, updates, model.as_bytes(), slot.as_mut_bytes())
                .expect("finite");
            for (i, ((weight, mean), new)) in model.iter().zip(&means).zip(&slot).enumerate() {
                let weight = weight.value();
                let difference = match updates {
                    UpdateKind::Deltas => mean.value(),
                    UpdateKind::Weights => mean.value() - weight,
                };
                let expected = match round {
                    0 => weight + difference,
                    _ => reference[i].step(optimizer, weight, difference),
                };
                let error = (new.value() - expected).abs();
                assert!(
                    error <= E::ROUNDING * expected.abs().max(0.1),
                    "{optimizer:?}, round {round}, element {i}: {} for {expected}",
                    new.value()
                );
            }
            model = slot;
        }
    }

    #[test]
    fn every_rule_agrees_with_the_papers_in_every_type() {
        for optimizer in optimizers() {
            for updates in [UpdateKind::Weights, UpdateKind::Deltas] {
                agrees::<f64>(optimizer, updates, 2);
                agrees::<f32>(optimizer, updates, 2);
                agrees::<bf16>(optimizer, updates, 1);
                agrees::<f16>(optimizer, updates, 1);
            }
        }
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F32, [ELEMENTS])]).expect("a schema");
        let model: Vec<f32> = (0..ELEMENTS).map(|i| (i as f32).sin()).collect();
        let run = |threads: Threads| {
            let mut server = ServerOptimizer::new(&schema, Optimizer::FedYogi(RATES));
            let mut weights = model.clone();
            for round in 0..3 {
                let mut slot: Vec<f32> = weights.iter().map(|w| w * 0.9 + round as f32 * 0.01).collect();
                server
                    .step(
                        &threads,
                        &schema,
                        UpdateKind::Weights,
                        weights.as_bytes(),
                        slot.as_mut_bytes(),
                    )
                    .expect("finite");
                weights = slot;
            }
            weights
        };
        let one = run(Threads::new(1).expect("threads").without_vectors());
        assert!(one == run(Threads::new(3).expect("threads")));
    }

    #[test]
    fn integers_are_averaged_only() {
        let specs = vec![
            TensorSpec::new("n", DType::I32, [3]),
            TensorSpec::new("w", DType::F32, [2]),
        ];
        let schema = Schema::new(specs).expect("a schema");
        let threads = Threads::new(1).expect("threads");
        for (updates, mean) in [
            (UpdateKind::Weights, [5_i32, -1, 9]),
            (UpdateKind::Deltas, [4, -3, 6]),
        ] {
            let mut server = ServerOptimizer::new(&schema, Optimizer::FedAdam(RATES));
            let model = ([1_i32, 2, 3], [0.5_f32, 0.25]);
            let bytes = |(n, w): ([i32; 3], [f32; 2])| {
                let mut words = vec![0_u64; 3];
                let data = &mut words.as_mut_bytes()[..20];
                let (n, w) = (n.as_bytes().to_vec(), w.as_bytes().to_vec());
                for (tensor, range) in schema.iter() {
                    data[range].copy_from_slice(if tensor.name == "n" { &n } else { &w });
                }
                words
            };
            let model = bytes(model);
            for _ in 0..3 {
                let mut slot = bytes((mean, [0.5, 0.25]));
                server
                    .step(
                        &threads,
                        &schema,
                        updates,
                        &model.as_bytes()[..20],
                        &mut slot.as_mut_bytes()[..20],
                    )
                    .expect("finite");
                let expected = bytes(([5, -1, 9], [0.0, 0.0]));
                let (_, range) = schema
                    .iter()
                    .find(|(tensor, _)| tensor.name == "n")
                    .expect("there");
                assert_eq!(slot.as_bytes()[range.clone()], expected.as_bytes()[range]);
            }
        }
    }

    #[test]
    fn a_step_that_is_too_large_says_so() {
        let rates = Adaptive {
            eta: 1e6,
            tau: 1e-3,
            ..RATES
        };
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F16, [1])]).expect("a schema");
        let threads = Threads::new(1).expect("threads");
        let mut server = ServerOptimizer::new(&schema, Optimizer::FedAdam(rates));
        let model = [f16::ONE];
        let mut step = || {
            let mut slot = [f16::from_f32(2.0)];
            server.step(
                &threads,
                &schema,
                UpdateKind::Weights,
                model.as_bytes(),
                slot.as_mut_bytes(),
            )
        };
        step().expect("the first mean is the model");
        let error = step().expect_err("infinite").to_string();
        assert!(error.contains("eta") && error.contains("1000000"), "{error}");
    }

    #[test]
    fn its_memory_is_what_is_planned() {
        let specs = vec![
            TensorSpec::new("a", DType::F64, [10]),
            TensorSpec::new("b", DType::F32, [20]),
            TensorSpec::new("c", DType::BF16, [30]),
            TensorSpec::new("d", DType::I64, [40]),
        ];
        let schema = Schema::new(specs).expect("a schema");
        let optimizer = Optimizer::FedAdam(RATES);
        let taken: usize = ServerOptimizer::new(&schema, optimizer)
            .moments
            .iter()
            .map(|moments| match moments {
                Moments::None => 0,
                Moments::Single { m, v } => 4 * (m.capacity() + v.capacity()),
                Moments::Double { m, v } => 8 * (m.capacity() + v.capacity()),
            })
            .sum();
        assert_eq!(taken, 10 * 16 + 50 * 8);
        assert_eq!(optimizer_bytes(&schema, &optimizer), taken);
        assert_eq!(optimizer_bytes(&schema, &Optimizer::FedAvg), 0);
    }
}
