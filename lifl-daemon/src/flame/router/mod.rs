//! Who is connected, who is registered, and what waits for whom. One task owns it ([`server`](super::server)).
//!
//! ```text
//!  connected ── registration granted ──▶ joining ── its socket is in the kernel's map ──▶ worker
//!      │                                    │ it is not, or the connection closes            │ its connection closes, or
//!      └── not registered in time: closed   └──▶ as if it had not been tried                 ▼ another replaces it
//!                                                                   registered anew ◀────── gone
//!
//!  a reference to   a worker                      is handed over, padded
//!                   one that is not there yet     is held until it registers, or its time is up
//!                   one that is gone              is refused, if the sender was there before it went
//! ```
//!
//! With the kernel's part ([`Kernel`]) references go from socket to socket; those that the daemon has to hand over itself
//! (held ones, and what a worker wrote before its registration took effect) go out on the receiver's connection, which
//! its `recv` reads too. Without the kernel's part all go that way. Between references that go different ways there is no
//! order.
//!
//! Nothing here waits for a client. Taking a socket out of its process and putting it into the kernel's map does, for the
//! socket's lock: that is done on threads of its user's ([`errands`]), one at a time for a socket and for an id.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddrV4;
use std::ops::Bound;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifl_common::control::{FlamePage, FlameWorkerStatus};
use lifl_common::flame::{Address, Worker, is_gone};
use lifl_common::plane::PlaneKind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::kernel::{EntryError, Joining, Kernel};
use super::owner::{self, Descriptor, Process};
use super::rules::{Claim, Holder, Refusal, Ruling, judge, show_id};
use super::server::{Event, Share};
use super::wire::{Message, Registration};
use crate::accounts;
use crate::chain::error_chain;
use crate::clock::{idle_ns, kernel_ns};
use crate::errands::{self, Foreign};
use crate::plane::connection;
use crate::refusals::may_log;

/// How long a connection may be without a registration.
const UNREGISTERED: Duration = Duration::from_secs(30);

/// How long a connection is new: see [`rules`](super::rules).
const NEW: Duration = Duration::from_secs(2);

/// How long a registration waits for its socket's connection to be accepted: it is in the kernel's queue by then.
const OVERTAKEN: Duration = Duration::from_secs(5);

/// Registrations that may wait so at a time for the sockets of one user's processes, and for all.
const EARLY_OF_USER: usize = 1024;
const EARLY: usize = 64 * EARLY_OF_USER;

/// Registrations that may wait for one under way, of the same socket or id.
const BEHIND: usize = 16;

/// References that are held for one receiver.
const HELD_FOR_RECEIVER: usize = 256;

/// References that are held for all receivers of one user.
pub(super) const HELD_FOR_USER: usize = 4096;

/// Messages that wait for one worker to read them.
pub(super) const QUEUED_OF_WORKER: usize = 4096;

/// Messages that wait for all workers of one user to read them: in the daemon, where they take 16 MiB, and in the kernel.
pub(super) const QUEUED_OF_USER: usize = 16_384;

/// Workers on one page of a status: a page must fit into a packet.
const STATUS_PAGE: usize = 128;

/// A connection's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ConnId(pub(super) u64);

/// A message that waits for its receiver to read, and its share of what may wait for that user's.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) message: Message,
    _share: OwnedSemaphorePermit,
}

/// A worker's connection.
#[derive(Debug)]
pub(super) struct Conn {
    /// Whose it is, and the number of the socket at its far end.
    pub(super) uid: u32,
    pub(super) inode: u32,
    /// For whom its amounts count, as long as it lives: the files that say so may be changed.
    account: u32,
    /// The far end's address.
    pub(super) peer: SocketAddrV4,
    /// What it is to read.
    pub(super) outbox: mpsc::Sender<Queued>,
    /// Closes it.
    pub(super) kick: CancellationToken,
    /// Its share of what its user may have: an errand for it has that, too.
    share: Arc<Share>,
    since: Instant,
    worker: Option<Registered>,
    /// Which registration was the last that was granted for it.
    granted: u64,
    /// What went through the daemon.
    relayed: Worker,
}

impl Conn {
    pub(super) fn new(
        (uid, inode): (u32, u32),
        peer: SocketAddrV4,
        outbox: mpsc::Sender<Queued>,
        kick: CancellationToken,
        share: Arc<Share>,
    ) -> Self {
        Self {
            share,
            uid,
            inode,
            account: accounts::owner_of(uid),
            peer,
            outbox,
            kick,
            since: Instant::now(),
            worker: None,
            granted: 0,
            relayed: Worker::default(),
        }
    }
}

/// What a connection is registered as.
#[derive(Clone, Debug)]
struct Registered {
    address: Address,
    /// The number of the change that registered it.
    since: u64,
    process: Process,
    /// Whether it may be sent to: its socket is in the kernel's map, where there is one.
    joined: bool,
}

/// What became of putting a worker's socket into the kernel's map.
#[derive(Debug)]
pub(super) struct Inserted {
    conn: ConnId,
    address: Address,
    since: u64,
    claim: Claim,
    result: Result<(), Refusal>,
}

/// A reference that waits for its receiver.
#[derive(Debug)]
struct Held {
    since: Instant,
    /// For whom it counts.
    account: u32,
    sender: Address,
    message: Message,
}

/// A claim that waits for its socket's connection, or for a registration under way.
#[derive(Debug)]
struct Early {
    since: Instant,
    /// The user of the process that it names.
    uid: u32,
    claim: Claim,
}

/// Flame's workers.
#[derive(Debug)]
pub(super) struct Switch {
    kernel: Option<Kernel>,
    /// Our address for workers.
    local: SocketAddrV4,
    hold: Duration,
    /// Workers that are remembered when they are gone.
    remembered: usize,
    conns: HashMap<ConnId, Conn>,
    inodes: HashMap<u32, ConnId>,
    workers: BTreeMap<Address, ConnId>,
    /// What may yet be queued for the connections of each user that has one.
    queues: HashMap<u32, (usize, Arc<Semaphore>)>,
    gone: HashMap<Address, Worker>,
    gone_in_order: VecDeque<(Address, u64)>,
    held: HashMap<Address, VecDeque<Held>>,
    /// How many of those each user has.
    held_of: HashMap<u32, usize>,
    /// Addresses for which a socket is being put into the kernel's map, and the claims that wait for the end of that.
    joining: HashMap<Address, Vec<Early>>,
    /// Where it is told that it has been.
    events: mpsc::Sender<Event>,
    /// Claims to sockets whose connection has not been accepted yet, by their inode.
    early: HashMap<u32, Early>,
    changes: u64,
}

impl Switch {
    pub(super) fn new(
        kernel: Option<Kernel>,
        local: SocketAddrV4,
        hold: Duration,
        remembered: usize,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Self {
            kernel,
            local,
            hold,
            remembered,
            conns: HashMap::new(),
            inodes: HashMap::new(),
            workers: BTreeMap::new(),
            queues: HashMap::new(),
            gone: HashMap::new(),
            gone_in_order: VecDeque::new(),
            held: HashMap::new(),
            held_of: HashMap::new(),
            joining: HashMap::new(),
            events,
            early: HashMap::new(),
            changes: 0,
        }
    }

    /// Gives the kernel's part back for its orderly end.
    pub(super) fn into_kernel(self) -> Option<Kernel> {
        self.kernel
    }

    /// A worker has connected.
    pub(super) fn connected(&mut self, id: ConnId, conn: Conn) {
        let inode = conn.inode;
        self.inodes.insert(inode, id);
        let new = || (0, Arc::new(Semaphore::new(QUEUED_OF_USER)));
        self.queues.entry(conn.account).or_insert_with(new).0 += 1;
        self.conns.insert(id, conn);
        if let Some(early) = self.early.remove(&inode) {
            self.claim(early.claim);
        }
    }

    /// A worker's connection is closed, and with it its socket.
    pub(super) fn closed(&mut self, id: ConnId) {
        self.unregister(id);
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        self.inodes.remove(&conn.inode);
        if let Some((connections, _)) = self.queues.get_mut(&conn.account) {
            *connections -= 1;
            if *connections == 0 {
                self.queues.remove(&conn.account);
            }
        }
    }

    /// Somebody wants a socket to be registered.
    pub(super) fn claim(&mut self, claim: Claim) {
        let granted = match claim.descriptor {
            Descriptor::Socket { inode } => match self.inodes.get(&inode) {
                Some(&id) => match self.under_way(id, &claim) {
                    None => self.grant(id, &claim),
                    Some(address) => self.wait_behind(address, claim),
                },
                // Its registration may overtake its connection, which is then on its way.
                None => self.wait_for(inode, claim),
            },
            Descriptor::Other => Err(Refusal::NotASocket),
            Descriptor::Missing => Err(Refusal::NoDescriptor),
        };
        if let Err(refusal) = granted {
            log_refused(&claim, &refusal);
        }
    }

    /// Keeps a claim until its socket's connection is accepted.
    fn wait_for(&mut self, inode: u32, claim: Claim) -> Result<(), Refusal> {
        let early = Early::of(claim)?;
        if let Some(other) = self.early.get(&inode)
            && other.claim.number > early.claim.number
        {
            return Err(Refusal::Overtaken);
        }
        let uid = early.uid;
        let of_user = self.early.values().filter(|early| early.uid == uid).count();
        if !self.early.contains_key(&inode) && (of_user >= EARLY_OF_USER || self.early.len() >= EARLY) {
            return Err(Refusal::TooEarly { of_user });
        }
        self.early.insert(inode, early);
        Ok(())
    }

    /// The address whose registration is under way, if a claim must wait for that: it is to the same socket, or wants the same id.
    fn under_way(&self, id: ConnId, claim: &Claim) -> Option<Address> {
        let conn = self.conns.get(&id)?;
        let wanted = Address {
            uid: conn.uid,
            id: claim.registration.id,
        };
        let own = conn.worker.as_ref().map(|worker| worker.address);
        [Some(wanted), own]
            .into_iter()
            .flatten()
            .find(|address| self.joining.contains_key(address))
    }

    /// Keeps a claim until the registration under way is over. A later one to the same socket takes its place.
    fn wait_behind(&mut self, address: Address, claim: Claim) -> Result<(), Refusal> {
        let early = Early::of(claim)?;
        let waiting = self.joining.entry(address).or_default();
        let is_same = |other: &Early| other.claim.descriptor == early.claim.descriptor;
        if waiting
            .iter()
            .any(|other| is_same(other) && other.claim.number > early.claim.number)
        {
            return Err(Refusal::Overtaken);
        }
        waiting.retain(|other| !is_same(other));
        if waiting.len() >= BEHIND {
            return Err(Refusal::UnderWay);
        }
        waiting.push(early);
        Ok(())
    }

    fn grant(&mut self, id: ConnId, claim: &Claim) -> Result<(), Refusal> {
        let conn = self.conns.get(&id).ok_or(Refusal::NotConnectedHere)?;
        if claim.number < conn.granted {
            return Err(Refusal::Overtaken);
        }
        let process = owner::process(claim.registration.pid).ok_or(Refusal::NoProcess)?;
        let address = Address {
            uid: conn.uid,
            id: claim.registration.id,
        };
        let holder = self
            .workers
            .get(&address)
            .filter(|holder| **holder != id)
            .copied();
        let holding = holder.and_then(|holder| self.conns.get(&holder)?.worker.as_ref());
        let holding = holding.map(|worker| Holder {
            runs: owner::process(worker.process.pid).is_some_and(|now| now.started == worker.process.started),
            process: worker.process.clone(),
        });
        let registered = conn.worker.as_ref().map(|worker| worker.address.id);
        let is_new = conn.since.elapsed() < NEW;
        let ruling = judge(claim, &process, conn.uid, is_new, registered, holding.as_ref())?;
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.granted = claim.number;
        }
        if ruling == Ruling::Nothing {
            return Ok(());
        }
        if let Some(holder) = holder {
            self.unregister(holder);
            if let Some(conn) = self.conns.get(&holder) {
                conn.kick.cancel();
            }
            // What is sent to it waits for its successor.
            self.forget(address);
        }
        self.unregister(id);
        if let Some(holding) = holding
            && let Some(dropped) = may_log(address.uid)
        {
            tracing::warn!(
                dropped,
                id = show_id(address.id),
                uid = address.uid,
                pid = process.pid,
                name = process.name,
                old_pid = holding.process.pid,
                old_name = holding.process.name,
                old_runs = holding.runs,
                "Flame worker replaced"
            );
        }
        self.register(id, address, process, claim)
    }

    fn register(
        &mut self,
        id: ConnId,
        address: Address,
        process: Process,
        claim: &Claim,
    ) -> Result<(), Refusal> {
        self.changes += 1;
        let since = self.changes;
        let conn = self.conns.get_mut(&id).ok_or(Refusal::NotConnectedHere)?;
        let joining = match &mut self.kernel {
            None => None,
            Some(kernel) => Some(kernel.begin(address, since, connection(conn.peer, self.local))),
        };
        let joining = joining.transpose().map_err(refused_by_kernel)?;
        conn.worker = Some(Registered {
            address,
            since,
            process,
            joined: false,
        });
        self.workers.insert(address, id);
        match joining {
            None => self.joined(id),
            Some(joining) => self.insert(id, address, since, *claim, joining),
        }
        Ok(())
    }

    /// Has a worker's socket put into the kernel's map.
    fn insert(&mut self, id: ConnId, address: Address, since: u64, claim: Claim, joining: Joining) {
        let Some(conn) = self.conns.get(&id) else { return };
        self.joining.insert(address, Vec::new());
        let (uid, inode, share) = (conn.uid, conn.inode, Arc::clone(&conn.share));
        let events = self.events.clone();
        let tell = move |result| {
            let inserted = Inserted {
                conn: id,
                address,
                since,
                claim,
                result,
            };
            // Fails when nobody is served any more.
            let _ = events.blocking_send(Event::Inserted(inserted));
            drop(share);
        };
        let refuse = tell.clone();
        let errand = move || {
            let socket = take_socket(claim.registration, uid, inode);
            tell(socket.and_then(|socket| joining.insert(socket).map_err(refused_by_kernel)));
        };
        errands::ask(uid, errand, move |why| refuse(Err(Refusal::NoThread(why))));
    }

    /// A worker's socket has been put into the kernel's map, or could not be.
    pub(super) fn inserted(&mut self, inserted: Inserted) {
        let Inserted {
            conn: id,
            address,
            since,
            claim,
            result,
        } = inserted;
        let waiting = self.joining.remove(&address).unwrap_or_default();
        let worker = self.conns.get(&id).and_then(|conn| conn.worker.as_ref());
        if worker.is_some_and(|worker| worker.since == since) {
            match result {
                Ok(()) => self.joined(id),
                Err(refusal) => {
                    self.unregister(id);
                    log_refused(&claim, &refusal);
                }
            }
        } else if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.forget_socket(address)
        {
            // It left meanwhile.
            log_entry(address, &error);
        }
        for early in waiting {
            self.claim(early.claim);
        }
    }

    /// A connection is a worker's from here on.
    fn joined(&mut self, id: ConnId) {
        let Some(worker) = self.conns.get_mut(&id).and_then(|conn| conn.worker.as_mut()) else {
            return;
        };
        let address = worker.address;
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.finish(address, worker.since)
        {
            log_entry(address, &error);
            return self.unregister(id);
        }
        worker.joined = true;
        tracing::info!(
            id = show_id(address.id),
            uid = address.uid,
            pid = worker.process.pid,
            name = worker.process.name,
            "Flame worker registered"
        );
        self.gone.remove(&address);
        for held in self.take_held(address) {
            self.hand_over(id, held.message);
        }
        if self.kernel.is_some() {
            // Its reader may have gone to sleep before its socket was in the map, and would not look there: only what
            // comes on the connection wakes it.
            self.hand_over(id, Message::empty(address.id));
        }
    }

    /// That connection is no worker's any more.
    fn unregister(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let Some(Registered {
            address,
            process,
            joined,
            ..
        }) = conn.worker.take()
        else {
            return;
        };
        self.workers.remove(&address);
        self.changes += 1;
        if let Some(kernel) = &mut self.kernel {
            let connection = connection(conn.peer, self.local);
            let removed = if joined {
                kernel.remove(address, connection, self.changes)
            } else {
                kernel.take_back(address, connection)
            };
            if let Err(error) = removed {
                log_entry(address, &error);
            }
        }
        if !joined {
            return;
        }
        tracing::info!(
            id = show_id(address.id),
            uid = address.uid,
            pid = process.pid,
            name = process.name,
            "Flame worker gone"
        );
        let gone = Worker {
            changed: self.changes,
            ..Worker::default()
        };
        self.gone.insert(address, gone);
        self.gone_in_order.push_back((address, self.changes));
        self.forget_oldest();
    }

    /// Tells whoever reads the log which workers this daemon leaves: Flame's SDK takes the end of its connection for an
    /// empty message, again and again.
    pub(super) fn name_left(&self) {
        for (address, conn) in &self.workers {
            let Some(worker) = self.conns.get(conn).and_then(|conn| conn.worker.as_ref()) else {
                continue;
            };
            tracing::warn!(
                id = show_id(address.id),
                uid = address.uid,
                pid = worker.process.pid,
                name = worker.process.name,
                "Flame worker left without a daemon: its SDK reads the closed connection without a pause and never \
                 connects again; end it with `kill {}` and start its job again once a daemon is there",
                worker.process.pid
            );
        }
    }

    /// Forgets the workers that are gone for longest, when there are too many.
    fn forget_oldest(&mut self) {
        while self.gone_in_order.len() > self.remembered {
            let Some((address, change)) = self.gone_in_order.pop_front() else {
                return;
            };
            // Unless it came back, or went once more.
            if self.gone.get(&address).is_some_and(|gone| gone.changed == change) {
                self.forget(address);
            }
        }
    }

    /// Forgets that there was such a worker: what is sent to it is held.
    fn forget(&mut self, address: Address) {
        self.gone.remove(&address);
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.forget(address)
        {
            log_entry(address, &error);
        }
    }

    /// The connection of a worker that may be sent to.
    fn worker(&self, address: Address) -> Option<ConnId> {
        let id = *self.workers.get(&address)?;
        let worker = self.conns.get(&id)?.worker.as_ref()?;
        worker.joined.then_some(id)
    }

    /// A worker wrote a reference to its connection: it is not in the kernel's map, or was not when it wrote.
    pub(super) fn reference(&mut self, from: ConnId, message: Message) {
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
    pub(super) fn undelivered(&mut self, sender: Address, message: Message) {
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
        let held = self.held.entry(receiver).or_default();
        if held.len() >= HELD_FOR_RECEIVER || of_user >= HELD_FOR_USER {
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
        held.push_back(Held {
            since: Instant::now(),
            account,
            sender,
            message,
        });
    }

    /// Takes what is held for a worker.
    fn take_held(&mut self, address: Address) -> VecDeque<Held> {
        let held = self.held.remove(&address).unwrap_or_default();
        for Held { account, .. } in &held {
            uncount(&mut self.held_of, *account);
        }
        held
    }

    fn hand_over(&mut self, to: ConnId, message: Message) {
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

    /// Ends what has waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let older = |since: Instant, limit| now.saturating_duration_since(since) >= limit;
        for (_, early) in self.early.extract_if(|_, early| older(early.since, OVERTAKEN)) {
            log_refused(&early.claim, &Refusal::NotConnectedHere);
        }
        for conn in self.conns.values().filter(|conn| conn.worker.is_none()) {
            if older(conn.since, UNREGISTERED) && !conn.kick.is_cancelled() {
                if let Some(dropped) = may_log(conn.uid) {
                    tracing::warn!(uid = conn.uid, peer = %conn.peer, dropped, "a connection that nobody registered: closed");
                }
                conn.kick.cancel();
            }
        }
        for early in self.joining.values_mut() {
            for early in early.extract_if(.., |early| older(early.since, OVERTAKEN)) {
                log_refused(&early.claim, &Refusal::UnderWay);
            }
        }
        let hold = self.hold;
        let (held, held_of) = (&mut self.held, &mut self.held_of);
        held.retain(|receiver, held| {
            while held.front().is_some_and(|first| older(first.since, hold)) {
                let Some(first) = held.pop_front() else { break };
                uncount(held_of, first.account);
                let why = format!("its receiver did not register within {} s", hold.as_secs());
                log_dropped(first.sender, *receiver, &why);
            }
            !held.is_empty()
        });
    }

    /// A page of the workers that a user may see, after that one.
    pub(super) fn status(&self, uid: u32, after: Option<(u32, u32)>) -> FlamePage {
        let may_see = |address: &Address| uid == 0 || uid == address.uid;
        let start = after.map(|(uid, id)| Address { uid, id });
        let mut shown: Vec<FlameWorkerStatus> = Vec::new();
        let mut more = false;
        let after = start.map_or(Bound::Unbounded, Bound::Excluded);
        let later = self.workers.range((after, Bound::Unbounded));
        for (address, conn) in later.filter(|(address, _)| may_see(address)) {
            let Some(conn) = self.conns.get(conn) else {
                continue;
            };
            let Some(worker) = conn.worker.as_ref().filter(|worker| worker.joined) else {
                continue;
            };
            if shown.len() == STATUS_PAGE {
                more = true;
                break;
            }
            let in_kernel = self
                .kernel
                .as_ref()
                .and_then(|kernel| kernel.counters(*address).ok());
            let (kernel, relayed) = (in_kernel.unwrap_or_default(), conn.relayed);
            let last_ns = kernel.last_ns.max(relayed.last_ns);
            shown.push(FlameWorkerStatus {
                uid: address.uid,
                id: address.id,
                taskid: show_id(address.id),
                pid: worker.process.pid,
                name: worker.process.name.clone(),
                sent: kernel.sent + relayed.sent,
                held: kernel.held + relayed.held,
                refused: kernel.refused + relayed.refused,
                last_ns,
                idle_ns: idle_ns(last_ns),
            });
        }
        let held = self.held.iter().filter(|(address, _)| may_see(address));
        FlamePage {
            plane: match self.kernel {
                Some(_) => PlaneKind::Sockmap,
                None => PlaneKind::Relay,
            },
            skmsg: self.local.to_string(),
            connections: self
                .conns
                .values()
                .filter(|conn| uid == 0 || uid == conn.uid)
                .count() as u32,
            held: held.map(|(_, held)| held.len() as u32).sum(),
            workers: shown,
            more,
        }
    }
}

/// A reference of that account's is held no more.
fn uncount(held_of: &mut HashMap<u32, usize>, account: u32) {
    if let Some(of_user) = held_of.get_mut(&account) {
        *of_user -= 1;
        if *of_user == 0 {
            held_of.remove(&account);
        }
    }
}

/// The worker's socket, which must be the one that was judged: another descriptor may have taken its number since.
fn take_socket(Registration { pid, fd, .. }: Registration, uid: u32, inode: u32) -> Result<Foreign, Refusal> {
    let socket = owner::duplicate(pid, fd)
        .map_err(|error| Refusal::Kernel(format!("pidfd_getfd({pid}, {fd}) failed: {error}")))?;
    let socket = Foreign::new(uid, socket);
    match owner::what_is(socket.as_fd()) {
        Descriptor::Socket { inode: found } if found == inode => Ok(socket),
        _ => Err(Refusal::NotConnectedHere),
    }
}

impl Early {
    /// A claim that waits, for the user of the process that it names. That process's own user counts: whoever calls, the claim can be
    /// granted to no other.
    fn of(claim: Claim) -> Result<Self, Refusal> {
        let process = owner::process(claim.registration.pid).ok_or(Refusal::NoProcess)?;
        if let Some(caller) = claim.caller
            && caller != process.uid
        {
            return Err(Refusal::OtherCaller {
                caller,
                socket: process.uid,
            });
        }
        Ok(Self {
            since: Instant::now(),
            uid: process.uid,
            claim,
        })
    }
}

fn refused_by_kernel(error: EntryError) -> Refusal {
    Refusal::Kernel(error_chain(&error))
}

/// An entry of the kernel's maps that is not as it should be.
fn log_entry(address: Address, error: &EntryError) {
    let (id, uid) = (show_id(address.id), address.uid);
    tracing::error!(id, uid, "{}", error_chain(error));
}

/// A reference that nobody gets.
fn log_dropped(from: Address, to: Address, why: &str) {
    if let Some(dropped) = may_log(to.uid) {
        let (from, uid, to) = (show_id(from.id), to.uid, show_id(to.id));
        tracing::warn!(from, to, uid, dropped, "dropped a reference: {why}");
    }
}

/// One line for whoever wonders why a worker cannot be reached.
fn log_refused(claim: &Claim, refusal: &Refusal) {
    // Those whom the kernel does not name are counted as one.
    let Some(dropped) = may_log(claim.caller.unwrap_or(u32::MAX)) else {
        return;
    };
    let Registration { pid, fd, id } = claim.registration;
    let process = owner::process(pid);
    let refusal = if process.is_none() {
        &Refusal::NoProcess
    } else {
        refusal
    };
    tracing::warn!(
        pid,
        uid = process.as_ref().map(|process| process.uid),
        name = process.map(|process| process.name),
        fd,
        id = show_id(id),
        caller = claim.caller,
        dropped,
        "Flame registration refused: {refusal}"
    );
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::super::server::Quota;
    use super::*;

    fn claim(pid: u32, inode: u32, caller: Option<u32>) -> Claim {
        Claim {
            number: 1,
            registration: Registration { pid, fd: 3, id: 9 },
            caller,
            descriptor: Descriptor::Socket { inode },
        }
    }

    /// What waits for one user's sockets takes no place of another's, whoever has sent it.
    #[test]
    fn early_registrations_are_counted_for_the_user_whose_process_they_name() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("NOT RUN: only root has processes of two users");
            assert!(
                std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(),
                "run as root, or without LIFL_REQUIRE_KERNEL"
            );
            return;
        }
        let other_uid = 65_533;
        let mut other = Command::new("sleep")
            .arg("600")
            .uid(other_uid)
            .spawn()
            .expect("a process");
        let local = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1);
        let mut switch = Switch::new(None, local, Duration::from_secs(1), 4, mpsc::channel(1).0);
        let theirs = |inode, caller| claim(other.id(), inode, caller);
        for inode in 0..EARLY_OF_USER as u32 {
            let caller = (inode % 2 == 0).then_some(other_uid);
            assert_eq!(switch.wait_for(inode, theirs(inode, caller)), Ok(()));
        }
        let of_user = EARLY_OF_USER;
        assert_eq!(
            switch.wait_for(1 << 20, theirs(1 << 20, None)),
            Err(Refusal::TooEarly { of_user })
        );
        // The same socket named again takes no other place.
        assert_eq!(switch.wait_for(0, theirs(0, None)), Ok(()));
        let own = std::process::id();
        assert_eq!(switch.wait_for(1 << 20, claim(own, 1 << 20, None)), Ok(()));
        let refused = switch.wait_for(2 << 20, claim(own, 2 << 20, Some(other_uid)));
        assert!(matches!(refused, Err(Refusal::OtherCaller { .. })), "{refused:?}");
        other.kill().expect("ended");
        other.wait().expect("reaped");
    }

    /// What had to wait, for the end of its bytes or behind another registration, undoes nothing that came after it.
    #[test]
    fn the_last_registration_of_a_socket_stands() {
        let local = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1);
        let mut switch = Switch::new(None, local, Duration::from_secs(1), 4, mpsc::channel(1).0);
        let (uid, inode) = (nix::unistd::geteuid().as_raw(), 7);
        let numbered = |number, id| {
            let mut claim = claim(std::process::id(), inode, Some(uid));
            claim.number = number;
            claim.registration.id = id;
            claim
        };
        let (outbox, kick) = (mpsc::channel(8).0, CancellationToken::new());
        let share = Quota::new(1).take(Some(uid)).expect("a share");
        let conn = Conn::new((uid, inode), local, outbox, kick, Arc::new(share));
        switch.connected(ConnId(1), conn);
        let registered = |switch: &Switch| {
            let worker = switch.conns[&ConnId(1)].worker.as_ref();
            worker.map(|worker| worker.address.id)
        };

        // One that another registration of the same id holds up.
        let busy = Address { uid, id: 37 };
        switch.joining.insert(busy, Vec::new());
        switch.claim(numbered(1, 37));
        assert_eq!(registered(&switch), None);
        switch.claim(numbered(2, 1000));
        assert_eq!(registered(&switch), Some(1000));
        switch.inserted(Inserted {
            conn: ConnId(2),
            address: busy,
            since: 0,
            claim: numbered(0, 37),
            result: Ok(()),
        });
        assert_eq!(registered(&switch), Some(1000));

        // One whose bytes came late.
        switch.claim(numbered(1, 38));
        assert_eq!(registered(&switch), Some(1000));
        switch.claim(numbered(3, 39));
        assert_eq!(registered(&switch), Some(39));

        // Of those that wait, too, the last stands.
        switch.joining.insert(busy, Vec::new());
        switch.claim(numbered(5, 37));
        switch.claim(numbered(4, 37));
        assert_eq!(switch.joining[&busy][0].claim.number, 5);
    }
}
