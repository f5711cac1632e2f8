//! Workers that register here: put on the plane, told of what they lose, removed.

use std::sync::Arc;

use lifl_common::control::{DeadLetter, ErrorCode, Event, Message, Reply};
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::Member;

use super::arenas::arenas_of;
use super::counted::Accounted;
use super::quota::Want;
use super::{Beside, ConnId, Denial, Done, NOBODY, Outgoing, Registry, check_name, deny};
use crate::chain::error_chain;
use crate::errands;
use crate::plane::PlaneError;
use crate::refusals::may_log;

/// Descriptors of this process that a proxy has: both ends of its connection and of its frame socket, and what it keeps of them
/// for itself.
const PROXY_DESCRIPTORS: u32 = 6;

#[derive(Debug)]
pub(super) struct Worker {
    pub(super) name: String,
    pub(super) role: String,
    pub(super) job: JobId,
    pub(super) conn: ConnId,
    pub(super) pid: i32,
    /// Whose its job is.
    pub(super) uid: u32,
    /// For whom it counts.
    pub(super) account: u32,
    /// Whether it is a proxy.
    pub(super) own: bool,
    /// Whether it may be sent to. Whoever may is told of when it is lost.
    pub(super) joined: bool,
    /// Bytes of arenas that it had under an earlier daemon and did not bring.
    pub(super) lost_bytes: u64,
}

impl Accounted for Worker {
    fn account(&self) -> Option<u32> {
        Some(self.account)
    }

    fn descriptors(&self) -> u32 {
        if self.own { PROXY_DESCRIPTORS } else { 1 }
    }
}

impl Registry {
    pub(super) fn register(
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
    pub(super) fn joined(&mut self, id: ConnId, worker: WorkerId, inserted: Result<(), PlaneError>) {
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

    pub(super) fn remove_worker(&mut self, id: WorkerId) {
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

    pub(super) fn worker_of(&self, id: ConnId) -> Result<(WorkerId, &Worker), Denial> {
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
