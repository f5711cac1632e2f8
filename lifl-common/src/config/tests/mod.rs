//! What a person who writes job files cares about.

mod control_plane;
mod errors;
mod folders;
mod jobs;
mod no_panic;
mod transports;
mod worker_files;

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{ConfigError, JobSpec, Loaded, Overrides, load};

/// A channel that carries models from `upper` to `lower`.
fn channel(name: &str, upper: &str, lower: &str, groups: &[&str]) -> Value {
    json!({
        "name": name,
        "pair": [lower, upper],
        "groupBy": { "type": "tag", "value": groups },
        "funcTags": { upper: ["distribute", "aggregate"], lower: ["fetch", "upload"] },
    })
}

/// One of the coordinator's channels.
fn coordinator_channel(name: &str, role: &str, tag: &str) -> Value {
    json!({
        "name": name,
        "pair": [role, "coordinator"],
        "backend": "p2p",
        "funcTags": { role: ["coordinate"], "coordinator": [tag] },
    })
}

/// A top, a leaf in each of two groups, and two trainers for each leaf.
fn job() -> Value {
    json!({
        "job": { "id": "job-1", "name": "digits" },
        "roles": [
            { "name": "top" },
            { "name": "leaf", "groupAssociation": [
                { "models": "default", "updates": "a" },
                { "models": "default", "updates": "b" },
            ] },
            { "name": "trainer", "replica": 2, "groupAssociation": [{ "updates": "a" }, { "updates": "b" }] },
        ],
        "channels": [
            channel("models", "top", "leaf", &["default"]),
            channel("updates", "leaf", "trainer", &["a", "b"]),
        ],
        "hyperparameters": { "rounds": 2 },
        "dataset": "builtin:digits",
    })
}

/// A change to a job: sets the value at a JSON pointer, or takes it away.
fn with(mut job: Value, changes: &[(&str, Value)]) -> Value {
    for (pointer, value) in changes {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        match job.pointer_mut(parent).expect("the parent") {
            Value::Array(list) => match key.parse::<usize>() {
                Ok(i) if i < list.len() => list[i] = value.clone(),
                _ => list.push(value.clone()),
            },
            parent if value.is_null() => {
                parent.as_object_mut().expect("an object").remove(key);
            }
            parent => parent[key] = value.clone(),
        }
    }
    job
}

/// Loads the values as the files `0.json`, `1.json`, …
fn load_all(files: &[Value], overrides: &Overrides) -> Result<Loaded, ConfigError> {
    let folder = TempDir::new().expect("a folder");
    let paths: Vec<PathBuf> = files
        .iter()
        .enumerate()
        .map(|(i, value)| {
            let path = folder.path().join(format!("{i}.json"));
            fs::write(&path, value.to_string()).expect("a file");
            path
        })
        .collect();
    load(&paths, overrides)
}

fn loaded(job: &Value) -> Loaded {
    load_all(std::slice::from_ref(job), &Overrides::default()).unwrap_or_else(|error| panic!("{error}"))
}

fn spec(job: &Value) -> JobSpec {
    loaded(job).job
}

/// All problems as they are printed, without the folder of the files.
fn problems(files: &[Value]) -> Vec<String> {
    let error = load_all(files, &Overrides::default()).expect_err("problems");
    let shown = error.to_string();
    let folder = error
        .problems
        .iter()
        .find_map(|problem| problem.file.as_ref()?.parent());
    let folder = folder
        .map(|folder| format!("{}/", folder.display()))
        .unwrap_or_default();
    shown.lines().map(|line| line.replace(&folder, "")).collect()
}

/// Asserts that this is all that is wrong with the job.
#[track_caller]
fn assert_problems(job: Value, expected: &[&str]) {
    let expected: Vec<String> = expected.iter().map(|line| format!("0.json: {line}")).collect();
    let found = problems(&[job]);
    assert_eq!(found, expected, "found:\n{}", found.join("\n"));
}
