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

/// A job whose model can be compared.
fn comparable() -> Job {
    let mut job = Job::synthetic(&[1, 2, 4, 8], 500_000, "F32");
    job.rounds = 30;
    job
}

/// Kills such a worker in the middle of a run, several times. Another takes its place, no round is without anybody, and the
/// model is the one of a run in which nobody died.
fn goes_on_as_if_nothing_had_happened(prefix: &str) {
    let undisturbed = Place::new(&comparable().file());
    undisturbed.finish(&["--checkpoint-every", "0"]).success();
    let place = Place::new(&comparable().file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    for kill in 1..=3 {
        run.wait_for_round(kill * 5);
        signal(run.wait_for_worker(prefix), Signal::SIGKILL);
        run.wait_for_several("worker_lost", kill as usize);
    }
    let finished = run.wait().success();
    let lost = finished.all("worker_lost");
    assert_eq!(lost.len(), 3);
    for lost in lost {
        assert!(
            lost["worker"].as_str().expect("a name").starts_with(prefix),
            "{lost}"
        );
        assert_eq!(lost["restarting"], true, "{lost}");
    }
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 30);
    for round in rounds {
        assert_eq!(round["trainers"], 8, "{round}");
        assert_eq!(round["left_out"].as_array().map(Vec::len), Some(0), "{round}");
    }
    assert!(place.model() == undisturbed.model(), "another model came out");
}

#[test]
fn a_killed_leaf_is_succeeded_and_nothing_is_lost() {
    goes_on_as_if_nothing_had_happened("leaf-aggregator-2");
}

#[test]
fn a_killed_middle_is_succeeded_and_nothing_is_lost() {
    goes_on_as_if_nothing_had_happened("middle-aggregator-1");
}

#[test]
fn a_killed_top_is_succeeded_and_nothing_is_lost() {
    goes_on_as_if_nothing_had_happened("top-aggregator");
}

#[test]
fn a_killed_trainer_is_left_out_and_comes_back() {
    let place = Place::new(&comparable().file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("trainer-3"), Signal::SIGKILL);
    let finished = run.wait().success();
    assert_eq!(finished.one("worker_lost")["worker"], "trainer-3");
    assert_eq!(finished.one("worker_replaced")["worker"], "trainer-3");
    let rounds = finished.all("round");
    let without: Vec<_> = rounds.iter().filter(|round| round["trainers"] != 8).collect();
    for round in &without {
        let left_out = (&round["trainers"], &round["left_out"][0]);
        assert_eq!(left_out, (&7.into(), &"trainer-3".into()), "{round}");
    }
    assert!(without.len() < 25, "it never came back");
    assert_eq!(rounds[29]["trainers"], 8);
}

#[test]
fn a_worker_that_always_dies_is_given_up() {
    let place = Place::new(&endless(&[1, 2]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    // Stopped, the other trainer keeps the round open: nobody finishes it.
    let stopped = run.wait_for_worker("trainer-2");
    signal(stopped, Signal::SIGSTOP);
    for kill in 1..=3 {
        signal(run.wait_for_worker("top-aggregator"), Signal::SIGKILL);
        run.wait_for_several("worker_lost", kill);
    }
    signal(run.wait_for_worker("top-aggregator"), Signal::SIGKILL);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("top-aggregator-1 is gone in round"),
        "{}",
        finished.stderr
    );
    assert_eq!(finished.one("job_failed")["exit_code"], 4);
}

#[test]
fn a_straggler_is_left_out_when_the_rounds_time_is_over_and_ended_when_it_does_not_stir() {
    let mut job = Job::synthetic(&[1, 2, 4], 1000, "F32");
    job.rounds = 12;
    let job = job.with("roundTimeout", 0.3).with("graceTime", 1.0);
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("trainer-2"), Signal::SIGSTOP);
    let finished = run.wait().success();
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 12);
    let without = rounds
        .iter()
        .filter(|round| round["left_out"][0] == "trainer-2")
        .count();
    assert!(without > 0, "it was waited for");
}

#[test]
fn an_aggregator_that_hangs_is_ended_and_succeeded() {
    let job = comparable().with("graceTime", 1.0);
    let undisturbed = Place::new(&comparable().file());
    undisturbed.finish(&["--checkpoint-every", "0"]).success();
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("leaf-aggregator-3"), Signal::SIGSTOP);
    let finished = run.wait().success();
    assert_eq!(finished.one("worker_replaced")["worker"], "leaf-aggregator-3");
    assert!(
        finished.stderr.contains("leaf-aggregator-3 is ended"),
        "{}",
        finished.stderr
    );
    assert!(place.model() == undisturbed.model(), "another model came out");
}

#[test]
fn a_round_without_its_quorum_leaves_the_model_as_it_was() {
    let mut job = Job::synthetic(&[1, 3], 1000, "F32");
    job.rounds = 300;
    let job = job.with("quorum", 3);
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("trainer-1"), Signal::SIGKILL);
    let finished = run.wait().success();
    for round in finished.all("round") {
        let (trainers, samples) = (round["trainers"].as_u64(), round["samples"].as_u64());
        assert!(
            trainers == Some(3) || (trainers, samples) == (Some(0), Some(0)),
            "{round}"
        );
    }
    finished.one("worker_replaced");
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
