//! The kernel's table of TCP sockets (`sock_diag(7)`): whose a socket is, and what waits in it.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A socket, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// A number of `include/net/tcp_states.h`.
    pub(crate) state: u8,
    /// Whose it is; of a closed socket the kernel may have forgotten that.
    pub(crate) uid: u32,
    /// Its number in the file system of sockets, 0 if no process has it open.
    pub(crate) inode: u32,
    /// Bytes that have come on its connection and that nobody has read.
    pub(crate) receive_queue_bytes: u32,
    /// Bytes that are charged to its receiving side. What a redirect put into its queue is among them, byte for byte, until it is
    /// read.
    pub(crate) receive_charged_bytes: Option<u32>,
}

/// `struct nlmsghdr` and `struct inet_diag_req_v2` (`include/uapi/linux/{netlink,inet_diag}.h`).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DiagRequest {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: DiagSocket,
}

/// `struct inet_diag_sockid`: ports and addresses in network byte order.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DiagSocket {
    local_port: [u8; 2],
    remote_port: [u8; 2],
    local: [u8; 16],
    remote: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct nlmsghdr` and `struct inet_diag_msg`.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DiagReply {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: DiagSocket,
    expires: u32,
    receive_queue: u32,
    send_queue: u32,
    uid: u32,
    inode: u32,
}

/// `struct nlattr`, behind a reply.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Attribute {
    /// With this header.
    bytes: u16,
    kind: u16,
}

const _: () = assert!(size_of::<DiagRequest>() == 16 + 56);
const _: () = assert!(size_of::<DiagReply>() == 16 + 72);

/// `SOCK_DIAG_BY_FAMILY` in `include/uapi/linux/sock_diag.h`.
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// `INET_DIAG_SKMEMINFO` in `include/uapi/linux/inet_diag.h`: numbers of four bytes, of which `SK_MEMINFO_RMEM_ALLOC` is the first.
const SKMEMINFO: u16 = 7;

/// The kernel's table of sockets. Kept open, so that a process without a descriptor to spare can still look there.
#[derive(Debug)]
pub(crate) struct SocketTable(OwnedFd);

impl SocketTable {
    pub(crate) fn open() -> io::Result<Self> {
        let netlink = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        Ok(Self(netlink))
    }

    /// The socket at that end of a TCP connection of this machine; `None` if there is none any more.
    pub(crate) fn at(&self, local: SocketAddrV4, remote: SocketAddrV4) -> io::Result<Option<Found>> {
        let request = request(local, remote);
        // The kernel answers before `send` returns.
        send(self.0.as_raw_fd(), request.as_bytes(), MsgFlags::empty())?;
        let mut answer = [0; 512];
        let length = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
        Ok(found(&request, &answer[..length]))
    }
}

fn request(local: SocketAddrV4, remote: SocketAddrV4) -> DiagRequest {
    let address = |ip: &std::net::Ipv4Addr| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&ip.octets());
        bytes
    };
    DiagRequest {
        length: size_of::<DiagRequest>() as u32,
        kind: SOCK_DIAG_BY_FAMILY,
        flags: libc::NLM_F_REQUEST as u16,
        sequence: 1,
        port: 0,
        family: libc::AF_INET as u8,
        protocol: libc::IPPROTO_TCP as u8,
        extensions: 1 << (SKMEMINFO - 1),
        pad: 0,
        states: u32::MAX,
        id: DiagSocket {
            local_port: local.port().to_be_bytes(),
            remote_port: remote.port().to_be_bytes(),
            local: address(local.ip()),
            remote: address(remote.ip()),
            interface: 0,
            cookie: [u32::MAX; 2],
        },
    }
}

fn found(request: &DiagRequest, answer: &[u8]) -> Option<Found> {
    let (reply, attributes) = DiagReply::read_from_prefix(answer).ok()?;
    // Where there is no such connection, the kernel shows who listens at the address, or NLMSG_ERROR.
    if reply.kind != SOCK_DIAG_BY_FAMILY || reply.id.remote_port != request.id.remote_port {
        return None;
    }
    Some(Found {
        state: reply.state,
        uid: reply.uid,
        inode: reply.inode,
        receive_queue_bytes: reply.receive_queue,
        receive_charged_bytes: charged(attributes),
    })
}

/// The first number of the attribute that has a socket's memory.
fn charged(mut attributes: &[u8]) -> Option<u32> {
    while let Ok((attribute, rest)) = Attribute::read_from_prefix(attributes) {
        if attribute.kind == SKMEMINFO {
            return u32::read_from_prefix(rest).ok().map(|(bytes, _)| bytes);
        }
        let next = usize::from(attribute.bytes).next_multiple_of(4);
        attributes = attributes.get(next.max(size_of::<Attribute>())..)?;
    }
    None
}

/// Connections for tests.
#[cfg(test)]
pub(crate) mod testing {
    use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};

    /// A connection of this process with itself, on the loopback.
    pub(crate) struct Pair {
        pub(crate) near: TcpStream,
        pub(crate) far: TcpStream,
        /// The near end's address, and the far end's.
        pub(crate) local: SocketAddrV4,
        pub(crate) remote: SocketAddrV4,
    }

    pub(crate) fn pair() -> Pair {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (far, _) = listener.accept().expect("accepted");
        let local = v4(near.local_addr().expect("bound"));
        let remote = v4(near.peer_addr().expect("connected"));
        Pair {
            near,
            far,
            local,
            remote,
        }
    }

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        match address {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => panic!("{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::testing::{Pair, pair};
    use super::*;

    #[test]
    fn a_socket_is_found_with_what_waits_in_it() {
        let Pair {
            near: _near,
            mut far,
            local,
            remote,
        } = pair();
        let table = SocketTable::open().expect("a socket");
        let empty = table.at(local, remote).expect("asked").expect("found");
        assert_eq!(
            (empty.uid, empty.receive_queue_bytes, empty.receive_charged_bytes),
            (nix::unistd::geteuid().as_raw(), 0, Some(0))
        );
        far.write_all(&[0; 1000]).expect("written");
        let full = table.at(local, remote).expect("asked").expect("found");
        assert_eq!(full.receive_queue_bytes, 1000);
        assert!(full.receive_charged_bytes >= Some(1000), "{full:?}");
        let elsewhere = SocketAddrV4::new(*local.ip(), local.port() ^ 1);
        assert_eq!(table.at(elsewhere, remote).expect("asked"), None);
    }

    #[test]
    fn attributes_are_walked_whatever_their_lengths() {
        let attribute = |bytes: u16, kind: u16, content: &[u8]| {
            [&bytes.to_ne_bytes()[..], &kind.to_ne_bytes(), content].concat()
        };
        let first = attribute(5, 8, &[1, 0, 0, 0]);
        let memory = attribute(
            12,
            SKMEMINFO,
            &[77_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat(),
        );
        assert_eq!(charged(&[first.clone(), memory.clone()].concat()), Some(77));
        assert_eq!(charged(&first), None);
        assert_eq!(charged(&attribute(0, 8, &[])), None);
        assert_eq!(charged(&attribute(u16::MAX, 8, &memory)), None);
        assert_eq!(charged(&memory[..6]), None);
    }
}
