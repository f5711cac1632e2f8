//! Jobs for tests: trees of one group on each channel, and a synthetic model.

use lifl_common::config::{
    Brokers, Group, JobSpec, Kind, ModelSpec, Optimizer, SampleShape, Timing, TrainingSpec, Transport,
    UpdateKind, WorkerSpec,
};
use lifl_common::update::DType;

/// A job of so many workers on each level, called `w0`, `w1` and so on from the top down; of three rounds that wait for all.
pub(crate) fn job(levels: &[u32]) -> JobSpec {
    let deepest = levels.len() - 1;
    let group = |level: usize| {
        Some(Group {
            channel: format!("channel-{level}"),
            group: "default".to_owned(),
        })
    };
    let worker = |(index, (level, number)): (usize, (usize, u32))| WorkerSpec {
        name: format!("w{index}"),
        role: format!("role-{level}"),
        task_id: None,
        kind: match level {
            0 => Kind::Top,
            level if level == deepest => Kind::Trainer,
            _ => Kind::Aggregator,
        },
        level: level as u32,
        up: level.checked_sub(1).and_then(group),
        down: group(level).filter(|_| level < deepest),
        transport: Transport::Shm,
        share: (level == deepest).then_some(number),
        agg_goal: None,
        select: None,
        dataset: None,
    };
    let numbers = |(level, &count): (usize, &u32)| (0..count).map(move |number| (level, number));
    let workers = levels.iter().enumerate().flat_map(numbers).enumerate();
    JobSpec {
        id: "1".to_owned(),
        name: "job".to_owned(),
        rounds: 3,
        seed: 7,
        timing: Timing::Lazy,
        updates: UpdateKind::Weights,
        workers: workers.map(worker).collect(),
        brokers: Brokers::default(),
        model: ModelSpec::Synthetic {
            parameters: 5,
            dtype: DType::F32,
        },
        samples: SampleShape::default(),
        base_model: None,
        training: TrainingSpec {
            epochs: 1,
            batch_size: 1,
            learning_rate: 0.1,
            weight_decay: 0.0,
            proximal_mu: 0.0,
        },
        optimizer: Optimizer::FedAvg,
        data: None,
        quorum: 1,
        round_timeout_s: None,
        grace_time_s: 30.0,
        spin_us: 0,
        max_run_time_s: 300,
    }
}
