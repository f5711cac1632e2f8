//! Frames that came before they can be handled: a few of each worker, so that nobody crowds out the others.

use std::collections::BTreeMap;

use lifl_common::frame::Frame;
use lifl_common::id::WorkerId;

/// Frames of one worker that are kept.
const MOST_OF_ONE: u32 = 4;

/// In the order in which they came.
#[derive(Debug, Default)]
pub(super) struct EarlyFrames {
    frames: Vec<Frame>,
    /// How many of them each worker has sent.
    counts: BTreeMap<WorkerId, u32>,
}

impl EarlyFrames {
    /// Keeps one; `false` if its sender has too many here. A replay is kept once.
    pub(super) fn keep(&mut self, frame: Frame) -> bool {
        let count = self.counts.entry(frame.from).or_default();
        let identity = |frame: &Frame| (frame.from, frame.kind, frame.round, frame.key);
        if *count > 0
            && self
                .frames
                .iter()
                .any(|known| identity(known) == identity(&frame))
        {
            return true;
        }
        let room = *count < MOST_OF_ONE;
        if room {
            *count += 1;
            self.frames.push(frame);
        }
        room
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    pub(super) fn take(&mut self) -> Vec<Frame> {
        self.counts.clear();
        std::mem::take(&mut self.frames)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_has_a_few_places_and_takes_none_from_another() {
        let mut early = EarlyFrames::default();
        let frame = |from, round| Frame {
            from: WorkerId(from),
            round,
            ..Frame::default()
        };
        assert!((0..MOST_OF_ONE).all(|round| early.keep(frame(1, round))));
        assert!(early.keep(frame(1, 0)), "a replay takes no place");
        assert!(!early.keep(frame(1, MOST_OF_ONE)));
        assert!(early.keep(frame(2, 9)));
        assert_eq!(early.take().len(), MOST_OF_ONE as usize + 1);
        assert!(early.is_empty() && early.keep(frame(1, 0)));
    }
}
