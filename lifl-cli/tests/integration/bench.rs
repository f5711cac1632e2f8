//! `lifl bench`, with as little as it takes: what it counts must be right, whatever the clock says.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{PATIENCE, can_have, lifl, signal};

/// Runs a bench to its end; gives its lines.
fn bench(arguments: &[&str]) -> Vec<Value> {
    let output = lifl()
        .arg("bench")
        .args(arguments)
        .arg("--json")
        .output()
        .expect("run");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect()
}

/// The results among the lines; each has what every result has.
fn results(lines: &[Value]) -> Vec<&Value> {
    let results: Vec<&Value> = lines.iter().filter(|line| line["event"] == "bench").collect();
    for result in &results {
        let seconds = |name: &str| result["seconds"][name].as_f64().expect(name);
        assert!(seconds("median") > 0.0, "{result}");
        let order = ["min", "median", "p99", "p999", "max"].map(seconds);
        assert!(order.is_sorted(), "{result}");
        assert!(result["seconds"]["runs"].as_u64() > Some(0), "{result}");
        assert!(
            result["cpu_seconds"].as_f64().is_none_or(|cpu| cpu >= 0.0),
            "{result}"
        );
    }
    results
}

#[test]
fn folds_are_measured_against_reading() {
    let arguments = "aggregate --bytes 80000 --updates 2,3 --dtype f32,bf16 --threads 1";
    let lines = bench(&arguments.split(' ').collect::<Vec<_>>());
    let memory: Vec<&Value> = lines.iter().filter(|line| line["event"] == "memory").collect();
    assert_eq!(memory.len(), 2, "{lines:#?}");
    let results = results(&lines);
    assert_eq!(results.len(), 2 * 2 * 3);
    for (n, result) in results.into_iter().enumerate() {
        let read = memory[n / 6]["read_bytes_per_second"].as_f64().expect("a speed");
        let updates = result["case"]["updates"].as_u64().expect("a number");
        let moved = result["bytes_moved"].as_u64().expect("bytes");
        assert_eq!(moved, updates * 80_000);
        let seconds = result["seconds"]["median"].as_f64().expect("seconds");
        let share = result["share_of_read"].as_f64().expect("a share");
        assert!(
            (share * seconds * read / moved as f64 - 1.0).abs() < 1e-9,
            "{result}"
        );
    }
}

#[test]
fn what_memory_does_not_allow_is_said_and_left_out() {
    for what in ["aggregate", "handoff", "round"] {
        let arguments = match what {
            "handoff" => vec![what, "--bytes", "1000000000000000", "--frames", "0"],
            _ => vec![what, "--bytes", "1000000000000000"],
        };
        let lines = bench(&arguments);
        let skipped = lines.iter().find(|line| line["event"] == "skipped").expect(what);
        assert!(
            skipped["why"]
                .as_str()
                .is_some_and(|why| why.contains("can be had")),
            "{skipped}"
        );
        assert!(results(&lines).is_empty());
    }
}

#[test]
fn updates_are_handed_over_in_every_way() {
    let arguments = "handoff --bytes 100000 --count 40 --frames 2000";
    let lines = bench(&arguments.split(' ').collect::<Vec<_>>());
    let results = results(&lines);
    let of = |via: &str, stream: bool| -> Vec<&Value> {
        let is = |result: &&&Value| {
            result["case"]["via"] == via && result["case"].get("stream").is_some() == stream
        };
        results.iter().filter(is).copied().collect()
    };
    let kernel = can_have("sockmap");
    for (via, needs_kernel, bytes) in [
        ("bare", true, 64),
        ("sockmap", true, 64),
        ("sockmap-spinning", true, 64),
        ("relay", false, 64),
        ("unix", false, 100_000),
        ("tcp", false, 100_000),
    ] {
        let found = of(via, false);
        assert_eq!(found.len(), usize::from(kernel || !needs_kernel), "{via}");
        for result in found {
            assert_eq!(result["seconds"]["runs"], 40, "{result}");
            assert_eq!(result["bytes_moved"], bytes, "{result}");
            let back = result["round_trip_seconds"].as_f64();
            assert!(back > result["seconds"]["min"].as_f64(), "{result}");
        }
    }
    for (via, needs_kernel) in [("sockmap", true), ("relay", false)] {
        let senders: Vec<&Value> = of(via, true)
            .into_iter()
            .map(|result| &result["case"]["stream"])
            .collect();
        let expected: &[u64] = if kernel || !needs_kernel { &[1, 8] } else { &[] };
        assert_eq!(senders, expected, "{via}");
    }
}

#[test]
fn rounds_say_where_their_time_goes() {
    let arguments =
        "round --bytes 40000 --trainers 4 --levels 2 --rounds 4 --timing lazy --plane relay --fan-out 2";
    let lines = bench(&arguments.split(' ').collect::<Vec<_>>());
    let results = results(&lines);
    assert_eq!(results.len(), 1, "{lines:#?}");
    let result = results[0];
    // 4 models read and 4 updates written by trainers; 4 read and 2 written by leaves; 2 read and 1 written by the top.
    assert_eq!(result["bytes_moved"], 17 * 40_000);
    assert_eq!(result["seconds"]["runs"], 3);
    let done = |role: &str| result["critical_path"][role].as_f64().expect(role);
    let path = [done("trainer"), done("leaf-aggregator"), done("top-aggregator")];
    assert!(path.is_sorted() && path[0] > 0.0, "{result}");
    let peak = result["peak_memory_bytes"].as_u64().expect("bytes");
    assert!(Some(peak) <= result["planned_bytes"].as_u64(), "{result}");
}

#[test]
fn workers_and_starts_are_counted() {
    let arguments = "scale --trainers 3,6 --fan-out 3 --rounds 4 --plane relay";
    let lines = bench(&arguments.split(' ').collect::<Vec<_>>());
    let results = results(&lines);
    let cases: Vec<&Value> = results.iter().map(|result| &result["case"]).collect();
    let jobs: Vec<&Value> = cases.iter().filter_map(|case| case.get("trainers")).collect();
    assert_eq!(jobs, [3, 6]);
    let workers: Vec<&Value> = cases
        .iter()
        .filter(|case| case.get("trainers").is_some())
        .map(|case| &case["workers"])
        .collect();
    assert_eq!(workers, [5, 9]);
    for result in results
        .iter()
        .filter(|result| result["case"].get("trainers").is_some())
    {
        for name in ["per_worker_seconds", "bare_per_worker_seconds"] {
            assert!(
                result[name].as_f64().is_some_and(|seconds| seconds > 0.0),
                "{name}"
            );
        }
    }
    for start in ["job", "worker"] {
        assert!(cases.iter().any(|case| case["start"] == start), "{start}");
    }
    for idle in ["daemon", "workers"] {
        assert!(cases.iter().any(|case| case["idle"] == idle), "{idle}");
    }
}

#[test]
fn an_interrupted_bench_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut bench = Command::new(env!("CARGO_BIN_EXE_lifl"))
        .args([
            "bench", "round", "--bytes", "40000", "--rounds", "1000000", "--json",
        ])
        .env("TMPDIR", folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let mark = folder.path().to_string_lossy().into_owned();
    let begun = Instant::now();
    // The job's workers, of which there are fifteen.
    while mentioned(&mark) < 15 {
        assert!(begun.elapsed() < PATIENCE, "the job does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(i32::try_from(bench.id()).expect("a pid"), Signal::SIGTERM);
    let status = bench.wait().expect("a child");
    assert_eq!(status.code(), Some(130));
    assert_eq!(mentioned(&mark), 0, "processes are left");
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
}

/// Processes whose command line has that in it.
fn mentioned(mark: &str) -> usize {
    let processes = fs::read_dir("/proc").expect("proc").flatten();
    let has_it = |line: Vec<u8>| String::from_utf8_lossy(&line).contains(mark);
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.filter(|line| has_it(line.clone())).count()
}
