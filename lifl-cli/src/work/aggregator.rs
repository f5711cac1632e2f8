//! Top, middle and leaf aggregator: one runtime, in another place of the tree.
//!
//! ```text
//!          Child×n, Begin (coordinator), Model (parent; the top has its own), a free slot
//!   idle ────────────────────────────────────────────────────────────────▶ collecting
//!    ▲                                                                         │ each child: Update, Nothing, or lost
//!    │          no child gave anything: Nothing up                             ▼
//!    │◀───────────────────────────────────────────────── all answered, or aggGoal updates came
//!    │          else: the aggregate is lent to the parent                      │
//!    └──────────────────────────── sent up ◀───────────────────────────────────┘
//! ```
//!
//! What was sent up stays *outstanding* until the parent answers: a `Release` means that the aggregate is contained
//! in what was accepted above, and is passed on to the children; a `Refuse`, or the parent's death, gives the
//! children's updates back uncounted. The next round may begin meanwhile.
//!
//! A parent that is reached through the gateway ([`Up::Wire`]) is told the same over a wire: its model comes into a slot of
//! this worker's own arena and is handed down from there, and the aggregate is sent from its slot.

mod children;
mod collect;
mod server;
mod settle;
mod start;
mod up;

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Context;
use lifl_common::config::{JobSpec, Kind, WorkerSpec};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};
use lifl_common::update::{Metadata, Schema, TensorsMut, image};

use self::collect::Collecting;
use self::server::Server;
use self::up::Up;
use super::link::{Incoming, Link};
use super::{Place, join, ready, uplink};
use crate::aggregate::{Accumulator, Threads};
use crate::memory;

/// What an aggregator needs to know of its job.
struct Shared {
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

/// A round that is announced or under way.
#[derive(Default)]
struct Round {
    number: u32,
    parent: WorkerId,
    children: Vec<WorkerId>,
    begun: bool,
    /// The model to hand down.
    model: Option<Lent>,
    collecting: Option<Collecting>,
}

/// A model that this aggregator was lent, or has in its own arena: the top's, and what came over a wire.
#[derive(Clone, Copy)]
struct Lent {
    key: Key,
    length: u64,
    by: WorkerId,
}

/// An aggregate that the parent has, and the children whose updates it contains.
struct Outstanding {
    round: u32,
    parent: WorkerId,
    children: Vec<(WorkerId, Frame)>,
}

struct Aggregator {
    link: Link,
    up: Up,
    shared: Shared,
    /// Models handed down and not yet given back by all children.
    models: HashMap<Key, (Lent, Vec<WorkerId>)>,
    outstanding: HashMap<Key, Outstanding>,
    /// The top's current model.
    current: Option<Lent>,
    round: Round,
    /// The round's mean in the making; one for all rounds, since its private memory is dear to touch first.
    accumulator: Accumulator,
    /// What makes the mean the model, at the top.
    server: Option<Server>,
}

/// Plays the role until the job ends.
pub(super) async fn play(place: Place, job: JobSpec, spec: WorkerSpec, schema: Schema) -> anyhow::Result<()> {
    let link = join(&place, &job, &spec, &schema).await?;
    let up = Up::new(uplink(&place, &spec)?);
    let threads = Threads::new(std::thread::available_parallelism().map_or(1, usize::from))?;
    let most_held = memory::most_held(&job, &spec);
    let shared = Shared {
        job,
        name: spec.name,
        kind: spec.kind,
        goal: spec.agg_goal,
        most_held,
        schema: Arc::new(schema),
        threads,
    };
    let Shared {
        job, schema, threads, ..
    } = &shared;
    let accumulator = Accumulator::new(schema.clone(), job.updates, job.timing, threads.clone());
    let server = (spec.kind == Kind::Top).then(|| Server::new(job, schema));
    let mut aggregator = Aggregator {
        link,
        up,
        shared,
        models: HashMap::new(),
        outstanding: HashMap::new(),
        current: None,
        round: Round::default(),
        accumulator,
        server,
    };
    if spec.kind == Kind::Top {
        match &place.start {
            Some(checkpoint) => aggregator.restore(checkpoint)?,
            None => aggregator.first_model()?,
        }
    }
    ready(&mut aggregator.link).await?;
    aggregator.up.ready();
    loop {
        tokio::select! {
            incoming = aggregator.link.next() => {
                let mut incoming = Some(incoming?);
                // All that is there already, so that an eager aggregator folds it in one pass.
                while let Some(one) = incoming {
                    if aggregator.take(one).await? {
                        return Ok(());
                    }
                    incoming = aggregator.link.ready().await?;
                }
            }
            above = aggregator.up.next() => if aggregator.above(above?).await? {
                return Ok(());
            },
        }
        aggregator.advance().await?;
    }
}

impl Aggregator {
    /// Deals with one thing that came; says whether it was the job's end.
    async fn take(&mut self, incoming: Incoming) -> anyhow::Result<bool> {
        match incoming {
            Incoming::Frame(kind, frame) => self.frame(kind, frame).await?,
            Incoming::Lost(worker) => self.lost(worker).await?,
            Incoming::Undelivered(letter) => {
                // Whoever did not get it has it no longer: as good as gone for this round.
                self.link.take_back(letter.to);
                self.lost(letter.to).await?;
            }
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
        let mut slot = self.link.arena.begin().context("a new arena has no free slot")?;
        let offset = image::data_offset(schema);
        let data = &mut slot.bytes_mut()[offset..offset + schema.data_bytes()];
        match &job.base_model {
            None => crate::learn::initial(&job.model, job.seed, TensorsMut::new(schema, data)),
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
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let key = self.link.arena.publish(slot);
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
        match kind {
            FrameKind::Child if frame.from == self.link.coordinator() => {
                self.announce(frame.round).await?.push(frame)
            }
            FrameKind::Begin if frame.from == self.link.coordinator() => {
                let round = self.announce(frame.round).await?;
                round.begin(&frame)?;
            }
            FrameKind::Model => {
                let lent = Lent {
                    key: frame.key,
                    length: frame.length,
                    by: frame.from,
                };
                self.model(frame.round, lent).await?;
            }
            FrameKind::Update | FrameKind::Nothing => self.answer(kind, frame).await?,
            FrameKind::Release => self.released(frame).await?,
            FrameKind::Refuse => {
                let refusal = Refusal::from_number(frame.refusal).unwrap_or(Refusal::BadKey);
                tracing::warn!(round = frame.round, "the parent refused our aggregate: {refusal}");
                self.settle(frame.key, frame.from, FrameKind::Refuse, frame.refusal)
                    .await?;
            }
            FrameKind::Child | FrameKind::Begin | FrameKind::Ready | FrameKind::State => {
                tracing::warn!(?kind, from = %frame.from, "not for an aggregator, or not from the coordinator");
            }
        }
        Ok(())
    }

    /// The round of that number; a new number ends what was left of the round before.
    async fn announce(&mut self, number: u32) -> anyhow::Result<&mut Round> {
        if self.round.number != number {
            let left = std::mem::take(&mut self.round);
            if let Some(model) = left.model {
                self.release_model(model, left.number).await?;
            }
            if let Some(collecting) = left.collecting {
                tracing::warn!(round = left.number, "ended without having been finished");
                self.let_go(collecting.model.key, collecting.round).await?;
                let given_back = collecting.children.given();
                self.give_back(&given_back, FrameKind::Refuse, Refusal::NotExpected as u16)
                    .await?;
            }
            self.round.number = number;
        }
        Ok(&mut self.round)
    }

    /// A round's model has come.
    async fn model(&mut self, number: u32, lent: Lent) -> anyhow::Result<()> {
        if self.shared.kind == Kind::Top || number < self.round.number {
            tracing::warn!(from = %lent.by, round = number, "a model that was not expected");
            return self.release_model(lent, number).await;
        }
        let round = self.announce(number).await?;
        if let Some(before) = round.model.replace(lent) {
            self.release_model(before, number).await?;
        }
        Ok(())
    }

    /// Whatever can begin begins; whatever has come is folded, if it is its time; whatever is complete is sent up.
    async fn advance(&mut self) -> anyhow::Result<()> {
        self.start().await?;
        self.make_room();
        self.hand_down_owed().await?;
        let Some(collecting) = &mut self.round.collecting else {
            return Ok(());
        };
        let refused = collecting.fold(&self.shared, &mut self.accumulator)?;
        let complete = collecting.complete();
        for (frame, refusal) in refused {
            self.refuse(&frame, refusal).await?;
        }
        if complete && let Some(collecting) = self.round.collecting.take() {
            // What came in the same moment as the last update that was needed; whatever comes from now on meets
            // no round that it belongs to.
            for late in collecting.children.unfolded() {
                self.refuse(&late.frame, Refusal::NotExpected).await?;
            }
            self.let_go(collecting.model.key, collecting.round).await?;
            self.finish(collecting).await?;
        }
        Ok(())
    }

    /// Begins to collect when the round is announced, the model is there, a slot is free. Who is late with a round before is
    /// handed the model [later](Self::hand_down_owed).
    async fn start(&mut self) -> anyhow::Result<()> {
        if self.round.collecting.is_some() || !self.round.begun {
            return Ok(());
        }
        let at_top = self.shared.kind == Kind::Top;
        let Some(model) = (if at_top { self.current } else { self.round.model }) else {
            return Ok(());
        };
        if model.by != self.round.parent {
            tracing::warn!(from = %model.by, parent = %self.round.parent, "a model from somebody else than the parent");
            self.round.model = None;
            return self.release_model(model, self.round.number).await;
        }
        if self
            .server
            .as_mut()
            .is_some_and(|server| !server.has_room(&mut self.link))
        {
            return Ok(());
        }
        let Some(slot) = self.link.arena.begin() else {
            return Ok(());
        };
        let children = std::mem::take(&mut self.round.children);
        let number = self.round.number;
        let busy = self.busy(&model);
        let (owed, free): (Vec<_>, Vec<_>) = children.iter().partition(|child| busy.contains(child));
        tracing::info!(
            round = number,
            children = children.len(),
            busy = owed.len(),
            "round begun"
        );
        self.round.model = None;
        self.round.begun = false;
        self.accumulator.reset();
        let mut collecting =
            Collecting::new(number, self.round.parent, children, self.shared.goal, slot, model);
        collecting.owed = owed;
        let holders = &mut self.models.entry(model.key).or_insert((model, Vec::new())).1;
        if !collecting.owed.is_empty() {
            // Until they have had it, it must not go back.
            holders.push(self.link.id());
        }
        self.round.collecting = Some(collecting);
        self.hand_down(model, number, &free).await
    }

    /// A child's answer.
    async fn answer(&mut self, kind: FrameKind, frame: Frame) -> anyhow::Result<()> {
        let number = self.round.number;
        let Some(collecting) = self.round.collecting.as_mut().filter(|_| frame.round == number) else {
            return self.refuse(&frame, Refusal::NotExpected).await;
        };
        if kind == FrameKind::Nothing {
            collecting.children.nothing(frame.from);
            return Ok(());
        }
        if !collecting.children.is_waiting(frame.from) {
            return self.refuse(&frame, Refusal::NotExpected).await;
        }
        match collect::inspect(&mut self.link, &self.shared.schema, &frame).await {
            Ok(given) => collecting.children.give(frame.from, given),
            Err(refusal) => {
                collecting.children.refuse(frame.from);
                self.refuse(&frame, refusal).await?;
            }
        }
        Ok(())
    }

    async fn refuse(&mut self, update: &Frame, refusal: Refusal) -> anyhow::Result<()> {
        if update.kind == FrameKind::Nothing as u16 {
            return Ok(());
        }
        tracing::warn!(from = %update.from, round = update.round, "update refused: {refusal}");
        let given_back = Frame {
            round: update.round,
            key: update.key,
            refusal: refusal as u16,
            ..Frame::default()
        };
        self.link.send(update.from, FrameKind::Refuse, given_back).await
    }

    /// All children have answered, or as many as are needed: the aggregate goes up.
    async fn finish(&mut self, collecting: Collecting) -> anyhow::Result<()> {
        let number = collecting.round;
        let parent = collecting.parent;
        let own_object = |key| self.link.arena.object(key);
        let state = self.link.state.as_ref();
        let step = self.server.as_mut().map(|server| server.step(state));
        let Some(done) = collecting.finish(&self.shared, &mut self.accumulator, step, own_object)? else {
            return self.nothing(number, parent).await;
        };
        let collect::Done {
            slot,
            metadata,
            covers,
            children,
            model,
        } = done;
        let key = self.link.arena.publish(slot);
        let length = image::image_bytes(&self.shared.schema) as u64;
        let loss = metadata.loss.unwrap_or(f64::NAN).to_bits();
        let up = Frame {
            round: number,
            key,
            length,
            samples: metadata.samples,
            value: loss,
            covers,
            ..Frame::default()
        };
        if self.shared.kind == Kind::Top {
            // What the top has made is accepted: nobody is above it.
            self.give_back(&children, FrameKind::Release, 0).await?;
            self.current = Some(self.own(key));
            self.retire(model.key);
            if let Some(server) = &mut self.server {
                server.publish(&mut self.link, &metadata);
            }
            return self.lend_model(up).await;
        }
        let outstanding = Outstanding {
            round: number,
            parent,
            children,
        };
        self.outstanding.insert(key, outstanding);
        self.send_up(up, &metadata).await
    }

    /// No child gave anything: the round leaves the model as it was.
    async fn nothing(&mut self, round: u32, parent: WorkerId) -> anyhow::Result<()> {
        if self.shared.kind != Kind::Top {
            return self.send_nothing(round, parent).await;
        }
        let Lent { key, length, .. } = self.current.context("the top has no model")?;
        let model = Frame {
            round,
            key,
            length,
            ..Frame::default()
        };
        self.lend_model(model).await
    }

    /// Lends the coordinator the top's model, and in front of it what the optimizer remembers with it.
    async fn lend_model(&mut self, model: Frame) -> anyhow::Result<()> {
        let coordinator = self.link.coordinator();
        self.link.arena.lend(model.key, coordinator)?;
        let mut frames = Vec::with_capacity(2);
        if let Some(server) = &self.server {
            let state = server.lend(&mut self.link, coordinator)?;
            frames.extend(state.map(|(key, length)| {
                let state = Frame {
                    round: model.round,
                    key,
                    length,
                    ..Frame::default()
                };
                self.link.frame(coordinator, FrameKind::State, state)
            }));
        }
        frames.push(self.link.frame(coordinator, FrameKind::Model, model));
        self.link.send_all(&frames).await
    }
}

impl Round {
    fn push(&mut self, child: Frame) {
        match u32::try_from(child.value) {
            Ok(id) if !self.children.contains(&WorkerId(id)) => self.children.push(WorkerId(id)),
            _ => tracing::warn!(value = child.value, "not a child's id, or one twice"),
        }
    }

    fn begin(&mut self, frame: &Frame) -> anyhow::Result<()> {
        let parent = u32::try_from(frame.value).context("the coordinator named an impossible parent")?;
        self.parent = WorkerId(parent);
        self.begun = true;
        Ok(())
    }
}
