//! An aggregator among children that send it what they should not: each is refused by name, and the round goes on. And a whole
//! run to which a stranger sends every kind of frame: nothing comes of it.
//!
//! In the former the test is the coordinator and the trainers; the top is the real process.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lifl_cli::task::Tasks;
use lifl_common::arena::{Layout, OwnedArena};
use lifl_common::client::{Client, FrameSocket};
use lifl_common::config::{self, Overrides};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, Generation, JobId, Key, WorkerId};
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo, image};
use lifl_daemon::plane::Request;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Options};
use tokio_util::sync::CancellationToken;

use crate::support::{self, Job, Place, can_have};

const TRAINERS: u32 = 3;
const PARAMETERS: usize = 1000;

/// What each trainer has, as the coordinator says.
const MOST_SAMPLES: u64 = 1000;

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), what)
        .await
        .expect("in time")
}

/// A worker that the test plays.
struct Actor {
    client: Client,
    frames: FrameSocket,
    id: WorkerId,
    arena: Option<OwnedArena>,
    /// What it has published.
    made: Vec<Key>,
}

impl Actor {
    async fn join(node: &Daemon, job: JobId, role: &str, name: &str) -> Self {
        let mut client = Client::connect(node.socket()).await.expect("connected");
        let registration = client.register(job, role, name).await.expect("registered");
        let layout = Layout::for_objects(1, 1 << 16).expect("a layout");
        let arena = client.create_arena(layout).await.expect("an arena").arena;
        Self {
            client,
            frames: registration.frames,
            id: registration.worker,
            arena: Some(arena),
            made: Vec::new(),
        }
    }

    async fn send(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) {
        let frame = Frame {
            to,
            from: self.id,
            kind: kind as u16,
            ..frame
        };
        within(self.frames.send(&[frame])).await.expect("sent");
    }

    async fn expect(&mut self, kind: FrameKind) -> Frame {
        let mut frame = within(self.frames.recv()).await.expect("read").expect("open");
        // The coordinator is told of refusals, between other things.
        while self.arena.is_none() && frame.kind == FrameKind::Refuse as u16 && kind != FrameKind::Refuse {
            frame = within(self.frames.recv()).await.expect("read").expect("open");
        }
        assert_eq!(FrameKind::from_number(frame.kind), Some(kind), "{frame:?}");
        frame
    }

    /// Writes an update of that schema, all elements of that value, and gives the frame that lends it.
    fn update(&mut self, schema: &Schema, round: u32, value: f32, samples: u64) -> Frame {
        let cover = Cover::of(self.id.0);
        self.update_of(schema, round, value, samples, cover)
    }

    /// The same, said to be the work of those trainers.
    fn update_of(&mut self, schema: &Schema, round: u32, value: f32, samples: u64, cover: Cover) -> Frame {
        let covers = cover.count();
        let arena = self.arena.as_mut().expect("an arena");
        self.made.retain(|&key| !arena.free(key));
        let mut slot = arena.begin().expect("free");
        for element in slot.bytes_mut()[image::data_range(schema)].chunks_exact_mut(4) {
            element.copy_from_slice(&value.to_le_bytes());
        }
        let generation = slot.key().generation;
        let metadata = Metadata {
            round,
            generation,
            maker: String::new(),
            info: UpdateInfo {
                samples,
                cover,
                // What cannot be is not added up.
                folded: u64::MAX,
                bytes_copied: u64::MAX,
                loss: Some(f64::MAX),
                made: Vec::new(),
            },
        };
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = arena.publish(slot);
        self.made.push(key);
        Frame {
            round,
            key,
            length: image::image_bytes(schema) as u64,
            samples,
            covers,
            ..Frame::default()
        }
    }

    async fn expect_refusal(&mut self, refusal: Refusal) {
        let frame = self.expect(FrameKind::Refuse).await;
        assert_eq!(Refusal::from_number(frame.refusal), Some(refusal));
    }
}

/// A daemon, the real top, the test's coordinator and trainers.
struct Stage {
    node: Daemon,
    top: Child,
    top_id: WorkerId,
    coordinator: Actor,
    trainers: Vec<Actor>,
    /// Those of them whose updates were taken, which they hear with the next round's model.
    taken: Vec<usize>,
    schema: Schema,
    place: Place,
}

impl Stage {
    async fn set(plane: &str, timing: &str, rounds: u32, goal: Option<u32>) -> Self {
        let mut job = Job::synthetic(&[1, TRAINERS], PARAMETERS as u64, "F32").with("timing", timing);
        job.rounds = rounds;
        let mut file = job.file();
        file["hyperparameters"]["aggGoal"] = serde_json::json!(goal);
        let place = Place::new(&file);
        let spec = config::load(std::slice::from_ref(&place.job), &Overrides::default())
            .expect("a job")
            .job;
        std::fs::create_dir(place.run()).expect("made");
        Tasks::of(&spec).write(&place.run()).expect("written");
        let options = Options {
            socket: place.folder.path().join("lifl.sock"),
            socket_mode: 0o600,
            socket_group: None,
            plane: if plane == "relay" {
                Request::Relay
            } else {
                Request::Sockmap
            },
            pool_bytes: 1 << 20,
            huge_pages: HugePages::Never,
            max_workers: 8,
            pin: None,
            grace: Duration::ZERO,
            flame: None,
            gateway: GatewayOptions::default(),
        };
        let node = Daemon::start(options, CancellationToken::new()).expect("a daemon");
        let mut client = Client::connect(node.socket()).await.expect("connected");
        let job_id = client.create_job("hostile").await.expect("made");
        let registration = client
            .register(job_id, "coordinator", "coordinator")
            .await
            .expect("registered");
        let mut coordinator = Actor {
            client,
            frames: registration.frames,
            id: registration.worker,
            arena: None,
            made: Vec::new(),
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifl"));
        command.args([
            "worker",
            "--name",
            "top-aggregator-1",
            "--job",
            &job_id.0.to_string(),
        ]);
        command
            .arg("--socket")
            .arg(node.socket())
            .arg("--run")
            .arg(place.run());
        let top = command
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("started");
        let top_id = coordinator.expect(FrameKind::Ready).await.from;
        let mut trainers = Vec::new();
        for n in 1..=TRAINERS {
            trainers.push(Actor::join(&node, job_id, "trainer", &format!("trainer-{n}")).await);
        }
        let schema = lifl_learn::schema(&spec.model).expect("a schema");
        Self {
            node,
            top,
            top_id,
            coordinator,
            trainers,
            taken: Vec::new(),
            schema,
            place,
        }
    }

    /// Says how a round stands: who its children are, 0 for who is not waited for.
    async fn announce(&mut self, round: u32, children: &[WorkerId]) {
        for child in children {
            let child = Frame {
                round,
                value: u64::from(child.0),
                samples: MOST_SAMPLES,
                ..Frame::default()
            };
            let child = child.with_cover_word(0, 1 << child.value);
            self.coordinator.send(self.top_id, FrameKind::Child, child).await;
        }
        let begin = Frame {
            round,
            covers: TRAINERS,
            ..Frame::default()
        };
        self.coordinator.send(self.top_id, FrameKind::Begin, begin).await;
    }

    /// Begins a round with all trainers; each is lent the model and gives it back.
    async fn begin(&mut self, round: u32) {
        let children: Vec<WorkerId> = self.trainers.iter().map(|trainer| trainer.id).collect();
        self.announce(round, &children).await;
        let taken = std::mem::take(&mut self.taken);
        for (n, trainer) in self.trainers.iter_mut().enumerate() {
            if taken.contains(&n) {
                trainer.expect(FrameKind::Release).await;
            }
            let model = trainer.expect(FrameKind::Model).await;
            let back = Frame {
                round,
                key: model.key,
                ..Frame::default()
            };
            trainer.send(self.top_id, FrameKind::Release, back).await;
        }
    }

    /// The round's model: whose updates it has, and its first element.
    async fn result(&mut self) -> (u32, u64, f32) {
        let frame = self.coordinator.expect(FrameKind::Model).await;
        let arena = self
            .coordinator
            .client
            .open_arena(frame.key.arena)
            .await
            .expect("the top's");
        let bytes = arena.object(frame.key, frame.length).expect("in bounds");
        let (_, data) = image::check(bytes, &self.schema).expect("a model");
        let first = f32::from_le_bytes(bytes[data][..4].try_into().expect("four"));
        let back = Frame {
            round: frame.round,
            key: frame.key,
            ..Frame::default()
        };
        self.coordinator.send(self.top_id, FrameKind::Release, back).await;
        (frame.covers, frame.samples, first)
    }

    async fn leave(mut self) {
        self.coordinator.client.end_job("over").await.expect("its own");
        let status = tokio::task::spawn_blocking(move || self.top.wait());
        assert!(
            within(status)
                .await
                .expect("no panic")
                .expect("a child")
                .success()
        );
        drop((self.coordinator, self.trainers));
        self.node.stop().await.expect("stopped");
        drop(self.place);
    }
}

async fn children_that_misbehave(plane: &str, timing: &str) {
    if !can_have(plane) {
        return;
    }
    let mut stage = Stage::set(plane, timing, 5, None).await;
    let schema = stage.schema.clone();
    let top = stage.top_id;

    // Round 1: one good, one with NaN, one of another shape.
    stage.begin(1).await;
    let good = stage.trainers[0].update(&schema, 1, 3.0, 10);
    stage.trainers[0].send(top, FrameKind::Update, good).await;
    let nan = stage.trainers[1].update(&schema, 1, f32::NAN, 20);
    stage.trainers[1].send(top, FrameKind::Update, nan).await;
    let other = Schema::new(vec![TensorSpec::new("parameters", DType::F32, [10, 10])]).expect("a schema");
    let shaped = stage.trainers[2].update(&other, 1, 1.0, 30);
    stage.trainers[2].send(top, FrameKind::Update, shaped).await;
    stage.trainers[2].expect_refusal(Refusal::WrongShape).await;
    stage.trainers[1].expect_refusal(Refusal::NotFinite).await;
    assert_eq!(stage.result().await, (1, 10, 3.0));
    stage.taken = vec![0];

    // Round 2: an arena that is not there, samples of nobody, and then the good one, twice.
    stage.begin(2).await;
    let nowhere = Key {
        arena: ArenaId(999),
        slot: 0,
        generation: Generation(1),
    };
    let lost = Frame {
        round: 2,
        key: nowhere,
        length: 64,
        samples: 5,
        covers: 1,
        ..Frame::default()
    };
    stage.trainers[0].send(top, FrameKind::Update, lost).await;
    stage.trainers[0].expect_refusal(Refusal::BadKey).await;
    let mut empty = stage.trainers[1].update(&schema, 2, 1.0, 20);
    empty.samples = 0;
    stage.trainers[1].send(top, FrameKind::Update, empty).await;
    stage.trainers[1].expect_refusal(Refusal::BadSamples).await;
    // A second try of one that was refused comes too late.
    let again = stage.trainers[1].update(&schema, 2, 1.0, 20);
    stage.trainers[1].send(top, FrameKind::Update, again).await;
    stage.trainers[1].expect_refusal(Refusal::NotExpected).await;
    let good = stage.trainers[2].update(&schema, 2, -7.0, 30);
    stage.trainers[2].send(top, FrameKind::Update, good).await;
    assert_eq!(stage.result().await, (1, 30, -7.0));
    stage.taken = vec![2];

    // Round 3: a key that points out of its arena, a stale generation, and nothing: the model stays.
    stage.begin(3).await;
    let mut outside = stage.trainers[0].update(&schema, 3, 1.0, 10);
    outside.length = 1 << 40;
    stage.trainers[0].send(top, FrameKind::Update, outside).await;
    stage.trainers[0].expect_refusal(Refusal::BadKey).await;
    let mut stale = stage.trainers[1].update(&schema, 3, 1.0, 10);
    stale.key.generation.0 += 1;
    stage.trainers[1].send(top, FrameKind::Update, stale).await;
    stage.trainers[1].expect_refusal(Refusal::BadKey).await;
    stage.trainers[2]
        .send(
            top,
            FrameKind::Nothing,
            Frame {
                round: 3,
                ..Frame::default()
            },
        )
        .await;
    let (covers, _, first) = stage.result().await;
    assert_eq!((covers, first), (0, -7.0));

    // Frames that only a coordinator may send, and numbers that mean nothing, change nothing.
    let stray = Frame {
        round: 9,
        value: u64::MAX,
        ..Frame::default()
    };
    stage.trainers[0].send(top, FrameKind::Begin, stray).await;
    stage.trainers[0].send(top, FrameKind::Release, stray).await;
    stage.trainers[0].send(top, FrameKind::Refuse, stray).await;
    stage.trainers[0]
        .send(
            top,
            FrameKind::Model,
            Frame {
                round: 9,
                ..Frame::default()
            },
        )
        .await;
    stage.trainers[0].expect(FrameKind::Release).await;
    stage.begin(4).await;
    for n in 0..3 {
        let update = stage.trainers[n].update(&schema, 4, 6.0, 10);
        stage.trainers[n].send(top, FrameKind::Update, update).await;
    }
    assert_eq!(stage.result().await, (3, 30, 6.0));
    stage.taken = vec![0, 1, 2];

    // Round 5: the last answers are that there is nothing, and that one is gone, which is for the coordinator to say. What
    // came before counts.
    stage.begin(5).await;
    let good = stage.trainers[0].update(&schema, 5, 8.0, 10);
    stage.trainers[0].send(top, FrameKind::Update, good).await;
    stage.trainers[1]
        .send(
            top,
            FrameKind::Nothing,
            Frame {
                round: 5,
                ..Frame::default()
            },
        )
        .await;
    drop(stage.trainers.pop());
    let left = [stage.trainers[0].id, stage.trainers[1].id, WorkerId::NONE];
    stage.announce(5, &left).await;
    assert_eq!(stage.result().await, (1, 10, 8.0));
    // No round comes with which it could.
    stage.trainers[0].expect(FrameKind::Release).await;
    stage.leave().await;
}

/// What a trainer says is held against what the coordinator has said of it, and what it lends against what can be averaged: it
/// is refused by itself, the others count.
async fn a_liar_harms_nobody_else(plane: &str, timing: &str) {
    if !can_have(plane) {
        return;
    }
    const ROUNDS: u32 = 9;
    let mut stage = Stage::set(plane, timing, ROUNDS, None).await;
    let schema = stage.schema.clone();
    let top = stage.top_id;
    let (own, mut both, mut others) = (
        Cover::of(stage.trainers[0].id.0),
        Cover::of(stage.trainers[0].id.0),
        Cover::of(stage.trainers[1].id.0),
    );
    both.add(&others);
    others.add(&Cover::of(stage.trainers[2].id.0));
    let lies = [
        (u64::MAX, &own, 1.0, Refusal::BadSamples),
        (MOST_SAMPLES + 1, &own, 1.0, Refusal::BadSamples),
        (10, &both, 1.0, Refusal::BadCover),
        (10, &others, 1.0, Refusal::BadCover),
        (10, &Cover::of(4000), 1.0, Refusal::BadCover),
        (10, &Cover::default(), 1.0, Refusal::BadCover),
        (10, &own, f32::MAX, Refusal::NotFinite),
        (10, &own, -3e38, Refusal::NotFinite),
    ];
    for (round, (samples, cover, value, refusal)) in (1..).zip(lies) {
        stage.begin(round).await;
        // The liar comes first, and last, by turns.
        let order = if round % 2 == 0 { [0, 1, 2] } else { [1, 2, 0] };
        for n in order {
            let trainer = &mut stage.trainers[n];
            let update = match n {
                0 => trainer.update_of(&schema, round, value, samples, cover.clone()),
                n => trainer.update(&schema, round, n as f32, MOST_SAMPLES / n as u64),
            };
            trainer.send(top, FrameKind::Update, update).await;
        }
        stage.trainers[0].expect_refusal(refusal).await;
        assert_eq!(stage.result().await, (2, 1500, 4.0 / 3.0), "round {round}");
        stage.taken = vec![1, 2];
    }
    // Nothing of what they said of themselves has been added up beyond what can be.
    stage.begin(ROUNDS).await;
    for n in 0..3 {
        let update = stage.trainers[n].update(&schema, ROUNDS, 5.0, MOST_SAMPLES);
        stage.trainers[n].send(top, FrameKind::Update, update).await;
    }
    let frame = stage.coordinator.expect(FrameKind::Model).await;
    let arena = stage
        .coordinator
        .client
        .open_arena(frame.key.arena)
        .await
        .expect("the top's");
    let bytes = arena.object(frame.key, frame.length).expect("in bounds");
    let (metadata, _) = image::check(bytes, &schema).expect("a model");
    assert!(
        metadata.info.folded <= 15 && metadata.info.bytes_copied < 1 << 20,
        "{metadata:?}"
    );
    assert_eq!(metadata.info.loss, None);
    for trainer in &mut stage.trainers {
        trainer.expect(FrameKind::Release).await;
    }
    stage.leave().await;
}

#[tokio::test]
async fn a_liar_harms_nobody_else_eager() {
    a_liar_harms_nobody_else("sockmap", "eager").await;
}

#[tokio::test]
async fn a_liar_harms_nobody_else_lazy() {
    a_liar_harms_nobody_else("relay", "lazy").await;
}

/// A trainer writes NaN into its update and takes it back, again and again, while it is folded: its own update may be refused,
/// the aggregator lives, and the others count.
async fn what_changes_while_it_is_folded(timing: &str) {
    const ROUNDS: u32 = 60;
    let mut stage = Stage::set("relay", timing, ROUNDS, None).await;
    let schema = stage.schema.clone();
    let top = stage.top_id;
    let mut refused = 0;
    for round in 1..=ROUNDS {
        stage.begin(round).await;
        for n in 1..3 {
            let update = stage.trainers[n].update(&schema, round, 2.0, 10);
            stage.trainers[n].send(top, FrameKind::Update, update).await;
        }
        let update = stage.trainers[0].update(&schema, round, 2.0, 10);
        let arena = stage.trainers[0].arena.as_ref().expect("an arena");
        let data = &arena.object(update.key).expect("published")[image::data_range(&schema)];
        let flips = Flips::begin(data.as_ptr().addr() as u64);
        stage.trainers[0].send(top, FrameKind::Update, update).await;
        let (covers, _, first) = stage.result().await;
        flips.end();
        assert_eq!(first, 2.0, "round {round}");
        stage.taken = vec![1, 2];
        if covers == 3 {
            stage.taken.push(0);
        } else {
            refused += 1;
            stage.trainers[0].expect_refusal(Refusal::NotFinite).await;
        }
    }
    assert!(refused > 0, "it was never seen");
    for n in std::mem::take(&mut stage.taken) {
        stage.trainers[n].expect(FrameKind::Release).await;
    }
    stage.leave().await;
}

/// A thread that writes NaN, and what was there, at an address of this process, by turns.
struct Flips {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl Flips {
    fn begin(address: u64) -> Self {
        let memory = File::options()
            .write(true)
            .open("/proc/self/mem")
            .expect("own memory");
        let over = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let over = Arc::clone(&over);
            move || {
                while !over.load(Ordering::Relaxed) {
                    for value in [f32::NAN, 2.0] {
                        memory
                            .write_all_at(&value.to_le_bytes(), address)
                            .expect("written");
                    }
                }
            }
        });
        Self { over, thread }
    }

    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_while_it_is_folded_eager() {
    what_changes_while_it_is_folded("eager").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_while_it_is_folded_lazy() {
    what_changes_while_it_is_folded("lazy").await;
}

/// A process of the job's user registers as one more worker and sends everybody frames of every kind, with numbers right and
/// wrong, all the time: the run ends as one that nobody disturbed.
async fn a_strangers_frames_change_nothing(plane: &'static str) {
    if !can_have(plane) {
        return;
    }
    let mut job = Job::synthetic(&[1, 2, 4], 1000, "F32").with("timing", "lazy");
    job.rounds = 80;
    let options = ["--plane", plane, "--checkpoint-every", "0"];
    let undisturbed = Place::new(&job.file());
    undisturbed.finish(&options).success();
    let place = Place::new(&job.file());
    let mut run = place.start(&options);
    let started = run.wait_for("job_started");
    let socket = std::path::PathBuf::from(started["daemon"].as_str().expect("a path"));
    let mut client = Client::connect(&socket).await.expect("connected");
    let status = client.status(None).await.expect("told");
    let job_id = status.jobs[0].job;
    let registration = client
        .register(job_id, "trainer", "stranger")
        .await
        .expect("registered");
    let (mut frames, own) = (registration.frames, registration.worker);
    let ids: Vec<WorkerId> = status.workers.iter().map(|worker| worker.worker).collect();
    let arenas: Vec<ArenaId> = ids.iter().filter_map(|&id| ArenaId::of(id, 0)).collect();
    let mut rounds = [0, 1, 1, 2, u32::MAX];
    let mut sent = 0_u64;
    while run.is_running() {
        let last = run
            .events()
            .iter()
            .filter(|event| event["event"] == "round")
            .count() as u32;
        rounds[2..4].copy_from_slice(&[last + 1, last + 2]);
        for (n, &to) in ids.iter().enumerate() {
            let mut batch = Vec::new();
            for kind in 0..=15 {
                for &round in &rounds {
                    let turn = sent as usize + n;
                    let key = Key {
                        arena: [
                            arenas[turn % arenas.len()],
                            ArenaId::of(own, 0).expect("a number"),
                        ][turn % 2],
                        slot: (turn % 3) as u32,
                        generation: Generation(
                            [1, 2, u64::from(round), u64::from(round) + 1, u64::MAX][turn % 5],
                        ),
                    };
                    batch.push(Frame {
                        to,
                        from: own,
                        kind,
                        refusal: [0, 17, u16::MAX][turn % 3],
                        round,
                        key,
                        length: [0, 4096, 1 << 20, u64::MAX][turn % 4],
                        samples: [0, 1, 100, u64::MAX][turn % 4],
                        value: [u64::from(to.0), u64::from(own.0), 1 << 32, u64::MAX][turn % 4],
                        covers: [0, 1, u32::MAX][turn % 3],
                        ..Frame::default()
                    });
                    sent += 1;
                }
            }
            if within(frames.send(&batch)).await.is_err() {
                break;
            }
        }
        // What comes back is read, and the workers get their turn.
        while let Ok(Some(_)) = frames.try_recv() {}
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop((client, frames));
    let finished = tokio::task::spawn_blocking(move || run.wait())
        .await
        .expect("no panic")
        .success();
    assert!(sent > 3000, "only {sent} frames");
    assert_eq!(finished.all("worker_lost").len(), 0, "{:?}", finished.events);
    for round in finished.all("round") {
        assert_eq!(round["trainers"], 4, "{round}");
    }
    assert!(place.model() == undisturbed.model(), "another model came out");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_frames_change_nothing_through_the_kernel() {
    a_strangers_frames_change_nothing("sockmap").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_frames_change_nothing_through_the_relay() {
    a_strangers_frames_change_nothing("relay").await;
}

/// With a goal of two, a round is done with two updates, whoever sends them.
async fn two_of_three_are_enough(timing: &str) {
    let mut stage = Stage::set("relay", timing, 3, Some(2)).await;
    let schema = stage.schema.clone();
    let top = stage.top_id;

    // Round 1: the third is late, and is told so.
    stage.begin(1).await;
    for (n, value) in [(2, 4.0), (0, 1.0)] {
        let update = stage.trainers[n].update(&schema, 1, value, 10);
        stage.trainers[n].send(top, FrameKind::Update, update).await;
    }
    assert_eq!(stage.result().await, (2, 20, 2.5));
    stage.taken = vec![0, 2];
    let late = stage.trainers[1].update(&schema, 1, 100.0, 10);
    stage.trainers[1].send(top, FrameKind::Update, late).await;
    stage.trainers[1].expect_refusal(Refusal::Late).await;

    // Round 2: one that is refused does not count, so the round waits for the third.
    stage.begin(2).await;
    let nan = stage.trainers[0].update(&schema, 2, f32::NAN, 10);
    stage.trainers[0].send(top, FrameKind::Update, nan).await;
    let good = stage.trainers[1].update(&schema, 2, 6.0, 30);
    stage.trainers[1].send(top, FrameKind::Update, good).await;
    stage.trainers[0].expect_refusal(Refusal::NotFinite).await;
    let good = stage.trainers[2].update(&schema, 2, 2.0, 10);
    stage.trainers[2].send(top, FrameKind::Update, good).await;
    assert_eq!(stage.result().await, (2, 40, 5.0));
    stage.taken = vec![1, 2];

    // Round 3: a goal that cannot be reached any more waits for all who are left.
    stage.begin(3).await;
    let nothing = Frame {
        round: 3,
        ..Frame::default()
    };
    stage.trainers[0].send(top, FrameKind::Nothing, nothing).await;
    drop(stage.trainers.pop());
    let left = [stage.trainers[0].id, stage.trainers[1].id, WorkerId::NONE];
    stage.announce(3, &left).await;
    let good = stage.trainers[1].update(&schema, 3, 8.0, 10);
    stage.trainers[1].send(top, FrameKind::Update, good).await;
    assert_eq!(stage.result().await, (1, 10, 8.0));
    stage.trainers[1].expect(FrameKind::Release).await;
    stage.leave().await;
}

#[tokio::test]
async fn a_goal_is_met_eager() {
    two_of_three_are_enough("eager").await;
}

#[tokio::test]
async fn a_goal_is_met_lazy() {
    two_of_three_are_enough("lazy").await;
}

#[tokio::test]
async fn through_the_kernel_eager() {
    children_that_misbehave("sockmap", "eager").await;
}

#[tokio::test]
async fn through_the_kernel_lazy() {
    children_that_misbehave("sockmap", "lazy").await;
}

#[tokio::test]
async fn through_the_relay_eager() {
    children_that_misbehave("relay", "eager").await;
}

#[tokio::test]
async fn through_the_relay_lazy() {
    children_that_misbehave("relay", "lazy").await;
}

/// Nobody but another process of the same user may do that, and it does not play the worker's role.
#[tokio::test]
async fn a_stranger_that_takes_a_dead_workers_name_is_named_and_the_job_goes_on_without_that_worker() {
    let mut file = Job::synthetic(&[1, 3], 1000, "F32");
    file.rounds = 1_000_000;
    let place = Place::new(&file.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    let started = run.wait_for("job_started");
    run.wait_for_round(2);
    let socket = std::path::PathBuf::from(started["daemon"].as_str().expect("a path"));
    let mut stranger = Client::connect(&socket).await.expect("connected");
    let job = stranger.status(None).await.expect("a status").jobs[0].job;
    support::signal(
        run.wait_for_worker("trainer-2"),
        nix::sys::signal::Signal::SIGKILL,
    );
    let taken = within(async {
        loop {
            if let Ok(registered) = stranger.register(job, "trainer", "trainer-2").await {
                return registered;
            }
        }
    });
    let _taken = taken.await;
    // After the worker's death; and its successor's, if one was started before the stranger was seen.
    let holder = format!("process {}, which is not of this run", std::process::id());
    let is_named = |event: &serde_json::Value| event["how"].to_string().contains(&holder);
    within(async {
        while !run.events().iter().any(is_named) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let round = run
        .events()
        .iter()
        .rev()
        .find_map(|event| event["round"].as_u64());
    run.wait_for_round(round.expect("a round") + 2);
    support::signal(run.pid(), nix::sys::signal::Signal::SIGINT);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    let last = *finished.all("worker_lost").last().expect("lost");
    assert!(is_named(last), "{last}");
    assert_eq!(
        (&last["worker"], &last["restarting"]),
        (&"trainer-2".into(), &false.into())
    );
}
