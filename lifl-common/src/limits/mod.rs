//! What the system allows this process and those that it starts: limits of control groups, which containers
//! and services have, and resource limits (`getrlimit(2)`).
//!
//! Nothing here fails: what cannot be found out is no limit. Memory that is shared counts for the group of whoever touches it
//! first, so a worker's arena counts where the worker runs, whoever made the arena.

mod cgroup;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::Serialize;

use self::cgroup::{Group, Groups, Hierarchy};

/// A limit, how much of it is in use, and who sets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limit {
    /// How much may be in use.
    pub allowed: u64,
    /// How much is.
    pub used: u64,
    /// The setting and where it stands: `memory.max of cgroup /docker/f00`.
    pub by: String,
    /// How to raise it.
    pub remedy: &'static str,
}

impl Limit {
    /// What is not in use.
    pub fn left(&self) -> u64 {
        self.allowed.saturating_sub(self.used)
    }

    fn of(allowed: u64, used: u64, file: &str, group: &Group, remedy: &'static str) -> Self {
        Self {
            allowed,
            used,
            by: format!("{file} of cgroup {}", group.name),
            remedy,
        }
    }
}

/// Numbers as they are; who has bytes writes them out for people.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} allowed by {}, {} in use", self.allowed, self.by, self.used)
    }
}

/// The tightest of some limits.
fn tightest(limits: impl IntoIterator<Item = Limit>) -> Option<Limit> {
    limits.into_iter().min_by_key(Limit::left)
}

const RAISE_MEMORY: &str = "raise it (docker run --memory, MemoryMax= of a systemd unit)";
const RAISE_HUGE_PAGES: &str = "raise it, or pass --huge-pages never";
const RAISE_TASKS: &str = "raise it (docker run --pids-limit, TasksMax= of a systemd unit)";
const RAISE_USER_TASKS: &str =
    "raise it (ulimit -u, nproc in /etc/security/limits.conf, LimitNPROC= of a systemd unit)";
const RAISE_DESCRIPTORS: &str = "raise it (ulimit -Hn, LimitNOFILE= of a systemd unit)";
const RAISE_ADDRESS_SPACE: &str = "raise it (ulimit -v, LimitAS= of a systemd unit)";
const RAISE_DATA: &str = "raise it (ulimit -d, LimitDATA= of a systemd unit)";

/// The control groups that hold this process.
#[derive(Clone, Debug)]
pub struct Cgroups {
    groups: Vec<Groups>,
    /// How often the machine's kernel has killed a process for lack of memory, where no group says it.
    machine_oom_kills: Option<u64>,
}

impl Cgroups {
    /// This process's.
    pub fn current() -> Self {
        Self::read(Path::new("/"), std::process::id())
    }

    /// Those of the process `pid`, by the files below `root`.
    fn read(root: &Path, pid: u32) -> Self {
        let vmstat = fs::read_to_string(root.join("proc/vmstat")).unwrap_or_default();
        Self {
            groups: cgroup::groups(root, pid),
            machine_oom_kills: cgroup::field(&vmstat, "oom_kill"),
        }
    }

    /// Every visible group that may have a controller's files, and whether it is of version 2.
    fn with<'a>(&'a self, controller: &'a str) -> impl Iterator<Item = (bool, &'a Group)> {
        let groups = self.groups.iter();
        let having = groups.filter(move |groups| groups.hierarchy.may_have(controller));
        having.flat_map(|groups| {
            groups
                .levels
                .iter()
                .map(|group| (groups.hierarchy.is_v2(), group))
        })
    }

    /// The limit of memory in bytes that leaves least. What the kernel would take back, cached files, is not in use.
    pub fn memory(&self) -> Option<Limit> {
        let of_v2 = |group: &Group| {
            let used = group.number("memory.current").unwrap_or(0);
            let stat = group.text("memory.stat").unwrap_or_default();
            let cached = ["inactive_file", "active_file", "slab_reclaimable"]
                .map(|name| cgroup::field(&stat, name).unwrap_or(0));
            let used = used.saturating_sub(cached.iter().sum());
            ["memory.max", "memory.high"]
                .into_iter()
                .filter_map(|file| Some(Limit::of(group.limit(file)?, used, file, group, RAISE_MEMORY)))
                .collect::<Vec<_>>()
        };
        let of_v1 = |group: &Group| {
            let used = group.number("memory.usage_in_bytes").unwrap_or(0);
            let stat = group.text("memory.stat").unwrap_or_default();
            let cached = ["total_inactive_file", "total_active_file"]
                .map(|name| cgroup::field(&stat, name).unwrap_or(0));
            let used = used.saturating_sub(cached.iter().sum());
            let own = group.limit("memory.limit_in_bytes");
            // Of groups above that are not visible, this alone is told.
            let above = cgroup::field(&stat, "hierarchical_memory_limit")
                .filter(|&above| Some(above) < own.or(Some(1 << 60)));
            [
                (own, "memory.limit_in_bytes"),
                (above, "hierarchical_memory_limit in memory.stat"),
            ]
            .into_iter()
            .filter_map(|(limit, file)| Some(Limit::of(limit?, used, file, group, RAISE_MEMORY)))
            .collect::<Vec<_>>()
        };
        let mut limits = Vec::new();
        for groups in self
            .groups
            .iter()
            .filter(|groups| groups.hierarchy.may_have("memory"))
        {
            for group in &groups.levels {
                limits.extend(if groups.hierarchy.is_v2() {
                    of_v2(group)
                } else {
                    of_v1(group)
                });
                // Before Linux 5.11 a group of version 1 could be without a say over those below it.
                let above = groups.levels.get(1);
                if above.is_some_and(|above| above.number("memory.use_hierarchy") == Some(0)) {
                    break;
                }
            }
        }
        tightest(limits)
    }

    /// The limit of huge pages of 2 MiB, in bytes, that leaves least.
    ///
    /// Those that are promised to a file count as used: whoever touches one beyond the limit gets a `SIGBUS`.
    pub fn huge_pages(&self) -> Option<Limit> {
        const V2: [(&str, &str); 2] = [
            ("hugetlb.2MB.max", "hugetlb.2MB.current"),
            ("hugetlb.2MB.rsvd.max", "hugetlb.2MB.rsvd.current"),
        ];
        const V1: [(&str, &str); 2] = [
            ("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.usage_in_bytes"),
            (
                "hugetlb.2MB.rsvd.limit_in_bytes",
                "hugetlb.2MB.rsvd.usage_in_bytes",
            ),
        ];
        let limits = self.with("hugetlb").flat_map(|(v2, group)| {
            let files = if v2 { V2 } else { V1 };
            let used = files.iter().filter_map(|(_, used)| group.number(used)).max();
            files.into_iter().filter_map(move |(file, _)| {
                Some(Limit::of(
                    group.limit(file)?,
                    used.unwrap_or(0),
                    file,
                    group,
                    RAISE_HUGE_PAGES,
                ))
            })
        });
        tightest(limits)
    }

    /// The limit of processes and threads that leaves least.
    pub fn tasks(&self) -> Option<Limit> {
        tightest(self.with("pids").filter_map(|(_, group)| {
            let used = group.number("pids.current").unwrap_or(0);
            Some(Limit::of(
                group.limit("pids.max")?,
                used,
                "pids.max",
                group,
                RAISE_TASKS,
            ))
        }))
    }

    /// How much of the machine's cores may be used, in cores, and who says so.
    pub fn cpus(&self) -> Option<(f64, String)> {
        let of = |(v2, group): (bool, &Group)| {
            let file = if v2 { "cpu.max" } else { "cpu.cfs_quota_us" };
            let (quota, period) = if v2 {
                let text = group.text(file)?;
                let mut words = text.split_ascii_whitespace();
                (words.next()?.parse::<u64>().ok()?, words.next()?.parse().ok()?)
            } else {
                // -1 is no number of this kind: no limit.
                (group.number(file)?, group.number("cpu.cfs_period_us")?)
            };
            let cores = (period > 0).then(|| quota as f64 / period as f64)?;
            Some((cores, format!("{file} of cgroup {}", group.name)))
        };
        self.with("cpu")
            .filter_map(of)
            .min_by(|(a, _), (b, _)| a.total_cmp(b))
    }

    /// How many processes of this one's memory group the kernel has killed for lack of memory, of the group or of the machine,
    /// ever; where there is no such group, how many of the whole machine. Compare two readings. `None` if nobody counts.
    pub fn oom_kills(&self) -> Option<u64> {
        let counted = self
            .groups
            .iter()
            .filter(|groups| groups.hierarchy.may_have("memory"))
            .find_map(|groups| {
                let group = groups.levels.first()?;
                match groups.hierarchy {
                    Hierarchy::V2 => group.field("memory.events", "oom_kill"),
                    Hierarchy::V1(_) => group.field("memory.oom_control", "oom_kill"),
                }
            });
        counted.or(self.machine_oom_kills)
    }
}

/// How many processes the kernel has killed for lack of memory where this one is: see [`Cgroups::oom_kills`].
pub fn oom_kills() -> Option<u64> {
    Cgroups::current().oom_kills()
}

/// The machine's memory that can be had without taking any from others, in bytes; `None` if the kernel does not say.
pub fn available_on_machine() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let kib = cgroup::field(&meminfo, "MemAvailable:")?;
    Some(kib.saturating_mul(1024))
}

/// What of the machine's memory this process and those that it starts can have, in bytes; `None` if the kernel does not say.
pub fn available_memory() -> Option<u64> {
    let group = Cgroups::current().memory().map(|limit| limit.left());
    match (available_on_machine(), group) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

/// Cores that this process can keep busy: those that it may run on, and no more than its groups' share of time. At least 1.
pub fn cpus() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let quota = Cgroups::current().cpus().map(|(cores, _)| cores as usize);
    quota.map_or(cores, |quota| cores.min(quota)).max(1)
}

/// The limit of processes and threads that leaves least: of a control group, or of this user.
pub fn tasks() -> Option<Limit> {
    tightest(Cgroups::current().tasks().into_iter().chain(user_tasks()))
}

/// Which limit a process or a thread that cannot be started has run into, as far as can be seen, and how to raise it.
pub fn explain_threads() -> String {
    // Those that were tried for have been given back by now.
    if let Some(limit) = tasks().filter(|limit| limit.left() < NEAR_TASKS) {
        return format!(
            "{} allows {} processes and threads, {} are there: {}",
            limit.by, limit.allowed, limit.used, limit.remedy
        );
    }
    if let Some(limit) = address_space().filter(|limit| limit.left() < NEAR_BYTES) {
        return explain_bytes(&limit);
    }
    if let Some(limit) = data().filter(|limit| limit.left() < NEAR_BYTES) {
        return explain_bytes(&limit);
    }
    "raise the limit of processes and threads (docker run --pids-limit, TasksMax= of a systemd unit, ulimit -u, sysctl \
     kernel.threads-max)"
        .to_owned()
}

/// Which limit a call has run into that a descriptor, a process or memory was refused, and how to raise it; `None` if it failed
/// otherwise.
pub fn explain_refusal(error: &std::io::Error) -> Option<String> {
    match error.raw_os_error()? {
        libc::EAGAIN => Some(explain_threads()),
        libc::ENOMEM => Some(
            "raise the limit of memory (docker run --memory, MemoryMax= of a systemd unit, ulimit -v)"
                .to_owned(),
        ),
        libc::EMFILE => {
            let limit = descriptors()?;
            Some(format!(
                "{} allows {}, {} are open: {}",
                limit.by, limit.allowed, limit.used, limit.remedy
            ))
        }
        libc::ENFILE => Some("raise fs.file-max (sysctl)".to_owned()),
        _ => None,
    }
}

/// Fewer left than this are why threads that are asked for together cannot be had.
const NEAR_TASKS: u64 = 32;

/// Less than this left of a limit of memory is why a thread cannot have its stack.
const NEAR_BYTES: u64 = 16 << 20;

fn explain_bytes(limit: &Limit) -> String {
    format!(
        "{} allows {} MiB, {} MiB are in use: {}",
        limit.by,
        limit.allowed >> 20,
        limit.used.div_ceil(1 << 20),
        limit.remedy
    )
}

/// `RLIMIT_NPROC`, which counts all threads of a real user; it holds for nobody who may do without.
fn user_tasks() -> Option<Limit> {
    let allowed = soft(Resource::RLIMIT_NPROC)?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    if may_exceed(&status) && in_first_user_namespace() {
        return None;
    }
    let uid = uid(&status)?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let used = processes.filter_map(|entry| {
        entry.file_name().to_str()?.parse::<u32>().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        (self::uid(&status)? == uid).then(|| cgroup::field(&status, "Threads:"))?
    });
    Some(Limit {
        allowed,
        used: used.sum(),
        by: format!("RLIMIT_NPROC of user {uid}"),
        remedy: RAISE_USER_TASKS,
    })
}

/// The real user in a `/proc/PID/status`.
fn uid(status: &str) -> Option<u64> {
    cgroup::field(status, "Uid:")
}

/// Whether the kernel lets that process exceed `RLIMIT_NPROC`: with `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN`, or as uid 0
/// (`copy_process` in `kernel/fork.c`).
fn may_exceed(status: &str) -> bool {
    const SYS_ADMIN: u32 = 21;
    const SYS_RESOURCE: u32 = 24;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    let has = |capability: u32| effective.is_some_and(|set| set >> capability & 1 == 1);
    uid(status) == Some(0) || has(SYS_ADMIN) || has(SYS_RESOURCE)
}

/// Whether this process's user and capabilities are the machine's, and not those of a container without root.
fn in_first_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let mut numbers = map.split_ascii_whitespace();
    (numbers.next(), numbers.next(), numbers.next()) == (Some("0"), Some("0"), Some("4294967295"))
}

/// This process's open descriptors. The soft limit counts: raise it first.
pub fn descriptors() -> Option<Limit> {
    let allowed = soft(Resource::RLIMIT_NOFILE)?;
    // The folder's own descriptor is one of them.
    let open = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1));
    Some(Limit {
        allowed,
        used: open as u64,
        by: "RLIMIT_NOFILE".to_owned(),
        remedy: RAISE_DESCRIPTORS,
    })
}

/// What one process may map, in bytes: this one has in use what is said.
pub fn address_space() -> Option<Limit> {
    process_limit(Resource::RLIMIT_AS, "RLIMIT_AS", "VmSize:", RAISE_ADDRESS_SPACE)
}

/// What one process may have of private memory, stacks among it, in bytes.
pub fn data() -> Option<Limit> {
    process_limit(Resource::RLIMIT_DATA, "RLIMIT_DATA", "VmData:", RAISE_DATA)
}

fn process_limit(resource: Resource, by: &str, field: &str, remedy: &'static str) -> Option<Limit> {
    let allowed = soft(resource)?;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    Some(Limit {
        allowed,
        used: cgroup::field(&status, field).unwrap_or(0).saturating_mul(1024),
        by: by.to_owned(),
        remedy,
    })
}

/// A resource limit, if there is one.
fn soft(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}
