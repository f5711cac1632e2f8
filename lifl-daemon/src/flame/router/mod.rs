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
//! socket's lock: that is done on threads of its user's ([`errands`](crate::errands)), one at a time for a socket and for an id.

mod references;
mod registration;
mod status;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifl_common::flame::{Address, Worker};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use self::references::{Held, log_dropped, uncount};
pub(super) use self::registration::Inserted;
use self::registration::{Early, OVERTAKEN, log_refused};
use super::kernel::{EntryError, Kernel};
use super::owner::Process;
use super::rules::{Refusal, show_id};
use super::server::{Event, Share};
use super::wire::Message;
use crate::accounts;
use crate::chain::error_chain;
use crate::refusals::may_log;

/// How long a connection may be without a registration.
const UNREGISTERED: Duration = Duration::from_secs(30);

/// References that are held for all receivers of one user.
pub(super) const HELD_FOR_USER: usize = 4096;

/// Messages that wait for one worker to read them.
pub(super) const QUEUED_OF_WORKER: usize = 4096;

/// Messages that wait for all workers of one user to read them: in the daemon, where they take 16 MiB, and in the kernel.
pub(super) const QUEUED_OF_USER: usize = 16_384;

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

/// Flame's workers.
#[derive(Debug)]
pub(super) struct Router {
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

impl Router {
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

    /// The connection of a worker that may be sent to.
    fn worker(&self, address: Address) -> Option<ConnId> {
        let id = *self.workers.get(&address)?;
        let worker = self.conns.get(&id)?.worker.as_ref()?;
        worker.joined.then_some(id)
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
}

/// An entry of the kernel's maps that is not as it should be.
fn log_entry(address: Address, error: &EntryError) {
    let (id, uid) = (show_id(address.id), address.uid);
    tracing::error!(id, uid, "{}", error_chain(error));
}
