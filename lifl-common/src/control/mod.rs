//! Control: what a process and its node's daemon say to each other.
//!
//! One JSON object per packet of a `SOCK_SEQPACKET` Unix socket, at most [`packet::MAX_BYTES`] long, descriptors
//! beside it (`SCM_RIGHTS`), so that any language can speak it. A client sends [`Request`]s, one after the other; the
//! daemon answers each with one [`Reply`] and sends [`Event`]s in between. Who the client is, the daemon knows from
//! the kernel (`SO_PEERCRED`).

mod message;
pub mod packet;
pub mod paths;

pub use message::{
    Amounts, ArenaStatus, DeadLetter, ErrorCode, Event, FlamePage, FlameWorkerStatus, GatewayStatus,
    HeldArena, JobStatus, JobTraffic, Message, PeerLost, RemoteWorker, Reply, Request, Status, UserStatus,
    Welcome, WorkerStatus,
};

/// The protocol's version; a client and a daemon of different versions do not talk.
pub const PROTOCOL: u32 = 4;
