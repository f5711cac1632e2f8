//! How updates leave the node, and which of a worker's files says so.

use std::path::{Path, PathBuf};

use super::super::{Brokers, Kind, Transport};
use super::worker_files::{assert_problems, files, models, updates, worker};
use super::*;

fn prefer(transport: Transport) -> Overrides {
    Overrides {
        prefer: Some(transport),
        ..Overrides::default()
    }
}

/// The files by their names in one folder.
fn load_named(files: &[(&str, Value)], overrides: &Overrides) -> Result<Loaded, String> {
    let folder = TempDir::new().expect("a folder");
    for (name, file) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, file.to_string()).expect("a file");
    }
    let shown = format!("{}/", folder.path().display());
    load(&[folder.path().to_owned()], overrides).map_err(|error| error.to_string().replace(&shown, ""))
}

/// The worker's file with another transport, and as another task.
fn variant(mut file: Value, backend: &str, taskid: &str) -> Value {
    file["backend"] = json!(backend);
    file["taskid"] = json!(taskid);
    file
}

/// A job in which the leaves and the top have a file for each of two transports. As in Flame's examples, the first of
/// one sort has the taskid of the second of the other.
fn variants() -> Vec<(&'static str, Value)> {
    let leaf = || worker("leaf", "", &[models(), updates()]);
    let top = || worker("top", "", &[models()]);
    let shm = |file: Value, taskid: &str| {
        let file = variant(file, "p2p", taskid);
        with(file, &[("/channels/0/backend", json!("shm"))])
    };
    vec![
        ("leaf/config_p2p_1.json", variant(leaf(), "p2p", "13")),
        ("leaf/config_p2p_2.json", variant(leaf(), "p2p", "14")),
        ("leaf/config_shm_1.json", shm(leaf(), "14")),
        ("leaf/config_shm_2.json", shm(leaf(), "15")),
        ("top/config_p2p.json", variant(top(), "p2p", "12")),
        ("top/config_shm.json", shm(top(), "18")),
        (
            "trainer/config1.json",
            variant(worker("trainer", "", &[updates()]), "p2p", "15"),
        ),
        (
            "trainer/config2.json",
            variant(worker("trainer", "", &[updates()]), "p2p", "16"),
        ),
    ]
}

fn transports(loaded: &Loaded) -> Vec<(&str, Option<&str>, Transport)> {
    let workers = loaded.job.workers.iter();
    workers
        .map(|worker| (worker.name.as_str(), worker.task_id.as_deref(), worker.transport))
        .collect()
}

#[test]
fn a_channels_backend_counts_before_the_files() {
    let job = with(
        job(),
        &[
            ("/backend", json!("p2p")),
            ("/channels/0/backend", json!("local")),
        ],
    );
    let loaded = loaded(&job);
    let of = |kind| {
        loaded
            .job
            .workers
            .iter()
            .find(|worker| worker.kind == kind)
            .map(|worker| worker.transport)
    };
    assert_eq!(of(Kind::Top), Some(Transport::Shm), "it has no parent");
    assert_eq!(of(Kind::Aggregator), Some(Transport::Shm));
    assert_eq!(of(Kind::Trainer), Some(Transport::P2p));
    let brokers = Brokers {
        p2p: Some("localhost:10104".to_owned()),
        mqtt: None,
    };
    assert_eq!(loaded.job.brokers, brokers);
}

#[test]
fn without_a_backend_it_is_shared_memory() {
    let loaded = loaded(&job());
    assert!(
        loaded
            .job
            .workers
            .iter()
            .all(|worker| worker.transport == Transport::Shm)
    );
    assert_eq!(loaded.job.brokers, Brokers::default());
}

#[test]
fn addresses_come_from_brokers_or_from_the_channel() {
    let brokers = json!([
        { "sort": "mqtt", "host": "broker.example" },
        { "sort": "p2p", "host": "10.0.0.7" },
        { "sort": "shm", "host": "localhost:10105" },
    ]);
    let job = with(
        job(),
        &[
            ("/brokers", brokers),
            ("/channels/0/backend", json!("p2p")),
            ("/channels/1/backend", json!("mqtt")),
        ],
    );
    let first = loaded(&job);
    assert_eq!(first.job.brokers.p2p.as_deref(), Some("10.0.0.7:10104"));
    assert_eq!(first.job.brokers.mqtt.as_deref(), Some("broker.example:1883"));
    assert_eq!(first.notes.len(), 1, "{:?}", first.notes);
    assert!(
        first.notes[0].starts_with("brokers of sort shm are not used"),
        "{:?}",
        first.notes
    );

    let overriding = loaded(&with(job, &[("/channels/1/brokerHost", json!("[::1]:77"))]));
    assert_eq!(overriding.job.brokers.mqtt.as_deref(), Some("[::1]:77"));
}

#[test]
fn a_transport_without_an_address_says_what_is_missing() {
    super::assert_problems(
        with(job(), &[("/backend", json!("mqtt"))]),
        &[
            "backend: channel models goes over mqtt, and no broker of that sort is given; expected an entry of \
             brokers, {\"sort\": \"mqtt\", \"host\": \"HOST\"}, or the channel's brokerHost",
        ],
    );
    super::assert_problems(
        with(
            job(),
            &[
                ("/channels/0/backend", json!("p2p")),
                (
                    "/brokers",
                    json!([{ "sort": "p2p", "host": "a:b" }, { "sort": "grpc", "host": "c" }]),
                ),
            ],
        ),
        &[
            "brokers[1].sort: broker of unknown backend \"grpc\"; expected shm, local, p2p or mqtt",
            "brokers[0].host: address \"a:b\"; expected HOST or HOST:PORT, the port from 1 to 65535",
        ],
    );
}

#[test]
fn files_that_mean_different_brokers_are_refused() {
    let mut files = files();
    for file in &mut files {
        file["backend"] = json!("p2p");
        file["brokers"] = json!([{ "sort": "p2p", "host": "localhost:10104" }]);
    }
    // Without a port, it is the same.
    files[1]["brokers"][0]["host"] = json!("localhost");
    assert!(load_all(&files, &Overrides::default()).is_ok());
    files[2]["brokers"][0]["host"] = json!("elsewhere:10104");
    assert_problems(
        &files,
        &["2.json: brokers[0].host: p2p at elsewhere:10104; expected localhost:10104 as in 0.json"],
    );
}

#[test]
fn variants_of_a_worker_are_listed_and_one_of_them_is_chosen() {
    let all = load_named(&variants(), &Overrides::default()).expect_err("variants");
    let choice = "expected a choice: pass --prefer shm or --prefer p2p, or only one of them";
    let expected = [
        format!(
            "leaf/config_shm_1.json: variants of one leaf: leaf/config_p2p_1.json (p2p) and leaf/config_shm_1.json \
             (p2p, shm); {choice}"
        ),
        format!(
            "leaf/config_shm_2.json: variants of one leaf: leaf/config_p2p_2.json (p2p) and leaf/config_shm_2.json \
             (p2p, shm); {choice}"
        ),
        format!(
            "top/config_shm.json: variants of one top: top/config_p2p.json (p2p) and top/config_shm.json (shm); \
             {choice}"
        ),
    ];
    assert_eq!(all.lines().collect::<Vec<_>>(), expected, "found:\n{all}");

    let p2p = load_named(&variants(), &prefer(Transport::P2p)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        transports(&p2p),
        [
            ("top-1", Some("12"), Transport::Shm),
            ("leaf-1", Some("13"), Transport::P2p),
            ("leaf-2", Some("14"), Transport::P2p),
            ("trainer-1", Some("15"), Transport::P2p),
            ("trainer-2", Some("16"), Transport::P2p),
        ]
    );
    // The trainers have one file each, so they keep it.
    let shm = load_named(&variants(), &prefer(Transport::Shm)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        transports(&shm)[1..],
        [
            ("leaf-1", Some("14"), Transport::Shm),
            ("leaf-2", Some("15"), Transport::Shm),
            ("trainer-1", Some("15"), Transport::P2p),
            ("trainer-2", Some("16"), Transport::P2p),
        ]
    );
    let mqtt = load_named(&variants(), &prefer(Transport::Mqtt)).expect_err("no such variant");
    assert_eq!(mqtt.lines().count(), 3, "{mqtt}");
    assert!(
        mqtt.contains("expected one with mqtt, as --prefer says: pass --prefer shm or --prefer p2p"),
        "{mqtt}"
    );
}

#[test]
fn variants_need_no_particular_names() {
    // By folder, by taskid, and by their number in the same groups.
    let by_folder: Vec<(String, Value)> = variants()
        .into_iter()
        .map(|(name, file)| {
            let kind = if name.contains("shm") {
                "SHM/"
            } else if name.contains("p2p") {
                "P2P/"
            } else {
                ""
            };
            (
                format!("{kind}{}", name.replace("_shm", "").replace("_p2p", "")),
                file,
            )
        })
        .collect();
    let by_number: Vec<(String, Value)> = variants()
        .into_iter()
        .map(|(name, file)| (name.replace("shm", "x").replace("p2p", "y"), file))
        .collect();
    let by_task_id: Vec<(String, Value)> = by_number
        .iter()
        .map(|(name, file)| {
            let file = match name.as_str() {
                "leaf/config_x_1.json" => with(file.clone(), &[("/taskid", json!("13"))]),
                "leaf/config_x_2.json" => with(file.clone(), &[("/taskid", json!("14"))]),
                "top/config_x.json" => with(file.clone(), &[("/taskid", json!("12"))]),
                _ => file.clone(),
            };
            (name.clone(), file)
        })
        .collect();
    for files in [by_folder, by_number, by_task_id] {
        let files: Vec<(&str, Value)> = files
            .iter()
            .map(|(name, file)| (name.as_str(), file.clone()))
            .collect();
        let error = load_named(&files, &Overrides::default()).expect_err("variants");
        assert_eq!(error.lines().count(), 3, "{error}");
        for transport in [Transport::Shm, Transport::P2p] {
            let loaded = load_named(&files, &prefer(transport)).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(loaded.job.workers.len(), 5);
            assert_eq!(loaded.job.workers[1].transport, transport);
        }
    }
}

#[test]
fn ends_of_a_channel_must_have_one_transport() {
    let mut files = files();
    files[2]["backend"] = json!("p2p");
    let expected = "expected one transport in all files of a channel";
    assert_problems(
        &files,
        &[
            &format!("2.json: backend: channel updates is shm in 0.json, p2p in 2.json; {expected}"),
            &format!("3.json: backend: channel models is p2p in 2.json, shm in 3.json; {expected}"),
        ],
    );
    // A preference does not make up files that are not there.
    assert!(load_all(&files, &prefer(Transport::Shm)).is_err());
}

/// Flame's own LIFL examples, where a developer has them beside the workspace.
fn flames_examples() -> Option<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut roots = manifest
        .ancestors()
        .map(|folder| folder.join("shared/data/flame-configs"));
    let root = roots.find(|root| root.is_dir());
    if root.is_none() {
        eprintln!("not tried: Flame's examples are not here");
    }
    root
}

#[test]
fn flames_examples_are_understood() {
    let Some(root) = flames_examples() else { return };
    for (example, levels, pairs) in [
        ("coord_hier_syncfl_mnist", 2, 3),
        ("coord_3_hier_syncfl_mnist", 3, 5),
    ] {
        let folder = root.join(example);
        let error = load(std::slice::from_ref(&folder), &Overrides::default()).expect_err("both variants");
        assert_eq!(error.problems.len(), pairs, "{error}");
        for transport in [Transport::Shm, Transport::P2p] {
            let loaded = load(std::slice::from_ref(&folder), &prefer(transport))
                .unwrap_or_else(|error| panic!("{example}, {transport}: {error}"));
            let job = loaded.job;
            assert_eq!(
                (job.levels(), job.rounds, job.trainers().count()),
                (levels, 10, 2)
            );
            assert_eq!(job.training.batch_size, 32);
            assert_eq!(job.brokers.p2p.as_deref(), Some("localhost:10104"));
            assert_eq!(job.brokers.mqtt, None);
            for worker in &job.workers {
                let expected = match worker.kind {
                    Kind::Top => Transport::Shm,
                    Kind::Aggregator => transport,
                    Kind::Trainer => Transport::P2p,
                };
                assert_eq!(worker.transport, expected, "{}", worker.name);
            }
        }
    }
}
