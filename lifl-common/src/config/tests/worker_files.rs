//! Worker files as one job.

use super::super::{Group, ModelSpec, Optimizer};
use super::*;

/// The file of one worker.
pub(super) fn worker(role: &str, taskid: &str, channels: &[Value]) -> Value {
    let groups: serde_json::Map<String, Value> = channels
        .iter()
        .filter_map(|channel| Some((channel["name"].as_str()?.to_owned(), json!("default"))))
        .collect();
    json!({
        "taskid": taskid,
        "role": role,
        "job": { "id": "job-1", "name": "digits" },
        "backend": "shm",
        "groupAssociation": groups,
        "channels": channels,
        "hyperparameters": { "rounds": 5 },
        "dataset": "builtin:digits",
    })
}

pub(super) fn models() -> Value {
    channel("models", "top", "leaf", &["default"])
}

pub(super) fn updates() -> Value {
    channel("updates", "leaf", "trainer", &["default"])
}

/// A top, a leaf and two trainers.
pub(super) fn files() -> Vec<Value> {
    vec![
        worker("trainer", "03", &[updates()]),
        worker("trainer", "04", &[updates()]),
        worker("leaf", "03", &[models(), updates()]),
        with(
            worker("top", "01", &[models()]),
            &[("/hyperparameters/rounds", json!(10))],
        ),
    ]
}

fn coordinator() -> Value {
    let channel = coordinator_channel("top-coord", "top", "coordinateWithTopAgg");
    with(
        worker("coordinator", "00", &[channel]),
        &[("/hyperparameters/rounds", json!(20))],
    )
}

#[track_caller]
pub(super) fn assert_problems(files: &[Value], expected: &[&str]) {
    let found = problems(files);
    assert_eq!(found, expected, "found:\n{}", found.join("\n"));
}

#[test]
fn worker_files_are_one_job() {
    let loaded = load_all(&files(), &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
    let job = loaded.job;
    let workers: Vec<_> = job
        .workers
        .iter()
        .map(|worker| (worker.name.as_str(), worker.task_id.as_deref()))
        .collect();
    // The same taskid in two roles is two workers.
    let expected = [
        ("top-1", Some("01")),
        ("leaf-1", Some("03")),
        ("trainer-1", Some("03")),
        ("trainer-2", Some("04")),
    ];
    assert_eq!(workers, expected);
    assert_eq!((job.rounds, job.levels(), job.model), (10, 2, ModelSpec::Cnn));
    assert_eq!(loaded.notes.len(), 1, "{:?}", loaded.notes);
    assert!(
        loaded.notes[0].starts_with("rounds is what "),
        "{:?}",
        loaded.notes
    );
}

#[test]
fn a_folder_is_searched_in_the_order_of_its_names() {
    let folder = TempDir::new().expect("a folder");
    let names = [
        "z/config2.json",
        "z/config1.json",
        "a/leaf/config.json",
        "top.json",
    ];
    for (name, file) in names.iter().zip(files()) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, file.to_string()).expect("a file");
    }
    fs::write(folder.path().join("README.md"), "not a config").expect("a file");
    let job = load(&[folder.path().to_owned()], &Overrides::default())
        .expect("a job")
        .job;
    let trainers: Vec<_> = job.trainers().map(|trainer| trainer.task_id.as_deref()).collect();
    assert_eq!(trainers, [Some("04"), Some("03")]);
}

#[test]
fn the_coordinators_rounds_end_the_job() {
    let mut files = files();
    files.insert(0, coordinator());
    let job = load_all(&files, &Overrides::default())
        .unwrap_or_else(|error| panic!("{error}"))
        .job;
    assert_eq!((job.rounds, job.workers.len()), (20, 4));
}

#[test]
fn a_coordinators_file_may_be_left_out() {
    let coordinated = coordinator_channel("top-coord", "top", "coordinateWithTopAgg");
    let mut files = files();
    files[3] = worker("top", "01", &[models(), coordinated]);
    assert!(load_all(&files, &Overrides::default()).is_ok());
}

#[test]
fn files_of_different_jobs_are_refused() {
    let mut files = files();
    files[1]["job"]["id"] = json!("job-2");
    assert_problems(
        &files,
        &[r#"1.json: job.id: another job: "job-2"; expected "job-1" as in 0.json"#],
    );
}

#[test]
fn workers_whose_taskids_flame_confuses_are_named_with_their_files_and_what_to_do() {
    let with_taskids = |taskids: [&str; 4]| {
        let mut files = files();
        for (file, taskid) in files.iter_mut().zip(taskids) {
            file["taskid"] = json!(taskid);
        }
        let loaded = load_all(&files, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
        let notes = loaded.notes.into_iter();
        notes.filter(|note| note.contains("taskids")).collect::<Vec<_>>()
    };
    let [a, b, c] = [
        "505f9fc483cf4df68a2409257b5fad7d3c580370",
        "605f9fc483cf4df68a2409257b5fad7d3c58037A",
        "705f9fc483cf4df68a2409257b5fad7d3c58047a",
    ];
    assert_eq!(with_taskids([a, b, c, "0001"]), [""; 0]);
    // The same taskid in two roles, and another one with the same end.
    let notes = with_taskids([a, "00037a", b, c]);
    assert_eq!(notes.len(), 1, "{notes:?}");
    for part in [
        "0.json",
        "1.json",
        "2.json",
        "037a",
        "trainer in ",
        "give each a taskid",
    ] {
        let named = part != "0.json";
        assert_eq!(notes[0].contains(part), named, "{part}: {}", notes[0]);
    }
    // No taskids of Flame's.
    assert_eq!(with_taskids(["04", "03", "02", "01"]), [""; 0]);
    assert_eq!(
        with_taskids(["trainer-4", "trainer-3", "leaf-3", "top-3"]),
        [""; 0]
    );
}

#[test]
fn a_worker_is_named_by_role_and_taskid() {
    let mut files = files();
    files[1]["taskid"] = json!("03");
    assert_problems(
        &files,
        &[
            "1.json: taskid: role trainer with taskid 03 is in 0.json too; expected one file for each worker: remove \
           one of the two, or give it a taskid of its own",
        ],
    );
}

#[test]
fn files_must_agree() {
    let mut files = files();
    files[1]["channels"][0]["groupBy"]["value"] = json!(["default", "b"]);
    files[1]["lifl"] = json!({ "timing": "eager" });
    files[2]["lifl"] = json!({ "timing": "lazy" });
    assert_problems(
        &files,
        &[
            "1.json: channels[0].groupBy: channel updates: other groupBy than in 0.json; expected the same in all \
             files",
            "2.json: lifl.timing: not what 1.json says; expected the same in all these files",
        ],
    );
    files[1]["channels"][0] = updates();
    assert_problems(
        &files,
        &["2.json: lifl.timing: not what 1.json says; expected the same in all these files"],
    );
}

#[test]
fn each_worker_has_its_own_goal_and_the_top_the_optimizer() {
    let mut files = files();
    files[2]["hyperparameters"]["aggGoal"] = json!(1);
    files[2]["selector"] = json!({ "sort": "random", "kwargs": { "k": 2 } });
    files[2]["optimizer"] = json!({ "sort": "fedyogi" });
    files[3]["optimizer"] = json!({ "sort": "fedadam" });
    for trainer in &mut files[..2] {
        trainer["optimizer"] = json!({ "sort": "fedprox", "kwargs": { "mu": 0.5 } });
        trainer["selector"] = json!({ "sort": "random", "kwargs": { "k": 1 } });
    }
    let loaded = load_all(&files, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
    let job = loaded.job;
    let goals: Vec<_> = job
        .workers
        .iter()
        .map(|worker| (worker.agg_goal, worker.select))
        .collect();
    assert_eq!(
        goals,
        [(None, None), (Some(1), Some(2)), (None, None), (None, None)]
    );
    assert!(
        matches!(job.optimizer, Optimizer::FedAdam(_)),
        "{:?}",
        job.optimizer
    );
    assert_eq!(job.training.proximal_mu, 0.5);
    assert!(
        loaded.notes.iter().any(|note| note.contains("optimizer")),
        "{:?}",
        loaded.notes
    );
    files[1]["optimizer"]["kwargs"]["mu"] = json!(0.25);
    assert_problems(
        &files,
        &["1.json: optimizer: not what 0.json says; expected the same in all these files"],
    );
}

#[test]
fn trainers_may_have_datasets_of_their_own() {
    let mut files = files();
    files[1]["dataset"] = json!("other.npz");
    files[3]["dataset"] = json!("test.npz");
    let loaded = load_all(&files, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
    let job = loaded.job;
    let trainers: Vec<_> = job
        .trainers()
        .map(|trainer| {
            (
                job.data_of(trainer).map(|data| data.dataset.to_string()),
                job.part_of(trainer),
            )
        })
        .collect();
    assert_eq!(
        trainers,
        [
            (Some("builtin:digits".to_owned()), (0, 1)),
            (Some("other.npz".to_owned()), (0, 1)),
        ]
    );
    // The top judges.
    assert_eq!(
        job.data.as_ref().map(|data| data.dataset.as_str()),
        Some("test.npz")
    );
    assert!(
        loaded
            .notes
            .iter()
            .any(|note| note.contains("judged on the test samples of test.npz"))
    );

    let over = Overrides {
        data: Some("builtin:digits".to_owned()),
        ..Overrides::default()
    };
    let job = load_all(&files, &over)
        .unwrap_or_else(|error| panic!("{error}"))
        .job;
    assert!(job.workers.iter().all(|worker| worker.dataset.is_none()));
    assert_eq!(job.datasets().len(), 1);

    files[0]["lifl"] = json!({ "sha256": "a".repeat(64) });
    assert_problems(
        &files,
        &["0.json: lifl.sha256: one hash for 3 datasets; expected no sha256, or one dataset"],
    );
}

#[test]
fn missing_workers_and_mixed_files_are_told() {
    let without_trainers = &files()[2..];
    assert_problems(
        without_trainers,
        &["0.json: channels[1].pair[0]: unknown role \"trainer\"; expected leaf or top"],
    );
    let mixed = [files(), vec![job()]].concat();
    assert_problems(
        &mixed,
        &["4.json: a job file among other files; expected one job file alone, or worker files only"],
    );
    let half = with(files()[0].clone(), &[("/taskid", Value::Null)]);
    assert_eq!(problems(&[half])[0], "0.json: taskid: missing; expected a string");
}

#[test]
fn groups_of_worker_files_are_subtrees_too() {
    let mut files = files();
    for file in &mut files[..3] {
        let updates = file["channels"].as_array().map_or(0, Vec::len) - 1;
        file["channels"][updates] = channel("updates", "leaf", "trainer", &["a", "b"]);
        file["groupAssociation"]["updates"] = json!("a");
    }
    files[1]["groupAssociation"]["updates"] = json!("b");
    let found = problems(&files);
    let expected =
        "1.json: groupAssociation.updates: no leaf is in group \"b\" of channel updates; did you mean a?";
    assert_eq!(found, [expected]);
    files.push(with(
        files[2].clone(),
        &[
            ("/taskid", json!("05")),
            ("/groupAssociation/updates", json!("b")),
        ],
    ));
    let job = load_all(&files, &Overrides::default()).expect("a job").job;
    let group = |name: &str| {
        Some(Group {
            channel: "updates".into(),
            group: name.into(),
        })
    };
    let down: Vec<_> = job.workers.iter().map(|worker| worker.down.clone()).collect();
    assert_eq!(down[1..3], [group("a"), group("b")]);
}
