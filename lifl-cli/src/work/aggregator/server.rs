//! The top's optimizer, and what it remembers: the state that lies in the top's second arena.
//!
//! ```text
//!   none ──── first step ────▶ published ──── step ────▶ the next, in the other slot, published
//!                                  │ ▲                          │
//!                     lent with each model, until released      └── the one before is free again
//! ```
//!
//! A step writes beside the state that it reads, so that one which fails, or a top that dies in it, leaves the last
//! state as it was; and whoever maps the arena still has it when the top is gone.

use std::sync::Arc;

use anyhow::Context;
use lifl_common::arena::{OwnedArena, WritableSlot};
use lifl_common::config::JobSpec;
use lifl_common::frame::Frame;
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Metadata, Schema, image};

use crate::work::ground::Ground;
use lifl_aggregate::{FoldError, ServerOptimizer, State, Threads};

/// The optimizer with its state.
pub(super) struct Server {
    optimizer: ServerOptimizer,
    /// The state published last; `None` before the first step, and for an optimizer that has none.
    current: Option<Key>,
    /// Where the next goes.
    next: Option<WritableSlot>,
}

/// One step, ready to be made.
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

impl Server {
    pub(super) fn new(job: &JobSpec, schema: &Arc<Schema>) -> Self {
        Self {
            optimizer: ServerOptimizer::new(Arc::clone(schema), job.optimizer, job.updates),
            current: None,
            next: None,
        }
    }

    /// The tensors of its state, if it has one.
    pub(super) fn state_schema(&self) -> Option<&Schema> {
        self.optimizer.state_schema()
    }

    /// Goes on from a state that is published.
    pub(super) fn restore(&mut self, state: Key) {
        self.current = Some(state);
    }

    /// Whether the next state has somewhere to go; not while the coordinator still has the one before the last.
    pub(super) fn has_room(&mut self, ground: &mut impl Ground) -> bool {
        let Some(arena) = ground.state() else {
            return true;
        };
        if self.next.is_none() {
            self.next = arena.begin();
        }
        self.next.is_some()
    }

    /// The next step, from the state in `arena`.
    pub(super) fn step<'a>(&'a mut self, arena: Option<&'a OwnedArena>) -> Step<'a> {
        let schema = self.optimizer.state_schema();
        let state = schema.zip(arena).zip(self.next.as_mut());
        let state = state.map(|((schema, arena), next)| {
            let offset = image::data_offset(schema);
            let data = offset..offset + schema.data_bytes();
            let before = self.current.and_then(|key| arena.object(key));
            State {
                before: before.map(|slot| &slot[data.clone()]),
                after: &mut next.bytes_mut()[data],
            }
        });
        Step {
            optimizer: &self.optimizer,
            state,
        }
    }

    /// Publishes the state that a step has made, with the model of that metadata.
    pub(super) fn publish(&mut self, ground: &mut impl Ground, model: &Metadata) {
        let (Some(schema), Some(arena)) = (self.optimizer.state_schema(), ground.state()) else {
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

    /// Lends the state to the coordinator: its key and length, if there is one.
    pub(super) fn lend(&self, ground: &mut impl Ground, to: WorkerId) -> anyhow::Result<Option<(Key, u64)>> {
        let (Some(key), Some(arena), Some(schema)) =
            (self.current, ground.state(), self.optimizer.state_schema())
        else {
            return Ok(None);
        };
        arena
            .lend(key, to)
            .context("the optimizer's state is not there")?;
        Ok(Some((key, image::image_bytes(schema) as u64)))
    }

    /// Deals with a release if it is of a state; says whether it was.
    pub(super) fn released(&self, ground: &mut impl Ground, frame: &Frame) -> bool {
        let Some(arena) = ground.state().filter(|arena| arena.id() == frame.key.arena) else {
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
