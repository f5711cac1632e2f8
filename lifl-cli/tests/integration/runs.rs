//! Whole runs: what they say, what they take, what they leave.

use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{self, Job, Place, can_have, lifl, signal};

/// Objects that frames refer to in one round of a tree with so many workers below the top: each is lent the model and
/// lends an update, and the coordinator is lent the result.
fn references(below_the_top: u64) -> u64 {
    2 * below_the_top + 1
}

fn workers_below(levels: &[u32]) -> u64 {
    u64::from(levels[1..].iter().sum::<u32>())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value}"))
}

fn plan(place: &Place) -> Value {
    let output = lifl()
        .arg("plan")
        .arg(&place.job)
        .arg("--json")
        .output()
        .expect("started");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("one event")
}

/// Nothing is copied, the plane's counters agree with the tree, and the memory is what the plan said.
fn nothing_is_copied(plane: &str, levels: &[u32], place: &Place) {
    let plan = plan(place);
    let finished = place
        .finish(&["--plane", plane, "--checkpoint-every", "0"])
        .success();
    let object = number(&plan["memory"]["object_bytes"]);
    let rounds = finished.all("round");
    assert!(!rounds.is_empty());
    for round in rounds {
        assert_eq!(number(&round["bytes_copied"]), 0);
        assert_eq!(
            number(&round["bytes_referenced"]),
            references(workers_below(levels)) * object
        );
        assert_eq!(number(&round["updates_folded"]), workers_below(levels));
    }
    let (peak, most) = (
        number(&finished.one("job_finished")["peak_memory_bytes"]),
        &plan["memory"]["total_bytes"],
    );
    assert!(peak <= number(most), "took {peak}, planned {most}");
    assert!(
        peak >= number(&plan["memory"]["pool_bytes"]),
        "took {peak}, which is less than its arenas"
    );
}

#[test]
fn synthetic_updates_are_never_copied_on_the_relay() {
    let levels = [1, 2, 3, 4];
    nothing_is_copied(
        "relay",
        &levels,
        &Place::new(&Job::synthetic(&levels, 1 << 21, "F32").file()),
    );
}

#[test]
fn synthetic_updates_are_never_copied_in_the_kernel() {
    if can_have("sockmap") {
        let levels = [1, 2, 3, 4];
        nothing_is_copied(
            "sockmap",
            &levels,
            &Place::new(&Job::synthetic(&levels, 1 << 21, "F32").file()),
        );
    }
}

/// The 232 MB job of `configs/`, when the machine has the memory.
#[test]
fn a_model_of_resnet_152s_size_goes_through_three_levels_uncopied() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/synthetic_resnet152_three_level.json");
    let mut job: Value = serde_json::from_slice(&std::fs::read(file).expect("a config")).expect("JSON");
    job["hyperparameters"]["rounds"] = json!(2);
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("proc");
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .expect("there");
    let kib: u64 = available
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    if kib < 9 << 20 {
        eprintln!(
            "NOT RUN: the 232 MB job wants 9 GiB of memory available, there are {} MiB",
            kib >> 10
        );
        return;
    }
    let plane = if can_have("sockmap") { "sockmap" } else { "relay" };
    nothing_is_copied(plane, &[1, 2, 4, 8], &Place::new(&job));
}

#[test]
fn two_hundred_trainers_fit_on_a_node() {
    let plane = if can_have("sockmap") { "sockmap" } else { "relay" };
    let levels = [1, 4, 200];
    let place = Place::new(&Job::digits(&levels, "softmax").file());
    let finished = place.finish(&["--plane", plane]).success();
    for round in finished.all("round") {
        assert_eq!(number(&round["trainers"]), 200);
    }
}

#[test]
fn a_run_learns_and_leaves_its_folder() {
    let mut job = Job::digits(&[1, 2, 4], "softmax").with("trainSamples", 2000);
    job.rounds = 3;
    let place = Place::new(&job.file());
    let finished = place.finish(&[]).success();
    let rounds = finished.all("round");
    let loss = |round: &Value| round["loss"].as_f64().expect("a loss");
    assert!(loss(rounds[2]) < loss(rounds[0]), "it did not learn: {rounds:#?}");
    assert_eq!(finished.one("job_finished")["accuracy"], rounds[2]["accuracy"]);
    for name in [
        "job.json",
        "metrics.jsonl",
        "model-1.safetensors",
        "model-3.safetensors",
        "logs/trainer-4.log",
    ] {
        assert!(place.run().join(name).exists(), "no {name}");
    }
    let metrics = std::fs::read_to_string(place.run().join("metrics.jsonl")).expect("metrics");
    assert_eq!(
        metrics.lines().count(),
        finished.events.len(),
        "the metrics are the events"
    );
    let last = std::fs::read(place.run().join("model-3.safetensors")).expect("a checkpoint");
    assert!(last == place.model(), "the last checkpoint is the model");
}

#[test]
fn a_run_goes_on_from_a_model_on_disk() {
    let job = Job::digits(&[1, 2], "softmax");
    let first = Place::new(&job.file());
    let before = first.finish(&[]).success();
    let mut again = job.file();
    again["baseModel"] = json!({ "name": first.run().join("model.safetensors"), "version": 1 });
    let second = Place::new(&again);
    let after = second.finish(&[]).success();
    let loss =
        |finished: &support::Finished| finished.all("round")[0]["train_loss"].as_f64().expect("a loss");
    assert!(loss(&after) < loss(&before), "it began anew");
}

/// Real MNIST where it lies beside the repository: the 10,000-image set, of which 8,000 are trained on.
#[test]
fn real_mnist_is_learnt_by_three_levels() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/mnist");
    if !data.exists() {
        eprintln!("NOT RUN: no MNIST at {}", data.display());
        return;
    }
    let plane = if can_have("sockmap") { "sockmap" } else { "relay" };
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/mnist_three_level.json");
    let place = Place::new(&serde_json::from_slice(&std::fs::read(config).expect("a config")).expect("JSON"));
    let data = data.to_str().expect("UTF-8");
    let finished = place
        .finish(&["--plane", plane, "--data", data, "--rounds", "10"])
        .success();
    let accuracy = finished.one("job_finished")["accuracy"]
        .as_f64()
        .expect("a test set");
    assert!(accuracy >= 0.95, "{accuracy}");
    let plan = plan(&place);
    let referenced: u64 = finished
        .all("round")
        .iter()
        .map(|round| number(&round["bytes_referenced"]))
        .sum();
    assert_eq!(
        referenced,
        10 * references(14) * number(&plan["memory"]["object_bytes"]),
        "the counters disagree"
    );
}

#[test]
fn status_shows_a_run_and_the_counters_grow() {
    let mut job = Job::synthetic(&[1, 2, 4], 1 << 20, "F32");
    job.rounds = 1_000_000;
    let place = Place::new(&job.file());
    let mut run = place.start(&["--checkpoint-every", "0"]);
    let socket = run.wait_for("job_started")["daemon"]
        .as_str()
        .expect("a path")
        .to_owned();
    let status = || -> Value {
        let output = lifl()
            .args(["status", "--json", "--daemon", &socket])
            .output()
            .expect("started");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).expect("one event")
    };
    let frames = |status: &Value| -> u64 {
        let workers = status["status"]["workers"].as_array().expect("workers");
        assert_eq!(workers.len(), 8, "seven and the coordinator");
        workers
            .iter()
            .map(|worker| number(&worker["counters"]["frames"]))
            .sum()
    };
    let first = frames(&status());
    run.wait_for("round");
    let mut later = frames(&status());
    while later <= first {
        later = frames(&status());
    }
    let people = lifl()
        .args(["status", "--daemon", &socket])
        .output()
        .expect("started");
    let people = String::from_utf8_lossy(&people.stdout).into_owned();
    assert!(
        people.contains("middle-aggregator-2") && people.contains("referenced"),
        "{people}"
    );
    signal(run.pid(), Signal::SIGINT);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    assert_eq!(finished.one("job_failed")["exit_code"], 130);
}
