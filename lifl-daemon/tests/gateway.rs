//! The gateway, with the test as parent on the node and as worker beyond it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lifl_common::arena::{Layout, OwnedArena};
use lifl_common::client::{Client, ClientError, FrameSocket};
use lifl_common::control::{ErrorCode, Event, RemoteWorker};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{JobId, Key, WorkerId};
use lifl_common::session::Broker;
use lifl_common::session::handshake::HandshakeError;
use lifl_common::session::{
    Buffer, Destination, JobToken, Message, Object, Secret, SessionError, Source, Traffic, TransferEvent,
    Transfers, Wire, proxy_name, tcp,
};
use lifl_common::update::{Cover, DType, Metadata, Schema, TensorSpec, UpdateInfo, image};
use lifl_daemon::plane::Request;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Brokers, Daemon, GatewayOptions, Options};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(30);

/// Elements of a job's one tensor: 8 MB, more than a connection holds.
const SOME: usize = 2_000_000;

/// Elements of a tensor that is under way for a while.
const MANY: usize = 16_000_000;

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

/// A daemon, a job whose coordinator is also the parent, and its open gateway.
struct Stage {
    daemon: Daemon,
    client: Client,
    job: JobId,
    frames: FrameSocket,
    id: WorkerId,
    arena: OwnedArena,
    /// What was published in it.
    made: Vec<Key>,
    schema: Schema,
    address: SocketAddr,
    token: JobToken,
    folder: tempfile::TempDir,
}

/// A worker beyond the node.
struct Remote {
    transfers: Transfers,
    name: String,
    secret: Secret,
    instance: u64,
}

impl Stage {
    async fn set(grace: Duration, elements: usize) -> Self {
        let gateway = GatewayOptions {
            grace,
            ..GatewayOptions::default()
        };
        Self::set_with(gateway, elements).await
    }

    async fn set_with(gateway: GatewayOptions, elements: usize) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let options = Options {
            socket: folder.path().join("lifl.sock"),
            socket_mode: 0o600,
            socket_group: None,
            plane: Request::Relay,
            pool_bytes: 512 << 20,
            huge_pages: HugePages::Never,
            max_workers: 16,
            pin: None,
            grace: Duration::ZERO,
            flame: None,
            gateway,
        };
        let daemon = Daemon::start(options, CancellationToken::new()).expect("a daemon");
        let mut client = Client::connect(daemon.socket()).await.expect("connected");
        let job = client.create_job("test").await.expect("made");
        let registration = client
            .register(job, "coordinator", "coordinator")
            .await
            .expect("registered");
        let tensor = TensorSpec::new("parameters", DType::F32, [elements]);
        let schema = Schema::new(vec![tensor]).expect("a schema");
        let object_bytes = image::image_bytes(&schema) as u64;
        let layout = Layout::for_objects(1, object_bytes).expect("a layout");
        let arena = client.create_arena(layout).await.expect("an arena").arena;
        let any = "127.0.0.1:0".parse().expect("an address");
        let opened = client.open_gateway(Some(any), None, object_bytes).await;
        let (token, address) = opened.expect("open");
        let expected = ["one", "two"].map(|name| RemoteWorker {
            name: name.to_owned(),
            role: "trainer".to_owned(),
        });
        client.expect_workers(&expected).await.expect("expected");
        Self {
            daemon,
            client,
            job,
            frames: registration.frames,
            id: registration.worker,
            arena,
            made: Vec::new(),
            schema,
            address: address.expect("an address"),
            token,
            folder,
        }
    }

    fn object(&self, round: u32) -> Object {
        Object::of(round, &self.schema)
    }

    fn update(&self, round: u32) -> Message {
        let info = UpdateInfo {
            samples: 5,
            cover: Cover::of(0),
            loss: Some(0.5),
            ..UpdateInfo::default()
        };
        Message::Update(self.object(round), info)
    }

    /// A connection of a worker that is let in.
    async fn enter(&self, remote: &mut Remote) -> Wire {
        self.enter_by(self.address, remote).await
    }

    /// The same, by an address from which somebody passes all on.
    async fn enter_by(&self, address: SocketAddr, remote: &mut Remote) -> Wire {
        let (secret, name) = (&remote.secret, &remote.name);
        let connected = tcp::connect(address, secret, name, remote.instance);
        let mut wire = within(connected).await.expect("proved");
        within(wire.welcomed()).await.expect("let in");
        remote.transfers.resume(&mut wire);
        wire
    }

    /// Why a worker that has proved itself is not let in.
    async fn turned_away(&self, remote: &Remote) -> String {
        let connected = tcp::connect(self.address, &remote.secret, &remote.name, remote.instance);
        let mut wire = within(connected).await.expect("proved");
        match within(wire.welcomed()).await {
            Err(SessionError::Bye { last: true, reason }) => reason,
            other => panic!("{other:?}"),
        }
    }

    /// What the gateway answers to a first message, until it closes the connection.
    async fn answer(&self, message: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.address).await.expect("connected");
        stream.write_all(message).await.expect("written");
        let mut answer = Vec::new();
        within(stream.read_to_end(&mut answer))
            .await
            .expect("closed in order");
        answer
    }

    /// The id of the proxy that joins next.
    async fn proxy(&mut self, name: &str) -> WorkerId {
        loop {
            if let Event::PeerJoined { worker, name: joined } =
                within(self.client.event()).await.expect("open")
            {
                assert_eq!(joined, proxy_name(name));
                return worker;
            }
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
        let frame = within(self.frames.recv()).await.expect("read").expect("open");
        assert_eq!(FrameKind::from_number(frame.kind), Some(kind), "{frame:?}");
        frame
    }

    /// That nothing comes in that round is told to the parent and to the coordinator, which are one here.
    async fn expect_nothing(&mut self, round: u32) {
        for _ in 0..2 {
            assert_eq!(self.expect(FrameKind::Nothing).await.round, round);
        }
    }

    /// Begins a round with that child and lends it a model of all ones.
    async fn begin(&mut self, child: WorkerId, round: u32) {
        self.made.retain(|&key| !self.arena.free(key));
        let mut slot = self.arena.begin().expect("free");
        for element in slot.bytes_mut()[image::data_range(&self.schema)].chunks_exact_mut(4) {
            element.copy_from_slice(&1.0_f32.to_le_bytes());
        }
        let metadata = Metadata {
            generation: slot.key().generation,
            ..Metadata::default()
        };
        image::write_header(slot.bytes_mut(), &self.schema, &metadata);
        let key = self.arena.publish(slot);
        self.made.push(key);
        self.arena.lend(key, child).expect("published");
        let begin = Frame {
            round,
            value: u64::from(self.id.0),
            ..Frame::default()
        };
        self.send(child, FrameKind::Begin, begin).await;
        let model = Frame {
            round,
            key,
            length: image::image_bytes(&self.schema) as u64,
            ..Frame::default()
        };
        self.send(child, FrameKind::Model, model).await;
    }

    async fn model_is_back(&mut self, child: WorkerId) {
        let back = self.expect(FrameKind::Release).await;
        self.arena.release(back.key, child).expect("lent");
    }

    fn remote(&self, name: &str, instance: u64) -> Remote {
        Remote {
            transfers: Transfers::default(),
            name: name.to_owned(),
            secret: self.token.participant(name),
            instance,
        }
    }

    /// Ends the job and the daemon; nothing may be left.
    async fn leave(mut self) {
        self.client.end_job("over").await.expect("its own");
        let address = self.address;
        drop((self.client, self.frames));
        within(self.daemon.stop()).await.expect("stopped");
        tokio::net::TcpStream::connect(address)
            .await
            .expect_err("the listener is closed");
        drop(self.folder);
    }
}

impl Remote {
    async fn next(&mut self, wire: &mut Wire) -> TransferEvent {
        within(self.transfers.next(wire)).await.expect("open")
    }

    /// Takes the model that comes.
    async fn model(&mut self, wire: &mut Wire) -> (Object, Destination) {
        loop {
            match self.next(wire).await {
                TransferEvent::Offered(Message::Model(object)) => {
                    let destination = Destination::Private(Buffer::new(object.length as usize));
                    self.transfers.accept(wire, object, destination);
                }
                TransferEvent::Received { object, destination } => {
                    within(wire.flush()).await.expect("open");
                    return (object, destination);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    async fn verdict(&mut self, wire: &mut Wire) -> (u32, u16) {
        loop {
            match self.next(wire).await {
                TransferEvent::Message(Message::Verdict { round, refusal }) => return (round, refusal),
                TransferEvent::Sent(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// The data of one of the stage's updates: all that value.
fn filled(stage: &Stage, value: f32) -> Source {
    let mut buffer = Buffer::new(stage.schema.data_bytes());
    for element in buffer.bytes_mut().chunks_exact_mut(4) {
        element.copy_from_slice(&value.to_le_bytes());
    }
    Source::Private(Arc::new(buffer))
}

#[tokio::test]
async fn an_update_goes_on_where_it_broke_and_counts_once() {
    let mut stage = Stage::set(PATIENCE, MANY).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    wire.send(&Message::Ready);
    within(wire.flush()).await.expect("open");
    assert_eq!(stage.expect(FrameKind::Ready).await.from, proxy);

    stage.begin(proxy, 1).await;
    let (object, mut destination) = remote.model(&mut wire).await;
    assert_eq!(object, stage.object(1));
    assert!(
        destination
            .data_mut()
            .chunks_exact(4)
            .all(|four| four == 1.0_f32.to_le_bytes())
    );
    stage.model_is_back(proxy).await;

    // A third of the update, then the connection breaks; the same again; then the rest.
    remote
        .transfers
        .offer(Some(&mut wire), stage.update(1), filled(&stage, 3.0));
    for third in 1..3 {
        while remote.transfers.moved() < object.length + third * object.length / 3 {
            let pause = Duration::from_millis(1);
            let event = tokio::time::timeout(pause, remote.transfers.next(&mut wire)).await;
            assert!(event.is_err(), "{event:?}");
        }
        wire = stage.enter(&mut remote).await;
    }
    let traffic = Arc::new(Traffic::default());
    wire.count_in(Arc::clone(&traffic));
    assert!(matches!(remote.next(&mut wire).await, TransferEvent::Sent(1)));
    let sent = traffic.sent();
    assert!(sent < object.length / 2, "{sent} bytes: it began anew");

    let lent = stage.expect(FrameKind::Update).await;
    assert_eq!(
        (lent.from, lent.round, lent.samples, lent.covers),
        (proxy, 1, 5, 1)
    );
    assert_eq!(f64::from_bits(lent.value), 0.5);
    let arena = stage
        .client
        .open_arena(lent.key.arena)
        .await
        .expect("the proxy's");
    let bytes = arena.object(lent.key, lent.length).expect("in bounds");
    let (metadata, data) = image::check(bytes, &stage.schema).expect("an image");
    assert_eq!(
        (metadata.maker.as_str(), metadata.round, metadata.info.samples),
        ("one", 1, 5)
    );
    assert_eq!(metadata.generation, lent.key.generation);
    assert!(
        bytes[data]
            .chunks_exact(4)
            .all(|four| four == 3.0_f32.to_le_bytes())
    );

    // Said again after yet another break, it is known, and lent no second time.
    let mut wire = stage.enter(&mut remote).await;
    remote
        .transfers
        .offer(Some(&mut wire), stage.update(1), filled(&stage, 3.0));
    assert!(matches!(remote.next(&mut wire).await, TransferEvent::Sent(1)));
    let accepted = Frame {
        round: 1,
        key: lent.key,
        ..Frame::default()
    };
    stage.send(proxy, FrameKind::Release, accepted).await;
    assert_eq!(remote.verdict(&mut wire).await, (1, 0));

    // Whoever missed the verdict hears it again; and the next frame of the parent is the next round's.
    let mut wire = stage.enter(&mut remote).await;
    assert_eq!(remote.verdict(&mut wire).await, (1, 0));
    stage.begin(proxy, 2).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    wire.send(&Message::Nothing(2));
    within(wire.flush()).await.expect("open");
    stage.expect_nothing(2).await;

    stage.client.end_job("that was it").await.expect("its own");
    match remote.next(&mut wire).await {
        TransferEvent::Message(Message::End(reason)) => assert_eq!(reason, "that was it"),
        other => panic!("{other:?}"),
    }
    drop((stage.client, stage.frames));
    within(stage.daemon.stop()).await.expect("stopped");
}

#[tokio::test]
async fn updates_that_are_none_are_refused_by_name() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    stage.begin(proxy, 1).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    // Of a round that is not, of another shape, and a second try.
    remote
        .transfers
        .offer(Some(&mut wire), stage.update(9), filled(&stage, 1.0));
    assert_eq!(remote.verdict(&mut wire).await, (9, Refusal::NotExpected as u16));
    let Message::Update(mut object, info) = stage.update(1) else {
        panic!("it is one");
    };
    object.schema += 1;
    let other = Message::Update(object, info);
    remote
        .transfers
        .offer(Some(&mut wire), other, filled(&stage, 1.0));
    assert_eq!(remote.verdict(&mut wire).await, (1, Refusal::WrongShape as u16));
    // The parent does not wait for it.
    stage.expect_nothing(1).await;
    remote
        .transfers
        .offer(Some(&mut wire), stage.update(1), filled(&stage, 1.0));
    assert_eq!(remote.verdict(&mut wire).await, (1, Refusal::WrongShape as u16));

    // The parent's own refusal is passed on, and the slot is free for the next round.
    for round in 2..4 {
        stage.begin(proxy, round).await;
        remote.model(&mut wire).await;
        stage.model_is_back(proxy).await;
        remote
            .transfers
            .offer(Some(&mut wire), stage.update(round), filled(&stage, f32::NAN));
        assert!(matches!(remote.next(&mut wire).await, TransferEvent::Sent(sent) if sent == round));
        let lent = stage.expect(FrameKind::Update).await;
        let refused = Frame {
            round,
            key: lent.key,
            refusal: Refusal::NotFinite as u16,
            ..Frame::default()
        };
        stage.send(proxy, FrameKind::Refuse, refused).await;
        assert_eq!(
            remote.verdict(&mut wire).await,
            (round, Refusal::NotFinite as u16)
        );
    }
    stage.leave().await;
}

#[tokio::test]
async fn what_is_late_is_not_taken() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    stage.begin(proxy, 1).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    // In the middle of the update the next round begins.
    let traffic = Arc::new(Traffic::default());
    wire.count_in(Arc::clone(&traffic));
    remote
        .transfers
        .offer(Some(&mut wire), stage.update(1), filled(&stage, 1.0));
    tokio::select! {
        event = remote.transfers.next(&mut wire) => panic!("{event:?}"),
        () = within(async {
            while traffic.sent() < 1 << 20 {
                tokio::task::yield_now().await;
            }
        }) => {}
    }
    stage.begin(proxy, 2).await;
    let (round, refusal) = loop {
        match remote.next(&mut wire).await {
            TransferEvent::Message(Message::Verdict { round, refusal }) => break (round, refusal),
            TransferEvent::Offered(Message::Model(object)) => {
                assert_eq!(object.round, 2);
                let destination = Destination::Private(Buffer::new(object.length as usize));
                remote.transfers.accept(&mut wire, object, destination);
            }
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((round, refusal), (1, Refusal::NotExpected as u16));
    remote.transfers.withdraw();
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    stage.leave().await;
}

/// A first message as it is framed: `u32` length, then itself.
fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u32).to_le_bytes()[..], message].concat()
}

#[tokio::test]
async fn only_the_jobs_own_workers_are_let_in() {
    let stage = Stage::set(PATIENCE, SOME).await;
    let refused = async |secret: &Secret, name: &str| {
        let connected = tcp::connect(stage.address, secret, name, 1);
        match within(connected).await.map(drop) {
            Err(SessionError::Handshake(error)) => assert_eq!(error, HandshakeError::Proof),
            other => panic!("{name}: {other:?}"),
        }
    };
    // Of no job, of nobody who is expected, of another who is.
    refused(&JobToken::new().participant("one"), "one").await;
    refused(&stage.token.participant("three"), "three").await;
    refused(&stage.token.participant("two"), "one").await;
    refused(&stage.token.participant("one"), "two").await;
    let mut first = stage.remote("one", 1);
    let _wire = stage.enter(&mut first).await;
    let reason = stage.turned_away(&stage.remote("one", 2)).await;
    assert!(reason.contains("another process"), "{reason}");

    // Another job shares the listener, and each has its own secrets.
    let mut client = Client::connect(stage.daemon.socket()).await.expect("connected");
    let job = client.create_job("other").await.expect("made");
    assert_ne!(job, stage.job);
    let (token, address) = client
        .open_gateway(Some(stage.address), None, 4096)
        .await
        .expect("open");
    assert_eq!(address, Some(stage.address));
    refused(&token.participant("two"), "two").await;
    client.end_job("over").await.expect("its own");
    drop(client);
    let mut second = stage.remote("two", 1);
    let _second = stage.enter(&mut second).await;
    stage.leave().await;
}

#[tokio::test]
async fn strangers_hear_the_same_whatever_they_say() {
    let stage = Stage::set(PATIENCE, SOME).await;
    let hello = |version: u16, participant: [u8; 16]| {
        let fields = [
            &b"\x01LIFL"[..],
            &version.to_le_bytes(),
            &participant,
            &[7; 8],
            &[9; 32],
        ];
        framed(&fields.concat())
    };
    let (known, unknown) = (stage.token.participant("one").id().0, [0; 16]);
    let refusal = stage.answer(&hello(2, known)).await;
    let text = String::from_utf8_lossy(&refusal);
    assert!(
        text.contains("not let in") && text.contains("version 3"),
        "{text}"
    );
    assert!(!text.contains("one"), "{text}");
    let odd = hello(3, known);
    for message in [
        hello(0, known),
        hello(4, known),
        hello(u16::MAX, unknown),
        odd[..4].iter().copied().chain([0; 63]).collect(),
        framed(&odd[4..66]),
        framed(&[&odd[4..], &[0]].concat()),
        u32::MAX.to_le_bytes().iter().copied().chain([1]).collect(),
        0_u32.to_le_bytes().iter().copied().chain([1]).collect(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        assert!(stage.answer(&message).await == refusal, "{message:?}");
    }
    // One who is expected and one who is not are asked alike, and a wrong proof is answered alike.
    let mut asked = Vec::new();
    for participant in [known, unknown] {
        let proof = framed(&[&[14][..], &[5; 32]].concat());
        let answer = stage.answer(&[hello(3, participant), proof].concat()).await;
        let (challenge, rest) = answer.split_at(4 + 67);
        assert_eq!(rest, refusal);
        asked.push(challenge[..7].to_vec());
    }
    assert_eq!(asked[0], asked[1]);
    stage.leave().await;
}

/// Passes on what comes to an address to another, and keeps what the one who connected has said. What is sent to the second
/// part of what it gives goes to the gateway as if it came from there.
async fn eavesdrop(
    to: SocketAddr,
) -> (
    SocketAddr,
    tokio::sync::mpsc::UnboundedSender<Vec<u8>>,
    Arc<Recorded>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let (inject, mut injected) = tokio::sync::mpsc::unbounded_channel::<Vec<u8>>();
    let recorded = Arc::new(Recorded::default());
    let record = Arc::clone(&recorded);
    tokio::spawn(async move {
        let (worker, _) = listener.accept().await.expect("accepted");
        let gateway = TcpStream::connect(to).await.expect("connected");
        let (mut from_worker, mut to_worker) = worker.into_split();
        let (mut from_gateway, mut to_gateway) = gateway.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_gateway, &mut to_worker).await });
        let mut bytes = vec![0; 1 << 16];
        loop {
            let sent = tokio::select! {
                read = from_worker.read(&mut bytes) => {
                    let Ok(read @ 1..) = read else { return };
                    record.lock().expect("whole").extend(&bytes[..read]);
                    to_gateway.write_all(&bytes[..read]).await
                }
                Some(bytes) = injected.recv() => to_gateway.write_all(&bytes).await,
            };
            if sent.is_err() {
                return;
            }
        }
    });
    (address, inject, recorded)
}

type Recorded = std::sync::Mutex<Vec<u8>>;

#[tokio::test]
async fn what_was_recorded_takes_no_session_over() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let (between, _, recorded) = eavesdrop(stage.address).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter_by(between, &mut remote).await;
    let proxy = stage.proxy("one").await;
    wire.send(&Message::Ready);
    within(wire.flush()).await.expect("open");
    assert_eq!(stage.expect(FrameKind::Ready).await.from, proxy);
    let (hello, proof) = (4 + 63, 4 + 33);
    let said = recorded.lock().expect("whole").clone();
    assert!(said.len() > hello + proof);

    // The hello alone, the whole handshake, and all that followed, while the true session lives and after it.
    for lives in [true, false] {
        for bytes in [hello, hello + proof, said.len()] {
            let mut stranger = TcpStream::connect(stage.address).await.expect("connected");
            stranger.write_all(&said[..bytes]).await.expect("written");
            let mut answer = vec![0; 4 + 67];
            within(stranger.read_exact(&mut answer))
                .await
                .expect("a challenge");
            if bytes > hello {
                let mut refusal = Vec::new();
                within(stranger.read_to_end(&mut refusal)).await.expect("closed");
                assert!(
                    String::from_utf8_lossy(&refusal).contains("not let in"),
                    "{refusal:?}"
                );
            }
        }
        if lives {
            // Nobody has disturbed the round.
            stage.begin(proxy, 1).await;
            remote.model(&mut wire).await;
            stage.model_is_back(proxy).await;
            wire.send(&Message::Nothing(1));
            within(wire.flush()).await.expect("open");
            stage.expect_nothing(1).await;
            drop(wire);
            // Only a new handshake takes the session up.
            wire = stage.enter(&mut remote).await;
        }
    }
    stage.begin(proxy, 2).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    stage.leave().await;
}

#[tokio::test]
async fn who_has_the_connection_can_put_nothing_into_the_session() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let mut remote = stage.remote("one", 7);
    let mut proxy = None;
    let ready = framed(&[&[3][..], &[0; 16]].concat());
    let nothing = framed(&[&[9, 1, 0, 0, 0][..], &[0; 16]].concat());
    for (round, forged) in [(1, nothing), (2, ready)] {
        let (between, inject, recorded) = eavesdrop(stage.address).await;
        let mut wire = stage.enter_by(between, &mut remote).await;
        let proxy = match proxy {
            Some(proxy) => proxy,
            None => *proxy.insert(stage.proxy("one").await),
        };
        if round > 1 {
            assert_eq!(remote.verdict(&mut wire).await, (round - 1, 0));
        }
        stage.begin(proxy, round).await;
        remote.model(&mut wire).await;
        stage.model_is_back(proxy).await;
        // What was said before, said again, and what was never said.
        let handshake = 4 + 63 + 4 + 33;
        let before = recorded.lock().expect("whole")[handshake..].to_vec();
        inject
            .send(if round == 1 { forged } else { before })
            .expect("open");
        let broken = within(async {
            loop {
                if let Err(broken) = remote.transfers.next(&mut wire).await {
                    return broken;
                }
            }
        });
        let broken = broken.await;
        assert!(
            matches!(
                broken,
                SessionError::Bye { last: false, .. } | SessionError::Closed | SessionError::Io(_)
            ),
            "{broken}"
        );
        // The parent has heard nothing of it: the next that it hears is what the worker says.
        let mut wire = stage.enter(&mut remote).await;
        remote
            .transfers
            .offer(Some(&mut wire), stage.update(round), filled(&stage, 1.0));
        loop {
            match remote.next(&mut wire).await {
                TransferEvent::Sent(sent) if sent == round => break,
                // Of the round before, again.
                TransferEvent::Message(Message::Verdict { round: judged, .. }) if judged < round => {}
                other => panic!("{other:?}"),
            }
        }
        let lent = stage.expect(FrameKind::Update).await;
        assert_eq!(lent.round, round);
        let accepted = Frame {
            round,
            key: lent.key,
            ..Frame::default()
        };
        stage.send(proxy, FrameKind::Release, accepted).await;
        assert_eq!(remote.verdict(&mut wire).await, (round, 0));
    }
    stage.leave().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_get_in_past_a_flood_of_connections() {
    let mut stage = Stage::set(PATIENCE, 64).await;
    let names: Vec<RemoteWorker> = (0..12)
        .map(|n| RemoteWorker {
            name: format!("late-{n}"),
            role: "trainer".to_owned(),
        })
        .collect();
    stage.client.expect_workers(&names).await.expect("expected");
    // Somebody else's address, from which connections are opened without end.
    let address = stage.address;
    let flood = tokio::spawn(async move {
        let mut held = std::collections::VecDeque::new();
        loop {
            let socket = TcpSocket::new_v4().expect("a socket");
            socket
                .bind("127.0.0.9:0".parse().expect("an address"))
                .expect("bound");
            if let Ok(stream) = socket.connect(address).await {
                held.push_back(stream);
            }
            if held.len() > 150 {
                held.pop_front();
            }
        }
    });
    for name in &names {
        let stream = TcpStream::connect(address).await.expect("connected");
        // As long as a message takes around the world.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let secret = stage.token.participant(&name.name);
        let mut wire = within(tcp::introduce(stream, &secret, &name.name, 1))
            .await
            .expect("proved");
        within(wire.welcomed()).await.expect("let in");
    }
    flood.abort();
    stage.leave().await;
}

#[tokio::test]
async fn who_only_pings_does_not_hold_up_the_round() {
    let mut stage = Stage::set(Duration::from_secs(1), SOME).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    stage.begin(proxy, 1).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    // An update is announced, and its place is given: nothing comes.
    wire.send(&stage.update(1));
    within(wire.flush()).await.expect("open");
    stage.expect_nothing(1).await;
    assert_eq!(remote.verdict(&mut wire).await, (1, Refusal::NotExpected as u16));

    // A model is begun to be taken, and then no more is acknowledged.
    stage.begin(proxy, 2).await;
    let offered = remote.next(&mut wire).await;
    assert!(
        matches!(offered, TransferEvent::Offered(Message::Model(_))),
        "{offered:?}"
    );
    wire.send(&Message::Ack { round: 2, offset: 0 });
    within(wire.flush()).await.expect("open");
    stage.model_is_back(proxy).await;
    stage.expect_nothing(2).await;
    stage.leave().await;
}

#[tokio::test]
async fn pings_without_end_end_the_session() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let mut remote = stage.remote("one", 7);
    let mut wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    for _ in 0..100 {
        wire.send(&Message::Ping);
    }
    let broken = within(remote.transfers.next(&mut wire))
        .await
        .expect_err("closed");
    assert!(
        matches!(
            broken,
            SessionError::Closed | SessionError::Io(_) | SessionError::Bye { last: false, .. }
        ),
        "{broken}"
    );
    // It may come back.
    let mut wire = stage.enter(&mut remote).await;
    stage.begin(proxy, 1).await;
    remote.model(&mut wire).await;
    stage.model_is_back(proxy).await;
    stage.leave().await;
}

#[tokio::test]
async fn the_daemon_connects_with_the_administrators_brokers_only() {
    let open = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = open.local_addr().expect("bound").port();
    let closed = {
        let freed = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        freed.local_addr().expect("bound").port()
    };
    let allowed = format!("127.0.0.1:{closed}");
    let gateway = GatewayOptions {
        brokers: Brokers::These(vec![Broker::parse(&allowed).expect("a broker")]),
        ..GatewayOptions::default()
    };
    let stage = Stage::set_with(gateway, SOME).await;
    let ask = async |broker: String| {
        let mut client = Client::connect(stage.daemon.socket()).await.expect("connected");
        client.create_job("other").await.expect("made");
        match client.open_gateway(None, Some(broker), 4096).await {
            Err(ClientError::Refused { code, message }) => (code, message),
            other => panic!("{other:?}"),
        }
    };
    // Another name for what is allowed is another broker, and an open port is answered as a closed one.
    let mut answers = Vec::new();
    for broker in [
        format!("127.0.0.1:{port}"),
        format!("localhost:{port}"),
        "127.0.0.1:1".to_owned(),
        format!("localhost:{closed}"),
        "broker.invalid:1883".to_owned(),
    ] {
        let (code, message) = ask(broker.clone()).await;
        assert_eq!(code, ErrorCode::Denied);
        assert!(message.contains("--gateway-broker"), "{message}");
        answers.push(message.replace(&broker, "HOST:PORT"));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    let connected = tokio::time::timeout(Duration::from_millis(100), open.accept()).await;
    assert!(connected.is_err(), "it has connected");
    // Of one that is allowed it is told what is wrong.
    let (code, message) = ask(allowed.clone()).await;
    assert_eq!(code, ErrorCode::Failed);
    assert!(message.contains(&allowed), "{message}");
    stage.leave().await;
}

#[tokio::test]
async fn nothing_goes_unencrypted_into_public_networks_unless_told() {
    for (address, insecure, broker, says) in [
        ("0.0.0.0:0", false, false, Some("--insecure")),
        ("[::]:0", false, false, Some("--insecure")),
        ("203.0.113.7:1883", false, true, Some("--insecure")),
        ("[2001:db8::7]:1883", false, true, Some("--insecure")),
        ("0.0.0.0:0", true, false, None),
    ] {
        let gateway = GatewayOptions {
            allowed: vec!["0.0.0.0".parse().expect("an address")],
            brokers: Brokers::These(Broker::parse(address).into_iter().collect()),
            insecure,
            ..GatewayOptions::default()
        };
        let stage = Stage::set_with(gateway, SOME).await;
        let mut client = Client::connect(stage.daemon.socket()).await.expect("connected");
        client.create_job("other").await.expect("made");
        let opened = match broker {
            true => client.open_gateway(None, Some(address.to_owned()), 4096).await,
            false => {
                let address = address.parse().expect("an address");
                client.open_gateway(Some(address), None, 4096).await
            }
        };
        match (opened, says) {
            (Ok(_), None) => {}
            (Err(ClientError::Refused { message, .. }), Some(says)) => {
                assert!(message.contains(says), "{address}: {message}");
            }
            (other, _) => panic!("{address}: {other:?}"),
        }
        drop(client);
        stage.leave().await;
    }
}

#[tokio::test]
async fn a_worker_that_does_not_come_back_is_lost() {
    let mut stage = Stage::set(Duration::from_millis(200), SOME).await;
    let mut remote = stage.remote("one", 7);
    let wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("one").await;
    drop(wire);
    let lost = loop {
        if let Event::PeerLost(lost) = within(stage.client.event()).await.expect("open") {
            break lost;
        }
    };
    assert_eq!(lost.worker, proxy);
    let reason = stage.turned_away(&remote).await;
    assert!(reason.contains("given up"), "{reason}");

    // One that is known to be dead is not waited for.
    let mut stage = Stage::set(PATIENCE * 10, SOME).await;
    let mut remote = stage.remote("two", 7);
    let _wire = stage.enter(&mut remote).await;
    let proxy = stage.proxy("two").await;
    stage.client.drop_worker("two").await.expect("dropped");
    loop {
        if let Event::PeerLost(lost) = within(stage.client.event()).await.expect("open") {
            assert_eq!(lost.worker, proxy);
            break;
        }
    }
    stage.leave().await;
}

#[tokio::test]
async fn the_door_is_the_jobs_makers_to_open() {
    let mut stage = Stage::set(PATIENCE, SOME).await;
    let refused = |result: Result<_, ClientError>| match result {
        Err(ClientError::Refused { code, message }) => (code, message),
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("granted"),
    };
    let any = |address: &str| Some(address.parse::<SocketAddr>().expect("an address"));
    let again = stage
        .client
        .open_gateway(any("127.0.0.1:0"), None, 64)
        .await
        .map(drop);
    assert_eq!(refused(again).0, ErrorCode::BadRequest);
    let mut stranger = Client::connect(stage.daemon.socket()).await.expect("connected");
    let without_job = stranger
        .open_gateway(any("127.0.0.1:0"), None, 64)
        .await
        .map(drop);
    assert_eq!(refused(without_job).0, ErrorCode::Denied);
    stranger.create_job("other").await.expect("made");
    let (code, message) = refused(stranger.open_gateway(any("0.0.0.0:0"), None, 64).await.map(drop));
    assert_eq!(code, ErrorCode::Denied);
    assert!(message.contains("--gateway-listen 0.0.0.0"), "{message}");
    assert_eq!(
        refused(stranger.drop_worker("one").await).0,
        ErrorCode::BadRequest
    );
    let endless = stranger
        .open_gateway(any("127.0.0.1:0"), None, u64::MAX)
        .await
        .map(drop);
    assert_eq!(refused(endless).0, ErrorCode::BadRequest);
    drop(stranger);
    stage.leave().await;
}
