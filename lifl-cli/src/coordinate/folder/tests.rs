//! What checkpoints a folder has, whatever was done to their files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use lifl_common::update::{DType, Metadata, Schema, TensorSpec};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A run's new folder.
fn folder() -> (TempDir, RunFolder) {
    let outer = tempfile::tempdir().expect("a folder");
    let folder = RunFolder::create(Some(&outer.path().join("run")), &job(), &Trust::new(&[])).expect("made");
    (outer, folder)
}

fn job() -> JobSpec {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/synthetic_resnet152_three_level.json");
    config::load(&[file], &config::Overrides::default())
        .expect("a job")
        .job
}

/// An image as it lies in a slot, all of whose bytes depend on the number.
fn slot(number: u32) -> Vec<u8> {
    let schema = Schema::new(vec![TensorSpec::new("w", DType::F32, [1000])]).expect("a schema");
    let mut slot = vec![number as u8; image::image_bytes(&schema)];
    let metadata = Metadata {
        round: number,
        generation: Generation(u64::from(number)),
        ..Metadata::default()
    };
    image::write_header(&mut slot, &schema, &metadata);
    slot
}

fn latest(folder: &RunFolder) -> (Option<u32>, Vec<String>) {
    let Latest { checkpoint, skipped } = folder.latest().expect("the job is the same");
    (checkpoint, skipped)
}

#[test]
fn the_newest_is_found_and_is_what_was_lent() {
    let (_outer, folder) = folder();
    assert_eq!(latest(&folder), (None, vec![]));
    for round in [1, 2, 10] {
        let written = folder.checkpoint(round, &slot(round), Some(&slot(round + 100)));
        written.expect("room");
        assert!(folder.path().join(format!("checkpoint-{round}.json")).exists());
    }
    assert_eq!(latest(&folder), (Some(10), vec![]));
    let model = fs::read(folder.path().join("model-10.safetensors")).expect("a model");
    let schema = image::schema(&model).expect("an image");
    let (metadata, data) = image::check(&model, &schema).expect("an image");
    assert_eq!((metadata.round, metadata.generation), (10, Generation(0)));
    assert!(model[data.clone()] == slot(10)[data]);
    assert!(!folder.path().join(".model-10.safetensors.part").exists());
}

#[test]
fn a_checkpoint_may_be_written_again() {
    let (_outer, folder) = folder();
    folder.checkpoint(1, &slot(1), Some(&slot(2))).expect("room");
    cut(&folder, "state-1.safetensors");
    assert_eq!(latest(&folder).0, None);
    folder.checkpoint(1, &slot(3), None).expect("room");
    assert_eq!(latest(&folder), (Some(1), vec![]));
}

fn cut(folder: &RunFolder, name: &str) {
    let file = File::options()
        .write(true)
        .open(folder.path().join(name))
        .expect("a file");
    file.set_len(100).expect("cut");
}

#[test]
fn one_that_cannot_be_written_leaves_nothing() {
    let (_outer, folder) = folder();
    folder.checkpoint(1, &slot(1), None).expect("room");
    // A folder where its state should be: the rename fails, after the model has its name.
    fs::create_dir(folder.path().join("state-2.safetensors")).expect("made");
    let error = folder
        .checkpoint(2, &slot(2), Some(&slot(3)))
        .expect_err("no file can be there");
    let what = format!("state-2.safetensors ({} bytes)", slot(3).len());
    assert!(format!("{error:#}").contains(&what), "{error:#}");
    assert!(!folder.path().join("model-2.safetensors").exists());
    assert!(!folder.path().join(".state-2.safetensors.part").exists());
    assert_eq!(latest(&folder), (Some(1), vec![]));
}

#[test]
fn older_ones_go_and_newer_ones_stay() {
    let (_outer, folder) = folder();
    for round in 1..=5 {
        folder
            .checkpoint(round, &slot(round), Some(&slot(round)))
            .expect("room");
    }
    folder.prune(4, NonZeroU32::new(2).expect("two"));
    assert_eq!(folder.rounds(), [5, 4, 3]);
    assert!(!folder.path().join("state-2.safetensors").exists());
    assert!(folder.path().join("model-3.safetensors").exists());
}

#[test]
fn the_last_model_is_the_checkpoints_only_if_that_is_this_rounds() {
    let (_outer, folder) = folder();
    // Left by a process that was killed before its checkpoint was one.
    fs::write(folder.path().join("model-3.safetensors"), "half").expect("written");
    folder.last_model(3, &slot(3), false).expect("room");
    let model = fs::read(folder.path().join(LAST_MODEL)).expect("a model");
    assert_eq!(model.len(), slot(3).len());
    folder.checkpoint(3, &slot(4), None).expect("room");
    folder.last_model(3, &slot(4), true).expect("room");
    let names = ["model-3.safetensors", "model.safetensors"].map(|name| folder.path().join(name));
    let inode = |path: &PathBuf| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).expect("there"));
    assert_eq!(inode(&names[0]), inode(&names[1]));
}

#[test]
fn a_folder_is_locked_as_long_as_anybody_has_it() {
    let (_outer, folder) = folder();
    let clone = folder.clone();
    let path = folder.path().to_owned();
    drop(folder);
    let error = RunFolder::open(&path, &Trust::new(&[]))
        .expect_err("it is in use")
        .to_string();
    assert!(
        error.contains("another `lifl run`") && error.contains(&std::process::id().to_string()),
        "{error}"
    );
    drop(clone);
    let (_folder, read) = RunFolder::open(&path, &Trust::new(&[])).expect("nobody has it");
    assert_eq!(
        read,
        anchored(&job(), &std::env::current_dir().expect("a folder"))
    );
}

#[test]
fn a_job_is_found_from_any_folder() {
    let mut job = job();
    job.base_model = Some("models/first".into());
    let trainer = job.workers.len() - 1;
    for (dataset, found) in [
        ("data/mnist", "/here/data/mnist"),
        ("/data/mnist", "/data/mnist"),
        ("builtin:digits", "builtin:digits"),
        ("HTTPS://example.org/a.npz", "HTTPS://example.org/a.npz"),
    ] {
        job.workers[trainer].dataset = Some(dataset.into());
        let anchored = anchored(&job, Path::new("/here"));
        assert_eq!(
            anchored.workers[trainer]
                .dataset
                .as_ref()
                .map(|dataset| dataset.as_str()),
            Some(found)
        );
        assert_eq!(
            anchored.base_model.as_deref(),
            Some(Path::new("/here/models/first"))
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whichever byte of a checkpoint changes, or wherever one of its files ends: the one before is found.
    #[test]
    fn damage_is_found(file in 0_usize..3, at: prop::sample::Index, bit in 0_u8..8, cut: bool) {
        let (_outer, folder) = folder();
        for round in 1..=2 {
            folder.checkpoint(round, &slot(round), Some(&slot(round))).expect("room");
        }
        let name = ["model-2.safetensors", "state-2.safetensors", "checkpoint-2.json"][file];
        let path = folder.path().join(name);
        let mut bytes = fs::read(&path).expect("a file");
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, &bytes).expect("written");
        let (round, skipped) = latest(&folder);
        prop_assert_eq!(round, Some(1));
        prop_assert_eq!(skipped.len(), 1);
        prop_assert!(skipped[0].contains("round 2 is not whole"), "{}", skipped[0]);
    }
}

/// Links under all names that a run writes, whoever has put them there: what they lead to stays as it is.
#[test]
fn planted_links_are_replaced_or_refused() {
    let (outer, folder) = folder();
    let victim = outer.path().join("victim");
    fs::write(&victim, "precious").expect("written");
    let at = |name: &str| folder.path().join(name);
    for name in [
        ".model-1.safetensors.part",
        "model-1.safetensors",
        ".state-1.safetensors.part",
        "state-1.safetensors",
        ".checkpoint-1.json.part",
        "checkpoint-1.json",
        ".model.safetensors.part",
        "model.safetensors",
        "logs/trainer-1.log",
    ] {
        symlink(&victim, at(name)).expect("linked");
    }
    fs::hard_link(&victim, at("logs/trainer-2.log")).expect("linked");
    folder.checkpoint(1, &slot(1), Some(&slot(2))).expect("room");
    assert_eq!(latest(&folder), (Some(1), vec![]));
    folder.last_model(1, &slot(1), true).expect("room");
    assert!(!at("model.safetensors").is_symlink());
    for worker in ["trainer-1", "trainer-2"] {
        let error = folder.open_log(worker).expect_err("a link");
        assert!(
            format!("{error:#}").contains(&format!("logs/{worker}.log")),
            "{error:#}"
        );
    }
    assert_eq!(folder.log_tail("trainer-1", 1), "");
    assert_eq!(fs::read(&victim).expect("there"), b"precious");
}

/// What a folder's `job.json` may say or be that would lead out of the folder, or be a panic later.
#[test]
fn a_job_that_was_changed_is_refused_by_name() {
    let (_outer, folder) = folder();
    let path = folder.path().to_owned();
    drop(folder);
    let text = fs::read(path.join("job.json")).expect("a job");
    let job: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let last = job["workers"].as_array().expect("workers").len() - 1;
    let refused = |text: &[u8], what: &str| {
        fs::write(path.join("job.json"), text).expect("written");
        let error = RunFolder::open(&path, &Trust::new(&[])).expect_err(what);
        assert!(format!("{error:#}").contains(what), "{error:#}");
    };
    for name in [
        "../../escaped",
        "/escaped",
        "a/b",
        "",
        ".",
        "..",
        ".lock",
        "a\n",
        "top-aggregator-1",
    ] {
        let mut job = job.clone();
        job["workers"][last]["name"] = name.into();
        refused(job.to_string().as_bytes(), &format!("{name:?}"));
    }
    for field in ["grace_time_s", "round_timeout_s"] {
        let mut job = job.clone();
        job[field] = (-1.0).into();
        refused(job.to_string().as_bytes(), "no time to wait");
    }
    refused(&vec![b'['; 1 << 20], "is damaged");
    let huge = File::create(path.join("job.json")).expect("made");
    huge.set_len(1 << 42).expect("sparse");
    assert!(
        format!(
            "{:#}",
            RunFolder::open(&path, &Trust::new(&[])).expect_err("huge")
        )
        .contains("bytes")
    );
    fs::remove_file(path.join("job.json")).expect("removed");
    nix::unistd::mkfifo(&path.join("job.json"), nix::sys::stat::Mode::S_IRWXU).expect("made");
    assert!(
        format!(
            "{:#}",
            RunFolder::open(&path, &Trust::new(&[])).expect_err("a FIFO")
        )
        .contains("FIFO")
    );
    fs::remove_file(path.join("job.json")).expect("removed");
    fs::create_dir(path.join("job.json")).expect("made");
    assert!(
        format!(
            "{:#}",
            RunFolder::open(&path, &Trust::new(&[])).expect_err("a folder")
        )
        .contains("job.json")
    );
}
