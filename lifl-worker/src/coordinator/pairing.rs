//! Who is whose child in a round: round robin within each group, as Flame's coordinator pairs, and of these as many as
//! the parent selects.

use std::collections::BTreeMap;

use lifl_common::config::{Group, Kind, WorkerSpec};
use lifl_common::random::{Stream, stream};

/// One worker's part in a round, by index into the job's workers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// Its parent; `None` for the top.
    pub parent: Option<usize>,
    /// Its children, in folding order.
    pub children: Vec<usize>,
}

/// Pairs the workers that are present, level by level from the trainers up: a group's children go to its parents in
/// turn. Aggregators that get no children take no part, nor does anybody whose group has no parent left.
///
/// What comes out depends on who is present only, so that equal runs fold in equal order. A worker that takes no part
/// is not in the map; without any way from a trainer to the top it is empty.
pub fn pair(workers: &[WorkerSpec], present: impl Fn(usize) -> bool) -> BTreeMap<usize, Pair> {
    let mut pairs: BTreeMap<usize, Pair> = BTreeMap::new();
    let deepest = workers.iter().map(|worker| worker.level).max().unwrap_or(0);
    let mut below: Vec<usize> = Vec::new();
    for level in (0..=deepest).rev() {
        let here = workers
            .iter()
            .enumerate()
            .filter(|(index, worker)| worker.level == level && present(*index));
        let mut parents: BTreeMap<&Group, Vec<usize>> = BTreeMap::new();
        let mut next: Vec<usize> = Vec::new();
        for (index, worker) in here {
            match &worker.down {
                Some(group) => parents.entry(group).or_default().push(index),
                None => next.push(index),
            }
        }
        let mut turn: BTreeMap<&Group, usize> = BTreeMap::new();
        let mut cut_off: Vec<usize> = Vec::new();
        for child in below {
            let candidates = workers[child]
                .up
                .as_ref()
                .and_then(|group| Some((group, parents.get(group)?)));
            let Some((group, candidates)) = candidates else {
                cut_off.push(child);
                continue;
            };
            let turn = turn.entry(group).or_default();
            let parent = candidates[*turn % candidates.len()];
            *turn += 1;
            pairs.entry(child).or_default().parent = Some(parent);
            let entry = pairs.entry(parent).or_default();
            if entry.children.is_empty() {
                next.push(parent);
            }
            entry.children.push(child);
        }
        for index in cut_off {
            drop_subtree(&mut pairs, index);
        }
        next.sort_unstable();
        below = next;
    }
    // The top may have been left without anybody below it.
    if !below.iter().any(|&index| workers[index].kind == Kind::Top) {
        pairs.clear();
    }
    pairs
}

/// Leaves of each aggregator's children as many as it [selects](WorkerSpec::select), drawn anew for each round, and takes
/// out the others with all below them. Equal seeds select equally among equal children.
pub(super) fn select(workers: &[WorkerSpec], pairs: &mut BTreeMap<usize, Pair>, seed: u64, round: u32) {
    // From the top down, which is their order, so that nothing is drawn for who is out.
    for (index, worker) in workers.iter().enumerate() {
        let Some(k) = worker.select.map(|k| k as usize) else {
            continue;
        };
        let Some(pair) = pairs.get_mut(&index).filter(|pair| pair.children.len() > k) else {
            continue;
        };
        let mut random = stream(seed, Stream::Select, index as u32, round.into());
        let mut chosen = rand::seq::index::sample(&mut random, pair.children.len(), k).into_vec();
        // Folding order stays.
        chosen.sort_unstable();
        let children = std::mem::take(&mut pair.children);
        pair.children = chosen.iter().map(|&at| children[at]).collect();
        for (at, child) in children.into_iter().enumerate() {
            if chosen.binary_search(&at).is_err() {
                drop_subtree(pairs, child);
            }
        }
    }
}

/// Takes out a worker without a parent, and everything below it.
fn drop_subtree(pairs: &mut BTreeMap<usize, Pair>, index: usize) {
    if let Some(pair) = pairs.remove(&index) {
        for child in pair.children {
            drop_subtree(pairs, child);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_job::job;

    /// One top, two middles, four leaves, eight trainers, all in one group a channel.
    fn three_levels() -> Vec<WorkerSpec> {
        job(&[1, 2, 4, 8]).workers
    }

    #[test]
    fn children_go_to_parents_in_turn() {
        let pairs = pair(&three_levels(), |_| true);
        assert_eq!(pairs[&0].children, [1, 2]);
        assert_eq!(pairs[&1].children, [3, 5]);
        assert_eq!(pairs[&2].children, [4, 6]);
        assert_eq!(pairs[&3].children, [7, 11]);
        assert_eq!(pairs[&14].parent, Some(6));
        assert_eq!(pairs.len(), 15);
    }

    #[test]
    fn aggregators_without_children_are_left_out() {
        // Only trainers 7 and 8 are there: two leaves are enough for them.
        let pairs = pair(&three_levels(), |index| index < 9);
        assert_eq!(pairs.len(), 1 + 2 + 2 + 2);
        assert!(!pairs.contains_key(&5) && !pairs.contains_key(&6));
    }

    #[test]
    fn groups_are_separate_subtrees() {
        let mut workers = job(&[1, 2, 3]).workers;
        let group =
            |of: &mut Option<Group>, name: &str| of.as_mut().expect("a group").group = name.to_owned();
        for (worker, side) in [(1, "east"), (2, "west")] {
            group(&mut workers[worker].down, side);
        }
        for (worker, side) in [(3, "west"), (4, "west"), (5, "east")] {
            group(&mut workers[worker].up, side);
        }
        let pairs = pair(&workers, |_| true);
        assert_eq!(pairs[&1].children, [5]);
        assert_eq!(pairs[&2].children, [3, 4]);
    }

    #[test]
    fn without_a_way_up_nobody_takes_part() {
        assert!(pair(&three_levels(), |index| index != 0).is_empty(), "no top");
        assert!(pair(&three_levels(), |index| index < 7).is_empty(), "no trainer");
        assert!(
            pair(&three_levels(), |index| !(1..=2).contains(&index)).is_empty(),
            "no middle"
        );
    }

    /// The tree in which each aggregator selects so many.
    fn selective(k: u32) -> Vec<WorkerSpec> {
        let mut workers = three_levels();
        for worker in &mut workers {
            worker.select = (worker.kind != Kind::Trainer).then_some(k);
        }
        workers
    }

    #[test]
    fn each_aggregator_selects_so_many_children() {
        let workers = selective(1);
        let mut taken = std::collections::HashSet::new();
        for round in 1..=20 {
            let mut pairs = pair(&workers, |_| true);
            select(&workers, &mut pairs, 3, round);
            // One on each level: the others, and all below them, take no part.
            assert_eq!(pairs.len(), 4, "round {round}: {pairs:?}");
            taken.extend(pairs.keys().copied().filter(|&index| index >= 7));
            let mut again = pair(&workers, |_| true);
            select(&workers, &mut again, 3, round);
            assert_eq!(pairs, again, "equal seeds select equally");
        }
        assert!(
            taken.len() > 4,
            "each round draws anew, but only {taken:?} took part"
        );
    }

    #[test]
    fn more_than_there_are_is_all() {
        let workers = selective(2);
        let all = pair(&workers, |_| true);
        let mut pairs = all.clone();
        select(&workers, &mut pairs, 3, 1);
        assert_eq!(pairs, all);
    }

    proptest! {
        #[test]
        fn what_is_selected_is_still_a_tree(
            present in proptest::collection::vec(any::<bool>(), 15), k in 1_u32..4, seed: u64, round: u32,
        ) {
            let workers = selective(k);
            let all = pair(&workers, |index| present[index]);
            let mut pairs = all.clone();
            select(&workers, &mut pairs, seed, round);
            for (&index, pair) in &pairs {
                prop_assert_eq!(pair.children.len(), all[&index].children.len().min(k as usize));
                prop_assert!(pair.children.is_sorted());
                for child in &pair.children {
                    prop_assert!(all[&index].children.contains(child));
                    prop_assert_eq!(pairs[child].parent, Some(index));
                }
                if let Some(parent) = pair.parent {
                    prop_assert!(pairs[&parent].children.contains(&index));
                }
            }
            prop_assert_eq!(pairs.is_empty(), all.is_empty());
        }

        /// Whoever is there: parent and child agree, everybody who takes part has a way to the top and, unless it is a
        /// trainer, a child; no present trainer is left out while each level has somebody.
        #[test]
        fn pairs_make_a_tree(present in proptest::collection::vec(any::<bool>(), 15)) {
            let workers = three_levels();
            let pairs = pair(&workers, |index| present[index]);
            for (&index, pair) in &pairs {
                prop_assert!(present[index]);
                for child in &pair.children {
                    prop_assert_eq!(pairs[child].parent, Some(index));
                }
                prop_assert_eq!(pair.children.is_empty(), workers[index].kind == Kind::Trainer);
                match pair.parent {
                    Some(parent) => prop_assert!(pairs[&parent].children.contains(&index)),
                    None => prop_assert_eq!(index, 0),
                }
            }
            let levels = [present[0], present[1..3].contains(&true), present[3..7].contains(&true)];
            if levels.iter().all(|level| *level) {
                for (trainer, present) in present.iter().enumerate().skip(7) {
                    prop_assert_eq!(*present, pairs.contains_key(&trainer));
                }
            }
        }
    }
}
