//! References that the daemon carries: handed over, held, or dropped.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use lifl_common::flame::{Address, is_gone};

use super::{ConnId, HELD_FOR_USER, Queued, Router};
use crate::accounts;
use crate::clock::kernel_ns;
use crate::flame::rules::show_id;
use crate::flame::wire::Message;
use crate::refusals::may_log;

/// References that are held for one receiver.
const HELD_FOR_RECEIVER: usize = 256;

/// A reference that waits for its receiver.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) since: Instant,
    /// For whom it counts.
    pub(super) account: u32,
    pub(super) sender: Address,
    pub(super) message: Message,
}

impl Router {
    /// A worker wrote a reference to its connection: it is not in the kernel's map, or was not when it wrote.
    pub(in crate::flame) fn reference(&mut self, from: ConnId, message: Message) {
        let Some(conn) = self.conns.get(&from) else {
            return;
        };
        let receiver = Address {
            uid: conn.uid,
            id: message.receiver(),
        };
        // One that is not registered yet was there before nobody.
        let (sender, since) = match &conn.worker {
            Some(worker) => (worker.address, worker.since),
            None => (
                Address {
                    uid: conn.uid,
                    id: u32::MAX,
                },
                u64::MAX,
            ),
        };
        let to = self.worker(receiver);
        let gone = self.gone.get(&receiver).is_some_and(|gone| is_gone(gone, since));
        let Some(conn) = self.conns.get_mut(&from) else {
            return;
        };
        conn.relayed.last_ns = kernel_ns();
        if let Some(to) = to {
            conn.relayed.sent += 1;
            self.hand_over(to, message);
        } else if gone {
            conn.relayed.refused += 1;
            log_dropped(sender, receiver, "its receiver is gone");
        } else {
            conn.relayed.held += 1;
            self.hold(sender, receiver, message);
        }
    }

    /// The kernel's part did not know the receiver.
    pub(in crate::flame) fn undelivered(&mut self, sender: Address, message: Message) {
        let receiver = Address {
            uid: sender.uid,
            id: message.receiver(),
        };
        match self.worker(receiver) {
            // It has registered since.
            Some(to) => self.hand_over(to, message),
            None => self.hold(sender, receiver, message),
        }
    }

    fn hold(&mut self, sender: Address, receiver: Address, message: Message) {
        let account = accounts::owner_of(receiver.uid);
        let of_user = self.held_of.get(&account).copied().unwrap_or(0);
        let of_receiver = self.held.get(&receiver).map_or(0, VecDeque::len);
        if of_receiver >= HELD_FOR_RECEIVER || of_user >= HELD_FOR_USER {
            return log_dropped(
                sender,
                receiver,
                "too many wait for workers that are not registered",
            );
        }
        *self.held_of.entry(account).or_default() += 1;
        tracing::debug!(
            from = show_id(sender.id),
            to = show_id(receiver.id),
            "held until its receiver registers"
        );
        self.held.entry(receiver).or_default().push_back(Held {
            since: Instant::now(),
            account,
            sender,
            message,
        });
    }

    /// Takes what is held for a worker.
    pub(super) fn take_held(&mut self, address: Address) -> VecDeque<Held> {
        let held = self.held.remove(&address).unwrap_or_default();
        for Held { account, .. } in &held {
            uncount(&mut self.held_of, *account);
        }
        held
    }

    pub(super) fn hand_over(&mut self, to: ConnId, message: Message) {
        let Some(conn) = self.conns.get(&to) else {
            return;
        };
        let queue = self.queues.get(&conn.account);
        let share = queue.and_then(|(_, queue)| Arc::clone(queue).try_acquire_owned().ok());
        let why = match share.map(|share| {
            let queued = Queued {
                message,
                _share: share,
            };
            conn.outbox.try_send(queued)
        }) {
            Some(Ok(())) => return,
            Some(Err(_)) => "its receiver does not read, or is just closing",
            None => "too many wait for this user's workers, which do not read",
        };
        let id = conn.worker.as_ref().map_or(u32::MAX, |worker| worker.address.id);
        if let Some(dropped) = may_log(conn.uid) {
            tracing::warn!(
                to = show_id(id),
                uid = conn.uid,
                dropped,
                "dropped a reference: {why}"
            );
        }
    }
}

/// A reference of that account's is held no more.
pub(super) fn uncount(held_of: &mut HashMap<u32, usize>, account: u32) {
    if let Some(of_user) = held_of.get_mut(&account) {
        *of_user -= 1;
        if *of_user == 0 {
            held_of.remove(&account);
        }
    }
}

/// A reference that nobody gets.
pub(super) fn log_dropped(from: Address, to: Address, why: &str) {
    if let Some(dropped) = may_log(to.uid) {
        let (from, uid, to) = (show_id(from.id), to.uid, show_id(to.id));
        tracing::warn!(from, to, uid, dropped, "dropped a reference: {why}");
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};
    use std::time::Duration;

    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_dropped_for_want_of_room_takes_none() {
        let local = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        let mut router = Router::new(None, local, Duration::from_secs(1), 4, mpsc::channel(1).0);
        let sender = Address { uid: 65_533, id: 1 };
        for id in 0..2 * HELD_FOR_USER as u32 {
            router.undelivered(sender, Message::empty(id));
        }
        assert_eq!(router.held.len(), HELD_FOR_USER);
        assert_eq!(router.held_of.values().sum::<usize>(), HELD_FOR_USER);
    }
}
