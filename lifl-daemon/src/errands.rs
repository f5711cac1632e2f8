//! What may take as long as a client likes, on threads of its user's own: closing a client's descriptors, system calls on
//! them, making an arena's memory.
//!
//! ```text
//!   run, ask, close ──▶ the user's errands, in order ──▶ its threads, at most 4 ── idle for 1 s ──▶ ended
//!                          │ no thread for 3 s
//!                          └── what was asked is refused, the rest waits
//! ```
//!
//! `close(2)` waits for the linger time of a socket (`SO_LINGER`), for the server of a FUSE or NFS file, and for whoever holds
//! a socket's lock; and it purges a socket's queue, in which other descriptors may lie. A user whose errands hang makes
//! nobody wait but itself. Subordinate users' errands are their owner's ([`accounts`]).

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use lifl_common::control::packet::recv_with_fds;
use lifl_common::limits;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::oneshot;

use crate::accounts;
use crate::refusals::may_log;

/// Threads of one user.
const THREADS_OF_USER: usize = 4;

/// Threads of all users.
const THREADS: usize = 256;

/// How long a thread without errands stays.
const IDLE: Duration = Duration::from_secs(1);

/// Descriptors of one user that wait to be closed, above which nothing more is read from it.
const CLOSING: usize = 512;

/// How long what somebody waits for stays without a thread.
const BEGIN: Duration = Duration::from_secs(3);

type Work = Box<dyn FnOnce() + Send>;

/// What is told to whoever waits for an errand that no thread can be had for.
type Refused = Box<dyn FnOnce(String) + Send>;

struct Errand {
    work: Work,
    /// `None` where nobody waits for it.
    refused: Option<Refused>,
    since: Instant,
}

/// All users' errands.
#[derive(Default)]
struct Table {
    users: HashMap<u32, User>,
    threads: usize,
    /// Whether the system has refused the last thread that was asked for.
    starved: bool,
}

#[derive(Default)]
struct User {
    waiting: VecDeque<Errand>,
    threads: usize,
    idle: usize,
    /// Descriptors that are being closed or wait for it.
    closing: usize,
    wake: Arc<Condvar>,
}

impl User {
    fn is_stuck(&self) -> bool {
        !self.waiting.is_empty() && self.threads == 0
    }

    /// Takes out what was asked a while ago and has no thread.
    fn take_stuck(&mut self) -> VecDeque<Errand> {
        if self.threads > 0 {
            return VecDeque::new();
        }
        let is_stuck = |errand: &Errand| errand.refused.is_some() && errand.since.elapsed() >= BEGIN;
        let (stuck, rest) = self.waiting.drain(..).partition(is_stuck);
        self.waiting = rest;
        stuck
    }
}

static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

fn table() -> MutexGuard<'static, Table> {
    // Nothing panics while it is locked.
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something on a thread of that user's. It must not panic.
pub(crate) fn run(uid: u32, errand: impl FnOnce() + Send + 'static) {
    submit(accounts::owner_of(uid), Box::new(errand), None, 0);
}

/// Does something that somebody waits for on a thread of that user's; where none can be had for a while, `refused` is called
/// instead, with the reason and the remedy, on a thread that may wait. Neither may panic, and the latter may not wait for a client.
pub(crate) fn ask(
    uid: u32,
    errand: impl FnOnce() + Send + 'static,
    refused: impl FnOnce(String) + Send + 'static,
) {
    let refused: Refused = Box::new(refused);
    submit(accounts::owner_of(uid), Box::new(errand), Some(refused), 0);
}

/// Does something on a thread of that user's, and waits for what comes of it.
///
/// # Errors
/// Why no thread can be had, and what to do.
pub(crate) async fn answer<T: Send + 'static>(
    uid: u32,
    errand: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (tell, told) = oneshot::channel();
    let (refuse, refused) = oneshot::channel();
    let work = move || {
        let _ = tell.send(errand());
    };
    ask(uid, work, move |why| {
        let _ = refuse.send(why);
    });
    match told.await {
        Ok(answer) => Ok(answer),
        Err(_) => Err(refused
            .await
            .unwrap_or_else(|_| "the daemon is stopping".to_owned())),
    }
}

/// Closes a descriptor on a thread of that user's.
pub(crate) fn close(uid: u32, fd: OwnedFd) {
    close_with(uid, move || dispose(fd));
}

/// Closes a Unix socket of the daemon's own, whose other end is that user's, with what lies unread in it.
pub(crate) fn close_own(uid: u32, fd: OwnedFd) {
    close_with(uid, move || {
        empty(fd.as_fd());
        drop(fd);
    });
}

fn close_with(uid: u32, closing: impl FnOnce() + Send + 'static) {
    let account = accounts::owner_of(uid);
    let errand = move || {
        closing();
        if let Some(user) = table().users.get_mut(&account) {
            user.closing = user.closing.saturating_sub(1);
        }
    };
    submit(account, Box::new(errand), None, 1);
}

/// Waits while so many of a user's descriptors are still to be closed that it may pass no more.
pub(crate) async fn until_closed(uid: u32) {
    const LOOK: Duration = Duration::from_millis(5);
    let account = accounts::owner_of(uid);
    while closing(account) > CLOSING {
        tokio::time::sleep(LOOK).await;
    }
}

/// Descriptors of a user that are still to be closed.
fn closing(account: u32) -> usize {
    table().users.get(&account).map_or(0, |user| user.closing)
}

/// Whether somebody's errands have no thread at all.
pub(crate) fn have_stuck() -> bool {
    table().users.values().any(User::is_stuck)
}

/// Starts threads for what could not have one before, and refuses what has been asked and has waited too long for one. To be
/// called now and then while [there is such](have_stuck); it looks through all processes for the limit: not for a task that
/// serves others.
pub(crate) fn retry() {
    let waiting: Vec<u32> = {
        let table = table();
        let stuck = table.users.iter().filter(|(_, user)| user.is_stuck());
        stuck.map(|(&account, _)| account).collect()
    };
    for &account in &waiting {
        start_if_needed(account);
    }
    refuse_stuck(&waiting);
}

/// Refuses what users without a thread have asked a while ago.
fn refuse_stuck(accounts: &[u32]) {
    let (refused, starved) = {
        let mut table = table();
        let refused: Vec<_> = accounts
            .iter()
            .filter_map(|account| Some((*account, table.users.get_mut(account)?.take_stuck())))
            .filter(|(_, stuck)| !stuck.is_empty())
            .collect();
        (refused, table.starved)
    };
    if refused.is_empty() {
        return;
    }
    let why = match starved {
        true => format!(
            "the daemon can have no thread more: {}",
            limits::explain_threads()
        ),
        false => format!(
            "the daemon has all {THREADS} threads that it may for its users' requests: try again later"
        ),
    };
    // Dropped without the lock: what an errand has is closed by another.
    for (account, stuck) in refused {
        if let Some(dropped) = may_log(account) {
            tracing::warn!(uid = account, dropped, requests = stuck.len(), "refused: {why}");
        }
        for Errand { refused, .. } in stuck {
            if let Some(refused) = refused {
                refused(why.clone());
            }
        }
    }
}

/// Closes a client's descriptor. Without its linger time, which is the client's choice, a socket's `close` returns at once.
fn dispose(fd: OwnedFd) {
    let now = libc::linger {
        l_onoff: 0,
        l_linger: 0,
    };
    // What is no socket has no such option.
    let _ = setsockopt(&fd, sockopt::Linger, &now);
    drop(fd);
}

/// Takes the descriptors out of a Unix socket that nobody reads any more: the kernel would close them with it, linger time and
/// all.
fn empty(socket: BorrowedFd<'_>) {
    /// Packets of which that is tried, and empty ones, which look like the end, one after the other.
    const PACKETS: usize = 1024;
    const EMPTY: usize = 32;

    let mut room = vec![0; 4096];
    let mut nothing = 0;
    for _ in 0..PACKETS {
        let Ok(received) = recv_with_fds(socket, &mut room) else {
            return;
        };
        nothing = if received.length == 0 { nothing + 1 } else { 0 };
        received.fds.into_iter().for_each(dispose);
        if nothing == EMPTY {
            return;
        }
    }
}

fn submit(account: u32, work: Work, refused: Option<Refused>, closing: usize) {
    {
        let mut table = table();
        let user = table.users.entry(account).or_default();
        user.waiting.push_back(Errand {
            work,
            refused,
            since: Instant::now(),
        });
        user.closing += closing;
        if user.idle >= user.waiting.len() {
            user.wake.notify_one();
            return;
        }
    }
    start_if_needed(account);
}

/// One thread more for a user's errands, if it may have one. Without one they wait for [`retry`].
fn start_if_needed(account: u32) {
    {
        let mut table = table();
        let free = table.threads < THREADS;
        let Some(user) = table.users.get_mut(&account) else {
            return;
        };
        if user.waiting.is_empty() || user.threads >= THREADS_OF_USER || !free {
            return;
        }
        user.threads += 1;
        table.threads += 1;
    }
    let thread = Builder::new().name("errands".into()).stack_size(256 << 10);
    let spawned = thread.spawn(move || work(account));
    let mut table = table();
    table.starved = spawned.is_err();
    if let Err(error) = spawned {
        if let Some(dropped) = may_log(account) {
            tracing::warn!(
                uid = account,
                dropped,
                "no thread for this user's descriptors: {error}"
            );
        }
        table.threads -= 1;
        if let Some(user) = table.users.get_mut(&account) {
            user.threads -= 1;
        }
    }
}

/// A thread: a user's errands, one after the other, until there are none for a while.
fn work(account: u32) {
    let mut all = table();
    while let Some(user) = all.users.get_mut(&account) {
        if let Some(errand) = user.waiting.pop_front() {
            drop(all);
            (errand.work)();
            all = table();
            continue;
        }
        user.idle += 1;
        let wake = Arc::clone(&user.wake);
        let (woken, waited) = wake
            .wait_timeout(all, IDLE)
            .unwrap_or_else(PoisonError::into_inner);
        all = woken;
        let Some(user) = all.users.get_mut(&account) else {
            break;
        };
        user.idle -= 1;
        if waited.timed_out() && user.waiting.is_empty() {
            user.threads -= 1;
            if user.threads == 0 && user.closing == 0 {
                all.users.remove(&account);
            }
            break;
        }
    }
    all.threads -= 1;
}

/// A descriptor that a client passed, or a socket whose other end is a client's. Dropped, it is closed on a thread of that
/// user's.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// `None` only once it is being dropped.
    fd: Option<OwnedFd>,
    uid: u32,
}

impl Foreign {
    /// Takes a descriptor of that user's.
    pub(crate) fn new(uid: u32, fd: OwnedFd) -> Self {
        Self { fd: Some(fd), uid }
    }

    /// Closes it on this thread, which is one of its user's, or may wait.
    pub(crate) fn close_here(mut self) {
        if let Some(fd) = self.fd.take() {
            dispose(fd);
        }
    }

    /// The descriptor, for whoever sees to its end.
    pub(crate) fn into_inner(mut self) -> Option<OwnedFd> {
        self.fd.take()
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("there until it is dropped").as_fd()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            close(self.uid, fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_user_whose_errands_hang_makes_nobody_else_wait_and_its_own_go_on_in_order() {
        let (hanging, other) = (4_300_001, 4_300_002);
        let (release, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (tell, told) = mpsc::channel();
        for _ in 0..2 * THREADS_OF_USER {
            let (gate, tell) = (Arc::clone(&gate), tell.clone());
            run(hanging, move || {
                let gate = gate.lock().expect("no panic");
                let _ = gate.recv();
                let _ = tell.send(hanging);
            });
        }
        for _ in 0..100 {
            let tell = tell.clone();
            run(other, move || {
                let _ = tell.send(other);
            });
        }
        for _ in 0..100 {
            assert_eq!(told.recv_timeout(PATIENCE), Ok(other));
        }
        assert!(
            table()
                .users
                .get(&hanging)
                .is_some_and(|user| user.threads <= THREADS_OF_USER)
        );
        drop(release);
        for _ in 0..2 * THREADS_OF_USER {
            assert_eq!(told.recv_timeout(PATIENCE), Ok(hanging));
        }
    }

    #[test]
    fn what_was_passed_is_closed_and_counted_until_then() {
        let uid = 4_300_003;
        let (near, far) = nix::unistd::pipe().expect("a pipe");
        drop(Foreign::new(uid, far));
        // The last writer is gone.
        assert_eq!(nix::unistd::read(&near, &mut [0; 1]), Ok(0));
        let begun = std::time::Instant::now();
        while closing(uid) > 0 {
            assert!(begun.elapsed() < PATIENCE, "still counted");
            std::thread::yield_now();
        }
    }

    #[test]
    fn what_was_asked_is_refused_where_no_thread_comes_and_what_nobody_waits_for_stays() {
        let uid = 4_300_004;
        let long_ago = Instant::now()
            .checked_sub(BEGIN)
            .expect("a machine that runs a while");
        let (tell, told) = mpsc::channel();
        let errand = |name: &'static str, asked: bool, since: Instant| {
            let (done, refused) = (tell.clone(), tell.clone());
            let refused: Refused = Box::new(move |why| {
                let _ = refused.send((name, Some(why)));
            });
            Errand {
                work: Box::new(move || {
                    let _ = done.send((name, None));
                }),
                refused: asked.then_some(refused),
                since,
            }
        };
        {
            let mut table = table();
            let user = table.users.entry(uid).or_default();
            user.waiting.push_back(errand("old", true, long_ago));
            user.waiting.push_back(errand("closing", false, long_ago));
            user.waiting.push_back(errand("new", true, Instant::now()));
        }
        assert!(have_stuck());
        refuse_stuck(&[uid]);
        let (name, why) = told.try_recv().expect("refused");
        assert_eq!(name, "old");
        assert!(why.is_some_and(|why| why.contains("thread")));
        assert!(told.try_recv().is_err(), "the others wait");
        retry();
        for expected in ["closing", "new"] {
            assert_eq!(told.recv_timeout(PATIENCE), Ok((expected, None)));
        }
    }
}
