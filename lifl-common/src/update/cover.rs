//! Whose updates an update contains: the accounting's unit.

use std::fmt;
use std::str::FromStr;

/// Trainers that one job may have: what a [`Cover`] can name in an image's metadata.
pub const MAX_TRAINERS: u32 = 16_384;

const WORDS: usize = MAX_TRAINERS as usize / 64;

/// A set of trainers, by their number in the job ([`share`](crate::config::WorkerSpec::share)).
///
/// As text it is hexadecimal, 16 digits for each 64 trainers, the first 64 first, and no further than there is somebody;
/// nothing for nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cover {
    /// 64 trainers a word, the last word not 0.
    words: Vec<u64>,
}

/// A text or bytes that are no [`Cover`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a set of at most {MAX_TRAINERS} trainers")]
pub struct NoCover;

impl Cover {
    /// One trainer; nobody, if no job has one of that number.
    pub fn of(share: u32) -> Self {
        let mut cover = Self::default();
        cover.set_word(share as usize / 64, 1 << (share % 64));
        cover
    }

    /// Whether it is nobody.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// How many they are.
    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether that trainer is among them.
    pub fn contains(&self, share: u32) -> bool {
        let word = self.words.get(share as usize / 64).copied().unwrap_or(0);
        word >> (share % 64) & 1 == 1
    }

    /// Whether everybody of the other is in this.
    pub fn contains_all(&self, other: &Self) -> bool {
        let theirs = other.words.iter().enumerate();
        theirs.into_iter().all(|(at, word)| word & !self.word(at) == 0)
    }

    /// Takes the others in.
    pub fn add(&mut self, other: &Self) {
        for (at, &word) in other.words.iter().enumerate() {
            self.set_word(at, self.word(at) | word);
        }
    }

    /// The trainers from `64 * at` on, the lowest in bit 0.
    pub fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    /// The words in which there is somebody, with their places.
    pub fn words(&self) -> impl Iterator<Item = (usize, u64)> {
        let words = self.words.iter().copied().enumerate();
        words.filter(|(_, word)| *word != 0)
    }

    /// Sets 64 trainers at once. Beyond [`MAX_TRAINERS`] nothing happens.
    pub fn set_word(&mut self, at: usize, word: u64) {
        if at >= WORDS {
            return;
        }
        if at >= self.words.len() {
            self.words.resize(at + 1, 0);
        }
        self.words[at] = word;
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
    }

    /// As bytes, eight for each 64 trainers, little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Reads [bytes](Self::to_bytes) back.
    ///
    /// # Errors
    /// If they are not whole words, end with one of nobody, or name trainers that no job has.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NoCover> {
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() || words.len() > WORDS {
            return Err(NoCover);
        }
        let mut cover = Self::default();
        for (at, word) in words.iter().enumerate() {
            cover.set_word(at, u64::from_le_bytes(*word));
        }
        if cover.words.len() == words.len() {
            Ok(cover)
        } else {
            Err(NoCover)
        }
    }
}

impl fmt::Display for Cover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.words.iter().try_for_each(|word| write!(f, "{word:016x}"))
    }
}

impl FromStr for Cover {
    type Err = NoCover;

    fn from_str(text: &str) -> Result<Self, NoCover> {
        let (digits, rest) = text.as_bytes().as_chunks::<16>();
        if !rest.is_empty() || digits.len() > WORDS {
            return Err(NoCover);
        }
        let mut cover = Self::default();
        for (at, digits) in digits.iter().enumerate() {
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return Err(NoCover);
            }
            let digits = std::str::from_utf8(digits).map_err(|_| NoCover)?;
            cover.set_word(at, u64::from_str_radix(digits, 16).map_err(|_| NoCover)?);
        }
        let digits = digits.len();
        if cover.words.len() == digits {
            Ok(cover)
        } else {
            Err(NoCover)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn cover(shares: &BTreeSet<u32>) -> Cover {
        let mut all = Cover::default();
        for &share in shares {
            all.add(&Cover::of(share));
        }
        all
    }

    #[test]
    fn beyond_the_most_trainers_there_is_nobody() {
        assert!(Cover::of(MAX_TRAINERS).is_empty());
        assert_eq!(Cover::of(MAX_TRAINERS - 1).count(), 1);
        assert_eq!("zz".parse::<Cover>(), Err(NoCover));
        assert_eq!("+00000000000000f".parse::<Cover>(), Err(NoCover));
        assert_eq!(Cover::from_bytes(&[0; 9]), Err(NoCover));
    }

    proptest! {
        #[test]
        fn a_cover_is_a_set(
            a in proptest::collection::btree_set(0..MAX_TRAINERS, 0..40),
            b in proptest::collection::btree_set(0..300_u32, 0..40),
        ) {
            let (one, other) = (cover(&a), cover(&b));
            prop_assert_eq!(one.count() as usize, a.len());
            prop_assert!(a.iter().all(|&share| one.contains(share)));
            prop_assert_eq!(one.contains_all(&other), a.is_superset(&b));
            let mut both = one.clone();
            both.add(&other);
            prop_assert_eq!(both.count() as usize, a.union(&b).count());
            prop_assert_eq!(one.to_string().parse::<Cover>(), Ok(one.clone()));
            prop_assert_eq!(Cover::from_bytes(&one.to_bytes()), Ok(one));
        }
    }
}
