//! Which training samples each trainer has.
//!
//! Every process of a job works the whole division out for itself from the labels and the seed, and keeps its own
//! part.

use lifl_common::config::Partition;
use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Gamma};

use super::error::DataError;
use super::samples::CLASSES;
use lifl_common::random::{Stream, stream};

/// Each trainer's samples, by number: every sample belongs to one trainer, every trainer has at least one.
///
/// # Errors
/// If there are fewer samples than trainers (or, for shards, than shards), or the partition's number makes no sense.
pub(super) fn divide(
    partition: Partition,
    labels: &[u8],
    trainers: u32,
    seed: u64,
) -> Result<Vec<Vec<usize>>, DataError> {
    check(partition, labels.len(), trainers)?;
    let mut random = stream(seed, Stream::Partition, 0, 0);
    Ok(match partition {
        Partition::Iid => cut(&shuffled(labels.len(), &mut random), trainers as usize),
        Partition::Shards { per_trainer } => {
            shards(labels, trainers as usize, per_trainer as usize, &mut random)
        }
        Partition::Dirichlet { alpha } => dirichlet(labels, trainers as usize, alpha, &mut random)?,
    })
}

/// Whether so many samples can be divided so.
///
/// # Errors
/// As [`divide`].
pub(super) fn check(partition: Partition, samples: usize, trainers: u32) -> Result<(), DataError> {
    if trainers == 0 || samples < trainers as usize {
        return Err(DataError::TooManyTrainers { samples, trainers });
    }
    let wrong = |what, found, expected| {
        Err(DataError::Partition {
            what,
            found,
            expected,
        })
    };
    match partition {
        Partition::Shards { per_trainer: 0 } => {
            wrong("number of shards per trainer", "0".into(), "at least 1")
        }
        Partition::Shards { per_trainer } => {
            let shards = u64::from(per_trainer) * u64::from(trainers);
            if shards > samples as u64 {
                let found = format!("{shards} for {samples} samples");
                return wrong("number of shards", found, "at most one for each sample");
            }
            Ok(())
        }
        Partition::Dirichlet { alpha } if !(alpha.is_finite() && alpha > 0.0) => {
            wrong("alpha", alpha.to_string(), "a number above 0")
        }
        Partition::Iid | Partition::Dirichlet { .. } => Ok(()),
    }
}

fn shuffled(n: usize, random: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(random);
    order
}

/// Consecutive parts whose sizes differ by one at most.
fn cut(samples: &[usize], parts: usize) -> Vec<Vec<usize>> {
    let at = |part: usize| samples.len() * part / parts;
    (0..parts)
        .map(|part| samples[at(part)..at(part + 1)].to_vec())
        .collect()
}

/// McMahan et al. 2017, section 3: "sort the data by digit label, divide it into 200 shards of size 300, and assign
/// each of 100 clients 2 shards".
fn shards(labels: &[u8], trainers: usize, per_trainer: usize, random: &mut ChaCha8Rng) -> Vec<Vec<usize>> {
    let mut sorted = shuffled(labels.len(), random);
    sorted.sort_by_key(|&sample| labels[sample]);
    let mut shards = cut(&sorted, trainers * per_trainer);
    shards.shuffle(random);
    shards.chunks(per_trainer).map(<[_]>::concat).collect()
}

/// For each label a draw from a symmetric Dirichlet says what part of its samples each trainer gets (the family of
/// Hsu et al. 2019, drawn by label as Yurochkin et al. 2019 do, so that no sample is left over).
fn dirichlet(
    labels: &[u8],
    trainers: usize,
    alpha: f64,
    random: &mut ChaCha8Rng,
) -> Result<Vec<Vec<usize>>, DataError> {
    let gamma = Gamma::new(alpha, 1.0).map_err(|e| DataError::Partition {
        what: "alpha",
        found: format!("{alpha} ({e})"),
        expected: "a number above 0",
    })?;
    let order = shuffled(labels.len(), random);
    let mut parts = vec![Vec::new(); trainers];
    // A draw for each of ten classes, even where there are fewer: what is drawn next does not depend on it.
    let classes = labels
        .iter()
        .max()
        .map_or(0, |&label| usize::from(label) + 1)
        .max(CLASSES);
    for label in 0..classes {
        let of_label: Vec<usize> = order
            .iter()
            .copied()
            .filter(|&sample| usize::from(labels[sample]) == label)
            .collect();
        // A Dirichlet draw is independent Gamma draws over their sum.
        let mut weights: Vec<f64> = (0..trainers).map(|_| gamma.sample(random)).collect();
        let mut sum: f64 = weights.iter().sum();
        if !(sum.is_normal() && sum.is_finite()) {
            // A tiny alpha: all draws round to nothing, and the distribution's limit is one trainer with all.
            weights.fill(0.0);
            weights[random.random_range(0..trainers)] = 1.0;
            sum = 1.0;
        }
        let (mut before, mut start) = (0.0, 0);
        for (trainer, weight) in weights.into_iter().enumerate() {
            before += weight;
            let last = trainer + 1 == trainers;
            let share = (before / sum * of_label.len() as f64).round() as usize;
            let end = if last {
                of_label.len()
            } else {
                share.clamp(start, of_label.len())
            };
            parts[trainer].extend_from_slice(&of_label[start..end]);
            start = end;
        }
    }
    fill_empty(&mut parts);
    Ok(parts)
}

/// Gives each trainer that has nothing one sample of whoever has most.
fn fill_empty(parts: &mut [Vec<usize>]) {
    while let Some(empty) = parts.iter().position(Vec::is_empty) {
        let sample = parts.iter_mut().max_by_key(|part| part.len()).and_then(Vec::pop);
        parts[empty].extend(sample);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i * 7 % 10) as u8).collect()
    }

    fn any_partition() -> impl Strategy<Value = Partition> {
        prop_oneof![
            Just(Partition::Iid),
            (1_u32..4).prop_map(|per_trainer| Partition::Shards { per_trainer }),
            (-9.0..3.0_f64).prop_map(|log| Partition::Dirichlet {
                alpha: 10_f64.powf(log)
            }),
        ]
    }

    proptest! {
        #[test]
        fn every_sample_has_one_trainer_and_every_trainer_a_sample(
            partition in any_partition(), n in 0_usize..300, trainers in 1_u32..40, seed: u64,
        ) {
            let labels = labels(n);
            let Ok(parts) = divide(partition, &labels, trainers, seed) else {
                let most = match partition { Partition::Shards { per_trainer } => per_trainer, _ => 1 };
                prop_assert!(n < (trainers * most) as usize, "refused what can be divided");
                return Ok(());
            };
            prop_assert_eq!(parts.len(), trainers as usize);
            prop_assert!(parts.iter().all(|part| !part.is_empty()));
            let mut all = parts.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..n).collect::<Vec<_>>());
            prop_assert_eq!(divide(partition, &labels, trainers, seed).ok(), Some(parts));
        }

        #[test]
        fn iid_shares_differ_by_one_at_most(n in 40_usize..300, trainers in 1_u32..40, seed: u64) {
            let parts = divide(Partition::Iid, &labels(n), trainers, seed).expect("enough samples");
            let sizes = || parts.iter().map(Vec::len);
            prop_assert!(sizes().max().unwrap_or(0) - sizes().min().unwrap_or(0) <= 1);
        }
    }

    #[test]
    fn shards_give_each_trainer_few_labels() {
        let labels = labels(8000);
        let parts = divide(Partition::Shards { per_trainer: 2 }, &labels, 8, 3).expect("parts");
        for part in parts {
            let mut seen: Vec<u8> = part.iter().map(|&sample| labels[sample]).collect();
            seen.sort_unstable();
            seen.dedup();
            // A shard of 500 of 800 of each label crosses one border at most.
            assert!(seen.len() <= 4, "{} labels", seen.len());
        }
    }

    #[test]
    fn a_small_alpha_is_uneven_and_a_large_one_even() {
        let labels = labels(8000);
        let spread = |alpha| {
            let parts = divide(Partition::Dirichlet { alpha }, &labels, 8, 3).expect("parts");
            let of_zero = |part: &Vec<usize>| part.iter().filter(|&&sample| labels[sample] == 0).count();
            let counts: Vec<usize> = parts.iter().map(of_zero).collect();
            counts.iter().max().unwrap_or(&0) - counts.iter().min().unwrap_or(&0)
        };
        assert!(spread(1000.0) < 40, "{}", spread(1000.0));
        assert!(spread(0.1) > 300, "{}", spread(0.1));
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        let labels = labels(5);
        assert!(divide(Partition::Iid, &labels, 6, 0).is_err());
        assert!(divide(Partition::Iid, &labels, 0, 0).is_err());
        assert!(divide(Partition::Shards { per_trainer: 0 }, &labels, 1, 0).is_err());
        for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(
                divide(Partition::Dirichlet { alpha }, &labels, 1, 0).is_err(),
                "{alpha}"
            );
        }
    }
}
