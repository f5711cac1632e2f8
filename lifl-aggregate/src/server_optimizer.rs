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
//! written once. `m` and `v` are the optimizer's [state](super::optimizer_state), which the caller keeps: a step reads the one
//! before and writes the next to another place, so that one which fails spoils nothing. They are `f64` beside `F64`,
//! `f32` beside every other float, and that is also what is computed in. Tensors of integers are averaged only.

use std::ops::{Add, Div, Mul, Sub};
use std::sync::Arc;

use half::{bf16, f16};
use lifl_common::config::{Adaptive, Optimizer, UpdateKind};
use lifl_common::update::{DType, Schema};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::element::{BLOCK, bf16_nearest, bf16_wide, f16_wide};
use super::half_precision;
use super::optimizer_state::{Run, State, runs, state_schema};
use super::threads::Threads;
use super::{FoldError, Operand, add, check, elements, elements_mut};

/// A server optimizer, at the top.
#[derive(Debug)]
pub struct ServerOptimizer {
    optimizer: Optimizer,
    updates: UpdateKind,
    schema: Arc<Schema>,
    /// What its state consists of; `None` if it remembers nothing.
    state: Option<Schema>,
    runs: Vec<Run>,
}

impl ServerOptimizer {
    /// The optimizer of a job with models of that schema and updates of that kind.
    pub fn new(schema: Arc<Schema>, optimizer: Optimizer, updates: UpdateKind) -> Self {
        let state = state_schema(&schema, &optimizer);
        let runs = state.as_ref().map_or_else(Vec::new, |state| runs(&schema, state));
        Self {
            optimizer,
            updates,
            schema,
            state,
            runs,
        }
    }

    /// The tensors of its state, as [`state_schema`] gives them; `None` if it remembers nothing.
    pub fn state_schema(&self) -> Option<&Schema> {
        self.state.as_ref()
    }

    /// Makes `mean`, the round's mean of what the updates say, the new model; `model` is the round's. An optimizer
    /// with a [state](Self::state_schema) writes all of `state.after`.
    ///
    /// # Errors
    /// If one of them is not the schema's (`model` is [`Operand::Input`] 0), or the new model is not finite: the mean
    /// and `state.after` are rubbish then.
    pub fn step(
        &self,
        threads: &Threads,
        model: &[u8],
        mean: &mut [u8],
        state: Option<State<'_>>,
    ) -> Result<(), FoldError> {
        let schema = &*self.schema;
        check(schema, Operand::Input(0), model)?;
        check(schema, Operand::Out, mean)?;
        let deltas = self.updates == UpdateKind::Deltas;
        let averaged = |mean: &mut [u8]| {
            if deltas {
                add(threads, schema, model, mean)
            } else {
                Ok(())
            }
        };
        let (rates, state_schema) = match (&self.optimizer, &self.state) {
            (Optimizer::FedAvg, _) | (_, None) => return averaged(mean),
            (
                Optimizer::FedAdagrad(rates) | Optimizer::FedAdam(rates) | Optimizer::FedYogi(rates),
                Some(state),
            ) => (rates, state),
        };
        let State { before, after } = state.unwrap_or(State {
            before: None,
            after: &mut [],
        });
        check(state_schema, Operand::State, after)?;
        let Some(before) = before else {
            threads.all(&mut *after, |_, part| {
                part.fill(0);
                true
            });
            return averaged(mean);
        };
        check(state_schema, Operand::State, before)?;
        let mut finite = true;
        for run in &self.runs {
            let pass = Pass {
                threads,
                run,
                mean: &mut *mean,
                model,
                before,
                after: &mut *after,
                rates,
                adagrad: matches!(self.optimizer, Optimizer::FedAdagrad(_)),
                deltas,
            };
            finite &= match self.optimizer {
                Optimizer::FedYogi(_) => pass.run::<true>(),
                _ => pass.run::<false>(),
            };
        }
        if deltas {
            // The mean of integers is the model, or, of deltas, is added to it; they wrap, whatever their sign.
            for region in schema.regions().iter().filter(|region| !region.dtype.is_float()) {
                super::deltas::add_region(threads, region, model, mean);
            }
        }
        if finite {
            Ok(())
        } else {
            Err(FoldError::Diverged { eta: rates.eta })
        }
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
    /// FedAdagrad's second moment is FedAdam's with 1 for both rates, bit for bit.
    fn new(rates: &Adaptive, adagrad: bool) -> Self {
        let (old_2, new_2) = match adagrad {
            true => (1.0, 1.0),
            false => (rates.beta_2, 1.0 - rates.beta_2),
        };
        Self {
            old_1: R::from_f64(rates.beta_1),
            new_1: R::from_f64(1.0 - rates.beta_1),
            old_2: R::from_f64(old_2),
            new_2: R::from_f64(new_2),
            eta: R::from_f64(rates.eta),
            tau: R::from_f64(rates.tau),
        }
    }
}

/// The moments of some elements: as they were, and where the next go.
struct Moments<'a, R> {
    m: &'a [R],
    v: &'a [R],
    next_m: &'a mut [R],
    next_v: &'a mut [R],
}

/// The rule for some elements; says whether the new weights are finite.
#[inline(always)]
fn adapt<R: Real, const YOGI: bool, const DELTAS: bool>(
    mean: &mut [R],
    model: &[R],
    moments: Moments<'_, R>,
    rates: &Rates<R>,
) -> bool {
    let Moments { m, v, next_m, next_v } = moments;
    let mut finite = true;
    let next = next_m.iter_mut().zip(next_v);
    for (((mean, &weight), (&m, &v)), (next_m, next_v)) in
        mean.iter_mut().zip(model).zip(m.iter().zip(v)).zip(next)
    {
        let difference = if DELTAS { *mean } else { *mean - weight };
        let m = rates.old_1 * m + rates.new_1 * difference;
        let square = difference * difference;
        let v = if YOGI {
            v - rates.new_2 * square * (v - square).sign()
        } else {
            rates.old_2 * v + rates.new_2 * square
        };
        *mean = weight + rates.eta * m / (v.sqrt() + rates.tau);
        (*next_m, *next_v) = (m, v);
        finite &= mean.finite() & v.finite();
    }
    finite
}

/// A float as it lies in a slot, and as it is computed with.
trait Stored: Copy + Send + Sync + FromBytes + IntoBytes + Immutable + 'static {
    type Real: Real + FromBytes + IntoBytes + Immutable;

    fn adapt<const YOGI: bool, const DELTAS: bool>(
        mean: &mut [Self],
        model: &[Self],
        moments: Moments<'_, Self::Real>,
        rates: &Rates<Self::Real>,
    ) -> bool;
}

macro_rules! stored_as_computed {
    ($($real:ty)*) => {$(
        impl Stored for $real {
            type Real = $real;

            #[inline(always)]
            fn adapt<const YOGI: bool, const DELTAS: bool>(
                mean: &mut [Self],
                model: &[Self],
                moments: Moments<'_, Self>,
                rates: &Rates<Self>,
            ) -> bool {
                adapt::<_, YOGI, DELTAS>(mean, model, moments, rates)
            }
        }
    )*};
}

stored_as_computed!(f32 f64);

/// A float of 16 bits, widened in blocks.
trait HalfFloat: Copy + Send + Sync + FromBytes + IntoBytes + Immutable + 'static {
    fn wide(self) -> f32;
    fn narrow(wide: &[f32], to: &mut [Self]);
    fn finite(self) -> bool;
}

impl HalfFloat for bf16 {
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

impl HalfFloat for f16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f16_wide(self)
    }

    #[inline(always)]
    fn narrow(wide: &[f32], to: &mut [Self]) {
        half_precision::narrow(wide, to);
    }

    #[inline(always)]
    fn finite(self) -> bool {
        f16_wide(self).is_finite()
    }
}

macro_rules! stored_half {
    ($($half:ty)*) => {$(
        impl Stored for $half {
            type Real = f32;

            #[inline(always)]
            fn adapt<const YOGI: bool, const DELTAS: bool>(
                mean: &mut [Self],
                model: &[Self],
                moments: Moments<'_, f32>,
                rates: &Rates<f32>,
            ) -> bool {
                let Moments { m, v, next_m, next_v } = moments;
                let mut finite = true;
                let (mut wide_mean, mut wide_model) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
                let blocks = mean.chunks_mut(BLOCK).zip(model.chunks(BLOCK));
                let before = m.chunks(BLOCK).zip(v.chunks(BLOCK));
                let after = next_m.chunks_mut(BLOCK).zip(next_v.chunks_mut(BLOCK));
                for ((mean, model), ((m, v), (next_m, next_v))) in blocks.zip(before.zip(after)) {
                    let wide_mean = &mut wide_mean[..mean.len()];
                    let wide_model = &mut wide_model[..mean.len()];
                    for (wide, &half) in wide_mean.iter_mut().zip(&*mean) {
                        *wide = HalfFloat::wide(half);
                    }
                    for (wide, &half) in wide_model.iter_mut().zip(model) {
                        *wide = HalfFloat::wide(half);
                    }
                    let moments = Moments { m, v, next_m, next_v };
                    finite &= adapt::<f32, YOGI, DELTAS>(wide_mean, wide_model, moments, rates);
                    HalfFloat::narrow(wide_mean, mean);
                    // What an f32 holds may be too much for 16 bits.
                    for &half in &*mean {
                        finite &= HalfFloat::finite(half);
                    }
                }
                finite
            }
        }
    )*};
}

stored_half!(bf16 f16);

/// The pass over one run of elements.
struct Pass<'a> {
    threads: &'a Threads,
    run: &'a Run,
    mean: &'a mut [u8],
    model: &'a [u8],
    before: &'a [u8],
    after: &'a mut [u8],
    rates: &'a Adaptive,
    /// Whether the rule is FedAdagrad.
    adagrad: bool,
    deltas: bool,
}

impl Pass<'_> {
    /// Says whether the new weights are finite.
    fn run<const YOGI: bool>(self) -> bool {
        match self.run.dtype {
            DType::F64 => self.typed::<f64, YOGI>(),
            DType::F32 => self.typed::<f32, YOGI>(),
            DType::BF16 => self.typed::<bf16, YOGI>(),
            DType::F16 => self.typed::<f16, YOGI>(),
            // They have no moments, and no run.
            _ => true,
        }
    }

    fn typed<E: Stored, const YOGI: bool>(self) -> bool {
        if self.deltas {
            self.apply::<E, YOGI, true>()
        } else {
            self.apply::<E, YOGI, false>()
        }
    }

    fn apply<E: Stored, const YOGI: bool, const DELTAS: bool>(self) -> bool {
        let rates = Rates::new(self.rates, self.adagrad);
        let Run { weights, m, v, .. } = self.run;
        let mean = elements_mut::<E>(self.mean, weights);
        let model = elements::<E>(self.model, weights);
        let before = (
            elements::<E::Real>(self.before, m),
            elements::<E::Real>(self.before, v),
        );
        // All of a state's first moments lie before its second ones of the same type.
        let (first, second) = self.after.split_at_mut(v.start);
        let next = (
            elements_mut::<E::Real>(first, m),
            elements_mut::<E::Real>(second, &(0..v.len())),
        );
        self.threads.all(
            ((mean, model), (before, next)),
            #[inline(always)]
            |_, ((mean, model), ((m, v), (next_m, next_v)))| {
                let moments = Moments { m, v, next_m, next_v };
                E::adapt::<YOGI, DELTAS>(mean, model, moments, &rates)
            },
        )
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

    /// The optimizer with its state, as the top keeps it.
    struct Server {
        optimizer: ServerOptimizer,
        before: Option<Vec<u64>>,
        bytes: usize,
    }

    impl Server {
        fn new(schema: Schema, optimizer: Optimizer, updates: UpdateKind) -> Self {
            let optimizer = ServerOptimizer::new(Arc::new(schema), optimizer, updates);
            let bytes = optimizer.state_schema().map_or(0, Schema::data_bytes);
            Self {
                optimizer,
                before: None,
                bytes,
            }
        }

        fn step(&mut self, threads: &Threads, model: &[u8], mean: &mut [u8]) -> Result<(), FoldError> {
            // Rubbish, all of which must be written over.
            let mut after = vec![u64::MAX; self.bytes.div_ceil(8)];
            let state = State {
                before: self
                    .before
                    .as_ref()
                    .map(|before| &before.as_bytes()[..self.bytes]),
                after: &mut after.as_mut_bytes()[..self.bytes],
            };
            self.optimizer.step(threads, model, mean, Some(state))?;
            self.before = Some(after);
            Ok(())
        }
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
        let mut server = Server::new(schema, optimizer, updates);
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
                .step(&threads, model.as_bytes(), slot.as_mut_bytes())
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
            let mut server = Server::new(schema.clone(), Optimizer::FedYogi(RATES), UpdateKind::Weights);
            let mut weights = model.clone();
            for round in 0..3 {
                let mut slot: Vec<f32> = weights.iter().map(|w| w * 0.9 + round as f32 * 0.01).collect();
                server
                    .step(&threads, weights.as_bytes(), slot.as_mut_bytes())
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
            let mut server = Server::new(schema.clone(), Optimizer::FedAdam(RATES), updates);
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
                    .step(&threads, &model.as_bytes()[..20], &mut slot.as_mut_bytes()[..20])
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
    fn a_step_that_is_too_large_says_so_and_spoils_nothing() {
        let rates = Adaptive {
            eta: 1e6,
            tau: 1e-3,
            ..RATES
        };
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F16, [1])]).expect("a schema");
        let threads = Threads::new(1).expect("threads");
        let mut server = Server::new(schema, Optimizer::FedAdam(rates), UpdateKind::Weights);
        let model = [f16::ONE];
        let mut step = |to: f32| {
            let mut slot = [f16::from_f32(to)];
            let stepped = server.step(&threads, model.as_bytes(), slot.as_mut_bytes());
            (stepped, server.before.clone())
        };
        step(2.0).0.expect("the first mean is the model");
        let (stepped, before) = step(1.0);
        stepped.expect("the model is at rest");
        let (stepped, after) = step(2.0);
        let error = stepped.expect_err("infinite").to_string();
        assert!(error.contains("eta") && error.contains("1000000"), "{error}");
        assert!(before.is_some() && before == after, "the state is the one before");
    }

    #[test]
    fn a_state_of_another_size_is_refused() {
        let schema = Arc::new(Schema::new(vec![TensorSpec::new("w", DType::F32, [4])]).expect("a schema"));
        let threads = Threads::new(1).expect("threads");
        let server = ServerOptimizer::new(schema, Optimizer::FedAdam(RATES), UpdateKind::Weights);
        let (model, mut mean) = ([0.0_f32; 4], [1.0_f32; 4]);
        for (before, after) in [(None, 7), (Some(8), 7), (Some(7), 8)] {
            let before = before.map(|elements| vec![0.0_f32; elements]);
            let mut after = vec![0.0_f32; after];
            let state = State {
                before: before.as_ref().map(|before| before.as_bytes()),
                after: after.as_mut_bytes(),
            };
            let error = server.step(&threads, model.as_bytes(), mean.as_mut_bytes(), Some(state));
            let error = error.expect_err("another size").to_string();
            assert!(error.contains("state has 28 bytes"), "{error}");
        }
        let error = server.step(&threads, model.as_bytes(), mean.as_mut_bytes(), None);
        assert!(error.expect_err("none").to_string().contains("state has 0 bytes"));
    }

    /// Of several element types, whose moments lie mixed in the state: each tensor comes out as it does alone.
    #[test]
    fn tensors_of_several_types_do_not_meet() {
        let specs = [
            TensorSpec::new("a", DType::BF16, [3]),
            TensorSpec::new("b", DType::F32, [5]),
            TensorSpec::new("c", DType::F16, [2]),
            TensorSpec::new("d", DType::F64, [4]),
            TensorSpec::new("e", DType::F32, [1]),
            TensorSpec::new("f", DType::I16, [3]),
        ];
        let threads = Threads::new(1).expect("threads");
        let run = |specs: Vec<TensorSpec>| -> Vec<(String, Vec<u8>)> {
            let schema = Schema::new(specs).expect("a schema");
            let mut server = Server::new(schema.clone(), Optimizer::FedAdam(RATES), UpdateKind::Weights);
            let fill = |round: usize| {
                let mut words = vec![0_u64; schema.data_bytes().div_ceil(8)];
                for (tensor, range) in schema.iter() {
                    let seed = usize::from(tensor.name.as_bytes()[0]);
                    let values = (0..range.len() / tensor.dtype.bytes())
                        .map(|i| ((seed * 7 + i * 3 + round * 5) % 11) as f64 / 8.0);
                    let bytes: Vec<u8> = match tensor.dtype {
                        DType::F64 => values.flat_map(|x| x.to_ne_bytes()).collect(),
                        DType::F32 => values.flat_map(|x| (x as f32).to_ne_bytes()).collect(),
                        DType::BF16 => values.flat_map(|x| bf16::from_f64(x).to_ne_bytes()).collect(),
                        DType::F16 => values.flat_map(|x| f16::from_f64(x).to_ne_bytes()).collect(),
                        _ => values.flat_map(|x| ((x * 8.0) as i16).to_ne_bytes()).collect(),
                    };
                    words.as_mut_bytes()[range].copy_from_slice(&bytes);
                }
                words
            };
            let bytes = schema.data_bytes();
            let mut model = fill(0);
            for round in 1..4 {
                let mut slot = fill(round);
                server
                    .step(
                        &threads,
                        &model.as_bytes()[..bytes],
                        &mut slot.as_mut_bytes()[..bytes],
                    )
                    .expect("finite");
                model = slot;
            }
            let tensors = schema.iter();
            tensors
                .map(|(tensor, range)| (tensor.name.clone(), model.as_bytes()[range].to_vec()))
                .collect()
        };
        let mut together = run(specs.to_vec());
        together.sort();
        let alone: Vec<_> = specs.into_iter().flat_map(|spec| run(vec![spec])).collect();
        assert_eq!(together, alone);
    }
}
