//! What the fuzz targets need of [`wire`](super::wire), which is nobody else's.

use lifl_common::flame::MESSAGE_BYTES;

use super::wire::{Message, Registration, Splitter};

/// What became of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// The messages, as their receivers read them.
    pub messages: Vec<[u8; MESSAGE_BYTES]>,
    /// Bytes that are held until more of the stream comes.
    pub left: Vec<u8>,
    /// Whether it turned out to be no stream of references. What comes after that is not looked at.
    pub broken: bool,
}

/// Takes a stream as so many reads bring it.
pub fn split(pieces: &[&[u8]]) -> Split {
    let mut splitter = Splitter::default();
    let mut whole = Vec::new();
    let broken = pieces
        .iter()
        .any(|piece| splitter.push(piece, &mut whole).is_err());
    Split {
        messages: whole.iter().map(|message| *message.bytes()).collect(),
        left: splitter.waiting().to_vec(),
        broken,
    }
}

/// The message that a reference becomes.
pub fn pad(reference: &[u8]) -> Option<[u8; MESSAGE_BYTES]> {
    Message::pad(reference).map(|message| *message.bytes())
}

/// A registration's process, descriptor and id.
pub fn registration(bytes: &[u8]) -> Option<(u32, u32, u32)> {
    Registration::parse(bytes).map(|registration| (registration.pid, registration.fd, registration.id))
}
