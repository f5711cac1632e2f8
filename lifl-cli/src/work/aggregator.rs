//! Top, middle and leaf aggregator: one runtime, in another place of the tree.
//!
//! ```text
//!            Child×n, Begin (coordinator)          Model (parent; the top has its own), a free slot
//!   silent ─────────────────────────────▶ announced ──────────────────────────────────────────▶ collecting
//!                                          │     ▲                                                │
//!                   Taken×n (parent): it   │     │ the parent whose predecessor       each child: Update, Nothing,
//!                   has the aggregate of   │     │ took that is gone too              or not waited for any more
//!                   our predecessor        │     │                                                │
//!                                          ▼     │          the aggregate, or Nothing, goes up    ▼
//!                                          over ◀─┴───────────────────────────────────── all answered, or aggGoal came
//! ```
//!
//! A round that is announced begins anew with every number. What was sent up is kept until it is settled, beside the next
//! round ([`sent`]); what was handed down, until it comes back ([`models`]). The coordinator may announce a round again: it
//! then says how the round stands now, with successors in the places of those who died ([`children`]).
//!
//! Nothing here waits: frames are posted, and sent when what has come has been dealt with.
//!
//! A parent that is reached through the gateway ([`Up::Wire`]) is told the same over a wire: its model comes into a slot of
//! this worker's own arena and is handed down from there, and the aggregate is sent from its slot.

mod children;
mod collect;
mod models;
mod sent;
mod server;
#[cfg(test)]
mod simulation;
mod start;
mod up;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anyhow::Context;
use lifl_common::config::{JobSpec, Kind};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::limits;
use lifl_common::update::{Cover, Metadata, Schema, TensorsMut, image};

use self::children::{Bound, Children, Found, Given};
use self::collect::{Collecting, Made};
use self::models::Lent;
use self::sent::Sent;
use self::server::Server;
use self::up::Up;
use super::ground::Ground;
use super::link::Incoming;
use super::{Place, join, ready, uplink};
use crate::dir::Dir;
use crate::task::Task;
use lifl_aggregate::{Rule, Threads};

/// Answers of one worker that are kept which came before they can be taken; what it sends beyond that is refused.
const MOST_EARLY: u32 = 4;

/// Updates that are taken for part of a predecessor's aggregate, for each trainer in it.
const MOST_INHERITED: usize = 8;

/// Where the numbers of refusals begin among what the log [tells](Aggregator::tell) of; below are kinds of frames.
const FIRST_REFUSAL: u16 = 1 << 8;

/// What an aggregator needs to know of its job.
struct Shared {
    /// Without its workers.
    job: JobSpec,
    name: String,
    kind: Kind,
    /// Updates after which a round is done; `None` for all of its children's.
    goal: Option<u32>,
    /// How many old models a child may hold and still be lent a new one; `None` where nobody holds any.
    most_held: Option<u32>,
    schema: Arc<Schema>,
    threads: Threads,
}

/// Where a round stands.
#[derive(Default)]
enum Stage {
    /// Not announced.
    #[default]
    Silent,
    /// Announced, without its model or a slot.
    Announced,
    /// The aggregate is in the making.
    Collecting(Collecting),
    /// Everything has been said about it.
    Over,
}

/// The round that the coordinator has announced last, or that something has come of.
#[derive(Default)]
struct Round {
    number: u32,
    parent: WorkerId,
    /// The children in folding order; [`WorkerId::NONE`] for one that is not waited for.
    places: Vec<WorkerId>,
    /// What an update from each place may say at most.
    bounds: Arc<[Bound]>,
    /// Places and bounds as they are being said, until `Begin`.
    listed: Vec<(WorkerId, Bound)>,
    /// Frames that are still to come of the place listed last.
    unlisted: u32,
    stage: Stage,
    /// The model to hand down.
    model: Option<Lent>,
    /// Those who have not answered are not waited for any more.
    closing: bool,
    /// Answers that came before they could be taken, those of later rounds too.
    early: Early,
    /// What a predecessor's aggregate covers, as far as it has been said, and in how many pieces.
    inherited: (Cover, u32),
}

/// Answers that came before they could be taken: a few of each worker, so that nobody crowds out the others.
#[derive(Default)]
struct Early {
    frames: Vec<Frame>,
    /// How many of them each worker has sent.
    counts: HashMap<WorkerId, u32>,
}

impl Early {
    /// Keeps one, unless its sender has too many here. What is said again is kept once.
    fn keep(&mut self, frame: Frame) -> bool {
        let count = self.counts.entry(frame.from).or_default();
        let what = |frame: &Frame| (frame.from, frame.kind, frame.round, frame.key);
        if *count > 0 && self.frames.iter().any(|known| what(known) == what(&frame)) {
            return true;
        }
        let room = *count < MOST_EARLY;
        if room {
            *count += 1;
            self.frames.push(frame);
        }
        room
    }

    fn take(&mut self) -> Vec<Frame> {
        self.counts.clear();
        std::mem::take(&mut self.frames)
    }
}

struct Aggregator<G> {
    ground: G,
    up: Up,
    shared: Shared,
    /// Models handed down and not yet given back by all who hold them; this worker is one of them while it collects.
    models: HashMap<Key, (Lent, Vec<WorkerId>)>,
    /// Models of rounds that are not announced yet, by who lent them: the last of each.
    early_models: HashMap<WorkerId, (u32, Lent)>,
    /// Aggregates that are not settled, and the last that is.
    sent: Vec<Sent>,
    /// Who is known to be gone: frames of theirs may still come.
    gone: HashSet<WorkerId>,
    /// The top's current model.
    current: Option<Lent>,
    round: Round,
    /// Whose frames of which kind the log has told of in this round, so that nobody can fill it.
    told: HashSet<(WorkerId, u16)>,
    /// Makes the rounds' aggregates; one for all rounds, since its private memory is dear to touch first.
    rule: Box<dyn Rule>,
    /// What makes the mean the model, at the top.
    server: Option<Server>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, run: &Dir, task: Task, schema: Schema) -> anyhow::Result<()> {
    let link = join(&place, &task, &schema).await?;
    let up = Up::new(uplink(&place, &task.worker)?);
    let threads = Threads::up_to(Threads::useful(limits::cpus(), schema.elements()));
    if task.worker.kind == Kind::Top && lifl_learn::threads::made(&task.job.model, 1) > 0 {
        // It makes the first model.
        lifl_learn::threads::start(&task.job.model)?;
    }
    let mut aggregator = Aggregator::new(link, up, threads, task, schema);
    if aggregator.at_top() {
        match place.start {
            Some(round) => aggregator.restore(run, round)?,
            None => aggregator.first_model()?,
        }
    }
    ready(&mut aggregator.ground).await?;
    aggregator.up.ready();
    loop {
        tokio::select! {
            incoming = aggregator.ground.next() => {
                let mut incoming = Some(incoming?);
                // All that is there already, so that an eager aggregator folds it in one pass.
                while let Some(one) = incoming {
                    if aggregator.take(one).await? {
                        return Ok(());
                    }
                    incoming = aggregator.ground.ready().await?;
                }
            }
            above = aggregator.up.next() => if aggregator.above(above?)? {
                return Ok(());
            },
        }
        aggregator.advance().await?;
        aggregator.ground.flush().await?;
    }
}

impl<G: Ground> Aggregator<G> {
    fn new(ground: G, up: Up, threads: Threads, task: Task, schema: Schema) -> Self {
        let Task {
            job,
            worker,
            most_held,
            ..
        } = task;
        let schema = Arc::new(schema);
        let rule = lifl_aggregate::rule(&job, &schema, &threads);
        let server = (worker.kind == Kind::Top).then(|| Server::new(&job, &schema));
        let shared = Shared {
            job,
            name: worker.name,
            kind: worker.kind,
            goal: worker.agg_goal,
            most_held,
            schema,
            threads,
        };
        Self {
            ground,
            up,
            shared,
            models: HashMap::new(),
            early_models: HashMap::new(),
            sent: Vec::new(),
            gone: HashSet::new(),
            current: None,
            round: Round::default(),
            told: HashSet::new(),
            rule,
            server,
        }
    }

    fn at_top(&self) -> bool {
        self.shared.kind == Kind::Top
    }

    /// Deals with one thing that came; says whether it was the job's end.
    async fn take(&mut self, incoming: Incoming) -> anyhow::Result<bool> {
        match incoming {
            Incoming::Frame(kind, frame) => self.frame(kind, frame).await?,
            Incoming::Lost(worker) => {
                self.gone.insert(worker);
                self.early_models.remove(&worker);
                self.lost(worker);
            }
            Incoming::Undelivered(letter) => {
                // Whoever did not get it has it no longer: as good as gone, until the coordinator says who took over.
                self.ground.take_back(letter.to);
                self.lost(letter.to);
                if letter.refusal == Refusal::ReceiverFull
                    && let Stage::Collecting(collecting) = &mut self.round.stage
                {
                    collecting.children.nothing(letter.to);
                }
            }
            Incoming::Asked => {}
            Incoming::Ended(reason) => {
                tracing::info!("the job has ended: {reason}");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The job's first model, from the seed or from a file.
    fn first_model(&mut self) -> anyhow::Result<()> {
        let Shared {
            job, schema, name, ..
        } = &self.shared;
        let mut slot = self
            .ground
            .arena()
            .begin()
            .context("a new arena has no free slot")?;
        let offset = image::data_offset(schema);
        let data = &mut slot.bytes_mut()[offset..offset + schema.data_bytes()];
        match &job.base_model {
            None => lifl_learn::initial(job, job.seed, TensorsMut::new(schema, data)),
            Some(path) => {
                let file = std::fs::read(path)
                    .with_context(|| format!("cannot read baseModel {}", path.display()))?;
                image::import(&file, TensorsMut::new(schema, data))
                    .with_context(|| format!("baseModel {} does not fit the job", path.display()))?;
            }
        }
        let metadata = Metadata {
            maker: name.clone(),
            generation: slot.key().generation,
            ..Metadata::default()
        };
        let data = &slot.bytes()[offset..offset + schema.data_bytes()];
        anyhow::ensure!(
            self.rule.is_finite(data),
            "the job's first model holds NaN, infinity or a number too large to be averaged: begin with another baseModel"
        );
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.ground.arena().publish(slot);
        self.current = Some(self.own(key));
        Ok(())
    }

    fn own(&self, key: Key) -> Lent {
        Lent {
            key,
            length: image::image_bytes(&self.shared.schema) as u64,
            by: WorkerId::NONE,
        }
    }

    async fn frame(&mut self, kind: FrameKind, frame: Frame) -> anyhow::Result<()> {
        let told = frame.from == self.ground.coordinator();
        match kind {
            FrameKind::Child if told => {
                self.announce(frame.round);
                if frame.round == self.round.number {
                    self.list(&frame)?;
                }
            }
            FrameKind::Begin if told => {
                self.announce(frame.round);
                if frame.round == self.round.number {
                    self.begin(worker_id(&frame)?)?;
                }
            }
            FrameKind::Close if told => {
                self.round.closing |= frame.round == self.round.number;
            }
            FrameKind::Model => {
                let lent = Lent {
                    key: frame.key,
                    length: frame.length,
                    by: frame.from,
                };
                self.model(frame.round, lent)?;
            }
            FrameKind::Taken => self.taken(&frame).await?,
            FrameKind::Update | FrameKind::Nothing => self.answer(frame).await?,
            FrameKind::Release => self.released(&frame),
            FrameKind::Refuse => self.settle(frame.key, frame.from, (FrameKind::Refuse, frame.refusal)),
            FrameKind::Child
            | FrameKind::Begin
            | FrameKind::Close
            | FrameKind::Ready
            | FrameKind::State
            | FrameKind::Ping
            | FrameKind::Pong => {
                if self.tell(frame.from, frame.kind) {
                    tracing::warn!(?kind, from = %frame.from, "not for an aggregator, or not from the coordinator");
                }
            }
        }
        Ok(())
    }

    /// Whether the log is to tell of something that a worker did: once a round.
    fn tell(&mut self, worker: WorkerId, what: u16) -> bool {
        self.told.insert((worker, what))
    }

    /// The coordinator names a child, or says more of the one that it named last.
    fn list(&mut self, frame: &Frame) -> anyhow::Result<()> {
        let (at, word) = frame.cover_word();
        let round = &mut self.round;
        if round.unlisted == 0 {
            let bound = Bound {
                samples: frame.samples,
                ..Bound::default()
            };
            round.listed.push((worker_id(frame)?, bound));
        }
        round.unlisted = frame.covers;
        if let Some((_, bound)) = round.listed.last_mut() {
            bound.cover.set_word(at as usize, word);
        }
        Ok(())
    }

    /// Something of a round has come; a new number ends what was left of the round before.
    fn announce(&mut self, number: u32) {
        if number <= self.round.number {
            return;
        }
        let left = std::mem::replace(
            &mut self.round,
            Round {
                number,
                ..Round::default()
            },
        );
        self.told.clear();
        if let Some(model) = left.model {
            self.release_model(model, left.number);
        }
        if let Stage::Collecting(collecting) = left.stage {
            tracing::warn!(round = left.number, "ended without having been finished");
            self.let_go(collecting.model.key, collecting.round);
            let taken: Vec<Frame> = collecting.children.taken().map(|given| given.frame).collect();
            self.give_back(&taken, (FrameKind::Refuse, Refusal::Late as u16));
        }
        for early in left.early.frames {
            if early.round < number {
                self.refuse(&early, Refusal::Late);
            } else {
                self.round.early.keep(early);
            }
        }
        self.give_up_orphans();
    }

    /// The coordinator has said how the round stands: for the first time, or again.
    fn begin(&mut self, parent: WorkerId) -> anyhow::Result<()> {
        let (listed, bounds): (Vec<_>, Vec<_>) = std::mem::take(&mut self.round.listed).into_iter().unzip();
        self.round.parent = parent;
        if matches!(self.round.stage, Stage::Silent) {
            self.tell_held();
            self.round.places = listed;
            self.round.bounds = bounds.into();
            self.round.stage = Stage::Announced;
            self.choose_model()?;
            return Ok(());
        }
        self.say_again();
        if listed.len() != self.round.places.len() {
            tracing::error!(
                round = self.round.number,
                "announced again with another number of children"
            );
            return Ok(());
        }
        let before = std::mem::replace(&mut self.round.places, listed.clone());
        for (old, new) in before.into_iter().zip(listed) {
            if old != new {
                self.replace(old, new)?;
            }
        }
        Ok(())
    }

    /// Somebody else sits in a child's place; [`WorkerId::NONE`]: nobody does.
    fn replace(&mut self, old: WorkerId, new: WorkerId) -> anyhow::Result<()> {
        match &mut self.round.stage {
            Stage::Silent | Stage::Announced => Ok(()),
            Stage::Over if new == WorkerId::NONE => Ok(()),
            Stage::Over => {
                self.succeeded(old, new);
                Ok(())
            }
            Stage::Collecting(collecting) => {
                let found = collecting.children.replace(old, new);
                let owed = collecting.owed.iter_mut().find(|child| **child == old);
                let model = collecting.model;
                match found {
                    _ if new == WorkerId::NONE => {}
                    Found::Waiting => match owed {
                        Some(child) => *child = new,
                        None => self.hand_down(model, self.round.number, &[new])?,
                    },
                    Found::Taken(update, cover) => self.post_taken(new, update.key, &cover),
                    Found::Gone => self.post_taken(new, Key::NONE, &Cover::default()),
                }
                Ok(())
            }
        }
    }

    /// Whatever can begin begins; whatever has come is folded, if it is its time; whatever is complete is sent up.
    async fn advance(&mut self) -> anyhow::Result<()> {
        self.start().await?;
        self.make_room();
        self.hand_down_owed()?;
        let Stage::Collecting(collecting) = &mut self.round.stage else {
            return Ok(());
        };
        if self.round.closing {
            collecting.children.close();
        }
        let refused = collecting.fold(&self.shared, &mut *self.rule)?;
        let complete = collecting.complete();
        for (frame, refusal) in refused {
            self.refuse(&frame, refusal);
        }
        if complete
            && let Stage::Collecting(collecting) = std::mem::replace(&mut self.round.stage, Stage::Over)
        {
            // What came in the same moment as the last update that was needed; whatever comes from now on meets
            // no round that it belongs to.
            let late: Vec<Frame> = collecting.children.unfolded().map(|given| given.frame).collect();
            for late in late {
                self.refuse(&late, Refusal::Late);
            }
            let model = collecting.model.key;
            self.finish(collecting).await?;
            self.let_go(model, self.round.number);
        }
        Ok(())
    }

    /// Begins to collect when the round is announced, the model is there, a slot is free. Who is late with a round before is
    /// handed the model [later](Self::hand_down_owed).
    async fn start(&mut self) -> anyhow::Result<()> {
        if !matches!(self.round.stage, Stage::Announced) {
            return Ok(());
        }
        let Some(model) = (if self.at_top() {
            self.current
        } else {
            self.round.model
        }) else {
            return Ok(());
        };
        let number = self.round.number;
        if model.by != self.round.parent {
            tracing::warn!(from = %model.by, parent = %self.round.parent, "a model from somebody else than the parent");
            self.round.model = None;
            self.release_model(model, number);
            return Ok(());
        }
        if let Some(server) = &mut self.server
            && !server.has_room(&mut self.ground)
        {
            return Ok(());
        }
        let Some(slot) = self.ground.arena().begin() else {
            return Ok(());
        };
        let busy = self.busy(&model);
        let children = self.round.places.iter().filter(|child| **child != WorkerId::NONE);
        let (owed, free): (Vec<_>, Vec<_>) = children.partition(|child| busy.contains(child));
        tracing::info!(
            round = number,
            children = self.round.places.len(),
            busy = owed.len(),
            "round begun"
        );
        self.round.model = None;
        self.rule.reset();
        let children = Children::new(&self.round.places, Arc::clone(&self.round.bounds));
        let mut collecting = Collecting::new(number, children, self.shared.goal, slot, model);
        collecting.owed = owed;
        // As long as it collects, a successor of a child may want it.
        let own = self.ground.id();
        self.models
            .entry(model.key)
            .or_insert((model, Vec::new()))
            .1
            .push(own);
        self.round.stage = Stage::Collecting(collecting);
        self.hand_down(model, number, &free)?;
        for early in self.round.early.take() {
            self.answer(early).await?;
        }
        Ok(())
    }

    /// A child's answer.
    async fn answer(&mut self, frame: Frame) -> anyhow::Result<()> {
        let nothing = frame.kind == FrameKind::Nothing as u16;
        if let Some(at) = self.sent.iter().position(|sent| sent.round == frame.round) {
            if !nothing {
                self.answer_to_sent(at, frame).await;
            }
            return Ok(());
        }
        let number = self.round.number;
        match &mut self.round.stage {
            Stage::Collecting(collecting) if frame.round == number => {
                if nothing {
                    collecting.children.nothing(frame.from);
                    return Ok(());
                }
                if collecting.children.has(&frame) {
                    // Said again.
                    return Ok(());
                }
                if !collecting.children.is_waiting(frame.from) {
                    self.refuse(&frame, Refusal::NotExpected);
                    return Ok(());
                }
                let inspected = collect::inspect(&mut self.ground, &self.shared.schema, &frame).await;
                if let Err(refusal) = inspected.and_then(|given| collecting.children.give(given)) {
                    // Whose maker is gone may still come from its successor.
                    if refusal != Refusal::NoArena {
                        collecting.children.refuse(frame.from);
                    }
                    self.refuse(&frame, refusal);
                }
            }
            Stage::Over if frame.round == number => self.refuse(&frame, Refusal::Late),
            _ if frame.round < number => self.refuse(&frame, Refusal::Late),
            _ => {
                if !self.round.early.keep(frame) {
                    self.refuse(&frame, Refusal::NotExpected);
                }
            }
        }
        Ok(())
    }

    /// A child's update of a round whose aggregate is above.
    async fn answer_to_sent(&mut self, at: usize, frame: Frame) {
        let sent = &self.sent[at];
        let verdict = sent.told();
        if sent
            .children
            .iter()
            .any(|(update, _)| (update.from, update.key) == (frame.from, frame.key))
        {
            // Said again: so is what is known of it.
            if let Some(verdict) = verdict {
                self.give_back(&[frame], verdict);
            }
            return;
        }
        if sent.own.is_some() {
            return self.refuse(&frame, Refusal::Late);
        }
        match collect::inspect(&mut self.ground, &self.shared.schema, &frame).await {
            Ok(given) if self.is_inherited(at, &given) => {
                self.sent[at].children.push((frame, given.metadata.cover));
                if let Some(verdict) = verdict {
                    self.give_back(&[frame], verdict);
                }
            }
            Ok(_) => self.refuse(&frame, Refusal::Late),
            Err(refusal) => self.refuse(&frame, refusal),
        }
    }

    /// Whether a child's update is part of the aggregate that a predecessor sent up, and of what stands below that child. A
    /// child's successor may make it again.
    fn is_inherited(&self, at: usize, given: &Given) -> bool {
        let (sent, cover) = (&self.sent[at], &given.metadata.cover);
        let round = &self.round;
        let place = round.places.iter().position(|child| *child == given.frame.from);
        let own = || place.is_some_and(|place| round.bounds[place].cover.contains_all(cover));
        let more = sent.children.len() < MOST_INHERITED * sent.cover.count() as usize;
        more && sent.cover.contains_all(cover) && (sent.round != round.number || own())
    }

    fn refuse(&mut self, update: &Frame, refusal: Refusal) {
        if update.kind == FrameKind::Nothing as u16 {
            return;
        }
        let Frame { from, round, .. } = *update;
        if self.tell(from, FIRST_REFUSAL + refusal as u16) {
            tracing::warn!(%from, round, "update refused: {refusal}");
            if refusal.is_senders_fault() {
                let refused = Frame {
                    round,
                    refusal: refusal as u16,
                    value: u64::from(from.0),
                    ..Frame::default()
                };
                let coordinator = self.ground.coordinator();
                self.ground.post(coordinator, FrameKind::Refuse, refused);
            }
        }
        self.give_back(&[*update], (FrameKind::Refuse, refusal as u16));
    }

    /// All children have answered, or as many as are needed: the aggregate goes up.
    async fn finish(&mut self, mut collecting: Collecting) -> anyhow::Result<()> {
        // Whoever is the parent now: it may have changed since the round began.
        let (number, parent) = (self.round.number, self.round.parent);
        let (metadata, children) = loop {
            if self.at_top() && !self.has_quorum(&collecting) {
                return self.nothing(number, parent);
            }
            let (arena, state) = self.ground.arenas();
            let (arena, state) = (&*arena, state.map(|state| &*state));
            let own_object = |key| arena.object(key);
            let step = self.server.as_mut().map(|server| server.step(state));
            match collecting.finish(&self.shared, &mut *self.rule, step, own_object)? {
                Made::Done { metadata, children } => break (metadata, children),
                Made::Nothing => return self.nothing(number, parent),
                Made::Diverged(culprits) if culprits.is_empty() => {
                    let updates: Vec<Frame> = collecting.children.folded().map(|given| given.frame).collect();
                    self.give_back(&updates, (FrameKind::Refuse, Refusal::Diverged as u16));
                    return self.nothing(number, parent);
                }
                Made::Diverged(culprits) => {
                    collecting.without(&culprits, &mut *self.rule);
                    let mut refused: Vec<_> = culprits
                        .iter()
                        .map(|culprit| (*culprit, Refusal::NotFinite))
                        .collect();
                    refused.extend(collecting.fold(&self.shared, &mut *self.rule)?);
                    for (frame, refusal) in refused {
                        self.refuse(&frame, refusal);
                    }
                }
            }
        };
        let key = self.ground.arena().publish(collecting.slot);
        let up = Frame {
            round: number,
            key,
            length: image::image_bytes(&self.shared.schema) as u64,
            samples: metadata.samples,
            value: metadata.loss.unwrap_or(f64::NAN).to_bits(),
            covers: metadata.cover.count(),
            ..Frame::default()
        };
        let mut sent = Sent {
            round: number,
            key,
            holder: Some(parent),
            cover: metadata.cover.clone(),
            own: Some((up, metadata)),
            children,
            verdict: None,
            held: false,
        };
        if self.at_top() {
            // What the top has made is accepted: nobody is above it. The coordinator hears of the new model before
            // anybody's update is given back, so that a top which dies in between has either decided or not.
            sent.verdict = Some((FrameKind::Release, 0));
            sent.held = true;
            if let (Some(server), Some((_, metadata))) = (&mut self.server, &sent.own) {
                server.publish(&mut self.ground, metadata);
            }
            self.sent.push(sent);
            self.current = Some(self.own(key));
            self.lend_model(up)?;
            if number >= self.shared.job.rounds {
                self.tell_held();
            }
            return Ok(());
        }
        self.sent.push(sent);
        self.send_up(key).await
    }

    /// Whether enough trainers' work came for a new model; if not, the updates go back.
    fn has_quorum(&mut self, collecting: &Collecting) -> bool {
        let mut cover = Cover::default();
        for given in collecting.children.folded() {
            cover.add(&given.metadata.cover);
        }
        let (came, quorum) = (cover.count(), self.shared.job.quorum);
        if came >= quorum {
            return true;
        }
        tracing::warn!(round = collecting.round, came, quorum, "no quorum");
        let updates: Vec<Frame> = collecting.children.folded().map(|given| given.frame).collect();
        self.give_back(&updates, (FrameKind::Refuse, Refusal::NoQuorum as u16));
        false
    }

    /// No child gave anything, or too few did: the round leaves the model as it was.
    fn nothing(&mut self, round: u32, parent: WorkerId) -> anyhow::Result<()> {
        if !self.at_top() {
            self.send_nothing(round, parent);
            return Ok(());
        }
        let Lent { key, length, .. } = self.current.context("the top has no model")?;
        let unchanged = Frame {
            round,
            key,
            length,
            ..Frame::default()
        };
        self.lend_model(unchanged)
    }

    /// Lends the coordinator the top's model, and in front of it what the optimizer remembers with it.
    fn lend_model(&mut self, model: Frame) -> anyhow::Result<()> {
        let coordinator = self.ground.coordinator();
        self.ground.arena().lend(model.key, coordinator)?;
        if let Some(server) = &self.server
            && let Some((key, length)) = server.lend(&mut self.ground, coordinator)?
        {
            let state = Frame {
                round: model.round,
                key,
                length,
                ..Frame::default()
            };
            self.ground.post(coordinator, FrameKind::State, state);
        }
        self.ground.post(coordinator, FrameKind::Model, model);
        Ok(())
    }
}

/// The worker that a frame from the coordinator names.
fn worker_id(frame: &Frame) -> anyhow::Result<WorkerId> {
    let id = u32::try_from(frame.value).context("the coordinator named an impossible worker")?;
    Ok(WorkerId(id))
}
