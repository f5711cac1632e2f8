//! Whole jobs over the local shell: the shipped coordinator, aggregators and trainers, with workers that die at any moment.
//!
//! What must hold, whatever happens: the job ends, and well; each round's model is the sample-weighted mean of the updates that
//! its cover names, with the optimizer's step from the state of the round before; no trainer's work is in it twice; where
//! rounds wait for all, no trainer that lived through the round is missing; and when nothing is on its way any more, nobody
//! holds anything of anybody's.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lifl_aggregate::{ServerOptimizer, State, Threads, state_schema};
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::config::{
    Adaptive, Brokers, Group, JobSpec, Kind, ModelSpec, Optimizer, SampleShape, Timing, TrainingSpec,
    Transport, UpdateKind, WorkerSpec,
};
use lifl_common::control::{Event as DaemonEvent, PeerLost};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::kernel::Counters;
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo, image};
use proptest::prelude::*;
use rand::Rng;
use rand::seq::IndexedRandom;

use super::{Delays, Event, LocalAggregator, LocalNetwork, LocalTrainer, Requests, Worker, WorkerError};
use crate::aggregator::{Aggregator, Config, LoadedModel, Top};
use crate::coordinator::failures::MOST_DEATHS;
use crate::coordinator::membership::Membership;
use crate::coordinator::pairing::pair;
use crate::coordinator::policy::Synchronous;
use crate::coordinator::{Coordinator, Event as Report, Input, Output};
use crate::slots::{STATE_SLOTS, most_held, slots};
use crate::trainer::Trainer;

const COORDINATOR: WorkerId = WorkerId(1);
const PARAMETERS: usize = 5;

/// How long a worker's start, and the end of its process, take at most.
const PROCESS: Duration = Duration::from_millis(20);

/// The coordinator, and what it has asked for beside frames.
struct Desk {
    coordinator: Coordinator,
    /// What it is told beside frames, and not told yet.
    inputs: VecDeque<Input>,
    orders: VecDeque<Output>,
    done: bool,
}

#[derive(Clone)]
struct LocalCoordinator(Rc<RefCell<Desk>>);

impl Worker for LocalCoordinator {
    fn handle(&mut self, now: Duration, event: Event, requests: &mut Requests) -> Result<(), WorkerError> {
        let mut desk = self.0.borrow_mut();
        match event {
            Event::Frame(frame) => desk.inputs.push_back(Input::Frame(frame)),
            Event::PeerLost(worker) => {
                desk.inputs
                    .push_back(Input::Daemon(DaemonEvent::PeerLost(PeerLost {
                        worker,
                        name: String::new(),
                    })))
            }
            Event::Timeout => desk.inputs.push_back(Input::Timeout),
            Event::Start | Event::Undelivered(..) | Event::ArenaOpened(..) | Event::Work => {}
        }
        while let Some(input) = desk.inputs.pop_front() {
            desk.coordinator.handle(now, input);
            while let Some(output) = desk.coordinator.poll_output() {
                match output {
                    Output::Send(frame) => requests.frames.push(frame),
                    Output::Done(_) => {
                        desk.done = true;
                        desk.orders.push_back(output);
                    }
                    order => desk.orders.push_back(order),
                }
            }
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let desk = self.0.borrow();
        desk.coordinator.timeout().filter(|_| !desk.done)
    }

    fn is_idle(&mut self) -> bool {
        self.0.borrow().done
    }
}

/// How a job is disturbed.
#[derive(Clone, Copy, Debug)]
struct Disturbance {
    seed: u64,
    /// How many workers die.
    deaths: u32,
    /// How long training takes at most; a frame's way takes a millisecond at most.
    training: Duration,
}

/// What becomes of a worker's process.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Process {
    Starts,
    Ends,
}

struct Simulation {
    network: LocalNetwork,
    desk: Rc<RefCell<Desk>>,
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
    deaths: u32,
    /// Of each worker, since it finished a round.
    deaths_of: BTreeMap<usize, u32>,
}

/// Training samples of a trainer.
fn samples(share: u32) -> u64 {
    u64::from(1 + share * 7 % 13)
}

/// What a trainer makes of a model in a round.
fn train(share: u32, round: u32, model: &[f32]) -> Vec<f32> {
    let noise = |at: usize| {
        let mixed = (share * 7919 + round * 104_729 + at as u32 * 31).wrapping_mul(2_654_435_761);
        mixed as f32 / u32::MAX as f32 - 0.5
    };
    let weights = model.iter().enumerate();
    weights.map(|(at, weight)| weight * 0.5 + noise(at)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let chunks = bytes.as_chunks::<4>().0.iter();
    chunks.map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn write_floats(out: &mut [u8], values: &[f32]) {
    for (place, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *place = value.to_le_bytes();
    }
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
        let desk = Rc::new(RefCell::new(Desk {
            coordinator: Coordinator::new(COORDINATOR, Arc::clone(&job), policy, known.collect(), 1),
            inputs: VecDeque::new(),
            orders: VecDeque::new(),
            done: false,
        }));
        let mut network = LocalNetwork::new(COORDINATOR, disturbance.seed, delays);
        let coordinator = LocalCoordinator(Rc::clone(&desk));
        network
            .start(COORDINATOR, Box::new(coordinator))
            .expect("it begins");
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F32, [PARAMETERS])]);
        let schema = Arc::new(schema.expect("a schema"));
        let starts = 0..job.workers.len();
        Self {
            network,
            desk,
            state_schema: state_schema(&schema, &job.optimizer),
            schema,
            tops: BTreeMap::new(),
            processes: starts
                .map(|index| (Duration::ZERO, index, Process::Starts))
                .collect(),
            alive: BTreeMap::new(),
            last_id: COORDINATOR.0,
            candidate: None,
            model: (0..PARAMETERS).map(|at| at as f32 / 10.0).collect(),
            made_in: 0,
            round: 0,
            state: None,
            expected_state: None,
            missing: BTreeSet::new(),
            deaths: 0,
            deaths_of: BTreeMap::new(),
            job,
        }
    }

    /// Runs the job; gives when it ended, and the model.
    fn run(&mut self, deaths: u32) -> (Duration, Vec<f32>) {
        let mut steps = 0;
        loop {
            steps += 1;
            let round = self.round + 1;
            assert!(steps < 20_000 * self.job.rounds, "round {round} does not end");
            self.processes_due();
            if self.obey() {
                break;
            }
            self.disturb(deaths);
            let went_on = self.network.step().expect("every worker goes on");
            if !went_on {
                // Nothing else happens before.
                let soonest = self.processes.iter().map(|(at, ..)| *at).min();
                let soonest = soonest.unwrap_or_else(|| panic!("round {round} hangs"));
                let due = self.processes.iter_mut().filter(|(at, ..)| *at == soonest);
                due.for_each(|process| process.0 = Duration::ZERO);
            }
        }
        assert_eq!(self.round, self.job.rounds);
        while self.network.step().expect("every worker goes on") {}
        for (id, worker) in self.network.workers() {
            assert!(worker.is_idle(), "{id} holds something, or waits for something");
        }
        (self.network.now(), self.model.clone())
    }

    /// Tells the coordinator.
    fn tell(&mut self, input: Input) {
        self.desk.borrow_mut().inputs.push_back(input);
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
                    let how = "it was killed".to_owned();
                    self.tell(Input::Exited { worker, how });
                }
            }
        }
    }

    /// A worker's process, and its registration.
    fn start(&mut self, index: usize) {
        self.last_id += 1;
        let (id, job) = (WorkerId(self.last_id), Arc::clone(&self.job));
        let spec = &job.workers[index];
        if self.desk.borrow().coordinator.round() > 0 {
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
        let deltas = self.job.updates == UpdateKind::Deltas;
        let learn = move |round: u32, model: &[u8], out: &mut [u8]| {
            let model = floats(model);
            let mut trained = train(share, round, &model);
            if deltas {
                trained.iter_mut().zip(&model).for_each(|(new, old)| *new -= old);
            }
            write_floats(out, &trained);
            Some(UpdateInfo {
                samples: samples(share),
                cover: Cover::of(share),
                ..UpdateInfo::default()
            })
        };
        let (schema, trainer) = (Arc::clone(&self.schema), Trainer::new(id, COORDINATOR));
        let arena = self
            .network
            .make_arena(arena_of(id, 0), 1, &schema)
            .expect("memory");
        let name = spec.name.clone();
        Box::new(LocalTrainer::new(trainer, name, schema, arena, Box::new(learn)))
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
        let state_schema = self.state_schema.clone();
        let load = move |mut slot: WritableSlot, state_slot: Option<WritableSlot>| {
            write_floats(&mut slot.bytes_mut()[image::data_range(&schema)], &weights);
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
    fn obey(&mut self) -> bool {
        loop {
            let order = self.desk.borrow_mut().orders.pop_front();
            match order {
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
                    result.expect("the job ends well");
                    return true;
                }
                Some(Output::Report(_) | Output::DropProxy(_) | Output::Send(_)) => {}
            }
        }
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
            self.missing.insert(index);
            self.network.kill(id);
            self.later(index, Process::Ends);
        }
    }

    /// Now and then a worker dies, but for the last round, and nobody so often that it is given up.
    fn disturb(&mut self, deaths: u32) {
        let last = self.round + 1 >= self.job.rounds;
        let may_die = |index: &usize| {
            self.deaths_of
                .get(index)
                .is_none_or(|&deaths| deaths < MOST_DEATHS)
        };
        let alive: Vec<usize> = self.alive.keys().copied().filter(may_die).collect();
        let begun = self.desk.borrow().coordinator.round() > 0;
        if !begun || last || self.deaths >= deaths || self.alive.len() <= 2 {
            return;
        }
        if self.network.random().random_bool(0.02)
            && let Some(&victim) = alive.choose(self.network.random())
        {
            self.deaths += 1;
            *self.deaths_of.entry(victim).or_default() += 1;
            self.kill(victim);
        }
    }

    /// Holds a decided round's model against what it says is in it.
    fn check(&mut self, round: u32, changed: bool, left_out: &[usize]) {
        let (model, state) = self.candidate.take().expect("a model was checked");
        let (metadata, data) = self.object(&model, &self.schema).expect("it was checked");
        let found = floats(&data);
        if changed {
            let (expected, samples) = self.expected(round, &metadata.info.cover);
            assert_eq!(metadata.info.samples, samples, "round {round}");
            // An optimizer divides by what may be small.
            let tolerance = if self.state_schema.is_some() { 1e-3 } else { 1e-6 };
            for (found, expected) in found.iter().zip(&expected) {
                let off = (f64::from(*found) - expected).abs();
                assert!(off < tolerance, "round {round}: {found} is not {expected}");
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
                let excused = self.missing.contains(index);
                assert!(
                    excused,
                    "round {round}: trainer {index} lived and is not in the model"
                );
            }
        }
        (self.model, self.round) = (found, round);
        self.made_in = metadata.round;
        let settled = (0..self.job.workers.len()).filter(|&index| self.is_settled(index));
        let settled: Vec<usize> = settled.collect();
        self.deaths_of.retain(|index, _| !settled.contains(index));
    }

    /// Flat FedAvg in double precision over those trainers, with the optimizer's step, and their samples.
    fn expected(&mut self, round: u32, cover: &Cover) -> (Vec<f64>, u64) {
        let (mut sum, mut total) = (vec![0.0; self.model.len()], 0);
        let shares = self.job.workers.iter().filter_map(|spec| spec.share);
        for share in shares.filter(|share| cover.contains(*share)) {
            total += samples(share);
            for (sum, value) in sum.iter_mut().zip(train(share, round, &self.model)) {
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
        (floats(&out).into_iter().map(f64::from).collect(), total)
    }
}

fn arena_of(id: WorkerId, number: u32) -> ArenaId {
    ArenaId::of(id, number).expect("not so many workers")
}

/// A job of so many workers on each level. With `goals` the aggregators above trainers wait for all but one.
fn job(levels: &[u32], timing: Timing, updates: UpdateKind, goals: bool) -> JobSpec {
    let deepest = levels.len() - 1;
    let group = |level: usize| {
        Some(Group {
            channel: format!("channel-{level}"),
            group: "default".to_owned(),
        })
    };
    let worker = |level: usize, number: u32| WorkerSpec {
        name: format!("worker-{level}-{number}"),
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
        agg_goal: (goals && level + 1 == deepest).then(|| (levels[deepest] / levels[level]).max(2) - 1),
        select: None,
        share: (level == deepest).then_some(number),
        dataset: None,
    };
    let numbers = |(level, &count): (usize, &u32)| (0..count).map(move |number| (level, number));
    let workers = levels.iter().enumerate().flat_map(numbers);
    JobSpec {
        id: "simulated".to_owned(),
        name: "simulated".to_owned(),
        rounds: 5,
        seed: 7,
        timing,
        updates,
        workers: workers.map(|(level, number)| worker(level, number)).collect(),
        brokers: Brokers::default(),
        model: ModelSpec::Synthetic {
            parameters: PARAMETERS as u64,
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
        grace_time_s: 2.0,
        spin_us: 0,
        max_run_time_s: 300,
    }
}

fn run(job: JobSpec, disturbance: Disturbance) -> (Duration, Vec<f32>) {
    Simulation::new(job, disturbance).run(disturbance.deaths)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(1500), ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_counts_twice(
        seed in any::<u64>(),
        levels in prop_oneof![
            Just(vec![1, 3]), Just(vec![1, 2, 4]), Just(vec![1, 3, 7]), Just(vec![1, 2, 4, 8]), Just(vec![1, 1, 2, 5])
        ],
        deaths in 0_u32..12,
        training in prop_oneof![Just(1_u64), Just(10), Just(100)],
        eager in any::<bool>(),
        deltas in any::<bool>(),
        goals in any::<bool>(),
        adam in any::<bool>(),
        quorum in 1_u32..3,
        timeout_ms in prop_oneof![Just(None), Just(Some(1_u32)), Just(Some(30))],
    ) {
        let timing = if eager { Timing::Eager } else { Timing::Lazy };
        let updates = if deltas { UpdateKind::Deltas } else { UpdateKind::Weights };
        let mut job = job(&levels, timing, updates, goals);
        job.quorum = quorum;
        job.round_timeout_s = timeout_ms.map(|timeout| f64::from(timeout) / 1e3);
        if adam {
            job.optimizer = Optimizer::FedAdam(Adaptive {
                tau: 0.01,
                ..Adaptive::default()
            });
        }
        run(job, Disturbance { seed, deaths, training: Duration::from_millis(training) });
    }
}

/// It may have an update of the round before whose parent died before it passed the verdict on.
#[test]
fn an_aggregator_with_nobody_to_aggregate_is_told_that_the_round_begins() {
    let job = Arc::new(job(&[1, 2, 1], Timing::Lazy, UpdateKind::Weights, false));
    let mut membership = Membership::new(COORDINATOR, Arc::clone(&job), vec![1; 4]);
    for (at, spec) in job.workers.iter().enumerate() {
        let id = WorkerId(10 + at as u32);
        membership.joined(id, &spec.name);
        membership.ready(id);
    }
    membership.plan(1, pair(&job.workers, |_| true));
    let begins = membership.announce().into_iter();
    let begins = begins.filter(|frame| frame.kind == FrameKind::Begin as u16);
    let begins: Vec<(WorkerId, u64)> = begins.map(|frame| (frame.to, frame.value)).collect();
    assert!(begins.contains(&(WorkerId(12), 0)), "{begins:?}");
    assert_eq!(begins.len(), job.workers.len());
}

#[test]
fn many_deaths_in_a_deep_tree() {
    let mut job = job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights, false);
    job.rounds = 61;
    let training = Duration::from_millis(10);
    let disturbance = Disturbance {
        seed: 1,
        deaths: 200,
        training,
    };
    let mut simulation = Simulation::new(job, disturbance);
    simulation.run(disturbance.deaths);
    assert!(simulation.deaths > 60, "{} died", simulation.deaths);
}

#[test]
fn covers_of_more_trainers_than_one_word_names_are_told_whole() {
    let mut job = job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights, false);
    job.rounds = 11;
    for share in job.workers.iter_mut().filter_map(|worker| worker.share.as_mut()) {
        *share *= 40;
    }
    let training = Duration::from_millis(1);
    run(
        job,
        Disturbance {
            seed: 5,
            deaths: 20,
            training,
        },
    );
}

#[test]
fn equal_seeds_replay() {
    let job = || job(&[1, 2, 4, 8], Timing::Eager, UpdateKind::Weights, true);
    let disturbance = |seed| Disturbance {
        seed,
        deaths: 9,
        training: Duration::from_millis(20),
    };
    let first = run(job(), disturbance(3));
    assert_eq!(first, run(job(), disturbance(3)));
    assert_ne!(first.0, run(job(), disturbance(4)).0);
}
