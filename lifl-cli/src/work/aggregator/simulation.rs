//! A whole tree in one thread: the aggregators, trainers and the coordinator's roster as they run, with workers that die at
//! any moment and are replaced, over a plane that delivers in any order in which a plane may:
//!
//! ```text
//!   worker ── posts ──▶ its stream ── carried one by one, some time ──▶ the receiver's inbox ── read, some time ──▶ receiver
//! ```
//!
//! What must hold, whatever happens: every round ends; its model is the sample-weighted mean of the updates that its cover
//! names; nobody's work is in it twice; nobody who lived through the round is missing; and when all is quiet, nobody still
//! waits for anything.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::fd::AsFd;
use std::rc::Rc;

use lifl_common::arena::{Layout, OwnedArena, PeerArena, memfd};
use lifl_common::config::{
    Brokers, Group, ModelSpec, Optimizer, SampleShape, Timing, TrainingSpec, Transport, UpdateKind,
    WorkerSpec,
};
use lifl_common::control::DeadLetter;
use lifl_common::id::ArenaId;
use lifl_common::update::{DType, Tensors};
use lifl_worker::coordinator::membership::Membership;
use lifl_worker::coordinator::pairing::{pair, select};
use proptest::prelude::*;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::memory;
use crate::task::Tasks;
use crate::work::trainer::{self, Lesson, TrainerProcess, learn_one};

const COORDINATOR: WorkerId = WorkerId(1);
const PARAMETERS: usize = 5;

/// The arenas that can be opened.
type Arenas = Rc<RefCell<HashMap<ArenaId, (File, WorkerId, Layout)>>>;

/// A worker's ground: what it posts is picked up by the network.
struct Ashore {
    id: WorkerId,
    arena: OwnedArena,
    outbox: Vec<Frame>,
    arenas: Arenas,
    mapped: HashMap<ArenaId, Arc<PeerArena>>,
}

impl Ashore {
    fn new(id: WorkerId, slots: u32, schema: &Schema, arenas: &Arenas) -> Self {
        let layout = Layout::for_objects(slots, memory::object_bytes(schema)).expect("a layout");
        let bytes = layout.memfd_bytes(false).expect("small");
        let file = memfd::create("simulated", bytes, false).expect("memfd");
        let arena = OwnedArena::new(&file, arena_of(id), layout).expect("mapped");
        memfd::seal(file.as_fd()).expect("sealed");
        arenas.borrow_mut().insert(arena_of(id), (file, id, layout));
        Self {
            id,
            arena,
            outbox: Vec::new(),
            arenas: Rc::clone(arenas),
            mapped: HashMap::new(),
        }
    }
}

impl Ashore {
    /// As a link does when it hears of a death.
    fn lost(&mut self, worker: WorkerId) {
        self.arena.take_back(worker);
        self.mapped.retain(|_, mapped| mapped.owner() != worker);
    }

    /// As a link sends what was posted.
    fn sent(&mut self) -> Vec<Frame> {
        self.order();
        std::mem::take(&mut self.outbox)
    }
}

impl Ground for Ashore {
    fn id(&self) -> WorkerId {
        self.id
    }

    fn coordinator(&self) -> WorkerId {
        COORDINATOR
    }

    fn arenas(&mut self) -> (&mut OwnedArena, Option<&mut OwnedArena>) {
        (&mut self.arena, None)
    }

    fn outbox(&mut self) -> &mut Vec<Frame> {
        &mut self.outbox
    }

    async fn peer(&mut self, arena: ArenaId) -> anyhow::Result<Option<Arc<PeerArena>>> {
        if let Some(mapped) = self.mapped.get(&arena) {
            return Ok(Some(Arc::clone(mapped)));
        }
        let arenas = self.arenas.borrow();
        let Some((file, owner, layout)) = arenas.get(&arena) else {
            return Ok(None);
        };
        let peer = Arc::new(PeerArena::new(file, arena, *owner, *layout)?);
        self.mapped.insert(arena, Arc::clone(&peer));
        Ok(Some(peer))
    }

    async fn own(&mut self) -> anyhow::Result<Arc<PeerArena>> {
        unreachable!("nobody here has a wire")
    }
}

enum Node {
    Aggregator(Box<Aggregator<Ashore>>),
    /// With the lesson that it is learning.
    Trainer(Box<TrainerProcess<Ashore>>, Option<Lesson>),
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
enum Step {
    Carry(WorkerId),
    Read(WorkerId),
    Tell(WorkerId),
    Learn(WorkerId),
    Start(usize),
    Hear,
}

struct World {
    random: ChaCha8Rng,
    job: JobSpec,
    schema: Schema,
    arenas: Arenas,
    nodes: BTreeMap<WorkerId, (usize, Node)>,
    /// Frames that a worker has sent and that are not there yet.
    streams: BTreeMap<WorkerId, VecDeque<Frame>>,
    /// Frames that are there and not read.
    inboxes: BTreeMap<WorkerId, VecDeque<Frame>>,
    /// News from the daemon: deaths, and frames that were not delivered.
    news: BTreeMap<WorkerId, VecDeque<Incoming>>,
    /// Deaths that the coordinator has not heard of.
    obituaries: VecDeque<WorkerId>,
    /// Places for which a successor is to be started.
    vacant: Vec<usize>,
    last_id: u32,
    /// The last model that was decided on, and its round.
    model: Vec<f32>,
    round: u32,
    /// Trainers that died in the round that runs, by share.
    died: HashSet<u32>,
    deaths: u32,
}

impl World {
    async fn new(job: JobSpec, seed: u64) -> Self {
        let schema = lifl_learn::schema(&job.model).expect("a schema");
        let mut model = vec![0; schema.data_bytes()];
        lifl_learn::initial(&job.model, job.seed, TensorsMut::new(&schema, &mut model));
        let mut world = Self {
            random: ChaCha8Rng::seed_from_u64(seed),
            schema,
            arenas: Arenas::default(),
            nodes: BTreeMap::new(),
            streams: BTreeMap::new(),
            inboxes: BTreeMap::new(),
            news: BTreeMap::new(),
            obituaries: VecDeque::new(),
            vacant: (0..job.workers.len()).collect(),
            job,
            last_id: COORDINATOR.0,
            model: floats(&model),
            round: 0,
            died: HashSet::new(),
            deaths: 0,
        };
        world.vacant.reverse();
        world
    }

    /// A worker's process and registration, ready at once.
    async fn start(&mut self, index: usize, roster: &mut Membership) -> Vec<Frame> {
        self.last_id += 1;
        let id = WorkerId(self.last_id);
        let spec = self.job.workers[index].clone();
        let task = Tasks::of(&self.job).task(&spec);
        let ground = Ashore::new(id, task.slots, &self.schema, &self.arenas);
        let threads = Threads::new(1).expect("one thread");
        let schema = self.schema.clone();
        let node = match spec.share {
            Some(share) => {
                let learner = lifl_learn::for_trainer(&task.job, &spec, task.part).expect("a learner");
                let shared = trainer::Shared {
                    name: spec.name.clone(),
                    cover: Cover::of(share),
                    updates: task.job.updates,
                    schema,
                    threads,
                };
                Node::Trainer(Box::new(TrainerProcess::new(ground, shared, learner)), None)
            }
            None => {
                let top = spec.kind == Kind::Top;
                let mut aggregator = Aggregator::new(ground, Up::Plane, threads, task, schema);
                if top {
                    self.begin_from_model(&mut aggregator);
                }
                Node::Aggregator(Box::new(aggregator))
            }
        };
        self.nodes.insert(id, (index, node));
        assert_eq!(roster.joined(id, &spec.name), Some(index));
        assert_eq!(roster.ready(id), Some(index), "{} is there at once", spec.name);
        roster.succeeds(index)
    }

    /// What a top's successor starts with.
    fn begin_from_model(&self, top: &mut Aggregator<Ashore>) {
        let mut slot = top.ground.arena.begin().expect("free");
        let offset = image::data_offset(&self.schema);
        let data = &mut slot.bytes_mut()[offset..][..self.schema.data_bytes()];
        for (place, value) in data.chunks_exact_mut(4).zip(&self.model) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        let metadata = Metadata {
            round: self.round,
            generation: slot.key().generation,
            ..Metadata::default()
        };
        image::write_header(slot.bytes_mut(), &self.schema, &metadata);
        let key = top.ground.arena.publish(slot);
        top.current = Some(top.own(key));
    }

    /// A worker sends frames.
    fn send(&mut self, frames: Vec<Frame>) {
        for frame in frames {
            self.streams.entry(frame.from).or_default().push_back(frame);
        }
    }

    /// The next frame that a worker has sent arrives; those to nobody come back.
    fn carry(&mut self, from: WorkerId) {
        let Some(frame) = self.streams.get_mut(&from).and_then(VecDeque::pop_front) else {
            return;
        };
        if frame.to == COORDINATOR || self.nodes.contains_key(&frame.to) {
            self.inboxes.entry(frame.to).or_default().push_back(frame);
        } else if self.nodes.contains_key(&from) {
            let letter = DeadLetter {
                to: frame.to,
                to_name: None,
                kind: frame.kind,
                round: frame.round,
                key: frame.key,
                refusal: Refusal::WorkerGone,
            };
            let news = self.news.entry(from).or_default();
            news.push_back(Incoming::Undelivered(letter));
        }
    }

    /// A worker dies: what it was sent is lost, its arena can be opened no more, everybody will hear of it. Of what it has
    /// sent, some may be lost too.
    fn kill(&mut self, id: WorkerId) {
        let (index, _) = self.nodes.remove(&id).expect("alive");
        self.died.extend(self.job.workers[index].share);
        self.deaths += 1;
        self.arenas.borrow_mut().remove(&arena_of(id));
        self.inboxes.remove(&id);
        self.news.remove(&id);
        let sent = self.streams.get(&id).map_or(0, VecDeque::len);
        for _ in 0..self.random.random_range(0..=sent) {
            self.carry(id);
        }
        self.streams.remove(&id);
        for other in self.nodes.keys() {
            self.news.entry(*other).or_default().push_back(Incoming::Lost(id));
        }
        self.obituaries.push_back(id);
    }

    fn steps(&self, waiting_for_places: bool) -> Vec<Step> {
        let streams = self.streams.iter().filter(|(_, frames)| !frames.is_empty());
        let mut steps: Vec<Step> = streams.map(|(&from, _)| Step::Carry(from)).collect();
        let inboxes = self
            .inboxes
            .iter()
            .filter(|(to, frames)| **to != COORDINATOR && !frames.is_empty());
        steps.extend(inboxes.map(|(&to, _)| Step::Read(to)));
        let news = self.news.iter().filter(|(_, news)| !news.is_empty());
        steps.extend(news.map(|(&id, _)| Step::Tell(id)));
        let learning = self
            .nodes
            .iter()
            .filter(|(_, (_, node))| matches!(node, Node::Trainer(_, Some(_))));
        steps.extend(learning.map(|(&id, _)| Step::Learn(id)));
        steps.extend(self.vacant.iter().map(|&index| Step::Start(index)));
        if !self.obituaries.is_empty() || (waiting_for_places && steps.is_empty()) {
            steps.push(Step::Hear);
        }
        steps
    }

    async fn deal(&mut self, id: WorkerId, incoming: Incoming) {
        let (_, node) = self.nodes.get_mut(&id).expect("alive");
        let frames = match node {
            Node::Aggregator(aggregator) => {
                if let Incoming::Lost(lost) = &incoming {
                    aggregator.ground.lost(*lost);
                }
                aggregator.take(incoming).await.expect("dealt with");
                aggregator.advance().await.expect("gone on");
                aggregator.ground.sent()
            }
            Node::Trainer(trainer, lesson) => {
                if let Incoming::Lost(lost) = &incoming {
                    trainer.ground.lost(*lost);
                }
                trainer.take(incoming);
                if let Some(next) = trainer.advance().await.expect("gone on") {
                    assert!(lesson.replace(next).is_none(), "two lessons at once");
                }
                trainer.ground.sent()
            }
        };
        self.send(frames);
    }

    async fn learn(&mut self, id: WorkerId) {
        let (_, node) = self.nodes.get_mut(&id).expect("alive");
        let Node::Trainer(trainer, lesson) = node else {
            unreachable!("only trainers learn")
        };
        let learned = learn_one(&trainer.shared, lesson.take().expect("a lesson"));
        trainer.deliver(learned);
        if let Some(next) = trainer.advance().await.expect("gone on") {
            *lesson = Some(next);
        }
        let frames = trainer.ground.sent();
        self.send(frames);
    }

    /// Reads the coordinator's inbox; the first model of the round that runs decides it.
    fn decision(&mut self) -> Option<Frame> {
        let frames = self.inboxes.remove(&COORDINATOR).unwrap_or_default();
        let decides = |frame: &Frame| frame.kind == FrameKind::Model as u16 && frame.round == self.round + 1;
        frames.into_iter().find(decides)
    }

    async fn read(&mut self, id: WorkerId) {
        let frame = self
            .inboxes
            .get_mut(&id)
            .and_then(VecDeque::pop_front)
            .expect("a frame");
        let kind = FrameKind::from_number(frame.kind).expect("a kind");
        self.deal(id, Incoming::Frame(kind, frame)).await;
    }

    async fn tell(&mut self, id: WorkerId) {
        let news = self
            .news
            .get_mut(&id)
            .and_then(VecDeque::pop_front)
            .expect("news");
        self.deal(id, news).await;
    }

    /// Holds a decided round's model against what it says is in it.
    fn check(&mut self, frame: &Frame, top: &PeerArena) {
        let bytes = top.object(frame.key, frame.length).expect("there");
        let (metadata, offset) = image::check(bytes, &self.schema).expect("an image");
        let found = floats(&bytes[offset..][..self.schema.data_bytes()]);
        let round = frame.round;
        if metadata.round != round {
            assert_eq!(
                (frame.covers, &found),
                (0, &self.model),
                "round {round} changed nothing"
            );
        } else {
            let (expected, samples) = self.reference(round, &metadata.cover);
            assert_eq!(metadata.samples, samples, "round {round}");
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-6,
                    "round {round}: {found} is not {expected}"
                );
            }
        }
        let cover = if metadata.round == round {
            metadata.cover
        } else {
            Cover::default()
        };
        let workers = &self.job.workers;
        for share in workers.iter().filter_map(|spec| spec.share) {
            let missing = !cover.contains(share) && !self.died.contains(&share);
            assert!(
                !missing,
                "round {round}: trainer {share} lived and is not in the model"
            );
        }
        self.model = found;
        self.round = round;
    }

    /// Flat FedAvg in double precision over those trainers.
    fn reference(&self, round: u32, cover: &Cover) -> (Vec<f64>, u64) {
        let (mut sum, mut samples) = (vec![0.0; self.model.len()], 0);
        let model: Vec<u8> = self.model.iter().flat_map(|value| value.to_le_bytes()).collect();
        for trainer in self.job.trainers() {
            if !trainer.share.is_some_and(|share| cover.contains(share)) {
                continue;
            }
            let part = self.job.part_of(trainer);
            let mut learner = lifl_learn::for_trainer(&self.job, trainer, part).expect("a learner");
            let mut update = vec![0; self.schema.data_bytes()];
            let out = TensorsMut::new(&self.schema, &mut update);
            let trained = learner
                .train(round, Tensors::new(&self.schema, &model), out)
                .expect("trained");
            samples += trained.samples;
            for (sum, value) in sum.iter_mut().zip(floats(&update)) {
                *sum += f64::from(value) * trained.samples as f64;
            }
        }
        (sum.into_iter().map(|sum| sum / samples as f64).collect(), samples)
    }
}

fn arena_of(id: WorkerId) -> ArenaId {
    ArenaId::of(id, 0).expect("not so many workers")
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

/// Runs a job of `rounds` rounds in which `deaths` workers die, and an undisturbed round more.
async fn live(mut job: JobSpec, seed: u64, deaths: u32, rounds: u32) {
    let last = rounds + 1;
    job.rounds = last;
    let workers = job.workers.clone();
    let samples = lifl_learn::known(&job).expect("synthetic").samples;
    let mut roster = Membership::new(COORDINATOR, Arc::new(job.clone()), samples);
    let mut world = World::new(job, seed).await;
    let mut tops: Vec<(WorkerId, Arc<PeerArena>)> = Vec::new();
    let mut running = false;
    let mut steps = 0;
    loop {
        steps += 1;
        assert!(steps < 20_000 * last, "round {} does not end", world.round + 1);
        if let Some(frame) = world.decision() {
            let (_, arena) = tops.iter().find(|(id, _)| *id == frame.from).expect("a top");
            world.check(&frame, &Arc::clone(arena));
            let back = Frame {
                to: frame.from,
                from: COORDINATOR,
                kind: FrameKind::Release as u16,
                ..frame
            };
            world.send(vec![back]);
            running = false;
            if world.round == last {
                break;
            }
        }
        let aggregators = roster.awaited(|spec| spec.kind != Kind::Trainer);
        let trainers = roster.awaited(|spec| spec.kind == Kind::Trainer);
        if !running && world.obituaries.is_empty() && aggregators == 0 {
            let mut pairs = pair(&workers, |index| roster.is_present(index));
            select(&workers, &mut pairs, world.job.seed, world.round + 1);
            let there = roster.plan(world.round + 1, pairs);
            if there > 0 && (trainers == 0 || world.random.random_bool(0.3)) {
                running = true;
                let present: HashSet<usize> = roster.trainers().collect();
                let share = |index: usize| world.job.workers[index].share;
                world.died = (0..workers.len())
                    .filter(|index| !present.contains(index))
                    .filter_map(share)
                    .collect();
                let frames = roster.announce();
                world.send(frames);
            }
        }
        let may_die = world.deaths < deaths && world.round < rounds && world.nodes.len() > 2;
        if may_die && world.random.random_bool(0.02) {
            let alive: Vec<WorkerId> = world.nodes.keys().copied().collect();
            let victim = *alive.choose(&mut world.random).expect("somebody");
            world.kill(victim);
        }
        if running && world.random.random_bool(0.01) {
            // The round is announced again to all, as it stands.
            let frames = (0..workers.len())
                .flat_map(|index| roster.succeeds(index))
                .collect();
            world.send(frames);
        }
        let possible = world.steps(!running);
        let Some(&step) = possible.choose(&mut world.random) else {
            panic!("round {} hangs", world.round + 1);
        };
        match step {
            Step::Carry(from) => world.carry(from),
            Step::Read(id) => world.read(id).await,
            Step::Tell(id) => world.tell(id).await,
            Step::Learn(id) => world.learn(id).await,
            Step::Start(index) => {
                world.vacant.retain(|&vacant| vacant != index);
                let frames = world.start(index, &mut roster).await;
                if world.job.workers[index].kind == Kind::Top {
                    let id = WorkerId(world.last_id);
                    let (file, owner, layout) = &world.arenas.borrow()[&arena_of(id)];
                    let arena = PeerArena::new(file, arena_of(id), *owner, *layout).expect("mapped");
                    tops.push((id, Arc::new(arena)));
                }
                world.send(if running { frames } else { Vec::new() });
            }
            Step::Hear => {
                let Some(dead) = world.obituaries.pop_front() else {
                    continue;
                };
                // What the dead said before is heard before: `decision` has been asked.
                let index = roster.left(dead).expect("it had a seat");
                if world.job.workers[index].kind == Kind::Trainer {
                    let frames = roster.vacated(index);
                    world.send(if running { frames } else { Vec::new() });
                }
                world.vacant.push(index);
            }
        }
    }
    quiet(&mut world).await;
}

/// When all frames have been read, nobody holds anything any more but the model.
async fn quiet(world: &mut World) {
    loop {
        let mut possible = world.steps(false);
        possible.retain(|step| !matches!(step, Step::Start(_) | Step::Hear));
        match possible.first() {
            Some(&Step::Carry(from)) => world.carry(from),
            Some(&Step::Read(id)) => world.read(id).await,
            Some(&Step::Tell(id)) => world.tell(id).await,
            Some(&Step::Learn(id)) => world.learn(id).await,
            _ => break,
        }
    }
    for (index, node) in world.nodes.values_mut() {
        let name = &world.job.workers[*index].name;
        match node {
            Node::Trainer(trainer, _) => assert!(
                trainer.protocol.update().is_none(),
                "{name} still lends its update"
            ),
            Node::Aggregator(aggregator) => {
                assert!(aggregator.models.is_empty(), "{name} waits for a model");
                assert!(
                    aggregator.sent.iter().all(|sent| sent.verdict.is_some()),
                    "{name} waits for a verdict"
                );
                assert!(
                    aggregator.ground.arena.begin().is_some(),
                    "{name} has no free slot"
                );
            }
        }
    }
}

fn job(levels: &[u32], timing: Timing, updates: UpdateKind) -> JobSpec {
    let mut workers = Vec::new();
    let group = |level: usize| {
        Some(Group {
            channel: format!("channel-{level}"),
            group: "default".to_owned(),
        })
    };
    let deepest = levels.len() - 1;
    for (level, &count) in levels.iter().enumerate() {
        for number in 0..count {
            let kind = match level {
                0 => Kind::Top,
                level if level == deepest => Kind::Trainer,
                _ => Kind::Aggregator,
            };
            workers.push(WorkerSpec {
                name: format!("worker-{level}-{number}"),
                role: format!("role-{level}"),
                task_id: None,
                kind,
                level: level as u32,
                up: if level == 0 { None } else { group(level - 1) },
                down: if level == deepest { None } else { group(level) },
                transport: Transport::Shm,
                agg_goal: None,
                select: None,
                share: (level == deepest).then_some(number),
                dataset: None,
            });
        }
    }
    JobSpec {
        id: "simulated".to_owned(),
        name: "simulated".to_owned(),
        rounds: 1,
        seed: 7,
        timing,
        updates,
        workers,
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

fn block_on(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(future);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_and_nothing_counts_twice(
        seed in any::<u64>(),
        levels in prop_oneof![
            Just(vec![1, 3]), Just(vec![1, 2, 4]), Just(vec![1, 3, 7]), Just(vec![1, 2, 4, 8]), Just(vec![1, 1, 2, 5])
        ],
        deaths in 0_u32..12,
        eager in any::<bool>(),
        deltas in any::<bool>(),
    ) {
        let timing = if eager { Timing::Eager } else { Timing::Lazy };
        let updates = if deltas { UpdateKind::Deltas } else { UpdateKind::Weights };
        block_on(live(job(&levels, timing, updates), seed, deaths, 4));
    }
}

#[test]
fn many_deaths_in_a_deep_tree() {
    block_on(live(
        job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights),
        1,
        200,
        60,
    ));
}

#[test]
fn covers_of_more_trainers_than_one_word_names_are_told_whole() {
    let mut job = job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights);
    for share in job.workers.iter_mut().filter_map(|worker| worker.share.as_mut()) {
        *share *= 40;
    }
    block_on(live(job, 5, 20, 10));
}
