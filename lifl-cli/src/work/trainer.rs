//! The trainer: once a round it is lent the model, trains on its own share of the data, and lends what came out.
//!
//! ```text
//!     Begin (coordinator), if the parent is new, Model (parent), a free slot            Release or Refuse
//!   idle ───────────────────────────────────────────────────▶ training ──▶ update lent ──────────────────▶ idle
//!    ▲                                                           │ ▲          │  ▲ │
//!    │                     the parent's successor lends the same └─┘          │  └─┘ Begin again: lent to the successor
//!    └───────────── the parent is gone and the next round is announced ───────┘
//! ```
//!
//! Training runs beside the event loop, so that the end of the job is never waited for; but for training that last time was
//! over before another thread would have begun. Where it fails, because the model is no good or the loss is no number, the
//! parent and the coordinator are told that there is nothing in this round; the trainer goes on with the next.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::config::UpdateKind;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::update::{Cover, Metadata, Schema, Tensors, TensorsMut, image};
use tokio::task::JoinHandle;

use super::ground::Ground;
use super::link::Incoming;
use super::{Place, join, ready};
use crate::clock::monotonic_ns;
use crate::task::Task;
use lifl_aggregate::{Threads, subtract};
use lifl_learn::{Learner, Trained};

/// What stays the same from round to round.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) cover: Cover,
    pub(super) updates: UpdateKind,
    pub(super) schema: Schema,
    pub(super) threads: Threads,
}

/// One round's work, handed to the training thread.
pub(super) struct Lesson {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    arena: Arc<PeerArena>,
    model: Frame,
}

/// What comes back from it.
pub(super) struct Learned {
    learner: Box<dyn Learner>,
    slot: WritableSlot,
    /// What was trained, or why nothing was.
    trained: anyhow::Result<Trained>,
    begun: Instant,
    took: Duration,
}

/// What lasts no longer is not worth waking a thread for.
const BRIEF: Duration = Duration::from_millis(1);

/// The log tells of training no oftener; of every round with `RUST_LOG=debug`.
const TELL_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Trainer<G> {
    pub(super) ground: G,
    pub(super) shared: Arc<Shared>,
    /// `None` while it is with the training thread.
    learner: Option<Box<dyn Learner>>,
    /// The model that is being trained on, as it was lent last.
    training: Option<Frame>,
    /// The parent that the coordinator named last, and for which round.
    begun: (u32, WorkerId),
    /// Models that may be trained on: the last of each lender. Which of them is the parent, the coordinator says.
    models: HashMap<WorkerId, Frame>,
    /// The update that there is no verdict on yet.
    pub(super) update: Option<Frame>,
    /// The last round that was trained for.
    trained: u32,
    /// Whether that was [brief](BRIEF).
    brief: bool,
    /// When the training began that the log told of last.
    told: Option<Instant>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, task: Task, schema: Schema) -> anyhow::Result<()> {
    let share = task.worker.share.context("a trainer without a number")?;
    let learner = tokio::task::spawn_blocking({
        let task = task.clone();
        move || lifl_learn::for_trainer(&task.job, &task.worker, task.part)
    });
    let learner = learner.await.context("the learner could not be made")??;
    let link = join(&place, &task, &schema).await?;
    let shared = Shared {
        name: task.worker.name,
        cover: Cover::of(share),
        updates: task.job.updates,
        schema,
        threads: Threads::new(1)?,
    };
    let mut trainer = Trainer::new(link, shared, learner);
    ready(&mut trainer.ground).await?;
    let mut training: Option<JoinHandle<anyhow::Result<Learned>>> = None;
    loop {
        tokio::select! {
            learned = finished(&mut training) => {
                training = None;
                trainer.deliver(learned?)?;
            }
            incoming = trainer.ground.next() => if trainer.take(incoming?)? {
                return Ok(());
            },
        }
        if let Some(lesson) = trainer.start().await? {
            let shared = Arc::clone(&trainer.shared);
            if trainer.brief {
                trainer.deliver(learn_one(&shared, lesson))?;
            } else {
                training = Some(tokio::task::spawn_blocking(move || {
                    Ok(learn_one(&shared, lesson))
                }));
            }
        }
        trainer.ground.flush().await?;
    }
}

/// Waits for the training thread; for ever when there is none.
pub(super) async fn finished<T>(training: &mut Option<JoinHandle<anyhow::Result<T>>>) -> anyhow::Result<T> {
    match training {
        Some(training) => training.await.context("the training thread panicked")?,
        None => std::future::pending().await,
    }
}

impl<G: Ground> Trainer<G> {
    pub(super) fn new(ground: G, shared: Shared, learner: Box<dyn Learner>) -> Self {
        Self {
            ground,
            shared: Arc::new(shared),
            learner: Some(learner),
            training: None,
            begun: (0, WorkerId::NONE),
            models: HashMap::new(),
            update: None,
            trained: 0,
            brief: false,
            told: None,
        }
    }

    /// Deals with one thing that came; says whether it was the job's end.
    pub(super) fn take(&mut self, incoming: Incoming) -> anyhow::Result<bool> {
        match incoming {
            Incoming::Frame(kind, frame) => self.frame(kind, &frame)?,
            Incoming::Lost(worker) => {
                self.models.remove(&worker);
                self.forget_orphan();
            }
            Incoming::Undelivered(letter) => {
                self.ground.take_back(letter.to);
                self.forget_orphan();
            }
            Incoming::Asked => {}
            Incoming::Ended(reason) => {
                tracing::info!("the job has ended: {reason}");
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn frame(&mut self, kind: FrameKind, frame: &Frame) -> anyhow::Result<()> {
        match kind {
            FrameKind::Begin if frame.from == self.ground.coordinator() => {
                let parent =
                    u32::try_from(frame.value).context("the coordinator named an impossible parent")?;
                self.begin(frame.round, WorkerId(parent));
            }
            FrameKind::Model => self.model(frame),
            FrameKind::Release | FrameKind::Refuse => {
                let own = |update: &mut Frame| (update.key, update.to) == (frame.key, frame.from);
                if self.update.take_if(own).is_none() {
                    // Said twice, by a parent and its successor; or by who does not have it.
                    tracing::debug!(from = %frame.from, "a verdict on what that worker does not have");
                    return Ok(());
                }
                if kind == FrameKind::Refuse {
                    let refusal = Refusal::from_number(frame.refusal).unwrap_or(Refusal::BadKey);
                    tracing::warn!(round = frame.round, "our update was refused: {refusal}");
                }
                let arena = self.ground.arena();
                if let Err(error) = arena.release(frame.key, frame.from) {
                    tracing::debug!(from = %frame.from, "judged by who was lent nothing: {error}");
                }
                arena.free(frame.key);
            }
            other => tracing::debug!(kind = ?other, from = %frame.from, "not for a trainer"),
        }
        Ok(())
    }

    /// The coordinator announces a round; or the same again, when the parent has a successor, which is to hear what its
    /// predecessor may have heard.
    fn begin(&mut self, round: u32, parent: WorkerId) {
        if round < self.begun.0 {
            return tracing::warn!(round, "announced after a later round");
        }
        let again = round == self.begun.0;
        self.begun = (round, parent);
        match self.update {
            Some(update) if update.round == round => self.lend(update, parent),
            Some(_) => self.forget_orphan(),
            None if again && self.trained == round => self.post_nothing(parent, round),
            None => {}
        }
    }

    fn post_nothing(&mut self, to: WorkerId, round: u32) {
        let nothing = Frame {
            round,
            ..Frame::default()
        };
        self.ground.post(to, FrameKind::Nothing, nothing);
    }

    /// Nothing comes of a round that was begun.
    fn failed(&mut self, model: &Frame, error: &anyhow::Error) {
        let (round, parent) = self.begun;
        tracing::error!(round = model.round, "no update: {error:#}");
        let parent = if model.round == round { parent } else { model.from };
        self.post_nothing(parent, model.round);
        self.post_nothing(self.ground.coordinator(), model.round);
    }

    /// Lends the update to the round's parent, and to nobody else.
    fn lend(&mut self, update: Frame, parent: WorkerId) {
        let arena = self.ground.arena();
        // Whether or not its end is known here already, who had it before is gone.
        let _ = arena.release(update.key, update.to);
        if let Err(error) = arena.lend(update.key, parent) {
            return tracing::error!(key = %update.key, "cannot be lent: {error}");
        }
        self.update = Some(Frame { to: parent, ..update });
        self.ground.post(parent, FrameKind::Update, update);
    }

    /// An update of a round that is over, whose parent is gone: nobody will give it back any more.
    fn forget_orphan(&mut self) {
        let round = self.begun.0;
        if let Some(update) = self.update.filter(|update| update.round < round)
            && self.ground.arena().free(update.key)
        {
            tracing::warn!(
                round = update.round,
                "the round went on without the aggregator that had our update"
            );
            self.update = None;
        }
    }

    /// A model has come; from the parent that the coordinator named last, it says that its round begins.
    fn model(&mut self, frame: &Frame) {
        let (round, parent) = self.begun;
        if frame.round > round && frame.from == parent {
            self.begin(frame.round, parent);
        }
        match &mut self.training {
            Some(training) if training.round == frame.round => {
                if training.key != frame.key || frame.from != self.begun.1 {
                    // A new top's, with the same bytes: what we have will do. Or a stranger's.
                    return self.release(frame);
                }
                // The parent's successor: it is to get it back.
                training.from = frame.from;
            }
            _ if frame.round <= self.trained || frame.round < self.begun.0 => self.release(frame),
            _ => {
                let before = self.models.insert(frame.from, *frame);
                if let Some(before) = before.filter(|before| before.key != frame.key) {
                    self.release(&before);
                }
            }
        }
    }

    fn release(&mut self, model: &Frame) {
        let Frame { round, key, from, .. } = *model;
        let back = Frame {
            round,
            key,
            ..Frame::default()
        };
        self.ground.post(from, FrameKind::Release, back);
    }

    /// A lesson to learn, when the round is announced, its model is there, a slot is free and no training runs.
    pub(super) async fn start(&mut self) -> anyhow::Result<Option<Lesson>> {
        let (round, parent) = self.begun;
        let useless = |from: &WorkerId, model: &mut Frame| {
            model.round < round || (model.round == round && *from != parent)
        };
        let useless: Vec<(WorkerId, Frame)> = self.models.extract_if(useless).collect();
        for (_, model) in useless {
            tracing::debug!(from = %model.from, round = model.round, "a model of an old round or from a stranger");
            self.release(&model);
        }
        let Some(&model) = self.models.get(&parent).filter(|model| model.round == round) else {
            return Ok(None);
        };
        if self.training.is_some() {
            return Ok(None);
        }
        let Some(slot) = self.ground.arena().begin() else {
            return Ok(None);
        };
        let Some(learner) = self.learner.take() else {
            return Ok(None);
        };
        self.models.remove(&parent);
        let arena = match self.ground.peer(model.key.arena).await {
            Ok(Some(arena)) => arena,
            missing => {
                self.learner = Some(learner);
                self.release(&model);
                match missing {
                    Err(error) => {
                        self.trained = model.round;
                        self.failed(&model, &error.context("cannot read the model"));
                    }
                    // The top's that has just died; its successor's is on its way.
                    Ok(_) => tracing::warn!(key = %model.key, "the model's arena is gone"),
                }
                return Ok(None);
            }
        };
        self.training = Some(model);
        Ok(Some(Lesson {
            learner,
            slot,
            arena,
            model,
        }))
    }

    /// The model goes back, the update goes up.
    pub(super) fn deliver(&mut self, learned: Learned) -> anyhow::Result<()> {
        let Learned {
            learner,
            slot,
            trained,
            begun,
            took,
        } = learned;
        self.learner = Some(learner);
        self.brief = took <= BRIEF;
        let model = self.training.take().context("nothing was to be learnt")?;
        self.trained = model.round;
        self.release(&model);
        let trained = match trained {
            Ok(trained) => trained,
            Err(error) => {
                self.failed(&model, &error);
                return Ok(());
            }
        };
        let (round, samples, loss) = (model.round, trained.samples, trained.loss);
        if self
            .told
            .is_none_or(|told| begun.duration_since(told) >= TELL_EVERY)
        {
            self.told = Some(begun);
            tracing::info!(round, samples, loss, "trained");
        } else {
            tracing::debug!(round, samples, loss, "trained");
        }
        let key = self.ground.arena().publish(slot);
        let (round, parent) = self.begun;
        let update = Frame {
            round: model.round,
            key,
            length: image::image_bytes(&self.shared.schema) as u64,
            samples: trained.samples,
            value: trained.loss.unwrap_or(f64::NAN).to_bits(),
            covers: 1,
            ..Frame::default()
        };
        // Late, it goes to who handed the round's model down, to hear that it is.
        let parent = if model.round == round { parent } else { model.from };
        self.lend(update, parent);
        Ok(())
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

/// Learns a lesson. What goes wrong in that is part of the result.
pub(super) fn learn_one(shared: &Shared, lesson: Lesson) -> Learned {
    let Lesson {
        mut learner,
        mut slot,
        arena,
        model,
    } = lesson;
    let begun = Instant::now();
    let mut learn = || -> anyhow::Result<Trained> {
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
            cover: shared.cover.clone(),
            loss: trained.loss,
            folded: 0,
            bytes_copied: trained.bytes_copied,
            made: vec![monotonic_ns()],
        };
        image::write_header(slot.bytes_mut(), schema, &metadata);
        Ok(trained)
    };
    let trained = learn();
    Learned {
        learner,
        slot,
        trained,
        begun,
        took: begun.elapsed(),
    }
}
