//! Who hangs: found in the times of the workers' last frames, which the plane keeps for every worker.
//!
//! ```text
//!   trainer      answers with its update                         hangs: it has sent nothing since the round began, and its
//!                                                                       time and the grace time are over
//!   aggregator   hands the model down, then, when all its        hangs: nothing of the first although it has the model, or
//!                children have answered, answers itself                 nothing of the second, for the grace time
//! ```

use std::collections::HashMap;

use lifl_common::config::Kind;

use super::pairing::Pair;

/// A round, as the plane's counters show it. Times are nanoseconds of `CLOCK_MONOTONIC`.
pub(super) struct Seen<'a, K, L> {
    /// Who is whose child.
    pub(super) pairs: &'a HashMap<usize, Pair>,
    /// What a worker is.
    pub(super) kind: K,
    /// When it sent its last frame, 0 for never; `None` if it is not there.
    pub(super) last: L,
    /// When the round was announced.
    pub(super) begun: u64,
    /// When trainers that had not answered ceased to be waited for.
    pub(super) closed: Option<u64>,
    /// The time.
    pub(super) now: u64,
    /// The grace time.
    pub(super) grace: u64,
    /// How long a trainer may take; `None` for as long as it likes.
    pub(super) trainers: Option<u64>,
    /// Whether a model may have to wait until a late worker gives an older one back.
    pub(super) models_wait: bool,
}

impl<K: Fn(usize) -> Kind, L: Fn(usize) -> Option<u64>> Seen<'_, K, L> {
    /// The workers that hang.
    pub(super) fn stuck(&self) -> Vec<usize> {
        let mut stuck: Vec<usize> = self
            .pairs
            .keys()
            .copied()
            .filter(|&at| self.is_stuck(at))
            .collect();
        stuck.sort_unstable();
        stuck
    }

    fn is_stuck(&self, index: usize) -> bool {
        let Some(last) = (self.last)(index) else {
            return false;
        };
        let Some(pair) = self.pairs.get(&index) else {
            return false;
        };
        if (self.kind)(index) == Kind::Trainer {
            let late = self
                .trainers
                .is_some_and(|most| self.since(self.begun) > most.saturating_add(self.grace));
            return late && last < self.begun;
        }
        if let Some(answered) = self.all_answered(pair) {
            return last <= answered && self.since(answered) > self.grace;
        }
        if self.models_wait || last >= self.begun {
            return false;
        }
        // It has the model since its parent sent something, the top since the round was announced.
        let has_model = match pair.parent {
            None => Some(self.begun),
            Some(parent) => (self.last)(parent).filter(|&last| last >= self.begun),
        };
        has_model.is_some_and(|since| self.since(since) > self.grace)
    }

    /// When the last of the children answered, if all have; who is not there will not.
    fn all_answered(&self, pair: &Pair) -> Option<u64> {
        let answers = pair.children.iter().map(|&child| self.answered(child));
        answers.collect::<Option<Vec<u64>>>()?.into_iter().max()
    }

    fn answered(&self, index: usize) -> Option<u64> {
        let Some(last) = (self.last)(index) else {
            return ((self.kind)(index) == Kind::Trainer).then_some(self.begun);
        };
        if (self.kind)(index) == Kind::Trainer {
            return (last >= self.begun).then_some(last).or(self.closed);
        }
        let below = self.all_answered(self.pairs.get(&index)?)?;
        (last > below).then_some(last)
    }

    fn since(&self, then: u64) -> u64 {
        self.now.saturating_sub(then)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A top, two leaves, two trainers each: 0; 1, 2; 3, 4, 5, 6.
    fn pairs() -> HashMap<usize, Pair> {
        let pair = |parent, children: &[usize]| Pair {
            parent,
            children: children.to_vec(),
        };
        HashMap::from([
            (0, pair(None, &[1, 2])),
            (1, pair(Some(0), &[3, 4])),
            (2, pair(Some(0), &[5, 6])),
            (3, pair(Some(1), &[])),
            (4, pair(Some(1), &[])),
            (5, pair(Some(2), &[])),
            (6, pair(Some(2), &[])),
        ])
    }

    /// Who hangs at 200, in a round that began at 100 and in which a worker may hang for 50 at the most.
    fn stuck(last: [u64; 7], trainers: Option<u64>, closed: Option<u64>) -> Vec<usize> {
        let kind = |index| match index {
            0 => Kind::Top,
            1 | 2 => Kind::Aggregator,
            _ => Kind::Trainer,
        };
        let seen = Seen {
            pairs: &pairs(),
            kind,
            last: |index: usize| Some(last[index]).filter(|last| *last != u64::MAX),
            begun: 100,
            closed,
            now: 200,
            grace: 50,
            trainers,
            models_wait: false,
        };
        seen.stuck()
    }

    #[test]
    fn who_works_does_not_hang() {
        assert!(
            stuck([101, 102, 102, 90, 90, 90, 90], None, None).is_empty(),
            "all train"
        );
        assert!(
            stuck([101, 102, 102, 190, 190, 190, 190], None, None).is_empty(),
            "both fold"
        );
        assert!(
            stuck([101, 160, 160, 120, 120, 120, 120], None, None).is_empty(),
            "the top folds"
        );
    }

    #[test]
    fn an_aggregator_that_folds_for_too_long_hangs() {
        assert_eq!(stuck([101, 102, 160, 120, 120, 120, 120], None, None), [1]);
        assert_eq!(
            stuck([101, 130, 130, 120, 120, 120, 120], None, None),
            [0],
            "the top"
        );
        let gone = u64::MAX;
        assert_eq!(
            stuck([101, 102, 160, 120, gone, 120, 120], None, None),
            [1],
            "one child is gone"
        );
    }

    #[test]
    fn an_aggregator_that_does_not_hand_the_model_down_hangs() {
        assert_eq!(stuck([101, 95, 160, 90, 90, 120, 120], None, None), [1]);
        assert_eq!(stuck([95, 95, 95, 90, 90, 90, 90], None, None), [0], "the top");
    }

    #[test]
    fn a_trainer_hangs_when_its_time_is_over() {
        assert_eq!(stuck([101, 102, 190, 90, 190, 190, 190], Some(20), None), [3]);
        assert!(stuck([101, 102, 190, 90, 190, 190, 190], Some(60), None).is_empty());
        assert_eq!(
            stuck([101, 102, 190, 90, 120, 190, 190], Some(60), Some(140)),
            [1],
            "whose leaf should go on"
        );
    }
}
