//! Registrations: waited for, judged, granted, taken back.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lifl_common::flame::{Address, Worker};

use super::{ConnId, Registered, Router, log_entry};
use crate::chain::error_chain;
use crate::errands::{self, Foreign};
use crate::flame::kernel::{EntryError, Joining};
use crate::flame::owner::{self, Descriptor, Process};
use crate::flame::rules::{Claim, Holder, Refusal, Ruling, judge, show_id};
use crate::flame::server::Event;
use crate::flame::wire::{Message, Registration};
use crate::plane::connection;
use crate::refusals::may_log;

/// How long a connection is new: see [`rules`](crate::flame::rules).
const NEW: Duration = Duration::from_secs(2);

/// How long a registration waits for its socket's connection to be accepted: it is in the kernel's queue by then.
pub(super) const OVERTAKEN: Duration = Duration::from_secs(5);

/// Registrations that may wait so at a time for the sockets of one user's processes, and for all.
const EARLY_OF_USER: usize = 1024;
const EARLY: usize = 64 * EARLY_OF_USER;

/// Registrations that may wait for one under way, of the same socket or id.
const BEHIND: usize = 16;

/// What became of putting a worker's socket into the kernel's map.
#[derive(Debug)]
pub(in crate::flame) struct Inserted {
    conn: ConnId,
    address: Address,
    since: u64,
    claim: Claim,
    result: Result<(), Refusal>,
}

/// A claim that waits for its socket's connection, or for a registration under way.
#[derive(Debug)]
pub(super) struct Early {
    pub(super) since: Instant,
    /// The user of the process that it names.
    pub(super) uid: u32,
    pub(super) claim: Claim,
}

impl Router {
    /// Somebody wants a socket to be registered.
    pub(in crate::flame) fn claim(&mut self, claim: Claim) {
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
    pub(in crate::flame) fn inserted(&mut self, inserted: Inserted) {
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
    pub(super) fn unregister(&mut self, id: ConnId) {
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

/// One line for whoever wonders why a worker cannot be reached.
pub(super) fn log_refused(claim: &Claim, refusal: &Refusal) {
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

    use std::net::SocketAddrV4;

    use tokio::sync::mpsc;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::flame::router::Conn;
    use crate::flame::server::Quota;

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
        let mut router = Router::new(None, local, Duration::from_secs(1), 4, mpsc::channel(1).0);
        let theirs = |inode, caller| claim(other.id(), inode, caller);
        for inode in 0..EARLY_OF_USER as u32 {
            let caller = (inode % 2 == 0).then_some(other_uid);
            assert_eq!(router.wait_for(inode, theirs(inode, caller)), Ok(()));
        }
        let of_user = EARLY_OF_USER;
        assert_eq!(
            router.wait_for(1 << 20, theirs(1 << 20, None)),
            Err(Refusal::TooEarly { of_user })
        );
        // The same socket named again takes no other place.
        assert_eq!(router.wait_for(0, theirs(0, None)), Ok(()));
        let own = std::process::id();
        assert_eq!(router.wait_for(1 << 20, claim(own, 1 << 20, None)), Ok(()));
        let refused = router.wait_for(2 << 20, claim(own, 2 << 20, Some(other_uid)));
        assert!(matches!(refused, Err(Refusal::OtherCaller { .. })), "{refused:?}");
        other.kill().expect("ended");
        other.wait().expect("reaped");
    }

    /// What had to wait, for the end of its bytes or behind another registration, undoes nothing that came after it.
    #[test]
    fn the_last_registration_of_a_socket_stands() {
        let local = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 1);
        let mut router = Router::new(None, local, Duration::from_secs(1), 4, mpsc::channel(1).0);
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
        router.connected(ConnId(1), conn);
        let registered = |router: &Router| {
            let worker = router.conns[&ConnId(1)].worker.as_ref();
            worker.map(|worker| worker.address.id)
        };

        // One that another registration of the same id holds up.
        let busy = Address { uid, id: 37 };
        router.joining.insert(busy, Vec::new());
        router.claim(numbered(1, 37));
        assert_eq!(registered(&router), None);
        router.claim(numbered(2, 1000));
        assert_eq!(registered(&router), Some(1000));
        router.inserted(Inserted {
            conn: ConnId(2),
            address: busy,
            since: 0,
            claim: numbered(0, 37),
            result: Ok(()),
        });
        assert_eq!(registered(&router), Some(1000));

        // One whose bytes came late.
        router.claim(numbered(1, 38));
        assert_eq!(registered(&router), Some(1000));
        router.claim(numbered(3, 39));
        assert_eq!(registered(&router), Some(39));

        // Of those that wait, too, the last stands.
        router.joining.insert(busy, Vec::new());
        router.claim(numbered(5, 37));
        router.claim(numbered(4, 37));
        assert_eq!(router.joining[&busy][0].claim.number, 5);
    }
}
