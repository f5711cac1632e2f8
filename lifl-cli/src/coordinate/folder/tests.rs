//! What checkpoints a folder has, whatever was done to their files.

use lifl_common::config;
use lifl_common::update::{DType, Schema, TensorSpec};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A run's new folder.
fn folder() -> (TempDir, RunFolder) {
    let outer = tempfile::tempdir().expect("a folder");
    let folder = RunFolder::create(Some(&outer.path().join("run")), &job()).expect("made");
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
    (checkpoint.map(|(round, _)| round), skipped)
}

#[test]
fn the_newest_is_found_and_is_what_was_lent() {
    let (_outer, folder) = folder();
    assert_eq!(latest(&folder), (None, vec![]));
    for round in [1, 2, 10] {
        let path = folder.checkpoint(round, &slot(round), Some(&slot(round + 100)));
        assert_eq!(
            path.expect("room").file_name().expect("a name").to_str(),
            Some(&*format!("checkpoint-{round}.json"))
        );
    }
    assert_eq!(latest(&folder), (Some(10), vec![]));
    let model = fs::read(folder.path().join("model-10.safetensors")).expect("a model");
    let schema = image::schema(&model).expect("an image");
    let (metadata, offset) = image::check(&model, &schema).expect("an image");
    assert_eq!((metadata.round, metadata.generation), (10, Generation(0)));
    assert!(model[offset..] == slot(10)[offset..]);
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
    let model = fs::read(folder.last_model_path()).expect("a model");
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
    let error = RunFolder::open(&path).expect_err("it is in use").to_string();
    assert!(
        error.contains("another `lifl run`") && error.contains(&std::process::id().to_string()),
        "{error}"
    );
    drop(clone);
    let (_folder, read) = RunFolder::open(&path).expect("nobody has it");
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
        job.workers[trainer].dataset = Some(dataset.to_owned());
        let anchored = anchored(&job, Path::new("/here"));
        assert_eq!(anchored.workers[trainer].dataset.as_deref(), Some(found));
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
