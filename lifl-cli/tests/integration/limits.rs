//! Runs where the system allows little: containers' memory, huge pages, processes, and resource limits.
//!
//! What cannot be is refused before anything starts, with exit code 3, the numbers, who sets the limit and how to raise it.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::{fs, process};

use crate::cgroup::Group;
use crate::support::node::Node;
use crate::support::{Job, Place, Started, lifl};
use serde_json::Value;

fn digits() -> Place {
    let mut job = Job::digits(&[1, 2], "softmax");
    job.rounds = 1;
    Place::new(&job.file())
}

/// What `lifl plan --json` says.
fn plan(place: &Place) -> Value {
    let planned = lifl()
        .arg("plan")
        .arg(&place.job)
        .arg("--json")
        .output()
        .expect("run");
    serde_json::from_slice(&planned.stdout).expect("a plan")
}

/// A command's end, within the time that a test has: its exit code and what it said.
fn end(place: &Place, command: Command) -> (Option<i32>, String) {
    let finished = Started::new(command, place.run(), &place.folder.path().join("start")).wait();
    (finished.code(), finished.stderr)
}

#[track_caller]
fn refused(place: &Place, command: Command, names: &[&str]) {
    let (code, said) = end(place, command);
    assert_eq!(code, Some(3), "{said}");
    for name in names {
        assert!(said.contains(name), "{name}: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    assert!(!place.run().exists(), "something was started");
}

#[test]
fn too_few_processes_are_refused_before_anything_starts() {
    let Some(group) = Group::new("pids") else { return };
    let place = digits();
    for most in [1, 2, 3, 4, 7, 10] {
        group.set("pids.max", "pids.max", most);
        let by = format!("pids.max of cgroup {} allows {most}", group.name());
        refused(
            &place,
            group.command("", &place.command(&[])),
            &[&by, "raise it", "TasksMax"],
        );
    }
}

/// What the plan says is enough, and one less is refused: no process or thread is forgotten.
#[test]
fn as_many_processes_as_the_plan_says_are_enough() {
    for (levels, lifl) in [(&[1, 2][..], "softmax"), (&[1, 2, 4], "mlp"), (&[1, 3], "")] {
        let Some(group) = Group::new("pids") else { return };
        let job = match lifl {
            // Larger than a chunk, so that aggregators have threads.
            "" => Job::synthetic(levels, 700_000, "F32"),
            model => Job::digits(levels, model),
        };
        let place = Place::new(&job.file());
        let tasks = plan(&place)["requirements"]["tasks"].as_u64().expect("a number");
        group.set("pids.max", "pids.max", tasks);
        refused(&place, group.command("", &place.command(&[])), &["pids.max"]);
        group.set("pids.max", "pids.max", tasks + 1);
        let (code, said) = end(&place, group.command("", &place.command(&[])));
        assert_eq!(code, Some(0), "{levels:?} {lifl}: {said}");
    }
}

#[test]
fn commands_that_look_need_no_more_than_a_thread() {
    let Some(group) = Group::new("pids") else { return };
    let place = digits();
    for most in 1..=3 {
        group.set("pids.max", "pids.max", most);
        for command in ["plan", "doctor", "status"] {
            let mut run = lifl();
            run.arg(command);
            if command == "plan" {
                run.arg(&place.job);
            }
            // Outside of the group, where it counts for nothing.
            let inner = group.command("", &run);
            let mut outer = Command::new("timeout");
            outer.arg("60").arg(inner.get_program()).args(inner.get_args());
            let output: Output = outer.output().expect("run");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                matches!(output.status.code(), Some(0 | 3)),
                "{command}: {output:?}"
            );
            assert!(!said.contains("panicked"), "{said}");
            if command == "doctor" {
                let found = String::from_utf8_lossy(&output.stdout);
                let by = format!("pids.max of cgroup {} allows {most}", group.name());
                assert!(found.contains(&by), "{found}");
            }
        }
    }
}

/// By another user than root, for whom the limit does not hold.
#[test]
fn a_users_limit_of_processes_is_refused_by_name() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("NOT RUN: only root can be another user");
        assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
        return;
    }
    let place = digits();
    // The user must reach the program and write beside the job.
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o777)).expect("set");
    let program = place.folder.path().join("lifl");
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_lifl"))
        .arg(&program)
        .status();
    assert!(copied.expect("run").success());
    let uid = 700_000_000 + process::id() % 1_000_000;
    for most in [1, 2, 5, 10] {
        let run = place.command(&[]);
        let mut command = Command::new("setpriv");
        command
            .args([
                &format!("--reuid={uid}"),
                "--regid=65534",
                "--clear-groups",
                "bash",
                "-c",
            ])
            .args([&format!("ulimit -u {most}; exec \"$@\""), "bash"])
            .arg(&program)
            .args(run.get_args())
            .env("TMPDIR", place.folder.path())
            .env_remove("XDG_RUNTIME_DIR");
        let by = format!("RLIMIT_NPROC of user {uid} allows {most}");
        refused(&place, command, &[&by, "ulimit -u"]);
    }
}

#[test]
fn more_memory_than_the_group_allows_is_refused_with_the_numbers() {
    let Some(group) = Group::new("memory") else { return };
    let place = Place::new(&Job::synthetic(&[1, 4], 10_000_000, "F32").file());
    group.set("memory.limit_in_bytes", "memory.max", 120 << 20);
    let by = format!("of cgroup {} allows 120 MiB", group.name());
    let command = group.command("", &place.command(&["--huge-pages", "never"]));
    refused(&place, command, &["the job needs up to", &by, "MemoryMax"]);

    let mut look = lifl();
    look.arg("plan").arg(&place.job);
    let planned = group.command("", &look).output().expect("run");
    let said = String::from_utf8_lossy(&planned.stdout);
    let line = said.lines().find(|line| line.starts_with("memory"));
    assert!(line.is_some_and(|line| line.contains(&by)), "{said}");

    // What fits runs, in a pool that is half of what the group leaves.
    let small = Place::new(&Job::synthetic(&[1, 2], 1_000_000, "F32").file());
    let (code, said) = end(
        &small,
        group.command("", &small.command(&["--huge-pages", "never"])),
    );
    assert_eq!(code, Some(0), "{said}");
}

/// A page beyond the limit would be a SIGBUS of the worker that touches it.
#[test]
fn huge_pages_beyond_the_groups_limit_are_ordinary_ones() {
    let Some(group) = Group::new("hugetlb") else {
        return;
    };
    let place = Place::new(&Job::synthetic(&[1, 3], 2_000_000, "F32").file());
    for (v1, v2) in [
        ("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"),
        ("hugetlb.2MB.rsvd.limit_in_bytes", "hugetlb.2MB.rsvd.max"),
    ] {
        for (mib, note) in [(0_u64, true), (10, true), (1024, false)] {
            group.set(v1, v2, mib << 20);
            let command = group.command("", &place.command(&["--huge-pages", "auto"]));
            let finished = Started::new(
                command,
                place.run(),
                &place.folder.path().join(format!("start-{mib}")),
            )
            .wait();
            assert_eq!(finished.code(), Some(0), "{v2} {mib} MiB: {}", finished.stderr);
            let started = finished.one("job_started");
            let why = started["page_note"].as_str().unwrap_or_default();
            assert_eq!(why.contains("hugetlb.2MB"), note, "{v2} {mib} MiB: {started}");
            fs::remove_dir_all(place.run()).expect("removed");
        }
        group.set(v1, v2, 1_u64 << 40);
    }
}

/// A system's daemon knows nothing of the workers' group.
#[test]
fn huge_pages_that_the_workers_group_does_not_allow_are_found_out_before_they_are_used() {
    let Some(group) = Group::new("hugetlb") else {
        return;
    };
    for (always, mib) in [(false, 0_u64), (false, 10), (true, 0)] {
        group.set("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max", mib << 20);
        let mut node = Node::start_with(None, always);
        node.wait_until_it_listens();
        let place = Place::new(&Job::synthetic(&[1, 3], 2_000_000, "F32").file());
        let command = group.command("", &place.command_at(&node.socket(), &[]));
        let finished = Started::new(command, place.run(), &place.folder.path().join("start")).wait();
        let said = format!("{always} {mib} MiB: {:#?} {}", finished.events, finished.stderr);
        if always {
            // A worker's own end, before the first round.
            assert_eq!(finished.code(), Some(3), "{said}");
            for part in ["before the first round", "hugetlb.2MB", "--huge-pages auto"] {
                assert!(said.contains(part), "{part}: {said}");
            }
        } else {
            assert_eq!(finished.code(), Some(0), "{said}");
            let why = finished.one("job_started")["page_note"].to_string();
            assert!(why.contains("hugetlb.2MB"), "{said}");
        }
        assert!(!said.contains("SIGBUS"), "{said}");
        node.wait_until_nothing_is_registered();
        node.end();
    }
}

#[test]
fn too_few_descriptors_are_refused_and_as_many_as_the_plan_says_are_enough() {
    let place = digits();
    let shell = |most: u64| {
        let run = place.command(&[]);
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("ulimit -n {most}; exec \"$@\""), "bash"])
            .arg(run.get_program())
            .args(run.get_args());
        command
    };
    for most in [6, 8, 12, 20, 30, 40] {
        let by = format!("RLIMIT_NOFILE allows {most}");
        refused(&place, shell(most), &[&by, "LimitNOFILE"]);
    }
    let enough = plan(&place)["requirements"]["descriptors"]
        .as_u64()
        .expect("a number");
    let (code, said) = end(&place, shell(enough));
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_process_that_may_not_map_enough_is_refused() {
    let place = Place::new(&Job::synthetic(&[1, 2], 30_000_000, "F32").file());
    for (limit, name) in [("-v 400000", "RLIMIT_AS"), ("-d 4000", "RLIMIT_DATA")] {
        let run = place.command(&[]);
        let mut command = Command::new("bash");
        command
            .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "bash"])
            .arg(run.get_program())
            .args(run.get_args());
        refused(&place, command, &[name, "raise it"]);
    }
}
