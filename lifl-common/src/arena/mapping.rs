//! The mappings behind arenas: all the unsafe code that shared memory needs.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use memmap2::{Advice, MmapOptions, MmapRaw};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{ArenaError, memfd};
use crate::id::{ArenaId, Key, WorkerId};

/// How an arena is cut into slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// How many slots, at least 1.
    pub slots: u32,
    /// Bytes of each, a multiple of [`Layout::SLOT_ALIGN`].
    pub slot_bytes: u64,
}

impl Layout {
    /// Slots begin at ordinary pages.
    pub const SLOT_ALIGN: u64 = 4096;

    /// Slots that hold objects of `object_bytes`; `None` if there is none or the sizes overflow.
    pub fn for_objects(slots: u32, object_bytes: u64) -> Option<Self> {
        let slot_bytes = object_bytes.max(1).checked_next_multiple_of(Self::SLOT_ALIGN)?;
        let layout = Self { slots, slot_bytes };
        layout.bytes().filter(|_| slots > 0).map(|_| layout)
    }

    /// Bytes of all slots; `None` if that overflows or the layout is none.
    pub fn bytes(&self) -> Option<u64> {
        let bytes = self.slot_bytes.checked_mul(u64::from(self.slots))?;
        let fits =
            bytes > 0 && isize::try_from(bytes).is_ok() && self.slot_bytes.is_multiple_of(Self::SLOT_ALIGN);
        fits.then_some(bytes)
    }

    /// Bytes from which on an arena has huge pages: half of one. Of a smaller arena's, most would be made, and zeroed, for
    /// nothing.
    pub const LARGE_BYTES: u64 = memfd::HUGE_PAGE_BYTES / 2;

    /// Whether it is [large enough](Self::LARGE_BYTES) for huge pages.
    pub fn suits_huge_pages(&self) -> bool {
        self.bytes().is_some_and(|bytes| bytes >= Self::LARGE_BYTES)
    }

    /// Bytes of the memfd behind it: whole pages of its kind; `None` if that overflows.
    pub fn memfd_bytes(&self, huge: bool) -> Option<u64> {
        let page = if huge {
            memfd::HUGE_PAGE_BYTES
        } else {
            Self::SLOT_ALIGN
        };
        self.bytes()?.checked_next_multiple_of(page)
    }
}

/// The owner's mapping: readable and writable, by slot.
#[derive(Debug)]
pub(super) struct OwnerMapping {
    map: MmapRaw,
    layout: Layout,
}

impl OwnerMapping {
    /// Maps the memfd read-write; must come before the seal.
    pub(super) fn new(file: &File, arena: ArenaId, layout: Layout) -> Result<Self, ArenaError> {
        let length = checked_length(file, arena, layout)?;
        let map = MmapOptions::new().len(length).map_raw(file.as_raw_fd());
        let map = map.map_err(system("mmap(PROT_READ|PROT_WRITE)", arena, length as u64))?;
        Ok(Self { map, layout })
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Has the kernel give all pages now.
    pub(super) fn touch(&self, arena: ArenaId) -> Result<(), ArenaError> {
        match self.map.advise(Advice::PopulateWrite) {
            // Before Linux 5.14: each page is given when it is first written.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
            populated => {
                let bytes = self.map.len() as u64;
                populated.map_err(system("madvise(MADV_POPULATE_WRITE)", arena, bytes))
            }
        }
    }

    /// The slot's first byte and its length.
    fn slot(&self, slot: u32) -> (*mut u8, usize) {
        assert!(slot < self.layout.slots, "slot {slot} of {}", self.layout.slots);
        let bytes = self.layout.slot_bytes as usize;
        (self.map.as_mut_ptr().wrapping_add(slot as usize * bytes), bytes)
    }

    /// The slot's bytes, for reading.
    ///
    /// # Safety
    /// While the slice lives nobody may hold the slot's [`bytes_mut`](Self::bytes_mut).
    pub(super) unsafe fn bytes(&self, slot: u32) -> &[u8] {
        let (start, bytes) = self.slot(slot);
        // SAFETY: the slot lies within the mapping, which lives as long as self and which the size seals (and,
        // before them, the daemon, which alone has the descriptor beside us) keep at its length; the caller keeps
        // writers out.
        unsafe { std::slice::from_raw_parts(start, bytes) }
    }

    /// The slot's bytes, for writing.
    ///
    /// # Safety
    /// While the slice lives nobody else may hold the slot's bytes in either way.
    #[expect(
        clippy::mut_from_ref,
        reason = "exclusive per slot, which the caller answers for"
    )]
    pub(super) unsafe fn bytes_mut(&self, slot: u32) -> &mut [u8] {
        let (start, bytes) = self.slot(slot);
        // SAFETY: as in `bytes`, and the caller is the slot's only user.
        unsafe { std::slice::from_raw_parts_mut(start, bytes) }
    }
}

/// Another worker's arena, mapped read-only.
#[derive(Debug)]
pub struct PeerArena {
    id: ArenaId,
    owner: WorkerId,
    map: MmapRaw,
    layout: Layout,
}

impl PeerArena {
    /// Maps a sealed memfd.
    ///
    /// # Errors
    /// If it lacks the seals, is smaller than announced, or cannot be mapped.
    pub fn new(file: &File, id: ArenaId, owner: WorkerId, layout: Layout) -> Result<Self, ArenaError> {
        let seals = memfd::seals(file).map_err(system("fcntl(F_GET_SEALS)", id, 0))?;
        let required = memfd::READER_SEALS;
        if seals & required != required {
            return Err(ArenaError::NotSealed {
                arena: id,
                seals,
                required,
            });
        }
        let length = checked_length(file, id, layout)?;
        let map = MmapOptions::new().len(length).map_raw_read_only(file.as_raw_fd());
        let map = map.map_err(system("mmap(PROT_READ)", id, length as u64))?;
        Ok(Self {
            id,
            owner,
            map,
            layout,
        })
    }

    /// Which arena it is.
    pub fn id(&self) -> ArenaId {
        self.id
    }

    /// Who writes it.
    pub fn owner(&self) -> WorkerId {
        self.owner
    }

    /// The object that the key names, `length` bytes of it.
    ///
    /// To be used only while its owner lends it to the caller: between the frame that brought the key and the
    /// release. In that time the owner does not write the slot, by the protocol; an owner that does so all the same
    /// can change what is read, but not the mapping's bounds. So this is for what may have any value: numbers that are
    /// folded, bytes that are sent or written to a file. Whoever decides something by the bytes reads them once
    /// ([`update::image::check`](crate::update::image::check) copies the header).
    ///
    /// # Errors
    /// If the key is of another arena or the bytes are not all in one slot.
    pub fn object(&self, key: Key, length: u64) -> Result<&[u8], ArenaError> {
        let Layout { slots, slot_bytes } = self.layout;
        if key.arena != self.id || key.slot >= slots || length > slot_bytes {
            return Err(ArenaError::OutOfBounds {
                key,
                length,
                slots,
                slot_bytes,
            });
        }
        let start = u64::from(key.slot) * slot_bytes;
        // SAFETY: start and length were just checked against a mapping that lives as long as self and that
        // F_SEAL_SHRINK keeps from being cut. The bytes are plain; while they are lent their owner does not write
        // them, which is the protocol's promise and all that can be had of another process.
        Ok(unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(start as usize), length as usize) })
    }
}

fn system(call: &'static str, arena: ArenaId, bytes: u64) -> impl FnOnce(io::Error) -> ArenaError {
    move |source| ArenaError::System {
        call,
        arena,
        bytes,
        source,
    }
}

/// The layout's length, after making sure that the file is that long.
fn checked_length(file: &File, arena: ArenaId, layout: Layout) -> Result<usize, ArenaError> {
    let found = file.metadata().map_err(system("fstat", arena, 0))?.len();
    let expected = layout.bytes().unwrap_or(u64::MAX);
    if found < expected {
        return Err(ArenaError::Size {
            arena,
            found,
            expected,
        });
    }
    // Whole files are mapped: hugetlb mappings must be whole pages.
    usize::try_from(found).map_err(|_| ArenaError::Size {
        arena,
        found,
        expected,
    })
}
