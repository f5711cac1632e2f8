//! Three users at once: two do their rounds, the third tries all that it must not.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use lifl_common::arena::{Layout, OwnedArena};
use lifl_common::client::{Client, ClientError, Registration};
use lifl_common::control::packet::PacketSocket;
use lifl_common::control::{ErrorCode, Event, Message, PROTOCOL, Reply, Request};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::plane::PlaneKind;

use crate::process::{Daemon, PATIENCE, as_user, connect, has, is_root, job, refused, within, worker};

const ALICE: u32 = 4_201_001;
const BOB: u32 = 4_201_002;
const MALLORY: u32 = 4_201_003;

/// Room for three users, of whom none may take all.
const SETTINGS: &str = "pool_mib = 64
max_workers = 64
[quota]
pool_mib = 24
workers = 20
jobs = 4
connections = 24
";

const LAYOUT: Layout = Layout {
    slots: 1,
    slot_bytes: 1 << 20,
};

/// What of a user's job is of interest to somebody who means it harm.
#[derive(Clone, Copy, Debug)]
struct Target {
    job: JobId,
    parent: WorkerId,
    trainer: WorkerId,
    arena: ArenaId,
}

/// A user whose job does its rounds until it is told to stop.
struct Victim {
    target: Target,
    rounds: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl Victim {
    fn start(uid: u32, socket: PathBuf) -> Self {
        let (rounds, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (tell, told) = mpsc::channel();
        let (counted, stopped) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = as_user(uid, move || do_rounds(socket, tell, counted, stopped));
        Self {
            target: told.recv_timeout(PATIENCE).expect("a job"),
            rounds,
            stop,
            thread,
        }
    }

    /// Waits for rounds that begin after now.
    async fn more_rounds(&self) {
        let seen = self.rounds.load(Ordering::Relaxed);
        within(async {
            while self.rounds.load(Ordering::Relaxed) < seen + 3 {
                assert!(!self.thread.is_finished(), "its rounds have ended");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }

    fn stop(self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("undisturbed rounds")
    }
}

struct Trainer {
    client: Client,
    registration: Registration,
    arena: OwnedArena,
}

/// A parent and two trainers in lockstep: each round both lend an update, the parent reads it where it lies and gives it
/// back. Anything else that comes is a failure.
async fn do_rounds(
    socket: PathBuf,
    tell: mpsc::Sender<Target>,
    rounds: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
) -> u32 {
    let (mut parent, id, mut up) = job(&socket, "honest").await;
    let mut trainers = Vec::new();
    let mut peers = Vec::new();
    for n in 0..2 {
        let (mut client, registration) = worker(&socket, id, &format!("trainer-{n}")).await;
        let arena = client.create_arena(LAYOUT).await.expect("an arena").arena;
        peers.push(parent.open_arena(arena.id()).await.expect("of this job"));
        trainers.push(Trainer {
            client,
            registration,
            arena,
        });
    }
    let target = Target {
        job: id,
        parent: up.worker,
        trainer: trainers[0].registration.worker,
        arena: trainers[0].arena.id(),
    };
    tell.send(target).expect("a test");
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        for trainer in &mut trainers {
            let from = trainer.registration.worker;
            let mut slot = trainer
                .arena
                .begin()
                .expect("free: the last round's was given back");
            slot.bytes_mut().fill((round + from.0) as u8);
            let key = trainer.arena.publish(slot);
            trainer.arena.lend(key, up.worker).expect("published");
            let update = Frame {
                to: up.worker,
                from,
                kind: FrameKind::Update as u16,
                round,
                key,
                length: LAYOUT.slot_bytes,
                ..Frame::default()
            };
            within(trainer.registration.frames.send(&[update]))
                .await
                .expect("sent");
        }
        for _ in 0..trainers.len() {
            let update = within(up.frames.recv()).await.expect("read").expect("open");
            assert_eq!(
                (update.kind, update.round),
                (FrameKind::Update as u16, round),
                "{update:?}"
            );
            let peer = peers
                .iter()
                .find(|peer| peer.id() == update.key.arena)
                .expect("a trainer's");
            let object = peer.object(update.key, update.length).expect("in bounds");
            let expected = (round + update.from.0) as u8;
            assert!(
                object.iter().all(|&byte| byte == expected),
                "round {round}: not what was written"
            );
            let release = Frame {
                to: update.from,
                from: up.worker,
                kind: FrameKind::Release as u16,
                round,
                key: update.key,
                ..Frame::default()
            };
            within(up.frames.send(&[release])).await.expect("sent");
        }
        for trainer in &mut trainers {
            let release = within(trainer.registration.frames.recv())
                .await
                .expect("read")
                .expect("open");
            assert_eq!(
                (release.kind, release.round),
                (FrameKind::Release as u16, round),
                "{release:?}"
            );
            trainer.arena.release(release.key, up.worker).expect("lent");
            trainer.arena.free(release.key);
        }
        rounds.store(round, Ordering::Relaxed);
    }
    // Nobody was told of anything but its own workers.
    for client in trainers
        .iter_mut()
        .map(|trainer| &mut trainer.client)
        .chain([&mut parent])
    {
        let event = tokio::time::timeout(Duration::from_millis(1), client.event()).await;
        assert!(
            event.is_err() || matches!(event, Ok(Ok(Event::PeerJoined { .. }))),
            "{event:?}"
        );
    }
    round
}

/// A connection on which the test says everything itself.
struct Raw(PacketSocket);

impl Raw {
    async fn connect(socket: &Path) -> Self {
        let raw = Self(PacketSocket::connect(socket).expect("connected"));
        raw.ask(&Request::Hello { protocol: PROTOCOL }, None)
            .await
            .expect("welcome");
        raw
    }

    async fn ask(
        &self,
        request: &Request,
        fd: Option<OwnedFd>,
    ) -> Result<(Reply, Vec<OwnedFd>), (ErrorCode, String)> {
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        self.0.send(request, &fds).await.expect("sent");
        loop {
            match within(self.0.recv::<Message>())
                .await
                .expect("read")
                .expect("open")
            {
                (Message::Reply(Reply::Error { code, message }), _) => return Err((code, message)),
                (Message::Reply(reply), fds) => return Ok((reply, fds)),
                (Message::Event(_), _) => {}
            }
        }
    }
}

async fn letter(client: &mut Client) -> Refusal {
    match within(client.event()).await.expect("an event") {
        Event::DeadLetter(letter) => letter.refusal,
        other => panic!("{other:?}"),
    }
}

/// What the third user does to the other two. Each of it must fail; what the log must say of it is the result.
async fn attack(socket: PathBuf, targets: [Target; 2]) -> Vec<String> {
    let mut expected = Vec::new();
    let (mut own, own_job, mut registration) = job(&socket, "of mallory").await;
    for target in targets {
        // In: as a worker of another's job.
        let mut client = connect(&socket).await;
        let (code, message) = refused(client.register(target.job, "trainer", "mallory").await);
        assert_eq!(code, ErrorCode::Denied, "{message}");
        expected.push(message);
        // Read.
        let (code, message) = refused(own.open_arena(target.arena).await);
        assert_eq!(code, ErrorCode::NotFound, "{message}");
        expected.push(message);
        // End, from a connection that has no job.
        let (code, message) = refused(client.end_job("because").await);
        assert_eq!(code, ErrorCode::Denied, "{message}");
        expected.push(message);
        // Seal, which is its owner's.
        let raw = Raw::connect(&socket).await;
        let seal = Request::SealArena { arena: target.arena };
        let (code, message) = raw.ask(&seal, None).await.expect_err("not a worker");
        assert_eq!(code, ErrorCode::BadRequest, "{message}");
        // Spoof: as its trainer to its parent, and as oneself into its job.
        let frame = |from: WorkerId, to: WorkerId| Frame {
            to,
            from,
            kind: FrameKind::Update as u16,
            round: 1,
            ..Frame::default()
        };
        let forged = frame(target.trainer, target.parent);
        within(registration.frames.send(&[forged])).await.expect("sent");
        assert_eq!(letter(&mut own).await, Refusal::ForgedSource);
        let across = frame(registration.worker, target.parent);
        within(registration.frames.send(&[across])).await.expect("sent");
        assert_eq!(letter(&mut own).await, Refusal::OtherJob);
        expected.push(format!("from={} to={}", target.trainer, target.parent));
        expected.push(format!("from={} to={}", registration.worker, target.parent));
        // Look.
        let status = own.status(None).await.expect("a status");
        let theirs = status
            .jobs
            .iter()
            .find(|job| job.job == target.job)
            .expect("counted");
        assert_eq!(theirs.name, None);
        assert!(
            status.workers.iter().all(|worker| worker.job == own_job),
            "{:?}",
            status.workers
        );
        assert!(
            status.users.iter().all(|user| user.uid == MALLORY),
            "{:?}",
            status.users
        );
    }
    expected.push(starve_pool(&socket, own_job).await);
    expected.push(starve_workers(&socket, own_job).await);
    expected.push(starve_jobs(&socket).await);
    own.end_job("over").await.expect("its own");
    expected
}

/// Takes memory until there is no more of it.
async fn starve_pool(socket: &Path, job: JobId) -> String {
    let mut greedy = Vec::new();
    for n in 0.. {
        let (mut client, registration) = worker(socket, job, &format!("greedy-{n}")).await;
        let layout = Layout { slots: 8, ..LAYOUT };
        match client.create_arena(layout).await {
            Ok(arena) => greedy.push((client, registration, arena)),
            Err(ClientError::Refused { code, message }) => {
                assert_eq!(code, ErrorCode::Full, "{message}");
                assert!(message.contains("has 24 MiB of a quota of 24 MiB"), "{message}");
                return message;
            }
            Err(other) => panic!("{other}"),
        }
    }
    unreachable!("memory ends")
}

async fn starve_workers(socket: &Path, job: JobId) -> String {
    let mut crowd = Vec::new();
    let (code, message) = loop {
        let mut client = connect(socket).await;
        match client
            .register(job, "trainer", &format!("crowd-{}", crowd.len()))
            .await
        {
            Ok(registration) => crowd.push((client, registration)),
            Err(error) => break refused::<()>(Err(error)),
        }
    };
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(message.contains("has 20 workers, and a quota of 20"), "{message}");
    message
}

async fn starve_jobs(socket: &Path) -> String {
    let mut makers = Vec::new();
    let (code, message) = loop {
        let mut client = connect(socket).await;
        match client.create_job("one of many").await {
            Ok(_) => makers.push(client),
            Err(error) => break refused::<()>(Err(error)),
        }
    };
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(message.contains("has 4 jobs, and a quota of 4"), "{message}");
    message
}

/// Takes connections that say nothing until there is no more of them, and keeps them for as long as the daemon lets it.
async fn starve_connections(socket: PathBuf) -> String {
    let mut silent = Vec::new();
    let message = loop {
        assert!(silent.len() < 100, "nobody was refused");
        let connection = PacketSocket::connect(&socket).expect("connected");
        match tokio::time::timeout(Duration::from_millis(50), connection.recv::<Message>()).await {
            Err(_nothing_said) => silent.push(connection),
            Ok(Ok(Some((Message::Reply(Reply::Error { code, message }), _)))) => {
                assert_eq!(code, ErrorCode::Full, "{message}");
                break message;
            }
            Ok(other) => panic!("{other:?}"),
        }
    };
    assert!(
        message.contains("has 24 connections, and a quota of 24"),
        "{message}"
    );
    // A client of LIFL's is told so too.
    let (code, _) = refused(Client::connect(&socket).await);
    assert_eq!(code, ErrorCode::Full);
    for connection in silent {
        let closed = within(connection.recv::<Message>()).await.expect("read");
        assert!(closed.is_none(), "who says nothing is disconnected");
    }
    message
}

async fn three_users(kind: PlaneKind) {
    if !is_root() {
        return;
    }
    let plane = kind.to_string();
    let mut daemon = Daemon::start(SETTINGS, &["--plane", "auto", "--huge-pages", "never"]).await;
    if kind == PlaneKind::Relay {
        daemon.terminate();
        daemon = Daemon::start(SETTINGS, &["--plane", &plane, "--huge-pages", "never"]).await;
    }
    let socket = daemon.socket();
    let mut root = connect(&socket).await;
    if !has(&daemon, &root, kind) {
        return;
    }
    let victims = [ALICE, BOB].map(|uid| Victim::start(uid, socket.clone()));
    let targets = [victims[0].target, victims[1].target];
    let attacked = {
        let socket = socket.clone();
        as_user(MALLORY, move || attack(socket, targets))
    };
    let expected = joined(attacked).await;
    for victim in &victims {
        victim.more_rounds().await;
    }
    let silent = {
        let socket = socket.clone();
        as_user(MALLORY, move || starve_connections(socket))
    };
    // While they hang on: others come in, and get what they ask for.
    daemon.logged("and a quota of 24").await;
    let late = {
        let socket = socket.clone();
        as_user(BOB, move || async move {
            let (mut client, _, _registration) = job(&socket, "second").await;
            client.create_arena(LAYOUT).await.expect("memory");
        })
    };
    joined(late).await;
    for victim in &victims {
        victim.more_rounds().await;
    }
    let told = joined(silent).await;

    let log = daemon.log();
    for what in expected
        .iter()
        .map(String::as_str)
        .chain([told.as_str(), "said nothing: disconnected"])
    {
        let who = format!("uid={MALLORY}");
        let named = log.lines().any(|line| line.contains(what) && line.contains(&who));
        assert!(named, "not in the log, or not with {who}: {what}\n{log}");
    }
    // The daemon hears of the last connections' end when it comes to it.
    let status = within(async {
        loop {
            let status = root.status(None).await.expect("a status");
            if status.users.iter().all(|user| user.uid != MALLORY) {
                break status;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let users: Vec<u32> = status.users.iter().map(|user| user.uid).collect();
    assert_eq!(users, [0, ALICE, BOB], "root sees all who are there");
    assert_eq!(
        status.daemon.pool_used_bytes,
        4 << 20,
        "what the third took is given back"
    );
    for victim in victims {
        let rounds = victim.stop();
        assert!(rounds > 6, "{rounds}");
    }
    drop(root);
    daemon.terminate();
}

/// What a user's thread has come to.
async fn joined<T: Send + 'static>(thread: JoinHandle<T>) -> T {
    let joined = tokio::task::spawn_blocking(move || thread.join()).await;
    joined.expect("run").expect("as expected")
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_users_one_cannot_harm_the_others_on_the_sockmap() {
    three_users(PlaneKind::Sockmap).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_users_one_cannot_harm_the_others_on_the_relay() {
    three_users(PlaneKind::Relay).await;
}

/// What a reader has of an arena is a descriptor, and it can do with that what it wants.
#[tokio::test]
async fn a_reader_cannot_write_an_arena_however_it_tries() {
    let mut daemon = Daemon::start("", &["--plane", "relay", "--huge-pages", "auto"]).await;
    let socket = daemon.socket();
    let (mut owner, id, _registration) = job(&socket, "sealed").await;
    let mut arena = owner.create_arena(LAYOUT).await.expect("an arena").arena;
    let mut slot = arena.begin().expect("free");
    slot.bytes_mut().fill(7);
    let key = arena.publish(slot);

    let raw = Raw::connect(&socket).await;
    let (_near, far) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let register = Request::Register {
        job: id,
        role: "trainer".into(),
        name: "reader".into(),
    };
    raw.ask(&register, Some(far.into())).await.expect("registered");
    let (_, mut fds) = raw
        .ask(&Request::OpenArena { arena: arena.id() }, None)
        .await
        .expect("opened");
    let memfd = File::from(fds.pop().expect("a memfd"));
    let length = memfd.metadata().expect("a size").len();

    let map = |file: &File| {
        memmap2::MmapOptions::new()
            .len(length as usize)
            .map_raw(file)
            .map(drop)
    };
    let mapped = map(&memfd).expect_err("mapped for writing");
    assert_eq!(mapped.kind(), std::io::ErrorKind::PermissionDenied, "{mapped}");
    let again = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    if let Ok(again) = File::options().read(true).write(true).open(&again) {
        map(&again).expect_err("mapped for writing");
        assert!((&again).write_all(&[1]).is_err(), "written");
    }
    assert!((&memfd).write_all(&[1]).is_err(), "written");
    assert!(memfd.set_len(0).is_err(), "cut");
    assert!(memfd.set_len(length * 2).is_err(), "grown");
    let punched = nix::fcntl::fallocate(
        &memfd,
        nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        length as i64,
    );
    assert!(punched.is_err(), "emptied");
    // Nor make it so that it could.
    assert!(
        lifl_common::arena::memfd::seal(std::os::fd::AsFd::as_fd(&memfd)).is_err(),
        "sealed anew"
    );
    assert!(
        arena
            .object(key)
            .expect("published")
            .iter()
            .all(|&byte| byte == 7)
    );
    drop(raw);
    daemon.terminate();
}
