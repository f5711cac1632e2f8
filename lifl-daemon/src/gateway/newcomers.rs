//! Connections that have not proved themselves yet: few at a time, and few of each address.
//!
//! One that is too many makes room at the cost of those that have most: of its own address, else of the address with most
//! connections, the oldest. So who opens connections without end pushes out its own. One that has said whose participant it
//! is, by an id that nobody can guess, is counted by that id from then on and is safe from those who have none.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lifl_common::session::ParticipantId;
use tokio::sync::oneshot;

/// At most so many at a time, where the process may have the descriptors.
const MOST: usize = 2048;

/// At most this share of the process's descriptors.
const DESCRIPTORS_SHARE: usize = 8;

const FEWEST: usize = 64;

/// Handshakes of one participant at a time.
const MOST_OF_PARTICIPANT: usize = 16;

/// One line in the log for all refusals of that time.
const LOG_PAUSE: Duration = Duration::from_secs(1);

/// All that have not proved themselves, of all listeners.
#[derive(Clone, Debug)]
pub(super) struct Newcomers {
    /// Those of whom only the address is known.
    strangers: Arc<Crowd<Origin>>,
    /// Those who have named a participant that is expected.
    named: Arc<Crowd<ParticipantId>>,
    refusals: Arc<Mutex<Refusals>>,
}

/// Whose connections are counted together: an IPv4 address, or what one customer has of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Origin {
    V4([u8; 4]),
    V6([u8; 8]),
}

#[derive(Debug)]
struct Crowd<K> {
    most: usize,
    most_of_one: usize,
    inner: Mutex<Inner<K>>,
}

#[derive(Debug)]
struct Inner<K> {
    /// Of each, by age: what it is told by when it has to go.
    by_key: HashMap<K, BTreeMap<u64, oneshot::Sender<()>>>,
    count: usize,
    next: u64,
}

/// A place among the newcomers, until it is dropped.
#[derive(Debug)]
pub(super) struct Place<K: Hash + Eq + Copy> {
    crowd: Arc<Crowd<K>>,
    key: K,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

#[derive(Debug, Default)]
struct Refusals {
    logged: Option<Instant>,
    /// Since then.
    unsaid: u64,
}

impl Origin {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.octets()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Self::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

impl Newcomers {
    /// As many as this process's limit of open files leaves room for.
    pub(super) fn new() -> Self {
        use nix::sys::resource::{Resource, getrlimit};
        let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        let share = usize::try_from(files).unwrap_or(usize::MAX) / DESCRIPTORS_SHARE;
        Self::at_most(share.clamp(FEWEST, MOST))
    }

    fn at_most(most: usize) -> Self {
        Self {
            strangers: Crowd::new(most, most / 2),
            named: Crowd::new(most, MOST_OF_PARTICIPANT),
            refusals: Arc::default(),
        }
    }

    /// A connection from that address.
    pub(super) fn stranger(&self, address: IpAddr) -> Place<Origin> {
        Crowd::enter(&self.strangers, Origin::of(address))
    }

    /// One that has named a participant that is expected.
    pub(super) fn named(&self, participant: ParticipantId) -> Place<ParticipantId> {
        Crowd::enter(&self.named, participant)
    }

    /// Logs that somebody was not let in, with those of whom nothing was said before.
    pub(super) fn log_refusal(&self, peer: impl std::fmt::Display, why: &str) {
        let mut refusals = lock(&self.refusals);
        refusals.unsaid += 1;
        if refusals.logged.is_none_or(|logged| logged.elapsed() >= LOG_PAUSE) {
            tracing::warn!(%peer, refusals = refusals.unsaid, "not let in: {why}");
            *refusals = Refusals {
                logged: Some(Instant::now()),
                unsaid: 0,
            };
        }
    }
}

impl<K: Hash + Eq + Copy> Crowd<K> {
    fn new(most: usize, most_of_one: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_of_one,
            inner: Mutex::new(Inner {
                by_key: HashMap::new(),
                count: 0,
                next: 0,
            }),
        })
    }

    fn enter(crowd: &Arc<Self>, key: K) -> Place<K> {
        let (evict, evicted) = oneshot::channel();
        let mut inner = lock(&crowd.inner);
        if inner.of(&key) >= crowd.most_of_one {
            inner.evict_oldest_of(&key);
        } else if inner.count >= crowd.most {
            let largest = inner.by_key.iter().max_by_key(|(_, places)| places.len());
            if let Some(largest) = largest.map(|(&key, _)| key) {
                inner.evict_oldest_of(&largest);
            }
        }
        let number = inner.next;
        inner.next += 1;
        inner.count += 1;
        inner.by_key.entry(key).or_default().insert(number, evict);
        Place {
            crowd: Arc::clone(crowd),
            key,
            number,
            evicted,
        }
    }
}

impl<K: Hash + Eq + Copy> Inner<K> {
    fn of(&self, key: &K) -> usize {
        self.by_key.get(key).map_or(0, BTreeMap::len)
    }

    /// Its place hears of it as the sender is dropped.
    fn evict_oldest_of(&mut self, key: &K) {
        let oldest = self
            .by_key
            .get(key)
            .and_then(|places| places.keys().next().copied());
        if let Some(oldest) = oldest {
            self.remove(key, oldest);
        }
    }

    fn remove(&mut self, key: &K, number: u64) {
        if let Some(places) = self.by_key.get_mut(key) {
            if places.remove(&number).is_some() {
                self.count -= 1;
            }
            if places.is_empty() {
                self.by_key.remove(key);
            }
        }
    }
}

impl<K: Hash + Eq + Copy> Place<K> {
    /// Waits until this place is needed for another; it does not come back.
    pub(super) async fn evicted(&mut self) {
        // The sender is dropped, and never used.
        let _ = (&mut self.evicted).await;
    }
}

impl<K: Hash + Eq + Copy> Drop for Place<K> {
    fn drop(&mut self) {
        lock(&self.crowd.inner).remove(&self.key, self.number);
    }
}

/// Nothing that is done under these locks can leave the count wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evicted<K: Hash + Eq + Copy>(place: &mut Place<K>) -> bool {
        !matches!(place.evicted.try_recv(), Err(oneshot::error::TryRecvError::Empty))
    }

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// How many of them are still held.
    fn held<K: Hash + Eq + Copy>(places: &mut [Place<K>]) -> usize {
        places.iter_mut().map(evicted).filter(|evicted| !evicted).count()
    }

    #[test]
    fn who_floods_pushes_out_its_own() {
        let newcomers = Newcomers::at_most(64);
        let mut patient: Vec<_> = (1..=20).map(|last| newcomers.stranger(address(last))).collect();
        let mut flood: Vec<_> = (0..1000).map(|_| newcomers.stranger(address(99))).collect();
        assert_eq!((held(&mut patient), held(&mut flood)), (20, 32));
        assert_eq!(held(&mut flood[968..]), 32, "the newest stay");
        // From many addresses: those with most go first, and never more than all are held.
        let mut others: Vec<_> = (0..1000_usize)
            .map(|n| newcomers.stranger(address(100 + (n % 100) as u8)))
            .collect();
        let all = held(&mut patient) + held(&mut flood) + held(&mut others);
        assert_eq!(all, 64);
        drop((patient, flood, others));
        let inner = lock(&newcomers.strangers.inner);
        assert!(inner.count == 0 && inner.by_key.is_empty());
    }

    #[test]
    fn who_is_named_is_safe_from_strangers() {
        let newcomers = Newcomers::at_most(64);
        let mut named = newcomers.named(ParticipantId([1; 16]));
        let _flood: Vec<_> = (0..1000).map(|_| newcomers.stranger(address(1))).collect();
        let mut others: Vec<_> = (0..1000)
            .map(|_| newcomers.named(ParticipantId([2; 16])))
            .collect();
        assert!(!evicted(&mut named));
        assert_eq!(held(&mut others), MOST_OF_PARTICIPANT);
    }

    #[test]
    fn one_customer_has_one_count() {
        let of = |text: &str| Origin::of(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:0:1::1"), of("2001:db8:0:1:ffff::9"));
        assert_ne!(of("2001:db8:0:1::1"), of("2001:db8:0:2::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
