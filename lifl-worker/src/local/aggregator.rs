//! The shell of an aggregator in one process with its children.

use std::time::Duration;

use lifl_common::arena::WritableSlot;

use super::{Event, Requests, Worker, WorkerError};
use crate::aggregator::{Aggregator, Input, LoadedModel, Output};

/// Answers [`Output::LoadModel`].
pub(crate) type LoadModel = Box<dyn FnMut(WritableSlot, Option<WritableSlot>) -> LoadedModel>;

/// An aggregator whose parent is in this process too.
pub(crate) struct LocalAggregator {
    aggregator: Aggregator,
    load_model: LoadModel,
}

/// An aggregator asked for its gateway.
#[derive(Debug, thiserror::Error)]
#[error("an aggregator in one process with its parent has no gateway")]
struct NoGateway;

impl LocalAggregator {
    /// One whose model, if it is a top, comes from there.
    ///
    /// # Errors
    /// If the model is no good.
    pub(crate) fn new(aggregator: Aggregator, load_model: LoadModel) -> Result<Self, WorkerError> {
        let mut shell = Self {
            aggregator,
            load_model,
        };
        shell.perform(Duration::ZERO, &mut Requests::default())?;
        Ok(shell)
    }

    fn perform(&mut self, now: Duration, requests: &mut Requests) -> Result<(), WorkerError> {
        while let Some(output) = self.aggregator.poll_output() {
            match output {
                Output::Send(frame) => requests.frames.push(frame),
                Output::OpenArena(arena) => requests.open_arena.push(arena),
                Output::LoadModel { model, state } => {
                    let loaded = (self.load_model)(model, state);
                    self.aggregator
                        .handle(now, Input::ModelLoaded(Box::new(loaded)))?;
                }
                Output::ReceiveModel(_) | Output::SendAggregate(..) | Output::SendNothing { .. } => {
                    return Err(NoGateway.into());
                }
            }
        }
        Ok(())
    }
}

impl Worker for LocalAggregator {
    fn handle(&mut self, now: Duration, event: Event, requests: &mut Requests) -> Result<(), WorkerError> {
        let input = match event {
            Event::Start => Input::Ready,
            Event::Frame(frame) => Input::Frame(frame),
            Event::PeerLost(worker) => Input::PeerLost(worker),
            Event::Undelivered(worker, refusal) => Input::Undelivered(worker, refusal),
            Event::ArenaOpened(arena, opened) => Input::ArenaOpened {
                arena,
                opened: Ok(opened),
            },
            Event::Work => return Ok(()),
            Event::Timeout => Input::Timeout,
        };
        self.aggregator.handle(now, input)?;
        self.perform(now, requests)
    }

    fn timeout(&self) -> Option<Duration> {
        self.aggregator.timeout()
    }

    fn is_idle(&mut self) -> bool {
        self.aggregator.is_idle()
    }
}
