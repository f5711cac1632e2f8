//! Every random choice of learning and data: one stream of numbers for each purpose, worker and round.
//!
//! A stream is ChaCha8 whose key *is* what it is for, so that streams are independent, no order of use matters, and
//! the same seed gives the same run on any machine.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What the numbers are for.
#[derive(Clone, Copy, Debug)]
pub enum Stream {
    /// A fresh model's weights.
    Initial = 1,
    /// The order of samples in a round.
    Shuffle = 2,
    /// Which activations a round's steps leave out.
    Dropout = 3,
    /// What a synthetic trainer changes.
    Noise = 4,
    /// Which samples each trainer has.
    Partition = 5,
    /// A generated training image.
    TrainDigit = 6,
    /// A generated test image.
    TestDigit = 7,
    /// Which children an aggregator selects.
    Select = 8,
}

/// The stream for that purpose, and among its kind for that worker (or other small number) and step.
pub fn stream(seed: u64, purpose: Stream, worker: u32, step: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&step.to_le_bytes());
    key[16..20].copy_from_slice(&worker.to_le_bytes());
    key[20..24].copy_from_slice(&(purpose as u32).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    #[test]
    fn every_part_of_the_key_counts() {
        let first = |mut stream: ChaCha8Rng| stream.random::<u64>();
        let streams = [
            stream(1, Stream::Shuffle, 0, 0),
            stream(2, Stream::Shuffle, 0, 0),
            stream(1, Stream::Dropout, 0, 0),
            stream(1, Stream::Shuffle, 1, 0),
            stream(1, Stream::Shuffle, 0, 1),
        ];
        let numbers: std::collections::HashSet<u64> = streams.into_iter().map(first).collect();
        assert_eq!(numbers.len(), 5);
        assert_eq!(
            first(stream(1, Stream::Shuffle, 0, 0)),
            first(stream(1, Stream::Shuffle, 0, 0))
        );
    }
}
