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

mod arenas;
mod counted;
mod gateway_requests;
pub(crate) mod quota;
pub(crate) mod reattach;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use lifl_common::arena::Layout;
use lifl_common::control::{DeadLetter, ErrorCode, Event, Message, PROTOCOL, Reply, Request};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::kernel::Member;
use lifl_common::session::Traffic;
use tokio::sync::mpsc;

use self::arenas::{Asking, Departed, MadeArena};
use self::counted::{Accounted, Counted};
use self::quota::{Quotas, Use, Want};
use self::reattach::Awaited;
use crate::accounts;
use crate::chain::error_chain;
use crate::errands::{self, Foreign};
use crate::gateway::{self, GatewayOptions};
use crate::plane::{Examined, Plane, PlaneError};
use crate::pool::Pool;
use crate::refusals::{may_log, plain};

/// The longest name of a job, a role or a worker.
const MAX_NAME_BYTES: usize = 128;

/// The longest reason for a job's end.
const MAX_REASON_BYTES: usize = 1024;

/// Descriptors of this process that a proxy has: both ends of its connection and of its frame socket, and what it keeps of them
/// for itself.
const PROXY_DESCRIPTORS: u32 = 6;

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

    /// Who has come through the [lobby](crate::server::Lobby), to which nothing beyond this process has a way; for a job of
    /// that user's.
    pub(crate) fn own(uid: u32) -> Self {
        Self {
            pid: std::process::id().cast_signed(),
            own: true,
            ..Self::new(0, uid)
        }
    }

    /// Whether it is a proxy, which the gateway lets in.
    pub(crate) fn is_own(&self) -> bool {
        self.own
    }
}

/// What came beside a request: the worker's socket, looked at already, and what else there is.
#[derive(Debug, Default)]
pub(crate) struct Beside {
    pub(crate) socket: Option<Examined>,
    pub(crate) fds: Vec<Foreign>,
}

/// Something to send.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) to: ConnId,
    pub(crate) message: Arc<Message>,
    pub(crate) fd: Option<OwnedFd>,
}

#[derive(Debug)]
struct Conn {
    peer: Peer,
    hello: bool,
    job: Option<JobId>,
    worker: Option<WorkerId>,
}

impl Accounted for Conn {
    /// The daemon's own, those of proxies, count for nobody.
    fn account(&self) -> Option<u32> {
        (!self.peer.is_own()).then_some(self.peer.account)
    }

    fn descriptors(&self) -> u32 {
        1
    }
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
    /// Its workers.
    members: BTreeSet<WorkerId>,
    /// Their names.
    names: HashSet<String>,
    /// What their frames referred to, when it was read, and when.
    referenced: Option<(Instant, u64)>,
    /// What goes through the gateway, once it is asked for.
    traffic: Option<Arc<Traffic>>,
    /// Workers that may come there.
    expected: BTreeSet<Box<str>>,
}

#[derive(Debug)]
struct Worker {
    name: String,
    role: String,
    job: JobId,
    conn: ConnId,
    pid: i32,
    /// Whose its job is.
    uid: u32,
    /// For whom it counts.
    account: u32,
    /// Whether it is a proxy.
    own: bool,
    /// Whether it may be sent to. Whoever may is told of when it is lost.
    joined: bool,
    /// Bytes of arenas that it had under an earlier daemon and did not bring.
    lost_bytes: u64,
}

impl Accounted for Worker {
    fn account(&self) -> Option<u32> {
        Some(self.account)
    }

    fn descriptors(&self) -> u32 {
        if self.own { PROXY_DESCRIPTORS } else { 1 }
    }
}

#[derive(Debug)]
struct Arena {
    owner: WorkerId,
    job: JobId,
    /// For whom it counts.
    account: u32,
    layout: Layout,
    memfd: File,
    bytes: u64,
    page_bytes: u64,
    note: Option<String>,
    sealed: bool,
}

impl Accounted for Arena {
    fn account(&self) -> Option<u32> {
        Some(self.account)
    }

    fn descriptors(&self) -> u32 {
        1
    }
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
    conns: Counted<ConnId, Conn>,
    jobs: BTreeMap<JobId, Job>,
    workers: Counted<WorkerId, Worker>,
    arenas: Counted<ArenaId, Arena>,
    last_job: u32,
    last_worker: u32,
    awaited: Awaited,
    outbox: Vec<Outgoing>,
    /// Memory whose owners have left.
    departed: VecDeque<Departed>,
    /// Who waits for that to go.
    asking: Vec<Asking>,
    done: mpsc::UnboundedSender<Done>,
    /// When it was last looked whether huge pages are to be expected.
    refreshed: Instant,
    gateway: gateway::Handle,
    gateway_options: GatewayOptions,
}

/// What an errand has done.
#[derive(Debug)]
pub(crate) enum Done {
    /// An arena was made, or could not be.
    Arena(MadeArena),
    /// A worker's socket was put on the plane, or could not be.
    Joined(ConnId, WorkerId, Result<(), PlaneError>),
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
            conns: Counted::default(),
            jobs: BTreeMap::new(),
            workers: Counted::default(),
            arenas: Counted::default(),
            last_job: 0,
            last_worker: 0,
            awaited: Awaited::default(),
            outbox: Vec::new(),
            departed: VecDeque::new(),
            asking: Vec::new(),
            // Until somebody asks to be told.
            done: mpsc::unbounded_channel().0,
            refreshed: Instant::now(),
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
    pub(crate) fn request(&mut self, id: ConnId, request: Request, beside: Beside) {
        let Some(hello) = self.conns.get(&id).map(|conn| conn.hello) else {
            return;
        };
        if !hello && !matches!(request, Request::Hello { .. }) {
            let denial = Denial(ErrorCode::BadRequest, HELLO_FIRST.to_owned());
            return self.answered(id, Err(denial));
        }
        let later = match request {
            Request::OpenGateway {
                p2p,
                object_bytes,
                mqtt,
            } => self.open_gateway(id, p2p, mqtt, object_bytes),
            Request::Register { job, role, name } => self.register(id, job, role, name, beside),
            Request::CreateArena { layout, instead_of } => self.create_arena(id, layout, instead_of),
            request => {
                let answer = self.answer(id, request, beside);
                return self.answered(id, answer);
            }
        };
        // What is begun answers when it is done.
        if let Err(denial) = later {
            self.answered(id, Err(denial));
        }
    }

    /// An errand is done.
    pub(crate) fn done(&mut self, done: Done) {
        match done {
            Done::Arena(made) => self.arena_made(made),
            Done::Joined(id, worker, inserted) => self.joined(id, worker, inserted),
        }
    }

    /// Where errands that are done are told of: for whoever owns the registry, once.
    pub(crate) fn take_done(&mut self) -> mpsc::UnboundedReceiver<Done> {
        let (done, told) = mpsc::unbounded_channel();
        self.done = done;
        told
    }

    /// Answers a connection's request, or says why not.
    fn answered(&mut self, id: ConnId, answer: Answer) {
        let Some(peer) = self.conns.get(&id).map(|conn| conn.peer) else {
            return;
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

    /// Whose a connection is, for the log.
    pub(crate) fn uid_of(&self, id: ConnId) -> u32 {
        self.conns.get(&id).map_or(u32::MAX, |conn| conn.peer.uid)
    }

    /// Answers a connection's request.
    pub(crate) fn reply(&mut self, id: ConnId, reply: Reply, fd: Option<OwnedFd>) {
        self.outbox.push(Outgoing {
            to: id,
            message: Arc::new(Message::Reply(reply)),
            fd,
        });
    }

    /// Whose a connection is, if it has said hello; if it has not, it is told to.
    pub(crate) fn may_ask(&mut self, id: ConnId) -> Option<Peer> {
        let conn = self.conns.get(&id)?;
        if conn.hello {
            return Some(conn.peer);
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
            message: Arc::new(Message::Event(Event::DeadLetter(letter))),
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
        for (&id, worker) in self.workers.iter() {
            if self.jobs.get(&worker.job).is_none_or(|job| job.ended)
                && let Err(error) = self.plane.unregister(id)
            {
                tracing::error!(worker = %id, "cannot be taken off the plane: {}", error_chain(&error));
            }
        }
        self.plane
    }

    fn answer(&mut self, id: ConnId, request: Request, beside: Beside) -> Answer {
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
        match request {
            Request::Hello { .. } => unreachable!("answered above"),
            Request::Flame { .. } => unreachable!("answered by whoever serves Flame's workers"),
            Request::CreateJob { name } => self.create_job(id, name),
            Request::Register { .. } | Request::CreateArena { .. } => {
                unreachable!("answered when it is done")
            }
            Request::Reattach {
                role,
                name,
                job_name,
                arenas,
            } => self.reattach(id, role, name, job_name, &arenas, beside),
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
                self.end_job(job, shorten(&reason));
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
            members: BTreeSet::new(),
            names: HashSet::new(),
            referenced: None,
            traffic: None,
            expected: BTreeSet::new(),
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
        beside: Beside,
    ) -> Result<(), Denial> {
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
        if job.names.contains(&name) {
            return deny(
                ErrorCode::BadRequest,
                format!("job {job_id} has a worker called {name:?} already"),
            );
        }
        let account = job.account;
        let used = self.used(account);
        let admitted = self.quotas.admit(account, &used, Want::Worker);
        admitted.map_err(|error| Denial(ErrorCode::Full, error.to_string()))?;
        self.admit_descriptors(account, &used, if peer.is_own() { PROXY_DESCRIPTORS } else { 1 })?;
        let (Some(socket), []) = (beside.socket, &*beside.fds) else {
            return deny(
                ErrorCode::BadRequest,
                "register needs one descriptor beside it, the socket for frames",
            );
        };
        let Some(job) = self.jobs.get_mut(&job_id) else {
            return deny(ErrorCode::NotFound, format!("there is no job {job_id}"));
        };
        let worker = WorkerId(self.last_worker + 1);
        let member = Member {
            job: job_id,
            uid: job.uid,
            flags: if job.maker == id { Member::MAKER } else { 0 },
        };
        let joining = self
            .plane
            .begin_register(worker, member, socket)
            .map_err(not_registered)?;
        self.last_worker = worker.0;
        job.members.insert(worker);
        job.names.insert(name.clone());
        let made = Worker {
            name,
            role,
            job: job_id,
            conn: id,
            pid: peer.pid,
            uid: job.uid,
            account,
            own: peer.is_own(),
            joined: false,
            lost_bytes: 0,
        };
        self.workers.insert(worker, made);
        self.known_mut(id)?.worker = Some(worker);
        match joining {
            None => self.joined(id, worker, Ok(())),
            Some(joining) => {
                let done = self.done.clone();
                let tell = move |inserted| {
                    let _ = done.send(Done::Joined(id, worker, inserted));
                };
                let refuse = tell.clone();
                errands::ask(
                    peer.uid,
                    move || tell(joining.insert()),
                    move |why| refuse(Err(PlaneError::NoThread(why))),
                );
            }
        }
        Ok(())
    }

    /// A worker's socket is on the plane, or could not be put there.
    fn joined(&mut self, id: ConnId, worker: WorkerId, inserted: Result<(), PlaneError>) {
        let inserted = inserted.and_then(|()| self.plane.finish_register(worker));
        let Some(entry) = self.workers.get_mut(&worker) else {
            // It left meanwhile.
            if let Err(error) = self.plane.forget_socket(worker) {
                tracing::error!(%worker, "cannot be taken off the plane: {}", error_chain(&error));
            }
            return;
        };
        if let Err(error) = inserted {
            self.remove_worker(worker);
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.worker = None;
            }
            return self.answered(id, Err(not_registered(error)));
        }
        entry.joined = true;
        let (job_id, name, pid) = (entry.job, entry.name.clone(), entry.pid);
        tracing::info!(%worker, job = %job_id, ?name, pid, "worker registered");
        let maker = self.jobs.get(&job_id).map_or(NOBODY, |job| job.maker);
        let owner = self.conns.get(&maker).and_then(|maker| maker.worker);
        let owner = owner.unwrap_or(WorkerId::NONE);
        if maker != id {
            self.tell(maker, Event::PeerJoined { worker, name });
        }
        self.answered(id, Ok((Reply::Registered { worker, owner }, None)));
    }

    fn end_job(&mut self, id: JobId, reason: &str) {
        let Some(job) = self.jobs.get_mut(&id).filter(|job| !job.ended) else {
            return;
        };
        job.ended = true;
        self.gateway.close(id);
        tracing::info!(job = %id, name = ?job.name, reason = ?reason, "job ended");
        self.awaited.job_ended(id);
        let reason = reason.to_owned();
        let ended = Arc::new(Message::Event(Event::JobEnded { reason }));
        let (maker, members) = (job.maker, job.members.iter());
        let told = members.filter_map(|worker| self.workers.get(worker));
        let told = told.filter(|worker| worker.conn != maker);
        self.outbox.extend(told.map(|worker| Outgoing {
            to: worker.conn,
            message: Arc::clone(&ended),
            fd: None,
        }));
    }

    fn remove_worker(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.remove(&id) else {
            return;
        };
        tracing::info!(worker = %id, name = ?worker.name, pid = worker.pid, "worker gone");
        if let Some(job) = self.jobs.get_mut(&worker.job) {
            job.members.remove(&id);
            job.names.remove(&worker.name);
            job.arena_bytes -= worker.lost_bytes;
        }
        self.pool.free(worker.lost_bytes);
        if let Err(error) = self.plane.unregister(id) {
            tracing::error!(worker = %id, "cannot be taken off the plane: {}", error_chain(&error));
        }
        for arena in arenas_of(id) {
            self.let_go(arena);
        }
        // When a job ends, all its workers go: nobody needs to be told of each. Nor of one that nobody could send to yet.
        if worker.joined {
            self.tell_lost(id, worker.job, &worker.name);
        }
        self.drop_if_deserted(worker.job);
    }

    /// Forgets an ended job when nobody is left in it.
    fn drop_if_deserted(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let deserted = !self.conns.contains_key(&job.maker) && job.members.is_empty();
        if job.ended && deserted {
            self.jobs.remove(&id);
        }
    }

    /// What an account has of the node.
    fn used(&self, uid: u32) -> Use {
        let jobs = self.jobs.values().filter(|job| job.account == uid);
        let (departed_bytes, departed) = Self::departed_of(&self.departed, uid);
        let awaited = self.awaited.of_user(uid);
        let (connections, workers) = (self.conns.count(uid), self.workers.count(uid));
        let arenas = self.arenas.count(uid);
        let descriptors = connections.descriptors + workers.descriptors + arenas.descriptors + departed;
        let of_jobs: u64 = jobs.clone().map(|job| job.arena_bytes).sum();
        let back = |job: &JobId| self.jobs.contains_key(job);
        Use {
            pool_bytes: of_jobs
                .saturating_add(departed_bytes)
                .saturating_add(awaited.arena_bytes),
            workers: workers.entries + awaited.workers,
            // One that has ended is nothing but its workers.
            jobs: jobs.filter(|job| !job.ended).count() as u32
                + awaited.jobs.iter().filter(|job| !back(job)).count() as u32,
            connections: connections.entries,
            descriptors,
        }
    }

    fn admit(&self, uid: u32, want: Want) -> Result<(), Denial> {
        let admitted = self.quotas.admit(uid, &self.used(uid), want);
        admitted.map_err(|error| Denial(ErrorCode::Full, error.to_string()))
    }

    /// Whether an account may have so many more of the daemon's descriptors.
    fn admit_descriptors(&self, account: u32, used: &Use, more: u32) -> Result<(), Denial> {
        let (used, most) = (used.descriptors, self.quotas.descriptors_of(account));
        if used.saturating_add(more) <= most {
            return Ok(());
        }
        let user = accounts::name_of(account);
        let message = format!(
            "{user} has {used} of the daemon's descriptors, and one user may have {most}: end another job, or raise \
             LimitNOFILE in its unit"
        );
        deny(ErrorCode::Full, message)
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

fn not_registered(error: PlaneError) -> Denial {
    let code = if matches!(error, PlaneError::Full { .. } | PlaneError::NoThread(_)) {
        ErrorCode::Full
    } else {
        ErrorCode::BadRequest
    };
    Denial(code, error_chain(&error))
}

/// The ids that a worker's arenas may have.
fn arenas_of(owner: WorkerId) -> impl Iterator<Item = ArenaId> {
    (0..ArenaId::PER_WORKER).filter_map(move |index| ArenaId::of(owner, index))
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

/// A reason, cut to what a log and an event have room for.
fn shorten(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

#[cfg(test)]
mod tests;
