//! Answers and events that wait for one client, counted by their bytes for its user.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lifl_common::control::{Event, Message, Reply};
use tokio::sync::{Notify, Semaphore};

/// Messages that wait for one client; who lets more pile up is disconnected.
const MESSAGES: usize = 8192;

/// Bytes that wait for all clients of one user. Above that, whoever of them has not read its last few messages is
/// disconnected.
const USER_BYTES: usize = 96 << 20;

/// Messages that a client may always have waiting.
const FEW: usize = 16;

/// What a waiting message takes beside its own bytes.
const ENTRY_BYTES: usize = 64;

/// Requests of one user that are read and judged at a time, of all its connections.
const AT_A_TIME: usize = 32;

/// What the connections of one user share.
#[derive(Debug)]
pub(crate) struct Account {
    /// One for each request that is under way.
    pub(crate) requests: Arc<Semaphore>,
    waiting_bytes: AtomicUsize,
}

impl Default for Account {
    fn default() -> Self {
        Self {
            requests: Arc::new(Semaphore::new(AT_A_TIME)),
            waiting_bytes: AtomicUsize::new(0),
        }
    }
}

/// All users' accounts, of those who are connected.
#[derive(Clone, Debug, Default)]
pub(crate) struct Accounts(Arc<Mutex<HashMap<u32, Arc<Account>>>>);

impl Accounts {
    /// A user's.
    pub(crate) fn of(&self, account: u32) -> Arc<Account> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = all.get(&account) {
            return Arc::clone(account);
        }
        all.retain(|_, account| Arc::strong_count(account) > 1);
        Arc::clone(all.entry(account).or_default())
    }
}

/// A message on its way to a client. What goes to many is there once.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) message: Arc<Message>,
    pub(crate) fd: Option<OwnedFd>,
}

/// The messages that wait for one client. Clones are the same messages.
#[derive(Clone, Debug)]
pub(crate) struct Mailbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    letters: Mutex<VecDeque<(Letter, usize)>>,
    filled: Notify,
    account: Arc<Account>,
}

/// A client does not read what it is sent.
#[derive(Debug)]
pub(crate) struct Deaf;

impl Mailbox {
    pub(crate) fn new(account: Arc<Account>) -> Self {
        Self(Arc::new(Shared {
            letters: Mutex::default(),
            filled: Notify::new(),
            account,
        }))
    }

    fn letters(&self) -> MutexGuard<'_, VecDeque<(Letter, usize)>> {
        // Nothing panics while it is locked.
        self.0.letters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message.
    ///
    /// # Errors
    /// If too much waits for this client, or for all of its user.
    pub(crate) fn push(&self, letter: Letter) -> Result<(), Deaf> {
        // Those that are on their way to others share its bytes.
        let bytes = ENTRY_BYTES + weight(&letter.message) / Arc::strong_count(&letter.message).max(1);
        {
            let mut letters = self.letters();
            let all = self.0.account.waiting_bytes.load(Relaxed).saturating_add(bytes);
            if letters.len() >= MESSAGES || (all > USER_BYTES && letters.len() >= FEW) {
                return Err(Deaf);
            }
            self.0.account.waiting_bytes.fetch_add(bytes, Relaxed);
            letters.push_back((letter, bytes));
        }
        self.0.filled.notify_one();
        Ok(())
    }

    /// Waits until there is a message. Cancel-safe; for one task.
    pub(crate) async fn filled(&self) {
        while self.letters().is_empty() {
            // One is remembered that comes before this waits.
            self.0.filled.notified().await;
        }
    }

    /// The first message.
    pub(crate) fn take(&self) -> Option<Letter> {
        let (letter, bytes) = self.letters().pop_front()?;
        self.0.account.waiting_bytes.fetch_sub(bytes, Relaxed);
        Some(letter)
    }

    /// Drops all that waits.
    pub(crate) fn clear(&self) {
        while self.take().is_some() {}
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let letters = self.letters.get_mut().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = letters.iter().map(|(_, bytes)| bytes).sum();
        self.account.waiting_bytes.fetch_sub(bytes, Relaxed);
    }
}

/// About how many bytes a message takes, rather more than less.
fn weight(message: &Message) -> usize {
    match message {
        Message::Reply(Reply::Status(status)) => {
            4096 + status.workers.len() * 2048 + status.jobs.len() * 256 + status.users.len() * 96
        }
        Message::Reply(Reply::Flame { page: Some(page) }) => 512 + page.workers.len() * 256,
        Message::Event(Event::Living { workers, .. }) => 512 + workers.len() * 4,
        Message::Event(Event::JobEnded { reason }) => 512 + reason.len(),
        _ => 1024,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(reason: &str) -> Letter {
        let reason = reason.to_owned();
        Letter {
            message: Arc::new(Message::Event(Event::JobEnded { reason })),
            fd: None,
        }
    }

    fn waiting(account: &Account) -> usize {
        account.waiting_bytes.load(Relaxed)
    }

    #[test]
    fn a_deaf_client_is_found_by_its_messages_or_by_its_users_bytes() {
        let account = Arc::new(Account::default());
        let mailbox = Mailbox::new(Arc::clone(&account));
        for _ in 0..MESSAGES {
            mailbox.push(ended("")).expect("room");
        }
        assert!(mailbox.push(ended("")).is_err());
        mailbox.clear();
        assert_eq!(waiting(&account), 0);

        let long = "x".repeat(1 << 20);
        let mut others = Vec::new();
        while waiting(&account) + (2 << 20) < USER_BYTES {
            let other = Mailbox::new(Arc::clone(&account));
            other.push(ended(&long)).expect("room");
            others.push(other);
        }
        let results: Vec<bool> = (0..100).map(|_| mailbox.push(ended(&long)).is_ok()).collect();
        assert_eq!(results.iter().filter(|&&pushed| pushed).count(), FEW);
        // Who reads is not disconnected for those who do not.
        others.last().expect("many").push(ended(&long)).expect("a few");
        drop(others);
        mailbox.push(ended(&long)).expect("room again");
        drop(mailbox);
        assert_eq!(waiting(&account), 0);
    }

    #[test]
    fn what_many_are_sent_counts_once() {
        let account = Arc::new(Account::default());
        let Letter { message, .. } = ended(&"x".repeat(1 << 20));
        let mailboxes: Vec<Mailbox> = (0..1000).map(|_| Mailbox::new(Arc::clone(&account))).collect();
        let letters: Vec<Letter> = mailboxes
            .iter()
            .map(|_| Letter {
                message: Arc::clone(&message),
                fd: None,
            })
            .collect();
        for (mailbox, letter) in mailboxes.iter().zip(letters) {
            mailbox.push(letter).expect("room");
        }
        let bytes = waiting(&account);
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
    }
}
