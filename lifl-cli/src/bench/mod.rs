//! `lifl bench`: what this machine does with what LIFL does, beside what its memory could do.
//!
//! One file for each bench: `handoff` (a reference from one process to another), `aggregate` (folding), `round` (whole jobs),
//! `scale` (many workers, and starts). `echo` is the other process of a hand-over, `machine` reads the memory and the
//! processes' accounts, `report` prints.
//!
//! Every figure is measured in this run. Shares are of the read bandwidth that the same run has measured, with as many
//! threads; nothing else is comparable between machines, or on one that others use.

mod aggregate;
mod echo;
mod handoff;
mod machine;
mod report;
mod round;
mod scale;

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use lifl_common::control::paths::MAX_PATH_BYTES;
use lifl_common::update::DType;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub(crate) use echo::{EchoArgs, echo};
use report::Reporter;

use crate::exit::{Because, Cause, Outcome};
use crate::program;

/// Sizes that mean something: 1 MB, ResNet-18, -34 and -152 in 32-bit floats, and 3.4 GB.
const SIZES: &str = "1000000,44000000,83000000,232000000,3400000000";

/// How long a child has to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to measure.
#[derive(Subcommand, Clone, Debug)]
pub(crate) enum Bench {
    /// One update from a process to another: by reference through the sockmap and the relay, and byte by byte through a Unix
    /// socket and TCP on the loopback; then frames as fast as they go
    Handoff(HandoffArgs),
    /// Folding updates into one, beside reading them
    Aggregate(AggregateArgs),
    /// Whole rounds of a tree with synthetic trainers
    Round(RoundArgs),
    /// Jobs of more and more workers, and how long daemon, worker and job take to start
    Scale(ScaleArgs),
}

/// See [`handoff`].
#[derive(Args, Clone, Debug)]
pub(crate) struct HandoffArgs {
    /// Sizes of the update, in bytes
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    bytes: Vec<u64>,
    /// References handed over for each size and way; what takes long is measured less often
    #[arg(long, value_name = "N", default_value_t = 4000, value_parser = clap::value_parser!(u32).range(10..))]
    count: u32,
    /// Measure the sockmap a second time with both ends looking for frames for so long before they sleep; 0 for not
    #[arg(long, value_name = "MICROS", default_value_t = 50)]
    spin: u32,
    /// Frames of the streams; 0 for no streams
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    frames: u32,
}

/// See [`aggregate`].
#[derive(Args, Clone, Debug)]
pub(crate) struct AggregateArgs {
    /// Sizes of an update, in bytes
    #[arg(long, value_delimiter = ',', default_value = SIZES)]
    bytes: Vec<u64>,
    /// How many are folded into one
    #[arg(long, value_delimiter = ',', default_value = "2,8,32")]
    updates: Vec<u32>,
    /// Element types
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,f16", value_parser = dtype)]
    dtype: Vec<DType>,
    /// lazy: all in one go; eager: each by itself; eager-together: an eager aggregator that finds all of them waiting
    #[arg(
        long,
        value_delimiter = ',',
        value_enum,
        default_value = "lazy,eager,eager-together"
    )]
    timing: Vec<Arrival>,
    /// Threads [default: one, and as many as there are]
    #[arg(long, value_delimiter = ',')]
    threads: Vec<u32>,
}

/// How updates come to an aggregator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arrival {
    Lazy,
    Eager,
    EagerTogether,
}

/// See [`round`].
#[derive(Args, Clone, Debug)]
pub(crate) struct RoundArgs {
    /// Sizes of the model, in bytes
    #[arg(long, value_delimiter = ',', default_value = "44000000,83000000,232000000")]
    bytes: Vec<u64>,
    /// Element type
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// Trainers
    #[arg(long, value_delimiter = ',', default_value = "8")]
    trainers: Vec<u32>,
    /// Levels of aggregators
    #[arg(long, value_delimiter = ',', default_value = "3", value_parser = clap::value_parser!(u32).range(1..=3))]
    levels: Vec<u32>,
    /// Children of an aggregator
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    fan_out: u32,
    /// When aggregators fold
    #[arg(long, value_delimiter = ',', value_enum, default_value = "lazy,eager")]
    timing: Vec<RoundTiming>,
    /// Rounds of each job; the first, which touches the memory for the first time, stands by itself
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(3..))]
    rounds: u32,
    /// How references travel
    #[arg(long, value_enum, default_value_t = lifl_daemon::plane::Request::Auto)]
    plane: lifl_daemon::plane::Request,
}

/// When aggregators fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RoundTiming {
    Lazy,
    Eager,
}

/// See [`scale`].
#[derive(Args, Clone, Debug)]
pub(crate) struct ScaleArgs {
    /// Trainers of the jobs
    #[arg(long, value_delimiter = ',', default_value = "10,50,200,1000,2000")]
    trainers: Vec<u32>,
    /// Children of a leaf
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    fan_out: u32,
    /// Parameters of the model, which is to weigh nothing
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    parameters: u64,
    /// Rounds of each job; the first stands by itself
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(3..))]
    rounds: u32,
    /// How references travel
    #[arg(long, value_enum, default_value_t = lifl_daemon::plane::Request::Auto)]
    plane: lifl_daemon::plane::Request,
}

fn dtype(text: &str) -> Result<DType, String> {
    let known = [DType::F32, DType::BF16, DType::F16, DType::F64];
    let found = known
        .into_iter()
        .find(|dtype| dtype.to_string().eq_ignore_ascii_case(text));
    found.ok_or_else(|| "expected f32, bf16, f16 or f64".to_owned())
}

/// Measures until it is done or `scene` is cut.
///
/// # Errors
/// If something cannot be measured, or its results cannot be written.
pub(crate) fn run(bench: &Bench, json: bool, scene: &Scene) -> Outcome {
    let mut reporter = Reporter::new(json, scene);
    let done = match bench {
        Bench::Handoff(args) => handoff::run(args, scene, &mut reporter),
        Bench::Aggregate(args) => aggregate::run(args, scene, &mut reporter),
        Bench::Round(args) => round::run(args, scene, &mut reporter),
        Bench::Scale(args) => scale::run(args, scene, &mut reporter),
    };
    // That results cannot be written is why the rest was not measured.
    reporter.end()?;
    done.because(Cause::Machine)
}

/// What a bench leaves behind unless it is cleared away: processes and a folder. Whoever interrupts it cuts the scene.
pub(crate) struct Scene {
    folder: TempDir,
    children: Mutex<Vec<u32>>,
    cut: AtomicBool,
}

impl Scene {
    /// With an empty folder.
    ///
    /// # Errors
    /// If it cannot be made.
    pub(crate) fn new() -> anyhow::Result<Self> {
        // Sockets' names are added to it.
        const MOST_BYTES: usize = MAX_PATH_BYTES - 30;
        let mut builder = tempfile::Builder::new();
        builder.prefix("lifl-bench-");
        let short = |folder: &TempDir| folder.path().as_os_str().len() <= MOST_BYTES;
        let folder = match builder.tempdir() {
            Ok(folder) if short(&folder) => Ok(folder),
            // TMPDIR is not there, cannot be written to, or is too long.
            _ => builder.tempdir_in("/tmp"),
        };
        Ok(Self {
            folder: folder.context(
                "no folder for the bench's jobs, neither in TMPDIR nor in /tmp: set TMPDIR to a folder of your own",
            )?,
            children: Mutex::default(),
            cut: AtomicBool::new(false),
        })
    }

    /// Has the bench end: its children are told to, and the next step fails.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
        for &pid in &*self.children.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.cut.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts a child that ends with the scene.
    fn spawn(&self, command: &mut Command) -> anyhow::Result<Actor<'_>> {
        self.check()?;
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        children.push(child.id());
        Ok(Actor { scene: self, child })
    }

    /// This program with those arguments.
    fn lifl(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = program::command()?;
        command.args(arguments).env_remove("RUST_LOG");
        Ok(command)
    }
}

/// A child of the bench; gone when this is.
struct Actor<'a> {
    scene: &'a Scene,
    child: Child,
}

impl Actor<'_> {
    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end, which must be a good one.
    fn wait(mut self) -> anyhow::Result<()> {
        let status = self.child.wait().context("a child is lost")?;
        self.scene.check()?;
        if !status.success() {
            bail!("a process of the bench ended with {status}");
        }
        Ok(())
    }

    /// Tells it to end, and waits until it has.
    fn end(&mut self) {
        let begun = std::time::Instant::now();
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM);
        while let Ok(None) = self.child.try_wait() {
            if begun.elapsed() > PATIENCE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Actor<'_> {
    fn drop(&mut self) {
        self.end();
        let mut children = self.scene.children.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = self.child.id();
        children.retain(|child| *child != pid);
    }
}
