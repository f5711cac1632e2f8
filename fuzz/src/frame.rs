//! Frames: a stream of them cut anywhere, what becomes of them on a plane, and their numbers.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream as StdStream;

use lifl_common::client::FrameSocket;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{self, Member, Sender};
use lifl_common::plane::PlaneKind;
use lifl_daemon::plane::{self, Chosen, Options, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use zerocopy::{FromBytes, IntoBytes};

use crate::input::{PATIENCE, pieces, runtime};

/// The worker that writes the stream, and one of its own job.
const WRITER: WorkerId = WorkerId(1);
const FELLOW: WorkerId = WorkerId(2);
const JOB: JobId = JobId(1);
/// A worker of another job.
const STRANGER: WorkerId = WorkerId(3);
const OTHER_JOB: JobId = JobId(2);

/// Four bytes of sizes, then the stream, which is written in pieces of those sizes: once to a worker, and once by a
/// worker to the relay, which must hand over to its job what is truly from it, and bring back all else.
pub fn frame(data: &[u8]) {
    let Some((sizes, stream)) = data.split_first_chunk::<4>() else {
        return;
    };
    let pieces = pieces(sizes, stream);
    let frames: Vec<Frame> = stream
        .chunks_exact(Frame::BYTES)
        .map(|bytes| Frame::read_from_bytes(bytes).expect("a frame's bytes"))
        .collect();
    for frame in &frames {
        numbers(frame);
    }
    runtime().block_on(async {
        let served = async {
            reassembled(&pieces, &frames).await;
            relayed(&pieces, &frames).await;
        };
        timeout(PATIENCE, served).await.expect("frames are lost");
    });
}

/// Numbers name what they name, on the wire and in JSON.
fn numbers(frame: &Frame) {
    if let Some(kind) = FrameKind::from_number(frame.kind) {
        assert_eq!(kind as u16, frame.kind);
    }
    if let Some(refusal) = Refusal::from_number(frame.refusal) {
        assert_eq!(refusal as u16, frame.refusal);
        let text = serde_json::to_string(&refusal).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Refusal>(&text).expect("a refusal"),
            refusal
        );
        assert!(!refusal.to_string().is_empty());
    }
}

/// A worker reads the frames that were written, and knows whether the stream ended within one.
async fn reassembled(pieces: &[&[u8]], frames: &[Frame]) {
    let (mut socket, far) = FrameSocket::pair_for(PlaneKind::Relay).expect("a pair of sockets");
    let mut far = stream(StdStream::from(far));
    let write = async {
        for piece in pieces {
            far.write_all(piece).await.expect("room");
        }
        drop(far);
    };
    let read = async {
        let mut read = Vec::new();
        loop {
            match socket.recv().await {
                Ok(Some(frame)) => read.push(frame),
                Ok(None) => return (read, false),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
                    return (read, true);
                }
            }
        }
    };
    let ((), (read, cut)) = tokio::join!(write, read);
    assert_eq!(read, frames);
    assert_eq!(cut, ends_within_a_frame(pieces));
}

fn ends_within_a_frame(pieces: &[&[u8]]) -> bool {
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    !bytes.is_multiple_of(Frame::BYTES)
}

/// What must become of a frame that the writer sends.
fn fate(frame: &Frame) -> Result<(), Refusal> {
    match (frame.from, frame.to) {
        (WRITER, WRITER | FELLOW) => Ok(()),
        (WRITER, STRANGER) => Err(Refusal::OtherJob),
        (WRITER, _) => Err(Refusal::UnknownWorker),
        (_, _) => Err(Refusal::ForgedSource),
    }
}

async fn relayed(pieces: &[&[u8]], frames: &[Frame]) {
    let cut = ends_within_a_frame(pieces);
    let Chosen {
        mut plane,
        mut dead_letters,
        ..
    } = plane::choose(
        Request::Relay,
        Options {
            max_workers: 3,
            pin: None,
        },
    )
    .expect("a relay");
    let (near, far) = StdStream::pair().expect("a pair of sockets");
    let mut writer = stream(near);
    plane
        .register(WRITER, member(JOB), far.into())
        .expect("registered");
    let (mut fellow, far) = FrameSocket::pair_for(PlaneKind::Relay).expect("a pair of sockets");
    plane.register(FELLOW, member(JOB), far).expect("registered");
    let (mut stranger, far) = FrameSocket::pair_for(PlaneKind::Relay).expect("a pair of sockets");
    plane
        .register(STRANGER, member(OTHER_JOB), far)
        .expect("registered");

    for piece in pieces {
        writer.write_all(piece).await.expect("room");
    }
    let (mut delivered, mut refused) = (0, 0);
    for frame in frames {
        let expected = fate(frame);
        assert_eq!(verdict(frame), expected);
        let read = match expected {
            Err(refusal) => {
                refused += 1;
                let letter = dead_letters.recv().await.expect("a dead letter");
                assert_eq!((letter.stamp, letter.refusal), (WRITER, refusal as u16));
                Frame {
                    stamp: frame.stamp,
                    refusal: frame.refusal,
                    ..letter
                }
            }
            Ok(()) => {
                delivered += 1;
                if frame.to == FELLOW {
                    fellow.recv().await.expect("a frame").expect("not the end")
                } else {
                    let mut bytes = [0; Frame::BYTES];
                    writer.read_exact(&mut bytes).await.expect("a frame");
                    Frame::read_from_bytes(&bytes).expect("a frame's bytes")
                }
            }
        };
        assert_eq!(read.as_bytes(), frame.as_bytes());
    }
    let counted = plane.counters(WRITER).expect("a count").expect("registered");
    assert_eq!((counted.frames, counted.refused), (delivered, refused));

    plane.shutdown().expect("the relay has nothing to detach");
    assert_eq!(fellow.recv().await.expect("the end"), None);
    assert_eq!(stranger.recv().await.expect("the end"), None);
    assert_eq!(dead_letters.recv().await, None);
    match writer.read(&mut [0]).await {
        Ok(0) => {}
        // Half a frame that the relay had not read when it was closed.
        Err(error) if error.kind() == ErrorKind::ConnectionReset && cut => {}
        other => panic!("not the end: {other:?}"),
    }
}

/// A worker of that job.
fn member(job: JobId) -> Member {
    Member {
        job,
        uid: 0,
        flags: 0,
    }
}

/// The decision that both planes make.
fn verdict(frame: &Frame) -> Result<(), Refusal> {
    let member = match frame.to {
        WRITER | FELLOW => Some(member(JOB)),
        STRANGER => Some(member(OTHER_JOB)),
        _ => None,
    };
    assert_eq!(
        kernel::verdict(frame, None, member.as_ref()),
        Err(Refusal::UnknownSender)
    );
    let sender = Sender {
        worker: WRITER,
        job: JOB,
    };
    kernel::verdict(frame, Some(&sender), member.as_ref())
}

fn stream(stream: StdStream) -> UnixStream {
    stream.set_nonblocking(true).expect("fcntl");
    UnixStream::from_std(stream).expect("a stream that can be watched")
}
