//! Whole jobs over the local shell: the shipped coordinator, aggregators and trainers, with workers that die at any
//! moment, and updates that a model has no room for.
//!
//! What must hold, whatever happens: the job ends, and well; each round's model is the sample-weighted mean of the updates that
//! its cover names, with the optimizer's step from the state of the round before; no trainer's work is in it twice; who hears
//! that its update counts is in the model; where rounds wait for all, no trainer that lived through the round is missing; and
//! when nothing is on its way any more, nobody holds anything of anybody's, and every update has its verdict.
//!
//! Which jobs, and how many: [`cases`].

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use half::f16;
use lifl_aggregate::{ServerOptimizer, State, Threads, state_schema};
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::config::{Adaptive, JobSpec, Kind, Optimizer, Timing, UpdateKind, WorkerSpec};
use lifl_common::control::{Event as DaemonEvent, PeerLost};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::kernel::Counters;
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo, image};
use rand::Rng;
use rand::seq::IndexedRandom;

use super::{
    Delays, Event, Learner, LocalAggregator, LocalNetwork, LocalTrainer, Requests, Worker, WorkerError,
};
use crate::aggregator::{Aggregator, Config, LoadedModel, Top};
use crate::coordinator::{Coordinator, Event as Report, Failure, Input, MOST_DEATHS, Output, Synchronous};
use crate::slots::{STATE_SLOTS, most_held, slots};
use crate::trainer::Trainer;

const COORDINATOR: WorkerId = WorkerId(1);
const PARAMETERS: usize = 5;

/// How long a worker's start, and the end of its process, take at most.
const PROCESS: Duration = Duration::from_millis(20);

/// The coordinator, and what it has asked for beside frames.
struct CoordinatorShell {
    coordinator: Coordinator,
    /// What it is told beside frames, and not told yet.
    inputs: VecDeque<Input>,
    outputs: VecDeque<Output>,
    done: bool,
}

#[derive(Clone)]
struct LocalCoordinator(Rc<RefCell<CoordinatorShell>>);

impl Worker for LocalCoordinator {
    fn handle(&mut self, now: Duration, event: Event, requests: &mut Requests) -> Result<(), WorkerError> {
        let mut shell = self.0.borrow_mut();
        match event {
            Event::Frame(frame) => shell.inputs.push_back(Input::Frame(frame)),
            Event::PeerLost(worker) => {
                shell
                    .inputs
                    .push_back(Input::Daemon(DaemonEvent::PeerLost(PeerLost {
                        worker,
                        name: String::new(),
                    })))
            }
            Event::Timeout => shell.inputs.push_back(Input::Timeout),
            Event::Start | Event::Undelivered(..) | Event::ArenaOpened(..) | Event::Work => {}
        }
        while let Some(input) = shell.inputs.pop_front() {
            shell.coordinator.handle(now, input);
            while let Some(output) = shell.coordinator.poll_output() {
                match output {
                    Output::Send(frame) => requests.frames.push(frame),
                    Output::Done(_) => {
                        shell.done = true;
                        shell.outputs.push_back(output);
                    }
                    output => shell.outputs.push_back(output),
                }
            }
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let shell = self.0.borrow();
        shell.coordinator.timeout().filter(|_| !shell.done)
    }

    fn is_idle(&mut self) -> bool {
        self.0.borrow().done
    }
}

/// How a job is disturbed.
#[derive(Clone, Copy, Debug)]
struct Disturbance {
    seed: u64,
    /// How many workers die by themselves.
    deaths: u32,
    /// Whether the updates of some trainers are so large that a model may have no sum with them.
    overflows: bool,
    /// How long training takes at most; a frame's way takes a millisecond at most.
    training: Duration,
}

/// What the first element of an `f16` model is whose sum with an update may be too large, and what some trainers add to it.
const CLOSE: f32 = 32_768.0;
const OVERFLOWING: f32 = 49_152.0;

/// A verdict that a trainer of that number has heard, and of which round's update.
type Verdict = (u32, u32, Option<Refusal>);

/// How a trainer of the simulation trains.
struct SimulatedLearner {
    share: u32,
    updates: UpdateKind,
    dtype: DType,
    overflows: bool,
    verdicts: Rc<RefCell<Vec<Verdict>>>,
}

impl Learner for SimulatedLearner {
    fn train(&mut self, round: u32, model: &[u8], out: &mut [u8]) -> Option<UpdateInfo> {
        let model = floats(self.dtype, model);
        let mut trained = train(self.share, round, &model, self.overflows);
        if self.updates == UpdateKind::Deltas {
            trained.iter_mut().zip(&model).for_each(|(new, old)| *new -= old);
        }
        write_floats(self.dtype, out, &trained);
        Some(UpdateInfo {
            samples: samples(self.share),
            cover: Cover::of(self.share),
            ..UpdateInfo::default()
        })
    }

    fn settled(&mut self, round: u32, refusal: Option<Refusal>) {
        self.verdicts.borrow_mut().push((self.share, round, refusal));
    }
}

/// What becomes of a worker's process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Process {
    Starts,
    Ends,
}

struct Simulation {
    network: LocalNetwork,
    disturbance: Disturbance,
    shell: Rc<RefCell<CoordinatorShell>>,
    job: Arc<JobSpec>,
    schema: Arc<Schema>,
    /// The tensors of the optimizer's state, if it has one.
    state_schema: Option<Schema>,
    /// The arenas of the tops, the dead ones' too: what they made last is still wanted.
    tops: BTreeMap<ArenaId, Arc<PeerArena>>,
    /// What is going to become of whom, and when.
    processes: Vec<(Duration, usize, Process)>,
    /// Who is there, since when.
    alive: BTreeMap<usize, (WorkerId, Duration)>,
    last_id: u32,
    /// The model that is being checked.
    candidate: Option<(Frame, Option<Frame>)>,
    /// The last model that was decided on, the round that made it, and the data of the optimizer's state.
    model: Vec<f32>,
    made_in: u32,
    /// The last round that was decided on.
    round: u32,
    state: Option<Vec<u8>>,
    /// The optimizer's state as it must be.
    expected_state: Option<Vec<u8>>,
    /// Trainers that died in the round that runs, or were not there when it began.
    missing: BTreeSet<usize>,
    /// Who is in the model of each round that was decided.
    covers: BTreeMap<u32, Cover>,
    verdicts: Rc<RefCell<Vec<Verdict>>>,
    deaths: u32,
    /// Workers that died, by themselves or killed by the coordinator.
    killed: u32,
    /// Of each worker, since it finished a round.
    deaths_of: BTreeMap<usize, u32>,
}

/// Training samples of a trainer.
fn samples(share: u32) -> u64 {
    u64::from(1 + share * 7 % 13)
}

/// Whether a trainer's updates are too large, where some are.
fn overflows(share: u32) -> bool {
    share % 3 == 1
}

/// What a trainer makes of a model in a round. Where some of them overflow, the first element is too large for noise.
fn train(share: u32, round: u32, model: &[f32], some_overflow: bool) -> Vec<f32> {
    let noise = |at: usize| {
        let mixed = (share * 7919 + round * 104_729 + at as u32 * 31).wrapping_mul(2_654_435_761);
        mixed as f32 / u32::MAX as f32 - 0.5
    };
    let weights = model.iter().enumerate();
    let trained = weights.map(
        |(at, weight)| match (some_overflow && at == 0, overflows(share)) {
            (true, true) => weight + OVERFLOWING,
            (true, false) => *weight,
            _ => weight * 0.5 + noise(at),
        },
    );
    trained.collect()
}

fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F16 => {
            let chunks = bytes.as_chunks::<2>().0.iter();
            chunks.map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
        }
        _ => {
            let chunks = bytes.as_chunks::<4>().0.iter();
            chunks.map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
    }
}

fn write_floats(dtype: DType, out: &mut [u8], values: &[f32]) {
    let bytes: Vec<u8> = match dtype {
        DType::F16 => {
            let values = values.iter().map(|value| f16::from_f32(*value));
            values.flat_map(f16::to_le_bytes).collect()
        }
        _ => bytes_of(values),
    };
    out.copy_from_slice(&bytes);
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

impl Simulation {
    fn new(job: JobSpec, disturbance: Disturbance) -> Self {
        let millisecond = Duration::from_millis(1);
        let delays = Delays {
            frame: millisecond,
            news: 4 * millisecond,
            open: millisecond,
            work: disturbance.training,
        };
        let job = Arc::new(job);
        let known = job.workers.iter().map(|spec| spec.share.map_or(0, samples));
        let policy = Box::new(Synchronous::new(&job));
        let shell = Rc::new(RefCell::new(CoordinatorShell {
            coordinator: Coordinator::new(COORDINATOR, Arc::clone(&job), policy, known.collect(), 1),
            inputs: VecDeque::new(),
            outputs: VecDeque::new(),
            done: false,
        }));
        let mut network = LocalNetwork::new(COORDINATOR, disturbance.seed, delays);
        let coordinator = LocalCoordinator(Rc::clone(&shell));
        network
            .start(COORDINATOR, Box::new(coordinator))
            .expect("it begins");
        // Of the types that models have this one alone can overflow by what may be an update.
        let dtype = if disturbance.overflows {
            DType::F16
        } else {
            DType::F32
        };
        let schema = Schema::new(vec![TensorSpec::new("w", dtype, [PARAMETERS])]);
        let schema = Arc::new(schema.expect("a schema"));
        let starts = 0..job.workers.len();
        let mut model: Vec<f32> = (0..PARAMETERS).map(|at| at as f32 / 16.0).collect();
        if disturbance.overflows {
            model[0] = CLOSE;
        }
        Self {
            network,
            disturbance,
            shell,
            state_schema: state_schema(&schema, &job.optimizer),
            schema,
            tops: BTreeMap::new(),
            processes: starts
                .map(|index| (Duration::ZERO, index, Process::Starts))
                .collect(),
            alive: BTreeMap::new(),
            last_id: COORDINATOR.0,
            candidate: None,
            model,
            made_in: 0,
            round: 0,
            state: None,
            expected_state: None,
            missing: BTreeSet::new(),
            covers: BTreeMap::new(),
            verdicts: Rc::default(),
            deaths: 0,
            killed: 0,
            deaths_of: BTreeMap::new(),
            job,
        }
    }

    /// Runs the job; gives when it ended, and the model.
    fn run(&mut self) -> (Duration, Vec<f32>) {
        let mut steps = 0;
        loop {
            steps += 1;
            let round = self.round + 1;
            assert!(steps < 20_000 * self.job.rounds, "round {round} does not end");
            self.processes_due();
            if self.do_outputs() {
                break;
            }
            self.disturb();
            let went_on = self.network.step().expect("every worker goes on");
            if !went_on {
                // Nothing else happens before.
                let soonest = self.processes.iter().map(|(at, ..)| *at).min();
                let soonest = soonest.unwrap_or_else(|| panic!("round {round} hangs"));
                let due = self.processes.iter_mut().filter(|(at, ..)| *at == soonest);
                due.for_each(|process| process.0 = Duration::ZERO);
            }
        }
        while self.network.step().expect("every worker goes on") {}
        for (id, worker) in self.network.workers() {
            assert!(worker.is_idle(), "{id} holds something, or waits for something");
        }
        self.check_verdicts();
        (self.network.now(), self.model.clone())
    }

    /// Tells the coordinator.
    fn tell(&mut self, input: Input) {
        self.shell.borrow_mut().inputs.push_back(input);
        self.network
            .deliver(COORDINATOR, [Event::Work])
            .expect("it goes on");
    }

    fn later(&mut self, index: usize, process: Process) {
        let takes = PROCESS.mul_f64(self.network.random().random_range(0.0..1.0));
        self.processes.push((self.network.now() + takes, index, process));
    }

    /// Starts and ends those whose time it is.
    fn processes_due(&mut self) {
        let now = self.network.now();
        let processes = std::mem::take(&mut self.processes).into_iter();
        let (due, later): (Vec<_>, Vec<_>) = processes.partition(|(at, ..)| *at <= now);
        self.processes = later;
        for (_, worker, process) in due {
            match process {
                Process::Starts => self.start(worker),
                Process::Ends => {
                    self.tell(Input::Exited { worker, how: None });
                }
            }
        }
    }

    /// A worker's process, and its registration.
    fn start(&mut self, index: usize) {
        self.last_id += 1;
        let (id, job) = (WorkerId(self.last_id), Arc::clone(&self.job));
        let spec = &job.workers[index];
        if self.shell.borrow().coordinator.round() > 0 {
            let result = Ok(());
            self.tell(Input::Started {
                worker: index,
                result,
            });
        }
        let worker = match spec.share {
            Some(share) => self.trainer(id, spec, share),
            None => self.aggregator(id, spec),
        };
        let name = spec.name.clone();
        self.tell(Input::Daemon(DaemonEvent::PeerJoined { worker: id, name }));
        self.network.start(id, worker).expect("it begins");
        self.alive.insert(index, (id, self.network.now()));
    }

    fn trainer(&mut self, id: WorkerId, spec: &WorkerSpec, share: u32) -> Box<dyn Worker> {
        let learner = Box::new(SimulatedLearner {
            share,
            updates: self.job.updates,
            dtype: self.dtype(),
            overflows: self.disturbance.overflows,
            verdicts: Rc::clone(&self.verdicts),
        });
        let (schema, trainer) = (Arc::clone(&self.schema), Trainer::new(id, COORDINATOR));
        let arena = self
            .network
            .make_arena(arena_of(id, 0), 1, &schema)
            .expect("memory");
        let name = spec.name.clone();
        Box::new(LocalTrainer::new(trainer, name, schema, arena, learner))
    }

    fn aggregator(&mut self, id: WorkerId, spec: &WorkerSpec) -> Box<dyn Worker> {
        let (job, schema) = (Arc::clone(&self.job), Arc::clone(&self.schema));
        let goals = job.has_goals();
        let arena = self
            .network
            .make_arena(arena_of(id, 0), slots(spec, goals), &schema)
            .expect("memory");
        let threads = Threads::new(1).expect("one thread");
        let top = (spec.kind == Kind::Top).then(|| {
            let state = self.state_schema.as_ref();
            let state_arena = state.map(|state| {
                self.network
                    .make_arena(arena_of(id, 1), STATE_SLOTS, state)
                    .expect("memory")
            });
            Top {
                optimizer: ServerOptimizer::new(Arc::clone(&schema), job.optimizer, job.updates),
                state_arena,
                quorum: job.quorum,
                rounds: job.rounds,
            }
        });
        let config = Config {
            name: spec.name.clone(),
            worker: id,
            coordinator: COORDINATOR,
            schema: Arc::clone(&schema),
            goal: spec.agg_goal,
            most_held: most_held(spec, goals, job.levels()),
            via_gateway: false,
            threads: threads.clone(),
        };
        let rule = lifl_aggregate::rule(&job, &schema, &threads);
        let aggregator = Aggregator::new(config, top, rule, arena).expect("a free slot");
        let (weights, state, round) = (self.model.clone(), self.state.clone(), self.made_in);
        let (state_schema, dtype) = (self.state_schema.clone(), self.dtype());
        let load = move |mut slot: WritableSlot, state_slot: Option<WritableSlot>| {
            write_floats(dtype, &mut slot.bytes_mut()[image::data_range(&schema)], &weights);
            let metadata = || Metadata {
                round,
                ..Metadata::default()
            };
            let state = state.as_ref().zip(state_slot).zip(state_schema.as_ref());
            let state = state.map(|((data, mut slot), schema)| {
                slot.bytes_mut()[image::data_range(schema)].copy_from_slice(data);
                (slot, metadata())
            });
            LoadedModel {
                slot,
                metadata: metadata(),
                state,
            }
        };
        Box::new(LocalAggregator::new(aggregator, Box::new(load)).expect("a good model"))
    }

    /// Does what the coordinator asks for; says whether the job is over.
    fn do_outputs(&mut self) -> bool {
        loop {
            let output = self.shell.borrow_mut().outputs.pop_front();
            match output {
                None => return false,
                Some(Output::Start(index)) => self.later(index, Process::Starts),
                Some(Output::Kill(index)) => self.kill(index),
                Some(Output::AskStatus) => {
                    let counters = self.alive.values().map(|&(id, _)| {
                        let frames = self.network.sent(id);
                        let counters = Counters {
                            frames,
                            ..Counters::default()
                        };
                        (id, counters)
                    });
                    let counters = counters.collect();
                    self.tell(Input::Status(Some(counters)));
                }
                Some(Output::MapArenas(id)) => {
                    for arena in [arena_of(id, 0), arena_of(id, 1)] {
                        let mapped = self.network.open_arena(arena).expect("mapped");
                        self.tops.extend(mapped.map(|mapped| (arena, mapped)));
                    }
                }
                Some(Output::CheckModel(lent)) => {
                    self.candidate = Some((lent.model, lent.state));
                    let checked = self.object(&lent.model, &self.schema);
                    self.tell(Input::Checked(checked.map(|(metadata, _)| metadata)));
                }
                Some(Output::Decided {
                    round,
                    changed,
                    left_out,
                }) => self.check(round, changed, &left_out),
                Some(Output::Evaluate(_)) => self.tell(Input::Evaluated { loss: None }),
                Some(Output::Write { .. }) => self.tell(Input::Written { error: None }),
                Some(Output::Report(Report::RoundBegins(round))) => {
                    assert_eq!(round, self.round + 1);
                    self.missing = (0..self.job.workers.len())
                        .filter(|&index| !self.is_settled(index))
                        .collect();
                }
                Some(Output::Done(result)) => {
                    match result {
                        // Nobody's update had room beside the model.
                        Err(Failure::NothingFolded) if self.disturbance.overflows => {}
                        result => result.expect("the job ends well"),
                    }
                    assert_eq!(self.round, self.job.rounds);
                    return true;
                }
                Some(output @ Output::FindHolder(_)) => panic!("{output:?}"),
                Some(Output::Report(_) | Output::DropProxy(_) | Output::Send(_)) => {}
            }
        }
    }

    fn dtype(&self) -> DType {
        self.schema.regions()[0].dtype
    }

    /// Whether a worker has been there for so long that the coordinator knows.
    fn is_settled(&self, index: usize) -> bool {
        let since = self.alive.get(&index).map(|(_, since)| *since);
        since.is_some_and(|since| since + PROCESS <= self.network.now())
    }

    /// What a frame of a top's lends.
    fn object(&self, frame: &Frame, schema: &Schema) -> Result<(Metadata, Vec<u8>), String> {
        let arena = self.tops.get(&frame.key.arena).ok_or("not mapped")?;
        let bytes = arena
            .object(frame.key, frame.length)
            .map_err(|error| error.to_string())?;
        let (metadata, data) = image::check(bytes, schema).map_err(|error| error.to_string())?;
        Ok((metadata, bytes[data].to_vec()))
    }

    fn kill(&mut self, index: usize) {
        if let Some((id, _)) = self.alive.remove(&index) {
            self.killed += 1;
            *self.deaths_of.entry(index).or_default() += 1;
            self.missing.insert(index);
            self.network.kill(id);
            self.later(index, Process::Ends);
        }
    }

    /// Now and then a worker dies, but for the last round, and nobody dies so often that it is given up.
    fn disturb(&mut self) {
        let wanted = self.disturbance;
        let last = self.round + 1 >= self.job.rounds;
        let may_die = |index: &usize| {
            self.deaths_of
                .get(index)
                .is_none_or(|&deaths| deaths < MOST_DEATHS)
        };
        let alive: Vec<usize> = self.alive.keys().copied().filter(may_die).collect();
        let begun = self.shell.borrow().coordinator.round() > 0;
        if !begun || last || self.alive.len() <= 2 {
            return;
        }
        if self.deaths < wanted.deaths
            && self.network.random().random_bool(0.02)
            && let Some(&victim) = alive.choose(self.network.random())
        {
            self.deaths += 1;
            self.kill(victim);
        }
    }

    /// Every verdict is that of the model of its round.
    fn check_verdicts(&self) {
        for (share, round, refusal) in &*self.verdicts.borrow() {
            let counts = self.covers.get(round).is_some_and(|cover| cover.contains(*share));
            assert!(
                counts || refusal.is_some(),
                "trainer {share} was told that it is in the model of round {round}"
            );
            // Whose parent died may be told that its update comes too late, though its predecessor's work has it.
            let said = refusal.filter(|_| self.killed == 0);
            assert!(
                !counts || said.is_none(),
                "trainer {share} is in the model of round {round} and was told {said:?}"
            );
        }
    }

    /// Holds a decided round's model against what it says is in it.
    fn check(&mut self, round: u32, changed: bool, left_out: &[usize]) {
        let (model, state) = self.candidate.take().expect("a model was checked");
        let (metadata, data) = self.object(&model, &self.schema).expect("it was checked");
        let found = floats(self.dtype(), &data);
        if changed {
            let (expected, samples) = self.expected(round, &metadata.info.cover);
            assert_eq!(metadata.info.samples, samples, "round {round}");
            // An optimizer divides by what may be small.
            let tolerance = match (&self.state_schema, self.dtype()) {
                (Some(_), _) => 1e-3,
                (None, DType::F16) => 4e-3,
                (None, _) => 1e-6,
            };
            for (found, expected) in found.iter().zip(&expected) {
                let off = (f64::from(*found) - expected).abs();
                assert!(
                    off < tolerance * expected.abs().max(1.0),
                    "round {round}: {found} is not {expected}"
                );
            }
        } else {
            assert_eq!(found, self.model, "round {round} changed nothing");
        }
        if let (Some(schema), Some(state)) = (&self.state_schema, state) {
            let (_, data) = self.object(&state, schema).expect("the optimizer's state");
            self.state = Some(data);
        }
        let waits = self.job.workers.iter().all(|spec| spec.agg_goal.is_none());
        if waits && self.job.round_timeout_s.is_none() && (changed || self.job.quorum == 1) {
            for index in left_out {
                let excused = self.missing.contains(index) || self.may_overflow(*index);
                assert!(
                    excused,
                    "round {round}: trainer {index} lived and is not in the model"
                );
            }
        }
        let cover = if changed {
            metadata.info.cover
        } else {
            Cover::default()
        };
        self.covers.insert(round, cover);
        (self.model, self.round) = (found, round);
        self.made_in = metadata.round;
        let settled = (0..self.job.workers.len()).filter(|&index| self.is_settled(index));
        let settled: Vec<usize> = settled.collect();
        self.deaths_of.retain(|index, _| !settled.contains(index));
    }

    /// Whether a trainer may be left out because an update that its own is in, its parent's or that above, has no sum with the
    /// model.
    fn may_overflow(&self, trainer: usize) -> bool {
        let own = self.job.workers[trainer].share.is_some_and(overflows);
        self.disturbance.overflows && (own || self.job.levels() > 1)
    }

    /// Flat FedAvg in double precision over those trainers, with the optimizer's step, and their samples.
    fn expected(&mut self, round: u32, cover: &Cover) -> (Vec<f64>, u64) {
        let (mut sum, mut total) = (vec![0.0; self.model.len()], 0);
        let shares = self.job.workers.iter().filter_map(|spec| spec.share);
        for share in shares.filter(|share| cover.contains(*share)) {
            total += samples(share);
            for (sum, value) in
                sum.iter_mut()
                    .zip(train(share, round, &self.model, self.disturbance.overflows))
            {
                *sum += f64::from(value) * samples(share) as f64;
            }
        }
        let mean: Vec<f64> = sum.into_iter().map(|sum| sum / total as f64).collect();
        let Some(state_schema) = &self.state_schema else {
            return (mean, total);
        };
        let deltas = self.job.updates == UpdateKind::Deltas;
        let old = self
            .model
            .iter()
            .map(|&old| if deltas { f64::from(old) } else { 0.0 });
        let rounded: Vec<f32> = mean
            .iter()
            .zip(old)
            .map(|(mean, old)| (mean - old) as f32)
            .collect();
        let mut out = bytes_of(&rounded);
        let mut after = vec![0; state_schema.data_bytes()];
        let optimizer = ServerOptimizer::new(Arc::clone(&self.schema), self.job.optimizer, self.job.updates);
        let state = State {
            before: self.expected_state.as_deref(),
            after: &mut after,
        };
        let threads = Threads::new(1).expect("one thread");
        let stepped = optimizer.step(&threads, &bytes_of(&self.model), &mut out, Some(state));
        stepped.expect("finite");
        self.expected_state = Some(after);
        (
            floats(DType::F32, &out).into_iter().map(f64::from).collect(),
            total,
        )
    }
}

fn arena_of(id: WorkerId, number: u32) -> ArenaId {
    ArenaId::of(id, number).expect("not so many workers")
}

mod cases;
