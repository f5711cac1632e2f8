//! The trainer's process: the [protocol](lifl_worker::trainer) with a frame socket, an arena of one slot and a learner.
//!
//! Training runs beside the event loop, so that the end of the job is never waited for; but for training that last time was
//! over before another thread would have begun. Where it fails, because the model is no good or the loss is no number, the
//! parent and the coordinator are told that there is nothing in this round; the trainer goes on with the next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use lifl_common::arena::{OwnedArena, PeerArena, WritableSlot};
use lifl_common::config::UpdateKind;
use lifl_common::frame::Refusal;
use lifl_common::update::{Cover, Schema, Tensors, TensorsMut, UpdateInfo, image};
use lifl_worker::node_link::{Incoming, NodeLink};
use lifl_worker::parent::LentModel;
use lifl_worker::trainer::{Input, Output, Trainer};
use tokio::task::JoinHandle;

use super::Place;
use super::join::{Joined, join, log};
use crate::clock::monotonic_ns;
use crate::task::Task;
use lifl_aggregate::{Threads, subtract};
use lifl_learn::Learner;

/// What stays the same from round to round.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) cover: Cover,
    pub(super) updates: UpdateKind,
    pub(super) schema: Schema,
    pub(super) threads: Threads,
}

/// One round's training, handed to the training thread.
struct Lesson {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    arena: Arc<PeerArena>,
    model: LentModel,
}

/// What comes back from it.
struct Learned {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    round: u32,
    /// What was trained, or why nothing was.
    trained: anyhow::Result<UpdateInfo>,
    begun: Instant,
    took: Duration,
}

/// What lasts no longer is not worth waking a thread for.
const BRIEF: Duration = Duration::from_millis(1);

/// The log tells of training no oftener; of every round with `RUST_LOG=debug`.
const TELL_EVERY: Duration = Duration::from_secs(1);

struct TrainerProcess {
    link: NodeLink,
    arena: OwnedArena,
    shared: Arc<Shared>,
    protocol: Trainer,
    /// `None` while it is with the training thread.
    learner: Option<Box<dyn Learner>>,
    /// Whether the last training was [brief](BRIEF).
    brief: bool,
    /// When the training began that the log told of last.
    told: Option<Instant>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, task: Task, schema: Schema) -> anyhow::Result<()> {
    let (shared, learner) = prepare(&task, schema.clone()).await?;
    let Joined { link, arena, .. } = join(&place, &task, &schema).await?;
    let mut trainer = TrainerProcess {
        protocol: Trainer::new(link.id(), link.coordinator()),
        link,
        arena,
        shared: Arc::new(shared),
        learner: Some(learner),
        brief: false,
        told: None,
    };
    trainer.protocol.handle(Input::Ready);
    let mut training: Option<JoinHandle<Learned>> = None;
    loop {
        if let Some(lesson) = trainer.advance().await? {
            let shared = Arc::clone(&trainer.shared);
            if trainer.brief {
                trainer.deliver(learn_one(&shared, lesson));
                continue;
            }
            training = Some(tokio::task::spawn_blocking(move || learn_one(&shared, lesson)));
        }
        trainer.link.flush().await?;
        tokio::select! {
            learned = finished(&mut training) => {
                training = None;
                trainer.deliver(learned?);
            }
            incoming = trainer.link.next() => if trainer.take(incoming?) {
                return Ok(());
            },
        }
    }
}

/// Makes the learner, and what else a trainer needs, wherever its parent is.
pub(super) async fn prepare(task: &Task, schema: Schema) -> anyhow::Result<(Shared, Box<dyn Learner>)> {
    let share = task.worker.share;
    let shared = Shared {
        name: task.worker.name.clone(),
        cover: Cover::of(share.context("a trainer without a share of the data")?),
        updates: task.job.updates,
        schema,
        threads: Threads::new(1)?,
    };
    let task = task.clone();
    let learner =
        tokio::task::spawn_blocking(move || lifl_learn::for_trainer(&task.job, &task.worker, task.part));
    let learner = learner.await.context("the learner could not be made")??;
    Ok((shared, learner))
}

/// Waits for the training thread; for ever when there is none.
pub(super) async fn finished<T>(training: &mut Option<JoinHandle<T>>) -> anyhow::Result<T> {
    match training {
        Some(training) => training.await.context("the training thread panicked"),
        None => std::future::pending().await,
    }
}

/// The log tells of an update that does not count.
pub(super) fn tell_refused(round: u32, refusal: Option<Refusal>) {
    if let Some(refusal) = refusal {
        tracing::warn!(round, "our update was refused: {refusal}");
    }
}

impl TrainerProcess {
    /// Deals with one thing that came; says whether it was the job's end.
    fn take(&mut self, incoming: Incoming) -> bool {
        log(&incoming);
        let input = match incoming {
            Incoming::Frame(frame) => Input::Frame(frame),
            Incoming::Lost { worker, .. } => Input::PeerLost(worker),
            Incoming::Undelivered(letter) => Input::Undelivered(letter.to),
            Incoming::Ended(_) => return true,
        };
        self.protocol.handle(input);
        false
    }

    /// Does what the protocol wants done; gives the training that it asks for, if it does.
    async fn advance(&mut self) -> anyhow::Result<Option<Lesson>> {
        let mut lesson = None;
        while let Some(output) = self.protocol.poll_output() {
            match output {
                Output::Send(frame) => self.link.post(frame),
                Output::Overtaken(_) => {}
                Output::Settled { round, key, refusal } => {
                    tell_refused(round, refusal);
                    self.arena.free(key);
                }
                Output::Train(model) => lesson = self.lesson(model).await?,
            }
        }
        Ok(lesson)
    }

    async fn lesson(&mut self, model: LentModel) -> anyhow::Result<Option<Lesson>> {
        let arena = match self.link.peer_arena(model.key.arena).await {
            Ok(Some(arena)) => arena,
            Ok(None) => {
                // The top's that has just died; its successor's is on its way.
                tracing::warn!(key = %model.key, "the model's arena is gone");
                self.protocol.handle(Input::GivenUp(model.round));
                return Ok(None);
            }
            Err(error) => {
                self.fail(
                    model.round,
                    &anyhow::Error::from(error).context("cannot read the model"),
                );
                return Ok(None);
            }
        };
        let slot = self.arena.begin();
        Ok(Some(Lesson {
            learner: self.learner.take().context("two trainings at a time")?,
            slot: slot.context("the last update's slot is not free")?,
            arena,
            model,
        }))
    }

    fn fail(&mut self, round: u32, error: &anyhow::Error) {
        tracing::error!(round, "no update: {error:#}");
        self.protocol.handle(Input::Nothing(round));
    }

    /// What came of training goes to the parent.
    fn deliver(&mut self, learned: Learned) {
        let Learned {
            learner,
            slot,
            round,
            trained,
            begun,
            took,
        } = learned;
        self.learner = Some(learner);
        self.brief = took <= BRIEF;
        let info = match trained {
            Ok(info) => info,
            Err(error) => return self.fail(round, &error),
        };
        let (samples, loss) = (info.samples, info.loss);
        if self
            .told
            .is_none_or(|told| begun.duration_since(told) >= TELL_EVERY)
        {
            self.told = Some(begun);
            tracing::info!(round, samples, loss, "trained");
        } else {
            tracing::debug!(round, samples, loss, "trained");
        }
        let key = self.arena.publish(slot);
        let update = info.frame(round, key, &self.shared.schema);
        self.protocol.handle(Input::Trained(update));
    }
}

/// Trains on a model's data, and writes the update's.
pub(super) fn learn_round(
    shared: &Shared,
    learner: &mut dyn Learner,
    round: u32,
    weights: &[u8],
    out: &mut [u8],
) -> anyhow::Result<UpdateInfo> {
    let schema = &shared.schema;
    let trained = learner.train(
        round,
        Tensors::new(schema, weights),
        TensorsMut::new(schema, &mut *out),
    )?;
    if shared.updates == UpdateKind::Deltas {
        subtract(&shared.threads, schema, weights, out)?;
    }
    Ok(UpdateInfo {
        samples: trained.samples,
        cover: shared.cover.clone(),
        loss: trained.loss,
        folded: 0,
        bytes_copied: trained.bytes_copied,
        made: vec![monotonic_ns()],
    })
}

/// Learns a lesson. What goes wrong in that is part of the result.
fn learn_one(shared: &Shared, lesson: Lesson) -> Learned {
    let Lesson {
        mut learner,
        mut slot,
        arena,
        model,
    } = lesson;
    let begun = Instant::now();
    let mut learn = || -> anyhow::Result<UpdateInfo> {
        let schema = &shared.schema;
        let bytes = arena.object(model.key, model.length)?;
        let (_, data) = image::check(bytes, schema).context("the model that came is not the job's")?;
        let out = &mut slot.bytes_mut()[image::data_range(schema)];
        let info = learn_round(shared, &mut *learner, model.round, &bytes[data], out)?;
        let metadata = info.metadata(&shared.name, model.round, slot.key().generation);
        image::write_header(slot.bytes_mut(), schema, &metadata);
        Ok(info)
    };
    let trained = learn();
    Learned {
        learner,
        slot,
        round: model.round,
        trained,
        begun,
        took: begun.elapsed(),
    }
}
