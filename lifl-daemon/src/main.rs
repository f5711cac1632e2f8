//! The command `lifl-daemon`.

// Such a macro panics, or waits for a reader: `logging` has what does neither.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod settings;
mod supervisor;
mod user;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use lifl_common::control::paths;
use lifl_common::kernel::DEFAULT_MAX_WORKERS;
use lifl_common::limits;
use lifl_common::plane::{NO_KERNEL_PLANE, UNBOUNDED};
use lifl_common::runtime::{self, RuntimeError, Threads};
use lifl_common::session::reach::Reach;
use lifl_daemon::logging::{self, Sink};
use lifl_daemon::plane::PinError;
use lifl_daemon::pool::HugePages;
use lifl_daemon::signals::{self, Ending};
use lifl_daemon::{
    Brokers, DEFAULT_GRACE, DEFAULT_PINS, Daemon, GatewayOptions, Host, Options, Quota, Quotas, StartError,
    default_pool_bytes, max_connections, raise_open_files,
};
use lifl_daemon::{flame, plane, privileges};
use tokio_util::sync::CancellationToken;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::{LogFormat, Settings};

/// The group whose members may connect, where the system has it.
const GROUP: &str = "lifl";

/// Four of one user for its descriptors and its memory, the log's, and two that add credit, for the plane and for Flame's
/// workers: without any nobody is served.
const SPARE: usize = 7;

/// Threads for what blocks, looking up names among it.
const BLOCKING: usize = 2;

/// The same at most.
const MOST_BLOCKING: usize = 64;

/// The node daemon of LIFL: carries references between the workers of federated-learning jobs, and owns the shared
/// memory that models lie in.
///
/// Start one on each node, as root, so that references travel through the kernel:
///
///   sudo lifl-daemon
///
/// It becomes user `lifl` where there is one, without capabilities. Then `lifl run JOB` uses it. Each option is also a key of /etc/lifl/daemon.toml, which has users' quotas besides. Members of the group `lifl` may connect where that group exists; else only root may,
/// unless --socket-mode says otherwise. It ends on SIGINT, SIGTERM and SIGHUP (those of them that were not ignored when it was started, as `nohup` and `command &` of a script have it) and leaves nothing behind but jobs that are under way:
/// those go on without it, and the next daemon takes them over.
#[derive(Parser, Debug)]
#[command(version)]
struct Cli {
    /// A file with settings in place of options, which win, and with quotas [default: /etc/lifl/daemon.toml, if it is
    /// there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Take away what daemons have left pinned in the folder of --pin, of whatever version, and end: jobs that still use
    /// it end
    #[arg(long)]
    reset: bool,
    #[command(flatten)]
    settings: Settings,
}

fn main() -> ExitCode {
    // It may have been started from a link, after which it would be called.
    let _ = nix::sys::prctl::set_name(c"lifl-daemon");
    if let Some(code) = user::cleaner() {
        return code;
    }
    signals::unblock();
    signals::survive_writes();
    let log = Sink::new(io::stderr(), logging::LOG_BYTES, |lost| {
        format!("{lost} lines of this log could not be written")
    });
    let code = logged(&log);
    user::clean_up();
    log.flush(logging::LAST_LINES);
    code
}

/// All that this process does, with its log.
fn logged(log: &Sink) -> ExitCode {
    logging::tell_panics(log.clone());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error, log),
    };
    let (settings, file) = match settings(&cli) {
        Ok(settings) => settings,
        Err(error) => {
            log.line(format!("lifl-daemon: {error:#}\n"));
            return ExitCode::from(2);
        }
    };
    log_to(log, settings.log_format.unwrap_or(LogFormat::Text));
    let done = match cli.reset {
        true => reset(&settings),
        false => run(&settings, &file, log),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            let lacking = error.is::<StartError>()
                || error.is::<PinError>()
                || error.is::<paths::NoFolder>()
                || error.is::<RuntimeError>();
            ExitCode::from(if lacking { 3 } else { 2 })
        }
    }
}

/// What the command line and the file say together, and which file that is.
fn settings(cli: &Cli) -> anyhow::Result<(Settings, PathBuf)> {
    let usual = Path::new(Quotas::FILE);
    let (file, below) = match &cli.config {
        Some(file) => (file.as_path(), Settings::read(file)?),
        None if usual.exists() => (usual, Settings::read(usual)?),
        None => (usual, Settings::default()),
    };
    Ok((cli.settings.clone().over(below), file.to_owned()))
}

/// What clap has to say: of a mistake, or what was asked for with --help or --version.
fn usage(error: &clap::Error, log: &Sink) -> ExitCode {
    if error.use_stderr() {
        log.line(logging::rendered(error, io::stderr().is_terminal()));
        return ExitCode::from(2);
    }
    let text = logging::rendered(error, io::stdout().is_terminal());
    match logging::write_all(&io::stdout(), text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.line(format!(
                "lifl-daemon: standard output cannot be written: {error}\n"
            ));
            ExitCode::from(2)
        }
    }
}

fn log_to(sink: &Sink, format: LogFormat) {
    let registry = tracing_subscriber::registry().with(logging::filter("info"));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(sink.clone())
        .with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => registry.with(lines).init(),
        LogFormat::Json => {
            sink.tell_by(|lost| {
                let message = format!("{lost} lines of this log could not be written");
                format!(
                    r#"{{"level":"WARN","fields":{{"message":"{message}","lost":{lost}}},"target":"lifl_daemon::logging"}}"#
                )
            });
            registry.with(lines.json()).init();
        }
    }
}

/// Takes away what daemons have left pinned.
fn reset(settings: &Settings) -> anyhow::Result<()> {
    let folder = settings.pin.as_deref().unwrap_or(Path::new(DEFAULT_PINS));
    let removed = plane::reset(folder)?;
    if removed.is_empty() {
        tracing::info!("nothing is pinned in {}", folder.display());
    }
    for path in removed {
        tracing::info!("removed {}", path.display());
    }
    Ok(())
}

fn run(settings: &Settings, file: &Path, log: &Sink) -> anyhow::Result<()> {
    let listener = supervisor::listener()?;
    raise_open_files();
    privileges::no_more().context("prctl(PR_SET_NO_NEW_PRIVS)")?;
    let options = options(settings, listener.is_some())?;
    let flame = options.flame.is_some();
    if let Some(user) = user::wanted(settings.user.as_deref())? {
        // The log's thread does not outlive that.
        log.flush(logging::LAST_LINES);
        match user::execute_as(&user, listener, &options, flame)? {}
    }
    let share = Quota::share_of(
        options.pool_bytes,
        options.max_workers,
        max_connections(options.max_workers),
    );
    let kept = privileges::running(flame);
    let host = Host {
        listener,
        listens_at: user::socket(),
        quotas: settings.quota.resolve(share, file)?,
        watch: supervisor::watch(),
        // This thread is the last that has more than it needs.
        unprivileged: Some(Box::new(move || {
            give_up(kept);
            if let Err(error) = privileges::restrict_system_calls(flame) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "system calls that are not needed stay open");
            }
        })),
    };
    let runtime = runtime::start(threads(), move || give_up(kept))?;
    runtime.block_on(async {
        let mut ending = Ending::watch().context("sigaction")?;
        let shutdown = CancellationToken::new();
        let (pool_mib, huge_pages) = (options.pool_bytes >> 20, options.huge_pages);
        let daemon = Daemon::start_in(host, options, shutdown.clone())?;
        let capabilities = plane::support::names_of(plane::support::effective_capabilities());
        tracing::info!(
            socket = %daemon.socket().display(), plane = %daemon.plane(), reason = daemon.plane_reason(), pool_mib,
            ?huge_pages, ?capabilities, "listening"
        );
        if daemon.plane_reason().contains(UNBOUNDED) {
            tracing::warn!("{}: one user can make the kernel hold memory without end", daemon.plane_reason());
        }
        if daemon.plane_reason().starts_with(NO_KERNEL_PLANE) {
            tracing::warn!(
                "{}: frames go through this daemon, which takes more of the processors, and no job outlives it",
                daemon.plane_reason()
            );
        }
        if let Some(flame) = daemon.flame() {
            let (skmsg, rpc) = flame.addresses();
            tracing::info!(%skmsg, %rpc, "listening for Flame's workers");
        }
        supervisor::ready();
        tokio::spawn(async move {
            let signal = ending.asked().await;
            tracing::info!("{signal}: stopping");
            supervisor::stopping();
            shutdown.cancel();
        });
        daemon.wait().await.context("something could not be taken down")?;
        tracing::info!("stopped");
        Ok(())
    })
}

/// A thread for each core, or as many as a limit leaves.
fn threads() -> Threads {
    let left = limits::tasks().map_or(usize::MAX, |limit| {
        usize::try_from(limit.left()).unwrap_or(usize::MAX)
    });
    Threads {
        workers: limits::cpus().min(left.saturating_sub(BLOCKING + SPARE)).max(1),
        blocking: BLOCKING,
        most_blocking: MOST_BLOCKING,
        spare: SPARE,
    }
}

/// Leaves the calling thread what it needs to serve.
fn give_up(kept: u64) {
    if let Err(error) = privileges::keep_only(kept) {
        tracing::error!("capabilities that are not needed cannot be given up: {error}");
    }
}

/// Where to listen when nobody says where.
fn usual_socket() -> Result<PathBuf, paths::NoFolder> {
    let (folder, passed_over) = paths::own_folder()?;
    for place in &passed_over {
        tracing::warn!("not listening where it is looked for first: {place}");
    }
    Ok(folder.join(paths::DAEMON_SOCKET))
}

/// Refuses what would let models go unencrypted into public networks without a word from the administrator, and warns of what
/// leaves this machine.
fn gateway_options(settings: &Settings) -> anyhow::Result<GatewayOptions> {
    let options = GatewayOptions {
        allowed: settings.gateway_listen.clone().unwrap_or_default(),
        brokers: Brokers::These(settings.gateway_broker.clone().unwrap_or_default()),
        insecure: settings.insecure.unwrap_or(false),
        ..GatewayOptions::default()
    };
    for address in options.check_reach().context("--gateway-listen")? {
        tracing::warn!(%address, reach = %Reach::of(address), "MODELS GO UNENCRYPTED through the gateway at this address");
    }
    if let Brokers::These(brokers) = &options.brokers {
        for broker in brokers.iter().filter(|broker| !broker.is_local()) {
            tracing::warn!(%broker, "MODELS GO UNENCRYPTED through this broker, to whom it lets read");
        }
    }
    Ok(options)
}

/// What the settings say; with a socket that was handed over, none is sought.
fn options(settings: &Settings, handed_over: bool) -> anyhow::Result<Options> {
    let group = match &settings.socket_group {
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
    let max_workers = settings.max_workers.unwrap_or(DEFAULT_MAX_WORKERS);
    let pinned = !settings.no_pin.unwrap_or(false);
    let pin = || settings.pin.clone().unwrap_or_else(|| DEFAULT_PINS.into());
    let serves_flame = settings.serves_flame().unwrap_or(false);
    Ok(Options {
        socket: match &settings.socket {
            Some(socket) => socket.clone(),
            None if handed_over => PathBuf::new(),
            None => usual_socket()?,
        },
        socket_mode: settings.socket_mode.unwrap_or(default_mode),
        socket_group: group.map(|group| group.gid),
        plane: settings.plane.unwrap_or_default(),
        pool_bytes: settings
            .pool_mib
            .map_or_else(default_pool_bytes, |mib| mib.saturating_mul(1 << 20)),
        huge_pages: settings.huge_pages.unwrap_or(HugePages::Auto),
        max_workers,
        pin: pinned.then(pin),
        grace: settings.grace.map_or(DEFAULT_GRACE, Duration::from_secs),
        flame: serves_flame.then(|| flame::Options {
            skmsg: settings.flame_skmsg.unwrap_or(flame::Options::SKMSG),
            rpc: settings.flame_rpc.unwrap_or(flame::Options::RPC),
            hold: Duration::from_secs(settings.flame_hold.unwrap_or(60)),
            workers_of_user: settings.flame_workers.unwrap_or(1024),
            max_workers,
        }),
        gateway: gateway_options(settings)?,
    })
}
