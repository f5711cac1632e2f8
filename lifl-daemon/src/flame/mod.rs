//! What Flame's Python workers (`backend/shm.py` of its SDK) talk to: the two ports of Flame's own `sockmap_manager`, so
//! that its jobs run unchanged.
//!
//! | port | what comes there |
//! | --- | --- |
//! | 10105 | each worker's connection, which it keeps: its references go out on it, and others' come in |
//! | 10106 | registrations: "descriptor F of process P is that connection, and I is my id" (`wire`) |
//!
//! Who may be registered is in `rules`, what becomes of references in `router`. The program and the map are this
//! module's own (`kernel`): nothing here touches those of LIFL's native workers. On the relay plane the daemon hands
//! over what the program would, on the workers' connections.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod kernel;
mod owner;
mod router;
mod rules;
mod server;
mod wire;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use aya::programs::ProgramError;
use lifl_common::control::FlamePage;
use lifl_common::plane::PlaneKind;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use self::kernel::Kernel;
use self::router::Router;
use self::server::{Event, Port, Ports};
use crate::sock_diag::SocketTable;

/// Events that wait for the router before connections are not read from.
const EVENTS: usize = 1024;

/// How Flame's workers are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where workers connect.
    pub skmsg: SocketAddrV4,
    /// Where they register.
    pub rpc: SocketAddrV4,
    /// How long a reference waits for a receiver that is not registered.
    pub hold: Duration,
    /// Workers of one user at a time.
    pub workers_of_user: u32,
    /// Workers of all users at a time.
    pub max_workers: u32,
}

impl Options {
    /// The port that Flame's SDK connects to.
    pub const SKMSG: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10105);
    /// The port that it registers at.
    pub const RPC: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 10106);
}

/// Why Flame's workers cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FlameError {
    /// A port that others could reach.
    #[error("{0} is not a loopback address: Flame's workers are on this machine")]
    NotLoopback(SocketAddrV4),
    /// A port cannot be had.
    #[error(
        "cannot listen at {address} for Flame's workers: stop whoever does (sockmap_manager, another lifl-daemon), or \
         pass --no-flame"
    )]
    Listen {
        /// The address.
        address: SocketAddrV4,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Nobody could be told apart.
    #[error(
        "Flame's workers cannot be told apart: the kernel's table of sockets cannot be opened; allow AF_NETLINK to the daemon, or \
         pass --no-flame"
    )]
    Sockets(#[source] io::Error),
    /// The program cannot be loaded.
    #[error("the kernel's part for Flame's workers is not available: {reason}; {remedy}")]
    Kernel {
        /// Why.
        reason: String,
        /// What to do.
        remedy: String,
    },
    /// The program stayed attached.
    #[error("cannot detach the program for Flame's workers")]
    Detach(#[source] ProgramError),
}

/// Serves Flame's workers.
#[derive(Debug)]
pub struct Flame {
    skmsg: SocketAddrV4,
    rpc: SocketAddrV4,
    desk: Desk,
    task: tokio::task::JoinHandle<Result<(), FlameError>>,
}

/// Where to ask for the workers' status.
#[derive(Clone, Debug)]
pub(crate) struct Desk(mpsc::Sender<Event>);

impl Desk {
    /// A page of the workers that a user may see, after that one; `None` when they are not served any more.
    pub(crate) async fn page(&self, uid: u32, after: Option<(u32, u32)>) -> Option<FlamePage> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Event::Status { uid, after, reply }).await.ok()?;
        answer.await.ok()
    }
}

impl Flame {
    /// Listens, and loads the kernel's part unless the plane is the relay. It ends with `shutdown`.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If a port is taken or not on the loopback, or the program cannot be loaded.
    pub fn start(
        options: Options,
        plane: PlaneKind,
        shutdown: CancellationToken,
    ) -> Result<Self, FlameError> {
        let ports = Ports {
            skmsg: listen(options.skmsg)?,
            rpc: listen(options.rpc)?,
        };
        let (skmsg, rpc) = (
            local(&ports.skmsg, options.skmsg)?,
            local(&ports.rpc, options.rpc)?,
        );
        // On the relay plane nothing comes this way, and the sender must stay.
        let (kernel, undelivered, idle) = match plane {
            PlaneKind::Sockmap => {
                let (kernel, undelivered) = Kernel::load(options.max_workers).map_err(|error| {
                    let (reason, remedy) = error.explain("or pass --no-flame");
                    FlameError::Kernel { reason, remedy }
                })?;
                if let Some(why) = kernel.unbounded() {
                    tracing::warn!("references that Flame's workers do not read are not bounded: {why}");
                }
                (Some(kernel), undelivered, None)
            }
            PlaneKind::Relay => {
                let (idle, undelivered) = mpsc::channel(1);
                (None, undelivered, Some(idle))
            }
        };
        let (events, inbox) = mpsc::channel(EVENTS);
        let remembered = options.max_workers as usize;
        let router = Router::new(kernel, skmsg, options.hold, remembered, events.clone());
        let desk = Desk(events.clone());
        let served = server::serve(
            ports,
            router,
            undelivered,
            (events, inbox),
            options.workers_of_user.min(options.max_workers),
            shutdown,
        );
        let task = tokio::spawn(async move {
            let router = served.await;
            drop(idle);
            match router.into_kernel() {
                Some(kernel) => kernel.detach().map_err(FlameError::Detach),
                None => Ok(()),
            }
        });
        Ok(Self {
            skmsg,
            rpc,
            desk,
            task,
        })
    }

    /// Where workers connect, and where they register.
    pub fn addresses(&self) -> (SocketAddrV4, SocketAddrV4) {
        (self.skmsg, self.rpc)
    }

    pub(crate) fn desk(&self) -> Desk {
        self.desk.clone()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If the program cannot be detached.
    ///
    /// # Panics
    /// If its task did.
    pub async fn wait(self) -> Result<(), FlameError> {
        self.task.await.expect("the task for Flame's workers panicked")
    }
}

fn listen(address: SocketAddrV4) -> Result<Port, FlameError> {
    if !address.ip().is_loopback() {
        return Err(FlameError::NotLoopback(address));
    }
    let failed = |source| FlameError::Listen { address, source };
    let sockets = SocketTable::open().map_err(FlameError::Sockets)?;
    let listen = || {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::V4(address))?;
        // All workers of a job may start at the same moment.
        Ok(Port::new(socket.listen(4096)?, sockets))
    };
    listen().map_err(failed)
}

fn local(port: &Port, asked: SocketAddrV4) -> Result<SocketAddrV4, FlameError> {
    match port.local() {
        Ok(SocketAddr::V4(address)) => Ok(address),
        Ok(SocketAddr::V6(_)) => Err(FlameError::NotLoopback(asked)),
        Err(source) => Err(FlameError::Listen {
            address: asked,
            source,
        }),
    }
}
