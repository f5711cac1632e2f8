//! Whole jobs whose daemon is killed and started anew under them.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lifl_daemon::plane::Request;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Options};
use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use support::{Finished, Job, PATIENCE, Place, can_have, free_port, signal, transports};

/// Where the daemon of a test is to listen, and to pin; nothing for no pins.
const SOCKET: &str = "LIFL_TEST_SOCKET";
const PINS: &str = "LIFL_TEST_PINS";

/// Not a test: the process that the others start as their daemon, and kill.
#[test]
#[ignore = "started by the other tests, as a daemon of their own"]
fn daemon_of_the_other_tests() {
    let socket = std::env::var_os(SOCKET).expect("started by another test");
    let pin = std::env::var_os(PINS).map(PathBuf::from);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let options = Options {
            socket: socket.into(),
            socket_mode: 0o600,
            socket_group: None,
            plane: if pin.is_some() {
                Request::Sockmap
            } else {
                Request::Relay
            },
            pool_bytes: 1 << 30,
            huge_pages: HugePages::Never,
            max_workers: 64,
            pin,
            grace: Duration::from_secs(10),
            flame: None,
            gateway: GatewayOptions::default(),
        };
        let shutdown = CancellationToken::new();
        let daemon = Daemon::start(options, shutdown.clone()).expect("started");
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a handler");
        terminate.recv().await;
        daemon.stop().await.expect("stopped");
    });
}

/// A daemon in a process of its own.
struct Node {
    folder: tempfile::TempDir,
    pins: Option<PathBuf>,
    process: Option<Child>,
}

impl Node {
    fn start(pins: Option<&str>) -> Self {
        let pins = pins.map(|name| format!("/sys/fs/bpf/lifl-test-{}-{name}", std::process::id()));
        let mut node = Self {
            folder: tempfile::tempdir().expect("a folder"),
            pins: pins.map(PathBuf::from),
            process: None,
        };
        node.again();
        node
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("lifl.sock")
    }

    /// Starts it, without waiting for it to listen.
    fn again(&mut self) {
        let mut command = Command::new(std::env::current_exe().expect("this file"));
        command.args(["--exact", "daemon_of_the_other_tests", "--ignored", "--nocapture"]);
        command.env(SOCKET, self.socket()).env_remove(PINS);
        if let Some(pins) = &self.pins {
            command.env(PINS, pins);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.process = Some(command.spawn().expect("started"));
    }

    fn wait_until_it_listens(&mut self) {
        let begun = Instant::now();
        while !self.answers() {
            let ended = self.process.as_mut().expect("a process").try_wait();
            assert!(ended.expect("a child").is_none(), "the daemon does not start");
            assert!(begun.elapsed() < PATIENCE, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn answers(&self) -> bool {
        let status = support::lifl()
            .args(["status", "--json", "--daemon"])
            .arg(self.socket())
            .output();
        status.expect("run").status.success()
    }

    fn kill(&mut self) {
        let mut process = self.process.take().expect("a process");
        process.kill().expect("killed");
        process.wait().expect("reaped");
    }

    /// Ends it in order; nothing may be left.
    fn end(mut self) {
        let mut process = self.process.take().expect("a process");
        signal(i32::try_from(process.id()).expect("a pid"), Signal::SIGTERM);
        assert!(process.wait().expect("reaped").success());
        assert!(!self.socket().exists(), "the socket's file is left");
        if let Some(pins) = &self.pins {
            assert!(!pins.exists(), "{} is left", pins.display());
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if let Some(pins) = &self.pins {
            let _ = lifl_daemon::plane::reset(pins);
        }
    }
}

/// Runs the job to its end with that daemon, which dies so many times on the way.
fn run_through(node: &mut Node, place: &Place, deaths: u64) -> Finished {
    let mut run = place.start_at(&node.socket(), &["--checkpoint-every", "0"]);
    for death in 1..=deaths {
        run.wait_for_round(death * 5);
        node.kill();
        // Rounds go on without it.
        run.wait_for_round(death * 5 + 2);
        node.again();
        node.wait_until_it_listens();
    }
    run.wait()
}

fn job() -> Job {
    let mut job = Job::synthetic(&[1, 2, 4, 8], 200_000, "F32").with("timing", "lazy");
    job.rounds = 30;
    job
}

#[test]
fn a_job_through_three_deaths_of_its_daemon_makes_the_same_model() {
    if !can_have("sockmap") {
        return;
    }
    let file = job().file();
    let undisturbed = Place::new(&file);
    undisturbed.finish(&["--checkpoint-every", "0"]).success();

    let mut node = Node::start(Some("deaths"));
    node.wait_until_it_listens();
    let place = Place::new(&file);
    let finished = run_through(&mut node, &place, 3).success();
    assert_eq!(finished.all("round").len(), 30);
    assert!(finished.all("worker_lost").is_empty(), "{}", finished.stderr);
    for round in finished.all("round") {
        assert_eq!(round["trainers"], 8, "{round}");
    }
    assert!(place.model() == undisturbed.model(), "another model");
    assert_nothing_is_registered(&node.socket());
    node.end();
}

/// The daemon has no job and no worker.
fn assert_nothing_is_registered(socket: &Path) {
    let begun = Instant::now();
    loop {
        let status = support::lifl()
            .args(["status", "--json", "--daemon"])
            .arg(socket)
            .output();
        let status: serde_json::Value = serde_json::from_slice(&status.expect("run").stdout).expect("JSON");
        let daemon = &status["status"]["daemon"];
        if daemon["workers"] == 0 && daemon["awaited"] == 0 && daemon["pool_used_bytes"] == 0 {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{status:#}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_worker_that_dies_while_there_is_no_daemon_is_missed_and_comes_back() {
    if !can_have("sockmap") {
        return;
    }
    let mut node = Node::start(Some("worker"));
    node.wait_until_it_listens();
    let mut job = job();
    job.rounds = 60;
    let place = Place::new(&job.file());
    let mut run = place.start_at(&node.socket(), &["--checkpoint-every", "0"]);
    run.wait_for_round(5);
    node.kill();
    signal(run.workers("trainer-3")[0], Signal::SIGKILL);
    node.again();
    let finished = run.wait().success();
    let lost = finished.one("worker_lost")["worker"].as_str().expect("a name");
    assert!(lost.starts_with("trainer-3"), "{lost}");
    // Whether a round was missed depends on how soon it was back.
    finished.one("worker_replaced");
    assert_eq!(finished.all("round")[59]["trainers"], 8);
    assert_nothing_is_registered(&node.socket());
    node.end();
}

#[test]
fn on_the_relay_a_job_ends_with_its_daemon_and_says_why() {
    let mut node = Node::start(None);
    node.wait_until_it_listens();
    let mut job = job();
    job.rounds = 1_000_000;
    let place = Place::new(&job.file());
    let mut run = place.start_at(&node.socket(), &["--checkpoint-every", "0"]);
    run.wait_for_round(1);
    node.kill();
    let finished = run.wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("the daemon is gone and the job with it")
            && finished.stderr.contains("relay"),
        "{}",
        finished.stderr
    );
}

/// Their proxies live in the daemon, and cannot outlive it.
#[test]
fn a_job_with_workers_beyond_the_gateway_ends_with_its_daemon_and_says_why() {
    if !can_have("sockmap") {
        return;
    }
    for how in [Signal::SIGKILL, Signal::SIGTERM] {
        let mut node = Node::start(Some(&format!("gateway-{}", how as i32)));
        node.wait_until_it_listens();
        let mut job = Job::synthetic(&[1, 2], 10_000, "F32");
        job.rounds = 1_000_000;
        let mut file = job.file();
        transports(&mut file, &["p2p"], free_port(), 1883);
        let place = Place::new(&file);
        let mut run = place.start_at(&node.socket(), &["--checkpoint-every", "0"]);
        run.wait_for_round(1);
        if how == Signal::SIGKILL {
            node.kill();
        } else {
            node.end();
        }
        let finished = run.wait();
        assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
        assert!(finished.stderr.contains("remote workers"), "{}", finished.stderr);
    }
}
