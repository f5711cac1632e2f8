//! Whole jobs whose daemon is killed and started anew under them.

use nix::sys::signal::Signal;

use crate::support::node::Node;
use crate::support::{Finished, Job, Place, can_have, free_port, signal, transports};

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
    node.wait_until_nothing_is_registered();
    node.wait_until_it_has_no_memory();
    node.end();
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
    node.wait_until_nothing_is_registered();
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
