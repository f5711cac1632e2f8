//! The trainer beyond the node's shared memory: as [`trainer`](super::trainer), but its model comes over the wire into
//! its own memory, and its update goes from there.
//!
//! ```text
//!          model offered, its buffer free        the update's buffer free
//!   idle ─────────────────────────────▶ coming ──────────────────────────▶ training ──▶ update offered ──▶ idle
//!                                                    (free again with the verdict on what was in it)
//! ```

use std::sync::Arc;

use anyhow::{Context, bail};
use lifl_common::session::{Buffer, Object, Room, Source, UpdateHeader};
use lifl_common::update::{Cover, Schema};
use tokio::task::JoinHandle;

use super::trainer::{Shared, finished, learn_round};
use super::uplink::{FromAbove, Uplink};
use crate::task::Task;
use lifl_aggregate::Threads;
use lifl_learn::{Learner, Trained};

/// What comes back from the training thread.
struct Learned {
    learner: Box<dyn Learner>,
    model: Buffer,
    update: Buffer,
    round: u32,
    /// What was trained, or why nothing was.
    trained: anyhow::Result<Trained>,
}

struct RemoteTrainer {
    up: Uplink,
    shared: Arc<Shared>,
    /// `None` while it is with the training thread.
    learner: Option<Box<dyn Learner>>,
    training: Option<JoinHandle<anyhow::Result<Learned>>>,
    /// Where a model can come, where an update can be made.
    free_model: Option<Buffer>,
    free_update: Option<Buffer>,
    model: Option<(Object, Buffer)>,
    /// The update that there is no verdict on yet.
    sent: Option<(u32, Arc<Buffer>)>,
}

/// Plays the role until the job ends.
pub(super) async fn play(up: Uplink, task: Task, schema: Schema) -> anyhow::Result<()> {
    let share = task
        .worker
        .share
        .context("a trainer without a share of the data")?;
    let (name, updates) = (task.worker.name.clone(), task.job.updates);
    let learner =
        tokio::task::spawn_blocking(move || lifl_learn::for_trainer(&task.job, &task.worker, task.part));
    let learner = learner.await.context("the learner could not be made")??;
    let bytes = schema.data_bytes();
    let shared = Shared {
        name,
        cover: Cover::of(share),
        updates,
        schema,
        threads: Threads::new(1)?,
    };
    let mut trainer = RemoteTrainer {
        up,
        shared: Arc::new(shared),
        learner: Some(learner),
        training: None,
        free_model: Some(Buffer::new(bytes)),
        free_update: Some(Buffer::new(bytes)),
        model: None,
        sent: None,
    };
    trainer.up.ready();
    loop {
        tokio::select! {
            learned = finished(&mut trainer.training) => {
                trainer.training = None;
                trainer.deliver(learned?);
            }
            above = trainer.up.next() => if trainer.above(above?)? {
                return Ok(());
            },
        }
        trainer.advance();
    }
}

impl RemoteTrainer {
    /// Deals with what came; says whether it was the job's end.
    fn above(&mut self, above: FromAbove) -> anyhow::Result<bool> {
        match above {
            FromAbove::Offered => {
                let offered = self.up.offered().map(|object| (object.length, object.schema));
                let schema = &self.shared.schema;
                if offered != Some((schema.data_bytes() as u64, schema.digest())) {
                    bail!("the model that is offered is not the job's");
                }
                // A model of an earlier round that nobody trains on any more makes room.
                if let Some((_, buffer)) = self.model.take() {
                    self.free_model = Some(buffer);
                }
            }
            FromAbove::Model(object, Room::Private(buffer)) => self.model = Some((object, buffer)),
            FromAbove::Model(..) => bail!("a model came into a slot that was not given"),
            FromAbove::Verdict(round, refusal) => {
                let Some((_, update)) = self.sent.take_if(|(sent, _)| *sent == round) else {
                    return Ok(false);
                };
                if let Some(refusal) = refusal {
                    tracing::warn!(round, "our update was refused: {refusal}");
                }
                self.free_update = Arc::into_inner(update);
                if self.free_update.is_none() {
                    bail!("an update that was judged is still being sent");
                }
            }
            FromAbove::Ended(reason) => {
                tracing::info!("the job has ended: {reason}");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whatever can go on goes on.
    fn advance(&mut self) {
        if self.up.offered().is_some()
            && let Some(buffer) = self.free_model.take()
        {
            self.up.accept(Room::Private(buffer));
        }
        let ready = self.model.is_some() && self.learner.is_some() && self.free_update.is_some();
        if !ready {
            return;
        }
        if let (Some((object, model)), Some(mut learner), Some(mut update)) =
            (self.model.take(), self.learner.take(), self.free_update.take())
        {
            let shared = Arc::clone(&self.shared);
            self.training = Some(tokio::task::spawn_blocking(move || {
                let round = object.round;
                let trained = learn_round(&shared, &mut *learner, round, model.bytes(), update.bytes_mut());
                Ok(Learned {
                    learner,
                    model,
                    update,
                    round,
                    trained,
                })
            }));
        }
    }

    /// The update goes up.
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
        let trained = match trained {
            Ok(trained) => trained,
            Err(error) => {
                tracing::error!(round, "no update: {error:#}");
                self.free_update = Some(update);
                self.up.nothing(round);
                return;
            }
        };
        tracing::info!(round, samples = trained.samples, loss = trained.loss, "trained");
        let schema = &self.shared.schema;
        let header = UpdateHeader {
            object: Object {
                round,
                length: schema.data_bytes() as u64,
                schema: schema.digest(),
            },
            samples: trained.samples,
            cover: self.shared.cover.clone(),
            loss: trained.loss.unwrap_or(f64::NAN),
            folded: 0,
            bytes_copied: trained.bytes_copied,
        };
        let update = Arc::new(update);
        self.up.update(header, Source::Private(Arc::clone(&update)));
        self.sent = Some((round, update));
    }
}
