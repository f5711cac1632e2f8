//! How long an end waits for its other end, and what it makes of sessions that break.

use std::time::Duration;

use tokio::time::Instant;

use super::exchange::{Exchange, SILENCE};
use super::message::MAX_CHUNK_BYTES;
use super::wire::Wire;

/// Chunks are not made shorter than this.
const SHORTEST_CHUNK_BYTES: usize = 1 << 10;

/// Since when sessions have been of no use, and how long chunks may be.
///
/// A session that was open for a while, or in which data got across, was of use. Sessions that open and break at once are
/// not, however many there are. One that broke when its first chunks were under way may have met a broker that finds them
/// too long, and brokers need not say so: the next session's are half as long.
#[derive(Debug)]
pub struct Patience {
    opened: Instant,
    moved: u64,
    since: Instant,
    chunk_bytes: usize,
}

impl Patience {
    /// From now on.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            opened: now,
            moved: 0,
            since: now,
            chunk_bytes: MAX_CHUNK_BYTES,
        }
    }

    /// A session has begun.
    pub fn opened(&mut self, exchange: &Exchange, wire: &mut Wire) {
        (self.opened, self.moved) = (Instant::now(), exchange.moved());
        wire.limit_chunks(self.chunk_bytes);
        self.chunk_bytes = self.chunk_bytes.min(wire.limits.chunk_bytes);
    }

    /// It has broken; says whether it had been of use.
    pub fn broken(&mut self, exchange: &Exchange) -> bool {
        let now = Instant::now();
        let moved = exchange.moved() != self.moved;
        if !moved && exchange.is_stuck() {
            self.chunk_bytes = (self.chunk_bytes / 2).max(SHORTEST_CHUNK_BYTES);
        }
        let of_use = moved || now >= self.opened + SILENCE;
        if of_use {
            self.since = now;
        }
        of_use
    }

    /// When it is at its end, while no session is open.
    pub fn ends(&self, grace: Duration) -> Instant {
        self.since + grace
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self::new()
    }
}
