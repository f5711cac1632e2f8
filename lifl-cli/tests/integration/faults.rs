//! Workers and coordinators that die, hang or run too long: each has an outcome, and nothing is left.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::node::Node;
use crate::support::{self, Job, PATIENCE, Place, Started, can_have, signal, workers};

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
    let job = endless(&[1, 2, 4])
        .with("roundTimeout", 0.3)
        .with("graceTime", 1.0);
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("trainer-2"), Signal::SIGSTOP);
    let lost = run.wait_for("worker_lost");
    assert_eq!(lost["worker"], "trainer-2");
    signal(run.pid(), Signal::SIGINT);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    let without = |round: &&serde_json::Value| round["left_out"][0] == "trainer-2";
    let rounds = finished.all("round");
    assert!(rounds.iter().any(without), "it was waited for");
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
    job.rounds = 3000;
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

/// A job whose training comes to nothing in every round.
fn diverging() -> Job {
    let mut job = Job::digits(&[1, 2], "softmax");
    job.rounds = 2;
    job
}

#[test]
fn a_job_that_never_folds_an_update_fails_and_says_why() {
    let mut file = diverging().file();
    file["hyperparameters"]["learningRate"] = serde_json::json!(1e308);
    let place = Place::new(&file);
    let finished = place.finish(&[]);
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    for said in [
        "no update was folded in any round",
        "training loss of share",
        "learningRate",
    ] {
        assert!(
            finished.stderr.contains(said),
            "no {said:?} in: {}",
            finished.stderr
        );
    }
    assert!(
        finished.stderr.contains("warning: round 1: no update was folded"),
        "{}",
        finished.stderr
    );
    // They have nothing to give, and live.
    assert_eq!(finished.all("worker_lost").len(), 0, "{:#?}", finished.events);
    let failed = finished.all("trainer_failed");
    assert_eq!(failed.len(), 2 * 2, "each in each round: {:#?}", finished.events);
    for failed in failed {
        let why = failed["why"].as_str().expect("words");
        assert!(why.contains("training loss"), "{why}");
    }
    for round in finished.all("round") {
        assert_eq!(round["trainers"], 0, "{round}");
        assert_eq!(round["left_out"].as_array().map(Vec::len), Some(2), "{round}");
    }
    // Nor does it succeed by being resumed.
    assert!(!place.run().join("model.safetensors").exists());
    let again = place.start_resume(&[]).wait();
    assert_eq!(again.code(), Some(4), "{}", again.stderr);
}

#[test]
fn a_job_whose_trainers_die_in_every_round_fails() {
    let mut job = endless(&[1, 2]);
    job.rounds = 3;
    let place = Place::new(&job.file());
    // Without a task no trainer can work: the first ones are killed before they have given anything.
    let run = place.start(&["--checkpoint-every", "0"]);
    for trainer in ["trainer-1", "trainer-2"] {
        let pid = run.wait_for_worker(trainer);
        std::fs::write(place.run().join(format!("workers/{trainer}.json")), "{}").expect("written");
        signal(pid, Signal::SIGKILL);
    }
    let finished = run.wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
}

#[test]
fn what_killed_a_worker_is_told_by_name_and_its_last_words_too() {
    let place = Place::new(&endless(&[1, 2, 4]).file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.wait_for_worker("trainer-1"), Signal::SIGABRT);
    run.wait_for_several("worker_lost", 1);
    signal(run.wait_for_worker("middle-aggregator"), Signal::SIGKILL);
    run.wait_for_several("worker_lost", 2);
    // Successors that end by themselves, as soon as they have looked at their tasks.
    std::fs::write(place.run().join("workers/trainer-3.json"), "{}").expect("written");
    signal(run.wait_for_worker("trainer-3"), Signal::SIGTERM);
    run.wait_for_several("worker_lost", 6);
    signal(run.pid(), Signal::SIGTERM);
    let finished = run.wait();
    let lost = finished.all("worker_lost");
    let how = |worker: &str| -> Vec<&str> {
        let of = lost.iter().filter(|lost| {
            lost["worker"]
                .as_str()
                .is_some_and(|name| name.starts_with(worker))
        });
        of.map(|lost| lost["how"].as_str().expect("words")).collect()
    };
    assert!(
        how("trainer-1")[0].starts_with("it was killed by SIGABRT"),
        "{lost:#?}"
    );
    // Behind it may stand that the kernel has killed for lack of memory, if it just did elsewhere on this machine.
    assert!(
        how("middle-aggregator")[0].starts_with("it was killed by SIGKILL"),
        "{lost:#?}"
    );
    assert_eq!(
        how("trainer-3"),
        [
            "it was killed by SIGTERM",
            "exit status: 4",
            "exit status: 4",
            "exit status: 4"
        ]
    );
    for lost in &lost {
        let words = lost["last_words"].as_str().expect("words");
        let ended_by_itself = lost["how"] == "exit status: 4";
        assert_eq!(
            words.contains("is not a worker's task"),
            ended_by_itself,
            "{lost}"
        );
    }
}

/// A job whose rounds last longer than its grace time, so that its workers are asked whether they stir.
fn slow() -> Job {
    let mut job = Job::digits(&[1, 2], "cnn");
    job.rounds = 2;
    job.lifl["trainSamples"] = serde_json::json!(3000);
    job.with("graceTime", 0.3)
}

#[test]
fn a_suspended_machine_kills_nobody() {
    let place = Place::new(&slow().file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("job_started");
    for _ in 0..2 {
        let processes = [vec![run.pid()], run.workers("")].concat();
        // As a container is paused, several grace times long.
        processes.iter().for_each(|&pid| signal(pid, Signal::SIGSTOP));
        std::thread::sleep(Duration::from_secs(2));
        processes.iter().for_each(|&pid| signal(pid, Signal::SIGCONT));
        std::thread::sleep(Duration::from_millis(200));
    }
    let finished = run.wait().success();
    assert_eq!(finished.all("worker_lost").len(), 0, "{}", finished.stderr);
    for round in finished.all("round") {
        assert_eq!(round["trainers"], 2, "{round}");
    }
}

#[test]
fn a_suspended_coordinator_kills_nobody() {
    let place = Place::new(&slow().file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    run.wait_for("job_started");
    for _ in 0..2 {
        signal(run.pid(), Signal::SIGSTOP);
        std::thread::sleep(Duration::from_secs(2));
        signal(run.pid(), Signal::SIGCONT);
        std::thread::sleep(Duration::from_millis(200));
    }
    let finished = run.wait().success();
    assert_eq!(finished.all("worker_lost").len(), 0, "{}", finished.stderr);
}

/// A run in a time namespace whose monotonic clock is ahead of the daemon's and the plane's, or behind.
fn another_time_namespace_kills_nobody(pins: Option<&str>) {
    let ahead = |seconds: &str| {
        let mut command = std::process::Command::new("unshare");
        command.args(["-T", "--monotonic", seconds, "--boottime", seconds, "--fork"]);
        command
    };
    if !ahead("100")
        .arg("true")
        .status()
        .is_ok_and(|status| status.success())
    {
        eprintln!("NOT RUN: no time namespace can be made here");
        assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
        return;
    }
    let mut node = Node::start(pins);
    node.wait_until_it_listens();
    for seconds in ["100000", "-200"] {
        // A machine that has just been started cannot have a clock that is further behind.
        let uptime = std::fs::read_to_string("/proc/uptime").expect("proc");
        if seconds.starts_with('-') && uptime.split('.').next().and_then(|s| s.parse().ok()) < Some(300) {
            continue;
        }
        let mut file = slow();
        file.rounds = 1;
        let mut place = Place::new(&file.file());
        place.keep(false);
        let plain = place.command_at(&node.socket(), &["--checkpoint-every", "0"]);
        let mut command = ahead(seconds);
        command.arg(plain.get_program()).args(plain.get_args());
        let run = Started::new(command, place.run(), &place.folder.path().join("ahead"));
        let finished = run.wait().success();
        assert_eq!(
            finished.all("worker_lost").len(),
            0,
            "{seconds}: {}",
            finished.stderr
        );
        assert_eq!(finished.one("round")["trainers"], 2);
    }
    node.end();
}

#[test]
fn another_time_namespace_kills_nobody_through_the_relay() {
    another_time_namespace_kills_nobody(None);
}

#[test]
fn another_time_namespace_kills_nobody_through_the_kernel() {
    if can_have("sockmap") {
        another_time_namespace_kills_nobody(Some("time"));
    }
}

/// A daemon in another time namespace than the plane and whoever asks.
#[test]
fn a_workers_last_frame_is_as_old_as_it_is_in_every_time_namespace() {
    for plane in ["relay", "sockmap"] {
        if !can_have(plane) {
            continue;
        }
        let place = Place::new(&slow().file());
        let plain = place.command(&["--checkpoint-every", "0", "--plane", plane]);
        let mut command = std::process::Command::new("unshare");
        command.args(["-T", "--monotonic", "100000", "--fork", "--kill-child"]);
        command.arg(plain.get_program()).args(plain.get_args());
        let mut run = Started::new(command, place.run(), &place.folder.path().join("ahead"));
        let started = run.wait_for("job_started");
        let socket = started["daemon"].as_str().expect("a path").to_owned();
        let output = support::lifl()
            .args(["status", "--json", "--daemon", &socket])
            .output()
            .expect("started");
        let text = String::from_utf8_lossy(&output.stdout);
        let status: serde_json::Value = serde_json::from_str(text.trim()).expect("JSON");
        let workers = status["status"]["workers"].as_array().expect("workers");
        let ages: Vec<u64> = workers
            .iter()
            .filter_map(|worker| worker["idle_ns"].as_u64())
            .collect();
        assert!(!ages.is_empty(), "{plane}: {text}");
        assert!(ages.iter().all(|&age| age < 300_000_000_000), "{plane}: {ages:?}");
        run.kill_everything();
    }
}
