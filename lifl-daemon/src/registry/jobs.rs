//! Jobs: made, ended, forgotten.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Instant;

use lifl_common::control::{ErrorCode, Event, Message, Reply};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::session::Traffic;

use super::quota::Want;
use super::{Answer, ConnId, Outgoing, Peer, Registry, check_name, deny};
use crate::chain::error_chain;

/// The longest reason for a job's end.
pub(super) const MAX_REASON_BYTES: usize = 1024;

#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) uid: u32,
    /// For whom its amounts count.
    pub(super) account: u32,
    pub(super) maker: ConnId,
    pub(super) ended: bool,
    pub(super) arena_bytes: u64,
    pub(super) arena_peak_bytes: u64,
    /// Its workers.
    pub(super) members: BTreeSet<WorkerId>,
    /// Their names.
    pub(super) names: HashSet<String>,
    /// What their frames referred to, when it was read, and when.
    pub(super) referenced: Option<(Instant, u64)>,
    /// What goes through the gateway, once it is asked for.
    pub(super) traffic: Option<Arc<Traffic>>,
    /// Workers that may come there.
    pub(super) expected: BTreeSet<Box<str>>,
}

impl Job {
    /// One without workers.
    pub(super) fn new(name: String, uid: u32, account: u32, maker: ConnId) -> Self {
        Self {
            name,
            uid,
            account,
            maker,
            ended: false,
            arena_bytes: 0,
            arena_peak_bytes: 0,
            members: BTreeSet::new(),
            names: HashSet::new(),
            referenced: None,
            traffic: None,
            expected: BTreeSet::new(),
        }
    }
}

impl Registry {
    pub(super) fn create_job(&mut self, id: ConnId, name: String) -> Answer {
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
        self.jobs.insert(job, Job::new(name, uid, account, id));
        self.known_mut(id)?.job = Some(job);
        Ok((Reply::JobCreated { job }, None))
    }

    pub(super) fn end_job(&mut self, id: JobId, reason: &str) {
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

    /// Ends all jobs, for the daemon's own end.
    pub(crate) fn end_all(&mut self, reason: &str) {
        let jobs: Vec<JobId> = self.jobs.keys().copied().collect();
        for job in jobs {
            self.end_job(job, reason);
        }
    }

    /// Forgets an ended job when nobody is left in it.
    pub(super) fn drop_if_deserted(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(&id) else { return };
        let deserted = !self.conns.contains_key(&job.maker) && job.members.is_empty();
        if job.ended && deserted {
            self.jobs.remove(&id);
        }
    }
}

/// A reason, cut to what a log and an event have room for.
pub(super) fn shorten(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}
