//! Many workers: what each costs in a round whose model weighs nothing, and how long things take to start.
//!
//! A job of two levels: trainers, leaves of `--fan-out` children, the top. `seconds` is a round;
//! `per_worker_seconds` and `cpu_per_worker_seconds` are wall and CPU time of a round, divided by all workers. `start_seconds` is
//! from the command to all workers' being ready.
//!
//! `bare_per_worker_seconds` is the least that as many processes cost on this machine: each, asleep in `read`, is woken by as
//! many bytes as a frame has, and answers. How that grows with their number is what none of ours can be spared.
//!
//! The starts: `daemon` until it answers, `worker` until it has said that it can begin, `job` from the command to the first round's
//! begin. `idle` is what a daemon and its workers use in a second in which there is nothing to do.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lifl_common::client::{Client, Registration};
use lifl_common::control::paths;
use lifl_common::frame::Frame;
use lifl_common::runtime::{self, Threads};
use lifl_common::update::DType;
use lifl_daemon::plane::Request;
use lifl_daemon::pool::HugePages;
use serde_json::{Map, Value, json};
use tokio::runtime::Builder;

use super::report::{Measured, Reporter, Seconds};
use super::round::{Job, tree};
use super::{Actor, ScaleArgs, Scene, echo, machine};
use crate::coordinate::daemon::{DaemonChoice, Node, NodeOptions};
use crate::task::Tasks;

/// How often a start is measured.
const STARTS: usize = 15;

/// How long idleness is watched.
const IDLE: Duration = Duration::from_secs(5);

/// Workers of the smallest job.
const FEW: u32 = 8;

pub(super) fn run(args: &ScaleArgs, scene: &Scene, reporter: &mut Reporter<'_>) -> anyhow::Result<()> {
    starts(args, scene, reporter)?;
    for &trainers in &args.trainers {
        scene.check()?;
        let leaves = trainers.div_ceil(args.fan_out);
        let tree = [1, leaves, trainers];
        let job = Job::write(scene, &tree, args.parameters, DType::F32, "lazy", args.rounds)?;
        let processes: u32 = tree.iter().sum();
        let workers = f64::from(processes);
        let bare = bare(processes, args.rounds, scene)?;
        let ran = job.run(scene, args.plane, args.rounds)?;
        let seconds = Seconds::of(ran.rounds.clone());
        let mut more = Map::new();
        let mut add = |name: &str, value: Option<f64>| more.insert(name.to_owned(), value.into());
        add("per_worker_seconds", Some(seconds.median / workers));
        add("cpu_per_worker_seconds", ran.cpu_seconds.map(|cpu| cpu / workers));
        add("bare_per_worker_seconds", Some(bare.median / workers));
        add("first_seconds", Some(ran.first_round));
        add("start_seconds", Some(ran.start));
        reporter.result(Measured {
            bench: "scale",
            case: json!({ "workers": processes, "trainers": trainers, "plane": ran.plane }),
            seconds,
            bytes_moved: 0,
            share_of_read: None,
            cpu_seconds: ran.cpu_seconds,
            peak_memory_bytes: ran.peak_memory_bytes,
            more,
        });
    }
    Ok(())
}

/// So many processes, all woken and all heard again, so often.
fn bare(processes: u32, rounds: u32, scene: &Scene) -> anyhow::Result<Seconds> {
    let mut sockets = Vec::new();
    let mut children = Vec::new();
    for _ in 0..processes {
        let (near, far) =
            UnixStream::pair().context("no socket for a process: `ulimit -n` may be too low")?;
        let mut command = scene.lifl(&["echo", "bare"])?;
        command.stdin(OwnedFd::from(far)).stdout(Stdio::null());
        children.push(scene.spawn(&mut command)?);
        sockets.push(near);
    }
    let mut message = [0; Frame::BYTES];
    let mut seconds = Vec::new();
    // In the first, each comes to its first read.
    for _ in 0..=rounds {
        scene.check()?;
        let begun = Instant::now();
        for socket in &mut sockets {
            socket.write_all(&message)?;
        }
        for socket in &mut sockets {
            ensure!(echo::read_whole(socket, &mut message)?, "a process is gone");
        }
        seconds.push(begun.elapsed().as_secs_f64());
    }
    drop(sockets);
    children.into_iter().try_for_each(Actor::wait)?;
    Ok(Seconds::of(seconds.split_off(1)))
}

fn starts(args: &ScaleArgs, scene: &Scene, reporter: &mut Reporter<'_>) -> anyhow::Result<()> {
    // Another program, which lies beside this one.
    let program = std::env::current_exe().context("this program has no path: mount /proc")?;
    let daemon = program.with_file_name("lifl-daemon");
    let case = json!({ "start": "daemon" });
    if daemon.exists() {
        let mut seconds = Vec::new();
        for _ in 0..STARTS {
            seconds.push(start_daemon(&daemon, args.plane, scene)?);
        }
        reporter.result(started(case, seconds));
    } else {
        let why = format!(
            "no {}: cargo build --release --package lifl-daemon",
            daemon.display()
        );
        reporter.skipped("scale", &case, &why);
    }
    let tree = tree(FEW, 2, 2);
    let job = Job::write(scene, &tree, args.parameters, DType::F32, "lazy", 2)?;
    let mut seconds = Vec::new();
    for _ in 0..STARTS {
        seconds.push(job.run(scene, args.plane, 1)?.start);
    }
    let workers = tree.iter().sum::<u32>();
    reporter.result(started(json!({ "start": "job", "workers": workers }), seconds));
    start_workers(&job, args.plane, scene, reporter)
}

fn started(case: Value, seconds: Vec<f64>) -> Measured {
    Measured {
        bench: "scale",
        case,
        seconds: Seconds::of(seconds),
        bytes_moved: 0,
        share_of_read: None,
        cpu_seconds: None,
        peak_memory_bytes: 0,
        more: Map::new(),
    }
}

/// From a daemon's start to its first answer.
fn start_daemon(daemon: &Path, plane: Request, scene: &Scene) -> anyhow::Result<f64> {
    let socket = scene.folder().join("lifl.sock");
    let plane = clap::ValueEnum::to_possible_value(&plane).context("a plane without a name")?;
    let mut command = std::process::Command::new(daemon);
    command
        .arg("--socket")
        .arg(&socket)
        .args(["--no-flame", "--no-pin", "--plane", plane.get_name()])
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let begun = Instant::now();
    let mut child = scene.spawn(&mut command)?;
    let answered = runtime.block_on(async {
        loop {
            match Client::connect(&socket).await {
                Ok(_) => break Ok(begun.elapsed().as_secs_f64()),
                Err(error) if begun.elapsed() > Duration::from_secs(30) => break Err(error),
                Err(_) => tokio::time::sleep(Duration::from_micros(500)).await,
            }
        }
    });
    child.end();
    Ok(answered?)
}

/// From a worker's start to its word that it can begin, with a daemon that is there; and what all of it uses while nothing is
/// done.
fn start_workers(
    job: &Job,
    plane: Request,
    scene: &Scene,
    reporter: &mut Reporter<'_>,
) -> anyhow::Result<()> {
    let out = scene.folder().join("workers");
    std::fs::create_dir(&out)?;
    Tasks::of(&job.spec).write(&out)?;
    let runtime = runtime::start(
        Threads {
            workers: 1,
            blocking: 1,
            most_blocking: 64,
            spare: 0,
        },
        || {},
    )?;
    let options = NodeOptions {
        daemon: DaemonChoice::Own,
        plane,
        pool_bytes: None,
        huge_pages: HugePages::Auto,
        workers: 64,
        insecure: false,
    };
    let mut node = runtime
        .block_on(Node::find(&options))
        .map_err(|failure| failure.error)?;
    let socket = paths::own_daemon(std::process::id())?.display().to_string();
    let (id, mut me) = runtime.block_on(async {
        let id = node.client.create_job("bench").await?;
        let me = node.client.register(id, "coordinator", "coordinator").await?;
        anyhow::Ok((id, me))
    })?;
    let mut children = Vec::new();
    let mut seconds = Vec::new();
    for worker in job.spec.trainers() {
        let number = id.0.to_string();
        let run = out.display().to_string();
        let arguments = [
            "worker",
            "--socket",
            &socket,
            "--job",
            &number,
            "--run",
            &run,
            "--name",
            &worker.name,
        ];
        let mut command = scene.lifl(&arguments)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let begun = Instant::now();
        children.push(scene.spawn(&mut command)?);
        runtime.block_on(ready(&mut me))?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    reporter.result(started(json!({ "start": "worker" }), seconds));
    idle(&children, reporter);
    runtime.block_on(node.client.end_job("the bench is done"))?;
    children.into_iter().try_for_each(Actor::wait)?;
    drop(me);
    runtime.block_on(node.stop())?;
    Ok(std::fs::remove_dir_all(out)?)
}

async fn ready(me: &mut Registration) -> anyhow::Result<()> {
    let ready = tokio::time::timeout(Duration::from_secs(30), me.frames.recv()).await;
    ready
        .context("the worker does not come")??
        .context("the daemon is gone")?;
    Ok(())
}

/// What the daemon, which is in this process, and the workers use while there is nothing to do.
fn idle(workers: &[Actor<'_>], reporter: &mut Reporter<'_>) {
    let of_workers = || {
        let used = workers.iter().map(|worker| machine::used_by(worker.pid()));
        used.fold((0.0, 0), |(cpu, switches), used| {
            (cpu + used.cpu_seconds, switches + used.switches)
        })
    };
    let of_daemon = || {
        let used = machine::used_by(std::process::id());
        (used.cpu_seconds, used.switches)
    };
    let before = [of_daemon(), of_workers()];
    std::thread::sleep(IDLE);
    let after = [of_daemon(), of_workers()];
    for (who, (before, after)) in ["daemon", "workers"]
        .into_iter()
        .zip(before.into_iter().zip(after))
    {
        let watched = IDLE.as_secs_f64();
        let mut more = Map::new();
        more.insert(
            "wakeups_per_s".to_owned(),
            ((after.1 - before.1) as f64 / watched).into(),
        );
        reporter.result(Measured {
            bench: "scale",
            case: json!({ "idle": who, "workers": workers.len() }),
            seconds: Seconds::of(vec![watched]),
            bytes_moved: 0,
            share_of_read: None,
            cpu_seconds: Some((after.0 - before.0) / watched),
            peak_memory_bytes: 0,
            more,
        });
    }
}
