//! Who sits in which place of the tree, and how the round stands: what the coordinator tells everybody.
//!
//! ```text
//!             joined, ready                    left                        joined, ready (a successor)
//!   vacant ─────────────────▶ taken, present ──────▶ vacant, awaited ─────────────────────────────────▶ taken, present
//!                                                       └── given up: nobody is awaited any more
//! ```
//!
//! A round's pairing stays as it was made; only who sits in a place changes. An aggregator's successor takes its place in the
//! round that runs, and its parent and its children are told so by having the round announced again. A trainer's place stays
//! empty until the next round: nobody else has its update.
//!
//! A trainer whose parent is the one that it was told last is not told of a new round: that parent's model is word enough, and
//! saves it being woken twice.

use std::collections::{HashMap, HashSet};

use lifl_common::config::{Kind, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::WorkerId;
use lifl_common::session::proxied;
use lifl_common::update::Cover;

use super::pairing::{Pair, pair, select};
use crate::memory;

/// One worker's place.
#[derive(Clone, Debug, Default)]
struct Seat {
    /// The worker itself, where it is registered, and whether it can begin.
    own: Option<(WorkerId, bool)>,
    /// Its proxy, where it has one.
    proxy: Option<(WorkerId, bool)>,
    given_up: bool,
}

/// The round that runs.
#[derive(Debug, Default)]
struct Current {
    number: u32,
    pairs: HashMap<usize, Pair>,
    /// Who was told of the round: the workers themselves, and proxies. Those who died are here until a successor is.
    own: HashMap<usize, WorkerId>,
    proxies: HashMap<usize, WorkerId>,
    /// Who is not waited for any more.
    out: HashSet<usize>,
    /// What an aggregator's update may say at most: whose work is in it, and their samples.
    below: HashMap<usize, (Cover, u64)>,
}

/// The job's workers, by their index in the job.
#[derive(Debug)]
pub(crate) struct Roster<'j> {
    coordinator: WorkerId,
    workers: &'j [WorkerSpec],
    /// The training samples that each trainer has.
    samples: Vec<u64>,
    seats: Vec<Seat>,
    round: Current,
    /// The parent that each was told last when a round began.
    parents: HashMap<WorkerId, WorkerId>,
}

impl<'j> Roster<'j> {
    pub(crate) fn new(coordinator: WorkerId, workers: &'j [WorkerSpec]) -> Self {
        Self {
            coordinator,
            workers,
            samples: vec![0; workers.len()],
            seats: vec![Seat::default(); workers.len()],
            round: Current::default(),
            parents: HashMap::new(),
        }
    }

    /// How many training samples each worker has, 0 of an aggregator: before the first round.
    pub(crate) fn know_samples(&mut self, samples: Vec<u64>) {
        self.samples = samples;
    }

    /// A worker, or a proxy, has registered. Gives whose seat it takes.
    pub(crate) fn joined(&mut self, id: WorkerId, name: &str) -> Option<usize> {
        let (name, is_proxy) = match proxied(name) {
            Some(name) => (name, true),
            None => (name, false),
        };
        let index = self.workers.iter().position(|spec| spec.name == name)?;
        let seat = &mut self.seats[index];
        let place = if is_proxy { &mut seat.proxy } else { &mut seat.own };
        // A daemon that is back says again who is there.
        if place.is_none_or(|(known, _)| known != id) {
            *place = Some((id, false));
        }
        Some(index)
    }

    /// A worker can begin. Gives its index when its place is complete with that, for the first time.
    pub(crate) fn ready(&mut self, id: WorkerId) -> Option<usize> {
        let index = self.index(id)?;
        let before = self.is_present(index);
        let seat = &mut self.seats[index];
        for (known, ready) in [&mut seat.own, &mut seat.proxy].into_iter().flatten() {
            *ready |= *known == id;
        }
        (!before && self.is_present(index)).then_some(index)
    }

    /// A worker, or a proxy, is gone. Gives whose seat it had.
    pub(crate) fn left(&mut self, id: WorkerId) -> Option<usize> {
        let index = self.index(id)?;
        let seat = &mut self.seats[index];
        for place in [&mut seat.own, &mut seat.proxy] {
            place.take_if(|(known, _)| *known == id);
        }
        self.parents.remove(&id);
        Some(index)
    }

    /// Nobody is awaited in that place any more.
    pub(crate) fn give_up(&mut self, index: usize) {
        self.seats[index].given_up = true;
    }

    /// All who are registered.
    pub(crate) fn ids(&self) -> Vec<WorkerId> {
        let places = self.seats.iter().flat_map(|seat| [seat.own, seat.proxy]);
        places.flatten().map(|(id, _)| id).collect()
    }

    /// Whose place a worker has.
    pub(crate) fn index(&self, id: WorkerId) -> Option<usize> {
        let is = |place: &Option<(WorkerId, bool)>| place.is_some_and(|(known, _)| known == id);
        self.seats
            .iter()
            .position(|seat| is(&seat.own) || is(&seat.proxy))
    }

    /// Registrations that can begin.
    pub(crate) fn ready_count(&self) -> usize {
        let places = self.seats.iter().flat_map(|seat| [seat.own, seat.proxy]);
        places.flatten().filter(|(_, ready)| *ready).count()
    }

    /// Whether whoever belongs in that place is there and can begin.
    pub(crate) fn is_present(&self, index: usize) -> bool {
        let (spec, seat) = (&self.workers[index], &self.seats[index]);
        let ready = |place: Option<(WorkerId, bool)>| place.is_some_and(|(_, ready)| ready);
        let there =
            (ready(seat.own) || !memory::is_local(spec)) && (ready(seat.proxy) || !memory::is_remote(spec));
        there && !seat.given_up
    }

    /// How many places of that kind wait for a successor.
    pub(crate) fn awaited(&self, which: impl Fn(&WorkerSpec) -> bool) -> usize {
        let awaited = |&index: &usize| {
            which(&self.workers[index]) && !self.is_present(index) && !self.seats[index].given_up
        };
        (0..self.seats.len()).filter(awaited).count()
    }

    /// Who answers to the parent from that place in this round, while it is there: the worker, or its proxy.
    pub(crate) fn takes_part_as(&self, index: usize) -> Option<WorkerId> {
        let (seat, round) = (&self.seats[index], &self.round);
        let (id, _) = seat.proxy.or(seat.own)?;
        let told = round.proxies.get(&index).or(round.own.get(&index));
        (told == Some(&id) && !round.out.contains(&index)).then_some(id)
    }

    /// The workers on this node that can begin, not counting proxies.
    pub(crate) fn present_here(&self) -> impl Iterator<Item = WorkerId> {
        let own = self.seats.iter().filter_map(|seat| seat.own);
        own.filter(|(_, ready)| *ready).map(|(id, _)| id)
    }

    /// The proxies that are there.
    pub(crate) fn proxies(&self) -> impl Iterator<Item = WorkerId> {
        let proxies = self.seats.iter().filter_map(|seat| seat.proxy);
        proxies.filter(|(_, ready)| *ready).map(|(id, _)| id)
    }

    /// The parent of a worker in this round.
    pub(crate) fn parent(&self, index: usize) -> Option<usize> {
        self.round.pairs.get(&index)?.parent
    }

    /// The training samples that those trainers have.
    pub(crate) fn samples_of(&self, cover: &Cover) -> u64 {
        let workers = self.workers.iter().zip(&self.samples);
        let covered = workers.filter(|(worker, _)| worker.share.is_some_and(|share| cover.contains(share)));
        covered.fold(0, |sum: u64, (_, samples)| sum.saturating_add(*samples))
    }

    /// Pairs those who are present for a new round; gives how many trainers take part.
    pub(crate) fn plan(&mut self, number: u32, seed: u64) -> u32 {
        let mut pairs = pair(self.workers, |index| self.is_present(index));
        select(self.workers, &mut pairs, seed, number);
        let seated = |place: fn(&Seat) -> Option<(WorkerId, bool)>| -> HashMap<usize, WorkerId> {
            let of = pairs
                .keys()
                .filter_map(|&index| Some((index, place(&self.seats[index])?.0)));
            of.collect()
        };
        let (own, proxies) = (seated(|seat| seat.own), seated(|seat| seat.proxy));
        self.round = Current {
            number,
            own,
            proxies,
            out: HashSet::new(),
            below: self.below(&pairs),
            pairs,
        };
        self.trainers().count() as u32
    }

    /// Whose work comes together at each aggregator of a round but the top, whose update nobody takes.
    fn below(&self, pairs: &HashMap<usize, Pair>) -> HashMap<usize, (Cover, u64)> {
        let mut below: HashMap<usize, (Cover, u64)> = HashMap::new();
        for (&index, pair) in pairs {
            let Some(share) = self.workers[index].share else {
                continue;
            };
            let mut parent = pair.parent;
            while let Some((above, next)) =
                parent.and_then(|parent| Some((parent, pairs.get(&parent)?.parent)))
            {
                if next.is_some() {
                    let (cover, samples) = below.entry(above).or_default();
                    cover.add(&Cover::of(share));
                    *samples = samples.saturating_add(self.samples[index]);
                }
                parent = next;
            }
        }
        below
    }

    /// The frames that tell a parent of one child: who it is, and what its update may say at most.
    fn child(&self, parent: WorkerId, child: usize) -> Vec<Frame> {
        let current = &self.round;
        let id = current.proxies.get(&child).or(current.own.get(&child));
        let id = id.filter(|_| !current.out.contains(&child));
        let (words, samples) = match (self.workers[child].share, current.below.get(&child)) {
            (Some(share), _) => (vec![(share / 64, 1 << (share % 64))], self.samples[child]),
            (None, Some((cover, samples))) => {
                let words = cover.words().map(|(at, word)| (at as u32, word));
                (words.collect(), *samples)
            }
            (None, None) => (vec![(0, 0)], 0),
        };
        let left = (0..words.len() as u32).rev();
        let frame = |((at, word), left)| {
            let frame = Frame {
                samples,
                ..self.frame(
                    parent,
                    FrameKind::Child,
                    id.copied().unwrap_or(WorkerId::NONE),
                    left,
                )
            };
            frame.with_cover_word(at, word)
        };
        words.into_iter().zip(left).map(frame).collect()
    }

    /// The trainers that take part in the round, or took part.
    pub(crate) fn trainers(&self) -> impl Iterator<Item = usize> {
        let indices = self.round.pairs.keys().copied();
        indices.filter(|&index| self.workers[index].kind == Kind::Trainer)
    }

    /// The aggregators that take part in the round, with their children.
    pub(crate) fn aggregators(&self) -> impl Iterator<Item = (usize, &Pair)> {
        let pairs = self.round.pairs.iter().map(|(&index, pair)| (index, pair));
        pairs.filter(|(index, _)| self.workers[*index].kind != Kind::Trainer)
    }

    /// Whether that worker takes part in the round.
    pub(crate) fn takes_part(&self, index: usize) -> bool {
        self.round.pairs.contains_key(&index)
    }

    /// The round that was [planned](Self::plan), to all who do not hear of it from their parent.
    pub(crate) fn announce(&mut self) -> Vec<Frame> {
        let mut order: Vec<usize> = self.round.pairs.keys().copied().collect();
        order.sort_unstable();
        let hear = order.into_iter().filter(|&index| !self.is_told_by_parent(index));
        let frames: Vec<Frame> = hear.flat_map(|index| self.stands(index)).collect();
        let begins = frames
            .iter()
            .filter(|frame| frame.kind == FrameKind::Begin as u16);
        // A parent is another worker, whose number is one.
        let parents = begins.map(|frame| (frame.to, WorkerId(frame.value as u32)));
        self.parents.extend(parents);
        frames
    }

    /// The round as it stands, to all who take part.
    #[cfg(test)]
    pub(crate) fn announce_again(&self) -> Vec<Frame> {
        self.round
            .pairs
            .keys()
            .flat_map(|&index| self.stands(index))
            .collect()
    }

    /// Whether that is a trainer on this node whose parent is the one that it was told last.
    fn is_told_by_parent(&self, index: usize) -> bool {
        let current = &self.round;
        let parent = current.pairs.get(&index).and_then(|pair| pair.parent);
        let parent = parent.and_then(|parent| current.own.get(&parent));
        let own = current
            .own
            .get(&index)
            .filter(|_| !current.proxies.contains_key(&index));
        let (Some(own), Some(parent)) = (own, parent) else {
            return false;
        };
        self.workers[index].kind == Kind::Trainer && self.parents.get(own) == Some(parent)
    }

    /// A successor can begin: if its place in the round waits for it, it, its parent and its children hear of it.
    pub(crate) fn succeeds(&mut self, index: usize) -> Vec<Frame> {
        if self.round.out.contains(&index) {
            return Vec::new();
        }
        let Some(pair) = self.round.pairs.get(&index).cloned() else {
            return Vec::new();
        };
        let seat = &self.seats[index];
        self.round.own.extend(seat.own.map(|(id, _)| (index, id)));
        self.round.proxies.extend(seat.proxy.map(|(id, _)| (index, id)));
        // In this order, so that everybody knows of a successor before it hears from it: what has been sent first is there
        // first, whatever follows from it.
        let hear = pair.children.into_iter().chain([index]).chain(pair.parent);
        hear.flat_map(|index| self.stands(index)).collect()
    }

    /// Nobody is waited for in that place in this round: its parent hears of it.
    pub(crate) fn vacated(&mut self, index: usize) -> Vec<Frame> {
        let Some(pair) = self.round.pairs.get(&index) else {
            return Vec::new();
        };
        let parent = pair.parent;
        self.round.out.insert(index);
        parent.map_or(Vec::new(), |parent| self.stands(parent))
    }

    /// What an aggregator hears that is not to wait for those who have not answered.
    pub(crate) fn close(&self, index: usize) -> Option<Frame> {
        let (to, _) = self.seats[index].own?;
        Some(self.frame(to, FrameKind::Close, WorkerId::NONE, 0))
    }

    /// Asks a worker whether it stirs.
    pub(crate) fn ping(&self, worker: WorkerId) -> Frame {
        self.frame(worker, FrameKind::Ping, WorkerId::NONE, 0)
    }

    /// What one who takes part hears of the round as it stands; nothing while it is gone.
    fn stands(&self, index: usize) -> Vec<Frame> {
        let Some(pair) = self.round.pairs.get(&index) else {
            return Vec::new();
        };
        let current = &self.round;
        let here = |place: Option<(WorkerId, bool)>, told: &HashMap<usize, WorkerId>| {
            let (id, _) = place?;
            (told.get(&index) == Some(&id)).then_some(id)
        };
        let mut frames = Vec::new();
        let parent = pair.parent.and_then(|parent| current.own.get(&parent).copied());
        let mut parent = parent.unwrap_or(WorkerId::NONE);
        if current.proxies.contains_key(&index) {
            // The worker's parent is beyond the wire; its proxy's is here.
            let proxy = here(self.seats[index].proxy, &current.proxies);
            frames.extend(proxy.map(|proxy| self.frame(proxy, FrameKind::Begin, parent, 0)));
            parent = WorkerId::NONE;
        }
        if let Some(own) = here(self.seats[index].own, &current.own) {
            frames.extend(pair.children.iter().flat_map(|&child| self.child(own, child)));
            frames.push(self.frame(own, FrameKind::Begin, parent, pair.children.len() as u32));
        }
        frames
    }

    fn frame(&self, to: WorkerId, kind: FrameKind, value: WorkerId, covers: u32) -> Frame {
        Frame {
            to,
            from: self.coordinator,
            kind: kind as u16,
            round: self.round.number,
            value: u64::from(value.0),
            covers,
            ..Frame::default()
        }
    }
}
