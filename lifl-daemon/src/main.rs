//! The command `lifl-daemon`.

use std::io::IsTerminal;
use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use lifl_common::control::paths;
use lifl_common::kernel::DEFAULT_MAX_WORKERS;
use lifl_daemon::plane::PinError;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{
    DEFAULT_GRACE, DEFAULT_PINS, Daemon, GatewayOptions, Options, StartError, default_pool_bytes,
    raise_open_files,
};
use lifl_daemon::{flame, plane};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The group whose members may connect, where the system has it.
const GROUP: &str = "lifl";

/// The node daemon of LIFL: carries references between the workers of federated-learning jobs, and owns the shared
/// memory that models lie in.
///
/// Start one on each node, as root, so that references travel through the kernel:
///
///   sudo lifl-daemon
///
/// Then `lifl run JOB` uses it. Members of the group `lifl` may connect where that group exists; else only root may,
/// unless --socket-mode says otherwise. It ends on SIGINT and SIGTERM and leaves nothing behind but jobs that are under way:
/// those go on without it, and the next daemon takes them over.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    /// Where to listen [default: /run/lifl/lifl.sock for root, else lifl.sock in the user's runtime folder]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The control socket's permission bits, octal [default: 660 with a group, else 600]
    #[arg(long, value_name = "MODE", value_parser = octal)]
    socket_mode: Option<u32>,
    /// The control socket's group [default: lifl, where it exists and this is root]
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// How frames travel: through the kernel, through the daemon, or the best that is allowed
    #[arg(long, value_enum, default_value_t = plane::Request::Auto)]
    plane: plane::Request,
    /// What arenas may take together, in MiB [default: half of the memory available at start]
    #[arg(long, value_name = "MIB")]
    pool_mib: Option<u64>,
    /// Whether arenas get huge pages of 2 MiB; auto has the kernel make missing ones if it may
    #[arg(long, value_enum, default_value_t = HugePages::Auto)]
    huge_pages: HugePages,
    /// Workers that can be registered at a time, of all jobs
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_WORKERS, value_parser = clap::value_parser!(u32).range(1..=65535))]
    max_workers: u32,
    /// The folder of a BPF filesystem in which jobs on the sockmap outlive this daemon; daemons that run side by side need
    /// one each
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_PINS)]
    pin: PathBuf,
    /// Have jobs end with this daemon
    #[arg(long, conflicts_with = "pin")]
    no_pin: bool,
    /// How long workers of the daemon before this one have to come back
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_GRACE.as_secs())]
    grace: u64,
    /// Take away what daemons have left pinned in the folder of --pin, of whatever version, and end: jobs that still use
    /// it end
    #[arg(long)]
    reset: bool,
    /// Where Flame's Python workers connect, on the loopback
    #[arg(long, value_name = "ADDR", default_value_t = flame::Options::SKMSG)]
    flame_skmsg: SocketAddrV4,
    /// Where Flame's Python workers register, on the loopback
    #[arg(long, value_name = "ADDR", default_value_t = flame::Options::RPC)]
    flame_rpc: SocketAddrV4,
    /// How long a Flame worker's reference waits for a receiver that has not registered yet
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    flame_hold: u64,
    /// Flame workers of one user at a time
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65535))]
    flame_workers: u32,
    /// Do not serve Flame's Python workers
    #[arg(long, conflicts_with_all = ["flame_skmsg", "flame_rpc", "flame_hold", "flame_workers"])]
    no_flame: bool,
    /// An address, beside the loopback's, on which jobs may open the gateway, where their remote workers come in over
    /// TCP; 0.0.0.0 or :: allows all. May be given several times. Sessions are let in by the job's token, but nothing
    /// is encrypted: give an address of a network that you trust
    #[arg(long, value_name = "ADDR")]
    gateway_listen: Vec<std::net::IpAddr>,
    /// How to log to standard error; RUST_LOG chooses what
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| format!("{text:?} is not an octal mode such as 660"))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.log_format);
    let done = if cli.reset { reset(&cli) } else { run(&cli) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let lacking =
                error.downcast_ref::<StartError>().is_some() || error.downcast_ref::<PinError>().is_some();
            ExitCode::from(if lacking { 3 } else { 2 })
        }
    }
}

fn log_to_stderr(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Takes away what daemons have left pinned.
fn reset(cli: &Cli) -> anyhow::Result<()> {
    let removed = plane::reset(&cli.pin)?;
    if removed.is_empty() {
        tracing::info!("nothing is pinned in {}", cli.pin.display());
    }
    for path in removed {
        tracing::info!("removed {}", path.display());
    }
    Ok(())
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    raise_open_files();
    let options = options(cli)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("no tokio runtime")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
        let shutdown = CancellationToken::new();
        let (pool_mib, huge_pages) = (options.pool_bytes >> 20, options.huge_pages);
        let daemon = Daemon::start(options, shutdown.clone())?;
        tracing::info!(
            socket = %daemon.socket().display(), plane = %daemon.plane(), reason = daemon.plane_reason(), pool_mib,
            ?huge_pages, "listening"
        );
        if let Some(flame) = daemon.flame() {
            let (skmsg, rpc) = flame.addresses();
            tracing::info!(%skmsg, %rpc, "listening for Flame's workers");
        }
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
                _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            }
            shutdown.cancel();
        });
        daemon.wait().await.context("something could not be taken down")?;
        tracing::info!("stopped");
        Ok(())
    })
}

fn options(cli: &Cli) -> anyhow::Result<Options> {
    let group = match &cli.socket_group {
        Some(name) => {
            let group = nix::unistd::Group::from_name(name).with_context(|| format!("group {name}"))?;
            Some(
                group
                    .with_context(|| format!("there is no group {name}: create it with `groupadd {name}`"))?,
            )
        }
        None if nix::unistd::geteuid().is_root() => nix::unistd::Group::from_name(GROUP).ok().flatten(),
        None => None,
    };
    let default_mode = if group.is_some() { 0o660 } else { 0o600 };
    Ok(Options {
        socket: cli
            .socket
            .clone()
            .unwrap_or_else(|| paths::own_folder().join(paths::DAEMON_SOCKET)),
        socket_mode: cli.socket_mode.unwrap_or(default_mode),
        socket_group: group.map(|group| group.gid),
        plane: cli.plane,
        pool_bytes: cli
            .pool_mib
            .map_or_else(default_pool_bytes, |mib| mib.saturating_mul(1 << 20)),
        huge_pages: cli.huge_pages,
        max_workers: cli.max_workers,
        pin: (!cli.no_pin).then(|| cli.pin.clone()),
        grace: Duration::from_secs(cli.grace),
        flame: (!cli.no_flame).then_some(flame::Options {
            skmsg: cli.flame_skmsg,
            rpc: cli.flame_rpc,
            hold: Duration::from_secs(cli.flame_hold),
            workers_of_user: cli.flame_workers,
            max_workers: cli.max_workers,
        }),
        gateway: GatewayOptions {
            allowed: cli.gateway_listen.clone(),
            ..GatewayOptions::default()
        },
    })
}
