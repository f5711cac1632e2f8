//! One aggregate in the making: how much has been folded, what each input weighs, and the private memory beside the
//! slot.

use std::sync::Arc;

use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::Schema;

use super::region::{RegionMean, Weights, kept_bytes};
use super::threads::Threads;
use super::{FoldError, Input, Operand, check};

/// A sample-weighted mean of updates, folded in place into the aggregator's slot.
///
/// With [`Timing::Lazy`], for one call with all inputs, there is no private memory; further calls work too, but each
/// rounds to the slot's type. With [`Timing::Eager`], for a call whenever something has come, what a slot cannot hold
/// is kept beside it ([`scratch_bytes`]), so that no rounding adds up over the calls. Either way the result is the
/// flat average within the type's own rounding.
///
/// A call reads each input once, writes what it keeps once, and reads that once if it is not the first. A single first
/// input is better not folded before the second is there: what would be kept is as long as the input itself.
#[derive(Debug)]
pub struct Accumulator {
    schema: Arc<Schema>,
    regions: Vec<RegionMean>,
    threads: Threads,
    samples: u64,
    state: State,
}

/// How an aggregate stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// More may be folded.
    Open,
    /// Its slot is the aggregate.
    Finished,
    /// Its slot holds rubbish.
    Spoilt,
}

/// Private memory that an [`Accumulator`] of this schema takes beside the slot, in bytes.
pub fn scratch_bytes(schema: &Schema, timing: Timing) -> usize {
    let regions = schema.regions().into_iter();
    regions
        .map(|region| region.range.len() / region.dtype.bytes() * kept_bytes(region.dtype, timing))
        .sum()
}

/// All samples, checked.
fn total(before: u64, inputs: &[Input<'_>]) -> Result<u64, FoldError> {
    inputs
        .iter()
        .enumerate()
        .try_fold(before, |samples, (input, more)| match more.samples {
            0 => Err(FoldError::NoSamples { input }),
            more => samples
                .checked_add(more)
                .ok_or(FoldError::TooManySamples { input, samples }),
        })
}

impl Accumulator {
    /// An empty aggregate of updates of that schema. Private memory is taken here; [`reset`](Self::reset) keeps it.
    pub fn new(schema: Arc<Schema>, updates: UpdateKind, timing: Timing, threads: Threads) -> Self {
        let regions = schema.regions().into_iter();
        let regions = regions
            .map(|region| RegionMean::new(region, updates, timing))
            .collect();
        Self {
            schema,
            regions,
            threads,
            samples: 0,
            state: State::Open,
        }
    }

    /// What it is an aggregate of.
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// Samples folded since the last reset.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Empties it: the next fold does not read its slot.
    pub fn reset(&mut self) {
        self.samples = 0;
        self.state = State::Open;
    }

    /// Folds the inputs into `out`, the same slot in every call until the next reset:
    ///
    /// `out ← N/N′ · out + Σ nᵢ/N′ · xᵢ`, where N is the samples so far and N′ = N + Σ nᵢ,
    ///
    /// in `f64` (64-bit integers exactly), and rounded once: floats to the nearest, integers to the nearest with
    /// halves to the even one. No inputs change nothing. `out` is not to be sent before
    /// [`finish`](Self::finish).
    ///
    /// # Errors
    /// After [`FoldError::NotFinite`] the accumulator is spoilt: reset it, and fold all that it held again without the
    /// culprits. After any other error it is as it was.
    pub fn fold(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<(), FoldError> {
        match self.state {
            State::Open => {}
            State::Finished => return Err(FoldError::Finished),
            State::Spoilt => return Err(FoldError::Spoilt),
        }
        self.take(out, inputs, RegionMean::fold)
    }

    /// Folds the last inputs, if there are any left, makes `out` the aggregate, and gives its samples.
    ///
    /// Of all that is folded last nothing is kept beside the slot, so that this is one pass over the memory where a
    /// [`fold`](Self::fold) before it would be two.
    ///
    /// # Errors
    /// As [`fold`](Self::fold); and if nothing was ever folded. What is finished can be finished again, without inputs.
    pub fn finish(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<u64, FoldError> {
        match self.state {
            State::Open => {}
            State::Finished if inputs.is_empty() => return Ok(self.samples),
            State::Finished => return Err(FoldError::Finished),
            State::Spoilt => return Err(FoldError::Spoilt),
        }
        self.take(out, inputs, RegionMean::fold_last)?;
        if self.samples == 0 {
            return Err(FoldError::Empty);
        }
        if inputs.is_empty() {
            for region in &self.regions {
                region.finish(&self.threads, out, self.samples);
            }
        }
        self.state = State::Finished;
        Ok(self.samples)
    }

    /// Checks the operands, and has each region fold its share of them.
    fn take(
        &mut self,
        out: &mut [u8],
        inputs: &[Input<'_>],
        fold: impl Fn(&mut RegionMean, &Threads, &mut [u8], &Weights<'_>) -> bool,
    ) -> Result<(), FoldError> {
        check(&self.schema, Operand::Out, out)?;
        for (index, input) in inputs.iter().enumerate() {
            check(&self.schema, Operand::Input(index), input.data)?;
        }
        let weights = Weights {
            before: self.samples,
            samples: total(self.samples, inputs)?,
            inputs,
        };
        if inputs.is_empty() {
            return Ok(());
        }
        let threads = &self.threads;
        let good = self
            .regions
            .iter_mut()
            .all(|region| fold(region, threads, out, &weights));
        if !good {
            self.state = State::Spoilt;
            return Err(FoldError::NotFinite {
                inputs: self.culprits(inputs),
            });
        }
        self.samples = weights.samples;
        Ok(())
    }

    /// Whether data of the schema's length holds neither NaN nor infinity, nor what is as good as that: whoever gives it
    /// is not to blame for a mean that is not finite.
    ///
    /// # Panics
    /// If the data is of another length.
    pub fn is_finite(&self, data: &[u8]) -> bool {
        self.regions
            .iter()
            .all(|region| region.is_finite(&self.threads, data))
    }

    /// Which inputs hold what they should not: a second look, taken only when there is one.
    fn culprits(&self, inputs: &[Input<'_>]) -> Vec<usize> {
        inputs
            .iter()
            .enumerate()
            .filter(|(_, input)| !self.is_finite(input.data))
            .map(|(index, _)| index)
            .collect()
    }
}
