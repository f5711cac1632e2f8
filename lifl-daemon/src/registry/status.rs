//! What the registry shows: the daemon's first word, and pages of what is registered.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lifl_common::control::packet::MAX_BYTES;
use lifl_common::control::{
    Amounts, ArenaStatus, ErrorCode, GatewayStatus, JobStatus, JobTraffic, PROTOCOL, Reply, Status,
    UserStatus, Welcome, WorkerStatus,
};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::Counters;
use lifl_common::plane::PlaneKind;
use serde::Serialize;

use super::arenas::arenas_of;
use super::jobs::Job;
use super::workers::Worker;
use super::{Answer, ConnId, Denial, Peer, Registry, deny};
use crate::Vitals;
use crate::clock::idle_ns;
use crate::errands;
use crate::plane::support;

/// Bytes of jobs, users and workers on one page of a status: with the daemon's facts, a page must fit into a packet.
const STATUS_PAGE_BYTES: usize = MAX_BYTES - (8 << 10);

/// Jobs on a page.
const STATUS_JOBS: usize = 64;

/// How long a job's counters are not read again, for each of its workers. Reading one takes about a microsecond.
const PER_WORKER: Duration = Duration::from_micros(20);

/// Users on a page.
const STATUS_USERS: usize = 64;

impl Registry {
    /// What has moved in the job of a connection.
    pub(super) fn traffic(&mut self, id: ConnId) -> Answer {
        let conn = self.known(id)?;
        let of_worker = conn
            .worker
            .and_then(|worker| Some(self.workers.get(&worker)?.job));
        let job_id = conn.job.or(of_worker);
        let Some(job) = job_id.and_then(|id| self.jobs.get(&id)) else {
            return deny(
                ErrorCode::BadRequest,
                "this connection has no job: make one or register first",
            );
        };
        // Reading all counters takes longer, the more workers there are. So it is not done again at once: that a job asks for
        // its traffic without end takes a twentieth of this task's time, however large it is.
        let rest = PER_WORKER * u32::try_from(job.members.len()).unwrap_or(u32::MAX);
        let bytes_referenced = match job.referenced {
            Some((read, bytes)) if read.elapsed() < rest => bytes,
            _ => {
                let mut bytes = 0_u64;
                for &worker in &job.members {
                    bytes = bytes.saturating_add(self.counters(worker)?.referenced_bytes);
                }
                bytes
            }
        };
        let traffic = JobTraffic {
            bytes_referenced,
            gateway: gateway_status(job).unwrap_or_default(),
            awaited: self.awaited.len() as u32,
        };
        let kept = job.referenced.filter(|(read, _)| read.elapsed() < rest);
        if let (None, Some(job)) = (kept, job_id.and_then(|id| self.jobs.get_mut(&id))) {
            job.referenced = Some((Instant::now(), bytes_referenced));
        }
        Ok((Reply::Traffic(traffic), None))
    }

    pub(super) fn status(&self, id: ConnId, job: Option<JobId>, after: Option<WorkerId>) -> Answer {
        let Peer { uid, account, .. } = self.known(id)?.peer;
        let visible = |owner: u32| uid == 0 || uid == owner;
        let first_page = after.is_none();
        let jobs = self
            .jobs
            .iter()
            .filter(|(id, _)| first_page && job.is_none_or(|job| job == **id))
            .map(|(&id, job)| {
                let workers = job.members.len();
                JobStatus {
                    job: id,
                    name: visible(job.uid).then(|| job.name.clone()),
                    uid: job.uid,
                    workers: workers as u32,
                    arena_bytes: job.arena_bytes,
                    arena_peak_bytes: job.arena_peak_bytes,
                    gateway: gateway_status(job),
                }
            });
        let jobs: Vec<JobStatus> = jobs.take(STATUS_JOBS).collect();
        let users = if first_page {
            self.users(account)
        } else {
            Vec::new()
        };
        let start = WorkerId(after.map_or(0, |after| after.0.saturating_add(1)));
        // Of one job, its workers only: others' are not gone through for each page.
        let of_job = job.map(|job| self.jobs.get(&job).map(|job| job.members.range(start..)));
        let of_all = job
            .is_none()
            .then(|| self.workers.range(start..).map(|(id, _)| id));
        let ids = of_job
            .into_iter()
            .flatten()
            .flatten()
            .chain(of_all.into_iter().flatten());
        let mut page: Vec<WorkerStatus> = Vec::new();
        let (mut bytes, mut more) = (packed_bytes(&jobs) + packed_bytes(&users), false);
        for &worker_id in ids {
            let Some(worker) = self.workers.get(&worker_id) else {
                continue;
            };
            if !self.jobs.get(&worker.job).is_some_and(|job| visible(job.uid)) {
                continue;
            }
            let status = self.worker_status(worker_id, worker)?;
            bytes += packed_bytes(&status);
            if bytes > STATUS_PAGE_BYTES && !page.is_empty() {
                more = true;
                break;
            }
            page.push(status);
        }
        let status = Status {
            daemon: self.welcome(),
            jobs,
            workers: page,
            more,
            users,
        };
        Ok((Reply::Status(status), None))
    }

    /// What that user has and may have; to root, what all have.
    fn users(&self, asking: u32) -> Vec<UserStatus> {
        let mut users = BTreeSet::from([asking]);
        if asking == 0 {
            let connected = self.conns.values().filter(|conn| !conn.peer.is_own());
            users.extend(connected.map(|conn| conn.peer.account));
            users.extend(self.jobs.values().map(|job| job.account));
            users.extend(self.awaited.users());
            users.extend(self.departed_users());
            users.extend(self.quotas.of.keys());
        }
        let status = |uid| {
            let (used, quota) = (self.used(uid), self.quotas.of(uid));
            UserStatus {
                uid,
                used: Amounts {
                    pool_bytes: used.pool_bytes,
                    workers: used.workers,
                    jobs: used.jobs,
                    connections: used.connections,
                },
                quota: Amounts {
                    pool_bytes: quota.pool_bytes,
                    workers: quota.workers,
                    jobs: quota.jobs,
                    connections: quota.connections,
                },
            }
        };
        users.into_iter().take(STATUS_USERS).map(status).collect()
    }

    /// Its plane.
    pub(crate) fn plane_kind(&self) -> PlaneKind {
        self.plane.kind()
    }

    /// Has it looked, now and then, whether huge pages are to be expected.
    pub(crate) fn refresh(&mut self) {
        const EVERY: Duration = Duration::from_secs(5);
        if self.refreshed.elapsed() > EVERY {
            self.refreshed = Instant::now();
            errands::run(nix::unistd::geteuid().as_raw(), self.pool.refresher());
        }
    }

    /// How the daemon is, for whoever supervises it.
    pub(crate) fn vitals(&self) -> Vitals {
        Vitals {
            plane: self.plane.kind(),
            jobs: self.jobs.values().filter(|job| !job.ended).count(),
            workers: self.workers.len(),
            pool_used_bytes: self.pool.used_bytes(),
            pool_bytes: self.pool.ceiling_bytes(),
        }
    }

    fn worker_status(&self, worker_id: WorkerId, worker: &Worker) -> Result<WorkerStatus, Denial> {
        let arenas = arenas_of(worker_id)
            .filter_map(|arena| Some((arena, self.arenas.get(&arena)?)))
            .map(|(arena, entry)| ArenaStatus {
                arena,
                layout: entry.layout,
                page_bytes: entry.page_bytes,
                note: entry.note.clone(),
                sealed: entry.sealed,
            });
        let counters = self.counters(worker_id)?;
        Ok(WorkerStatus {
            worker: worker_id,
            job: worker.job,
            name: worker.name.clone(),
            role: worker.role.clone(),
            pid: worker.pid.unsigned_abs(),
            idle_ns: idle_ns(counters.last_ns),
            counters,
            arenas: arenas.collect(),
        })
    }

    fn counters(&self, worker: WorkerId) -> Result<Counters, Denial> {
        let counters = self.plane.counters(worker).map_err(|error| {
            Denial(
                ErrorCode::Failed,
                format!("the counters of {worker} cannot be read: {error}"),
            )
        })?;
        Ok(counters.unwrap_or_default())
    }

    pub(super) fn welcome(&self) -> Welcome {
        Welcome {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            plane: self.plane.kind(),
            plane_reason: self.facts.plane_reason.clone(),
            pinned: self.plane.pinned().is_some(),
            pool_bytes: self.pool.ceiling_bytes(),
            pool_used_bytes: self.pool.used_bytes(),
            huge_pages: self.pool.expects_huge_pages(),
            max_workers: self.facts.max_workers,
            workers: self.workers.len() as u32,
            awaited: self.awaited.len() as u32,
            uid: nix::unistd::geteuid().as_raw(),
            capabilities: support::names_of(support::effective_capabilities()),
        }
    }
}

/// Bytes that it takes in a packet, with the comma behind it.
fn packed_bytes(value: &impl Serialize) -> usize {
    serde_json::to_vec(value).map_or(0, |json| json.len() + 1)
}

fn gateway_status(job: &Job) -> Option<GatewayStatus> {
    job.traffic.as_ref().map(|traffic| GatewayStatus {
        bytes_received: traffic.received(),
        bytes_sent: traffic.sent(),
    })
}
