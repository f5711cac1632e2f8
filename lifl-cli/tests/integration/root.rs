//! Root's `lifl run`: what its processes keep of root's rights, and what others can make of its files.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use crate::support::{Job, Place, Started, lifl, resume};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

/// A user that no machine has.
const OTHER: u32 = 4_207_001;

fn is_root() -> bool {
    if geteuid().is_root() {
        return true;
    }
    eprintln!("NOT RUN: root's runs are root's");
    assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
    false
}

fn job(rounds: u32) -> Job {
    let mut job = Job::synthetic(&[1, 2], 1000, "F32").with("timing", "lazy");
    job.rounds = rounds;
    job
}

/// What all threads of a process say under that name.
fn threads(pid: i32, name: &str) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let word = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.expect("a thread").path().join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    tasks.filter_map(word).collect()
}

fn keeps(pid: i32, capabilities: u64) {
    let [kept, none] = [capabilities, 0].map(|set| format!("{set:016x}"));
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        // The thread that writes what is said, where there is one, has none.
        let mut found = threads(pid, set);
        assert!(found.remove(&kept), "{set}");
        found.remove(&none);
        assert_eq!(found, BTreeSet::new(), "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(threads(pid, set), BTreeSet::from([none.clone()]), "{set}");
    }
    assert_eq!(threads(pid, "NoNewPrivs"), BTreeSet::from(["1".to_owned()]));
    assert_eq!(threads(pid, "Seccomp"), BTreeSet::from(["2".to_owned()]));
}

fn interrupt(run: Started) {
    kill(Pid::from_raw(run.pid()), Signal::SIGINT).expect("a process");
    assert_eq!(run.wait().code(), Some(130));
}

#[test]
fn no_process_of_roots_run_keeps_a_capability() {
    if !is_root() {
        return;
    }
    let place = Place::new(&job(1_000_000).file());
    let mut run = place.start(&[]);
    run.wait_for_round(1);
    keeps(run.pid(), 0);
    let workers = run.workers("");
    assert_eq!(workers.len(), 3);
    for worker in workers {
        keeps(worker, 0);
    }
    interrupt(run);
}

/// Digits of a user whose home is closed, which root reads by a right, and trains on.
#[test]
fn one_capability_stays_for_data_that_root_reads_by_it_only() {
    if !is_root() {
        return;
    }
    let home = tempfile::tempdir().expect("a folder");
    let data = home.path().join("home/data");
    fs::create_dir_all(&data).expect("made");
    write_digits(&data);
    let closed = home.path().join("home");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("closed");
    chown(&closed, Some(OTHER), Some(OTHER)).expect("given");
    let mut job = Job::digits(&[1, 2], "softmax").with("timing", "lazy");
    job.rounds = 1_000_000;
    job.dataset = Some(data.display().to_string());
    let place = Place::new(&job.file());
    let mut run = place.start(&[]);
    run.wait_for_round(1);
    keeps(run.pid(), 1 << 2);
    for worker in run.workers("") {
        keeps(worker, 1 << 2);
    }
    interrupt(run);
}

/// 500 images of 28 × 28 with labels, as MNIST's four files.
fn write_digits(folder: &Path) {
    for (name, count) in [("train", 400_u32), ("t10k", 100)] {
        let header = |magic: u32, sizes: &[u32]| {
            let numbers = [&[magic, count], sizes].concat();
            numbers
                .into_iter()
                .flat_map(u32::to_be_bytes)
                .collect::<Vec<u8>>()
        };
        let mut images = header(0x803, &[28, 28]);
        images.extend((0..count * 784).map(|n| (n % 251) as u8));
        let mut labels = header(0x801, &[]);
        labels.extend((0..count).map(|n| (n % 10) as u8));
        fs::write(folder.join(format!("{name}-images-idx3-ubyte")), images).expect("written");
        fs::write(folder.join(format!("{name}-labels-idx1-ubyte")), labels).expect("written");
    }
}

#[test]
fn folders_of_other_users_are_refused_by_name() {
    if !is_root() {
        return;
    }
    let place = Place::new(&job(1).file());
    let theirs = place.folder.path().join("theirs");
    fs::create_dir_all(theirs.join("runs")).expect("made");
    for folder in [theirs.join("runs"), theirs.clone()] {
        chown(&folder, Some(OTHER), Some(OTHER)).expect("given");
    }
    let run = |out: Option<&Path>, here: &Path, more: &[&str]| {
        let mut command = lifl();
        command
            .arg("run")
            .arg(&place.job)
            .args(["--daemon", "own"])
            .args(more)
            .current_dir(here);
        if let Some(out) = out {
            command.arg("--out").arg(out);
        }
        let output = command.output().expect("run");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    // Theirs is the folder above, `runs`, or the folder itself.
    fs::create_dir(place.folder.path().join("mine")).expect("made");
    let mine = place.folder.path().join("mine");
    fs::create_dir(mine.join("runs")).expect("made");
    chown(mine.join("runs"), Some(OTHER), Some(OTHER)).expect("given");
    for (out, here) in [
        (Some(theirs.join("runs/new")), place.folder.path()),
        (Some(theirs.join("new")), place.folder.path()),
        (Some(mine.join("runs")), place.folder.path()),
        (None, theirs.as_path()),
        (None, mine.as_path()),
    ] {
        let (code, says) = run(out.as_deref(), here, &[]);
        assert_eq!(code, Some(2), "{out:?} {here:?}: {says}");
        assert!(
            says.contains(&format!("belongs to uid {OTHER}")) && says.contains("--trust-owner"),
            "{says}"
        );
    }
    assert_eq!(fs::read_dir(theirs.join("runs")).expect("there").count(), 0);
    let user = OTHER.to_string();
    let (code, says) = run(None, &theirs, &["--trust-owner", &user]);
    assert_eq!(code, Some(0), "{says}");
    let made = fs::read_dir(theirs.join("runs"))
        .expect("there")
        .next()
        .expect("a run")
        .expect("a run");
    let found = made.metadata().expect("there");
    assert_eq!((found.uid(), found.mode() & 0o777), (0, 0o700));
}

/// Puts something at the second path that leads to the first.
type Plant = fn(&Path, &Path);

/// Whatever is planted in a folder that a run goes on in: what it leads to stays as it is.
#[test]
fn what_others_planted_in_a_runs_folder_is_refused() {
    let place = Place::new(&job(1).file());
    place.finish(&[]).success();
    let victim = place.folder.path().join("victim");
    fs::write(&victim, "precious").expect("written");
    let run = place.run();
    // So that it has something left to do.
    let begin_anew = || {
        for name in ["model.safetensors", "model-1.safetensors", "checkpoint-1.json"] {
            let _ = fs::remove_file(run.join(name));
        }
    };
    let plants: [(&str, Plant); 4] = [
        ("a symbolic link", |from, to| symlink(from, to).expect("linked")),
        ("a symbolic link that leads nowhere", |from, to| {
            symlink(from.with_extension("created"), to).expect("linked");
        }),
        ("a hard link", |from, to| fs::hard_link(from, to).expect("linked")),
        ("a FIFO", |_, to| {
            nix::unistd::mkfifo(to, nix::sys::stat::Mode::S_IRWXU).expect("made")
        }),
    ];
    for name in [".lock", "metrics.jsonl", "logs/trainer-1.log", "job.json"] {
        for (what, plant) in &plants {
            if name == "job.json" && *what == "a hard link" {
                continue;
            }
            let path = run.join(name);
            let before = fs::read(&path).expect("there");
            fs::remove_file(&path).expect("there");
            plant(&victim, &path);
            begin_anew();
            let output = resume(&run, &[]).output().expect("run");
            let says = String::from_utf8_lossy(&output.stderr);
            // Without a log a worker works all the same.
            let expected = if name.starts_with("logs/") { 0 } else { 2 };
            assert_eq!(output.status.code(), Some(expected), "{name}, {what}: {says}");
            let file = Path::new(name)
                .file_name()
                .and_then(|name| name.to_str())
                .expect("a name");
            assert!(says.contains(file), "{name}, {what}: {says}");
            assert_eq!(fs::read(&victim).expect("there"), b"precious", "{name}, {what}");
            assert!(!victim.with_extension("created").exists(), "{name}, {what}");
            fs::remove_file(&path).expect("there");
            fs::write(&path, before).expect("written");
        }
    }
    begin_anew();
    let output = resume(&run, &[]).output().expect("run");
    assert!(output.status.success(), "{output:?}");
}

/// The folder is moved away under the run, and another put in its place with links under the names to come.
#[test]
fn a_run_works_on_in_its_folder_wherever_that_is() {
    let place = Place::new(&job(20).file());
    let mut run = place.start(&[]);
    run.wait_for("job_started");
    let (here, moved) = (place.run(), place.folder.path().join("moved"));
    fs::rename(&here, &moved).expect("moved");
    let victim = place.folder.path().join("victim");
    fs::write(&victim, "precious").expect("written");
    for folder in ["logs", "workers"] {
        fs::create_dir_all(here.join(folder)).expect("made");
    }
    let mut planted: Vec<PathBuf> = [
        "metrics.jsonl",
        ".model.safetensors.part",
        "model.safetensors",
        ".lock",
    ]
    .map(|name| here.join(name))
    .into();
    for round in 1..=20 {
        planted.push(here.join(format!(".checkpoint-{round}.json.part")));
        planted.push(here.join(format!(".model-{round}.safetensors.part")));
    }
    planted.extend(["trainer-1", "trainer-2"].map(|name| here.join(format!("logs/{name}.log"))));
    for path in &planted {
        symlink(&victim, path).expect("linked");
    }
    // A successor, which is started now, finds its task and writes its log in the folder that was moved.
    let trainer = run.workers("trainer-1");
    for pid in trainer {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let finished = run.wait().success();
    assert_eq!(finished.all("round").len(), 20);
    assert_eq!(fs::read(&victim).expect("there"), b"precious");
    assert!(planted.iter().all(|path| path.is_symlink()));
    assert!(moved.join("model.safetensors").exists() && moved.join("checkpoint-20.json").exists());
    let lines = fs::read_to_string(moved.join("metrics.jsonl")).expect("there");
    assert!(
        lines.contains("job_finished") || lines.contains("\"round\":20"),
        "{lines}"
    );
}
