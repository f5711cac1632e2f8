//! Runs that are killed, at any moment, and go on from what they left; and what they leave when a disk is full.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{self, Finished, Job, PATIENCE, Place, Started, resume, signal};

/// A job whose equal runs are equal bit for bit, with that optimizer.
fn job(rounds: u32, optimizer: &Value, updates: &str) -> Value {
    let mut job = Job::digits(&[1, 2, 4], "softmax")
        .with("timing", "lazy")
        .with("updates", updates);
    job.rounds = rounds;
    let mut file = job.file();
    file["optimizer"] = optimizer.clone();
    file
}

/// The same without data.
fn synthetic(rounds: u32) -> Value {
    let mut job = Job::synthetic(&[1, 2, 4], 100_000, "F32").with("timing", "lazy");
    job.rounds = rounds;
    let mut file = job.file();
    file["optimizer"] = json!({ "sort": "fedadam" });
    file
}

/// Waits for it.
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The last round that a trainer says it has trained.
fn trained(run: &Path, trainer: u32) -> u32 {
    let log = fs::read_to_string(run.join(format!("logs/trainer-{trainer}.log"))).unwrap_or_default();
    let lines = log.lines().filter(|line| line.contains(" trained "));
    let round = |line: &str| line.split("round=").nth(1)?.split(' ').next()?.parse().ok();
    lines.filter_map(round).next_back().unwrap_or(0)
}

/// The newest checkpoint's round.
fn newest(run: &Path) -> u32 {
    let names = fs::read_dir(run).expect("a folder").flatten();
    let round = |name: String| {
        name.strip_prefix("checkpoint-")?
            .strip_suffix(".json")?
            .parse()
            .ok()
    };
    names
        .filter_map(|entry| round(entry.file_name().to_string_lossy().into_owned()))
        .max()
        .unwrap_or(0)
}

/// Kills everything in the middle of a round, which a trainer that is stopped keeps from being done. Gives the round.
fn kill_in_mid_round(run: Started, place: &Place) -> u32 {
    let stopped = run.workers("trainer-1")[0];
    signal(stopped, Signal::SIGSTOP);
    let state = || fs::read_to_string(format!("/proc/{stopped}/stat")).unwrap_or_default();
    wait_until("stopped", || state().contains(") T "));
    let missing = trained(&place.run(), 1) + 1;
    wait_until("in that round", || trained(&place.run(), 2) == missing);
    run.kill_everything();
    missing
}

/// A run that is killed in a round ends, resumed, as one that is not.
fn ends_as_if_not_killed(file: &Value) {
    let whole = Place::new(file);
    let undisturbed = whole.finish(&["--plane", "relay"]).success();
    let place = Place::new(file);
    let mut run = place.start(&["--plane", "relay"]);
    run.wait_for("round");
    wait_until("at the first checkpoint", || newest(&place.run()) >= 1);
    let missing = kill_in_mid_round(run, &place);
    let before = newest(&place.run());
    assert!((1..missing).contains(&before), "{before} before {missing}");
    let log = place.run().join("logs/top-aggregator-1.log");
    let said_before = fs::read(&log).expect("a log");
    let metrics_before = fs::read_to_string(place.run().join("metrics.jsonl")).expect("metrics");

    let finished = place.start_resume(&["--plane", "relay"]).wait().success();
    let resumed = finished.one("resumed");
    assert_eq!(resumed["round"], before + 1);
    assert_eq!(resumed["checkpoint"], format!("checkpoint-{before}.json"));
    assert_eq!(resumed["skipped"], json!([]));
    let rounds = |finished: &Finished| -> Vec<Value> {
        let rounds = finished.all("round").into_iter();
        rounds
            .map(|round| {
                json!([
                    round["round"],
                    round["loss"],
                    round["train_loss"],
                    round["samples"]
                ])
            })
            .collect()
    };
    assert_eq!(rounds(&finished), rounds(&undisturbed)[before as usize..]);
    assert!(place.model() == whole.model(), "another model");
    let last = |place: &Place| {
        let state = format!("state-{}.safetensors", file["hyperparameters"]["rounds"]);
        fs::read(place.run().join(state)).ok()
    };
    assert_eq!(last(&place).is_some(), file["optimizer"]["sort"] != "fedavg");
    assert!(
        last(&place) == last(&whole),
        "the optimizer remembers something else"
    );
    // What was said before still stands.
    assert!(fs::read(&log).expect("a log").starts_with(&said_before));
    let metrics = fs::read_to_string(place.run().join("metrics.jsonl")).expect("metrics");
    let kept = &metrics_before[..metrics_before.rfind('\n').map_or(0, |end| end + 1)];
    assert!(metrics.starts_with(kept));
    assert_eq!(
        metrics.lines().count(),
        kept.lines().count() + finished.events.len()
    );
}

#[test]
fn fedavg_goes_on_bit_for_bit() {
    ends_as_if_not_killed(&job(100, &json!({ "sort": "fedavg" }), "weights"));
}

#[test]
fn fedadam_of_deltas_goes_on_bit_for_bit() {
    ends_as_if_not_killed(&job(100, &json!({ "sort": "fedadam" }), "deltas"));
}

#[test]
fn fedyogi_goes_on_bit_for_bit() {
    ends_as_if_not_killed(&job(100, &json!({ "sort": "fedyogi" }), "weights"));
}

#[test]
fn fedadagrad_with_two_moments_of_16_bits_weights_goes_on_bit_for_bit() {
    let mut job = Job::synthetic(&[1, 4], 300_001, "BF16").with("timing", "lazy");
    job.rounds = 100;
    let mut file = job.file();
    file["optimizer"] = json!({ "sort": "fedadagrad" });
    ends_as_if_not_killed(&file);
}

#[test]
fn who_is_selected_by_chance_is_the_same_when_resumed() {
    let mut file = job(100, &json!({ "sort": "fedadam" }), "weights");
    file["selector"] = json!({ "sort": "random", "kwargs": { "k": 1 } });
    let whole = Place::new(&file);
    whole.finish(&["--plane", "relay"]).success();
    let place = Place::new(&file);
    let mut run = place.start(&["--plane", "relay"]);
    run.wait_for("round");
    wait_until("at the first checkpoint", || newest(&place.run()) >= 1);
    run.kill_everything();
    let resumed = place.start_resume(&["--plane", "relay"]).wait().success();
    let round = resumed.one("resumed")["round"].as_u64().expect("a number");
    assert!((2..100).contains(&round), "{round}");
    assert!(place.model() == whole.model(), "another model");
}

/// A run's folder with some checkpoints, killed, and the model that the undisturbed run came to.
struct Killed {
    place: Place,
    newest: u32,
    model: Vec<u8>,
}

impl Killed {
    fn new() -> Self {
        let file = synthetic(60);
        let whole = Place::new(&file);
        whole.finish(&["--plane", "relay"]).success();
        let place = Place::new(&file);
        let mut run = place.start(&["--plane", "relay"]);
        run.wait_for("round");
        let stopped = run.workers("trainer-1")[0];
        wait_until("at the third checkpoint", || newest(&place.run()) >= 3);
        signal(stopped, Signal::SIGSTOP);
        run.kill_everything();
        let newest = newest(&place.run());
        assert!(newest < 60);
        Self {
            place,
            newest,
            model: whole.model(),
        }
    }

    /// A copy of its folder, and where it is.
    fn copy(&self) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let run = folder.path().join("run");
        let copied = Command::new("cp")
            .arg("-a")
            .arg(self.place.run())
            .arg(&run)
            .status();
        assert!(copied.expect("started").success());
        (folder, run)
    }

    fn resume(folder: &TempDir, run: &Path, more: &[&str]) -> Finished {
        Started::new(resume(run, more), run.to_owned(), &folder.path().join("resume")).wait()
    }

    /// With that done to the newest checkpoint, the one before must be used, the damage named, and the model come out.
    fn survives(&self, what: &str, damage: impl FnOnce(&dyn Fn(&str, &str) -> PathBuf)) {
        let (folder, run) = self.copy();
        let newest = self.newest;
        damage(&|name, extension| run.join(format!("{name}-{newest}.{extension}")));
        let finished = Self::resume(&folder, &run, &["--plane", "relay"]).success();
        let resumed = finished.one("resumed");
        assert_eq!(
            resumed["checkpoint"],
            format!("checkpoint-{}.json", newest - 1),
            "{what}"
        );
        let skipped = resumed["skipped"].as_array().expect("a list");
        assert_eq!(skipped.len(), 1, "{what}: {skipped:?}");
        let skipped = skipped[0].as_str().expect("text");
        assert!(
            skipped.contains(&format!("round {newest} is not whole")) && skipped.contains(what),
            "{skipped}"
        );
        let model = fs::read(run.join("model.safetensors")).expect("a model");
        assert!(model == self.model, "{what}: another model");
    }
}

fn cut(path: &Path, bytes: u64) {
    let file = fs::File::options().write(true).open(path).expect("a file");
    file.set_len(bytes).expect("cut");
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[at] ^= 4;
    fs::write(path, bytes).expect("written");
}

#[test]
fn the_checkpoint_before_a_damaged_one_is_used() {
    let killed = Killed::new();
    killed.survives("is cut off", |file| cut(&file("model", "safetensors"), 100_000));
    killed.survives("is cut off", |file| cut(&file("state", "safetensors"), 0));
    killed.survives("was changed", |file| flip(&file("model", "safetensors"), 77_777));
    killed.survives("was changed", |file| flip(&file("state", "safetensors"), 200_000));
    killed.survives("is damaged", |file| cut(&file("checkpoint", "json"), 60));
    killed.survives("cannot read", |file| {
        fs::remove_file(file("state", "safetensors")).expect("removed");
    });
}

#[test]
fn what_a_kill_left_half_written_is_no_checkpoint_and_goes() {
    let killed = Killed::new();
    let (folder, run) = killed.copy();
    let next = killed.newest + 1;
    // As if killed between the renames, and in a write.
    fs::write(run.join(format!("model-{next}.safetensors")), "half").expect("written");
    let part = run.join(format!(".state-{next}.safetensors.part"));
    fs::write(&part, "half").expect("written");
    let metrics = run.join("metrics.jsonl");
    let mut text = fs::read_to_string(&metrics).expect("metrics");
    text.push_str("{\"event\":\"rou");
    fs::write(&metrics, text).expect("written");
    let finished = Killed::resume(&folder, &run, &["--plane", "relay"]).success();
    assert_eq!(finished.one("resumed")["round"], next);
    assert!(!part.exists());
    let model = fs::read(run.join("model.safetensors")).expect("a model");
    assert!(model == killed.model, "another model");
    for line in fs::read_to_string(&metrics).expect("metrics").lines() {
        serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("not JSON: {line}"));
    }
}

#[test]
fn a_run_may_be_killed_again_and_again() {
    let killed = Killed::new();
    let (folder, run) = killed.copy();
    let mut before = killed.newest;
    for life in 0..3 {
        let words = folder.path().join(format!("life-{life}"));
        let started = Started::new(resume(&run, &["--plane", "relay"]), run.clone(), &words);
        wait_until("at the next checkpoint", || newest(&run) > before);
        started.kill_everything();
        before = newest(&run);
        every_round_is_told_of(&run, before);
    }
    Killed::resume(&folder, &run, &["--plane", "relay"]);
    let model = fs::read(run.join("model.safetensors")).expect("a model");
    assert!(model == killed.model, "another model");
    every_round_is_told_of(&run, 60);
}

/// A round whose checkpoint is there has its event: it comes first, since a run that goes on does not make that round again.
fn every_round_is_told_of(run: &Path, last: u32) {
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    let whole = metrics
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let told: HashSet<u64> = whole
        .filter_map(|event| (event["event"] == "round").then(|| event["round"].as_u64())?)
        .collect();
    for round in 1..=u64::from(last) {
        assert!(
            told.contains(&round),
            "nothing is told of round {round} of {last}"
        );
    }
}

#[test]
fn a_run_that_is_killed_as_a_checkpoint_appears_has_told_of_its_round() {
    for life in 1..=6 {
        let mut job = Job::synthetic(&[1, 2], 10, "F32");
        job.rounds = 100_000;
        let place = Place::new(&job.file());
        let mut run = place.start(&["--plane", "relay", "--keep-checkpoints", "2"]);
        run.wait_for("job_started");
        wait_until("at a checkpoint", || newest(&place.run()) >= life * 3);
        run.kill_everything();
        every_round_is_told_of(&place.run(), newest(&place.run()));
    }
}

/// It must fail with code 2, having started nothing, and say all of that.
fn refused(run: &Path, more: &[&str], says: &[&str]) {
    let folder = tempfile::tempdir().expect("a folder");
    let words = folder.path().join("words");
    let started = Started::new(resume(run, more), folder.path().to_owned(), &words);
    started.wait().refused(2, says);
}

#[test]
fn two_runs_do_not_work_in_one_folder() {
    let place = Place::new(&synthetic(1_000_000));
    let mut run = place.start(&["--plane", "relay", "--keep-checkpoints", "2"]);
    run.wait_for("round");
    let process = format!("process {}", run.pid());
    let place_text = place.run().display().to_string();
    refused(
        &place.run(),
        &[],
        &["another `lifl run` works in", &place_text, &process],
    );
    assert!(run.is_running());
    // What is kept is bounded meanwhile: a round's is written before the oldest goes.
    let names = fs::read_dir(place.run()).expect("a folder").flatten();
    let checkpoints = names
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"))
        .count();
    assert!(checkpoints <= 3, "{checkpoints}");
    signal(run.pid(), Signal::SIGINT);
    assert_eq!(run.wait().code(), Some(130));
}

#[test]
fn a_finished_run_says_so() {
    let place = Place::new(&synthetic(3));
    place.finish(&["--plane", "relay"]).success();
    let (model, metrics) = (place.model(), place.run().join("metrics.jsonl"));
    let said = fs::read(&metrics).expect("metrics");
    let again = place.start_resume(&[]).wait().success();
    assert_eq!(again.one("already_finished")["rounds"], 3);
    assert_eq!(again.events.len(), 1, "{:?}", again.events);
    // Killed between the last round and the end.
    fs::remove_file(place.run().join("model.safetensors")).expect("removed");
    let again = place.start_resume(&[]).wait().success();
    assert_eq!(again.one("already_finished")["rounds"], 3);
    assert!(place.model() == model);
    assert!(fs::read(&metrics).expect("metrics") == said);
    // A last model that is not whole is not taken for one.
    cut(&place.run().join("model.safetensors"), 1000);
    let again = place.start_resume(&[]).wait().success();
    assert!(again.all("already_finished").is_empty());
    let skipped = again.one("resumed")["skipped"].to_string();
    assert!(
        skipped.contains("model.safetensors is not whole") && skipped.contains("round 3 is not whole"),
        "{skipped}"
    );
    assert!(place.model() == model);
}

#[test]
fn a_run_without_checkpoints_begins_anew() {
    let file = synthetic(30);
    let whole = Place::new(&file);
    whole.finish(&["--plane", "relay"]).success();
    let place = Place::new(&file);
    let mut run = place.start(&["--plane", "relay", "--checkpoint-every", "0"]);
    run.wait_for("round");
    run.kill_everything();
    let finished = place
        .start_resume(&["--plane", "relay", "--checkpoint-every", "7"])
        .wait()
        .success();
    let resumed = finished.one("resumed");
    assert_eq!(
        (&resumed["round"], &resumed["checkpoint"]),
        (&json!(1), &Value::Null)
    );
    assert!(place.model() == whole.model(), "another model");
    // Every seventh, and the last.
    for round in 1..=30 {
        let there = place.run().join(format!("checkpoint-{round}.json")).exists();
        assert_eq!(there, round % 7 == 0 || round == 30, "round {round}");
    }
}

#[test]
fn people_are_told_the_same() {
    let Some(disk) = SmallDisk::new(300) else { return };
    let place = Place::new(&synthetic(2));
    let run = disk.folder.path().join("run");
    let say = |command: &mut Command| {
        let output = command.args(["--daemon", "own"]).output().expect("started");
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        (out, output.status.code())
    };
    let (out, code) = say(support::lifl().arg("run").arg(&place.job).arg("--out").arg(&run));
    assert_eq!(code, Some(4));
    assert!(
        out.contains("warning: round 1 has no checkpoint, the job goes on: cannot write"),
        "{out}"
    );
    let (out, _) = say(support::lifl().arg("run").arg("--resume").arg(&run));
    assert!(
        out.contains("no checkpoint in") && out.contains("beginning at round 1"),
        "{out}"
    );
    place.finish(&["--plane", "relay"]).success();
    let (out, code) = say(support::lifl().arg("run").arg("--resume").arg(place.run()));
    assert_eq!(code, Some(0));
    assert!(out.contains("nothing left to do: all 2 rounds are done"), "{out}");
}

#[test]
fn only_so_many_checkpoints_are_kept() {
    let place = Place::new(&synthetic(9));
    place
        .finish(&["--plane", "relay", "--keep-checkpoints", "2"])
        .success();
    let mut names: Vec<String> = fs::read_dir(place.run())
        .expect("a folder")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("-") || name.starts_with(".m") || name.ends_with(".part"))
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "checkpoint-8.json",
            "checkpoint-9.json",
            "model-8.safetensors",
            "model-9.safetensors",
            "state-8.safetensors",
            "state-9.safetensors"
        ]
    );
}

#[test]
fn what_is_no_run_is_refused() {
    let empty = tempfile::tempdir().expect("a folder");
    refused(
        empty.path(),
        &[],
        &["not the folder of a run", "no job.json", "--resume"],
    );
    refused(
        &empty.path().join("nowhere"),
        &[],
        &["nowhere is no folder", "--resume"],
    );
    let job = empty.path().join("job.json");
    fs::write(&job, synthetic(3).to_string()).expect("written");
    refused(empty.path(), &[], &["job.json has no version", "lifl run PATH"]);
    fs::write(&job, r#"{"version": 7}"#).expect("written");
    refused(
        empty.path(),
        &[],
        &["job.json is of version 7", "this lifl knows 1"],
    );
    for damaged in ["", "{\"version\": 1", "{\"version\": 1, \"id\": 3}"] {
        fs::write(&job, damaged).expect("written");
        refused(empty.path(), &[], &["job.json is damaged"]);
    }
}

#[test]
fn a_job_that_was_changed_is_refused() {
    let killed = Killed::new();
    let (_folder, run) = killed.copy();
    let job = run.join("job.json");
    let text = fs::read_to_string(&job).expect("a job");
    let changed = text.replace("\"rounds\": 60", "\"rounds\": 61");
    assert_ne!(text, changed);
    fs::write(&job, changed).expect("written");
    refused(&run, &[], &["job.json", "was changed since", "baseModel"]);
}

#[test]
fn options_that_the_run_has_already_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for (option, value) in [
        ("--seed", "3"),
        ("--rounds", "3"),
        ("--timing", "lazy"),
        ("--data", "builtin:digits"),
        ("--prefer", "shm"),
        ("--out", "elsewhere"),
    ] {
        refused(
            folder.path(),
            &[option, value],
            &["--resume", option, "cannot be used with"],
        );
    }
    refused(folder.path(), &["job.json"], &["--resume", "cannot be used with"]);
}

#[test]
fn the_time_counts_anew() {
    let mut job = Job::synthetic(&[1, 2], 100_000, "F32");
    (job.rounds, job.max_run_time) = (1_000_000, 2);
    let place = Place::new(&job.file());
    let first = place.finish(&["--plane", "relay", "--keep-checkpoints", "3"]);
    assert_eq!(first.code(), Some(5), "{}", first.stderr);
    let before = newest(&place.run());
    let second = place
        .start_resume(&["--plane", "relay", "--keep-checkpoints", "3"])
        .wait();
    assert_eq!(second.code(), Some(5), "{}", second.stderr);
    assert!(newest(&place.run()) > before);
}

/// A file system of its own in memory.
struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// `None`, said loudly, where it cannot be had.
    ///
    /// # Panics
    /// If it cannot be had and `LIFL_REQUIRE_KERNEL` is set.
    fn new(kib: u32) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let size = format!("size={kib}k");
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .output()
            .expect("started");
        if mount.status.success() {
            return Some(Self { folder });
        }
        let why = String::from_utf8_lossy(&mount.stderr);
        eprintln!("NOT RUN on a disk that is full: {why}");
        assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{why}");
        None
    }

    fn start(&self, place: &Place, more: &[&str]) -> Started {
        let run = self.folder.path().join("run");
        let mut command = support::lifl();
        command
            .arg("run")
            .arg(&place.job)
            .args(["--json", "--daemon", "own", "--plane", "relay"]);
        command.arg("--out").arg(&run).args(more);
        Started::new(command, run, &place.folder.path().join("start"))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.folder.path()).status();
    }
}

fn parts(run: &Path) -> Vec<String> {
    let names = fs::read_dir(run).expect("a folder").flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".part"))
        .collect()
}

#[test]
fn a_full_disk_costs_the_checkpoint_and_not_the_job() {
    let Some(disk) = SmallDisk::new(8 << 10) else {
        return;
    };
    let ballast = disk.folder.path().join("ballast");
    // The model and its moments are 1.2 MB, and room is left for 1 MB.
    fs::write(&ballast, vec![1; 7 << 20]).expect("written");
    let mut file = synthetic(1_000_000);
    file["maxRunTime"] = json!(120);
    let place = Place::new(&file);
    let mut run = disk.start(&place, &["--keep-checkpoints", "2"]);
    let failed = run.wait_for("checkpoint_failed");
    let error = failed["error"].as_str().expect("text");
    assert!(
        error.contains("state-1.safetensors (805") && error.contains("bytes were free for it"),
        "{error}"
    );
    assert!(
        error.contains("make room") && error.contains("--keep-checkpoints"),
        "{error}"
    );
    run.wait_for("round");
    let folder = disk.folder.path().join("run");
    assert_eq!(newest(&folder), 0);
    fs::remove_file(&ballast).expect("removed");
    wait_until("there is a checkpoint again", || newest(&folder) > 0);
    signal(run.pid(), Signal::SIGINT);
    let finished = run.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    // All that was told stands in the metrics, whatever had no room at first.
    let metrics = fs::read_to_string(folder.join("metrics.jsonl")).expect("metrics");
    assert_eq!(metrics.lines().count(), finished.events.len());
    // From what was written then the job goes on.
    let words = place.folder.path().join("resume");
    let mut resumed = Started::new(
        resume(&folder, &["--keep-checkpoints", "2"]),
        folder.clone(),
        &words,
    );
    assert!(resumed.wait_for("resumed")["checkpoint"].is_string());
    resumed.wait_for("round");
    signal(resumed.pid(), Signal::SIGINT);
    resumed.wait();
}

#[test]
fn a_last_model_that_has_no_room_fails_the_job() {
    let Some(disk) = SmallDisk::new(300) else { return };
    let place = Place::new(&synthetic(2));
    let finished = disk.start(&place, &[]).wait();
    assert_eq!(finished.code(), Some(4), "{}", finished.stderr);
    assert_eq!(
        finished.all("checkpoint_failed").len(),
        1,
        "{:?}",
        finished.events
    );
    let error = finished.one("job_failed")["error"]
        .as_str()
        .expect("text")
        .to_owned();
    assert!(
        error.contains("model.safetensors (405") && error.contains("its file system is full"),
        "{error}"
    );
    assert!(parts(&disk.folder.path().join("run")).is_empty());
}

#[test]
fn a_limit_on_files_costs_the_checkpoint_and_not_the_job() {
    let place = Place::new(&synthetic(1_000_000));
    let mut run = place.start(&["--plane", "relay", "--keep-checkpoints", "2"]);
    run.wait_for("round");
    let pid = run.pid().to_string();
    let limit = |bytes: &str| {
        let limited = Command::new("prlimit")
            .args(["--pid", &pid, &format!("--fsize={bytes}:unlimited")])
            .status();
        assert!(limited.expect("started").success());
    };
    limit("100000");
    let failed = run.wait_for("checkpoint_failed");
    let error = failed["error"].as_str().expect("text").to_owned();
    assert!(
        error.contains(".safetensors (") && error.contains("ulimit -f"),
        "{error}"
    );
    let round = failed["round"].as_u64().expect("a number") as u32;
    limit("unlimited");
    wait_until("there is a later checkpoint", || newest(&place.run()) > round);
    signal(run.pid(), Signal::SIGINT);
    assert_eq!(run.wait().code(), Some(130));
}
