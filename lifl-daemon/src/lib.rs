//! LIFL's node daemon, as a library so that `lifl run` can run one inside itself.
//!
//! It loads the SK_MSG program ([`plane`]), owns the shared memory ([`pool`]), keeps jobs, workers and arenas in a
//! registry that one task owns, and lets workers in over the network (the gateway). Beside that, and apart from it, it
//! serves Flame's Python workers ([`flame`]). It does not know what an aggregator computes.

// Such a macro panics, or waits for a reader: `logging` has what does neither.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod accounts;
mod chain;
mod clock;
mod ebpf;
mod errands;
pub mod flame;
mod gateway;
mod limits;
pub mod logging;
mod mailbox;
pub mod plane;
pub mod pool;
pub mod privileges;
mod refusals;
mod registry;
mod server;
pub mod signals;
mod sock_diag;
mod turns;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use lifl_common::plane::PlaneKind;
use tokio_util::sync::CancellationToken;

use crate::flame::{Flame, FlameError};
pub use crate::gateway::{Brokers, GatewayOptions};
use crate::plane::PlaneError;
use crate::pool::{HugePages, Pool};
pub use crate::registry::quota::{Quota, Quotas};
use crate::registry::{Facts, Registry};
use crate::server::{Connections, Listener, Others};
pub use crate::server::{ListenError, listen_at};

/// Connections beside those of workers: coordinators that have no worker yet, `lifl status`.
const SPARE_CONNECTIONS: u32 = 256;

/// Connections to a daemon at a time, of all users.
pub fn max_connections(max_workers: u32) -> u32 {
    max_workers.saturating_add(SPARE_CONNECTIONS)
}

/// How long workers of the daemon before have to come back, unless somebody says otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// Where `lifl-daemon` pins the maps, unless somebody says otherwise.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/lifl";

/// How a daemon is to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// The socket's permission bits.
    pub socket_mode: u32,
    /// The socket's group.
    pub socket_group: Option<nix::unistd::Gid>,
    /// Which plane.
    pub plane: plane::Request,
    /// Bytes that arenas may take together.
    pub pool_bytes: u64,
    /// Which pages they get.
    pub huge_pages: HugePages,
    /// Workers that can be registered at a time.
    pub max_workers: u32,
    /// The folder of a BPF filesystem in which jobs on the sockmap outlive this daemon; `None` to end them with it.
    pub pin: Option<PathBuf>,
    /// How long workers of the daemon before this one have to come back.
    pub grace: Duration,
    /// Whether and how Flame's Python workers are served.
    pub flame: Option<flame::Options>,
    /// How workers beyond shared memory come in.
    pub gateway: GatewayOptions,
}

/// What whoever runs the daemon has for it, besides its options.
pub struct Host {
    /// A socket that listens already, as a service manager hands it over. Its file stays when the daemon goes.
    pub listener: Option<OwnedFd>,
    /// Where that socket is, if it was bound under another name.
    pub listens_at: Option<PathBuf>,
    /// What users may have.
    pub quotas: Quotas,
    /// Whom the registry's task tells that it is well.
    pub watch: Option<Watch>,
    /// What to do when everything is done that takes privileges, before anybody is served.
    pub unprivileged: Option<Box<dyn FnOnce()>>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            listener: None,
            listens_at: None,
            quotas: Quotas::unlimited(),
            watch: None,
            unprivileged: None,
        }
    }
}

/// Whom to tell how the daemon is, and how often. The registry's task does it between two requests: when it hangs, so
/// does this.
pub struct Watch {
    /// How often.
    pub every: Duration,
    /// Is told; must not block.
    pub tell: Box<dyn FnMut(&Vitals) + Send>,
}

/// How a daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vitals {
    /// Its plane.
    pub plane: PlaneKind,
    /// Jobs.
    pub jobs: usize,
    /// Workers.
    pub workers: usize,
    /// Bytes that arenas take.
    pub pool_used_bytes: u64,
    /// Bytes that they may take.
    pub pool_bytes: u64,
}

impl fmt::Display for Vitals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "plane {}, {} jobs, {} workers, {} of {} MiB in arenas",
            self.plane,
            self.jobs,
            self.workers,
            self.pool_used_bytes >> 20,
            self.pool_bytes >> 20
        )
    }
}

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No control socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No plane.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// Flame's workers cannot be served.
    #[error(transparent)]
    Flame(#[from] FlameError),
}

/// What a daemon could not take down.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The plane.
    #[error(transparent)]
    Plane(#[from] PlaneError),
    /// What Flame's workers were served with.
    #[error(transparent)]
    Flame(#[from] FlameError),
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    socket: PathBuf,
    plane: PlaneKind,
    plane_reason: String,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), PlaneError>>,
    flame: Option<Flame>,
}

impl Daemon {
    /// Starts one: when this returns, it listens. It ends when `shutdown` is cancelled: then its jobs are told, its
    /// clients have a moment to leave, and the program, the memory and the socket file go. Jobs that are pinned stay, with
    /// the program and their memory, for the daemon that is started next.
    ///
    /// # Errors
    /// If it cannot listen, or the plane that is asked for cannot be had, or another daemon or version has the pins.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(options: Options, shutdown: CancellationToken) -> Result<Self, StartError> {
        Self::start_in(Host::default(), options, shutdown)
    }

    /// As [`start`](Self::start), with what its host has for it.
    ///
    /// # Errors
    /// As there; or if the socket that was handed over is not one to listen at.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start_in(
        host: Host,
        mut options: Options,
        shutdown: CancellationToken,
    ) -> Result<Self, StartError> {
        let listener = match host.listener {
            Some(listener) => Listener::take(listener)?,
            None => Listener::bind(&options.socket, options.socket_mode, options.socket_group)?,
        };
        options.socket = host.listens_at.unwrap_or_else(|| listener.path().to_owned());
        let mut chosen = plane::choose(
            options.plane,
            plane::Options {
                max_workers: options.max_workers,
                pin: options.pin,
            },
        )?;
        let recovered = chosen.plane.recovered()?;
        // Memory that was granted stays granted, and takes from what a daemon finds free at its start.
        let mut pool_bytes = options.pool_bytes;
        if !recovered.members.is_empty() {
            pool_bytes = pool_bytes.max(recovered.pool_bytes);
        }
        chosen.plane.note_pool(pool_bytes)?;
        let (plane, plane_reason) = (chosen.plane.kind(), chosen.reason.clone());
        let flame = options
            .flame
            .map(|flame| Flame::start(flame, plane, shutdown.clone()));
        let flame = flame.transpose()?;
        let facts = Facts {
            plane_reason: chosen.reason,
            max_workers: chosen.plane.capacity(),
        };
        let pool = Pool::new(pool_bytes, options.huge_pages);
        let gateway_stop = CancellationToken::new();
        let (lobby, own) = server::lobby();
        let (handle, opened, gateway) = gateway::gateway(lobby, &options.gateway, gateway_stop.clone());
        let mut registry = Registry::new(
            facts,
            host.quotas.clone(),
            chosen.plane,
            pool,
            handle,
            options.gateway,
        );
        registry.recover(recovered, options.grace);
        let connections = Connections::new(max_connections(options.max_workers), host.quotas);
        let served = server::serve(
            listener,
            registry,
            Others {
                dead_letters: chosen.dead_letters,
                opened,
                own,
                flame: flame.as_ref().map(Flame::desk),
                watch: host.watch,
            },
            connections,
            shutdown.clone(),
        );
        if let Some(give_up) = host.unprivileged {
            give_up();
        }
        let task = tokio::spawn(async move {
            let gateway = tokio::spawn(gateway);
            let registry = served.await;
            gateway_stop.cancel();
            if let Err(error) = gateway.await {
                tracing::error!("the gateway's task failed: {error}");
            }
            registry.into_plane().shutdown()
        });
        Ok(Self {
            socket: options.socket,
            plane,
            plane_reason,
            shutdown,
            task,
            flame,
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &std::path::Path {
        &self.socket
    }

    /// Its plane.
    pub fn plane(&self) -> PlaneKind {
        self.plane
    }

    /// Why that plane.
    pub fn plane_reason(&self) -> &str {
        &self.plane_reason
    }

    /// Who serves Flame's workers.
    pub fn flame(&self) -> Option<&Flame> {
        self.flame.as_ref()
    }

    /// Ends it and waits until everything is gone.
    ///
    /// # Errors
    /// If something could not be detached.
    ///
    /// # Panics
    /// If the daemon's task did.
    pub async fn stop(self) -> Result<(), StopError> {
        self.shutdown.cancel();
        self.wait().await
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If something could not be detached.
    ///
    /// # Panics
    /// If the daemon's task did.
    pub async fn wait(self) -> Result<(), StopError> {
        let plane = self.task.await.expect("the daemon's task panicked");
        if let Some(flame) = self.flame {
            flame.wait().await?;
        }
        Ok(plane?)
    }
}

/// Lets this process have as many descriptors as it may: each worker takes two or three of the daemon's, and the usual
/// soft limit of 1,024 is for programs that use `select`.
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("the limit of open files cannot be raised: {error}");
    }
}

/// What a pool's ceiling is when nobody gives one: half of the memory that is available now, to this process's control group
/// too.
pub fn default_pool_bytes() -> u64 {
    lifl_common::limits::available_memory().map_or(1 << 30, |bytes| bytes / 2)
}
