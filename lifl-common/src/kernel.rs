//! What the kernel program and the daemon share through maps: their names, keys, values, and the verdict.
//!
//! | map | kind | key | value | written by |
//! | --- | --- | --- | --- | --- |
//! | [`MAP_SOCKETS`] | `SOCKHASH` | worker u32 | the worker's socket; 0: the dead-letter socket | daemon |
//! | [`MAP_SENDERS`] | `HASH` | [`Connection`] | [`Sender`] | daemon |
//! | [`MAP_MEMBERS`] | `HASH` | worker u32 | [`Receiver`] | daemon |
//! | [`MAP_COUNTERS`] | `HASH` | worker u32 | [`Counters`] | daemon (zero), program |
//! | [`MAP_STATE`] | `ARRAY` | 0 | [`State`] | daemon |
//! | [`MAP_INBOXES`] | `ARRAY` | slot u32 | [`Inbox`] | program |
//! | [`MAP_CREDITS`] | `ARRAY` | slot u32 | [`Credit`] | daemon |
//! | [`MAP_LOW`] | `RINGBUF` | – | slot u32 | program |
//!
//! A slot counts the messages that were handed to one receiver, or to all workers of one user; slot [`DEAD_LETTERS`], to the
//! daemon's own socket.
//!
//! A daemon that pins them finds them again when it comes back, with the workers that have gone on meanwhile. What a
//! daemon must know to trust what it finds is in [`State`]; whoever changes a value here, or the frame, raises [`ABI`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::frame::{Frame, Refusal};
use crate::id::{JobId, WorkerId};

/// The SK_MSG program's name in the object.
pub const PROGRAM: &str = "lifl_verdict";
/// The sockets by worker.
pub const MAP_SOCKETS: &str = "SOCKETS";
/// Who sends on a connection.
pub const MAP_SENDERS: &str = "SENDERS";
/// Which job a worker is in.
pub const MAP_MEMBERS: &str = "MEMBERS";
/// What a worker has sent.
pub const MAP_COUNTERS: &str = "COUNTERS";
/// What outlives the daemon beside the workers.
pub const MAP_STATE: &str = "STATE";

/// What was handed to each receiver and each user.
pub const MAP_INBOXES: &str = "INBOXES";
/// What may be.
pub const MAP_CREDITS: &str = "CREDITS";
/// Slots with little credit left; never pinned.
pub const MAP_LOW: &str = "LOW";
/// What both programs have for the daemon's log: a ring buffer of [`LogRecord`]s, never pinned.
pub const MAP_LOG: &str = "LOG";
/// Whether a program records what goes well, too: a global of one byte, 0 or 1.
pub const LOG_ALL: &str = "LOG_ALL";

/// All that are pinned.
pub const MAPS: [&str; 7] = [
    MAP_SOCKETS,
    MAP_SENDERS,
    MAP_MEMBERS,
    MAP_COUNTERS,
    MAP_STATE,
    MAP_INBOXES,
    MAP_CREDITS,
];

/// The version of the maps' values and of the frame. Maps of another version are left alone.
pub const ABI: u32 = 2;

/// Workers that the maps hold unless the daemon asks for another number.
pub const DEFAULT_MAX_WORKERS: u32 = 4096;

/// A TCP connection as `struct sk_msg_md` shows it (`include/uapi/linux/bpf.h`): the identity of a sending socket,
/// unique within a network namespace.
///
/// Addresses and the remote port are in network byte order, the local port in the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Connection {
    /// IPv4 address of the sending end.
    pub local_ip4: u32,
    /// IPv4 address of the far end.
    pub remote_ip4: u32,
    /// Port of the sending end.
    pub local_port: u32,
    /// Port of the far end.
    pub remote_port: u32,
}

/// The worker behind a sending socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Sender {
    /// The worker.
    pub worker: WorkerId,
    /// Its job.
    pub job: JobId,
}

/// A worker that frames may be sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Member {
    /// Its job.
    pub job: JobId,
    /// Whose that job is.
    pub uid: u32,
    /// Bit 0: [`Member::MAKER`], or 0. The others: pages of 4 KiB in its arenas.
    pub flags: u32,
}

impl Member {
    /// The process that made the job: the job ends with it.
    pub const MAKER: u32 = 1;

    /// Bytes in its arenas, which are whole pages: what a later daemon counts for its user until it is back.
    pub const fn arena_bytes(&self) -> u64 {
        (self.flags >> 1) as u64 * 4096
    }

    /// The same member with so many bytes in its arenas; of 8 TiB and more, 8 TiB.
    #[must_use]
    pub const fn with_arena_bytes(self, bytes: u64) -> Self {
        let pages = bytes.div_ceil(4096);
        let most = (u32::MAX >> 1) as u64;
        let pages = if pages > most { most } else { pages };
        Self {
            flags: (self.flags & Self::MAKER) | ((pages as u32) << 1),
            ..self
        }
    }

    /// Whether it made its job.
    pub const fn is_maker(&self) -> bool {
        self.flags & Self::MAKER != 0
    }
}

/// A worker that frames may be sent to, as the program knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Receiver {
    /// Whose it is.
    pub member: Member,
    /// The slot that counts what it is handed.
    pub inbox: u32,
    /// The slot that counts what all workers of its user are handed.
    pub account: u32,
}

/// The slot of the daemon's own socket.
pub const DEAD_LETTERS: u32 = 0;

/// What a receiver, or all of a user's, were handed since the map was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inbox {
    /// Messages: a redirect each, of one frame or several.
    pub messages: u64,
    /// `messages` when the program last said that little credit is left.
    pub told: u64,
    /// So that no two slots share a cache line.
    pub reserved: [u64; 6],
}

/// What may be handed to a receiver, or to all of a user's: so many messages since the map was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Credit {
    /// From here on the program tells the daemon, which then looks what has been read.
    pub low: u64,
    /// One more is refused.
    pub allowed: u64,
    /// While there is no daemon: nobody looks then.
    pub without_daemon: u64,
    /// For later.
    pub reserved: u64,
}

/// How many messages lie between two times that the program tells of one slot, at least.
pub const TELL_EVERY: u64 = 1024;

const _: () = assert!(size_of::<Receiver>() == 20);
const _: () = assert!(size_of::<Inbox>() == 64);
const _: () = assert!(size_of::<Credit>() == 32);

/// What a daemon leaves to the next.
///
/// | offset | field | meaning |
/// | --- | --- | --- |
/// | 0 | `magic` | [`State::MAGIC`], once the maps are complete |
/// | 8 | `abi` | [`ABI`] |
/// | 12 | `last_worker` | no worker has a larger number |
/// | 16 | `last_job` | no job has a larger number |
/// | 20 | `max_workers` | what the maps hold |
/// | 24 | `netns` | cookie of the network namespace in which [`Connection`]s are unique |
/// | 32 | `pool_bytes` | the ceiling under which the arenas were made |
/// | 40 | `reserved` | 0 |
///
/// Its size and the first two fields stay the same in every version, so that each can tell the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct State {
    /// Whose maps these are.
    pub magic: u64,
    /// Their version.
    pub abi: u32,
    /// The last worker's number.
    pub last_worker: u32,
    /// The last job's number.
    pub last_job: u32,
    /// Entries of the maps.
    pub max_workers: u32,
    /// The network namespace's cookie.
    pub netns: u64,
    /// Bytes that arenas may take together.
    pub pool_bytes: u64,
    /// For later.
    pub reserved: [u64; 3],
}

impl State {
    /// The first eight bytes.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"LIFLmaps");
}

const _: () = assert!(size_of::<State>() == 64);
const _: () = assert!(core::mem::offset_of!(State, abi) == 8);

/// What a worker has sent since it registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Counters {
    /// Frames delivered to another worker.
    pub frames: u64,
    /// Bytes of the objects that those frames refer to.
    pub referenced_bytes: u64,
    /// Frames sent to the dead-letter socket.
    pub refused: u64,
    /// Nanoseconds of the last frame by `bpf_ktime_get_ns` (the initial time namespace's `CLOCK_MONOTONIC`), 0 for
    /// none.
    pub last_ns: u64,
}

/// What a program tells the daemon's log. Numbers in a record of one size: text would have to be copied behind length
/// checks, which kernels before 6.18 let only `CAP_PERFMON` do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogRecord {
    /// One of the program's `LOG_` numbers.
    pub event: u32,
    /// What that number's description lists, in that order.
    pub values: [u32; 5],
}

/// LIFL's program refused a frame: the sending socket's worker, the frame's `from` and `to`, the [`Refusal`]'s number.
pub const LOG_REFUSED: u32 = 1;
/// LIFL's program cut off what a write ended with after its last whole frame: bytes.
pub const LOG_CUT: u32 = 2;

const _: () = assert!(size_of::<LogRecord>() == 24);

/// Decides on a frame; both planes ask here.
///
/// `sender` is who the socket belongs to, `member` what is known of the frame's destination. The caller still finds
/// out whether the destination's socket is open.
///
/// # Errors
/// The reason for which the frame is a dead letter.
#[inline(always)]
pub fn verdict(frame: &Frame, sender: Option<&Sender>, member: Option<&Member>) -> Result<(), Refusal> {
    let Some(sender) = sender else {
        return Err(Refusal::UnknownSender);
    };
    if frame.from.0 != sender.worker.0 {
        return Err(Refusal::ForgedSource);
    }
    let Some(member) = member else {
        return Err(Refusal::UnknownWorker);
    };
    if member.job.0 != sender.job.0 {
        return Err(Refusal::OtherJob);
    }
    Ok(())
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::*;

    #[test]
    fn a_frame_passes_only_from_its_own_socket_to_its_own_job() {
        let frame = Frame {
            to: WorkerId(2),
            from: WorkerId(1),
            ..Frame::default()
        };
        let sender = |worker, job| Sender {
            worker: WorkerId(worker),
            job: JobId(job),
        };
        let member = |job| Member {
            job: JobId(job),
            uid: 0,
            flags: 0,
        };
        assert_eq!(verdict(&frame, Some(&sender(1, 1)), Some(&member(1))), Ok(()));
        assert_eq!(
            verdict(&frame, None, Some(&member(1))),
            Err(Refusal::UnknownSender)
        );
        assert_eq!(
            verdict(&frame, Some(&sender(3, 1)), Some(&member(1))),
            Err(Refusal::ForgedSource)
        );
        assert_eq!(
            verdict(&frame, Some(&sender(1, 1)), None),
            Err(Refusal::UnknownWorker)
        );
        assert_eq!(
            verdict(&frame, Some(&sender(1, 1)), Some(&member(2))),
            Err(Refusal::OtherJob)
        );
    }
}
