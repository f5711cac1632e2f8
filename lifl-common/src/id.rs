//! Names of things: workers, jobs, arenas, and the 16-byte key of an object in shared memory.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord,
            FromBytes, IntoBytes, Immutable, KnownLayout,
        )]
        #[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "std", serde(transparent))]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A worker's number on its node. Each is given out once, by a daemon and those that take its jobs over, so that a late frame cannot
    /// reach a successor. 0 is nobody: as a destination it is the daemon's dead-letter socket.
    WorkerId, u32, "w"
);
id!(
    /// A job's number on its node; 0 is no job.
    JobId, u32, "j"
);
id!(
    /// An arena's number on its node: four times its owner's, and which of the owner's arenas it is. 0 is no arena.
    ArenaId, u32, "a"
);
id!(
    /// How often a slot has been written: a key whose generation is not the slot's current one is stale.
    Generation, u64, "g"
);

impl WorkerId {
    /// Nobody; as a destination, the dead-letter socket.
    pub const NONE: Self = Self(0);
}

impl ArenaId {
    /// Arenas that one worker may have.
    pub const PER_WORKER: u32 = 4;

    /// A worker's arena, from 0; `None` if it may not have so many, or there is no such number.
    pub const fn of(owner: WorkerId, index: u32) -> Option<Self> {
        match owner.0.checked_mul(Self::PER_WORKER) {
            Some(first) if index < Self::PER_WORKER => Some(Self(first + index)),
            _ => None,
        }
    }

    /// Whose it is.
    pub const fn owner(self) -> WorkerId {
        WorkerId(self.0 / Self::PER_WORKER)
    }
}

/// Names one object in shared memory: 16 bytes, as in LIFL (MLSys 2024, section 4.1).
///
/// Layout, little endian as the machine is: arena u32, slot u32, generation u64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
#[repr(C)]
pub struct Key {
    /// The arena that the object lies in.
    pub arena: ArenaId,
    /// The slot of that arena, from 0.
    pub slot: u32,
    /// The slot's generation when the object was written.
    pub generation: Generation,
}

const _: () = assert!(size_of::<Key>() == 16);

impl Key {
    /// No object.
    pub const NONE: Self = Self {
        arena: ArenaId(0),
        slot: 0,
        generation: Generation(0),
    };
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.arena, self.slot, self.generation)
    }
}
