//! What the registry shows: the daemon's first word, and pages of what is registered.

use std::collections::BTreeSet;

use lifl_common::control::{
    Amounts, ArenaStatus, ErrorCode, GatewayStatus, JobStatus, JobTraffic, PROTOCOL, Reply, Status,
    UserStatus, Welcome, WorkerStatus,
};
use lifl_common::id::{ArenaId, JobId, WorkerId};
use lifl_common::kernel::Counters;

use super::{Answer, ConnId, Denial, Job, Peer, Registry, Worker, deny};
use crate::Vitals;
use crate::plane::support;

/// Workers on one page of a status: a page must fit into a packet.
const STATUS_PAGE: usize = 16;

/// Jobs on a page.
const STATUS_JOBS: usize = 64;

/// Users on a page.
const STATUS_USERS: usize = 64;

impl Registry {
    /// What has moved in the job of a connection.
    pub(super) fn traffic(&self, id: ConnId) -> Answer {
        let conn = self.known(id)?;
        let of_worker = conn
            .worker
            .and_then(|worker| Some(self.workers.get(&worker)?.job));
        let job_id = conn.job.or(of_worker);
        let job = job_id.and_then(|id| Some((id, self.jobs.get(&id)?)));
        let Some((job_id, job)) = job else {
            return deny(
                ErrorCode::BadRequest,
                "this connection has no job: make one or register first",
            );
        };
        let mut bytes_referenced = 0_u64;
        for (&worker, _) in self.workers.iter().filter(|(_, worker)| worker.job == job_id) {
            bytes_referenced = bytes_referenced.saturating_add(self.counters(worker)?.referenced_bytes);
        }
        let traffic = JobTraffic {
            bytes_referenced,
            gateway: gateway_status(job).unwrap_or_default(),
            awaited: self.welcome().awaited,
        };
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
                let workers = self.workers.values().filter(|worker| worker.job == id).count();
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
        let start = WorkerId(after.map_or(0, |after| after.0.saturating_add(1)));
        let mut page: Vec<WorkerStatus> = Vec::new();
        let mut more = false;
        for (&worker_id, worker) in self.workers.range(start..) {
            let shown = self.jobs.get(&worker.job).is_some_and(|job| visible(job.uid));
            if !shown || job.is_some_and(|job| job != worker.job) {
                continue;
            }
            if page.len() == STATUS_PAGE {
                more = true;
                break;
            }
            page.push(self.worker_status(worker_id, worker)?);
        }
        let status = Status {
            daemon: self.welcome(),
            jobs: jobs.take(STATUS_JOBS).collect(),
            workers: page,
            more,
            users: if first_page {
                self.users(account)
            } else {
                Vec::new()
            },
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
        let own = (0..ArenaId::PER_WORKER).filter_map(|index| ArenaId::of(worker_id, index));
        let arenas = own
            .filter_map(|arena| Some((arena, self.arenas.get(&arena)?)))
            .map(|(arena, entry)| ArenaStatus {
                arena,
                layout: entry.layout,
                page_bytes: entry.page_bytes,
                note: entry.note.clone(),
                sealed: entry.sealed,
            });
        Ok(WorkerStatus {
            worker: worker_id,
            job: worker.job,
            name: worker.name.clone(),
            role: worker.role.clone(),
            pid: worker.pid.unsigned_abs(),
            counters: self.counters(worker_id)?,
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

fn gateway_status(job: &Job) -> Option<GatewayStatus> {
    job.traffic.as_ref().map(|traffic| GatewayStatus {
        bytes_received: traffic.received(),
        bytes_sent: traffic.sent(),
    })
}
