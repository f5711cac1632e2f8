//! What proves each message after the handshake: a tag over the session's key, the message's number and its bytes.
//!
//! HMAC-SHA-256, of which 128 bits are sent. A message that was changed, left out, brought twice or made by somebody else has
//! another tag. Nothing is hidden by it.

use std::fmt;

use hmac::{Hmac, Mac};
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
pub(super) struct Seal(Hmac<Sha256>);

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
        let mut mac = self.0.clone();
        mac.update(&number.to_le_bytes());
        Seal(mac)
    }

    /// The tag of a whole message.
    pub(super) fn seal(&self, number: u64, message: &[u8]) -> [u8; TAG_BYTES] {
        let mut seal = self.begin(number);
        seal.add(message);
        seal.finish()
    }
}

impl Seal {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(super) fn finish(self) -> [u8; TAG_BYTES] {
        let whole = self.0.finalize().into_bytes();
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&whole[..TAG_BYTES]);
        tag
    }

    /// Whether that is the tag. Takes the same time wherever they differ.
    pub(super) fn is(self, tag: &[u8]) -> bool {
        tag.len() == TAG_BYTES && self.0.verify_truncated_left(tag).is_ok()
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
        let mut seal = key.begin(1);
        seal.add(b"one");
        seal.add(b"two");
        assert_eq!(seal.finish(), key.seal(1, b"onetwo"));
    }
}
