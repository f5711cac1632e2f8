//! A TCP address of the gateway: connections are taken, and passed on once they have proved themselves.
//!
//! ```text
//!   accepted ──▶ stranger ── hello of a participant ──▶ named ── proof ──▶ passed on
//!                  │ 10 s in all, or too many             │ no proof
//!                  ▼                                      ▼
//!                closed          something else ──▶ refused: the same words for all, closed
//! ```

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use lifl_common::session::{HELLO_TIMEOUT, SessionError, SessionKeys, tcp};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::newcomers::Newcomers;
use super::{Entrance, FAREWELL, Proven, REFUSAL};
use crate::chain::error_chain;

/// A listening address.
#[derive(Debug)]
pub(super) struct Listener {
    address: SocketAddr,
    open: CancellationToken,
}

impl Listener {
    /// Listens; whoever proves itself enters by `entrance`.
    pub(super) async fn bind(
        address: SocketAddr,
        entrance: Entrance,
        newcomers: Newcomers,
        tasks: &TaskTracker,
        open: CancellationToken,
    ) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        let address = socket.local_addr()?;
        tasks.spawn(accept(socket, entrance, newcomers, tasks.clone(), open.clone()));
        Ok(Self { address, open })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn close(self) {
        self.open.cancel();
    }
}

async fn accept(
    socket: TcpListener,
    entrance: Entrance,
    newcomers: Newcomers,
    tasks: TaskTracker,
    open: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            () = open.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: what is connected must go on, so wait for one to leave.
                tracing::error!("accept on the gateway failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let mut place = newcomers.stranger(peer.ip());
        let (entrance, newcomers, open) = (entrance.clone(), newcomers.clone(), open.clone());
        tasks.spawn(async move {
            let mut stream = stream;
            let hello = async {
                let hello = tcp::hello(&mut stream).await?;
                let known = entrance.identify(hello.participant).await;
                Ok((hello, known))
            };
            let deadline = tokio::time::Instant::now() + HELLO_TIMEOUT;
            let hello = tokio::select! {
                hello = tokio::time::timeout_at(deadline, hello) => hello,
                () = place.evicted() => return,
                () = open.cancelled() => return,
            };
            let greeted = match hello {
                Ok(Ok((hello, Some(known)))) => {
                    let mut named = newcomers.named(hello.participant);
                    drop(place);
                    let asked = tcp::challenge(&mut stream, &hello, Some(&known.participant));
                    let keys = tokio::select! {
                        keys = tokio::time::timeout_at(deadline, asked) => keys,
                        () = named.evicted() => return,
                        () = open.cancelled() => return,
                    };
                    let proven = Proven {
                        job: known.job,
                        name: known.participant.name,
                        instance: hello.instance,
                    };
                    keys.map(|keys| keys.map(|keys| (proven, keys)))
                }
                // Asked as one who is known, and let in never.
                Ok(Ok((hello, None))) => {
                    let asked = tcp::challenge(&mut stream, &hello, None);
                    let keys = tokio::select! {
                        keys = tokio::time::timeout_at(deadline, asked) => keys,
                        () = place.evicted() => return,
                        () = open.cancelled() => return,
                    };
                    keys.map(|keys| Err(keys.err().unwrap_or(SessionError::Closed)))
                }
                Ok(Err(error)) => Ok(Err(error)),
                Err(late) => Err(late),
            };
            judge(stream, peer, greeted, &entrance, &newcomers).await;
        });
    }
}

/// Passes on who has proved itself, and refuses who has not.
async fn judge(
    stream: TcpStream,
    peer: SocketAddr,
    greeted: Result<Result<(Proven, SessionKeys), SessionError>, tokio::time::error::Elapsed>,
    entrance: &Entrance,
    newcomers: &Newcomers,
) {
    match greeted {
        Ok(Ok((proven, keys))) => match tcp::gateway_wire(stream, keys) {
            Ok(wire) => entrance.admit(proven, wire),
            Err(error) => tracing::debug!(%peer, "closed at once: {error}"),
        },
        Ok(Err(error @ SessionError::Handshake(_))) => {
            newcomers.log_refusal(peer, &error_chain(&error));
            let _ = tokio::time::timeout(FAREWELL, tcp::refuse(stream, REFUSAL)).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, "left before its proof: {error}"),
        Err(_) => newcomers.log_refusal(peer, "no proof in time"),
    }
}
