//! Packets on a `SOCK_SEQPACKET` Unix socket, with descriptors beside them.

use std::error::Error;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    recvmsg, sendmsg, socket,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

use crate::watch::watch;

/// The longest packet.
pub const MAX_BYTES: usize = 64 << 10;

/// The most descriptors beside a packet: a worker that comes back brings its socket and up to four arenas.
const MAX_FDS: usize = 8;

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("the control socket failed")]
    Io(#[from] io::Error),
    /// The packet was longer than [`MAX_BYTES`]; its end is lost.
    #[error("a packet of more than {MAX_BYTES} bytes")]
    TooLong,
    /// More descriptors than anybody needs; all were closed.
    #[error("more than {MAX_FDS} descriptors beside a packet")]
    TooManyFds,
    /// This process may have no descriptor more: those beside the packet were closed.
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
        loop {
            let mut ready = self.fd.writable().await?;
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
        loop {
            let mut ready = self.fd.readable().await?;
            // Not before: a worker waits here beside whatever else it waits for, and begins anew each time.
            let mut bytes = vec![0_u8; MAX_BYTES];
            let Ok(received) = ready.try_io(|fd| recv_packet(fd.as_raw_fd(), &mut bytes)) else {
                continue;
            };
            let (length, fds) = received??;
            if length == 0 {
                return Ok(None);
            }
            return Ok(Some((serde_json::from_slice(&bytes[..length])?, fds)));
        }
    }

    /// The socket itself, for its credentials.
    pub fn get_ref(&self) -> &OwnedFd {
        self.fd.get_ref()
    }
}

type Received = Result<(usize, Vec<OwnedFd>), PacketError>;

/// One `recvmsg`; the outer error is for "would block" and other failures of the call.
fn recv_packet(fd: RawFd, bytes: &mut [u8]) -> io::Result<Received> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = match recvmsg::<()>(fd, &mut iov, Some(&mut space), flags) {
        Ok(received) => received,
        // Whoever left with unread packets leaves a reset, which is an end like any other. It is told once, and before
        // what was said last, which may be why.
        Err(Errno::ECONNRESET) => recvmsg::<()>(fd, &mut iov, Some(&mut space), flags)?,
        Err(errno) => return Err(errno.into()),
    };
    let mut fds = Vec::new();
    let mut cut = received.flags.contains(MsgFlags::MSG_CTRUNC);
    match received.cmsgs() {
        Ok(messages) => {
            for message in messages {
                if let ControlMessageOwned::ScmRights(rights) = message {
                    // SAFETY: the kernel has just installed these descriptors in this process for this message;
                    // nobody else knows their numbers.
                    fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
        }
        Err(_) => cut = true,
    }
    if cut {
        // The kernel cuts where the space for them ends, or where this process may have no more.
        let full = fds.len() >= MAX_FDS;
        return Ok(Err(if full {
            PacketError::TooManyFds
        } else {
            PacketError::NoDescriptors
        }));
    }
    if received.flags.contains(MsgFlags::MSG_TRUNC) {
        return Ok(Err(PacketError::TooLong));
    }
    Ok(Ok((received.bytes, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ErrorCode, Message, Reply, Request};

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
