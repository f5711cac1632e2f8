//! `lifl-daemon` as a process that is killed, stopped and started anew while its workers go on. Real kernel, real maps.
//!
//! Each test has a socket and a folder for pins of its own, so they run side by side.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData, SockHash};
use lifl_common::arena::{Layout, OwnedArena, memfd};
use lifl_common::client::{Client, ClientError, FrameSocket, Registration};
use lifl_common::control::packet::PacketSocket;
use lifl_common::control::{
    DeadLetter, ErrorCode, Event, HeldArena, Message, PROTOCOL, PeerLost, Reply, Request,
};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::kernel::State;
use lifl_common::plane::PlaneKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a test waits for what should come soon.
const PATIENCE: Duration = Duration::from_secs(20);

/// A machine's daemon, with what stays when it goes.
struct Machine {
    folder: tempfile::TempDir,
    pins: PathBuf,
    daemon: Option<Child>,
}

impl Machine {
    /// With a daemon that listens; `None` where this machine cannot have pinned maps.
    ///
    /// # Panics
    /// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
    async fn start(more: &[&str]) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::tempdir().expect("a folder");
        // Another user's process is to find the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("set");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let pins = format!("/sys/fs/bpf/lifl-test-{}-{count}", std::process::id());
        let mut machine = Self {
            folder,
            pins: pins.into(),
            daemon: None,
        };
        machine.daemon(more).await;
        let welcome = machine.client().await.welcome().clone();
        if welcome.pinned != more.contains(&"--no-pin") {
            return Some(machine);
        }
        eprintln!("NOT RUN: {}", welcome.plane_reason);
        assert!(
            std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(),
            "{}",
            welcome.plane_reason
        );
        None
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("lifl.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lifl-daemon"));
        command
            .args(["--socket-mode", "666", "--no-flame", "--huge-pages", "never"])
            .arg("--socket")
            .arg(self.socket())
            .args(more);
        if !more.contains(&"--no-pin") {
            command.arg("--pin").arg(&self.pins);
        }
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Starts a daemon, and waits until it listens.
    async fn daemon(&mut self, more: &[&str]) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .expect("a log");
        let mut daemon = self.command(more).stderr(log).spawn().expect("started");
        let begun = Instant::now();
        while Client::connect(&self.socket()).await.is_err() {
            let ended = daemon.try_wait().expect("a child");
            assert!(ended.is_none(), "the daemon does not start: {}", self.log());
            assert!(
                begun.elapsed() < PATIENCE,
                "the daemon does not listen: {}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.daemon = Some(daemon);
    }

    /// Runs the program to its end.
    fn run(&self, more: &[&str]) -> Output {
        self.command(more).output().expect("run")
    }

    fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        daemon.kill().expect("killed");
        daemon.wait().expect("reaped");
    }

    /// Ends it in order.
    fn terminate(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).expect("a living process");
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = daemon.try_wait().expect("a child") {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "{status}: {}", self.log());
        assert!(!self.socket().exists(), "the socket's file is left");
    }

    /// Ends it, once it has heard that nobody is there any more: nothing is left.
    async fn end(mut self) {
        let mut client = self.client().await;
        within(async {
            while client.status(None).await.expect("a status").daemon.workers > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        drop(client);
        self.terminate();
        assert!(
            !self.pins.exists(),
            "{} is left: {}",
            self.pins.display(),
            self.log()
        );
    }

    async fn client(&self) -> Client {
        Client::connect(&self.socket()).await.expect("connected")
    }

    async fn worker(&self, job: JobId, name: &str) -> Worker {
        let mut client = self.client().await;
        let registration = client.register(job, "trainer", name).await.expect("registered");
        Worker::new(client, registration)
    }

    async fn job(&self) -> (Worker, JobId) {
        let mut client = self.client().await;
        let job = client.create_job("the job").await.expect("made");
        let registration = client
            .register(job, "coordinator", "coordinator")
            .await
            .expect("registered");
        (Worker::new(client, registration), job)
    }

    fn map(&self, name: &str) -> Map {
        let data = MapData::from_pin(self.pins.join(name)).expect("a pinned map");
        Map::from_map_data(data).expect("a map")
    }

    /// The workers that each map has an entry of.
    fn workers_in_maps(&self) -> [BTreeSet<u32>; 4] {
        let sockets: SockHash<_, u32> = self.map("SOCKETS").try_into().expect("a sockhash");
        let members: HashMap<_, u32, [u8; 20]> = self.map("MEMBERS").try_into().expect("a hash");
        let counters: HashMap<_, u32, [u8; 32]> = self.map("COUNTERS").try_into().expect("a hash");
        let senders: HashMap<_, [u8; 16], [u8; 8]> = self.map("SENDERS").try_into().expect("a hash");
        let senders = senders.iter().map(|entry| {
            let (_, sender) = entry.expect("an entry");
            u32::from_ne_bytes(sender[..4].try_into().expect("four"))
        });
        [
            sockets
                .keys()
                .map(|key| key.expect("a key"))
                .filter(|key| *key != 0)
                .collect(),
            members.keys().map(|key| key.expect("a key")).collect(),
            counters.keys().map(|key| key.expect("a key")).collect(),
            senders.collect(),
        ]
    }

    /// Changes what the next daemon finds.
    fn change_state(&self, change: impl FnOnce(&mut State)) {
        let mut map: Array<_, [u8; 64]> = self.map("STATE").try_into().expect("an array");
        let mut state: State = zerocopy::transmute!(map.get(&0, 0).expect("an entry"));
        assert_eq!(state.magic, State::MAGIC);
        change(&mut state);
        let bytes: [u8; 64] = zerocopy::transmute!(state);
        map.set(0, bytes, 0).expect("set");
    }

    fn expect_in_maps(&self, workers: &[&Worker]) {
        let expected: BTreeSet<u32> = workers.iter().map(|worker| worker.id.0).collect();
        assert_eq!(self.workers_in_maps(), [(); 4].map(|()| expected.clone()));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if self.pins.exists() {
            let _ = self.run(&["--reset"]);
        }
    }
}

/// A worker, played by the test.
struct Worker {
    client: Client,
    frames: FrameSocket,
    id: WorkerId,
}

impl Worker {
    fn new(client: Client, registration: Registration) -> Self {
        Self {
            client,
            frames: registration.frames,
            id: registration.worker,
        }
    }

    fn frame(&self, to: &Self, round: u32) -> Frame {
        Frame {
            to: to.id,
            from: self.id,
            kind: FrameKind::Release as u16,
            round,
            ..Frame::default()
        }
    }

    async fn send(&mut self, frames: &[Frame]) {
        within(self.frames.send(frames)).await.expect("sent");
    }

    async fn recv(&mut self) -> Frame {
        within(self.frames.recv()).await.expect("read").expect("open")
    }

    async fn event(&mut self) -> Event {
        within(self.client.event()).await.expect("an event")
    }

    /// Waits until a new daemon has it back; who lives, by what it says.
    async fn back(&mut self) -> Vec<WorkerId> {
        loop {
            if let Event::Living { workers, .. } = self.event().await {
                return workers;
            }
        }
    }

    /// Waits until it is told of a loss.
    async fn loss(&mut self) -> WorkerId {
        loop {
            if let Event::PeerLost(PeerLost { worker, .. }) = self.event().await {
                return worker;
            }
        }
    }

    /// Waits until it is told of the job's end.
    async fn ended(&mut self) -> String {
        loop {
            if let Event::JobEnded { reason } = self.event().await {
                return reason;
            }
        }
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

fn layout() -> Layout {
    Layout::for_objects(2, 100).expect("a layout")
}

/// An arena with a word in its first slot.
async fn arena_with(worker: &mut Worker, word: &[u8]) -> (OwnedArena, lifl_common::id::Key) {
    let mut arena = worker
        .client
        .create_arena(layout())
        .await
        .expect("an arena")
        .arena;
    let mut slot = arena.begin().expect("free");
    slot.bytes_mut()[..word.len()].copy_from_slice(word);
    let key = arena.publish(slot);
    (arena, key)
}

/// `count` frames from one to the other, numbered on from `first`.
async fn flow(from: &mut Worker, to: &mut Worker, first: u32, count: u32) {
    for round in first..first + count {
        let frame = from.frame(to, round);
        from.send(&[frame]).await;
        assert_eq!(to.recv().await, frame);
    }
}

#[tokio::test]
async fn frames_flow_through_three_deaths_of_the_daemon_and_the_next_one_knows_everybody() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let (mut top, job) = machine.job().await;
    let (mut one, mut two) = (machine.worker(job, "one").await, machine.worker(job, "two").await);
    let (arena, key) = arena_with(&mut one, b"hello").await;
    assert_eq!(arena.id().owner(), one.id);
    flow(&mut one, &mut two, 0, 100).await;
    for death in 1..=3 {
        machine.kill();
        flow(&mut one, &mut two, death * 1000, 100).await;
        // Nobody reads dead letters now: the sender gets them, and can go on.
        let nowhere = Frame {
            to: WorkerId(77),
            ..one.frame(&two, 7)
        };
        one.send(&[nowhere]).await;
        let letter = DeadLetter::returned(&one.recv().await, one.id).expect("its own");
        assert_eq!(
            (letter.to, letter.refusal),
            (WorkerId(77), Refusal::UnknownWorker)
        );
        machine.daemon(&[]).await;
        for worker in [&mut top, &mut one, &mut two] {
            let living = worker.back().await;
            assert_eq!(living.len() as u32, 3 + death - 1, "{living:?}");
        }
        flow(&mut one, &mut two, death * 1000 + 500, 100).await;
        let status = within(top.client.status(Some(job))).await.expect("a status");
        let of = |id| {
            let mut workers = status.workers.iter();
            workers.find(|worker| worker.worker == id).expect("there")
        };
        assert_eq!(u64::from(100 + 200 * death), of(one.id).counters.frames);
        assert_eq!(u64::from(death), of(one.id).counters.refused);
        assert_eq!(of(one.id).name, "one");
        assert_eq!(of(one.id).arenas[0].arena, arena.id());
        assert_eq!(status.jobs[0].name.as_deref(), Some("the job"));
        let read = within(two.client.open_arena(arena.id()))
            .await
            .expect("still there");
        assert_eq!(&read.object(key, 100).expect("in bounds")[..5], b"hello");
        // Numbers are not given out again.
        let name = format!("new-{death}");
        let new = machine.worker(job, &name).await;
        assert_eq!(new.id.0, two.id.0 + death);
        std::mem::forget(new);
    }
    within(top.client.end_job("done")).await.expect("its maker");
    assert_eq!(one.ended().await, "done");
}

#[tokio::test]
async fn who_dies_meanwhile_or_stays_away_is_reported_lost_and_leaves_no_entry() {
    let Some(mut machine) = Machine::start(&["--grace", "1"]).await else {
        return;
    };
    let (mut top, job) = machine.job().await;
    let (dead, away) = (
        machine.worker(job, "dead").await,
        machine.worker(job, "away").await,
    );
    let mut here = machine.worker(job, "here").await;
    machine.expect_in_maps(&[&top, &dead, &away, &here]);
    let dead_id = dead.id;
    machine.kill();
    // As if its process had ended: its socket is closed.
    drop(dead);
    // This one's socket is open, but it does not connect.
    let Worker { client, frames, id } = away;
    drop(client);
    machine.daemon(&["--grace", "1"]).await;
    // At the same time: who does not look for the new daemon does not come back to it.
    let (of_top, of_here) = tokio::join!(top.back(), here.back());
    assert!(
        !of_top.contains(&dead_id) && !of_here.contains(&dead_id),
        "{of_top:?} {of_here:?}"
    );
    let (of_top, of_here) = tokio::join!(top.loss(), here.loss());
    assert_eq!((of_top, of_here), (id, id));
    machine.expect_in_maps(&[&top, &here]);
    let status = within(top.client.status(Some(job))).await.expect("a status");
    assert_eq!((status.daemon.workers, status.daemon.awaited), (2, 0));
    // What is sent to either comes back, by way of the daemon again.
    let lost = Frame {
        to: dead_id,
        ..here.frame(&top, 1)
    };
    here.send(&[lost]).await;
    let Event::DeadLetter(letter) = here.event().await else {
        panic!("no dead letter")
    };
    assert_eq!(letter.refusal, Refusal::UnknownWorker);
    drop((top, here, frames));
    machine.end().await;
}

#[tokio::test]
async fn a_job_whose_maker_is_gone_ends_when_its_workers_come_back() {
    let Some(mut machine) = Machine::start(&["--grace", "1"]).await else {
        return;
    };
    let (top, job) = machine.job().await;
    let mut worker = machine.worker(job, "worker").await;
    let (other, other_job) = machine.job().await;
    let mut follower = machine.worker(other_job, "follower").await;
    machine.kill();
    drop(top);
    let Worker { client, frames, .. } = other;
    drop(client);
    machine.daemon(&["--grace", "1"]).await;
    let (one, other) = tokio::join!(worker.ended(), follower.ended());
    for reason in [one, other] {
        assert!(
            reason.contains("the process that made the job is gone"),
            "{reason}"
        );
    }
    drop((worker, follower, frames));
    machine.end().await;
}

#[tokio::test]
async fn terminated_it_leaves_jobs_to_the_next_one_and_without_jobs_nothing() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let (mut top, job) = machine.job().await;
    let (mut one, mut two) = (machine.worker(job, "one").await, machine.worker(job, "two").await);
    machine.terminate();
    machine.expect_in_maps(&[&top, &one, &two]);
    flow(&mut one, &mut two, 0, 100).await;
    machine.daemon(&[]).await;
    for worker in [&mut top, &mut one, &mut two] {
        worker.back().await;
    }
    flow(&mut one, &mut two, 100, 100).await;
    within(top.client.end_job("done")).await.expect("ended");
    assert_eq!(one.ended().await, "done");
    // The others are still connected, and have nothing to stay for.
    drop((top, one, two));
    machine.end().await;
}

#[tokio::test]
async fn an_arena_whose_owner_is_not_back_yet_is_waited_for() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let (mut reader, job) = machine.job().await;
    let mut owner = Raw::register(&machine, job, "owner").await;
    let (id, memfd) = owner.arena().await;
    machine.kill();
    machine.daemon(&[]).await;
    reader.back().await;
    let opened = reader.client.open_arena(id);
    tokio::pin!(opened);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut opened).await;
    assert!(early.is_err(), "{early:?}");
    // Neither can anybody join a job before its maker is back.
    let held = [HeldArena {
        arena: id,
        layout: layout(),
    }];
    owner
        .reattach(&machine, owner.near.as_fd(), &held, &[memfd.as_fd()])
        .await
        .expect("it is who it says");
    let opened = within(opened).await.expect("opened");
    assert_eq!(opened.owner(), owner.id);
}

#[tokio::test]
async fn without_pins_a_worker_is_told_why_it_cannot_go_on() {
    let Some(mut machine) = Machine::start(&["--no-pin"]).await else {
        return;
    };
    let (mut top, _) = machine.job().await;
    machine.kill();
    let error = within(top.client.event()).await.expect_err("gone");
    assert!(error.to_string().contains("not pinned"), "{error}");
}

#[tokio::test]
async fn a_daemon_that_does_not_come_back_is_waited_for_and_no_longer() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let (mut top, _) = machine.job().await;
    top.client.set_reconnect_time(Duration::from_millis(500));
    machine.kill();
    let error = within(top.client.event()).await.expect_err("nobody is there");
    assert!(matches!(error, ClientError::NotReconnected { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&machine.socket().display().to_string()),
        "{error}"
    );
}

/// A worker that speaks the protocol itself.
struct Raw {
    socket: PacketSocket,
    near: OwnedFd,
    _frames: FrameSocket,
    id: WorkerId,
}

async fn hello(path: &Path) -> PacketSocket {
    let socket = PacketSocket::connect(path).expect("connected");
    let hello = Request::Hello { protocol: PROTOCOL };
    assert!(matches!(ask(&socket, &hello, &[]).await.0, Reply::Welcome(_)));
    socket
}

async fn ask(socket: &PacketSocket, request: &Request, fds: &[i32]) -> (Reply, Vec<OwnedFd>) {
    within(socket.send(request, fds)).await.expect("sent");
    loop {
        let (message, fds) = within(socket.recv::<Message>())
            .await
            .expect("read")
            .expect("open");
        if let Message::Reply(reply) = message {
            return (reply, fds);
        }
    }
}

/// What a daemon says to somebody who shows these descriptors.
async fn reattach(
    path: &Path,
    near: std::os::fd::BorrowedFd<'_>,
    arenas: &[HeldArena],
    memfds: &[std::os::fd::BorrowedFd<'_>],
) -> Result<WorkerId, (ErrorCode, String)> {
    let socket = hello(path).await;
    let request = Request::Reattach {
        role: "trainer".into(),
        name: "somebody".into(),
        job_name: None,
        arenas: arenas.to_vec(),
    };
    let mut fds = vec![near.as_raw_fd()];
    fds.extend(memfds.iter().map(AsRawFd::as_raw_fd));
    let reply = ask(&socket, &request, &fds).await.0;
    // It stays as long as the test.
    std::mem::forget(socket);
    match reply {
        Reply::Reattached { worker, .. } => Ok(worker),
        Reply::Error { code, message } => Err((code, message)),
        other => panic!("{other:?}"),
    }
}

impl Raw {
    async fn register(machine: &Machine, job: JobId, name: &str) -> Self {
        let socket = hello(&machine.socket()).await;
        let (frames, near) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        let request = Request::Register {
            job,
            role: "trainer".into(),
            name: name.into(),
        };
        let (reply, _) = ask(&socket, &request, &[near.as_raw_fd()]).await;
        let Reply::Registered { worker, .. } = reply else {
            panic!("{reply:?}")
        };
        Self {
            socket,
            near,
            _frames: frames,
            id: worker,
        }
    }

    /// A sealed arena.
    async fn arena(&mut self) -> (ArenaId, OwnedFd) {
        let (reply, fds) = ask(
            &self.socket,
            &Request::CreateArena {
                layout: layout(),
                instead_of: None,
            },
            &[],
        )
        .await;
        let Reply::ArenaCreated { arena, .. } = reply else {
            panic!("{reply:?}")
        };
        let (reply, _) = ask(&self.socket, &Request::SealArena { arena }, &[]).await;
        assert_eq!(reply, Reply::Done {});
        (arena, fds.into_iter().next().expect("a memfd"))
    }

    async fn reattach(
        &self,
        machine: &Machine,
        near: std::os::fd::BorrowedFd<'_>,
        arenas: &[HeldArena],
        memfds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<WorkerId, (ErrorCode, String)> {
        reattach(&machine.socket(), near, arenas, memfds).await
    }
}

#[tokio::test]
async fn nobody_comes_back_as_somebody_else_or_with_memory_that_is_no_arena() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let (_top, job) = machine.job().await;
    let mut victim = Raw::register(&machine, job, "victim").await;
    let other = Raw::register(&machine, job, "other").await;
    let (id, memfd) = victim.arena().await;
    machine.kill();
    machine.daemon(&[]).await;
    let held = |arena, layout| vec![HeldArena { arena, layout }];

    // A socket like it, but another.
    let (_stranger, near) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
    let (code, message) = victim
        .reattach(&machine, near.as_fd(), &[], &[])
        .await
        .expect_err("a stranger");
    assert_eq!(code, ErrorCode::NotFound, "{message}");
    // Not even a socket.
    let (code, message) = victim
        .reattach(&machine, memfd.as_fd(), &[], &[])
        .await
        .expect_err("a file");
    assert_eq!(code, ErrorCode::BadRequest, "{message}");
    assert!(message.contains("not a socket"), "{message}");

    // Another user with the very socket, however it may have come by it.
    let (path, near) = (machine.socket(), victim.near.try_clone().expect("cloned"));
    let refused = std::thread::spawn(move || {
        // SAFETY: the bare call changes this thread's ids alone, and has no memory to do with.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(changed, 0, "this test runs as root");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(reattach(&path, near.as_fd(), &[], &[]))
    });
    let (code, message) = refused.join().expect("joined").expect_err("another user");
    assert_eq!(code, ErrorCode::Denied, "{message}");

    // Memory that could be written or cut by others.
    let unsealed = memfd::create("test", 8192, false).expect("a memfd");
    let half = memfd::create("test", 8192, false).expect("a memfd");
    let seals = nix::fcntl::SealFlag::F_SEAL_GROW | nix::fcntl::SealFlag::F_SEAL_SHRINK;
    nix::fcntl::fcntl(half.as_fd(), nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).expect("sealed");
    let small = memfd::create("test", 4096, false).expect("a memfd");
    memfd::seal(small.as_fd()).expect("sealed");
    let file = File::open("/dev/null").expect("a file");
    for (bad, says) in [
        (&unsealed, "has the seals"),
        (&half, "has the seals"),
        (&small, "has 4096 bytes, its slots make 8192"),
        (&file, "is no memfd"),
    ] {
        let (code, message) = victim
            .reattach(&machine, victim.near.as_fd(), &held(id, layout()), &[bad.as_fd()])
            .await
            .expect_err("no arena");
        assert_eq!(code, ErrorCode::BadRequest, "{message}");
        assert!(message.contains(says), "{message}");
    }
    // Slots without end.
    let endless = Layout {
        slots: u32::MAX,
        slot_bytes: u64::MAX - 4095,
    };
    let (code, _) = victim
        .reattach(
            &machine,
            victim.near.as_fd(),
            &held(id, endless),
            &[memfd.as_fd()],
        )
        .await
        .expect_err("no layout");
    assert_eq!(code, ErrorCode::BadRequest);
    // Another worker's arena.
    let (code, message) = other
        .reattach(
            &machine,
            other.near.as_fd(),
            &held(id, layout()),
            &[memfd.as_fd()],
        )
        .await
        .expect_err("not its arena");
    assert_eq!(code, ErrorCode::Denied, "{message}");
    // More than there are.
    let (code, _) = victim
        .reattach(&machine, victim.near.as_fd(), &held(id, layout()), &[])
        .await
        .expect_err("no memfd");
    assert_eq!(code, ErrorCode::BadRequest);

    // And after all that, itself; once.
    let back = victim
        .reattach(
            &machine,
            victim.near.as_fd(),
            &held(id, layout()),
            &[memfd.as_fd()],
        )
        .await;
    assert_eq!(back.expect("it is who it says"), victim.id);
    let (code, _) = victim
        .reattach(&machine, victim.near.as_fd(), &[], &[])
        .await
        .expect_err("it is back already");
    assert_eq!(code, ErrorCode::NotFound);
}

#[tokio::test]
async fn maps_of_another_version_are_left_alone_until_somebody_clears_them() {
    let Some(mut machine) = Machine::start(&[]).await else {
        return;
    };
    let refused = machine.run(&["--reset"]);
    let pid = machine.daemon.as_ref().expect("a daemon").id().to_string();
    let says = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{says}");
    assert!(says.contains(&pid), "{says} does not name {pid}");

    let (_top, _) = machine.job().await;
    machine.kill();
    machine.change_state(|state| state.netns += 1);
    let refused = machine.run(&[]);
    let says = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{says}");
    assert!(says.contains("another network namespace"), "{says}");

    machine.change_state(|state| state.abi = 99);
    let refused = machine.run(&[]);
    let says = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(3), "{says}");
    let remedy = format!("lifl-daemon --reset --pin {}", machine.pins.display());
    assert!(says.contains("version 99") && says.contains(&remedy), "{says}");
    assert!(machine.pins.join("MEMBERS").exists(), "they are left alone");

    let reset = machine.run(&["--reset"]);
    let says = String::from_utf8_lossy(&reset.stderr);
    assert!(reset.status.success(), "{says}");
    assert!(says.contains("MEMBERS") && says.contains("SOCKETS"), "{says}");
    assert!(!machine.pins.exists());
    machine.daemon(&[]).await;
    machine.end().await;
}

#[tokio::test]
async fn two_daemons_do_not_share_a_folder() {
    let Some(machine) = Machine::start(&[]).await else {
        return;
    };
    let second = machine.folder.path().join("second.sock");
    let refused = Command::new(env!("CARGO_BIN_EXE_lifl-daemon"))
        .arg("--no-flame")
        .arg("--socket")
        .arg(&second)
        .arg("--pin")
        .arg(&machine.pins)
        .output()
        .expect("run");
    let says = String::from_utf8_lossy(&refused.stderr);
    let pid = machine.daemon.as_ref().expect("a daemon").id();
    assert_eq!(refused.status.code(), Some(3), "{says}");
    assert!(
        says.contains(&format!("pid {pid}")) && says.contains("--pin"),
        "{says}"
    );
    assert!(!second.exists());
    machine.end().await;
}

#[tokio::test]
async fn a_daemon_for_other_numbers_takes_over_what_is_used_and_makes_anew_what_is_not() {
    let Some(mut machine) = Machine::start(&["--max-workers", "8"]).await else {
        return;
    };
    let (mut top, _) = machine.job().await;
    let first = top.id;
    let large = Layout::for_objects(1, 3 << 20).expect("a layout");
    let _arena = top.client.create_arena(large).await.expect("an arena");
    machine.kill();
    machine.daemon(&["--max-workers", "16", "--pool-mib", "1"]).await;
    top.back().await;
    let client = machine.client().await;
    let welcome = client.welcome();
    assert_eq!(welcome.max_workers, 8);
    // Memory that was granted stays granted.
    assert_eq!(welcome.pool_used_bytes, 3 << 20);
    assert!(welcome.pool_bytes > 3 << 20, "{}", welcome.pool_bytes);
    drop(client);
    drop(top);
    machine.kill();
    machine.daemon(&["--max-workers", "16"]).await;
    assert_eq!(machine.client().await.welcome().max_workers, 16);
    let (top, job) = machine.job().await;
    assert!(top.id > first && job > JobId(1), "{} {job}", top.id);
    drop(top);
    machine.end().await;
}
