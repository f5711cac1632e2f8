//! Sessions over MQTT: each message is a publish of QoS 1, through a broker that both ends connect to.
//!
//! | topic | from |
//! | --- | --- |
//! | `lifl/<digest of the token>/<worker>/up` | worker |
//! | `lifl/<digest of the token>/<worker>/down` | gateway |
//!
//! The worker chooses a random number for each session, and both ends count their messages in it. So what a broker brings
//! twice is known by its number and passed over, and what it loses or brings late leaves a gap: then the session is
//! broken, and the next one goes on at the acknowledged offsets. Nothing is retained, and no session is kept at the
//! broker: one that is killed and started anew finds both ends again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rumqttc::NetworkOptions;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::mqttbytes::{Error as MqttError, QoS};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions, StateError};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, watch};

use super::exchange::{Incoming, Outgoing, Sink};
use super::message::{Broken, CHUNK, CHUNK_HEAD_BYTES, MAX_CHUNK_BYTES, Malformed, Message, check_length};
use super::token::hex;
use super::wire::{self, Limits, Queue, Wire};
use super::{JobToken, Traffic, random};

/// Session and sequence number.
const ENVELOPE_BYTES: usize = 8 + 4;

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

/// Where a broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    host: String,
    port: u16,
}

impl Broker {
    /// From `host:port`.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let host = host.to_owned();
        (!host.is_empty()).then_some(Self { host, port })
    }
}

impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// The topics of a job begin so.
fn root(token: &JobToken) -> String {
    let digest = Sha256::digest(token.as_bytes());
    format!("lifl/{}", hex(&digest[..16]))
}

/// A worker's name as one level of a topic.
fn level(name: &str) -> String {
    let mut level = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => level.push(char::from(byte)),
            other => level.push_str(&format!("%{other:02X}")),
        }
    }
    level
}

/// What the gateway subscribes to.
pub fn subscription(token: &JobToken) -> String {
    format!("{}/+/up", root(token))
}

/// Where the gateway answers to what came on a topic of its subscription.
pub fn answering(topic: &str) -> Option<String> {
    Some(format!("{}/down", topic.strip_suffix("/up")?))
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
/// but answer to what is too long.
///
/// # Errors
/// If it does not answer, or does not let us subscribe.
pub async fn connect(
    broker: &Broker,
    token: &JobToken,
    subscription: &str,
) -> Result<(Line, Driver), Broken> {
    let mut chunk_bytes = CHUNK_BYTES;
    loop {
        let connected = connect_with(broker, token, subscription, chunk_bytes);
        match tokio::time::timeout(BROKER_TIMEOUT, connected).await {
            Ok(Err(Broken::Broker(error))) if is_too_long(&error) && chunk_bytes > SHORTEST_CHUNK_BYTES => {
                chunk_bytes /= 2;
            }
            Ok(connected) => return connected,
            Err(_) => return Err(Broken::Silent(BROKER_TIMEOUT)),
        }
    }
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
    broker: &Broker,
    token: &JobToken,
    subscription: &str,
    mut chunk_bytes: usize,
) -> Result<(Line, Driver), Broken> {
    let id = format!("lifl-{}", hex(&random::<8>()));
    let mut options = MqttOptions::new(id, &broker.host, broker.port);
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
    subscribe.map_err(|_| Broken::Closed)?;
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
                let probe = vec![0; ENVELOPE_BYTES + CHUNK_HEAD_BYTES + chunk_bytes];
                let topic = format!("{}/probe", root(token));
                let published = client.try_publish(topic, QoS::AtLeastOnce, false, probe);
                published.map_err(|_| Broken::Closed)?;
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

/// A worker's session in the making: connects, and gives the wire with the task that is to be run for it, which ends with
/// the wire or the connection.
///
/// # Errors
/// As [`connect`].
pub async fn dial(
    broker: &Broker,
    token: &JobToken,
    worker: &str,
) -> Result<(Wire, impl Future<Output = ()> + use<>), Broken> {
    let topic = format!("{}/{}", root(token), level(worker));
    let (line, mut driver) = connect(broker, token, &format!("{topic}/down")).await?;
    let (inbox, publishes) = mpsc::channel(INBOX);
    let session = u64::from_le_bytes(random());
    let wire = line.wire(format!("{topic}/up"), session, publishes);
    let driven = async move {
        loop {
            let publish = tokio::select! {
                publish = driver.next() => publish,
                () = inbox.closed() => return,
            };
            // At the end the reader finds its inbox closed.
            let Ok((_, payload)) = publish else { return };
            if inbox.try_send(payload).is_err() {
                return;
            }
        }
    };
    Ok((wire, driven))
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
    pub async fn next(&mut self) -> Result<(Bytes, Bytes), Broken> {
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
    /// A session that is published on `topic`, and whose other end's messages come through `publishes`.
    pub fn wire(&self, topic: String, session: u64, publishes: mpsc::Receiver<Bytes>) -> Wire {
        let traffic = Arc::new(Traffic::default());
        let reader = Reader {
            publishes,
            session,
            next: 0,
            traffic: Arc::clone(&traffic),
        };
        let writer = Writer {
            line: self.clone(),
            topic,
            session,
            next: 0,
            queue: Queue::default(),
            current: None,
            traffic,
        };
        let limits = Limits {
            chunk_bytes: self.chunk_bytes,
            window_bytes: WINDOW_CHUNKS * self.chunk_bytes as u64,
        };
        Wire::new(wire::Reader::Mqtt(reader), wire::Writer::Mqtt(writer), limits)
    }

    /// Tells whoever goes on with a session that is not known here to begin another.
    pub fn refuse(&self, topic: &str, session: u64) {
        let bye = Message::Bye {
            last: false,
            reason: "no such session".to_owned(),
        };
        let payload = enveloped(session, 0, &bye.encode());
        // A busy line has no room for it: they will find out.
        let _ = self.client.try_publish(topic, QoS::AtLeastOnce, false, payload);
    }
}

fn enveloped(session: u64, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(ENVELOPE_BYTES + body.len());
    payload.extend(session.to_le_bytes());
    payload.extend(sequence.to_le_bytes());
    payload.extend(body);
    payload
}

#[derive(Debug)]
pub(super) struct Reader {
    publishes: mpsc::Receiver<Bytes>,
    session: u64,
    next: u32,
    pub(super) traffic: Arc<Traffic>,
}

impl Reader {
    /// The next message. Cancel-safe: a publish is taken whole or not.
    pub(super) async fn next(&mut self, incoming: &mut Incoming) -> Result<Message, Broken> {
        loop {
            let payload = self.publishes.recv().await.ok_or(Broken::Closed)?;
            self.traffic.add_received(payload.len());
            let Some((session, sequence)) = envelope(&payload) else {
                return Err(Malformed::Magic.into());
            };
            let body = &payload[ENVELOPE_BYTES..];
            if session != self.session {
                continue;
            }
            // Of a session that the other end does not know, it counts from the beginning.
            if body.first() == Some(&BYE) && sequence == 0 {
                return Ok(Message::decode(body)?);
            }
            if sequence < self.next {
                continue;
            }
            if sequence > self.next {
                return Err(Broken::Gap);
            }
            self.next += 1;
            return message(body, incoming);
        }
    }
}

const BYE: u8 = 12;

fn message(body: &[u8], incoming: &mut Incoming) -> Result<Message, Broken> {
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
    next: u32,
    pub(super) queue: Queue,
    /// What is being published. When that is cancelled it may have gone all the same: then it goes twice, under the same
    /// number.
    current: Option<Bytes>,
    pub(super) traffic: Arc<Traffic>,
}

impl Writer {
    pub(super) async fn drive(&mut self, mut outgoing: Option<&mut Outgoing>, limits: &Limits) -> Broken {
        loop {
            match self.publish(outgoing.as_deref_mut(), limits).await {
                Ok(true) => {}
                Ok(false) => std::future::pending().await,
                Err(broken) => return broken,
            }
        }
    }

    /// Publishes what is in the queue, and waits until the broker has it.
    pub(super) async fn flush(&mut self) -> Result<(), Broken> {
        let limits = Limits {
            chunk_bytes: 0,
            window_bytes: 0,
        };
        while self.publish(None, &limits).await? {}
        let published = self.line.published.load(Ordering::Acquire);
        let all = self.line.acknowledged.wait_for(|count| *count >= published).await;
        all.map(drop).map_err(|_| Broken::Closed)
    }

    /// Publishes one message; says whether there was one.
    async fn publish(&mut self, outgoing: Option<&mut Outgoing>, limits: &Limits) -> Result<bool, Broken> {
        if self.current.is_none() {
            let body = match self.queue.pop()? {
                Some(body) => Some(body),
                None => outgoing.and_then(|outgoing| chunk(outgoing, limits)),
            };
            let Some(body) = body else { return Ok(false) };
            self.current = Some(enveloped(self.session, self.next, &body).into());
            self.next = self.next.checked_add(1).ok_or(Broken::Gap)?;
        }
        let Some(current) = &self.current else {
            return Ok(false);
        };
        let published = self
            .line
            .client
            .publish_bytes(&self.topic, QoS::AtLeastOnce, false, current.clone());
        published.await.map_err(|_| Broken::Closed)?;
        self.line.published.fetch_add(1, Ordering::Release);
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
