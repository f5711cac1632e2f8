//! What a worker is told of its job: its own part of it. The job itself names all workers, and a thousand of them would each
//! read a thousand.
//!
//! It lies in the run's folder, under the worker's name.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use lifl_common::config::{JobSpec, WorkerSpec};
use lifl_worker::slots;
use serde::{Deserialize, Serialize};

use crate::dir::Dir;

/// The folder of the tasks in a run's.
const FOLDER: &str = "workers";

/// The most that a task can have.
const TASK_BYTES: u64 = 16 << 20;

/// One worker's part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// The job without its workers.
    pub job: JobSpec,
    /// The worker.
    pub worker: WorkerSpec,
    /// [Slots](slots::slots) of its arena.
    pub slots: u32,
    /// How many old models a child of it may [hold](slots::most_held).
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
            goals: job.has_goals(),
            levels: job.levels(),
        }
    }

    /// That worker's.
    pub fn task(&self, worker: &WorkerSpec) -> Task {
        Task {
            job: self.without_workers.clone(),
            worker: worker.clone(),
            slots: slots::slots(worker, self.goals),
            most_held: slots::most_held(worker, self.goals, self.levels),
            part: self.job.part_of(worker),
        }
    }

    /// Writes all of them into the folder of a run at a path that whoever calls has made.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write(&self, run: &Path) -> anyhow::Result<()> {
        let folder = Dir::at(run).with_context(|| format!("cannot open {}", run.display()))?;
        self.write_into(&folder)
    }

    /// Writes all of them into a run's folder.
    ///
    /// # Errors
    /// If one cannot be written.
    pub fn write_into(&self, run: &Dir) -> anyhow::Result<()> {
        let folder = run.make_folder(FOLDER);
        let folder = folder.with_context(|| format!("cannot make {}/{FOLDER}", run.path().display()))?;
        for worker in &self.job.workers {
            let name = file_name(&worker.name);
            let text = serde_json::to_vec(&self.task(worker))?;
            // What the run wrote that goes on now.
            let _ = folder.remove(&name);
            let written = folder
                .create_new(&name)
                .and_then(|mut file| file.write_all(&text));
            written.with_context(|| format!("cannot write {}/{name}", folder.path().display()))?;
        }
        Ok(())
    }
}

impl Task {
    /// Reads a worker's out of the folder of its run.
    ///
    /// # Errors
    /// If it is not there, or not as it was written.
    pub fn read(run: &Dir, worker: &str) -> anyhow::Result<Self> {
        let name = file_name(worker);
        let path = run.path().join(FOLDER).join(&name);
        let text = run
            .folder(FOLDER)
            .and_then(|folder| folder.read(&name, TASK_BYTES));
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is not a worker's task as `lifl run` writes it",
                path.display()
            )
        })
    }
}

fn file_name(worker: &str) -> String {
    format!("{worker}.json")
}
