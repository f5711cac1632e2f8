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

use super::message::{Malformed, Message, Object, SessionError};
use super::object::{Destination, Source};
use super::wire::{Limits, Wire};

/// Silence after which a session is broken.
pub(super) const SILENCE: Duration = Duration::from_secs(30);

/// How often an end says something.
const PING: Duration = Duration::from_secs(10);

/// How long data may be on its way without an acknowledgement.
const STALL: Duration = Duration::from_secs(15);

/// What a transfer has to get across on average, a while after its first byte might have gone.
const SLOWEST_BYTES_PER_S: u64 = 16 << 10;

/// Pieces and acknowledgements of less than this count as messages that move nothing.
const LITTLE_BYTES: u64 = 64;

/// Pings that may come at once, and one more each second. An end says one each [`PING`].
const PINGS: u32 = 16;

/// Other messages that move nothing: so many at once, and as many each second. A round takes two or three.
const OTHERS: u32 = 4096;

/// What came of waiting.
#[derive(Debug)]
pub enum TransferEvent {
    /// The header of an object that is not here yet: [`Transfers::accept`] it when there is a place.
    Offered(Message),
    /// The object is complete.
    Received {
        /// Which.
        object: Object,
        /// Where it is.
        destination: Destination,
    },
    /// The other end has all of the object of that round.
    Sent(u32),
    /// Any other message.
    Message(Message),
    /// The other end is too slow with what is being received or sent: [`Transfers::abandon`] or [`Transfers::withdraw`] it.
    Overdue,
}

/// The transfers of one worker.
#[derive(Debug)]
pub struct Transfers {
    incoming: Incoming,
    outgoing: Option<Outgoing>,
    /// The last object that came whole.
    done: Option<Object>,
    ready: VecDeque<TransferEvent>,
    moved: u64,
    pings: Allowance,
    others: Allowance,
    /// How long a transfer may take, beside the time for what has got across; `None` where nobody minds.
    grace: Option<Duration>,
}

/// Messages that may come: so many at once, and then so many each second.
#[derive(Debug)]
struct Allowance {
    left: u32,
    most: u32,
    per_s: u32,
    filled: Instant,
}

impl Allowance {
    fn new(most: u32, per_s: u32) -> Self {
        Self {
            left: most,
            most,
            per_s,
            filled: Instant::now(),
        }
    }

    fn take(&mut self) -> Result<(), SessionError> {
        let now = Instant::now();
        let more = (now - self.filled).as_millis() * u128::from(self.per_s) / 1000;
        if more > 0 {
            let left = u128::from(self.left) + more;
            self.left = u32::try_from(left).unwrap_or(u32::MAX).min(self.most);
            self.filled = now;
        }
        self.left = self.left.checked_sub(1).ok_or(SessionError::Flood)?;
        Ok(())
    }
}

impl Default for Transfers {
    fn default() -> Self {
        Self {
            incoming: Incoming::default(),
            outgoing: None,
            done: None,
            ready: VecDeque::new(),
            moved: 0,
            pings: Allowance::new(PINGS, 1),
            others: Allowance::new(OTHERS, OTHERS),
            grace: None,
        }
    }
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
    destination: Destination,
    /// When its first byte might have come.
    since: Instant,
}

/// What is being sent.
#[derive(Debug)]
pub(super) struct Outgoing {
    header: Message,
    object: Object,
    source: Source,
    granted: bool,
    /// When its first byte might have gone.
    since: Option<Instant>,
    sent: u64,
    acknowledged: u64,
    progress: Instant,
}

/// Where a chunk's data goes.
pub(super) enum Sink<'a> {
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
            let data = receiving.destination.data_mut();
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

impl Transfers {
    /// Of an end that does not wait for ever: a transfer may take so long to begin or to go on in another session, and
    /// 16 KiB a second for the rest.
    pub fn with_grace(grace: Duration) -> Self {
        Self {
            grace: Some(grace),
            ..Self::default()
        }
    }

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
            since: None,
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

    /// When the other end will have been too slow with what is being received or sent, which holds a place at this end.
    pub(super) fn overdue(&self) -> Option<Instant> {
        let grace = self.grace?;
        let due = |since: Instant, bytes: u64| {
            since + grace + Duration::from_millis(bytes.saturating_mul(1000) / SLOWEST_BYTES_PER_S)
        };
        let receiving = self.incoming.receiving.as_ref();
        let receiving = receiving.map(|receiving| due(receiving.since, receiving.at));
        let sending = self.outgoing.as_ref();
        let sending = sending.and_then(|outgoing| Some(due(outgoing.since?, outgoing.acknowledged)));
        receiving.into_iter().chain(sending).min()
    }

    /// Gives up what is being sent.
    pub fn withdraw(&mut self) {
        self.outgoing = None;
    }

    /// Gives up what is being received; its place is free again.
    pub fn abandon(&mut self) {
        if let Some(receiving) = self.incoming.receiving.take() {
            let left = receiving.object.length - receiving.at;
            self.incoming.abandoned = Some((receiving.object.round, left));
        }
    }

    /// Takes an object that was offered.
    pub fn accept(&mut self, wire: &mut Wire, object: Object, destination: Destination) {
        self.abandon();
        self.incoming.receiving = Some(Receiving {
            object,
            at: 0,
            acknowledged: 0,
            destination,
            since: Instant::now(),
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
    pub async fn next(&mut self, wire: &mut Wire) -> Result<TransferEvent, SessionError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let now = Instant::now();
            if now >= wire.heard + SILENCE {
                return Err(SessionError::Silent(SILENCE));
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
                    return Err(SessionError::Stalled(STALL));
                }
                wake = wake.min(stalled);
            }
            if let Some(due) = self.overdue() {
                if now >= due {
                    return Ok(TransferEvent::Overdue);
                }
                wake = wake.min(due);
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

    fn take(&mut self, wire: &mut Wire, message: Message) -> Result<(), SessionError> {
        match message {
            Message::Ping => self.pings.take()?,
            Message::Chunk { round, length, .. } => self.chunk(wire, round, length)?,
            Message::Ack { round, offset } => self.acknowledged(round, offset)?,
            Message::Bye { last, reason } => return Err(SessionError::Bye { last, reason }),
            header @ (Message::Model(_) | Message::Update(..)) => {
                self.others.take()?;
                self.offered(wire, header)?;
            }
            other => {
                self.others.take()?;
                self.ready.push_back(TransferEvent::Message(other));
            }
        }
        Ok(())
    }

    fn chunk(&mut self, wire: &mut Wire, round: u32, bytes: usize) -> Result<(), SessionError> {
        let mut little = (bytes as u64) < LITTLE_BYTES;
        if let Some(receiving) = &mut self.incoming.receiving
            && receiving.object.round == round
        {
            receiving.at += bytes as u64;
            self.moved += bytes as u64;
            little &= receiving.at < receiving.object.length;
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
        if little { self.others.take() } else { Ok(()) }
    }

    /// Tells of the object that has come whole, if it has.
    fn received(&mut self) {
        let complete = |receiving: &mut Receiving| receiving.at == receiving.object.length;
        if let Some(Receiving {
            object, destination, ..
        }) = self.incoming.receiving.take_if(complete)
        {
            self.done = Some(object);
            self.ready
                .push_back(TransferEvent::Received { object, destination });
        }
    }

    fn acknowledged(&mut self, round: u32, offset: u64) -> Result<(), SessionError> {
        // Of an object that was given up.
        let Some(outgoing) = self.outgoing.as_mut().filter(|it| it.object.round == round) else {
            return self.others.take();
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
            return Err(Malformed::Ack { round, offset }.into());
        }
        let more = offset.saturating_sub(outgoing.acknowledged);
        if more < LITTLE_BYTES && offset < outgoing.object.length {
            self.others.take()?;
        }
        if !outgoing.granted {
            outgoing.granted = true;
            outgoing.since.get_or_insert_with(Instant::now);
            outgoing.sent = offset;
        }
        self.moved += more;
        outgoing.acknowledged = offset;
        outgoing.progress = Instant::now();
        if offset == outgoing.object.length {
            self.outgoing = None;
            self.ready.push_back(TransferEvent::Sent(round));
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
        self.ready.push_back(TransferEvent::Offered(header));
        Ok(())
    }
}
