//! The sample-weighted mean: how much has been folded, what each input weighs, and the private memory beside the slot.

use std::sync::Arc;

use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::Schema;

use super::region::{RegionMean, Weights, private_bytes};
use super::threads::Threads;
use super::{Action, FoldError, Input, Operand, Rule, check};

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
pub struct WeightedMean {
    schema: Arc<Schema>,
    timing: Timing,
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

/// Private memory that an [`WeightedMean`] of this schema takes beside the slot, in bytes.
pub fn scratch_bytes(schema: &Schema, timing: Timing) -> usize {
    let regions = schema.regions().into_iter();
    regions
        .map(|region| region.range.len() / region.dtype.bytes() * private_bytes(region.dtype, timing))
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

impl WeightedMean {
    /// An empty aggregate of updates of that schema. Private memory is taken here; [`reset`](Self::reset) keeps it.
    pub fn new(schema: Arc<Schema>, updates: UpdateKind, timing: Timing, threads: Threads) -> Self {
        let regions = schema.regions().into_iter();
        let regions = regions
            .map(|region| RegionMean::new(region, updates, timing))
            .collect();
        Self {
            schema,
            timing,
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

    /// Checks the operands, and has each region fold its share of them.
    fn fold_regions(
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
        let finite = self
            .regions
            .iter_mut()
            .all(|region| fold(region, threads, out, &weights));
        if !finite {
            self.state = State::Spoilt;
            return Err(FoldError::NotFinite {
                inputs: self.not_finite(inputs),
            });
        }
        self.samples = weights.samples;
        Ok(())
    }

    /// Which inputs hold what they should not: a second look, taken only when there is one.
    fn not_finite(&self, inputs: &[Input<'_>]) -> Vec<usize> {
        inputs
            .iter()
            .enumerate()
            .filter(|(_, input)| !self.is_finite(input.data))
            .map(|(index, _)| index)
            .collect()
    }
}

impl Rule for WeightedMean {
    /// Eager timing does not fold a single first update: what is kept would be as long as the update, which stays where it
    /// is until the verdict anyway, and to fold the second with either is the same work.
    fn action(&self, folded: usize, arrived: usize, complete: bool) -> Action {
        match self.timing {
            _ if arrived == 0 => Action::Wait,
            _ if complete => Action::Finish,
            Timing::Lazy => Action::Wait,
            Timing::Eager if folded + arrived == 1 => Action::Wait,
            Timing::Eager => Action::Fold,
        }
    }

    /// Computes, with N the samples so far and N′ = N + Σ nᵢ,
    ///
    /// `out ← N/N′ · out + Σ nᵢ/N′ · xᵢ`
    ///
    /// in `f64` (64-bit integers exactly), and rounds once: floats to the nearest, integers to the nearest with
    /// halves to the even one.
    fn fold(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<(), FoldError> {
        match self.state {
            State::Open => {}
            State::Finished => return Err(FoldError::Finished),
            State::Spoilt => return Err(FoldError::Spoilt),
        }
        self.fold_regions(out, inputs, RegionMean::fold)
    }

    /// Of all that is folded last nothing is kept beside the slot, so that this is one pass over the memory where a
    /// [`fold`](Self::fold) before it would be two.
    fn finish(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<u64, FoldError> {
        match self.state {
            State::Open => {}
            State::Finished if inputs.is_empty() => return Ok(self.samples),
            State::Finished => return Err(FoldError::Finished),
            State::Spoilt => return Err(FoldError::Spoilt),
        }
        self.fold_regions(out, inputs, RegionMean::fold_last)?;
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

    fn reset(&mut self) {
        self.samples = 0;
        self.state = State::Open;
    }

    fn samples(&self) -> u64 {
        self.samples
    }

    /// Whether data of the schema's length holds neither NaN nor infinity, nor what is as good as that: whoever gives it
    /// is not to blame for a mean that is not finite.
    ///
    /// # Panics
    /// If the data is of another length.
    fn is_finite(&self, data: &[u8]) -> bool {
        self.regions
            .iter()
            .all(|region| region.is_finite(&self.threads, data))
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::update::{DType, TensorSpec};

    use super::*;

    fn mean(timing: Timing) -> WeightedMean {
        let tensors = vec![TensorSpec::new("w", DType::F32, [1])];
        let schema = Schema::new(tensors).expect("a schema");
        let threads = Threads::new(1).expect("threads");
        WeightedMean::new(Arc::new(schema), UpdateKind::Weights, timing, threads)
    }

    #[test]
    fn eager_folds_whatever_has_come_but_for_a_lone_first() {
        let mean = mean(Timing::Eager);
        assert_eq!(mean.action(0, 0, false), Action::Wait);
        assert_eq!(mean.action(0, 1, false), Action::Wait);
        assert_eq!(mean.action(0, 2, false), Action::Fold);
        assert_eq!(mean.action(2, 1, false), Action::Fold);
        assert_eq!(
            mean.action(0, 1, true),
            Action::Finish,
            "the others will not come"
        );
        assert_eq!(mean.action(2, 1, true), Action::Finish);
        assert_eq!(mean.action(2, 0, true), Action::Wait, "it is folded");
    }

    #[test]
    fn lazy_folds_once() {
        let mean = mean(Timing::Lazy);
        assert_eq!(mean.action(0, 7, false), Action::Wait);
        assert_eq!(mean.action(0, 8, true), Action::Finish);
    }
}
