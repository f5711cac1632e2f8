//! Who hangs: whoever was asked, and has sent nothing since.
//!
//! ```text
//!               Ping                       it has sent a frame since
//!   not asked ─────────▶ asked ─────────────────────────────────────────▶ not asked
//!                          └── it has not, and the grace time is over ──▶ hangs
//! ```
//!
//! That it has sent a frame is seen by the plane's counters, of which two readings are compared for being equal: the time in
//! them is of another process's clock. A `Pong` is such a frame, and any other does as well; it also says whether the round's
//! update has gone up, of which the coordinator hears nothing else.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lifl_common::id::WorkerId;
use lifl_common::kernel::Counters;

/// Time as far as this process has been running: what it was suspended for, alone or with its machine, does not count.
#[derive(Debug)]
pub(super) struct Awake {
    time: Duration,
    ticked: Instant,
}

impl Default for Awake {
    fn default() -> Self {
        Self {
            time: Duration::ZERO,
            ticked: Instant::now(),
        }
    }
}

impl Awake {
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

/// What was asked and answered.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// When whoever has not been heard of since was asked, and what it had sent by then.
    asked: HashMap<WorkerId, (Duration, Counters)>,
    /// The last round in which each was known to have answered its parent.
    answered: HashMap<WorkerId, u32>,
}

/// What follows from a look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Looked {
    /// Who is to be asked.
    pub(super) ask: Vec<WorkerId>,
    /// Who hangs.
    pub(super) hang: Vec<WorkerId>,
}

impl Watch {
    /// Looks at all workers that can be asked. `sent` is what one has sent, `None` if the plane does not have it.
    pub(super) fn look(
        &mut self,
        workers: &[WorkerId],
        sent: impl Fn(WorkerId) -> Option<Counters>,
        now: Duration,
        grace: Duration,
    ) -> Looked {
        self.asked.retain(|id, _| workers.contains(id));
        self.answered.retain(|id, _| workers.contains(id));
        let mut looked = Looked::default();
        for &id in workers {
            let Some(sent) = sent(id) else {
                continue;
            };
            match self.asked.get(&id) {
                Some((asked, before)) if *before == sent => {
                    if now.saturating_sub(*asked) > grace {
                        looked.hang.push(id);
                    }
                }
                _ => {
                    self.asked.insert(id, (now, sent));
                    looked.ask.push(id);
                }
            }
        }
        looked
    }

    /// A worker has said in which round it answered last.
    pub(super) fn heard(&mut self, id: WorkerId, round: u32) {
        self.answered.insert(id, round);
    }

    /// Whether a worker is known to have answered in that round.
    pub(super) fn has_answered(&self, id: WorkerId, round: u32) -> bool {
        self.answered.get(&id) == Some(&round)
    }

    /// For a while nobody could be heard of: all are asked anew.
    pub(super) fn begin_anew(&mut self) {
        self.asked.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(50);
    const ONE: WorkerId = WorkerId(1);
    const TWO: WorkerId = WorkerId(2);

    /// A look at both; how many frames they have sent is given.
    fn look(watch: &mut Watch, now: u64, frames: [u64; 2]) -> Looked {
        let sent = |id: WorkerId| Some(sent(frames[id.0 as usize - 1]));
        watch.look(&[ONE, TWO], sent, Duration::from_secs(now), GRACE)
    }

    fn sent(frames: u64) -> Counters {
        Counters {
            frames,
            // Of a clock that has nothing to do with ours.
            last_ns: u64::MAX - frames,
            ..Counters::default()
        }
    }

    fn looked(ask: &[WorkerId], hang: &[WorkerId]) -> Looked {
        Looked {
            ask: ask.to_vec(),
            hang: hang.to_vec(),
        }
    }

    #[test]
    fn who_sends_nothing_for_the_grace_time_after_it_was_asked_hangs() {
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, 100, [7, 7]), looked(&[ONE, TWO], &[]));
        assert_eq!(look(&mut watch, 150, [8, 7]), looked(&[ONE], &[]), "time is left");
        assert_eq!(look(&mut watch, 151, [9, 7]), looked(&[ONE], &[TWO]));
    }

    #[test]
    fn silence_that_nobody_asked_about_is_no_fault() {
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, 1_000_000, [0, 0]), looked(&[ONE, TWO], &[]));
        watch.begin_anew();
        assert_eq!(look(&mut watch, 2_000_000, [0, 0]), looked(&[ONE, TWO], &[]));
    }

    #[test]
    fn a_successor_is_asked_anew() {
        let mut watch = Watch::default();
        look(&mut watch, 100, [0, 0]);
        let without_it = watch.look(&[ONE], |_| Some(sent(1)), Duration::from_secs(130), GRACE);
        assert_eq!(without_it, looked(&[ONE], &[]));
        assert_eq!(look(&mut watch, 200, [2, 0]), looked(&[ONE, TWO], &[]));
    }

    #[test]
    fn whom_the_plane_does_not_have_is_left_alone() {
        let mut watch = Watch::default();
        let nobody = watch.look(&[ONE], |_| None, Duration::from_secs(100), GRACE);
        assert_eq!(nobody, Looked::default());
    }

    #[test]
    fn an_answer_counts_for_its_round() {
        let mut watch = Watch::default();
        watch.heard(ONE, 3);
        assert!(watch.has_answered(ONE, 3));
        assert!(!watch.has_answered(ONE, 4) && !watch.has_answered(TWO, 3));
    }

    #[test]
    fn what_this_process_was_suspended_for_does_not_count() {
        let mut awake = Awake::default();
        let most = Duration::from_millis(300);
        let mut step = |passed| {
            let clipped = awake.advance(Instant::now(), Duration::from_millis(passed), most);
            (clipped, awake.time().as_millis())
        };
        assert_eq!(step(200), (false, 200));
        assert_eq!(step(3_600_000), (true, 500));
        assert_eq!(step(100), (false, 600));
    }
}
