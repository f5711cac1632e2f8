//! A round's children: who has answered, and how.
//!
//! ```text
//!             ┌── give ────▶ given ──▶ folded
//!   waiting ──┼── nothing ─▶ gone
//!             ├── refuse ──▶ gone            (also from given and folded, when an update turns out not finite)
//!             └── lost ────▶ gone            (what was given before stays: it lies whole in the dead one's arena)
//! ```

use std::sync::Arc;

use lifl_common::arena::PeerArena;
use lifl_common::frame::Frame;
use lifl_common::id::WorkerId;
use lifl_common::update::Metadata;

/// An update that a child has lent, checked but for its numbers.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// Its place among the round's updates in the order of their arrival; set when it is [taken](Children::give).
    pub(super) arrival: u64,
    /// The frame that brought it.
    pub(super) frame: Frame,
    /// Where it lies.
    pub(super) arena: Arc<PeerArena>,
    /// Where its data begins.
    pub(super) offset: usize,
    /// What its maker says of it.
    pub(super) metadata: Metadata,
}

/// How a child stands.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// Nothing has come.
    Waiting,
    /// An update has come.
    Given(Given),
    /// It is in the aggregate.
    Folded(Given),
    /// Nothing will come.
    Gone,
}

/// The children in folding order.
#[derive(Debug)]
pub(super) struct Children {
    answers: Vec<(WorkerId, Answer)>,
    /// Updates that have come.
    arrivals: u64,
}

impl Children {
    pub(super) fn new(children: Vec<WorkerId>) -> Self {
        Self {
            answers: children
                .into_iter()
                .map(|child| (child, Answer::Waiting))
                .collect(),
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

    pub(super) fn give(&mut self, worker: WorkerId, mut given: Given) {
        given.arrival = self.arrivals;
        self.arrivals += 1;
        self.waiting(worker, Answer::Given(given));
    }

    pub(super) fn nothing(&mut self, worker: WorkerId) {
        self.waiting(worker, Answer::Gone);
    }

    pub(super) fn lost(&mut self, worker: WorkerId) {
        self.waiting(worker, Answer::Gone);
    }

    /// An update is out, whether or not it had been folded.
    pub(super) fn refuse(&mut self, worker: WorkerId) {
        for (child, answer) in &mut self.answers {
            if *child == worker {
                *answer = Answer::Gone;
            }
        }
    }

    fn waiting(&mut self, worker: WorkerId, becomes: Answer) {
        let child = self.answers.iter_mut().find(|(child, _)| *child == worker);
        if let Some((_, answer @ Answer::Waiting)) = child {
            *answer = becomes;
        }
    }

    /// What has come and is not in the aggregate yet, in folding order.
    pub(super) fn unfolded(&self) -> Vec<Given> {
        let given = self.answers.iter().filter_map(|(_, answer)| match answer {
            Answer::Given(given) => Some(given.clone()),
            _ => None,
        });
        given.collect()
    }

    /// Of what has come and is not in the aggregate yet, so many that came first, in folding order.
    pub(super) fn first_unfolded(&self, most: usize) -> Vec<Given> {
        let mut given = self.unfolded();
        if given.len() > most {
            let mut arrivals: Vec<u64> = given.iter().map(|given| given.arrival).collect();
            arrivals.sort_unstable();
            let first = &arrivals[..most];
            given.retain(|given| first.binary_search(&given.arrival).is_ok());
        }
        given
    }

    /// These, which [came first](Self::first_unfolded), are in the aggregate now.
    pub(super) fn mark_folded(&mut self, these: &[Given]) {
        let Some(last) = these.iter().map(|given| given.arrival).max() else {
            return;
        };
        for (_, answer) in &mut self.answers {
            if let Answer::Given(given) = answer
                && given.arrival <= last
            {
                *answer = Answer::Folded(given.clone());
            }
        }
    }

    /// The aggregate has to be made again.
    pub(super) fn mark_unfolded(&mut self) {
        for (_, answer) in &mut self.answers {
            if let Answer::Folded(given) = answer {
                *answer = Answer::Given(given.clone());
            }
        }
    }

    /// What the aggregate contains.
    pub(super) fn folded(&self) -> impl Iterator<Item = &Given> {
        self.answers.iter().filter_map(|(_, answer)| match answer {
            Answer::Folded(given) => Some(given),
            _ => None,
        })
    }

    /// Every update that is still lent to this aggregator, with its child.
    pub(super) fn given(&self) -> Vec<(WorkerId, Frame)> {
        let given = self.answers.iter().filter_map(|(child, answer)| match answer {
            Answer::Given(given) | Answer::Folded(given) => Some((*child, given.frame)),
            Answer::Waiting | Answer::Gone => None,
        });
        given.collect()
    }
}
