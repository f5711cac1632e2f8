//! A session's connection: messages in order, or broken.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use super::message::{Malformed, Message, SessionError};
#[cfg(feature = "mqtt")]
use super::mqtt;
use super::transfers::{Incoming, Outgoing, TransferEvent, Transfers};
use super::{Traffic, tcp};

/// Messages that wait to be sent; who lets more pile up does not read.
const QUEUE: usize = 1024;

/// How much of an object is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest chunk's data.
    pub chunk_bytes: usize,
    /// Bytes sent and not acknowledged.
    pub window_bytes: u64,
}

/// One connection of one worker's session.
#[derive(Debug)]
pub struct Wire {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) limits: Limits,
    pub(super) heard: Instant,
    pub(super) said: Instant,
}

#[derive(Debug)]
pub(super) enum Reader {
    Tcp(Box<tcp::Reader>),
    #[cfg(feature = "mqtt")]
    Mqtt(mqtt::Reader),
}

#[derive(Debug)]
pub(super) enum Writer {
    Tcp(Box<tcp::Writer>),
    #[cfg(feature = "mqtt")]
    Mqtt(Box<mqtt::Writer>),
}

/// Encoded messages that wait.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: VecDeque<Vec<u8>>,
}

impl Queue {
    pub(super) fn push(&mut self, message: Vec<u8>) {
        // One too many is kept, as the mark that there were too many.
        if self.waiting.len() <= QUEUE {
            self.waiting.push_back(message);
        }
    }

    pub(super) fn pop(&mut self) -> Result<Option<Vec<u8>>, SessionError> {
        if self.waiting.len() > QUEUE {
            return Err(SessionError::Unread);
        }
        Ok(self.waiting.pop_front())
    }
}

impl Reader {
    pub(super) async fn next(&mut self, incoming: &mut Incoming) -> Result<Message, SessionError> {
        match self {
            Self::Tcp(reader) => reader.next(incoming).await,
            #[cfg(feature = "mqtt")]
            Self::Mqtt(reader) => reader.next(incoming).await,
        }
    }
}

impl Writer {
    /// Sends whatever may be sent; ends only when the connection does. Cancel-safe.
    pub(super) async fn drive(&mut self, outgoing: Option<&mut Outgoing>, limits: &Limits) -> SessionError {
        match self {
            Self::Tcp(writer) => writer.drive(outgoing, limits).await,
            #[cfg(feature = "mqtt")]
            Self::Mqtt(writer) => writer.drive(outgoing, limits).await,
        }
    }
}

impl Wire {
    pub(super) fn new(reader: Reader, writer: Writer, limits: Limits) -> Self {
        let now = Instant::now();
        Self {
            reader,
            writer,
            limits,
            heard: now,
            said: now,
        }
    }

    /// Counts this wire's bytes there, from here on.
    pub fn count_in(&mut self, traffic: Arc<Traffic>) {
        match &mut self.reader {
            Reader::Tcp(reader) => reader.traffic = Arc::clone(&traffic),
            #[cfg(feature = "mqtt")]
            Reader::Mqtt(reader) => reader.traffic = Arc::clone(&traffic),
        }
        match &mut self.writer {
            Writer::Tcp(writer) => writer.traffic = traffic,
            #[cfg(feature = "mqtt")]
            Writer::Mqtt(writer) => writer.traffic = traffic,
        }
    }

    /// Makes chunks at most so long, where a broker may find longer ones too long.
    pub fn limit_chunks(&mut self, bytes: usize) {
        if !matches!(self.writer, Writer::Tcp(_)) {
            let chunks = self.limits.window_bytes / self.limits.chunk_bytes as u64;
            self.limits.chunk_bytes = self.limits.chunk_bytes.min(bytes).max(1);
            self.limits.window_bytes = chunks * self.limits.chunk_bytes as u64;
        }
    }

    /// Puts a message into the queue, which [`Transfers::next`] sends.
    pub fn send(&mut self, message: &Message) {
        self.said = Instant::now();
        match &mut self.writer {
            Writer::Tcp(writer) => writer.queue.push(message.encode()),
            #[cfg(feature = "mqtt")]
            Writer::Mqtt(writer) => writer.queue.push(message.encode()),
        }
    }

    /// Sends what is in the queue.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn flush(&mut self) -> Result<(), SessionError> {
        match &mut self.writer {
            Writer::Tcp(writer) => writer.flush().await,
            #[cfg(feature = "mqtt")]
            Writer::Mqtt(writer) => writer.flush().await,
        }
    }

    /// Says a last word and closes. A connection is closed in an orderly way: what is thrown at it meanwhile is read and
    /// dropped, or the kernel would reset it and the last word could be lost.
    pub async fn close(mut self, last_word: &Message) {
        self.send(last_word);
        if self.flush().await.is_err() {
            return;
        }
        match (&mut self.reader, &mut self.writer) {
            (Reader::Tcp(reader), Writer::Tcp(writer)) => {
                writer.shut().await;
                reader.drain().await;
            }
            #[cfg(feature = "mqtt")]
            _ => {}
        }
    }

    /// Waits for the gateway's welcome.
    ///
    /// # Errors
    /// If it does not let us in.
    pub async fn welcomed(&mut self) -> Result<(), SessionError> {
        match Transfers::default().next(self).await? {
            TransferEvent::Message(Message::Welcome) => Ok(()),
            TransferEvent::Message(other) => Err(Malformed::Unexpected(other.name()).into()),
            _ => Err(Malformed::Unexpected("an object").into()),
        }
    }
}
