//! The daemon of root becomes an ordinary user's before it serves anybody.
//!
//! ```text
//!   root ── socket, pins' folder, limit of huge pages ──▶ starts the cleaner ──▶ executes itself as the user
//!                                                             │                      │
//!                                  removes socket and folder, │                      ▼
//!                                  takes the limit back       │      listens at the socket that is handed over,
//!                                                             ◀─ ends ─  gives up what it loaded with, serves
//! ```
//!
//! So from the moment that it executes itself it is what the systemd unit makes of it, by the same way. What it then cannot
//! take away itself, since it lies in folders of root's, the cleaner does: another process of this program, root's without
//! capabilities but `CAP_CHOWN`, which waits for its end, however it comes, and hears nothing of anybody.

use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use caps::{CapSet, Capability, CapsHashSet};
use lifl_daemon::{Options, listen_at, plane, privileges};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::prctl::set_keepcaps;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Pid, User, geteuid, getgrouplist};

/// The user that root's daemon becomes, where the system has it.
const USER: &str = "lifl";

/// The word on the command line that makes this program the cleaner.
const CLEANER: &str = "clean-up-after-daemon";

/// Where a daemon that was executed finds the cleaner's pipe and pid.
const CLEANER_VARIABLE: &str = "LIFL_CLEANER";

/// Where it finds the path of the socket that was made for it.
const SOCKET_VARIABLE: &str = "LIFL_SOCKET";

/// How many huge pages the kernel may make: for root to say, and for the user while the daemon runs.
const SURPLUS_LIMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

/// The first descriptor of those that a service manager hands over.
const FIRST_HANDED: RawFd = 3;

/// What the user's process begins with: to load programs, on kernels whose verifier asks for more too; to find the pins'
/// folder, to which root's folders lead; and to empty the bounding set.
const TO_BEGIN: [Capability; 5] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_SETPCAP,
];

/// The user to become; `None` to stay what this process is, which only root need not.
///
/// # Errors
/// If there is no such user, or this process cannot become it.
pub(crate) fn wanted(named: Option<&str>) -> anyhow::Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let name = named.unwrap_or(USER);
    let found = User::from_name(name).with_context(|| format!("user {name}"))?;
    let Some(user) = found else {
        if named.is_some() {
            bail!("there is no user {name}: create it with `useradd --system {name}`");
        }
        tracing::warn!(
            "there is no user {USER} to become: this daemon keeps root's uid, without capabilities; create it with \
             `useradd --system {USER}`, or say --user root"
        );
        return Ok(None);
    };
    if user.uid.is_root() {
        return Ok(None);
    }
    let may = [
        Capability::CAP_SETUID,
        Capability::CAP_SETGID,
        Capability::CAP_CHOWN,
    ];
    let effective = caps::read(None, CapSet::Effective).context("capget")?;
    if let Some(lacks) = may.iter().find(|capability| !effective.contains(capability)) {
        if named.is_some() {
            bail!("this process lacks {lacks}, which it takes to become user {name}");
        }
        tracing::warn!(
            "this daemon keeps root's uid: it lacks {lacks}, which it takes to become user {name}"
        );
        return Ok(None);
    }
    Ok(Some(user))
}

/// Executes this program as that user, with what the daemon needs of root; returns only if that fails.
///
/// # Errors
/// If the daemon could not listen, or this program cannot be executed by that user.
pub(crate) fn execute_as(
    user: &User,
    listener: Option<OwnedFd>,
    options: &Options,
    flame: bool,
) -> anyhow::Result<std::convert::Infallible> {
    let made = listener.is_none();
    let listener = match listener {
        Some(listener) => listener,
        None => listen_at(&options.socket, options.socket_mode, options.socket_group)
            .map_err(lifl_daemon::StartError::from)?,
    };
    let pins = options
        .pin
        .as_deref()
        .filter(|_| options.plane != plane::Request::Relay);
    if let Some(folder) = pins {
        match plane::give_pins(folder, user.uid, user.gid) {
            Ok(()) => {}
            // The daemon finds that out too, and does without.
            Err(plane::PinError::Unavailable(why)) => tracing::debug!("no pins: {why}"),
            Err(error) => return Err(error.into()),
        }
    }
    let limit = give_surplus_limit(user);
    let path = std::path::absolute(&options.socket);
    let path = path.with_context(|| options.socket.display().to_string())?;
    let socket = made.then_some(path.as_path());
    let (pipe, cleaner) = start_cleaner(socket, pins, limit.then_some(user))?;

    let groups = CString::new(user.name.as_str())
        .map_err(io::Error::from)
        .and_then(|name| Ok(getgrouplist(&name, user.gid)?));
    let groups = groups.with_context(|| format!("getgrouplist of {}", user.name))?;
    change(user, &groups, flame).with_context(|| format!("cannot become user {}", user.name))?;

    let program = "/proc/self/exe";
    let mut arguments = std::env::args_os();
    let mut command = Command::new(program);
    command.arg0(arguments.next().unwrap_or_else(|| OsString::from("lifl-daemon")));
    command
        .args(arguments)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_PID", std::process::id().to_string())
        .env(CLEANER_VARIABLE, format!("{pipe} {cleaner}"))
        .env_remove(SOCKET_VARIABLE);
    if let Some(socket) = socket {
        command.env(SOCKET_VARIABLE, socket);
    }
    // SAFETY: a number of which nothing here makes use any more: the call that follows replaces the process.
    let handed = unsafe { libc::dup2(listener.as_raw_fd(), FIRST_HANDED) };
    Errno::result(handed).context("dup2")?;
    if listener.as_raw_fd() == FIRST_HANDED {
        // dup2 has left it to be closed by execve.
        fcntl(&listener, FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).context("fcntl")?;
    }
    let error = command.exec();
    Err(error).with_context(|| {
        format!(
            "user {} cannot execute this program: install it where all users can, or say --user root",
            user.name
        )
    })
}

/// Makes the calling thread that user's, with what the daemon begins with, in all sets that `execve(2)` looks at.
fn change(user: &User, groups: &[Gid], flame: bool) -> anyhow::Result<()> {
    let to_begin = TO_BEGIN
        .into_iter()
        .chain(flame.then_some(Capability::CAP_SYS_PTRACE));
    let permitted = caps::read(None, CapSet::Permitted).context("capget")?;
    let to_begin: CapsHashSet = to_begin
        .filter(|capability| permitted.contains(capability))
        .collect();
    let ids = [Capability::CAP_SETUID, Capability::CAP_SETGID];
    let mask = to_begin
        .iter()
        .chain(&ids)
        .fold(0, |mask, capability| mask | capability.bitmask());
    privileges::keep_only(mask)?;
    set_keepcaps(true).context("prctl(PR_SET_KEEPCAPS)")?;
    let groups: Vec<libc::gid_t> = groups.iter().map(|group| group.as_raw()).collect();
    let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
    // The bare calls change the calling thread, and the log's thread has no right to follow any more; execve ends it.
    // SAFETY: numbers, and a slice of as many groups as is said, which lives.
    let done = unsafe {
        let grouped = libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr());
        Errno::result(grouped)
            .and_then(|_| Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid)))
            .and_then(|_| Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid)))
    };
    done.context("setresuid")?;
    caps::set(None, CapSet::Effective, &to_begin)?;
    caps::set(None, CapSet::Permitted, &to_begin)?;
    caps::set(None, CapSet::Inheritable, &to_begin)?;
    caps::set(None, CapSet::Ambient, &to_begin)?;
    Ok(())
}

/// Lets the user say how many huge pages the kernel may make, if that is root's to say. Says whether it did.
fn give_surplus_limit(user: &User) -> bool {
    let roots = fs::metadata(SURPLUS_LIMIT).is_ok_and(|found| found.uid() == 0);
    roots && chown(SURPLUS_LIMIT, Some(user.uid.as_raw()), None).is_ok()
}

/// Starts the cleaner; gives the pipe whose closing it waits for, which stays open over execve, and its pid.
fn start_cleaner(
    socket: Option<&Path>,
    pins: Option<&Path>,
    limit_of: Option<&User>,
) -> anyhow::Result<(RawFd, u32)> {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("lifl-daemon").arg(CLEANER);
    for (what, path) in [("socket", socket), ("pins", pins)] {
        if let Some(path) = path {
            let path = std::path::absolute(path).with_context(|| path.display().to_string())?;
            command.arg(what).arg(path);
        }
    }
    if let Some(user) = limit_of {
        command.arg("limit").arg(user.uid.to_string());
    }
    // In a process group of its own: Ctrl-C is for the daemon.
    command.env_clear().process_group(0);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command
        .spawn()
        .context("the process that cleans up cannot be started")?;
    let pipe = child.stdin.take().context("no pipe")?;
    // Out of the way of what is handed over, and without close-on-exec.
    let kept = fcntl(&pipe, FcntlArg::F_DUPFD(FIRST_HANDED + 7)).context("fcntl(F_DUPFD)")?;
    Ok((kept, child.id()))
}

/// The path of the socket that was made for this daemon, if root's made one.
pub(crate) fn socket() -> Option<PathBuf> {
    std::env::var_os(CLEANER_VARIABLE)?;
    std::env::var_os(SOCKET_VARIABLE).map(PathBuf::from)
}

/// Waits until the cleaner has done its work, if this daemon has one. To be called when nothing of the daemon is left.
pub(crate) fn clean_up() {
    let Ok(cleaner) = std::env::var(CLEANER_VARIABLE) else {
        return;
    };
    let numbers: Vec<i32> = cleaner
        .split(' ')
        .filter_map(|number| number.parse().ok())
        .collect();
    if let [pipe, pid] = numbers[..] {
        // SAFETY: the number that `start_cleaner` has kept for this, of which nobody else knows.
        unsafe { libc::close(pipe) };
        let _ = waitpid(Pid::from_raw(pid), None);
    }
}

/// What the cleaner does, if this process is it.
pub(crate) fn cleaner() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != CLEANER {
        return None;
    }
    for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: no handler runs.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
    let _ = privileges::no_more();
    let _ = privileges::keep_only(Capability::CAP_CHOWN.bitmask());
    let told: Vec<OsString> = arguments.collect();
    let of = |what: &str| {
        let pair = told.chunks_exact(2).find(|pair| pair[0] == what);
        pair.map(|pair| pair[1].clone())
    };
    let (socket, pins) = (of("socket"), of("pins"));
    let identity = |path: &OsString| {
        let found = fs::symlink_metadata(path).ok()?;
        found.file_type().is_socket().then(|| (found.dev(), found.ino()))
    };
    let made = socket.as_ref().and_then(identity);
    // Nobody writes: this ends when the daemon has.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    if let Some(socket) = socket.filter(|socket| made.is_some() && identity(socket) == made) {
        let _ = fs::remove_file(socket);
    }
    if let Some(pins) = pins {
        // If jobs go on without a daemon, it is not empty, and stays.
        let _ = fs::remove_dir(pins);
    }
    let uid = of("limit").and_then(|uid| uid.to_str()?.parse::<u32>().ok());
    if let Some(uid) = uid
        && fs::metadata(SURPLUS_LIMIT).is_ok_and(|found| found.uid() == uid)
    {
        let _ = chown(SURPLUS_LIMIT, Some(0), None);
    }
    Some(ExitCode::SUCCESS)
}
