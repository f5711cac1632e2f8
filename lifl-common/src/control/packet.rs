//! Packets on a `SOCK_SEQPACKET` Unix socket, with descriptors beside them.

use std::error::Error;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

use crate::watch::watch;

/// The longest packet.
pub const MAX_BYTES: usize = 64 << 10;

/// The most descriptors that a request takes: a worker that comes back brings its socket and up to four arenas.
pub const MAX_FDS: usize = 8;

/// The most descriptors that the kernel passes beside a packet (`include/net/scm.h`).
const SCM_MAX_FD: usize = 253;

/// `SCM_PIDFD` in `include/linux/socket.h`: a descriptor too, where somebody has asked for it.
const SCM_PIDFD: libc::c_int = 4;

/// Room for all that the kernel may put beside a packet: the descriptors, and credentials, a pidfd and a security label where
/// a socket that was handed over asks for them.
const CONTROL_BYTES: usize = 8 << 10;

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("the control socket failed")]
    Io(#[from] io::Error),
    /// The packet was longer than [`MAX_BYTES`]; its end is lost.
    #[error("a packet of more than {MAX_BYTES} bytes")]
    TooLong,
    /// More descriptors than anybody needs.
    #[error("more than {MAX_FDS} descriptors beside a packet")]
    TooManyFds,
    /// This process may have no descriptor more.
    #[error("this process has no descriptor left for those beside a packet")]
    NoDescriptors,
    /// Not the JSON that belongs here.
    #[error("not a control message")]
    Syntax(#[from] serde_json::Error),
}

/// The longest [`PacketError::told`]. However it is escaped it fits into a packet.
const TOLD_BYTES: usize = 1024;

impl PacketError {
    /// In words for whoever sent the packet, with the cause. What they sent may be quoted in it, so it is cut: it must go
    /// into a packet itself, and into a line of a log.
    pub fn told(&self) -> String {
        let mut told = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            told.push_str(&format!(": {error}"));
            cause = error.source();
        }
        if told.len() > TOLD_BYTES {
            let mut end = TOLD_BYTES;
            while !told.is_char_boundary(end) {
                end -= 1;
            }
            told.truncate(end);
            told.push('…');
        }
        told
    }
}

/// One end of a control connection.
#[derive(Debug)]
pub struct PacketSocket {
    fd: AsyncFd<OwnedFd>,
}

impl PacketSocket {
    /// Takes a connected, non-blocking `SOCK_SEQPACKET` socket.
    ///
    /// # Errors
    /// If it cannot be watched; outside of a tokio runtime it panics.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { fd: watch(fd)? })
    }

    /// Connects to a daemon's socket.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` if no daemon listens there, `PermissionDenied` if this user may not, `WouldBlock` if
    /// as many wait for that daemon as may.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::new(fd)
    }

    /// Both ends of a connection of this process with itself.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self::new(near)?, Self::new(far)?))
    }

    /// Sends a message with descriptors beside it; they stay the caller's.
    ///
    /// # Errors
    /// If the other end is gone, or the message is longer than [`MAX_BYTES`].
    pub async fn send<T: Serialize>(&self, message: &T, fds: &[RawFd]) -> Result<(), PacketError> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_BYTES {
            return Err(PacketError::TooLong);
        }
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        drop(bytes);
        loop {
            let mut ready = self.fd.writable().await?;
            // Anew each time: what waits for room, for many who do not read, is not kept in two forms.
            let bytes = serde_json::to_vec(message)?;
            let sent = ready.try_io(|fd| {
                sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None)
                    .map_err(io::Error::from)
            });
            match sent {
                Ok(sent) => return Ok(sent.map(drop)?),
                Err(_would_block) => continue,
            }
        }
    }

    /// Waits for the next packet; `None` when the other end is closed. Cancel-safe: a packet is read whole or not.
    ///
    /// # Errors
    /// If the socket fails or the packet is not a `T`; the descriptors beside such a packet are closed.
    pub async fn recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, PacketError> {
        let packet = self.recv_packet().await?;
        if packet.is_end() {
            return Ok(None);
        }
        Ok(Some((packet.message()?, packet.fds)))
    }

    /// Waits for the next packet, whatever is in it and beside it. Cancel-safe: a packet is read whole or not.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn recv_packet(&self) -> io::Result<Packet> {
        loop {
            let mut ready = self.fd.readable().await?;
            let Ok(received) = ready.try_io(|fd| receive(fd.as_fd())) else {
                continue;
            };
            return received;
        }
    }

    /// Waits until there is something to read, or the other end is closed.
    ///
    /// # Errors
    /// If the socket fails.
    pub async fn readable(&self) -> io::Result<()> {
        self.fd.readable().await.map(drop)
    }

    /// The next packet, if there is one already.
    ///
    /// # Errors
    /// `WouldBlock` if there is none, and if the socket fails.
    pub fn try_recv_packet(&self) -> io::Result<Packet> {
        self.fd
            .try_io(tokio::io::Interest::READABLE, |fd| receive(fd.as_fd()))
    }

    /// The socket itself, for its credentials.
    pub fn get_ref(&self) -> &OwnedFd {
        self.fd.get_ref()
    }

    /// The socket itself, for whoever sees to its end.
    pub fn into_inner(self) -> OwnedFd {
        self.fd.into_inner()
    }
}

/// A packet as it came, with every descriptor that the kernel put beside it.
#[derive(Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    /// The descriptors, however many they are.
    pub fds: Vec<OwnedFd>,
    flags: libc::c_int,
}

impl Packet {
    /// Whether the other end is closed. (An empty packet looks the same, and nobody has a use for one.)
    pub fn is_end(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The message in it.
    ///
    /// # Errors
    /// If it was cut, has more than [`MAX_FDS`] descriptors beside it, or is not a `T`.
    pub fn message<T: DeserializeOwned>(&self) -> Result<T, PacketError> {
        if self.fds.len() > MAX_FDS {
            return Err(PacketError::TooManyFds);
        }
        if self.flags & libc::MSG_CTRUNC != 0 {
            // There was room for all that the kernel passes: it could not give this process their numbers.
            return Err(PacketError::NoDescriptors);
        }
        if self.flags & libc::MSG_TRUNC != 0 {
            return Err(PacketError::TooLong);
        }
        Ok(serde_json::from_slice(&self.bytes)?)
    }
}

/// What one `recvmsg` gave.
#[derive(Debug)]
pub struct Received {
    /// Bytes that were read.
    pub length: usize,
    /// Descriptors that came beside them: all that the kernel has installed in this process.
    pub fds: Vec<OwnedFd>,
    /// `msg_flags`.
    pub flags: libc::c_int,
}

fn receive(fd: BorrowedFd<'_>) -> io::Result<Packet> {
    let mut bytes = vec![0_u8; MAX_BYTES];
    let Received { length, fds, flags } = recv_whole(fd, &mut bytes)?;
    bytes.truncate(length);
    bytes.shrink_to_fit();
    Ok(Packet { bytes, fds, flags })
}

/// One `recvmsg`, for a packet; an end that was a reset is an end like any other.
fn recv_whole(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Received> {
    match recv_with_fds(fd, bytes) {
        // Whoever left with unread packets leaves a reset. It is told once, and before what was said last, which may be why.
        Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => recv_with_fds(fd, bytes),
        received => received,
    }
}

/// One `recvmsg` that does not wait. Whatever its flags say, every descriptor that the kernel has installed in this process is
/// in the result: nothing else would ever close it.
///
/// # Errors
/// What `recvmsg(2)` answers.
pub fn recv_with_fds(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Received> {
    /// Aligned as the kernel's headers are.
    #[repr(C, align(8))]
    struct Control([u8; CONTROL_BYTES]);

    let mut control = Control([0; CONTROL_BYTES]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: `msghdr` is plain numbers and pointers, for all of which zero is a value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = (&raw mut control).cast();
    header.msg_controllen = CONTROL_BYTES as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to `bytes` and to `control`, both of which outlive the call and are as long as it says.
    let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    let Ok(length) = usize::try_from(length) else {
        return Err(io::Error::last_os_error());
    };
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled in the header, whose control bytes are still there. `CMSG_NXTHDR` stays within
    // `msg_controllen`, which the kernel has set to what it wrote.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !next.is_null() {
        // SAFETY: not null, so a whole message header within `control`, which is aligned for it.
        let message = unsafe { &*next };
        let kind = (message.cmsg_level, message.cmsg_type);
        if kind == (libc::SOL_SOCKET, libc::SCM_RIGHTS) || kind == (libc::SOL_SOCKET, SCM_PIDFD) {
            // SAFETY: takes a number and gives the length of a header.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (message.cmsg_len as usize).saturating_sub(empty) / size_of::<RawFd>();
            // SAFETY: as for the header.
            let numbers = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for n in 0..count.min(SCM_MAX_FD) {
                // SAFETY: the message has `count` numbers behind its header. Each is a descriptor that the kernel has just
                // installed in this process for this call; nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(numbers.add(n).read_unaligned()) });
            }
        }
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    Ok(Received {
        length,
        fds,
        flags: header.msg_flags,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ErrorCode, Message, Reply, Request};

    /// Descriptors that nobody is given would stay open for good. The read end of a pipe tells when the last is closed.
    #[tokio::test]
    async fn every_descriptor_is_handed_out_however_many_they_are_and_whatever_is_beside_them() {
        use nix::sys::socket::{setsockopt, sockopt};

        for credentials in [false, true] {
            for beside in [&[1][..], &[8], &[9], &[252], &[253], &[1, 8], &[100, 100, 53]] {
                let (near, far) = PacketSocket::pair().expect("a pair");
                setsockopt(far.get_ref(), sockopt::PassCred, &credentials).expect("set");
                let (reader, writer) = nix::unistd::pipe().expect("a pipe");
                let all: Vec<Vec<RawFd>> = beside.iter().map(|&n| vec![writer.as_raw_fd(); n]).collect();
                let messages: Vec<_> = all.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
                let sent = sendmsg::<()>(
                    near.get_ref().as_raw_fd(),
                    &[IoSlice::new(b"{}")],
                    &messages,
                    MsgFlags::empty(),
                    None,
                );
                assert_eq!(sent, Ok(2), "{beside:?}");
                drop(writer);
                let packet = far.recv_packet().await.expect("a packet");
                let count: usize = beside.iter().sum();
                assert_eq!(packet.fds.len(), count, "{beside:?}");
                let message = packet.message::<serde_json::Value>();
                assert_eq!(message.is_ok(), count <= MAX_FDS, "{beside:?}");
                drop(packet);
                let mut polled = [nix::poll::PollFd::new(
                    reader.as_fd(),
                    nix::poll::PollFlags::POLLIN,
                )];
                nix::poll::poll(&mut polled, nix::poll::PollTimeout::ZERO).expect("polled");
                assert_eq!(nix::unistd::read(&reader, &mut [0; 1]), Ok(0), "{beside:?}");
            }
        }
    }

    #[test]
    fn what_is_told_of_a_packet_fits_into_one_whatever_was_in_it() {
        // An unknown name is quoted in the error; each of these characters is six bytes of JSON.
        for character in ["x", "\\u0001", "é"] {
            let name = character.repeat((MAX_BYTES - 20) / character.len());
            let packet = format!(r#"{{"request":"{name}"}}"#);
            assert!(packet.len() <= MAX_BYTES);
            let error = serde_json::from_str::<Request>(&packet).expect_err("no such request");
            let message = PacketError::from(error).told();
            assert!(
                message.starts_with("not a control message: unknown variant"),
                "{message}"
            );
            let answer = Message::Reply(Reply::Error {
                code: ErrorCode::BadPacket,
                message,
            });
            assert!(serde_json::to_vec(&answer).expect("JSON").len() <= MAX_BYTES);
        }
    }
}
