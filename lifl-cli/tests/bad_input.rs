//! Bad input gets an error that names the thing, its place and the remedy, and leaves nothing behind.

mod support;

use std::fs;

use serde_json::{Value, json};

use support::{Finished, Job, Place, lifl};

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

#[test]
fn a_base_model_of_another_shape_ends_the_job_by_name() {
    let first = Place::new(&Job::digits(&[1, 1], "softmax").file());
    first.finish(&[]).success();
    let mut file = Job::digits(&[1, 1], "mlp").file();
    file["baseModel"] = json!({ "name": first.run().join("model.safetensors"), "version": 1 });
    let finished = Place::new(&file).finish(&[]);
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("top-aggregator-1") && finished.stderr.contains("baseModel"),
        "{}",
        finished.stderr
    );
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
