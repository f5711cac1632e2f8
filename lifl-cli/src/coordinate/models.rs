//! The rounds' models, as the top lends them: mapped, checked, evaluated and written out, each beside the round after it.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use lifl_common::arena::PeerArena;
use lifl_common::client::Client;
use lifl_common::control::JobTraffic;
use lifl_common::frame::Frame;
use lifl_common::id::ArenaId;
use lifl_common::update::{Metadata, Schema, Tensors, image};
use lifl_learn::{Evaluation, Evaluator};
use lifl_worker::coordinator::{Input, LentModel};
use tokio::task::{JoinHandle, spawn_blocking};

use super::Run;
use super::folder::RunFolder;
use super::report::{Event, Level, LevelTime};

/// A frame that lends an object, and the arena that it lies in.
type Lent = (Frame, Arc<PeerArena>);

/// A round's new model, as the top lent it. It lies in the top's arena as it is until the next round is decided, whether the
/// top lives or not.
struct Model {
    model: Lent,
    /// What the optimizer remembers with it.
    state: Option<Lent>,
    metadata: Metadata,
    /// Where its tensors' data lies: the header was checked once.
    data: Range<usize>,
    /// The round's event, but for what evaluation tells.
    event: Option<Event>,
}

/// What became of a model.
enum Examined {
    Evaluated(Option<Evaluation>, Option<Evaluator>),
    /// It has been written out, where it was time; or why its checkpoint could not be.
    Written(Option<String>),
}

pub(super) struct Models {
    schema: Schema,
    folder: RunFolder,
    rounds: u32,
    checkpoint_every: u32,
    keep_checkpoints: Option<NonZeroU32>,
    evaluator: Option<Evaluator>,
    /// Of the tops, the dead ones' too: what they made last is still wanted.
    arenas: HashMap<ArenaId, Arc<PeerArena>>,
    checked: Option<Model>,
    decided: Option<Arc<Model>>,
    /// The one that is being evaluated or written out.
    examined: Option<Arc<Model>>,
    task: Option<JoinHandle<anyhow::Result<Examined>>>,
    evaluation: Option<Evaluation>,
}

impl Models {
    pub(super) fn new(run: &Run<'_>, evaluator: Option<Evaluator>) -> Self {
        Self {
            schema: run.schema.clone(),
            folder: run.folder.clone(),
            rounds: run.job.rounds,
            checkpoint_every: run.checkpoint_every,
            keep_checkpoints: run.keep_checkpoints,
            evaluator,
            arenas: HashMap::new(),
            checked: None,
            decided: None,
            examined: None,
            task: None,
            evaluation: None,
        }
    }

    /// An arena of the top, mapped at the first use.
    pub(super) async fn arena(&mut self, client: &mut Client, id: ArenaId) -> anyhow::Result<Arc<PeerArena>> {
        if let Some(arena) = self.arenas.get(&id) {
            return Ok(Arc::clone(arena));
        }
        let arena = Arc::new(client.open_arena(id).await?);
        self.arenas.insert(id, Arc::clone(&arena));
        Ok(arena)
    }

    async fn lent(&mut self, client: &mut Client, frame: Frame) -> anyhow::Result<Lent> {
        let arena = self.arena(client, frame.key.arena).await?;
        arena.object(frame.key, frame.length)?;
        Ok((frame, arena))
    }

    /// Checks that a model is an image of the job's schema. Gives what it says of itself.
    pub(super) async fn check(&mut self, client: &mut Client, lent: &LentModel) -> anyhow::Result<Metadata> {
        let model = self.lent(client, lent.model).await?;
        let state = match lent.state {
            Some(state) => Some(self.lent(client, state).await?),
            None => None,
        };
        let checked = image::check(object(&model)?, &self.schema);
        let (metadata, data) = checked.context("it is not the job's")?;
        self.checked = Some(Model {
            model,
            state,
            metadata: metadata.clone(),
            data,
            event: None,
        });
        Ok(metadata)
    }

    /// The model that was checked last is its round's.
    pub(super) fn decided(
        &mut self,
        changed: bool,
        left_out: Vec<String>,
        seconds: f64,
        begun_ns: u64,
        moved: &JobTraffic,
        levels: Vec<Level>,
    ) {
        let Some(mut model) = self.checked.take() else {
            return;
        };
        let metadata = match changed {
            true => model.metadata.clone(),
            false => Metadata::default(),
        };
        // When each level was done, from the trainers up, if the model tells of all of them.
        let whole = metadata.info.made.len() == levels.len();
        let times = levels.into_iter().rev().zip(&metadata.info.made);
        let times = times.map(|(level, &made)| LevelTime {
            role: level.role,
            seconds: made.saturating_sub(begun_ns) as f64 / 1e9,
        });
        model.event = Some(Event::Round {
            round: model.model.0.round,
            seconds,
            loss: None,
            accuracy: None,
            train_loss: metadata.info.loss,
            trainers: metadata.info.cover.count(),
            left_out,
            samples: metadata.info.samples,
            updates_folded: metadata.info.folded,
            bytes_referenced: moved.bytes_referenced,
            bytes_copied: metadata.info.bytes_copied,
            bytes_received: moved.gateway.bytes_received,
            bytes_sent: moved.gateway.bytes_sent,
            levels: times.filter(|_| whole).collect(),
        });
        self.decided = Some(Arc::new(model));
    }

    /// Begins to evaluate the model that was decided last, beside the rounds.
    pub(super) fn evaluate(&mut self) {
        let Some(model) = self.decided.clone() else { return };
        self.examined = Some(Arc::clone(&model));
        let (schema, evaluator) = (self.schema.clone(), self.evaluator.take());
        self.task = Some(spawn_blocking(move || {
            let data = &object(&model.model)?[model.data.clone()];
            let tensors = Tensors::new(&schema, data);
            let evaluation = evaluator.as_ref().map(|evaluator| evaluator.evaluate(tensors));
            Ok(Examined::Evaluated(evaluation.transpose()?, evaluator))
        }));
    }

    /// Begins to write it out, if it is time and it is of use.
    pub(super) fn write(&mut self, round: u32, useful: bool) {
        let Some(model) = self.examined.clone() else {
            return;
        };
        let (every, keep) = (self.checkpoint_every, self.keep_checkpoints);
        let last = useful && round == self.rounds;
        let checkpoint = useful && every > 0 && (round.is_multiple_of(every) || last);
        let folder = self.folder.clone();
        self.task = Some(spawn_blocking(move || {
            let mut failed = None;
            if checkpoint {
                match model.write_checkpoint(&folder)? {
                    Ok(()) => keep.into_iter().for_each(|keep| folder.prune(round, keep)),
                    // The job can do without: the next one may have room.
                    Err(error) => failed = Some(format!("{error:#}")),
                }
            }
            if last {
                folder.last_model(round, object(&model.model)?, checkpoint && failed.is_none())?;
            }
            Ok(Examined::Written(failed))
        }));
    }

    /// Waits until the model has been evaluated or written out; for ever when there is none. Cancel-safe.
    ///
    /// # Errors
    /// If it is no model any more, cannot be evaluated, or the last one cannot be written.
    pub(super) async fn examined(&mut self) -> anyhow::Result<Input> {
        let Some(task) = &mut self.task else {
            return std::future::pending().await;
        };
        let examined = task.await.context("the new model could not be examined");
        self.task = None;
        Ok(match examined?? {
            Examined::Evaluated(evaluation, evaluator) => {
                (self.evaluation, self.evaluator) = (evaluation, evaluator);
                let loss = evaluation.map(|evaluation| evaluation.loss);
                Input::Evaluated { loss }
            }
            Examined::Written(error) => {
                self.examined = None;
                Input::Written { error }
            }
        })
    }

    /// The event of the round whose model has been evaluated, and whether that model is another than the one before.
    pub(super) fn round_event(&self) -> Option<(Event, bool)> {
        let mut told = self.examined.as_ref()?.event.clone()?;
        let Event::Round {
            loss,
            accuracy,
            trainers,
            ..
        } = &mut told
        else {
            return None;
        };
        *loss = self.evaluation.map(|evaluation| evaluation.loss);
        *accuracy = self.evaluation.map(|evaluation| evaluation.accuracy);
        let changed = *trainers > 0;
        Some((told, changed))
    }

    /// How good the last model is that was evaluated.
    pub(super) fn evaluation(&self) -> Option<Evaluation> {
        self.evaluation
    }

    /// Writes the model that was decided last out for the top's successor, which begins with it. Gives its round.
    pub(super) async fn restore_point(&mut self) -> anyhow::Result<Option<u32>> {
        let Some(model) = self.decided.clone() else {
            return Ok(None);
        };
        let (folder, round) = (self.folder.clone(), model.model.0.round);
        let written = spawn_blocking(move || model.write_checkpoint(&folder)?);
        let written = written.await.context("the top's successor has no model")?;
        written.context("the top's successor has no model")?;
        // What the dead top had is read no more.
        self.arenas.clear();
        Ok(Some(round))
    }
}

impl Model {
    /// Writes a checkpoint.
    ///
    /// # Errors
    /// If the objects cannot be read; within, if the checkpoint cannot be written.
    fn write_checkpoint(&self, folder: &RunFolder) -> anyhow::Result<anyhow::Result<()>> {
        let state = self.state.as_ref().map(object).transpose()?;
        let written = folder.checkpoint(self.model.0.round, object(&self.model)?, state);
        Ok(written.map(|_| ()))
    }
}

/// The bytes of a lent object.
fn object((frame, arena): &Lent) -> Result<&[u8], lifl_common::arena::ArenaError> {
    arena.object(frame.key, frame.length)
}
