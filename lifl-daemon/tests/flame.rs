//! Flame's workers: a client that is byte-exact to `backend/shm.py` of Flame's SDK, against a whole daemon, on both planes.
//!
//! Each fault of Flame's own manager is a test that fails against what that manager does.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use caps::{CapSet, Capability};
use lifl_common::client::Client;
use lifl_common::control::{FlamePage, FlameWorkerStatus};
use lifl_common::plane::PlaneKind;
use lifl_daemon::flame::{self, FlameError};
use lifl_daemon::plane::{PlaneError, Request, support};
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Options, StartError};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use tokio_util::sync::CancellationToken;

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the SDK reads at a time.
const RECV_BYTES: usize = 1024;

struct Node {
    runtime: tokio::runtime::Runtime,
    daemon: Option<Daemon>,
    client: Option<Client>,
    skmsg: SocketAddrV4,
    rpc: SocketAddrV4,
    _folder: tempfile::TempDir,
}

fn flame_options() -> flame::Options {
    let any = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    flame::Options {
        skmsg: any,
        rpc: any,
        hold: Duration::from_secs(60),
        workers_of_user: 400,
        max_workers: 600,
    }
}

fn start(kind: PlaneKind, flame: flame::Options) -> Result<Node, StartError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let options = Options {
        socket: folder.path().join("lifl.sock"),
        socket_mode: 0o600,
        socket_group: None,
        plane: match kind {
            PlaneKind::Sockmap => Request::Sockmap,
            PlaneKind::Relay => Request::Relay,
        },
        pool_bytes: 4 << 20,
        huge_pages: HugePages::Never,
        max_workers: 8,
        pin: None,
        grace: Duration::ZERO,
        flame: Some(flame),
        gateway: GatewayOptions::default(),
    };
    let (daemon, client) = runtime.block_on(async {
        let daemon = Daemon::start(options, CancellationToken::new())?;
        let client = Client::connect(daemon.socket()).await.expect("connected");
        Ok::<_, StartError>((daemon, client))
    })?;
    let (skmsg, rpc) = daemon.flame().expect("serves Flame").addresses();
    Ok(Node {
        runtime,
        daemon: Some(daemon),
        client: Some(client),
        skmsg,
        rpc,
        _folder: folder,
    })
}

/// A daemon on that plane; `None` where this machine cannot have it.
///
/// # Panics
/// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
fn node_with(kind: PlaneKind, flame: flame::Options) -> Option<Node> {
    match start(kind, flame) {
        Ok(node) => Some(node),
        Err(StartError::Plane(error @ PlaneError::Unavailable { .. })) => {
            eprintln!("NOT RUN on the {kind} plane: {error}");
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.client = None;
        if let Some(daemon) = self.daemon.take() {
            let stopped = self.runtime.block_on(daemon.stop());
            if !std::thread::panicking() {
                stopped.expect("nothing left");
            }
        }
    }
}

impl Node {
    fn page(&mut self) -> FlamePage {
        let client = self.client.as_mut().expect("until the end");
        self.runtime
            .block_on(client.flame())
            .expect("answered")
            .expect("serves Flame")
    }

    fn workers(&mut self) -> Vec<FlameWorkerStatus> {
        self.page().workers
    }

    fn until(&mut self, what: &str, holds: impl Fn(&FlamePage) -> bool) -> FlamePage {
        let begun = Instant::now();
        loop {
            let page = self.page();
            if holds(&page) {
                return page;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {page:#?}");
            std::thread::yield_now();
        }
    }

    fn until_registered(&mut self, id: u16) {
        self.until("registered", |page| has(page, id));
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.skmsg).expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        stream
    }

    /// Sends bytes to the port for registrations, in these segments, and closes, as the SDK does.
    fn call(&self, segments: &[&[u8]]) {
        let mut rpc = TcpStream::connect(self.rpc).expect("connected");
        rpc.set_nodelay(true).expect("set");
        for segment in segments {
            rpc.write_all(segment).expect("sent");
        }
    }

    fn register(&self, pid: u32, fd: i32, id: u16) {
        self.call(&[&registration(pid, fd, id)]);
    }

    /// A worker of this process, registered.
    fn worker(&mut self, id: u16) -> TcpStream {
        let stream = self.connect();
        self.register(std::process::id(), stream.as_raw_fd(), id);
        self.until_registered(id);
        stream
    }

    /// Another process with a connection at descriptor 5.
    fn other_process(&self, uid: Option<u32>) -> OtherProcess {
        let mut command = Command::new("bash");
        let port = self.skmsg.port();
        command.arg("-c").arg(format!(
            "exec 5<>/dev/tcp/127.0.0.1/{port}; echo ready; exec sleep 600"
        ));
        if let Some(uid) = uid {
            command.uid(uid);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().expect("bash starts");
        let mut ready = [0; 6];
        let stdout = child.stdout.as_mut().expect("piped");
        stdout.read_exact(&mut ready).expect("connected");
        OtherProcess(child)
    }
}

struct OtherProcess(Child);

impl Drop for OtherProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn has(page: &FlamePage, id: u16) -> bool {
    page.workers.iter().any(|worker| worker.id == u32::from(id))
}

fn registration(pid: u32, fd: i32, id: u16) -> Vec<u8> {
    let mut bytes = pid.to_le_bytes().to_vec();
    bytes.extend(fd.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    bytes
}

/// What the SDK writes: the receiver's id, then `Data { end_id, channel_name, seqno, eom }`.
fn reference(to: u16, sender: &str, length: u32) -> Vec<u8> {
    let mut bytes = u32::from(to).to_le_bytes().to_vec();
    for (tag, text) in [(0x0a, sender), (0x12, "param-channel")] {
        bytes.extend([tag, text.len() as u8]);
        bytes.extend(text.as_bytes());
    }
    bytes.push(0x18);
    let mut rest = length;
    while rest >= 0x80 {
        bytes.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    bytes.extend([rest as u8, 0x20, 1]);
    bytes
}

/// What the SDK makes of one `recv(1024)`: the receiver, the sender, and the length. `None` for a message on no channel,
/// which it ignores.
fn parse(bytes: &[u8]) -> Option<(u16, String, u32)> {
    let to = u16::from_le_bytes([bytes[0], bytes[1]]);
    let (mut at, mut sender, mut channel, mut length) = (4, String::new(), String::new(), 0);
    let varint = |at: &mut usize| {
        let (mut value, mut shift) = (0_u64, 0);
        loop {
            let byte = *bytes.get(*at).expect("DecodeError: truncated");
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                return value;
            }
        }
    };
    while at < bytes.len() {
        let tag = varint(&mut at);
        let value = varint(&mut at);
        let text = match tag & 7 {
            0 => &[][..],
            2 => {
                let start = at;
                at += value as usize;
                bytes.get(start..at).expect("DecodeError: truncated")
            }
            other => panic!("DecodeError: wire type {other}"),
        };
        match tag >> 3 {
            1 => sender = String::from_utf8(text.to_vec()).expect("text"),
            2 => channel = String::from_utf8(text.to_vec()).expect("text"),
            3 => length = value as u32,
            0 => panic!("DecodeError: field 0"),
            _ => {}
        }
    }
    (!channel.is_empty()).then_some((to, sender, length))
}

/// The next reference, as the SDK's thread reads it.
fn receive(stream: &mut TcpStream) -> (u16, String, u32) {
    loop {
        let mut bytes = [0; RECV_BYTES];
        let read = stream.read(&mut bytes).expect("a reference in time");
        assert_ne!(read, 0, "the SDK would read end-of-file for ever");
        if let Some(found) = parse(&bytes[..read]) {
            return found;
        }
    }
}

fn gone(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; RECV_BYTES];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == ErrorKind::ConnectionReset,
        }
    }
}

const TASK: &str = "49d06b7526964db86cf37c70e8e0cdb6bd7aa743";

macro_rules! on_both_planes {
    ($($(#[$doc:meta])* fn $name:ident($node:ident: Node) $body:block)*) => {$(
        $(#[$doc])*
        mod $name {
            use super::*;

            #[test]
            fn sockmap() {
                if let Some(node) = node_with(PlaneKind::Sockmap, flame_options()) {
                    run(node);
                }
            }

            #[test]
            fn relay() {
                if let Some(node) = node_with(PlaneKind::Relay, flame_options()) {
                    run(node);
                }
            }

            fn run(mut $node: Node) $body
        }
    )*};
}

on_both_planes! {
    fn a_reference_arrives_as_it_was_written(node: Node) {
        let mut a = node.worker(0x43a7);
        let mut b = node.worker(0x0010);
        a.write_all(&reference(0x0010, TASK, 44_000_000)).expect("sent");
        assert_eq!(receive(&mut b), (0x0010, TASK.to_owned(), 44_000_000));
        b.write_all(&reference(0x43a7, "other", 0)).expect("sent");
        assert_eq!(receive(&mut a), (0x43a7, "other".to_owned(), 0));
        let workers = node.until("counted", |page| page.workers.iter().all(|worker| worker.sent == 1)).workers;
        let shown = workers.iter().find(|worker| worker.id == 0x43a7).expect("registered");
        assert_eq!((shown.taskid.as_str(), shown.pid, shown.refused), ("…a743", std::process::id(), 0));
        assert!(shown.last_ns > 0);
    }

    /// A registration that comes in two segments goes in under id 0 there.
    fn registrations_of_10_and_12_bytes_come_in_any_segments(node: Node) {
        let pid = std::process::id();
        let cuts: [&[usize]; 6] = [&[], &[4], &[8], &[1, 9], &[10], &[3, 8, 11]];
        let mut streams = Vec::new();
        for (i, cuts) in cuts.iter().enumerate() {
            let (stream, id) = (node.connect(), 0x1000 + i as u16);
            let mut bytes = registration(pid, stream.as_raw_fd(), id);
            if cuts.iter().any(|cut| *cut >= 10) {
                bytes.extend([0, 0]);
            }
            let mut rpc = TcpStream::connect(node.rpc).expect("connected");
            rpc.set_nodelay(true).expect("set");
            let mut sent = 0;
            for &cut in cuts.iter().chain([&bytes.len()]) {
                rpc.write_all(&bytes[sent..cut]).expect("sent");
                sent = cut;
                // The segment is on its way by itself, whatever the next one does.
                std::thread::yield_now();
            }
            streams.push((stream, rpc));
            node.until_registered(id);
        }
        assert!(!has(&node.page(), 0));
    }

    /// There, whoever slept before it was registered sleeps for ever.
    fn a_worker_that_already_sleeps_in_recv_is_woken(node: Node) {
        let mut sender = node.worker(1);
        let mut readers = Vec::new();
        for id in 100..150 {
            let stream = node.connect();
            let (told, tid) = std::sync::mpsc::channel();
            let mut reading = stream.try_clone().expect("a copy");
            let reader = std::thread::spawn(move || {
                told.send(nix::unistd::gettid()).expect("told");
                receive(&mut reading)
            });
            let tid = tid.recv().expect("started");
            asleep(tid.as_raw());
            readers.push((id, stream, reader));
        }
        // All at the same moment.
        for (id, stream, _) in &readers {
            node.register(std::process::id(), stream.as_raw_fd(), *id);
        }
        node.until("all registered", |page| page.workers.len() == 51);
        for (id, ..) in &readers {
            sender.write_all(&reference(*id, TASK, 1)).expect("sent");
        }
        for (id, _stream, reader) in readers {
            assert_eq!(reader.join().expect("read"), (id, TASK.to_owned(), 1));
        }
    }

    /// There, two references in one `recv(1024)` end the receiving thread.
    fn fan_in_breaks_no_receiver(node: Node) {
        const SENDERS: u16 = 12;
        const EACH: u32 = 100;
        let mut receiver = node.worker(1);
        let senders: Vec<TcpStream> = (0..SENDERS).map(|i| node.worker(100 + i)).collect();
        let sending: Vec<_> = senders
            .into_iter()
            .enumerate()
            .map(|(i, mut stream)| std::thread::spawn(move || {
                for n in 0..EACH {
                    stream.write_all(&reference(1, &format!("sender-{i}"), n)).expect("sent");
                }
                stream
            }))
            .collect();
        let _open: Vec<TcpStream> = sending.into_iter().map(|thread| thread.join().expect("sent")).collect();
        // Only now: everything has piled up.
        let mut next = vec![0; usize::from(SENDERS)];
        for _ in 0..u32::from(SENDERS) * EACH {
            let (_, sender, n) = receive(&mut receiver);
            let sender: usize = sender.strip_prefix("sender-").expect("a sender").parse().expect("a number");
            assert_eq!(n, next[sender], "of sender {sender}");
            next[sender] += 1;
        }
    }

    fn a_reference_to_a_worker_that_comes_later_waits_for_it(node: Node) {
        let mut early = node.worker(1);
        for n in 0..3 {
            early.write_all(&reference(2, TASK, n)).expect("sent");
        }
        let page = node.until("held", |page| page.held == 3);
        assert_eq!(page.workers[0].held, 3);
        let mut late = node.worker(2);
        for n in 0..3 {
            assert_eq!(receive(&mut late), (2, TASK.to_owned(), n));
        }
        assert_eq!(node.page().held, 0);
        early.write_all(&reference(2, TASK, 9)).expect("sent");
        assert_eq!(receive(&mut late), (2, TASK.to_owned(), 9));
    }

    /// The SDK waits for no answer to its registration, and so may write before it has taken effect.
    fn what_is_written_before_the_registration_arrives_too(node: Node) {
        let mut receiver = node.worker(1);
        let mut sender = node.connect();
        for n in 0..20 {
            sender.write_all(&reference(1, TASK, n)).expect("sent");
        }
        node.register(std::process::id(), sender.as_raw_fd(), 2);
        for n in 0..20 {
            assert_eq!(receive(&mut receiver), (1, TASK.to_owned(), n));
        }
        node.until_registered(2);
        sender.write_all(&reference(1, TASK, 77)).expect("sent");
        assert_eq!(receive(&mut receiver), (1, TASK.to_owned(), 77));
    }

    fn held_references_are_bounded_and_nobody_else_suffers(node: Node) {
        let mut sender = node.worker(1);
        let mut receiver = node.worker(2);
        for n in 0..400 {
            sender.write_all(&reference(3, TASK, n)).expect("sent");
        }
        sender.write_all(&reference(2, TASK, 5)).expect("sent");
        assert_eq!(receive(&mut receiver), (2, TASK.to_owned(), 5));
        node.until("all looked at", |page| {
            page.held == 256 && page.workers.iter().any(|worker| worker.held == 400)
        });
        let mut late = node.worker(3);
        for n in 0..256 {
            assert_eq!(receive(&mut late), (3, TASK.to_owned(), n));
        }
        sender.write_all(&reference(3, TASK, 1000)).expect("sent");
        assert_eq!(receive(&mut late), (3, TASK.to_owned(), 1000));
    }

    /// There, a dead worker's entry stays and swallows what is sent to it.
    fn a_worker_that_exits_is_gone_and_its_successor_is_reached(node: Node) {
        let mut sender = node.worker(1);
        let process = node.other_process(None);
        node.register(process.0.id(), 5, 2);
        node.until_registered(2);
        // kill -9.
        drop(process);
        node.until("gone", |page| !has(page, 2));
        let begun = Instant::now();
        loop {
            match sender.write_all(&reference(2, TASK, 1)) {
                Err(error) => break assert_eq!(error.kind(), ErrorKind::BrokenPipe),
                // The relay plane has no way to fail a send.
                Ok(()) if node.page().plane == PlaneKind::Relay => break,
                Ok(()) => assert!(begun.elapsed() < PATIENCE, "sends to nobody succeed"),
            }
        }
        node.until("refused", |page| page.workers.iter().any(|worker| worker.id == 1 && worker.refused == 1));
        let mut other = node.worker(3);
        sender.write_all(&reference(3, TASK, 2)).expect("the next send works");
        assert_eq!(receive(&mut other), (3, TASK.to_owned(), 2));
        let mut successor = node.worker(2);
        sender.write_all(&reference(2, TASK, 3)).expect("sent");
        assert_eq!(receive(&mut successor), (2, TASK.to_owned(), 3));
    }

    /// A job's taskids are those of the run before: that such a one is gone must not be held against its successor.
    fn who_came_after_a_death_waits_for_the_successor(node: Node) {
        drop(node.worker(2));
        node.until("gone", |page| !has(page, 2));
        let mut sender = node.worker(1);
        sender.write_all(&reference(2, TASK, 4)).expect("held, not refused");
        node.until("held", |page| page.held == 1);
        let mut successor = node.worker(2);
        assert_eq!(receive(&mut successor), (2, TASK.to_owned(), 4));
    }

    /// Each of these ends the manager there.
    fn no_registration_ends_the_daemon(node: Node) {
        let pid = std::process::id();
        let file = std::fs::File::open("/dev/null").expect("there");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let elsewhere = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let datagrams = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let to_rpc = TcpStream::connect(node.rpc).expect("connected");
        for (fd, id) in [
            (9999, 0x201), (-1, 0x202), (file.as_raw_fd(), 0x203), (elsewhere.as_raw_fd(), 0x204),
            (listener.as_raw_fd(), 0x205), (datagrams.as_raw_fd(), 0x206), (to_rpc.as_raw_fd(), 0x207),
        ] {
            node.register(pid, fd, id);
        }
        let mut dead = Command::new("true").spawn().expect("starts");
        dead.wait().expect("ended");
        for pid in [dead.id(), 0, u32::MAX, 1 << 30] {
            node.register(pid, 5, 0x208);
        }
        node.call(&[]);
        node.call(&[b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"]);
        node.call(&[&[0; 11]]);
        node.call(&[&[0xff; 4096]]);
        let reset = TcpStream::connect(node.rpc).expect("connected");
        nix::sys::socket::setsockopt(&reset, nix::sys::socket::sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })
            .expect("set");
        drop(reset);
        // The same socket twice, and an id at the end of the range.
        let mut twice = node.worker(0xffff);
        node.register(pid, twice.as_raw_fd(), 0xffff);
        let mut other = node.worker(2);
        other.write_all(&reference(0xffff, TASK, 8)).expect("sent");
        assert_eq!(receive(&mut twice), (0xffff, TASK.to_owned(), 8));
        let ids: Vec<u32> = node.workers().iter().map(|worker| worker.id).collect();
        assert_eq!(ids, [2, 0xffff], "nobody else was registered");
    }

    /// There, one silent connection keeps all others waiting.
    fn silent_and_slow_callers_block_nobody(node: Node) {
        let silent: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(node.rpc).expect("connected")).collect();
        let idle: Vec<TcpStream> = (0..200).map(|_| node.connect()).collect();
        let begun = Instant::now();
        let mut a = node.worker(1);
        let mut b = node.worker(2);
        a.write_all(&reference(2, TASK, 1)).expect("sent");
        assert_eq!(receive(&mut b), (2, TASK.to_owned(), 1));
        assert!(begun.elapsed() < Duration::from_secs(5), "waited for the silent ones");
        // They are dropped after their time.
        let mut first = silent.into_iter().next().expect("one");
        first.set_read_timeout(Some(PATIENCE)).expect("set");
        assert!(gone(&mut first), "a silent caller is still there");
        drop(idle);
        node.until("idle connections counted out", |page| page.connections == 2);
    }

    fn garbage_on_the_workers_port_is_hung_up_on(node: Node) {
        let mut garbage = node.connect();
        garbage.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
        assert!(gone(&mut garbage), "still connected");
        let mut half = node.connect();
        half.shutdown(Shutdown::Write).expect("shut down");
        assert!(gone(&mut half), "still connected");
        let mut a = node.worker(1);
        let mut b = node.worker(2);
        a.write_all(&reference(2, TASK, 1)).expect("sent");
        assert_eq!(receive(&mut b), (2, TASK.to_owned(), 1));
    }

    /// There, the later of two workers with the same last two bytes of their taskids silently replaces the earlier.
    fn of_two_living_workers_with_one_id_the_first_keeps_it(node: Node) {
        let first = node.other_process(None);
        let second = node.other_process(None);
        node.register(first.0.id(), 5, 7);
        node.until_registered(7);
        node.register(second.0.id(), 5, 7);
        // Registrations are judged in their order: once the next one stands, this one has been refused.
        let _after = node.worker(8);
        let holder = node.workers().into_iter().find(|worker| worker.id == 7).expect("registered");
        assert_eq!(holder.pid, first.0.id());
        // The first is gone: the second may try again.
        drop(first);
        node.until("gone", |page| !has(page, 7));
        node.register(second.0.id(), 5, 7);
        let page = node.until("registered", |page| has(page, 7));
        let holder = page.workers.iter().find(|worker| worker.id == 7).expect("registered");
        assert_eq!(holder.pid, second.0.id());
    }

    fn the_same_process_may_connect_anew(node: Node) {
        let old = node.worker(7);
        let mut new = node.connect();
        node.register(std::process::id(), new.as_raw_fd(), 7);
        let mut sender = node.worker(1);
        let mut old = old;
        assert!(gone(&mut old), "the connection that was replaced is closed");
        sender.write_all(&reference(7, TASK, 6)).expect("sent");
        assert_eq!(receive(&mut new), (7, TASK.to_owned(), 6));
    }

    /// There, anybody may register any descriptor of any process.
    fn users_are_kept_apart(node: Node) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("NOT RUN: only root can start processes of other users");
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
            return;
        }
        const NOBODY: u32 = 65534;
        let theirs = node.other_process(Some(NOBODY));
        // Not even root registers another user's socket. (Of a caller that closes at once, kernels before 6.18 do not tell the
        // user.)
        let mut root = TcpStream::connect(node.rpc).expect("connected");
        root.write_all(&registration(theirs.0.id(), 5, 7)).expect("sent");
        assert_eq!(root.read(&mut [0]).expect("read to its end"), 0);
        let mut ours = node.worker(7);
        let page = node.page();
        assert_eq!(page.workers.len(), 1, "{page:#?}");
        // Its own user does, under the same id.
        let bytes: String = registration(theirs.0.id(), 5, 7).iter().map(|byte| format!("\\x{byte:02x}")).collect();
        let call = format!("printf '{bytes}' > /dev/tcp/127.0.0.1/{}", node.rpc.port());
        let called = Command::new("bash").arg("-c").arg(call).uid(NOBODY).status().expect("bash starts");
        assert!(called.success());
        let page = node.until("registered", |page| page.workers.len() == 2);
        assert_eq!(page.workers.iter().map(|worker| worker.uid).collect::<Vec<_>>(), [0, NOBODY]);
        // A reference goes to the worker of the sender's user.
        let mut sender = node.worker(1);
        sender.write_all(&reference(7, TASK, 3)).expect("sent");
        assert_eq!(receive(&mut ours), (7, TASK.to_owned(), 3));
    }

    /// There, each registration leaks three descriptors.
    fn registrations_leave_no_descriptor(node: Node) {
        let open = || std::fs::read_dir("/proc/self/fd").expect("there").count();
        for id in 0..20 {
            drop(node.worker(id));
        }
        node.until("gone", |page| page.connections == 0);
        let connected = |node: &mut Node| node.until("gone", |page| page.connections == 0);
        connected(&mut node);
        let before = open();
        for id in 0..300 {
            drop(node.worker(id));
        }
        connected(&mut node);
        // They are closed on other threads. The other tests of this process have some, too.
        let begun = Instant::now();
        while open() >= before + 250 {
            let after = open();
            assert!(begun.elapsed() < PATIENCE, "{before} descriptors before, {after} after 300 registrations");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Keeps a socket's lock, as any process can keep that of its own: it sends bytes from memory that is not there, and the kernel
/// waits for them within the send. Dropping it gives them.
struct Locked {
    page: *mut libc::c_void,
    memory: Option<OwnedFd>,
    sending: Option<std::thread::JoinHandle<()>>,
}

impl Locked {
    const PAGE: usize = 4096;

    /// `None` where this process may not have such memory.
    fn socket(socket: &TcpStream) -> Option<Self> {
        // `include/uapi/linux/userfaultfd.h`: version and features, then an address, a length and the mode "missing".
        const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
        let mut api = [0xaa_u64, 0, 0];
        // SAFETY: makes a descriptor or fails.
        let memory = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        if memory < 0 {
            eprintln!("NOT RUN: userfaultfd: {}", std::io::Error::last_os_error());
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
            return None;
        }
        // SAFETY: the kernel has just made it for this call; nobody else knows it.
        let memory = unsafe { OwnedFd::from_raw_fd(memory as i32) };
        // SAFETY: new memory, at a place that the kernel chooses.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        let mut range = [page as u64, Self::PAGE as u64, 1, 0];
        // SAFETY: each takes and fills a structure of that many bytes.
        let registered = unsafe {
            libc::ioctl(memory.as_raw_fd(), UFFDIO_API, &raw mut api) == 0
                && libc::ioctl(memory.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) == 0
        };
        assert!(registered, "{}", std::io::Error::last_os_error());
        let (fd, from) = (socket.try_clone().expect("a copy"), page as usize);
        let (told, tid) = std::sync::mpsc::channel();
        let sending = std::thread::spawn(move || {
            told.send(nix::unistd::gettid()).expect("told");
            // SAFETY: one byte of the page, which stays mapped until this thread has ended.
            let sent = unsafe { libc::send(fd.as_raw_fd(), from as *const libc::c_void, 1, 0) };
            assert_eq!(sent, 1);
        });
        asleep(tid.recv().expect("started").as_raw());
        Some(Self {
            page,
            memory: Some(memory),
            sending: Some(sending),
        })
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // Without the one who was to give the bytes they are zeros.
        self.memory = None;
        let _ = self.sending.take().map(std::thread::JoinHandle::join);
        // SAFETY: nobody reads there any more.
        unsafe { libc::munmap(self.page, Self::PAGE) };
    }
}

/// Putting a socket into the kernel's map waits for the socket's lock, and its worker may have that for as long as it likes.
#[test]
fn who_keeps_its_sockets_lock_makes_nobody_wait_and_is_registered_when_it_lets_go() {
    let Some(mut node) = node_with(PlaneKind::Sockmap, flame_options()) else {
        return;
    };
    let pid = std::process::id();
    let (first, second) = (node.connect(), node.connect());
    let Some(locks) = [&first, &second]
        .map(Locked::socket)
        .into_iter()
        .collect::<Option<Vec<_>>>()
    else {
        return;
    };
    // Should somebody wait, it is not for ever.
    let (release, released) = std::sync::mpsc::channel::<()>();
    let locks = Releasing(Some(locks));
    let watch = std::thread::spawn(move || {
        let _ = released.recv_timeout(PATIENCE);
        drop(locks);
    });
    node.register(pid, first.as_raw_fd(), 7);
    node.register(pid, second.as_raw_fd(), 8);
    let begun = Instant::now();
    // One's own other workers, too; and the id waits for who was first.
    let mut a = node.worker(1);
    let mut b = node.worker(2);
    a.write_all(&reference(2, TASK, 1)).expect("sent");
    assert_eq!(receive(&mut b), (2, TASK.to_owned(), 1));
    a.write_all(&reference(7, TASK, 2)).expect("held");
    let page = node.until("held", |page| page.held == 1);
    assert!(!has(&page, 7) && !has(&page, 8), "{page:#?}");
    assert!(begun.elapsed() < PATIENCE / 2, "waited for who keeps a lock");
    // One leaves before its socket is in the map: its id is free for the next.
    drop(second);
    let third = node.connect();
    node.register(pid, third.as_raw_fd(), 8);
    // Registrations are judged in their order.
    let _after = node.worker(9);
    drop(release);
    watch.join().expect("released");
    node.until("registered", |page| {
        has(page, 7) && has(page, 8) && page.held == 0
    });
    let (mut first, mut third) = (first, third);
    assert_eq!(receive(&mut first), (7, TASK.to_owned(), 2));
    a.write_all(&reference(8, TASK, 3)).expect("sent");
    assert_eq!(receive(&mut third), (8, TASK.to_owned(), 3));
}

/// Memory that a thread lets go of which did not make it.
struct Releasing(Option<Vec<Locked>>);

// SAFETY: the pages belong to nobody else, and are only unmapped.
unsafe impl Send for Releasing {}

impl Drop for Releasing {
    fn drop(&mut self) {
        self.0 = None;
    }
}

/// Any local user can send, and need not read.
#[test]
fn references_for_who_does_not_read_are_refused_after_so_many_and_taken_again_once_it_reads() {
    let Some(mut node) = node_with(PlaneKind::Sockmap, flame_options()) else {
        return;
    };
    const MOST: u32 = 4096 + 64;
    let mut sender = node.worker(1);
    let mut deaf = node.worker(2);
    let mut other = node.worker(3);
    let mut sent = 0;
    let error = loop {
        assert!(sent <= MOST, "{sent} are in the kernel for who does not read");
        match sender.write_all(&reference(2, TASK, sent)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    sender
        .write_all(&reference(3, TASK, 1))
        .expect("the next send works");
    assert_eq!(receive(&mut other), (3, TASK.to_owned(), 1));
    node.until("counted", |page| {
        let sender = page.workers.iter().find(|worker| worker.id == 1);
        sender.is_some_and(|sender| sender.refused == 1 && sender.sent == u64::from(sent) + 1)
    });
    for n in 0..sent {
        assert_eq!(receive(&mut deaf), (2, TASK.to_owned(), n));
    }
    let begun = Instant::now();
    while sender.write_all(&reference(2, TASK, 77)).is_err() {
        assert!(begun.elapsed() < PATIENCE, "still refused");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(receive(&mut deaf), (2, TASK.to_owned(), 77));
}

/// Waits until a thread of this process sleeps.
fn asleep(tid: i32) {
    let begun = Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).expect("the thread runs");
        let state = stat[stat.rfind(')').expect("a name") + 1..]
            .trim_start()
            .chars()
            .next();
        // `D` within a send.
        if matches!(state, Some('S' | 'D')) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the thread does not go to sleep");
        std::thread::yield_now();
    }
}

#[test]
fn a_reference_waits_no_longer_than_it_may() {
    let hold = Duration::from_secs(1);
    for kind in [PlaneKind::Sockmap, PlaneKind::Relay] {
        let Some(mut node) = node_with(
            kind,
            flame::Options {
                hold,
                ..flame_options()
            },
        ) else {
            continue;
        };
        let mut sender = node.worker(1);
        sender.write_all(&reference(2, TASK, 1)).expect("sent");
        node.until("held", |page| page.held == 1);
        node.until("dropped", |page| page.held == 0);
        let mut late = node.worker(2);
        sender.write_all(&reference(2, TASK, 2)).expect("sent");
        assert_eq!(receive(&mut late), (2, TASK.to_owned(), 2));
    }
}

#[test]
fn nobody_has_more_workers_than_he_may() {
    let options = flame::Options {
        workers_of_user: 3,
        ..flame_options()
    };
    let mut node = node_with(PlaneKind::Relay, options).expect("a relay needs nothing");
    let workers: Vec<TcpStream> = (0..3).map(|id| node.worker(id)).collect();
    assert!(gone(&mut node.connect()), "a fourth is served");
    drop(workers);
    node.until("gone", |page| page.connections == 0);
    let _again = node.worker(4);
}

#[test]
fn what_is_no_reference_fails_its_send_and_no_other() {
    let Some(mut node) = node_with(PlaneKind::Sockmap, flame_options()) else {
        return;
    };
    let mut sender = node.worker(1);
    let mut receiver = node.worker(2);
    let mut long = reference(2, &"x".repeat(100), 1);
    long.extend([0x3a, 0xff, 0x07]);
    long.resize(long.len() + 1023, 0);
    for bad in [&[1, 2, 3][..], &long, &[0; 100_000]] {
        let error = sender.write_all(bad).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{} bytes", bad.len());
        sender
            .write_all(&reference(2, TASK, 1))
            .expect("the next send works");
        assert_eq!(receive(&mut receiver), (2, TASK.to_owned(), 1));
    }
}

/// What systemd's unit grants for loading, and not `CAP_PERFMON`.
#[test]
fn two_capabilities_are_enough_for_flames_program() {
    if node_with(PlaneKind::Sockmap, flame_options()).is_none() {
        return;
    }
    let limited = std::thread::spawn(|| {
        let granted: HashSet<Capability> = support::CAPABILITIES
            .iter()
            .map(|(name, _)| name.parse().expect("a capability"))
            .collect();
        caps::set(None, CapSet::Effective, &granted).expect("given up");
        start(PlaneKind::Sockmap, flame_options()).map(drop)
    });
    if let Err(error) = limited.join().expect("the thread's work") {
        panic!("{error}");
    }
}

/// Flame's SDK never notices that its connection is closed, and reads it without a pause.
#[test]
fn at_its_end_the_daemon_names_the_workers_that_it_leaves() {
    let folder = tempfile::tempdir().expect("a folder");
    let free = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        listener.local_addr().expect("bound").port()
    };
    let (skmsg, rpc) = (free(), free());
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_lifl-daemon"))
        .args([
            "--plane",
            "relay",
            "--no-pin",
            "--huge-pages",
            "never",
            "--socket",
        ])
        .arg(folder.path().join("lifl.sock"))
        .args(["--flame-skmsg", &format!("127.0.0.1:{skmsg}")])
        .args(["--flame-rpc", &format!("127.0.0.1:{rpc}")])
        .stderr(Stdio::piped())
        .spawn()
        .expect("the daemon starts");
    let mut log = BufReader::new(daemon.stderr.take().expect("piped")).lines();
    let mut line_with = |what: &str| {
        log.by_ref()
            .map(|line| line.expect("readable"))
            .find(|line| line.contains(what))
            .unwrap_or_else(|| panic!("the log ends without {what:?}"))
    };
    line_with("listening for Flame");
    let worker = TcpStream::connect((Ipv4Addr::LOCALHOST, skmsg)).expect("connected");
    let own = std::process::id();
    TcpStream::connect((Ipv4Addr::LOCALHOST, rpc))
        .expect("connected")
        .write_all(&registration(own, worker.as_raw_fd(), 0x45a7))
        .expect("sent");
    line_with("Flame worker registered");
    let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("told");
    let left = line_with("left without a daemon");
    for said in [&format!("kill {own}"), "…a745", "start its job again"] {
        assert!(left.contains(said), "{said:?} in {left}");
    }
    assert!(daemon.wait().expect("ended").success());
}

#[test]
fn a_port_that_is_taken_or_reachable_from_outside_is_refused_with_the_remedy() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let port = taken.local_addr().expect("bound").port();
    let options = flame::Options {
        skmsg: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
        ..flame_options()
    };
    let error = start(PlaneKind::Relay, options).err().expect("taken").to_string();
    assert!(
        error.contains("--no-flame") && error.contains("sockmap_manager"),
        "{error}"
    );
    let options = flame::Options {
        rpc: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
        ..flame_options()
    };
    let error = start(PlaneKind::Relay, options).err().expect("open to others");
    assert!(
        matches!(error, StartError::Flame(FlameError::NotLoopback(_))),
        "{error}"
    );
}

/// There, the manager is dead after 18 registrations.
#[test]
fn two_thousand_registrations_fit_into_256_descriptors() {
    let folder = tempfile::tempdir().expect("a folder");
    let free = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        listener.local_addr().expect("bound").port()
    };
    let (skmsg, rpc) = (free(), free());
    let root = nix::unistd::geteuid().is_root();
    let mut daemon = Command::new("bash")
        .arg("-c")
        .arg(format!(
            "ulimit -n 256; exec \"$0\" --socket {}/lifl.sock --no-pin --plane {} --huge-pages never \
             --flame-skmsg 127.0.0.1:{skmsg} --flame-rpc 127.0.0.1:{rpc} --log-format json",
            folder.path().display(),
            if root { "auto" } else { "relay" },
        ))
        .arg(env!("CARGO_BIN_EXE_lifl-daemon"))
        .env("RUST_LOG", "error")
        .spawn()
        .map(OtherProcess)
        .expect("bash starts");
    let connect = |port| {
        let begun = Instant::now();
        loop {
            match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                Ok(stream) => return stream,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
            }
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let register = |stream: TcpStream, id: u16| {
        let bytes = registration(std::process::id(), stream.as_raw_fd(), id);
        connect(rpc).write_all(&bytes).expect("sent");
        stream
    };
    for n in 0..2000 {
        drop(register(connect(skmsg), n % 50));
    }
    // Under a number that none of those had: they may be read late.
    let elsewhere = |stream: TcpStream| {
        let number = fcntl(&stream, FcntlArg::F_DUPFD_CLOEXEC(500)).expect("a descriptor");
        // SAFETY: nobody else has the descriptor, which is new.
        TcpStream::from(unsafe { OwnedFd::from_raw_fd(number) })
    };
    let mut receiver = register(elsewhere(connect(skmsg)), 1000);
    receiver.set_read_timeout(Some(PATIENCE)).expect("set");
    let socket = folder.path().join("lifl.sock");
    let mut client = runtime.block_on(Client::connect(&socket)).expect("connected");
    let begun = Instant::now();
    while !has(
        &runtime
            .block_on(client.flame())
            .expect("answered")
            .expect("served"),
        1000,
    ) {
        assert!(begun.elapsed() < PATIENCE, "not registered");
    }
    let mut sender = register(elsewhere(connect(skmsg)), 1001);
    sender.write_all(&reference(1000, TASK, 5)).expect("sent");
    assert_eq!(receive(&mut receiver), (1000, TASK.to_owned(), 5));
    assert_eq!(daemon.0.try_wait().expect("asked"), None, "the daemon is dead");
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.0.id()))
        .expect("there")
        .count();
    assert!(open < 100, "{open} descriptors are open");
}
