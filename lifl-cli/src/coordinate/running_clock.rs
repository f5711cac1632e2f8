//! The coordinator's clock: it stands while this process does.

use std::time::{Duration, Instant};

/// Time as far as this process has been running: what it was suspended for, alone or with its machine, does not count.
#[derive(Debug)]
pub(super) struct RunningClock {
    time: Duration,
    ticked: Instant,
}

impl Default for RunningClock {
    fn default() -> Self {
        Self {
            time: Duration::ZERO,
            ticked: Instant::now(),
        }
    }
}

impl RunningClock {
    /// Goes on to now, by `most` at most, and says whether it is more than that since the last call.
    pub(super) fn tick(&mut self, most: Duration) -> bool {
        let now = Instant::now();
        let passed = now.duration_since(self.ticked);
        self.advance(now, passed, most)
    }

    fn advance(&mut self, now: Instant, passed: Duration, most: Duration) -> bool {
        self.ticked = now;
        self.time += passed.min(most);
        passed > most
    }

    /// As of the last tick.
    pub(super) fn time(&self) -> Duration {
        self.time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_was_suspended_for_does_not_count() {
        let mut clock = RunningClock::default();
        let most = Duration::from_millis(300);
        let mut step = |passed| {
            let clipped = clock.advance(Instant::now(), Duration::from_millis(passed), most);
            (clipped, clock.time().as_millis())
        };
        assert_eq!(step(200), (false, 200));
        assert_eq!(step(3_600_000), (true, 500));
        assert_eq!(step(100), (false, 600));
    }
}
