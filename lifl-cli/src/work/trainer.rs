//! The trainer: once a round it is lent the model, trains on its own share of the data, and lends what came out.
//!
//! ```text
//!          Begin (coordinator), Model (parent), a free slot
//!   idle ───────────────────────────────────────────────────▶ training ──▶ model released, update lent ──▶ idle
//! ```
//!
//! Training runs beside the event loop, so that the end of the job is never waited for.

use std::sync::Arc;

use anyhow::Context;
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::config::{JobSpec, UpdateKind, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::update::{Metadata, Schema, Tensors, TensorsMut, image};
use tokio::task::JoinHandle;

use super::link::{Incoming, Link};
use super::{Place, join, ready};
use crate::aggregate::{Threads, subtract};
use crate::learn::{self, Learner, Trained};

/// What stays the same from round to round.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) updates: UpdateKind,
    pub(super) schema: Schema,
    pub(super) threads: Threads,
}

/// One round's work, handed to the training thread.
struct Lesson {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    arena: Arc<PeerArena>,
    model: Frame,
}

/// What comes back from it.
struct Learned {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    model: Frame,
    trained: Trained,
}

struct Trainer {
    link: Link,
    shared: Arc<Shared>,
    /// `None` while it is with the training thread.
    learner: Option<Box<dyn Learner>>,
    training: Option<JoinHandle<anyhow::Result<Learned>>>,
    /// The parent that the coordinator named last, and for which round.
    begun: Option<(u32, WorkerId)>,
    model: Option<Frame>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, job: JobSpec, spec: WorkerSpec, schema: Schema) -> anyhow::Result<()> {
    let share = spec.share.context("a trainer without a number")?;
    let learner = tokio::task::spawn_blocking({
        let job = job.clone();
        move || learn::for_trainer(&job, share)
    });
    let learner = learner.await.context("the learner could not be made")??;
    let link = join(&place, &job, &spec, &schema).await?;
    let shared = Shared {
        name: spec.name,
        updates: job.updates,
        schema,
        threads: Threads::new(1)?,
    };
    let mut trainer = Trainer {
        link,
        shared: Arc::new(shared),
        learner: Some(learner),
        training: None,
        begun: None,
        model: None,
    };
    ready(&mut trainer.link).await?;
    loop {
        tokio::select! {
            learned = finished(&mut trainer.training) => {
                trainer.training = None;
                trainer.deliver(learned?).await?;
            }
            incoming = trainer.link.next() => match incoming? {
                Incoming::Frame(kind, frame) => trainer.frame(kind, frame).await?,
                // The arena has taken back what was lent; its round is over for us.
                Incoming::Lost(_) => {}
                Incoming::Undelivered(letter) => trainer.link.take_back(letter.to),
                Incoming::Ended(reason) => {
                    tracing::info!("the job has ended: {reason}");
                    return Ok(());
                }
            },
        }
        trainer.start().await?;
    }
}

/// Waits for the training thread; for ever when there is none.
pub(super) async fn finished<T>(training: &mut Option<JoinHandle<anyhow::Result<T>>>) -> anyhow::Result<T> {
    match training {
        Some(training) => training.await.context("the training thread panicked")?,
        None => std::future::pending().await,
    }
}

impl Trainer {
    async fn frame(&mut self, kind: FrameKind, frame: Frame) -> anyhow::Result<()> {
        match kind {
            FrameKind::Begin if frame.from == self.link.coordinator() => {
                let parent =
                    u32::try_from(frame.value).context("the coordinator named an impossible parent")?;
                self.begun = Some((frame.round, WorkerId(parent)));
            }
            FrameKind::Model => {
                if let Some(before) = self.model.replace(frame) {
                    self.release(&before).await?;
                }
            }
            FrameKind::Release | FrameKind::Refuse => {
                if kind == FrameKind::Refuse {
                    let refusal = Refusal::from_number(frame.refusal).unwrap_or(Refusal::BadKey);
                    tracing::warn!(round = frame.round, "our update was refused: {refusal}");
                }
                if let Err(error) = self.link.arena.release(frame.key, frame.from) {
                    tracing::warn!(from = %frame.from, "released what was not lent: {error}");
                }
                self.link.arena.free(frame.key);
            }
            other => tracing::warn!(kind = ?other, from = %frame.from, "not for a trainer"),
        }
        Ok(())
    }

    async fn release(&mut self, model: &Frame) -> anyhow::Result<()> {
        let Frame { round, key, from, .. } = *model;
        self.link
            .send(
                from,
                FrameKind::Release,
                Frame {
                    round,
                    key,
                    ..Frame::default()
                },
            )
            .await
    }

    /// Begins to train when the round is announced, its model is there, a slot is free and no training runs.
    async fn start(&mut self) -> anyhow::Result<()> {
        let (Some((round, parent)), Some(model)) = (self.begun, self.model) else {
            return Ok(());
        };
        if model.round < round || (model.round == round && model.from != parent) {
            tracing::warn!(from = %model.from, round = model.round, "a model of an old round or from a stranger");
            self.model = None;
            return self.release(&model).await;
        }
        if model.round > round || self.training.is_some() {
            return Ok(());
        }
        // An update whose parent died was taken back; nobody will release it any more.
        self.link.arena.free_unheld();
        let Some(slot) = self.link.arena.begin() else {
            return Ok(());
        };
        let Some(learner) = self.learner.take() else {
            return Ok(());
        };
        self.model = None;
        let arena = self
            .link
            .peer(model.key.arena)
            .await
            .context("cannot read the model")?;
        let lesson = Lesson {
            learner,
            slot,
            arena,
            model,
        };
        let shared = Arc::clone(&self.shared);
        self.training = Some(tokio::task::spawn_blocking(move || learn_one(&shared, lesson)));
        Ok(())
    }

    /// The model goes back, the update goes up.
    async fn deliver(&mut self, learned: Learned) -> anyhow::Result<()> {
        let Learned {
            learner,
            slot,
            model,
            trained,
        } = learned;
        self.learner = Some(learner);
        let key = self.link.arena.publish(slot);
        let parent = model.from;
        self.link.arena.lend(key, parent)?;
        let release = Frame {
            round: model.round,
            key: model.key,
            ..Frame::default()
        };
        let update = Frame {
            round: model.round,
            key,
            length: image::image_bytes(&self.shared.schema) as u64,
            samples: trained.samples,
            value: trained.loss.unwrap_or(f64::NAN).to_bits(),
            covers: 1,
            ..Frame::default()
        };
        let frames = [
            self.link.frame(parent, FrameKind::Release, release),
            self.link.frame(parent, FrameKind::Update, update),
        ];
        tracing::info!(
            round = model.round,
            samples = trained.samples,
            loss = trained.loss,
            "trained"
        );
        self.link.send_all(&frames).await
    }
}

/// Trains on a model's data, and writes the update's.
pub(super) fn learn_round(
    shared: &Shared,
    learner: &mut dyn Learner,
    round: u32,
    weights: &[u8],
    out: &mut [u8],
) -> anyhow::Result<Trained> {
    let schema = &shared.schema;
    let trained = learner.train(
        round,
        Tensors::new(schema, weights),
        TensorsMut::new(schema, &mut *out),
    )?;
    if shared.updates == UpdateKind::Deltas {
        subtract(&shared.threads, schema, weights, out)?;
    }
    Ok(trained)
}

fn learn_one(shared: &Shared, lesson: Lesson) -> anyhow::Result<Learned> {
    let Lesson {
        mut learner,
        mut slot,
        arena,
        model,
    } = lesson;
    let schema = &shared.schema;
    let bytes = arena.object(model.key, model.length)?;
    let (_, from) = image::check(bytes, schema).context("the model that came is not the job's")?;
    let weights = &bytes[from..][..schema.data_bytes()];
    let offset = image::data_offset(schema);
    let out = &mut slot.bytes_mut()[offset..][..schema.data_bytes()];
    let trained = learn_round(shared, &mut *learner, model.round, weights, out)?;
    let metadata = Metadata {
        maker: shared.name.clone(),
        round: model.round,
        generation: slot.key().generation,
        samples: trained.samples,
        loss: trained.loss,
        folded: 0,
        bytes_copied: trained.bytes_copied,
    };
    image::write_header(slot.bytes_mut(), schema, &metadata);
    Ok(Learned {
        learner,
        slot,
        model,
        trained,
    })
}
