//! Sessions: messages one by one, and what a gateway or a worker makes of whatever a connection brings.

use lifl_common::session::{Broken, Buffer, Exchange, Happened, Message, Object, Room, Wire, mqtt, tcp};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::input::{PATIENCE, part, pieces, runtime};

/// Longer objects are left waiting, as by a receiver without a place for them.
const ROOM_BYTES: u64 = 64 << 10;

/// The session over MQTT that is listened to.
const SESSION: u64 = 7;

/// The first byte says what the rest is. 0: a message. 1: four bytes of sizes and a stream, which a TCP connection brings
/// in pieces of those sizes. Otherwise: publishes that a broker brings, each with its length in front, in two bytes.
pub fn session(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    match how {
        0 => decoded(rest),
        1 => {
            if let Some((sizes, stream)) = rest.split_first_chunk::<4>() {
                let pieces = pieces(sizes, stream);
                runtime().block_on(async {
                    let conversation = timeout(PATIENCE, over_tcp(&pieces, stream));
                    conversation.await.expect("the end of the stream");
                });
            }
        }
        _ => runtime().block_on(async {
            let conversation = timeout(PATIENCE, over_mqtt(rest));
            conversation.await.expect("the end of the publishes");
        }),
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

/// What a receiver can have got whole by some place of a conversation, found by the shortest way. It may be more than a
/// receiver has taken: here nobody minds a chunk that was not expected.
fn sent<'a>(messages: impl IntoIterator<Item = &'a [u8]>) -> Vec<(Object, Vec<u8>)> {
    let mut coming: Vec<(Object, Vec<u8>)> = Vec::new();
    let mut whole = Vec::new();
    for message in messages {
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

async fn over_tcp(pieces: &[&[u8]], stream: &[u8]) {
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
    let wire = tcp::wire(far).expect("a connection");
    let (_near, objects) = tokio::join!(write, receive(wire));
    let mut rest = stream;
    let messages = std::iter::from_fn(|| {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let (message, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        rest = after;
        Some(message)
    });
    were_sent(&objects, messages);
}

async fn over_mqtt(mut publishes: &[u8]) {
    let (line, _driver) = mqtt::nowhere();
    let (inbox, brought) = mpsc::channel(mqtt::INBOX);
    let wire = line.wire("there".to_owned(), SESSION, brought);
    let mut messages = Vec::new();
    let mut expected = 0;
    let write = async {
        while publishes.len() > 2 {
            let (publish, rest) = part(publishes);
            publishes = rest;
            if let Some((SESSION, sequence)) = mqtt::envelope(publish)
                && sequence == expected
            {
                // What came before is brought again, what comes too early breaks the session.
                expected += 1;
                messages.push(&publish[12..]);
            }
            if inbox.send(publish.to_vec().into()).await.is_err() {
                break;
            }
        }
        drop(inbox);
    };
    let ((), objects) = tokio::join!(write, receive(wire));
    were_sent(&objects, messages);
}

/// Each object that was received is one that was sent.
fn were_sent<'a>(objects: &[(Object, Vec<u8>)], messages: impl IntoIterator<Item = &'a [u8]>) {
    let sent = sent(messages);
    for (object, bytes) in objects {
        assert_eq!(bytes.len() as u64, object.length);
        let is_it = |known: &(Object, Vec<u8>)| known.0 == *object && known.1 == *bytes;
        assert!(sent.iter().any(is_it), "{object:?} is not what was sent");
    }
}

/// Takes what a connection brings, until it ends or is broken.
async fn receive(mut wire: Wire) -> Vec<(Object, Vec<u8>)> {
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
