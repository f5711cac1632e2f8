//! An owner's slots: which is free, being written, published, lent to whom.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::mapping::OwnerMapping;
use super::{ArenaError, Layout};
use crate::id::{ArenaId, Generation, Key, WorkerId};

/// What cannot be done with a slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SlotError {
    /// The key is not that of a published object of this arena.
    #[error("key {0} names no published object of this arena")]
    Stale(Key),
    /// A release by somebody who holds nothing.
    #[error("{worker} does not hold {key}")]
    NotHeld {
        /// The key.
        key: Key,
        /// Who wanted to give it back.
        worker: WorkerId,
    },
}

#[derive(Debug)]
enum State {
    Free,
    /// A [`WritableSlot`] is out; `true` once it has been dropped.
    Writing(Arc<AtomicBool>),
    Published {
        holders: Vec<WorkerId>,
    },
}

#[derive(Debug)]
struct Slot {
    generation: Generation,
    state: State,
}

/// A worker's own arena.
#[derive(Debug)]
pub struct OwnedArena {
    id: ArenaId,
    mapping: Arc<OwnerMapping>,
    slots: Vec<Slot>,
}

impl OwnedArena {
    /// Maps the memfd that the daemon made for this worker; the daemon seals it afterwards.
    ///
    /// # Errors
    /// If it is smaller than the layout or cannot be mapped.
    pub fn new(file: &File, id: ArenaId, layout: Layout) -> Result<Self, ArenaError> {
        let mapping = Arc::new(OwnerMapping::new(file, id, layout)?);
        let slots = (0..layout.slots)
            .map(|_| Slot {
                generation: Generation(0),
                state: State::Free,
            })
            .collect();
        Ok(Self { id, mapping, slots })
    }

    /// Has the kernel give all of its pages now, zeroed, and not one by one when they are first written. It takes as long
    /// as zeroing them does; several workers do it side by side. What has been written stays as it is.
    ///
    /// # Errors
    /// If the machine has not so much memory. Kernels before 5.14 cannot do it and give the pages later.
    pub fn touch(&self) -> Result<(), ArenaError> {
        self.mapping.touch(self.id)
    }

    /// Which arena it is.
    pub fn id(&self) -> ArenaId {
        self.id
    }

    /// Its slots.
    pub fn layout(&self) -> Layout {
        self.mapping.layout()
    }

    /// A free slot to write, or `None` when all are in use.
    pub fn begin(&mut self) -> Option<WritableSlot> {
        let index = self.slots.iter().position(|slot| match &slot.state {
            State::Free => true,
            State::Writing(dropped) => dropped.load(Ordering::Acquire),
            State::Published { .. } => false,
        })?;
        let slot = &mut self.slots[index];
        slot.generation.0 += 1;
        let dropped = Arc::new(AtomicBool::new(false));
        slot.state = State::Writing(Arc::clone(&dropped));
        let key = Key {
            arena: self.id,
            slot: index as u32,
            generation: slot.generation,
        };
        Some(WritableSlot {
            key,
            mapping: Arc::clone(&self.mapping),
            dropped,
        })
    }

    /// Ends the writing of a slot: from here on it is only read, until it is [freed](Self::free).
    ///
    /// # Panics
    /// If the slot is another arena's.
    pub fn publish(&mut self, slot: WritableSlot) -> Key {
        assert!(
            Arc::ptr_eq(&slot.mapping, &self.mapping),
            "a slot of another arena"
        );
        let key = slot.key;
        self.slots[key.slot as usize].state = State::Published { holders: Vec::new() };
        key
    }

    /// Notes that a published object is lent to a worker.
    ///
    /// # Errors
    /// If the key names no published object.
    pub fn lend(&mut self, key: Key, to: WorkerId) -> Result<(), SlotError> {
        self.holders(key)?.push(to);
        Ok(())
    }

    /// Notes that a worker gave an object back; says how many still hold it.
    ///
    /// # Errors
    /// If the key is stale or the worker holds nothing: nothing changes then.
    pub fn release(&mut self, key: Key, by: WorkerId) -> Result<usize, SlotError> {
        let holders = self.holders(key)?;
        let at = holders.iter().position(|&holder| holder == by);
        holders.swap_remove(at.ok_or(SlotError::NotHeld { key, worker: by })?);
        Ok(holders.len())
    }

    /// Takes back everything that is lent to a worker that is gone.
    pub fn take_back(&mut self, from: WorkerId) {
        for slot in &mut self.slots {
            if let State::Published { holders } = &mut slot.state {
                holders.retain(|&holder| holder != from);
            }
        }
    }

    /// How many hold the object; `None` if the key is stale.
    pub fn held_by(&self, key: Key) -> Option<usize> {
        match &self.published(key)?.state {
            State::Published { holders } => Some(holders.len()),
            _ => None,
        }
    }

    /// Makes the slot of a published object writable again, if nobody holds it; says whether it did.
    pub fn free(&mut self, key: Key) -> bool {
        let free = self.held_by(key) == Some(0);
        if free {
            self.slots[key.slot as usize].state = State::Free;
        }
        free
    }

    /// A published object's bytes, its whole slot.
    pub fn object(&self, key: Key) -> Option<&[u8]> {
        self.published(key)?;
        // SAFETY: a published slot has no WritableSlot, and `begin`, which makes one, takes &mut self and passes over
        // published slots.
        Some(unsafe { self.mapping.bytes(key.slot) })
    }

    fn published(&self, key: Key) -> Option<&Slot> {
        let slot = self.slots.get(key.slot as usize)?;
        let current = key.arena == self.id
            && key.generation == slot.generation
            && matches!(slot.state, State::Published { .. });
        current.then_some(slot)
    }

    fn holders(&mut self, key: Key) -> Result<&mut Vec<WorkerId>, SlotError> {
        self.published(key).ok_or(SlotError::Stale(key))?;
        match &mut self.slots[key.slot as usize].state {
            State::Published { holders } => Ok(holders),
            _ => Err(SlotError::Stale(key)),
        }
    }
}

/// A slot that is being written: only its holder has it. Dropped unpublished, it is free again.
#[derive(Debug)]
pub struct WritableSlot {
    key: Key,
    mapping: Arc<OwnerMapping>,
    dropped: Arc<AtomicBool>,
}

impl WritableSlot {
    /// The key that the object will have.
    pub fn key(&self) -> Key {
        self.key
    }

    /// What has been written.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: this is the slot's only WritableSlot, `bytes_mut` needs it exclusively, and `OwnedArena::object`
        // reads only published slots.
        unsafe { self.mapping.bytes(self.key.slot) }
    }

    /// To write it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed exclusively.
        unsafe { self.mapping.bytes_mut(self.key.slot) }
    }
}

impl Drop for WritableSlot {
    fn drop(&mut self) {
        // Pairs with the Acquire in `begin`: what was written here happens before the next writer's writes.
        self.dropped.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::super::{PeerArena, memfd};
    use super::*;

    #[test]
    fn a_touched_arena_has_all_of_its_memory_and_keeps_what_was_written() {
        use std::os::unix::fs::MetadataExt;

        let (file, mut owned) = arena(3);
        let had = || file.metadata().expect("fstat").blocks() * 512;
        let mut slot = owned.begin().expect("a free slot");
        slot.bytes_mut()[0] = 7;
        let bytes = owned.layout().bytes().expect("a layout");
        assert!(had() < bytes, "pages are given when they are written");
        owned.touch().expect("there is memory");
        assert_eq!(had(), bytes);
        assert_eq!(slot.bytes_mut()[..2], [7, 0]);
    }

    fn arena(slots: u32) -> (File, OwnedArena) {
        let layout = Layout::for_objects(slots, 5000).expect("a layout");
        let file = memfd::create("test", layout.memfd_bytes(false).expect("small"), false).expect("memfd");
        let arena = OwnedArena::new(&file, ArenaId(1), layout).expect("mapped");
        memfd::seal(file.as_fd()).expect("sealed");
        (file, arena)
    }

    #[test]
    fn readers_see_what_the_owner_publishes_after_the_seal() {
        let (file, mut arena) = arena(2);
        let peer = PeerArena::new(&file, ArenaId(1), WorkerId(1), arena.layout()).expect("mapped");
        let mut slot = arena.begin().expect("free");
        slot.bytes_mut()[..3].copy_from_slice(b"abc");
        let key = arena.publish(slot);
        assert_eq!(peer.object(key, 3).expect("in bounds"), b"abc");
        let outside = Key { slot: 2, ..key };
        assert!(peer.object(outside, 3).is_err());
        assert!(peer.object(key, arena.layout().slot_bytes + 1).is_err());
    }

    #[test]
    fn the_kernel_keeps_everybody_else_from_writing() {
        let (file, _arena) = arena(1);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let again = File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("reopened");
        assert!(
            memmap2::MmapOptions::new().map_raw(&again).is_err(),
            "a writable mapping was made"
        );
        assert!(
            std::io::Write::write(&mut &again, b"x").is_err(),
            "a write went through"
        );
    }

    #[test]
    fn an_unsealed_memfd_is_not_mapped_for_reading() {
        let layout = Layout::for_objects(1, 10).expect("a layout");
        let file = memfd::create("test", 4096, false).expect("memfd");
        let error = PeerArena::new(&file, ArenaId(1), WorkerId(1), layout).expect_err("not sealed");
        assert!(matches!(error, ArenaError::NotSealed { .. }), "{error}");
    }

    #[test]
    fn a_dropped_writer_leaves_its_slot_free_under_a_new_generation() {
        let (_file, mut arena) = arena(1);
        let first = arena.begin().expect("free").key();
        let second = arena.begin().expect("free again").key();
        assert_eq!(
            (second.slot, second.generation.0),
            (first.slot, first.generation.0 + 1)
        );
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Publish,
        Lend(usize, u32),
        Release(usize, u32),
        TakeBack(u32),
        Free(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Publish),
            (0_usize..6, 1_u32..4).prop_map(|(key, worker)| Step::Lend(key, worker)),
            (0_usize..6, 1_u32..4).prop_map(|(key, worker)| Step::Release(key, worker)),
            (1_u32..4).prop_map(Step::TakeBack),
            (0_usize..6).prop_map(Step::Free),
        ]
    }

    proptest! {
        /// Against a model that knows only lists: no slot is handed out for writing while somebody holds its object.
        #[test]
        fn a_lent_slot_is_never_written(steps in proptest::collection::vec(step(), 0..60)) {
            let (_file, mut arena) = arena(3);
            let mut keys: Vec<Key> = Vec::new();
            let mut held: Vec<(Key, WorkerId)> = Vec::new();
            let mut live: Vec<Key> = Vec::new();
            for step in steps {
                match step {
                    Step::Publish => match arena.begin() {
                        Some(slot) => {
                            prop_assert!(live.iter().all(|key| key.slot != slot.key().slot));
                            let key = arena.publish(slot);
                            keys.push(key);
                            live.push(key);
                        }
                        None => prop_assert_eq!(live.len(), 3),
                    },
                    Step::Lend(at, worker) => if let Some(&key) = keys.get(at) {
                        let lent = arena.lend(key, WorkerId(worker));
                        prop_assert_eq!(lent.is_ok(), live.contains(&key));
                        if lent.is_ok() { held.push((key, WorkerId(worker))); }
                    },
                    Step::Release(at, worker) => if let Some(&key) = keys.get(at) {
                        let at = held.iter().position(|&holder| holder == (key, WorkerId(worker)));
                        let released = arena.release(key, WorkerId(worker));
                        prop_assert_eq!(released.is_ok(), at.is_some());
                        if let Some(at) = at { held.swap_remove(at); }
                    },
                    Step::TakeBack(worker) => {
                        arena.take_back(WorkerId(worker));
                        held.retain(|&(_, holder)| holder != WorkerId(worker));
                    }
                    Step::Free(at) => if let Some(&key) = keys.get(at) {
                        let freed = arena.free(key);
                        let holders = held.iter().filter(|(held, _)| *held == key).count();
                        prop_assert_eq!(freed, live.contains(&key) && holders == 0);
                        if freed { live.retain(|&other| other != key); }
                    },
                }
            }
        }
    }
}
