//! A worker whose daemon is gone: it waits for the next one, and shows it who it is.
//!
//! ```text
//!                 the daemon is gone                    connected, reattached
//!   connected ───────────────────────▶ reconnecting ──────────────────────────▶ connected
//!                                        │  ▲
//!                              nobody    ▼  │ 50 ms … 1 s
//!                              there    waits ── the time is over, or refused ──▶ lost
//! ```
//!
//! A task of its own does that, so that the worker reads and sends frames meanwhile: its socket and the kernel's maps do
//! not need the daemon.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::ClientError;
use crate::control::packet::{PacketError, PacketSocket};
use crate::control::{Event, HeldArena, Message, PROTOCOL, Reply, Request, Welcome};
use crate::id::WorkerId;

/// How long a worker waits for the next daemon unless it is told otherwise.
pub(super) const RECONNECT_TIME: Duration = Duration::from_secs(60);

/// How long a daemon has to let a process in and to answer its greeting.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// How long to wait for a place in the daemon's backlog before trying again.
const SHORTEST_BUSY: Duration = Duration::from_millis(1);
const LONGEST_BUSY: Duration = Duration::from_millis(100);

const SHORTEST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// What a worker shows to the next daemon.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) worker: WorkerId,
    pub(super) role: String,
    pub(super) name: String,
    /// The job's name, if this process made it.
    pub(super) job_name: Option<String>,
    /// The near end of its socket.
    pub(super) socket: OwnedFd,
    pub(super) arenas: Vec<(HeldArena, File)>,
}

impl Identity {
    /// A second one with descriptors of its own.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let arenas = self.arenas.iter();
        let arenas: io::Result<_> = arenas
            .map(|(arena, memfd)| Ok((*arena, memfd.try_clone()?)))
            .collect();
        Ok(Self {
            worker: self.worker,
            role: self.role.clone(),
            name: self.name.clone(),
            job_name: self.job_name.clone(),
            socket: self.socket.try_clone()?,
            arenas: arenas?,
        })
    }
}

/// A connection to the next daemon, which knows this worker.
#[derive(Debug)]
pub(super) struct Reattached {
    pub(super) socket: PacketSocket,
    pub(super) welcome: Welcome,
    pub(super) events: Vec<Event>,
}

/// An attempt to reconnect to the next daemon. Dropping it gives up.
#[derive(Debug)]
pub(super) struct Reconnect(JoinHandle<Result<Reattached, ClientError>>);

impl Reconnect {
    pub(super) fn start(path: PathBuf, identity: Arc<Identity>, reconnect_time: Duration) -> Self {
        Self(tokio::spawn(reconnect(path, identity, reconnect_time)))
    }

    /// Waits for the end of it. Cancel-safe; not to be called again once it has answered.
    pub(super) async fn wait(&mut self) -> Result<Reattached, ClientError> {
        match (&mut self.0).await {
            Ok(reattached) => reattached,
            Err(error) => Err(ClientError::Packet(PacketError::Io(io::Error::other(error)))),
        }
    }
}

impl Drop for Reconnect {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn reconnect(
    path: PathBuf,
    identity: Arc<Identity>,
    reconnect_time: Duration,
) -> Result<Reattached, ClientError> {
    let given_up = Instant::now() + reconnect_time;
    let mut wait = SHORTEST_WAIT;
    loop {
        let error = match within(ANSWER, attempt(&path, &identity)).await {
            Some(Ok(reattached)) => return Ok(reattached),
            Some(Err(error)) if error.is_passing() => error,
            Some(Err(error)) => return Err(error),
            None => ClientError::silent(&path, ANSWER, None),
        };
        if Instant::now() + wait > given_up {
            return Err(ClientError::NotReconnected {
                path,
                reconnect_time,
                source: Box::new(error),
            });
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

async fn attempt(path: &Path, identity: &Identity) -> Result<Reattached, ClientError> {
    let (socket, welcome) = greet(path).await?;
    let request = Request::Reattach {
        role: identity.role.clone(),
        name: identity.name.clone(),
        job_name: identity.job_name.clone(),
        arenas: identity.arenas.iter().map(|(arena, _)| *arena).collect(),
    };
    let memfds = identity.arenas.iter().map(|(_, memfd)| memfd.as_raw_fd());
    let fds: Vec<_> = [identity.socket.as_raw_fd()].into_iter().chain(memfds).collect();
    socket.send(&request, &fds).await?;
    let mut events = Vec::new();
    loop {
        match socket.recv::<Message>().await?.ok_or(ClientError::Closed)?.0 {
            Message::Event(event) => events.push(event),
            Message::Reply(Reply::Reattached { worker, .. }) if worker == identity.worker => {
                return Ok(Reattached {
                    socket,
                    welcome,
                    events,
                });
            }
            Message::Reply(Reply::Error { code, message }) => {
                return Err(ClientError::Refused { code, message });
            }
            Message::Reply(_) => return Err(ClientError::Unexpected { request: "reattach" }),
        }
    }
}

/// Connects. Where the daemon's backlog is full it is tried again: somebody listens, who is busy.
async fn connect(path: &Path) -> Result<PacketSocket, ClientError> {
    let given_up = Instant::now() + ANSWER;
    let mut wait = SHORTEST_BUSY;
    loop {
        let source = match PacketSocket::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        let path = path.to_owned();
        if source.kind() != io::ErrorKind::WouldBlock {
            return Err(ClientError::Connect { path, source });
        }
        if Instant::now() + wait > given_up {
            return Err(ClientError::Busy { path, waited: ANSWER });
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_BUSY);
    }
}

/// Connects and says hello. Whoever listens has [`ANSWER`] for the one and for the other.
pub(super) async fn greet(path: &Path) -> Result<(PacketSocket, Welcome), ClientError> {
    let socket = connect(path).await?;
    let listener = listener_of(&socket);
    let greeted = within(ANSWER, greet_over(socket)).await;
    greeted.unwrap_or_else(|| Err(ClientError::silent(path, ANSWER, listener)))
}

/// The process that listens at the other end, if this process can see it.
pub(super) fn listener_of(socket: &PacketSocket) -> Option<i32> {
    let listener = getsockopt(socket.get_ref(), sockopt::PeerCredentials).ok()?;
    // 0 is a process of another pid namespace; 1 a service manager that listens for the daemon.
    Some(listener.pid()).filter(|&pid| pid > 1)
}

/// A timeout that counts while this process runs: a time in which it was stopped, whoever was stopped with it, counts as one
/// step. `None` when it is over.
pub(super) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    const STEP: Duration = Duration::from_secs(1);
    let mut future = std::pin::pin!(future);
    let mut left = limit;
    while !left.is_zero() {
        let step = left.min(STEP);
        if let Ok(output) = tokio::time::timeout(step, &mut future).await {
            return Some(output);
        }
        left -= step;
    }
    None
}

/// Says hello.
pub(super) async fn greet_over(socket: PacketSocket) -> Result<(PacketSocket, Welcome), ClientError> {
    let hello = Request::Hello { protocol: PROTOCOL };
    // A daemon that lets nobody more in says why and closes, perhaps before it could hear this: then that is what counts.
    let said = socket.send(&hello, &[]).await;
    let answer = socket.recv::<Message>().await?;
    if answer.is_none() {
        said?;
    }
    let welcome = match answer.ok_or(ClientError::Closed)?.0 {
        Message::Reply(Reply::Welcome(welcome)) => welcome,
        Message::Reply(Reply::Error { code, message }) => {
            return Err(ClientError::Refused { code, message });
        }
        _ => return Err(ClientError::Unexpected { request: "hello" }),
    };
    if welcome.protocol != PROTOCOL {
        return Err(ClientError::Protocol {
            theirs: welcome.protocol,
        });
    }
    Ok((socket, welcome))
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept, bind, listen, socket,
    };

    use super::*;

    #[tokio::test]
    async fn a_full_backlog_is_waited_for_and_is_not_no_daemon() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lifl.sock");
        let listener = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        );
        let listener = listener.expect("a socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("short")).expect("bound");
        listen(&listener, Backlog::new(0).expect("in range")).expect("listens");
        let mut waiting = Vec::new();
        let full = loop {
            match PacketSocket::connect(&path) {
                Ok(socket) => waiting.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        let coming = connect(&path);
        tokio::pin!(coming);
        // It has been refused at least once when it is asked the first time.
        assert!(asked_once(coming.as_mut()).await.is_none());
        let accepted = accept(listener.as_raw_fd()).expect("one of those who wait");
        // SAFETY: accept has just made it, and nobody else knows it.
        drop(unsafe { OwnedFd::from_raw_fd(accepted) });
        coming.await.expect("let in");
        drop((waiting, listener));
        let error = connect(&path).await.expect_err("nobody listens");
        let ClientError::Connect { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(source.kind(), io::ErrorKind::ConnectionRefused);
    }

    /// Asks a future once.
    async fn asked_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        let mut future = Some(future);
        std::future::poll_fn(move |context| {
            let polled = future.as_mut().expect("asked once").as_mut().poll(context);
            std::task::Poll::Ready(match polled {
                std::task::Poll::Ready(value) => Some(value),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }
}
