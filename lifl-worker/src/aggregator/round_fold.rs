//! One round's aggregate in the making: which updates may come in, and the folding. When what has come is folded, and how,
//! the [`Rule`] decides.

use std::sync::Arc;

use lifl_aggregate::{Action, FoldError, Input, Rule, Threads};
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Schema, UpdateInfo, image};
use zerocopy::IntoBytes;

use super::children::{Children, TakenUpdate};
use super::server_optimizer::Step;
use super::{Config, Error};
use crate::parent::LentModel;

/// An aggregate in the making.
#[derive(Debug)]
pub(super) struct RoundFold {
    pub(super) round: u32,
    pub(super) children: Children,
    /// Those of them that have not been handed the model yet.
    pub(super) without_model: Vec<WorkerId>,
    /// Updates after which nobody else is waited for.
    goal: usize,
    /// Where it comes to lie.
    pub(super) slot: WritableSlot,
    pub(super) model: LentModel,
}

/// What became of an aggregate.
#[derive(Debug)]
pub(super) enum Folded {
    /// Its data lies in its slot.
    Whole,
    /// No child gave anything, or too few trainers' work came for a new model.
    TooFew,
    /// The new model would not be finite, by the fault of these updates; of none, if it is the optimizer's.
    Diverged(Vec<Frame>),
}

/// The most that an honest trainer's loss can be: it is computed in `f32`.
const LARGEST_LOSS: f64 = f32::MAX as f64;

/// Objects that one trainer's work goes through on its way up, at most.
const MOST_LEVELS: u64 = 4;

/// Checks an update before it is taken: that it lies where its key says and has the job's tensors. Its numbers are checked
/// when they are folded.
pub(super) fn check_update(
    schema: &Schema,
    frame: &Frame,
    opened: &Result<Option<Arc<PeerArena>>, String>,
) -> Result<TakenUpdate, Refusal> {
    let arena = opened.as_ref().map_err(|error| {
        tracing::warn!(from = %frame.from, key = %frame.key, "cannot read the update: {error}");
        Refusal::BadKey
    })?;
    let arena = Arc::clone(arena.as_ref().ok_or(Refusal::NoArena)?);
    let bytes = arena.object(frame.key, frame.length).map_err(|error| {
        tracing::warn!(from = %frame.from, "{error}");
        Refusal::BadKey
    })?;
    let (metadata, data) = image::check(bytes, schema).map_err(|error| {
        tracing::warn!(from = %frame.from, "{error}");
        Refusal::WrongShape
    })?;
    if metadata.generation != frame.key.generation || metadata.round != frame.round {
        tracing::warn!(from = %frame.from, key = %frame.key, "the object there is of {}", metadata.generation);
        return Err(Refusal::BadKey);
    }
    if frame.samples == 0 || metadata.info.samples != frame.samples {
        return Err(Refusal::BadSamples);
    }
    let cover = &metadata.info.cover;
    if cover.is_empty() || cover.count() != frame.covers {
        return Err(Refusal::BadCover);
    }
    Ok(TakenUpdate {
        arrival: 0,
        frame: *frame,
        arena,
        data,
        metadata,
    })
}

impl RoundFold {
    pub(super) fn new(
        round: u32,
        children: Children,
        goal: Option<u32>,
        slot: WritableSlot,
        model: LentModel,
    ) -> Self {
        Self {
            round,
            // A goal that all children together do not reach waits for all.
            goal: goal.map_or(usize::MAX, |goal| goal as usize),
            children,
            without_model: Vec::new(),
            slot,
            model,
        }
    }

    /// Whether what has been folded is the round's aggregate: nobody is waited for any more.
    pub(super) fn is_complete(&self) -> bool {
        self.children.answered() || self.children.folded().count() >= self.goal
    }

    /// Folds what has come, but no more than the goal, [when it is time](Rule::action). Gives the updates that turned out
    /// not to be finite, which are out.
    pub(super) fn fold(
        &mut self,
        schema: &Schema,
        rule: &mut dyn Rule,
    ) -> Result<Vec<(Frame, Refusal)>, Error> {
        let mut refused = Vec::new();
        let mut from_copies = false;
        loop {
            let folded = self.children.folded().count();
            let wanted = self.goal.saturating_sub(folded);
            let arrived = self.children.unfolded().count();
            let enough = arrived >= wanted || self.children.answered();
            let action = rule.action(folded, arrived.min(wanted), enough);
            if action == Action::Wait {
                return Ok(refused);
            }
            let updates = self.children.first_unfolded(wanted);
            let last = updates.iter().map(|update| update.arrival).max().unwrap_or(0);
            let inputs = updates.iter().map(|update| input(update));
            let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
            let out = &mut self.slot.bytes_mut()[image::data_range(schema)];
            let done = match action {
                _ if from_copies => fold_copies(rule, out, &inputs)?,
                Action::Finish => rule.finish(out, &inputs).map(|_| ()),
                _ => rule.fold(out, &inputs),
            };
            match done {
                Ok(()) => {
                    self.children.mark_folded(last);
                    return Ok(refused);
                }
                Err(FoldError::NotFinite { inputs }) if !(inputs.is_empty() && from_copies) => {
                    // Written while it was read, and taken back before the second look: what is in a copy stays.
                    from_copies |= inputs.is_empty();
                    let culprits = inputs.into_iter().filter_map(|index| updates.get(index));
                    let culprits: Vec<Frame> = culprits.map(|update| update.frame).collect();
                    self.remove(&culprits, rule);
                    refused.extend(culprits.into_iter().map(|culprit| (culprit, Refusal::NotFinite)));
                }
                Err(error @ FoldError::TooManySamples { .. }) => {
                    // Of all that has come, not only of what came last.
                    let largest = self.children.taken().max_by_key(|update| update.frame.samples);
                    let Some(culprit) = largest.map(|update| update.frame) else {
                        return Err(error.into());
                    };
                    self.remove(&[culprit], rule);
                    refused.push((culprit, Refusal::BadSamples));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Updates that turned out to be no good are out: the aggregate is made again from the others, which are all still
    /// lent.
    pub(super) fn remove(&mut self, culprits: &[Frame], rule: &mut dyn Rule) {
        for culprit in culprits {
            self.children.refuse(culprit.from);
        }
        rule.reset();
        self.children.mark_unfolded();
    }

    /// Makes the aggregate's data, at the top the model's. Only the top has a `step`, and the round's `model` in its own
    /// arena.
    pub(super) fn make<'a>(
        &mut self,
        config: &Config,
        rule: &mut dyn Rule,
        step: Option<Step<'_>>,
        model: impl FnOnce(Key) -> Option<&'a [u8]>,
    ) -> Result<Folded, Error> {
        if rule.samples() == 0 {
            return Ok(Folded::TooFew);
        }
        let (schema, threads) = (&*config.schema, &config.threads);
        let mean = &mut self.slot.bytes_mut()[image::data_range(schema)];
        rule.finish(mean, &[])?;
        let Some(step) = step else {
            return Ok(Folded::Whole);
        };
        let model = &model(self.model.key).ok_or(Error::ModelGone)?[image::data_range(schema)];
        match step.apply(threads, model, mean) {
            Ok(()) => Ok(Folded::Whole),
            Err(error @ FoldError::Overflow) => {
                tracing::error!(round = self.round, "{error}");
                Ok(Folded::Diverged(self.overflowing(threads, schema, model)?))
            }
            Err(error @ FoldError::Diverged { .. }) => {
                tracing::error!(round = self.round, "{error}");
                Ok(Folded::Diverged(Vec::new()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The updates that are too large for the model by themselves. If the model and the mean are too large together, then
    /// one of them is: the mean is between them.
    fn overflowing(&self, threads: &Threads, schema: &Schema, model: &[u8]) -> Result<Vec<Frame>, Error> {
        let mut culprits = Vec::new();
        for update in self.children.folded() {
            let mut copy = copied(input(update)?.data)?;
            let sum = &mut copy.as_mut_bytes()[..schema.data_bytes()];
            match lifl_aggregate::add(threads, schema, model, sum) {
                Ok(()) => {}
                Err(FoldError::Overflow) => culprits.push(update.frame),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(culprits)
    }
}

/// What several objects say of themselves together, but for their samples: of one that is made `now`, in nanoseconds of the
/// node's monotonic clock. What cannot be so is counted as the most that can, and what is no loss is none.
pub(super) fn combined<'a>(
    children: impl Iterator<Item = &'a UpdateInfo> + Clone,
    schema: &Schema,
    now: u64,
) -> UpdateInfo {
    let mut sum = UpdateInfo {
        made: made(children.clone().map(|child| &*child.made), now),
        ..UpdateInfo::default()
    };
    let (mut loss, mut with_loss) = (0.0, 0.0);
    for child in children {
        let objects = u64::from(child.cover.count()) * MOST_LEVELS;
        let most_bytes = (image::image_bytes(schema) as u64).saturating_mul(objects);
        sum.folded += child.folded.min(objects) + 1;
        sum.bytes_copied = sum
            .bytes_copied
            .saturating_add(child.bytes_copied.min(most_bytes));
        sum.cover.add(&child.cover);
        if let Some(mean) = child.loss.filter(|loss| loss.abs() <= LARGEST_LOSS) {
            loss += mean * child.samples as f64;
            with_loss += child.samples as f64;
        }
    }
    sum.loss = (with_loss > 0.0).then(|| loss / with_loss);
    sum
}

/// When the last object of each level was made, of those that went into an object that is made now. Nothing was made later.
fn made<'a>(children: impl Iterator<Item = &'a [u64]>, now: u64) -> Vec<u64> {
    let mut latest: Vec<u64> = Vec::new();
    for times in children {
        if times.is_empty() {
            return Vec::new();
        }
        latest.resize(latest.len().max(times.len()), 0);
        for (latest, &time) in latest.iter_mut().zip(times) {
            *latest = time.min(now).max(*latest);
        }
    }
    latest.push(now);
    latest
}

/// Folds from copies, one input after the other: what their owners write meanwhile changes nothing. The outer error is that
/// there is no memory for one.
fn fold_copies(
    rule: &mut dyn Rule,
    out: &mut [u8],
    inputs: &[Input<'_>],
) -> Result<Result<(), FoldError>, Error> {
    for (index, input) in inputs.iter().enumerate() {
        let copy = copied(input.data)?;
        let data = &copy.as_bytes()[..input.data.len()];
        let samples = input.samples;
        let folded = if rule.is_finite(data) {
            rule.fold(out, &[Input { data, samples }])
        } else {
            Err(FoldError::NotFinite { inputs: Vec::new() })
        };
        match folded {
            Ok(()) => {}
            Err(FoldError::NotFinite { .. }) => {
                return Ok(Err(FoldError::NotFinite { inputs: vec![index] }));
            }
            other => return Ok(other),
        }
    }
    Ok(Ok(()))
}

/// A private copy, aligned for every element type.
fn copied(data: &[u8]) -> Result<Vec<u64>, Error> {
    let (bytes, words) = (data.len(), data.len().div_ceil(size_of::<u64>()));
    let mut copy: Vec<u64> = Vec::new();
    copy.try_reserve_exact(words)
        .map_err(|source| Error::Memory { bytes, source })?;
    copy.resize(words, 0);
    copy.as_mut_bytes()[..bytes].copy_from_slice(data);
    Ok(copy)
}

/// The update's data, where it lies.
fn input(update: &TakenUpdate) -> Result<Input<'_>, Error> {
    let bytes = update.arena.object(update.frame.key, update.frame.length)?;
    // `check_update` has found the data to end with the object.
    Ok(Input {
        data: &bytes[update.data.clone()],
        samples: update.frame.samples,
    })
}

#[cfg(test)]
mod tests {
    use lifl_common::update::{Cover, DType, TensorSpec};

    use super::*;

    #[test]
    fn what_cannot_be_so_is_not_added_up() {
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F32, [4])]).expect("a schema");
        let honest = UpdateInfo {
            samples: 30,
            cover: Cover::of(0),
            loss: Some(0.5),
            bytes_copied: 16,
            ..UpdateInfo::default()
        };
        let liar = |loss| UpdateInfo {
            samples: 10,
            cover: Cover::of(1),
            loss: Some(loss),
            folded: u64::MAX,
            bytes_copied: u64::MAX,
            ..UpdateInfo::default()
        };
        for loss in [f64::MAX, -1e300, f64::INFINITY, f64::NAN] {
            let sum = combined([&liar(loss), &honest, &liar(loss)].into_iter(), &schema, 0);
            assert_eq!(sum.loss, Some(0.5), "{loss} is no loss");
            assert!(sum.folded <= 3 + 2 * MOST_LEVELS, "{}", sum.folded);
            assert!(sum.bytes_copied < 1 << 17, "{}", sum.bytes_copied);
        }
        let sum = combined([&liar(1.5), &honest].into_iter(), &schema, 0);
        assert_eq!(sum.loss, Some(0.75));
    }

    #[test]
    fn nothing_was_made_later_than_now() {
        let made = |times: &[&[u64]]| made(times.iter().copied(), 100);
        assert_eq!(made(&[&[u64::MAX, 5], &[3, 7]]), [100, 7, 100]);
        assert_eq!(made(&[&[3], &[]]), [0; 0], "some of it was made elsewhere");
    }
}
