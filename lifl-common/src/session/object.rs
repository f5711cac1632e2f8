//! Where an object's data is read from, and where it is put: shared memory, or a trainer's own.

use std::ops::Range;
use std::sync::Arc;

use crate::arena::{PeerArena, WritableSlot};
use crate::id::Key;

/// Private memory for one object's data, aligned as vector code likes it.
#[derive(Debug)]
pub struct Buffer {
    words: Vec<u128>,
    bytes: usize,
}

impl Buffer {
    /// So many zeros.
    pub fn new(bytes: usize) -> Self {
        Self {
            words: vec![0; bytes.div_ceil(size_of::<u128>())],
            bytes,
        }
    }

    /// The data.
    pub fn bytes(&self) -> &[u8] {
        &zerocopy::IntoBytes::as_bytes(&self.words[..])[..self.bytes]
    }

    /// To write it.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut zerocopy::IntoBytes::as_mut_bytes(&mut self.words[..])[..self.bytes]
    }
}

/// What is sent.
#[derive(Clone, Debug)]
pub enum Source {
    /// An object that lies in an arena and is lent to the sender, or is the sender's own and published.
    Arena {
        /// The arena.
        arena: Arc<PeerArena>,
        /// The object.
        key: Key,
        /// Where its data lies in it.
        data: Range<usize>,
    },
    /// The sender's own memory.
    Private(Arc<Buffer>),
}

impl Source {
    /// The data; empty if the key is not the arena's.
    pub fn data(&self) -> &[u8] {
        match self {
            Self::Arena { arena, key, data } => {
                let object = arena.object(*key, data.end as u64);
                object.map_or(&[], |object| &object[data.start..])
            }
            Self::Private(buffer) => buffer.bytes(),
        }
    }
}

/// Where what comes is put.
#[derive(Debug)]
pub enum Destination {
    /// A slot of the receiver's arena.
    Slot {
        /// The slot.
        slot: WritableSlot,
        /// Where the data lies in it.
        data: Range<usize>,
    },
    /// The receiver's own memory.
    Private(Buffer),
}

impl Destination {
    /// The data's place.
    pub fn data_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Slot { slot, data } => {
                let slot = slot.bytes_mut();
                let end = data.end.min(slot.len());
                slot.get_mut(data.start..end).unwrap_or_default()
            }
            Self::Private(buffer) => buffer.bytes_mut(),
        }
    }
}
