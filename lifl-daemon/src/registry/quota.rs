//! How much of the node one user may have.
//!
//! A quota is judged by [`admit`] alone: from what the user has and what it asks for, with no state of its own. What a
//! user has is counted afresh for each request, from the registry's tables, so it cannot drift from what is there.
//!
//! Memory, workers and jobs count for the user whose job it is, whoever asks; a connection counts for the user at its
//! other end. Root's count like anybody's.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::accounts;
use crate::limits;

/// What one user may have at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of arenas.
    pub pool_bytes: u64,
    /// Workers.
    pub workers: u32,
    /// Jobs.
    pub jobs: u32,
    /// Connections to the control socket. Each worker has one.
    pub connections: u32,
    /// Descriptors of the daemon's: of connections, frame sockets on the relay plane, and arenas.
    pub descriptors: u32,
}

impl Quota {
    /// No limit but the daemon's own.
    pub const UNLIMITED: Self = Self {
        pool_bytes: u64::MAX,
        workers: u32::MAX,
        jobs: u32::MAX,
        connections: u32::MAX,
        descriptors: u32::MAX,
    };

    /// Three quarters of what the daemon has, and 64 jobs: enough for one user who is alone, and no user alone can take
    /// all.
    pub fn share_of(pool_bytes: u64, max_workers: u32, max_connections: u32) -> Self {
        let most = |all: u32| (all - all / 4).max(1);
        Self {
            pool_bytes: pool_bytes - pool_bytes / 4,
            workers: most(max_workers),
            jobs: 64,
            connections: most(max_connections),
            descriptors: most(limits::open_files()),
        }
    }
}

/// Everybody's quotas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Of a user who is not in `of`.
    pub default: Quota,
    /// By uid.
    pub of: BTreeMap<u32, Quota>,
    /// The file in which an administrator changes them, for messages.
    pub file: PathBuf,
}

impl Quotas {
    /// Where an administrator sets them unless somebody says otherwise.
    pub const FILE: &'static str = "/etc/lifl/daemon.toml";

    /// None: for a daemon that serves one user.
    pub fn unlimited() -> Self {
        Self {
            default: Quota::UNLIMITED,
            of: BTreeMap::new(),
            file: Self::FILE.into(),
        }
    }

    /// A user's.
    pub fn of(&self, uid: u32) -> Quota {
        self.of.get(&uid).copied().unwrap_or(self.default)
    }

    /// How many of the daemon's descriptors a user may have. Root, and who runs the daemon, may have all.
    pub(crate) fn descriptors_of(&self, uid: u32) -> u32 {
        match uid == 0 || uid == nix::unistd::geteuid().as_raw() {
            true => u32::MAX,
            false => self.of(uid).descriptors,
        }
    }

    /// Whether a user may have that, besides what it has.
    ///
    /// # Errors
    /// If that is more than its quota; the error is for that user to read.
    pub(crate) fn admit(&self, uid: u32, used: &Use, want: Want) -> Result<(), QuotaError> {
        admit(&self.of(uid), used, want).map_err(|limit| QuotaError {
            user: accounts::name_of(uid),
            used: want.of(used),
            want,
            limit,
            file: self.file.clone(),
        })
    }
}

/// What a user has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) pool_bytes: u64,
    pub(crate) workers: u32,
    pub(crate) jobs: u32,
    pub(crate) connections: u32,
    /// Judged apart: nobody asks for them.
    pub(crate) descriptors: u32,
}

/// What a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Arena { bytes: u64 },
    Worker,
    Job,
    Connection,
}

impl Want {
    /// How much of that there is in use.
    fn of(self, used: &Use) -> u64 {
        match self {
            Self::Arena { .. } => used.pool_bytes,
            Self::Worker => used.workers.into(),
            Self::Job => used.jobs.into(),
            Self::Connection => used.connections.into(),
        }
    }
}

/// Decides; an error is the limit that would be passed.
pub(crate) fn admit(quota: &Quota, used: &Use, want: Want) -> Result<(), u64> {
    let (more, limit) = match want {
        Want::Arena { bytes } => (bytes, quota.pool_bytes),
        Want::Worker => (1, quota.workers.into()),
        Want::Job => (1, quota.jobs.into()),
        Want::Connection => (1, quota.connections.into()),
    };
    match want.of(used).checked_add(more) {
        Some(total) if total <= limit => Ok(()),
        _ => Err(limit),
    }
}

/// A user's quota is used up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct QuotaError {
    user: String,
    used: u64,
    want: Want,
    limit: u64,
    file: PathBuf,
}

impl fmt::Display for QuotaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            user,
            used,
            want,
            limit,
            file,
        } = self;
        let (key, remedy) = match want {
            Want::Arena { bytes } => {
                // Of what is used and needed more rather than less, so that the sum is seen not to fit.
                let (used, need) = (used.div_ceil(1 << 20), bytes.div_ceil(1 << 20));
                let limit = limit >> 20;
                write!(
                    f,
                    "{user} has {used} MiB of a quota of {limit} MiB, the arena needs {need} MiB"
                )?;
                ("pool_mib", "end another job")
            }
            Want::Worker => {
                write!(f, "{user} has {used} workers, and a quota of {limit}")?;
                ("workers", "end another job")
            }
            Want::Job => {
                write!(f, "{user} has {used} jobs, and a quota of {limit}")?;
                ("jobs", "end another job")
            }
            Want::Connection => {
                write!(f, "{user} has {used} connections, and a quota of {limit}")?;
                ("connections", "end another job")
            }
        };
        write!(
            f,
            ": {remedy}, or ask the administrator to raise quota.{key} in {}",
            file.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn wants() -> impl Strategy<Value = Want> {
        prop_oneof![
            (0_u64..1 << 40).prop_map(|bytes| Want::Arena { bytes }),
            Just(Want::Arena { bytes: u64::MAX }),
            Just(Want::Worker),
            Just(Want::Job),
            Just(Want::Connection),
        ]
    }

    /// What a user has when that was granted.
    fn granted(used: &Use, want: Want) -> Use {
        let mut used = *used;
        match want {
            Want::Arena { bytes } => used.pool_bytes += bytes,
            Want::Worker => used.workers += 1,
            Want::Job => used.jobs += 1,
            Want::Connection => used.connections += 1,
        }
        used
    }

    proptest! {
        /// Whatever is asked for in whatever order: nobody has more than its quota, and what would have fitted is not
        /// refused.
        #[test]
        fn nobody_gets_past_a_quota_and_nobody_is_kept_from_it(
            pool_bytes in 0_u64..1 << 42, workers in 0_u32..20, jobs in 0_u32..20, connections in 0_u32..20,
            asked in prop::collection::vec(wants(), 0..200),
        ) {
            let quota = Quota { pool_bytes, workers, jobs, connections, ..Quota::UNLIMITED };
            let mut used = Use::default();
            for want in asked {
                match admit(&quota, &used, want) {
                    Ok(()) => used = granted(&used, want),
                    Err(limit) => {
                        let more = if let Want::Arena { bytes } = want { bytes } else { 1 };
                        prop_assert!(want.of(&used).saturating_add(more) > limit);
                    }
                }
                prop_assert!(used.pool_bytes <= pool_bytes && used.workers <= workers);
                prop_assert!(used.jobs <= jobs && used.connections <= connections);
            }
        }

        /// A quota of one kind does not care about the others.
        #[test]
        fn each_kind_is_judged_by_itself(want in wants(), others in any::<u32>()) {
            let full = Use {
                pool_bytes: others.into(), workers: others, jobs: others, connections: others, ..Use::default()
            };
            let alone = match want {
                Want::Arena { .. } => Use { pool_bytes: full.pool_bytes, ..Use::default() },
                Want::Worker => Use { workers: full.workers, ..Use::default() },
                Want::Job => Use { jobs: full.jobs, ..Use::default() },
                Want::Connection => Use { connections: full.connections, ..Use::default() },
            };
            let quota = Quota { pool_bytes: 1 << 30, workers: 1000, jobs: 1000, connections: 1000, ..Quota::UNLIMITED };
            prop_assert_eq!(admit(&quota, &full, want), admit(&quota, &alone, want));
        }

        /// By default nobody alone can take everything, and everybody can take something.
        #[test]
        fn a_share_is_less_than_all(pool in 4_u64..1 << 50, workers in 4_u32..=65535, connections in 4_u32..1 << 20) {
            let share = Quota::share_of(pool, workers, connections);
            prop_assert!(0 < share.pool_bytes && share.pool_bytes < pool);
            prop_assert!(0 < share.workers && share.workers < workers);
            prop_assert!(0 < share.connections && share.connections < connections);
        }
    }

    #[test]
    fn an_override_is_for_that_user_alone_and_the_error_has_numbers_and_remedy() {
        let small = Quota {
            pool_bytes: 600 << 20,
            ..Quota::UNLIMITED
        };
        let mut quotas = Quotas::unlimited();
        quotas.of.insert(123_456_789, small);
        let used = Use {
            pool_bytes: 512 << 20,
            ..Use::default()
        };
        let want = Want::Arena { bytes: 128 << 20 };
        assert_eq!(quotas.admit(1, &used, want), Ok(()));
        let error = quotas
            .admit(123_456_789, &used, want)
            .expect_err("too much")
            .to_string();
        assert_eq!(
            error,
            "uid 123456789 has 512 MiB of a quota of 600 MiB, the arena needs 128 MiB: end another job, or ask the \
             administrator to raise quota.pool_mib in /etc/lifl/daemon.toml"
        );
    }
}
