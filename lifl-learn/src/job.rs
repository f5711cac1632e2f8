//! What a job's processes learn with and judge by.

use std::collections::BTreeMap;

use anyhow::Context;
use lifl_common::config::{Dataset, JobSpec, Kind, WorkerSpec};

use super::{Evaluator, Learner, build, synthetic, threads};
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
    threads::start(&job.model)?;
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
    evaluator_of(job, &data::open(source, job.seed)?)
}

fn evaluator_of(job: &JobSpec, source: &data::Source) -> anyhow::Result<Option<Evaluator>> {
    threads::start(&job.model)?;
    let test = source.test();
    if test.is_empty() {
        return Ok(None);
    }
    Ok(Some(
        Evaluator::new(job, test).context("the model cannot be judged")?,
    ))
}

/// What the coordinator knows by itself, whatever the workers say.
pub struct Known {
    /// What judges the job's models; `None` without data to judge by.
    pub evaluator: Option<Evaluator>,
    /// The training samples of each worker, by its index in the job; 0 of an aggregator.
    pub samples: Vec<u64>,
}

/// Looks at the job's data for what the workers' words are held against.
///
/// # Errors
/// If the data cannot be had.
pub fn known(job: &JobSpec) -> anyhow::Result<Known> {
    let mut samples = vec![0; job.workers.len()];
    let Some(data) = &job.data else {
        for (samples, worker) in samples.iter_mut().zip(&job.workers) {
            *samples = worker.share.map_or(0, synthetic::samples);
        }
        return Ok(Known {
            evaluator: None,
            samples,
        });
    };
    // As [`JobSpec::part_of`] has it.
    let mut sharing: BTreeMap<Option<&str>, Vec<(u32, usize)>> = BTreeMap::new();
    for (index, worker) in job.workers.iter().enumerate() {
        if worker.kind == Kind::Trainer {
            let share = worker.share.context("a trainer without a number")?;
            let trainers = sharing
                .entry(worker.dataset.as_ref().map(Dataset::as_str))
                .or_default();
            trainers.push((share, index));
        }
    }
    let source = data::open(data, job.seed)?;
    for (dataset, mut trainers) in sharing {
        let other;
        let source = match dataset {
            Some(dataset) if dataset != data.dataset.as_str() => {
                let (_, first) = trainers[0];
                let data = job
                    .data_of(&job.workers[first])
                    .context("a network without data")?;
                other = data::open(&data, job.seed)?;
                &other
            }
            _ => &source,
        };
        trainers.sort_unstable();
        let lens = source.share_lens(trainers.len() as u32)?;
        for (&(_, index), len) in trainers.iter().zip(lens) {
            samples[index] = len;
        }
    }
    Ok(Known {
        evaluator: evaluator_of(job, &source)?,
        samples,
    })
}
