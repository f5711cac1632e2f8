//! A TCP address of the gateway: connections are taken, and passed on once they have said hello.
//!
//! ```text
//!   accepted ──▶ silent ── hello ──▶ passed on
//!                  └── 10 s, no hello, or one of too many and the oldest ──▶ closed
//! ```

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use lifl_common::session::{Broken, HELLO_TIMEOUT, Hello, Message, Wire, tcp};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::FAREWELL;
use crate::chain::error_chain;

/// Connections that have not said hello; of more the oldest is closed.
const MAX_SILENT: usize = 256;

/// A listening address.
#[derive(Debug)]
pub(super) struct Listener {
    address: SocketAddr,
    open: CancellationToken,
}

impl Listener {
    /// Listens; whoever says hello is passed to `admit`.
    pub(super) async fn bind(
        address: SocketAddr,
        admit: impl Fn(Hello, Wire) + Clone + Send + 'static,
        tasks: &TaskTracker,
        open: CancellationToken,
    ) -> io::Result<Self> {
        let socket = TcpListener::bind(address).await?;
        let address = socket.local_addr()?;
        tasks.spawn(accept(socket, admit, tasks.clone(), open.clone()));
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
    admit: impl Fn(Hello, Wire) + Clone + Send + 'static,
    tasks: TaskTracker,
    open: CancellationToken,
) {
    let mut silent: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            () = open.cancelled() => break,
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
        silent.retain(|task| !task.is_finished());
        if silent.len() >= MAX_SILENT
            && let Some(oldest) = silent.pop_front()
        {
            oldest.abort();
        }
        let admit = admit.clone();
        let greeted = tasks.spawn(async move { greet(stream, peer, admit).await });
        silent.push_back(greeted.abort_handle());
    }
    for task in silent {
        task.abort();
    }
}

/// Waits for a connection's hello.
async fn greet(stream: TcpStream, peer: SocketAddr, admit: impl Fn(Hello, Wire)) {
    let mut wire = match tcp::wire(stream) {
        Ok(wire) => wire,
        Err(error) => {
            tracing::debug!(%peer, "closed at once: {error}");
            return;
        }
    };
    match tokio::time::timeout(HELLO_TIMEOUT, wire.hello()).await {
        Ok(Ok(hello)) => admit(hello, wire),
        Ok(Err(error @ Broken::Malformed(_))) => {
            let reason = error_chain(&error);
            tracing::warn!(%peer, "no worker: {reason}");
            let bye = Message::Bye { last: true, reason };
            let _ = tokio::time::timeout(FAREWELL, wire.close(&bye)).await;
        }
        Ok(Err(error)) => tracing::debug!(%peer, "left before hello: {error}"),
        Err(_) => tracing::warn!(%peer, "said nothing: disconnected"),
    }
}
