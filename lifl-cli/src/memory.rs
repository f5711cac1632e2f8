//! What a job takes of the machine's memory: the layout of every arena, and the sum that `lifl plan` shows.

use std::collections::HashMap;

use lifl_common::arena::{Layout, memfd};
use lifl_common::config::{Dataset, Group, JobSpec, Kind, ModelSpec, SampleShape, WorkerSpec};
use lifl_common::session::proxy_name;
use lifl_common::update::{Schema, image};
use lifl_worker::slots::{STATE_SLOTS, slots};
use serde::Serialize;

/// Private memory of a worker beside what it learns and keeps: runtime, stacks, the job. Measured: 0.8 MiB.
const WORKER_BYTES: u64 = 2 << 20;

/// The same of the coordinator, with a daemon inside. Measured: 19 MiB while it loads the kernel's programs, 2 MiB on the relay.
const COORDINATOR_BYTES: u64 = 24 << 20;

/// What learning takes beside model, data and activations. Measured on two threads: under 1 MiB for each of the networks.
const LEARNER_BYTES: u64 = 8 << 20;

/// Activations and gradients of one sample of the CNN, the largest network. Measured: 0.31 MiB, in batches of 32 and of 512 (a
/// trainer's peak is 13 and 158 MiB, with the MLP 5 and 9, with softmax 3 and 6).
const SAMPLE_BYTES: u64 = 1 << 19;

/// Samples that the coordinator judges at once.
const EVALUATION_BATCH: u64 = 128;

/// Copies of the model that a learner makes: parameters, gradients, and a step's temporaries.
const LEARNER_MODELS: u64 = 4;

/// Slots of the arena of a worker's proxy in the gateway.
const PROXY_SLOTS: u32 = 1;

/// Aggregators' private memory by their group, while all workers are there. Up to two children are folded at once, under
/// eager timing too: nothing is kept beside the slot then.
fn kept_bytes<'a>(job: &'a JobSpec, schema: &Schema) -> HashMap<&'a Group, u64> {
    let all = lifl_aggregate::scratch_bytes(schema, job.timing) as u64;
    let children = job.children_by_group().into_iter();
    children
        .map(|(group, most)| (group, if most > 2 { all } else { 0 }))
        .collect()
}

/// Bytes of a model, an update or an aggregate in its slot.
pub fn object_bytes(schema: &Schema) -> u64 {
    image::image_bytes(schema) as u64
}

/// The layout of the second arena of a worker, for the optimizer's state; `None` for who has none.
pub fn state_layout(job: &JobSpec, worker: &WorkerSpec, schema: &Schema) -> Option<Layout> {
    if worker.kind != Kind::Top {
        return None;
    }
    let state = lifl_aggregate::state_schema(schema, &job.optimizer)?;
    Layout::for_objects(STATE_SLOTS, object_bytes(&state))
}

/// What one worker takes.
#[derive(Clone, Debug, Serialize)]
pub struct Share {
    /// The worker.
    pub name: String,
    /// Its arena's slots.
    pub slots: u32,
    /// Its arena's bytes, whole pages.
    pub arena_bytes: u64,
    /// The bytes of its second arena, for the optimizer's state; 0 for who has none.
    pub state_bytes: u64,
    /// At most that much private memory.
    pub private_bytes: u64,
}

/// What a job takes.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Elements of the model.
    pub parameters: u64,
    /// Bytes of a model or an update in its slot.
    pub object_bytes: u64,
    /// Bytes of the largest pages that were reckoned with.
    pub page_bytes: u64,
    /// The workers.
    pub workers: Vec<Share>,
    /// All arenas.
    pub pool_bytes: u64,
    /// All private memory, the coordinator's included, at most.
    pub private_bytes: u64,
    /// Both.
    pub total_bytes: u64,
}

impl Plan {
    /// Bytes of arenas that are on ordinary pages: those that control groups count as memory.
    pub fn ordinary_bytes(&self) -> u64 {
        if self.page_bytes != memfd::HUGE_PAGE_BYTES {
            return self.pool_bytes;
        }
        let arenas = self
            .workers
            .iter()
            .flat_map(|share| [share.arena_bytes, share.state_bytes]);
        arenas
            .filter(|&bytes| bytes < Layout::LARGE_BYTES)
            .fold(0, u64::saturating_add)
    }

    /// Adds up what the job takes on huge or ordinary pages. Sums that overflow stand as `u64::MAX`.
    pub fn new(job: &JobSpec, schema: &Schema, huge_pages: bool) -> Self {
        let object_bytes = object_bytes(schema);
        let datasets: HashMap<Dataset, u32> = job
            .datasets()
            .into_iter()
            .map(|(data, trainers)| (data.dataset, trainers))
            .collect();
        let bytes = |layout: Layout| layout.memfd_bytes(huge_pages && layout.suits_huge_pages());
        let share = |name, slots, state: Option<Layout>, private_bytes| {
            let layout = Layout::for_objects(slots, object_bytes);
            let arena_bytes = layout.and_then(bytes);
            let arena_bytes = if slots == 0 {
                0
            } else {
                arena_bytes.unwrap_or(u64::MAX)
            };
            let state_bytes = state.map(|layout| bytes(layout).unwrap_or(u64::MAX));
            Share {
                name,
                slots,
                arena_bytes,
                state_bytes: state_bytes.unwrap_or(0),
                private_bytes,
            }
        };
        let (kept, goals) = (kept_bytes(job, schema), job.has_goals());
        let own = job.workers.iter().map(|worker| {
            let dataset = worker
                .dataset
                .as_ref()
                .or(job.data.as_ref().map(|data| &data.dataset));
            let sharing = dataset.and_then(|dataset| datasets.get(dataset)).copied();
            let kept = worker.down.as_ref().and_then(|group| kept.get(group)).copied();
            let private_bytes = private_bytes(job, schema, worker, sharing.unwrap_or(1), kept.unwrap_or(0));
            let state = state_layout(job, worker, schema);
            share(worker.name.clone(), slots(worker, goals), state, private_bytes)
        });
        let remote = job.workers.iter().filter(|worker| worker.is_remote());
        let proxies = remote.map(|worker| share(proxy_name(&worker.name), PROXY_SLOTS, None, 0));
        let workers: Vec<Share> = own.chain(proxies).collect();
        let sum = |of: fn(&Share) -> u64| workers.iter().map(of).fold(0, u64::saturating_add);
        let mut sizes = workers
            .iter()
            .flat_map(|share| [share.arena_bytes, share.state_bytes]);
        let pool_bytes = sum(|share| share.arena_bytes.saturating_add(share.state_bytes));
        // The coordinator evaluates, as a trainer does.
        let private_bytes = sum(|share| share.private_bytes)
            .saturating_add(COORDINATOR_BYTES)
            .saturating_add(learner_bytes(job, schema, 1, EVALUATION_BATCH));
        Self {
            parameters: schema.elements() as u64,
            object_bytes,
            page_bytes: if huge_pages && sizes.any(|bytes| bytes >= Layout::LARGE_BYTES) {
                memfd::HUGE_PAGE_BYTES
            } else {
                Layout::SLOT_ALIGN
            },
            pool_bytes,
            private_bytes,
            total_bytes: pool_bytes.saturating_add(private_bytes),
            workers,
        }
    }
}

/// `sharing` is how many trainers a trainer's dataset is divided among, `kept` what an aggregator keeps beside its slot.
fn private_bytes(job: &JobSpec, schema: &Schema, worker: &WorkerSpec, sharing: u32, kept: u64) -> u64 {
    match worker.kind {
        Kind::Trainer => {
            // What others have in arenas: the model and the update.
            let buffers = if worker.is_remote() { 2 } else { 0 };
            learner_bytes(job, schema, sharing.into(), u64::from(job.training.batch_size))
                .saturating_add(WORKER_BYTES)
                .saturating_add((schema.data_bytes() as u64).saturating_mul(buffers))
        }
        Kind::Top | Kind::Aggregator => WORKER_BYTES.saturating_add(kept),
    }
}

/// What a process takes beside that trains on one of `shares` parts of the data, or evaluates.
fn learner_bytes(job: &JobSpec, schema: &Schema, shares: u64, batch: u64) -> u64 {
    if matches!(job.model, ModelSpec::Synthetic { .. }) {
        return 0;
    }
    // While a data set is read, all of it is in memory, whatever the share.
    let data = data_bytes(job).saturating_add(data_bytes(job) / shares.max(1));
    let models = LEARNER_MODELS.saturating_mul(schema.data_bytes() as u64);
    let larger = (job.samples.pixels() as u64).div_ceil(SampleShape::default().pixels() as u64);
    let activations = SAMPLE_BYTES.saturating_mul(batch).saturating_mul(larger);
    [LEARNER_BYTES, models, activations, data]
        .into_iter()
        .fold(0, u64::saturating_add)
}

/// All samples of the largest data set that is known here, 70,000 images, unless the job uses fewer.
fn data_bytes(job: &JobSpec) -> u64 {
    let pixels = (job.samples.pixels() as u64).saturating_add(1);
    let data = job.data.as_ref();
    let train = data.and_then(|data| data.train_samples).unwrap_or(60_000);
    let test = data.and_then(|data| data.test_samples).unwrap_or(10_000);
    train.saturating_add(test).saturating_mul(pixels)
}
