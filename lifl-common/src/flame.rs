//! What the kernel program for Flame's Python workers and the daemon share: the message on a worker's socket, and the
//! program's maps. The wire is Flame's (`backend/shm.py` of its SDK), only the padding is ours.
//!
//! A *reference* is what a worker writes: the receiver's id, then a protobuf message without a length. A *message* is
//! what a worker reads, always [`MESSAGE_BYTES`] long, since it takes what one `recv(1024)` returns for one reference:
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 4 | the receiver's id, little endian |
//! | 4 | n | the protobuf message `Data` as it was written |
//! | 4 + n | 3 | [`PADDING_TAG`], and the number of bytes that follow as a varint of two bytes |
//! | 7 + n | rest | zeros: a field that `Data` has not, which every protobuf reader skips |
//!
//! While the daemon holds a message for a receiver that is not registered yet, the last [`STAMP_BYTES`] are the sender's
//! [`Address`], written by the program.
//!
//! | map | kind | key | value | written by |
//! | --- | --- | --- | --- | --- |
//! | [`MAP_SOCKETS`] | `SOCKHASH` | [`Address`] | the worker's socket; [`HOLD`], [`REFUSE`]: the daemon's own | daemon |
//! | [`MAP_SENDERS`] | `HASH` | [`Connection`](crate::kernel::Connection) | [`Sender`] | daemon |
//! | [`MAP_WORKERS`] | `HASH` | [`Address`] | [`Worker`] | daemon (`live`, `changed`), program (the rest) |
//!
//! Taskids stand in configs, so a job's workers have the ids of the workers of the run before. That such a one is gone
//! says nothing to a worker that came later: [`is_gone`] is for those who were there.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The SK_MSG program's name in the object.
pub const PROGRAM: &str = "flame_verdict";
/// The sockets by address.
pub const MAP_SOCKETS: &str = "SOCKETS";
/// Who sends on a connection.
pub const MAP_SENDERS: &str = "SENDERS";
/// Who is registered, or was.
pub const MAP_WORKERS: &str = "WORKERS";

/// Bytes of a message: Flame's workers read with `recv(1024)`.
pub const MESSAGE_BYTES: usize = 1024;
/// Bytes of the receiver's id.
pub const HEADER_BYTES: usize = 4;
/// Bytes of a held message's stamp.
pub const STAMP_BYTES: usize = size_of::<Address>();
/// Bytes of the longest reference: behind it there must be room for the padding's tag and length, and for a stamp.
pub const LONGEST_REFERENCE_BYTES: usize = MESSAGE_BYTES - 3 - STAMP_BYTES;
/// Protobuf field 15, length-delimited.
pub const PADDING_TAG: u8 = 15 << 3 | 2;

/// A Flame worker: its user, and the last two bytes of its taskid.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Address {
    /// Whose it is. Users do not see each other's workers, so their ids cannot collide.
    pub uid: u32,
    /// Its id on the wire.
    pub id: u32,
}

/// The daemon's own socket, for references to workers that are not registered yet. (No user has this uid: it is the
/// kernel's "unchanged" in `chown` and `setuid`.)
pub const HOLD: Address = Address { uid: u32::MAX, id: 0 };

/// The daemon's other socket, which is shut down: what is sent there fails with `EPIPE`.
pub const REFUSE: Address = Address { uid: u32::MAX, id: 1 };

/// [`LogRecord`](crate::kernel::LogRecord)'s event for a reference that was handed over or held: user, sender's id,
/// receiver's id, bytes.
pub const LOG_TAKEN: u32 = 16;
/// A reference to a worker that was there and is gone: as for [`LOG_TAKEN`].
pub const LOG_GONE: u32 = 17;
/// A write that is no reference, since it is too short or too long: user, sender's id, bytes.
pub const LOG_LENGTH: u32 = 18;
/// The receiver's socket is closed, and the daemon has not taken it off the map yet: as for [`LOG_TAKEN`].
pub const LOG_CLOSED: u32 = 19;
/// The kernel had no memory to look at the reference or to pad it: as for [`LOG_TAKEN`].
pub const LOG_NO_MEMORY: u32 = 20;
/// The receiver, or all workers of its user, have as many references unread as may wait, or, where the receiver is not registered yet,
/// as many of the sender's user wait for the daemon to take them: as for [`LOG_TAKEN`].
pub const LOG_FULL: u32 = 21;

/// A worker in the program's map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Worker {
    /// References handed over to their receivers.
    pub sent: u64,
    /// References to workers that were not registered yet.
    pub held: u64,
    /// References refused.
    pub refused: u64,
    /// Nanoseconds of the last reference by `bpf_ktime_get_ns` (the initial time namespace's `CLOCK_MONOTONIC`), 0 for
    /// none.
    pub last_ns: u64,
    /// 1 while it is registered, 0 when it is gone.
    pub live: u64,
    /// Which of the daemon's changes made it so: they are numbered.
    pub changed: u64,
    /// While it is registered, the slot that counts what it is handed ([`MAP_INBOXES`](crate::kernel::MAP_INBOXES)).
    pub inbox: u32,
    /// The slot that counts what all workers of its user are handed.
    pub account: u32,
}

/// The worker behind a sending socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Sender {
    /// The worker.
    pub address: Address,
    /// The number of the change that registered it.
    pub since: u64,
    /// The slot that counts what its user's workers have the daemon hold ([`MAP_INBOXES`](crate::kernel::MAP_INBOXES)).
    pub held: u32,
    /// 0.
    pub reserved: u32,
}

/// Whether a receiver was there and is gone, as seen from a sender: one that came later waits for its successor.
#[inline(always)]
pub fn is_gone(receiver: &Worker, sender_since: u64) -> bool {
    receiver.live != 1 && sender_since < receiver.changed
}

const _: () = assert!(size_of::<Address>() == 8);
const _: () = assert!(size_of::<Worker>() == 56);
const _: () = assert!(size_of::<Sender>() == 24);
