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
mod jobs;
pub(crate) mod quota;
pub(crate) mod reattach;
mod status;
mod usage;
mod workers;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use lifl_common::control::{ErrorCode, Message, PROTOCOL, Reply, Request};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use tokio::sync::mpsc;

use self::arenas::{Arena, Asking, Departed, MadeArena};
use self::counted::{Accounted, Counted};
use self::jobs::{Job, shorten};
use self::quota::Quotas;
use self::reattach::Awaited;
use self::workers::Worker;
use crate::accounts;
use crate::chain::error_chain;
use crate::errands::Foreign;
use crate::gateway::{self, GatewayOptions};
use crate::plane::{Examined, Plane, PlaneError};
use crate::pool::Pool;
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

#[cfg(test)]
mod tests;
