//! Runs whose workers come through the gateway over TCP: they give the model that shared memory gives, and neither
//! deaths nor strangers at the door disturb them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use lifl_cli::task::Tasks;
use lifl_common::config::{self, Overrides};
use lifl_common::session::handshake::Participant;
use lifl_common::session::{
    Buffer, Destination, JobToken, Message, Object, SECRET_VARIABLE, Source, TransferEvent, Transfers, Wire,
    tcp,
};
use lifl_common::update::UpdateInfo;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::net::TcpListener;

use crate::support::{
    Finished, Job, PATIENCE, Place, assert_same_model, can_have, free_port, lifl, signal, transports,
};

/// The model of that job after one round, and the round.
fn model_of(job: &Job, backends: &[&str], more: &[&str]) -> (Vec<u8>, Finished) {
    let mut file = Job {
        rounds: 1,
        ..job.clone()
    }
    .file();
    transports(&mut file, backends, free_port(), 1883);
    let place = Place::new(&file);
    let finished = place.finish(more).success();
    (place.model(), finished)
}

/// The bytes of a model's tensors.
fn data_bytes(model: &[u8]) -> u64 {
    let tensors = safetensors::SafeTensors::deserialize(model).expect("safetensors");
    tensors
        .tensors()
        .iter()
        .map(|(_, view)| view.data().len() as u64)
        .sum()
}

fn number(event: &Value, field: &str) -> u64 {
    event[field]
        .as_u64()
        .unwrap_or_else(|| panic!("{field} in {event}"))
}

/// Trainers over TCP, and then everybody.
fn as_on_shared_memory(plane: &str, timing: &str, updates: &str) {
    if !can_have(plane) {
        return;
    }
    let job = Job::digits(&[1, 2, 3, 5], "cnn")
        .with("timing", timing)
        .with("updates", updates);
    let on = ["--plane", plane];
    let (native, finished) = model_of(&job, &["shm", "shm", "shm"], &on);
    let quiet = finished.one("round");
    assert_eq!(
        (number(quiet, "bytes_received"), number(quiet, "bytes_sent")),
        (0, 0)
    );
    for (backends, remote) in [(["shm", "shm", "p2p"], 5), (["p2p", "p2p", "p2p"], 10)] {
        let (model, finished) = model_of(&job, &backends, &on);
        assert_same_model(&native, &model);
        // What crosses the wire crosses it once.
        let (round, objects) = (finished.one("round"), remote * data_bytes(&model));
        for direction in ["bytes_received", "bytes_sent"] {
            let bytes = number(round, direction);
            assert!(
                (objects..objects + objects / 10).contains(&bytes),
                "{direction}: {bytes} for {objects}"
            );
        }
        assert_eq!(number(round, "bytes_copied"), number(quiet, "bytes_copied"));
        assert_eq!(number(round, "trainers"), 5);
    }
}

#[test]
fn through_the_kernel_and_lazy() {
    as_on_shared_memory("sockmap", "lazy", "weights");
}

#[test]
fn through_the_kernel_and_eager() {
    as_on_shared_memory("sockmap", "eager", "deltas");
}

#[test]
fn through_the_relay_and_lazy() {
    as_on_shared_memory("relay", "lazy", "deltas");
}

/// A run of 30 rounds over TCP in which a worker is killed after the first.
fn goes_on_without(prefix: &str, backends: &[&str], fewest_trainers: u64) {
    let mut job = Job::synthetic(&[1, 2, 4, 8], 1_000_000, "F32");
    job.rounds = 30;
    let mut file = job.file();
    transports(&mut file, backends, free_port(), 1883);
    let place = Place::new(&file);
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.workers(prefix)[0], Signal::SIGKILL);
    // Far less than the time for which a session may be away.
    let begun = Instant::now();
    let finished = run.wait().success();
    assert!(begun.elapsed() < PATIENCE / 2, "it was waited for");
    let lost = finished.one("worker_lost")["worker"].as_str().expect("a name");
    assert!(lost.starts_with(prefix), "{lost}");
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 30);
    assert_eq!(number(rounds[29], "trainers"), fewest_trainers);
}

#[test]
fn a_killed_trainer_over_tcp_is_left_out() {
    goes_on_without("trainer-3", &["shm", "shm", "p2p"], 7);
}

#[test]
fn a_killed_leaf_over_tcp_leaves_its_trainers_to_another() {
    goes_on_without("leaf-aggregator-2", &["shm", "p2p", "shm"], 8);
}

#[test]
fn a_killed_middle_among_all_over_tcp_is_left_out() {
    goes_on_without("middle-aggregator-1", &["p2p", "p2p", "p2p"], 8);
}

#[test]
fn an_interrupted_run_over_tcp_leaves_nothing() {
    let mut job = Job::synthetic(&[1, 2, 4], 2_000_000, "F32");
    job.rounds = 1_000_000;
    let (mut file, port) = (job.file(), free_port());
    transports(&mut file, &["p2p", "p2p"], port, 1883);
    let place = Place::new(&file);
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.pid(), Signal::SIGTERM);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    assert!(!finished.stderr.contains("did not leave"), "{}", finished.stderr);
    TcpStream::connect(("127.0.0.1", port)).expect_err("nobody listens any more");
}

#[test]
fn an_address_in_use_is_named_before_anything_starts() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = taken.local_addr().expect("bound").port();
    let mut file = Job::digits(&[1, 2], "softmax").file();
    transports(&mut file, &["p2p"], port, 1883);
    let finished = Place::new(&file).finish(&[]);
    assert_eq!(finished.code(), Some(3), "{}", finished.stderr);
    let address = format!("127.0.0.1:{port}");
    assert!(finished.stderr.contains(&address), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("brokers") || finished.stderr.contains("broker"),
        "{}",
        finished.stderr
    );
    assert!(finished.all("job_started").is_empty());
}

#[test]
fn an_address_that_others_can_reach_needs_leave() {
    let mut file = Job::digits(&[1, 2], "softmax").file();
    transports(&mut file, &["p2p"], 1, 1883);
    file["brokers"][0]["host"] = "0.0.0.0:45991".into();
    let finished = Place::new(&file).finish(&[]);
    assert_eq!(finished.code(), Some(3), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("--gateway-listen 0.0.0.0") && finished.stderr.contains("--insecure"),
        "{}",
        finished.stderr
    );
    assert!(finished.all("job_started").is_empty());
    // The daemon of a run listens on the loopback only, whatever the run may do.
    let finished = Place::new(&file).finish(&["--insecure"]);
    assert_eq!(finished.code(), Some(3), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("--gateway-listen 0.0.0.0"),
        "{}",
        finished.stderr
    );
}

#[test]
fn models_that_leave_the_machine_are_named_before_anything_starts() {
    let mut file = Job::digits(&[1, 2], "softmax").file();
    transports(&mut file, &["mqtt"], 1, 1883);
    for (host, refused) in [
        ("203.0.113.7:1883", true),
        ("[2001:db8::1]:1883", true),
        ("10.255.255.1:1", false),
    ] {
        file["brokers"][1]["host"] = host.into();
        let place = Place::new(&file);
        for command in ["validate", "plan"] {
            let said = lifl().arg(command).arg(&place.job).output().expect("started");
            let text = String::from_utf8_lossy(&said.stdout);
            assert!(said.status.success(), "{text}");
            assert!(text.contains("UNENCRYPTED") && text.contains(host), "{text}");
            assert_eq!(text.contains("--insecure"), refused, "{text}");
        }
        if refused {
            let finished = place.finish(&[]);
            assert_eq!(finished.code(), Some(3), "{}", finished.stderr);
            for word in ["UNENCRYPTED", host, "--insecure"] {
                assert!(finished.stderr.contains(word), "{}", finished.stderr);
            }
            assert!(finished.all("job_started").is_empty());
        }
    }
}

#[test]
fn strangers_at_the_door_disturb_nobody() {
    // Rounds enough to be still under way when the siege is over.
    let mut job = Job::synthetic(&[1, 2, 4], 2_000_000, "F32");
    job.rounds = 150;
    let run = |disturb: bool| {
        let (mut file, port) = (job.file(), free_port());
        transports(&mut file, &["shm", "p2p"], port, 1883);
        let place = Place::new(&file);
        let mut run = place.start(&["--checkpoint-every", "0"]);
        run.wait_for("round");
        if disturb {
            besiege(port);
            assert!(run.is_running(), "it ended before the siege");
        }
        let finished = run.wait().success();
        assert!(finished.all("worker_lost").is_empty(), "{:?}", finished.events);
        assert!(
            finished
                .all("round")
                .iter()
                .all(|round| number(round, "trainers") == 4)
        );
        place.model()
    };
    assert!(run(false) == run(true), "the model came out otherwise");
}

/// Everything that may be thrown at an open port, and 500 connections that say nothing.
fn besiege(port: u16) {
    let connect = || TcpStream::connect(("127.0.0.1", port)).expect("connected");
    let idle: Vec<TcpStream> = (0..500).map(|_| connect()).collect();
    let garbage: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\nHost: lifl\r\n\r\n",
        &[0xff; 4096],
        &[0; 4096],
        &[5, 0, 0, 0, 1, b'L', b'I', b'F', b'L'],
        &[0, 0, 16, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        b"",
    ];
    for bytes in garbage {
        let mut stream = connect();
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        // It is closed, at once: nobody waits for more.
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
    drop(idle);
}

/// A trainer's process, and the test as its gateway.
struct Stage {
    listener: TcpListener,
    worker: std::process::Child,
    transfers: Transfers,
    participant: Participant,
    job: config::JobSpec,
    _place: Place,
}

impl Stage {
    async fn set(parameters: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        let mut file = Job::synthetic(&[1, 1], parameters, "F32").file();
        transports(&mut file, &["p2p"], port, 1883);
        let place = Place::new(&file);
        let loaded = config::load(std::slice::from_ref(&place.job), &Overrides::default());
        std::fs::create_dir(place.run()).expect("made");
        let job = loaded.expect("a job").job;
        Tasks::of(&job).write(&place.run()).expect("written");
        let participant = Participant {
            name: "trainer-1".to_owned(),
            secret: JobToken::new().participant("trainer-1"),
        };
        let worker = lifl()
            .args([
                "worker",
                "--socket",
                "/nowhere",
                "--job",
                "1",
                "--name",
                "trainer-1",
                "--run",
            ])
            .arg(place.run())
            .args(["--gateway", &format!("127.0.0.1:{port}")])
            .env(SECRET_VARIABLE, participant.secret.to_text())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("started");
        Self {
            listener,
            worker,
            transfers: Transfers::default(),
            participant,
            job,
            _place: place,
        }
    }

    /// The worker's next session.
    async fn session(&mut self) -> Wire {
        let mut wire = self.proved().await;
        wire.send(&Message::Welcome);
        self.transfers.resume(&mut wire);
        wire
    }

    /// The worker's next connection, once it has proved itself.
    async fn proved(&self) -> Wire {
        let (mut stream, _) = within(self.listener.accept()).await.expect("accepted");
        let hello = within(tcp::hello(&mut stream)).await.expect("a hello");
        assert_eq!(hello.participant, self.participant.secret.id());
        let asked = within(tcp::challenge(&mut stream, &hello, Some(&self.participant)));
        let keys = asked.await.expect("proved");
        tcp::gateway_wire(stream, keys).expect("open")
    }

    async fn next(&mut self, wire: &mut Wire) -> TransferEvent {
        within(self.transfers.next(wire)).await.expect("open")
    }
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

/// The gateway's end of the worker's connection takes so many bytes and then breaks.
async fn cut_after(stage: &mut Stage, wire: Wire, bytes: u64) {
    let traffic = std::sync::Arc::new(lifl_common::session::Traffic::default());
    let mut wire = wire;
    wire.count_in(std::sync::Arc::clone(&traffic));
    // Looked at whenever the transfer has got on, and not by the clock: on a busy machine all may have gone over by then.
    let enough = std::future::poll_fn(|_| {
        if traffic.sent() + traffic.received() < bytes {
            std::task::Poll::Pending
        } else {
            std::task::Poll::Ready(())
        }
    });
    tokio::select! {
        biased;
        () = enough => {}
        () = async {
            loop {
                if let TransferEvent::Offered(header) = stage.next(&mut wire).await {
                    let object = *header.object().expect("a header");
                    let destination = Destination::Private(Buffer::new(object.length as usize));
                    stage.transfers.accept(&mut wire, object, destination);
                }
            }
        } => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trainer_takes_up_what_broke_and_trains_once() {
    const PARAMETERS: usize = 10_000_000;
    let mut stage = Stage::set(PARAMETERS as u64).await;
    let schema = lifl_learn::schema(&stage.job.model).expect("a schema");
    let object = Object {
        round: 1,
        length: schema.data_bytes() as u64,
        schema: schema.digest(),
    };
    let mut wire = stage.session().await;
    assert!(matches!(
        stage.next(&mut wire).await,
        TransferEvent::Message(Message::Ready)
    ));
    let model = std::sync::Arc::new(Buffer::new(schema.data_bytes()));
    stage
        .transfers
        .offer(Some(&mut wire), Message::Model(object), Source::Private(model));
    // In the middle of the model.
    cut_after(&mut stage, wire, object.length / 2).await;
    let mut wire = stage.session().await;
    let sent = loop {
        match stage.next(&mut wire).await {
            TransferEvent::Message(Message::Ready) => {}
            other => break other,
        }
    };
    assert!(matches!(sent, TransferEvent::Sent(1)), "{sent:?}");
    // In the middle of the update.
    cut_after(&mut stage, wire, object.length / 2).await;
    let mut wire = stage.session().await;
    let mut headers: Vec<UpdateInfo> = Vec::new();
    let mut update = loop {
        match stage.next(&mut wire).await {
            TransferEvent::Message(Message::Ready) => {}
            TransferEvent::Offered(Message::Update(_, header)) => headers.push(header),
            TransferEvent::Received { object, destination } => {
                assert_eq!(object.round, 1);
                break destination;
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(
        headers.is_empty(),
        "an update that is half here is no new one: {headers:?}"
    );
    assert!(
        update.data_mut().iter().any(|byte| *byte != 0),
        "nothing was trained"
    );
    // It is offered no second time, and the job's end ends the process.
    wire.send(&Message::Verdict { round: 1, refusal: 0 });
    wire.send(&Message::End("over".to_owned()));
    within(wire.flush()).await.expect("open");
    let mut worker = stage.worker;
    let status = tokio::task::spawn_blocking(move || worker.wait());
    assert!(
        within(status)
            .await
            .expect("no panic")
            .expect("a child")
            .success()
    );
}

#[tokio::test]
async fn a_trainer_that_is_turned_away_says_why() {
    let stage = Stage::set(10).await;
    // Who cannot prove to be the gateway turns nobody away: any stranger could.
    let (mut stream, _) = within(stage.listener.accept()).await.expect("accepted");
    within(tcp::hello(&mut stream)).await.expect("a hello");
    tcp::refuse(stream, "go away").await;
    let mut wire = stage.proved().await;
    let reason = "trainer-1 was given up".to_owned();
    wire.send(&Message::Bye { last: true, reason });
    within(wire.flush()).await.expect("open");
    let mut worker = stage.worker;
    let status = tokio::task::spawn_blocking(move || worker.wait());
    let status = within(status).await.expect("no panic").expect("a child");
    assert_eq!(status.code(), Some(4));
}
