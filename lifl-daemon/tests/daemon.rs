//! A whole daemon and its clients, over a real control socket, on both planes.

use std::io::IoSlice;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use lifl_common::arena::Layout;
use lifl_common::client::{Client, ClientError, Registration};
use lifl_common::control::{ErrorCode, Event, PROTOCOL};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, JobId};
use lifl_common::plane::PlaneKind;
use lifl_daemon::plane::{PlaneError, Request};
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Host, ListenError, Options, Quota, Quotas, StartError};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, sendmsg,
    setsockopt, socket, sockopt,
};
use tokio_util::sync::CancellationToken;

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    daemon: Daemon,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

fn options(socket: PathBuf, plane: Request) -> Options {
    Options {
        socket,
        socket_mode: 0o600,
        socket_group: None,
        plane,
        pool_bytes: 4 << 20,
        huge_pages: HugePages::Never,
        max_workers: 8,
        pin: None,
        grace: Duration::ZERO,
        flame: None,
        gateway: GatewayOptions::default(),
    }
}

/// A daemon on that plane; `None` where this machine cannot have it.
///
/// # Panics
/// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
fn node_on(kind: PlaneKind) -> Option<Node> {
    let request = match kind {
        PlaneKind::Sockmap => Request::Sockmap,
        PlaneKind::Relay => Request::Relay,
    };
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("below").join("lifl.sock");
    match Daemon::start(options(socket.clone(), request), CancellationToken::new()) {
        Ok(daemon) => Some(Node {
            daemon,
            socket,
            folder,
        }),
        Err(StartError::Plane(error @ PlaneError::Unavailable { .. })) => {
            eprintln!("NOT RUN on the {kind} plane: {error}");
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

impl Node {
    async fn client(&self) -> Client {
        Client::connect(&self.socket).await.expect("connected")
    }

    /// A job with its maker registered as coordinator.
    async fn job(&self) -> (Client, JobId, Registration) {
        let mut client = self.client().await;
        let job = client.create_job("test").await.expect("made");
        let registration = client
            .register(job, "coordinator", "coordinator")
            .await
            .expect("registered");
        (client, job, registration)
    }

    async fn worker(&self, job: JobId, name: &str) -> (Client, Registration) {
        let mut client = self.client().await;
        let registration = client.register(job, "trainer", name).await.expect("registered");
        (client, registration)
    }
}

/// A connection on which a test says everything itself.
struct Raw(std::os::fd::OwnedFd);

impl Raw {
    fn connect(path: &std::path::Path) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket");
        connect(socket.as_raw_fd(), &UnixAddr::new(path).expect("short")).expect("connected");
        Self(socket)
    }

    fn say(&self, packet: &[u8], fds: &[i32]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let sent = sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(packet)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        assert_eq!(sent, Ok(packet.len()));
    }

    /// The answer; without words when the connection is closed.
    async fn hear(self) -> (Self, String) {
        let heard = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; 64 << 10];
            let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap_or(0);
            let heard = String::from_utf8_lossy(&bytes[..length]).into_owned();
            (self, heard)
        });
        within(heard).await.expect("heard")
    }

    async fn hello(path: &std::path::Path) -> Self {
        let raw = Self::connect(path);
        raw.say(br#"{"request":"hello","protocol":4}"#, &[]);
        let (raw, heard) = raw.hear().await;
        assert!(heard.contains("welcome"), "{heard}");
        raw
    }
}

/// Where a descriptor can be passed that nobody has a use for.
#[derive(Clone, Copy, Debug)]
enum Place {
    BeforeHello,
    BesideNothing,
    BesideGarbage,
    BesideTooMuch,
    BesideAnotherRequest,
    BesideARefusedRequest,
    /// Which takes it, where the plane is one for such sockets.
    BesideRegister,
}

impl Place {
    const ALL: [Self; 7] = [
        Self::BeforeHello,
        Self::BesideNothing,
        Self::BesideGarbage,
        Self::BesideTooMuch,
        Self::BesideAnotherRequest,
        Self::BesideARefusedRequest,
        Self::BesideRegister,
    ];

    /// Passes them there; the connection, which may be open still.
    async fn pass(self, path: &std::path::Path, fds: &[i32]) -> Raw {
        let mut raw = match self {
            Self::BeforeHello => Raw::connect(path),
            _ => Raw::hello(path).await,
        };
        match self {
            Self::BeforeHello => raw.say(br#"{"request":"traffic"}"#, fds),
            Self::BesideNothing => raw.say(b"", fds),
            Self::BesideGarbage => raw.say(b"{}", fds),
            Self::BesideTooMuch => raw.say(&[b' '; (64 << 10) + 1], fds),
            Self::BesideAnotherRequest => raw.say(br#"{"request":"status","job":null,"after":null}"#, fds),
            Self::BesideARefusedRequest => {
                raw.say(br#"{"request":"register","job":77,"role":"r","name":"n"}"#, fds);
            }
            Self::BesideRegister => {
                raw.say(br#"{"request":"create_job","name":"j"}"#, &[]);
                let (answered, reply) = raw.hear().await;
                raw = answered;
                let job = reply
                    .rsplit_once(':')
                    .expect("a job")
                    .1
                    .trim_end_matches('}')
                    .to_owned();
                let register = format!(r#"{{"request":"register","job":{job},"role":"r","name":"n"}}"#);
                raw.say(register.as_bytes(), fds);
            }
        }
        raw
    }
}

/// A connection of this machine with unsent data, whose `close` takes so long; and its other end.
fn lingering(seconds: i32) -> (std::net::TcpStream, std::net::TcpStream) {
    use std::io::Write;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut near = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
    let (far, _) = listener.accept().expect("accepted");
    near.set_nonblocking(true).expect("set");
    while near.write(&[0; 64 << 10]).is_ok() {}
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: seconds,
    };
    setsockopt(&near, sockopt::Linger, &linger).expect("set");
    (near, far)
}

async fn event(client: &mut Client) -> Event {
    within(client.event()).await.expect("an event")
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result.expect_err("refused") {
        ClientError::Refused { code, message } => (code, message),
        other => panic!("{other}"),
    }
}

macro_rules! on_both_planes {
    ($($(#[$doc:meta])* async fn $name:ident($node:ident: Node) $body:block)*) => {$(
        $(#[$doc])*
        mod $name {
            use super::*;

            #[tokio::test]
            async fn sockmap() {
                if let Some(node) = node_on(PlaneKind::Sockmap) {
                    run(node).await;
                }
            }

            #[tokio::test]
            async fn relay() {
                if let Some(node) = node_on(PlaneKind::Relay) {
                    run(node).await;
                }
            }

            async fn run($node: Node) $body
        }
    )*};
}

on_both_planes! {
    /// The read end of a pipe tells when nobody has the other one any more.
    async fn descriptors_that_nobody_wants_are_closed_wherever_they_are_passed(node: Node) {
        for place in Place::ALL {
            for count in [1, 8, 9, 253] {
                let (reader, writer) = nix::unistd::pipe().expect("a pipe");
                let raw = place.pass(&node.socket, &vec![writer.as_raw_fd(); count]).await;
                drop(writer);
                let ended = tokio::task::spawn_blocking(move || nix::unistd::read(&reader, &mut [0; 1]));
                assert_eq!(within(ended).await.expect("read"), Ok(0), "{place:?}, {count}");
                drop(raw);
            }
        }
        node.daemon.stop().await.expect("stopped");
    }

    /// Whoever has the last descriptor of such a socket waits in `close` for a minute; here that is the daemon.
    async fn a_socket_that_lingers_makes_nobody_wait(node: Node) {
        const LINGER: i32 = 60;
        let begun = std::time::Instant::now();
        let mut held = Vec::new();
        for place in Place::ALL {
            for _ in 0..4 {
                let (near, far) = lingering(LINGER);
                held.push((place.pass(&node.socket, &[near.as_raw_fd()]).await, far));
                // If the daemon was first, it is this process that waits.
                std::thread::spawn(move || drop(near));
            }
        }
        // In packets that nobody reads, on connections that end.
        for _ in 0..4 {
            let (near, far) = lingering(LINGER);
            let raw = Raw::connect(&node.socket);
            raw.say(b"{}", &[]);
            raw.say(b"{}", &[near.as_raw_fd()]);
            held.push((raw, far));
            std::thread::spawn(move || drop(near));
        }
        for _ in 0..20 {
            let (mut client, _, _) = node.job().await;
            within(client.status(None)).await.expect("a status");
        }
        node.daemon.stop().await.expect("stopped");
        assert!(begun.elapsed() < Duration::from_secs(LINGER as u64 / 2), "{:?}", begun.elapsed());
    }

    async fn an_update_is_lent_by_frame_and_read_in_place(node: Node) {
        let (mut parent, job, mut up) = node.job().await;
        let (mut child, mut down) = node.worker(job, "trainer-1").await;
        assert_eq!(down.owner, up.worker);
        assert_eq!(event(&mut parent).await, Event::PeerJoined { worker: down.worker, name: "trainer-1".into() });
        let layout = Layout::for_objects(2, 100).expect("a layout");
        let mut arena = child.create_arena(layout).await.expect("an arena").arena;
        let mut slot = arena.begin().expect("free");
        slot.bytes_mut()[..5].copy_from_slice(b"hello");
        let key = arena.publish(slot);
        arena.lend(key, up.worker).expect("published");
        let update = Frame {
            to: up.worker,
            from: down.worker,
            kind: FrameKind::Update as u16,
            key,
            length: 5,
            samples: 1,
            ..Frame::default()
        };
        within(down.frames.send(&[update])).await.expect("sent");
        let came = within(up.frames.recv()).await.expect("read").expect("open");
        assert_eq!(came, update);
        let peer = parent.open_arena(came.key.arena).await.expect("the job's own");
        assert_eq!(peer.object(came.key, came.length).expect("in bounds"), b"hello");
        assert_eq!(peer.owner(), down.worker);
        let status = parent.status(Some(job)).await.expect("a status");
        let sender = status.workers.iter().find(|worker| worker.worker == down.worker).expect("listed");
        assert_eq!((sender.counters.frames, sender.counters.referenced_bytes), (1, 5));
        assert!(sender.arenas[0].sealed);
        assert_eq!(status.jobs[0].arena_bytes, layout.bytes().expect("small"));
        drop((parent, child));
        node.daemon.stop().await.expect("stopped");
    }

    async fn a_worker_that_dies_is_told_of_and_its_frames_come_back_by_name(node: Node) {
        let (mut parent, job, mut up) = node.job().await;
        let (child, down) = node.worker(job, "trainer-1").await;
        let (mut other, _other) = node.worker(job, "trainer-2").await;
        let gone = down.worker;
        drop((child, down));
        let lost = loop {
            match event(&mut parent).await {
                Event::PeerJoined { .. } => {}
                other => break other,
            }
        };
        let Event::PeerLost(lost) = lost else { panic!("{lost:?}") };
        assert_eq!((lost.worker, lost.name.as_str()), (gone, "trainer-1"));
        let told = event(&mut other).await;
        assert!(matches!(told, Event::PeerLost(peer) if peer.worker == gone));
        let late = Frame { to: gone, from: up.worker, kind: FrameKind::Model as u16, round: 3, ..Frame::default() };
        within(up.frames.send(&[late])).await.expect("sent");
        let Event::DeadLetter(letter) = event(&mut parent).await else { panic!("no dead letter") };
        assert_eq!((letter.to, letter.round, letter.refusal), (gone, 3, Refusal::UnknownWorker));
        // The name is free again, the number is not.
        let (_again, again) = node.worker(job, "trainer-1").await;
        assert!(again.worker > gone);
    }

    /// Whenever its receiver leaves: what was sent comes back, or the receiver is told of as lost.
    async fn no_frame_to_who_has_just_come_and_leaves_is_lost_without_a_word(node: Node) {
        let (mut maker, job, mut up) = node.job().await;
        for round in 0..60 {
            let (child, down) = node.worker(job, "brief").await;
            let gone = down.worker;
            let frame = Frame { to: gone, from: up.worker, kind: FrameKind::Release as u16, round, ..Frame::default() };
            let (mut came_back, mut lost) = (false, false);
            let leaving = match round % 3 {
                // Its socket for frames first: whoever has it in the kernel or in the daemon must not swallow the frame.
                0 => {
                    drop(down.frames);
                    Some(child)
                }
                // Both while the frame is on its way, in either order.
                1 => {
                    std::thread::spawn(move || drop((down.frames, child)));
                    None
                }
                _ => {
                    std::thread::spawn(move || drop((child, down.frames)));
                    None
                }
            };
            within(up.frames.send(&[frame])).await.expect("sent");
            if leaving.is_some() {
                while !came_back {
                    let event = event(&mut maker).await;
                    assert!(!matches!(&event, Event::PeerLost(_)), "it is connected still");
                    came_back = matches!(&event, Event::DeadLetter(letter) if letter.round == round);
                }
            }
            drop(leaving);
            while !lost {
                lost = matches!(event(&mut maker).await, Event::PeerLost(peer) if peer.worker == gone);
            }
        }
    }

    async fn a_forged_source_and_another_job_are_told_to_the_true_sender(node: Node) {
        let (mut mine, _, mut own) = node.job().await;
        let (mut theirs, _, mut other) = node.job().await;
        let forged = Frame { to: own.worker, from: other.worker, ..Frame::default() };
        within(own.frames.send(&[forged])).await.expect("sent");
        let Event::DeadLetter(letter) = event(&mut mine).await else { panic!("no dead letter") };
        assert_eq!(letter.refusal, Refusal::ForgedSource);
        let across = Frame { to: other.worker, from: own.worker, round: 7, ..Frame::default() };
        within(own.frames.send(&[across])).await.expect("sent");
        let Event::DeadLetter(letter) = event(&mut mine).await else { panic!("no dead letter") };
        assert_eq!((letter.refusal, letter.round, letter.to_name), (Refusal::OtherJob, 7, None));
        // Nothing of it reached the other job.
        let welcome = Frame { to: other.worker, from: other.worker, round: 1, ..Frame::default() };
        within(other.frames.send(&[welcome])).await.expect("sent");
        assert_eq!(within(other.frames.recv()).await.expect("read"), Some(welcome));
        theirs.end_job("over").await.expect("its own");
    }

    async fn arenas_of_another_job_are_not_to_be_had(node: Node) {
        let (_mine, job, _own) = node.job().await;
        let (mut worker, _registration) = node.worker(job, "trainer-1").await;
        let arena = worker.create_arena(Layout { slots: 1, slot_bytes: 4096 }).await.expect("an arena").arena.id();
        let (mut stranger, _, _other) = node.job().await;
        let (code, message) = refused(stranger.open_arena(arena).await);
        assert_eq!(code, ErrorCode::NotFound, "{message}");
        let (unknown, _) = refused(stranger.open_arena(ArenaId(999)).await);
        assert_eq!(unknown, code, "a stranger cannot tell a foreign arena from none");
    }

    async fn a_job_ends_with_its_makers_connection(node: Node) {
        let (parent, job, _up) = node.job().await;
        let (mut child, _down) = node.worker(job, "trainer-1").await;
        drop(parent);
        let ended = loop {
            match event(&mut child).await {
                Event::PeerLost(_) => {}
                other => break other,
            }
        };
        assert!(matches!(ended, Event::JobEnded { .. }), "{ended:?}");
        let mut late = node.client().await;
        let (code, message) = refused(late.register(job, "trainer", "trainer-2").await);
        assert_eq!(code, ErrorCode::NotFound, "{message}");
    }

    async fn one_worker_too_many_is_refused_with_the_number(node: Node) {
        let (_parent, job, _up) = node.job().await;
        let mut workers = Vec::new();
        for n in 1..8 {
            workers.push(node.worker(job, &format!("trainer-{n}")).await);
        }
        let mut late = node.client().await;
        let (code, message) = refused(late.register(job, "trainer", "trainer-8").await);
        assert_eq!(code, ErrorCode::Full);
        assert!(message.contains('8') && message.contains("--max-workers"), "{message}");
        // Room again as soon as one has left.
        drop(workers.pop());
        within(async {
            while late.register(job, "trainer", "trainer-8").await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    async fn a_daemon_that_stops_leaves_no_socket_and_tells_its_workers(node: Node) {
        let (parent, job, _up) = node.job().await;
        let (mut child, _down) = node.worker(job, "trainer-1").await;
        let stopping = tokio::spawn(node.daemon.stop());
        let ended = event(&mut child).await;
        assert!(matches!(&ended, Event::JobEnded { reason } if reason.contains("stopping")), "{ended:?}");
        drop((parent, child));
        within(stopping).await.expect("no panic").expect("stopped");
        assert!(!node.socket.exists(), "the socket's file is still there");
        drop(node.folder);
    }
}

/// A relay daemon, where the plane does not matter.
fn node() -> Node {
    node_on(PlaneKind::Relay).expect("a relay needs nothing")
}

#[tokio::test]
async fn the_pool_gives_what_it_has_and_takes_it_back() {
    let node = node();
    let (_parent, job, _up) = node.job().await;
    let (mut first, _a) = node.worker(job, "trainer-1").await;
    let (mut second, _b) = node.worker(job, "trainer-2").await;
    let layout = Layout {
        slots: 3,
        slot_bytes: 1 << 20,
    };
    let arena = first.create_arena(layout).await.expect("fits");
    let (code, message) = refused(second.create_arena(layout).await);
    assert_eq!(code, ErrorCode::Full);
    assert!(message.contains("1 MiB left of 4 MiB"), "{message}");
    drop(first);
    let (code, _) = refused(second.create_arena(layout).await);
    assert_eq!(
        code,
        ErrorCode::Full,
        "its owner has left the daemon, and has it still"
    );
    drop(arena);
    within(async {
        while second.create_arena(layout).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn requests_out_of_place_are_refused_and_the_connection_goes_on() {
    let node = node();
    let mut client = node.client().await;
    let layout = Layout {
        slots: 1,
        slot_bytes: 4096,
    };
    assert_eq!(
        refused(client.create_arena(layout).await).0,
        ErrorCode::BadRequest,
        "not a worker"
    );
    assert_eq!(
        refused(client.end_job("x").await).0,
        ErrorCode::Denied,
        "no job of its own"
    );
    assert_eq!(
        refused(client.register(JobId(77), "trainer", "a").await).0,
        ErrorCode::NotFound
    );
    assert_eq!(
        refused(client.create_job("").await).0,
        ErrorCode::BadRequest,
        "no name"
    );
    let job = client.create_job("fine").await.expect("made after all");
    assert_eq!(
        refused(client.create_job("second").await).0,
        ErrorCode::BadRequest
    );
    assert_eq!(
        refused(client.register(job, "trainer", "line\nbreak").await).0,
        ErrorCode::BadRequest
    );
    client
        .register(job, "coordinator", "c")
        .await
        .expect("registered");
    let mut twin = node.client().await;
    let (_, message) = refused(twin.register(job, "trainer", "c").await);
    assert!(message.contains("already"), "{message}");
}

/// What the daemon answers to raw packets on one connection, until it closes it.
fn answers(socket_path: &std::path::Path, packets: &[&[u8]]) -> Vec<String> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).expect("a socket");
    connect(fd.as_raw_fd(), &UnixAddr::new(socket_path).expect("short")).expect("connected");
    for packet in packets {
        if send(fd.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).is_err() {
            break;
        }
    }
    let mut answers = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        if length == 0 {
            break;
        }
        answers.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_oversized_packets_end_their_connection_and_nothing_else() {
    let node = node();
    let (mut bystander, _, _registration) = node.job().await;
    let hello = format!(r#"{{"request":"hello","protocol":{PROTOCOL}}}"#);
    let huge = vec![b' '; 100_000];
    let cases: [(&str, Vec<&[u8]>); 6] = [
        ("not JSON", vec![b"\xff\xfe garbage"]),
        (
            "unknown request",
            vec![hello.as_bytes(), br#"{"request":"format_disk"}"#],
        ),
        (
            "unknown field",
            vec![br#"{"request":"hello","protocol":1,"extra":1}"#],
        ),
        ("wrong type", vec![br#"{"request":"hello","protocol":"one"}"#]),
        ("longer than a packet", vec![hello.as_bytes(), &huge]),
        ("deep nesting", vec![b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["]),
    ];
    for (what, packets) in cases {
        let socket = node.socket.clone();
        let packets: Vec<Vec<u8>> = packets.into_iter().map(<[u8]>::to_vec).collect();
        let answers = tokio::task::spawn_blocking(move || {
            let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
            answers(&socket, &packets)
        });
        let answers = within(answers).await.expect("no panic");
        let last = answers.last().unwrap_or_else(|| panic!("{what}: no answer"));
        assert!(last.contains("bad_packet"), "{what}: {last}");
    }
    assert!(bystander.status(None).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_works_before_hello_and_no_other_version_is_served() {
    let node = node();
    let socket = node.socket.clone();
    let other = format!(r#"{{"request":"hello","protocol":{}}}"#, PROTOCOL + 1);
    let early = br#"{"request":"create_job","name":"x"}"#.to_vec();
    let said = tokio::task::spawn_blocking(move || {
        // The garbage at the end makes the daemon close the connection.
        answers(&socket, &[&early, other.as_bytes(), b"bye"])
    });
    let said = within(said).await.expect("no panic");
    assert!(said[0].contains("must be hello"), "{said:?}");
    assert!(said[1].contains("protocol"), "{said:?}");
}

#[tokio::test]
async fn a_second_daemon_does_not_take_the_first_ones_socket_but_a_stale_one_is_replaced() {
    let node = node();
    let again = Daemon::start(
        options(node.socket.clone(), Request::Relay),
        CancellationToken::new(),
    );
    assert!(
        matches!(again, Err(StartError::Listen(ListenError::InUse(_)))),
        "{again:?}"
    );
    let stale = node.folder.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("bound"));
    let replaced = Daemon::start(options(stale.clone(), Request::Relay), CancellationToken::new());
    replaced
        .expect("nobody listens there")
        .stop()
        .await
        .expect("stopped");
    assert!(!stale.exists());
    assert!(
        node.client().await.status(None).await.is_ok(),
        "the first daemon still answers"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let precious = folder.path().join("lifl.sock");
    std::fs::write(&precious, "x").expect("written");
    let refused = Daemon::start(
        options(precious.clone(), Request::Relay),
        CancellationToken::new(),
    );
    assert!(
        matches!(refused, Err(StartError::Listen(ListenError::System { .. }))),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(&precious).expect("still there"), b"x");
    assert_eq!(
        std::fs::read_dir(folder.path()).expect("a folder").count(),
        1,
        "nothing was left beside it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_start_at_once_one_listens_and_the_others_say_so() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("lifl.sock");
    let starting: Vec<_> = (0..16)
        .map(|_| {
            let socket = socket.clone();
            tokio::spawn(
                async move { Daemon::start(options(socket, Request::Relay), CancellationToken::new()) },
            )
        })
        .collect();
    let mut winners = Vec::new();
    for start in starting {
        match start.await.expect("no panic") {
            Ok(daemon) => winners.push(daemon),
            Err(StartError::Listen(ListenError::InUse(_))) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(winners.len(), 1);
    Client::connect(&socket).await.expect("the winner answers");
    winners.pop().expect("one").stop().await.expect("stopped");
}

/// The number of a process says nothing: this test's is the daemon's own.
#[tokio::test]
async fn who_has_the_daemons_pid_is_a_client_like_any_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lifl.sock");
    let host = Host {
        quotas: Quotas {
            default: Quota {
                connections: 1,
                ..Quota::UNLIMITED
            },
            ..Quotas::unlimited()
        },
        ..Host::default()
    };
    let options = options(path.clone(), Request::Relay);
    let daemon = Daemon::start_in(host, options, CancellationToken::new()).expect("started");
    let client = Client::connect(&path).await.expect("connected");
    let (code, message) = refused(Client::connect(&path).await);
    assert_eq!(code, ErrorCode::Full, "{message}");
    drop(client);
    daemon.stop().await.expect("stopped");
}
