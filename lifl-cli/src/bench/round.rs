//! Whole rounds of a tree with synthetic trainers, as `lifl run` runs them.
//!
//! `seconds` is a round, from the coordinator's first frame to the top's new model; the first round, which touches all memory
//! for the first time, stands by itself (`first_seconds`). `bytes_moved` is what must be read and written: a trainer reads
//! the model and writes its update, an aggregator reads its children's and writes its own. `floor_seconds` is what
//! that takes at the memory's read bandwidth, `times_floor` the round in that measure. `critical_path` says when
//! the last of each level was done.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lifl_common::config::{self, JobSpec, Overrides};
use lifl_common::update::DType;
use serde_json::{Map, Value, json};

use super::machine::TreeCpu;
use super::report::{Measured, Reporter, Seconds};
use super::{RoundArgs, RoundTiming, Scene, machine};
use crate::memory::Plan;

/// How often a job's processes are looked at, at the most; what share of the time that may take, since a look at a thousand
/// takes a while; and how long they are watched at the least for what that says to mean something.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOK_SHARE: u32 = 10;
const SHORTEST_WATCH: Duration = Duration::from_millis(100);

/// Roles from the top down.
const ROLES: [&str; 3] = ["top-aggregator", "middle-aggregator", "leaf-aggregator"];

pub(super) fn run(args: &RoundArgs, scene: &Scene, reporter: &mut Reporter<'_>) -> anyhow::Result<()> {
    for &bytes in &args.bytes {
        for &trainers in &args.trainers {
            for &levels in &args.levels {
                for &timing in &args.timing {
                    scene.check()?;
                    let timing = match timing {
                        RoundTiming::Lazy => "lazy",
                        RoundTiming::Eager => "eager",
                    };
                    let tree = tree(trainers, levels, args.fan_out);
                    let case = json!({
                        "bytes": bytes, "dtype": args.dtype.to_string(), "trainers": trainers, "levels": levels,
                        "timing": timing,
                    });
                    let parameters = (bytes / args.dtype.bytes() as u64).max(1);
                    let job = Job::write(scene, &tree, parameters, args.dtype, timing, args.rounds)?;
                    let room = machine::available_bytes();
                    if job.plan.pool_bytes + job.plan.private_bytes > room {
                        let needed = job.plan.pool_bytes + job.plan.private_bytes;
                        reporter.skipped(
                            "round",
                            &case,
                            &format!("{needed} bytes needed, {room} can be had"),
                        );
                        continue;
                    }
                    // Anew for each: what a virtual machine is given changes.
                    let read = machine::probe()?;
                    reporter.memory(machine::cores(), read);
                    let ran = job.run(scene, args.plane, args.rounds)?;
                    reporter.result(measured(case, &job, &tree, bytes, read, &ran));
                }
            }
        }
    }
    Ok(())
}

/// How many workers each level has, from the top to the trainers.
pub(super) fn tree(trainers: u32, levels: u32, fan_out: u32) -> Vec<u32> {
    let mut tree = vec![trainers.max(1)];
    for level in 0..levels {
        let below = tree[0];
        let last = level + 1 == levels;
        tree.insert(0, if last { 1 } else { below.div_ceil(fan_out) });
    }
    tree
}

/// Objects that a round of that tree reads and writes.
fn objects(tree: &[u32]) -> u64 {
    let trainers = u64::from(*tree.last().unwrap_or(&0));
    let aggregators: u64 = tree.iter().rev().skip(1).map(|&level| u64::from(level)).sum();
    // Whoever is not the top is read once, and everybody but a trainer has read all below.
    let read_by_parents = trainers + aggregators - 1;
    2 * trainers + read_by_parents + aggregators
}

fn measured(case: Value, job: &Job, tree: &[u32], bytes: u64, read: f64, ran: &Ran) -> Measured {
    let bytes_moved = objects(tree) * bytes;
    let floor = bytes_moved as f64 / read;
    let planned = job.plan.pool_bytes + job.plan.private_bytes;
    let seconds = Seconds::of(ran.rounds.clone());
    let mut more = Map::new();
    let mut add = |name: &str, value: Value| more.insert(name.to_owned(), value);
    add("first_seconds", ran.first_round.into());
    add("floor_seconds", floor.into());
    add("times_floor", (seconds.median / floor).into());
    add("start_seconds", ran.start.into());
    add("planned_bytes", planned.into());
    add("critical_path", ran.critical_path.clone());
    add("plane", ran.plane.clone().into());
    Measured {
        bench: "round",
        case,
        share_of_read: Some(bytes_moved as f64 / seconds.median / read),
        bytes_moved,
        cpu_seconds: ran.cpu_seconds,
        peak_memory_bytes: ran.peak_memory_bytes,
        seconds,
        more,
    }
}

pub(super) struct Job {
    path: PathBuf,
    pub(super) spec: JobSpec,
    plan: Plan,
}

impl Job {
    /// Of a tree with synthetic trainers.
    pub(super) fn write(
        scene: &Scene,
        tree: &[u32],
        parameters: u64,
        dtype: DType,
        timing: &str,
        rounds: u32,
    ) -> anyhow::Result<Self> {
        let aggregators = tree.len() - 1;
        // One level of aggregators is the top, two are top and leaves.
        let names: Vec<&str> = match aggregators {
            2 => vec![ROLES[0], ROLES[2]],
            levels => ROLES[..levels].to_vec(),
        };
        let names: Vec<&str> = names.into_iter().chain(["trainer"]).collect();
        let channels: Vec<Value> = names
            .windows(2)
            .enumerate()
            .map(|(n, pair)| {
                json!({
                    "name": format!("channel-{n}"),
                    "pair": pair,
                    "groupBy": { "type": "tag", "value": ["default"] },
                    "funcTags": { pair[0]: ["distribute", "aggregate"], pair[1]: ["fetch", "upload"] },
                })
            })
            .collect();
        let roles: Vec<Value> = names
            .iter()
            .zip(tree)
            .map(|(name, replica)| {
                json!({ "name": name, "replica": replica, "isDataConsumer": *name == "trainer" })
            })
            .collect();
        let file = json!({
            "job": { "id": "bench", "name": "bench" },
            "backend": "shm",
            "roles": roles,
            "channels": channels,
            "hyperparameters": { "rounds": rounds },
            "maxRunTime": 3600,
            "lifl": {
                "model": { "synthetic": { "parameters": parameters, "dtype": dtype.to_string() } },
                "timing": timing,
            },
        });
        let path = scene.folder().join("job.json");
        std::fs::write(&path, serde_json::to_vec_pretty(&file)?)?;
        let spec = config::load(std::slice::from_ref(&path), &Overrides::default())?.job;
        let schema = lifl_learn::schema(&spec.model)?;
        let plan = Plan::new(&spec, &schema, true);
        Ok(Self { path, spec, plan })
    }

    /// Runs so many rounds of it with a daemon of its own, to its end.
    pub(super) fn run(
        &self,
        scene: &Scene,
        plane: lifl_daemon::plane::Request,
        rounds: u32,
    ) -> anyhow::Result<Ran> {
        let out = scene.folder().join("run");
        let plane = clap::ValueEnum::to_possible_value(&plane).context("a plane without a name")?;
        let mut command = scene.lifl(&["run"])?;
        command
            .arg(&self.path)
            .args([
                "--json",
                "--daemon",
                "own",
                "--checkpoint-every",
                "0",
                "--plane",
                plane.get_name(),
            ])
            .args(["--rounds", &rounds.to_string()])
            .arg("--out")
            .arg(&out)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let begun = Instant::now();
        let mut child = scene.spawn(&mut command)?;
        let lines = child.child.stdout.take().context("no standard output")?;
        let mut ran = Ran::default();
        let mut watch = Watch::default();
        let mut last = None;
        for line in BufReader::new(lines).lines() {
            let event: Value = serde_json::from_str(&line?).context("an event is not JSON")?;
            let number = |name: &str| event[name].as_f64().unwrap_or(0.0);
            match event["event"].as_str() {
                Some("job_started") => {
                    ran.start = begun.elapsed().as_secs_f64();
                    ran.plane = event["plane"].as_str().unwrap_or_default().to_owned();
                }
                Some("round") if event["round"] == 1 => {
                    ran.first_round = number("seconds");
                    watch.begin(child.pid());
                }
                Some("round") => {
                    ran.rounds.push(number("seconds"));
                    ran.levels.push(event["levels"].clone());
                    last = Some(Instant::now());
                }
                Some("job_finished") => ran.peak_memory_bytes = number("peak_memory_bytes") as u64,
                _ => {}
            }
        }
        child.wait()?;
        remove(&out)?;
        ran.cpu_seconds = watch.end(last, ran.rounds.len());
        ensure!(
            ran.rounds.len() + 1 == rounds as usize,
            "the job had {} rounds more than its first, not {}",
            ran.rounds.len(),
            rounds - 1
        );
        ran.critical_path = critical_path(&ran.levels);
        Ok(ran)
    }
}

fn remove(folder: &Path) -> anyhow::Result<()> {
    std::fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

/// What came of a job.
#[derive(Default)]
pub(super) struct Ran {
    /// From the command to all workers' being ready.
    pub(super) start: f64,
    pub(super) plane: String,
    pub(super) first_round: f64,
    /// The others.
    pub(super) rounds: Vec<f64>,
    levels: Vec<Value>,
    /// User and system time of such a round, of all processes; `None` if they were over too soon to tell.
    pub(super) cpu_seconds: Option<f64>,
    pub(super) peak_memory_bytes: u64,
    /// By role: the median of when the last was done.
    critical_path: Value,
}

/// Watches from the side what a job's processes use: how fast their CPU time grows while rounds run, since a look at all of them may
/// take longer than a round.
#[derive(Default)]
struct Watch {
    begun: Option<Instant>,
    looking: Option<JoinHandle<Vec<(Instant, TreeCpu)>>>,
    stop: Arc<AtomicBool>,
}

impl Watch {
    fn begin(&mut self, root: u32) {
        self.begun = Some(Instant::now());
        let looking = std::thread::Builder::new().spawn({
            let stop = Arc::clone(&self.stop);
            move || {
                let mut seen: Vec<(Instant, TreeCpu)> = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begun = Instant::now();
                    let used = machine::cpu_of_tree(root);
                    // Those who have left take with them what they have used; of a thousand, a few may.
                    let gone = |first: &TreeCpu| first.processes.saturating_sub(used.processes);
                    if seen
                        .first()
                        .is_some_and(|(_, first)| gone(first) > first.processes / 100)
                    {
                        break;
                    }
                    seen.push((Instant::now(), used));
                    std::thread::park_timeout(LOOK_EVERY.max(begun.elapsed() * LOOK_SHARE));
                }
                seen
            }
        });
        // Without a thread for it nothing is said of processors.
        self.looking = looking.ok();
    }

    /// What a round took, of so many until `last`.
    fn end(self, last: Option<Instant>, rounds: usize) -> Option<f64> {
        let looking = self.looking?;
        self.stop.store(true, Ordering::Relaxed);
        looking.thread().unpark();
        let seen = looking.join().ok()?;
        let ((from, first), (to, then)) = (seen.first()?, seen.last()?);
        let watched = to.duration_since(*from);
        if watched < SHORTEST_WATCH {
            return None;
        }
        let round = last?.duration_since(self.begun?).as_secs_f64() / rounds as f64;
        Some((then.seconds - first.seconds) / watched.as_secs_f64() * round)
    }
}

fn critical_path(rounds: &[Value]) -> Value {
    let mut roles: Vec<(String, Vec<f64>)> = Vec::new();
    for level in rounds.iter().filter_map(Value::as_array).flatten() {
        let (Some(role), Some(seconds)) = (level["role"].as_str(), level["seconds"].as_f64()) else {
            continue;
        };
        match roles.iter_mut().find(|(known, _)| known == role) {
            Some((_, times)) => times.push(seconds),
            None => roles.push((role.to_owned(), vec![seconds])),
        }
    }
    let medians = roles
        .into_iter()
        .map(|(role, times)| (role, Seconds::of(times).median.into()));
    Value::Object(medians.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trees_have_their_levels() {
        assert_eq!(tree(8, 1, 2), [1, 8]);
        assert_eq!(tree(8, 2, 2), [1, 4, 8]);
        assert_eq!(tree(8, 3, 2), [1, 2, 4, 8]);
        assert_eq!(tree(9, 3, 3), [1, 1, 3, 9]);
    }

    #[test]
    fn every_object_that_moves_is_counted() {
        // 8 models read, 8 updates written; read by 4 leaves, which write 4; read by 2, which write 2; read by the top, which
        // writes 1.
        assert_eq!(objects(&[1, 2, 4, 8]), 8 + 8 + 8 + 4 + 4 + 2 + 2 + 1);
        assert_eq!(objects(&[1, 2]), 2 + 2 + 2 + 1);
    }
}
