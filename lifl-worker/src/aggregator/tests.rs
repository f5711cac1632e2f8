//! One aggregator, its inputs and outputs by hand.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use half::f16;
use lifl_aggregate::{Action, Input as Addend, WeightedMean};
use lifl_common::arena::{Layout, memfd};
use lifl_common::config::{Optimizer, Timing, UpdateKind};
use lifl_common::update::{Cover, DType, TensorSpec, UpdateInfo};

use super::*;
use crate::node_link::sending_order;

const COORDINATOR: WorkerId = WorkerId(1);
const PARENT: WorkerId = WorkerId(2);
const OWN: WorkerId = WorkerId(3);
const CHILDREN: [WorkerId; 3] = [WorkerId(4), WorkerId(5), WorkerId(6)];
const STRANGER: WorkerId = WorkerId(9);

/// A weighted mean that notes how many updates each call folds, and that finds fault with an update once, as if it had been
/// written meanwhile.
#[derive(Debug)]
struct Watched {
    mean: WeightedMean,
    calls: Arc<Mutex<Vec<usize>>>,
    changed_once: bool,
}

impl Watched {
    fn note(&mut self, inputs: usize) -> Result<(), FoldError> {
        self.calls.lock().expect("not poisoned").push(inputs);
        if std::mem::take(&mut self.changed_once) {
            return Err(FoldError::NotFinite { inputs: Vec::new() });
        }
        Ok(())
    }
}

impl Rule for Watched {
    fn action(&self, folded: usize, arrived: usize, complete: bool) -> Action {
        self.mean.action(folded, arrived, complete)
    }

    fn fold(&mut self, out: &mut [u8], inputs: &[Addend<'_>]) -> Result<(), FoldError> {
        self.note(inputs.len())?;
        self.mean.fold(out, inputs)
    }

    fn finish(&mut self, out: &mut [u8], inputs: &[Addend<'_>]) -> Result<u64, FoldError> {
        self.note(inputs.len())?;
        self.mean.finish(out, inputs)
    }

    fn reset(&mut self) {
        self.mean.reset();
    }

    fn samples(&self) -> u64 {
        self.mean.samples()
    }

    fn is_finite(&self, data: &[u8]) -> bool {
        self.mean.is_finite(data)
    }
}

/// What an aggregator in a [`Bench`] is.
#[derive(Clone, Copy)]
struct Setup {
    top: bool,
    timing: Timing,
    goal: Option<u32>,
    updates: UpdateKind,
    dtype: DType,
    /// Each element of the first model.
    model: f32,
    changed_once: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            top: false,
            timing: Timing::Lazy,
            goal: None,
            updates: UpdateKind::Weights,
            dtype: DType::F32,
            model: 0.0,
            changed_once: false,
        }
    }
}

/// An aggregator above three children, with everybody's arenas.
struct Bench {
    aggregator: Aggregator,
    model: f32,
    schema: Arc<Schema>,
    arenas: BTreeMap<ArenaId, (File, Layout)>,
    calls: Arc<Mutex<Vec<usize>>>,
}

fn arena(id: ArenaId, slots: u32, schema: &Schema) -> (OwnedArena, (File, Layout)) {
    let layout = Layout::for_objects(slots, image::image_bytes(schema) as u64).expect("a layout");
    let file = memfd::create("test", layout.memfd_bytes(false).expect("small"), false).expect("memfd");
    let arena = OwnedArena::new(&file, id, layout).expect("mapped");
    memfd::seal(file.as_fd()).expect("sealed");
    (arena, (file, layout))
}

fn arena_of(worker: WorkerId) -> ArenaId {
    ArenaId::of(worker, 0).expect("few workers")
}

impl Bench {
    fn new(setup: Setup) -> Self {
        let Setup {
            top,
            timing,
            goal,
            updates,
            dtype,
            model,
            changed_once,
        } = setup;
        let schema = Schema::new(vec![TensorSpec::new("w", dtype, [2])]);
        let schema = Arc::new(schema.expect("a schema"));
        let threads = Threads::new(1).expect("one thread");
        let calls = Arc::new(Mutex::new(Vec::new()));
        let rule = Watched {
            mean: WeightedMean::new(Arc::clone(&schema), updates, timing, threads.clone()),
            calls: Arc::clone(&calls),
            changed_once,
        };
        let config = Config {
            name: "leaf".to_owned(),
            worker: OWN,
            coordinator: COORDINATOR,
            schema: Arc::clone(&schema),
            goal,
            most_held: None,
            via_gateway: false,
            threads,
        };
        let top = top.then(|| Top {
            optimizer: ServerOptimizer::new(Arc::clone(&schema), Optimizer::FedAvg, updates),
            state_arena: None,
            quorum: 1,
            rounds: 10,
        });
        let (own, file) = arena(arena_of(OWN), 2, &schema);
        Self {
            aggregator: Aggregator::new(config, top, Box::new(rule), own).expect("a free slot"),
            model,
            schema,
            arenas: BTreeMap::from([(arena_of(OWN), file)]),
            calls,
        }
    }

    /// Gives inputs as one batch, answers what is asked for, and gives the frames.
    fn batch(&mut self, inputs: impl IntoIterator<Item = Input>) -> Vec<Frame> {
        let mut inputs: VecDeque<Input> = inputs.into_iter().collect();
        let (mut frames, mut now) = (Vec::new(), Duration::ZERO);
        loop {
            while let Some(output) = self.aggregator.poll_output() {
                match output {
                    Output::Send(frame) => frames.push(frame),
                    Output::OpenArena(arena) => {
                        let opened = self.arenas.get(&arena).map(|(file, layout)| {
                            PeerArena::new(file, arena, arena.owner(), *layout).expect("mapped")
                        });
                        let opened = Ok(opened.map(Arc::new));
                        inputs.push_front(Input::ArenaOpened { arena, opened });
                    }
                    Output::LoadModel { model: mut slot, .. } => {
                        self.fill(&mut slot, self.model);
                        let loaded = LoadedModel {
                            slot,
                            metadata: Metadata::default(),
                            state: None,
                        };
                        inputs.push_front(Input::ModelLoaded(Box::new(loaded)));
                    }
                    other => panic!("no gateway here: {other:?}"),
                }
            }
            let due = self.aggregator.timeout().map(|_| Input::Timeout);
            let Some(input) = inputs.pop_front().or(due) else {
                sending_order(&mut frames, COORDINATOR);
                return frames;
            };
            now += Duration::from_nanos(1);
            self.aggregator.handle(now, input).expect("handled");
        }
    }

    fn frames(&mut self, frames: &[Frame]) -> Vec<Frame> {
        self.batch(frames.iter().copied().map(Input::Frame))
    }

    /// Makes each element of an object that value.
    fn fill(&self, slot: &mut WritableSlot, value: f32) {
        let data = &mut slot.bytes_mut()[image::data_range(&self.schema)];
        match self.schema.regions()[0].dtype {
            DType::F16 => data.as_chunks_mut().0.fill(f16::from_f32(value).to_le_bytes()),
            _ => data.as_chunks_mut().0.fill(value.to_le_bytes()),
        }
    }

    /// A child's update of round 1, in its own arena.
    fn update(&mut self, child: usize, samples: u64, value: f32) -> Frame {
        let worker = CHILDREN[child];
        let (mut owned, file) = arena(arena_of(worker), 1, &self.schema);
        self.arenas.insert(arena_of(worker), file);
        let mut slot = owned.begin().expect("free");
        self.fill(&mut slot, value);
        let info = UpdateInfo {
            samples,
            cover: Cover::of(child as u32),
            made: vec![0],
            ..UpdateInfo::default()
        };
        let metadata = info.metadata("trainer", 1, slot.key().generation);
        image::write_header(slot.bytes_mut(), &self.schema, &metadata);
        let frame = info.frame(1, owned.publish(slot), &self.schema);
        Frame {
            to: OWN,
            from: worker,
            ..frame
        }
    }

    /// The aggregate, or model, that a frame lends.
    fn object(&self, frame: &Frame) -> (Metadata, Vec<f32>) {
        let (file, layout) = &self.arenas[&frame.key.arena];
        let peer = PeerArena::new(file, frame.key.arena, OWN, *layout).expect("mapped");
        let bytes = peer.object(frame.key, frame.length).expect("there");
        let (metadata, data) = image::check(bytes, &self.schema).expect("an image");
        let chunks = bytes[data].as_chunks::<4>().0.iter();
        (metadata, chunks.map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// The coordinator announces round 1: each child has up to 10 samples.
fn announced(parent: WorkerId) -> Vec<Frame> {
    let child = |(at, id): (usize, &WorkerId)| {
        let frame = Frame {
            kind: FrameKind::Child as u16,
            value: u64::from(id.0),
            samples: 10,
            ..Frame::default()
        };
        frame.with_cover_word(0, 1 << at)
    };
    let begin = Frame {
        kind: FrameKind::Begin as u16,
        value: u64::from(parent.0),
        covers: CHILDREN.len() as u32,
        ..Frame::default()
    };
    let frames = CHILDREN.iter().enumerate().map(child).chain([begin]);
    let from_coordinator = |frame| Frame {
        to: OWN,
        from: COORDINATOR,
        round: 1,
        ..frame
    };
    frames.map(from_coordinator).collect()
}

fn model_of(parent: WorkerId) -> Frame {
    Frame {
        to: OWN,
        from: parent,
        kind: FrameKind::Model as u16,
        round: 1,
        key: Key {
            arena: arena_of(parent),
            ..Key::default()
        },
        length: 64,
        ..Frame::default()
    }
}

fn of_kind(frames: &[Frame], kind: FrameKind) -> Vec<Frame> {
    let of_kind = frames.iter().filter(|frame| frame.kind == kind as u16);
    of_kind.copied().collect()
}

fn refusals(frames: &[Frame]) -> Vec<(WorkerId, Option<Refusal>)> {
    let refused = of_kind(frames, FrameKind::Refuse).into_iter();
    refused
        .map(|frame| (frame.to, Refusal::from_number(frame.refusal)))
        .collect()
}

/// A leaf whose round has begun.
fn folding(timing: Timing, changed_once: bool) -> Bench {
    let mut bench = Bench::new(Setup {
        timing,
        changed_once,
        ..Setup::default()
    });
    let mut frames = announced(PARENT);
    frames.push(model_of(PARENT));
    let sent = bench.frames(&frames);
    let models = of_kind(&sent, FrameKind::Model);
    assert_eq!(models.iter().map(|frame| frame.to).collect::<Vec<_>>(), CHILDREN);
    bench
}

#[test]
fn what_is_ready_at_once_is_folded_in_one_pass() {
    for timing in [Timing::Lazy, Timing::Eager] {
        let mut bench = folding(timing, false);
        let updates = [
            bench.update(0, 1, 1.0),
            bench.update(1, 2, 4.0),
            bench.update(2, 1, 3.0),
        ];
        let sent = bench.frames(&updates);
        assert_eq!(bench.calls.lock().expect("not poisoned")[0], 3);
        let aggregate = of_kind(&sent, FrameKind::Update);
        assert_eq!(
            (aggregate.len(), aggregate[0].to, aggregate[0].samples),
            (1, PARENT, 4)
        );
        let (metadata, values) = bench.object(&aggregate[0]);
        assert_eq!(values, [3.0, 3.0]);
        assert_eq!(
            (
                metadata.info.samples,
                metadata.info.folded,
                metadata.info.cover.count()
            ),
            (4, 3, 3)
        );
        let dated = metadata.info.made.last().is_some_and(|&made| made > 0);
        assert!(
            dated,
            "the aggregate is dated when it is made: {:?}",
            metadata.info.made
        );
        let release = Frame {
            to: OWN,
            from: PARENT,
            kind: FrameKind::Release as u16,
            key: aggregate[0].key,
            ..Frame::default()
        };
        let sent = bench.frames(&[release]);
        let told = of_kind(&sent, FrameKind::Release);
        assert_eq!(told.iter().map(|frame| frame.to).collect::<Vec<_>>(), CHILDREN);
    }
}

#[test]
fn the_coordinator_is_told_of_a_model_before_anybody_else_hears_of_the_round() {
    let mut bench = Bench::new(Setup {
        top: true,
        ..Setup::default()
    });
    bench.frames(&announced(WorkerId::NONE));
    let updates = [bench.update(1, 2, 4.0), bench.update(2, 1, 3.0)];
    let stranger = Frame {
        from: STRANGER,
        ..updates[0]
    };
    let nothing = Frame {
        to: OWN,
        from: CHILDREN[0],
        kind: FrameKind::Nothing as u16,
        round: 1,
        ..Frame::default()
    };
    let sent = bench.frames(&[stranger, updates[0], updates[1], nothing]);
    let model = of_kind(&sent, FrameKind::Model);
    assert_eq!((model.len(), model[0].to, model[0].covers), (1, COORDINATOR, 2));
    let first_other = sent.iter().position(|frame| frame.to != COORDINATOR);
    let last_coordinators = sent.iter().rposition(|frame| frame.to == COORDINATOR);
    assert!(last_coordinators < first_other, "{sent:?}");
    assert!(
        of_kind(&sent, FrameKind::Release).is_empty(),
        "that comes with the next round"
    );
}

#[test]
fn an_update_that_says_what_it_may_not_is_refused_by_name_and_the_others_count() {
    let mut bench = folding(Timing::Lazy, false);
    let honest = bench.update(2, 1, 3.0);
    let too_many = bench.update(0, 11, 1.0);
    let foreign = Frame {
        from: CHILDREN[1],
        ..honest
    };
    let sent = bench.frames(&[too_many, foreign, honest]);
    let refused = refusals(&sent);
    assert_eq!(
        refused,
        [
            (COORDINATOR, Some(Refusal::BadSamples)),
            (COORDINATOR, Some(Refusal::BadKey)),
            (CHILDREN[0], Some(Refusal::BadSamples)),
            (CHILDREN[1], Some(Refusal::BadKey)),
        ]
    );
    let aggregate = of_kind(&sent, FrameKind::Update);
    assert_eq!(bench.object(&aggregate[0]).1, [3.0, 3.0]);
}

#[test]
fn an_update_that_is_written_while_it_is_read_is_folded_from_a_copy() {
    let mut bench = folding(Timing::Lazy, true);
    let updates = [0, 1, 2].map(|child| bench.update(child, 1, child as f32));
    let sent = bench.frames(&updates);
    assert!(refusals(&sent).is_empty(), "{sent:?}");
    let calls = bench.calls.lock().expect("not poisoned").clone();
    assert_eq!(calls[..4], [3, 1, 1, 1], "all at once, then each from its copy");
    let aggregate = of_kind(&sent, FrameKind::Update);
    assert_eq!(bench.object(&aggregate[0]).1, [1.0, 1.0]);
}

#[test]
fn nobody_but_coordinator_and_parent_decides_anything() {
    let mut bench = Bench::new(Setup::default());
    let forged = |frame: Frame| Frame {
        from: STRANGER,
        ..frame
    };
    let frames: Vec<Frame> = announced(PARENT).into_iter().map(forged).collect();
    assert!(bench.frames(&frames).is_empty());
    assert!(
        bench.frames(&announced(PARENT)).is_empty(),
        "its model is not there"
    );
    let sent = bench.frames(&[forged(model_of(STRANGER))]);
    assert_eq!(
        of_kind(&sent, FrameKind::Release)[0].to,
        STRANGER,
        "it is given back"
    );
    let sent = bench.frames(&[model_of(PARENT)]);
    assert_eq!(of_kind(&sent, FrameKind::Model).len(), CHILDREN.len());
}

#[test]
fn of_one_workers_early_answers_a_few_are_kept() {
    let mut bench = Bench::new(Setup::default());
    let early = |round| Frame {
        to: OWN,
        from: STRANGER,
        kind: FrameKind::Update as u16,
        round,
        ..Frame::default()
    };
    let frames: Vec<Frame> = (1..100).map(early).collect();
    let refused = refusals(&bench.frames(&frames));
    assert!(refused.len() > 90, "{}", refused.len());
    assert!(refused.contains(&(STRANGER, Some(Refusal::NotExpected))));
}

#[test]
fn a_ping_is_answered_with_the_last_round_that_the_parent_has_an_answer_of() {
    let mut bench = folding(Timing::Lazy, false);
    let ping = Frame {
        to: OWN,
        from: COORDINATOR,
        kind: FrameKind::Ping as u16,
        ..Frame::default()
    };
    assert_eq!(of_kind(&bench.frames(&[ping]), FrameKind::Pong)[0].round, 0);
    let updates = [0, 1, 2].map(|child| bench.update(child, 1, 1.0));
    bench.frames(&updates);
    assert_eq!(of_kind(&bench.frames(&[ping]), FrameKind::Pong)[0].round, 1);
}

#[test]
fn the_same_model_in_two_rounds_is_two_loans() {
    let mut bench = folding(Timing::Lazy, false);
    let of_round = |frame: Frame, round| Frame { round, ..frame };
    let second = announced(PARENT).into_iter().chain([model_of(PARENT)]);
    let second: Vec<Frame> = second.map(|frame| of_round(frame, 2)).collect();
    bench.frames(&second);
    let back = |round| Frame {
        to: OWN,
        from: CHILDREN[0],
        kind: FrameKind::Release as u16,
        round,
        key: model_of(PARENT).key,
        ..Frame::default()
    };
    let nothing = |child| Frame {
        to: OWN,
        from: child,
        kind: FrameKind::Nothing as u16,
        round: 2,
        ..Frame::default()
    };
    let others = CHILDREN[1..]
        .iter()
        .flat_map(|&from| [1, 2].map(|round| Frame { from, ..back(round) }));
    let others: Vec<Frame> = others.chain(CHILDREN.map(nothing)).collect();
    bench.frames(&others);
    let given_back = |sent: &[Frame]| -> Vec<(WorkerId, u32)> {
        let back = of_kind(sent, FrameKind::Release).into_iter();
        back.map(|frame| (frame.to, frame.round)).collect()
    };
    assert_eq!(given_back(&bench.frames(&[back(1)])), [(PARENT, 1)]);
    assert_eq!(given_back(&bench.frames(&[back(2)])), [(PARENT, 2)]);
}

/// What each child hears of its update, as soon as the next round is announced.
fn verdicts(bench: &mut Bench, mut sent: Vec<Frame>) -> Vec<(WorkerId, Option<Refusal>)> {
    let next = announced(WorkerId::NONE)
        .into_iter()
        .map(|frame| Frame { round: 2, ..frame });
    sent.extend(bench.frames(&next.collect::<Vec<_>>()));
    let of_child = |frame: &&Frame| CHILDREN.contains(&frame.to) && frame.round == 1;
    let verdict = |frame: &Frame| {
        let refused = frame.kind == FrameKind::Refuse as u16;
        let refusal = refused.then(|| Refusal::from_number(frame.refusal).expect("a reason"));
        let told = refused || frame.kind == FrameKind::Release as u16;
        told.then_some((frame.to, refusal))
    };
    let mut verdicts: Vec<_> = sent.iter().filter(of_child).filter_map(verdict).collect();
    verdicts.sort_by_key(|(child, _)| *child);
    verdicts
}

/// A top that adds means to a model with which this update has no sum, whose round has begun.
fn close_to_overflow(timing: Timing, goal: Option<u32>) -> Bench {
    let mut bench = Bench::new(Setup {
        top: true,
        timing,
        goal,
        updates: UpdateKind::Deltas,
        dtype: DType::F16,
        model: 32_768.0,
        ..Setup::default()
    });
    bench.frames(&announced(WorkerId::NONE));
    bench
}

/// An update that is finite, and its sum with the model is not, if it has most of the samples: an `f16` is less than 65,520.
const OVERFLOWING: f32 = 49_152.0;

const BOTH: [Timing; 2] = [Timing::Lazy, Timing::Eager];

#[test]
fn with_a_goal_another_update_is_awaited_for_one_that_overflows() {
    for timing in BOTH {
        let mut bench = close_to_overflow(timing, Some(2));
        let [honest, overflowing] = [bench.update(0, 1, 3.0), bench.update(1, 9, OVERFLOWING)];
        let mut sent = bench.frames(&[honest, overflowing]);
        assert!(
            of_kind(&sent, FrameKind::Model).is_empty(),
            "one good update is not the goal"
        );
        let last = bench.update(2, 1, 5.0);
        let made = bench.frames(&[last]);
        let model = of_kind(&made, FrameKind::Model);
        assert_eq!((model.len(), model[0].covers, model[0].samples), (1, 2, 2));
        sent.extend(made);
        assert_eq!(
            verdicts(&mut bench, sent),
            [
                (CHILDREN[0], None),
                (CHILDREN[1], Some(Refusal::NotFinite)),
                (CHILDREN[2], None),
            ]
        );
    }
}

#[test]
fn what_comes_beside_an_update_that_overflows_counts_in_its_place_and_is_not_late() {
    for timing in BOTH {
        let mut bench = close_to_overflow(timing, Some(2));
        let (values, samples) = ([3.0, OVERFLOWING, 5.0], [1, 9, 1]);
        let updates = [0, 1, 2].map(|child| bench.update(child, samples[child], values[child]));
        let sent = bench.frames(&updates);
        let model = of_kind(&sent, FrameKind::Model);
        assert_eq!((model.len(), model[0].covers), (1, 2));
        assert_eq!(
            verdicts(&mut bench, sent),
            [
                (CHILDREN[0], None),
                (CHILDREN[1], Some(Refusal::NotFinite)),
                (CHILDREN[2], None),
            ]
        );
    }
}

#[test]
fn a_round_that_is_closed_waits_for_nobody_in_the_place_of_an_update_that_overflows() {
    for timing in BOTH {
        let mut bench = close_to_overflow(timing, Some(2));
        let close = Frame {
            to: OWN,
            from: COORDINATOR,
            kind: FrameKind::Close as u16,
            round: 1,
            ..Frame::default()
        };
        let [honest, overflowing] = [bench.update(0, 1, 3.0), bench.update(1, 9, OVERFLOWING)];
        let mut sent = bench.frames(&[honest, overflowing, close]);
        let model = of_kind(&sent, FrameKind::Model);
        assert_eq!((model.len(), model[0].covers), (1, 1));
        let late = bench.update(2, 1, 5.0);
        sent.extend(bench.frames(&[late]));
        assert_eq!(
            verdicts(&mut bench, sent),
            [
                (CHILDREN[0], None),
                (CHILDREN[1], Some(Refusal::NotFinite)),
                (CHILDREN[2], Some(Refusal::Late)),
            ]
        );
    }
}

#[test]
fn where_every_update_overflows_the_model_stays_and_each_hears_it_once() {
    for timing in BOTH {
        let mut bench = close_to_overflow(timing, None);
        let updates = [0, 1, 2].map(|child| bench.update(child, 1, OVERFLOWING));
        let sent = bench.frames(&updates);
        let model = of_kind(&sent, FrameKind::Model);
        assert_eq!((model.len(), model[0].covers), (1, 0), "the one before");
        let refused = CHILDREN.map(|child| (child, Some(Refusal::NotFinite)));
        assert_eq!(verdicts(&mut bench, sent), refused);
    }
}
