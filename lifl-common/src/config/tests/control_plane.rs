//! The files that Flame's control plane is given, as one job.

use super::super::{Group, Transport};
use super::*;

fn schema_file() -> Value {
    json!({
        "name": "two regions",
        "description": "for people",
        "roles": [
            { "name": "trainer", "isDataConsumer": true, "groupAssociation": [
                { "updates": "east" }, { "updates": "west" },
            ] },
            { "name": "leaf", "replica": 1, "groupAssociation": [
                { "updates": "east", "models": "default" },
                { "updates": "west", "models": "default" },
            ] },
            { "name": "top", "groupAssociation": [{ "models": "default" }] },
        ],
        "channels": [
            channel("updates", "leaf", "trainer", &["east", "west"]),
            channel("models", "top", "leaf", &["default"]),
        ],
    })
}

fn dataset(place: &str) -> Value {
    json!({
        "name": "digits",
        "url": format!("https://example.org/{place}.npz"),
        "//": "a remark",
        "dataFormat": "npz",
        "realm": format!("default/{place}"),
        "isPublic": true,
    })
}

/// A job as a folder, by its files' names.
fn folder() -> Vec<(&'static str, Value)> {
    vec![
        ("schema.json", schema_file()),
        (
            "job.json",
            json!({
                "name": "an example", "designId": "example", "priority": "low", "backend": "p2p", "maxRunTime": 1800,
                "dataSpecPath": "dataSpec.json", "modelSpecPath": "modelSpec.json",
            }),
        ),
        (
            "modelSpec.json",
            json!({
                "baseModel": { "name": "", "version": 0 },
                "hyperparameters": { "rounds": 5, "batchSize": 32, "learningRate": 0.1 },
                "dependencies": ["numpy >= 1.2.0"],
                "selector": { "sort": "default", "kwargs": {} },
                "optimizer": { "sort": "fedavg", "kwargs": {} },
            }),
        ),
        (
            "dataSpec.json",
            json!([{ "role": "trainer", "datasetGroups": { "east": ["e1", "e2"], "west": ["w1"] } }]),
        ),
        ("dataset_a.json", dataset("east/a")),
        ("dataset_b.json", dataset("west/b")),
        ("dataset_c.json", dataset("east/c")),
    ]
}

fn changed(name: &str, changes: &[(&str, Value)]) -> Vec<(&'static str, Value)> {
    folder()
        .into_iter()
        .map(|(other, file)| (other, if other == name { with(file, changes) } else { file }))
        .collect()
}

fn load_folder(files: &[(&str, Value)]) -> Result<Loaded, String> {
    let folder = TempDir::new().expect("a folder");
    for (name, file) in files {
        fs::write(folder.path().join(name), file.to_string()).expect("a file");
    }
    let shown = format!("{}/", folder.path().display());
    load(&[folder.path().to_owned()], &Overrides::default()).map_err(|error| {
        error
            .to_string()
            .replace(&shown, "")
            .replace(shown.trim_end_matches('/'), "FOLDER")
    })
}

#[track_caller]
fn assert_folder_problems(files: &[(&str, Value)], expected: &[&str]) {
    let error = load_folder(files).expect_err("problems");
    assert_eq!(error.lines().collect::<Vec<_>>(), expected, "found:\n{error}");
}

/// Each trainer's group and dataset.
fn trainers(job: &JobSpec) -> Vec<(String, String)> {
    job.trainers()
        .map(|trainer| {
            let Some(Group { group, .. }) = &trainer.up else {
                panic!("{trainer:?}")
            };
            let data = job.data_of(trainer).expect("data");
            (
                group.clone(),
                data.dataset.as_str().replace("https://example.org/", ""),
            )
        })
        .collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected
        .iter()
        .map(|&(a, b)| (a.to_owned(), b.to_owned()))
        .collect()
}

#[test]
fn a_control_planes_folder_is_one_job() {
    let loaded = load_folder(&folder()).unwrap_or_else(|error| panic!("{error}"));
    let job = loaded.job;
    assert_eq!((job.id.as_str(), job.name.as_str()), ("example", "an example"));
    assert_eq!((job.rounds, job.max_run_time_s, job.levels()), (5, 1800, 2));
    assert_eq!((job.training.batch_size, job.training.learning_rate), (32, 0.1));
    assert!(
        job.workers
            .iter()
            .all(|worker| worker.up.is_none() || worker.transport == Transport::P2p)
    );
    // Of each dataset's group one trainer, with that dataset alone.
    assert_eq!(
        trainers(&job),
        pairs(&[
            ("east", "east/a.npz"),
            ("east", "east/c.npz"),
            ("west", "west/b.npz")
        ])
    );
    for trainer in job.trainers() {
        assert_eq!(job.part_of(trainer), (0, 1));
    }
    let about: Vec<&str> = loaded
        .notes
        .iter()
        .filter_map(|note| note.split(' ').next())
        .collect();
    assert_eq!(
        about,
        [
            "priority",
            "dataFormat",
            "isPublic",
            "the",
            "dependencies",
            "trainers"
        ],
        "{:?}",
        loaded.notes
    );
}

#[test]
fn files_are_known_by_their_content() {
    let names = [
        "a.json", "b.json", "c.json", "d.json", "e.json", "f.json", "g.json",
    ];
    let mut files = folder();
    for (file, name) in files.iter_mut().zip(names) {
        file.0 = name;
    }
    files[1].1 = with(
        files[1].1.clone(),
        &[
            ("/dataSpecPath", json!("d.json")),
            ("/modelSpecPath", Value::Null),
        ],
    );
    let job = load_folder(&files).unwrap_or_else(|error| panic!("{error}")).job;
    assert_eq!(job.trainers().count(), 3);
    // What the job's file holds itself needs no file.
    let data_spec = files.remove(3).1;
    let model_spec = files.remove(2).1;
    files[1].1 = with(
        files[1].1.clone(),
        &[
            ("/dataSpecPath", Value::Null),
            ("/dataSpec", data_spec),
            ("/modelSpec", model_spec),
        ],
    );
    assert_eq!(
        load_folder(&files).unwrap_or_else(|error| panic!("{error}")).job,
        job
    );
}

#[test]
fn datasets_are_found_by_id_by_realm_or_in_order() {
    let mut by_id = folder();
    for (file, id) in by_id[4..].iter_mut().zip(["w1", "e2", "e1"]) {
        file.1["id"] = json!(id);
    }
    let job = load_folder(&by_id).unwrap_or_else(|error| panic!("{error}")).job;
    assert_eq!(
        trainers(&job),
        pairs(&[
            ("east", "east/c.npz"),
            ("east", "west/b.npz"),
            ("west", "east/a.npz")
        ])
    );

    let mut in_order = folder();
    for (file, name) in in_order[4..]
        .iter_mut()
        .zip(["dataset10.json", "dataset9.json", "dataset1.json"])
    {
        file.0 = name;
        file.1["realm"] = json!("default");
    }
    let job = load_folder(&in_order)
        .unwrap_or_else(|error| panic!("{error}"))
        .job;
    assert_eq!(
        trainers(&job),
        pairs(&[
            ("east", "east/c.npz"),
            ("east", "west/b.npz"),
            ("west", "east/a.npz")
        ])
    );

    let urls = json!([{ "role": "trainer", "datasetGroups": {
        "east": ["https://example.org/x.npz"], "west": ["https://example.org/x.npz"],
    } }]);
    let mut by_url = folder();
    by_url[3].1 = urls;
    by_url.truncate(4);
    let job = load_folder(&by_url).unwrap_or_else(|error| panic!("{error}")).job;
    assert_eq!(trainers(&job), pairs(&[("east", "x.npz"), ("west", "x.npz")]));
    // Who has the same dataset shares it.
    let parts: Vec<_> = job.trainers().map(|trainer| job.part_of(trainer)).collect();
    assert_eq!(parts, [(0, 2), (1, 2)]);
}

#[test]
fn what_is_wrong_is_said_of_the_file_that_it_stands_in() {
    let mut files = folder();
    files[0].1 = with(
        files[0].1.clone(),
        &[("/roles/1/replica", json!("two")), ("/connectors", json!([1]))],
    );
    files[1].1 = with(
        files[1].1.clone(),
        &[("/backend", json!("p2")), ("/maxRuntime", json!(5))],
    );
    files[2].1 = with(
        files[2].1.clone(),
        &[
            ("/hyperparameters/epoch", json!(3)),
            ("/selector/sort", json!("oort")),
        ],
    );
    files[4].1 = with(files[4].1.clone(), &[("/url", Value::Null)]);
    assert_folder_problems(
        &files,
        &[
            "job.json: maxRuntime: unknown field, of value 5; did you mean maxRunTime?",
            "schema.json: roles[1].replica: \"two\"; expected a whole number from 1 to 4294967295",
            "modelSpec.json: hyperparameters.epoch: unknown field, of value 3; did you mean epochs?",
            "dataset_a.json: url: missing; expected a string",
            "schema.json: connectors: connectors [1] is not supported yet; supported: channels",
            "dataSpec.json: 3 datasets named that no file has as its id (e1, e2 or w1), and 2 dataset files left; \
             expected a dataset*.json for each, in the order of their names, or each with its id",
            "modelSpec.json: selector.sort: selector oort is not supported yet; supported: default or random",
            "job.json: backend: unknown backend \"p2\"; did you mean p2p?",
        ],
    );
}

#[test]
fn groups_and_roles_of_datasets_must_be_the_schemas() {
    assert_folder_problems(
        &changed(
            "dataSpec.json",
            &[("/0/datasetGroups", json!({ "eats": ["1", "2"], "west": ["3"] }))],
        ),
        &[
            "dataSpec.json: [0].datasetGroups.eats[0]: group \"eats\" is in no groupAssociation of role trainer; did \
             you mean east?",
            "dataSpec.json: [0].datasetGroups.eats[1]: group \"eats\" is in no groupAssociation of role trainer; did \
             you mean east?",
        ],
    );
    assert_folder_problems(
        &changed("dataSpec.json", &[("/0/role", json!("trianer"))]),
        &[
            "dataSpec.json: [0].datasetGroups.east[0]: datasets for role \"trianer\", which does not train; did you \
             mean trainer?",
        ],
    );
}

#[test]
fn what_is_missing_is_named() {
    let mut files = folder();
    files.remove(2);
    files.remove(0);
    assert_folder_problems(
        &files,
        &[
            "job.json: modelSpecPath: no file \"modelSpec.json\"; expected the path of a file with hyperparameters",
            "FOLDER: no schema.json here; expected a file with roles and channels",
        ],
    );
    let mut two = folder();
    two.push(("schema2.json", schema_file()));
    two.push(("notes.json", json!({ "todo": 1 })));
    assert_folder_problems(
        &two,
        &[
            "notes.json: not a part of a job that is known here; expected schema.json, job.json, modelSpec.json, \
             dataSpec.json or dataset*.json of one job",
            "schema2.json: a second schema.json; expected schema.json alone",
        ],
    );
}

#[test]
fn a_broker_of_mqtt_is_on_this_machine_unless_a_file_says_otherwise() {
    let mqtt = changed("job.json", &[("/backend", json!("mqtt"))]);
    let loaded = load_folder(&mqtt).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.job.brokers.mqtt.as_deref(), Some("localhost:1883"));
    assert!(
        loaded.notes.iter().any(|note| note.contains("localhost:1883")),
        "{:?}",
        loaded.notes
    );
    let brokers = json!([{ "sort": "mqtt", "host": "elsewhere:77" }]);
    let given = changed("job.json", &[("/backend", json!("mqtt")), ("/brokers", brokers)]);
    let job = load_folder(&given).unwrap_or_else(|error| panic!("{error}")).job;
    assert_eq!(job.brokers.mqtt.as_deref(), Some("elsewhere:77"));
}
