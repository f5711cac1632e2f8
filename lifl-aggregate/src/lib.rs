//! FedAvg's arithmetic: the sample-weighted mean of updates (McMahan, Moore, Ramage, Hampson and Agüera y Arcas,
//! "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, Algorithm 1:
//! `w ← Σ n_k/n · w_k`), folded where it lies at the speed of the memory.
//!
//! A [`Rule`] makes aggregates; [`WeightedMean`] is FedAvg's. It belongs to one aggregator, which calls
//! [`fold`](Rule::fold) with the updates that have arrived and its own slot, and [`finish`](Rule::finish) with those that
//! arrived last. [`subtract`] and [`add`] turn weights into deltas and back. Nothing here knows of slots, frames
//! or sockets: bytes come in, laid out as the job's [`Schema`] says, and bytes go out.
//!
//! | module | what it has |
//! | --- | --- |
//! | `rule` | what any aggregation rule is |
//! | `weighted_mean` | FedAvg's: the states and the weights of a mean |
//! | `region` | which arithmetic a run of elements of one type needs, and its private memory |
//! | `fold` | the loops that fold floats, for each place where a mean is kept |
//! | `element` | the arithmetic of one type of floats |
//! | `half_precision` | conversions of `f16` |
//! | `integers` | means of integers |
//! | `threads` | cutting the work |
//! | `deltas` | subtracting models and adding deltas |
//! | `server_optimizer`, `optimizer_state` | FedAdagrad, FedAdam and FedYogi at the top, and what they keep from round to round |
//!
//! Each element is computed from its own inputs in the order given, by multiplications and additions that are not
//! fused: the same bits come out for any number of threads, and on any machine.

mod deltas;
mod element;
mod fold;
mod half_precision;
mod integers;
mod optimizer_state;
mod region;
mod rule;
mod server_optimizer;
mod threads;
mod weighted_mean;

#[cfg(test)]
mod tests;

use std::ops::Range;

use lifl_common::update::Schema;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub use deltas::{add, subtract};
pub use optimizer_state::{State, state_schema};
pub use rule::{Action, Rule, rule};
pub use server_optimizer::ServerOptimizer;
pub use threads::Threads;
pub use weighted_mean::{WeightedMean, scratch_bytes};

/// One update or aggregate to be folded.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// The tensors' data, laid out as the schema says.
    pub data: &'a [u8],
    /// Training samples behind it, at least 1: its weight.
    pub samples: u64,
}

/// Why nothing, or nothing usable, was folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// An input that stands for no sample has no weight. Nothing was folded.
    #[error("input {input} has 0 samples")]
    NoSamples {
        /// Its index among the inputs of the call.
        input: usize,
    },
    /// The sum of samples passes `u64`. Nothing was folded.
    #[error("the samples of input {input} overflow their sum, {samples} so far")]
    TooManySamples {
        /// Index of the input that was too much.
        input: usize,
        /// The sum without it.
        samples: u64,
    },
    /// Data of another schema. Nothing was folded.
    #[error("{what} has {found} bytes, the job's tensors have {expected}")]
    Length {
        /// Which data.
        what: Operand,
        /// Its bytes.
        found: usize,
        /// The schema's.
        expected: usize,
    },
    /// Data that does not begin at a multiple of its elements' size. Nothing was folded.
    #[error("{what} is not aligned to {align} bytes")]
    Misaligned {
        /// Which data.
        what: Operand,
        /// What the schema needs.
        align: usize,
    },
    /// NaN, infinity or what is as good as that among the inputs. The aggregate is spoilt: [`reset`](Rule::reset) the rule and
    /// fold again all that it held, without the culprits.
    #[error("inputs {inputs:?} hold NaN or infinity")]
    NotFinite {
        /// Indices of the culprits among the inputs of the call. None means that somebody has changed an input
        /// meanwhile.
        inputs: Vec<usize>,
    },
    /// The aggregate was finished, and not reset since.
    #[error("the aggregate is finished, and was not reset")]
    Finished,
    /// The aggregate was spoilt by an earlier [`NotFinite`](Self::NotFinite) and not reset since.
    #[error("the aggregate was spoilt by an input that is not finite, and was not reset")]
    Spoilt,
    /// The model and the mean of the deltas are too large together for the model's type.
    #[error("the new model holds NaN or infinity")]
    Overflow,
    /// A server optimizer's step is too large for the model's type.
    #[error("the optimizer's new model holds NaN or infinity: a lower eta than {eta} may help")]
    Diverged {
        /// Its step size.
        eta: f64,
    },
    /// There is nothing to finish.
    #[error("nothing was folded")]
    Empty,
    /// The machine refused a thread.
    #[error("cannot start {threads} threads")]
    Threads {
        /// As many as were asked for.
        threads: usize,
        /// Why.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
}

/// Which of the byte slices of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// The slot that is written.
    Out,
    /// The input of that index.
    Input(usize),
    /// An optimizer's state, before or after the step.
    State,
}

impl std::fmt::Display for Operand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Out => f.write_str("the output"),
            Self::Input(index) => write!(f, "input {index}"),
            Self::State => f.write_str("the optimizer's state"),
        }
    }
}

/// Whether `data` can be read as the schema's regions.
fn check(schema: &Schema, what: Operand, data: &[u8]) -> Result<(), FoldError> {
    let expected = schema.data_bytes();
    if data.len() != expected {
        return Err(FoldError::Length {
            what,
            found: data.len(),
            expected,
        });
    }
    // Regions come widest first and have no holes, so what suits the first suits all.
    let align = schema.regions().first().map_or(1, |region| region.dtype.bytes());
    if !data.as_ptr().addr().is_multiple_of(align) {
        return Err(FoldError::Misaligned { what, align });
    }
    Ok(())
}

/// A region's elements.
///
/// # Panics
/// If [`check`] has not been passed.
fn elements<'a, E: FromBytes + Immutable>(data: &'a [u8], range: &Range<usize>) -> &'a [E] {
    <[E]>::ref_from_bytes(&data[range.clone()]).expect("length and alignment were checked")
}

/// A region's elements, to be written.
///
/// # Panics
/// If [`check`] has not been passed.
fn elements_mut<'a, E>(data: &'a mut [u8], range: &Range<usize>) -> &'a mut [E]
where
    E: FromBytes + IntoBytes,
{
    <[E]>::mut_from_bytes(&mut data[range.clone()]).expect("length and alignment were checked")
}
