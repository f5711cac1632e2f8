//! Workers that were there before this daemon: waited for, taken back, or removed.
//!
//! ```text
//!   found in the pinned maps ──▶ awaited ── reattach ──▶ worker, as if it had registered here
//!                                   │
//!                                   ├── its socket closes ──▶ gone: off the plane, peers told
//!                                   └── the grace is over ──▶ gone, the same way
//!   a job whose maker is gone ──▶ ended: whoever comes back to it is told so
//! ```
//!
//! The proof of who somebody is lies in the kernel: the socket that it hands over is in the map, and its connection is
//! that worker's. Everything else that it says of itself is for people, or is checked here.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use lifl_common::arena::{Layout, memfd};
use lifl_common::control::{ErrorCode, Event, HeldArena, Message, PeerLost, Reply};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::kernel::Member;
use nix::sys::stat::fstat;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use tokio::time::Instant;

use super::arenas::Arena;
use super::jobs::Job;
use super::quota::Want;
use super::workers::Worker;
use super::{Answer, Beside, ConnId, Denial, NOBODY, Outgoing, Registry, check_name, deny};
use crate::accounts;
use crate::chain::error_chain;
use crate::errands::Foreign;
use crate::plane::{Examined, Recovered};

/// How often the sockets of those who are awaited are looked at.
pub(crate) const CHECK: Duration = Duration::from_millis(200);

/// Workers named in one [`Event::Living`].
const LIVING: usize = 4096;

/// `F_SEAL_EXEC` in `include/uapi/linux/fcntl.h`: set by the kernel itself where `vm.memfd_noexec` says so.
const SEAL_EXEC: i32 = 0x20;

/// What is known of those who have not come back.
#[derive(Debug)]
pub(super) struct Awaited {
    members: BTreeMap<WorkerId, Member>,
    /// Jobs with members here, whose makers are gone.
    orphans: BTreeSet<JobId>,
    until: Instant,
}

/// What those who are awaited have of the node.
#[derive(Debug, Default)]
pub(super) struct AwaitedOfUser {
    pub(super) workers: u32,
    pub(super) arena_bytes: u64,
    pub(super) jobs: BTreeSet<JobId>,
}

impl Default for Awaited {
    fn default() -> Self {
        Self {
            members: BTreeMap::new(),
            orphans: BTreeSet::new(),
            until: Instant::now(),
        }
    }
}

impl Awaited {
    /// How many.
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// What those of a user have.
    pub(super) fn of_user(&self, account: u32) -> AwaitedOfUser {
        let mut all = AwaitedOfUser::default();
        for member in self.members.values() {
            if accounts::owner_of(member.uid) == account {
                all.workers += 1;
                all.arena_bytes = all.arena_bytes.saturating_add(member.arena_bytes());
                all.jobs.insert(member.job);
            }
        }
        all
    }

    /// Whose jobs they are in.
    pub(super) fn users(&self) -> impl Iterator<Item = u32> {
        self.members.values().map(|member| accounts::owner_of(member.uid))
    }

    /// Whether somebody of that job is awaited.
    pub(super) fn has_job(&self, job: JobId) -> bool {
        self.members.values().any(|member| member.job == job)
    }

    /// Whoever comes back to that job is told that it has ended.
    pub(super) fn job_ended(&mut self, job: JobId) {
        if self.has_job(job) {
            self.orphans.insert(job);
        }
    }

    /// Whether that worker of that job is awaited.
    pub(super) fn has_worker(&self, worker: WorkerId, job: JobId) -> bool {
        self.members.get(&worker).is_some_and(|member| member.job == job)
    }
}

impl Registry {
    /// Takes over what the last daemon left, and waits for so long for its workers.
    pub(crate) fn recover(&mut self, recovered: Recovered, grace: Duration) {
        self.last_worker = self.last_worker.max(recovered.last_worker.0);
        self.last_job = self.last_job.max(recovered.last_job.0);
        let members = recovered.members;
        if members.is_empty() {
            return;
        }
        let jobs: BTreeSet<JobId> = members.values().map(|member| member.job).collect();
        let made: BTreeSet<JobId> = members
            .values()
            .filter(|member| member.is_maker())
            .map(|member| member.job)
            .collect();
        tracing::info!(
            workers = members.len(),
            jobs = jobs.len(),
            grace_s = grace.as_secs_f64(),
            "waiting for the last daemon's workers"
        );
        // Whoever asks for memory before they are back finds theirs taken.
        let held = members.values().map(|member| member.arena_bytes());
        self.pool.adopt(held.fold(0, u64::saturating_add));
        self.awaited = Awaited {
            members,
            orphans: jobs.difference(&made).copied().collect(),
            until: Instant::now() + grace,
        };
    }

    /// Whether somebody is awaited.
    pub(crate) fn awaits(&self) -> bool {
        !self.awaited.members.is_empty()
    }

    /// Removes those whose sockets have closed, and all when the grace is over. To be called every [`CHECK`].
    pub(crate) fn check_awaited(&mut self, now: Instant) {
        let over = now >= self.awaited.until;
        let open = match self.plane.open_sockets() {
            Ok(open) => open,
            Err(error) => {
                tracing::error!("who is alive cannot be seen: {}", error_chain(&error));
                self.awaited.members.keys().map(|worker| worker.0).collect()
            }
        };
        let gone = |worker: &WorkerId| over || !open.contains(&worker.0);
        let gone: Vec<WorkerId> = self.awaited.members.keys().copied().filter(gone).collect();
        for worker in gone {
            let why = if open.contains(&worker.0) {
                "it did not come back"
            } else {
                "its socket is closed"
            };
            self.remove_awaited(worker, why);
        }
    }

    fn remove_awaited(&mut self, id: WorkerId, why: &str) {
        let Some(member) = self.awaited.members.remove(&id) else {
            return;
        };
        tracing::info!(worker = %id, job = %member.job, "worker gone: {why}");
        self.pool.free(member.arena_bytes());
        if let Err(error) = self.plane.unregister(id) {
            tracing::error!(worker = %id, "cannot be taken off the plane: {}", error_chain(&error));
        }
        if member.is_maker() {
            self.awaited.orphans.insert(member.job);
            self.end_job(member.job, "the process that made the job is gone");
        }
        self.tell_lost(id, member.job, &id.to_string());
        self.drop_if_deserted(member.job);
    }

    /// A worker shows who it is.
    pub(super) fn reattach(
        &mut self,
        id: ConnId,
        role: String,
        name: String,
        job_name: Option<String>,
        held: &[HeldArena],
        beside: Beside,
    ) -> Answer {
        check_name("role", &role)?;
        check_name("worker", &name)?;
        if let Some(name) = &job_name {
            check_name("job", name)?;
        }
        let conn = self.known(id)?;
        let peer = conn.peer;
        if conn.job.is_some() || conn.worker.is_some() {
            return deny(ErrorCode::BadRequest, "this connection is a worker already");
        }
        let Some(socket) = beside.socket else {
            let message =
                "reattach needs descriptors beside it: the socket for frames, and each arena's memfd";
            return deny(ErrorCode::BadRequest, message);
        };
        let (worker, member) = self.prove(socket)?;
        if peer.uid != member.uid && peer.uid != 0 {
            return deny(ErrorCode::Denied, format!("{worker} is another user's"));
        }
        if self
            .jobs
            .get(&member.job)
            .is_some_and(|job| job.names.contains(&name))
        {
            let message = format!("job {} has a worker called {name:?} already", member.job);
            return deny(ErrorCode::BadRequest, message);
        }
        let arenas = self.check_arenas(worker, member, held, beside.fds)?;

        // From here on nothing fails.
        self.awaited.members.remove(&worker);
        let brought = arenas.iter().map(|(_, arena)| arena.bytes);
        let brought = brought.fold(0, u64::saturating_add);
        // What it had and does not bring may still be there: it counts for as long as the worker does.
        let lost_bytes = member.arena_bytes().saturating_sub(brought);
        self.pool.free(member.arena_bytes());
        self.pool.adopt(brought.saturating_add(lost_bytes));
        let orphan = self.awaited.orphans.contains(&member.job);
        let job = self.jobs.entry(member.job).or_insert_with(|| {
            let (name, account) = (member.job.to_string(), accounts::owner_of(member.uid));
            Job {
                ended: orphan,
                ..Job::new(name, member.uid, account, NOBODY)
            }
        });
        job.members.insert(worker);
        job.names.insert(name.clone());
        job.arena_bytes += lost_bytes;
        for (arena, entry) in arenas {
            job.arena_bytes += entry.bytes;
            self.arenas.insert(arena, entry);
        }
        job.arena_peak_bytes = job.arena_peak_bytes.max(job.arena_bytes);
        let ended = job.ended;
        if member.is_maker() {
            job.maker = id;
            if let Some(name) = job_name {
                job.name = name;
            }
        }
        let maker = job.maker;
        tracing::info!(%worker, job = %member.job, ?name, pid = peer.pid, "worker is back");
        let made = Worker {
            name: name.clone(),
            role,
            job: member.job,
            conn: id,
            pid: peer.pid,
            uid: member.uid,
            account: accounts::owner_of(member.uid),
            own: false,
            joined: true,
            lost_bytes,
        };
        self.workers.insert(worker, made);
        let conn = self.known_mut(id)?;
        conn.worker = Some(worker);
        conn.job = member.is_maker().then_some(member.job);
        self.tell_living(id, member.job);
        if ended {
            self.tell(
                id,
                Event::JobEnded {
                    reason: "the process that made the job is gone".to_owned(),
                },
            );
        } else if maker == id {
            // It may have missed some.
            let members = self
                .jobs
                .get(&member.job)
                .into_iter()
                .flat_map(|job| &job.members);
            let others = members.filter(|&&other| other != worker);
            let joined: Vec<Event> = others
                .filter_map(|&worker| {
                    let name = self.workers.get(&worker)?.name.clone();
                    Some(Event::PeerJoined { worker, name })
                })
                .collect();
            joined.into_iter().for_each(|event| self.tell(id, event));
        } else if maker != NOBODY {
            self.tell(maker, Event::PeerJoined { worker, name });
        }
        let job = member.job;
        Ok((Reply::Reattached { worker, job }, None))
    }

    /// Whose a socket is, of those who are awaited.
    fn prove(&self, socket: Examined) -> Result<(WorkerId, Member), Denial> {
        if self.plane.pinned().is_none() {
            let message = "this daemon keeps no workers of a daemon before it: its maps are not pinned";
            return deny(ErrorCode::Denied, message);
        }
        let found = match self.plane.whose_examined(socket) {
            Ok(found) => found,
            Err(error) => {
                let message = format!("the socket is no worker's: {}", error_chain(&error));
                return deny(ErrorCode::BadRequest, message);
            }
        };
        let member = found.and_then(|worker| Some((worker, *self.awaited.members.get(&worker)?)));
        let Some((worker, member)) = member else {
            let message = "the socket is not that of a worker that is awaited: it never was one, it is back already, or its \
                           time is over";
            return deny(ErrorCode::NotFound, message);
        };
        // The numbers of a closed connection may be another's by now.
        let open = self.plane.open_sockets();
        if open.is_ok_and(|open| open.contains(&worker.0)) {
            return Ok((worker, member));
        }
        deny(ErrorCode::NotFound, format!("{worker}'s socket is closed"))
    }

    /// The arenas that a worker brings, if all of them are what they should be, and there is room for them.
    fn check_arenas(
        &mut self,
        owner: WorkerId,
        member: Member,
        held: &[HeldArena],
        fds: Vec<Foreign>,
    ) -> Result<Vec<(ArenaId, Arena)>, Denial> {
        if held.len() != fds.len() {
            let message = format!(
                "{} arenas are named and {} descriptors are beside them",
                held.len(),
                fds.len()
            );
            return deny(ErrorCode::BadRequest, message);
        }
        let mut arenas: BTreeMap<ArenaId, Arena> = BTreeMap::new();
        for (&HeldArena { arena, layout }, fd) in held.iter().zip(fds) {
            if arena.owner() != owner {
                return deny(ErrorCode::Denied, format!("arena {arena} is not {owner}'s"));
            }
            let (bytes, page_bytes) = check_memfd(fd.as_fd(), arena, layout)?;
            let memfd = memfd::reopen(fd.as_fd(), true).map_err(|error| {
                let message = format!("the descriptor for arena {arena} cannot be opened: {error}");
                Denial(ErrorCode::Failed, message)
            })?;
            let entry = Arena {
                owner,
                job: member.job,
                account: accounts::owner_of(member.uid),
                layout,
                memfd,
                bytes,
                page_bytes,
                note: None,
                sealed: true,
            };
            if arenas.insert(arena, entry).is_some() {
                return deny(ErrorCode::BadRequest, format!("arena {arena} is named twice"));
            }
        }
        let bytes = arenas
            .values()
            .map(|arena| arena.bytes)
            .fold(0, u64::saturating_add);
        // What it is known to have was granted before; more than that is asked for.
        let more = bytes.saturating_sub(member.arena_bytes());
        if more > 0 {
            if let Err(error) = self.pool.has_room(more) {
                return deny(ErrorCode::Full, error_chain(&error));
            }
            self.admit(accounts::owner_of(member.uid), Want::Arena { bytes: more })?;
        }
        Ok(arenas.into_iter().collect())
    }

    /// Tells a worker that comes back who of its job is there.
    fn tell_living(&mut self, id: ConnId, job: JobId) {
        let present = self.jobs.get(&job).into_iter().flat_map(|job| &job.members);
        let awaited = self
            .awaited
            .members
            .iter()
            .filter(|(_, member)| member.job == job);
        let mut living: Vec<WorkerId> = present
            .copied()
            .chain(awaited.map(|(&worker, _)| worker))
            .collect();
        living.sort_unstable();
        let mut first = WorkerId(1);
        let chunks = living.chunks(LIVING);
        let count = chunks.len();
        for (n, workers) in chunks.enumerate() {
            let last = match workers.last() {
                Some(&last) if n + 1 < count => last,
                _ => WorkerId(self.last_worker),
            };
            let workers = workers.to_vec();
            self.tell(id, Event::Living { first, last, workers });
            first = WorkerId(last.0.saturating_add(1));
        }
    }

    pub(super) fn tell(&mut self, to: ConnId, event: Event) {
        self.outbox.push(Outgoing {
            to,
            message: Arc::new(Message::Event(event)),
            fd: None,
        });
    }

    /// Tells a job's workers that one of them is gone; nobody needs to know when the job has ended.
    pub(super) fn tell_lost(&mut self, id: WorkerId, job: JobId, name: &str) {
        if self.jobs.get(&job).is_none_or(|job| job.ended) {
            return;
        }
        let Some(job) = self.jobs.get(&job) else { return };
        let name = name.to_owned();
        let lost = Arc::new(Message::Event(Event::PeerLost(PeerLost { worker: id, name })));
        let peers = job.members.iter().filter_map(|peer| self.workers.get(peer));
        self.outbox.extend(peers.map(|peer| Outgoing {
            to: peer.conn,
            message: Arc::clone(&lost),
            fd: None,
        }));
    }

    /// For the daemon's end: whether jobs go on without it. Those that cannot are ended.
    pub(crate) fn leave_jobs(&mut self) -> bool {
        const STOPPING: &str = "the daemon is stopping";
        if self.plane.pinned().is_none() {
            self.end_all(STOPPING);
            return false;
        }
        let ids: Vec<JobId> = self.jobs.keys().copied().collect();
        for id in ids {
            let job = &self.jobs[&id];
            let has_worker = |conn: &super::Conn| conn.worker.is_some();
            if job.traffic.is_some() {
                self.end_job(
                    id,
                    "the daemon is stopping, and the job's remote workers come through it",
                );
            } else if job.maker != NOBODY && !self.conns.get(&job.maker).is_some_and(has_worker) {
                self.end_job(id, STOPPING);
            }
        }
        self.awaits() || self.workers.values().any(|worker| !self.is_over(worker.job))
    }

    /// Whether somebody is connected whom the daemon waits for at its end: whose job has ended, or who has none.
    pub(crate) fn is_deserted(&self, jobs_stay: bool) -> bool {
        let stays = |conn: &super::Conn| {
            let worker = conn.worker.and_then(|worker| self.workers.get(&worker));
            jobs_stay && worker.is_none_or(|worker| !self.is_over(worker.job))
        };
        self.conns.values().all(stays)
    }

    pub(super) fn is_over(&self, job: JobId) -> bool {
        self.jobs.get(&job).is_none_or(|job| job.ended)
    }
}

/// That a descriptor is an arena as the pool makes and seals them; its bytes, and those of its pages.
///
/// Its seals are asked for first, which only files in memory have: whatever else it is could make the other calls wait.
fn check_memfd(memfd: BorrowedFd<'_>, arena: ArenaId, layout: Layout) -> Result<(u64, u64), Denial> {
    let wrong = |what: String| {
        Denial(
            ErrorCode::BadRequest,
            format!("the descriptor for arena {arena} {what}"),
        )
    };
    let seals = memfd::seals(memfd).map_err(|error| wrong(format!("is no memfd: {error}")))?;
    if seals & !SEAL_EXEC != memfd::ARENA_SEALS {
        let required = memfd::ARENA_SEALS;
        return Err(wrong(format!("has the seals {seals:#x}, not {required:#x}")));
    }
    let huge = fstatfs(memfd)
        .map_err(|errno| wrong(format!("cannot be looked at: {errno}")))?
        .filesystem_type()
        == HUGETLBFS_MAGIC;
    let found = fstat(memfd)
        .map_err(|errno| wrong(format!("cannot be looked at: {errno}")))?
        .st_size
        .unsigned_abs();
    let page_bytes = if huge {
        memfd::HUGE_PAGE_BYTES
    } else {
        Layout::SLOT_ALIGN
    };
    match layout.memfd_bytes(huge) {
        Some(bytes) if bytes == found => Ok((bytes, page_bytes)),
        expected => {
            let expected = expected.unwrap_or(0);
            Err(wrong(format!("has {found} bytes, its slots make {expected}")))
        }
    }
}
