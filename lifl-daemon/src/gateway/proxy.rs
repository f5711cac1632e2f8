//! A proxy: a worker of the job in the daemon that stands for one beyond the node's shared memory.
//!
//! To its parent it is a trainer like any other: the same [protocol](lifl_worker::trainer), with a session in the learner's
//! place. It knows nothing of models and updates but their format.
//!
//! ```text
//!   down:  a model to train on ─▶ streamed out ─▶ all acknowledged: given back
//!   up:    header ─▶ waits for a free slot ─▶ data into the slot, header written ─▶ lent to the parent ─▶ settled:
//!          the worker gets the verdict, the slot is free
//!   wire:  open ── broken ──▶ waited for, at most the grace ──▶ given up: the proxy leaves, its peers are told
//! ```

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lifl_common::arena::{ArenaError, Layout, OwnedArena, PeerArena};
use lifl_common::client::{Client, ClientError};
use lifl_common::frame::Refusal;
use lifl_common::id::{JobId, Key};
use lifl_common::session::{
    Destination, Malformed, Message, Object, ReconnectPolicy, SessionError, Source, Traffic, TransferEvent,
    Transfers, Wire, proxy_name,
};
use lifl_common::update::{ImageError, Schema, UpdateInfo, image};
use lifl_worker::node_link::{Incoming, LinkError, NodeLink};
use lifl_worker::parent::LentModel;
use lifl_worker::trainer::{Input, Output, Trainer};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::FAREWELL;
use crate::chain::error_chain;
use crate::errands;
use crate::server::Lobby;

/// Whom a proxy stands for, and what it needs for that.
pub(super) struct ProxyConfig {
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
    #[error("it is cut off from its job")]
    Link(#[from] LinkError),
    #[error("its session was not taken up again for {} s", .0.as_secs())]
    GivenUp(Duration),
    #[error("no slot has {0} bytes")]
    NoSlot(u64),
    #[error("an update came for which nothing was prepared")]
    Unprepared,
}

/// Why a model that was lent is not sent on.
#[derive(Debug, thiserror::Error)]
enum ModelError {
    #[error("its arena is gone")]
    Gone,
    #[error("its arena cannot be had")]
    Link(#[from] LinkError),
    #[error("it cannot be read")]
    Arena(#[from] ArenaError),
    #[error("the daemon cannot read it: {0}")]
    Unread(String),
    #[error("it is not the job's")]
    Image(#[from] ImageError),
    #[error("the job's updates take {needed} bytes, but {announced} were announced")]
    Room { needed: u64, announced: u64 },
}

pub(super) struct Proxy {
    link: NodeLink,
    arena: OwnedArena,
    protocol: Trainer,
    /// Whose the job is.
    uid: u32,
    name: String,
    transfers: Transfers,
    wire: Option<Wire>,
    schema: Option<Arc<Schema>>,
    /// The job's, once one of its proxies has seen a model: a long one is there once.
    shared_schema: Arc<OnceLock<Arc<Schema>>>,
    /// An update that waits for a slot, or is coming.
    coming: Option<(Object, UpdateInfo)>,
    /// The last verdict, for a worker that did not get it.
    verdict: Option<(u32, u16)>,
}

impl Proxy {
    /// Stands for a worker until the job ends or the worker is lost. However it ends, the worker is told.
    pub(super) async fn run(mut config: ProxyConfig) {
        let (mut proxy, outcome) = match Self::join(&config).await {
            Ok(mut proxy) => {
                let outcome = proxy.serve(&mut config).await;
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
                tracing::warn!(job = %config.job, worker = ?config.name, "the worker's proxy leaves: {reason}");
                // Its peers need not wait.
                proxy = None;
                Message::Bye { last: true, reason }
            }
        };
        config.wires.close();
        while let Ok(next) = config.wires.try_recv() {
            wire = Some(next);
        }
        farewell(wire, &last_word).await;
        drop(proxy);
    }

    /// Gives the reason of an end that is none of the proxy's making.
    async fn serve(&mut self, config: &mut ProxyConfig) -> Result<String, ProxyError> {
        let mut reconnect_policy = ReconnectPolicy::new();
        loop {
            let given_up = reconnect_policy.ends(config.grace);
            tokio::select! {
                incoming = self.link.next() => match incoming? {
                    Incoming::Frame(frame) => self.protocol.handle(Input::Frame(frame)),
                    Incoming::Lost { worker, .. } => self.protocol.handle(Input::PeerLost(worker)),
                    Incoming::Undelivered(letter) => self.protocol.handle(Input::Undelivered(letter.to)),
                    Incoming::Ended(reason) => return Ok(reason),
                },
                Some(mut wire) = config.wires.recv() => {
                    wire.count_in(Arc::clone(&config.traffic));
                    if self.wire.take().is_some() {
                        reconnect_policy.broken(&self.transfers);
                    }
                    reconnect_policy.opened(&self.transfers, &mut wire);
                    self.open(wire);
                }
                event = next_event(&mut self.transfers, &mut self.wire) => {
                    let outcome = match event {
                        Ok(event) => self.transfer_event(event)?,
                        Err(broken) => Err(broken),
                    };
                    if let Err(broken) = outcome {
                        self.broken(&broken).await;
                        reconnect_policy.broken(&self.transfers);
                    }
                }
                () = tokio::time::sleep_until(given_up), if self.wire.is_none() => {
                    return Err(ProxyError::GivenUp(config.grace));
                }
                () = config.leave.cancelled() => return Ok("the worker's place is taken away".to_owned()),
            }
            self.advance().await?;
        }
    }

    async fn join(config: &ProxyConfig) -> Result<Self, ProxyError> {
        let line = config.lobby.enter(config.uid).await.map_err(ProxyError::Lobby)?;
        let client = Client::over(line).await?;
        let name = proxy_name(&config.name);
        let mut link = NodeLink::register(client, config.job, &config.role, &name).await?;
        let layout = Layout::for_objects(1, config.object_bytes);
        let layout = layout.ok_or(ProxyError::NoSlot(config.object_bytes))?;
        let arena = link.create_arena(layout).await?.arena;
        Ok(Self {
            protocol: Trainer::new(link.id(), link.coordinator()),
            link,
            arena,
            uid: config.uid,
            name: config.name.clone(),
            transfers: Transfers::with_grace(config.grace),
            wire: None,
            schema: None,
            shared_schema: Arc::clone(&config.schema),
            coming: None,
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
        self.transfers.resume(&mut wire);
        self.wire = Some(wire);
    }

    async fn broken(&mut self, broken: &SessionError) {
        let reason = error_chain(broken);
        let wire = self.wire.take();
        if !matches!(broken, SessionError::Malformed(_)) {
            // Often enough the end of a job, which its worker may hear of first. One that does not come back is warned of.
            tracing::info!(worker = ?self.name, "session broken: {reason}");
        } else {
            tracing::warn!(worker = ?self.name, "session broken: {reason}");
            farewell(wire, &Message::Bye { last: false, reason }).await;
        }
        // The worker says again what it wanted.
        if self.transfers.receiving().is_none() {
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

    /// The worker has taken too long over a model or an update: the round goes on without it.
    fn too_slow(&mut self) {
        let round = self.protocol.round();
        tracing::warn!(worker = ?self.name, round, "too slow, left out of the round");
        self.transfers.abandon();
        self.coming = None;
        if self.protocol.awaits(round) {
            self.judge(round, Refusal::NotExpected as u16);
        }
        self.nothing(round);
    }

    /// What can go on goes on: the model out, the update in, frames to whom they are for.
    async fn advance(&mut self) -> Result<(), ProxyError> {
        while let Some(output) = self.protocol.poll_output() {
            match output {
                Output::Send(frame) => self.link.post(frame),
                Output::Train(model) => self.send_model(model).await,
                // The worker's own update comes late, and it hears so at once.
                Output::Overtaken(round) => {
                    self.stop_sending(round);
                    self.protocol.handle(Input::GivenUp(round));
                }
                Output::Settled { round, key, refusal } => {
                    self.arena.free(key);
                    self.judge(round, refusal.map_or(0, |refusal| refusal as u16));
                }
            }
        }
        let round = self.protocol.round();
        if let Some((late, _)) = self.coming.take_if(|(coming, _)| coming.round != round) {
            self.transfers.abandon();
            self.judge(late.round, Refusal::NotExpected as u16);
        }
        if let (Some((object, _)), Some(schema), Some(wire)) = (&self.coming, &self.schema, &mut self.wire)
            && self.transfers.receiving() != Some(object.round)
            && let Some(slot) = self.arena.begin()
        {
            let data = image::data_range(schema);
            let destination = Destination::Slot { slot, data };
            self.transfers.accept(wire, *object, destination);
        }
        Ok(self.link.flush().await?)
    }

    /// Begins to send a model to the worker.
    async fn send_model(&mut self, model: LentModel) {
        let Err(error) = self.stream(&model).await else {
            return;
        };
        let reason = error_chain(&error);
        tracing::warn!(worker = %self.name, round = model.round, "the model is not sent on: {reason}");
        // Where a top has just died its successor's is on its way.
        let gone = matches!(error, ModelError::Gone);
        let ended = if gone { Input::GivenUp } else { Input::Nothing };
        self.protocol.handle(ended(model.round));
    }

    async fn stream(&mut self, model: &LentModel) -> Result<(), ModelError> {
        let arena = self.link.peer_arena(model.key.arena).await?;
        let arena = arena.ok_or(ModelError::Gone)?;
        // Its header can be long, and not be what it should be: not for a thread that others wait for.
        let (known, shared) = (self.schema.clone(), Arc::clone(&self.shared_schema));
        let lent = Arc::clone(&arena);
        let (key, length) = (model.key, model.length);
        let looked = errands::answer(self.uid, move || look(&lent, (key, length), known, &shared)).await;
        let (schema, data) = looked.map_err(ModelError::Unread)??;
        self.schema = Some(Arc::clone(&schema));
        let (needed, announced) = (image::image_bytes(&schema) as u64, self.arena.layout().slot_bytes);
        if needed > announced {
            return Err(ModelError::Room { needed, announced });
        }
        let source = Source::Arena {
            arena,
            key: model.key,
            data,
        };
        let header = Message::Model(Object::of(model.round, &schema));
        self.transfers.offer(self.wire.as_mut(), header, source);
        Ok(())
    }

    /// The model of that round goes back to its lender: it is not sent any further.
    fn stop_sending(&mut self, round: u32) {
        if self.transfers.sending() == Some(round) {
            self.transfers.withdraw();
        }
    }

    /// The outer error ends the proxy, the inner one the session.
    fn transfer_event(&mut self, event: TransferEvent) -> Result<Result<(), SessionError>, ProxyError> {
        match event {
            TransferEvent::Offered(Message::Update(object, info)) => self.offered(object, info),
            TransferEvent::Received { object, destination } => self.received(object, destination)?,
            TransferEvent::Sent(round) => self.protocol.handle(Input::ModelRead(round)),
            TransferEvent::Message(Message::Ready) => self.protocol.handle(Input::Ready),
            TransferEvent::Message(Message::Nothing(round)) => self.nothing(round),
            TransferEvent::Overdue => self.too_slow(),
            TransferEvent::Offered(other) | TransferEvent::Message(other) => {
                return Ok(Err(Malformed::Unexpected(other.name()).into()));
            }
        }
        Ok(Ok(()))
    }

    fn offered(&mut self, object: Object, info: UpdateInfo) {
        let round = object.round;
        // One that the parent cannot be given any more, or a second one.
        if !self.protocol.awaits(round) {
            let before = self.verdict.filter(|(judged, _)| *judged == round);
            let refusal = before.map_or(Refusal::NotExpected as u16, |(_, refusal)| refusal);
            return self.say(&Message::Verdict { round, refusal });
        }
        let schema = self.schema.as_ref();
        if schema.is_none_or(|schema| object != Object::of(round, schema)) {
            tracing::warn!(worker = ?self.name, round, length = object.length, "an update of another shape");
            self.judge(round, Refusal::WrongShape as u16);
            return self.nothing(round);
        }
        self.coming = Some((object, info));
    }

    /// The parent hears that nothing will come.
    fn nothing(&mut self, round: u32) {
        self.stop_sending(round);
        self.protocol.handle(Input::Nothing(round));
    }

    /// The update's data is in the slot: it is made an image and lent.
    fn received(&mut self, object: Object, destination: Destination) -> Result<(), ProxyError> {
        let (Some((_, info)), Some(schema), Destination::Slot { mut slot, .. }) =
            (self.coming.take(), &self.schema, destination)
        else {
            return Err(ProxyError::Unprepared);
        };
        let round = object.round;
        let metadata = info.metadata(&self.name, round, slot.key().generation);
        image::write_header(slot.bytes_mut(), schema, &metadata);
        let update = info.frame(round, self.arena.publish(slot), schema);
        self.stop_sending(round);
        self.protocol.handle(Input::Trained(update));
        Ok(())
    }
}

/// The schema of a model that is lent, the job's if that is known, and where its data lies.
fn look(
    arena: &PeerArena,
    (key, length): (Key, u64),
    known: Option<Arc<Schema>>,
    shared: &OnceLock<Arc<Schema>>,
) -> Result<(Arc<Schema>, Range<usize>), ModelError> {
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
    let (_, data) = image::check(bytes, &schema)?;
    Ok((schema, data))
}

/// Waits for the wire; for ever when there is none.
async fn next_event(
    transfers: &mut Transfers,
    wire: &mut Option<Wire>,
) -> Result<TransferEvent, SessionError> {
    match wire {
        Some(wire) => transfers.next(wire).await,
        None => std::future::pending().await,
    }
}

/// The last word on a wire.
async fn farewell(wire: Option<Wire>, message: &Message) {
    if let Some(wire) = wire {
        let _ = tokio::time::timeout(FAREWELL, wire.close(message)).await;
    }
}
