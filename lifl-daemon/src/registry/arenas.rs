//! Arenas: made on a thread of their user's, and counted until nobody has their memory any more.
//!
//! ```text
//!   bytes set aside ── made, elsewhere ──▶ arena ── its owner leaves ──▶ departed ── nobody has it open ──▶ gone
//!          │ nothing free, but some departed                  └──────────────────────────────────────────▶
//!          └── asked again, for a second ── no ──▶ refused
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use lifl_common::arena::{Layout, memfd};
use lifl_common::control::{ErrorCode, Reply};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use tokio::time::Instant;

use super::counted::Accounted;
use super::quota::Want;
use super::{Answer, ConnId, Denial, Done, Registry, deny};
use crate::chain::error_chain;
use crate::errands;
use crate::limits;
use crate::pool::{Allocation, Pages, PoolError};

/// How long a request for memory waits for that of workers who have left.
const DEPARTURE: Duration = Duration::from_secs(1);

/// Requests of one user that wait for that at a time.
const ASKING: usize = 4;

/// Departed arenas that are looked at in one go.
const LOOK: usize = 64;

#[derive(Debug)]
pub(super) struct Arena {
    pub(super) owner: WorkerId,
    pub(super) job: JobId,
    /// For whom it counts.
    pub(super) account: u32,
    pub(super) layout: Layout,
    pub(super) memfd: File,
    pub(super) bytes: u64,
    pub(super) page_bytes: u64,
    pub(super) note: Option<String>,
    pub(super) sealed: bool,
}

impl Accounted for Arena {
    fn account(&self) -> Option<u32> {
        Some(self.account)
    }

    fn descriptors(&self) -> u32 {
        1
    }
}

/// Memory whose owner has left, and that somebody may still have.
#[derive(Debug)]
pub(super) struct Departed {
    pub(super) account: u32,
    pub(super) bytes: u64,
    memfd: File,
}

/// A request for memory that waits for departed arenas to go.
#[derive(Debug)]
pub(super) struct Asking {
    id: ConnId,
    account: u32,
    layout: Layout,
    pages: Pages,
    until: Instant,
}

/// What was made for a connection's request.
#[derive(Debug)]
pub(crate) struct MadeArena {
    id: ConnId,
    owner: WorkerId,
    job: JobId,
    account: u32,
    arena: ArenaId,
    layout: Layout,
    /// What was set aside for it.
    bytes: u64,
    made: Result<Allocation, PoolError>,
}

impl Registry {
    /// Has an arena made; [`arena_made`](Self::arena_made) answers.
    pub(super) fn create_arena(
        &mut self,
        id: ConnId,
        layout: Layout,
        instead_of: Option<ArenaId>,
    ) -> Result<(), Denial> {
        let pages = match instead_of {
            None => Pages::Usual,
            Some(arena) => {
                self.take_back(id, arena)?;
                Pages::Ordinary
            }
        };
        self.plan_arena(id, layout, pages, Instant::now() + DEPARTURE)
    }

    /// Takes an arena from its owner, who cannot use its pages; nobody else has it yet.
    fn take_back(&mut self, id: ConnId, arena: ArenaId) -> Result<(), Denial> {
        let (owner, _) = self.worker_of(id)?;
        let unused = |entry: &Arena| entry.owner == owner && !entry.sealed;
        if !self.arenas.get(&arena).is_some_and(unused) {
            return deny(
                ErrorCode::BadRequest,
                format!("{owner} has no arena {arena} that is not sealed yet"),
            );
        }
        self.let_go(arena);
        self.note_arenas(owner);
        Ok(())
    }

    fn plan_arena(&mut self, id: ConnId, layout: Layout, pages: Pages, until: Instant) -> Result<(), Denial> {
        let (owner, worker) = self.worker_of(id)?;
        let (job_id, uid) = (worker.job, worker.uid);
        let name = format!("lifl-{}-{}", job_id, worker.name);
        // By its number it is its owner's, and nobody can bring another's to a later daemon.
        let mut numbers = (0..).map_while(|index| ArenaId::of(owner, index));
        let Some(arena) = numbers.find(|arena| !self.arenas.contains_key(arena)) else {
            let most = ArenaId::PER_WORKER;
            return deny(ErrorCode::Full, format!("a worker has at most {most} arenas"));
        };
        let Some(account) = self.jobs.get(&job_id).map(|job| job.account) else {
            return deny(ErrorCode::NotFound, "the job is gone");
        };
        let used = self.used(account);
        self.admit_descriptors(account, &used, 1)?;
        let (quotas, pool) = (&self.quotas, &mut self.pool);
        let admit = |bytes| quotas.admit(account, &used, Want::Arena { bytes });
        let plan = match pool.plan(name, layout, pages, admit) {
            Ok(plan) => plan,
            Err(PoolError::Full { .. } | PoolError::Quota(_))
                if !self.departed.is_empty()
                    && Instant::now() < until
                    && self
                        .asking
                        .iter()
                        .filter(|asking| asking.account == account)
                        .count()
                        < ASKING =>
            {
                let asking = Asking {
                    id,
                    account,
                    layout,
                    pages,
                    until,
                };
                self.asking.push(asking);
                return Ok(());
            }
            Err(error) => return Err(refused(&error)),
        };
        let bytes = plan.bytes();
        if let Some(job) = self.jobs.get_mut(&job_id) {
            job.arena_bytes += bytes;
        }
        let done = self.done.clone();
        let tell = move |made| {
            let made = MadeArena {
                id,
                owner,
                job: job_id,
                account,
                arena,
                layout,
                bytes,
                made,
            };
            // It ends after the registry only, or with it.
            let _ = done.send(Done::Arena(made));
        };
        let refuse = tell.clone();
        errands::ask(
            uid,
            move || tell(plan.make()),
            move |why| refuse(Err(PoolError::NoThread(why))),
        );
        Ok(())
    }

    /// An arena was made, or could not be.
    pub(super) fn arena_made(&mut self, made: MadeArena) {
        let MadeArena {
            id,
            owner,
            job,
            account,
            arena,
            layout,
            bytes,
            made,
        } = made;
        let got = made.as_ref().map_or(0, |made| made.bytes);
        self.pool.free(bytes - got);
        if let Some(job) = self.jobs.get_mut(&job) {
            job.arena_bytes -= bytes - got;
            job.arena_peak_bytes = job.arena_peak_bytes.max(job.arena_bytes);
        }
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                let denial = refused(&error);
                return self.answered(id, Err(denial));
            }
        };
        let Allocation {
            memfd,
            handed,
            bytes,
            page_bytes,
            note,
        } = made;
        if self.conns.get(&id).and_then(|conn| conn.worker) != Some(owner) {
            // Its owner left meanwhile, and nobody was given it.
            drop(handed);
            return self.depart(job, account, bytes, memfd);
        }
        tracing::debug!(%arena, %owner, bytes, page_bytes, "arena created");
        let entry = Arena {
            owner,
            job,
            account,
            layout,
            memfd,
            bytes,
            page_bytes,
            note: note.clone(),
            sealed: false,
        };
        self.arenas.insert(arena, entry);
        self.note_arenas(owner);
        let reply = Reply::ArenaCreated {
            arena,
            page_bytes,
            note,
        };
        self.answered(id, Ok((reply, Some(handed))));
    }

    /// Notes a worker's memory for a later daemon.
    fn note_arenas(&mut self, owner: WorkerId) {
        let bytes = arenas_of(owner).filter_map(|arena| self.arenas.get(&arena));
        let lost = self.workers.get(&owner).map_or(0, |worker| worker.lost_bytes);
        let bytes = bytes.map(|arena| arena.bytes).fold(lost, u64::saturating_add);
        if let Err(error) = self.plane.note_arenas(owner, bytes) {
            tracing::error!(worker = %owner, "its memory cannot be noted: {}", error_chain(&error));
        }
    }

    /// An arena has no owner any more, if there is one of that number.
    pub(super) fn let_go(&mut self, arena: ArenaId) {
        if let Some(arena) = self.arenas.remove(&arena) {
            self.depart(arena.job, arena.account, arena.bytes, arena.memfd);
        }
    }

    /// A job's memory has no owner any more. It counts for its user, no longer for the job, until nobody has it.
    fn depart(&mut self, job: JobId, account: u32, bytes: u64, memfd: File) {
        if let Some(job) = self.jobs.get_mut(&job) {
            job.arena_bytes -= bytes;
        }
        let departed = Departed {
            account,
            bytes,
            memfd,
        };
        if !self.is_gone(&departed) {
            self.departed.push_back(departed);
        }
    }

    /// Whether nobody has departed memory any more; then it is let go, and does not count.
    fn is_gone(&mut self, departed: &Departed) -> bool {
        match memfd::is_sole_opener(departed.memfd.as_fd()) {
            Ok(false) => return false,
            Ok(true) => {}
            Err(error) => tracing::debug!("who has a departed arena cannot be seen: {error}"),
        }
        self.pool.free(departed.bytes);
        // The last reference frees the pages, of which there may be many.
        if let Ok(last) = departed.memfd.try_clone() {
            errands::run(departed.account, move || drop(last));
        }
        true
    }

    /// Looks whether departed memory is gone, and asks again for those who wait for it. To be called now and then.
    pub(crate) fn check_departed(&mut self) {
        for _ in 0..LOOK.min(self.departed.len()) {
            let Some(departed) = self.departed.pop_front() else {
                break;
            };
            if !self.is_gone(&departed) {
                self.departed.push_back(departed);
            }
        }
        for Asking {
            id,
            layout,
            pages,
            until,
            ..
        } in std::mem::take(&mut self.asking)
        {
            if let Err(denial) = self.plan_arena(id, layout, pages, until) {
                self.answered(id, Err(denial));
            }
        }
    }

    /// Whether somebody waits for departed memory to go.
    pub(crate) fn has_departed(&self) -> bool {
        !self.departed.is_empty() || !self.asking.is_empty()
    }

    pub(super) fn seal_arena(&mut self, id: ConnId, arena_id: ArenaId) -> Answer {
        let (worker, _) = self.worker_of(id)?;
        let Some(arena) = self
            .arenas
            .get_mut(&arena_id)
            .filter(|arena| arena.owner == worker)
        else {
            return deny(ErrorCode::NotFound, format!("{worker} has no arena {arena_id}"));
        };
        if let Err(error) = memfd::seal(arena.memfd.as_fd()) {
            return deny(
                ErrorCode::Failed,
                format!("arena {arena_id} cannot be sealed: {error}"),
            );
        }
        arena.sealed = true;
        Ok((Reply::Done {}, None))
    }

    pub(super) fn open_arena(&mut self, id: ConnId, arena_id: ArenaId) -> Answer {
        let (worker, reader) = self.worker_of(id)?;
        // Another job's arena is told from none at all by nobody.
        let Some(arena) = self.arenas.get(&arena_id).filter(|arena| arena.job == reader.job) else {
            let owner = arena_id.owner();
            if self.awaited.has_worker(owner, reader.job) {
                let message = format!("{owner}, whose arena {arena_id} is, is not back yet");
                return deny(ErrorCode::NotYet, message);
            }
            return deny(
                ErrorCode::NotFound,
                format!("{worker}'s job has no arena {arena_id}"),
            );
        };
        if !arena.sealed {
            return deny(
                ErrorCode::BadRequest,
                format!("arena {arena_id} is not sealed yet"),
            );
        }
        let handle = open_to_read(&arena.memfd)?;
        Ok((
            Reply::ArenaOpened {
                owner: arena.owner,
                layout: arena.layout,
            },
            Some(handle),
        ))
    }

    /// For whom departed memory counts.
    pub(super) fn departed_users(&self) -> impl Iterator<Item = u32> {
        self.departed.iter().map(|departed| departed.account)
    }

    /// What departed memory counts for a user.
    pub(super) fn departed_of(departed: &VecDeque<Departed>, account: u32) -> (u64, u32) {
        let of_user = departed.iter().filter(|departed| departed.account == account);
        of_user.fold((0, 0), |(bytes, count), departed| {
            (bytes + departed.bytes, count + 1)
        })
    }
}

/// The ids that a worker's arenas may have.
pub(super) fn arenas_of(owner: WorkerId) -> impl Iterator<Item = ArenaId> {
    (0..ArenaId::PER_WORKER).filter_map(move |index| ArenaId::of(owner, index))
}

fn refused(error: &PoolError) -> Denial {
    let code = match error {
        PoolError::Layout { .. } => ErrorCode::BadRequest,
        PoolError::Memfd { .. } => ErrorCode::Failed,
        PoolError::Full { .. }
        | PoolError::Quota(_)
        | PoolError::NoHugePages(_)
        | PoolError::NoThread(_)
        | PoolError::Limit { .. } => ErrorCode::Full,
    };
    Denial(code, error_chain(error))
}

/// An arena for a reader: an open file of its own, by which the kernel counts it.
fn open_to_read(file: &File) -> Result<OwnedFd, Denial> {
    let opened = memfd::reopen(file.as_fd(), false).map_err(|error| {
        let call = "the arena cannot be opened once more";
        match limits::explain(&error, 0) {
            Some(limit) => Denial(ErrorCode::Full, format!("{call}: {limit}")),
            None => Denial(ErrorCode::Failed, format!("{call}: {error}")),
        }
    })?;
    Ok(opened.into())
}
