//! How long an end waits for its other end, and what it makes of sessions that break.

use std::time::Duration;

use tokio::time::Instant;

use super::message::MAX_CHUNK_BYTES;
use super::transfers::{SILENCE, Transfers};
use super::wire::Wire;

/// Chunks are not made shorter than this.
const SHORTEST_CHUNK_BYTES: usize = 1 << 10;

/// Since when sessions have been of no use, and how long chunks may be.
///
/// A session that was open for a while, or in which data got across, was of use. Sessions that open and break at once are
/// not, however many there are. One that broke when its first chunks were under way may have met a broker that finds them
/// too long, and brokers need not say so: the next session's are half as long.
#[derive(Debug)]
pub struct ReconnectPolicy {
    /// When the session that is open began, and what had got across by then.
    open: Option<(Instant, u64)>,
    since: Instant,
    chunk_bytes: usize,
}

impl ReconnectPolicy {
    /// From now on.
    pub fn new() -> Self {
        Self {
            open: None,
            since: Instant::now(),
            chunk_bytes: MAX_CHUNK_BYTES,
        }
    }

    /// A session has begun.
    pub fn opened(&mut self, transfers: &Transfers, wire: &mut Wire) {
        self.open = Some((Instant::now(), transfers.moved()));
        wire.limit_chunks(self.chunk_bytes);
        self.chunk_bytes = self.chunk_bytes.min(wire.limits.chunk_bytes);
    }

    /// It has broken, or could not begin; says whether it had been of use.
    pub fn broken(&mut self, transfers: &Transfers) -> bool {
        let Some((opened, before)) = self.open.take() else {
            return false;
        };
        let now = Instant::now();
        let moved = transfers.moved() != before;
        if !moved && transfers.is_stuck() {
            self.chunk_bytes = (self.chunk_bytes / 2).max(SHORTEST_CHUNK_BYTES);
        }
        let of_use = moved || now >= opened + SILENCE;
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

impl Default for ReconnectPolicy {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_never_works_comes_to_an_end_and_what_works_does_not() {
        let grace = Duration::from_secs(60);
        let (transfers, mut reconnect_policy) = (Transfers::default(), ReconnectPolicy::new());
        let begun = Instant::now();
        while Instant::now() < reconnect_policy.ends(grace) {
            assert!(!reconnect_policy.broken(&transfers), "no session was open");
            reconnect_policy.open = Some((Instant::now(), transfers.moved()));
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(!reconnect_policy.broken(&transfers), "it broke at once");
        }
        assert_eq!(begun.elapsed(), grace);
        reconnect_policy.open = Some((Instant::now(), transfers.moved()));
        tokio::time::advance(grace).await;
        assert!(reconnect_policy.broken(&transfers), "it was open for long");
        assert_eq!(reconnect_policy.ends(grace), Instant::now() + grace);
    }
}
