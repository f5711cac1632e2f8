//! Sessions: what a worker that is not on the node's shared memory says to the node's gateway, over TCP or MQTT.
//!
//! The gateway stands in for such a worker with a *proxy*: an ordinary worker of the job in the daemon. The proxy is
//! lent models and streams them out; it takes updates from the wire straight into its slot and lends them on. Both ends
//! run the same [`Transfers`] over a [`Wire`], of which there are two: [`tcp`] and, with the feature of that name, `mqtt`.
//!
//! # Messages
//!
//! Little endian. Over TCP a message is `u32` length (of all that follows, the tag too), `u8` kind, fields, tag; over MQTT one publish is `u64` session,
//! `u32` sequence, `u8` kind, fields, tag. No length is believed before it has been held against the kind's own maximum. The
//! tag has 16 bytes and seals what is before it and the message's number: [`handshake`] says where its key comes from, and
//! has the messages before the first sealed one, 1, 13 and 14.
//!
//! | kind | name | from | fields | meaning |
//! | --- | --- | --- | --- | --- |
//! | 1 | hello | worker | `"LIFL"`, version `u16`, participant 16 bytes, instance `u64`, nonce 32 bytes; no tag | first; `instance` tells one process of a participant from another |
//! | 13 | challenge | gateway | version `u16`, nonce 32 bytes, proof 32 bytes; no tag | whom the gateway has to do with must know the secret |
//! | 14 | proof | worker | proof 32 bytes; no tag | knows it |
//! | 2 | welcome | gateway | | let in |
//! | 3 | ready | worker | | can begin |
//! | 4 | model | gateway | round `u32`, length `u64`, schema `u64` | a round begins: its model's data is to come |
//! | 5 | update | worker | round `u32`, length `u64`, schema `u64`, samples `u64`, loss `f64`, folded `u64`, bytes copied `u64`, cover `u16` length and bytes | an update's data is to come |
//! | 6 | chunk | both | round `u32`, offset `u64`, then 1 to 1 MiB of data | a piece of the sender's object |
//! | 7 | ack | both | round `u32`, offset `u64` | all before the offset is there. The first after a header says where to begin |
//! | 8 | verdict | gateway | round `u32`, refusal `u16` (0: accepted) | what became of the update |
//! | 9 | nothing | worker | round `u32` | no update in this round |
//! | 10 | ping | both | | still there |
//! | 11 | end | gateway | `u16` length and text | the job is over |
//! | 12 | bye | both | last `u8`, `u16` length and text | the session is over; `last`: it is no use to come again |
//!
//! # An object's transfer
//!
//! ```text
//!   sender                       receiver
//!     ├── model or update ─────▶ │   has a place for it? else the sender waits: that is the back-pressure
//!     │◀──────────────── ack n ──┤   n = what is there already: 0, or where a broken session ended
//!     ├── chunk n … ───────────▶ │   into the slot, where it stays
//!     │◀──────────────── ack m ──┤   a sender is at most a window ahead of the last ack;
//!     │                          │   one comes at the latest after two chunks
//!     ├── … ───────────────────▶ │
//!     │◀─────────── ack length ──┤   complete. A header that comes again gets this ack again, and no second object
//! ```
//!
//! # A session
//!
//! ```text
//!             hello            challenge, proof           welcome
//!   connected ─────▶ not proven ───────────────▶ proven ─────────▶ open ──── end ────▶ over
//!       ▲                │ bye (not sealed)         │ bye (last)    │ silence, stall, malformed, connection lost
//!       │                ▼                          ▼               ▼
//!       ├─── back-off ───┘                        over           broken ── back-off ─┐   the transfers' state stays on both
//!       └────────────────────────────────────────────────────────────────────────────┘   sides: the headers are said again,
//!                                                                                        and the acks say where to go on
//! ```
//!
//! A session that is broken for longer than [`GRACE`] is given up: the proxy leaves the job, and the worker ends.

mod broker;
pub mod handshake;
mod message;
#[cfg(feature = "mqtt")]
pub mod mqtt;
mod object;
pub mod reach;
mod reconnect_policy;
mod seal;
mod secret;
pub mod tcp;
mod transfers;
mod wire;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub use broker::Broker;
pub use message::{Malformed, Message, Object, SessionError};
pub use object::{Buffer, Destination, Source};
pub use reconnect_policy::ReconnectPolicy;
pub use seal::{SealKey, SessionKeys};
pub use secret::{JobDigest, JobToken, ParticipantId, Secret, random};
pub use transfers::{TransferEvent, Transfers};
pub use wire::{Limits, Wire};

/// The version of what is said in sessions; both ends must have the same.
pub const VERSION: u16 = 3;

/// What a first message begins with.
const MAGIC: [u8; 4] = *b"LIFL";

/// How long a proxy and its worker wait for a broken session to be taken up again.
pub const GRACE: Duration = Duration::from_secs(60);

/// How long a handshake may take, from the connection to the proof.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest name of a worker beyond the node's shared memory: its proxy's name must fit into a registration.
pub const MAX_NAME_BYTES: usize = 112;

/// The environment variable in which a worker finds its [`Secret`], so that it is not on the command line.
pub const SECRET_VARIABLE: &str = "LIFL_GATEWAY_SECRET";

/// What the proxy's name has behind its worker's.
const PROXY_SUFFIX: &str = "@gateway";

/// The name under which the gateway registers a worker's proxy.
pub fn proxy_name(worker: &str) -> String {
    format!("{worker}{PROXY_SUFFIX}")
}

/// The worker that a proxy of that name stands for.
pub fn proxied(name: &str) -> Option<&str> {
    name.strip_suffix(PROXY_SUFFIX)
}

/// Bytes over wires, in both directions.
#[derive(Debug, Default)]
pub struct Traffic {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Traffic {
    /// Bytes that came.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes that went.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
