//! The coordinator, driven by hand: deaths in each phase of a round, quorum and closing, failures, and sequences at random.

mod deaths;
mod rounds;
mod sequences;

use lifl_common::config::{
    Brokers, Group, ModelSpec, Optimizer, SampleShape, Timing, TrainingSpec, Transport, UpdateKind,
    WorkerSpec,
};
use lifl_common::control::{Event as DaemonEvent, PeerLost};
use lifl_common::id::{ArenaId, Generation, Key};
use lifl_common::kernel::Counters;
use lifl_common::update::{Cover, DType, Metadata, UpdateInfo};

use super::policy::Synchronous;
use super::*;

const COORDINATOR: WorkerId = WorkerId(1);
const TOP: usize = 0;
const MIDDLE: usize = 1;
const LEAF: usize = 3;
const TRAINERS: std::ops::Range<usize> = 5..9;
const SAMPLES: u64 = 10;

/// One top, two middles (1, 2), two leaves (3, 4) and four trainers, of which 5 and 7 are below leaf 3.
fn job() -> JobSpec {
    let group = |channel: &str| {
        Some(Group {
            channel: channel.into(),
            group: "default".into(),
        })
    };
    let channels = ["global", "hierarchy", "param"];
    let level_of = |index: usize| [0, 1, 1, 2, 2, 3, 3, 3, 3][index];
    let worker = |index: usize| {
        let level: usize = level_of(index);
        WorkerSpec {
            name: format!("w{index}"),
            role: format!("role-{level}"),
            task_id: None,
            kind: [Kind::Top, Kind::Aggregator, Kind::Aggregator, Kind::Trainer][level],
            level: level as u32,
            up: level.checked_sub(1).and_then(|above| group(channels[above])),
            down: channels.get(level).and_then(|channel| group(channel)),
            transport: Transport::Shm,
            share: (level == 3).then(|| index as u32 - 5),
            agg_goal: None,
            select: None,
            dataset: None,
        }
    };
    JobSpec {
        id: "1".into(),
        name: "job".into(),
        rounds: 3,
        seed: 7,
        timing: Timing::Lazy,
        updates: UpdateKind::Weights,
        workers: (0..9).map(worker).collect(),
        brokers: Brokers::default(),
        model: ModelSpec::Synthetic {
            parameters: 4,
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

/// A coordinator and what its driver knows.
struct Driver {
    coordinator: Coordinator,
    job: JobSpec,
    now: Duration,
    last_id: u32,
    /// The registration of each worker, while it is there.
    ids: Vec<WorkerId>,
    /// What has been put out and not been [taken](Self::take).
    outputs: Vec<Output>,
}

impl Driver {
    /// All processes have been started.
    fn new(job: JobSpec, first_round: u32) -> Self {
        let samples = job
            .workers
            .iter()
            .map(|spec| if spec.share.is_some() { SAMPLES } else { 0 });
        let policy = Box::new(Synchronous::new(&job));
        let samples = samples.collect();
        Self {
            coordinator: Coordinator::new(COORDINATOR, Arc::new(job.clone()), policy, samples, first_round),
            now: Duration::ZERO,
            last_id: COORDINATOR.0,
            ids: vec![WorkerId::NONE; job.workers.len()],
            job,
            outputs: Vec::new(),
        }
    }

    /// In the first round, which has just begun.
    fn running(job: JobSpec) -> Self {
        let mut driver = Self::new(job, 1);
        driver.all_join();
        driver.take();
        driver
    }

    fn all_join(&mut self) {
        for worker in 0..self.job.workers.len() {
            self.join(worker);
        }
    }

    fn handle(&mut self, input: Input) {
        self.coordinator.handle(self.now, input);
        while let Some(output) = self.coordinator.poll_output() {
            self.outputs.push(output);
        }
    }

    fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// Lets that much time pass, with timeouts when they are due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(when) = self.coordinator.timeout().filter(|when| *when <= end) {
            self.now = when.max(self.now);
            let before = self.outputs.len();
            self.handle(Input::Timeout);
            assert_ne!(self.coordinator.timeout(), Some(when), "it has been dealt with");
            // Without a daemon's answer nothing but time goes on.
            if self.outputs[before..].contains(&Output::AskStatus) {
                return;
            }
        }
        self.now = end;
    }

    /// A worker registers, without being ready.
    fn register(&mut self, worker: usize) -> WorkerId {
        self.last_id += 1;
        let id = WorkerId(self.last_id);
        self.ids[worker] = id;
        let name = self.job.workers[worker].name.clone();
        self.handle(Input::Daemon(DaemonEvent::PeerJoined { worker: id, name }));
        id
    }

    fn join(&mut self, worker: usize) {
        let id = self.register(worker);
        self.frame(id, FrameKind::Ready, 0);
    }

    fn frame(&mut self, from: WorkerId, kind: FrameKind, round: u32) {
        self.handle(Input::Frame(Frame {
            to: COORDINATOR,
            from,
            kind: kind as u16,
            round,
            ..Frame::default()
        }));
    }

    fn disconnect(&mut self, worker: usize) {
        let id = std::mem::replace(&mut self.ids[worker], WorkerId::NONE);
        let name = self.job.workers[worker].name.clone();
        self.handle(Input::Daemon(DaemonEvent::PeerLost(PeerLost {
            worker: id,
            name,
        })));
    }

    fn exit(&mut self, worker: usize) {
        let how = "it was killed by SIGKILL".to_owned();
        self.handle(Input::Exited { worker, how });
    }

    fn die(&mut self, worker: usize) {
        self.disconnect(worker);
        self.exit(worker);
    }

    fn started(&mut self, worker: usize) {
        let result = Ok(());
        self.handle(Input::Started { worker, result });
    }

    /// It dies, is started anew, and is ready.
    fn replace(&mut self, worker: usize) {
        self.die(worker);
        self.started(worker);
        self.join(worker);
    }

    /// What a top lends as that round's model, of all trainers' work.
    fn model(&self, round: u32) -> (Frame, Metadata) {
        let mut cover = Cover::default();
        (0..4).for_each(|share| cover.add(&Cover::of(share)));
        let from = self.ids[TOP];
        let key = Key {
            arena: ArenaId::of(from, 0).expect("a small number"),
            slot: 0,
            generation: Generation(round.into()),
        };
        let frame = Frame {
            to: COORDINATOR,
            from,
            kind: FrameKind::Model as u16,
            round,
            key,
            covers: 4,
            ..Frame::default()
        };
        let metadata = Metadata {
            round,
            generation: key.generation,
            info: UpdateInfo {
                samples: 4 * SAMPLES,
                cover,
                ..UpdateInfo::default()
            },
            ..Metadata::default()
        };
        (frame, metadata)
    }

    /// The top lends the round's model, which is as it should be.
    fn decide(&mut self, round: u32) {
        let (frame, metadata) = self.model(round);
        self.handle(Input::Frame(frame));
        self.handle(Input::Checked(Ok(metadata)));
    }

    fn examine(&mut self) {
        self.handle(Input::Evaluated { loss: Some(0.5) });
        self.handle(Input::Written { error: None });
    }

    /// The daemon's answer: what each that is registered has sent.
    fn status(&mut self, frames: impl Fn(usize) -> u64) {
        let ids = self
            .ids
            .iter()
            .enumerate()
            .filter(|(_, id)| **id != WorkerId::NONE);
        let counters = ids.map(|(worker, &id)| {
            let counters = Counters {
                frames: frames(worker),
                ..Counters::default()
            };
            (id, counters)
        });
        let counters = counters.collect();
        self.handle(Input::Status(Some(counters)));
    }
}

/// The frames among the outputs: to whom, of what kind and value.
fn frames(outputs: &[Output]) -> Vec<(WorkerId, FrameKind, u64)> {
    let frame = |output: &Output| match output {
        Output::Send(frame) => {
            let kind = FrameKind::from_number(frame.kind).expect("a kind");
            Some((frame.to, kind, frame.value))
        }
        _ => None,
    };
    outputs.iter().filter_map(frame).collect()
}

/// The outputs that are no frames.
fn others(outputs: Vec<Output>) -> Vec<Output> {
    let others = outputs.into_iter();
    others
        .filter(|output| !matches!(output, Output::Send(_)))
        .collect()
}

fn lost(worker: usize, round: u32, how: &str, restarting: bool) -> Output {
    Output::Report(Event::Worker {
        worker,
        round,
        what: WorkerEvent::Lost {
            how: how.to_owned(),
            restarting,
        },
    })
}

const KILLED: &str = "it was killed by SIGKILL";
