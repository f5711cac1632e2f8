//! Sessions over TCP: each message has its length in front, and a chunk's data is read where it is to lie.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::handshake::{
    CHALLENGE, CHALLENGE_BYTES, GatewayHandshake, HELLO_BYTES, HandshakeError, Hello, PROOF_BYTES,
    Participant, WorkerHandshake,
};
use super::message::{
    BYE, CHUNK, CHUNK_HEAD_BYTES, MAX_CONTROL_BYTES, MAX_REASON_BYTES, Malformed, Message, SessionError,
    check_length,
};
use super::seal::{Seal, SealKey, SessionKeys, TAG_BYTES};
use super::transfers::{Incoming, Outgoing, Sink};
use super::wire::{self, Limits, Queue, Wire};
use super::{Secret, Traffic};

const LENGTH_BYTES: usize = 4;

const LIMITS: Limits = Limits {
    chunk_bytes: 256 << 10,
    window_bytes: 8 << 20,
};

/// What is sent for data that was given up in the middle of a chunk.
const ZEROS: [u8; 4096] = [0; 4096];

/// The longest refusal, with its kind.
const REFUSAL_BYTES: usize = 1 + 1 + 2 + MAX_REASON_BYTES;

/// The gateway's end of a connection whose handshake is done.
///
/// # Errors
/// If it is closed already.
pub fn gateway_wire(stream: TcpStream, keys: SessionKeys) -> io::Result<Wire> {
    wire(stream, keys.up, keys.down)
}

/// The worker's end of a connection whose handshake is done.
///
/// # Errors
/// If it is closed already.
pub fn worker_wire(stream: TcpStream, keys: SessionKeys) -> io::Result<Wire> {
    wire(stream, keys.down, keys.up)
}

fn wire(stream: TcpStream, theirs: SealKey, ours: SealKey) -> io::Result<Wire> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let traffic = Arc::new(Traffic::default());
    let reader = Reader {
        half: read,
        head: [0; HEAD_BYTES],
        filled: 0,
        data: 0,
        key: theirs,
        number: 0,
        seal: None,
        traffic: Arc::clone(&traffic),
    };
    let writer = Writer {
        half: write,
        queue: Queue::default(),
        current: None,
        key: ours,
        number: 0,
        traffic,
    };
    Ok(Wire::new(
        wire::Reader::Tcp(Box::new(reader)),
        wire::Writer::Tcp(Box::new(writer)),
        LIMITS,
    ))
}

/// Connects to a gateway and does a worker's part of the handshake. The gateway's welcome is still to come.
///
/// # Errors
/// If nobody listens there, or somebody who does not know the secret.
pub async fn connect(
    address: SocketAddr,
    secret: &Secret,
    name: &str,
    instance: u64,
) -> Result<Wire, SessionError> {
    introduce(TcpStream::connect(address).await?, secret, name, instance).await
}

/// Proves to a gateway that we know the secret, and has it prove the same.
///
/// # Errors
/// If it does not know the secret.
pub async fn introduce(
    mut stream: TcpStream,
    secret: &Secret,
    name: &str,
    instance: u64,
) -> Result<Wire, SessionError> {
    stream.set_nodelay(true)?;
    let handshake = WorkerHandshake::new(secret, name, instance, 0);
    write_first(&mut stream, &handshake.hello()).await?;
    let mut bytes = [0; REFUSAL_BYTES];
    let challenge = read_first(&mut stream, &mut bytes, |kind, length| match kind {
        CHALLENGE => length == CHALLENGE_BYTES,
        BYE => length <= REFUSAL_BYTES,
        _ => false,
    });
    let challenge = challenge.await?;
    if let Ok(Message::Bye { reason, .. }) = Message::decode(challenge) {
        return Err(SessionError::Refused(reason));
    }
    let (proof, keys) = handshake.answer(challenge)?;
    write_first(&mut stream, &proof).await?;
    Ok(worker_wire(stream, keys)?)
}

/// Reads a connection's hello.
///
/// # Errors
/// If something else comes.
pub async fn hello(stream: &mut TcpStream) -> Result<Hello, SessionError> {
    stream.set_nodelay(true)?;
    let mut bytes = [0; HELLO_BYTES];
    let hello = read_first(stream, &mut bytes, |_, length| length == HELLO_BYTES).await?;
    Ok(Hello::decode(hello)?)
}

/// Asks whoever said hello for a proof, with our own. Gives the session's keys.
///
/// # Errors
/// If it does not know the secret, or is nobody who is known.
pub async fn challenge(
    stream: &mut TcpStream,
    hello: &Hello,
    known: Option<&Participant>,
) -> Result<SessionKeys, SessionError> {
    let (handshake, challenge) = GatewayHandshake::answer(hello, known, 0);
    write_first(stream, &challenge).await?;
    let mut bytes = [0; PROOF_BYTES];
    let proof = read_first(stream, &mut bytes, |_, length| length == PROOF_BYTES).await?;
    Ok(handshake.check(proof).ok_or(HandshakeError::Proof)?)
}

/// Tells whoever has not proved itself that it is not let in, and closes. That is the same for all, whatever they said.
pub async fn refuse(mut stream: TcpStream, reason: &str) {
    let bye = Message::Bye {
        last: false,
        reason: reason.to_owned(),
    };
    if write_first(&mut stream, &bye.encode()).await.is_ok() && stream.shutdown().await.is_ok() {
        // What is thrown at it meanwhile is read, or the kernel would reset the connection and our word could be lost.
        let mut scratch = [0; 256];
        while stream.read(&mut scratch).await.is_ok_and(|read| read > 0) {}
    }
}

/// Sends a message that is not sealed.
async fn write_first(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = (message.len() as u32).to_le_bytes();
    stream.write_all(&[&length, message].concat()).await
}

/// Reads a message that is not sealed, if it may have that kind and length; no more bytes than that are taken.
async fn read_first<'a>(
    stream: &mut TcpStream,
    bytes: &'a mut [u8],
    may_be: impl FnOnce(u8, usize) -> bool,
) -> Result<&'a [u8], SessionError> {
    let mut head = [0; LENGTH_BYTES + 1];
    read_exact(stream, &mut head).await?;
    let [l0, l1, l2, l3, kind] = head;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length == 0 || length > bytes.len() || !may_be(kind, length) {
        return Err(HandshakeError::Unknown.into());
    }
    bytes[0] = kind;
    read_exact(stream, &mut bytes[1..length]).await?;
    Ok(&bytes[..length])
}

async fn read_exact(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), SessionError> {
    match stream.read_exact(bytes).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(SessionError::Closed),
        Err(error) => Err(error.into()),
    }
}

/// A message with its length in front, without its tag; the length counts the data that is to follow, and the tag.
fn framed(body: &[u8], data: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(LENGTH_BYTES + body.len() + TAG_BYTES);
    out.extend(((body.len() + data + TAG_BYTES) as u32).to_le_bytes());
    out.extend(body);
    out
}

/// A whole message as it is sent under that number; a chunk's body has its data.
#[cfg(any(test, feature = "fuzzing"))]
pub fn sealed(key: &SealKey, number: u64, body: &[u8]) -> Vec<u8> {
    let mut out = framed(body, 0);
    let tag = key.seal(number, &out);
    out.extend(tag);
    out
}

/// Length, kind and fields of the longest message that is no chunk, and its tag.
const HEAD_BYTES: usize = LENGTH_BYTES + MAX_CONTROL_BYTES + TAG_BYTES;

#[derive(Debug)]
pub(super) struct Reader {
    half: OwnedReadHalf,
    /// Length, kind and fields of the message that is coming, and its tag.
    head: [u8; HEAD_BYTES],
    /// How much of that is there.
    filled: usize,
    /// How much of a chunk's data is where it belongs.
    data: usize,
    key: SealKey,
    /// The number of the message that is coming.
    number: u64,
    /// Over what of a chunk is there.
    seal: Option<Seal>,
    pub(super) traffic: Arc<Traffic>,
}

impl Reader {
    /// The next message. Cancel-safe: what has come of it is kept.
    ///
    /// Until the tag has been compared only the length, the kind and a chunk's place are looked at. A chunk's data lies in
    /// its place by then, where nobody takes it for received.
    pub(super) async fn next(&mut self, incoming: &mut Incoming) -> Result<Message, SessionError> {
        self.fill(LENGTH_BYTES + 1).await?;
        let announced = u32::from_le_bytes([self.head[0], self.head[1], self.head[2], self.head[3]]);
        let (kind, bytes) = (self.head[LENGTH_BYTES], u64::from(announced));
        let length = bytes
            .checked_sub(TAG_BYTES as u64)
            .ok_or(Malformed::Length { kind, bytes })?;
        check_length(kind, length)?;
        let length = length as usize;
        let message = if kind == CHUNK {
            let head = LENGTH_BYTES + CHUNK_HEAD_BYTES;
            self.fill(head).await?;
            let chunk = Message::decode_chunk(&self.head[LENGTH_BYTES..head], length)?;
            if self.seal.is_none() {
                let mut seal = self.key.begin(self.number);
                seal.add(&self.head[..head]);
                self.seal = Some(seal);
            }
            self.data(&chunk, incoming).await?;
            self.fill(head + TAG_BYTES).await?;
            let seal = self.seal.take();
            if !seal.is_some_and(|seal| seal.is(&self.head[head..head + TAG_BYTES])) {
                return Err(Malformed::Seal.into());
            }
            chunk
        } else {
            let end = LENGTH_BYTES + length;
            self.fill(end + TAG_BYTES).await?;
            let mut seal = self.key.begin(self.number);
            seal.add(&self.head[..end]);
            if !seal.is(&self.head[end..end + TAG_BYTES]) {
                return Err(Malformed::Seal.into());
            }
            Message::decode(&self.head[LENGTH_BYTES..end])?
        };
        self.number += 1;
        (self.filled, self.data) = (0, 0);
        Ok(message)
    }

    /// Reads until the other end closes.
    pub(super) async fn drain(&mut self) {
        let mut scratch = [0; 4096];
        while self.half.read(&mut scratch).await.is_ok_and(|read| read > 0) {}
    }

    async fn fill(&mut self, end: usize) -> Result<(), SessionError> {
        while self.filled < end {
            let read = self.half.read(&mut self.head[self.filled..end]).await?;
            if read == 0 {
                return Err(SessionError::Closed);
            }
            self.filled += read;
            self.traffic.add_received(read);
        }
        Ok(())
    }

    async fn data(&mut self, chunk: &Message, incoming: &mut Incoming) -> Result<(), SessionError> {
        let Message::Chunk {
            round,
            offset,
            length,
        } = *chunk
        else {
            return Ok(());
        };
        let mut scratch = [0; 4096];
        while self.data < length {
            let place = match incoming.sink(round, offset, length)? {
                Sink::Into(place) => &mut place[self.data..],
                Sink::Away => {
                    let most = scratch.len().min(length - self.data);
                    &mut scratch[..most]
                }
            };
            let read = self.half.read(place).await?;
            if read == 0 {
                return Err(SessionError::Closed);
            }
            if let Some(seal) = &mut self.seal {
                seal.add(&place[..read]);
            }
            self.data += read;
            self.traffic.add_received(read);
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Writer {
    half: OwnedWriteHalf,
    pub(super) queue: Queue,
    current: Option<Current>,
    key: SealKey,
    /// The next message's.
    number: u64,
    pub(super) traffic: Arc<Traffic>,
}

/// The message that is being written.
#[derive(Debug)]
struct Current {
    /// Length, kind and fields, and the tag of one that is no chunk.
    head: Vec<u8>,
    /// A chunk's data and tag, which follow.
    chunk: Option<ChunkData>,
    written: usize,
}

#[derive(Debug)]
struct ChunkData {
    round: u32,
    offset: u64,
    bytes: usize,
    /// Over what has been written, until all of the data has.
    seal: Option<Seal>,
    tag: [u8; TAG_BYTES],
}

impl Current {
    fn total(&self) -> usize {
        self.head.len() + self.chunk.as_ref().map_or(0, |chunk| chunk.bytes + TAG_BYTES)
    }

    /// What is to be written next.
    fn rest<'a>(&'a self, outgoing: Option<&'a Outgoing>) -> &'a [u8] {
        let Some(into) = self.written.checked_sub(self.head.len()) else {
            return &self.head[self.written..];
        };
        match &self.chunk {
            Some(chunk) if into < chunk.bytes => chunk.data(into, outgoing),
            Some(chunk) => &chunk.tag[into - chunk.bytes..],
            None => &[],
        }
    }

    /// So many bytes of the rest were written.
    fn advance(&mut self, written: usize, outgoing: Option<&Outgoing>) {
        let into = self.written.checked_sub(self.head.len());
        self.written += written;
        let (Some(into), Some(chunk)) = (into, &mut self.chunk) else {
            return;
        };
        if let Some(mut seal) = chunk.seal.take() {
            seal.add(&chunk.data(into, outgoing)[..written]);
            if into + written == chunk.bytes {
                chunk.tag = seal.finish();
            } else {
                chunk.seal = Some(seal);
            }
        }
    }
}

impl ChunkData {
    /// The data from that byte on, or a part of it; zeros where it was given up, since the message must be as long as it
    /// said.
    fn data<'a>(&self, into: usize, outgoing: Option<&'a Outgoing>) -> &'a [u8] {
        let data = outgoing.filter(|outgoing| outgoing.round() == self.round);
        let data = data.map_or(&[][..], |outgoing| outgoing.data(self.offset + into as u64));
        let data = if data.is_empty() { &ZEROS[..] } else { data };
        &data[..(self.bytes - into).min(data.len())]
    }
}

impl Writer {
    pub(super) async fn drive(
        &mut self,
        mut outgoing: Option<&mut Outgoing>,
        limits: &Limits,
    ) -> SessionError {
        loop {
            match self.write(outgoing.as_deref_mut(), limits).await {
                Ok(true) => {}
                Ok(false) => std::future::pending().await,
                Err(broken) => return broken,
            }
        }
    }

    pub(super) async fn flush(&mut self) -> Result<(), SessionError> {
        // Without an object to go on with, what is left ends.
        while self.write(None, &LIMITS).await? {}
        Ok(())
    }

    /// Nothing more will be written.
    pub(super) async fn shut(&mut self) {
        // Of a connection that is gone already nothing is left to be said.
        let _ = self.half.shutdown().await;
    }

    /// Writes a piece; says whether there was one.
    async fn write(
        &mut self,
        mut outgoing: Option<&mut Outgoing>,
        limits: &Limits,
    ) -> Result<bool, SessionError> {
        if self.current.is_none() {
            self.current = match self.queue.pop()? {
                Some(body) => Some(self.message(&body)),
                None => outgoing
                    .as_deref_mut()
                    .and_then(|outgoing| self.chunk(outgoing, limits)),
            };
        }
        let Some(current) = &mut self.current else {
            return Ok(false);
        };
        let written = self.half.write(current.rest(outgoing.as_deref())).await?;
        if written == 0 {
            return Err(SessionError::Closed);
        }
        self.traffic.add_sent(written);
        current.advance(written, outgoing.as_deref());
        if current.written >= current.total() {
            self.current = None;
        }
        Ok(true)
    }

    fn message(&mut self, body: &[u8]) -> Current {
        let mut head = framed(body, 0);
        let tag = self.key.seal(self.number, &head);
        head.extend(tag);
        self.number += 1;
        Current {
            head,
            chunk: None,
            written: 0,
        }
    }

    /// The next chunk, if one may go.
    fn chunk(&mut self, outgoing: &mut Outgoing, limits: &Limits) -> Option<Current> {
        let (round, offset, bytes) = outgoing.next_chunk(limits)?;
        outgoing.mark_sent(bytes);
        let body = Message::Chunk {
            round,
            offset,
            length: bytes,
        };
        let head = framed(&body.encode(), bytes);
        let mut seal = self.key.begin(self.number);
        seal.add(&head);
        self.number += 1;
        let chunk = ChunkData {
            round,
            offset,
            bytes,
            seal: Some(seal),
            tag: [0; TAG_BYTES],
        };
        Some(Current {
            head,
            chunk: Some(chunk),
            written: 0,
        })
    }
}
