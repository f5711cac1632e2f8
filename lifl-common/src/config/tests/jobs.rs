//! Jobs that load.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;

use super::super::{
    Adaptive, Group, JobSpec, Kind, ModelSpec, Optimizer, Overrides, Partition, Timing, TrainingSpec,
    UpdateKind, load, schema,
};
use super::*;
use crate::update::DType;

fn sample(name: &str) -> JobSpec {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(name);
    let loaded = load(&[path], &Overrides::default()).unwrap_or_else(|error| panic!("{error}"));
    assert!(loaded.notes.is_empty(), "{name}: {:?}", loaded.notes);
    loaded.job
}

/// Workers of each level, from the top.
fn shape(job: &JobSpec) -> Vec<usize> {
    (0..=job.levels())
        .map(|level| job.workers.iter().filter(|worker| worker.level == level).count())
        .collect()
}

#[test]
fn the_sample_jobs_load() {
    let job = sample("mnist_three_level.json");
    assert_eq!(
        (shape(&job), job.rounds, job.timing),
        (vec![1, 2, 4, 8], 10, Timing::Lazy)
    );
    assert_eq!(
        (job.levels(), job.trainers().count(), job.aggregators().count()),
        (3, 8, 7)
    );
    assert_eq!(job.model, ModelSpec::Cnn);
    assert_eq!(
        job.data.as_ref().map(|data| data.dataset.as_str()),
        Some("builtin:digits")
    );

    let eager = sample("mnist_three_level_eager.json");
    assert_eq!((shape(&eager), eager.timing), (vec![1, 2, 4, 8], Timing::Eager));
    for (name, timing) in [("lazy", Timing::Lazy), ("eager", Timing::Eager)] {
        let job = sample(&format!("mnist_two_level_{name}.json"));
        assert_eq!((shape(&job), job.timing), (vec![1, 2, 4], timing));
    }
    let big = sample("synthetic_resnet152_three_level.json");
    assert_eq!((shape(&big), big.rounds, big.data), (vec![1, 2, 4, 8], 3, None));
    let ModelSpec::Synthetic { parameters, dtype } = big.model else {
        panic!("{:?}", big.model)
    };
    assert_eq!(parameters * dtype.bytes() as u64, 232_000_000);
}

#[test]
fn what_is_not_given_is_flames_default() {
    let job = spec(&with(
        job(),
        &[("/hyperparameters", Value::Null), ("/job/name", Value::Null)],
    ));
    assert_eq!(
        (job.name.as_str(), job.rounds, job.seed, job.max_run_time_s),
        ("job-1", 1, 1, 300)
    );
    assert_eq!(
        (job.timing, job.updates, job.model),
        (Timing::Lazy, UpdateKind::Weights, ModelSpec::Cnn)
    );
    let training = TrainingSpec {
        epochs: 1,
        batch_size: 16,
        learning_rate: 0.01,
        weight_decay: 0.0,
        proximal_mu: 0.0,
    };
    assert_eq!(job.optimizer, Optimizer::FedAvg);
    assert!(
        job.workers
            .iter()
            .all(|worker| (worker.agg_goal, worker.select) == (None, None))
    );
    assert_eq!((job.training, job.base_model), (training, None));
    assert_eq!(job.data.map(|data| data.partition), Some(Partition::Iid));
}

#[test]
fn every_setting_arrives() {
    let job = spec(&with(
        job(),
        &[
            (
                "/hyperparameters",
                json!({ "rounds": 7, "epochs": 2, "batchSize": 32, "learningRate": 0.5, "weightDecay": 1e-4 }),
            ),
            ("/baseModel", json!({ "name": "start.safetensors" })),
            ("/dataset", json!("https://example.org/mnist.npz")),
            ("/maxRunTime", json!(60)),
            (
                "/lifl",
                json!({
                    "seed": u64::MAX, "timing": "eager", "updates": "deltas", "model": { "mlp": { "hidden": 64 } },
                    "sha256": "AB".repeat(32), "trainSamples": 1000, "testSamples": 100,
                    "partition": { "sort": "shards", "perTrainer": 2 },
                }),
            ),
        ],
    ));
    assert_eq!((job.rounds, job.seed, job.max_run_time_s), (7, u64::MAX, 60));
    assert_eq!((job.timing, job.updates), (Timing::Eager, UpdateKind::Deltas));
    assert_eq!(job.model, ModelSpec::Mlp { hidden: 64 });
    assert_eq!(job.base_model, Some(PathBuf::from("start.safetensors")));
    let training = TrainingSpec {
        epochs: 2,
        batch_size: 32,
        learning_rate: 0.5,
        weight_decay: 1e-4,
        proximal_mu: 0.0,
    };
    assert_eq!(job.training, training);
    let data = job.data.expect("data");
    assert_eq!(data.dataset.as_str(), "https://example.org/mnist.npz");
    assert_eq!(data.sha256, Some("ab".repeat(32)));
    assert_eq!((data.train_samples, data.test_samples), (Some(1000), Some(100)));
    assert_eq!(data.partition, Partition::Shards { per_trainer: 2 });
}

#[test]
fn optimizers_have_flames_defaults() {
    let optimizer = |optimizer: Value| spec(&with(job(), &[("/optimizer", optimizer)]));
    let flames = Adaptive {
        beta_1: 0.9,
        beta_2: 0.99,
        eta: 0.01,
        tau: 0.001,
    };
    let adam = optimizer(json!({ "sort": "fedadam" })).optimizer;
    assert_eq!(adam, Optimizer::FedAdam(flames));
    let yogi = optimizer(json!({ "sort": "fedyogi", "kwargs": { "eta": 1, "beta_1": 0 } })).optimizer;
    let rates = Adaptive {
        eta: 1.0,
        beta_1: 0.0,
        ..flames
    };
    assert_eq!(yogi, Optimizer::FedYogi(rates));
    assert_eq!(
        optimizer(json!({ "sort": "fedadagrad", "kwargs": {} })).optimizer,
        Optimizer::FedAdagrad(flames)
    );
    assert_eq!(optimizer(json!({})).optimizer, Optimizer::FedAvg);
    // FedProx is the trainers'.
    let prox = optimizer(json!({ "sort": "fedprox", "kwargs": { "mu": 0.25 } }));
    assert_eq!(
        (prox.optimizer, prox.training.proximal_mu),
        (Optimizer::FedAvg, 0.25)
    );
}

#[test]
fn aggregators_have_their_goals_and_selections() {
    let job = spec(&with(
        job(),
        &[
            ("/hyperparameters/aggGoal", json!(3)),
            ("/selector", json!({ "sort": "random", "kwargs": { "k": 2 } })),
        ],
    ));
    for worker in &job.workers {
        let expected = if worker.kind == Kind::Trainer {
            (None, None)
        } else {
            (Some(3), Some(2))
        };
        assert_eq!((worker.agg_goal, worker.select), expected, "{}", worker.name);
    }
}

#[test]
fn models_are_named_or_sized() {
    let model = |model: Value| spec(&with(job(), &[("/lifl", json!({ "model": model }))])).model;
    assert_eq!(model(json!("softmax")), ModelSpec::Softmax);
    assert_eq!(model(json!("cnn")), ModelSpec::Cnn);
    assert!(matches!(model(json!("mlp")), ModelSpec::Mlp { hidden } if hidden > 0));
    let synthetic = |dtype| ModelSpec::Synthetic { parameters: 5, dtype };
    assert_eq!(
        model(json!({ "synthetic": { "parameters": 5 } })),
        synthetic(DType::F32)
    );
    assert_eq!(
        model(json!({ "synthetic": { "parameters": 5, "dtype": "BF16" } })),
        synthetic(DType::BF16)
    );
}

#[test]
fn workers_are_named_by_role_in_file_order() {
    let job = spec(&job());
    let names: Vec<&str> = job.workers.iter().map(|worker| worker.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "top-1",
            "leaf-1",
            "leaf-2",
            "trainer-1",
            "trainer-2",
            "trainer-3",
            "trainer-4"
        ]
    );
    assert_eq!(job.top().map(|top| (top.kind, top.level)), Some((Kind::Top, 0)));
    let shares: Vec<_> = job.trainers().map(|trainer| trainer.share).collect();
    assert_eq!(shares, [Some(0), Some(1), Some(2), Some(3)]);
    assert!(job.aggregators().all(|worker| worker.share.is_none()));
}

#[test]
fn groups_are_subtrees() {
    let job = spec(&job());
    let group = |channel: &str, group: &str| {
        Some(Group {
            channel: channel.into(),
            group: group.into(),
        })
    };
    let ends: Vec<_> = job
        .workers
        .iter()
        .map(|worker| (worker.up.clone(), worker.down.clone()))
        .collect();
    assert_eq!(
        ends,
        [
            (None, group("models", "default")),
            (group("models", "default"), group("updates", "a")),
            (group("models", "default"), group("updates", "b")),
            (group("updates", "a"), None),
            (group("updates", "a"), None),
            (group("updates", "b"), None),
            (group("updates", "b"), None),
        ]
    );
}

#[test]
fn the_tags_say_who_is_above_whatever_the_names_say() {
    let upside_down = json!({
        "job": { "id": "j" },
        "roles": [{ "name": "top-aggregator", "replica": 3 }, { "name": "trainer" }],
        "channels": [channel("c", "trainer", "top-aggregator", &["default"])],
        "dataset": "builtin:digits",
    });
    let job = spec(&upside_down);
    assert_eq!(job.top().map(|top| top.role.as_str()), Some("trainer"));
    assert_eq!((job.levels(), job.trainers().count()), (1, 3));
}

#[test]
fn a_coordinator_is_recognised_by_its_tags_and_is_no_worker_of_the_tree() {
    let coordinated = with(
        job(),
        &[
            (
                "/roles/-",
                json!({ "name": "coordinator", "groupAssociation": [{ "top-coord": "default" }] }),
            ),
            (
                "/channels/-",
                coordinator_channel("top-coord", "top", "coordinateWithTopAgg"),
            ),
            (
                "/channels/-",
                coordinator_channel("trainer-coord", "trainer", "coordinateWithTrainer"),
            ),
        ],
    );
    let loaded = loaded(&coordinated);
    assert_eq!(loaded.job.workers, spec(&job()).workers);
    assert_eq!(loaded.notes.len(), 1, "{:?}", loaded.notes);
    assert!(loaded.notes[0].contains("coordinator's channels"));
}

#[test]
fn what_means_nothing_here_is_noted_once() {
    let job = with(
        job(),
        &[
            ("/dependencies", json!(["numpy >= 1.2.0"])),
            ("/realm", json!("default/us")),
            ("/channels/0/isBidirectional", json!(true)),
            ("/channels/1/isBidirectional", json!(true)),
            ("/channels/1/description", json!("of no importance")),
            ("/brokers", json!([{ "sort": "mqtt", "host": "localhost" }])),
            ("/optimizer", json!({ "sort": "fedavg", "kwargs": {} })),
            ("/registry", json!({ "sort": "dummy", "uri": "" })),
        ],
    );
    let notes = loaded(&job).notes;
    let about: Vec<&str> = notes.iter().filter_map(|note| note.split(' ').next()).collect();
    assert_eq!(about, ["dependencies", "realm", "isBidirectional", "brokers"]);
}

#[test]
fn a_synthetic_model_needs_no_data() {
    let synthetic = json!({ "model": { "synthetic": { "parameters": 10 } } });
    let without = loaded(&with(
        job(),
        &[("/lifl", synthetic.clone()), ("/dataset", Value::Null)],
    ));
    assert_eq!((without.job.data, without.notes.len()), (None, 0));
    let with_data = loaded(&with(job(), &[("/lifl", synthetic)]));
    assert_eq!((with_data.job.data, with_data.notes.len()), (None, 1));
}

#[test]
fn an_aggregator_without_children_is_noted() {
    let lonely = with(
        job(),
        &[("/roles/2/groupAssociation", json!([{ "updates": "a" }]))],
    );
    let notes = loaded(&lonely).notes;
    assert_eq!(
        notes,
        ["channel updates: no trainer in group b: aggregators there have no children"]
    );
}

#[test]
fn the_command_line_overrides_the_file() {
    let overrides = Overrides {
        rounds: Some(9),
        seed: Some(5),
        timing: Some(Timing::Eager),
        data: Some("mnist".to_owned()),
        prefer: None,
    };
    let hashed = with(
        job(),
        &[
            ("/dataset", json!("data.npz")),
            ("/lifl", json!({ "sha256": "0".repeat(64), "seed": 2 })),
        ],
    );
    let loaded = load_all(&[hashed], &overrides).expect("a job");
    assert_eq!(
        (loaded.job.rounds, loaded.job.seed, loaded.job.timing),
        (9, 5, Timing::Eager)
    );
    let data = loaded.job.data.expect("data");
    assert_eq!(
        (data.dataset.as_str(), data.sha256),
        ("mnist", None),
        "the hash is of other data"
    );
    assert!(
        loaded.notes.iter().any(|note| note.contains("sha256")),
        "{:?}",
        loaded.notes
    );

    let nothing = Overrides {
        rounds: Some(0),
        ..Overrides::default()
    };
    let error = load_all(&[job()], &nothing).expect_err("no rounds");
    assert_eq!(error.to_string(), "override: rounds: 0; expected at least 1");
}

#[test]
fn the_schema_is_of_the_types_that_are_read() {
    let schema = schema();
    assert!(schema.pointer("/properties/hyperparameters").is_some());
    assert_eq!(
        schema.pointer("/$defs/Role/properties/replica/minimum"),
        Some(&json!(1))
    );
    assert_eq!(schema.pointer("/$defs/Tag/enum/1"), Some(&json!("aggregate")));
    assert_eq!(schema.get("required"), Some(&json!(["job", "channels"])));
    assert_eq!(schema.pointer("/$defs/Dataset/required"), Some(&json!(["url"])));
    assert!(schema.pointer("/$defs/DesignJob/properties/designId").is_some());
}

proptest! {
    #[test]
    fn a_job_written_and_read_back_is_the_same(
        seed in any::<u64>(),
        rate in 1e-12_f64..10.0,
        alpha in 1e-6_f64..1e6,
        parameters in 1..u64::MAX,
        synthetic in any::<bool>(),
    ) {
        let mut job = spec(&with(job(), &[("/baseModel", json!({ "name": "m.safetensors" }))]));
        job.seed = seed;
        job.training.learning_rate = rate;
        if let Some(data) = &mut job.data {
            data.partition = Partition::Dirichlet { alpha };
        }
        if synthetic {
            job.model = ModelSpec::Synthetic { parameters, dtype: DType::BF16 };
        }
        let written = serde_json::to_string(&job).expect("JSON");
        prop_assert_eq!(serde_json::from_str::<JobSpec>(&written).expect("a job"), job);
    }
}
