//! Sessions: messages one by one, and what a gateway or a worker makes of whatever a connection brings.

use std::ops::Range;

use lifl_common::session::handshake::{GatewayHandshake, HELLO_BYTES, Hello, Participant, WorkerHandshake};
use lifl_common::session::{
    Buffer, Destination, JobToken, Message, Object, SealKey, SessionError, SessionKeys, TransferEvent,
    Transfers, Wire, mqtt, tcp,
};
use lifl_common::update::UpdateInfo;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::input::{PATIENCE, part, pieces, runtime};

/// Longer objects are left waiting, as by a receiver without a place for them.
const ROOM_BYTES: u64 = 64 << 10;

/// The session over MQTT that is listened to.
const SESSION: u64 = 7;

/// The number of a session's first sealed publish: what an input calls 0.
const FIRST: u32 = 2;

/// The first byte says what the rest is. 0: a message. 1: four bytes of sizes and a stream of messages, which a TCP connection
/// brings sealed, in pieces of those sizes. 3: the first message of somebody who has proved nothing. Otherwise: publishes that
/// a broker brings, each with its length in front, in two bytes.
pub fn session(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    match how {
        0 => decoded(rest),
        1 => {
            if let Some((sizes, stream)) = rest.split_first_chunk::<4>() {
                let sealed = sealed(stream);
                let pieces = pieces(sizes, &sealed);
                runtime().block_on(async {
                    let conversation = timeout(PATIENCE, over_tcp(&pieces, stream));
                    conversation.await.expect("the end of the stream");
                });
            }
        }
        3 => shaken(rest),
        _ => runtime().block_on(async {
            let conversation = timeout(PATIENCE, over_mqtt(rest));
            conversation.await.expect("the end of the publishes");
        }),
    }
}

fn keys() -> SessionKeys {
    SessionKeys {
        up: SealKey::from_bytes(&[1; 32]),
        down: SealKey::from_bytes(&[2; 32]),
    }
}

/// A stream's messages as one who knows the key sends them; what is no whole message stays as it is.
fn sealed(mut stream: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::new();
    let mut number = 0;
    while let Some((length, after)) = stream.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some((message, after)) = after.split_at_checked(length).filter(|_| length > 0) else {
            break;
        };
        sealed.extend(tcp::sealed(&keys().up, number, message));
        number += 1;
        stream = after;
    }
    sealed.extend(stream);
    sealed
}

/// A hello is what is written for it, and lets nobody in; nor does anything else that is made without the secret.
fn shaken(bytes: &[u8]) {
    let secret = JobToken::from_bytes([7; 16]).participant("one");
    let known = Participant {
        name: "one".to_owned(),
        secret: secret.clone(),
    };
    if let Ok(hello) = Hello::decode(bytes) {
        assert_eq!(hello.encode(), bytes);
        for known in [None, Some(&known)] {
            let (gateway, _) = GatewayHandshake::answer(&hello, known, 0);
            assert!(gateway.check(bytes).is_none());
        }
    } else {
        let worker = WorkerHandshake::new(&secret, "one", 1, 0);
        assert!(worker.answer(bytes).is_err());
        let hello = Hello::decode(&worker.hello()).expect("a hello");
        let (gateway, _) = GatewayHandshake::answer(&hello, Some(&known), 0);
        assert!(gateway.check(bytes).is_none());
        assert!(bytes.len() != HELLO_BYTES || bytes[..7] != worker.hello()[..7]);
    }
}

/// Where an update's loss lies in its message, behind kind, object and samples.
const LOSS: Range<usize> = 29..37;

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
    if let Message::Update(_, UpdateInfo { loss: None, .. }) = message {
        // Whatever is no number says so.
        again[LOSS].copy_from_slice(&bytes[LOSS]);
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
    let wire = tcp::gateway_wire(far, keys()).expect("a connection");
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
    let (mut inbound, brought) = mqtt::Inbound::new(SESSION, keys().up);
    let wire = line.wire("there".to_owned(), SESSION, keys().down, brought);
    let mut messages = Vec::new();
    let mut expected = FIRST;
    let write = async {
        while publishes.len() > 2 {
            let (publish, rest) = part(publishes);
            publishes = rest;
            let Some((session, sequence)) = mqtt::envelope(publish) else {
                // It is nobody's.
                inbound.take(publish.to_vec().into()).expect("room");
                continue;
            };
            let (number, message) = (sequence.wrapping_add(FIRST), mqtt::body(publish));
            if session == SESSION && number == expected && !message.is_empty() {
                // What came before is brought again, what comes too early breaks the session.
                expected += 1;
                messages.push(message);
            }
            // Without the key it takes nobody's place.
            let forged = mqtt::sealed_publish(&keys().down, session, number, message);
            inbound.take(forged).expect("room");
            let sealed = mqtt::sealed_publish(&keys().up, session, number, message);
            if inbound.take(sealed).is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(inbound);
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
    let mut transfers = Transfers::default();
    let mut objects = Vec::new();
    loop {
        match transfers.next(&mut wire).await {
            Ok(TransferEvent::Offered(header)) => {
                let object = *header.object().expect("a header");
                if object.length <= ROOM_BYTES {
                    let destination = Destination::Private(Buffer::new(object.length as usize));
                    transfers.accept(&mut wire, object, destination);
                    assert!(object.length == 0 || transfers.receiving() == Some(object.round));
                }
            }
            Ok(TransferEvent::Received {
                object,
                mut destination,
            }) => {
                objects.push((object, destination.data_mut().to_vec()));
            }
            Ok(TransferEvent::Message(message)) => {
                assert!(!matches!(
                    message,
                    Message::Ping | Message::Chunk { .. } | Message::Ack { .. } | Message::Bye { .. }
                ));
            }
            Ok(TransferEvent::Sent(round)) => panic!("nothing was sent, but round {round} has arrived"),
            Ok(TransferEvent::Overdue) => panic!("nobody minds how long it takes"),
            Err(broken) => {
                assert!(
                    !matches!(broken, SessionError::Silent(_) | SessionError::Stalled(_)),
                    "{broken}"
                );
                return objects;
            }
        }
    }
}
