//! Whole runs with other optimizers and selectors than the defaults, and with rounds that do not wait for everybody.

use std::path::Path;

use lifl_common::config::{JobSpec, UpdateKind};
use lifl_common::update::{Schema, Tensors, TensorsMut};
use nix::sys::signal::Signal;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::support::{Finished, Job, Place, lifl, signal};

/// A job that learns digits in some rounds, with that optimizer.
fn job(optimizer: &Value, updates: &str) -> Value {
    let mut job = Job::digits(&[1, 2, 4], "softmax")
        .with("trainSamples", 2000)
        .with("updates", updates);
    job.rounds = 5;
    let mut file = job.file();
    file["optimizer"] = optimizer.clone();
    file
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

/// It must learn, and all of its trainers must take part.
fn learns(optimizer: &Value, updates: &str) {
    let place = Place::new(&job(optimizer, updates));
    let finished = place.finish(&["--plane", "relay"]).success();
    let rounds = finished.all("round");
    let (first, last) = (number(&rounds[0]["loss"]), number(&rounds[4]["loss"]));
    assert!(last < first, "{optimizer}: the loss went from {first} to {last}");
    assert!(number(&rounds[4]["accuracy"]) > 0.5, "{optimizer}: {}", rounds[4]);
    assert!(rounds.iter().all(|round| round["trainers"] == 4));
}

#[test]
fn fedadagrad_learns() {
    learns(&json!({ "sort": "fedadagrad" }), "weights");
}

#[test]
fn fedadam_learns() {
    learns(&json!({ "sort": "fedadam", "kwargs": { "eta": 0.02 } }), "deltas");
}

#[test]
fn fedyogi_learns() {
    learns(&json!({ "sort": "fedyogi", "kwargs": {} }), "weights");
}

#[test]
fn fedprox_learns() {
    learns(&json!({ "sort": "fedprox", "kwargs": { "mu": 0.01 } }), "weights");
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    let quads = bytes.chunks_exact(4);
    quads
        .map(|quad| f64::from(f32::from_le_bytes(quad.try_into().expect("four"))))
        .collect()
}

/// A round's model as it lies in a slot.
fn checkpoint(finished: &Finished, schema: &Schema, round: u32) -> Vec<u8> {
    let file = std::fs::read(finished.run.join(format!("model-{round}.safetensors"))).expect("a checkpoint");
    let tensors = SafeTensors::deserialize(&file).expect("safetensors");
    let mut data = vec![0; schema.data_bytes()];
    for (tensor, range) in schema.iter() {
        data[range].copy_from_slice(tensors.tensor(&tensor.name).expect("there").data());
    }
    data
}

/// The mean of what the trainers make of a model in a round, less the model, in this process.
fn mean_difference(job: &JobSpec, schema: &Schema, round: u32, model: &[u8]) -> Vec<f64> {
    let mut sum = vec![0.0; schema.data_bytes() / 4];
    let mut samples = 0.0;
    let before = floats(model);
    for trainer in job.trainers() {
        let mut weights = vec![0; schema.data_bytes()];
        let mut learner = lifl_learn::for_trainer(job, trainer, job.part_of(trainer)).expect("a learner");
        let trained = learner
            .train(
                round,
                Tensors::new(schema, model),
                TensorsMut::new(schema, &mut weights),
            )
            .expect("trained");
        samples += trained.samples as f64;
        for ((sum, weight), before) in sum.iter_mut().zip(floats(&weights)).zip(&before) {
            *sum += trained.samples as f64 * (weight - before);
        }
    }
    sum.into_iter().map(|sum| sum / samples).collect()
}

/// Each round's model, from the one before by the paper's rule and Flame's defaults.
fn follows_the_rule(updates: &str) {
    let place = Place::new(&job(&json!({ "sort": "fedadam" }), updates));
    let finished = place.finish(&["--plane", "relay"]).success();
    let text = std::fs::read(finished.run.join("job.json")).expect("the run's job");
    let job: JobSpec = serde_json::from_slice(&text).expect("a job");
    assert_eq!(job.updates == UpdateKind::Deltas, updates == "deltas");
    let schema = lifl_learn::schema(&job.model).expect("a schema");
    let mut m = vec![0.0; schema.data_bytes() / 4];
    let mut v = m.clone();
    for round in 2..=4 {
        let before = checkpoint(&finished, &schema, round - 1);
        let difference = mean_difference(&job, &schema, round, &before);
        let after = floats(&checkpoint(&finished, &schema, round));
        let mut worst = 0.0_f64;
        for (i, (weight, d)) in floats(&before).into_iter().zip(difference).enumerate() {
            m[i] = 0.9 * m[i] + 0.1 * d;
            v[i] = 0.99 * v[i] + 0.01 * d * d;
            let expected = weight + 0.01 * m[i] / (v[i].sqrt() + 0.001);
            worst = worst.max((after[i] - expected).abs());
        }
        assert!(worst < 1e-5, "round {round}: {worst}");
    }
}

#[test]
fn a_run_with_weights_follows_the_papers_rule() {
    follows_the_rule("weights");
}

#[test]
fn a_run_with_deltas_follows_the_papers_rule() {
    follows_the_rule("deltas");
}

/// What the optimizer remembers lies in an arena of its own, which the plan knows of.
#[test]
fn the_optimizers_state_is_planned_for() {
    let mut file = Job::synthetic(&[1, 2], 1 << 20, "F32").file();
    file["optimizer"] = json!({ "sort": "fedadam" });
    let place = Place::new(&file);
    let output = lifl().arg("plan").arg(&place.job).arg("--json").output();
    let plan: Value = serde_json::from_slice(&output.expect("started").stdout).expect("one event");
    let memory = &plan["memory"];
    // Two states of two moments of four bytes.
    let state = memory["workers"][0]["state_bytes"].as_u64().expect("a number");
    assert!(state >= (2 * 8) << 20, "{state}");
    let arenas = memory["workers"].as_array().expect("workers").iter();
    let arenas: u64 = arenas.filter_map(|share| share["arena_bytes"].as_u64()).sum();
    assert_eq!(memory["pool_bytes"], arenas + state);
    let finished = place
        .finish(&["--plane", "relay", "--checkpoint-every", "0"])
        .success();
    let peak = finished.one("job_finished")["peak_memory_bytes"]
        .as_u64()
        .expect("a number");
    let most = memory["total_bytes"].as_u64().expect("a number");
    assert!(peak <= most, "took {peak}, planned {most}");
    assert!(
        peak >= arenas + state,
        "took {peak}, which is less than its arenas"
    );
}

#[test]
fn a_random_selector_takes_so_many_trainers_and_equal_seeds_take_the_same() {
    let mut job = Job::digits(&[1, 2, 6], "softmax");
    job.rounds = 4;
    let mut file = job.file();
    file["selector"] = json!({ "sort": "random", "kwargs": { "k": 2 } });
    let run = |seed: &str| {
        let place = Place::new(&file);
        let finished = place.finish(&["--plane", "relay", "--seed", seed]).success();
        // Two aggregators of three trainers each.
        assert!(finished.all("round").iter().all(|round| round["trainers"] == 4));
        place.model()
    };
    let first = run("5");
    assert!(first == run("5"), "the same seed gave another model");
    assert!(first != run("6"), "another seed gave the same model");
}

/// A run in which a worker that hangs, and holds the models that it was lent for ever, is not waited for.
fn goes_on_beside(hanging: &str, goal: u32, trainers: u32) {
    let mut job = Job::synthetic(&[1, 2, 6], 100_000, "F32");
    job.rounds = 200;
    job.max_run_time = 60;
    let mut file = job.file();
    file["hyperparameters"]["aggGoal"] = json!(goal);
    let place = Place::new(&file);
    let mut run = place.start(&["--plane", "relay", "--checkpoint-every", "0"]);
    run.wait_for("round");
    signal(run.workers(hanging)[0], Signal::SIGSTOP);
    let finished = run.wait().success();
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 200);
    for round in rounds {
        assert_eq!(round["trainers"], trainers, "{round}");
    }
}

#[test]
fn with_a_goal_nobody_waits_for_a_trainer_that_hangs() {
    // Two of each aggregator's three.
    goes_on_beside("trainer-1", 2, 4);
}

#[test]
fn with_a_goal_nobody_waits_for_an_aggregator_that_hangs() {
    // One of two aggregators, and one of its trainers.
    goes_on_beside("middle-aggregator-1", 1, 1);
}

#[test]
fn a_goal_above_the_number_of_children_waits_for_all() {
    let mut file = Job::synthetic(&[1, 2, 4], 1000, "F32").file();
    file["hyperparameters"]["aggGoal"] = json!(100);
    let place = Place::new(&file);
    let finished = place.finish(&["--plane", "relay"]).success();
    assert!(finished.all("round").iter().all(|round| round["trainers"] == 4));
    // So there are no late ones to keep old models for.
    let plan = lifl()
        .args(["plan", "--json"])
        .arg(&place.job)
        .output()
        .expect("started");
    let plan: Value = serde_json::from_slice(&plan.stdout).expect("one event");
    assert_eq!(plan["memory"]["workers"][0]["slots"], 2);
}

/// Images and labels as MNIST's files have them, all black.
fn write_idx(folder: &Path, stem: &str, count: u8) {
    let images = [
        &[0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28][..],
        &vec![0; 784 * usize::from(count)],
    ];
    let labels = [&[0, 0, 8, 1, 0, 0, 0, count][..], &vec![3; usize::from(count)]];
    std::fs::write(folder.join(format!("{stem}-images-idx3-ubyte")), images.concat()).expect("written");
    std::fs::write(folder.join(format!("{stem}-labels-idx1-ubyte")), labels.concat()).expect("written");
}

#[test]
fn trainers_of_a_control_planes_job_train_on_their_datasets() {
    let place = Place::new(&json!({}));
    let folder = place.folder.path().join("design");
    let black = place.folder.path().join("black");
    std::fs::create_dir(&folder).expect("made");
    std::fs::create_dir(&black).expect("made");
    write_idx(&black, "train", 60);
    write_idx(&black, "t10k", 20);
    let channels = Job::digits(&[1, 3], "softmax").file()["channels"].clone();
    let in_group = json!([{ "channel-0": "default" }]);
    let files = [
        (
            "schema.json",
            json!({
                "name": "a design",
                "roles": [
                    { "name": "top-aggregator", "groupAssociation": in_group },
                    { "name": "trainer", "isDataConsumer": true, "groupAssociation": in_group },
                ],
                "channels": channels,
            }),
        ),
        (
            "job.json",
            json!({
                "name": "a job", "designId": "d", "priority": "low", "backend": "shm", "maxRunTime": 120,
                "dataSpecPath": "dataSpec.json", "modelSpecPath": "modelSpec.json",
                "lifl": { "model": "softmax" },
            }),
        ),
        (
            "modelSpec.json",
            json!({ "hyperparameters": { "rounds": 2, "learningRate": 0.1 }, "dependencies": ["numpy"] }),
        ),
        (
            "dataSpec.json",
            json!([{ "role": "trainer", "datasetGroups": { "default": ["1", "2", "3"] } }]),
        ),
        (
            "dataset1.json",
            json!({ "url": "builtin:digits", "dataFormat": "npz", "realm": "default" }),
        ),
        (
            "dataset2.json",
            json!({ "url": black, "dataFormat": "idx", "realm": "default" }),
        ),
        (
            "dataset3.json",
            json!({ "url": "builtin:digits", "dataFormat": "npz", "realm": "default" }),
        ),
    ];
    for (name, value) in files {
        std::fs::write(folder.join(name), value.to_string()).expect("written");
    }
    let place = Place { job: folder, ..place };
    let finished = place.finish(&["--plane", "relay"]).success();
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), 2);
    for round in rounds {
        assert_eq!(round["trainers"], 3);
        // Two share the 8,000 digits, and one has what is in its folder.
        assert_eq!(round["samples"], 8060, "{round}");
    }
}
