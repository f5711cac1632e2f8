//! Who hangs: whoever was asked, and has sent nothing since.
//!
//! ```text
//!               Ping                       it has sent a frame since
//!   not asked ─────────▶ asked ─────────────────────────────────────────▶ not asked
//!                          └── it has not, and the grace time is over ──▶ hangs
//! ```
//!
//! The times of the workers' last frames are the plane's. A `Pong` is such a frame, and any other does as well; it also says
//! whether the round's update has gone up, of which the coordinator hears nothing else.

use std::collections::HashMap;

use lifl_common::id::WorkerId;

/// What was asked and answered.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// When whoever has not been heard of since was asked.
    asked: HashMap<WorkerId, u64>,
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
    /// Looks at all workers that can be asked. `last` is when one sent its last frame, `None` if the plane does not have it;
    /// times are nanoseconds of one clock.
    pub(super) fn look(
        &mut self,
        workers: &[WorkerId],
        last: impl Fn(WorkerId) -> Option<u64>,
        now: u64,
        grace: u64,
    ) -> Looked {
        self.asked.retain(|id, _| workers.contains(id));
        self.answered.retain(|id, _| workers.contains(id));
        let mut looked = Looked::default();
        for &id in workers {
            let Some(last) = last(id) else {
                continue;
            };
            match self.asked.get(&id) {
                Some(&asked) if last < asked => {
                    if now.saturating_sub(asked) > grace {
                        looked.hang.push(id);
                    }
                }
                _ => {
                    self.asked.insert(id, now);
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

    const GRACE: u64 = 50;
    const ONE: WorkerId = WorkerId(1);
    const TWO: WorkerId = WorkerId(2);

    /// A look at both; what they sent last is given.
    fn look(watch: &mut Watch, now: u64, last: [u64; 2]) -> Looked {
        let last = |id: WorkerId| Some(last[id.0 as usize - 1]);
        watch.look(&[ONE, TWO], last, now, GRACE)
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
        assert_eq!(look(&mut watch, 100, [0, 0]), looked(&[ONE, TWO], &[]));
        assert_eq!(
            look(&mut watch, 150, [101, 99]),
            looked(&[ONE], &[]),
            "time is left"
        );
        assert_eq!(look(&mut watch, 151, [150, 99]), looked(&[ONE], &[TWO]));
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
        let without_it = watch.look(&[ONE], |_| Some(120), 130, GRACE);
        assert_eq!(without_it, looked(&[ONE], &[]));
        assert_eq!(look(&mut watch, 200, [190, 0]), looked(&[ONE, TWO], &[]));
    }

    #[test]
    fn whom_the_plane_does_not_have_is_left_alone() {
        let mut watch = Watch::default();
        assert_eq!(watch.look(&[ONE], |_| None, 100, GRACE), Looked::default());
    }

    #[test]
    fn an_answer_counts_for_its_round() {
        let mut watch = Watch::default();
        watch.heard(ONE, 3);
        assert!(watch.has_answered(ONE, 3));
        assert!(!watch.has_answered(ONE, 4) && !watch.has_answered(TWO, 3));
    }
}
