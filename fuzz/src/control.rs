//! Control packets: requests as the daemon reads them, answers and events as its clients do.

use std::fmt::Debug;
use std::os::fd::{AsRawFd, OwnedFd};

use lifl_common::control::packet::{MAX_BYTES, PacketError, PacketSocket};
use lifl_common::control::{ErrorCode, Event, Message, Reply, Request};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::input::runtime;

/// The bytes are one packet. What is read from it is sent on and read again as the same; what is not can be answered.
pub fn control_packet(data: &[u8]) {
    runtime().block_on(async {
        packet::<Request>(data).await;
        packet::<Message>(data).await;
        packet::<Reply>(data).await;
        packet::<Event>(data).await;
    });
}

async fn packet<T>(data: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let (theirs, ours) = pair();
    if send(theirs.as_raw_fd(), data, MsgFlags::MSG_NOSIGNAL).is_err() {
        // Longer than a socket's buffer.
        return;
    }
    match ours.recv::<T>().await {
        Ok(None) => assert!(data.is_empty(), "a packet was taken for the connection's end"),
        Ok(Some((message, fds))) => {
            assert!(fds.is_empty() && data.len() <= MAX_BYTES);
            // JSON can be shorter than serde_json writes it: fields may be left out, for one.
            comes_back(&message).await;
        }
        Err(error) => {
            assert!(!matches!(error, PacketError::Io(_)), "{error}");
            assert_eq!(matches!(error, PacketError::TooLong), data.len() > MAX_BYTES);
            let answer = Message::Reply(Reply::Error {
                code: ErrorCode::BadPacket,
                message: error.told(),
            });
            assert!(comes_back(&answer).await, "whoever sent this cannot be told so");
        }
    }
}

/// A message that is sent is read as the one that it was. Says whether it is short enough to be sent.
async fn comes_back<T>(message: &T) -> bool
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let (theirs, ours) = pair();
    let theirs = PacketSocket::new(theirs).expect("an end that can be watched");
    match theirs.send(message, &[]).await {
        Ok(()) => {
            let (again, _) = ours
                .recv::<T>()
                .await
                .expect("a packet of ours")
                .expect("not the end");
            assert_eq!(&again, message);
            true
        }
        Err(PacketError::TooLong) => false,
        Err(error) => panic!("not sent: {error}"),
    }
}

/// Both ends of a control connection.
fn pair() -> (OwnedFd, PacketSocket) {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (theirs, ours) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair of sockets");
    (
        theirs,
        PacketSocket::new(ours).expect("an end that can be watched"),
    )
}
