//! What users have of the node, and whether they may have more.

use lifl_common::control::ErrorCode;
use lifl_common::id::JobId;

use super::quota::{Use, Want};
use super::{Denial, Registry, deny};
use crate::accounts;

impl Registry {
    /// What an account has of the node.
    pub(super) fn used(&self, uid: u32) -> Use {
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

    pub(super) fn admit(&self, uid: u32, want: Want) -> Result<(), Denial> {
        let admitted = self.quotas.admit(uid, &self.used(uid), want);
        admitted.map_err(|error| Denial(ErrorCode::Full, error.to_string()))
    }

    /// Whether an account may have so many more of the daemon's descriptors.
    pub(super) fn admit_descriptors(&self, account: u32, used: &Use, more: u32) -> Result<(), Denial> {
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
}
