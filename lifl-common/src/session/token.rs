//! A job's token: what lets a worker into its job through the gateway.

use std::fmt;

/// 128 random bits. It is compared in constant time, and shown by [`to_hex`](Self::to_hex) only.
#[derive(Clone, Copy)]
pub struct JobToken([u8; Self::BYTES]);

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

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// As text.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// From text.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits = text.as_bytes();
        if digits.len() != 2 * Self::BYTES {
            return None;
        }
        let mut bytes = [0; Self::BYTES];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let value = |digit: u8| char::from(digit).to_digit(16);
            *byte = (value(pair[0])? << 4 | value(pair[1])?) as u8;
        }
        Some(Self(bytes))
    }

    /// Whether it is that one. Takes the same time wherever they differ.
    pub fn is(&self, other: &Self) -> bool {
        let differing = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0, |bits, (a, b)| std::hint::black_box(bits | (a ^ b)));
        differing == 0
    }
}

impl Default for JobToken {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for JobToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobToken(…)")
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
