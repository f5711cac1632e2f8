//! Arenas: shared memory that one worker writes and the others only read.
//!
//! An arena is a memfd made by the daemon for one worker. Its owner maps it read-write ([`OwnedArena`]); then the
//! daemon seals it, and the kernel keeps everybody else ([`PeerArena`]) from writing. What a slot is doing is known
//! only in its owner's private memory, so an owner that dies cannot leave the shared part half-changed.
//!
//! ```text
//!             begin                publish               lend ×n
//!   free ──────────────▶ writing ──────────▶ published ───────────▶ lent to n
//!    ▲                      │                 │     ▲                  │
//!    │◀─── drop ────────────┘                 │     └── n-th release ──┘
//!    └────────────────── free ────────────────┘
//! ```

mod copy;
mod mapping;
pub mod memfd;
mod slots;

pub(crate) use copy::copy_once;
pub use mapping::{Layout, PeerArena};
pub use slots::{OwnedArena, SlotError, WritableSlot};

use crate::id::{ArenaId, Key};

/// Why an arena cannot be mapped or read.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A system call failed.
    #[error("{call} of arena {arena} ({bytes} bytes) failed")]
    System {
        /// The call.
        call: &'static str,
        /// The arena.
        arena: ArenaId,
        /// Its size.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A descriptor that could be cut or written under its readers.
    #[error("arena {arena} is not sealed: its seals are {seals:#x}, {required:#x} are required")]
    NotSealed {
        /// The arena.
        arena: ArenaId,
        /// The seals it has.
        seals: i32,
        /// The seals it must have.
        required: i32,
    },
    /// A descriptor smaller than the arena is said to be.
    #[error("arena {arena} has {found} bytes, {expected} were announced")]
    Size {
        /// The arena.
        arena: ArenaId,
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        expected: u64,
    },
    /// A key that points out of the arena.
    #[error("key {key} with {length} bytes lies outside its arena of {slots} slots of {slot_bytes} bytes")]
    OutOfBounds {
        /// The key.
        key: Key,
        /// The length that came with it.
        length: u64,
        /// The arena's slots.
        slots: u32,
        /// Bytes of each.
        slot_bytes: u64,
    },
}
