//! Both planes, with real sockets and, for the sockmap, the real program in the kernel.
//!
//! Every test makes its own plane, so they run side by side.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use aya::maps::loaded_maps;
use aya::programs::loaded_programs;
use lifl_common::client::FrameSocket;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{Counters, Member};
use lifl_common::plane::PlaneKind;
use lifl_daemon::plane::{Chosen, Options, Plane, PlaneError, Request, SocketError, choose, support};
use tokio::sync::mpsc;
use zerocopy::IntoBytes;

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// A plane with what its daemon would hold.
struct Node {
    plane: Plane,
    dead_letters: mpsc::Receiver<Frame>,
}

/// A test's plane of that kind; `None` where this machine cannot have it.
///
/// # Panics
/// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
fn node_for(kind: PlaneKind, max_workers: u32) -> Option<Node> {
    let request = match kind {
        PlaneKind::Sockmap => Request::Sockmap,
        PlaneKind::Relay => Request::Relay,
    };
    match choose(
        request,
        Options {
            max_workers,
            pin: None,
        },
    ) {
        Ok(Chosen {
            plane, dead_letters, ..
        }) => Some(Node { plane, dead_letters }),
        Err(error) => {
            eprintln!("NOT RUN on the {kind} plane: {error}");
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
            None
        }
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

impl Node {
    /// A registered worker's socket.
    fn worker(&mut self, worker: u32, job: u32) -> FrameSocket {
        let (socket, registered) = FrameSocket::pair_for(self.plane.kind()).expect("a pair");
        self.register(worker, job, registered).expect("registered");
        socket
    }

    fn register(&mut self, worker: u32, job: u32, socket: OwnedFd) -> Result<(), PlaneError> {
        let member = Member {
            job: JobId(job),
            uid: 0,
            flags: 0,
        };
        self.plane.register(WorkerId(worker), member, socket)
    }

    fn counters(&self, worker: u32) -> Counters {
        self.plane
            .counters(WorkerId(worker))
            .expect("readable")
            .expect("registered")
    }

    /// Waits until nobody has a worker's socket open: the daemon closes what it was passed on a thread of its own.
    async fn until_closed(&self, worker: u32) {
        within(async {
            while self.plane.open_sockets().expect("readable").contains(&worker) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    /// The next dead letter must be `frame`, for that reason, from that worker.
    async fn expect_dead(&mut self, frame: Frame, refusal: Refusal, stamp: u32) {
        let dead = within(self.dead_letters.recv()).await.expect("the plane runs");
        assert_eq!(
            dead,
            Frame {
                refusal: refusal as u16,
                stamp: WorkerId(stamp),
                ..frame
            }
        );
    }
}

/// A frame from one worker to another, told apart by its round.
fn frame(from: u32, to: u32, round: u32) -> Frame {
    let kind = FrameKind::Release as u16;
    Frame {
        to: WorkerId(to),
        from: WorkerId(from),
        kind,
        round,
        ..Frame::default()
    }
}

async fn expect(socket: &mut FrameSocket, frame: Frame) {
    assert_eq!(within(socket.recv()).await.expect("read"), Some(frame));
}

/// A pair as a worker makes one, but to be written to byte by byte: near end, far end, and what is registered.
fn raw_pair(kind: PlaneKind) -> (Box<dyn Write + Send>, Option<TcpStream>, OwnedFd) {
    match kind {
        PlaneKind::Sockmap => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
            let near = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
            let (far, _) = listener.accept().expect("accepted");
            let registered = near.try_clone().expect("cloned");
            near.set_nodelay(true).expect("set");
            (Box::new(near), Some(far), registered.into())
        }
        PlaneKind::Relay => {
            let (near, far) = UnixStream::pair().expect("a pair");
            (Box::new(near), None, far.into())
        }
    }
}

macro_rules! on_both_planes {
    ($($(#[$doc:meta])* async fn $name:ident($node:ident: Node) $body:block)*) => {$(
        $(#[$doc])*
        mod $name {
            use super::*;

            #[tokio::test]
            async fn sockmap() {
                if let Some(node) = node_for(PlaneKind::Sockmap, 16) {
                    run(node).await;
                }
            }

            #[tokio::test]
            async fn relay() {
                if let Some(node) = node_for(PlaneKind::Relay, 16) {
                    run(node).await;
                }
            }

            async fn run(mut $node: Node) $body
        }
    )*};
}

on_both_planes! {
    async fn a_frame_reaches_its_destination_unchanged(node: Node) {
        let (mut one, mut two) = (node.worker(1, 1), node.worker(2, 1));
        let update = Frame {
            kind: FrameKind::Update as u16,
            length: 1 << 20,
            samples: 600,
            value: 0.5_f64.to_bits(),
            covers: 3,
            ..frame(1, 2, 1)
        };
        one.send(&[update]).await.expect("sent");
        expect(&mut two, update).await;
        let answer = frame(2, 1, 2);
        two.send(&[answer]).await.expect("sent");
        expect(&mut one, answer).await;
        let to_itself = frame(1, 1, 3);
        one.send(&[to_itself]).await.expect("sent");
        expect(&mut one, to_itself).await;
    }

    async fn one_send_reaches_two_destinations_each_in_order(node: Node) {
        let (mut one, mut two, mut three) = (node.worker(1, 1), node.worker(2, 1), node.worker(3, 1));
        let frames: Vec<Frame> = (0..10_000).map(|n| frame(1, 2 + n % 2, n)).collect();
        // At once, since the relay takes only what somebody reads.
        let (sent, (), ()) = tokio::join!(
            within(one.send(&frames)),
            async { for n in (0..10_000).step_by(2) { expect(&mut two, frame(1, 2, n)).await } },
            async { for n in (1..10_000).step_by(2) { expect(&mut three, frame(1, 3, n)).await } },
        );
        sent.expect("sent");
    }

    /// The kernel hands over what stands together and goes to one worker together; who may send what is no less looked at.
    async fn frames_that_go_together_are_judged_one_by_one(node: Node) {
        let (mut one, mut two, closed) = (node.worker(1, 1), node.worker(2, 1), node.worker(3, 1));
        drop(closed);
        node.until_closed(3).await;
        let mut sent = Vec::new();
        for length in 1..=50 {
            for at in 0..length {
                let forged = at > 0 && at == length / 2;
                let from = if forged { 2 } else { 1 };
                sent.push(Frame { kind: FrameKind::Update as u16, length: 10, ..frame(from, 2, length * 100 + at) });
            }
            sent.extend((0..length % 4).map(|at| frame(1, 3, length * 100 + at)));
        }
        let good = |frame: &&Frame| (frame.from.0, frame.to.0) == (1, 2);
        let mut dead: HashMap<(u32, u32), Frame> = sent
            .iter()
            .filter(|frame| !good(frame))
            .map(|frame| {
                let refusal = if frame.to.0 == 3 { Refusal::WorkerGone } else { Refusal::ForgedSource };
                ((frame.to.0, frame.round), Frame { refusal: refusal as u16, stamp: WorkerId(1), ..*frame })
            })
            .collect();
        let refused = dead.len() as u64;
        let (send, (), ()) = tokio::join!(
            within(one.send(&sent)),
            async { for frame in sent.iter().filter(good) { expect(&mut two, *frame).await } },
            async {
                while !dead.is_empty() {
                    let letter = within(node.dead_letters.recv()).await.expect("the plane runs");
                    assert_eq!(dead.remove(&(letter.to.0, letter.round)), Some(letter));
                }
            },
        );
        send.expect("sent");
        let taken = sent.iter().filter(good).count() as u64;
        let counters = node.counters(1);
        let expected = Counters {
            frames: taken,
            referenced_bytes: 10 * taken,
            refused,
            last_ns: counters.last_ns,
        };
        assert_eq!(counters, expected);
    }

    async fn a_frame_may_come_in_pieces(node: Node) {
        let (mut near, _far, registered) = raw_pair(node.plane.kind());
        node.register(1, 1, registered).expect("registered");
        let mut two = node.worker(2, 1);
        for byte in frame(1, 2, 1).as_bytes() {
            near.write_all(&[*byte]).expect("written");
        }
        expect(&mut two, frame(1, 2, 1)).await;
        for n in 2..100 {
            let (cut, bytes) = (n as usize % 63 + 1, frame(1, 2, n));
            near.write_all(&bytes.as_bytes()[..cut]).expect("written");
            near.write_all(&bytes.as_bytes()[cut..]).expect("written");
            expect(&mut two, bytes).await;
        }
        near.write_all([frame(1, 2, 100), frame(1, 2, 101)].as_bytes()).expect("written");
        expect(&mut two, frame(1, 2, 100)).await;
        expect(&mut two, frame(1, 2, 101)).await;
    }

    /// Whole frames arrive; what is left over in the write is kept by the relay and cut off by the sockmap.
    async fn a_write_that_ends_within_a_frame_spoils_nothing(node: Node) {
        let (mut near, _far, registered) = raw_pair(node.plane.kind());
        node.register(1, 1, registered).expect("registered");
        let mut two = node.worker(2, 1);
        let bytes = [frame(1, 2, 1), frame(1, 2, 2), frame(1, 2, 3)];
        assert_eq!(near.write(&bytes.as_bytes()[..150]).expect("written"), 150);
        expect(&mut two, bytes[0]).await;
        expect(&mut two, bytes[1]).await;
        if node.plane.kind() == PlaneKind::Sockmap {
            near.write_all(bytes[2].as_bytes()).expect("written");
        } else {
            near.write_all(&bytes.as_bytes()[150..]).expect("written");
        }
        expect(&mut two, bytes[2]).await;
    }

    async fn what_may_not_be_sent_comes_back_with_the_reason_and_the_sender(node: Node) {
        let (mut one, mut two) = (node.worker(1, 1), node.worker(2, 1));
        let _other_job = node.worker(3, 2);
        let cases = [
            (frame(2, 2, 1), Refusal::ForgedSource),
            (frame(0, 2, 2), Refusal::ForgedSource),
            (frame(1, 3, 3), Refusal::OtherJob),
            (frame(1, 99, 4), Refusal::UnknownWorker),
            (frame(1, 0, 5), Refusal::UnknownWorker),
            // What the sender writes where the plane writes counts for nothing.
            (Frame { stamp: WorkerId(2), refusal: 77, ..frame(1, 99, 6) }, Refusal::UnknownWorker),
        ];
        for (bad, refusal) in cases {
            one.send(&[bad]).await.expect("sent");
            node.expect_dead(bad, refusal, 1).await;
        }
        // Bad and good in one send: each goes its way, and none sticks.
        let mixed = [frame(1, 2, 7), frame(1, 3, 8), frame(1, 2, 9), frame(2, 2, 10), frame(1, 2, 11)];
        one.send(&mixed).await.expect("sent");
        for n in [7, 9, 11] {
            expect(&mut two, frame(1, 2, n)).await;
        }
        node.expect_dead(mixed[1], Refusal::OtherJob, 1).await;
        node.expect_dead(mixed[3], Refusal::ForgedSource, 1).await;
    }

    async fn a_frame_to_a_closed_socket_comes_back_and_the_next_goes_through(node: Node) {
        let (mut one, two, mut three) = (node.worker(1, 1), node.worker(2, 1), node.worker(3, 1));
        drop(two);
        node.until_closed(2).await;
        one.send(&[frame(1, 2, 1), frame(1, 3, 2)]).await.expect("sent");
        node.expect_dead(frame(1, 2, 1), Refusal::WorkerGone, 1).await;
        expect(&mut three, frame(1, 3, 2)).await;
        node.plane.unregister(WorkerId(2)).expect("unregistered");
        one.send(&[frame(1, 2, 3), frame(1, 3, 4)]).await.expect("sent");
        node.expect_dead(frame(1, 2, 3), Refusal::UnknownWorker, 1).await;
        expect(&mut three, frame(1, 3, 4)).await;
        assert_eq!((node.counters(1).frames, node.counters(1).refused), (2, 2));
    }

    async fn a_socket_that_was_never_registered_reaches_nobody(node: Node) {
        let mut two = node.worker(2, 1);
        let (mut stranger, _unregistered) = FrameSocket::pair_for(node.plane.kind()).expect("a pair");
        stranger.send(&[frame(1, 2, 1)]).await.expect("sent to its own far end");
        // Nor does one that is registered no more.
        let mut former = node.worker(1, 1);
        node.plane.unregister(WorkerId(1)).expect("unregistered");
        _ = former.send(&[frame(1, 2, 2)]).await;
        let mut three = node.worker(3, 1);
        three.send(&[frame(3, 2, 3)]).await.expect("sent");
        expect(&mut two, frame(3, 2, 3)).await;
        assert!(node.dead_letters.try_recv().is_err());
        assert_eq!(node.plane.counters(WorkerId(1)).expect("readable"), None);
    }

    /// A worker that wrote and died has written: the frames of its last moment arrive.
    async fn what_was_sent_before_the_end_arrives(node: Node) {
        let mut two = node.worker(2, 1);
        let mut one = node.worker(1, 1);
        let sent: Vec<Frame> = (1..=500).map(|n| frame(1, 2, n)).collect();
        one.send(&sent).await.expect("sent");
        drop(one);
        node.plane.unregister(WorkerId(1)).expect("unregistered");
        for frame in sent {
            expect(&mut two, frame).await;
        }
    }

    async fn counters_count_what_was_sent(node: Node) {
        let (mut one, mut two) = (node.worker(1, 1), node.worker(2, 1));
        assert_eq!(node.counters(1), Counters::default());
        let lends = |kind, round| Frame { kind: kind as u16, length: 1000, ..frame(1, 2, round) };
        let sent = [
            lends(FrameKind::Update, 1),
            lends(FrameKind::Model, 2),
            lends(FrameKind::Release, 3),
            Frame { length: 1000, ..frame(1, 99, 4) },
        ];
        one.send(&sent).await.expect("sent");
        for frame in &sent[..3] {
            expect(&mut two, *frame).await;
        }
        node.expect_dead(sent[3], Refusal::UnknownWorker, 1).await;
        let counters = node.counters(1);
        assert!(counters.last_ns > 0);
        let expected = Counters { frames: 3, referenced_bytes: 2000, refused: 1, last_ns: counters.last_ns };
        assert_eq!(counters, expected);
        assert_eq!(node.counters(2), Counters::default());
        one.send(&[frame(1, 2, 5)]).await.expect("sent");
        expect(&mut two, frame(1, 2, 5)).await;
        assert!(node.counters(1).last_ns > counters.last_ns);
    }

    async fn one_worker_more_than_fits_is_refused_and_the_others_go_on(node: Node) {
        let mut sockets: Vec<FrameSocket> = (1..=16).map(|n| node.worker(n, 1)).collect();
        let (_more, registered) = FrameSocket::pair_for(node.plane.kind()).expect("a pair");
        let error = node.register(17, 1, registered).expect_err("full");
        assert!(matches!(error, PlaneError::Full { capacity: 16 }), "{error}");
        assert!(error.to_string().contains("16 workers"), "{error}");
        let (last, others) = sockets.split_last_mut().expect("sixteen");
        for (n, socket) in (1..).zip(others) {
            socket.send(&[frame(n, 16, n)]).await.expect("sent");
            expect(last, frame(n, 16, n)).await;
        }
        // Room again when one has gone.
        node.plane.unregister(WorkerId(1)).expect("unregistered");
        node.worker(17, 1).send(&[frame(17, 16, 99)]).await.expect("sent");
        expect(last, frame(17, 16, 99)).await;
    }

    async fn a_descriptor_that_will_not_do_is_named(node: Node) {
        let kind = node.plane.kind();
        let mut refused = |socket: OwnedFd| match node.register(1, 1, socket) {
            Err(PlaneError::Socket { source, .. }) => source,
            other => panic!("registered or failed otherwise: {other:?}"),
        };
        let udp = || OwnedFd::from(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound"));
        let tcp = |kind| {
            use nix::sys::socket::{AddressFamily, SockFlag, socket};
            socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket")
        };
        let unix_pair = |kind| {
            use nix::sys::socket::{AddressFamily, SockFlag, socketpair};
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("a pair")
        };
        use nix::sys::socket::SockType;
        assert!(matches!(refused(File::open("/dev/null").expect("open").into()), SocketError::NotASocket));
        let (pipe, _writer) = std::io::pipe().expect("a pipe");
        assert!(matches!(refused(pipe.into()), SocketError::NotASocket));
        let memfd = lifl_common::arena::memfd::create("test", 4096, false).expect("a memfd");
        assert!(matches!(refused(memfd.into()), SocketError::NotASocket));
        match kind {
            PlaneKind::Sockmap => {
                assert!(matches!(refused(udp()), SocketError::Type { found: 2 }));
                let listening = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
                assert!(matches!(refused(listening.into()), SocketError::NotEstablished { state: 10 }));
                // Its addresses are IPv4's in disguise, its family is not.
                let listener = TcpListener::bind(("::ffff:127.0.0.1", 0)).expect("bound");
                let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
                assert!(matches!(refused(near.into()), SocketError::Family { found: 10, .. }));
                // Multipath TCP answers the same questions as TCP.
                if let Some(near) = multipath_pair() {
                    assert!(matches!(refused(near), SocketError::Protocol { found: 262 }));
                }
                let unix = unix_pair(SockType::Stream).0;
                assert!(matches!(refused(unix), SocketError::Family { found: 1, .. }));
                let unconnected = tcp(SockType::Stream);
                assert!(matches!(refused(unconnected), SocketError::NotEstablished { state: 7 }));
                let (near, far) = tcp_pair();
                drop(far);
                // Its state changes when the far end's FIN has come, which reading waits for.
                assert_eq!(std::io::Read::read(&mut &near, &mut [0]).expect("end of file"), 0);
                assert!(matches!(refused(near.into()), SocketError::NotEstablished { state: 8 }));
            }
            PlaneKind::Relay => {
                assert!(matches!(refused(udp()), SocketError::Family { found: 2, .. }));
                let (near, _far) = tcp_pair();
                assert!(matches!(refused(near.into()), SocketError::Family { found: 2, .. }));
                let packets = unix_pair(SockType::SeqPacket).0;
                assert!(matches!(refused(packets), SocketError::Type { found: 5 }));
                let folder = tempfile::tempdir().expect("a folder");
                let listening = std::os::unix::net::UnixListener::bind(folder.path().join("x")).expect("bound");
                assert!(matches!(refused(listening.into()), SocketError::NotConnected));
                let datagrams = unix_pair(SockType::Datagram).0;
                assert!(matches!(refused(datagrams), SocketError::Type { found: 2 }));
                use nix::sys::socket::{AddressFamily, SockFlag, socket};
                let unconnected =
                    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
                assert!(matches!(refused(unconnected.expect("a socket")), SocketError::NotConnected));
            }
        }
        // None of it took the worker's place.
        let mut one = node.worker(1, 1);
        one.send(&[frame(1, 1, 1)]).await.expect("sent");
        expect(&mut one, frame(1, 1, 1)).await;
    }

    async fn a_socket_or_worker_is_registered_once(node: Node) {
        let (mut one, registered) = FrameSocket::pair_for(node.plane.kind()).expect("a pair");
        let again = registered.try_clone().expect("cloned");
        node.register(1, 1, registered).expect("registered");
        let error = node.register(2, 1, again).expect_err("the same socket");
        let holder = WorkerId(1);
        assert!(matches!(error, PlaneError::SocketTaken { holder: h, .. } if h == holder), "{error}");
        let (_other, registered) = FrameSocket::pair_for(node.plane.kind()).expect("a pair");
        let error = node.register(1, 1, registered).expect_err("the same worker");
        assert!(matches!(error, PlaneError::WorkerTaken(WorkerId(1))), "{error}");
        let (_nobody, registered) = FrameSocket::pair_for(node.plane.kind()).expect("a pair");
        assert!(matches!(node.register(0, 1, registered), Err(PlaneError::Nobody)));
        one.send(&[frame(1, 1, 1)]).await.expect("sent");
        expect(&mut one, frame(1, 1, 1)).await;
    }

    async fn after_shutdown_nothing_is_carried_and_the_dead_letters_end(node: Node) {
        let mut one = node.worker(1, 1);
        node.plane.shutdown().expect("detached");
        _ = one.send(&[frame(1, 99, 1)]).await;
        assert_eq!(within(node.dead_letters.recv()).await, None);
    }
}

/// Runs `make` on a thread that has a network namespace of its own, with this address on its loopback.
///
/// # Panics
/// If the machine refuses; it let the test load a program, so it should not.
fn in_another_netns<T: Send>(address: Ipv4Addr, make: impl FnOnce() -> T + Send) -> T {
    let on_thread = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("bound");
        // SAFETY: all-zero bytes are a valid `ifreq`: numbers, and a union of plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        let bytes = address.octets();
        request.ifr_ifru.ifru_addr.sa_family = libc::AF_INET as libc::sa_family_t;
        // SAFETY: a write to the union's member that was just written to.
        let data = unsafe { &mut request.ifr_ifru.ifru_addr.sa_data };
        for (to, from) in data[2..].iter_mut().zip(bytes) {
            *to = from as libc::c_char;
        }
        let ask = |request: &libc::ifreq, what| {
            // SAFETY: both requests read an `ifreq`, which lives across the call.
            let status = unsafe { libc::ioctl(socket.as_raw_fd(), what, request) };
            assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        };
        ask(&request, libc::SIOCSIFADDR);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        ask(&request, libc::SIOCSIFFLAGS);
        make()
    };
    std::thread::scope(|scope| scope.spawn(on_thread).join().expect("the thread's work"))
}

#[tokio::test]
async fn a_socket_of_another_network_namespace_is_refused() {
    let Some(mut node) = node_for(PlaneKind::Sockmap, 2) else {
        return;
    };
    let (near, _far) = in_another_netns(Ipv4Addr::LOCALHOST, tcp_pair);
    let Err(PlaneError::Socket { source, .. }) = node.register(1, 1, near.into()) else {
        panic!("registered")
    };
    assert!(matches!(source, SocketError::OtherNetns), "{source}");
    assert!(source.to_string().contains("relay"), "{source}");
}

#[tokio::test]
async fn a_socket_that_leaves_the_loopback_is_refused() {
    let Some(mut node) = node_for(PlaneKind::Sockmap, 2) else {
        return;
    };
    let address = Ipv4Addr::new(10, 9, 8, 7);
    let (near, _far) = in_another_netns(address, || {
        let listener = TcpListener::bind((address, 0)).expect("bound");
        let near = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
        (near, listener.accept().expect("accepted").0)
    });
    let Err(PlaneError::Socket { source, .. }) = node.register(1, 1, near.into()) else {
        panic!("registered")
    };
    assert!(
        matches!(source, SocketError::NotLoopback { remote, .. } if remote == address),
        "{source}"
    );
}

#[tokio::test]
async fn a_dropped_sockmap_leaves_no_program_and_no_map() {
    let Some(Node {
        plane: Plane::Sockmap(sockmap),
        ..
    }) = node_for(PlaneKind::Sockmap, 2)
    else {
        return;
    };
    let id = sockmap.program_id().expect("loaded");
    let program = || loaded_programs().flatten().find(|program| program.id() == id);
    let info = program().expect("listed");
    assert_eq!(info.name_as_str(), Some("lifl_verdict"));
    let maps = info.map_ids().expect("readable").expect("this kernel tells");
    assert!(maps.len() >= 4);
    let left = || {
        loaded_maps()
            .flatten()
            .filter(|map| maps.contains(&map.id()))
            .count()
    };
    assert_eq!(left(), maps.len());
    drop(sockmap);
    // The kernel frees them after a grace period.
    within(async {
        while program().is_some() || left() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[test]
fn two_capabilities_are_enough_for_the_sockmap() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime")
    };
    if runtime()
        .block_on(async { node_for(PlaneKind::Sockmap, 2) })
        .is_none()
    {
        return;
    }
    let masks = [
        support::CAPABILITIES
            .iter()
            .fold(0_u64, |mask, (_, number)| mask | 1 << number),
        0,
    ];
    let [loaded, refused] = masks.map(|effective| {
        let on_thread = move || {
            limit_capabilities(effective);
            let request = Request::Sockmap;
            runtime().block_on(async {
                choose(
                    request,
                    Options {
                        max_workers: 2,
                        pin: None,
                    },
                )
                .map(|_| ())
            })
        };
        std::thread::spawn(on_thread).join().expect("the thread's work")
    });
    loaded.expect("loaded");
    let message = refused.expect_err("no capability").to_string();
    assert!(message.contains("lacks CAP_BPF and CAP_NET_ADMIN"), "{message}");
    assert!(message.contains("sudo"), "{message}");
}

/// Leaves the calling thread's effective capabilities only those of the mask.
fn limit_capabilities(effective: u64) {
    // `struct __user_cap_header_struct` and two of `__user_cap_data_struct` in include/uapi/linux/capability.h.
    let header: [u32; 2] = [0x2008_0522, 0];
    let halves = [effective as u32, (effective >> 32) as u32];
    let data = halves.map(|half| [half, half, 0]);
    // SAFETY: `capset` reads the two structs, laid out as the header file says, and writes nothing.
    let status = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

#[tokio::test]
async fn the_program_logs_what_it_refuses() {
    #[derive(Clone)]
    struct Lines(std::sync::mpsc::Sender<String>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0
                .send(String::from_utf8_lossy(bytes).into_owned())
                .map_err(std::io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (lines, logged) = std::sync::mpsc::channel();
    let lines = Lines(lines);
    // For all tests of this process: a callsite is asked once whether anybody listens.
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || lines.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("the only one");

    let Some(mut node) = node_for(PlaneKind::Sockmap, 2) else {
        return;
    };
    node.worker(1, 1).send(&[frame(1, 4242, 1)]).await.expect("sent");
    within(async {
        loop {
            if logged
                .try_iter()
                .any(|line| line.contains("WARN ebpf") && line.contains("worker 4242"))
            {
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Messages that may wait for one receiver in the kernel, and for all workers of one user.
const UNREAD_OF_RECEIVER: u64 = 16_384;
const UNREAD_OF_USER: u64 = 65_536;

impl Node {
    /// As [`worker`](Self::worker), of a job of that user.
    fn worker_of(&mut self, worker: u32, job: u32, uid: u32) -> FrameSocket {
        let (socket, registered) = FrameSocket::pair_for(self.plane.kind()).expect("a pair");
        let member = Member {
            job: JobId(job),
            uid,
            flags: 0,
        };
        let registered = self.plane.register(WorkerId(worker), member, registered);
        registered.expect("registered");
        socket
    }

    /// Sends frames one by one until one comes back; says for which reason.
    async fn fill(&mut self, socket: &mut FrameSocket, from: u32, to: u32) -> Refusal {
        let before = self.counters(from).frames;
        for round in 0_u32.. {
            let sent = self.counters(from).frames - before;
            assert!(
                sent <= UNREAD_OF_USER + 1024,
                "{sent} frames for who does not read"
            );
            for n in 0..256 {
                socket
                    .send(&[frame(from, to, round * 256 + n)])
                    .await
                    .expect("sent");
            }
            tokio::task::yield_now().await;
            let mut first = None;
            while let Ok(dead) = self.dead_letters.try_recv() {
                assert_eq!(dead.stamp.0, from);
                // Some may be left of the receiver before.
                if dead.to.0 == to {
                    first = first.or(Refusal::from_number(dead.refusal));
                }
            }
            if let Some(refusal) = first {
                return refusal;
            }
        }
        unreachable!("an endless loop")
    }
}

/// Sender and receiver are one attacker's: what the receiver says about itself counts for nothing.
#[tokio::test]
async fn frames_for_who_does_not_read_are_bounded_and_others_go_on() {
    let Some(mut node) = node_for(PlaneKind::Sockmap, 4) else {
        return;
    };
    let (mut one, mut deaf) = (node.worker_of(1, 1, 1000), node.worker_of(2, 1, 1000));
    let (mut three, mut four) = (node.worker_of(3, 2, 1001), node.worker_of(4, 2, 1001));
    assert_eq!(node.fill(&mut one, 1, 2).await, Refusal::ReceiverFull);
    let queued = node.counters(1).frames;
    assert!(queued >= UNREAD_OF_RECEIVER / 2, "{queued}: refused too soon");
    assert!(
        queued <= UNREAD_OF_RECEIVER + 64,
        "{queued} are in the kernel for who does not read"
    );
    // Its trouble is not another job's.
    for n in 0..100 {
        three.send(&[frame(3, 4, n)]).await.expect("sent");
        expect(&mut four, frame(3, 4, n)).await;
    }
    // All that was taken is there, and when it has been read there is room again.
    for n in 0..queued {
        let got = within(deaf.recv()).await.expect("read").expect("open");
        assert_eq!((got.from.0, u64::from(got.round)), (1, n));
    }
    let again = frame(1, 2, 4_000_000);
    within(async {
        loop {
            one.send(&[again]).await.expect("sent");
            match tokio::time::timeout(Duration::from_millis(50), deaf.recv()).await {
                Ok(got) => break assert_eq!(got.expect("read"), Some(again)),
                Err(_still_refused) => while node.dead_letters.try_recv().is_ok() {},
            }
        }
    })
    .await;
}

#[tokio::test]
async fn frames_for_all_workers_of_one_user_are_bounded() {
    const DEAF: u32 = 6;
    let Some(mut node) = node_for(PlaneKind::Sockmap, DEAF + 3) else {
        return;
    };
    let mut sender = node.worker_of(1, 1, 1000);
    let deaf: Vec<FrameSocket> = (2..2 + DEAF).map(|id| node.worker_of(id, 1, 1000)).collect();
    let (mut three, mut four) = (node.worker_of(10, 2, 1001), node.worker_of(11, 2, 1001));
    for id in 2..2 + DEAF {
        assert_eq!(node.fill(&mut sender, 1, id).await, Refusal::ReceiverFull);
    }
    let queued = node.counters(1).frames;
    assert!(queued >= UNREAD_OF_USER / 2, "{queued}: refused too soon");
    assert!(
        queued <= UNREAD_OF_USER + 64,
        "{queued} are in the kernel for one user"
    );
    three.send(&[frame(10, 11, 1)]).await.expect("sent");
    expect(&mut four, frame(10, 11, 1)).await;
    // What was for those who leave is nobody's any more.
    drop(deaf);
    for id in 2..2 + DEAF {
        node.plane.unregister(WorkerId(id)).expect("unregistered");
    }
    let mut reader = node.worker_of(20, 1, 1000);
    let again = frame(1, 20, 7);
    within(async {
        loop {
            sender.send(&[again]).await.expect("sent");
            match tokio::time::timeout(Duration::from_millis(50), reader.recv()).await {
                Ok(got) => break assert_eq!(got.expect("read"), Some(again)),
                Err(_still_refused) => while node.dead_letters.try_recv().is_ok() {},
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_relay_gives_back_what_a_full_receiver_cannot_take() {
    let Some(mut node) = node_for(PlaneKind::Relay, 3) else {
        return;
    };
    let (mut one, mut two, mut three) = (node.worker(1, 1), node.worker(2, 1), node.worker(3, 1));
    let frames: Vec<Frame> = (0..100_000).map(|n| frame(1, 2, n)).collect();
    let first_back = async {
        let first = within(node.dead_letters.recv()).await.expect("the plane runs");
        let mut back = 1;
        // The relay reads no more of worker 1 while its dead letters are not read.
        while !node.dead_letters.is_empty() || one_is_unread(&node.plane, 100_000) {
            back += u32::from(within(node.dead_letters.recv()).await.is_some());
        }
        (first, back)
    };
    let (sent, (first, back)) = tokio::join!(one.send(&frames), first_back);
    sent.expect("sent");
    assert_eq!(
        (first.refusal, first.stamp),
        (Refusal::ReceiverFull as u16, WorkerId(1))
    );
    // What the relay took is there, in order, and the receiver's trouble was nobody else's.
    one.send(&[frame(1, 3, 1)]).await.expect("sent");
    expect(&mut three, frame(1, 3, 1)).await;
    assert!(first.round >= 65_536, "{first:?}");
    for n in 0..first.round {
        expect(&mut two, frame(1, 2, n)).await;
    }
    assert!(back <= 100_000 - 65_536);
}

/// However long the daemon takes to read dead letters.
#[tokio::test]
async fn a_relay_hands_over_what_a_worker_wrote_before_it_left() {
    let Some(mut node) = node_for(PlaneKind::Relay, 2) else {
        return;
    };
    let (mut one, mut two) = (node.worker(1, 1), node.worker(2, 1));
    // More dead letters than wait for the daemon, and behind them a frame.
    let mut frames: Vec<Frame> = (0..1500).map(|n| frame(1, 9, n)).collect();
    frames.push(frame(1, 2, 7));
    within(one.send(&frames)).await.expect("sent");
    node.plane.unregister(WorkerId(1)).expect("unregistered");
    // Longer than the relay waits for a stream that is silent.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let reading = async { while node.dead_letters.recv().await.is_some() {} };
    tokio::select! {
        () = reading => panic!("the plane has ended"),
        () = expect(&mut two, frame(1, 2, 7)) => {}
    }
}

/// Whether the plane has yet to read some of what worker 1 sent.
fn one_is_unread(plane: &Plane, sent: u64) -> bool {
    let counters = plane
        .counters(WorkerId(1))
        .expect("readable")
        .expect("registered");
    counters.frames + counters.refused < sent
}

#[tokio::test]
async fn a_relay_survives_garbage_and_half_a_frame() {
    let Some(mut node) = node_for(PlaneKind::Relay, 3) else {
        return;
    };
    let (mut near, _, registered) = raw_pair(PlaneKind::Relay);
    node.register(1, 1, registered).expect("registered");
    let mut garbage = Vec::new();
    let mut state = 1_u64;
    for _ in 0..100 * Frame::BYTES / 8 + 3 {
        // Knuth's MMIX generator: any bytes will do.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        garbage.extend_from_slice(&state.to_ne_bytes());
    }
    near.write_all(&garbage).expect("written");
    drop(near);
    for bytes in garbage.as_chunks::<{ Frame::BYTES }>().0 {
        let bad: Frame = zerocopy::transmute!(*bytes);
        node.expect_dead(bad, Refusal::ForgedSource, 1).await;
    }
    let (mut two, mut three) = (node.worker(2, 1), node.worker(3, 1));
    two.send(&[frame(2, 3, 1)]).await.expect("sent");
    expect(&mut three, frame(2, 3, 1)).await;
}

/// An end of an established pair of Multipath TCP, where the kernel has that.
fn multipath_pair() -> Option<OwnedFd> {
    use nix::sys::socket::{Backlog, SockaddrIn, bind, connect, getsockname, listen};
    let mptcp = || {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        // SAFETY: three numbers, and a descriptor of nobody else's.
        match unsafe { libc::socket(libc::AF_INET, kind, libc::IPPROTO_MPTCP) } {
            -1 => None,
            // SAFETY: as above.
            fd => Some(unsafe { OwnedFd::from_raw_fd(fd) }),
        }
    };
    let (listener, near) = (mptcp()?, mptcp()?);
    bind(listener.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).expect("bound");
    listen(&listener, Backlog::new(1).expect("small")).expect("listens");
    let address: SockaddrIn = getsockname(listener.as_raw_fd()).expect("bound");
    connect(near.as_raw_fd(), &address).expect("connected");
    Some(near)
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let near = TcpStream::connect(listener.local_addr().expect("an address")).expect("connected");
    (near, listener.accept().expect("accepted").0)
}
