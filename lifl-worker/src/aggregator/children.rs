//! A round's children: who has answered, and how. Each has its place in folding order for all of the round; when a child
//! dies, a successor may take its place.
//!
//! ```text
//!             ┌── take ─────▶ taken ──▶ folded
//!   waiting ──┼── nothing ─▶ gone
//!             ├── refuse ──▶ gone            (also from taken and folded, when an update turns out not finite)
//!             └── close, or the place is empty now ──▶ gone
//!
//!   a successor takes the place:   waiting: it answers instead
//!                                  taken, folded: that update stays, it lies whole in the dead one's arena; the verdict on
//!                                  it goes to the successor
//! ```
//!
//! That is the one decision on a child's update in a round: the first that comes is taken, if it says no more than the
//! coordinator has said of that place ([`Bound`]), and stays taken until the verdict. Since no trainer stands below two
//! places, no trainer's work is taken twice.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use lifl_common::arena::PeerArena;
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::update::{Cover, Metadata, UpdateInfo};

/// An update that a child has lent, checked but for its numbers.
#[derive(Clone, Debug)]
pub(super) struct TakenUpdate {
    /// Its place among the round's updates in the order of their arrival; set when it is [taken](Children::take).
    pub(super) arrival: u64,
    /// The frame that brought it; `from` is who is to hear the verdict.
    pub(super) frame: Frame,
    /// Where it lies.
    pub(super) arena: Arc<PeerArena>,
    /// Where its data lies.
    pub(super) data: Range<usize>,
    /// What its maker says of it.
    pub(super) metadata: Metadata,
}

/// What an update from one place may say at most, as the coordinator knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bound {
    /// The trainers below the place.
    pub(super) cover: Cover,
    /// The training samples that they have.
    pub(super) samples: u64,
}

impl Bound {
    /// Whether an update that says this may come from there.
    fn admits(&self, update: &UpdateInfo) -> Result<(), Refusal> {
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
        update: Box<TakenUpdate>,
        /// Whether it is in the aggregate.
        folded: bool,
    },
    /// Nothing will come.
    Gone,
}

/// What a successor finds in its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum InPlace {
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
    answers: Vec<Answer>,
    /// In which place each child is.
    places: BTreeMap<WorkerId, usize>,
    /// Of each place.
    bounds: Arc<[Bound]>,
    /// Places that wait.
    waiting: usize,
    /// Updates that have come.
    arrivals: u64,
}

impl Children {
    /// [`WorkerId::NONE`] is a place that nobody has.
    pub(super) fn new(children: &[WorkerId], bounds: Arc<[Bound]>) -> Self {
        let answer = |&child: &WorkerId| match child {
            WorkerId::NONE => Answer::Gone,
            _ => Answer::Waiting,
        };
        let places = children.iter().enumerate();
        let places = places.filter(|(_, child)| **child != WorkerId::NONE);
        let places = places.map(|(place, &child)| (child, place));
        Self {
            answers: children.iter().map(answer).collect(),
            places: places.collect(),
            bounds,
            waiting: children.iter().filter(|child| **child != WorkerId::NONE).count(),
            arrivals: 0,
        }
    }

    /// Whether an update of that worker is awaited.
    pub(super) fn is_waiting(&self, worker: WorkerId) -> bool {
        let place = self.places.get(&worker);
        place.is_some_and(|&place| matches!(self.answers[place], Answer::Waiting))
    }

    /// Whether nobody is waited for any more.
    pub(super) fn answered(&self) -> bool {
        self.waiting == 0
    }

    /// Whether this very update has been taken.
    pub(super) fn has(&self, frame: &Frame) -> bool {
        let place = self.places.get(&frame.from);
        place.is_some_and(
            |&place| matches!(&self.answers[place], Answer::Taken { update, .. } if update.frame.key == frame.key),
        )
    }

    /// Takes an awaited child's update.
    ///
    /// # Errors
    /// If it says more than it may.
    pub(super) fn take(&mut self, mut update: TakenUpdate) -> Result<(), Refusal> {
        let from = update.frame.from;
        let bound = self.places.get(&from).and_then(|&place| self.bounds.get(place));
        bound.ok_or(Refusal::NotExpected)?.admits(&update.metadata.info)?;
        update.arrival = self.arrivals;
        self.arrivals += 1;
        let update = Box::new(update);
        self.end_waiting(
            from,
            Answer::Taken {
                update,
                folded: false,
            },
        );
        Ok(())
    }

    /// A child has nothing, or is not waited for any more.
    pub(super) fn nothing(&mut self, worker: WorkerId) {
        self.end_waiting(worker, Answer::Gone);
    }

    /// Nobody is waited for any more.
    pub(super) fn close(&mut self) {
        self.waiting = 0;
        for answer in &mut self.answers {
            if matches!(answer, Answer::Waiting) {
                *answer = Answer::Gone;
            }
        }
    }

    /// An update is out, whether or not it had been folded.
    pub(super) fn refuse(&mut self, worker: WorkerId) {
        self.nothing(worker);
        if let Some(&place) = self.places.get(&worker) {
            self.answers[place] = Answer::Gone;
        }
    }

    /// A successor has a child's place now; with [`WorkerId::NONE`] nobody has.
    pub(super) fn replace(&mut self, old: WorkerId, new: WorkerId) -> InPlace {
        if new == WorkerId::NONE {
            self.nothing(old);
            return InPlace::Gone;
        }
        let Some(place) = self.places.remove(&old) else {
            return InPlace::Gone;
        };
        self.places.insert(new, place);
        match &mut self.answers[place] {
            Answer::Waiting => InPlace::Waiting,
            Answer::Taken { update, .. } => {
                update.frame.from = new;
                InPlace::Taken(update.frame, update.metadata.info.cover.clone())
            }
            Answer::Gone => InPlace::Gone,
        }
    }

    fn end_waiting(&mut self, worker: WorkerId, becomes: Answer) {
        if self.is_waiting(worker) {
            self.answers[self.places[&worker]] = becomes;
            self.waiting -= 1;
        }
    }

    /// What has come and is not in the aggregate yet, in folding order.
    pub(super) fn unfolded(&self) -> impl Iterator<Item = &TakenUpdate> {
        self.updates(false)
    }

    /// Of what has come and is not in the aggregate yet, so many that came first, in folding order.
    pub(super) fn first_unfolded(&self, most: usize) -> Vec<&TakenUpdate> {
        let mut updates: Vec<&TakenUpdate> = self.unfolded().collect();
        if updates.len() > most {
            let mut arrivals: Vec<u64> = updates.iter().map(|update| update.arrival).collect();
            arrivals.sort_unstable();
            let first = &arrivals[..most];
            updates.retain(|update| first.binary_search(&update.arrival).is_ok());
        }
        updates
    }

    /// What came until this arrival is in the aggregate now.
    pub(super) fn mark_folded(&mut self, last: u64) {
        for answer in &mut self.answers {
            if let Answer::Taken { update, folded } = answer {
                *folded |= update.arrival <= last;
            }
        }
    }

    /// The aggregate has to be made again.
    pub(super) fn mark_unfolded(&mut self) {
        for answer in &mut self.answers {
            if let Answer::Taken { folded, .. } = answer {
                *folded = false;
            }
        }
    }

    /// What the aggregate contains.
    pub(super) fn folded(&self) -> impl Iterator<Item = &TakenUpdate> + Clone {
        self.updates(true)
    }

    fn updates(&self, in_aggregate: bool) -> impl Iterator<Item = &TakenUpdate> + Clone {
        self.answers.iter().filter_map(move |answer| match answer {
            Answer::Taken { update, folded } if *folded == in_aggregate => Some(&**update),
            _ => None,
        })
    }

    /// Every update that is still lent to this aggregator.
    pub(super) fn taken(&self) -> impl Iterator<Item = &TakenUpdate> {
        self.answers.iter().filter_map(|answer| match answer {
            Answer::Taken { update, .. } => Some(&**update),
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
            bound.admits(&UpdateInfo {
                cover: cover(shares),
                samples,
                ..UpdateInfo::default()
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
            Bound::default().admits(&UpdateInfo {
                cover: cover(&[0]),
                samples: 1,
                ..UpdateInfo::default()
            }),
            Err(Refusal::BadCover),
            "nobody stands there"
        );
    }
}
