//! What the daemon knows: connections, jobs, workers, arenas. One task owns it ([`server`](crate::server)).
//!
//! ```text
//!   connection: hello ──▶ known ──create_job──▶ makes a job ──register──▶ makes a job and is a worker of it
//!                           └──────register──▶ worker
//!   job:        created ──end_job, or its maker's connection closes──▶ ended ──last connection closes──▶ gone
//!   worker:     registered ──its connection closes──▶ gone: unregistered, arenas freed, peers told
//! ```
//!
//! With pinned maps, workers of the daemon before this one come in by [`reattach`] instead.
//!
//! Requests are judged here and nowhere else. Nothing here waits: answers and events go into an outbox.

mod door;
pub(crate) mod quota;
pub(crate) mod reattach;
mod status;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use lifl_common::arena::{Layout, memfd};
use lifl_common::control::{DeadLetter, ErrorCode, Event, Message, PROTOCOL, Reply, Request};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::kernel::Member;
use lifl_common::session::Traffic;

use self::quota::{Quotas, Use, Want};
use self::reattach::Awaited;
use crate::accounts;
use crate::chain::error_chain;
use crate::errands::Foreign;
use crate::gateway::{self, GatewayOptions};
use crate::limits;
use crate::plane::{Plane, PlaneError};
use crate::pool::{Pool, PoolError};
use crate::refusals::{may_log, plain};

/// The longest name of a job, a role or a worker.
const MAX_NAME_BYTES: usize = 128;

const HELLO_FIRST: &str = "the first request must be hello";

/// A connection's number; 0 is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ConnId(pub(crate) u64);

/// No connection: the maker of a job that has not come back.
const NOBODY: ConnId = ConnId(0);

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// For people alone. A process that has ended leaves its number to others: nothing is decided by it.
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    /// For whom its amounts count.
    pub(crate) account: u32,
    own: bool,
}

impl Peer {
    /// Who has connected to the control socket.
    pub(crate) fn new(pid: i32, uid: u32) -> Self {
        Self {
            pid,
            uid,
            account: accounts::owner_of(uid),
            own: false,
        }
    }

    /// Who has come through the [lobby](crate::server::Lobby), to which nothing beyond this process has a way.
    pub(crate) fn own() -> Self {
        let uid = nix::unistd::geteuid().as_raw();
        Self {
            pid: std::process::id().cast_signed(),
            uid,
            account: uid,
            own: true,
        }
    }

    /// Whether it is a proxy, which the gateway lets in.
    pub(crate) fn is_own(&self) -> bool {
        self.own
    }
}

/// Something to send.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) to: ConnId,
    pub(crate) message: Message,
    pub(crate) fd: Option<OwnedFd>,
}

#[derive(Debug)]
struct Conn {
    peer: Peer,
    hello: bool,
    job: Option<JobId>,
    worker: Option<WorkerId>,
}

#[derive(Debug)]
struct Job {
    name: String,
    uid: u32,
    /// For whom its amounts count.
    account: u32,
    maker: ConnId,
    ended: bool,
    arena_bytes: u64,
    arena_peak_bytes: u64,
    /// What goes through the gateway, once it is asked for.
    traffic: Option<Arc<Traffic>>,
}

#[derive(Debug)]
struct Worker {
    name: String,
    role: String,
    job: JobId,
    conn: ConnId,
    pid: i32,
}

#[derive(Debug)]
struct Arena {
    owner: WorkerId,
    job: JobId,
    layout: Layout,
    memfd: File,
    bytes: u64,
    page_bytes: u64,
    note: Option<String>,
    sealed: bool,
}

/// The daemon's fixed facts.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) plane_reason: String,
    pub(crate) max_workers: u32,
}

/// The daemon's state.
pub(crate) struct Registry {
    facts: Facts,
    quotas: Quotas,
    plane: Plane,
    pool: Pool,
    conns: HashMap<ConnId, Conn>,
    jobs: BTreeMap<JobId, Job>,
    workers: BTreeMap<WorkerId, Worker>,
    arenas: BTreeMap<ArenaId, Arena>,
    last_job: u32,
    last_worker: u32,
    awaited: Awaited,
    outbox: Vec<Outgoing>,
    gateway: gateway::Handle,
    gateway_options: GatewayOptions,
}

/// A request that is not granted.
struct Denial(ErrorCode, String);

type Answer = Result<(Reply, Option<OwnedFd>), Denial>;

fn deny<T>(code: ErrorCode, message: impl Into<String>) -> Result<T, Denial> {
    Err(Denial(code, message.into()))
}

impl Registry {
    pub(crate) fn new(
        facts: Facts,
        quotas: Quotas,
        plane: Plane,
        pool: Pool,
        gateway: gateway::Handle,
        gateway_options: GatewayOptions,
    ) -> Self {
        Self {
            facts,
            quotas,
            plane,
            pool,
            conns: HashMap::new(),
            jobs: BTreeMap::new(),
            workers: BTreeMap::new(),
            arenas: BTreeMap::new(),
            last_job: 0,
            last_worker: 0,
            awaited: Awaited::default(),
            outbox: Vec::new(),
            gateway,
            gateway_options,
        }
    }

    /// Everything that was to be sent since the last call.
    pub(crate) fn take_outbox(&mut self) -> Vec<Outgoing> {
        std::mem::take(&mut self.outbox)
    }

    /// A process has connected.
    pub(crate) fn connected(&mut self, id: ConnId, peer: Peer) {
        self.conns.insert(
            id,
            Conn {
                peer,
                hello: false,
                job: None,
                worker: None,
            },
        );
    }

    /// A connection is closed: its worker is gone, its job ends.
    pub(crate) fn closed(&mut self, id: ConnId) {
        let Some(conn) = self.conns.remove(&id) else {
            return;
        };
        if let Some(worker) = conn.worker {
            self.remove_worker(worker);
        }
        if let Some(job) = conn.job {
            self.end_job(job, "the process that made the job is gone");
            self.drop_if_deserted(job);
        }
    }

    /// A request, with the descriptors beside it.
    pub(crate) fn request(&mut self, id: ConnId, request: Request, fds: Vec<Foreign>) {
        let Some(peer) = self.conns.get(&id).map(|conn| conn.peer) else {
            return;
        };
        let answer = match request {
            Request::OpenGateway {
                p2p,
                object_bytes,
                mqtt,
            } => match self.open_gateway(id, p2p, mqtt, object_bytes) {
                // It answers itself, when it is open.
                Ok(()) => return,
                Err(denial) => Err(denial),
            },
            request => self.answer(id, request, fds),
        };
        let (reply, fd) = match answer {
            Ok(answer) => answer,
            Err(Denial(code, message)) => {
                if let Some(dropped) = may_log(peer.uid) {
                    let message = plain(&message);
                    tracing::warn!(
                        pid = peer.pid,
                        uid = peer.uid,
                        ?code,
                        dropped,
                        "refused: {message}"
                    );
                }
                (Reply::Error { code, message }, None)
            }
        };
        self.reply(id, reply, fd);
    }

    /// Answers a connection's request.
    pub(crate) fn reply(&mut self, id: ConnId, reply: Reply, fd: Option<OwnedFd>) {
        self.outbox.push(Outgoing {
            to: id,
            message: Message::Reply(reply),
            fd,
        });
    }

    /// Whose a connection is, if it has said hello; if it has not, it is told to.
    pub(crate) fn may_ask(&mut self, id: ConnId) -> Option<u32> {
        let conn = self.conns.get(&id)?;
        if conn.hello {
            return Some(conn.peer.uid);
        }
        let message = HELLO_FIRST.to_owned();
        self.reply(
            id,
            Reply::Error {
                code: ErrorCode::BadRequest,
                message,
            },
            None,
        );
        None
    }

    /// A frame that the plane did not deliver: its sender learns why.
    pub(crate) fn dead_letter(&mut self, frame: &Frame) {
        let refusal = Refusal::from_number(frame.refusal).unwrap_or(Refusal::UnknownSender);
        let Some(sender) = self.workers.get(&frame.stamp) else {
            // A sender that has left since, or a socket that was never registered: nobody to tell.
            tracing::debug!(from = %frame.from, to = %frame.to, %refusal, "a dead letter of nobody");
            return;
        };
        let hostile = matches!(refusal, Refusal::ForgedSource | Refusal::OtherJob);
        if hostile {
            let uid = self.jobs.get(&sender.job).map_or(u32::MAX, |job| job.uid);
            if let Some(dropped) = may_log(uid) {
                tracing::warn!(
                    worker = ?sender.name, pid = sender.pid, uid, from = %frame.from, to = %frame.to, dropped,
                    "frame refused: {refusal}"
                );
            }
        }
        let receiver = self
            .workers
            .get(&frame.to)
            .filter(|receiver| receiver.job == sender.job);
        let letter = DeadLetter {
            to: frame.to,
            to_name: receiver.map(|receiver| receiver.name.clone()),
            kind: frame.kind,
            round: frame.round,
            key: frame.key,
            refusal,
        };
        let to = sender.conn;
        self.outbox.push(Outgoing {
            to,
            message: Message::Event(Event::DeadLetter(letter)),
            fd: None,
        });
    }

    /// Ends all jobs, for the daemon's own end.
    pub(crate) fn end_all(&mut self, reason: &str) {
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        for job in jobs {
            self.end_job(job, reason);
        }
    }

    /// How many connections there are.
    pub(crate) fn connections(&self) -> usize {
        self.conns.len()
    }

    /// Gives the plane back for its orderly end; arenas are let go. Whose job has ended is off it, connected or not.
    pub(crate) fn into_plane(mut self) -> Plane {
        for (&id, worker) in &self.workers {
            if self.jobs.get(&worker.job).is_none_or(|job| job.ended)
                && let Err(error) = self.plane.unregister(id)
            {
                tracing::error!(worker = %id, "cannot be taken off the plane: {}", error_chain(&error));
            }
        }
        self.plane
    }

    fn answer(&mut self, id: ConnId, request: Request, fds: Vec<Foreign>) -> Answer {
        let Some(conn) = self.conns.get_mut(&id) else {
            return deny(ErrorCode::BadRequest, "no connection");
        };
        if let Request::Hello { protocol } = request {
            if protocol != PROTOCOL {
                let message = format!("this daemon speaks protocol {PROTOCOL}, not {protocol}");
                return deny(ErrorCode::BadRequest, message);
            }
            conn.hello = true;
            return Ok((Reply::Welcome(self.welcome()), None));
        }
        if !conn.hello {
            return deny(ErrorCode::BadRequest, HELLO_FIRST);
        }
        match request {
            Request::Hello { .. } => unreachable!("answered above"),
            Request::Flame { .. } => unreachable!("answered by whoever serves Flame's workers"),
            Request::CreateJob { name } => self.create_job(id, name),
            Request::Register { job, role, name } => self.register(id, job, role, name, fds),
            Request::Reattach {
                role,
                name,
                job_name,
                arenas,
            } => self.reattach(id, role, name, job_name, &arenas, fds),
            Request::CreateArena { layout } => self.create_arena(id, layout),
            Request::SealArena { arena } => self.seal_arena(id, arena),
            Request::OpenArena { arena } => self.open_arena(id, arena),
            Request::OpenGateway { .. } => unreachable!("answered by the gateway"),
            Request::ExpectWorkers { workers } => self.expect_workers(id, workers),
            Request::DropWorker { name } => self.drop_worker(id, name),
            Request::Status { job, after } => self.status(id, job, after),
            Request::Traffic {} => self.traffic(id),
            Request::EndJob { reason } => {
                let Some(job) = conn.job else {
                    return deny(ErrorCode::Denied, "only the connection that made a job ends it");
                };
                self.end_job(job, &reason);
                Ok((Reply::Done {}, None))
            }
        }
    }

    fn create_job(&mut self, id: ConnId, name: String) -> Answer {
        check_name("job", &name)?;
        let conn = self.known(id)?;
        if conn.job.is_some() || conn.worker.is_some() {
            return deny(ErrorCode::BadRequest, "this connection has a job already");
        }
        let Peer { uid, account, .. } = conn.peer;
        self.admit(account, Want::Job)?;
        let job = JobId(self.last_job + 1);
        if let Err(error) = self.plane.note_job(job) {
            return deny(ErrorCode::Failed, error_chain(&error));
        }
        self.last_job = job.0;
        tracing::info!(%job, ?name, uid, "job created");
        let made = Job {
            name,
            uid,
            account,
            maker: id,
            ended: false,
            arena_bytes: 0,
            arena_peak_bytes: 0,
            traffic: None,
        };
        self.jobs.insert(job, made);
        self.known_mut(id)?.job = Some(job);
        Ok((Reply::JobCreated { job }, None))
    }

    fn register(
        &mut self,
        id: ConnId,
        job_id: JobId,
        role: String,
        name: String,
        fds: Vec<Foreign>,
    ) -> Answer {
        check_name("role", &role)?;
        check_name("worker", &name)?;
        let conn = self.known(id)?;
        if conn.worker.is_some() {
            return deny(ErrorCode::BadRequest, "this connection is a worker already");
        }
        if conn.job.is_some_and(|own| own != job_id) {
            return deny(ErrorCode::BadRequest, "this connection made another job");
        }
        let peer = conn.peer;
        let Some(job) = self.jobs.get(&job_id).filter(|job| !job.ended) else {
            if self.awaited.has_job(job_id) && !self.jobs.contains_key(&job_id) {
                return deny(ErrorCode::NotYet, format!("job {job_id} is not back yet"));
            }
            return deny(ErrorCode::NotFound, format!("there is no job {job_id}"));
        };
        if job.maker == NOBODY {
            let message = format!("the process that made job {job_id} is not back yet");
            return deny(ErrorCode::NotYet, message);
        }
        if peer.uid != job.uid && peer.uid != 0 && !peer.is_own() {
            return deny(ErrorCode::Denied, format!("job {job_id} is another user's"));
        }
        if self
            .workers
            .values()
            .any(|worker| worker.job == job_id && worker.name == name)
        {
            return deny(
                ErrorCode::BadRequest,
                format!("job {job_id} has a worker called {name} already"),
            );
        }
        self.admit(job.account, Want::Worker)?;
        let mut fds = fds.into_iter();
        let (Some(socket), None) = (fds.next(), fds.next()) else {
            return deny(
                ErrorCode::BadRequest,
                "register needs one descriptor beside it, the socket for frames",
            );
        };
        let maker = job.maker;
        let worker = WorkerId(self.last_worker + 1);
        let member = Member {
            job: job_id,
            uid: job.uid,
            flags: if maker == id { Member::MAKER } else { 0 },
        };
        if let Err(error) = self.plane.register_foreign(worker, member, socket) {
            let code = if matches!(error, PlaneError::Full { .. }) {
                ErrorCode::Full
            } else {
                ErrorCode::BadRequest
            };
            return deny(code, error_chain(&error));
        }
        self.last_worker = worker.0;
        tracing::info!(%worker, job = %job_id, ?name, pid = peer.pid, "worker registered");
        let made = Worker {
            name: name.clone(),
            role,
            job: job_id,
            conn: id,
            pid: peer.pid,
        };
        self.workers.insert(worker, made);
        self.known_mut(id)?.worker = Some(worker);
        let owner = self
            .conns
            .get(&maker)
            .and_then(|maker| maker.worker)
            .unwrap_or(WorkerId::NONE);
        if maker != id {
            let joined = Message::Event(Event::PeerJoined { worker, name });
            self.outbox.push(Outgoing {
                to: maker,
                message: joined,
                fd: None,
            });
        }
        Ok((Reply::Registered { worker, owner }, None))
    }

    fn create_arena(&mut self, id: ConnId, layout: Layout) -> Answer {
        let (owner, worker) = self.worker_of(id)?;
        let job_id = worker.job;
        let name = format!("lifl-{}-{}", job_id, worker.name);
        // By its number it is its owner's, and nobody can bring another's to a later daemon.
        let mut numbers = (0..).map_while(|index| ArenaId::of(owner, index));
        let Some(arena) = numbers.find(|arena| !self.arenas.contains_key(arena)) else {
            let most = ArenaId::PER_WORKER;
            return deny(ErrorCode::Full, format!("a worker has at most {most} arenas"));
        };
        let Some(uid) = self.jobs.get(&job_id).map(|job| job.account) else {
            return deny(ErrorCode::NotFound, "the job is gone");
        };
        let used = self.used(uid);
        let admit = |bytes| self.quotas.admit(uid, &used, Want::Arena { bytes });
        let allocation = match self.pool.allocate(&name, layout, admit) {
            Ok(allocation) => allocation,
            Err(error) => {
                let code = match &error {
                    PoolError::Layout { .. } => ErrorCode::BadRequest,
                    PoolError::Memfd { .. } => ErrorCode::Failed,
                    PoolError::Full { .. }
                    | PoolError::Quota(_)
                    | PoolError::NoHugePages(_)
                    | PoolError::Limit { .. } => ErrorCode::Full,
                };
                return deny(code, error_chain(&error));
            }
        };
        let handle = match duplicate(&allocation.memfd) {
            Ok(handle) => handle,
            Err(denial) => {
                self.pool.free(allocation.bytes);
                return Err(denial);
            }
        };
        let Some(job) = self.jobs.get_mut(&job_id) else {
            return deny(ErrorCode::NotFound, "the job is gone");
        };
        job.arena_bytes += allocation.bytes;
        job.arena_peak_bytes = job.arena_peak_bytes.max(job.arena_bytes);
        tracing::debug!(
            %arena, %owner, bytes = allocation.bytes, page_bytes = allocation.page_bytes, "arena created"
        );
        let crate::pool::Allocation {
            memfd,
            bytes,
            page_bytes,
            note,
        } = allocation;
        self.arenas.insert(
            arena,
            Arena {
                owner,
                job: job_id,
                layout,
                memfd,
                bytes,
                page_bytes,
                note: note.clone(),
                sealed: false,
            },
        );
        Ok((
            Reply::ArenaCreated {
                arena,
                page_bytes,
                note,
            },
            Some(handle),
        ))
    }

    fn seal_arena(&mut self, id: ConnId, arena_id: ArenaId) -> Answer {
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

    fn open_arena(&mut self, id: ConnId, arena_id: ArenaId) -> Answer {
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
        let handle = duplicate(&arena.memfd)?;
        Ok((
            Reply::ArenaOpened {
                owner: arena.owner,
                layout: arena.layout,
            },
            Some(handle),
        ))
    }

    fn end_job(&mut self, id: JobId, reason: &str) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.ended) else {
            return;
        };
        job.ended = true;
        self.gateway.close(id);
        tracing::info!(job = %id, name = ?job.name, reason = ?reason, "job ended");
        self.awaited.job_ended(id);
        for worker in self
            .workers
            .values()
            .filter(|worker| worker.job == id && worker.conn != job.maker)
        {
            let ended = Message::Event(Event::JobEnded {
                reason: reason.to_owned(),
            });
            self.outbox.push(Outgoing {
                to: worker.conn,
                message: ended,
                fd: None,
            });
        }
    }

    fn remove_worker(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.remove(&id) else {
            return;
        };
        tracing::info!(worker = %id, name = ?worker.name, pid = worker.pid, "worker gone");
        if let Err(error) = self.plane.unregister(id) {
            tracing::error!(worker = %id, "cannot be taken off the plane: {}", error_chain(&error));
        }
        let gone: Vec<ArenaId> = self
            .arenas
            .iter()
            .filter(|(_, arena)| arena.owner == id)
            .map(|(&arena, _)| arena)
            .collect();
        for arena in gone.iter().filter_map(|arena| self.arenas.remove(arena)) {
            if let Some(job) = self.jobs.get_mut(&arena.job) {
                job.arena_bytes -= arena.bytes;
            }
            drop(arena.memfd);
            self.pool.free(arena.bytes);
        }
        // When a job ends, all its workers go: nobody needs to be told of each.
        self.tell_lost(id, worker.job, &worker.name);
        self.drop_if_deserted(worker.job);
    }

    /// Forgets an ended job when nobody is left in it.
    fn drop_if_deserted(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let deserted =
            !self.conns.contains_key(&job.maker) && self.workers.values().all(|worker| worker.job != id);
        if job.ended && deserted {
            self.jobs.remove(&id);
        }
    }

    /// What an account has of the node. Counted afresh each time, so that it is what is there.
    fn used(&self, uid: u32) -> Use {
        let jobs = self.jobs.values().filter(|job| job.account == uid);
        let workers = self.workers.values().filter(|worker| {
            let job = self.jobs.get(&worker.job);
            job.is_some_and(|job| job.account == uid)
        });
        let connections = self.conns.values().filter(|conn| is_of(conn.peer, uid));
        Use {
            pool_bytes: jobs.clone().map(|job| job.arena_bytes).sum(),
            workers: (workers.count() + self.awaited.of_user(uid)) as u32,
            // One that has ended is nothing but its workers.
            jobs: jobs.filter(|job| !job.ended).count() as u32,
            connections: connections.count() as u32,
        }
    }

    fn admit(&self, uid: u32, want: Want) -> Result<(), Denial> {
        let admitted = self.quotas.admit(uid, &self.used(uid), want);
        admitted.map_err(|error| Denial(ErrorCode::Full, error.to_string()))
    }

    fn known(&self, id: ConnId) -> Result<&Conn, Denial> {
        self.conns
            .get(&id)
            .ok_or_else(|| Denial(ErrorCode::BadRequest, "no connection".to_owned()))
    }

    fn known_mut(&mut self, id: ConnId) -> Result<&mut Conn, Denial> {
        self.conns
            .get_mut(&id)
            .ok_or_else(|| Denial(ErrorCode::BadRequest, "no connection".to_owned()))
    }

    fn worker_of(&self, id: ConnId) -> Result<(WorkerId, &Worker), Denial> {
        let worker = self
            .known(id)?
            .worker
            .and_then(|id| Some((id, self.workers.get(&id)?)));
        worker.ok_or_else(|| {
            Denial(
                ErrorCode::BadRequest,
                "this connection is not a worker: register first".into(),
            )
        })
    }
}

/// Whether a connection counts for an account. The daemon's own, those of proxies, count for nobody.
fn is_of(peer: Peer, account: u32) -> bool {
    peer.account == account && !peer.is_own()
}

fn check_name(what: &str, name: &str) -> Result<(), Denial> {
    let printable = !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control);
    if printable {
        return Ok(());
    }
    deny(
        ErrorCode::BadRequest,
        format!("a {what}'s name has 1 to {MAX_NAME_BYTES} bytes and no control characters"),
    )
}

fn duplicate(file: &File) -> Result<OwnedFd, Denial> {
    file.as_fd().try_clone_to_owned().map_err(|error| {
        let call = "the arena's descriptor cannot be copied";
        match limits::explain(&error, 0) {
            Some(limit) => Denial(ErrorCode::Full, format!("{call}: {limit}")),
            None => Denial(ErrorCode::Failed, format!("{call}: {error}")),
        }
    })
}

#[cfg(test)]
mod tests;
