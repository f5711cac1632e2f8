//! Bad input gets an error that names the thing, its place and the remedy, and leaves nothing behind.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Finished, Job, Place, lifl};

/// The run must fail with that code and say all of that, before it made anything.
fn refused(place: &Place, more: &[&str], code: i32, says: &[&str]) -> Finished {
    let finished = place.finish(more).refused(code, says);
    assert!(!place.run().exists(), "a run folder was made");
    finished
}

fn file_refused(change: impl FnOnce(&mut Value), says: &[&str]) {
    let mut file = Job::synthetic(&[1, 2, 4], 1000, "F32").file();
    change(&mut file);
    let place = Place::new(&file);
    let finished = refused(&place, &[], 2, says);
    assert!(!finished.all("problem").is_empty(), "problems are events too");
    // `validate` says the same.
    let output = lifl().arg("validate").arg(&place.job).output().expect("started");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(says.iter().all(|says| text.contains(says)), "{text}");
}

#[test]
fn a_misspelt_field_is_named_with_the_right_one() {
    file_refused(
        |file| file["hyperparameters"]["batchsize"] = json!(3),
        &["batchsize", "batchSize"],
    );
}

#[test]
fn all_faults_of_a_file_are_told_at_once() {
    file_refused(
        |file| {
            file["hyperparameters"]["rounds"] = json!(0);
            file["lifl"]["timing"] = json!("sometimes");
            file["roles"][2]["replica"] = json!(-1);
        },
        &["hyperparameters.rounds", "lifl.timing", "roles[2].replica"],
    );
}

#[test]
fn a_channel_without_an_end_is_named() {
    file_refused(
        |file| file["channels"][1]["pair"] = json!(["middle-aggregator", "trayner"]),
        &["trayner", "channels[1]"],
    );
}

#[test]
fn zero_replicas_are_refused() {
    file_refused(
        |file| file["roles"][1]["replica"] = json!(0),
        &["roles[1].replica"],
    );
}

#[test]
fn a_tree_that_is_a_ring_is_refused() {
    file_refused(
        |file| {
            let mut ring = file["channels"][0].clone();
            ring["name"] = json!("ring");
            ring["pair"] = json!(["trainer", "top-aggregator"]);
            ring["funcTags"] =
                json!({ "trainer": ["distribute", "aggregate"], "top-aggregator": ["fetch", "upload"] });
            file["channels"].as_array_mut().expect("channels").push(ring);
        },
        &["top"],
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    file_refused(
        |file| file["optimizer"] = json!({ "sort": "scaffold" }),
        &["optimizer", "scaffold"],
    );
    file_refused(
        |file| file["hyperparameters"]["concurrency"] = json!(10),
        &["hyperparameters.concurrency", "10"],
    );
    file_refused(
        |file| file["channels"][0]["backend"] = json!("mqtt"),
        &["mqtt", "channels[0]"],
    );
}

#[test]
fn a_data_set_that_is_not_there_is_named() {
    let mut job = Job::digits(&[1, 2], "softmax");
    job.dataset = Some("/nonexistent/mnist".to_owned());
    refused(&Place::new(&job.file()), &[], 2, &["/nonexistent/mnist"]);
}

#[test]
fn a_data_set_that_is_cut_off_is_named() {
    let place = Place::new(&Job::digits(&[1, 2], "softmax").file());
    let folder = place.folder.path().join("data");
    fs::create_dir(&folder).expect("made");
    // 100 images are announced, and the file ends after its header.
    let header = [0_u8, 0, 8, 3, 0, 0, 0, 100, 0, 0, 0, 28, 0, 0, 0, 28];
    fs::write(folder.join("t10k-images-idx3-ubyte"), header).expect("written");
    fs::write(folder.join("t10k-labels-idx1-ubyte"), [0, 0, 8, 1, 0, 0, 0, 100]).expect("written");
    let data = folder.to_str().expect("UTF-8");
    refused(&place, &["--data", data], 2, &["t10k-images-idx3-ubyte"]);
}

#[test]
fn fewer_samples_than_trainers_are_refused() {
    let job = Job::digits(&[1, 20], "softmax").with("trainSamples", 10);
    refused(&Place::new(&job.file()), &[], 2, &["10", "20"]);
}

#[test]
fn a_pool_too_small_is_told_with_the_numbers_before_anything_starts() {
    let place = Place::new(&Job::synthetic(&[1, 2, 4], 10_000_000, "F32").file());
    refused(
        &place,
        &["--pool-mib", "100", "--huge-pages", "never"],
        3,
        &["100 MiB", "305", "--pool-mib"],
    );
}

#[test]
fn a_daemon_that_is_not_there_is_named() {
    let place = Place::new(&Job::synthetic(&[1, 1], 10, "F32").file());
    let output = lifl()
        .arg("run")
        .arg(&place.job)
        .args(["--daemon", "/nonexistent/lifl.sock"])
        .output();
    let output = output.expect("started");
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/lifl.sock"));
}

#[test]
fn a_run_folder_in_use_is_not_written_to() {
    let place = Place::new(&Job::synthetic(&[1, 1], 10, "F32").file());
    fs::create_dir(place.run()).expect("made");
    fs::write(place.run().join("precious"), "x").expect("written");
    let finished = place.finish(&[]);
    assert_eq!(finished.code(), Some(2));
    assert!(finished.stderr.contains("not empty"), "{}", finished.stderr);
    assert_eq!(fs::read_dir(place.run()).expect("there").count(), 1);
}

/// `run`, `validate` and `plan` must refuse the job at those paths with code 2 before anything starts, and say all of that.
fn base_model_refused(paths: &[&Path], says: &[&str]) {
    let out = tempfile::tempdir().expect("a folder");
    let run = out.path().join("run");
    for command in ["validate", "plan", "run"] {
        let mut lifl = lifl();
        lifl.arg(command).args(paths);
        if command == "run" {
            lifl.args(["--daemon", "own", "--out"]).arg(&run);
        }
        let output = lifl.output().expect("started");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{command}: {text}");
        for says in ["baseModel", "safetensors file"].iter().chain(says) {
            assert!(text.contains(says), "{command}: no {says:?} in: {text}");
        }
    }
    assert!(!run.exists(), "a run folder was made");
}

#[test]
fn a_base_model_of_another_shape_is_refused_before_anything_starts() {
    let first = Place::new(&Job::digits(&[1, 1], "softmax").file());
    first.finish(&[]).success();
    let mut file = Job::digits(&[1, 1], "mlp").file();
    let model = first.run().join("model.safetensors");
    file["baseModel"] = json!({ "name": model, "version": 1 });
    let place = Place::new(&file);
    base_model_refused(
        &[&place.job],
        &["model.safetensors", "it lacks hidden.bias", "lifl.model"],
    );
    refused(&place, &[], 2, &["it lacks hidden.bias"]);
    // Of the same kind, but with a number that is none.
    let mut file = Job::digits(&[1, 1], "softmax").file();
    let mut bytes = fs::read(&model).expect("a model");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    let spoilt = first.folder.path().join("spoilt.safetensors");
    fs::write(&spoilt, bytes).expect("written");
    file["baseModel"] = json!({ "name": spoilt });
    base_model_refused(&[&Place::new(&file).job], &["spoilt.safetensors", "1 NaN"]);
    // It is looked at before a run, and no more where a run goes on from a checkpoint.
    file["baseModel"] = json!({ "name": model });
    let again = Place::new(&file);
    again.finish(&[]).success();
    fs::remove_file(&model).expect("removed");
    fs::remove_file(again.run().join("model.safetensors")).expect("removed");
    fs::remove_file(again.run().join("checkpoint-2.json")).expect("removed");
    again.start_resume(&[]).wait().success();
}

#[test]
fn a_base_model_is_looked_at_in_every_form_of_job_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let pointer = folder.path().join("pointer.safetensors");
    fs::write(
        &pointer,
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
    )
    .expect("written");
    let base_model = json!({ "name": pointer });
    let says = ["pointer.safetensors", "Git LFS pointer", "git lfs pull"];
    let mut job = Job::synthetic(&[1, 2], 1000, "F32").file();
    job["baseModel"] = base_model.clone();
    base_model_refused(&[&Place::new(&job).job], &says);

    // Worker files: any of them may name it.
    let workers = folder.path().join("workers");
    fs::create_dir(&workers).expect("made");
    let mut channel = job["channels"][0].clone();
    channel["name"] = json!("updates");
    for (n, role) in ["top-aggregator", "trainer"].into_iter().enumerate() {
        let worker = json!({
            "taskid": n.to_string(), "role": role, "job": { "id": "j" }, "channels": [channel],
            "groupAssociation": { "updates": "default" }, "lifl": job["lifl"],
            "baseModel": if n == 0 { base_model.clone() } else { json!({ "name": "" }) },
        });
        fs::write(workers.join(format!("{role}.json")), worker.to_string()).expect("written");
    }
    base_model_refused(&[&workers], &says);

    // What Flame's control plane is given.
    let design = folder.path().join("design");
    fs::create_dir(&design).expect("made");
    let parts = [
        (
            "schema.json",
            json!({ "roles": [{ "name": "top-aggregator" }, { "name": "trainer" }], "channels": [channel] }),
        ),
        (
            "job.json",
            json!({ "name": "j", "designId": "d", "lifl": job["lifl"] }),
        ),
        (
            "modelSpec.json",
            json!({ "baseModel": base_model, "hyperparameters": { "rounds": 1 } }),
        ),
        (
            "dataSpec.json",
            json!([{ "role": "trainer", "datasetGroups": { "default": ["builtin:digits"] } }]),
        ),
    ];
    for (name, part) in parts {
        fs::write(design.join(name), part.to_string()).expect("written");
    }
    base_model_refused(&[&design], &says);
}

#[test]
fn programs_are_told_of_a_base_model_too() {
    let mut file = Job::synthetic(&[1, 1], 10, "F32").file();
    file["baseModel"] = json!({ "name": "/nonexistent/model.safetensors" });
    let place = Place::new(&file);
    let finished = refused(
        &place,
        &[],
        2,
        &["/nonexistent/model.safetensors", "give its path"],
    );
    assert_eq!(finished.all("problem")[0]["problem"]["path"], "baseModel.name");
    let output = lifl()
        .arg("validate")
        .arg("--json")
        .arg(&place.job)
        .output()
        .expect("started");
    let event: Value = serde_json::from_slice(&output.stdout).expect("one event");
    assert_eq!(event["problem"]["file"], "/nonexistent/model.safetensors");
}

#[test]
fn a_file_that_is_not_json_is_told_with_its_place() {
    let place = Place::new(&json!({}));
    fs::write(&place.job, "{\n  \"job\": {,}\n}").expect("written");
    refused(&place, &[], 2, &["job.json", "2:"]);
}

#[test]
fn the_command_line_is_checked() {
    for arguments in [
        &["run"][..],
        &["run", "x.json", "--rounds", "0"],
        &["run", "x.json", "--plane", "warp"],
        &["fly"],
    ] {
        let output = lifl().args(arguments).output().expect("started");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn the_schema_describes_the_files_that_are_read() {
    let output = lifl().arg("schema").output().expect("started");
    let schema: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(schema.to_string().contains("batchSize") && schema.to_string().contains("groupAssociation"));
}
