//! Checks a descriptor that a worker passed, before it becomes that worker's identity on a plane.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd};

use lifl_common::kernel::Connection;
use nix::errno::Errno;
use nix::sys::socket::{SockaddrIn, getpeername, getsockname};
use zerocopy::{FromBytes, IntoBytes};

/// `TCP_ESTABLISHED` in `include/net/tcp_states.h`, the first byte of `struct tcp_info`.
const ESTABLISHED: u8 = 1;

/// What is wrong with a descriptor.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A file, a pipe, anything else.
    #[error("the descriptor is not a socket")]
    NotASocket,
    /// Another address family.
    #[error("the socket's address family is {found}, this plane needs {needed}")]
    Family {
        /// What it is, as a number of `socket(2)`.
        found: i32,
        /// What it should be.
        needed: &'static str,
    },
    /// Datagrams, say.
    #[error("the socket's type is {found}, this plane needs SOCK_STREAM (1)")]
    Type {
        /// What it is, as a number of `socket(2)`.
        found: i32,
    },
    /// A stream of another kind, which the kernel does not put into a sockmap.
    #[error("the socket's protocol is {found}, this plane needs IPPROTO_TCP (6)")]
    Protocol {
        /// What it is, as a number of `socket(2)`.
        found: i32,
    },
    /// Listening, unconnected, or closing.
    #[error("the socket is not connected (TCP state {state}, not ESTABLISHED)")]
    NotEstablished {
        /// The state's number in `include/net/tcp_states.h`.
        state: u8,
    },
    /// Without a peer.
    #[error("the socket is not connected")]
    NotConnected,
    /// Its bytes could leave the machine.
    #[error("the socket connects {local} with {remote}, and not 127.0.0.1 with itself")]
    NotLoopback {
        /// Its own address.
        local: Ipv4Addr,
        /// Its peer's.
        remote: Ipv4Addr,
    },
    /// Connections are told apart within one network namespace only.
    #[error(
        "the socket is of another network namespace than the daemon's: use the relay plane across containers"
    )]
    OtherNetns,
    /// The kernel does not say.
    #[error("{call} failed")]
    Syscall {
        /// The call with its argument.
        call: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// The network namespace that this process makes its sockets in: a number that the kernel gives out once.
pub(super) fn own_netns() -> Result<u64, SocketError> {
    let socket =
        std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|source| SocketError::Syscall {
            call: "bind(127.0.0.1)",
            source,
        })?;
    option(
        &socket,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        "getsockopt(SO_NETNS_COOKIE)",
    )
}

/// That a descriptor is the near end of an established TCP pair on a loopback; and which.
pub(super) fn check_tcp(fd: impl AsFd) -> Result<Found, SocketError> {
    let fd = fd.as_fd();
    check_stream(fd, libc::AF_INET, "AF_INET (2)")?;
    match option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, "getsockopt(SO_PROTOCOL)")? {
        libc::IPPROTO_TCP => {}
        found => return Err(SocketError::Protocol { found }),
    }
    let state: u8 = option(fd, libc::IPPROTO_TCP, libc::TCP_INFO, "getsockopt(TCP_INFO)")?;
    if state != ESTABLISHED {
        return Err(SocketError::NotEstablished { state });
    }
    let failed = |call| {
        move |errno: Errno| SocketError::Syscall {
            call,
            source: errno.into(),
        }
    };
    let local: SockaddrIn = getsockname(fd.as_raw_fd()).map_err(failed("getsockname"))?;
    let remote: SockaddrIn = getpeername(fd.as_raw_fd()).map_err(failed("getpeername"))?;
    let (local, remote) = (SocketAddrV4::from(local), SocketAddrV4::from(remote));
    if !(local.ip().is_loopback() && remote.ip().is_loopback()) {
        return Err(SocketError::NotLoopback {
            local: *local.ip(),
            remote: *remote.ip(),
        });
    }
    let netns = option(
        fd,
        libc::SOL_SOCKET,
        libc::SO_NETNS_COOKIE,
        "getsockopt(SO_NETNS_COOKIE)",
    )?;
    Ok(Found {
        connection: connection(local, remote),
        netns,
    })
}

/// An established TCP pair on a loopback, and of which network namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    connection: Connection,
    netns: u64,
}

impl Found {
    /// Its own end, and the far one.
    pub(super) fn addresses(&self) -> (SocketAddrV4, SocketAddrV4) {
        addresses(&self.connection)
    }

    /// The connection, if it is of that namespace.
    pub(super) fn within(&self, netns: u64) -> Result<Connection, SocketError> {
        if self.netns == netns {
            return Ok(self.connection);
        }
        Err(SocketError::OtherNetns)
    }
}

/// The connection of a socket that this process has made itself.
pub(crate) fn own_connection(fd: impl AsFd) -> Result<Connection, SocketError> {
    Ok(check_tcp(fd)?.connection)
}

/// That a descriptor is an end of a Unix stream pair; and its number, which the kernel gives out once.
pub(super) fn check_unix(fd: impl AsFd) -> Result<u64, SocketError> {
    let fd = fd.as_fd();
    check_stream(fd, libc::AF_UNIX, "AF_UNIX (1)")?;
    match getpeername::<nix::sys::socket::UnixAddr>(fd.as_raw_fd()) {
        Ok(_) => option(fd, libc::SOL_SOCKET, libc::SO_COOKIE, "getsockopt(SO_COOKIE)"),
        Err(Errno::ENOTCONN) => Err(SocketError::NotConnected),
        Err(errno) => Err(SocketError::Syscall {
            call: "getpeername",
            source: errno.into(),
        }),
    }
}

fn check_stream(fd: impl AsFd, family: i32, needed: &'static str) -> Result<(), SocketError> {
    let found: i32 = match option(&fd, libc::SOL_SOCKET, libc::SO_DOMAIN, "getsockopt(SO_DOMAIN)") {
        Err(SocketError::Syscall { source, .. }) if source.raw_os_error() == Some(libc::ENOTSOCK) => {
            return Err(SocketError::NotASocket);
        }
        other => other?,
    };
    if found != family {
        return Err(SocketError::Family { found, needed });
    }
    match option(&fd, libc::SOL_SOCKET, libc::SO_TYPE, "getsockopt(SO_TYPE)")? {
        libc::SOCK_STREAM => Ok(()),
        found => Err(SocketError::Type { found }),
    }
}

/// The connection as `struct sk_msg_md` shows it to the program.
pub(crate) fn connection(local: SocketAddrV4, remote: SocketAddrV4) -> Connection {
    Connection {
        local_ip4: u32::from(*local.ip()).to_be(),
        remote_ip4: u32::from(*remote.ip()).to_be(),
        local_port: u32::from(local.port()),
        remote_port: u32::from(remote.port()).to_be(),
    }
}

/// A connection's own end and its far end.
pub(super) fn addresses(connection: &Connection) -> (SocketAddrV4, SocketAddrV4) {
    let ip = |ip4: u32| Ipv4Addr::from(u32::from_be(ip4));
    // Ports are 16 bits wide, in 32.
    let local = connection.local_port as u16;
    let remote = u32::from_be(connection.remote_port) as u16;
    (
        SocketAddrV4::new(ip(connection.local_ip4), local),
        SocketAddrV4::new(ip(connection.remote_ip4), remote),
    )
}

/// One socket option, or its first bytes.
fn option<T: FromBytes + IntoBytes>(
    fd: impl AsFd,
    level: i32,
    name: i32,
    call: &'static str,
) -> Result<T, SocketError> {
    let mut value = T::new_zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `value`, which has that many, and any bytes are a `T`.
    let status = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    match status {
        0 => Ok(value),
        _ => Err(SocketError::Syscall {
            call,
            source: io::Error::last_os_error(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_has_the_byte_orders_of_sk_msg_md() {
        let at = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let connection = connection(at(0x1234), at(0x5678));
        assert_eq!(connection.local_ip4.to_ne_bytes(), [127, 0, 0, 1]);
        assert_eq!(connection.local_port, 0x1234);
        assert_eq!(connection.remote_port.to_ne_bytes(), [0, 0, 0x56, 0x78]);
        assert_eq!(addresses(&connection), (at(0x1234), at(0x5678)));
    }
}
