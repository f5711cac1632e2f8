//! The planes: how frames get from one worker's socket to another's.
//!
//! Two with one interface. [`Sockmap`] leaves the work to the kernel, [`Relay`] does it in the daemon for machines
//! that may not load eBPF programs. Both decide by [`lifl_common::kernel::verdict`], both count, and both turn what
//! they refuse or cannot deliver into a dead letter: the frame with `refusal` and `stamp` filled in, on the channel
//! that comes with the plane. Whoever holds the plane must keep reading that channel.
//!
//! ```text
//!  register ──▶ registered ── its socket closes ──▶ gone      frames to it: WorkerGone
//!                   │                                │
//!                   └─────────── unregister ─────────┴──▶     frames to it: UnknownWorker
//! ```
//!
//! The registry task owns the plane; nobody else calls it.

mod relay;
mod socket;
mod sockmap;
pub mod support;

use std::os::fd::OwnedFd;

use aya::maps::MapError;
use lifl_common::frame::Frame;
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{Counters, DEFAULT_MAX_WORKERS};
use lifl_common::plane::PlaneKind;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

pub use relay::Relay;
pub use socket::SocketError;
pub(crate) use socket::connection;
pub use sockmap::Sockmap;

/// Dead letters that wait for the daemon before the plane stops reading more.
const DEAD_LETTERS: usize = 1024;

/// Which plane a person asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    /// The sockmap where this process may, else the relay.
    #[default]
    Auto,
    /// The sockmap or nothing.
    Sockmap,
    /// The relay.
    Relay,
}

impl Request {
    /// Whether a plane of that kind is what was asked for.
    pub fn admits(self, kind: PlaneKind) -> bool {
        match self {
            Self::Auto => true,
            Self::Sockmap => kind == PlaneKind::Sockmap,
            Self::Relay => kind == PlaneKind::Relay,
        }
    }
}

/// What a plane is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Workers that may be registered at a time.
    pub max_workers: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_workers: DEFAULT_MAX_WORKERS,
        }
    }
}

/// A plane with what comes out of it.
#[derive(Debug)]
pub struct Chosen {
    /// The plane.
    pub plane: Plane,
    /// What it could not deliver.
    pub dead_letters: mpsc::Receiver<Frame>,
    /// Why it is this one, in words that fit after "relay: ".
    pub reason: String,
}

/// Makes the plane that was asked for.
///
/// Must be called within a tokio runtime that drives I/O.
///
/// # Errors
/// If the sockmap was asked for and this process cannot have it; the error says why and what to do.
pub fn choose(request: Request, options: Options) -> Result<Chosen, PlaneError> {
    let relay = |reason: String| {
        let (relay, dead_letters) = Relay::new(options);
        Chosen {
            plane: Plane::Relay(relay),
            dead_letters,
            reason,
        }
    };
    if request == Request::Relay {
        return Ok(relay("as asked for".to_owned()));
    }
    match Sockmap::load(options) {
        Ok((sockmap, dead_letters)) => {
            let reason = "the kernel hands the frames over".to_owned();
            Ok(Chosen {
                plane: Plane::Sockmap(Box::new(sockmap)),
                dead_letters,
                reason,
            })
        }
        Err(error) if request == Request::Sockmap => Err(error),
        Err(PlaneError::Unavailable { reason, .. }) => Ok(relay(reason)),
        Err(error) => Ok(relay(error.to_string())),
    }
}

/// One of the planes.
#[derive(Debug)]
pub enum Plane {
    /// Through the kernel.
    Sockmap(Box<Sockmap>),
    /// Through the daemon.
    Relay(Relay),
}

impl Plane {
    /// Which it is.
    pub fn kind(&self) -> PlaneKind {
        match self {
            Self::Sockmap(_) => PlaneKind::Sockmap,
            Self::Relay(_) => PlaneKind::Relay,
        }
    }

    /// Lets that worker send and be sent to. `socket` is what
    /// [`FrameSocket::pair_for`](lifl_common::client::FrameSocket::pair_for) made for the daemon.
    ///
    /// # Errors
    /// If the descriptor is not the socket that this plane needs, the worker or its socket is registered already, or
    /// the plane is full; everybody else's registration stands.
    pub fn register(&mut self, worker: WorkerId, job: JobId, socket: OwnedFd) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.register(worker, job, socket),
            Self::Relay(plane) => plane.register(worker, job, socket),
        }
    }

    /// Forgets that worker; nothing happens if it is not registered.
    ///
    /// # Errors
    /// If the kernel does not let go of an entry.
    pub fn unregister(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.unregister(worker),
            Self::Relay(plane) => {
                plane.unregister(worker);
                Ok(())
            }
        }
    }

    /// What that worker has sent; `None` if it is not registered.
    ///
    /// # Errors
    /// If the kernel's map cannot be read.
    pub fn counters(&self, worker: WorkerId) -> Result<Option<Counters>, PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.counters(worker),
            Self::Relay(plane) => Ok(plane.counters(worker)),
        }
    }

    /// Ends the plane. Dropping it does the same but cannot say what went wrong.
    ///
    /// # Errors
    /// If the program cannot be detached.
    pub fn shutdown(self) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.shutdown(),
            Self::Relay(_) => Ok(()),
        }
    }
}

/// What a plane could not do.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// This process cannot have the sockmap.
    #[error("the sockmap plane is not available: {reason}; {remedy}")]
    Unavailable {
        /// Why, in one line.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The descriptor is not the socket that the plane needs.
    #[error("the socket of {worker} cannot be registered")]
    Socket {
        /// Whose it was to be.
        worker: WorkerId,
        /// What is wrong with it.
        #[source]
        source: SocketError,
    },
    /// 0 is nobody.
    #[error("w0 stands for nobody and cannot be registered")]
    Nobody,
    /// That worker has a socket.
    #[error("{0} is already registered")]
    WorkerTaken(WorkerId),
    /// That socket has a worker.
    #[error("the socket of {worker} is already registered, for {holder}")]
    SocketTaken {
        /// Whose it was to be.
        worker: WorkerId,
        /// Whose it is.
        holder: WorkerId,
    },
    /// No room for another worker.
    #[error("the plane is full: it holds {capacity} workers; start the daemon with a larger --max-workers")]
    Full {
        /// How many it holds.
        capacity: u32,
    },
    /// A kernel map refused.
    #[error("map {map}: cannot {action}")]
    Map {
        /// The map.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: MapError,
    },
    /// The program stayed attached.
    #[error("cannot detach the program")]
    Detach(#[source] aya::programs::ProgramError),
}
