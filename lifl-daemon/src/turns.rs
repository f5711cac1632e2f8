//! Each user's turn: what is to be done for users waits in a queue for each, and one of each is taken in turn.
//!
//! What one user has waiting is bounded by what its connections may have: a request each, its connect and its end.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The queues. Clones are the same queues.
#[derive(Debug)]
pub(crate) struct Turns<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    queues: Mutex<Queues<T>>,
    filled: Notify,
}

#[derive(Debug)]
struct Queues<T> {
    of: HashMap<u32, VecDeque<T>>,
    /// Whose queues are not empty, in the order of their turns.
    next: VecDeque<u32>,
    closed: bool,
}

impl<T> Clone for Turns<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Turns<T> {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            queues: Mutex::new(Queues {
                of: HashMap::new(),
                next: VecDeque::new(),
                closed: false,
            }),
            filled: Notify::new(),
        }))
    }

    fn queues(&self) -> MutexGuard<'_, Queues<T>> {
        // Nothing panics while it is locked.
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds something for that user.
    ///
    /// # Errors
    /// If nobody takes anything any more; it is given back.
    pub(crate) fn push(&self, account: u32, item: T) -> Result<(), T> {
        {
            let mut queues = self.queues();
            if queues.closed {
                return Err(item);
            }
            let queue = queues.of.entry(account).or_default();
            queue.push_back(item);
            if queue.len() == 1 {
                queues.next.push_back(account);
            }
        }
        self.0.filled.notify_one();
        Ok(())
    }

    /// Takes the first thing of the user whose turn it is, once there is something. Cancel-safe.
    pub(crate) async fn next(&self) -> T {
        loop {
            if let Some(item) = self.take() {
                return item;
            }
            // One is remembered that comes before this waits.
            self.0.filled.notified().await;
        }
    }

    fn take(&self) -> Option<T> {
        let mut queues = self.queues();
        let account = queues.next.pop_front()?;
        let queue = queues.of.get_mut(&account)?;
        let item = queue.pop_front();
        if queue.is_empty() {
            queues.of.remove(&account);
        } else {
            queues.next.push_back(account);
        }
        item
    }

    /// Takes no more, and drops what waits.
    pub(crate) fn close(&self) {
        let waiting = {
            let mut queues = self.queues();
            queues.closed = true;
            queues.next.clear();
            std::mem::take(&mut queues.of)
        };
        drop(waiting);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_of_each_user_in_turn_however_many_one_has_and_each_users_in_order() {
        let turns = Turns::new();
        for n in 0..1000 {
            turns.push(1, (1, n)).expect("open");
        }
        for n in 0..3 {
            turns.push(2, (2, n)).expect("open");
        }
        turns.push(3, (3, 0)).expect("open");
        let mut taken = Vec::new();
        for _ in 0..1004 {
            taken.push(turns.next().await);
        }
        assert_eq!(
            taken[..8],
            [(1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2), (2, 2), (1, 3)]
        );
        assert_eq!(taken[1003], (1, 999));
        assert!(turns.take().is_none());
        turns.close();
        assert_eq!(turns.push(1, (1, 1000)), Err((1, 1000)));
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let turns = Turns::new();
        let waiting = {
            let turns = turns.clone();
            tokio::spawn(async move { turns.next().await })
        };
        tokio::task::yield_now().await;
        turns.push(7, "a request").expect("open");
        assert_eq!(waiting.await.expect("no panic"), "a request");
    }
}
