//! Bounds what waits in the kernel for receivers that do not read.
//!
//! The kernel holds redirected messages against nobody: for a receiver that does not read it would keep gigabytes. So the
//! program counts the messages that it hands to each receiver and to all workers of each user, and refuses one more than this
//! module's credit allows ([`Refusal::ReceiverFull`](lifl_common::frame::Refusal::ReceiverFull)):
//!
//! ```text
//!  program: messages += 1 ── half of the credit is used up ──▶ ring buffer ──▶ this module's thread
//!                                                                                 │ sock_diag: bytes unread
//!           messages < allowed ◀──────── allowed = messages read + limit ─────────┘
//! ```
//!
//! What a receiver has read, the kernel tells: redirected bytes are charged to the receiving socket until they are read
//! (`sk_rmem_alloc`; measured on Linux 6.1, 6.12 and 6.18). Neither sender nor receiver is asked. A message has a frame at least,
//! so unread bytes say how many messages are unread at most.
//!
//! The thread sleeps until the program writes to it. A queue that stays long is looked at again, ever more rarely. While there is
//! no daemon nobody adds credit, so the program then allows [`WITHOUT_DAEMON`] times as much.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::{self, Read};
use std::net::SocketAddrV4;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::maps::{Array, MapData, MapError, RingBuf};
use lifl_common::kernel::{Connection, Credit, DEAD_LETTERS, Inbox, MAP_CREDITS, MAP_INBOXES, MAP_LOW};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zerocopy::{FromBytes, transmute};

use super::socket::addresses;
use crate::chain::error_chain;
use crate::ebpf::{LoadError, Program};
use crate::privileges;
use crate::sock_diag::SocketTable;

/// Messages that may wait for one receiver. Each takes the kernel about 1 KiB beside what is in it.
pub(crate) const OF_RECEIVER: u64 = 16_384;

/// Messages that may wait for all workers of one user together.
pub(crate) const OF_USER: u64 = 65_536;

/// How many times as much there may be while no daemon looks.
const WITHOUT_DAEMON: u64 = 16;

/// How soon a queue that stays long is looked at again; the pause doubles up to the second.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

type InboxBytes = [u8; size_of::<Inbox>()];
type CreditBytes = [u8; size_of::<Credit>()];

/// The credit of a program's receivers and of their users. Dropping it ends its thread.
pub(crate) struct Credits {
    table: Arc<Mutex<Table>>,
    /// Closed, it ends the thread.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

/// Where a receiver's messages are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slots {
    /// Its own.
    pub(crate) inbox: u32,
    /// Its user's.
    pub(crate) account: u32,
}

impl Credits {
    /// The map entries that so many receivers take: as many users, at most, and the daemon's own socket.
    pub(crate) fn entries(receivers: u32) -> u32 {
        receivers.saturating_mul(2).saturating_add(1)
    }

    /// Takes the program's maps, and starts the thread. `message_bytes` is what the smallest message has.
    pub(crate) fn of(program: &mut Program, receivers: u32, message_bytes: u32) -> Result<Self, LoadError> {
        let low: RingBuf<MapData> = program.map(MAP_LOW)?;
        let sockets = SocketTable::open()
            .inspect_err(|error| {
                tracing::warn!(
                    "what receivers do not read is not bounded: the kernel's table of sockets cannot be read: {error} \
                     (allow AF_NETLINK)"
                );
            })
            .ok();
        let table = Arc::new(Mutex::new(Table {
            inboxes: program.map(MAP_INBOXES)?,
            credits: program.map(MAP_CREDITS)?,
            sockets,
            message_bytes,
            receivers: BTreeMap::new(),
            accounts: BTreeMap::new(),
            account_of: HashMap::new(),
            free_inboxes: (1..=receivers).collect(),
            free_accounts: (receivers + 1..=receivers.saturating_mul(2)).collect(),
        }));
        let (stop, stopped) = UnixStream::pair()?;
        let shared = Arc::clone(&table);
        let thread = thread::Builder::new()
            .name("credit".to_owned())
            .spawn(move || add_credit(&shared, low, &stopped))?;
        Ok(Self {
            table,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Begins to count what the daemon's own socket is handed.
    pub(crate) fn add_own(&self, connection: &Connection) -> Result<(), MapError> {
        self.table().receive(DEAD_LETTERS, None, connection)
    }

    /// Slots for one more receiver, of that user.
    pub(crate) fn add(&self, uid: u32, connection: &Connection) -> Result<Slots, MapError> {
        let mut table = self.table();
        let account = match table.account_of.get(&uid) {
            Some(&account) => account,
            None => table.open_account(uid)?,
        };
        let Some(inbox) = table.free_inboxes.pop_first() else {
            return Err(MapError::OutOfBounds {
                index: table.inboxes.len(),
                max_entries: table.inboxes.len(),
            });
        };
        let slots = Slots { inbox, account };
        table.receive(inbox, Some(account), connection)?;
        Ok(slots)
    }

    /// Goes on with a receiver that has slots from the daemon before.
    pub(crate) fn adopt(&self, uid: u32, connection: &Connection, slots: Slots) -> Result<(), MapError> {
        let mut table = self.table();
        table.free_inboxes.remove(&slots.inbox);
        if table.free_accounts.remove(&slots.account) {
            table.account_of.insert(uid, slots.account);
            table.accounts.insert(slots.account, Account::new(uid));
        }
        table.receive(slots.inbox, Some(slots.account), connection)?;
        table.refill_receiver(slots.inbox)?;
        drop(table);
        refill_account(&self.table, slots.account)?;
        Ok(())
    }

    /// Gives a receiver's slots back: it is off the map of sockets, and with that its queue is gone.
    pub(crate) fn remove(&self, slots: Slots) {
        let mut table = self.table();
        if table.receivers.remove(&slots.inbox).is_none() {
            return;
        }
        table.free_inboxes.insert(slots.inbox);
        let Some(account) = table.accounts.get_mut(&slots.account) else {
            return;
        };
        account.receivers.remove(&slots.inbox);
        if account.receivers.is_empty() {
            let uid = account.uid;
            table.accounts.remove(&slots.account);
            table.account_of.remove(&uid);
            table.free_accounts.insert(slots.account);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Drop for Credits {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that adds credit has panicked");
        }
    }
}

impl fmt::Debug for Credits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table();
        f.debug_struct("Credits")
            .field("receivers", &table.receivers.len())
            .field("accounts", &table.accounts.len())
            .finish_non_exhaustive()
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the plane and the thread share. Locked for one slot's sake at a time.
struct Table {
    inboxes: Array<MapData, InboxBytes>,
    credits: Array<MapData, CreditBytes>,
    /// `None` where the kernel does not let us look: then everything counts as read.
    sockets: Option<SocketTable>,
    message_bytes: u32,
    receivers: BTreeMap<u32, Receiver>,
    accounts: BTreeMap<u32, Account>,
    account_of: HashMap<u32, u32>,
    free_inboxes: BTreeSet<u32>,
    free_accounts: BTreeSet<u32>,
}

/// A socket that messages are put into.
struct Receiver {
    local: SocketAddrV4,
    remote: SocketAddrV4,
    /// Messages that it has read at least, of all that its slot ever counted.
    read: u64,
}

/// A user.
struct Account {
    uid: u32,
    receivers: BTreeSet<u32>,
    /// Messages that its workers have read at least, or that went with their sockets.
    read: u64,
}

impl Account {
    fn new(uid: u32) -> Self {
        Self {
            uid,
            receivers: BTreeSet::new(),
            read: 0,
        }
    }
}

impl Table {
    fn messages(&self, slot: u32) -> Result<u64, MapError> {
        let inbox: Inbox = transmute!(self.inboxes.get(&slot, 0)?);
        Ok(inbox.messages)
    }

    fn allow(&mut self, slot: u32, read: u64, limit: u64) -> Result<(), MapError> {
        let credit: CreditBytes = transmute!(Credit {
            low: read + limit / 2,
            allowed: read + limit,
            without_daemon: read + WITHOUT_DAEMON * limit,
            reserved: 0,
        });
        self.credits.set(slot, credit, 0)
    }

    fn open_account(&mut self, uid: u32) -> Result<u32, MapError> {
        // As many as receivers, and each has one of those.
        let Some(slot) = self.free_accounts.pop_first() else {
            return Err(MapError::OutOfBounds {
                index: self.inboxes.len(),
                max_entries: self.inboxes.len(),
            });
        };
        let read = self.messages(slot)?;
        self.allow(slot, read, OF_USER)?;
        let account = Account {
            read,
            ..Account::new(uid)
        };
        self.accounts.insert(slot, account);
        self.account_of.insert(uid, slot);
        Ok(slot)
    }

    /// Begins to count what a socket is handed.
    fn receive(&mut self, slot: u32, account: Option<u32>, connection: &Connection) -> Result<(), MapError> {
        let (local, remote) = addresses(connection);
        // Whoever had the slot before is gone, with its queue.
        let read = self.messages(slot)?;
        self.allow(slot, read, OF_RECEIVER)?;
        let receiver = Receiver { local, remote, read };
        self.receivers.insert(slot, receiver);
        if let Some(account) = account.and_then(|account| self.accounts.get_mut(&account)) {
            account.receivers.insert(slot);
        }
        Ok(())
    }

    /// Messages of a slot that nobody has read, at most; 0 for one that is gone.
    fn unread(&mut self, slot: u32) -> Result<u64, MapError> {
        // The count comes first: what is sent meanwhile is then taken for unread.
        let messages = self.messages(slot)?;
        let Some(receiver) = self.receivers.get_mut(&slot) else {
            return Ok(0);
        };
        if receiver.read < messages {
            let found = self
                .sockets
                .as_ref()
                .and_then(|sockets| sockets.at(receiver.local, receiver.remote).ok().flatten());
            let bytes = found.and_then(|found| found.receive_charged_bytes).unwrap_or(0);
            let unread = u64::from(bytes.div_ceil(self.message_bytes));
            receiver.read = receiver.read.max(messages.saturating_sub(unread));
        }
        Ok(messages - receiver.read)
    }

    /// Gives a receiver the credit that it has by what it has read; how much of it is used up.
    fn refill_receiver(&mut self, slot: u32) -> Result<Used, MapError> {
        let unread = self.unread(slot)?;
        let Some(receiver) = self.receivers.get(&slot) else {
            return Ok(Used::LITTLE);
        };
        let read = receiver.read;
        self.allow(slot, read, OF_RECEIVER)?;
        Ok(Used::of(unread, OF_RECEIVER, read))
    }
}

/// How it stands with a slot's credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Used {
    /// Whether it is to be looked at again without being asked.
    much: bool,
    /// Messages read.
    read: u64,
}

impl Used {
    const LITTLE: Self = Self { much: false, read: 0 };

    fn of(unread: u64, limit: u64, read: u64) -> Self {
        Self {
            much: unread >= limit / 4,
            read,
        }
    }
}

/// As [`Table::refill_receiver`], for a user. The table is locked for each of its workers by itself: it may have thousands.
fn refill_account(table: &Mutex<Table>, slot: u32) -> Result<Used, MapError> {
    let (messages, receivers) = {
        let table = lock(table);
        let Some(account) = table.accounts.get(&slot) else {
            return Ok(Used::LITTLE);
        };
        (table.messages(slot)?, account.receivers.clone())
    };
    let mut unread = 0;
    for receiver in receivers {
        unread += lock(table).unread(receiver)?;
    }
    let mut table = lock(table);
    let Some(account) = table.accounts.get_mut(&slot) else {
        return Ok(Used::LITTLE);
    };
    account.read = account.read.max(messages.saturating_sub(unread));
    let read = account.read;
    table.allow(slot, read, OF_USER)?;
    Ok(Used::of(messages - read.min(messages), OF_USER, read))
}

/// A slot that is looked at again.
struct Look {
    at: Instant,
    pause: Duration,
    read: u64,
}

/// The thread: adds credit where the program says that little is left, until `stop` is closed.
fn add_credit(table: &Mutex<Table>, mut low: RingBuf<MapData>, stop: &UnixStream) {
    if let Err(error) = privileges::keep_only(privileges::running(false)) {
        tracing::error!("capabilities that are not needed cannot be given up: {error}");
    }
    let mut looks: BTreeMap<u32, Look> = BTreeMap::new();
    loop {
        let next = looks.values().map(|look| look.at).min();
        match wait(&low, stop, next) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => return tracing::error!("the thread that adds credit cannot wait: {error}"),
        }
        let now = Instant::now();
        while let Some(record) = low.next() {
            if let Ok(slot) = u32::read_from_bytes(&record) {
                let look = looks.entry(slot).or_insert(Look {
                    at: now,
                    pause: LOOK_AGAIN.0,
                    read: 0,
                });
                look.at = now;
            }
        }
        let due: Vec<u32> = looks
            .iter()
            .filter(|(_, look)| look.at <= now)
            .map(|(&slot, _)| slot)
            .collect();
        for slot in due {
            let is_account = lock(table).accounts.contains_key(&slot);
            let used = if is_account {
                refill_account(table, slot)
            } else {
                lock(table).refill_receiver(slot)
            };
            let used = used.unwrap_or_else(|error| {
                tracing::error!(slot, "credit cannot be added: {}", error_chain(&error));
                Used::LITTLE
            });
            match looks.get_mut(&slot) {
                Some(look) if used.much => {
                    let (shortest, longest) = LOOK_AGAIN;
                    look.pause = if used.read > look.read {
                        shortest
                    } else {
                        longest.min(2 * look.pause)
                    };
                    look.read = used.read;
                    look.at = now + look.pause;
                }
                _ => _ = looks.remove(&slot),
            }
        }
    }
}

/// Waits for the program, for the time to look again, or for the end; says whether it was that.
fn wait(low: &RingBuf<MapData>, mut stop: &UnixStream, next: Option<Instant>) -> io::Result<bool> {
    let timeout = next.map_or(PollTimeout::NONE, |next| {
        let left = next.saturating_duration_since(Instant::now());
        PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    let mut watched = [
        PollFd::new(low.as_fd(), PollFlags::POLLIN),
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
    ];
    match poll(&mut watched, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ended = watched[1].any().unwrap_or(false);
    Ok(ended && stop.read(&mut [0])? == 0)
}
