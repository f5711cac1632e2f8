//! What is said about jobs that do not load.

use super::super::{MAX_FILE_BYTES, ProblemKind};
use super::*;

#[test]
fn everything_wrong_is_said_at_once() {
    let wrong = with(
        job(),
        &[
            (
                "/hyperparameters",
                json!({ "rounds": 0, "batchsize": 8, "learningRate": -1, "aggGoal": 0 }),
            ),
            ("/roles/2/replica", json!(0)),
            ("/channels/1/backend", json!("p2")),
            (
                "/optimizer",
                json!({ "sort": "fedbuff", "kwargs": { "beta_1": 0.9 } }),
            ),
            ("/lifl", json!({ "timing": "lazzy", "seed": "one" })),
            ("/dataset", json!("s3://bucket/mnist")),
            ("/job/id", json!("a/b")),
        ],
    );
    assert_problems(
        wrong,
        &[
            "hyperparameters.aggGoal: 0; expected a whole number from 1 to 4294967295",
            "hyperparameters.batchsize: unknown field, of value 8; did you mean batchSize?",
            "hyperparameters.learningRate: -1; expected a number above 0",
            "hyperparameters.rounds: 0; expected a whole number from 1 to 4294967295",
            "lifl.seed: \"one\"; expected a whole number not below 0",
            "lifl.timing: unknown name \"lazzy\"; did you mean lazy?",
            "roles[2].replica: 0; expected a whole number from 1 to 4294967295",
            "optimizer.sort: optimizer fedbuff is not supported yet; supported: fedavg, fedadagrad, fedadam, fedyogi or \
             fedprox",
            "channels[1].backend: channel updates: unknown backend \"p2\"; did you mean p2p?",
            "job.id: job name \"a/b\"; expected 1 to 64 bytes without '/', '\\' and control characters, not \
             starting with '.'",
            "dataset: dataset at \"s3://bucket/mnist\"; supported: an http(s) URL, a file or folder, or \
             builtin:digits",
        ],
    );
}

#[test]
fn a_problem_can_be_read_by_a_program() {
    let wrong = with(job(), &[("/hyperparameters", json!({ "epoch": 3 }))]);
    let error = load_all(&[wrong], &Overrides::default()).expect_err("a problem");
    let problem = serde_json::to_value(&error.problems[0]).expect("JSON");
    assert_eq!(problem["kind"], "unknown");
    assert_eq!(problem["path"], "hyperparameters.epoch");
    assert_eq!(problem["found"], "unknown field, of value 3");
    assert_eq!(problem["hint"], "did you mean epochs?");
    assert!(
        problem["file"]
            .as_str()
            .is_some_and(|file| file.ends_with("0.json")),
        "{problem}"
    );
    assert!(
        problem["expected"]
            .as_str()
            .is_some_and(|names| names.contains("batchSize")),
        "{problem}"
    );
}

#[test]
fn what_is_missing_is_named_and_nothing_that_follows_from_it() {
    assert_problems(
        json!({ "job": { "name": "x" }, "channels": [{ "name": "c" }], "roles": 3 }),
        &[
            "channels[0].pair: missing; expected a list of 2, each a string",
            "channels[0].funcTags: missing; expected an object",
            "job.id: missing; expected a string",
            "roles: 3; expected a list, each an object with name",
            "dataset: missing: every model but a synthetic one needs data; expected an http(s) URL, a file or \
             folder, or builtin:digits",
        ],
    );
    let bad_model = json!({ "model": { "synthetic": { "parameters": 0 } } });
    assert_problems(
        with(job(), &[("/lifl", bad_model), ("/dataset", Value::Null)]),
        &["lifl.model.synthetic.parameters: 0; expected a whole number of at least 1"],
    );
}

#[test]
fn a_file_that_describes_nothing_says_what_it_should() {
    assert_problems(
        json!({}),
        &[
            "job: missing; expected an object with id",
            "channels: missing; expected a list, each an object with name, pair, funcTags",
            "roles: missing; expected roles, as in a job file, or role and taskid, as in a worker file",
            "dataset: missing: every model but a synthetic one needs data; expected an http(s) URL, a file or \
             folder, or builtin:digits",
        ],
    );
    assert_eq!(problems(&[json!([1])])[0], "0.json: a list; expected an object");
}

#[test]
fn each_form_of_a_model_and_a_partition_is_checked_as_what_was_meant() {
    let lifl = |lifl: Value| with(job(), &[("/lifl", lifl)]);
    assert_problems(
        lifl(json!({ "model": "cnm", "partition": { "sort": "shard", "perTrainer": 2 } })),
        &[
            "lifl.model: unknown name \"cnm\"; did you mean cnn?",
            "lifl.partition.sort: unknown name \"shard\"; did you mean shards?",
        ],
    );
    assert_problems(
        lifl(json!({ "model": { "mlp": { "hiden": 2 } }, "partition": { "sort": "iid", "alpha": 1 } })),
        &[
            "lifl.model.mlp.hiden: unknown field, of value 2; did you mean hidden?",
            "lifl.model.mlp.hidden: missing; expected a whole number from 1 to 4294967295",
            "lifl.partition.alpha: unknown field, of value 1; expected sort",
        ],
    );
    assert_problems(
        lifl(json!({ "model": { "synthetik": {} }, "partition": { "alpha": 1 } })),
        &[
            "lifl.model.synthetik: unknown field; did you mean synthetic?",
            "lifl.partition.sort: missing; expected iid, shards or dirichlet",
        ],
    );
    assert_problems(
        lifl(json!({ "spinMicros": 1001 })),
        &["lifl.spinMicros: 1001; expected a whole number from 0 to 1000"],
    );
    assert_problems(
        lifl(json!({ "model": 5, "partition": { "sort": "dirichlet", "alpha": 0 } })),
        &[
            "lifl.model: 5; expected softmax, mlp or cnn, or an object with mlp, or an object with synthetic",
            "lifl.partition.alpha: 0; expected a number above 0",
        ],
    );
}

#[test]
fn what_flame_has_and_this_has_not_is_refused_by_name() {
    let unsupported = with(
        job(),
        &[
            ("/selector", json!({ "sort": "oort" })),
            ("/datasampler", json!({ "sort": "fedbalancer" })),
            ("/privacy", json!({ "sort": "dp", "kwargs": { "noise": 1 } })),
            (
                "/registry",
                json!({ "sort": "mlflow", "uri": "http://flame-mlflow:5000" }),
            ),
            ("/optimizer", json!({ "sort": "fedavg", "kwargs": { "eta": 1 } })),
            ("/hyperparameters/concurrency", json!(10)),
        ],
    );
    assert_problems(
        unsupported.clone(),
        &[
            "optimizer.kwargs.eta: argument eta, of value 1, of optimizer fedavg is not supported; supported: no \
             arguments",
            "selector.sort: selector oort is not supported yet; supported: default or random",
            "datasampler.sort: datasampler fedbalancer is not supported yet; supported: default",
            "privacy.sort: privacy dp is not supported yet; supported: default",
            "registry.sort: registry mlflow is not supported yet; supported: dummy",
            "hyperparameters.concurrency: concurrency 10 is not supported yet; supported: synchronous rounds",
        ],
    );
    let error = load_all(&[unsupported], &Overrides::default()).expect_err("problems");
    assert!(
        error
            .problems
            .iter()
            .all(|problem| problem.kind == ProblemKind::Unsupported)
    );
    assert_problems(
        with(
            job(),
            &[
                ("/backend", json!("smh")),
                ("/selector", json!({ "sort": "defualt" })),
            ],
        ),
        &[
            "selector.sort: unknown selector \"defualt\"; did you mean default?",
            "backend: unknown backend \"smh\"; did you mean shm?",
        ],
    );
}

#[test]
fn arguments_are_known_and_in_range() {
    assert_problems(
        with(
            job(),
            &[
                (
                    "/optimizer",
                    json!({ "sort": "fedyogi", "kwargs": { "beta1": 0.9, "beta_2": 1, "eta": 0, "tau": "small" } }),
                ),
                ("/selector", json!({ "sort": "random", "kwargs": { "k": 0 } })),
            ],
        ),
        &[
            "optimizer.kwargs.beta1: argument beta1, of value 0.9, of optimizer fedyogi is not supported; did you mean \
             beta_1?",
            "optimizer.kwargs.beta_2: 1; expected a number from 0 to below 1",
            "optimizer.kwargs.eta: 0; expected a number above 0",
            "optimizer.kwargs.tau: \"small\"; expected a number above 0",
            "selector.kwargs.k: 0; expected a whole number from 1 to 4294967295",
        ],
    );
    assert_problems(
        with(
            job(),
            &[
                ("/optimizer", json!({ "sort": "fedprox" })),
                ("/selector", json!({ "sort": "random" })),
            ],
        ),
        &[
            "optimizer.kwargs.mu: missing: optimizer fedprox has no default for it; expected a number not below 0",
            "selector.kwargs.k: missing: selector random has no default for it; expected a whole number from 1 to \
             4294967295",
        ],
    );
}

#[test]
fn channels_must_connect_the_roles_to_one_tree() {
    let tags = |pointer: &str, tags: Value| with(job(), &[(pointer, tags)]);
    assert_problems(
        tags("/channels/1/pair/0", json!("trianer")),
        &[
            "channels[1].pair[0]: unknown role \"trianer\"; did you mean trainer?",
            "channels[1].funcTags.trainer: role \"trainer\" is no end of channel updates; did you mean trianer?",
            "channels[1].funcTags.trianer: role trianer has no funcTags on channel updates; expected distribute \
             and aggregate, or fetch and upload, or coordinate…",
        ],
    );
    assert_problems(
        tags("/channels/0/funcTags/leaf", json!(["fetch", "aggregate"])),
        &[
            "channels[0].funcTags.leaf: tags of more than one side: [\"fetch\",\"aggregate\"]; expected distribute and \
           aggregate (the parent), or fetch and upload (the child), or coordinate…",
        ],
    );
    assert_problems(
        tags("/channels/0/funcTags/leaf", json!(["fetch"])),
        &["channels[0].funcTags.leaf: half a child; expected both fetch and upload"],
    );
    assert_problems(
        tags("/channels/0/funcTags/leaf/1", json!("uplaod")),
        &["channels[0].funcTags.leaf[1]: unknown name \"uplaod\"; did you mean upload?"],
    );
    assert_problems(
        tags("/channels/0/funcTags/leaf", json!(["distribute", "aggregate"])),
        &[
            "channels[0].funcTags: channel models: leaf and top do not fit together; expected one end that \
           distributes and aggregates and one that fetches and uploads, or one coordinate and one coordinateWith…",
        ],
    );
    assert_problems(
        tags("/channels/0/pair", json!(["top", "top"])),
        &["channels[0].pair: role top twice; expected two roles"],
    );
}

#[test]
fn roles_must_have_their_places() {
    let idle = with(job(), &[("/roles/-", json!({ "name": "idle" }))]);
    assert_problems(
        idle,
        &[
            "roles[3]: role idle has no channel for models; expected a channel with distribute and aggregate, or \
           with fetch and upload",
        ],
    );
    let two_tops = with(
        job(),
        &[
            ("/roles/-", json!({ "name": "a" })),
            ("/roles/-", json!({ "name": "b" })),
            ("/channels/-", channel("c", "a", "b", &["default"])),
        ],
    );
    assert_problems(
        two_tops,
        &["roles[0]: more than one top: a or top; expected a channel on which all but one fetch and upload"],
    );
    let circle = with(
        job(),
        &[
            ("/roles/-", json!({ "name": "a" })),
            ("/roles/-", json!({ "name": "b" })),
            ("/channels/-", channel("c", "a", "b", &["default"])),
            ("/channels/-", channel("d", "b", "a", &["default"])),
        ],
    );
    assert_problems(
        circle,
        &["roles[3]: roles in a circle: a → b → a; expected a tree with one top"],
    );
    let all_in_a_circle = with(
        job(),
        &[("/channels/-", channel("back", "trainer", "top", &["default"]))],
    );
    assert_problems(
        all_in_a_circle,
        &["roles[1]: roles in a circle: leaf → trainer → top → leaf; expected a tree with one top"],
    );
    let two_parents = with(
        job(),
        &[("/channels/-", channel("short", "top", "trainer", &["default"]))],
    );
    assert_problems(
        two_parents,
        &[
            "channels[2]: role top has children on two channels, models and short; expected one channel",
            "channels[2]: role trainer has parents on two channels, updates and short; expected one channel",
        ],
    );
    let nobody = with(job(), &[("/roles", json!([])), ("/channels", json!([]))]);
    assert_problems(
        nobody,
        &[
            "channels: no top and no trainers; expected a channel between a role that distributes and aggregates \
           and one that fetches and uploads",
        ],
    );
    let many_tops = with(job(), &[("/roles/0/replica", json!(2))]);
    assert_problems(
        many_tops,
        &["roles[0]: 2 workers of role top, which is the top; expected one"],
    );
}

#[test]
fn a_tree_has_three_levels_of_aggregators_at_most() {
    let names = ["top", "a", "b", "c", "trainer"];
    let channels: Vec<Value> = names
        .windows(2)
        .map(|pair| channel(pair[1], pair[0], pair[1], &["default"]))
        .collect();
    let roles: Vec<Value> = names.iter().map(|name| json!({ "name": name })).collect();
    let deep = with(job(), &[("/roles", json!(roles)), ("/channels", json!(channels))]);
    assert_problems(
        deep,
        &["roles[3]: 4 levels of aggregators: top, a, b, c; supported: 3 at most"],
    );
}

#[test]
fn names_are_given_once() {
    let twice = with(
        job(),
        &[
            ("/roles/-", json!({ "name": "leaf" })),
            ("/channels/-", channel("models", "top", "leaf", &["default"])),
        ],
    );
    assert_problems(
        twice,
        &[
            "roles[3].name: a second role leaf; expected names that differ",
            "channels[2].name: a second channel models; expected names that differ",
        ],
    );
}

#[test]
fn groups_must_meet() {
    assert_problems(
        with(
            job(),
            &[(
                "/roles/2/groupAssociation",
                json!([{ "updates": "a" }, { "updates": "c" }, {}]),
            )],
        ),
        &[
            "roles[2].groupAssociation[1].updates: group \"c\" is not in groupBy of channel updates; did you \
             mean a?",
            "roles[2].groupAssociation[2].updates: no group on channel updates; expected a group, such as \
             \"default\"",
        ],
    );
    assert_problems(
        with(
            job(),
            &[
                (
                    "/roles/1/groupAssociation",
                    json!([{ "models": "default", "updates": "a" }]),
                ),
                (
                    "/roles/2/groupAssociation/0",
                    json!({ "update": "a", "updates": "a", "models": "default" }),
                ),
            ],
        ),
        &[
            "roles[2].groupAssociation[0].models: role trainer is no end of channel models",
            "roles[2].groupAssociation[0].update: unknown channel \"update\"; did you mean updates?",
            "roles[2].groupAssociation[1].updates: no leaf is in group \"b\" of channel updates; did you mean a?",
        ],
    );
    // That the trainers of group b have no parent follows from that.
    assert_problems(
        with(job(), &[("/roles/1/groupAssociation/1/updates", json!("bb"))]),
        &[
            "roles[1].groupAssociation[1].updates: group \"bb\" is not in groupBy of channel updates; did you mean b?",
        ],
    );
    assert_problems(
        with(job(), &[("/roles/2/groupAssociation", Value::Null)]),
        &[
            "roles[2].groupAssociation: group \"default\" is not in groupBy of channel updates; expected a or b",
        ],
    );
}

#[test]
fn data_must_fit() {
    let lifl = |dataset: &str, lifl: Value| with(job(), &[("/dataset", json!(dataset)), ("/lifl", lifl)]);
    assert_problems(
        lifl("builtin:digit", json!({ "sha256": "abc", "trainSamples": 3 })),
        &[
            "lifl.sha256: \"abc\"; expected 64 hex digits",
            "dataset: unknown dataset \"builtin:digit\"; did you mean builtin:digits?",
            "lifl.trainSamples: 3 samples for 4 trainers; expected at least one sample each",
        ],
    );
    assert_problems(
        lifl("builtin:digits", json!({ "sha256": "a".repeat(64) })),
        &[
            "lifl.sha256: a hash, and builtin:digits, which is no file; expected no sha256, or another dataset",
        ],
    );
    assert_problems(
        with(job(), &[("/dataset", Value::Null)]),
        &[
            "dataset: missing: every model but a synthetic one needs data; expected an http(s) URL, a file or \
           folder, or builtin:digits",
        ],
    );
}

#[test]
fn a_job_is_bounded() {
    assert_problems(
        with(job(), &[("/roles/2/replica", json!(u32::MAX))]),
        &["roles: 8589934593 workers; expected 16384 at most"],
    );
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("big.json");
    fs::write(&path, " ".repeat(MAX_FILE_BYTES as usize + 1)).expect("a file");
    let error = load(std::slice::from_ref(&path), &Overrides::default()).expect_err("too large");
    assert_eq!(
        error.to_string(),
        format!("{}: larger than 16 MiB", path.display())
    );
}

#[test]
fn what_is_not_json_is_pointed_at() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("bad.json");
    fs::write(&path, "{\n  \"job\": {,\n").expect("a file");
    let error = load(std::slice::from_ref(&path), &Overrides::default()).expect_err("no JSON");
    assert_eq!(
        error.to_string(),
        format!("{}: not JSON at 2:11: key must be a string", path.display())
    );

    let twice = job()
        .to_string()
        .replacen("\"rounds\":2", "\"rounds\":2,\"rounds\":3", 1);
    fs::write(&path, twice).expect("a file");
    let error = load(std::slice::from_ref(&path), &Overrides::default()).expect_err("given twice");
    let expected = "hyperparameters.rounds: given twice; expected each field once";
    assert_eq!(error.to_string(), format!("{}: {expected}", path.display()));
}

#[test]
fn what_cannot_be_read_is_named() {
    let folder = TempDir::new().expect("a folder");
    let absent = folder.path().join("absent.json");
    let error =
        load(&[absent.clone(), folder.path().to_owned()], &Overrides::default()).expect_err("nothing");
    let shown = error.to_string();
    assert!(
        shown.contains(&format!("{}: cannot read this file: ", absent.display())),
        "{shown}"
    );
    assert!(
        shown.contains("no file in this folder; expected worker files or a job file, *.json"),
        "{shown}"
    );
    let error = load(&[], &Overrides::default()).expect_err("nothing");
    assert!(!error.problems.is_empty());
}

#[test]
fn a_terminal_is_not_obeyed() {
    let wrong = with(
        job(),
        &[
            ("/dataset", json!("builtin:\u{1b}[31m")),
            ("/\u{1b}[2J", json!(1)),
        ],
    );
    let error = load_all(&[wrong], &Overrides::default()).expect_err("problems");
    assert!(!error.to_string().contains('\u{1b}'), "{error}");
}
