//! Who may take part: the job's token, and each participant's own secret, which is derived from it.
//!
//! The token stays with the daemon and the job's maker. A worker is handed its secret only, from which neither the token nor
//! another participant's secret can be computed.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// 128 random bits, drawn for each job. Shown by [`to_hex`](Self::to_hex) only.
#[derive(Clone, Copy)]
pub struct JobToken([u8; Self::BYTES]);

/// A job by the first half of its token's SHA-256, which may be known to anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct JobDigest(pub(super) [u8; 16]);

/// What one participant of one job proves itself by. Shown by [`to_text`](Self::to_text) only.
#[derive(Clone)]
pub struct Secret {
    job: JobDigest,
    key: [u8; Self::KEY_BYTES],
}

/// A participant by a digest of its secret, which may be known to anybody and tells neither its name nor its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParticipantId(pub [u8; Self::BYTES]);

/// So many random bytes, from the kernel.
///
/// # Panics
/// If the kernel has none to give, which it always has once it has booted.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel has random bytes");
    bytes
}

impl JobToken {
    /// A token's length.
    pub const BYTES: usize = 16;

    /// A new one.
    pub fn new() -> Self {
        Self(random())
    }

    /// From its bytes.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// As text.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// From text.
    pub fn from_hex(text: &str) -> Option<Self> {
        unhex(text).map(Self)
    }

    /// What the job is called where others can read it.
    pub fn digest(&self) -> JobDigest {
        let digest: [u8; 32] = Sha256::digest(self.0).into();
        let mut job = [0; 16];
        job.copy_from_slice(&digest[..16]);
        JobDigest(job)
    }

    /// The secret of the participant of that name.
    pub fn participant(&self, name: &str) -> Secret {
        Secret {
            job: self.digest(),
            key: derive(&self.0, "participant", &[name.as_bytes()]),
        }
    }
}

impl Default for JobToken {
    fn default() -> Self {
        Self::new()
    }
}

impl Secret {
    const KEY_BYTES: usize = 32;

    /// Of which job.
    pub fn job(&self) -> JobDigest {
        self.job
    }

    /// What the participant says first.
    pub fn id(&self) -> ParticipantId {
        let digest = self.derive("id", &[]);
        let mut id = [0; ParticipantId::BYTES];
        id.copy_from_slice(&digest[..ParticipantId::BYTES]);
        ParticipantId(id)
    }

    /// Another key, for one purpose.
    pub(super) fn derive(&self, purpose: &str, of: &[&[u8]]) -> [u8; 32] {
        derive(&self.key, purpose, of)
    }

    /// As text.
    pub fn to_text(&self) -> String {
        format!("{}.{}", hex(&self.job.0), hex(&self.key))
    }

    /// From text.
    pub fn from_text(text: &str) -> Option<Self> {
        let (job, key) = text.split_once('.')?;
        Some(Self {
            job: JobDigest(unhex(job)?),
            key: unhex(key)?,
        })
    }
}

impl ParticipantId {
    /// An id's length.
    pub const BYTES: usize = 16;
}

impl fmt::Display for JobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(…)")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// HMAC-SHA-256 over a purpose and fields, each with its length in front: no two lists of fields give the same bytes.
pub(super) fn derive(key: &[u8], purpose: &str, fields: &[&[u8]]) -> [u8; 32] {
    let mut mac = keyed(key);
    for field in [b"lifl session", purpose.as_bytes()].iter().chain(fields) {
        mac.update(&(field.len() as u64).to_le_bytes());
        mac.update(field);
    }
    mac.finalize().into_bytes().into()
}

/// HMAC-SHA-256 with that key.
pub(super) fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: u8| char::from(digit).to_digit(16);
        *byte = (value(pair[0])? << 4 | value(pair[1])?) as u8;
    }
    Some(bytes)
}
