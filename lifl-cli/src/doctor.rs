//! `lifl doctor`: what this machine has of what LIFL can use, and how to get the rest.
//!
//! Each check looks for itself and none fails: what cannot be found out is reported as such.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use lifl_common::arena::memfd;
use lifl_common::client::{Client, ClientError};
use lifl_common::control::{Welcome, paths};
use lifl_common::limits::{self, Cgroups, Limit};
use lifl_common::plane::{NO_KERNEL_PLANE, UNBOUNDED};
use lifl_daemon::plane::{Options, PlaneError, Sockmap, support};
use lifl_daemon::privileges;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::Serialize;

use crate::coordinate::report::human_bytes;

/// Open files that a job of a few hundred workers takes of its daemon: each has a control socket and an
/// arena there.
const OPEN_FILES: u64 = 4096;

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// LIFL runs without it, but slower or smaller.
    Warn,
    /// The sockmap plane does not work without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
    /// What was found.
    pub found: String,
    /// The command, or what else helps; `None` when nothing needs to be done.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            remedy: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Warn,
            found: found.into(),
            remedy: Some(remedy.into()),
        }
    }

    fn missing(name: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::warn(name, found, remedy)
        }
    }
}

/// Looks at everything. Loads the SK_MSG program for a moment, if it may.
pub fn run() -> Vec<Check> {
    vec![
        kernel(),
        capabilities(),
        sockmap(),
        unprivileged_bpf(),
        bpffs(),
        huge_pages(),
        huge_memfd(),
        memory_limit(Cgroups::current().memory()),
        huge_page_limit(Cgroups::current().huge_pages()),
        task_limit(limits::tasks()),
        cpu_limit(Cgroups::current().cpus()),
        memlock(),
        open_files(),
        socket_folder(),
        daemon(),
    ]
}

/// The checks as a table for people: state, name, what was found, and the remedy beneath.
pub fn render(checks: &[Check]) -> String {
    checks.iter().map(ToString::to_string).collect()
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Missing => "missing",
        };
        writeln!(f, "{state:<8} {:<18} {}", self.name, self.found)?;
        match &self.remedy {
            Some(remedy) => writeln!(f, "{:27} → {remedy}", ""),
            None => Ok(()),
        }
    }
}

fn kernel() -> Check {
    const NAME: &str = "kernel";
    let (major, minor) = support::OLDEST_KERNEL;
    let remedy = format!("install kernel {major}.{minor} or newer; without it use --plane relay");
    match support::kernel() {
        Some((release, version)) if version >= support::OLDEST_KERNEL => Check::ok(NAME, release),
        Some((release, _)) => Check::missing(NAME, format!("{release}, older than {major}.{minor}"), remedy),
        None => Check::warn(NAME, "/proc/sys/kernel/osrelease cannot be read", remedy),
    }
}

fn capabilities() -> Check {
    const NAME: &str = "capabilities";
    let missing = support::missing_capabilities(support::effective_capabilities());
    if missing.is_empty() {
        return Check::ok(NAME, "may load eBPF programs and put sockets into their maps");
    }
    Check::missing(
        NAME,
        format!("this process lacks {}", missing.join(" and ")),
        "sudo lifl doctor",
    )
}

fn sockmap() -> Check {
    const NAME: &str = "sockmap plane";
    const LOADS: &str = "the SK_MSG program loads and attaches";
    // The plane's tasks need a runtime, and this may be called within one.
    let tried = on_thread(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .ok()?;
        Some(runtime.block_on(async {
            let (sockmap, _dead_letters) = Sockmap::load(Options {
                max_workers: 1,
                pin: None,
            })?;
            let unbounded = sockmap.unbounded().map(str::to_owned);
            sockmap.shutdown().map(|()| unbounded)
        }))
    });
    match tried {
        Some(Some(Ok(None))) => Check::ok(NAME, LOADS),
        Some(Some(Ok(Some(why)))) => unbounded(NAME, LOADS, &why),
        Some(Some(Err(PlaneError::Unavailable { reason, remedy }))) => Check::missing(NAME, reason, remedy),
        Some(Some(Err(error))) => Check::missing(NAME, error.to_string(), "report this kernel and message"),
        Some(None) | None => Check::warn(
            NAME,
            "could not be tried: no thread or no descriptor is left",
            "raise the limits of processes and open files that are named below",
        ),
    }
}

/// The kernel's plane works, but holds for a worker that does not read whatever comes. `why` is the plane's reason.
fn unbounded(name: &'static str, found: &str, why: &str) -> Check {
    let (why, remedy) = why
        .split_once("; ")
        .unwrap_or((why, "use the relay plane (--plane relay)"));
    Check::warn(name, format!("{found}; {UNBOUNDED}{why}"), remedy)
}

fn unprivileged_bpf() -> Check {
    const NAME: &str = "unprivileged eBPF";
    const COMMAND: &str = "sudo sysctl kernel.unprivileged_bpf_disabled=2";
    match read("/proc/sys/kernel/unprivileged_bpf_disabled").as_deref() {
        Some("0") => Check::warn(NAME, "allowed to everybody, which LIFL does not need", COMMAND),
        Some(value) => Check::ok(NAME, format!("off (kernel.unprivileged_bpf_disabled={value})")),
        None => Check::ok(NAME, "this kernel has no such setting"),
    }
}

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    const PATH: &str = "/sys/fs/bpf";
    let mounts = read("/proc/self/mounts").unwrap_or_default();
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next(), fields.next()) == (Some(PATH), Some("bpf"))
    });
    if mounted {
        return Check::ok(NAME, format!("mounted at {PATH}"));
    }
    Check::warn(
        NAME,
        format!("not mounted at {PATH}"),
        format!("sudo mount -t bpf bpf {PATH}"),
    )
}

fn huge_pages() -> Check {
    const NAME: &str = "huge pages";
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let number = |file| read(&format!("{POOL}/{file}")).and_then(|n| n.parse::<u64>().ok());
    let (Some(total), Some(free)) = (number("nr_hugepages"), number("free_hugepages")) else {
        return Check::warn(
            NAME,
            "this kernel has no pages of 2 MiB",
            "use --huge-pages never",
        );
    };
    let limit = format!("{POOL}/nr_overcommit_hugepages");
    let may_make = nix::unistd::access(limit.as_str(), nix::unistd::AccessFlags::W_OK).is_ok();
    if may_make {
        let found =
            format!("{free} of {total} pages of 2 MiB are free; missing ones are made when they are needed");
        return Check::ok(NAME, found);
    }
    let found = format!("{free} of {total} pages of 2 MiB are free; only root has more made");
    if free > 0 {
        return Check::ok(NAME, found);
    }
    Check::warn(
        NAME,
        found,
        format!("sudo sysctl vm.nr_hugepages={}", total + 512),
    )
}

fn huge_memfd() -> Check {
    const NAME: &str = "huge memfd";
    match memfd_create(
        c"lifl-doctor",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    ) {
        Ok(_) => Check::ok(NAME, "memfd_create(MFD_HUGETLB) works"),
        Err(errno) => Check::warn(
            NAME,
            format!("memfd_create(MFD_HUGETLB) failed: {}", errno.desc()),
            match errno {
                Errno::ENODEV | Errno::EINVAL | Errno::ENOSYS => "run a kernel with CONFIG_HUGETLBFS",
                _ => "sudo lifl doctor",
            },
        ),
    }
}

fn memlock() -> Check {
    const NAME: &str = "locked memory";
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        // Kernels since 5.11 charge maps to the memory cgroup, so this limit holds nothing back.
        Ok((soft, _)) => Check::ok(
            NAME,
            format!("limit {}; eBPF maps do not count against it", bytes(soft)),
        ),
        Err(errno) => Check::warn(NAME, format!("getrlimit failed: {}", errno.desc()), "ulimit -l"),
    }
}

fn open_files() -> Check {
    const NAME: &str = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft >= OPEN_FILES => {
            Check::ok(NAME, format!("limit {soft} (hard limit {hard})"))
        }
        Ok((soft, hard)) => Check::warn(
            NAME,
            format!(
                "limit {soft} (hard limit {hard}): enough for about {} workers",
                soft / 4
            ),
            format!("ulimit -n {}", OPEN_FILES.min(hard)),
        ),
        Err(errno) => Check::warn(NAME, format!("getrlimit failed: {}", errno.desc()), "ulimit -n"),
    }
}

/// Where a daemon of this user would listen.
fn socket_folder() -> Check {
    const NAME: &str = "socket folder";
    match paths::own_folder() {
        Ok((folder, passed_over)) => {
            // Runtime folders that a login would have made are nobody's fault.
            let named = passed_over.iter().find(|passed| passed.place.variable.is_some());
            let system = passed_over.iter().find(|_| nix::unistd::geteuid().is_root());
            let found = folder.display().to_string();
            match named.or(system) {
                None => Check::ok(NAME, found),
                Some(passed) => {
                    let remedy = match passed.place.variable {
                        Some(variable) => format!("unset {variable}, or set it to a folder of your own"),
                        None => "other users look for a daemon of root there only: make it writable, or have them pass \
                                 --daemon SOCKET"
                            .to_owned(),
                    };
                    Check::warn(NAME, format!("{found}, since {passed}"), remedy)
                }
            }
        }
        Err(error) => Check::missing(
            NAME,
            error.to_string(),
            "mkdir -m 700 ~/.lifl; export XDG_RUNTIME_DIR=~/.lifl",
        ),
    }
}

/// A daemon that listens: what it runs as, and whether it has kept more than it needs.
fn daemon() -> Check {
    // A daemon has 10 s to accept the connection, 10 s to greet and 10 s to answer; only one that greets is asked.
    const PATIENCE: Duration = Duration::from_secs(35);
    let asked = on_thread(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .ok()?;
        let ask = async {
            for socket in paths::daemon_sockets() {
                match Client::connect(&socket).await {
                    Ok(mut client) => match client.flame().await {
                        Err(error @ ClientError::Silent { .. }) => {
                            return Check::warn(
                                DAEMON,
                                error.to_string(),
                                "sudo systemctl restart lifl-daemon",
                            );
                        }
                        flame => {
                            let flame = flame.is_ok_and(|page| page.is_some());
                            return listening(&socket, client.welcome(), flame);
                        }
                    },
                    Err(ClientError::Connect { source, .. })
                        if source.kind() == std::io::ErrorKind::PermissionDenied =>
                    {
                        return Check::warn(
                            DAEMON,
                            format!("listens at {}, where this user may not connect", socket.display()),
                            "sudo usermod -aG lifl $USER",
                        );
                    }
                    Err(error @ ClientError::Busy { .. }) => {
                        return Check::warn(DAEMON, error.to_string(), "lifl status");
                    }
                    Err(error @ ClientError::Silent { .. }) => {
                        return Check::warn(DAEMON, error.to_string(), "sudo systemctl restart lifl-daemon");
                    }
                    // Nobody there, or of another version.
                    Err(_) => {}
                }
            }
            Check::ok(DAEMON, "none listens: each run has one of its own")
        };
        runtime
            .block_on(async { tokio::time::timeout(PATIENCE, ask).await })
            .ok()
    });
    match asked {
        Some(Some(check)) => check,
        None => Check::warn(
            DAEMON,
            "could not be asked: no thread or no descriptor is left",
            "raise the limits of processes and open files that are named above",
        ),
        Some(None) => Check::warn(
            DAEMON,
            format!("does not answer within {} s", PATIENCE.as_secs()),
            "sudo systemctl restart lifl-daemon",
        ),
    }
}

const DAEMON: &str = "daemon";

/// How it stands with a daemon that has answered.
fn listening(socket: &Path, welcome: &Welcome, serves_flame: bool) -> Check {
    let needed = support::names_of(privileges::running(serves_flame));
    let has = &welcome.capabilities;
    let excess: Vec<&str> = has
        .iter()
        .filter(|capability| !needed.contains(capability))
        .map(String::as_str)
        .collect();
    let capabilities = match has.as_slice() {
        [] => "without capabilities".to_owned(),
        some => format!("with {}", some.join(" and ")),
    };
    let found = format!(
        "{} at {}, plane {}, as uid {} {capabilities}",
        welcome.version,
        socket.display(),
        welcome.plane,
        welcome.uid
    );
    if let Some(why) = welcome.plane_reason.strip_prefix(NO_KERNEL_PLANE) {
        let (why, remedy) = why.split_once("; ").unwrap_or((why, "journalctl -u lifl-daemon"));
        return Check::warn(DAEMON, format!("{found}; {NO_KERNEL_PLANE}{why}"), remedy);
    }
    if let Some((_, why)) = welcome.plane_reason.split_once(UNBOUNDED) {
        return unbounded(DAEMON, &found, why);
    }
    if excess.is_empty() && welcome.uid == 0 {
        // Its files are root's to it, capabilities or not.
        return Check::warn(
            DAEMON,
            format!("{found}, root's"),
            "sudo useradd --system lifl, and start it anew",
        );
    }
    if excess.is_empty() {
        return Check::ok(DAEMON, found);
    }
    let found = format!("{found}; it does not need {}", excess.join(" and "));
    Check::warn(DAEMON, found, "sudo systemctl restart lifl-daemon")
}

/// Runs what needs a runtime of its own; `None` where no thread or no descriptor for it is left.
fn on_thread<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    // A runtime without a pair of sockets for signals panics.
    const DESCRIPTORS: u64 = 16;
    if limits::descriptors().is_some_and(|limit| limit.left() < DESCRIPTORS) {
        return None;
    }
    std::thread::Builder::new().spawn(run).ok()?.join().ok()
}

fn memory_limit(limit: Option<Limit>) -> Check {
    const NAME: &str = "memory limit";
    // What the smallest job takes.
    const LEAST: u64 = 64 << 20;
    let Some(limit) = limit else {
        return Check::ok(NAME, "no control group sets one");
    };
    let found = format!(
        "{} allows {}, {} in use",
        limit.by,
        human_bytes(limit.allowed),
        human_bytes(limit.used)
    );
    match limit.left() < LEAST {
        true => Check::warn(NAME, found, limit.remedy),
        false => Check::ok(NAME, found),
    }
}

fn huge_page_limit(limit: Option<Limit>) -> Check {
    const NAME: &str = "huge page limit";
    let Some(limit) = limit else {
        return Check::ok(NAME, "no control group sets one");
    };
    let pages = |bytes: u64| bytes / memfd::HUGE_PAGE_BYTES;
    let found = format!(
        "{} allows {} pages of 2 MiB, {} in use",
        limit.by,
        pages(limit.allowed),
        pages(limit.used)
    );
    match pages(limit.left()) {
        0 => Check::warn(NAME, found, limit.remedy),
        _ => Check::ok(NAME, found),
    }
}

fn task_limit(limit: Option<Limit>) -> Check {
    const NAME: &str = "process limit";
    let Some(limit) = limit else {
        return Check::ok(NAME, "neither a control group nor this user has one");
    };
    let found = format!(
        "{} allows {} processes and threads, {} there: enough for about {} workers",
        limit.by,
        limit.allowed,
        limit.used,
        limit.left().saturating_sub(TASKS_BESIDE) / TASKS_OF_WORKER
    );
    match limit.left() < TASKS_BESIDE + 4 * TASKS_OF_WORKER {
        true => Check::warn(NAME, found, limit.remedy),
        false => Check::ok(NAME, found),
    }
}

/// Threads of a run beside its workers, and of a worker: about.
const TASKS_BESIDE: u64 = 8;
const TASKS_OF_WORKER: u64 = 3;

fn cpu_limit(limit: Option<(f64, String)>) -> Check {
    const NAME: &str = "cpu limit";
    let threads = limits::cpus();
    match limit {
        Some((cores, by)) if cores < 1.0 => Check::warn(
            NAME,
            format!("{by} allows {cores:.2} cores"),
            "raise it (docker run --cpus, CPUQuota= of a systemd unit)",
        ),
        Some((cores, by)) => Check::ok(
            NAME,
            format!("{by} allows {cores:.2} cores: {threads} threads compute"),
        ),
        None => Check::ok(NAME, format!("{threads} cores, all their time")),
    }
}

fn bytes(limit: u64) -> String {
    match limit {
        RLIM_INFINITY => "unlimited".to_owned(),
        limit => format!("{} KiB", limit / 1024),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_not_ok_has_a_remedy() {
        let checks = run();
        for check in &checks {
            assert_eq!(check.remedy.is_none(), check.state == State::Ok, "{check:?}");
        }
        let text = render(&checks);
        assert!(checks.iter().all(|check| text.contains(check.name)), "{text}");
    }

    #[tokio::test]
    async fn may_be_asked_for_within_a_runtime() {
        assert_eq!(run().len(), 15);
    }

    #[test]
    fn a_daemon_with_more_than_it_needs_is_warned_of_by_name() {
        let welcome = |capabilities: &[&str]| Welcome {
            protocol: 1,
            version: "1.2.3".into(),
            pid: 1,
            plane: lifl_common::plane::PlaneKind::Sockmap,
            plane_reason: String::new(),
            pinned: true,
            pool_bytes: 0,
            pool_used_bytes: 0,
            huge_pages: false,
            max_workers: 1,
            workers: 0,
            awaited: 0,
            uid: 990,
            capabilities: capabilities.iter().map(ToString::to_string).collect(),
        };
        let check = |capabilities: &[&str], flame| listening(Path::new("/x"), &welcome(capabilities), flame);
        let of_root = listening(
            Path::new("/x"),
            &Welcome {
                uid: 0,
                ..welcome(&[])
            },
            false,
        );
        assert_eq!(of_root.state, State::Warn);
        assert!(of_root.remedy.is_some_and(|remedy| remedy.contains("useradd")));
        let bare = check(&[], false);
        assert_eq!(bare.state, State::Ok);
        assert_eq!(
            bare.found,
            "1.2.3 at /x, plane sockmap, as uid 990 without capabilities"
        );
        assert_eq!(check(&["CAP_SYS_PTRACE"], true).state, State::Ok);
        let relay = Welcome {
            plane: lifl_common::plane::PlaneKind::Relay,
            plane_reason: format!("{NO_KERNEL_PLANE}kernel 5.10 is older than 5.15; run a newer kernel"),
            ..welcome(&[])
        };
        let relay = listening(Path::new("/x"), &relay, false);
        assert_eq!(relay.state, State::Warn);
        let unbounded = Welcome {
            plane_reason: format!("handed over; {UNBOUNDED}no AF_NETLINK; allow it"),
            ..welcome(&[])
        };
        let unbounded = listening(Path::new("/x"), &unbounded, false);
        assert_eq!(unbounded.state, State::Warn);
        assert!(
            unbounded.found.ends_with("not bounded: no AF_NETLINK"),
            "{}",
            unbounded.found
        );
        assert_eq!(unbounded.remedy.as_deref(), Some("allow it"));
        assert!(relay.found.contains("older than 5.15"), "{}", relay.found);
        assert_eq!(relay.remedy.as_deref(), Some("run a newer kernel"));
        let more = check(&["CAP_SYS_PTRACE", "CAP_SYS_ADMIN"], true);
        assert_eq!(more.state, State::Warn);
        assert!(
            more.found.ends_with("it does not need CAP_SYS_ADMIN"),
            "{}",
            more.found
        );
    }

    #[test]
    fn limits_are_told_with_who_sets_them() {
        let limit = |allowed, used| Limit {
            allowed,
            used,
            by: "x.max of cgroup /docker/f00".to_owned(),
            remedy: "raise it",
        };
        let small = memory_limit(Some(limit(300 << 20, 280 << 20)));
        assert_eq!(small.state, State::Warn);
        assert_eq!(
            small.found,
            "x.max of cgroup /docker/f00 allows 300 MiB, 280 MiB in use"
        );
        assert_eq!(memory_limit(Some(limit(300 << 20, 0))).state, State::Ok);
        let none = huge_page_limit(Some(limit(8 << 20, 8 << 20)));
        assert!(
            none.state == State::Warn && none.found.contains("4 pages of 2 MiB, 4 in use"),
            "{none:?}"
        );
        assert_eq!(huge_page_limit(Some(limit(8 << 20, 0))).state, State::Ok);
        let few = task_limit(Some(limit(10, 1)));
        assert!(
            few.state == State::Warn && few.found.contains("10 processes and threads"),
            "{few:?}"
        );
        assert_eq!(task_limit(Some(limit(100, 1))).state, State::Ok);
        let half = cpu_limit(Some((0.5, "cpu.max of cgroup /x".to_owned())));
        assert!(
            half.state == State::Warn && half.found.contains("0.50 cores"),
            "{half:?}"
        );
        for none in [
            memory_limit(None),
            huge_page_limit(None),
            task_limit(None),
            cpu_limit(None),
        ] {
            assert_eq!(none.state, State::Ok, "{none:?}");
        }
    }

    #[test]
    fn the_table_has_aligned_columns() {
        let checks = [
            Check::ok("bpffs", "mounted"),
            Check::missing("kernel", "4.19", "install a newer one"),
        ];
        let expected = "ok       bpffs              mounted\n\
                        missing  kernel             4.19\n\
                        \u{20}                           → install a newer one\n";
        assert_eq!(render(&checks), expected);
    }

    #[test]
    fn a_check_is_json_with_lower_case_states() {
        let json = serde_json::to_value(Check::warn("bpffs", "no", "mount it")).expect("json");
        let expected = serde_json::json!({
            "name": "bpffs", "state": "warn", "found": "no", "remedy": "mount it",
        });
        assert_eq!(json, expected);
    }
}
