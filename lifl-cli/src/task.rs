//! What a worker is told of its job: its own part of it. The job itself names all workers, and a thousand of them would each
//! read a thousand.
//!
//! It lies in the run's folder, under the worker's name.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use lifl_common::config::{JobSpec, WorkerSpec};
use serde::{Deserialize, Serialize};

use crate::memory;

/// One worker's part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// The job without its workers.
    pub job: JobSpec,
    /// The worker.
    pub worker: WorkerSpec,
    /// [Slots](memory::slots) of its arena.
    pub slots: u32,
    /// How many old models a child of it may [hold](memory::most_held).
    pub most_held: Option<u32>,
    /// Which [part](JobSpec::part_of) of its data a trainer's is, and of how many.
    pub part: (u32, u32),
}

/// The tasks of a job.
#[derive(Debug)]
pub struct Tasks<'j> {
    job: &'j JobSpec,
    without_workers: JobSpec,
    goals: bool,
    levels: u32,
}

impl<'j> Tasks<'j> {
    /// Of that job.
    pub fn of(job: &'j JobSpec) -> Self {
        Self {
            job,
            without_workers: JobSpec {
                workers: Vec::new(),
                ..job.clone()
            },
            goals: memory::has_goals(job),
            levels: job.levels(),
        }
    }

    /// That worker's.
    pub fn task(&self, worker: &WorkerSpec) -> Task {
        Task {
            job: self.without_workers.clone(),
            worker: worker.clone(),
            slots: memory::slots(worker, self.goals),
            most_held: memory::most_held(worker, self.goals, self.levels),
            part: self.job.part_of(worker),
        }
    }

    /// Writes all of them into a run's folder.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(&self, run: &Path) -> anyhow::Result<()> {
        let folder = folder(run);
        let made = fs::create_dir_all(&folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
        for worker in &self.job.workers {
            let path = path(run, &worker.name);
            let text = serde_json::to_vec(&self.task(worker))?;
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

impl Task {
    /// Reads a worker's out of the folder of its run.
    ///
    /// # Errors
    /// If it is not there, or not as it was written.
    pub fn read(run: &Path, worker: &str) -> anyhow::Result<Self> {
        let path = path(run, worker);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is not a worker's task as `lifl run` writes it",
                path.display()
            )
        })
    }
}

fn folder(run: &Path) -> PathBuf {
    run.join("workers")
}

fn path(run: &Path, worker: &str) -> PathBuf {
    folder(run).join(format!("{worker}.json"))
}
