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
//! so unread bytes say how many messages are unread at most. Whether this kernel tells it is tried at the start ([`sockets`]).
//!
//! Flame's program also hands messages to the daemon, which holds them for receivers that are not registered yet. They are
//! counted for their sender's user; how many of them have been read, the daemon itself knows ([`Credits::taken`]).
//!
//! The thread sleeps until the program writes to it. A queue that stays long is looked at again, ever more rarely. While there is
//! no daemon nobody adds credit, so the program then allows [`WITHOUT_DAEMON`] times as much.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io::{self, Read};
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::maps::{Array, MapData, MapError, RingBuf};
use lifl_common::client::loopback_pair;
use lifl_common::frame::Frame;
use lifl_common::kernel::{Connection, Credit, DEAD_LETTERS, Inbox, MAP_CREDITS, MAP_INBOXES, MAP_LOW};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use zerocopy::{FromBytes, transmute};

use super::Bare;
use super::socket::{addresses, check_tcp};
use crate::accounts;
use crate::chain::error_chain;
use crate::ebpf::{LoadError, Program};
use crate::privileges;
use crate::sock_diag::SocketTable;

/// What may wait, in messages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Receivers at a time.
    pub(crate) receivers: u32,
    /// Bytes of the smallest message.
    pub(crate) message_bytes: u32,
    /// For one receiver.
    pub(crate) of_receiver: u64,
    /// For all workers of one user together.
    pub(crate) of_user: u64,
    /// For the daemon to hold, from all workers of one user; 0 where it holds none.
    pub(crate) held_of_user: u64,
}

impl Bounds {
    /// For frames. Each message takes the kernel about 1 KiB beside what is in it.
    pub(crate) const fn of_frames(receivers: u32) -> Self {
        Self {
            receivers,
            message_bytes: Frame::BYTES as u32,
            of_receiver: 16_384,
            of_user: 65_536,
            held_of_user: 0,
        }
    }

    /// The map entries that this takes: the daemon's own socket, the receivers, as many users at most, and what each of those has
    /// the daemon hold.
    ///
    /// ```text
    ///  0 │ 1 … n receivers │ n + 1 … 2 n users │ 2 n + 1 … 3 n held
    /// ```
    pub(crate) const fn entries(&self) -> u32 {
        let each = if self.held_of_user == 0 { 2 } else { 3 };
        self.receivers.saturating_mul(each).saturating_add(1)
    }

    /// The slot that counts what that user's slot has the daemon hold.
    const fn held(&self, account: u32) -> u32 {
        account + self.receivers
    }

    /// The user's slot that a held one belongs to.
    const fn account_of_held(&self, slot: u32) -> Option<u32> {
        if slot > self.receivers.saturating_mul(2) {
            Some(slot - self.receivers)
        } else {
            None
        }
    }
}

/// How many times as much there may be while no daemon looks.
const WITHOUT_DAEMON: u64 = 16;

/// How soon a queue that stays long is looked at again; the pause doubles up to the second.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

type InboxBytes = [u8; size_of::<Inbox>()];
type CreditBytes = [u8; size_of::<Credit>()];

/// The credit of a program's receivers and of their users. Dropping it ends its thread.
pub(crate) struct Credits {
    table: Arc<Mutex<Table>>,
    bounds: Bounds,
    unbounded: Option<String>,
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
    /// Takes the program's maps, and starts the thread. `sockets` is where it is looked what is unread, or why that cannot be done
    /// ([`sockets`]).
    pub(crate) fn of(
        program: &mut Program,
        bounds: Bounds,
        sockets: Result<SocketTable, String>,
    ) -> Result<Self, LoadError> {
        let low: RingBuf<MapData> = program.map(MAP_LOW)?;
        let (sockets, unbounded) = match sockets {
            Ok(sockets) => (Some(sockets), None),
            Err(why) => (None, Some(why)),
        };
        let receivers = bounds.receivers;
        let table = Arc::new(Mutex::new(Table {
            inboxes: program.map(MAP_INBOXES)?,
            credits: program.map(MAP_CREDITS)?,
            sockets,
            bounds,
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
            .spawn(move || add_credit(&shared, low, &stopped))
            .map_err(LoadError::Thread)?;
        Ok(Self {
            table,
            bounds,
            unbounded,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Why what is unread is not bounded; `None` if it is.
    pub(crate) fn unbounded(&self) -> Option<&str> {
        self.unbounded.as_deref()
    }

    /// Begins to count what the daemon's own socket is handed.
    pub(crate) fn add_own(&self, connection: &Connection) -> Result<(), MapError> {
        self.table().receive(DEAD_LETTERS, None, connection)
    }

    /// Slots for one more receiver, of that user.
    pub(crate) fn add(&self, uid: u32, connection: &Connection) -> Result<Slots, MapError> {
        let uid = accounts::owner_of(uid);
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
        let uid = accounts::owner_of(uid);
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
        if let Some(account) = table.accounts.get_mut(&slots.account) {
            account.receivers.remove(&slots.inbox);
        }
        table.close_if_deserted(slots.account);
    }

    /// The slot that counts what that receiver's user has the daemon hold.
    pub(crate) fn held(&self, slots: Slots) -> u32 {
        self.bounds.held(slots.account)
    }

    /// The daemon has taken a message that a user's worker has it hold.
    pub(crate) fn taken(&self, uid: u32) {
        let uid = accounts::owner_of(uid);
        let mut table = self.table();
        let Some(&slot) = table.account_of.get(&uid) else {
            return;
        };
        if let Some(account) = table.accounts.get_mut(&slot) {
            account.taken += 1;
        }
        table.close_if_deserted(slot);
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
    bounds: Bounds,
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

/// A user. It is there while it has workers, or messages of its wait to be held.
struct Account {
    uid: u32,
    receivers: BTreeSet<u32>,
    /// Messages that its workers have read at least, or that went with their sockets.
    read: u64,
    /// Messages of its that the daemon has taken to hold.
    taken: u64,
}

impl Account {
    fn new(uid: u32) -> Self {
        Self {
            uid,
            receivers: BTreeSet::new(),
            read: 0,
            taken: 0,
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
        self.allow(slot, read, self.bounds.of_user)?;
        let mut account = Account {
            read,
            ..Account::new(uid)
        };
        if self.bounds.held_of_user > 0 {
            let held = self.bounds.held(slot);
            account.taken = self.messages(held)?;
            self.allow(held, account.taken, self.bounds.held_of_user)?;
        }
        self.accounts.insert(slot, account);
        self.account_of.insert(uid, slot);
        Ok(slot)
    }

    /// Begins to count what a socket is handed.
    fn receive(&mut self, slot: u32, account: Option<u32>, connection: &Connection) -> Result<(), MapError> {
        let (local, remote) = addresses(connection);
        // Whoever had the slot before is gone, with its queue.
        let read = self.messages(slot)?;
        self.allow(slot, read, self.bounds.of_receiver)?;
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
            let bytes = charged(self.sockets.as_ref(), receiver).unwrap_or(0);
            let unread = u64::from(bytes.div_ceil(self.bounds.message_bytes));
            receiver.read = receiver.read.max(messages.saturating_sub(unread));
        }
        Ok(messages - receiver.read)
    }

    /// Messages of a user that the daemon has yet to take, at most. Where nothing waits for it, those that are missing did not come
    /// so far: the kernel had no memory for them.
    fn held(&mut self, account: u32) -> Result<u64, MapError> {
        if self.bounds.held_of_user == 0 {
            return Ok(0);
        }
        let messages = self.messages(self.bounds.held(account))?;
        let own = self.receivers.get(&DEAD_LETTERS);
        let nothing_waits = own.is_some_and(|own| charged(self.sockets.as_ref(), own) == Some(0));
        let Some(account) = self.accounts.get_mut(&account) else {
            return Ok(0);
        };
        if nothing_waits || account.taken > messages {
            account.taken = messages;
        }
        Ok(messages - account.taken)
    }

    /// As [`refill_receiver`](Self::refill_receiver), for what a user has the daemon hold.
    fn refill_held(&mut self, slot: u32, account: u32) -> Result<Used, MapError> {
        let waiting = self.held(account)?;
        let Some(taken) = self.accounts.get(&account).map(|account| account.taken) else {
            return Ok(Used::LITTLE);
        };
        let limit = self.bounds.held_of_user;
        self.allow(slot, taken, limit)?;
        Ok(Used::of(waiting, limit, taken))
    }

    /// Forgets a user that has no workers, once what it has had held has been taken: another's count begins where its own ends.
    fn close_if_deserted(&mut self, slot: u32) {
        let deserted = |account: &Account| account.receivers.is_empty();
        if !self.accounts.get(&slot).is_some_and(deserted) || self.held(slot).is_ok_and(|held| held > 0) {
            return;
        }
        if let Some(account) = self.accounts.remove(&slot) {
            self.account_of.remove(&account.uid);
            self.free_accounts.insert(slot);
        }
    }

    /// Gives a receiver the credit that it has by what it has read; how much of it is used up.
    fn refill_receiver(&mut self, slot: u32) -> Result<Used, MapError> {
        let unread = self.unread(slot)?;
        let Some(receiver) = self.receivers.get(&slot) else {
            return Ok(Used::LITTLE);
        };
        let read = receiver.read;
        let limit = self.bounds.of_receiver;
        self.allow(slot, read, limit)?;
        Ok(Used::of(unread, limit, read))
    }
}

/// Bytes that wait in a receiver's socket; `None` where the kernel does not tell, or it is gone.
fn charged(sockets: Option<&SocketTable>, receiver: &Receiver) -> Option<u32> {
    let found = sockets?.at(receiver.local, receiver.remote).ok().flatten();
    found?.receive_charged_bytes
}

/// The kernel's table of sockets, if it tells there what a receiver has not read.
///
/// # Errors
/// Why it does not, and what to do, in words that fit after "unread frames are not bounded: ".
pub(crate) fn sockets() -> Result<SocketTable, String> {
    let sockets = SocketTable::open().map_err(|error| {
        format!("the kernel's table of sockets cannot be opened ({error}); allow AF_NETLINK to the daemon")
    })?;
    // The same for as long as the kernel runs.
    static TELLS: LazyLock<Result<(), String>> = LazyLock::new(tells_what_is_unread);
    TELLS.clone().map(|()| sockets)
}

/// Tries it: with two sockets and a program that hands a message from one to the other.
fn tells_what_is_unread() -> Result<(), String> {
    // To the second socket.
    let mut message = [0; 1024];
    message[..4].copy_from_slice(&1_u32.to_ne_bytes());
    let failed =
        |error: &(dyn std::error::Error + 'static)| format!("it could not be tried ({})", error_chain(error));
    let (from, _from_far) = loopback_pair().map_err(|error| failed(&error))?;
    let (to, _to_far) = loopback_pair().map_err(|error| failed(&error))?;
    let receiver = check_tcp(&to).map_err(|error| failed(&error))?.addresses();
    let sockets = SocketTable::open().map_err(|error| failed(&error))?;
    let _program = Bare::load([&from, &to]).map_err(|error| failed(&error))?;
    send(from.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL).map_err(|error| failed(&error))?;
    let found = sockets.at(receiver.0, receiver.1).map_err(|error| {
        format!("the kernel does not describe sockets ({error}); load tcp_diag (sudo modprobe tcp_diag)")
    })?;
    match found.and_then(|found| found.receive_charged_bytes) {
        Some(bytes) if bytes as usize >= message.len() => Ok(()),
        _ => Err(
            "this kernel does not tell what was handed to a socket and is unread; install its latest updates"
                .to_owned(),
        ),
    }
}

/// Gives a slot the credit that it has by what has been read; how much of it is used up.
fn refill(table: &Mutex<Table>, slot: u32) -> Result<Used, MapError> {
    let mut locked = lock(table);
    if let Some(account) = locked.bounds.account_of_held(slot) {
        return locked.refill_held(slot, account);
    }
    if locked.accounts.contains_key(&slot) {
        drop(locked);
        return refill_account(table, slot);
    }
    locked.refill_receiver(slot)
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
    let limit = table.bounds.of_user;
    table.allow(slot, read, limit)?;
    Ok(Used::of(messages - read.min(messages), limit, read))
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
            let used = refill(table, slot);
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
