//! The trainer beyond the node's shared memory: the same [protocol](lifl_worker::trainer) as on the node, over sessions with the
//! gateway. Its model comes over the wire into its own memory, and its update goes from there.
//!
//! What a session says is what frames say on the node: that a model is offered announces its round, and a verdict names its
//! round's update. The gateway's proxy stands for the parent.

use std::sync::Arc;

use anyhow::{Context, bail};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, Generation, Key, WorkerId};
use lifl_common::session::{Buffer, Destination, Object, Source};
use lifl_common::update::{Schema, UpdateInfo};
use lifl_worker::gateway_link::{GatewayEvent, GatewayLink};
use lifl_worker::trainer::{Input, Output, Trainer};
use tokio::task::JoinHandle;

use super::trainer::{Shared, finished, learn_round, prepare, tell_refused};
use crate::task::Task;
use lifl_learn::Learner;

/// Who speaks at the other end of a session: for the coordinator when it announces a round, for the parent when it does not.
const COORDINATOR: WorkerId = WorkerId(1);
const PARENT: WorkerId = WorkerId(2);
const SELF: WorkerId = WorkerId(3);

/// What comes back from the training thread.
struct Learned {
    learner: Box<dyn Learner>,
    model: Buffer,
    update: Buffer,
    round: u32,
    /// What was trained, or why nothing was.
    trained: anyhow::Result<UpdateInfo>,
}

struct RemoteTrainer {
    gateway: GatewayLink,
    shared: Arc<Shared>,
    protocol: Trainer,
    /// `None` while it is with the training thread.
    learner: Option<Box<dyn Learner>>,
    training: Option<JoinHandle<Learned>>,
    /// Where a model can come, where an update can be made.
    free_model: Option<Buffer>,
    free_update: Option<Buffer>,
    /// A model that has come and is not trained on yet.
    model: Option<Buffer>,
    /// The update that there is no verdict on yet.
    update: Option<(UpdateInfo, Arc<Buffer>)>,
}

/// The name of a round's model or update: there is one of each in a round.
fn key(round: u32) -> Key {
    Key {
        arena: ArenaId(0),
        slot: 0,
        generation: Generation(round.into()),
    }
}

/// Plays the role until the job ends.
pub(super) async fn play(gateway: GatewayLink, task: Task, schema: Schema) -> anyhow::Result<()> {
    let bytes = schema.data_bytes();
    let (shared, learner) = prepare(&task, schema).await?;
    let mut trainer = RemoteTrainer {
        gateway,
        shared: Arc::new(shared),
        protocol: Trainer::new(SELF, COORDINATOR),
        learner: Some(learner),
        training: None,
        free_model: Some(Buffer::new(bytes)),
        free_update: Some(Buffer::new(bytes)),
        model: None,
        update: None,
    };
    trainer.protocol.handle(Input::Ready);
    loop {
        trainer.advance()?;
        tokio::select! {
            learned = finished(&mut trainer.training) => {
                trainer.training = None;
                trainer.deliver(learned?);
            }
            event = trainer.gateway.next() => if trainer.take(event?)? {
                return Ok(());
            },
        }
    }
}

impl RemoteTrainer {
    /// Deals with what came; says whether it was the job's end.
    fn take(&mut self, event: GatewayEvent) -> anyhow::Result<bool> {
        match event {
            GatewayEvent::Offered => {
                let Some(offered) = self.gateway.offered() else {
                    return Ok(false);
                };
                if offered != Object::of(offered.round, &self.shared.schema) {
                    bail!("the model that is offered is not the job's");
                }
                self.hear(COORDINATOR, FrameKind::Begin, offered.round, 0);
            }
            GatewayEvent::Model(object, Destination::Private(buffer)) => {
                self.model = Some(buffer);
                self.hear(PARENT, FrameKind::Model, object.round, 0);
            }
            GatewayEvent::Model(..) => bail!("a model came into a slot that was not given"),
            GatewayEvent::Verdict(round, None) => self.hear(PARENT, FrameKind::Release, round, 0),
            GatewayEvent::Verdict(round, Some(refusal)) => {
                self.hear(PARENT, FrameKind::Refuse, round, refusal as u16);
            }
            GatewayEvent::Ended(reason) => {
                tracing::info!("the job has ended: {reason}");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What came, as the frame that says it on the node.
    fn hear(&mut self, from: WorkerId, kind: FrameKind, round: u32, refusal: u16) {
        self.protocol.handle(Input::Frame(Frame {
            from,
            kind: kind as u16,
            refusal,
            round,
            key: key(round),
            value: PARENT.0.into(),
            ..Frame::default()
        }));
    }

    /// Does what the protocol wants done.
    fn advance(&mut self) -> anyhow::Result<()> {
        while let Some(output) = self.protocol.poll_output() {
            match output {
                Output::Send(frame) => self.send(&frame),
                Output::Overtaken(_) => {}
                Output::Settled { round, refusal, .. } => {
                    tell_refused(round, refusal);
                    let update = self.update.take().map(|(_, update)| update);
                    self.free_update = update.and_then(Arc::into_inner);
                    if self.free_update.is_none() {
                        bail!("an update that was judged is still being sent");
                    }
                }
                Output::Train(model) => self.train(model.round)?,
            }
        }
        if self.gateway.offered().is_some()
            && let Some(buffer) = self.free_model.take()
        {
            self.gateway.accept(Destination::Private(buffer));
        }
        Ok(())
    }

    /// Says in a session what a frame says on the node.
    fn send(&mut self, frame: &Frame) {
        match FrameKind::from_number(frame.kind) {
            Some(FrameKind::Ready) => self.gateway.ready(),
            // The proxy tells the coordinator.
            Some(FrameKind::Nothing) if frame.to == PARENT => self.gateway.nothing(frame.round),
            Some(FrameKind::Update) => {
                if let Some((info, update)) = &self.update {
                    let object = Object::of(frame.round, &self.shared.schema);
                    let source = Source::Private(Arc::clone(update));
                    self.gateway.update(object, info.clone(), source);
                }
            }
            // A model that nobody trains on makes room for the next one.
            Some(FrameKind::Release) => {
                if let Some(model) = self.model.take() {
                    self.free_model = Some(model);
                }
            }
            _ => {}
        }
    }

    fn train(&mut self, round: u32) -> anyhow::Result<()> {
        let (model, update) = (self.model.take(), self.free_update.take());
        let model = model.context("no model has come")?;
        let mut update = update.context("the last update's buffer is not free")?;
        let mut learner = self.learner.take().context("two trainings at a time")?;
        let shared = Arc::clone(&self.shared);
        self.training = Some(tokio::task::spawn_blocking(move || {
            let trained = learn_round(&shared, &mut *learner, round, model.bytes(), update.bytes_mut());
            Learned {
                learner,
                model,
                update,
                round,
                trained,
            }
        }));
        Ok(())
    }

    /// What came of training goes up.
    fn deliver(&mut self, learned: Learned) {
        let Learned {
            learner,
            model,
            update,
            round,
            trained,
        } = learned;
        self.learner = Some(learner);
        self.free_model = Some(model);
        match trained {
            Ok(info) => {
                tracing::info!(round, samples = info.samples, loss = info.loss, "trained");
                let frame = info.frame(round, key(round), &self.shared.schema);
                self.update = Some((info, Arc::new(update)));
                self.protocol.handle(Input::Trained(frame));
            }
            Err(error) => {
                tracing::error!(round, "no update: {error:#}");
                self.free_update = Some(update);
                self.protocol.handle(Input::Nothing(round));
            }
        }
    }
}
