//! The top's server optimizer, and what it remembers: the state that lies in the top's second arena.
//!
//! ```text
//!   none ──── first step ────▶ published ──── step ────▶ the next, in the other slot, published
//!                                  │ ▲                          │
//!                     lent with each model, until released      └── the one before is free again
//! ```
//!
//! A step writes beside the state that it reads, so that one which fails, or a top that dies in it, leaves the last
//! state as it was; and whoever maps the arena still has it when the top is gone.

use lifl_aggregate::{FoldError, ServerOptimizer, State, Threads};
use lifl_common::arena::{OwnedArena, WritableSlot};
use lifl_common::frame::Frame;
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Metadata, image};

use super::Error;

/// The optimizer with its state.
#[derive(Debug)]
pub(super) struct OptimizerState {
    optimizer: ServerOptimizer,
    /// Where its state lies, if it has one.
    arena: Option<OwnedArena>,
    /// The state published last; `None` before the first step, and for an optimizer that has none.
    current: Option<Key>,
    /// Where the next goes.
    next: Option<WritableSlot>,
}

/// One step, ready to be made.
#[derive(Debug)]
pub(super) struct Step<'a> {
    optimizer: &'a ServerOptimizer,
    state: Option<State<'a>>,
}

impl Step<'_> {
    /// Makes `mean` the model.
    pub(super) fn apply(self, threads: &Threads, model: &[u8], mean: &mut [u8]) -> Result<(), FoldError> {
        self.optimizer.step(threads, model, mean, self.state)
    }
}

impl OptimizerState {
    pub(super) fn new(optimizer: ServerOptimizer, arena: Option<OwnedArena>) -> Self {
        let arena = arena.filter(|_| optimizer.state_schema().is_some());
        Self {
            optimizer,
            arena,
            current: None,
            next: None,
        }
    }

    /// A slot for a state that is not made by a step.
    pub(super) fn begin_state(&mut self) -> Result<Option<WritableSlot>, Error> {
        let Some(arena) = &mut self.arena else {
            return Ok(None);
        };
        arena.begin().map(Some).ok_or(Error::NoFreeSlot)
    }

    /// Goes on from a model of that round, and from the state of the same round.
    pub(super) fn restore(
        &mut self,
        round: u32,
        state: Option<(WritableSlot, Metadata)>,
    ) -> Result<(), Error> {
        // Before the first step, which the first new model comes of, there is nothing to remember.
        let due = self.optimizer.state_schema().filter(|_| round > 0);
        match (state, due, &mut self.arena) {
            (None, None, _) => Ok(()),
            (Some((mut slot, mut metadata)), Some(schema), Some(arena)) => {
                if metadata.round != round {
                    return Err(Error::StateOfOtherRound {
                        state: metadata.round,
                        model: round,
                    });
                }
                metadata.generation = slot.key().generation;
                image::write_header(slot.bytes_mut(), schema, &metadata);
                self.current = Some(arena.publish(slot));
                Ok(())
            }
            (Some(_), _, _) => Err(Error::UnexpectedState),
            (None, Some(_), _) => Err(Error::MissingState),
        }
    }

    /// Whether the next state has somewhere to go; not while the coordinator still has the one before the last.
    pub(super) fn has_room(&mut self) -> bool {
        let Some(arena) = &mut self.arena else {
            return true;
        };
        if self.next.is_none() {
            self.next = arena.begin();
        }
        self.next.is_some()
    }

    /// The next step.
    pub(super) fn step(&mut self) -> Step<'_> {
        let Self {
            optimizer,
            arena,
            current,
            next,
        } = self;
        let schema = optimizer.state_schema();
        let state = schema.zip(arena.as_ref()).zip(next.as_mut());
        let state = state.map(|((schema, arena), next)| State {
            before: current
                .and_then(|key| arena.object(key))
                .map(|slot| &slot[image::data_range(schema)]),
            after: &mut next.bytes_mut()[image::data_range(schema)],
        });
        Step { optimizer, state }
    }

    /// Publishes the state that a step has made, with the model of that metadata.
    pub(super) fn publish(&mut self, model: &Metadata) {
        let (Some(schema), Some(arena)) = (self.optimizer.state_schema(), &mut self.arena) else {
            return;
        };
        let Some(mut slot) = self.next.take() else { return };
        let metadata = Metadata {
            maker: model.maker.clone(),
            round: model.round,
            generation: slot.key().generation,
            ..Metadata::default()
        };
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let before = self.current.replace(arena.publish(slot));
        if let Some(before) = before {
            arena.free(before);
        }
    }

    /// Lends the state: its key and length, if there is one.
    pub(super) fn lend(&mut self, to: WorkerId) -> Result<Option<(Key, u64)>, Error> {
        let (Some(key), Some(arena), Some(schema)) =
            (self.current, &mut self.arena, self.optimizer.state_schema())
        else {
            return Ok(None);
        };
        arena.lend(key, to)?;
        Ok(Some((key, image::image_bytes(schema) as u64)))
    }

    /// Takes back what is lent to a worker that is gone.
    pub(super) fn take_back(&mut self, from: WorkerId) {
        if let Some(arena) = &mut self.arena {
            arena.take_back(from);
        }
    }

    /// Handles a release if it is of a state; says whether it was.
    pub(super) fn released(&mut self, frame: &Frame) -> bool {
        let Some(arena) = self.arena.as_mut().filter(|arena| arena.id() == frame.key.arena) else {
            return false;
        };
        if let Err(error) = arena.release(frame.key, frame.from) {
            tracing::debug!(from = %frame.from, "released what was not lent: {error}");
        }
        if self.current != Some(frame.key) {
            arena.free(frame.key);
        }
        true
    }
}
