//! One end of a worker's sessions: at most one object going out and one coming in, whose state outlives a connection.
//!
//! ```text
//!   outgoing:  none ── offer ──▶ announced ── first ack ──▶ granted ── ack length ──▶ none (Sent)
//!                                    ▲                          │
//!                                    └──────── resume ──────────┘   the next first ack says where to go on
//!   incoming:  none ── header: Offered, accept ──▶ receiving ── last chunk ──▶ done (Received)
//!                                                      └── abandon: chunks still on the way are passed over
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::message::{Broken, Malformed, Message, Object};
use super::object::{Room, Source};
use super::wire::{Limits, Wire};

/// Silence after which a session is broken.
pub(super) const SILENCE: Duration = Duration::from_secs(30);

/// How often an end says something.
const PING: Duration = Duration::from_secs(10);

/// How long data may be on its way without an acknowledgement.
const STALL: Duration = Duration::from_secs(15);

/// Bytes of an abandoned object that may still come.
const ABANDONED_BYTES: u64 = 64 << 20;

/// What came of waiting.
#[derive(Debug)]
pub enum Happened {
    /// The header of an object that is not here yet: [`Exchange::accept`] it when there is a place.
    Offered(Message),
    /// The object is complete.
    Received {
        /// Which.
        object: Object,
        /// Where it is.
        room: Room,
    },
    /// The other end has all of the object of that round.
    Sent(u32),
    /// Any other message.
    Message(Message),
}

/// The transfers of one worker.
#[derive(Debug, Default)]
pub struct Exchange {
    incoming: Incoming,
    outgoing: Option<Outgoing>,
    /// The last object that came whole.
    done: Option<Object>,
    ready: VecDeque<Happened>,
    moved: u64,
}

/// What is being received.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    receiving: Option<Receiving>,
    /// A round whose object is not wanted any more, and how much of it may still come.
    abandoned: Option<(u32, u64)>,
}

#[derive(Debug)]
struct Receiving {
    object: Object,
    at: u64,
    acknowledged: u64,
    room: Room,
}

/// What is being sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    header: Message,
    object: Object,
    source: Source,
    granted: bool,
    sent: u64,
    acknowledged: u64,
    progress: Instant,
}

/// Where a chunk's data goes.
pub(super) enum Sink<'a> {
    /// There.
    Into(&'a mut [u8]),
    /// Nowhere.
    Away,
}

impl Incoming {
    /// The place of a chunk.
    pub(super) fn sink(&mut self, round: u32, offset: u64, bytes: usize) -> Result<Sink<'_>, Malformed> {
        let unexpected = Malformed::Chunk { round, offset, bytes };
        if let Some(receiving) = &mut self.receiving
            && receiving.object.round == round
        {
            let left = receiving.object.length.saturating_sub(receiving.at);
            if offset != receiving.at || bytes as u64 > left {
                return Err(unexpected);
            }
            // It is no longer than the object, whose room was made by this end.
            let start = usize::try_from(offset).map_err(|_| unexpected.clone())?;
            let data = receiving.room.data_mut();
            let place = start.checked_add(bytes).and_then(|end| data.get_mut(start..end));
            return place.map(Sink::Into).ok_or(unexpected);
        }
        match self.abandoned {
            Some((abandoned, left)) if abandoned == round && bytes as u64 <= left => Ok(Sink::Away),
            _ => Err(unexpected),
        }
    }
}

impl Outgoing {
    /// The next piece that may go, as offset and length.
    pub(super) fn next_chunk(&self, limits: &Limits) -> Option<(u32, u64, usize)> {
        let ahead = self.sent - self.acknowledged;
        let window = limits.window_bytes.saturating_sub(ahead);
        let bytes = window
            .min(self.object.length - self.sent)
            .min(limits.chunk_bytes as u64);
        (self.granted && bytes > 0).then_some((self.object.round, self.sent, bytes as usize))
    }

    /// That piece is on its way.
    pub(super) fn mark_sent(&mut self, bytes: usize) {
        if self.sent == self.acknowledged {
            self.progress = Instant::now();
        }
        self.sent += bytes as u64;
    }

    /// Which round's it is.
    pub(super) fn round(&self) -> u32 {
        self.object.round
    }

    /// The data from that byte on.
    pub(super) fn data(&self, offset: u64) -> &[u8] {
        self.source.data().get(offset as usize..).unwrap_or_default()
    }
}

impl Exchange {
    /// Sends an object as soon as the other end has a place for it. What was being sent is given up.
    ///
    /// # Panics
    /// If `header` is none, or announces more than the source has.
    pub fn offer(&mut self, wire: Option<&mut Wire>, header: Message, source: Source) {
        let object = *header.object().expect("a header");
        assert!(
            source.data().len() as u64 >= object.length,
            "less data than announced"
        );
        self.outgoing = Some(Outgoing {
            header,
            object,
            source,
            granted: false,
            sent: 0,
            acknowledged: 0,
            progress: Instant::now(),
        });
        if let Some(wire) = wire {
            self.announce(wire);
        }
    }

    /// Whether pieces of an object were sent and not acknowledged.
    pub(super) fn is_stuck(&self) -> bool {
        let stuck = |outgoing: &Outgoing| outgoing.sent > outgoing.acknowledged;
        self.outgoing.as_ref().is_some_and(stuck)
    }

    /// Bytes of objects that got across, in both directions.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    /// The round whose object is on its way out.
    pub fn sending(&self) -> Option<u32> {
        self.outgoing.as_ref().map(Outgoing::round)
    }

    /// The round whose object is on its way in.
    pub fn receiving(&self) -> Option<u32> {
        self.incoming
            .receiving
            .as_ref()
            .map(|receiving| receiving.object.round)
    }

    /// Gives up what is being sent.
    pub fn withdraw(&mut self) {
        self.outgoing = None;
    }

    /// Gives up what is being received; its place is free again.
    pub fn abandon(&mut self) {
        if let Some(receiving) = self.incoming.receiving.take() {
            self.incoming.abandoned = Some((receiving.object.round, ABANDONED_BYTES));
        }
    }

    /// Takes an object that was offered.
    pub fn accept(&mut self, wire: &mut Wire, object: Object, room: Room) {
        self.abandon();
        self.incoming.receiving = Some(Receiving {
            object,
            at: 0,
            acknowledged: 0,
            room,
        });
        wire.send(&Message::Ack {
            round: object.round,
            offset: 0,
        });
        self.received();
    }

    /// A new connection: what was not acknowledged is announced again.
    pub fn resume(&mut self, wire: &mut Wire) {
        self.announce(wire);
    }

    fn announce(&mut self, wire: &mut Wire) {
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.granted = false;
            wire.send(&outgoing.header);
        }
    }

    /// Moves data both ways until there is something to tell. Cancel-safe.
    ///
    /// # Errors
    /// If the session is broken; the transfers wait for [`resume`](Self::resume).
    pub async fn next(&mut self, wire: &mut Wire) -> Result<Happened, Broken> {
        loop {
            if let Some(happened) = self.ready.pop_front() {
                return Ok(happened);
            }
            let now = Instant::now();
            if now >= wire.heard + SILENCE {
                return Err(Broken::Silent(SILENCE));
            }
            if now >= wire.said + PING {
                wire.send(&Message::Ping);
            }
            let mut wake = (wire.heard + SILENCE).min(wire.said + PING);
            if let Some(outgoing) = &self.outgoing
                && outgoing.sent > outgoing.acknowledged
            {
                let stalled = outgoing.progress + STALL;
                if now >= stalled {
                    return Err(Broken::Stalled(STALL));
                }
                wake = wake.min(stalled);
            }
            let (reader, writer) = (&mut wire.reader, &mut wire.writer);
            let message = tokio::select! {
                message = reader.next(&mut self.incoming) => message?,
                broken = writer.drive(self.outgoing.as_mut(), &wire.limits) => return Err(broken),
                () = sleep_until(wake) => continue,
            };
            wire.heard = Instant::now();
            self.take(wire, message)?;
        }
    }

    fn take(&mut self, wire: &mut Wire, message: Message) -> Result<(), Broken> {
        match message {
            Message::Ping => {}
            Message::Chunk { round, length, .. } => self.chunk(wire, round, length),
            Message::Ack { round, offset } => self.acknowledged(round, offset)?,
            Message::Bye { last, reason } => return Err(Broken::Bye { last, reason }),
            header @ (Message::Model(_) | Message::Update(_)) => self.offered(wire, header)?,
            other => self.ready.push_back(Happened::Message(other)),
        }
        Ok(())
    }

    fn chunk(&mut self, wire: &mut Wire, round: u32, bytes: usize) {
        if let Some(receiving) = &mut self.incoming.receiving
            && receiving.object.round == round
        {
            receiving.at += bytes as u64;
            self.moved += bytes as u64;
            let ahead = receiving.at - receiving.acknowledged;
            if ahead >= 2 * bytes as u64 || receiving.at == receiving.object.length {
                receiving.acknowledged = receiving.at;
                wire.send(&Message::Ack {
                    round,
                    offset: receiving.at,
                });
            }
            self.received();
        } else if let Some((_, left)) = &mut self.incoming.abandoned {
            *left = left.saturating_sub(bytes as u64);
        }
    }

    /// Tells of the object that has come whole, if it has.
    fn received(&mut self) {
        let complete = |receiving: &mut Receiving| receiving.at == receiving.object.length;
        if let Some(Receiving { object, room, .. }) = self.incoming.receiving.take_if(complete) {
            self.done = Some(object);
            self.ready.push_back(Happened::Received { object, room });
        }
    }

    fn acknowledged(&mut self, round: u32, offset: u64) -> Result<(), Malformed> {
        // Of an object that was given up.
        let Some(outgoing) = self.outgoing.as_mut().filter(|it| it.object.round == round) else {
            return Ok(());
        };
        let limit = if outgoing.granted {
            outgoing.sent
        } else {
            outgoing.object.length
        };
        let least = if outgoing.granted {
            outgoing.acknowledged
        } else {
            0
        };
        if !(least..=limit).contains(&offset) {
            return Err(Malformed::Ack { round, offset });
        }
        if !outgoing.granted {
            outgoing.granted = true;
            outgoing.sent = offset;
        }
        self.moved += offset - outgoing.acknowledged;
        outgoing.acknowledged = offset;
        outgoing.progress = Instant::now();
        if offset == outgoing.object.length {
            self.outgoing = None;
            self.ready.push_back(Happened::Sent(round));
        }
        Ok(())
    }

    fn offered(&mut self, wire: &mut Wire, header: Message) -> Result<(), Malformed> {
        let Some(&object) = header.object() else {
            return Ok(());
        };
        let round = object.round;
        let known = self.incoming.receiving.as_mut().map(|receiving| {
            receiving.acknowledged = receiving.at;
            (receiving.object, receiving.at)
        });
        let known = known.into_iter().chain(self.done.map(|done| (done, done.length)));
        for (before, at) in known {
            if before == object {
                wire.send(&Message::Ack { round, offset: at });
                return Ok(());
            }
            if before.round == round {
                return Err(Malformed::Unexpected("another object of the same round"));
            }
        }
        self.ready.push_back(Happened::Offered(header));
        Ok(())
    }
}
