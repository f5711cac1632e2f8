//! The shell of a trainer in one process with its parent.

use std::sync::Arc;
use std::time::Duration;

use lifl_common::arena::{OwnedArena, PeerArena};
use lifl_common::frame::Refusal;
use lifl_common::update::{Schema, UpdateInfo, image};

use super::{Event, Requests, Worker, WorkerError};
use crate::parent::LentModel;
use crate::trainer::{Input, Output, Trainer};

/// What a trainer does with models.
pub(crate) trait Learner {
    /// Trains in a round, from a model's data into an update's; `None` if nothing comes of it.
    fn train(&mut self, round: u32, model: &[u8], out: &mut [u8]) -> Option<UpdateInfo>;

    /// Hears what became of the update: `None` if it counts.
    fn settled(&mut self, round: u32, refusal: Option<Refusal>);
}

/// A trainer with an arena of one slot.
pub(crate) struct LocalTrainer {
    trainer: Trainer,
    name: String,
    schema: Arc<Schema>,
    arena: OwnedArena,
    learner: Box<dyn Learner>,
    /// The model of the training that was asked for, and its arena as soon as that is open.
    training: Option<(LentModel, Option<Arc<PeerArena>>)>,
}

/// The trainer was asked to train before its last update was settled.
#[derive(Debug, thiserror::Error)]
#[error("the last update's slot is not free")]
struct NoFreeSlot;

impl LocalTrainer {
    /// A trainer that can begin.
    pub(crate) fn new(
        trainer: Trainer,
        name: String,
        schema: Arc<Schema>,
        arena: OwnedArena,
        learner: Box<dyn Learner>,
    ) -> Self {
        Self {
            trainer,
            name,
            schema,
            arena,
            learner,
            training: None,
        }
    }

    /// Trains on the model that is open.
    fn train(&mut self) -> Result<(), WorkerError> {
        let Some((model, Some(arena))) = self.training.take() else {
            return Ok(());
        };
        let (round, schema) = (model.round, &*self.schema);
        let bytes = arena.object(model.key, model.length)?;
        let (_, data) = image::check(bytes, schema)?;
        let mut slot = self.arena.begin().ok_or(NoFreeSlot)?;
        let out = &mut slot.bytes_mut()[image::data_range(schema)];
        let Some(info) = self.learner.train(round, &bytes[data], out) else {
            self.trainer.handle(Input::Nothing(round));
            return Ok(());
        };
        let metadata = info.metadata(&self.name, round, slot.key().generation);
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.arena.publish(slot);
        self.trainer
            .handle(Input::Trained(info.frame(round, key, schema)));
        Ok(())
    }
}

impl Worker for LocalTrainer {
    fn handle(&mut self, _now: Duration, event: Event, requests: &mut Requests) -> Result<(), WorkerError> {
        match event {
            Event::Start => self.trainer.handle(Input::Ready),
            Event::Frame(frame) => self.trainer.handle(Input::Frame(frame)),
            Event::PeerLost(worker) => self.trainer.handle(Input::PeerLost(worker)),
            Event::Undelivered(worker, _) => self.trainer.handle(Input::Undelivered(worker)),
            Event::ArenaOpened(_, None) => {
                if let Some((model, _)) = self.training.take() {
                    self.trainer.handle(Input::GivenUp(model.round));
                }
            }
            Event::ArenaOpened(_, Some(opened)) => {
                if let Some((_, arena)) = &mut self.training {
                    *arena = Some(opened);
                    requests.work = true;
                }
            }
            Event::Work => self.train()?,
            Event::Timeout => {}
        }
        while let Some(output) = self.trainer.poll_output() {
            match output {
                Output::Send(frame) => requests.frames.push(frame),
                Output::Overtaken(_) => {}
                Output::Train(model) => {
                    self.training = Some((model, None));
                    requests.open_now = Some(model.key.arena);
                }
                Output::Settled { round, key, refusal } => {
                    self.arena.free(key);
                    self.learner.settled(round, refusal);
                }
            }
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        None
    }

    fn is_idle(&mut self) -> bool {
        self.trainer.update().is_none() && self.training.is_none() && self.arena.begin().is_some()
    }
}
