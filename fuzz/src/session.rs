//! Sessions: messages one by one, and what a gateway or a worker makes of whatever a TCP connection brings.

use lifl_common::session::{Broken, Buffer, Exchange, Happened, Message, Object, Room, tcp};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::input::{PATIENCE, pieces, runtime};

/// Longer objects are left waiting, as by a receiver without a place for them.
const ROOM_BYTES: u64 = 64 << 10;

/// The first byte 0: the rest is one message. Otherwise four bytes of sizes and a stream, which a connection brings in
/// pieces of those sizes.
pub fn session(data: &[u8]) {
    match data.split_first() {
        Some((0, message)) => decoded(message),
        Some((_, rest)) => {
            if let Some((sizes, stream)) = rest.split_first_chunk::<4>() {
                let pieces = pieces(sizes, stream);
                runtime().block_on(async {
                    let conversation = timeout(PATIENCE, received(&pieces, stream));
                    conversation.await.expect("the end of the stream");
                });
            }
        }
        None => {}
    }
}

/// What is read is written as it came.
fn decoded(bytes: &[u8]) {
    let Ok(message) = Message::decode(bytes) else {
        return;
    };
    assert!(!message.name().is_empty());
    let mut again = message.encode();
    if let Message::Bye { last: true, .. } = message {
        // Any number but 0 says so.
        again[1] = bytes[1];
    }
    assert_eq!(again, bytes);
}

/// What a receiver can have got whole by some place of a stream, found by the shortest way. It may be more than a
/// receiver has taken: here nobody minds a chunk that was not expected.
fn sent(mut stream: &[u8]) -> Vec<(Object, Vec<u8>)> {
    let mut coming: Vec<(Object, Vec<u8>)> = Vec::new();
    let mut whole = Vec::new();
    let mut next = || {
        let (length, rest) = stream.split_first_chunk::<4>()?;
        let (message, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        stream = rest;
        Some(message)
    };
    while let Some(message) = next() {
        if let [6, r0, r1, r2, r3, rest @ ..] = message {
            let round = u32::from_le_bytes([*r0, *r1, *r2, *r3]);
            let Some((offset, data)) = rest.split_first_chunk::<8>() else {
                break;
            };
            let offset = u64::from_le_bytes(*offset);
            let begun = |it: &&mut (Object, Vec<u8>)| it.0.round == round && offset <= it.1.len() as u64;
            if let Some(object) = coming.iter_mut().rev().find(begun) {
                object.1.truncate(offset as usize);
                object.1.extend(data);
                if object.1.len() as u64 == object.0.length {
                    whole.push(object.clone());
                }
            }
        } else {
            let Ok(message) = Message::decode(message) else {
                break;
            };
            if let Some(&object) = message.object().filter(|object| object.length <= ROOM_BYTES)
                && coming.iter().all(|known| known.0 != object)
            {
                coming.push((object, Vec::new()));
                if object.length == 0 {
                    whole.push((object, Vec::new()));
                }
            }
        }
    }
    whole
}

async fn received(pieces: &[&[u8]], stream: &[u8]) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("its address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (mut near, (far, _)) = (near.expect("connected"), far.expect("accepted"));
    near.set_nodelay(true).expect("TCP");
    // So that no port is kept for stragglers: this end closes last, and nothing of it is wanted then.
    let at_once = nix::libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&near, sockopt::Linger, &at_once).expect("SO_LINGER");

    let write = async {
        for piece in pieces {
            if near.write_all(piece).await.is_err() {
                // The other end has found a fault.
                break;
            }
        }
        // Of a connection that the other end has closed there is nothing left to end.
        let _ = near.shutdown().await;
        near
    };
    let (_near, objects) = tokio::join!(write, receive(far));
    let sent = sent(stream);
    for (object, bytes) in &objects {
        assert_eq!(bytes.len() as u64, object.length);
        let is_it = |known: &(Object, Vec<u8>)| known.0 == *object && known.1 == *bytes;
        assert!(sent.iter().any(is_it), "{object:?} is not what was sent");
    }
}

/// Takes what a connection brings, until it ends or is broken.
async fn receive(stream: TcpStream) -> Vec<(Object, Vec<u8>)> {
    let mut wire = tcp::wire(stream).expect("a connection");
    let mut exchange = Exchange::default();
    let mut objects = Vec::new();
    loop {
        match exchange.next(&mut wire).await {
            Ok(Happened::Offered(header)) => {
                let object = *header.object().expect("a header");
                if object.length <= ROOM_BYTES {
                    let room = Room::Private(Buffer::new(object.length as usize));
                    exchange.accept(&mut wire, object, room);
                    assert!(object.length == 0 || exchange.receiving() == Some(object.round));
                }
            }
            Ok(Happened::Received { object, mut room }) => {
                objects.push((object, room.data_mut().to_vec()));
            }
            Ok(Happened::Message(message)) => {
                assert!(!matches!(
                    message,
                    Message::Ping | Message::Chunk { .. } | Message::Ack { .. } | Message::Bye { .. }
                ));
            }
            Ok(Happened::Sent(round)) => panic!("nothing was sent, but round {round} has arrived"),
            Err(broken) => {
                assert!(
                    !matches!(broken, Broken::Silent(_) | Broken::Stalled(_)),
                    "{broken}"
                );
                return objects;
            }
        }
    }
}
