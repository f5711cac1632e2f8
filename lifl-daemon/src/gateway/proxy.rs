//! A proxy: a worker of the job in the daemon that stands for one beyond the node's shared memory.
//!
//! To its parent it is a worker like any other: it is lent models and lends updates. It knows nothing of them but their
//! format.
//!
//! ```text
//!   down:  Model lent ─▶ Begin of its round has come ─▶ streamed out ─▶ all acknowledged: Release
//!   up:    header ─▶ waits for a free slot ─▶ data into the slot, header written ─▶ Update lent ─▶ Release or Refuse:
//!          the worker gets the verdict, the slot is free
//!   wire:  open ── broken ──▶ waited for, at most the grace ──▶ given up: the proxy leaves, its peers are told
//! ```

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lifl_common::arena::{ArenaError, Layout, OwnedArena, PeerArena, SlotError};
use lifl_common::client::{Client, ClientError, FrameSocket};
use lifl_common::control::{ErrorCode, Event};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, JobId, Key, WorkerId};
use lifl_common::session::{
    Broken, Exchange, Happened, Malformed, Message, Object, Patience, Room, Source, Traffic, UpdateHeader,
    Wire, proxy_name,
};
use lifl_common::update::{ImageError, Metadata, Schema, image};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::FAREWELL;
use crate::chain::error_chain;
use crate::errands;
use crate::server::Lobby;

/// Whom a proxy stands for, and what it needs for that.
pub(super) struct Stand {
    /// The way to the daemon's registry.
    pub(super) lobby: Lobby,
    pub(super) job: JobId,
    /// Whose that is.
    pub(super) uid: u32,
    pub(super) role: String,
    pub(super) name: String,
    pub(super) object_bytes: u64,
    pub(super) grace: Duration,
    pub(super) traffic: Arc<Traffic>,
    /// The job's tensors, which its proxies share.
    pub(super) schema: Arc<OnceLock<Arc<Schema>>>,
    /// The worker's connections, one after the other.
    pub(super) wires: mpsc::Receiver<Wire>,
    /// The worker is dead, or the gateway ends.
    pub(super) leave: CancellationToken,
}

/// Why a proxy leaves its job before the end.
#[derive(Debug, thiserror::Error)]
enum ProxyError {
    #[error("the daemon does not have it")]
    Client(#[from] ClientError),
    #[error("no connection with the registry can be made")]
    Lobby(#[source] io::Error),
    #[error("the frame socket failed")]
    Frames(#[source] io::Error),
    #[error("the frame socket was closed")]
    FramesClosed,
    #[error("its session was not taken up again for {} s", .0.as_secs())]
    GivenUp(Duration),
    #[error("no slot has {0} bytes")]
    NoSlot(u64),
    #[error("the coordinator named the impossible parent {0}")]
    Parent(u64),
    #[error("the update cannot be lent")]
    Slot(#[from] SlotError),
    #[error("an update came for which nothing was prepared")]
    Unprepared,
}

/// Why a model that was lent is not sent on.
#[derive(Debug, thiserror::Error)]
enum ModelError {
    #[error("its arena cannot be had")]
    Client(#[from] ClientError),
    #[error("it cannot be read")]
    Arena(#[from] ArenaError),
    #[error("the daemon has not read it")]
    Unread,
    #[error("it is not the job's")]
    Image(#[from] ImageError),
    #[error("the job's updates take {needed} bytes, but {announced} were announced")]
    Room { needed: u64, announced: u64 },
}

/// An update that the parent has, or its predecessor had.
struct Lent {
    /// The frame that it went up with.
    update: Frame,
    parent: WorkerId,
}

pub(super) struct Proxy {
    client: Client,
    frames: FrameSocket,
    id: WorkerId,
    coordinator: WorkerId,
    arena: OwnedArena,
    /// Whose the job is.
    uid: u32,
    peers: HashMap<ArenaId, Arc<PeerArena>>,
    name: String,
    exchange: Exchange,
    wire: Option<Wire>,
    schema: Option<Arc<Schema>>,
    /// The job's, once one of its proxies has seen a model: a long one is there once.
    shared_schema: Arc<OnceLock<Arc<Schema>>>,
    ready: bool,
    /// The round and the parent that the coordinator named last.
    begun: (u32, WorkerId),
    /// The model that we are lent, by the round's parent.
    model: Option<Frame>,
    /// Models of rounds that have not been announced, by who lent them: the last of each.
    early_models: HashMap<WorkerId, Frame>,
    /// An update that waits for a slot, or is coming.
    coming: Option<UpdateHeader>,
    lent: Option<Lent>,
    /// The last round in which the parent has had an answer.
    answered: u32,
    /// The last verdict, for a worker that did not get it.
    verdict: Option<(u32, u16)>,
}

impl Proxy {
    /// Stands for a worker until the job ends or the worker is lost. However it ends, the worker is told.
    pub(super) async fn stand_in(mut stand: Stand) {
        let (mut proxy, outcome) = match Self::join(&stand).await {
            Ok(mut proxy) => {
                let outcome = proxy.stand(&mut stand).await;
                (Some(proxy), outcome)
            }
            Err(error) => (None, Err(error)),
        };
        let mut wire = proxy.as_mut().and_then(|proxy| proxy.wire.take());
        let last_word = match outcome {
            // The daemon waits for its workers, and so for the last word.
            Ok(reason) => Message::End(reason),
            Err(error) => {
                let reason = error_chain(&error);
                tracing::warn!(job = %stand.job, worker = ?stand.name, "the worker's proxy leaves: {reason}");
                // Its peers need not wait.
                proxy = None;
                Message::Bye { last: true, reason }
            }
        };
        stand.wires.close();
        while let Ok(next) = stand.wires.try_recv() {
            wire = Some(next);
        }
        farewell(wire, &last_word).await;
        drop(proxy);
    }

    /// Gives the reason of an end that is none of the proxy's making.
    async fn stand(&mut self, stand: &mut Stand) -> Result<String, ProxyError> {
        let mut patience = Patience::new();
        loop {
            let given_up = patience.ends(stand.grace);
            tokio::select! {
                frame = self.frames.recv() => {
                    let frame = frame.map_err(ProxyError::Frames)?;
                    self.frame(&frame.ok_or(ProxyError::FramesClosed)?).await?;
                }
                event = self.client.event() => match event? {
                    Event::PeerLost(lost) => self.lost(lost.worker),
                    Event::DeadLetter(letter) => self.lost(letter.to),
                    Event::JobEnded { reason } => return Ok(reason),
                    // A proxy ends with its daemon, so none comes back.
                    Event::PeerJoined { .. } | Event::Living { .. } => {}
                },
                Some(mut wire) = stand.wires.recv() => {
                    wire.count_in(Arc::clone(&stand.traffic));
                    if self.wire.take().is_some() {
                        patience.broken(&self.exchange);
                    }
                    patience.opened(&self.exchange, &mut wire);
                    self.open(wire);
                }
                happened = happened(&mut self.exchange, &mut self.wire) => {
                    let outcome = match happened {
                        Ok(happened) => self.happened(happened).await?,
                        Err(broken) => Err(broken),
                    };
                    if let Err(broken) = outcome {
                        self.broken(&broken).await;
                        patience.broken(&self.exchange);
                    }
                }
                () = tokio::time::sleep_until(given_up), if self.wire.is_none() => {
                    return Err(ProxyError::GivenUp(stand.grace));
                }
                () = stand.leave.cancelled() => return Ok("the worker's place is taken away".to_owned()),
            }
            self.advance().await?;
        }
    }

    async fn join(stand: &Stand) -> Result<Self, ProxyError> {
        let line = stand.lobby.enter(stand.uid).await.map_err(ProxyError::Lobby)?;
        let mut client = Client::over(line).await?;
        let registration = client
            .register(stand.job, &stand.role, &proxy_name(&stand.name))
            .await?;
        let layout = Layout::for_objects(1, stand.object_bytes);
        let created = client
            .create_arena(layout.ok_or(ProxyError::NoSlot(stand.object_bytes))?)
            .await?;
        Ok(Self {
            client,
            frames: registration.frames,
            id: registration.worker,
            coordinator: registration.owner,
            arena: created.arena,
            uid: stand.uid,
            peers: HashMap::new(),
            name: stand.name.clone(),
            exchange: Exchange::with_grace(stand.grace),
            wire: None,
            schema: None,
            shared_schema: Arc::clone(&stand.schema),
            ready: false,
            begun: (0, WorkerId::NONE),
            model: None,
            early_models: HashMap::new(),
            coming: None,
            lent: None,
            answered: 0,
            verdict: None,
        })
    }

    /// A connection of the worker, its first or the next.
    fn open(&mut self, mut wire: Wire) {
        tracing::info!(worker = ?self.name, "session open");
        wire.send(&Message::Welcome);
        if let Some((round, refusal)) = self.verdict {
            wire.send(&Message::Verdict { round, refusal });
        }
        self.exchange.resume(&mut wire);
        self.wire = Some(wire);
    }

    async fn broken(&mut self, broken: &Broken) {
        let reason = error_chain(broken);
        let wire = self.wire.take();
        if !matches!(broken, Broken::Malformed(_)) {
            // Often enough the end of a job, which its worker may hear of first. One that does not come back is warned of.
            tracing::info!(worker = ?self.name, "session broken: {reason}");
        } else {
            tracing::warn!(worker = ?self.name, "session broken: {reason}");
            farewell(wire, &Message::Bye { last: false, reason }).await;
        }
        // The worker says again what it wanted.
        if self.exchange.receiving().is_none() {
            self.coming = None;
        }
    }

    fn say(&mut self, message: &Message) {
        if let Some(wire) = &mut self.wire {
            wire.send(message);
        }
    }

    fn judge(&mut self, round: u32, refusal: u16) {
        self.verdict = Some((round, refusal));
        self.say(&Message::Verdict { round, refusal });
    }

    async fn send(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) -> Result<(), ProxyError> {
        let frame = Frame {
            to,
            from: self.id,
            kind: kind as u16,
            ..frame
        };
        self.frames.send(&[frame]).await.map_err(ProxyError::Frames)
    }

    async fn frame(&mut self, frame: &Frame) -> Result<(), ProxyError> {
        match FrameKind::from_number(frame.kind) {
            Some(FrameKind::Begin) if frame.from == self.coordinator => {
                let parent = u32::try_from(frame.value).map_err(|_| ProxyError::Parent(frame.value))?;
                let again = frame.round == self.begun.0;
                self.begun = (frame.round, WorkerId(parent));
                self.announced(again).await?;
                self.choose_model().await?;
                // What was coming for an earlier round comes too late.
                if let Some(late) = self.coming.take_if(|coming| coming.object.round != frame.round) {
                    self.exchange.abandon();
                    self.judge(late.object.round, Refusal::NotExpected as u16);
                }
            }
            Some(FrameKind::Model) => self.lent_model(frame).await?,
            Some(FrameKind::Ping) if frame.from == self.coordinator => {
                let answered = Frame {
                    round: self.answered,
                    ..Frame::default()
                };
                self.send(self.coordinator, FrameKind::Pong, answered).await?;
            }
            Some(kind @ (FrameKind::Release | FrameKind::Refuse)) => {
                let Some(lent) = self
                    .lent
                    .take_if(|lent| lent.update.key == frame.key && lent.parent == frame.from)
                else {
                    tracing::debug!(from = %frame.from, key = %frame.key, "released what was not lent");
                    return Ok(());
                };
                if let Err(error) = self.arena.release(lent.update.key, lent.parent) {
                    tracing::warn!(from = %frame.from, "released what was not lent: {error}");
                }
                self.arena.free(lent.update.key);
                let refusal = match kind {
                    FrameKind::Refuse if frame.refusal == 0 => Refusal::BadKey as u16,
                    FrameKind::Refuse => frame.refusal,
                    _ => 0,
                };
                self.judge(lent.update.round, refusal);
            }
            _ => tracing::debug!(kind = frame.kind, from = %frame.from, "not for a proxy"),
        }
        Ok(())
    }

    /// Somebody lends a model. Whether that is the parent, the coordinator says: anybody can send one.
    async fn lent_model(&mut self, frame: &Frame) -> Result<(), ProxyError> {
        let (round, parent) = self.begun;
        if frame.round > round {
            let before = self.early_models.insert(frame.from, *frame);
            return match before.filter(|before| before.key != frame.key) {
                Some(before) => self.give_back(&before).await,
                None => Ok(()),
            };
        }
        if frame.round < round || frame.from != parent {
            tracing::debug!(from = %frame.from, round = frame.round, "a model of an old round or from a stranger");
            return self.give_back(frame).await;
        }
        if self.model.is_some_and(|model| model.key != frame.key) {
            self.give_model_back().await?;
        }
        self.model = Some(*frame);
        Ok(())
    }

    /// A round has been announced: of the models that came before that, its parent's is its.
    async fn choose_model(&mut self) -> Result<(), ProxyError> {
        let (round, parent) = self.begun;
        if self
            .model
            .is_some_and(|model| model.round < round || model.from != parent)
        {
            self.give_model_back().await?;
        }
        let early: Vec<Frame> = self
            .early_models
            .extract_if(|_, model| model.round <= round)
            .map(|(_, model)| model)
            .collect();
        for model in early {
            self.lent_model(&model).await?;
        }
        Ok(())
    }

    /// Gives back a model that is not sent on.
    async fn give_back(&mut self, model: &Frame) -> Result<(), ProxyError> {
        let back = Frame {
            round: model.round,
            key: model.key,
            ..Frame::default()
        };
        self.send(model.from, FrameKind::Release, back).await
    }

    /// Stops sending the model that we have, and gives it back.
    async fn give_model_back(&mut self) -> Result<(), ProxyError> {
        let Some(model) = self.model.take() else {
            return Ok(());
        };
        self.exchange.withdraw();
        self.give_back(&model).await
    }

    /// A peer is gone, or as good as gone.
    fn lost(&mut self, worker: WorkerId) {
        self.arena.take_back(worker);
        // What of it is still to be read is held by its readers.
        self.peers.retain(|_, peer| peer.owner() != worker);
        self.early_models.remove(&worker);
        if self.model.take_if(|model| model.from == worker).is_some() {
            self.exchange.withdraw();
        }
        // Its successor in the round is lent the same.
        self.give_up_orphan();
    }

    /// The coordinator has announced a round, or the same again with the parent's successor.
    async fn announced(&mut self, again: bool) -> Result<(), ProxyError> {
        let (round, parent) = self.begun;
        match &mut self.lent {
            Some(lent) if lent.update.round == round => {
                let _ = self.arena.release(lent.update.key, lent.parent);
                self.arena.lend(lent.update.key, parent)?;
                lent.parent = parent;
                let update = lent.update;
                self.send(parent, FrameKind::Update, update).await
            }
            Some(_) => {
                self.give_up_orphan();
                Ok(())
            }
            None if again && self.answered == round => {
                let nothing = Frame {
                    round,
                    ..Frame::default()
                };
                self.send(parent, FrameKind::Nothing, nothing).await
            }
            None => Ok(()),
        }
    }

    /// An update of a round that is over, whose parent is gone: nobody will decide on it any more.
    fn give_up_orphan(&mut self) {
        let round = self.begun.0;
        let orphan = |lent: &mut Lent| lent.update.round < round;
        if let Some(lent) = self
            .lent
            .take_if(|lent| orphan(lent) && self.arena.free(lent.update.key))
        {
            self.judge(lent.update.round, Refusal::RoundOver as u16);
        }
    }

    /// The worker has taken too long over a model or an update: the round goes on without it.
    async fn too_slow(&mut self) -> Result<(), ProxyError> {
        let round = self.begun.0;
        tracing::warn!(worker = ?self.name, round, "too slow, left out of the round");
        self.exchange.abandon();
        self.exchange.withdraw();
        self.coming = None;
        self.give_model_back().await?;
        if self.answered < round {
            self.nothing(round).await?;
            self.judge(round, Refusal::NotExpected as u16);
        }
        Ok(())
    }

    /// What can go on goes on: the model out, the update in.
    async fn advance(&mut self) -> Result<(), ProxyError> {
        if let Some(model) = self.model
            && self.exchange.sending() != Some(model.round)
            && let Err(error) = self.stream(&model).await
        {
            let gone = matches!(
                &error,
                ModelError::Client(ClientError::Refused {
                    code: ErrorCode::NotFound,
                    ..
                })
            );
            let reason = error_chain(&error);
            tracing::warn!(worker = %self.name, round = model.round, "the model is not sent on: {reason}");
            self.give_model_back().await?;
            // Where a top has just died its successor's is on its way.
            if !gone {
                self.nothing(model.round).await?;
            }
        }
        if let (Some(header), Some(schema), Some(wire)) = (&self.coming, &self.schema, &mut self.wire)
            && self.exchange.receiving() != Some(header.object.round)
            && let Some(slot) = self.arena.begin()
        {
            let room = Room::Slot {
                slot,
                start: image::data_offset(schema),
                bytes: schema.data_bytes(),
            };
            self.exchange.accept(wire, header.object, room);
        }
        Ok(())
    }

    /// Begins to send a model out.
    async fn stream(&mut self, model: &Frame) -> Result<(), ModelError> {
        let arena = match self.peers.get(&model.key.arena) {
            Some(arena) => Arc::clone(arena),
            None => {
                let arena = Arc::new(self.client.open_arena(model.key.arena).await?);
                self.peers.insert(model.key.arena, Arc::clone(&arena));
                arena
            }
        };
        // Its header can be long, and not be what it should be: not for a thread that others wait for.
        let (known, shared) = (self.schema.clone(), Arc::clone(&self.shared_schema));
        let lent = Arc::clone(&arena);
        let (key, length) = (model.key, model.length);
        let (tell, told) = oneshot::channel();
        errands::run(self.uid, move || {
            let _ = tell.send(look(&lent, (key, length), known, &shared));
        });
        let (schema, start) = told.await.map_err(|_| ModelError::Unread)??;
        self.schema = Some(Arc::clone(&schema));
        let (needed, announced) = (image::image_bytes(&schema) as u64, self.arena.layout().slot_bytes);
        if needed > announced {
            return Err(ModelError::Room { needed, announced });
        }
        let object = Object {
            round: model.round,
            length: schema.data_bytes() as u64,
            schema: schema.digest(),
        };
        let source = Source::Arena {
            arena,
            key: model.key,
            start,
            bytes: schema.data_bytes(),
        };
        self.exchange
            .offer(self.wire.as_mut(), Message::Model(object), source);
        Ok(())
    }

    /// The outer error ends the proxy, the inner one the session.
    async fn happened(&mut self, happened: Happened) -> Result<Result<(), Broken>, ProxyError> {
        match happened {
            Happened::Offered(Message::Update(header)) => self.offered(header).await?,
            Happened::Received { object, room } => self.received(object, room).await?,
            Happened::Sent(round) => {
                if self.model.is_some_and(|model| model.round == round) {
                    self.give_model_back().await?;
                }
            }
            Happened::Message(Message::Ready) => {
                if !std::mem::replace(&mut self.ready, true) {
                    self.send(self.coordinator, FrameKind::Ready, Frame::default())
                        .await?;
                }
            }
            Happened::Message(Message::Nothing(round)) => self.nothing(round).await?,
            Happened::Overdue => self.too_slow().await?,
            Happened::Offered(other) | Happened::Message(other) => {
                return Ok(Err(Malformed::Unexpected(other.name()).into()));
            }
        }
        Ok(Ok(()))
    }

    async fn offered(&mut self, header: UpdateHeader) -> Result<(), ProxyError> {
        let round = header.object.round;
        // One that the parent cannot be given any more, or a second one.
        if round != self.begun.0 || round <= self.answered {
            let before = self.verdict.filter(|(judged, _)| *judged == round);
            let refusal = before.map_or(Refusal::NotExpected as u16, |(_, refusal)| refusal);
            self.say(&Message::Verdict { round, refusal });
            return Ok(());
        }
        let fits = self.schema.as_ref().is_some_and(|schema| {
            let (length, digest) = (schema.data_bytes() as u64, schema.digest());
            (header.object.length, header.object.schema) == (length, digest)
        });
        if !fits {
            tracing::warn!(worker = ?self.name, round, length = header.object.length, "an update of another shape");
            self.judge(round, Refusal::WrongShape as u16);
            return self.nothing(round).await;
        }
        self.coming = Some(header);
        Ok(())
    }

    /// The parent hears that nothing will come.
    async fn nothing(&mut self, round: u32) -> Result<(), ProxyError> {
        let (begun, parent) = self.begun;
        if round != begun || round <= self.answered {
            return Ok(());
        }
        self.answered = round;
        let nothing = Frame {
            round,
            ..Frame::default()
        };
        self.send(parent, FrameKind::Nothing, nothing).await?;
        self.send(self.coordinator, FrameKind::Nothing, nothing).await
    }

    /// The update's data is in the slot: it is made an image and lent.
    async fn received(&mut self, object: Object, room: Room) -> Result<(), ProxyError> {
        let (Some(header), Some(schema), Room::Slot { mut slot, .. }) =
            (self.coming.take(), &self.schema, room)
        else {
            return Err(ProxyError::Unprepared);
        };
        let metadata = Metadata {
            maker: self.name.clone(),
            round: object.round,
            generation: slot.key().generation,
            samples: header.samples,
            cover: header.cover,
            loss: Some(header.loss).filter(|loss| loss.is_finite()),
            folded: header.folded,
            bytes_copied: header.bytes_copied,
            // By another machine's clock.
            made: Vec::new(),
        };
        let covers = metadata.cover.count();
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let length = image::image_bytes(schema) as u64;
        let key = self.arena.publish(slot);
        let (round, parent) = (object.round, self.begun.1);
        self.arena.lend(key, parent)?;
        self.answered = round;
        let update = Frame {
            round,
            key,
            length,
            samples: header.samples,
            value: header.loss.to_bits(),
            covers,
            ..Frame::default()
        };
        self.lent = Some(Lent { update, parent });
        self.send(parent, FrameKind::Update, update).await
    }
}

/// The schema of a model that is lent, the job's if that is known, and where its data begins.
fn look(
    arena: &PeerArena,
    (key, length): (Key, u64),
    known: Option<Arc<Schema>>,
    shared: &OnceLock<Arc<Schema>>,
) -> Result<(Arc<Schema>, usize), ModelError> {
    let bytes = arena.object(key, length)?;
    let schema = match known {
        Some(schema) => schema,
        None => {
            let own = Arc::new(image::schema(bytes)?);
            let first = shared.get_or_init(|| Arc::clone(&own));
            // As a rule it is the same. One that is not is its sender's word, and nobody else's.
            if **first == *own { Arc::clone(first) } else { own }
        }
    };
    let (_, start) = image::check(bytes, &schema)?;
    Ok((schema, start))
}

/// Waits for the wire; for ever when there is none.
async fn happened(exchange: &mut Exchange, wire: &mut Option<Wire>) -> Result<Happened, Broken> {
    match wire {
        Some(wire) => exchange.next(wire).await,
        None => std::future::pending().await,
    }
}

/// The last word on a wire.
async fn farewell(wire: Option<Wire>, message: &Message) {
    if let Some(wire) = wire {
        let _ = tokio::time::timeout(FAREWELL, wire.close(message)).await;
    }
}
