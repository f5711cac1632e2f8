//! What an aggregation rule is: how updates that arrive one by one become one aggregate.
//!
//! ```text
//!            ┌──── fold ────┐
//!            ▼              │   finish
//! empty ── fold ─────────▶ folding ─────▶ finished: the slot may be sent; nothing more can be folded
//!   │ ▲                     │
//!   │ │                     └──── fold or finish: an input is not finite ────▶ spoilt: the slot holds rubbish;
//!   │ └─ reset, from all                                                          nothing more can be folded
//!   └── finish, with all inputs at once ─▶ finished, or spoilt
//! ```

use std::fmt::Debug;
use std::sync::Arc;

use lifl_common::config::JobSpec;
use lifl_common::update::Schema;

use super::{FoldError, Input, Threads, WeightedMean};

/// How an aggregator makes one aggregate after another. It decides when updates are folded, and computes the aggregate in
/// the slot that the aggregator gives to each call until the next [`reset`](Self::reset).
///
/// To add a rule, implement this and let [`rule`] make it for the jobs that ask for it.
pub trait Rule: Debug + Send {
    /// What the aggregator does now: `folded` updates have been folded, `arrived` others have not, and `complete` says
    /// that no further one is waited for. With nothing that has arrived it is [`Action::Wait`].
    fn action(&self, folded: usize, arrived: usize, complete: bool) -> Action;

    /// Folds updates into the aggregate in `out`, which is not to be sent before [`finish`](Self::finish). No inputs
    /// change nothing.
    ///
    /// # Errors
    /// After [`FoldError::NotFinite`] the aggregate is spoilt: reset the rule, and fold all that it held again without the
    /// culprits. After any other error it is as it was.
    fn fold(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<(), FoldError>;

    /// Folds the last updates, if there are any left, makes `out` the aggregate, and gives its samples. What is finished
    /// can be finished again, without inputs.
    ///
    /// # Errors
    /// As [`fold`](Self::fold); and [`FoldError::Empty`] if nothing was ever folded.
    fn finish(&mut self, out: &mut [u8], inputs: &[Input<'_>]) -> Result<u64, FoldError>;

    /// Begins a new aggregate: what was folded counts no more, and the next slot's content is not read.
    fn reset(&mut self);

    /// Samples folded since the last reset.
    fn samples(&self) -> u64;

    /// Whether [`fold`](Self::fold) would find nothing wrong with the numbers of data that has the schema's length.
    fn is_finite(&self, data: &[u8]) -> bool;
}

/// What an aggregator does with the updates that have arrived and are not folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing yet.
    Wait,
    /// It [folds](Rule::fold) them; more will come.
    Fold,
    /// It [finishes](Rule::finish) with them; no more will come.
    Finish,
}

/// The rule of a job whose models have that schema. Its private memory is taken here.
pub fn rule(job: &JobSpec, schema: &Arc<Schema>, threads: &Threads) -> Box<dyn Rule> {
    Box::new(WeightedMean::new(
        Arc::clone(schema),
        job.updates,
        job.timing,
        threads.clone(),
    ))
}
