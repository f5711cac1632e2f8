//! Whatever is in a file, it is answered, not died of.

use proptest::prelude::*;

use super::*;

/// Any small JSON value, preferring what stands in job files.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any_key().prop_map(Value::from),
        ".{0,80}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(any_key(), inner, 0..4)
                .prop_map(|members| members.into_iter().collect::<serde_json::Map<_, _>>().into()),
        ]
    })
}

fn any_key() -> impl Strategy<Value = String> {
    const KNOWN: &[&str] = &[
        "",
        "a",
        "default",
        "role",
        "roles",
        "taskid",
        "name",
        "pair",
        "funcTags",
        "groupAssociation",
        "models",
        "updates",
        "top",
        "leaf",
        "trainer",
        "coordinate",
        "coordinateWithTrainer",
        "fetch",
        "aggregate",
        "sort",
        "shards",
        "iid",
        "alpha",
        "model",
        "mlp",
        "synthetic",
        "lifl",
        "partition",
        "shm",
        "p2p",
        "replica",
    ];
    prop_oneof![prop::sample::select(KNOWN).prop_map(str::to_owned), "\\PC{0,5}"]
}

/// Every value within a value.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum(),
        _ => 0,
    }
}

/// Does it to the `n`th value within a value.
fn mutate(value: &mut Value, n: &mut usize, mutation: &Mutation) {
    if *n == 0 {
        match (mutation, &mut *value) {
            (Mutation::Rename(key), Value::Object(members)) => {
                if let Some(old) = members.keys().next().cloned()
                    && let Some(member) = members.remove(&old)
                {
                    members.insert(key.clone(), member);
                }
            }
            (Mutation::Drop, Value::Object(members)) => {
                if let Some(key) = members.keys().next_back().cloned() {
                    members.remove(&key);
                }
            }
            (Mutation::Drop, Value::Array(list)) => {
                list.pop();
            }
            (Mutation::Double, Value::Array(list)) => list.extend(list.clone()),
            (Mutation::Replace(new), value) => *value = new.clone(),
            _ => {}
        }
    }
    let Some(left) = n.checked_sub(1) else { return };
    *n = left;
    let members: Box<dyn Iterator<Item = &mut Value>> = match value {
        Value::Array(list) => Box::new(list.iter_mut()),
        Value::Object(members) => Box::new(members.values_mut()),
        _ => return,
    };
    for member in members {
        let size = count(member);
        if *n < size {
            return mutate(member, n, mutation);
        }
        *n -= size;
    }
}

#[derive(Debug, Clone)]
enum Mutation {
    Replace(Value),
    Rename(String),
    Drop,
    Double,
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        any_value().prop_map(Mutation::Replace),
        any_key().prop_map(Mutation::Rename),
        Just(Mutation::Drop),
        Just(Mutation::Double),
    ]
}

/// Either a job that keeps its promises, or problems that can be shown.
fn check(files: &[Value]) {
    let prefer = Overrides {
        prefer: Some(super::super::Transport::P2p),
        ..Overrides::default()
    };
    let _ = load_all(files, &prefer);
    match load_all(files, &Overrides::default()) {
        Ok(loaded) => {
            let job = loaded.job;
            assert!(job.top().is_some() && job.trainers().next().is_some());
            for worker in &job.workers {
                assert_eq!(worker.up.is_none(), worker.level == 0);
                let above = |other: &&super::super::WorkerSpec| {
                    other.level + 1 == worker.level && other.down == worker.up
                };
                assert!(worker.up.is_none() || job.workers.iter().any(|other| above(&other)));
            }
        }
        Err(error) => {
            assert!(!error.problems.is_empty());
            let lines = error.to_string().lines().count();
            assert_eq!(
                lines,
                error.problems.len() + usize::from(error.omitted > 0),
                "{error}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_jobs_never_panic(mutations in prop::collection::vec((any::<prop::sample::Index>(), any_mutation()), 1..4)) {
        let mut file = with(job(), &[
            ("/lifl", json!({ "model": { "mlp": { "hidden": 3 } }, "partition": { "sort": "iid" } })),
            ("/roles/-", json!({ "name": "coordinator" })),
            ("/channels/-", coordinator_channel("coord", "top", "coordinateWithTopAgg")),
        ]);
        for (at, mutation) in mutations {
            let mut n = at.index(count(&file));
            mutate(&mut file, &mut n, &mutation);
        }
        check(&[file]);
    }

    #[test]
    fn mutated_worker_files_never_panic(
        mutations in prop::collection::vec((0..3_usize, any::<prop::sample::Index>(), any_mutation()), 1..4),
    ) {
        let updates = channel("updates", "top", "trainer", &["default"]);
        let worker = |role: &str, taskid: &str| json!({
            "taskid": taskid, "role": role, "job": { "id": "j" }, "channels": [updates],
            "groupAssociation": { "updates": "default" }, "dataset": "builtin:digits",
        });
        let mut files = [worker("top", "1"), worker("trainer", "2"), worker("trainer", "3")];
        for (file, at, mutation) in mutations {
            let mut n = at.index(count(&files[file]));
            mutate(&mut files[file], &mut n, &mutation);
        }
        check(&files);
    }

    #[test]
    fn mutated_control_plane_files_never_panic(
        mutations in prop::collection::vec((0..6_usize, any::<prop::sample::Index>(), any_mutation()), 1..5),
    ) {
        let dataset = json!({ "url": "builtin:digits", "realm": "default", "dataFormat": "npz" });
        let mut files = [
            json!({ "roles": [{ "name": "top" }, { "name": "trainer" }],
                    "channels": [channel("updates", "top", "trainer", &["default"])] }),
            json!({ "name": "j", "designId": "d", "backend": "shm" }),
            json!({ "hyperparameters": { "rounds": 1, "aggGoal": 1 }, "optimizer": { "sort": "fedadam" },
                    "selector": { "sort": "random", "kwargs": { "k": 1 } } }),
            json!([{ "role": "trainer", "datasetGroups": { "default": ["a", "b"] } }]),
            dataset.clone(),
            dataset,
        ];
        for (file, at, mutation) in mutations {
            let mut n = at.index(count(&files[file]));
            mutate(&mut files[file], &mut n, &mutation);
        }
        check(&files);
    }

    #[test]
    fn any_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let folder = TempDir::new().expect("a folder");
        let path = folder.path().join("x.json");
        fs::write(&path, bytes).expect("a file");
        let _ = load(&[path], &Overrides::default());
    }
}
