//! The frame: the fixed-size message on a worker's socket.
//!
//! Frames carry references, never model bytes. All are [`Frame::BYTES`] long, so a stream of them needs no
//! framing. One write to the socket is some whole frames, or a piece of one that ends where the frame ends at the
//! latest; a sockmap loses what goes beyond. The kernel program reads the destination, the source and the key's length; the rest is between workers.

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::id::{Generation, Key, WorkerId};

/// One message between two workers of a job.
///
/// Layout (64 bytes, native endian: a frame never leaves its node):
///
/// | offset | field | meaning |
/// | --- | --- | --- |
/// | 0 | `to` | destination |
/// | 4 | `from` | source; must be the sending socket's worker |
/// | 8 | `kind` | a [`FrameKind`] |
/// | 10 | `refusal` | a [`Refusal`]: why, in a dead letter and in a [`FrameKind::Refuse`] |
/// | 12 | `round` | the job's round, from 1 |
/// | 16 | `key` | the object that is lent or released |
/// | 32 | `length` | bytes of that object that are in use |
/// | 40 | `samples` | training samples behind an update |
/// | 48 | `value` | by kind, see [`FrameKind`] |
/// | 56 | `stamp` | 0; in a dead letter the sending socket's worker, written by the plane |
/// | 60 | `covers` | trainers whose updates an update contains |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Frame {
    /// Destination.
    pub to: WorkerId,
    /// Source, as the sender gives it.
    pub from: WorkerId,
    /// A [`FrameKind`] as a number.
    pub kind: u16,
    /// A [`Refusal`] as a number, 0 for none.
    pub refusal: u16,
    /// The round.
    pub round: u32,
    /// The object.
    pub key: Key,
    /// Bytes of the object in use.
    pub length: u64,
    /// Samples behind the update.
    pub samples: u64,
    /// Kind-specific.
    pub value: u64,
    /// The true sender, written by the plane into a dead letter.
    pub stamp: WorkerId,
    /// Trainers covered.
    pub covers: u32,
}

impl Frame {
    /// Every frame's size.
    pub const BYTES: usize = 64;

    /// The frame with 64 trainers of a cover in its key: the word of that number.
    #[must_use]
    pub const fn with_cover_word(mut self, at: u32, word: u64) -> Self {
        self.key.slot = at;
        self.key.generation = Generation(word);
        self
    }

    /// The number of the word that a [`Child`](FrameKind::Child) frame carries, and the word.
    pub const fn cover_word(&self) -> (u32, u64) {
        (self.key.slot, self.key.generation.0)
    }
}

const _: () = assert!(size_of::<Frame>() == Frame::BYTES);
const _: () = assert!(core::mem::offset_of!(Frame, to) == 0);
const _: () = assert!(core::mem::offset_of!(Frame, from) == 4);
const _: () = assert!(core::mem::offset_of!(Frame, refusal) == 10);
const _: () = assert!(core::mem::offset_of!(Frame, length) == 32);
const _: () = assert!(core::mem::offset_of!(Frame, stamp) == 56);

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $n:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[cfg_attr(feature = "std", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "std", serde(rename_all = "snake_case"))]
        #[repr(u16)]
        pub enum $name { $($(#[$vdoc])* $variant = $n,)* }

        impl $name {
            /// The variant of that number, if there is one.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($n => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

numbered!(
    /// What a frame says.
    FrameKind {
        /// Worker to coordinator: registered, arena made, data loaded.
        Ready = 1,
        /// Coordinator to parent: `value` is the id of one of this round's children; they come in folding order, and
        /// each has its place in it for all of the round. Said again, another id in a place is a successor's, and 0
        /// says that nobody is waited for there any more. What an update from that place may say at most: `samples`,
        /// and trainers of the [word](Frame::cover_word) of a cover that the frame carries; `covers` frames follow for
        /// the same place, each with a further word.
        Child = 2,
        /// Coordinator to everyone who takes part in the round, after the `Child`ren: `value` is the parent's id
        /// (0 for the top), `covers` the number of `Child` frames before it. It may come again in the same round, with
        /// the same parent or that one's successor: whoever hears it says again what it has said and what is not settled.
        Begin = 3,
        /// Parent to child, and top to coordinator at a round's end: the global model, lent. From the top to the
        /// coordinator, `covers` is the number of trainers whose updates it contains.
        Model = 4,
        /// Child to parent: an update or an aggregate, lent. `value`: mean training loss, f64 bits.
        Update = 5,
        /// Child to parent: nothing to give this round. A trainer, or its proxy, that has failed in the round tells the
        /// coordinator the same.
        Nothing = 6,
        /// To the lender: the lent object is given back. For an update: accepted above, and counted.
        Release = 7,
        /// Parent to child: the update is given back uncounted; `refusal` says why. If that is the child's fault, the
        /// coordinator hears it too, `value` being the child's id.
        Refuse = 8,
        /// Coordinator to an aggregator above trainers: those that have not answered are not waited for any more.
        Close = 9,
        /// Parent to the successor of a child whose aggregate (`key`) it has: whom that covers, `value` being the word
        /// number `samples` of a [`Cover`](crate::update::Cover), `covers` the number of such frames. A verdict follows.
        Taken = 10,
        /// Coordinator to a worker, in a round that takes long: whether it stirs.
        Ping = 11,
        /// Worker to coordinator: it does. `round` is the last in which it has answered its parent.
        Pong = 12,
        /// Top to coordinator, immediately before the round's `Model`: what the optimizer remembers, lent. Only the
        /// `Model` makes it count.
        State = 13,
    }
);

numbered!(
    /// Why a frame or an update was not taken.
    Refusal {
        /// The destination is not a worker of this node.
        UnknownWorker = 1,
        /// The destination belongs to another job.
        OtherJob = 2,
        /// The frame's source is not the worker of the socket that it came from.
        ForgedSource = 3,
        /// The destination was registered but its socket is gone.
        WorkerGone = 4,
        /// The sending socket is not registered.
        UnknownSender = 5,
        /// The destination has too many unread frames.
        ReceiverFull = 6,
        /// The update's tensors are not the job's.
        WrongShape = 16,
        /// The update contains NaN, an infinity, or a number too large to be averaged.
        NotFinite = 17,
        /// The key names no readable object.
        BadKey = 18,
        /// The update came from no child of this round, or a second time.
        NotExpected = 19,
        /// The update's sample count is 0, or more than its trainers have.
        BadSamples = 20,
        /// The update came after its parent had stopped to wait for it.
        Late = 21,
        /// The round went on without the aggregator that had the update.
        RoundOver = 22,
        /// The update does not say whose it is, or names trainers that do not stand below its sender.
        BadCover = 24,
        /// The key's arena cannot be had: as a rule because its owner has just died.
        NoArena = 25,
        /// So few trainers' updates came that the round left the model as it was.
        NoQuorum = 23,
        /// The new model would hold NaN or infinity: the round left the model as it was.
        Diverged = 26,
    }
);

impl Refusal {
    /// Whether it is a plane that refuses so, and not a worker.
    pub const fn is_planes(self) -> bool {
        (self as u16) < Self::WrongShape as u16
    }

    /// Whether who sent the update alone is to blame, and not when it came or what became of the round.
    pub const fn is_senders_fault(self) -> bool {
        matches!(
            self,
            Self::WrongShape | Self::NotFinite | Self::BadKey | Self::BadSamples | Self::BadCover
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnknownWorker => "the destination is not a worker of this node",
            Self::OtherJob => "the destination belongs to another job",
            Self::ForgedSource => "the frame's source is not the sending socket's worker",
            Self::WorkerGone => "the destination's socket is closed",
            Self::UnknownSender => "the sending socket is not registered",
            Self::ReceiverFull => "the destination has too many unread frames",
            Self::WrongShape => "the update's tensors are not the job's",
            Self::NotFinite => "the update contains NaN, an infinity or a number too large to be averaged",
            Self::BadKey => "the key names no readable object",
            Self::NotExpected => "the update was not expected in this round",
            Self::Late => "the update came too late for its round",
            Self::RoundOver => "the round went on without the aggregator that had the update",
            Self::BadCover => {
                "the update does not say whose it is, or names trainers that are not its sender's"
            }
            Self::NoArena => "the key's arena cannot be had",
            Self::NoQuorum => "the round had fewer updates than its quorum",
            Self::Diverged => "the new model would have held NaN or infinity",
            Self::BadSamples => "the update's sample count is zero or more than its trainers have",
        })
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use proptest::prelude::*;
    use zerocopy::{FromBytes, IntoBytes};

    use super::*;

    proptest! {
        #[test]
        fn any_64_bytes_are_a_frame_and_come_back_unchanged(bytes in proptest::array::uniform32(any::<u8>())) {
            let mut image = [0_u8; Frame::BYTES];
            image[..32].copy_from_slice(&bytes);
            image[32..].copy_from_slice(&bytes);
            let frame = Frame::read_from_bytes(&image).expect("64 bytes");
            prop_assert_eq!(frame.as_bytes(), &image[..]);
        }

        #[test]
        fn kinds_and_refusals_survive_their_number(number in any::<u16>()) {
            if let Some(kind) = FrameKind::from_number(number) {
                prop_assert_eq!(kind as u16, number);
            }
            if let Some(refusal) = Refusal::from_number(number) {
                prop_assert_eq!(refusal as u16, number);
            }
        }
    }

    #[test]
    fn fields_lie_where_the_table_says() {
        let frame = Frame {
            to: WorkerId(7),
            kind: FrameKind::Update as u16,
            samples: 600,
            ..Frame::default()
        };
        let bytes = frame.as_bytes();
        assert_eq!(bytes[..4], 7_u32.to_ne_bytes());
        assert_eq!(bytes[8..10], 5_u16.to_ne_bytes());
        assert_eq!(bytes[40..48], 600_u64.to_ne_bytes());
    }
}
