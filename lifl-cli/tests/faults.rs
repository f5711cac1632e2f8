//! Workers and coordinators that die, hang or run too long: each has an outcome, and nothing is left.

mod support;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use support::{Job, PATIENCE, Place, signal, workers};

/// A job that goes on until something ends it.
fn endless(levels: &[u32]) -> Job {
    let mut job = Job::synthetic(levels, 100_000, "F32");
    job.rounds = 1_000_000;
    job
}

/// A run of `rounds` rounds in which a worker is killed after the first; its events must name it and go on.
fn goes_on_without(prefix: &str, fewest_trainers: u64) {
    let mut job = Job::synthetic(&[1, 2, 4, 8], 2_000_000, "F32");
    job.rounds = 40;
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    let victim = run.workers(prefix)[0];
    signal(victim, Signal::SIGKILL);
    let finished = run.wait().success();
    let lost = finished.one("worker_lost")["worker"]
        .as_str()
        .expect("a name")
        .to_owned();
    assert!(lost.starts_with(prefix), "{lost}");
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 40);
    let last = rounds[39]["trainers"].as_u64().expect("a number");
    assert_eq!(last, fewest_trainers, "the last round counts who is left");
}

#[test]
fn a_killed_trainer_is_left_out() {
    goes_on_without("trainer-3", 7);
}

#[test]
fn a_killed_leafs_trainers_find_another() {
    goes_on_without("leaf-aggregator-2", 8);
}

#[test]
fn a_killed_middles_subtree_finds_another() {
    goes_on_without("middle-aggregator-1", 8);
}

#[test]
fn a_killed_top_ends_the_job_by_name() {
    let place = Place::new(&endless(&[1, 2, 4]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.workers("top")[0], Signal::SIGKILL);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("top-aggregator-1 is gone"),
        "{}",
        finished.stderr
    );
    assert_eq!(finished.one("job_failed")["exit_code"], 4);
}

#[test]
fn a_killed_coordinator_takes_its_workers_with_it() {
    let place = Place::new(&endless(&[1, 2, 4]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    let socket = run.wait_for("job_started")["daemon"]
        .as_str()
        .expect("a path")
        .to_owned();
    run.wait_for("round");
    signal(run.pid(), Signal::SIGKILL);
    let begun = Instant::now();
    while !workers(&place.run(), "").is_empty() {
        assert!(begun.elapsed() < PATIENCE, "workers outlive their coordinator");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Nobody could take its socket's file away; the next run does.
    let next = Place::new(&Job::synthetic(&[1, 1], 10, "F32").file());
    next.finish(&[]).success();
    assert!(!std::path::Path::new(&socket).exists(), "{socket} is still there");
    run.forget();
}

#[test]
fn every_trainer_lost_ends_the_job() {
    let place = Place::new(&endless(&[1, 2]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    for trainer in run.workers("trainer") {
        signal(trainer, Signal::SIGKILL);
    }
    let finished = run.wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert!(finished.stderr.contains("no trainer"), "{}", finished.stderr);
}

#[test]
fn a_job_past_its_time_is_ended() {
    let mut job = endless(&[1, 2]);
    job.max_run_time = 2;
    let finished = Place::new(&job.file()).finish(&["--checkpoint-every", "0"]);
    assert_eq!(finished.code(), Some(5), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("maxRunTime (2 s)"),
        "{}",
        finished.stderr
    );
}

#[test]
fn a_worker_that_hangs_is_killed_when_the_time_is_up() {
    let mut job = endless(&[1, 2, 4]);
    job.max_run_time = 3;
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.workers("trainer-1")[0], Signal::SIGSTOP);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(5), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("1 workers did not leave"),
        "{}",
        finished.stderr
    );
}

#[test]
fn terminated_is_interrupted() {
    let place = Place::new(&endless(&[1, 2]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("job_started");
    signal(run.pid(), Signal::SIGTERM);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
}
