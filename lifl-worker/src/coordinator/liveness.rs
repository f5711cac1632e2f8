//! Liveness: a worker that was asked for a sign of life and has sent nothing since hangs.
//!
//! ```text
//!               Ping                       it has sent a frame since
//!   not asked ─────────▶ asked ─────────────────────────────────────────▶ not asked
//!                          └── it has not, and the grace time is over ──▶ hangs
//! ```
//!
//! That a worker has sent a frame is seen by the plane's counters, of which two readings are compared for being equal: the time
//! in them is of another process's clock. A `Pong` is such a frame, and any other does as well; it also says whether the
//! round's update has gone up, of which the coordinator hears nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use lifl_common::id::WorkerId;
use lifl_common::kernel::Counters;

/// What was asked and answered.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    /// When whoever has not been heard of since was asked, and what it had sent by then.
    asked: BTreeMap<WorkerId, (Duration, Counters)>,
    /// The last round in which each was known to have answered its parent.
    answered: BTreeMap<WorkerId, u32>,
}

/// What follows from a look at the counters.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Verdicts {
    pub(super) ask: Vec<WorkerId>,
    pub(super) hang: Vec<WorkerId>,
}

impl Liveness {
    /// Looks at all workers that can be asked, in order. `sent` is what one has sent, `None` if the plane does not have it.
    pub(super) fn look(
        &mut self,
        workers: &[WorkerId],
        sent: impl Fn(WorkerId) -> Option<Counters>,
        now: Duration,
        grace: Duration,
    ) -> Verdicts {
        self.asked.retain(|id, _| workers.binary_search(id).is_ok());
        self.answered.retain(|id, _| workers.binary_search(id).is_ok());
        let mut verdicts = Verdicts::default();
        for &id in workers {
            let Some(sent) = sent(id) else {
                continue;
            };
            match self.asked.get(&id) {
                Some((asked, before)) if *before == sent => {
                    if now.saturating_sub(*asked) > grace {
                        verdicts.hang.push(id);
                    }
                }
                _ => {
                    self.asked.insert(id, (now, sent));
                    verdicts.ask.push(id);
                }
            }
        }
        verdicts
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
    pub(super) fn reset(&mut self) {
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
    fn look(liveness: &mut Liveness, now: u64, frames: [u64; 2]) -> Verdicts {
        let sent = |id: WorkerId| Some(sent(frames[id.0 as usize - 1]));
        liveness.look(&[ONE, TWO], sent, Duration::from_secs(now), GRACE)
    }

    fn sent(frames: u64) -> Counters {
        Counters {
            frames,
            // Of a clock that has nothing to do with ours.
            last_ns: u64::MAX - frames,
            ..Counters::default()
        }
    }

    fn verdicts(ask: &[WorkerId], hang: &[WorkerId]) -> Verdicts {
        Verdicts {
            ask: ask.to_vec(),
            hang: hang.to_vec(),
        }
    }

    #[test]
    fn who_sends_nothing_for_the_grace_time_after_it_was_asked_hangs() {
        let mut liveness = Liveness::default();
        assert_eq!(look(&mut liveness, 100, [7, 7]), verdicts(&[ONE, TWO], &[]));
        assert_eq!(
            look(&mut liveness, 150, [8, 7]),
            verdicts(&[ONE], &[]),
            "time is left"
        );
        assert_eq!(look(&mut liveness, 151, [9, 7]), verdicts(&[ONE], &[TWO]));
    }

    #[test]
    fn silence_that_nobody_asked_about_is_no_fault() {
        let mut liveness = Liveness::default();
        assert_eq!(look(&mut liveness, 1_000_000, [0, 0]), verdicts(&[ONE, TWO], &[]));
        liveness.reset();
        assert_eq!(look(&mut liveness, 2_000_000, [0, 0]), verdicts(&[ONE, TWO], &[]));
    }

    #[test]
    fn a_successor_is_asked_anew() {
        let mut liveness = Liveness::default();
        look(&mut liveness, 100, [0, 0]);
        let without_it = liveness.look(&[ONE], |_| Some(sent(1)), Duration::from_secs(130), GRACE);
        assert_eq!(without_it, verdicts(&[ONE], &[]));
        assert_eq!(look(&mut liveness, 200, [2, 0]), verdicts(&[ONE, TWO], &[]));
    }

    #[test]
    fn whom_the_plane_does_not_have_is_left_alone() {
        let mut liveness = Liveness::default();
        let nobody = liveness.look(&[ONE], |_| None, Duration::from_secs(100), GRACE);
        assert_eq!(nobody, Verdicts::default());
    }

    #[test]
    fn an_answer_counts_for_its_round() {
        let mut liveness = Liveness::default();
        liveness.heard(ONE, 3);
        assert!(liveness.has_answered(ONE, 3));
        assert!(!liveness.has_answered(ONE, 4) && !liveness.has_answered(TWO, 3));
    }
}
