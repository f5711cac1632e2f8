//! The messages and their bytes.

use std::io;
use std::time::Duration;

use super::handshake::HandshakeError;
use super::reach::Exposed;
use crate::update::{Cover, MAX_TRAINERS, Schema, UpdateInfo, loss_bits, loss_of_bits};

/// The longest chunk's data.
pub(super) const MAX_CHUNK_BYTES: usize = 1 << 20;

/// A chunk's kind, round and offset.
pub(super) const CHUNK_HEAD_BYTES: usize = 1 + 4 + 8;

/// The longest message that is no chunk.
pub(super) const MAX_CONTROL_BYTES: usize = 1024 + MAX_COVER_BYTES;

/// The longest [`Cover`].
const MAX_COVER_BYTES: usize = MAX_TRAINERS as usize / 8;

pub(super) const MAX_REASON_BYTES: usize = 512;

pub(super) const CHUNK: u8 = 6;
pub(super) const BYE: u8 = 12;

/// What is to come in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The job's round.
    pub round: u32,
    /// Bytes of data, all tensors.
    pub length: u64,
    /// The schema's digest.
    pub schema: u64,
}

impl Object {
    /// A model or an update of that round.
    pub fn of(round: u32, schema: &Schema) -> Self {
        Self {
            round,
            length: schema.data_bytes() as u64,
            schema: schema.digest(),
        }
    }
}

/// One message. See the table in [`session`](super).
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// The gateway has let the worker in.
    Welcome,
    /// The worker can begin.
    Ready,
    /// A model is to come.
    Model(Object),
    /// An update is to come, and what its maker says of it, but for [times](UpdateInfo::made): those of another machine's clock
    /// mean nothing here.
    Update(Object, UpdateInfo),
    /// A piece of an object has come; its bytes are where the object's are.
    Chunk {
        /// Of which round.
        round: u32,
        /// Where it begins.
        offset: u64,
        /// Its bytes.
        length: usize,
    },
    /// All before the offset is there.
    Ack {
        /// Of which round's object.
        round: u32,
        /// So much.
        offset: u64,
    },
    /// What became of an update.
    Verdict {
        /// Which round's.
        round: u32,
        /// A [`Refusal`](crate::frame::Refusal) as a number; 0: accepted.
        refusal: u16,
    },
    /// No update in that round.
    Nothing(u32),
    /// Still there.
    Ping,
    /// The job is over, and why.
    End(String),
    /// The session is over.
    Bye {
        /// Whether it is no use to come again.
        last: bool,
        /// Why.
        reason: String,
    },
}

/// What is wrong with bytes that came.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Malformed {
    /// Longer than any message of its kind, or shorter.
    #[error("a message of kind {kind} with {bytes} bytes")]
    Length {
        /// The kind.
        kind: u8,
        /// The length that was announced.
        bytes: u64,
    },
    /// No such kind.
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    /// The fields do not fill the message, or do not fit.
    #[error("a message of kind {0} whose fields are not as long as it is")]
    Fields(u8),
    /// Not sealed by the session's key for this place: changed, out of order, or somebody else's.
    #[error("a message that the other end has not sent like this")]
    Seal,
    /// A text that is none.
    #[error("a text that is not UTF-8")]
    Text,
    /// A chunk that nobody asked for.
    #[error(
        "a chunk of round {round} at byte {offset} with {bytes} bytes, which does not go on where the last ended"
    )]
    Chunk {
        /// Its round.
        round: u32,
        /// Its offset.
        offset: u64,
        /// Its bytes.
        bytes: usize,
    },
    /// An acknowledgement of what was not sent.
    #[error("an acknowledgement of byte {offset} of round {round}, which was not sent")]
    Ack {
        /// Its round.
        round: u32,
        /// Its offset.
        offset: u64,
    },
    /// A message that has no place here.
    #[error("{0} was not expected")]
    Unexpected(&'static str),
}

/// Why a session is over or broken.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The transport failed.
    #[error("the connection failed")]
    Io(#[from] io::Error),
    /// The transport was closed.
    #[error("the connection was closed")]
    Closed,
    /// The MQTT broker failed, or does not take what it is sent.
    #[cfg(feature = "mqtt")]
    #[error("the connection with the MQTT broker failed")]
    Broker(#[from] Box<rumqttc::v5::ConnectionError>),
    /// One end has not proved itself.
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    /// It would go over a public network.
    #[error("the connection is not made")]
    Exposed(#[from] Exposed),
    /// Not let in, by somebody who has not proved to be the gateway.
    #[error("whoever answered did not let us in and said {0:?}")]
    Refused(String),
    /// Not even a ping.
    #[error("nothing was heard for {} s", .0.as_secs())]
    Silent(Duration),
    /// Data goes out and nothing is acknowledged.
    #[error("nothing was acknowledged for {} s", .0.as_secs())]
    Stalled(Duration),
    /// Messages that move nothing, more than any work needs.
    #[error("more messages without data than there is use for")]
    Flood,
    /// Not the protocol.
    #[error("the other end does not keep to the protocol")]
    Malformed(#[from] Malformed),
    /// Messages of this session were lost on the way.
    #[error("messages were lost on the way")]
    Gap,
    /// It does not take what it is sent.
    #[error("the other end does not read")]
    Unread,
    /// It said so.
    #[error("the other end ended the session: {reason}")]
    Bye {
        /// Whether it is no use to come again.
        last: bool,
        /// Why.
        reason: String,
    },
}

impl SessionError {
    /// Whether it is no use to try again.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Bye { last: true, .. } | Self::Exposed(_))
    }
}

impl Message {
    /// Kind and fields. A chunk's data is not among them: it follows.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        match self {
            Self::Welcome => out.push(2),
            Self::Ready => out.push(3),
            Self::Model(object) => {
                out.push(4);
                put_object(&mut out, object);
            }
            Self::Update(object, info) => {
                out.push(5);
                put_object(&mut out, object);
                out.extend(info.samples.to_le_bytes());
                out.extend(loss_bits(info.loss).to_le_bytes());
                out.extend(info.folded.to_le_bytes());
                out.extend(info.bytes_copied.to_le_bytes());
                let cover = info.cover.to_bytes();
                out.extend((cover.len() as u16).to_le_bytes());
                out.extend(cover);
            }
            Self::Chunk { round, offset, .. } => {
                out.push(CHUNK);
                out.extend(round.to_le_bytes());
                out.extend(offset.to_le_bytes());
            }
            Self::Ack { round, offset } => {
                out.push(7);
                out.extend(round.to_le_bytes());
                out.extend(offset.to_le_bytes());
            }
            Self::Verdict { round, refusal } => {
                out.push(8);
                out.extend(round.to_le_bytes());
                out.extend(refusal.to_le_bytes());
            }
            Self::Nothing(round) => {
                out.push(9);
                out.extend(round.to_le_bytes());
            }
            Self::Ping => out.push(10),
            Self::End(reason) => {
                out.push(11);
                put_reason(&mut out, reason);
            }
            Self::Bye { last, reason } => {
                out.push(12);
                out.push(u8::from(*last));
                put_reason(&mut out, reason);
            }
        }
        out
    }

    /// Reads kind and fields back, of any message but a chunk.
    ///
    /// # Errors
    /// If they are not exactly one message.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (&kind, fields) = bytes
            .split_first()
            .ok_or(Malformed::Length { kind: 0, bytes: 0 })?;
        check_length(kind, bytes.len() as u64)?;
        let mut fields = Fields { kind, left: fields };
        let message = match kind {
            2 => Self::Welcome,
            3 => Self::Ready,
            4 => Self::Model(fields.object()?),
            5 => {
                let object = fields.object()?;
                let info = UpdateInfo {
                    samples: fields.u64()?,
                    loss: loss_of_bits(fields.u64()?),
                    folded: fields.u64()?,
                    bytes_copied: fields.u64()?,
                    cover: fields.cover()?,
                    made: Vec::new(),
                };
                Self::Update(object, info)
            }
            7 => Self::Ack {
                round: fields.u32()?,
                offset: fields.u64()?,
            },
            8 => Self::Verdict {
                round: fields.u32()?,
                refusal: fields.u16()?,
            },
            9 => Self::Nothing(fields.u32()?),
            10 => Self::Ping,
            11 => Self::End(fields.reason()?),
            12 => Self::Bye {
                last: fields.array::<1>()?[0] != 0,
                reason: fields.reason()?,
            },
            other => return Err(Malformed::Kind(other)),
        };
        if fields.left.is_empty() {
            Ok(message)
        } else {
            Err(Malformed::Fields(kind))
        }
    }

    /// Reads a chunk's kind, round and offset; `total` bytes are the message with its data.
    pub(super) fn decode_chunk(head: &[u8], total: usize) -> Result<Self, Malformed> {
        check_length(CHUNK, total as u64)?;
        let mut fields = Fields {
            kind: CHUNK,
            left: head.get(1..).unwrap_or_default(),
        };
        Ok(Self::Chunk {
            round: fields.u32()?,
            offset: fields.u64()?,
            length: total - CHUNK_HEAD_BYTES,
        })
    }

    /// What it is called.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::Ready => "ready",
            Self::Model(_) => "model",
            Self::Update(..) => "update",
            Self::Chunk { .. } => "chunk",
            Self::Ack { .. } => "ack",
            Self::Verdict { .. } => "verdict",
            Self::Nothing(_) => "nothing",
            Self::Ping => "ping",
            Self::End(_) => "end",
            Self::Bye { .. } => "bye",
        }
    }

    /// The header of an object that is to come.
    pub fn object(&self) -> Option<&Object> {
        match self {
            Self::Model(object) | Self::Update(object, _) => Some(object),
            _ => None,
        }
    }
}

/// Whether a message of that kind may have that length, kind included. Nothing is read or made before.
pub(super) fn check_length(kind: u8, bytes: u64) -> Result<(), Malformed> {
    let (least, most) = match kind {
        CHUNK => (CHUNK_HEAD_BYTES + 1, CHUNK_HEAD_BYTES + MAX_CHUNK_BYTES),
        2..=12 => (1, MAX_CONTROL_BYTES),
        other => return Err(Malformed::Kind(other)),
    };
    if (least as u64..=most as u64).contains(&bytes) {
        return Ok(());
    }
    Err(Malformed::Length { kind, bytes })
}

fn put_object(out: &mut Vec<u8>, object: &Object) {
    out.extend(object.round.to_le_bytes());
    out.extend(object.length.to_le_bytes());
    out.extend(object.schema.to_le_bytes());
}

fn put_reason(out: &mut Vec<u8>, reason: &str) {
    let reason = cut(reason, MAX_REASON_BYTES);
    out.extend((reason.len() as u16).to_le_bytes());
    out.extend(reason.as_bytes());
}

/// At most so many bytes of a text, whole characters.
fn cut(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A message's fields, taken from the front.
struct Fields<'a> {
    kind: u8,
    left: &'a [u8],
}

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (first, rest) = self
            .left
            .split_first_chunk::<N>()
            .ok_or(Malformed::Fields(self.kind))?;
        self.left = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, bytes: usize, most: usize) -> Result<String, Malformed> {
        if bytes > most || bytes > self.left.len() {
            return Err(Malformed::Fields(self.kind));
        }
        let (text, rest) = self.left.split_at(bytes);
        self.left = rest;
        std::str::from_utf8(text)
            .map(str::to_owned)
            .map_err(|_| Malformed::Text)
    }

    fn object(&mut self) -> Result<Object, Malformed> {
        Ok(Object {
            round: self.u32()?,
            length: self.u64()?,
            schema: self.u64()?,
        })
    }

    fn cover(&mut self) -> Result<Cover, Malformed> {
        let bytes = usize::from(self.u16()?);
        let cover = self.left.split_at_checked(bytes);
        let (cover, rest) = cover.ok_or(Malformed::Fields(self.kind))?;
        self.left = rest;
        Cover::from_bytes(cover).map_err(|_| Malformed::Fields(self.kind))
    }

    fn reason(&mut self) -> Result<String, Malformed> {
        let bytes = usize::from(self.u16()?);
        self.text(bytes, MAX_REASON_BYTES)
    }
}
