//! The coordinator, driven by hand: deaths in each phase of a round, quorum and closing, failures, and sequences at random.

mod deaths;
mod rounds;
mod sequences;

use lifl_common::config::Transport;
use lifl_common::control::{Event as DaemonEvent, PeerLost};
use lifl_common::id::{ArenaId, Generation, Key};
use lifl_common::kernel::Counters;
use lifl_common::session::proxy_name;
use lifl_common::update::{Cover, Metadata, UpdateInfo};

use super::*;
use crate::test_job;

const COORDINATOR: WorkerId = WorkerId(1);
const TOP: usize = 0;
const MIDDLE: usize = 1;
const LEAF: usize = 3;
const TRAINERS: std::ops::Range<usize> = 5..9;
const SAMPLES: u64 = 10;

/// One top, two middles (1, 2), two leaves (3, 4) and four trainers, of which 5 and 7 are below leaf 3.
fn job() -> JobSpec {
    test_job::job(&[1, 2, 2, 4])
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
        let id = self.register_as(&self.job.workers[worker].name.clone());
        self.ids[worker] = id;
        id
    }

    /// Some process registers under that name.
    fn register_as(&mut self, name: &str) -> WorkerId {
        self.last_id += 1;
        let (worker, name) = (WorkerId(self.last_id), name.to_owned());
        self.handle(Input::Daemon(DaemonEvent::PeerJoined { worker, name }));
        worker
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

    /// A process ends that the coordinator had killed.
    fn killed(&mut self, worker: usize) {
        self.handle(Input::Exited { worker, how: None });
    }

    fn exit(&mut self, worker: usize) {
        let how = Some(KILLED.to_owned());
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
