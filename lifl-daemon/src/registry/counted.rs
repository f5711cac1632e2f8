//! A map that knows what its values count for each account, so that a request need not look at all of them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;

/// A value that counts for an account.
pub(super) trait Accounted {
    /// For which; `None` if for nobody. As long as the value is in the map it stays the same.
    fn account(&self) -> Option<u32>;

    /// How many of the daemon's descriptors it takes. As long as the value is in the map it stays the same.
    fn descriptors(&self) -> u32;
}

/// What the values of one account come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    /// How many there are.
    pub(super) entries: u32,
    /// Descriptors that they take together.
    pub(super) descriptors: u32,
}

/// The map. Everything that only reads it goes to the [`BTreeMap`] within.
#[derive(Debug)]
pub(super) struct Counted<K, V> {
    entries: BTreeMap<K, V>,
    /// Accounts without values have none.
    counts: HashMap<u32, Count>,
}

impl<K, V> Default for Counted<K, V> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            counts: HashMap::new(),
        }
    }
}

impl<K: Ord, V: Accounted> Counted<K, V> {
    pub(super) fn insert(&mut self, key: K, value: V) {
        self.remove(&key);
        if let Some(account) = value.account() {
            let count = self.counts.entry(account).or_default();
            count.entries += 1;
            count.descriptors += value.descriptors();
        }
        self.entries.insert(key, value);
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let value = self.entries.remove(key)?;
        if let Some(account) = value.account()
            && let Some(count) = self.counts.get_mut(&account)
        {
            count.entries -= 1;
            count.descriptors -= value.descriptors();
            if count.entries == 0 {
                self.counts.remove(&account);
            }
        }
        Some(value)
    }

    pub(super) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.entries.get_mut(key)
    }

    /// What the account's values come to.
    pub(super) fn count(&self, account: u32) -> Count {
        let count = self.counts.get(&account).copied().unwrap_or_default();
        #[cfg(test)]
        assert_eq!(count, self.counted(account), "of account {account}");
        count
    }

    /// The same, from all values.
    #[cfg(test)]
    fn counted(&self, account: u32) -> Count {
        let of_account = self
            .entries
            .values()
            .filter(|value| value.account() == Some(account));
        of_account.fold(Count::default(), |count, value| Count {
            entries: count.entries + 1,
            descriptors: count.descriptors + value.descriptors(),
        })
    }
}

impl<K, V> Deref for Counted<K, V> {
    type Target = BTreeMap<K, V>;

    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Accounted for (Option<u32>, u32) {
        fn account(&self) -> Option<u32> {
            self.0
        }

        fn descriptors(&self) -> u32 {
            self.1
        }
    }

    #[test]
    fn what_comes_and_goes_is_counted() {
        let mut map = Counted::default();
        for key in 0..100 {
            map.insert(key, ((key % 3 > 0).then_some(key % 3), key % 2 + 1));
        }
        let count = |entries, descriptors| Count { entries, descriptors };
        assert_eq!(
            (map.count(1), map.count(2), map.count(0)),
            (count(33, 50), count(33, 49), count(0, 0))
        );
        // What takes another's place is counted in its stead.
        map.insert(1, (Some(2), 7));
        assert_eq!((map.count(1), map.count(2)), (count(32, 48), count(34, 56)));
        for key in 0..100 {
            assert!(map.remove(&key).is_some() && map.remove(&key).is_none());
        }
        assert!(map.is_empty() && map.counts.is_empty());
    }
}
