//! What a run takes of the system beside memory in all: processes, threads, descriptors, and what one process may have.
//!
//! Refused before anything starts, with the limit and who sets it: later a thread that cannot be had is a worker's death. How
//! many threads each process has is decided here and where it is started, in the same words.

use anyhow::anyhow;
use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::limits::{self, Limit};
use lifl_common::runtime::Threads;
use lifl_common::update::Schema;
use serde::Serialize;

use crate::coordinate::report::human_bytes;
use crate::exit::{Cause, Failure, Outcome};
use crate::memory::{self, Plan};

/// The coordinator's threads, an own daemon's among them.
pub const COORDINATOR: Threads = Threads {
    workers: 2,
    blocking: 1,
    most_blocking: 64,
    spare: 0,
};

/// Threads that come and go, an own daemon's four for this user among them, and the two that write what is said: a limit is to
/// leave room for them.
const SPARE_TASKS: u64 = 7;

/// Descriptors of a coordinator with a daemon inside, before it has workers: 35 were measured, and some are inherited, or are
/// closed a little later.
const OWN_DESCRIPTORS: u64 = 56;

/// The same for each registered worker, proxies among them: its process, and the daemon's ends of its connection, its socket
/// and its arena. Measured: 3.
const WORKER_DESCRIPTORS: u64 = 3;

/// What a process maps beside its memory: the program, libraries, the main thread's stack.
const PROGRAM_BYTES: u64 = 40 << 20;

/// What a thread maps: its stack, and what its allocator takes at a time.
const THREAD_BYTES: u64 = 3 << 20;

/// What a run takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Requirements {
    /// Processes beside this one.
    pub processes: u64,
    /// Processes and threads beside those that there are.
    pub tasks: u64,
    /// Open files of this process, an own daemon's among them.
    pub descriptors: u64,
    /// Bytes that the largest process maps.
    pub mapped_bytes: u64,
    /// Bytes that the largest process has of private memory and stacks.
    pub data_bytes: u64,
}

impl Requirements {
    /// Of that job.
    pub fn of(job: &JobSpec, schema: &Schema) -> Self {
        let cpus = limits::cpus();
        let threads = |worker: &WorkerSpec| 1 + blocking(worker) + computing(job, schema, worker, cpus);
        let judging = if job.data.is_some() {
            lifl_learn::threads::made(&job.model, lifl_learn::threads::allowed())
        } else {
            0
        };
        let coordinator = COORDINATOR.count() + judging;
        let of_workers: usize = job.workers.iter().map(threads).sum();
        let workers = job.workers.len() as u64;

        // Ordinary pages are the smaller arenas; every process maps its own, the model and, an aggregator, its children's.
        let plan = Plan::new(job, schema, false);
        let arena = |share: &memory::Share| share.arena_bytes.saturating_add(share.state_bytes);
        let largest = plan.workers.iter().map(arena).max().unwrap_or(0);
        let all = plan.workers.iter().map(arena).fold(0, u64::saturating_add);
        let children = u64::from(job.children_by_group().into_values().max().unwrap_or(0));
        let mapped = largest.saturating_mul(children.saturating_add(2)).min(all);
        let private = plan
            .workers
            .iter()
            .map(|share| share.private_bytes)
            .max()
            .unwrap_or(0);
        let most_threads = job
            .workers
            .iter()
            .map(threads)
            .max()
            .unwrap_or(0)
            .max(coordinator + 1) as u64;
        let data_bytes = private.saturating_add(most_threads * THREAD_BYTES);
        Self {
            processes: workers,
            tasks: (coordinator + of_workers) as u64 + SPARE_TASKS,
            descriptors: own_descriptors(job.registrations()),
            mapped_bytes: data_bytes.saturating_add(mapped).saturating_add(PROGRAM_BYTES),
            data_bytes,
        }
    }

    /// Refuses what a limit does not leave, before any process or thread is started.
    ///
    /// # Errors
    /// With the numbers, who sets the limit, and how to raise it.
    pub fn check(&self) -> Outcome {
        if let Some(limit) = limits::tasks().filter(|limit| limit.left() < self.tasks) {
            let needed = format!(
                "the job needs {} processes and threads more, {} of them processes",
                self.tasks, self.processes
            );
            return refuse(&needed, &limit, &|number| number.to_string());
        }
        for (need, limit, what) in [
            (self.mapped_bytes, limits::address_space(), "of address space"),
            (self.data_bytes, limits::data(), "of private memory and stacks"),
        ] {
            if let Some(limit) = limit.filter(|limit| limit.allowed < need) {
                let needed = format!("a process of the job needs up to {} {what}", human_bytes(need));
                return refuse(&needed, &limit, &human_bytes);
            }
        }
        // Of a daemon elsewhere the processes, and little more.
        check_descriptors(self.processes + OWN_DESCRIPTORS / 2)
    }
}

/// Refuses a job that needs more descriptors than this process may have open.
///
/// # Errors
/// With the numbers, who sets the limit, and how to raise it.
pub fn check_descriptors(need: u64) -> Outcome {
    match limits::descriptors() {
        Some(limit) if limit.allowed < need => {
            refuse(&format!("the job needs {need} descriptors"), &limit, &|number| {
                number.to_string()
            })
        }
        _ => Ok(()),
    }
}

/// Descriptors of a process with a daemon inside that has so many registered workers, the coordinator and proxies among them.
pub fn own_descriptors(registrations: u32) -> u64 {
    OWN_DESCRIPTORS + WORKER_DESCRIPTORS * u64::from(registrations)
}

/// Refuses a job whose memory its control group does not allow. Huge pages are not among that memory.
///
/// # Errors
/// With the numbers, who sets the limit, and how to raise it.
pub fn check_memory(plan: &Plan) -> Outcome {
    let need = plan.private_bytes.saturating_add(plan.ordinary_bytes());
    match limits::Cgroups::current().memory() {
        Some(limit) if limit.left() < need => {
            let needed = format!(
                "the job needs up to {} of memory, {} of them in arenas",
                human_bytes(need),
                human_bytes(plan.ordinary_bytes())
            );
            refuse(&needed, &limit, &human_bytes)
        }
        _ => Ok(()),
    }
}

fn refuse(needed: &str, limit: &Limit, number: &dyn Fn(u64) -> String) -> Outcome {
    let error = anyhow!(
        "{needed}; {} allows {}, {} in use: {}, or use fewer workers or a smaller model (`lifl plan` shows both)",
        limit.by,
        number(limit.allowed),
        number(limit.used),
        limit.remedy
    );
    Err(Failure::new(Cause::Machine, error))
}

/// Threads of a worker for work that blocks: a trainer's training, and looking up names where the parent is elsewhere.
pub fn blocking(worker: &WorkerSpec) -> usize {
    usize::from(worker.kind == Kind::Trainer) + usize::from(worker.is_remote())
}

/// Threads of a worker that compute.
fn computing(job: &JobSpec, schema: &Schema, worker: &WorkerSpec, cpus: usize) -> usize {
    match worker.kind {
        Kind::Trainer => lifl_learn::threads::made(&job.model, trainer_threads(job, cpus)),
        Kind::Aggregator | Kind::Top => {
            let folding = match lifl_aggregate::Threads::useful(cpus, schema.elements()) {
                1 => 0,
                threads => threads,
            };
            // The top makes the first model, if none is given.
            let first = worker.kind == Kind::Top && job.base_model.is_none();
            let makes = first && lifl_learn::threads::made(&job.model, 1) > 0;
            folding + if makes { cpus } else { 0 }
        }
    }
}

/// Threads that each trainer computes on. Trainers work all at once: between them they get each core about once.
pub fn trainer_threads(job: &JobSpec, cpus: usize) -> usize {
    (cpus / job.trainers().count().max(1)).max(1)
}
