//! Sessions over MQTT: each message is a publish of QoS 1, through a broker that both ends connect to.
//!
//! | topic | from |
//! | --- | --- |
//! | `lifl/<digest of the token>/<worker>/up` | worker |
//! | `lifl/<digest of the token>/<worker>/down` | gateway |
//!
//! The worker chooses a random number for each session, and both ends count their messages in it: a hello is 0, a proof is 1,
//! sealed ones follow. So what a broker brings twice is known by its number and passed over, and what it loses or brings late leaves a gap:
//! then the session is broken, and the next one goes on at the acknowledged offsets. Nothing is retained, and no session is
//! kept at the broker: one that is killed and started anew finds both ends again.
//!
//! Others at the broker may publish on the same topics. What is not sealed by the session's key is passed over before it takes
//! a place in an [`Inbound`]'s queue, and a session that has not been proved leaves the topic's session as it is. A name is
//! its topic: the gateway derives the secret that it asks for from the topic that a hello came on.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::NetworkOptions;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::mqttbytes::{Error as MqttError, QoS};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use tokio::sync::{mpsc, watch};

use super::broker::Broker;
use super::handshake::{HandshakeError, Participant, WorkerHandshake};
use super::message::{
    BYE, CHUNK, CHUNK_HEAD_BYTES, MAX_CHUNK_BYTES, Malformed, Message, SessionError, check_length,
};
use super::seal::{SealKey, TAG_BYTES};
use super::secret::hex;
use super::transfers::{Incoming, Outgoing, Sink};
use super::wire::{self, Limits, Queue, Wire};
use super::{JobDigest, JobToken, MAX_NAME_BYTES, Secret, Traffic, random};

/// Session and sequence number.
const ENVELOPE_BYTES: usize = 8 + 4;

/// The number of a session's first sealed message, at both ends.
const FIRST_SEALED: u32 = 2;

/// The longest chunk's data, unless the broker takes less.
const CHUNK_BYTES: usize = 128 << 10;

/// It is not looked for a limit below this.
const SHORTEST_CHUNK_BYTES: usize = 1 << 10;

/// Chunks under way: a broker keeps a thousand messages for a slow reader, and some hundred workers may share one.
const WINDOW_CHUNKS: u64 = 4;

/// What a publish has beside a chunk's data: packet header, topic, properties, envelope.
const OVERHEAD_BYTES: usize = 1024;

/// Publishes that wait for a session's reader; an honest end has not half as many under way.
pub const INBOX: usize = 64;

/// How long a broker has to answer.
const BROKER_TIMEOUT: Duration = Duration::from_secs(10);

const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Messages that may be unacknowledged by the broker.
const IN_FLIGHT: u16 = 64;

/// The topics of a job begin so.
fn root(job: JobDigest) -> String {
    format!("lifl/{job}")
}

/// A worker's name as one level of a topic.
pub(super) fn level(name: &str) -> String {
    let mut level = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => level.push(char::from(byte)),
            other => level.push_str(&format!("%{other:02X}")),
        }
    }
    level
}

/// The name that a topic's level stands for.
fn unlevel(text: &str) -> Option<String> {
    let mut name = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            name.push(byte);
            continue;
        }
        let (digits, after) = rest.split_first_chunk::<2>()?;
        name.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    let name = String::from_utf8(name).ok()?;
    // One name has one topic.
    (!name.is_empty() && name.len() <= MAX_NAME_BYTES && level(&name) == text).then_some(name)
}

/// What the gateway subscribes to.
pub fn subscription(token: &JobToken) -> String {
    format!("{}/+/up", root(token.digest()))
}

/// Whom a topic of the gateway's subscription belongs to, and where the gateway answers.
pub fn correspondent(token: &JobToken, topic: &str) -> Option<(Participant, String)> {
    let topic = topic.strip_suffix("/up")?;
    let worker = topic.strip_prefix(&root(token.digest()))?.strip_prefix('/')?;
    let name = unlevel(worker)?;
    let secret = token.participant(&name);
    Some((Participant { name, secret }, format!("{topic}/down")))
}

/// A connection with a broker, for any number of sessions.
#[derive(Clone, Debug)]
pub struct Line {
    client: AsyncClient,
    chunk_bytes: usize,
    published: Arc<AtomicU64>,
    acknowledged: watch::Receiver<u64>,
}

/// The connection's other half: it does the work, and brings what is published to us.
pub struct Driver {
    events: EventLoop,
    acknowledged: watch::Sender<u64>,
}

/// Connects to a broker, subscribes, and finds out how long a message may be: brokers with a limit need not announce it,
/// but answer to what is too long. That is tried on `probe`, a topic that nobody reads.
async fn connect(
    broker: &Broker,
    insecure: bool,
    probe: &str,
    subscription: &str,
) -> Result<(Line, Driver), SessionError> {
    let addresses = broker.addresses(insecure).await?;
    let mut chunk_bytes = CHUNK_BYTES;
    let mut nth = 0;
    loop {
        let address = *addresses.get(nth).ok_or(SessionError::Closed)?;
        let connected = connect_with(address, probe, subscription, chunk_bytes);
        match tokio::time::timeout(BROKER_TIMEOUT, connected).await {
            Ok(Err(SessionError::Broker(error)))
                if is_too_long(&error) && chunk_bytes > SHORTEST_CHUNK_BYTES =>
            {
                chunk_bytes /= 2;
            }
            Ok(Err(SessionError::Broker(error)))
                if matches!(*error, ConnectionError::Io(_)) && nth + 1 < addresses.len() =>
            {
                nth += 1;
            }
            Ok(connected) => return connected,
            Err(_) => return Err(SessionError::Silent(BROKER_TIMEOUT)),
        }
    }
}

/// The gateway's connection with a job's broker.
///
/// # Errors
/// If it does not answer, does not let us subscribe, or is where models may not go.
pub async fn serve(
    broker: &Broker,
    insecure: bool,
    token: &JobToken,
) -> Result<(Line, Driver), SessionError> {
    let probe = format!("{}/probe", root(token.digest()));
    connect(broker, insecure, &probe, &subscription(token)).await
}

/// Whether a broker answered "packet too large" (MQTT 5, section 2.4), which the client takes for a broken packet.
fn is_too_long(error: &ConnectionError) -> bool {
    const PACKET_TOO_LARGE: u8 = 0x95;
    matches!(
        error,
        ConnectionError::MqttState(StateError::Deserialization(MqttError::InvalidConnectReturnCode(
            PACKET_TOO_LARGE
        )))
    )
}

async fn connect_with(
    address: SocketAddr,
    probe: &str,
    subscription: &str,
    mut chunk_bytes: usize,
) -> Result<(Line, Driver), SessionError> {
    let id = format!("lifl-{}", hex(&random::<8>()));
    let host = match address.ip() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let mut options = MqttOptions::new(id, host, address.port());
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    options
        .set_keep_alive(KEEP_ALIVE)
        .set_clean_start(true)
        .set_max_packet_size(Some((MAX_CHUNK_BYTES + OVERHEAD_BYTES) as u32))
        .set_outgoing_inflight_upper_limit(IN_FLIGHT)
        .set_network_options(network);
    let (client, mut events) = AsyncClient::new(options, INBOX);
    let subscribe = client.subscribe(subscription, QoS::AtLeastOnce).await;
    subscribe.map_err(|_| SessionError::Closed)?;
    loop {
        match events.poll().await.map_err(Box::new)? {
            Event::Incoming(Packet::ConnAck(acknowledged)) => {
                let properties = acknowledged.properties;
                if let Some(most) = properties.and_then(|properties| properties.max_packet_size) {
                    chunk_bytes = chunk_bytes.min((most as usize).saturating_sub(OVERHEAD_BYTES).max(1));
                }
            }
            Event::Incoming(Packet::SubAck(_)) => {
                // Nobody reads it: only the answer counts.
                let message = vec![0; ENVELOPE_BYTES + CHUNK_HEAD_BYTES + chunk_bytes + TAG_BYTES];
                let published = client.try_publish(probe, QoS::AtLeastOnce, false, message);
                published.map_err(|_| SessionError::Closed)?;
            }
            Event::Incoming(Packet::PubAck(_)) => break,
            _ => {}
        }
    }
    Ok(halves(client, events, chunk_bytes))
}

fn halves(client: AsyncClient, events: EventLoop, chunk_bytes: usize) -> (Line, Driver) {
    let (acknowledged, watched) = watch::channel(0);
    let line = Line {
        client,
        chunk_bytes,
        published: Arc::new(AtomicU64::new(0)),
        acknowledged: watched,
    };
    (line, Driver { events, acknowledged })
}

/// A line without a broker, for sessions of which only the reading counts: what is published waits in the driver.
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub fn nowhere() -> (Line, Driver) {
    let mut options = MqttOptions::new("nobody", "localhost", 1);
    // Room is made for as many at once; by default that is 20 MB.
    options.set_outgoing_inflight_upper_limit(IN_FLIGHT);
    let (client, events) = AsyncClient::new(options, INBOX);
    halves(client, events, CHUNK_BYTES)
}

/// A worker's session in the making: connects, proves to the gateway that we know the secret and has it prove the same
/// within `answer`, and gives the wire with the task that is to be run for it, which ends with the wire or the connection.
///
/// # Errors
/// As [`serve`], and if no gateway answers that knows the secret.
pub async fn dial(
    broker: &Broker,
    insecure: bool,
    secret: &Secret,
    worker: &str,
    instance: u64,
    answer: Duration,
) -> Result<(Wire, impl Future<Output = ()> + use<>), SessionError> {
    let topic = format!("{}/{}", root(secret.job()), level(worker));
    let (up, down, probe) = (
        format!("{topic}/up"),
        format!("{topic}/down"),
        format!("{topic}/probe"),
    );
    let (line, mut driver) = connect(broker, insecure, &probe, &down).await?;
    let session = u64::from_le_bytes(random());
    let handshake = WorkerHandshake::new(secret, worker, instance, session);
    let mut heard = HandshakeError::Unknown;
    let shaken = async {
        line.publish(&up, enveloped(session, 0, &handshake.hello()).into())
            .await?;
        loop {
            let (_, payload) = driver.next().await?;
            if envelope(&payload).is_none_or(|(of, _)| of != session) {
                continue;
            }
            // Anybody may publish here; what is no answer to us is not waited for any less.
            match handshake.answer(&payload[ENVELOPE_BYTES..]) {
                Ok((proof, keys)) => {
                    line.publish(&up, enveloped(session, 1, &proof).into()).await?;
                    return Ok::<_, SessionError>(keys);
                }
                Err(error) => heard = error,
            }
        }
    };
    let keys = match tokio::time::timeout(answer, shaken).await {
        Ok(keys) => keys?,
        Err(_) if heard == HandshakeError::Unknown => return Err(SessionError::Silent(answer)),
        Err(_) => return Err(heard.into()),
    };
    let (mut inbound, publishes) = Inbound::new(session, keys.down);
    inbound.refusal = Some(refusal_key(secret));
    let wire = line.wire(up, session, keys.up, publishes);
    let driven = async move {
        loop {
            let publish = tokio::select! {
                publish = driver.next() => publish,
                () = inbound.inbox.closed() => return,
            };
            // At the end the reader finds its inbox closed.
            let Ok((_, payload)) = publish else { return };
            if inbound.take(payload).is_err() {
                return;
            }
        }
    };
    Ok((wire, driven))
}

/// What seals the gateway's word that it does not know a session.
fn refusal_key(secret: &Secret) -> SealKey {
    SealKey::new(&secret.derive("no such session", &[]))
}

/// The other end has sent more than it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

/// What is published to one end of a session, on its way to the reader: what the other end has sealed, each message once. All
/// else may be anybody's and is passed over.
#[derive(Debug)]
pub struct Inbound {
    session: u64,
    key: SealKey,
    /// A worker's, whose gateway may not know the session.
    refusal: Option<SealKey>,
    next: u32,
    inbox: mpsc::Sender<Bytes>,
}

impl Inbound {
    /// Of the session of that number, whose other end seals by that key; and what the reader reads.
    pub fn new(session: u64, key: SealKey) -> (Self, mpsc::Receiver<Bytes>) {
        let (inbox, publishes) = mpsc::channel(INBOX);
        let inbound = Self {
            session,
            key,
            refusal: None,
            next: FIRST_SEALED,
            inbox,
        };
        (inbound, publishes)
    }

    /// The session's number.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.inbox.is_closed()
    }

    /// Takes a publish.
    ///
    /// # Errors
    /// If the other end has sent more than there is room for.
    pub fn take(&mut self, payload: Bytes) -> Result<(), Overflow> {
        let Some((session, sequence)) = envelope(&payload) else {
            return Ok(());
        };
        let Some(end) = payload
            .len()
            .checked_sub(TAG_BYTES)
            .filter(|end| *end > ENVELOPE_BYTES)
        else {
            return Ok(());
        };
        let (message, tag) = payload.split_at(end);
        let sealed = |key: &SealKey, number: u64| {
            let mut seal = key.begin(number);
            seal.add(message);
            seal.is(tag)
        };
        let refused = || {
            let key = self.refusal.as_ref().filter(|_| sequence == 0);
            key.is_some_and(|key| sealed(key, session))
        };
        if session != self.session
            || !(sequence >= self.next && sealed(&self.key, sequence.into()) || refused())
        {
            return Ok(());
        }
        if sequence == self.next {
            self.next = self.next.saturating_add(1);
        }
        self.inbox.try_send(payload.slice(..end)).map_err(|_| Overflow)
    }
}

/// The session and the number of a message.
pub fn envelope(payload: &[u8]) -> Option<(u64, u32)> {
    let (session, rest) = payload.split_first_chunk()?;
    let (sequence, _) = rest.split_first_chunk()?;
    Some((u64::from_le_bytes(*session), u32::from_le_bytes(*sequence)))
}

impl Driver {
    /// The next publish to us, as topic and payload.
    ///
    /// # Errors
    /// If the connection fails; it is not taken up again.
    pub async fn next(&mut self) -> Result<(Bytes, Bytes), SessionError> {
        loop {
            match self.events.poll().await {
                Ok(Event::Incoming(Packet::Publish(publish))) => return Ok((publish.topic, publish.payload)),
                Ok(Event::Incoming(Packet::PubAck(_))) => self.acknowledged.send_modify(|count| *count += 1),
                Ok(_) => {}
                Err(error) => return Err(Box::<ConnectionError>::new(error).into()),
            }
        }
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}

impl Line {
    /// A session that is published on `topic` and sealed by that key, and whose other end's messages come through
    /// `publishes`.
    pub fn wire(&self, topic: String, session: u64, key: SealKey, publishes: mpsc::Receiver<Bytes>) -> Wire {
        let traffic = Arc::new(Traffic::default());
        let reader = Reader {
            publishes,
            next: FIRST_SEALED,
            traffic: Arc::clone(&traffic),
        };
        let writer = Writer {
            line: self.clone(),
            topic,
            session,
            key,
            next: FIRST_SEALED,
            queue: Queue::default(),
            current: None,
            traffic,
        };
        let limits = Limits {
            chunk_bytes: self.chunk_bytes,
            window_bytes: WINDOW_CHUNKS * self.chunk_bytes as u64,
        };
        Wire::new(
            wire::Reader::Mqtt(reader),
            wire::Writer::Mqtt(Box::new(writer)),
            limits,
        )
    }

    /// Sends the gateway's part of a handshake.
    ///
    /// # Errors
    /// If the connection has failed.
    pub async fn challenge(&self, topic: &str, session: u64, challenge: &[u8]) -> Result<(), SessionError> {
        self.publish(topic, enveloped(session, 0, challenge).into()).await
    }

    /// Tells the participant, if it goes on with a session that is not known here, to begin another.
    pub fn refuse(&self, topic: &str, session: u64, secret: &Secret) {
        let bye = Message::Bye {
            last: false,
            reason: "no such session".to_owned(),
        };
        let payload = sealed(&refusal_key(secret), session, 0, session, &bye.encode());
        // A busy line has no room for it: they will find out.
        if self
            .client
            .try_publish(topic, QoS::AtLeastOnce, false, payload)
            .is_ok()
        {
            self.published.fetch_add(1, Ordering::Release);
        }
    }

    /// Publishes, and counts what the broker has to acknowledge. When it is cancelled it may have been published all the
    /// same.
    async fn publish(&self, topic: &str, payload: Bytes) -> Result<(), SessionError> {
        let published = self.client.publish_bytes(topic, QoS::AtLeastOnce, false, payload);
        published.await.map_err(|_| SessionError::Closed)?;
        self.published.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

fn enveloped(session: u64, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(ENVELOPE_BYTES + body.len() + TAG_BYTES);
    payload.extend(session.to_le_bytes());
    payload.extend(sequence.to_le_bytes());
    payload.extend(body);
    payload
}

/// A message with its envelope and its tag under that number.
fn sealed(key: &SealKey, session: u64, sequence: u32, number: u64, body: &[u8]) -> Vec<u8> {
    let mut payload = enveloped(session, sequence, body);
    let tag = key.seal(number, &payload);
    payload.extend(tag);
    payload
}

/// A whole publish of that number; a chunk's body has its data.
#[cfg(any(test, feature = "fuzzing"))]
pub fn sealed_publish(key: &SealKey, session: u64, sequence: u32, body: &[u8]) -> Bytes {
    sealed(key, session, sequence, sequence.into(), body).into()
}

/// What is behind a publish's envelope.
pub fn body(payload: &[u8]) -> &[u8] {
    payload.get(ENVELOPE_BYTES..).unwrap_or_default()
}

#[derive(Debug)]
pub(super) struct Reader {
    publishes: mpsc::Receiver<Bytes>,
    next: u32,
    pub(super) traffic: Arc<Traffic>,
}

impl Reader {
    /// The next message. Cancel-safe: a publish is taken whole or not.
    pub(super) async fn next(&mut self, incoming: &mut Incoming) -> Result<Message, SessionError> {
        let payload = self.publishes.recv().await.ok_or(SessionError::Closed)?;
        self.traffic.add_received(payload.len() + TAG_BYTES);
        let Some((_, sequence)) = envelope(&payload) else {
            return Err(Malformed::Fields(0).into());
        };
        let body = body(&payload);
        // Of a session that the other end does not know, it counts from the beginning.
        if body.first() == Some(&BYE) && sequence == 0 {
            return Ok(Message::decode(body)?);
        }
        if sequence != self.next {
            return Err(SessionError::Gap);
        }
        self.next = self.next.checked_add(1).ok_or(SessionError::Gap)?;
        message(body, incoming)
    }
}

fn message(body: &[u8], incoming: &mut Incoming) -> Result<Message, SessionError> {
    if body.first() != Some(&CHUNK) {
        return Ok(Message::decode(body)?);
    }
    check_length(CHUNK, body.len() as u64)?;
    let (head, data) = body.split_at(CHUNK_HEAD_BYTES);
    let chunk = Message::decode_chunk(head, body.len())?;
    if let Message::Chunk { round, offset, .. } = chunk
        && let Sink::Into(place) = incoming.sink(round, offset, data.len())?
    {
        place.copy_from_slice(data);
    }
    Ok(chunk)
}

#[derive(Debug)]
pub(super) struct Writer {
    line: Line,
    topic: String,
    session: u64,
    key: SealKey,
    next: u32,
    pub(super) queue: Queue,
    /// What is being published. When that is cancelled it may have gone all the same: then it goes twice, under the same
    /// number.
    current: Option<Bytes>,
    pub(super) traffic: Arc<Traffic>,
}

impl Writer {
    pub(super) async fn drive(
        &mut self,
        mut outgoing: Option<&mut Outgoing>,
        limits: &Limits,
    ) -> SessionError {
        loop {
            match self.publish(outgoing.as_deref_mut(), limits).await {
                Ok(true) => {}
                Ok(false) => std::future::pending().await,
                Err(broken) => return broken,
            }
        }
    }

    /// Publishes what is in the queue, and waits until the broker has it.
    pub(super) async fn flush(&mut self) -> Result<(), SessionError> {
        let limits = Limits {
            chunk_bytes: 0,
            window_bytes: 0,
        };
        while self.publish(None, &limits).await? {}
        let published = self.line.published.load(Ordering::Acquire);
        let all = self.line.acknowledged.wait_for(|count| *count >= published).await;
        all.map(drop).map_err(|_| SessionError::Closed)
    }

    /// Publishes one message; says whether there was one.
    async fn publish(
        &mut self,
        outgoing: Option<&mut Outgoing>,
        limits: &Limits,
    ) -> Result<bool, SessionError> {
        if self.current.is_none() {
            let body = match self.queue.pop()? {
                Some(body) => Some(body),
                None => outgoing.and_then(|outgoing| chunk(outgoing, limits)),
            };
            let Some(body) = body else { return Ok(false) };
            let sealed = sealed(&self.key, self.session, self.next, self.next.into(), &body);
            self.current = Some(sealed.into());
            self.next = self.next.checked_add(1).ok_or(SessionError::Gap)?;
        }
        let Some(current) = &self.current else {
            return Ok(false);
        };
        self.line.publish(&self.topic, current.clone()).await?;
        self.traffic.add_sent(current.len());
        self.current = None;
        Ok(true)
    }
}

/// The next chunk with its data, if one may go.
fn chunk(outgoing: &mut Outgoing, limits: &Limits) -> Option<Vec<u8>> {
    let (round, offset, length) = outgoing.next_chunk(limits)?;
    let mut body = Message::Chunk {
        round,
        offset,
        length,
    }
    .encode();
    body.extend(outgoing.data(offset).get(..length)?);
    outgoing.mark_sent(length);
    Some(body)
}
