//! The command line.

use std::io::{self, IsTerminal};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use lifl_common::config::{Overrides, Timing, Transport};
use lifl_common::id::JobId;
use lifl_daemon::logging;
use lifl_daemon::plane;
use lifl_daemon::pool::HugePages;
use lifl_daemon::signals;
use nix::unistd::User;

use crate::bench::{Bench, EchoArgs};
use crate::commands;
use crate::coordinate::daemon::DaemonChoice;
use crate::exit::{Cause, Failure, Outcome};
use crate::output;
use crate::program;
use crate::work::Place;

/// Hierarchical federated learning on one node: trainers' updates lie in shared memory, and references to them travel
/// between aggregators through the kernel.
///
/// Try it:
///
///   lifl run configs/mnist_three_level.json
///
/// Exit codes: 0 done, 2 the command line or the config is wrong, 3 this machine lacks something, 4 the job failed,
/// 5 it ran past maxRunTime, 6 the answer could not be written, 130 interrupted, 141 the answer's reader has gone.
#[derive(Parser, Debug)]
#[command(name = "lifl", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run a job: start its aggregators and trainers, train, and leave a run folder
    Run(RunArgs),
    /// Follow a run: what it has said since it began, and what it says until it ends
    ///
    /// Ends with the run, with its exit code; Ctrl-C ends the following, and not the run. A run that has ended is shown too.
    Attach(AttachArgs),
    /// Stop a run in order, as Ctrl-C does: its workers leave, its checkpoints stay, `lifl run --resume` goes on with it
    Stop(StopArgs),
    /// Check a job's files and say everything that is wrong with them
    Validate(JobArgs),
    /// Show a job's tree, the memory that it will take, and the plane that it would get
    Plan(JobArgs),
    /// Print the JSON Schema of job files
    Schema,
    /// Look at what this machine can do for LIFL, and what to do where it cannot
    Doctor(Report),
    /// Show the jobs, workers, arenas and counters of the daemons that this user can reach
    Status(StatusArgs),
    /// Measure this machine: handing updates over, folding them, whole rounds, many workers
    ///
    /// Each prints a table, or with --json a line for each result. Shares are of the memory's read bandwidth, measured in the
    /// same run; nothing else is comparable between machines. Let nothing else run meanwhile.
    Bench(BenchArgs),
    /// Be the other process of a hand-over; `lifl bench` starts these
    #[command(hide = true)]
    Echo(EchoArgs),
    /// Play one worker's role; `lifl run` starts these
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// How a command reports.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Report {
    /// Print newline-delimited JSON objects with an `event` field, and nothing else, on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// Which job.
#[derive(Args, Clone, Debug)]
pub(crate) struct JobArgs {
    /// A job file, or the worker files of one job, or a folder of them
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) choices: Choices,
    #[command(flatten)]
    pub(crate) report: Report,
}

/// What counts before a job's files.
#[derive(Args, Clone, Debug)]
pub(crate) struct Choices {
    /// When aggregators fold: eager, when an update comes; lazy, when all have come [default: the job file's]
    #[arg(long, value_enum)]
    timing: Option<TimingArg>,
    /// Rounds to run [default: the job file's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// A data set instead of the job file's: a folder with IDX files, an .npz file, the URL of one, or
    /// builtin:digits
    #[arg(long, value_name = "PATH|URL|builtin:digits")]
    data: Option<String>,
    /// What every random choice comes from; equal seeds give equal runs [default: the job file's]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Where files are variants of one worker, take those with this transport
    #[arg(long, value_enum, value_name = "TRANSPORT")]
    prefer: Option<TransportArg>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TimingArg {
    Eager,
    Lazy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TransportArg {
    Shm,
    P2p,
    Mqtt,
}

impl Choices {
    pub(crate) fn overrides(&self) -> Overrides {
        Overrides {
            rounds: self.rounds,
            seed: self.seed,
            timing: self.timing.map(|timing| match timing {
                TimingArg::Eager => Timing::Eager,
                TimingArg::Lazy => Timing::Lazy,
            }),
            data: self.data.clone(),
            prefer: self.prefer.map(|prefer| match prefer {
                TransportArg::Shm => Transport::Shm,
                TransportArg::P2p => Transport::P2p,
                TransportArg::Mqtt => Transport::Mqtt,
            }),
        }
    }
}

#[derive(Args, Clone, Debug)]
pub(crate) struct RunArgs {
    /// A job file, or the worker files of one job, or a folder of them
    #[arg(required_unless_present = "resume", value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// Go on with a run that was interrupted or killed, in its own folder: with the round after its last whole checkpoint,
    /// and with its job as it was
    #[arg(
        long,
        value_name = "RUN_FOLDER",
        conflicts_with_all = ["paths", "timing", "rounds", "data", "seed", "prefer", "out"]
    )]
    pub(crate) resume: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) choices: Choices,
    #[command(flatten)]
    pub(crate) report: Report,
    /// Run in the background: come back when the first round begins. `lifl attach` follows it, `lifl stop` stops it, and its
    /// lines go to run.log in its folder
    #[arg(long)]
    pub(crate) detach: bool,
    /// What `--detach` starts
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub(crate) detached: bool,
    /// The daemon: auto (one that listens, else one inside this command), own (inside this command), or its socket
    #[arg(long, value_name = "auto|own|SOCKET", default_value = "auto", value_parser = daemon_choice)]
    pub(crate) daemon: DaemonChoice,
    /// How references travel: through the kernel, through the daemon, or the best that is allowed
    #[arg(long, value_enum, default_value_t = plane::Request::Auto)]
    pub(crate) plane: plane::Request,
    /// The run's folder, new or empty [default: runs/JOB-TIME]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) out: Option<PathBuf>,
    /// Use folders that belong to that user, too: a name or uid. May be given several times
    #[arg(long, value_name = "USER", value_parser = user)]
    pub(crate) trust_owner: Vec<u32>,
    /// Write a checkpoint every N rounds; 0 for the last model only
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) checkpoint_every: u32,
    /// Keep only so many checkpoints, the newest ones [default: all]
    #[arg(long, value_name = "K")]
    pub(crate) keep_checkpoints: Option<NonZeroU32>,
    /// What arenas may take together, in MiB, for an own daemon [default: half of the memory available]
    #[arg(long, value_name = "MIB")]
    pub(crate) pool_mib: Option<u64>,
    /// Whether arenas get huge pages of 2 MiB, for an own daemon
    #[arg(long, value_enum, default_value_t = HugePages::Auto)]
    pub(crate) huge_pages: HugePages,
    /// Let models go unencrypted beyond private networks: to remote workers, or to an MQTT broker, whose address is there
    #[arg(long)]
    pub(crate) insecure: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct AttachArgs {
    /// The run's folder, or latest: the one in ./runs that began last
    #[arg(value_name = "RUN_FOLDER|latest")]
    pub(crate) run: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) report: Report,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct StopArgs {
    /// The run's folder, or latest: the one in ./runs that began last [default: the only one in ./runs that is under way]
    #[arg(value_name = "RUN_FOLDER|latest")]
    pub(crate) run: Option<PathBuf>,
    /// How long to wait for its end, in seconds; without --kill it is left to end by itself then (exit code 4)
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) timeout: u64,
    /// If it has not ended by then, kill it
    #[arg(long)]
    pub(crate) kill: bool,
    #[command(flatten)]
    pub(crate) report: Report,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct StatusArgs {
    /// The daemon's socket [default: all that this user can reach]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) daemon: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) report: Report,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) bench: Bench,
    /// Print newline-delimited JSON objects with an `event` field, and nothing else, on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Args, Clone, Debug)]
struct WorkerArgs {
    #[arg(long)]
    socket: PathBuf,
    #[arg(long)]
    job: u32,
    #[arg(long)]
    run: PathBuf,
    #[arg(long)]
    name: String,
    #[arg(long)]
    gateway: Option<String>,
    #[arg(long)]
    insecure: bool,
    #[arg(long)]
    start: Option<u32>,
    #[arg(long, default_value_t = 1)]
    blocking: usize,
}

/// A user's number, by name or number.
fn user(text: &str) -> Result<u32, String> {
    match (text.parse(), User::from_name(text)) {
        (Ok(uid), _) => Ok(uid),
        (_, Ok(Some(user))) => Ok(user.uid.as_raw()),
        (_, Ok(None)) => Err("there is no such user".to_owned()),
        (_, Err(errno)) => Err(format!("the user cannot be looked up: {errno}")),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "clap's parsers give results")]
fn daemon_choice(text: &str) -> Result<DaemonChoice, String> {
    Ok(match text {
        "auto" => DaemonChoice::Auto,
        "own" => DaemonChoice::Own,
        socket => DaemonChoice::At(PathBuf::from(socket)),
    })
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    signals::unblock();
    signals::survive_writes();
    program::name_process();
    logging::tell_panics(output::log().clone());
    let code = match Cli::try_parse() {
        Ok(Cli {
            command: Command::Run(args),
        }) if args.detach => match commands::detach::start(args.report) {
            Ok(code) => ExitCode::from(code),
            Err(failure) => ended(Err(failure)),
        },
        Ok(cli) => ended(execute(cli.command)),
        // --help and --version are answers like any other.
        Err(error) if !error.use_stderr() => {
            let text = logging::rendered(&error, io::stdout().is_terminal());
            ended(output::print(&text))
        }
        Err(error) => {
            output::log().line(logging::rendered(&error, io::stderr().is_terminal()));
            Cause::Config.into()
        }
    };
    output::flush_log();
    code
}

/// Says why a command has failed. Gives its exit code.
fn ended(outcome: Outcome) -> ExitCode {
    output::flush_told();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { cause, error }) => {
            if cause != Cause::Pipe {
                output::log().line(format!("lifl: {error:#}\n"));
            }
            cause.into()
        }
    }
}

fn execute(command: Command) -> Outcome {
    match command {
        Command::Run(args) => commands::run(&args),
        Command::Attach(args) => commands::attach(&args),
        Command::Stop(args) => commands::stop(&args),
        Command::Validate(args) => commands::validate(&args),
        Command::Plan(args) => commands::plan(&args),
        Command::Schema => commands::schema(),
        Command::Doctor(report) => commands::doctor(report),
        Command::Status(args) => commands::status(&args),
        Command::Bench(args) => commands::bench(args),
        Command::Echo(args) => commands::echo(&args),
        Command::Worker(WorkerArgs {
            socket,
            job,
            run,
            name,
            gateway,
            insecure,
            start,
            blocking,
        }) => {
            let place = Place {
                socket,
                job: JobId(job),
                run,
                name,
                gateway,
                insecure,
                start,
            };
            commands::worker(place, blocking)
        }
    }
}
