//! One user asks for all that it can, in all ways at once; another one's requests are answered meanwhile.

use std::fs;
use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lifl_common::arena::Layout;
use lifl_common::client::{Client, loopback_pair};
use lifl_common::control::packet::PacketSocket;
use lifl_common::control::{ErrorCode, Message, PROTOCOL, Reply, Request};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::JobId;
use lifl_common::plane::PlaneKind;
use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};

use crate::process::{Daemon, PATIENCE, as_user, connect, has, is_root, job, refused, within, worker};

const ALICE: u32 = 4_202_001;
const MALLORY: u32 = 4_202_003;

const SETTINGS: &str = "pool_mib = 64
max_workers = 400
[quota]
workers = 300
jobs = 8
connections = 330
";

/// How long the greedy user is at it.
const ATTACK: Duration = Duration::from_secs(6);

/// No request of another user's waits so long. (Here many things run beside each other: what it waits on a machine of its own
/// is for a bench. Each of the greedy user's sockets lingers for much longer.)
const LONGEST_WAIT: Duration = Duration::from_secs(3);
const LINGER_S: i32 = 60;

/// The daemon's memory, with deaf workers and requests without end.
const MOST_MIB: u64 = 96;

/// Deaf workers.
const DEAF: usize = 200;

fn memory_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a living process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .and_then(|kib| kib.trim().trim_end_matches(" kB").parse().ok())
        .expect("a size");
    kib >> 10
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("a living process")
        .count()
}

/// A connection that says what it is told to, and reads nothing.
struct Mute(PacketSocket);

impl Mute {
    async fn connect(socket: &Path) -> Option<Self> {
        let mute = Self(PacketSocket::connect(socket).ok()?);
        let hello = Request::Hello { protocol: PROTOCOL };
        mute.0.send(&hello, &[]).await.ok()?;
        mute.0.recv::<Message>().await.ok()??;
        Some(mute)
    }

    /// Without waiting for room.
    fn say(&self, packet: &[u8], fds: &[i32]) -> bool {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let socket = self.0.get_ref().as_raw_fd();
        sendmsg::<()>(socket, &[IoSlice::new(packet)], rights, flags, None).is_ok()
    }
}

/// A connection with unsent data, whose `close` takes a minute; and its other end.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
    let (far, _) = listener.accept().expect("accepted");
    near.set_nonblocking(true).expect("set");
    while near.write(&[0; 64 << 10]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: LINGER_S,
    };
    setsockopt(&near, sockopt::Linger, &linger).expect("set");
    (near, far)
}

/// The near end of a frame socket for that plane, and what must stay open beside it.
fn frame_socket(kind: PlaneKind) -> (OwnedFd, OwnedFd) {
    match kind {
        PlaneKind::Sockmap => loopback_pair().expect("a pair"),
        PlaneKind::Relay => {
            let (near, far) = std::os::unix::net::UnixStream::pair().expect("a pair");
            (far.into(), near.into())
        }
    }
}

async fn deaf(socket: &Path, kind: PlaneKind, job: JobId, name: &str) -> Option<(Mute, OwnedFd, OwnedFd)> {
    let mute = Mute::connect(socket).await?;
    let (passed, kept) = frame_socket(kind);
    let register = Request::Register {
        job,
        role: "deaf".into(),
        name: name.into(),
    };
    mute.0.send(&register, &[passed.as_raw_fd()]).await.ok()?;
    loop {
        match mute.0.recv::<Message>().await.ok()??.0 {
            Message::Reply(Reply::Registered { .. }) => break,
            Message::Reply(_) => return None,
            Message::Event(_) => {}
        }
    }
    Some((mute, passed, kept))
}

/// Everything at once, until it is told to stop.
async fn attack(socket: PathBuf, kind: PlaneKind, begun: Arc<AtomicU32>, stop: Arc<AtomicBool>) -> u32 {
    let mut maker = connect(&socket).await;
    let id = maker.create_job("all of it").await.expect("made");
    // A file that every user may lock.
    let surplus = fs::File::open("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages");
    let _lock = surplus
        .ok()
        .and_then(|file| nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).ok());
    let mut crowd = Vec::new();
    for n in 0..DEAF {
        crowd.extend(deaf(&socket, kind, id, &format!("{}{n}", "x".repeat(120))).await);
    }
    assert_eq!(crowd.len(), DEAF);
    begun.store(1, Ordering::Relaxed);
    let requests: [&[u8]; 4] = [
        br#"{"request":"traffic"}"#,
        br#"{"request":"status","job":null,"after":null}"#,
        br#"{"request":"end_job","reason":"not mine"}"#,
        br#"{"request":"open_arena","arena":4}"#,
    ];
    let mut held = Vec::new();
    let null = fs::File::open("/dev/null").expect("open");
    let mut said = 0;
    while !stop.load(Ordering::Relaxed) {
        for (mute, ..) in &crowd {
            for request in requests {
                said += u32::from(mute.say(request, &[]));
            }
        }
        // Who is disconnected comes again: all others would be told.
        if let Some(next) = deaf(&socket, kind, id, "one more").await {
            drop(next);
        }
        // Descriptors beside what takes none, more than anybody needs, and such as are slow to close.
        for packet in [&b"{}"[..], b"", br#"{"request":"hello","protocol":4}"#] {
            if let Some(mute) = Mute::connect(&socket).await {
                mute.say(packet, &[null.as_raw_fd(); 253]);
                if held.len() < 200 {
                    let (near, far) = lingering();
                    mute.say(packet, &[near.as_raw_fd()]);
                    std::thread::spawn(move || drop(near));
                    held.push(far);
                }
            }
        }
    }
    said
}

/// A user who does what users do, and how long it waited at most.
async fn honest(socket: PathBuf, stop: Arc<AtomicBool>) -> (u32, Vec<Duration>) {
    let (mut parent, id, mut up) = job(&socket, "honest").await;
    let (mut child, mut down) = worker(&socket, id, "trainer").await;
    let mut waits = Vec::new();
    let mut frames = 0;
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        within(child.traffic_now()).await.expect("told");
        waits.push(asked.elapsed());
        let asked = Instant::now();
        let mut other = within(Client::connect(&socket)).await.expect("let in");
        within(other.status(Some(id))).await.expect("a status");
        waits.push(asked.elapsed());
        let frame = Frame {
            to: up.worker,
            from: down.worker,
            kind: FrameKind::Ping as u16,
            round: frames,
            ..Frame::default()
        };
        let asked = Instant::now();
        within(down.frames.send(&[frame])).await.expect("sent");
        let came = within(up.frames.recv()).await.expect("read").expect("open");
        assert_eq!(came, frame);
        waits.push(asked.elapsed());
        frames += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    drop((parent.status(None).await, child));
    (frames, waits)
}

async fn one_of_two_is_greedy(kind: PlaneKind) {
    if !is_root() {
        return;
    }
    let plane = kind.to_string();
    let mut daemon = Daemon::start(SETTINGS, &["--plane", &plane, "--huge-pages", "never"]).await;
    let root = connect(&daemon.socket()).await;
    if !has(&daemon, &root, kind) {
        return;
    }
    drop(root);
    let before = descriptors(daemon.pid());
    let (begun, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    let greedy = {
        let (socket, begun, stop) = (daemon.socket(), Arc::clone(&begun), Arc::clone(&stop));
        as_user(MALLORY, move || attack(socket, kind, begun, stop))
    };
    let started = Instant::now();
    while begun.load(Ordering::Relaxed) == 0 {
        assert!(
            !greedy.is_finished() && started.elapsed() < 3 * PATIENCE,
            "{}",
            daemon.log()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let victim = {
        let (socket, stop) = (daemon.socket(), Arc::clone(&stop));
        as_user(ALICE, move || honest(socket, stop))
    };
    let (mut memory, mut open) = (0, 0);
    let started = Instant::now();
    while started.elapsed() < ATTACK {
        memory = memory.max(memory_mib(daemon.pid()));
        open = open.max(descriptors(daemon.pid()));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let joined = tokio::task::spawn_blocking(move || (victim.join(), greedy.join())).await;
    let (victim, greedy) = joined.expect("run");
    let (frames, mut waits) = victim.expect("undisturbed");
    assert!(greedy.expect("as expected") > 0, "it asked for nothing");
    waits.sort_unstable();
    let (median, longest) = (waits[waits.len() / 2], waits[waits.len() - 1]);
    let p99 = waits[waits.len() * 99 / 100];
    println!(
        "{kind}: {frames} frames; waits: {median:?}, p99 {p99:?}, {longest:?}; {memory} MiB, {open} descriptors"
    );
    assert!(frames > 10, "{frames}");
    assert!(longest < LONGEST_WAIT, "{longest:?}");
    assert!(memory < MOST_MIB, "{memory} MiB");
    // Its connections and sockets, and what is just being closed.
    assert!(open < before + 4000, "{open} descriptors");
    let log = daemon.log();
    let lines = log.lines().filter(|line| line.contains("refused: ")).count();
    assert!(lines < 1000, "{lines} lines of refusals");
    let begun = Instant::now();
    while descriptors(daemon.pid()) > before {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} descriptors",
            descriptors(daemon.pid())
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.terminate();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_user_asks_for_everything_and_another_is_served_on_the_sockmap() {
    one_of_two_is_greedy(PlaneKind::Sockmap).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_user_asks_for_everything_and_another_is_served_on_the_relay() {
    one_of_two_is_greedy(PlaneKind::Relay).await;
}

/// Memory is a user's until nobody has it, also when the daemon is started anew while its workers go on.
#[tokio::test]
async fn what_workers_have_is_theirs_while_a_new_daemon_waits_for_them() {
    if !is_root() {
        return;
    }
    let settings = "pool_mib = 64\n[quota]\npool_mib = 60\n";
    let mut daemon = Daemon::new(settings);
    let pins = format!("/sys/fs/bpf/lifl-test-{}", std::process::id());
    let more = [
        "--plane",
        "auto",
        "--huge-pages",
        "never",
        "--pin",
        &pins,
        "--grace",
        "60",
    ];
    let start = daemon.command("exec \"$@\"", &more);
    daemon.spawn(start);
    daemon.listening().await;
    let socket = daemon.socket();
    let root = connect(&socket).await;
    if !has(&daemon, &root, PlaneKind::Sockmap) {
        return;
    }
    drop(root);
    let layout = |mib: u64| Layout {
        slots: 1,
        slot_bytes: mib << 20,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let ready = Arc::new(AtomicU32::new(0));
    let holder = {
        let (socket, stop, ready) = (socket.clone(), Arc::clone(&stop), Arc::clone(&ready));
        as_user(ALICE, move || async move {
            let (mut maker, _, _registration) = job(&socket, "outlives").await;
            let _arena = maker.create_arena(layout(40)).await.expect("an arena").arena;
            ready.store(1, Ordering::Relaxed);
            // It does not come back before it is told to: it waits for nothing.
            while !stop.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            within(maker.status(None)).await.expect("back");
        })
    };
    let begun = Instant::now();
    while ready.load(Ordering::Relaxed) == 0 {
        assert!(
            begun.elapsed() < PATIENCE && !holder.is_finished(),
            "{}",
            daemon.log()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    daemon.signal(nix::sys::signal::Signal::SIGKILL);
    daemon.wait();
    let start = daemon.command("exec \"$@\"", &more);
    daemon.spawn(start);
    daemon.listening().await;
    let taker = {
        let socket = socket.clone();
        as_user(MALLORY, move || async move {
            let (mut maker, _, _registration) = job(&socket, "the next").await;
            let (code, message) = refused(maker.create_arena(layout(40)).await);
            assert_eq!(code, ErrorCode::Full, "{message}");
            maker.create_arena(layout(20)).await.expect("what is left");
        })
    };
    let taken = tokio::task::spawn_blocking(move || taker.join()).await;
    taken.expect("run").expect("as expected");
    stop.store(true, Ordering::Relaxed);
    let held = tokio::task::spawn_blocking(move || holder.join()).await;
    held.expect("run").expect("as expected");
    daemon.terminate();
    drop(daemon);
    let left = fs::remove_dir(&pins);
    assert!(left.is_err(), "the daemon takes its pins away");
}
