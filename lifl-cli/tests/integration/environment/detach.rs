//! Runs in the background: begun, followed and stopped by other processes.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use serde_json::Value;

use super::{long, short};
use crate::support::{Job, PATIENCE, Place, lifl, signal, workers};

/// A job that does not end by itself while a test looks.
fn endless() -> Place {
    let mut job = Job::synthetic(&[1, 2], 100, "F32");
    job.rounds = 10_000_000;
    Place::new(&job.file())
}

/// A run that was detached; stopped when it is dropped.
struct Detached {
    place: Place,
    pid: i32,
}

impl Detached {
    fn begin(place: Place, more: &[&str]) -> Self {
        let options = [&["--detach", "--checkpoint-every", "0"][..], more].concat();
        let output = place.command(&options).output().expect("started");
        let events = events_of(&output);
        assert!(output.status.success(), "{}", text(&output.stderr));
        // What a run says before it goes to the background is heard by who waits for that.
        let names: Vec<_> = events
            .iter()
            .map(|event| event["event"].as_str().expect("a name"))
            .collect();
        assert_eq!(names, ["job_started", "detached"]);
        let run = place.run().canonicalize().expect("there");
        assert_eq!(events[1]["run"], run.to_str().expect("text"));
        let pid = i32::try_from(events[1]["pid"].as_i64().expect("a number")).expect("a pid");
        Self { place, pid }
    }

    fn is_running(&self) -> bool {
        kill(Pid::from_raw(self.pid), None).is_ok()
    }

    fn command(&self, command: &str, more: &[&str]) -> Command {
        let mut lifl = lifl();
        lifl.arg(command).arg(self.place.run()).args(more);
        lifl
    }

    fn output(&self, command: &str, more: &[&str]) -> Output {
        self.command(command, more).output().expect("started")
    }

    fn last_event(&self) -> Value {
        let text = fs::read_to_string(self.place.run().join("metrics.jsonl")).expect("read");
        serde_json::from_str(text.lines().last().expect("a line")).expect("JSON")
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        let _ = self.output("stop", &["--timeout", "20", "--kill"]);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn events_of(output: &Output) -> Vec<Value> {
    let lines = text(&output.stdout);
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for a child that has little left to do.
fn ended(mut child: Child) -> Option<i32> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status.code();
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_detached_run_has_a_session_of_its_own_and_can_be_stopped() {
    let run = Detached::begin(endless(), &[]);
    let own = getsid(None).expect("a session");
    assert_eq!(
        getsid(Some(Pid::from_raw(run.pid))).expect("runs"),
        Pid::from_raw(run.pid)
    );
    for pid in workers(&run.place.run(), "") {
        assert_ne!(getsid(Some(Pid::from_raw(pid))).expect("runs"), own);
    }
    let descriptors: Vec<_> = (0..3)
        .map(|fd| fs::read_link(format!("/proc/{}/fd/{fd}", run.pid)).expect("open"))
        .collect();
    let log = run.place.run().canonicalize().expect("there").join("run.log");
    assert_eq!(descriptors, [Path::new("/dev/null"), &log, &log]);

    until("past a round", || {
        fs::read_to_string(&log).is_ok_and(|log| log.contains("round   1"))
    });
    let output = run.output("stop", &["--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let stopped = &events_of(&output)[0];
    assert_eq!(
        (&stopped["event"], &stopped["exit_code"]),
        (&"stopped".into(), &130.into())
    );
    assert!(workers(&run.place.run(), "").is_empty());
    assert_eq!(run.last_event()["exit_code"], 130);
    // Its log has what people read.
    let log = fs::read_to_string(log).expect("a log");
    assert!(log.contains("round   1") && log.contains("interrupted"), "{log}");
    assert!(!log.contains("{\"event\""), "{log}");

    // Once more is no error, and touches no process.
    let again = run.output("stop", &[]);
    assert!(again.status.success());
    assert!(
        text(&again.stdout).contains("had ended before: exit code 130"),
        "{}",
        text(&again.stdout)
    );
}

#[test]
fn whoever_attaches_sees_the_run_and_ends_as_it_does() {
    let run = Detached::begin(long(), &[]);
    let output = run.output("attach", &["--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let events = events_of(&output);
    let rounds = events.iter().filter(|event| event["event"] == "round").count();
    assert_eq!(rounds, 40, "all of them, those before it attached too");
    assert_eq!(events.last().expect("some")["event"], "job_finished");
    // It has ended, and can be looked at as before.
    let again = run.output("attach", &[]);
    assert_eq!(again.status.code(), Some(0));
    let lines = text(&again.stdout);
    assert!(
        lines.contains("round  40") && lines.contains("done: 40 rounds"),
        "{lines}"
    );
    // What the log has is not said twice.
    assert_eq!(text(&again.stderr), "");
}

#[test]
fn an_interrupt_ends_the_following_and_not_the_run_and_a_stop_ends_both() {
    let run = Detached::begin(endless(), &[]);
    let follow = || {
        let words = run.place.folder.path().join("attached");
        let file = File::create(&words).expect("made");
        let child = run
            .command("attach", &["--json"])
            .stdout(file)
            .stderr(Stdio::null())
            .spawn();
        let child = child.expect("started");
        until("attached", || {
            fs::metadata(&words).is_ok_and(|found| found.len() > 0)
        });
        child
    };
    let first = follow();
    signal(first.id() as i32, Signal::SIGINT);
    assert_eq!(ended(first), Some(130));
    assert!(run.is_running());
    let second = follow();
    assert!(run.output("stop", &[]).status.success());
    assert_eq!(ended(second), Some(130));
}

#[test]
fn a_run_that_cannot_begin_says_so_where_it_was_asked_for() {
    let place = short();
    fs::write(&place.job, "{").expect("written");
    let output = place.command(&["--detach"]).output().expect("started");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("job.json"),
        "{}",
        text(&output.stderr)
    );
    assert!(!place.run().exists());

    // Its workers die before the first round.
    let mut file = Job::digits(&[1, 2], "softmax").file();
    file["dataset"] = "/nowhere".into();
    let place = Place::new(&file);
    let output = place.command(&["--detach"]).output().expect("started");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

#[test]
fn a_run_that_was_killed_is_known_as_dead_and_another_process_of_its_number_is_left_alone() {
    let run = Detached::begin(endless(), &[]);
    signal(run.pid, Signal::SIGKILL);
    let output = run.output("attach", &[]);
    assert_eq!(output.status.code(), Some(4));
    assert!(
        text(&output.stderr).contains("--resume"),
        "{}",
        text(&output.stderr)
    );
    // Its number is another's by now.
    let mut innocent = Command::new("sleep").arg("600").spawn().expect("started");
    let lock = run.place.run().join(".lock");
    fs::write(&lock, format!("{}\n", innocent.id())).expect("written");
    let output = run.output("stop", &["--kill", "--timeout", "0"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(
        innocent.try_wait().expect("a child").is_none(),
        "it was signalled"
    );
    // Not even while somebody has the lock.
    let file = File::open(&lock).expect("open");
    file.lock().expect("locked");
    let output = run.output("stop", &["--kill", "--timeout", "0"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(
        innocent.try_wait().expect("a child").is_none(),
        "it was signalled"
    );
    innocent.kill().expect("its own");
    innocent.wait().expect("a child");
}

#[test]
fn a_run_that_stands_still_is_stopped_or_killed_in_time() {
    let run = Detached::begin(endless(), &[]);
    // As Ctrl-Z leaves it.
    signal(run.pid, Signal::SIGSTOP);
    let output = run.output("stop", &["--json"]);
    assert_eq!(
        events_of(&output)[0]["exit_code"],
        130,
        "{}",
        text(&output.stderr)
    );

    let run = Detached::begin(endless(), &[]);
    let output = run.output("stop", &["--timeout", "0", "--kill", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    until("gone", || {
        !run.is_running() && workers(&run.place.run(), "").is_empty()
    });
}

#[test]
fn a_run_in_the_foreground_can_be_followed_and_stopped_too() {
    let place = endless();
    let mut started = place.start(&["--checkpoint-every", "0"]);
    started.wait_for_round(1);
    let output = lifl().arg("stop").arg(place.run()).output().expect("started");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(started.wait().code(), Some(130));
    let output = lifl().arg("attach").arg(place.run()).output().expect("started");
    assert_eq!(output.status.code(), Some(130));
}

#[test]
fn without_a_folder_the_latest_is_followed_and_only_the_only_one_is_stopped() {
    let here = tempfile::tempdir().expect("a folder");
    let place = endless();
    let at = |arguments: &[&str]| {
        let output = lifl().args(arguments).current_dir(here.path()).output();
        output.expect("started")
    };
    let none = at(&["stop"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(
        text(&none.stderr).contains("no run of yours"),
        "{}",
        text(&none.stderr)
    );
    let job = place.job.to_str().expect("text");
    let begin = || {
        let output = at(&[
            "run",
            job,
            "--daemon",
            "own",
            "--detach",
            "--json",
            "--checkpoint-every",
            "0",
        ]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        events_of(&output)[1]["run"].as_str().expect("a path").to_owned()
    };
    let (first, second) = (begin(), begin());
    assert_ne!(first, second);
    let which = at(&["stop"]);
    assert_eq!(which.status.code(), Some(2));
    let names = text(&which.stderr);
    assert!(names.contains(&first) && names.contains(&second), "{names}");
    let latest = at(&["stop", "latest", "--json"]);
    assert_eq!(events_of(&latest)[0]["run"], second.as_str());
    let only = at(&["stop", "--json"]);
    assert_eq!(events_of(&only)[0]["run"], first.as_str());
    let followed = at(&["attach"]);
    assert_eq!(followed.status.code(), Some(130));
}

#[test]
fn descriptors_that_it_was_started_with_are_let_go() {
    let place = endless();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    // As a script's lock or a caller's pipe, which nobody meant for it: its number is 9.
    let run = place.command(&["--detach", "--checkpoint-every", "0"]);
    let mut command = Command::new("bash");
    command
        .args(["-c", "exec \"$@\" 9>&1 1>&2", "bash"])
        .arg(run.get_program())
        .args(run.get_args())
        .stdout(writer)
        .stderr(Stdio::null());
    let status = command.status().expect("started");
    drop(command);
    assert!(status.success());
    // Its end comes although the run goes on.
    let reading = std::thread::spawn(move || reader.read_to_end(&mut Vec::new()));
    until("let go", || reading.is_finished());
    let output = lifl().arg("stop").arg(place.run()).output().expect("started");
    assert!(output.status.success(), "{}", text(&output.stderr));
}
