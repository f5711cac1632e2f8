//! The codec, and two ends that talk over a real connection which breaks as it likes.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use super::message::{MAX_CHUNK_BYTES, MAX_CONTROL_BYTES, check_length};
use super::*;
use crate::update::{Cover, UpdateInfo};

fn any_object() -> impl Strategy<Value = Object> {
    (any::<u32>(), any::<u64>(), any::<u64>()).prop_map(|(round, length, schema)| Object {
        round,
        length,
        schema,
    })
}

fn any_message() -> impl Strategy<Value = Message> {
    let update = (
        any_object(),
        any::<(u64, u64, u64)>(),
        proptest::collection::vec(0_u32..1000, 0..5),
        proptest::num::f64::NORMAL,
    );
    let update = update.prop_map(|(object, (samples, folded, bytes_copied), shares, loss)| {
        let mut cover = Cover::default();
        shares.into_iter().for_each(|share| cover.add(&Cover::of(share)));
        let info = UpdateInfo {
            samples,
            cover,
            loss: Some(loss),
            folded,
            bytes_copied,
            made: Vec::new(),
        };
        Message::Update(object, info)
    });
    prop_oneof![
        update,
        Just(Message::Welcome),
        Just(Message::Ready),
        any_object().prop_map(Message::Model),
        any::<(u32, u64)>().prop_map(|(round, offset)| Message::Ack { round, offset }),
        any::<(u32, u16)>().prop_map(|(round, refusal)| Message::Verdict { round, refusal }),
        any::<u32>().prop_map(Message::Nothing),
        Just(Message::Ping),
        "\\PC{0,100}".prop_map(Message::End),
        (any::<bool>(), "\\PC{0,100}").prop_map(|(last, reason)| Message::Bye { last, reason }),
    ]
}

proptest! {
    #[test]
    fn messages_come_back_as_they_were(message in any_message()) {
        prop_assert_eq!(Message::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = Message::decode(&bytes);
        let _ = Message::decode_chunk(&bytes, bytes.len());
    }

    #[test]
    fn a_message_cut_short_or_made_longer_is_none(message in any_message(), more in 1_usize..20) {
        let whole = message.encode();
        let mut longer = whole.clone();
        longer.extend(vec![0; more]);
        prop_assert!(Message::decode(&longer).is_err());
        prop_assert!(Message::decode(&whole[..whole.len().saturating_sub(more)]).is_err());
    }

    #[test]
    fn secrets_survive_their_text(bytes in any::<[u8; 16]>(), name in "\\PC{1,40}") {
        let token = JobToken::from_bytes(bytes);
        let again = JobToken::from_hex(&token.to_hex()).expect("hex");
        prop_assert_eq!(again.to_hex(), token.to_hex());
        let secret = token.participant(&name);
        let read = Secret::from_text(&secret.to_text()).expect("a secret");
        prop_assert_eq!(read.to_text(), secret.to_text());
        prop_assert_eq!((read.id(), read.job()), (secret.id(), token.digest()));
    }

    #[test]
    fn a_topic_is_of_one_name(name in "\\PC{1,30}", other in "\\PC{1,30}") {
        let token = JobToken::new();
        let topic = format!("lifl/{}/{}/up", token.digest(), mqtt::level(&name));
        let (participant, answers) = mqtt::correspondent(&token, &topic).expect("a worker's");
        prop_assert_eq!(&participant.name, &name);
        prop_assert_eq!(participant.secret.id(), token.participant(&name).id());
        prop_assert_eq!(answers, topic.replace("/up", "/down"));
        prop_assert_eq!(name == other, mqtt::level(&name) == mqtt::level(&other));
    }
}

#[test]
fn lengths_are_judged_before_anything_is_read() {
    assert_eq!(check_length(6, 14), Ok(()));
    assert_eq!(check_length(6, 13 + MAX_CHUNK_BYTES as u64), Ok(()));
    for (kind, bytes) in [
        (6, 13),
        (6, 14 + MAX_CHUNK_BYTES as u64),
        (6, u64::from(u32::MAX)),
        (2, MAX_CONTROL_BYTES as u64 + 1),
        (3, 0),
    ] {
        assert_eq!(check_length(kind, bytes), Err(Malformed::Length { kind, bytes }));
    }
    // Those of a handshake have no place behind it.
    for kind in [0, 1, 13, 14, 77] {
        assert_eq!(check_length(kind, 5), Err(Malformed::Kind(kind)));
    }
}

#[test]
fn no_token_that_is_none() {
    for text in ["", "00", &"0".repeat(31), &"g".repeat(32), &"ä".repeat(16)] {
        assert!(JobToken::from_hex(text).is_none(), "{text:?}");
        assert!(Secret::from_text(text).is_none(), "{text:?}");
    }
    let whole = JobToken::new().participant("one").to_text();
    assert!(Secret::from_text(&whole[1..]).is_none());
    assert!(Secret::from_text(&whole.replace('.', "")).is_none());
}

#[test]
fn a_topic_that_is_no_workers_has_nobody() {
    let token = JobToken::new();
    let root = format!("lifl/{}", token.digest());
    for topic in [
        "lifl/one/up",
        &format!("{root}/one"),
        &format!("{root}/one/down"),
        &format!("{root}//up"),
        &format!("{root}/one/two/up"),
        &format!("{root}/on%65/up"),
        &format!("{root}/%/up"),
        &format!("{root}/%FF/up"),
        &format!("{root}/a%2b/up"),
        &format!("{root}/{}/up", "a".repeat(MAX_NAME_BYTES + 1)),
    ] {
        assert!(mqtt::correspondent(&token, topic).is_none(), "{topic}");
    }
}

#[test]
fn a_long_reason_is_cut_between_characters() {
    let message = Message::End("ä".repeat(400));
    let Ok(Message::End(reason)) = Message::decode(&message.encode()) else {
        panic!("no end");
    };
    assert_eq!(reason, "ä".repeat(256));
}

/// A connection, both ends of it.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let near = TcpStream::connect(listener.local_addr().expect("bound"));
    let (near, far) = tokio::join!(near, listener.accept());
    (near.expect("connected"), far.expect("accepted").0)
}

fn keys() -> SessionKeys {
    SessionKeys {
        up: SealKey::new(&[1; 32]),
        down: SealKey::new(&[2; 32]),
    }
}

async fn wires() -> (Wire, Wire) {
    let (near, far) = connection().await;
    let near = tcp::worker_wire(near, keys()).expect("open");
    (near, tcp::gateway_wire(far, keys()).expect("open"))
}

fn data(bytes: usize, seed: u8) -> Arc<Buffer> {
    let mut buffer = Buffer::new(bytes);
    for (n, byte) in buffer.bytes_mut().iter_mut().enumerate() {
        *byte = (n as u8).wrapping_mul(31).wrapping_add(seed) ^ (n >> 8) as u8;
    }
    Arc::new(buffer)
}

fn model(round: u32, bytes: usize) -> Object {
    Object {
        round,
        length: bytes as u64,
        schema: 7,
    }
}

/// Lets an end receive one object, taking it as soon as it is offered.
async fn receive(transfers: &mut Transfers, wire: &mut Wire) -> Result<(Object, Destination), SessionError> {
    loop {
        match transfers.next(wire).await? {
            TransferEvent::Offered(header) => {
                let object = *header.object().expect("a header");
                let destination = Destination::Private(Buffer::new(object.length as usize));
                transfers.accept(wire, object, destination);
            }
            TransferEvent::Received { object, destination } => return Ok((object, destination)),
            other => panic!("{other:?}"),
        }
    }
}

/// Keeps an end going until its object is there.
async fn sent(transfers: &mut Transfers, wire: &mut Wire) -> Result<u32, SessionError> {
    match transfers.next(wire).await? {
        TransferEvent::Sent(round) => Ok(round),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn objects_go_both_ways_at_once() {
    let (mut near, mut far) = wires().await;
    let (mut one, mut other) = (Transfers::default(), Transfers::default());
    let (up, down) = (data(20_000_001, 1), data(19_999_999, 2));
    let offered = |data: &Arc<Buffer>| {
        (
            Message::Model(model(3, data.bytes().len())),
            Source::Private(Arc::clone(data)),
        )
    };
    let (header, source) = offered(&up);
    one.offer(Some(&mut near), header, source);
    let (header, source) = offered(&down);
    other.offer(Some(&mut far), header, source);
    let end = async |transfers: &mut Transfers, wire: &mut Wire| {
        let (mut got, mut gone) = (None, false);
        while got.is_none() || !gone {
            match transfers.next(wire).await.expect("open") {
                TransferEvent::Offered(header) => {
                    let object = *header.object().expect("a header");
                    transfers.accept(
                        wire,
                        object,
                        Destination::Private(Buffer::new(object.length as usize)),
                    );
                }
                TransferEvent::Received { destination, .. } => got = Some(destination),
                TransferEvent::Sent(_) => gone = true,
                other @ (TransferEvent::Message(_) | TransferEvent::Overdue) => panic!("{other:?}"),
            }
        }
        wire.flush().await.expect("open");
        got.expect("received")
    };
    let (mut at_near, mut at_far) = tokio::join!(end(&mut one, &mut near), end(&mut other, &mut far));
    assert!(at_far.data_mut() == up.bytes(), "what went up came otherwise");
    assert!(
        at_near.data_mut() == down.bytes(),
        "what went down came otherwise"
    );
}

#[tokio::test]
async fn a_transfer_goes_on_where_its_connection_broke() {
    let bytes = 30_000_000;
    let original = data(bytes, 9);
    let (mut sender, mut receiver) = (Transfers::default(), Transfers::default());
    sender.offer(
        None,
        Message::Model(model(1, bytes)),
        Source::Private(Arc::clone(&original)),
    );
    let mut whole = 0;
    let mut got = None;
    for cut_after in [1_000_000_u64, 9_000_000, 9_100_000, u64::MAX] {
        let (mut near, mut far) = wires().await;
        let traffic = Arc::new(Traffic::default());
        far.count_in(Arc::clone(&traffic));
        sender.resume(&mut near);
        tokio::select! {
            done = async { tokio::try_join!(sent(&mut sender, &mut near), async {
                got = Some(receive(&mut receiver, &mut far).await?);
                far.flush().await
            }) } => { done.expect("open"); }
            () = async {
                while traffic.received() < cut_after {
                    tokio::task::yield_now().await;
                }
            } => {}
        }
        whole += traffic.received();
        // On a busy machine all may have gone over before anybody looked.
        if got.is_some() {
            break;
        }
    }
    let (object, mut destination) = got.expect("complete");
    assert_eq!(object, model(1, bytes));
    assert!(destination.data_mut() == original.bytes(), "it came otherwise");
    let twice = whole - bytes as u64;
    assert!(twice < 3 * (9 << 20), "{twice} bytes went twice: it began anew");
}

#[tokio::test]
async fn what_was_complete_is_not_taken_twice() {
    let original = data(1000, 4);
    let (mut sender, mut receiver) = (Transfers::default(), Transfers::default());
    let header = Message::Model(model(5, 1000));
    for first in [true, false] {
        let (mut near, mut far) = wires().await;
        sender.offer(
            Some(&mut near),
            header.clone(),
            Source::Private(Arc::clone(&original)),
        );
        if first {
            let (_, got) = tokio::join!(sent(&mut sender, &mut near), async {
                let got = receive(&mut receiver, &mut far).await.expect("complete");
                far.flush().await.expect("open");
                got
            });
            assert_eq!(got.0.round, 5);
        } else {
            // The last acknowledgement was lost: the sender says it again, and hears that it is there.
            tokio::select! {
                round = sent(&mut sender, &mut near) => assert_eq!(round.expect("open"), 5),
                again = receive(&mut receiver, &mut far) => panic!("taken again: {again:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_sender_waits_for_a_place() {
    let (mut near, mut far) = wires().await;
    let (mut sender, mut receiver) = (Transfers::default(), Transfers::default());
    let traffic = Arc::new(Traffic::default());
    far.count_in(Arc::clone(&traffic));
    sender.offer(
        Some(&mut near),
        Message::Model(model(1, 5000)),
        Source::Private(data(5000, 1)),
    );
    let offered = tokio::select! {
        offered = receiver.next(&mut far) => offered.expect("open"),
        other = sender.next(&mut near) => panic!("{other:?}"),
    };
    assert!(matches!(offered, TransferEvent::Offered(Message::Model(_))));
    let quiet = tokio::time::timeout(Duration::from_millis(50), async {
        tokio::join!(receiver.next(&mut far), sender.next(&mut near))
    });
    assert!(quiet.await.is_err(), "something came before there was a place");
    assert!(traffic.received() < 100, "{} bytes", traffic.received());
}

/// What an end with 1,000 bytes of room for round 2 makes of those bytes.
async fn judged(bytes: &[u8]) -> SessionError {
    let (near, mut far) = connection().await;
    let mut wire = tcp::gateway_wire(near, keys()).expect("open");
    let mut transfers = Transfers::default();
    transfers.accept(&mut wire, model(2, 1000), Destination::Private(Buffer::new(1000)));
    far.write_all(bytes).await.expect("written");
    let judged = async {
        loop {
            if let Err(broken) = transfers.next(&mut wire).await {
                return broken;
            }
        }
    };
    let patience = Duration::from_secs(20);
    tokio::time::timeout(patience, judged)
        .await
        .expect("judged at once")
}

/// Messages as a worker sends them, from its first on.
fn sealed(bodies: &[Vec<u8>]) -> Vec<u8> {
    let numbered = bodies.iter().enumerate();
    let each = numbered.flat_map(|(number, body)| tcp::sealed(&keys().up, number as u64, body));
    each.collect()
}

fn chunk(round: u32, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = Message::Chunk {
        round,
        offset,
        length,
    }
    .encode();
    bytes.extend(vec![1; length]);
    bytes
}

#[tokio::test]
async fn chunks_out_of_place_end_the_session() {
    for bodies in [
        &[chunk(3, 0, 100)][..],
        &[chunk(2, 1, 100)],
        &[chunk(2, u64::MAX, 100)],
        &[chunk(2, 0, 1001)],
        &[chunk(2, 0, 600), chunk(2, 600, 500)],
        &[chunk(2, 0, 600), chunk(2, 0, 400)],
    ] {
        let broken = judged(&sealed(bodies)).await;
        assert!(
            matches!(broken, SessionError::Malformed(Malformed::Chunk { .. })),
            "{broken} for {:?}",
            &bodies[0][..13]
        );
    }
}

#[tokio::test]
async fn lengths_beyond_all_measure_end_the_session() {
    for length in [u32::MAX, 5, 15, 16] {
        let odd = [&length.to_le_bytes()[..], &[6]].concat();
        let broken = judged(&odd).await;
        assert!(
            matches!(broken, SessionError::Malformed(Malformed::Length { kind: 6, .. })),
            "{broken}"
        );
    }
    let broken = judged(b"GET / HTTP/1.1\r\n\r\n").await;
    assert!(
        matches!(broken, SessionError::Malformed(Malformed::Kind(_))),
        "{broken}"
    );
    let beyond = [Message::Ack { round: 9, offset: 5 }.encode(), chunk(9, 0, 5)];
    assert!(matches!(
        judged(&sealed(&beyond)).await,
        SessionError::Malformed(Malformed::Chunk { .. })
    ));
}

#[tokio::test]
async fn what_the_other_end_has_not_sealed_ends_the_session() {
    let half = chunk(2, 0, 500);
    let ready = Message::Ready.encode();
    let whole = sealed(&[half.clone(), ready.clone()]);
    let first = sealed(std::slice::from_ref(&half)).len();
    // Changed in any place, from the fields to the tag.
    for at in [5, 9, 20, 300, first - 16, first - 1, whole.len() - 1] {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        let broken = judged(&changed).await;
        // A chunk's place is looked at before.
        let misplaced = at == 5 || at == 9;
        let found = match broken {
            SessionError::Malformed(Malformed::Seal) => !misplaced,
            SessionError::Malformed(Malformed::Chunk { .. }) => misplaced,
            _ => false,
        };
        assert!(found, "{broken} with byte {at} changed");
    }
    // Brought twice, left out, in another order, by the other end's key, by nobody's.
    let twice = [&whole[first..], &whole[first..]].concat();
    let once = tcp::sealed(&keys().up, 0, &ready);
    for forged in [
        [once.clone(), once.clone()].concat(),
        whole[first..].to_vec(),
        twice,
        tcp::sealed(&keys().down, 0, &ready),
        tcp::sealed(&keys().up, 1, &half),
        [&17_u32.to_le_bytes()[..], &ready, &[0; 16]].concat(),
    ] {
        let broken = judged(&forged).await;
        assert!(
            matches!(broken, SessionError::Malformed(Malformed::Seal)),
            "{broken}"
        );
    }
}

#[tokio::test]
async fn a_chunk_that_was_forged_is_overwritten_by_the_true_one() {
    let original = data(1000, 3);
    let (mut sender, mut receiver) = (Transfers::default(), Transfers::default());
    let info = UpdateInfo {
        samples: 1,
        cover: Cover::of(0),
        ..UpdateInfo::default()
    };
    let header = Message::Update(model(2, 1000), info);
    // Somebody who has taken over the worker's connection sends half of the data, without the key.
    let (near, far) = connection().await;
    let mut far = tcp::gateway_wire(far, keys()).expect("open");
    let mut forged = sealed(&[header.encode(), chunk(2, 0, 500)]);
    let end = forged.len();
    forged[end - 1] ^= 1;
    let mut near = near;
    near.write_all(&forged).await.expect("written");
    let broken = receive(&mut receiver, &mut far).await.expect_err("forged");
    assert!(
        matches!(broken, SessionError::Malformed(Malformed::Seal)),
        "{broken}"
    );
    assert_eq!(receiver.moved(), 0, "it counts as received");

    let (mut near, mut far) = wires().await;
    sender.offer(Some(&mut near), header, Source::Private(Arc::clone(&original)));
    let ((), mut destination) = tokio::join!(
        async {
            sent(&mut sender, &mut near).await.expect("open");
        },
        async {
            let (_, destination) = receive(&mut receiver, &mut far).await.expect("complete");
            far.flush().await.expect("open");
            destination
        }
    );
    assert!(
        destination.data_mut() == original.bytes(),
        "the forged bytes stayed"
    );
}

#[tokio::test]
async fn an_acknowledgement_of_what_was_not_sent_ends_the_session() {
    let (near, mut far) = connection().await;
    let mut wire = tcp::gateway_wire(near, keys()).expect("open");
    let mut transfers = Transfers::default();
    transfers.offer(
        Some(&mut wire),
        Message::Model(model(1, 100)),
        Source::Private(data(100, 1)),
    );
    let beyond = Message::Ack {
        round: 1,
        offset: 101,
    };
    far.write_all(&sealed(&[beyond.encode()])).await.expect("written");
    let broken = transfers.next(&mut wire).await.expect_err("broken");
    assert!(
        matches!(broken, SessionError::Malformed(Malformed::Ack { .. })),
        "{broken}"
    );
}

#[tokio::test]
async fn messages_that_move_nothing_are_bounded() {
    // An end with a model on its way out, and one coming in.
    let flooded = async |bodies: Vec<Vec<u8>>| {
        let (near, mut far) = connection().await;
        let mut wire = tcp::gateway_wire(near, keys()).expect("open");
        let mut transfers = Transfers::default();
        transfers.accept(
            &mut wire,
            model(2, 1 << 20),
            Destination::Private(Buffer::new(1 << 20)),
        );
        transfers.offer(
            Some(&mut wire),
            Message::Model(model(1, 1 << 20)),
            Source::Private(data(1 << 20, 1)),
        );
        let stream = sealed(&bodies);
        let mut taken = 0_usize;
        let (mut reading, mut writing) = far.split();
        let broken = tokio::select! {
            broken = async {
                loop {
                    match transfers.next(&mut wire).await {
                        Ok(_) => taken += 1,
                        Err(broken) => break broken,
                    }
                }
            } => broken,
            () = async {
                let _ = writing.write_all(&stream).await;
                tokio::io::copy(&mut reading, &mut tokio::io::sink()).await.expect("read");
            } => panic!("the connection was closed"),
        };
        assert!(matches!(broken, SessionError::Flood), "{broken}");
        taken
    };
    let ack = |offset| Message::Ack { round: 1, offset }.encode();
    flooded(vec![Message::Ping.encode(); 40]).await;
    flooded(vec![ack(0); 20_000]).await;
    let taken = flooded(vec![Message::Nothing(1).encode(); 20_000]).await;
    assert!(taken < 20_000);
    // A byte at a time.
    flooded((0..20_000).map(|at| chunk(2, at, 1)).collect()).await;
    // Of a round that is not.
    flooded(vec![Message::Ack { round: 9, offset: 0 }.encode(); 20_000]).await;
}

#[tokio::test(start_paused = true)]
async fn who_drips_is_overdue_and_who_is_slow_is_not() {
    let bytes = 1 << 20;
    // So many bytes every ten seconds.
    let delivered = async |piece: usize| {
        let (near, mut far) = connection().await;
        let mut wire = tcp::gateway_wire(near, keys()).expect("open");
        let mut transfers = Transfers::with_grace(GRACE);
        transfers.accept(
            &mut wire,
            model(2, bytes),
            Destination::Private(Buffer::new(bytes)),
        );
        let begun = tokio::time::Instant::now();
        let drip = async {
            for (number, offset) in (0..bytes).step_by(piece).enumerate() {
                tokio::time::sleep(Duration::from_secs(10)).await;
                let length = piece.min(bytes - offset);
                let body = chunk(2, offset as u64, length);
                let sealed = tcp::sealed(&keys().up, number as u64, &body);
                far.write_all(&sealed).await.expect("open");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = drip => unreachable!("it goes on"),
            event = transfers.next(&mut wire) => (event.expect("open"), begun.elapsed()),
        }
    };
    let (event, after) = delivered(200 << 10).await;
    assert!(matches!(event, TransferEvent::Received { .. }), "{event:?}");
    assert!(after >= Duration::from_secs(60), "{after:?}");
    let (event, after) = delivered(100).await;
    assert!(matches!(event, TransferEvent::Overdue), "{event:?}");
    assert!(
        after >= GRACE && after < GRACE + Duration::from_secs(2),
        "{after:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_its_receivers_place_is_not_overdue() {
    let (mut near, mut far) = wires().await;
    let (mut sender, mut receiver) = (Transfers::with_grace(GRACE), Transfers::default());
    sender.offer(
        Some(&mut near),
        Message::Model(model(1, 100)),
        Source::Private(data(100, 1)),
    );
    let offered = tokio::select! {
        offered = receiver.next(&mut far) => offered.expect("open"),
        other = sender.next(&mut near) => panic!("{other:?}"),
    };
    assert!(matches!(offered, TransferEvent::Offered(_)), "{offered:?}");
    let waited = tokio::time::timeout(GRACE * 10, async {
        tokio::select! {
            event = sender.next(&mut near) => event,
            event = receiver.next(&mut far) => event,
        }
    });
    assert!(waited.await.is_err(), "it was given up");
}

#[tokio::test(start_paused = true)]
async fn silence_is_noticed_and_pings_break_it() {
    let (mut near, mut far) = wires().await;
    let (mut one, mut other) = (Transfers::default(), Transfers::default());
    let spoken = tokio::time::timeout(Duration::from_secs(600), async {
        tokio::select! {
            one = one.next(&mut near) => one,
            other = other.next(&mut far) => other,
        }
    });
    assert!(spoken.await.is_err(), "two ends that ping do not part");
    let broken = one
        .next(&mut near)
        .await
        .expect_err("the other end says nothing any more");
    assert!(matches!(broken, SessionError::Silent(_)), "{broken}");
}
