//! Membership: which process plays each worker of the job, and what each of them is told of the round that runs.
//!
//! ```text
//!            joined, ready               left                         joined, ready (a successor)
//!   absent ────────────────▶ present ───────────▶ absent, awaited ────────────────────────────────▶ present
//!                                                   └── given up: nobody is awaited any more
//! ```
//!
//! A round's pairing stays as it was made; only the process behind a place changes. An aggregator's successor takes its place
//! in the round that runs, and its parent and its children are told so by having the round announced again. A trainer's place
//! stays empty until the next round: nobody else has its update.
//!
//! A trainer whose parent is the one that it was told last is not told of a new round: it takes that parent's model as the
//! announcement, and is woken once instead of twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::WorkerId;
use lifl_common::session::proxied;
use lifl_common::update::Cover;

use super::pairing::Pair;

#[derive(Clone, Copy, Debug)]
struct Registered {
    id: WorkerId,
    /// It has said that it can begin.
    ready: bool,
}

/// The registrations behind one worker of the job.
#[derive(Clone, Debug, Default)]
struct Member {
    /// The worker itself, where it is registered.
    own: Option<Registered>,
    /// Its proxy in the gateway, where it has one.
    proxy: Option<Registered>,
    given_up: bool,
}

impl Member {
    fn registrations(&self) -> impl Iterator<Item = Registered> {
        [self.own, self.proxy].into_iter().flatten()
    }
}

#[derive(Debug, Default)]
struct Round {
    number: u32,
    pairs: BTreeMap<usize, Pair>,
    /// Who was told of the round: the workers themselves, and proxies. The dead stay here until they have a successor.
    own: BTreeMap<usize, WorkerId>,
    proxies: BTreeMap<usize, WorkerId>,
    /// Places in which nobody is waited for any more.
    vacated: BTreeSet<usize>,
    /// What an aggregator's update may say at most: the trainers below it, and their samples.
    below: BTreeMap<usize, (Cover, u64)>,
}

impl Round {
    /// Who was told of the round and answers to the parent from that place: the worker, or its proxy.
    fn told(&self, index: usize) -> Option<WorkerId> {
        self.proxies.get(&index).or(self.own.get(&index)).copied()
    }
}

/// The job's workers, by their index in the job.
#[derive(Debug)]
pub(super) struct Membership {
    coordinator: WorkerId,
    job: Arc<JobSpec>,
    /// The training samples that each worker has, 0 for an aggregator.
    samples: Vec<u64>,
    members: Vec<Member>,
    names: BTreeMap<String, usize>,
    ids: BTreeMap<WorkerId, usize>,
    /// Registrations that are ready.
    ready: usize,
    round: Round,
    /// The parent that each was told last when a round began.
    parents: BTreeMap<WorkerId, WorkerId>,
}

impl Membership {
    /// A job's workers, none of which is registered yet. `samples` is by worker.
    pub(super) fn new(coordinator: WorkerId, job: Arc<JobSpec>, samples: Vec<u64>) -> Self {
        let names = job.workers.iter().enumerate();
        Self {
            coordinator,
            samples,
            members: vec![Member::default(); job.workers.len()],
            names: names.map(|(index, spec)| (spec.name.clone(), index)).collect(),
            ids: BTreeMap::new(),
            ready: 0,
            round: Round::default(),
            parents: BTreeMap::new(),
            job,
        }
    }

    /// A worker or a proxy has registered under that name. Gives which worker of the job it is or stands for; `None` if the
    /// job has no worker of that name, or one that needs no proxy, or only a proxy, and the name is that of the other.
    pub(super) fn joined(&mut self, id: WorkerId, name: &str) -> Option<usize> {
        let (name, is_proxy) = match proxied(name) {
            Some(name) => (name, true),
            None => (name, false),
        };
        let index = *self.names.get(name)?;
        let spec = &self.job.workers[index];
        let expected = if is_proxy {
            spec.is_remote()
        } else {
            spec.is_local()
        };
        if !expected {
            return None;
        }
        let member = &mut self.members[index];
        let place = if is_proxy {
            &mut member.proxy
        } else {
            &mut member.own
        };
        // A daemon that is back says again who is there.
        if place.is_none_or(|known| known.id != id) {
            if let Some(before) = place.replace(Registered { id, ready: false }) {
                self.ids.remove(&before.id);
                self.ready -= usize::from(before.ready);
            }
            self.ids.insert(id, index);
        }
        Some(index)
    }

    /// A registration can begin. Gives the worker's index when it is complete with that, for the first time.
    pub(super) fn ready(&mut self, id: WorkerId) -> Option<usize> {
        let index = self.index(id)?;
        let before = self.is_present(index);
        let member = &mut self.members[index];
        for known in [&mut member.own, &mut member.proxy].into_iter().flatten() {
            if known.id == id && !known.ready {
                known.ready = true;
                self.ready += 1;
            }
        }
        (!before && self.is_present(index)).then_some(index)
    }

    /// A worker, or a proxy, is gone. Gives whose place it had.
    pub(super) fn left(&mut self, id: WorkerId) -> Option<usize> {
        let index = self.ids.remove(&id)?;
        let member = &mut self.members[index];
        for place in [&mut member.own, &mut member.proxy] {
            let gone = place.take_if(|known| known.id == id);
            self.ready -= usize::from(gone.is_some_and(|gone| gone.ready));
        }
        self.parents.remove(&id);
        Some(index)
    }

    /// Nobody is awaited in that place any more.
    pub(super) fn give_up(&mut self, index: usize) {
        self.members[index].given_up = true;
    }

    /// The registrations with numbers from `first` to `last`, in order.
    pub(super) fn ids(&self, first: WorkerId, last: WorkerId) -> Vec<WorkerId> {
        let ids = self.ids.keys().copied();
        ids.filter(|id| (first..=last).contains(id)).collect()
    }

    /// Which worker of the job a registration is, or stands for.
    pub(super) fn index(&self, id: WorkerId) -> Option<usize> {
        self.ids.get(&id).copied()
    }

    /// Registrations that can begin.
    pub(super) fn ready_count(&self) -> usize {
        self.ready
    }

    /// Whether whoever belongs in that place is there and can begin.
    pub(super) fn is_present(&self, index: usize) -> bool {
        let (spec, member) = (&self.job.workers[index], &self.members[index]);
        let ready = |place: Option<Registered>| place.is_some_and(|known| known.ready);
        let there = (ready(member.own) || !spec.is_local()) && (ready(member.proxy) || !spec.is_remote());
        there && !member.given_up
    }

    /// How many of those workers are absent and have not been given up.
    pub(super) fn awaited(&self, which: impl Fn(&WorkerSpec) -> bool) -> usize {
        let awaited = |&index: &usize| {
            which(&self.job.workers[index]) && !self.is_present(index) && !self.members[index].given_up
        };
        (0..self.members.len()).filter(awaited).count()
    }

    /// Who answers to the parent from that place in this round, while it is there: the worker, or its proxy.
    pub(super) fn participant(&self, index: usize) -> Option<WorkerId> {
        let (member, round) = (&self.members[index], &self.round);
        let id = member.proxy.or(member.own)?.id;
        (round.told(index) == Some(id) && !round.vacated.contains(&index)).then_some(id)
    }

    /// The registrations that can begin, in order, each with whether it is a proxy.
    pub(super) fn connected(&self) -> impl Iterator<Item = (WorkerId, bool)> {
        self.ids.iter().filter_map(|(&id, &index)| {
            let known = self.members[index].registrations().find(|known| known.id == id)?;
            let proxy = self.members[index].proxy.is_some_and(|proxy| proxy.id == id);
            known.ready.then_some((id, proxy))
        })
    }

    /// The parent of a worker in this round.
    pub(super) fn parent(&self, index: usize) -> Option<usize> {
        self.round.pairs.get(&index)?.parent
    }

    /// The training samples that those trainers have.
    pub(super) fn samples_of(&self, cover: &Cover) -> u64 {
        let workers = self.job.workers.iter().zip(&self.samples);
        let covered = workers.filter(|(worker, _)| worker.share.is_some_and(|share| cover.contains(share)));
        covered.fold(0, |sum: u64, (_, samples)| sum.saturating_add(*samples))
    }

    /// Takes the pairing of a new round.
    pub(super) fn plan(&mut self, number: u32, pairs: BTreeMap<usize, Pair>) {
        let told = |place: fn(&Member) -> Option<Registered>| -> BTreeMap<usize, WorkerId> {
            let of = pairs
                .keys()
                .filter_map(|&index| Some((index, place(&self.members[index])?.id)));
            of.collect()
        };
        let (own, proxies) = (told(|member| member.own), told(|member| member.proxy));
        self.round = Round {
            number,
            own,
            proxies,
            vacated: BTreeSet::new(),
            below: self.below(&pairs),
            pairs,
        };
    }

    /// The trainers below each aggregator of a round but the top, whose update nobody takes.
    fn below(&self, pairs: &BTreeMap<usize, Pair>) -> BTreeMap<usize, (Cover, u64)> {
        let mut below: BTreeMap<usize, (Cover, u64)> = BTreeMap::new();
        for (&index, pair) in pairs {
            let Some(share) = self.job.workers[index].share else {
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
    fn child_frames(&self, parent: WorkerId, child: usize) -> Vec<Frame> {
        let round = &self.round;
        let id = round.told(child).filter(|_| !round.vacated.contains(&child));
        let (words, samples) = match (self.job.workers[child].share, round.below.get(&child)) {
            (Some(share), _) => (vec![(share / 64, 1 << (share % 64))], self.samples[child]),
            (None, Some((cover, samples))) => {
                let words = cover.words().map(|(at, word)| (at as u32, word));
                (words.collect(), *samples)
            }
            (None, None) => (vec![(0, 0)], 0),
        };
        let left = (0..words.len() as u32).rev();
        let id = id.unwrap_or(WorkerId::NONE);
        let frame = |((at, word), left)| {
            let frame = Frame {
                samples,
                ..self.frame(parent, FrameKind::Child, id, left)
            };
            frame.with_cover_word(at, word)
        };
        words.into_iter().zip(left).map(frame).collect()
    }

    /// The trainers that take part in the round, or took part.
    pub(super) fn trainers(&self) -> impl Iterator<Item = usize> {
        let indices = self.round.pairs.keys().copied();
        indices.filter(|&index| self.job.workers[index].kind == Kind::Trainer)
    }

    /// The aggregators of the round that have trainers as children.
    pub(super) fn parents_of_trainers(&self) -> impl Iterator<Item = usize> {
        let is_trainer = |&child: &usize| self.job.workers[child].kind == Kind::Trainer;
        let pairs = self.round.pairs.iter();
        pairs
            .filter(move |(_, pair)| pair.children.iter().any(is_trainer))
            .map(|(&index, _)| index)
    }

    /// Whether that worker takes part in the round.
    pub(super) fn takes_part(&self, index: usize) -> bool {
        self.round.pairs.contains_key(&index)
    }

    /// The round that was [planned](Self::plan), to all who do not hear of it from their parent.
    pub(super) fn announce(&mut self) -> Vec<Frame> {
        let hear = self.round.pairs.keys().copied();
        let hear = hear.filter(|&index| !self.is_told_by_parent(index));
        let mut frames: Vec<Frame> = hear.flat_map(|index| self.announcement(index)).collect();
        frames.extend(self.bystanders());
        let begins = frames
            .iter()
            .filter(|frame| frame.kind == FrameKind::Begin as u16);
        // A parent is another worker, whose number is one.
        let parents = begins.map(|frame| (frame.to, WorkerId(frame.value as u32)));
        self.parents.extend(parents);
        frames
    }

    /// Aggregators that are there and have nobody to aggregate in the round are told that it begins: they give back what they
    /// have of a round before, if nobody above will decide on it any more.
    fn bystanders(&self) -> impl Iterator<Item = Frame> {
        let workers = self.job.workers.iter().enumerate();
        let away = workers.filter(|(index, spec)| {
            spec.kind != Kind::Trainer && !self.round.pairs.contains_key(index) && self.is_present(*index)
        });
        let ids = away.filter_map(|(index, _)| self.members[index].own);
        ids.map(|own| self.frame(own.id, FrameKind::Begin, WorkerId::NONE, 0))
    }

    /// Whether that is a trainer, or its proxy, whose parent is the one that it was told last.
    fn is_told_by_parent(&self, index: usize) -> bool {
        let round = &self.round;
        let parent = round.pairs.get(&index).and_then(|pair| pair.parent);
        let parent = parent.and_then(|parent| round.own.get(&parent));
        let (Some(child), Some(parent)) = (round.told(index), parent) else {
            return false;
        };
        self.job.workers[index].kind == Kind::Trainer && self.parents.get(&child) == Some(parent)
    }

    /// A successor can begin: if its place in the round waits for it, it, its parent and its children hear of it.
    pub(super) fn succeeds(&mut self, index: usize) -> Vec<Frame> {
        if self.round.vacated.contains(&index) {
            return Vec::new();
        }
        let Some(pair) = self.round.pairs.get(&index).cloned() else {
            return Vec::new();
        };
        let member = &self.members[index];
        self.round.own.extend(member.own.map(|own| (index, own.id)));
        self.round
            .proxies
            .extend(member.proxy.map(|proxy| (index, proxy.id)));
        // In this order, so that everybody knows of a successor before it hears from it: what has been sent first is there
        // first, whatever follows from it.
        let hear = pair.children.into_iter().chain([index]).chain(pair.parent);
        hear.flat_map(|index| self.announcement(index)).collect()
    }

    /// Nobody is waited for in that place in this round: its parent hears of it, once.
    pub(super) fn vacated(&mut self, index: usize) -> Vec<Frame> {
        let Some(pair) = self.round.pairs.get(&index) else {
            return Vec::new();
        };
        let parent = pair.parent.filter(|_| self.round.vacated.insert(index));
        parent.map_or(Vec::new(), |parent| self.announcement(parent))
    }

    /// Tells an aggregator not to wait for those who have not answered.
    pub(super) fn close(&self, index: usize) -> Option<Frame> {
        let to = self.members[index].own?.id;
        Some(self.frame(to, FrameKind::Close, WorkerId::NONE, 0))
    }

    /// Asks a worker for a sign of life.
    pub(super) fn ping(&self, worker: WorkerId) -> Frame {
        self.frame(worker, FrameKind::Ping, WorkerId::NONE, 0)
    }

    /// What a worker that takes part is told of the round as it is now; nothing while it is gone.
    fn announcement(&self, index: usize) -> Vec<Frame> {
        let (round, member) = (&self.round, &self.members[index]);
        let Some(pair) = round.pairs.get(&index) else {
            return Vec::new();
        };
        let here = |place: Option<Registered>, told: &BTreeMap<usize, WorkerId>| {
            let id = place?.id;
            (told.get(&index) == Some(&id)).then_some(id)
        };
        let mut frames = Vec::new();
        let parent = pair.parent.and_then(|parent| round.own.get(&parent).copied());
        let mut parent = parent.unwrap_or(WorkerId::NONE);
        if round.proxies.contains_key(&index) {
            // The worker's parent is beyond the wire; its proxy's is here.
            let proxy = here(member.proxy, &round.proxies);
            frames.extend(proxy.map(|proxy| self.frame(proxy, FrameKind::Begin, parent, 0)));
            parent = WorkerId::NONE;
        }
        if let Some(own) = here(member.own, &round.own) {
            let children = pair.children.iter();
            frames.extend(children.flat_map(|&child| self.child_frames(own, child)));
            frames.push(self.frame(own, FrameKind::Begin, parent, pair.children.len() as u32));
        }
        frames
    }

    /// A frame to that registration about the round.
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
