//! One round's aggregate in the making: which updates come in, and the folding.

use anyhow::Context;
use lifl_common::arena::WritableSlot;
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Cover, Metadata, Schema, image};
use zerocopy::IntoBytes;

use super::Shared;
use super::children::{Children, Given};
use super::models::Lent;
use super::server::Step;
use crate::clock::monotonic_ns;
use crate::work::ground::Ground;
use lifl_aggregate::{Action, FoldError, Input, Rule, Threads};

/// An aggregate in the making.
pub(super) struct Collecting {
    pub(super) round: u32,
    pub(super) children: Children,
    /// Those of them that have not been handed the model yet.
    pub(super) owed: Vec<WorkerId>,
    /// Updates after which nobody else is waited for.
    goal: usize,
    /// Where it comes to lie.
    pub(super) slot: WritableSlot,
    pub(super) model: Lent,
}

/// What became of an aggregate.
pub(super) enum Made {
    /// It lies in its slot.
    Done {
        metadata: Metadata,
        /// The updates in it, and whose work is in each.
        children: Vec<(Frame, Cover)>,
    },
    /// No child gave anything.
    Nothing,
    /// The new model would not be finite, by the fault of these updates; of none, if it is the optimizer's.
    Diverged(Vec<Frame>),
}

/// The most that an honest trainer's loss can be: it is computed in `f32`.
const LARGEST_LOSS: f64 = f32::MAX as f64;

/// Objects that one trainer's work goes through on its way up, at most.
const MOST_LEVELS: u64 = 4;

/// Looks at an update before it is taken: that it lies where its key says and has the job's tensors. Its numbers are
/// looked at when they are folded.
pub(super) async fn inspect(
    ground: &mut impl Ground,
    schema: &Schema,
    frame: &Frame,
) -> Result<Given, Refusal> {
    if frame.key.arena.owner() != frame.from {
        tracing::warn!(from = %frame.from, key = %frame.key, "not of its own arena");
        return Err(Refusal::BadKey);
    }
    let arena = ground.peer(frame.key.arena).await.map_err(|error| {
        tracing::warn!(from = %frame.from, key = %frame.key, "cannot read the update: {error:#}");
        Refusal::BadKey
    })?;
    let arena = arena.ok_or(Refusal::NoArena)?;
    let bytes = arena.object(frame.key, frame.length).map_err(|error| {
        tracing::warn!(from = %frame.from, "{error}");
        Refusal::BadKey
    })?;
    let (metadata, offset) = image::check(bytes, schema).map_err(|error| {
        tracing::warn!(from = %frame.from, "{error}");
        Refusal::WrongShape
    })?;
    if metadata.generation != frame.key.generation || metadata.round != frame.round {
        tracing::warn!(from = %frame.from, key = %frame.key, "the object there is of {}", metadata.generation);
        return Err(Refusal::BadKey);
    }
    if frame.samples == 0 || metadata.samples != frame.samples {
        return Err(Refusal::BadSamples);
    }
    if metadata.cover.is_empty() || metadata.cover.count() != frame.covers {
        return Err(Refusal::BadCover);
    }
    Ok(Given {
        arrival: 0,
        frame: *frame,
        arena,
        offset,
        metadata,
    })
}

impl Collecting {
    pub(super) fn new(
        round: u32,
        children: Children,
        goal: Option<u32>,
        slot: WritableSlot,
        model: Lent,
    ) -> Self {
        Self {
            round,
            // A goal that all children together do not reach waits for all.
            goal: goal.map_or(usize::MAX, |goal| goal as usize),
            children,
            owed: Vec::new(),
            slot,
            model,
        }
    }

    /// Whether what has been folded is the round's aggregate: nobody is waited for any more.
    pub(super) fn complete(&self) -> bool {
        self.children.answered() || self.children.folded().count() >= self.goal
    }

    /// Folds what is there, but no more than the goal, [when it is time](Rule::action). Gives the updates that turned out not
    /// to be finite, which are out.
    pub(super) fn fold(
        &mut self,
        shared: &Shared,
        rule: &mut dyn Rule,
    ) -> anyhow::Result<Vec<(Frame, Refusal)>> {
        let mut refused = Vec::new();
        let mut from_copies = false;
        let offset = image::data_offset(&shared.schema);
        loop {
            let folded = self.children.folded().count();
            let wanted = self.goal.saturating_sub(folded);
            let there = self.children.unfolded().count();
            let enough = there >= wanted || self.children.answered();
            let action = rule.action(folded, there.min(wanted), enough);
            if action == Action::Wait {
                return Ok(refused);
            }
            let given = self.children.first_unfolded(wanted);
            let last = given.iter().map(|given| given.arrival).max().unwrap_or(0);
            let inputs = given.iter().map(|given| input(given, &shared.schema));
            let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
            let out = &mut self.slot.bytes_mut()[offset..][..shared.schema.data_bytes()];
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
                    let culprits = inputs.into_iter().filter_map(|index| given.get(index));
                    let culprits: Vec<Frame> = culprits.map(|given| given.frame).collect();
                    for culprit in culprits {
                        self.children.refuse(culprit.from);
                        refused.push((culprit, Refusal::NotFinite));
                    }
                    rule.reset();
                    // All others are still lent: the aggregate is made again without the culprits.
                    self.children.mark_unfolded();
                }
                Err(FoldError::TooManySamples { .. }) => {
                    // Of all that has come, not only of what came last.
                    let largest = self.children.taken().max_by_key(|given| given.frame.samples);
                    let culprit = largest.context("no update has samples")?.frame;
                    self.children.refuse(culprit.from);
                    refused.push((culprit, Refusal::BadSamples));
                    rule.reset();
                    self.children.mark_unfolded();
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Updates that turned out to be no good are out: the aggregate is made again from the others, which are all still
    /// lent.
    pub(super) fn without(&mut self, culprits: &[Frame], rule: &mut dyn Rule) {
        for culprit in culprits {
            self.children.refuse(culprit.from);
        }
        rule.reset();
        self.children.mark_unfolded();
    }

    /// Makes the aggregate, at the top the model, and writes the header.
    pub(super) fn finish<'a>(
        &mut self,
        shared: &Shared,
        rule: &mut dyn Rule,
        step: Option<Step<'_>>,
        own_object: impl FnOnce(Key) -> Option<&'a [u8]>,
    ) -> anyhow::Result<Made> {
        if rule.samples() == 0 {
            return Ok(Made::Nothing);
        }
        let Shared {
            schema,
            name,
            threads,
            ..
        } = shared;
        let offset = image::data_offset(schema);
        let data = offset..offset + schema.data_bytes();
        let samples = rule.finish(&mut self.slot.bytes_mut()[data.clone()], &[])?;
        // Only the top has an optimizer, and the model in its own arena.
        if let Some(step) = step {
            let model = own_object(self.model.key).context("the top has not the round's model any more")?;
            let model = &model[data.clone()];
            let mean = &mut self.slot.bytes_mut()[data.clone()];
            match step.apply(threads, model, mean) {
                Ok(()) => {}
                Err(error @ FoldError::Overflow) => {
                    tracing::error!(round = self.round, "{error}");
                    return Ok(Made::Diverged(self.overflowing(threads, schema, model)?));
                }
                Err(error @ FoldError::Diverged { .. }) => {
                    tracing::error!(round = self.round, "{error}");
                    return Ok(Made::Diverged(Vec::new()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let metadata = Metadata {
            maker: name.clone(),
            round: self.round,
            generation: self.slot.key().generation,
            samples,
            made: made(self.children.folded().map(|given| &*given.metadata.made)),
            ..summed(self.children.folded().map(|given| &given.metadata), schema)
        };
        image::write_header(self.slot.bytes_mut(), schema, &metadata);
        let children = self
            .children
            .folded()
            .map(|given| (given.frame, given.metadata.cover.clone()))
            .collect();
        Ok(Made::Done { metadata, children })
    }

    /// The updates that are too large for the model by themselves. If the model and the mean are too large together, then
    /// one of them is: the mean is between them.
    fn overflowing(&self, threads: &Threads, schema: &Schema, model: &[u8]) -> anyhow::Result<Vec<Frame>> {
        let mut culprits = Vec::new();
        for given in self.children.folded() {
            let mut copy = copied(input(given, schema)?.data)?;
            match lifl_aggregate::add(
                threads,
                schema,
                model,
                &mut copy.as_mut_bytes()[..schema.data_bytes()],
            ) {
                Ok(()) => {}
                Err(FoldError::Overflow) => culprits.push(given.frame),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(culprits)
    }
}

/// What several objects say of themselves together, but for their samples and times. What cannot be so is counted as the
/// most that can, and what is no loss is none.
fn summed<'a>(children: impl Iterator<Item = &'a Metadata>, schema: &Schema) -> Metadata {
    let mut sum = Metadata::default();
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

/// Folds from copies, one input after the other: what their owners write meanwhile changes nothing. The outer error is that
/// there is no memory for one.
fn fold_copies(
    rule: &mut dyn Rule,
    out: &mut [u8],
    inputs: &[Input<'_>],
) -> anyhow::Result<Result<(), FoldError>> {
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
fn copied(data: &[u8]) -> anyhow::Result<Vec<u64>> {
    let words = data.len().div_ceil(size_of::<u64>());
    let mut copy: Vec<u64> = Vec::new();
    let room = copy.try_reserve_exact(words);
    room.with_context(|| format!("no memory for a copy of an update of {} bytes", data.len()))?;
    copy.resize(words, 0);
    copy.as_mut_bytes()[..data.len()].copy_from_slice(data);
    Ok(copy)
}

/// When the last object of each level was made, of those that went into an object that is just being made. Nothing was made
/// later than now.
fn made<'a>(children: impl Iterator<Item = &'a [u64]>) -> Vec<u64> {
    let now = monotonic_ns();
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

/// The update's data, where it lies.
fn input<'a>(given: &'a Given, schema: &Schema) -> anyhow::Result<Input<'a>> {
    let bytes = given.arena.object(given.frame.key, given.frame.length)?;
    // `inspect` has found the data to end with the object.
    Ok(Input {
        data: &bytes[given.offset..][..schema.data_bytes()],
        samples: given.frame.samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_so_is_not_added_up() {
        let tensors = vec![lifl_common::update::TensorSpec::new(
            "w",
            lifl_common::update::DType::F32,
            [4],
        )];
        let schema = Schema::new(tensors).expect("a schema");
        let honest = Metadata {
            samples: 30,
            cover: Cover::of(0),
            loss: Some(0.5),
            bytes_copied: 16,
            ..Metadata::default()
        };
        let liar = |loss| Metadata {
            samples: 10,
            cover: Cover::of(1),
            loss: Some(loss),
            folded: u64::MAX,
            bytes_copied: u64::MAX,
            ..Metadata::default()
        };
        for loss in [f64::MAX, -1e300, f64::INFINITY, f64::NAN] {
            let sum = summed([&liar(loss), &honest, &liar(loss)].into_iter(), &schema);
            assert_eq!(sum.loss, Some(0.5), "{loss} is no loss");
            assert!(sum.folded <= 3 + 2 * MOST_LEVELS, "{}", sum.folded);
            assert!(sum.bytes_copied < 1 << 17, "{}", sum.bytes_copied);
        }
        assert_eq!(
            summed([&liar(1.5), &honest].into_iter(), &schema).loss,
            Some(0.75)
        );
    }

    #[test]
    fn nothing_was_made_later_than_now() {
        let (before, future) = (monotonic_ns(), [u64::MAX, 5]);
        let made = made([&future[..], &[3, 7]].into_iter());
        assert!((before..=monotonic_ns()).contains(&made[0]), "{made:?}");
        assert_eq!((made[1], made.len()), (7, 3));
    }
}
