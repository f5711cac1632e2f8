//! Whole jobs over the local shell: the shipped aggregators, trainers and membership, with workers that die at any moment and
//! are replaced. Only who decides when a round begins and when a successor is started is a stand-in for the coordinator.
//!
//! What must hold, whatever happens: every round ends; its model is the sample-weighted mean of the updates that its cover
//! names; no trainer's work is in it twice; where rounds wait for all, no trainer that lived through the round is missing; and
//! when nothing is on its way any more, nobody holds anything of anybody's.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use lifl_aggregate::{ServerOptimizer, Threads};
use lifl_common::arena::{PeerArena, WritableSlot};
use lifl_common::config::{
    Brokers, Group, JobSpec, Kind, ModelSpec, Optimizer, SampleShape, Timing, TrainingSpec, Transport,
    UpdateKind, WorkerSpec,
};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, image};
use proptest::prelude::*;
use rand::Rng;
use rand::seq::IndexedRandom;

use super::{Delays, Event, LocalAggregator, LocalNetwork, LocalTrainer, Requests, Worker, WorkerError};
use crate::aggregator::{Aggregator, Config, LoadedModel, Top};
use crate::coordinator::membership::Membership;
use crate::coordinator::pairing::{pair, select};
use crate::trainer::Trainer;
use crate::update_info::UpdateInfo;

const COORDINATOR: WorkerId = WorkerId(1);
const PARAMETERS: usize = 5;

/// What the coordinator hears, until the simulation looks.
#[derive(Clone, Default)]
struct Inbox(Rc<RefCell<VecDeque<Event>>>);

impl Worker for Inbox {
    fn handle(&mut self, _now: Duration, event: Event, _requests: &mut Requests) -> Result<(), WorkerError> {
        self.0.borrow_mut().push_back(event);
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        None
    }

    fn is_idle(&mut self) -> bool {
        true
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

struct Simulation {
    network: LocalNetwork,
    inbox: Inbox,
    membership: Membership,
    job: Arc<JobSpec>,
    schema: Arc<Schema>,
    /// The arenas of the tops, the dead ones' too: what they made last is still wanted.
    tops: Vec<(WorkerId, Arc<PeerArena>)>,
    /// Workers to be started, and when.
    starting: Vec<(Duration, usize)>,
    last_id: u32,
    /// The last model that was decided on, and its round.
    model: Vec<f32>,
    round: u32,
    running: bool,
    /// Trainers that died in the round that runs, by share.
    died: BTreeSet<u32>,
    deaths: u32,
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

fn arena_of(id: WorkerId) -> ArenaId {
    ArenaId::of(id, 0).expect("not so many workers")
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
        let mut network = LocalNetwork::new(COORDINATOR, disturbance.seed, delays);
        let inbox = Inbox::default();
        network.start(COORDINATOR, Box::new(inbox.clone()));
        let schema = Schema::new(vec![TensorSpec::new("w", DType::F32, [PARAMETERS])]);
        Self {
            network,
            inbox,
            membership: Membership::new(COORDINATOR, Arc::clone(&job), known.collect()),
            schema: Arc::new(schema.expect("a schema")),
            tops: Vec::new(),
            starting: (0..job.workers.len())
                .map(|index| (Duration::ZERO, index))
                .collect(),
            last_id: COORDINATOR.0,
            model: (0..PARAMETERS).map(|at| at as f32 / 10.0).collect(),
            round: 0,
            running: false,
            died: BTreeSet::new(),
            deaths: 0,
            job,
        }
    }

    /// Runs the job; gives when it ended, and the model.
    fn run(&mut self, deaths: u32) -> (Duration, Vec<f32>) {
        let mut steps = 0;
        while self.round < self.job.rounds {
            steps += 1;
            assert!(
                steps < 20_000 * self.job.rounds,
                "round {} does not end",
                self.round + 1
            );
            self.start_due();
            self.hear();
            if !self.running {
                self.begin_round();
            }
            self.disturb(deaths);
            let went_on = self.network.step().expect("every worker goes on");
            let soonest = self.starting.iter().map(|(at, _)| *at).min();
            if !went_on && let Some(at) = soonest {
                // Nothing else happens before.
                self.starting
                    .iter_mut()
                    .filter(|(due, _)| *due == at)
                    .for_each(|start| start.0 = Duration::ZERO);
            } else {
                assert!(went_on || !self.running, "round {} hangs", self.round + 1);
            }
        }
        while self.network.step().expect("every worker goes on") {}
        for (id, worker) in self.network.workers() {
            assert!(worker.is_idle(), "{id} holds something, or waits for something");
        }
        (self.network.now(), self.model.clone())
    }

    /// Starts those whose time it is.
    fn start_due(&mut self) {
        let now = self.network.now();
        let starting = std::mem::take(&mut self.starting).into_iter();
        let (due, later): (Vec<_>, Vec<_>) = starting.partition(|(at, _)| *at <= now);
        self.starting = later;
        for (_, index) in due {
            self.start(index);
        }
    }

    /// A worker's process and registration, ready at once.
    fn start(&mut self, index: usize) {
        self.last_id += 1;
        let (id, job) = (WorkerId(self.last_id), Arc::clone(&self.job));
        let spec = &job.workers[index];
        let goals = job.workers.iter().any(|worker| worker.agg_goal.is_some());
        let slots = match spec.kind {
            Kind::Top if goals => 4,
            Kind::Top => 2,
            Kind::Aggregator | Kind::Trainer => 1,
        };
        let schema = Arc::clone(&self.schema);
        let arena = self
            .network
            .make_arena(arena_of(id), slots, &schema)
            .expect("memory");
        let worker: Box<dyn Worker> = match spec.share {
            Some(share) => {
                let (deltas, trainer) = (job.updates == UpdateKind::Deltas, Trainer::new(id, COORDINATOR));
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
                Box::new(LocalTrainer::new(
                    trainer,
                    spec.name.clone(),
                    schema,
                    arena,
                    Box::new(learn),
                ))
            }
            None => {
                let threads = Threads::new(1).expect("one thread");
                let top = (spec.kind == Kind::Top).then(|| Top {
                    optimizer: ServerOptimizer::new(Arc::clone(&schema), job.optimizer, job.updates),
                    state_arena: None,
                    quorum: job.quorum,
                    rounds: job.rounds,
                });
                let deepest = job.workers.iter().map(|worker| worker.level).max();
                let above_trainers = Some(spec.level + 1) == deepest;
                let rule = lifl_aggregate::rule(&job, &schema, &threads);
                let config = Config {
                    name: spec.name.clone(),
                    worker: id,
                    coordinator: COORDINATOR,
                    schema: Arc::clone(&schema),
                    goal: spec.agg_goal,
                    most_held: goals.then_some(u32::from(!above_trainers)),
                    via_gateway: false,
                    threads,
                };
                let aggregator = Aggregator::new(config, top, rule, arena).expect("a free slot");
                let (weights, round) = (self.model.clone(), self.round);
                let load = move |mut slot: WritableSlot, _| {
                    write_floats(&mut slot.bytes_mut()[image::data_offset(&schema)..], &weights);
                    let metadata = Metadata {
                        round,
                        ..Metadata::default()
                    };
                    LoadedModel {
                        slot,
                        metadata,
                        state: None,
                    }
                };
                Box::new(LocalAggregator::new(aggregator, Box::new(load)).expect("a good model"))
            }
        };
        self.network.start(id, worker);
        if spec.kind == Kind::Top {
            let arena = self.network.open_arena(arena_of(id)).expect("mapped");
            self.tops.push((id, arena.expect("it lives")));
        }
        assert_eq!(self.membership.joined(id, &spec.name), Some(index));
        assert_eq!(
            self.membership.ready(id),
            Some(index),
            "{} is there at once",
            spec.name
        );
        let frames = self.membership.succeeds(index);
        if self.running {
            self.send(frames);
        }
    }

    fn send(&mut self, frames: Vec<Frame>) {
        frames.into_iter().for_each(|frame| self.network.send(frame));
    }

    /// What the coordinator has heard: a round is decided by its first model; the dead are replaced.
    fn hear(&mut self) {
        let events = std::mem::take(&mut *self.inbox.0.borrow_mut());
        for event in events {
            match event {
                Event::Frame(frame)
                    if frame.kind == FrameKind::Model as u16 && frame.round == self.round + 1 =>
                {
                    self.check(&frame);
                    self.running = false;
                    self.network.send(Frame {
                        to: frame.from,
                        from: COORDINATOR,
                        kind: FrameKind::Release as u16,
                        ..frame
                    });
                }
                Event::PeerLost(dead) => {
                    let index = self.membership.left(dead).expect("it had a place");
                    if self.job.workers[index].kind == Kind::Trainer {
                        let frames = self.membership.vacated(index);
                        if self.running {
                            self.send(frames);
                        }
                    }
                    let takes = self.network.random().random_range(0..20);
                    self.starting
                        .push((self.network.now() + Duration::from_millis(takes), index));
                }
                _ => {}
            }
        }
    }

    fn begin_round(&mut self) {
        let membership = &mut self.membership;
        let awaited = membership.awaited(|spec| spec.kind != Kind::Trainer);
        let trainers = membership.awaited(|spec| spec.kind == Kind::Trainer);
        if awaited > 0 || (trainers > 0 && !self.network.random().random_bool(0.3)) {
            return;
        }
        let workers = &self.job.workers;
        let mut pairs = pair(workers, |index| membership.is_present(index));
        select(workers, &mut pairs, self.job.seed, self.round + 1);
        if membership.plan(self.round + 1, pairs) == 0 {
            return;
        }
        self.running = true;
        let alive: BTreeSet<WorkerId> = self.network.workers().map(|(id, _)| id).collect();
        let takes_part = |index: usize| {
            let id = self.membership.participant(index);
            id.is_some_and(|id| alive.contains(&id))
        };
        let away = (0..self.job.workers.len()).filter(|&index| !takes_part(index));
        self.died = away.filter_map(|index| self.job.workers[index].share).collect();
        let frames = self.membership.announce();
        self.send(frames);
    }

    /// Now and then a worker dies, or the round is announced again to all, as it stands.
    fn disturb(&mut self, deaths: u32) {
        let last = self.round + 1 >= self.job.rounds;
        let mut alive: Vec<WorkerId> = self.network.workers().map(|(id, _)| id).collect();
        alive.retain(|id| *id != COORDINATOR);
        let random = self.network.random();
        if self.deaths < deaths && !last && alive.len() > 2 && random.random_bool(0.02) {
            let &victim = alive.choose(random).expect("somebody");
            self.deaths += 1;
            self.died.extend(
                self.membership
                    .index(victim)
                    .and_then(|index| self.job.workers[index].share),
            );
            self.network.kill(victim);
        }
        if self.running && self.network.random().random_bool(0.002) {
            let indices = 0..self.job.workers.len();
            let frames = indices
                .flat_map(|index| self.membership.succeeds(index))
                .collect();
            self.send(frames);
        }
    }

    /// Holds a decided round's model against what it says is in it.
    fn check(&mut self, frame: &Frame) {
        let (_, top) = self.tops.iter().find(|(id, _)| *id == frame.from).expect("a top");
        let bytes = top.object(frame.key, frame.length).expect("there");
        let (metadata, offset) = image::check(bytes, &self.schema).expect("an image");
        let found = floats(&bytes[offset..][..self.schema.data_bytes()]);
        let round = frame.round;
        let changed = metadata.round == round;
        if changed {
            let (expected, samples) = self.reference(round, &metadata.cover);
            assert_eq!(metadata.samples, samples, "round {round}");
            for (found, expected) in found.iter().zip(&expected) {
                let off = (f64::from(*found) - expected).abs();
                assert!(off < 1e-6, "round {round}: {found} is not {expected}");
            }
        } else {
            assert_eq!(
                (frame.covers, &found),
                (0, &self.model),
                "round {round} changed nothing"
            );
        }
        let waits = self.job.workers.iter().all(|spec| spec.agg_goal.is_none());
        for share in self
            .job
            .workers
            .iter()
            .filter_map(|spec| spec.share)
            .filter(|_| waits)
        {
            let there = (changed && metadata.cover.contains(share)) || self.died.contains(&share);
            assert!(
                there,
                "round {round}: trainer {share} lived and is not in the model"
            );
        }
        self.model = found;
        self.round = round;
    }

    /// Flat FedAvg in double precision over those trainers.
    fn reference(&self, round: u32, cover: &Cover) -> (Vec<f64>, u64) {
        let (mut sum, mut total) = (vec![0.0; self.model.len()], 0);
        let shares = self.job.workers.iter().filter_map(|spec| spec.share);
        for share in shares.filter(|share| cover.contains(*share)) {
            total += samples(share);
            for (sum, value) in sum.iter_mut().zip(train(share, round, &self.model)) {
                *sum += f64::from(value) * samples(share) as f64;
            }
        }
        (sum.into_iter().map(|sum| sum / total as f64).collect(), total)
    }
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
        grace_time_s: 30.0,
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
    ) {
        let timing = if eager { Timing::Eager } else { Timing::Lazy };
        let updates = if deltas { UpdateKind::Deltas } else { UpdateKind::Weights };
        let training = Duration::from_millis(training);
        run(job(&levels, timing, updates, goals), Disturbance { seed, deaths, training });
    }
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
