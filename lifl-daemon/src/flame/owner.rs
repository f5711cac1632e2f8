//! Who is at the other end of a loopback connection, and which of a process's descriptors is what: asked of the kernel,
//! never of the caller.

use std::fs;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat};

use crate::errands::Foreign;
use crate::plane::support;
use crate::sock_diag::SocketTable;

/// A socket, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    /// Whose it is; `None` if the kernel has forgotten, which it may once the socket is closed.
    pub(super) uid: Option<u32>,
    /// Its number in the file system of sockets, 0 if no process has it open.
    pub(super) inode: u32,
}

/// A process, as `/proc` describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Whose it is: its effective user.
    pub(super) uid: u32,
    /// Its name, for people.
    pub(super) name: String,
    /// When it started, in clock ticks since boot: with the pid, it tells a process from its successor.
    pub(super) started: u64,
}

/// What a descriptor of a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Descriptor {
    Socket { inode: u32 },
    Other,
    Missing,
}

/// `TCP_FIN_WAIT2` and `TCP_TIME_WAIT` in `include/net/tcp_states.h`: of a closed socket in these states the kernel keeps
/// little more than the addresses.
const FORGOTTEN: [u8; 2] = [5, 6];

/// The first kernel that was seen to show whose a closed socket was for as long as it keeps all of it, which is until the
/// far end has acknowledged. Older ones may show user 0 instead.
const KEEPS_USERS: (u32, u32) = (6, 18);

/// The socket at that end of a TCP connection of this machine; `None` if there is none any more.
pub(super) fn owner(
    sockets: &SocketTable,
    local: SocketAddrV4,
    remote: SocketAddrV4,
) -> io::Result<Option<Owner>> {
    let Some(found) = sockets.at(local, remote)? else {
        return Ok(None);
    };
    let open = found.inode != 0;
    let known = open || keeps_users() && !FORGOTTEN.contains(&found.state);
    Ok(Some(Owner {
        uid: known.then_some(found.uid),
        inode: found.inode,
    }))
}

fn keeps_users() -> bool {
    static KEEPS: LazyLock<bool> =
        LazyLock::new(|| support::kernel().is_some_and(|(_, version)| version >= KEEPS_USERS));
    *KEEPS
}

/// The process of that number, if there is one.
pub(super) fn process(pid: u32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
    let uid = field("Uid:")?.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may contain anything; after it comes the third field, and the 22nd is the start.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let started = after_name.split_ascii_whitespace().nth(22 - 3)?.parse().ok()?;
    Some(Process {
        pid,
        uid,
        name: field("Name:")?
            .trim()
            .chars()
            .filter(|c| !c.is_control())
            .collect(),
        started,
    })
}

/// What a process has under that number.
pub(super) fn descriptor(pid: u32, fd: u32) -> Descriptor {
    let link = match fs::read_link(format!("/proc/{pid}/fd/{fd}")) {
        Ok(link) => link,
        // The folder is its user's alone: CAP_DAC_READ_SEARCH would open it. What takes the descriptor later can tell as
        // well, and asks for CAP_SYS_PTRACE only.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let uid = process(pid).map_or(u32::MAX, |process| process.uid);
            let copy = duplicate(pid, fd).map(|copy| Foreign::new(uid, copy));
            return copy.map_or(Descriptor::Missing, |copy| what_is(copy.as_fd()));
        }
        Err(_) => return Descriptor::Missing,
    };
    let inode = link
        .to_str()
        .and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
    inode.map_or(Descriptor::Other, |inode| Descriptor::Socket { inode })
}

/// What a descriptor is. Of what is no socket nothing more is asked: the server of a file could take its time to answer.
pub(super) fn what_is(descriptor: BorrowedFd<'_>) -> Descriptor {
    if getsockopt(&descriptor, sockopt::SockType).is_err() {
        return Descriptor::Other;
    }
    let Ok(stat) = fstat(descriptor) else {
        return Descriptor::Missing;
    };
    let is_socket = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK;
    let inode = u32::try_from(stat.st_ino).ok().filter(|_| is_socket);
    inode.map_or(Descriptor::Other, |inode| Descriptor::Socket { inode })
}

/// A duplicate of another process's descriptor.
///
/// # Errors
/// `EPERM` without the right to trace that process, `ESRCH` and `EBADF` if either is gone.
pub(super) fn duplicate(pid: u32, fd: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers and makes a descriptor or fails.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let pidfd = owned(pidfd)?;
    // SAFETY: as above; the pidfd is open.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(copy)
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for this call; nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testing::{Pair, pair};

    #[test]
    fn the_other_end_is_found_by_its_addresses_and_has_the_inode_of_its_descriptor() {
        let Pair {
            near,
            far: _far,
            local,
            remote,
        } = pair();
        let table = SocketTable::open().expect("a socket");
        let owner = owner(&table, local, remote).expect("asked").expect("found");
        let uid = nix::unistd::geteuid().as_raw();
        assert_eq!(owner.uid, Some(uid));
        let (pid, fd) = (std::process::id(), near.as_raw_fd() as u32);
        assert_eq!(descriptor(pid, fd), Descriptor::Socket { inode: owner.inode });
        assert_eq!(descriptor(pid, 9999), Descriptor::Missing);
        let copy = duplicate(pid, fd).expect("one's own");
        assert_eq!(what_is(copy.as_fd()), Descriptor::Socket { inode: owner.inode });
        let file = fs::File::open("/dev/null").expect("open");
        assert_eq!(what_is(file.as_fd()), Descriptor::Other);
    }

    #[test]
    fn a_process_is_known_by_user_name_and_start() {
        let own = process(std::process::id()).expect("this process");
        assert_eq!(own.uid, nix::unistd::geteuid().as_raw());
        assert!(own.started > 0 && !own.name.is_empty(), "{own:?}");
        assert_eq!(process(u32::MAX), None);
    }
}
