//! Runs whose workers come through an MQTT broker, a real mosquitto.

use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::sys::signal::Signal;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{Filter, Packet};
use rumqttc::v5::{Client, Event, MqttOptions};

use crate::support::{Finished, Job, PATIENCE, Place, assert_same_model, free_port, signal, transports};

/// A mosquitto of the test's own, on a free port.
struct Mosquitto {
    process: Child,
    port: u16,
    config: tempfile::TempDir,
}

impl Mosquitto {
    /// Starts one with those lines in its configuration; `None`, said loudly, where there is none.
    ///
    /// # Panics
    /// If there is none and `LIFL_REQUIRE_KERNEL` is set.
    fn start(more: &str) -> Option<Self> {
        let config = tempfile::tempdir().expect("a folder");
        let port = free_port();
        let text = format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n{more}\n");
        std::fs::write(config.path().join("mosquitto.conf"), text).expect("written");
        match launch(config.path()) {
            Ok(process) => {
                let broker = Self {
                    process,
                    port,
                    config,
                };
                broker.wait();
                Some(broker)
            }
            Err(error) => {
                eprintln!("NOT RUN: mosquitto cannot be started: {error}");
                assert!(
                    std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(),
                    "no mosquitto: {error}"
                );
                None
            }
        }
    }

    fn wait(&self) {
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "mosquitto does not listen");
            std::thread::yield_now();
        }
    }

    /// Kills it and starts it anew: it remembers nothing.
    fn restart(&mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("a child");
        self.process = launch(self.config.path()).expect("started before");
        self.wait();
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Somebody else at the broker, who may read and publish everything: says all again that is said, changed and unchanged,
/// and begins sessions by hellos that it has heard. Until it is dropped.
struct Meddler {
    client: Client,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Meddler {
    fn start(port: u16) -> Self {
        let mut options = MqttOptions::new("meddler", "127.0.0.1", port);
        options.set_max_packet_size(Some(2 << 20));
        let (client, mut connection) = Client::new(options, 4096);
        // What it says itself is not brought to it.
        let mut everything = Filter::new("lifl/#", QoS::AtMostOnce);
        everything.nolocal = true;
        client.subscribe_many([everything]).expect("asked");
        let (subscribed, ready) = std::sync::mpsc::channel();
        let again = client.clone();
        let thread = std::thread::spawn(move || {
            let mut said = 0;
            for event in connection.iter() {
                let publish = match event {
                    Ok(Event::Incoming(Packet::Publish(publish))) => publish,
                    Ok(Event::Incoming(Packet::SubAck(_))) => {
                        let _ = subscribed.send(());
                        continue;
                    }
                    Ok(_) => continue,
                    Err(_) => break,
                };
                let topic = std::str::from_utf8(&publish.topic).expect("a topic").to_owned();
                let payload = publish.payload.to_vec();
                let (mut changed, mut next, mut begun) = (payload.clone(), payload.clone(), payload.clone());
                if let Some(last) = changed.last_mut() {
                    *last ^= 1;
                }
                // Session, then sequence: the next of the same session, and the same in another.
                if payload.len() >= 12 {
                    next[8] = next[8].wrapping_add(1);
                    begun[0] ^= 1;
                }
                for forged in [payload, changed, next, begun] {
                    let published = again.try_publish(&topic, QoS::AtMostOnce, false, forged);
                    said += u64::from(published.is_ok());
                }
            }
            said
        });
        ready.recv_timeout(PATIENCE).expect("subscribed");
        Self {
            client,
            thread: Some(thread),
        }
    }

    /// How much it has said.
    fn stop(mut self) -> u64 {
        self.client.disconnect().expect("asked");
        let thread = self.thread.take().expect("started");
        thread.join().expect("no panic")
    }
}

fn launch(config: &std::path::Path) -> std::io::Result<Child> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut command = Command::new("mosquitto");
    // Debian puts it where only root looks.
    command.env(
        "PATH",
        [path.to_str().unwrap_or_default(), ":/usr/sbin:/usr/local/sbin"].concat(),
    );
    command.arg("-c").arg(config.join("mosquitto.conf"));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn()
}

/// The model of a job after one round.
fn model_of(job: &Job, backends: &[&str], mqtt: u16, more: &[&str]) -> Vec<u8> {
    let mut file = Job {
        rounds: 1,
        ..job.clone()
    }
    .file();
    transports(&mut file, backends, free_port(), mqtt);
    let place = Place::new(&file);
    let finished = place.finish(more).success();
    assert_orderly(&finished);
    place.model()
}

/// Nobody was left behind at the end.
fn assert_orderly(finished: &Finished) {
    assert!(!finished.stderr.contains("did not leave"), "{}", finished.stderr);
    assert!(finished.all("worker_lost").is_empty(), "{:?}", finished.events);
}

fn as_on_shared_memory(broker: &Mosquitto) {
    let job = Job::digits(&[1, 2, 3, 5], "cnn").with("timing", "lazy");
    let native = model_of(&job, &["shm", "shm", "shm"], broker.port, &[]);
    for backends in [
        ["shm", "shm", "mqtt"],
        ["mqtt", "mqtt", "mqtt"],
        ["shm", "p2p", "mqtt"],
    ] {
        assert_same_model(&native, &model_of(&job, &backends, broker.port, &[]));
    }
}

#[test]
fn a_broker_gives_what_shared_memory_gives() {
    let Some(broker) = Mosquitto::start("") else {
        return;
    };
    as_on_shared_memory(&broker);
}

#[test]
fn the_brokers_announced_limit_is_respected() {
    let Some(broker) = Mosquitto::start("max_packet_size 20000") else {
        return;
    };
    as_on_shared_memory(&broker);
}

#[test]
fn a_limit_that_the_broker_does_not_announce_is_found() {
    let Some(broker) = Mosquitto::start("message_size_limit 20000") else {
        return;
    };
    as_on_shared_memory(&broker);
}

#[test]
fn a_broker_that_is_killed_in_the_middle_is_survived() {
    let Some(mut broker) = Mosquitto::start("") else {
        return;
    };
    let mut job = Job::synthetic(&[1, 2, 4], 3_000_000, "F32");
    job.rounds = 6;
    let run = |kill: Option<&mut Mosquitto>, port| {
        let mut file = job.file();
        transports(&mut file, &["shm", "mqtt"], free_port(), port);
        let place = Place::new(&file);
        let mut run = place.start(&["--checkpoint-every", "0"]);
        run.wait_for("round");
        if let Some(broker) = kill {
            broker.restart();
        }
        let finished = run.wait().success();
        assert!(finished.all("worker_lost").is_empty(), "{:?}", finished.events);
        let rounds = finished.all("round");
        assert_eq!(rounds.len(), 6);
        assert!(rounds.iter().all(|round| round["trainers"] == 4), "{rounds:?}");
        place.model()
    };
    let port = broker.port;
    let undisturbed = run(None, port);
    assert!(
        undisturbed == run(Some(&mut broker), port),
        "the model came out otherwise"
    );
}

#[test]
fn what_others_publish_changes_nothing() {
    let Some(broker) = Mosquitto::start("") else {
        return;
    };
    let mut job = Job::synthetic(&[1, 2, 4], 100_000, "F32");
    job.rounds = 5;
    let run = || {
        let mut file = job.file();
        transports(&mut file, &["shm", "mqtt"], free_port(), broker.port);
        let place = Place::new(&file);
        let finished = place.finish(&[]).success();
        assert_orderly(&finished);
        let rounds = finished.all("round");
        assert_eq!(rounds.len(), 5);
        assert!(rounds.iter().all(|round| round["trainers"] == 4), "{rounds:?}");
        place.model()
    };
    let undisturbed = run();
    let meddler = Meddler::start(broker.port);
    let disturbed = run();
    let said = meddler.stop();
    // Each of four trainers says a dozen things a round.
    assert!(said > 500, "it has said {said} things");
    assert!(undisturbed == disturbed, "the model came out otherwise");
}

#[test]
fn a_killed_trainer_over_mqtt_is_left_out() {
    let Some(broker) = Mosquitto::start("") else {
        return;
    };
    let mut job = Job::synthetic(&[1, 2, 4], 100_000, "F32");
    job.rounds = 20;
    let mut file = job.file();
    transports(&mut file, &["mqtt", "mqtt"], free_port(), broker.port);
    let place = Place::new(&file);
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.workers("trainer-2")[0], Signal::SIGKILL);
    let finished = run.wait().success();
    assert_eq!(finished.one("worker_lost")["worker"], "trainer-2");
    assert_eq!(finished.all("round").len(), 20);
}

#[test]
fn a_broker_that_is_not_there_is_named_before_anything_starts() {
    let mut file = Job::digits(&[1, 2], "softmax").file();
    let port = free_port();
    transports(&mut file, &["mqtt"], free_port(), port);
    let finished = Place::new(&file).finish(&[]);
    assert_eq!(finished.code(), Some(3), "{}", finished.stderr);
    assert!(
        finished.stderr.contains(&format!("127.0.0.1:{port}")),
        "{}",
        finished.stderr
    );
    assert!(finished.all("job_started").is_empty());
}
