//! Who is connected, who is registered, and what waits for whom. One task owns it ([`server`](super::server)).
//!
//! ```text
//!  connected ── registered ──▶ worker ── its connection closes, or another replaces it ──▶ gone
//!      │                                                                                     │
//!      └── not registered in time: closed                            registered anew: worker ┘
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

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddrV4;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifl_common::control::{FlamePage, FlameWorkerStatus};
use lifl_common::flame::{Address, Sender, Worker, is_gone};
use lifl_common::plane::PlaneKind;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::kernel::Kernel;
use super::owner::{self, Descriptor, Process};
use super::rules::{Claim, Holder, Refusal, Ruling, judge, show_id};
use super::wire::{Message, Registration};
use crate::chain::error_chain;
use crate::errands::Foreign;
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

/// References that are held for one receiver.
const HELD_FOR_RECEIVER: usize = 256;

/// References that are held for all receivers of one user.
const HELD_FOR_USER: usize = 4096;

/// Messages that wait in the daemon for all workers of one user to read them: 16 MiB.
const QUEUED_OF_USER: usize = 16_384;

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
    /// The far end's address.
    pub(super) peer: SocketAddrV4,
    /// What it is to read.
    pub(super) outbox: mpsc::Sender<Queued>,
    /// Closes it.
    pub(super) kick: CancellationToken,
    since: Instant,
    worker: Option<Registered>,
    /// What went through the daemon.
    relayed: Worker,
}

impl Conn {
    pub(super) fn new(
        (uid, inode): (u32, u32),
        peer: SocketAddrV4,
        outbox: mpsc::Sender<Queued>,
        kick: CancellationToken,
    ) -> Self {
        Self {
            uid,
            inode,
            peer,
            outbox,
            kick,
            since: Instant::now(),
            worker: None,
            relayed: Worker::default(),
        }
    }
}

/// What a connection is registered as.
#[derive(Clone, Debug)]
struct Registered {
    sender: Sender,
    process: Process,
}

/// A reference that waits for its receiver.
#[derive(Debug)]
struct Held {
    since: Instant,
    sender: Address,
    message: Message,
}

/// A claim that waits for its socket's connection.
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
        self.queues.entry(conn.uid).or_insert_with(new).0 += 1;
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
        if let Some((connections, _)) = self.queues.get_mut(&conn.uid) {
            *connections -= 1;
            if *connections == 0 {
                self.queues.remove(&conn.uid);
            }
        }
    }

    /// Somebody wants a socket to be registered.
    pub(super) fn claim(&mut self, claim: Claim) {
        let granted = match claim.descriptor {
            Descriptor::Socket { inode } => match self.inodes.get(&inode) {
                Some(&id) => self.grant(id, &claim),
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

    /// Keeps a claim until its socket's connection is accepted. A process's own user counts: whoever calls, the claim can be
    /// granted to no other.
    fn wait_for(&mut self, inode: u32, claim: Claim) -> Result<(), Refusal> {
        let process = owner::process(claim.registration.pid).ok_or(Refusal::NoProcess)?;
        if let Some(caller) = claim.caller
            && caller != process.uid
        {
            return Err(Refusal::OtherCaller {
                caller,
                socket: process.uid,
            });
        }
        let uid = process.uid;
        let of_user = self.early.values().filter(|early| early.uid == uid).count();
        if !self.early.contains_key(&inode) && (of_user >= EARLY_OF_USER || self.early.len() >= EARLY) {
            return Err(Refusal::TooEarly { of_user });
        }
        let since = Instant::now();
        self.early.insert(inode, Early { since, uid, claim });
        Ok(())
    }

    fn grant(&mut self, id: ConnId, claim: &Claim) -> Result<(), Refusal> {
        let conn = self.conns.get(&id).ok_or(Refusal::NotConnectedHere)?;
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
        let registered = conn.worker.as_ref().map(|worker| worker.sender.address.id);
        let is_new = conn.since.elapsed() < NEW;
        let ruling = judge(claim, &process, conn.uid, is_new, registered, holding.as_ref())?;
        if ruling == Ruling::Nothing {
            return Ok(());
        }
        let (uid, inode) = (conn.uid, conn.inode);
        let socket = self
            .kernel
            .is_some()
            .then(|| take_socket(claim.registration, uid, inode))
            .transpose()?;
        if let Some(holder) = holder {
            self.unregister(holder);
            if let Some(conn) = self.conns.get(&holder) {
                conn.kick.cancel();
            }
        }
        self.unregister(id);
        if let Some(holding) = holding {
            tracing::warn!(
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
        self.register(id, address, process, socket)
    }

    fn register(
        &mut self,
        id: ConnId,
        address: Address,
        process: Process,
        socket: Option<Foreign>,
    ) -> Result<(), Refusal> {
        self.changes += 1;
        let sender = Sender {
            address,
            since: self.changes,
        };
        let conn = self.conns.get_mut(&id).ok_or(Refusal::NotConnectedHere)?;
        if let (Some(kernel), Some(socket)) = (&mut self.kernel, socket) {
            let inserted = kernel.insert(sender, connection(conn.peer, self.local), socket.as_fd());
            inserted.map_err(|error| Refusal::Kernel(error_chain(&error)))?;
            // `socket` closes here: a duplicate kept by the daemon would keep a dead worker's connection open.
        }
        tracing::info!(
            id = show_id(address.id),
            uid = address.uid,
            pid = process.pid,
            name = process.name,
            "Flame worker registered"
        );
        conn.worker = Some(Registered { sender, process });
        self.workers.insert(address, id);
        self.gone.remove(&address);
        for held in self.held.remove(&address).into_iter().flatten() {
            self.hand_over(id, held.message);
        }
        if self.kernel.is_some() {
            // Its reader may have gone to sleep before its socket was in the map, and would not look there: only what
            // comes on the connection wakes it.
            self.hand_over(id, Message::empty(address.id));
        }
        Ok(())
    }

    /// That connection is no worker's any more.
    fn unregister(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let Some(Registered { sender, process }) = conn.worker.take() else {
            return;
        };
        let address = sender.address;
        self.changes += 1;
        if let Some(kernel) = &mut self.kernel
            && let Err(error) = kernel.remove(address, connection(conn.peer, self.local), self.changes)
        {
            tracing::error!(
                id = show_id(address.id),
                uid = address.uid,
                "{}",
                error_chain(&error)
            );
        }
        tracing::info!(
            id = show_id(address.id),
            uid = address.uid,
            pid = process.pid,
            name = process.name,
            "Flame worker gone"
        );
        self.workers.remove(&address);
        let gone = Worker {
            changed: self.changes,
            ..Worker::default()
        };
        self.gone.insert(address, gone);
        self.gone_in_order.push_back((address, self.changes));
        self.forget();
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
    fn forget(&mut self) {
        while self.gone_in_order.len() > self.remembered {
            let Some((address, change)) = self.gone_in_order.pop_front() else {
                return;
            };
            // Unless it came back, or went once more.
            if self.gone.get(&address).is_some_and(|gone| gone.changed == change) {
                self.gone.remove(&address);
                if let Some(kernel) = &mut self.kernel
                    && let Err(error) = kernel.forget(address)
                {
                    tracing::error!(
                        id = show_id(address.id),
                        uid = address.uid,
                        "{}",
                        error_chain(&error)
                    );
                }
            }
        }
    }

    /// A worker wrote a reference to its connection: it is not in the kernel's map, or was not when it wrote.
    pub(super) fn reference(&mut self, from: ConnId, message: Message) {
        let Some(conn) = self.conns.get_mut(&from) else {
            return;
        };
        let receiver = Address {
            uid: conn.uid,
            id: message.receiver(),
        };
        // One that is not registered yet was there before nobody.
        let (sender, since) = match &conn.worker {
            Some(worker) => (worker.sender.address, worker.sender.since),
            None => (
                Address {
                    uid: conn.uid,
                    id: u32::MAX,
                },
                u64::MAX,
            ),
        };
        conn.relayed.last_ns = monotonic_ns();
        let gone = self.gone.get(&receiver).is_some_and(|gone| is_gone(gone, since));
        if let Some(&to) = self.workers.get(&receiver) {
            conn.relayed.sent += 1;
            self.hand_over(to, message);
        } else if gone {
            conn.relayed.refused += 1;
            tracing::warn!(
                from = show_id(sender.id),
                to = show_id(receiver.id),
                "dropped a reference: its receiver is gone"
            );
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
        match self.workers.get(&receiver) {
            // It has registered since.
            Some(&to) => self.hand_over(to, message),
            None => self.hold(sender, receiver, message),
        }
    }

    fn hold(&mut self, sender: Address, receiver: Address, message: Message) {
        let of_user = self
            .held
            .iter()
            .filter(|(address, _)| address.uid == receiver.uid);
        let of_user: usize = of_user.map(|(_, held)| held.len()).sum();
        let held = self.held.entry(receiver).or_default();
        if held.len() >= HELD_FOR_RECEIVER || of_user >= HELD_FOR_USER {
            tracing::warn!(
                from = show_id(sender.id),
                to = show_id(receiver.id),
                uid = receiver.uid,
                held = held.len(),
                of_user,
                "dropped a reference: too many wait for workers that are not registered"
            );
            return;
        }
        tracing::debug!(
            from = show_id(sender.id),
            to = show_id(receiver.id),
            "held until its receiver registers"
        );
        held.push_back(Held {
            since: Instant::now(),
            sender,
            message,
        });
    }

    fn hand_over(&mut self, to: ConnId, message: Message) {
        let Some(conn) = self.conns.get(&to) else {
            return;
        };
        let queue = self.queues.get(&conn.uid);
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
        let id = conn
            .worker
            .as_ref()
            .map_or(u32::MAX, |worker| worker.sender.address.id);
        tracing::warn!(to = show_id(id), uid = conn.uid, "dropped a reference: {why}");
    }

    /// Ends what has waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let older = |since: Instant, limit| now.saturating_duration_since(since) >= limit;
        for (_, early) in self.early.extract_if(|_, early| older(early.since, OVERTAKEN)) {
            log_refused(&early.claim, &Refusal::NotConnectedHere);
        }
        for conn in self.conns.values().filter(|conn| conn.worker.is_none()) {
            if older(conn.since, UNREGISTERED) && !conn.kick.is_cancelled() {
                tracing::warn!(uid = conn.uid, peer = %conn.peer, "a connection that nobody registered: closed");
                conn.kick.cancel();
            }
        }
        let hold = self.hold;
        self.held.retain(|receiver, held| {
            while held.front().is_some_and(|first| older(first.since, hold)) {
                let sender = held.pop_front().map_or(u32::MAX, |held| held.sender.id);
                tracing::warn!(
                    from = show_id(sender),
                    to = show_id(receiver.id),
                    uid = receiver.uid,
                    "dropped a reference: its receiver did not register within {} s",
                    hold.as_secs()
                );
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
        for (address, conn) in self.workers.iter().filter(|(address, _)| may_see(address)) {
            if start.is_some_and(|start| *address <= start) {
                continue;
            }
            if shown.len() == STATUS_PAGE {
                more = true;
                break;
            }
            let Some((conn, worker)) = self
                .conns
                .get(conn)
                .and_then(|conn| Some((conn, conn.worker.as_ref()?)))
            else {
                continue;
            };
            let in_kernel = self
                .kernel
                .as_ref()
                .and_then(|kernel| kernel.counters(*address).ok());
            let (kernel, relayed) = (in_kernel.unwrap_or_default(), conn.relayed);
            shown.push(FlameWorkerStatus {
                uid: address.uid,
                id: address.id,
                taskid: show_id(address.id),
                pid: worker.process.pid,
                name: worker.process.name.clone(),
                sent: kernel.sent + relayed.sent,
                held: kernel.held + relayed.held,
                refused: kernel.refused + relayed.refused,
                last_ns: kernel.last_ns.max(relayed.last_ns),
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

fn monotonic_ns() -> u64 {
    nix::time::ClockId::CLOCK_MONOTONIC.now().map_or(0, |now| {
        now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    fn claim(pid: u32, inode: u32, caller: Option<u32>) -> Claim {
        Claim {
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
        let mut switch = Switch::new(None, local, Duration::from_secs(1), 4);
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
}
