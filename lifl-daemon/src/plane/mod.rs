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

mod bare;
pub(crate) mod credit;
mod pins;
mod recover;
mod relay;
mod socket;
mod sockmap;
pub mod support;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::MapError;
use lifl_common::frame::Frame;
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{Counters, DEFAULT_MAX_WORKERS, MAP_SOCKETS, Member};
use lifl_common::plane::{NO_KERNEL_PLANE, PlaneKind};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::chain::error_chain;
use crate::ebpf;
use crate::errands::Foreign;

pub use bare::Bare;
pub use pins::{PinError, give as give_pins, reset};
pub use recover::Recovered;
pub use relay::Relay;
pub use socket::SocketError;
pub(crate) use socket::{connection, own_connection};
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Workers that may be registered at a time.
    pub max_workers: u32,
    /// The folder of a BPF filesystem in which the sockmap outlives the daemon; `None` to have it end with it.
    pub pin: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_workers: DEFAULT_MAX_WORKERS,
            pin: None,
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
/// If the sockmap was asked for and this process cannot have it, or if pinned maps are there that it may not use; the
/// error says why and what to do.
pub fn choose(request: Request, options: Options) -> Result<Chosen, PlaneError> {
    let max_workers = options.max_workers;
    let relay = |reason: String| {
        let (relay, dead_letters) = Relay::new(max_workers);
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
            let reason = sockmap.reason();
            Ok(Chosen {
                plane: Plane::Sockmap(Box::new(sockmap)),
                dead_letters,
                reason,
            })
        }
        // With the relay beside them, jobs that are in the kernel would be left there for good.
        Err(error @ PlaneError::Pins(_)) => Err(error),
        Err(error) if request == Request::Sockmap => Err(error),
        Err(PlaneError::Unavailable { reason, remedy }) => {
            Ok(relay(format!("{NO_KERNEL_PLANE}{reason}; {remedy}")))
        }
        Err(error) => Ok(relay(format!("{NO_KERNEL_PLANE}{}", error_chain(&error)))),
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
    pub fn register(&mut self, worker: WorkerId, member: Member, socket: OwnedFd) -> Result<(), PlaneError> {
        let socket = Foreign::new(member.uid, socket);
        match self.begin_register(worker, member, examine(self.kind(), socket))? {
            None => Ok(()),
            Some(joining) => joining
                .insert()
                .and_then(|()| self.finish_register(worker))
                .inspect_err(|_| {
                    if let Err(error) = self.unregister(worker) {
                        tracing::error!(%worker, "cannot take back a registration that failed: {error}");
                    }
                }),
        }
    }

    /// As [`register`](Self::register), but for what may have to wait for the worker's socket: that is [`Joining::insert`], after
    /// which the registration is to be [finished](Self::finish_register), or the worker [unregistered](Self::unregister).
    pub(crate) fn begin_register(
        &mut self,
        worker: WorkerId,
        member: Member,
        socket: Examined,
    ) -> Result<Option<Joining>, PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.begin_register(worker, member, socket).map(Some),
            Self::Relay(plane) => plane.register(worker, member, socket).map(|()| None),
        }
    }

    /// Lets a worker be sent to whose socket is on the plane.
    ///
    /// # Errors
    /// If the kernel's map cannot be written.
    pub(crate) fn finish_register(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.finish_register(worker),
            Self::Relay(_) => Ok(()),
        }
    }

    /// Takes a socket off that was put there when its worker had been unregistered.
    pub(crate) fn forget_socket(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.forget_socket(worker),
            Self::Relay(_) => Ok(()),
        }
    }

    /// Where the plane outlives the daemon; `None` if it ends with it.
    pub fn pinned(&self) -> Option<&Path> {
        match self {
            Self::Sockmap(plane) => plane.pinned(),
            Self::Relay(_) => None,
        }
    }

    /// Workers that it holds: not always as many as were asked for, when it was there before.
    pub fn capacity(&self) -> u32 {
        match self {
            Self::Sockmap(plane) => plane.capacity(),
            Self::Relay(plane) => plane.capacity(),
        }
    }

    /// What the last daemon left; they are registered.
    ///
    /// # Errors
    /// If a kernel's map cannot be read.
    pub fn recovered(&self) -> Result<Recovered, PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.recovered(),
            Self::Relay(_) => Ok(Recovered::default()),
        }
    }

    /// Notes a job's number, so that no later daemon gives it to another.
    ///
    /// # Errors
    /// If the kernel's map cannot be written.
    pub fn note_job(&mut self, job: JobId) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.keep(|state| state.last_job = state.last_job.max(job.0)),
            Self::Relay(_) => Ok(()),
        }
    }

    /// Notes how much memory a worker has, for a later daemon that waits for it.
    ///
    /// # Errors
    /// If the kernel's map cannot be written.
    pub(crate) fn note_arenas(&mut self, worker: WorkerId, bytes: u64) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.note_arenas(worker, bytes),
            Self::Relay(_) => Ok(()),
        }
    }

    /// Notes the ceiling under which arenas are made, for a later daemon that takes them over.
    ///
    /// # Errors
    /// If the kernel's map cannot be written.
    pub fn note_pool(&mut self, bytes: u64) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.keep(|state| state.pool_bytes = bytes),
            Self::Relay(_) => Ok(()),
        }
    }

    /// The registered worker whose socket a descriptor is; `None` if it is nobody's.
    ///
    /// # Errors
    /// If the descriptor is not a socket of this plane.
    pub fn whose(&self, socket: impl AsFd) -> Result<Option<WorkerId>, SocketError> {
        match self {
            Self::Sockmap(plane) => plane.whose(&socket::check_tcp(socket)?),
            Self::Relay(_) => Ok(None),
        }
    }

    /// As [`whose`](Self::whose), of a socket that was looked at before.
    pub(crate) fn whose_examined(&self, socket: Examined) -> Result<Option<WorkerId>, SocketError> {
        match (self, socket.found?) {
            (Self::Sockmap(plane), Identity::Tcp(found)) => plane.whose(&found),
            _ => Ok(None),
        }
    }

    /// The workers whose sockets are open, as far as the kernel knows it.
    ///
    /// # Errors
    /// If the kernel's map cannot be read.
    pub fn open_sockets(&self) -> Result<BTreeSet<u32>, PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.open_sockets(),
            Self::Relay(_) => Ok(BTreeSet::new()),
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

    /// Ends the plane, or leaves it to the next daemon: if it is pinned and somebody is registered. Dropping it does the
    /// same but cannot say what went wrong.
    ///
    /// # Errors
    /// If the program cannot be detached, or a pin stays.
    pub fn shutdown(self) -> Result<(), PlaneError> {
        match self {
            Self::Sockmap(plane) => plane.shutdown(),
            Self::Relay(_) => Ok(()),
        }
    }
}

/// A socket that a worker passed, and what it was found to be.
#[derive(Debug)]
pub(crate) struct Examined {
    /// `None` where only its identity is wanted: then it is closed.
    pub(crate) socket: Option<Foreign>,
    pub(crate) found: Result<Identity, SocketError>,
}

/// By what a plane knows a socket.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Identity {
    Tcp(socket::Found),
    Unix { cookie: u64 },
}

/// Looks at a socket that a worker passed. The kernel answers when nobody holds the socket's lock, which its worker may do for
/// as long as it likes: not for the registry's task.
pub(crate) fn examine(kind: PlaneKind, socket: Foreign) -> Examined {
    let found = match kind {
        PlaneKind::Sockmap => socket::check_tcp(socket.as_fd()).map(Identity::Tcp),
        PlaneKind::Relay => socket::check_unix(socket.as_fd()).map(|cookie| Identity::Unix { cookie }),
    };
    let socket = Some(socket);
    Examined { socket, found }
}

/// As [`examine`], and closes the descriptor: where it stayed open, its worker's entry would outlive the worker.
pub(crate) fn identify(kind: PlaneKind, socket: Foreign) -> Examined {
    let examined = examine(kind, socket);
    if let Some(socket) = examined.socket {
        socket.close_here();
    }
    Examined {
        socket: None,
        ..examined
    }
}

/// A worker whose socket is still to be put into the kernel's map.
#[derive(Debug)]
pub(crate) struct Joining {
    pub(super) worker: WorkerId,
    pub(super) socket: Foreign,
    /// The map.
    pub(super) sockets: OwnedFd,
}

impl Joining {
    /// Puts it there, and closes the daemon's descriptor of it. As [`examine`]: not for the registry's task.
    pub(crate) fn insert(self) -> Result<(), PlaneError> {
        let inserted = ebpf::insert_socket(self.sockets, self.worker.0, self.socket);
        inserted.map_err(sockmap::failed(MAP_SOCKETS, "add an entry"))
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
    /// Nobody to put a socket into the kernel's map.
    #[error("{0}")]
    NoThread(String),
    /// Pinned maps that may not be used.
    #[error(transparent)]
    Pins(#[from] PinError),
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
