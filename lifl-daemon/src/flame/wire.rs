//! What Flame's workers say: registrations, and references as they come over plain TCP.
//!
//! A worker that is not in the sockmap yet, or is on the relay plane, writes its references to its connection with the
//! daemon. They come as a stream, and nothing says how long one is; but a reference is an id and the fields of one
//! protobuf message in the order of their numbers: two texts, then two numbers (`seqno` and `eom`), and no payload. So
//! [`Splitter`] finds its end. One that lacks a number, which Flame never sends, ends where the next begins or the stream
//! falls silent.

use lifl_common::flame::{
    Address, HEADER_BYTES, LONGEST_REFERENCE_BYTES, MESSAGE_BYTES, PADDING_TAG, STAMP_BYTES,
};
use zerocopy::{FromBytes, FromZeros};

/// What a worker says to be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registration {
    /// Its process.
    pub(super) pid: u32,
    /// The number, in that process, of the socket that is to be registered.
    pub(super) fd: u32,
    /// What others name it by.
    pub(super) id: u32,
}

impl Registration {
    /// Bytes of the short form, which Flame's SDK sends.
    pub(super) const SHORT_BYTES: usize = 10;
    /// Bytes of the long form, with an id of 32 bits.
    pub(super) const LONG_BYTES: usize = 12;

    /// Reads 10 or 12 bytes, little endian; `None` for any other number of bytes.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let id = match *bytes.get(8..)? {
            [a, b] => u32::from_le_bytes([a, b, 0, 0]),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return None,
        };
        let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            pid: number(0)?,
            fd: number(4)?,
            id,
        })
    }
}

/// What a worker reads: a reference, padded to the size of its `recv`.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Message(Box<[u8; MESSAGE_BYTES]>);

impl Message {
    /// Pads a reference. `None` if it is too short or too long for one.
    pub(super) fn pad(reference: &[u8]) -> Option<Self> {
        if !(HEADER_BYTES..=LONGEST_REFERENCE_BYTES).contains(&reference.len()) {
            return None;
        }
        let mut bytes = Box::new([0; MESSAGE_BYTES]);
        bytes[..reference.len()].copy_from_slice(reference);
        let rest = MESSAGE_BYTES - reference.len() - 3;
        // A varint of two bytes, whatever the number.
        let padding = [PADDING_TAG, (rest & 0x7f) as u8 | 0x80, (rest >> 7) as u8];
        bytes[reference.len()..][..3].copy_from_slice(&padding);
        Some(Self(bytes))
    }

    /// A message without anything in it: Flame's receiver takes it for one on a channel that it does not have.
    pub(super) fn empty(receiver: u32) -> Self {
        Self::pad(&receiver.to_le_bytes()).expect("a header alone can be padded")
    }

    /// Takes what the kernel program handed to the daemon: the message, and its sender.
    pub(super) fn unstamp(bytes: &[u8; MESSAGE_BYTES]) -> (Address, Self) {
        let mut bytes = Box::new(*bytes);
        let stamp = &mut bytes[MESSAGE_BYTES - STAMP_BYTES..];
        let sender = Address::read_from_bytes(stamp).expect("a stamp's size");
        stamp.zero();
        (sender, Self(bytes))
    }

    /// The receiver's id.
    pub(super) fn receiver(&self) -> u32 {
        u32::from_le_bytes([self.0[0], self.0[1], self.0[2], self.0[3]])
    }

    /// As it goes over the wire.
    pub(super) fn bytes(&self) -> &[u8; MESSAGE_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Message(to {:x})", self.receiver())
    }
}

/// Bytes that are no reference, however many more come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are no reference (an id of 4 bytes, then a protobuf message)")]
pub(super) struct NotAReference;

/// Cuts a stream into references.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    /// What has come and is not part of a whole reference.
    bytes: Vec<u8>,
}

/// Protobuf's wire types.
const VARINT: u8 = 0;
const TEXT: u8 = 2;

/// What stands at some place of a reference.
enum Field {
    /// A field that ends there.
    Ends(usize, u8),
    /// A field whose end has not come.
    Begins,
    /// No field with a higher number than the last one.
    Other,
}

impl Splitter {
    /// Whether there is the beginning of a reference, or one whose end is not sure.
    pub(super) fn is_waiting(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The bytes of it.
    #[cfg(feature = "fuzzing")]
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes
    }

    /// The stream has fallen silent: what ends with a field is a whole reference.
    pub(super) fn flush(&mut self) -> Option<Message> {
        let (mut at, mut last) = (HEADER_BYTES, 0);
        while let Field::Ends(end, number) = self.field(at, last) {
            (at, last) = (end, number);
        }
        if at != self.bytes.len() || last == 0 {
            return None;
        }
        Message::pad(&std::mem::take(&mut self.bytes))
    }

    /// Takes what came in one read, and gives the references that are whole now to `whole`, also those before what is
    /// none: what was said does not depend on how it was cut.
    pub(super) fn push(&mut self, bytes: &[u8], whole: &mut Vec<Message>) -> Result<(), NotAReference> {
        self.bytes.extend_from_slice(bytes);
        while let Some(end) = self.end_of_first()? {
            whole.push(Message::pad(&self.bytes[..end]).ok_or(NotAReference)?);
            self.bytes.drain(..end);
        }
        Ok(())
    }

    /// Where the first reference ends; `None` if more must come first.
    fn end_of_first(&self) -> Result<Option<usize>, NotAReference> {
        /// `seqno` and `eom`.
        const NUMBERS: u32 = 2;
        let (mut at, mut last, mut numbers) = (HEADER_BYTES, 0, 0);
        loop {
            match self.field(at, last) {
                Field::Ends(end, number) => {
                    numbers += u32::from(self.bytes[at] & 7 == VARINT);
                    (at, last) = (end, number);
                }
                Field::Begins if self.bytes.len() > LONGEST_REFERENCE_BYTES => return Err(NotAReference),
                Field::Begins => return Ok(None),
                Field::Other if last == 0 => return Err(NotAReference),
                Field::Other => return Ok(Some(at)),
            }
            if numbers == NUMBERS {
                return Ok(Some(at));
            }
        }
    }

    /// The field at a place, if one does stand there: its tag is one byte, its number above `last`.
    fn field(&self, at: usize, last: u8) -> Field {
        let Some(&tag) = self.bytes.get(at) else {
            return Field::Begins;
        };
        let number = tag >> 3;
        if tag & 0x80 != 0 || number <= last {
            return Field::Other;
        }
        let Some((value, after)) = varint(&self.bytes, at + 1) else {
            let is_too_long = self.bytes.len() > at + 10;
            return if is_too_long { Field::Other } else { Field::Begins };
        };
        let end = match tag & 7 {
            VARINT => after,
            TEXT => match usize::try_from(value)
                .ok()
                .and_then(|length| after.checked_add(length))
            {
                Some(end) if end <= LONGEST_REFERENCE_BYTES => end,
                _ => return Field::Other,
            },
            _ => return Field::Other,
        };
        if end <= self.bytes.len() {
            Field::Ends(end, number)
        } else {
            Field::Begins
        }
    }
}

/// A number of at most 9 bytes, and where it ends.
fn varint(bytes: &[u8], start: usize) -> Option<(u64, usize)> {
    let mut value = 0;
    for (i, byte) in bytes.get(start..)?.iter().take(9).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some((value, start + i + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn reference(id: u32, sender: &str, channel: &str, length: u64, eom: bool) -> Vec<u8> {
        let mut bytes = id.to_le_bytes().to_vec();
        for (tag, text) in [(0x0a, sender), (0x12, channel)] {
            bytes.extend([tag, text.len() as u8]);
            bytes.extend(text.as_bytes());
        }
        bytes.push(0x18);
        let mut rest = length;
        while rest >= 0x80 {
            bytes.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        if eom {
            bytes.extend([0x20, 1]);
        }
        bytes
    }

    /// The message's fields by number, as any protobuf reader finds them.
    fn fields(message: &Message) -> Vec<(u64, Vec<u8>)> {
        let (bytes, mut at, mut found) = (message.bytes(), HEADER_BYTES, Vec::new());
        while at < bytes.len() {
            let (tag, after) = varint(bytes, at).expect("a tag");
            let (value, after) = varint(bytes, after).expect("a value");
            let end = if tag & 7 == 2 {
                after + value as usize
            } else {
                after
            };
            found.push((tag >> 3, bytes[after..end].to_vec()));
            at = end;
        }
        assert_eq!(at, bytes.len(), "the padding ends with the message");
        found
    }

    #[test]
    fn registrations_have_10_or_12_bytes() {
        let bytes = [1, 2, 0, 0, 9, 0, 0, 0, 0xa7, 0x43, 1, 2];
        let short = Registration {
            pid: 0x201,
            fd: 9,
            id: 0x43a7,
        };
        assert_eq!(Registration::parse(&bytes[..10]), Some(short));
        assert_eq!(
            Registration::parse(&bytes),
            Some(Registration {
                id: 0x0201_43a7,
                ..short
            })
        );
        for length in [0, 8, 9, 11] {
            assert_eq!(Registration::parse(&bytes[..length]), None, "{length}");
        }
    }

    #[test]
    fn every_length_can_be_padded_so_that_protobuf_reads_what_it_read_before() {
        for length in 60..=LONGEST_REFERENCE_BYTES {
            let mut bytes = 7_u32.to_le_bytes().to_vec();
            let text = length - HEADER_BYTES - 3;
            bytes.extend([0x0a, (text & 0x7f) as u8 | 0x80, (text >> 7) as u8]);
            bytes.resize(length, b'x');
            let message = Message::pad(&bytes).expect("padded");
            let fields = fields(&message);
            assert_eq!(
                (fields.len(), fields[0].1.len(), fields[1].0),
                (2, text, 15),
                "{length}"
            );
            assert!(fields[1].1.iter().all(|byte| *byte == 0));
        }
        assert_eq!(Message::pad(&[0; LONGEST_REFERENCE_BYTES + 1]), None);
        assert_eq!(Message::pad(&[0; 3]), None);
    }

    #[test]
    fn a_stamp_is_taken_out() {
        let sender = Address {
            uid: 1000,
            id: 0x43a7,
        };
        let message = Message::pad(&reference(5, "a", "b", 3, true)).expect("padded");
        let mut stamped = *message.bytes();
        stamped[MESSAGE_BYTES - STAMP_BYTES..].copy_from_slice(sender.as_bytes());
        assert_eq!(Message::unstamp(&stamped), (sender, message));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[0xff; 2000]] {
            let mut whole = Vec::new();
            let pushed = Splitter::default().push(garbage, &mut whole);
            assert_eq!((pushed, whole), (Err(NotAReference), Vec::new()), "{garbage:?}");
        }
    }

    #[test]
    fn a_reference_is_taken_whether_or_not_what_is_none_came_with_it() {
        let written = reference(7, "a", "b", 3, true);
        let message = Message::pad(&written).expect("padded");
        for cut in [1, written.len(), 100] {
            let mut splitter = Splitter::default();
            let mut whole = Vec::new();
            let stream = [&written[..], b"GET / HTTP/1.1\r\n\r\n"].concat();
            let refused = stream
                .chunks(cut)
                .any(|piece| splitter.push(piece, &mut whole).is_err());
            assert!(refused);
            assert_eq!(whole, std::slice::from_ref(&message), "in pieces of {cut} bytes");
        }
    }

    #[test]
    fn without_eom_a_reference_ends_in_silence_or_where_the_next_begins() {
        let written = reference(7, "a", "b", 3, false);
        let message = Message::pad(&written).expect("padded");
        let mut splitter = Splitter::default();
        let push = |splitter: &mut Splitter, bytes: &[u8]| {
            let mut whole = Vec::new();
            splitter.push(bytes, &mut whole).map(|()| whole)
        };
        assert_eq!(push(&mut splitter, &written[..4]), Ok(Vec::new()));
        assert_eq!(splitter.flush(), None, "a header alone");
        assert_eq!(push(&mut splitter, &written[4..]), Ok(Vec::new()));
        assert_eq!(push(&mut splitter, &written), Ok(vec![message.clone()]));
        assert_eq!(splitter.flush(), Some(message));
        assert!(!splitter.is_waiting());
    }

    proptest! {
        /// However many were written at once, and wherever the stream is cut.
        #[test]
        fn a_stream_is_cut_where_the_writes_were(
            lengths in proptest::collection::vec((any::<u16>(), any::<u64>()), 1..8),
            cut in 1_usize..200,
        ) {
            let task = "49d06b7526964db86cf37c70e8e0cdb6bd7aa743";
            let written: Vec<Vec<u8>> = lengths
                .iter()
                .map(|&(id, length)| reference(u32::from(id), task, "param-channel", length >> 2, true))
                .collect();
            let mut splitter = Splitter::default();
            let mut read = Vec::new();
            for piece in written.concat().chunks(cut) {
                if let Err(error) = splitter.push(piece, &mut read) {
                    return Err(TestCaseError::fail(error.to_string()));
                }
            }
            let expected: Vec<Message> =
                written.iter().map(|bytes| Message::pad(bytes).expect("padded")).collect();
            prop_assert_eq!(read, expected);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let mut splitter = Splitter::default();
            for piece in bytes.chunks(97) {
                if splitter.push(piece, &mut Vec::new()).is_err() {
                    break;
                }
            }
            prop_assert!(splitter.bytes.len() <= LONGEST_REFERENCE_BYTES + 97);
        }
    }
}
