//! Sessions over TCP: each message has its length in front, and a chunk's data is read where it is to lie.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::Traffic;
use super::exchange::{Incoming, Outgoing, Sink};
use super::message::{Broken, CHUNK, CHUNK_HEAD_BYTES, MAX_CONTROL_BYTES, Message, check_length};
use super::wire::{self, Limits, Queue, Wire};

const LENGTH_BYTES: usize = 4;

const LIMITS: Limits = Limits {
    chunk_bytes: 256 << 10,
    window_bytes: 8 << 20,
};

/// What is sent for data that was given up in the middle of a chunk.
const ZEROS: [u8; 4096] = [0; 4096];

/// Takes a connection.
///
/// # Errors
/// If it is closed already.
pub fn wire(stream: TcpStream) -> io::Result<Wire> {
    stream.set_nodelay(true)?;
    let (read, write) = stream.into_split();
    let traffic = Arc::new(Traffic::default());
    let reader = Reader {
        half: read,
        head: [0; LENGTH_BYTES + MAX_CONTROL_BYTES],
        filled: 0,
        data: 0,
        traffic: Arc::clone(&traffic),
    };
    let writer = Writer {
        half: write,
        queue: Queue::default(),
        current: None,
        traffic,
    };
    Ok(Wire::new(
        wire::Reader::Tcp(Box::new(reader)),
        wire::Writer::Tcp(writer),
        LIMITS,
    ))
}

/// Connects to a gateway.
///
/// # Errors
/// If nobody listens there.
pub async fn connect(address: SocketAddr) -> io::Result<Wire> {
    wire(TcpStream::connect(address).await?)
}

/// A message with its length in front; a chunk's length counts the data that is to follow.
pub(super) fn framed(message: &Message) -> Vec<u8> {
    let body = message.encode();
    let data = match message {
        Message::Chunk { length, .. } => *length,
        _ => 0,
    };
    let mut out = ((body.len() + data) as u32).to_le_bytes().to_vec();
    out.extend(body);
    out
}

#[derive(Debug)]
pub(super) struct Reader {
    half: OwnedReadHalf,
    /// Length, kind and fields of the message that is coming.
    head: [u8; LENGTH_BYTES + MAX_CONTROL_BYTES],
    /// How much of that is there.
    filled: usize,
    /// How much of a chunk's data is where it belongs.
    data: usize,
    pub(super) traffic: Arc<Traffic>,
}

impl Reader {
    /// The next message. Cancel-safe: what has come of it is kept.
    pub(super) async fn next(&mut self, incoming: &mut Incoming) -> Result<Message, Broken> {
        self.fill(LENGTH_BYTES + 1).await?;
        let length = u32::from_le_bytes([self.head[0], self.head[1], self.head[2], self.head[3]]);
        let kind = self.head[LENGTH_BYTES];
        check_length(kind, u64::from(length))?;
        let length = length as usize;
        let message = if kind == CHUNK {
            self.fill(LENGTH_BYTES + CHUNK_HEAD_BYTES).await?;
            let head = &self.head[LENGTH_BYTES..LENGTH_BYTES + CHUNK_HEAD_BYTES];
            let chunk = Message::decode_chunk(head, length)?;
            self.data(&chunk, incoming).await?;
            chunk
        } else {
            self.fill(LENGTH_BYTES + length).await?;
            Message::decode(&self.head[LENGTH_BYTES..LENGTH_BYTES + length])?
        };
        (self.filled, self.data) = (0, 0);
        Ok(message)
    }

    /// Reads until the other end closes.
    pub(super) async fn drain(&mut self) {
        let mut scratch = [0; 4096];
        while self.half.read(&mut scratch).await.is_ok_and(|read| read > 0) {}
    }

    async fn fill(&mut self, end: usize) -> Result<(), Broken> {
        while self.filled < end {
            let read = self.half.read(&mut self.head[self.filled..end]).await?;
            if read == 0 {
                return Err(Broken::Closed);
            }
            self.filled += read;
            self.traffic.add_received(read);
        }
        Ok(())
    }

    async fn data(&mut self, chunk: &Message, incoming: &mut Incoming) -> Result<(), Broken> {
        let Message::Chunk {
            round,
            offset,
            length,
        } = *chunk
        else {
            return Ok(());
        };
        while self.data < length {
            let read = match incoming.sink(round, offset, length)? {
                Sink::Into(place) => self.half.read(&mut place[self.data..]).await?,
                Sink::Away => {
                    let mut scratch = [0; 4096];
                    let most = scratch.len().min(length - self.data);
                    self.half.read(&mut scratch[..most]).await?
                }
            };
            if read == 0 {
                return Err(Broken::Closed);
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
    pub(super) traffic: Arc<Traffic>,
}

/// The message that is being written.
#[derive(Debug)]
struct Current {
    head: Vec<u8>,
    /// A chunk's round, offset and length: its data follows.
    data: Option<(u32, u64, usize)>,
    written: usize,
}

impl Current {
    fn total(&self) -> usize {
        self.head.len() + self.data.map_or(0, |(_, _, bytes)| bytes)
    }

    /// What is to be written next.
    fn rest<'a>(&'a self, outgoing: Option<&'a Outgoing>) -> &'a [u8] {
        let Some(into) = self.written.checked_sub(self.head.len()) else {
            return &self.head[self.written..];
        };
        let Some((round, offset, bytes)) = self.data else {
            return &[];
        };
        let left = bytes - into;
        let data = outgoing.filter(|outgoing| outgoing.round() == round);
        let data = data.map_or(&[][..], |outgoing| outgoing.data(offset + into as u64));
        // Given up in the middle: the message must still be as long as it said.
        let data = if data.is_empty() { &ZEROS[..] } else { data };
        &data[..left.min(data.len())]
    }
}

impl Writer {
    pub(super) async fn drive(&mut self, mut outgoing: Option<&mut Outgoing>, limits: &Limits) -> Broken {
        loop {
            match self.write(outgoing.as_deref_mut(), limits).await {
                Ok(true) => {}
                Ok(false) => std::future::pending().await,
                Err(broken) => return broken,
            }
        }
    }

    pub(super) async fn flush(&mut self) -> Result<(), Broken> {
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
    async fn write(&mut self, mut outgoing: Option<&mut Outgoing>, limits: &Limits) -> Result<bool, Broken> {
        if self.current.is_none() {
            self.current = match self.queue.pop()? {
                Some(head) => Some(Current {
                    head,
                    data: None,
                    written: 0,
                }),
                None => outgoing
                    .as_deref_mut()
                    .and_then(|outgoing| begin(outgoing, limits)),
            };
        }
        let Some(current) = &mut self.current else {
            return Ok(false);
        };
        let written = self.half.write(current.rest(outgoing.as_deref())).await?;
        if written == 0 {
            return Err(Broken::Closed);
        }
        self.traffic.add_sent(written);
        current.written += written;
        if current.written >= current.total() {
            self.current = None;
        }
        Ok(true)
    }
}

/// The next chunk, if one may go.
fn begin(outgoing: &mut Outgoing, limits: &Limits) -> Option<Current> {
    let (round, offset, length) = outgoing.next_chunk(limits)?;
    outgoing.mark_sent(length);
    let head = framed(&Message::Chunk {
        round,
        offset,
        length,
    });
    Some(Current {
        head,
        data: Some((round, offset, length)),
        written: 0,
    })
}
