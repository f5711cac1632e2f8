//! What proves each message after the handshake: a tag over the message's bytes, by a key of the session and the message's number.
//!
//! Poly1305 with a key that is used once: HMAC-SHA-256 of the session's key over the number. A message that was changed, left
//! out, brought twice or made by somebody else has another tag. Nothing is hidden by it. No two messages may have the same
//! number under one key; one that is sent again under its number must be the same.

use std::fmt;

use hmac::{Hmac, Mac};
use poly1305::universal_hash::{KeyInit, UniversalHash};
use poly1305::{Block, Poly1305};
use sha2::Sha256;

use super::secret::keyed;

/// A tag's length.
pub(super) const TAG_BYTES: usize = 16;

/// The key of one direction of one session.
#[derive(Clone)]
pub struct SealKey(Hmac<Sha256>);

/// The keys of a session.
#[derive(Clone, Debug)]
pub struct SessionKeys {
    /// For what the worker says.
    pub up: SealKey,
    /// For what the gateway says.
    pub down: SealKey,
}

/// A tag in the making.
pub(super) struct Seal {
    sum: Poly1305,
    /// What does not fill a block yet.
    rest: [u8; BLOCK_BYTES],
    filled: usize,
}

const BLOCK_BYTES: usize = size_of::<Block>();

impl SealKey {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self(keyed(key))
    }

    /// One that everybody may know.
    #[cfg(feature = "fuzzing")]
    pub fn from_bytes(key: &[u8; 32]) -> Self {
        Self::new(key)
    }

    /// Of the message of that number.
    pub(super) fn begin(&self, number: u64) -> Seal {
        let mut once = self.0.clone();
        once.update(&number.to_le_bytes());
        Seal {
            sum: Poly1305::new(&once.finalize().into_bytes()),
            rest: [0; BLOCK_BYTES],
            filled: 0,
        }
    }

    /// The tag of a whole message.
    pub(super) fn seal(&self, number: u64, message: &[u8]) -> [u8; TAG_BYTES] {
        let mut seal = self.begin(number);
        seal.add(message);
        seal.finish()
    }
}

impl Seal {
    pub(super) fn add(&mut self, mut bytes: &[u8]) {
        if self.filled > 0 {
            let (first, after) = bytes.split_at(bytes.len().min(BLOCK_BYTES - self.filled));
            self.rest[self.filled..][..first.len()].copy_from_slice(first);
            self.filled += first.len();
            bytes = after;
            if self.filled < BLOCK_BYTES {
                return;
            }
            self.sum.update(&[Block::from(self.rest)]);
        }
        let (blocks, rest) = Block::slice_as_chunks(bytes);
        self.sum.update(blocks);
        self.rest[..rest.len()].copy_from_slice(rest);
        self.filled = rest.len();
    }

    pub(super) fn finish(self) -> [u8; TAG_BYTES] {
        self.sum.compute_unpadded(&self.rest[..self.filled]).into()
    }

    /// Whether that is the tag. Takes the same time wherever they differ.
    pub(super) fn is(self, tag: &[u8]) -> bool {
        let ours = self.finish();
        let differing = |(a, b)| std::hint::black_box(a ^ b);
        tag.len() == TAG_BYTES
            && ours
                .iter()
                .zip(tag)
                .map(differing)
                .fold(0, |all, bits| all | bits)
                == 0
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(…)")
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seal(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_of_one_key_one_number_and_one_message() {
        let (key, other) = (SealKey::new(&[1; 32]), SealKey::new(&[2; 32]));
        let tag = key.seal(5, b"ping");
        let is = |key: &SealKey, number, message: &[u8], tag: &[u8]| {
            let mut seal = key.begin(number);
            seal.add(message);
            seal.is(tag)
        };
        assert!(is(&key, 5, b"ping", &tag));
        assert!(!is(&other, 5, b"ping", &tag));
        assert!(!is(&key, 6, b"ping", &tag));
        assert!(!is(&key, 5, b"pong", &tag));
        // A shorter tag would be easier to guess.
        assert!(!is(&key, 5, b"ping", &tag[..8]));
        assert!(!is(&key, 5, b"ping", &[]));
    }

    #[test]
    fn a_tag_of_pieces_is_the_tag_of_the_whole() {
        let key = SealKey::new(&[3; 32]);
        let whole: Vec<u8> = (0..200).collect();
        for pieces in [1, 3, 15, 16, 17, 31, 32, 64, 199, 200] {
            let mut seal = key.begin(1);
            whole.chunks(pieces).for_each(|piece| seal.add(piece));
            seal.add(&[]);
            assert_eq!(seal.finish(), key.seal(1, &whole), "in pieces of {pieces}");
        }
        // A zero more or less is another message.
        assert_ne!(key.seal(1, &[0; 15]), key.seal(1, &[0; 16]));
        assert_ne!(key.seal(1, &[0; 16]), key.seal(1, &[0; 17]));
        assert_ne!(key.seal(1, &[]), key.seal(1, &[0]));
    }
}
