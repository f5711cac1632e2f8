//! Where and how the program is started: signals that were ignored, folders that cannot be had, a program that is replaced,
//! output that cannot be written.

mod detach;

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::support::{Job, PATIENCE, Place, Started, lifl, signal};

/// A job that is still under way when a test has done what it does, and is soon over then.
pub(crate) fn long() -> Place {
    let mut job = Job::digits(&[1, 2], "softmax");
    job.rounds = 40;
    Place::new(&job.file())
}

pub(crate) fn short() -> Place {
    Place::new(&Job::synthetic(&[1, 2], 100, "F32").file())
}

/// The run as `nohup` and shells start it: by another program, with the run's own command line.
fn through(place: &Place, starter: &[&str]) -> Started {
    let run = place.command(&["--checkpoint-every", "0"]);
    let mut command = Command::new(starter[0]);
    command
        .args(&starter[1..])
        .arg(run.get_program())
        .args(run.get_args());
    for (name, value) in run.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    Started::new(command, place.run(), &place.folder.path().join("start"))
}

#[test]
fn a_hangup_that_nohup_has_ignored_ends_no_run() {
    let place = long();
    let mut started = through(&place, &["nohup"]);
    started.wait_for_round(1);
    signal(started.pid(), Signal::SIGHUP);
    let finished = started.wait().success();
    assert_eq!(finished.all("round").len(), 40);
}

#[test]
fn an_interrupt_that_a_shell_has_ignored_ends_no_run() {
    let place = long();
    // What a shell without job control does for `command &`.
    let mut started = through(&place, &["sh", "-c", "trap '' INT QUIT; exec \"$@\"", "sh"]);
    started.wait_for_round(1);
    signal(started.pid(), Signal::SIGINT);
    signal(started.pid(), Signal::SIGQUIT);
    started.wait().success();
}

#[test]
fn a_hangup_that_nobody_has_ignored_ends_the_run_in_order() {
    let place = long();
    let mut started = place.start(&[]);
    started.wait_for_round(1);
    signal(started.pid(), Signal::SIGHUP);
    let finished = started.wait();
    assert_eq!(finished.code(), Some(130), "{}", finished.stderr);
    assert_eq!(finished.one("job_failed")["exit_code"], 130);
}

/// Has a command start with all signals blocked, as some supervisors leave them.
fn block_signals(command: &mut Command) {
    let block = || SigSet::all().thread_block().map_err(io::Error::from);
    // SAFETY: between fork and exec it makes nothing but a system call.
    unsafe { command.pre_exec(block) };
}

#[test]
fn signals_that_were_blocked_when_it_was_started_end_a_run_in_order_and_its_workers_ends_are_noticed() {
    for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let place = long();
        let mut command = place.command(&["--checkpoint-every", "0"]);
        block_signals(&mut command);
        let mut started = Started::new(command, place.run(), &place.folder.path().join("start"));
        started.wait_for_round(1);
        signal(started.wait_for_worker("trainer-1"), Signal::SIGKILL);
        started.wait_for("worker_replaced");
        signal(started.pid(), number);
        let finished = started.wait();
        assert_eq!(finished.code(), Some(130), "{number}: {}", finished.stderr);
    }
}

#[test]
fn a_program_that_is_removed_while_it_runs_still_starts_successors() {
    let place = long();
    let program = place.folder.path().join("lifl");
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_lifl"))
        .arg(&program)
        .status();
    assert!(copied.expect("run").success());
    let run = place.command(&[]);
    let mut command = Command::new(&program);
    command.args(run.get_args());
    let mut started = Started::new(command, place.run(), &place.folder.path().join("start"));
    started.wait_for_round(1);
    fs::remove_file(&program).expect("removed");
    let trainer = started.wait_for_worker("trainer-1");
    let shown = fs::read(format!("/proc/{trainer}/cmdline")).expect("a process");
    assert!(
        shown.starts_with(program.as_os_str().as_encoded_bytes()),
        "a path that a person knows"
    );
    let name = fs::read_to_string(format!("/proc/{trainer}/comm")).expect("a process");
    assert_eq!(name.trim(), "lifl");
    signal(trainer, Signal::SIGKILL);
    started.wait_for("worker_replaced");
    started.wait().success();
}

/// `lifl run` of a short job with an own daemon and those variables, as a shell command's last part.
fn run_with(place: &Place, before: &str, variables: &[(&str, Option<&str>)]) -> Output {
    let run = place.command(&[]);
    let mut command = Command::new("sh");
    command
        .args(["-c", before, "sh"])
        .arg(run.get_program())
        .args(run.get_args());
    for (name, value) in variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.output().expect("started")
}

fn daemon_of(output: &Output) -> PathBuf {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut events = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let started = events
        .find(|event| event["event"] == "job_started")
        .expect("started");
    PathBuf::from(started["daemon"].as_str().expect("a path"))
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("NOT RUN: needs root");
        assert!(env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "needs root");
    }
    root
}

/// A job of nobody's, with a program that nobody may start.
fn nobodys() -> (Place, String) {
    let place = short();
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o777)).expect("set");
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_lifl"))
        .arg(place.folder.path().join("lifl"))
        .status();
    assert!(copied.expect("run").success());
    let before = "shift; exec setpriv --reuid=65533 --regid=65533 --clear-groups -- ./lifl \"$@\"";
    let enter = format!("cd {} && {before}", place.folder.path().display());
    (place, enter)
}

#[test]
fn where_the_folder_for_sockets_is_anothers_missing_or_too_long_another_is_taken() {
    if !is_root() {
        return;
    }
    let long = format!("/tmp/{}", "x".repeat(100));
    for (runtime, temporary) in [
        // As `su` and `sudo -u` leave it.
        (Some("/root"), None),
        (Some("/nowhere"), Some("/nowhere")),
        (None, Some("/proc")),
        (Some(long.as_str()), Some(long.as_str())),
    ] {
        let (place, before) = nobodys();
        let variables = [("XDG_RUNTIME_DIR", runtime), ("TMPDIR", temporary)];
        let output = run_with(&place, &before, &variables);
        let folder = daemon_of(&output).parent().expect("a folder").to_owned();
        assert_eq!(folder, Path::new("/tmp/lifl-65533"), "{variables:?}");
        let made = fs::metadata(&folder).expect("there").permissions().mode();
        assert_eq!(made & 0o777, 0o700);
    }
    // An own folder counts, whichever variable names it.
    let (place, before) = nobodys();
    let own = place.folder.path().join("own");
    fs::create_dir(&own).expect("made");
    std::os::unix::fs::chown(&own, Some(65533), Some(65533)).expect("given");
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o1777)).expect("set");
    let output = run_with(&place, &before, &[("XDG_RUNTIME_DIR", own.to_str())]);
    assert_eq!(daemon_of(&output).parent(), Some(own.join("lifl").as_path()));
    fs::remove_dir("/tmp/lifl-65533").expect("empty");
}

#[test]
fn root_has_another_place_where_run_is_read_only() {
    if !is_root() {
        return;
    }
    let place = short();
    let runtime = place.folder.path().join("runtime");
    fs::create_dir(&runtime).expect("made");
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o700)).expect("set");
    let before = "mount --bind /run /run && mount -o remount,ro,bind /run && exec \"$@\"";
    let private = format!("exec unshare -m sh -c '{before}' sh \"$@\"");
    let output = run_with(&place, &private, &[("XDG_RUNTIME_DIR", runtime.to_str())]);
    assert_eq!(daemon_of(&output).parent(), Some(runtime.join("lifl").as_path()));
}

#[test]
fn where_no_folder_can_be_had_each_is_named_with_its_variable_and_a_remedy() {
    if !is_root() {
        return;
    }
    let (place, _) = nobodys();
    // Read-only everything, and no runtime folder.
    let before = "for d in /run /tmp /dev/shm; do mount --bind $d $d && mount -o remount,ro,bind $d || exit 99; done; shift; \
                  cd \"$HERE\" && exec setpriv --reuid=65532 --regid=65532 --clear-groups -- ./lifl \"$@\"";
    let private = format!("exec unshare -m sh -c '{before}' sh \"$@\"");
    let variables = [
        ("XDG_RUNTIME_DIR", Some("/root")),
        ("TMPDIR", Some("/nowhere")),
        ("HERE", place.folder.path().to_str()),
    ];
    let output = run_with(&place, &private, &variables);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    for part in [
        "/root/lifl (of XDG_RUNTIME_DIR)",
        "/nowhere/lifl-65532 (of TMPDIR)",
        "/tmp/lifl-65532",
        "export XDG_RUNTIME_DIR=DIR",
    ] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn doctor_names_the_variable_behind_a_folder_that_cannot_be_had() {
    let output = lifl()
        .args(["doctor", "--json"])
        .env("XDG_RUNTIME_DIR", "/nowhere")
        .env("TMPDIR", "/nowhere")
        .output()
        .expect("started");
    let text = String::from_utf8_lossy(&output.stdout);
    let mut checks = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    let check = checks
        .find(|check| check["check"]["name"] == "socket folder")
        .expect("a check");
    let check = &check["check"];
    let first_is_had = nix::unistd::geteuid().is_root();
    let expected = if first_is_had { "ok" } else { "warn" };
    assert_eq!(check["state"], expected, "{check}");
    if !first_is_had {
        assert!(
            check["found"].to_string().contains("of XDG_RUNTIME_DIR"),
            "{check}"
        );
    }
}

/// A socket at which somebody listens who never answers: a daemon that is stopped.
fn deaf(path: &Path) -> OwnedFd {
    let listener = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    );
    let listener = listener.expect("a socket");
    bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("short")).expect("bound");
    listen(&listener, Backlog::new(16).expect("in range")).expect("listens");
    listener
}

#[test]
fn a_daemon_that_does_not_answer_is_named_by_every_command_that_asks_one() {
    let place = short();
    let folder = place.folder.path().join("lifl");
    fs::create_dir(&folder).expect("made");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("set");
    let path = folder.join("lifl.sock");
    let _listener = deaf(&path);
    let socket = path.to_str().expect("text");
    let job = place.job.to_str().expect("text");
    let begun = Instant::now();
    let start = |arguments: &[&str]| {
        let mut command = lifl();
        command
            .args(arguments)
            .env("XDG_RUNTIME_DIR", place.folder.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("started")
    };
    let asked = [
        (start(&["status", "--daemon", socket]), Some(3)),
        (start(&["status"]), Some(3)),
        (start(&["run", job, "--daemon", socket]), Some(3)),
        // Its state is that of all that is looked at.
        (start(&["doctor"]), None),
    ];
    for (child, code) in asked {
        let output = child.wait_with_output().expect("ended");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(
            code.is_none() || output.status.code() == code,
            "{:?}: {text}",
            output.status
        );
        let says = |part: &str| text.contains(part);
        assert!(
            says(socket) && says("has not answered") && says("restart"),
            "{text}"
        );
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
}

/// What a command does whose standard output or standard error is that file.
fn with_stream(arguments: &[&str], out: Option<&str>, err: Option<&str>) -> Option<i32> {
    let open = |path: Option<&str>| match path {
        Some(path) => Stdio::from(File::options().write(true).open(path).expect("open")),
        None => Stdio::null(),
    };
    let mut command = lifl();
    command.args(arguments).stdout(open(out)).stderr(open(err));
    command.status().expect("started").code()
}

const FULL: Option<&str> = Some("/dev/full");

#[test]
fn a_command_whose_answer_cannot_be_written_says_so_by_its_exit_code() {
    let place = short();
    let job = place.job.to_str().expect("text");
    let answers = [
        &["schema"][..],
        &["validate", job],
        &["validate", job, "--json"],
        &["plan", job],
        &["plan", job, "--json"],
        &["--help"],
        &["run", "--help"],
        &["--version"],
    ];
    for arguments in answers {
        assert_eq!(with_stream(arguments, FULL, None), Some(6), "{arguments:?}");
        assert_eq!(with_stream(arguments, FULL, FULL), Some(6), "{arguments:?}");
        assert_eq!(with_stream(arguments, None, FULL), Some(0), "{arguments:?}");
    }
    // What is wrong counts for more than that it cannot be said.
    let bad = place.folder.path().join("bad.json");
    fs::write(&bad, "{").expect("written");
    let bad = bad.to_str().expect("text");
    for arguments in [
        &["validate", bad][..],
        &["validate", bad, "--json"],
        &["run", bad],
        &["run", bad, "--json"],
        &["no-such-command"],
    ] {
        assert_eq!(with_stream(arguments, FULL, FULL), Some(2), "{arguments:?}");
    }
}

/// A pipe's writing end whose reader has gone.
fn dead_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    writer.into()
}

#[test]
fn a_reader_that_has_gone_ends_a_command_quietly() {
    let place = short();
    for arguments in [&["schema"][..], &["validate", place.job.to_str().expect("text")]] {
        let output = lifl()
            .args(arguments)
            .stdout(dead_pipe())
            .stderr(Stdio::piped())
            .output()
            .expect("started");
        assert_eq!(output.status.code(), Some(141), "{arguments:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{arguments:?}");
    }
}

#[test]
fn a_bench_whose_results_cannot_be_written_stops_and_says_so() {
    let arguments = ["bench", "aggregate", "--bytes", "1000000", "--updates", "2"];
    for more in [&[][..], &["--json"]] {
        let arguments = [&arguments[..], more].concat();
        assert_eq!(with_stream(&arguments, FULL, None), Some(6));
    }
}

/// The run's last event, as its folder has it.
fn last_event(place: &Place) -> serde_json::Value {
    let text = fs::read_to_string(place.run().join("metrics.jsonl")).expect("read");
    serde_json::from_str(text.lines().last().expect("a line")).expect("JSON")
}

#[test]
fn a_run_goes_on_and_ends_as_it_should_wherever_its_lines_go() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").expect("open"));
    let streams: [fn() -> Stdio; 2] = [dead_pipe, || {
        Stdio::from(File::options().write(true).open("/dev/full").expect("open"))
    }];
    for stream in streams {
        for json in [true, false] {
            let place = short();
            let mut command = place.command(&[]);
            if !json {
                command = lifl();
                command
                    .arg("run")
                    .arg(&place.job)
                    .args(["--daemon", "own", "--out"])
                    .arg(place.run());
            }
            // Each log line of the workers cannot be written either: their log is their own file.
            let status = command
                .stdout(stream())
                .stderr(stream())
                .status()
                .expect("started");
            assert_eq!(status.code(), Some(0), "json: {json}");
            assert_eq!(last_event(&place)["event"], "job_finished");
        }
    }
    // A run that fails keeps its code, and its last event.
    let mut job = Job::synthetic(&[1, 2], 100, "F32");
    job.rounds = 1_000_000;
    job.max_run_time = 2;
    let place = Place::new(&job.file());
    let status = place
        .command(&["--checkpoint-every", "0"])
        .stdout(full())
        .stderr(full())
        .status();
    assert_eq!(status.expect("started").code(), Some(5));
    let last = last_event(&place);
    assert_eq!(
        (&last["event"], &last["exit_code"]),
        (&"job_failed".into(), &5.into())
    );
}

#[test]
fn closed_streams_end_no_run() {
    let place = short();
    let run = place.command(&[]);
    let status = Command::new("sh")
        .args(["-c", "exec \"$@\" <&- >&- 2>&-", "sh"])
        .arg(run.get_program())
        .args(run.get_args())
        .status();
    assert_eq!(status.expect("started").code(), Some(0));
    assert_eq!(last_event(&place)["event"], "job_finished");
}

#[test]
fn a_pipe_that_nobody_reads_holds_no_run_up() {
    // Many more rounds' events than a pipe holds.
    let mut job = Job::synthetic(&[1, 1], 10, "F32");
    job.rounds = 500;
    let place = Place::new(&job.file());
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let mut command = place.command(&["--checkpoint-every", "0"]);
    let mut child = command
        .stdout(writer.try_clone().expect("another"))
        .stderr(writer)
        .spawn()
        .expect("started");
    drop(command);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child") {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("it waits for a reader");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    drop(reader);
    assert_eq!(status.code(), Some(0));
    assert_eq!(last_event(&place)["event"], "job_finished");
}

#[test]
fn a_slow_reader_gets_every_event() {
    let mut job = Job::synthetic(&[1, 1], 10, "F32");
    job.rounds = 500;
    let place = Place::new(&job.file());
    let mut command = place.command(&["--checkpoint-every", "0"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let mut reader = child.stdout.take().expect("a pipe");
    // It begins to read when the run is done with its rounds.
    let begun = Instant::now();
    while !place.run().join("model.safetensors").exists() {
        assert!(begun.elapsed() < PATIENCE, "no model");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    assert!(child.wait().expect("a child").success());
    let rounds = text
        .lines()
        .filter(|line| line.contains(r#""event":"round""#))
        .count();
    assert_eq!(rounds, 500);
}

#[test]
fn workers_outlive_a_limit_that_their_logs_have_reached() {
    let mut job = Job::synthetic(&[1, 2], 100, "F32");
    job.rounds = 1000;
    let place = Place::new(&job.file());
    let run = place.command(&["--checkpoint-every", "0"]);
    // A worker's log has a line for each round, with this more than its limit of 64 KiB; its memory file has less.
    let status = Command::new("bash")
        .args(["-c", "ulimit -f 64; exec \"$@\"", "bash"])
        .arg(run.get_program())
        .args(run.get_args())
        .env("RUST_LOG", "trace")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let log = fs::metadata(place.run().join("logs").join("trainer-1.log"))
        .expect("a log")
        .len();
    assert_eq!(log, 64 << 10, "the limit is reached");
    // Its metrics have no room either: what counts is the model.
    assert_eq!(status.expect("started").code(), Some(0));
    assert!(place.run().join("model.safetensors").exists());
}
