//! A round's children: who has answered, and how. Each has its place in folding order for all of the round; who sits in it
//! may change, when a child dies and a successor takes over.
//!
//! ```text
//!             ┌── give ────▶ given ──▶ folded
//!   waiting ──┼── nothing ─▶ gone
//!             ├── refuse ──▶ gone            (also from given and folded, when an update turns out not finite)
//!             └── close, or the place is empty now ──▶ gone
//!
//!   a successor takes the place:   waiting: it answers instead
//!                                  given, folded: that update stays, it lies whole in the dead one's arena; the verdict on
//!                                  it goes to the successor
//! ```
//!
//! That is the one decision on a child's update in a round, and it is made here: the first that comes is taken, if it says
//! no more than the coordinator has said of that place ([`Bound`]), and what was taken stays taken until the verdict. Since
//! nobody stands below two places, nobody's work is taken twice.

use std::sync::Arc;

use lifl_common::arena::PeerArena;
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::update::{Cover, Metadata};

/// An update that a child has lent, checked but for its numbers.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// Its place among the round's updates in the order of their arrival; set when it is [taken](Children::give).
    pub(super) arrival: u64,
    /// The frame that brought it; `from` is who is to hear the verdict.
    pub(super) frame: Frame,
    /// Where it lies.
    pub(super) arena: Arc<PeerArena>,
    /// Where its data begins.
    pub(super) offset: usize,
    /// What its maker says of it.
    pub(super) metadata: Metadata,
}

/// What an update from one place may say at most, as the coordinator knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bound {
    /// Who stands below the place.
    pub(super) cover: Cover,
    /// The training samples that they have.
    pub(super) samples: u64,
}

impl Bound {
    /// Whether an update that says this may come from there.
    fn admits(&self, update: &Metadata) -> Result<(), Refusal> {
        if !self.cover.contains_all(&update.cover) {
            return Err(Refusal::BadCover);
        }
        // Nobody trains on nothing.
        let least = u64::from(update.cover.count());
        if !(least..=self.samples).contains(&update.samples) {
            return Err(Refusal::BadSamples);
        }
        Ok(())
    }
}

/// How a child stands.
#[derive(Clone, Debug)]
enum Answer {
    /// Nothing has come.
    Waiting,
    /// An update has come.
    Taken {
        /// The update.
        given: Box<Given>,
        /// Whether it is in the aggregate.
        folded: bool,
    },
    /// Nothing will come.
    Gone,
}

/// What a successor finds in its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Found {
    /// Its update is awaited.
    Waiting,
    /// Its predecessor's was taken.
    Taken(Frame, Cover),
    /// Nothing is awaited.
    Gone,
}

/// The children in folding order.
#[derive(Debug)]
pub(super) struct Children {
    answers: Vec<(WorkerId, Answer)>,
    /// Of each of their places.
    bounds: Arc<[Bound]>,
    /// Updates that have come.
    arrivals: u64,
}

impl Children {
    /// [`WorkerId::NONE`] is a place that nobody sits in.
    pub(super) fn new(children: &[WorkerId], bounds: Arc<[Bound]>) -> Self {
        let answer = |&child: &WorkerId| match child {
            WorkerId::NONE => (child, Answer::Gone),
            child => (child, Answer::Waiting),
        };
        Self {
            answers: children.iter().map(answer).collect(),
            bounds,
            arrivals: 0,
        }
    }

    /// Whether an update of that worker is awaited.
    pub(super) fn is_waiting(&self, worker: WorkerId) -> bool {
        self.answers
            .iter()
            .any(|(child, answer)| *child == worker && matches!(answer, Answer::Waiting))
    }

    /// Whether nobody is waited for any more.
    pub(super) fn answered(&self) -> bool {
        !self
            .answers
            .iter()
            .any(|(_, answer)| matches!(answer, Answer::Waiting))
    }

    /// Whether this very update has been taken.
    pub(super) fn has(&self, update: &Frame) -> bool {
        self.taken()
            .any(|given| (given.frame.from, given.frame.key) == (update.from, update.key))
    }

    /// Takes an awaited child's update.
    ///
    /// # Errors
    /// If it says more than it may.
    pub(super) fn give(&mut self, mut given: Given) -> Result<(), Refusal> {
        let from = given.frame.from;
        let place = self.answers.iter().position(|(child, _)| *child == from);
        let bound = place.and_then(|place| self.bounds.get(place));
        bound.ok_or(Refusal::NotExpected)?.admits(&given.metadata)?;
        given.arrival = self.arrivals;
        self.arrivals += 1;
        let given = Box::new(given);
        self.waiting(from, Answer::Taken { given, folded: false });
        Ok(())
    }

    /// A child has nothing, or is not waited for any more.
    pub(super) fn nothing(&mut self, worker: WorkerId) {
        self.waiting(worker, Answer::Gone);
    }

    /// Nobody is waited for any more.
    pub(super) fn close(&mut self) {
        for (_, answer) in &mut self.answers {
            if matches!(answer, Answer::Waiting) {
                *answer = Answer::Gone;
            }
        }
    }

    /// An update is out, whether or not it had been folded.
    pub(super) fn refuse(&mut self, worker: WorkerId) {
        for (child, answer) in &mut self.answers {
            if *child == worker {
                *answer = Answer::Gone;
            }
        }
    }

    /// Somebody else sits in a child's place now; with [`WorkerId::NONE`] nobody does.
    pub(super) fn replace(&mut self, old: WorkerId, new: WorkerId) -> Found {
        if new == WorkerId::NONE {
            self.nothing(old);
            return Found::Gone;
        }
        let Some((child, answer)) = self.answers.iter_mut().find(|(child, _)| *child == old) else {
            return Found::Gone;
        };
        *child = new;
        match answer {
            Answer::Waiting => Found::Waiting,
            Answer::Taken { given, .. } => {
                given.frame.from = new;
                Found::Taken(given.frame, given.metadata.cover.clone())
            }
            Answer::Gone => Found::Gone,
        }
    }

    fn waiting(&mut self, worker: WorkerId, becomes: Answer) {
        let waiting =
            |(child, answer): &&mut (WorkerId, Answer)| *child == worker && matches!(answer, Answer::Waiting);
        if let Some((_, answer)) = self.answers.iter_mut().find(waiting) {
            *answer = becomes;
        }
    }

    /// What has come and is not in the aggregate yet, in folding order.
    pub(super) fn unfolded(&self) -> impl Iterator<Item = &Given> {
        self.given(false)
    }

    /// Of what has come and is not in the aggregate yet, so many that came first, in folding order.
    pub(super) fn first_unfolded(&self, most: usize) -> Vec<&Given> {
        let mut given: Vec<&Given> = self.unfolded().collect();
        if given.len() > most {
            let mut arrivals: Vec<u64> = given.iter().map(|given| given.arrival).collect();
            arrivals.sort_unstable();
            let first = &arrivals[..most];
            given.retain(|given| first.binary_search(&given.arrival).is_ok());
        }
        given
    }

    /// What came until this arrival is in the aggregate now.
    pub(super) fn mark_folded(&mut self, last: u64) {
        for (_, answer) in &mut self.answers {
            if let Answer::Taken { given, folded } = answer {
                *folded |= given.arrival <= last;
            }
        }
    }

    /// The aggregate has to be made again.
    pub(super) fn mark_unfolded(&mut self) {
        for (_, answer) in &mut self.answers {
            if let Answer::Taken { folded, .. } = answer {
                *folded = false;
            }
        }
    }

    /// What the aggregate contains.
    pub(super) fn folded(&self) -> impl Iterator<Item = &Given> {
        self.given(true)
    }

    fn given(&self, in_aggregate: bool) -> impl Iterator<Item = &Given> {
        self.answers.iter().filter_map(move |(_, answer)| match answer {
            Answer::Taken { given, folded } if *folded == in_aggregate => Some(&**given),
            _ => None,
        })
    }

    /// Every update that is still lent to this aggregator.
    pub(super) fn taken(&self) -> impl Iterator<Item = &Given> {
        self.answers.iter().filter_map(|(_, answer)| match answer {
            Answer::Taken { given, .. } => Some(&**given),
            Answer::Waiting | Answer::Gone => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover(shares: &[u32]) -> Cover {
        let mut cover = Cover::default();
        shares.iter().for_each(|&share| cover.add(&Cover::of(share)));
        cover
    }

    #[test]
    fn an_update_says_no_more_than_its_place_may() {
        let bound = Bound {
            cover: cover(&[2, 70, 900]),
            samples: 600,
        };
        let says = |shares: &[u32], samples| {
            bound.admits(&Metadata {
                cover: cover(shares),
                samples,
                ..Metadata::default()
            })
        };
        assert_eq!(says(&[2, 70, 900], 600), Ok(()));
        assert_eq!(says(&[70], 1), Ok(()), "some may be missing");
        assert_eq!(says(&[2, 3], 600), Err(Refusal::BadCover), "somebody else's");
        assert_eq!(
            says(&[964], 1),
            Err(Refusal::BadCover),
            "the same bit of another word"
        );
        assert_eq!(says(&[2, 70], 601), Err(Refusal::BadSamples));
        assert_eq!(says(&[2, 70], u64::MAX), Err(Refusal::BadSamples));
        assert_eq!(
            says(&[2, 70], 1),
            Err(Refusal::BadSamples),
            "nobody trains on nothing"
        );
        assert_eq!(
            Bound::default().admits(&Metadata {
                cover: cover(&[0]),
                samples: 1,
                ..Metadata::default()
            }),
            Err(Refusal::BadCover),
            "nobody stands there"
        );
    }
}
