//! What a job's processes learn with and judge by.

use anyhow::Context;
use lifl_common::config::{JobSpec, WorkerSpec};

use super::{Evaluator, Learner, build};
use crate::data;

/// The learner of a trainer, with its [part](JobSpec::part_of) of its data.
///
/// # Errors
/// If the data or the model cannot be had.
pub fn for_trainer(
    job: &JobSpec,
    trainer: &WorkerSpec,
    (part, parts): (u32, u32),
) -> anyhow::Result<Box<dyn Learner>> {
    let share = trainer.share.context("a trainer without a number")?;
    let samples = match job.data_of(trainer) {
        Some(source) => Some(data::open(&source, job.seed)?.train_share(part, parts)?),
        None => None,
    };
    build(job, &job.training, samples, share, job.seed).context("the model cannot be trained")
}

/// What judges the job's models; `None` without data to judge by.
///
/// # Errors
/// If the data cannot be had.
pub fn evaluator(job: &JobSpec) -> anyhow::Result<Option<Evaluator>> {
    let Some(source) = &job.data else { return Ok(None) };
    let test = data::open(source, job.seed)?.test();
    if test.is_empty() {
        return Ok(None);
    }
    Ok(Some(
        Evaluator::new(job, test).context("the model cannot be judged")?,
    ))
}
