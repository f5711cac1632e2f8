//! A job's connection with its MQTT broker: what workers publish is dealt to their sessions.
//!
//! ```text
//!            subscribed                        connection lost, broker gone
//!   away ───────────────────▶ on the line ─────────────────────────────────▶ away   all sessions are broken, and their
//!     └─ not reached: pause ─┘                                                        workers say hello again
//!
//!   a topic:   its session, proven ◀── proof ── sessions that have said hello, which the proven one does not notice
//! ```

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lifl_common::id::JobId;
use lifl_common::session::handshake::{GatewayHandshake, Hello, Participant};
use lifl_common::session::mqtt::{self, Driver, Inbound, Line};
use lifl_common::session::{Broker, HELLO_TIMEOUT, JobToken};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Entrance, Proven};
use crate::chain::error_chain;

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Sessions of one topic that have not been proved; of more the oldest is ended.
const MOST_UNPROVEN: usize = 16;

/// Publishes that wait for the task of one that has not been proved, which needs one.
const UNPROVEN_INBOX: usize = 2;

/// Topics with a session, beyond which dead ones are looked for.
const MANY: usize = 1024;

/// Answers in a second to messages of sessions that are not known, which anybody may send.
const MOST_REFUSALS_PER_S: u32 = 100;

/// What it takes to serve a job's broker.
pub(super) struct Service {
    pub(super) broker: Broker,
    /// Whether it may be beyond private networks.
    pub(super) insecure: bool,
    pub(super) job: JobId,
    pub(super) token: JobToken,
    /// Takes who has proved itself.
    pub(super) entrance: Entrance,
    pub(super) tasks: TaskTracker,
    pub(super) open: CancellationToken,
}

/// What is known of a topic.
#[derive(Debug, Default)]
struct Topic {
    session: Option<Inbound>,
    /// By number, the oldest first.
    unproven: Vec<(u64, mpsc::Sender<Bytes>)>,
}

/// A session that has been proved.
struct Arrival {
    topic: Bytes,
    inbound: Inbound,
}

impl Topic {
    /// Whether anybody listens to what comes there.
    fn is_alive(&mut self) -> bool {
        self.session.take_if(|session| session.is_closed());
        self.unproven.retain(|(_, inbox)| !inbox.is_closed());
        self.session.is_some() || !self.unproven.is_empty()
    }
}

impl Service {
    /// Serves until `open` is cancelled. `reached` is told once whether the broker could be reached at first; if not,
    /// that is the end.
    pub(super) async fn serve(self, reached: impl FnOnce(Result<(), String>)) {
        let open = self.open.clone();
        tokio::select! {
            () = open.cancelled() => {}
            () = self.serve_on(reached) => {}
        }
    }

    async fn serve_on(self, reached: impl FnOnce(Result<(), String>)) {
        let mut reached = Some(reached);
        let mut pause = FIRST_PAUSE;
        loop {
            match mqtt::serve(&self.broker, self.insecure, &self.token).await {
                Ok((line, driver)) => {
                    if let Some(reached) = reached.take() {
                        reached(Ok(()));
                    }
                    pause = FIRST_PAUSE;
                    self.deal(&line, driver).await;
                }
                Err(error) => {
                    let why = error_chain(&error);
                    if let Some(reached) = reached.take() {
                        return reached(Err(why));
                    }
                    tracing::warn!(broker = %self.broker, "not reached: {why}");
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Deals publishes until the connection fails.
    async fn deal(&self, line: &Line, mut driver: Driver) {
        let mut topics: HashMap<Bytes, Topic> = HashMap::new();
        let (arrive, mut arrivals) = mpsc::unbounded_channel();
        let mut refusals = (Instant::now(), 0);
        loop {
            let publish = tokio::select! {
                // First, since what is published next may be the proven session's.
                biased;
                Some(Arrival { topic, inbound }) = arrivals.recv() => {
                    let topic = topics.entry(topic).or_default();
                    topic.unproven.retain(|(number, _)| *number != inbound.session());
                    topic.session = Some(inbound);
                    continue;
                }
                publish = driver.next() => publish,
            };
            let (topic, payload) = match publish {
                Ok(publish) => publish,
                Err(error) => {
                    let why = error_chain(&error);
                    tracing::warn!(broker = %self.broker, "the line to the broker is lost: {why}");
                    return;
                }
            };
            let Some((session, sequence)) = mqtt::envelope(&payload) else {
                continue;
            };
            if let Some(known) = topics.get_mut(&topic) {
                if let Some(open) = known.session.as_mut().filter(|open| open.session() == session)
                    && !open.is_closed()
                {
                    if open.take(payload).is_err() {
                        tracing::warn!("a worker sends more than was asked for: its session is ended");
                        known.session = None;
                    }
                    continue;
                }
                if let Some((_, inbox)) = known.unproven.iter().find(|(number, _)| *number == session) {
                    // More than it waits for is nobody's.
                    let _ = inbox.try_send(payload);
                    continue;
                }
            }
            let from = std::str::from_utf8(&topic).ok();
            let Some((participant, down)) = from.and_then(|topic| mqtt::correspondent(&self.token, topic))
            else {
                continue;
            };
            if sequence != 0 {
                if refusals.0.elapsed() >= Duration::from_secs(1) {
                    refusals = (Instant::now(), 0);
                }
                refusals.1 += 1;
                if refusals.1 <= MOST_REFUSALS_PER_S {
                    line.refuse(&down, session, &participant.secret);
                }
                continue;
            }
            // A first message: a hello of the topic's own worker, or nobody's.
            let hello = Hello::decode(mqtt::body(&payload));
            let Some(hello) = hello
                .ok()
                .filter(|hello| hello.participant == participant.secret.id())
            else {
                continue;
            };
            if topics.len() >= MANY {
                topics.retain(|_, topic| topic.is_alive());
            }
            let known = topics.entry(topic.clone()).or_default();
            known.unproven.retain(|(_, inbox)| !inbox.is_closed());
            if known.unproven.len() >= MOST_UNPROVEN {
                known.unproven.remove(0);
            }
            let (inbox, publishes) = mpsc::channel(UNPROVEN_INBOX);
            known.unproven.push((session, inbox));
            let greeting = Greeting {
                line: line.clone(),
                topic,
                down,
                session,
                job: self.job,
                participant,
                hello,
            };
            let greeted = greeting.greet(publishes, arrive.clone(), self.entrance.clone());
            self.tasks.spawn(greeted);
        }
    }
}

/// A hello that came with the right id on a topic.
struct Greeting {
    line: Line,
    topic: Bytes,
    /// Where the gateway answers.
    down: String,
    session: u64,
    job: JobId,
    participant: Participant,
    hello: Hello,
}

impl Greeting {
    /// Asks for a proof, and passes on who has it.
    async fn greet(
        self,
        mut publishes: mpsc::Receiver<Bytes>,
        arrive: mpsc::UnboundedSender<Arrival>,
        entrance: Entrance,
    ) {
        let (handshake, challenge) =
            GatewayHandshake::answer(&self.hello, Some(&self.participant), self.session);
        let proven = async {
            let asked = self.line.challenge(&self.down, self.session, &challenge);
            asked.await.ok()?;
            while let Some(payload) = publishes.recv().await {
                // Whatever else comes may be from anybody.
                if let Some(keys) = handshake.check(mqtt::body(&payload)) {
                    return Some(keys);
                }
            }
            None
        };
        let Ok(Some(keys)) = tokio::time::timeout(HELLO_TIMEOUT, proven).await else {
            return;
        };
        let (inbound, messages) = Inbound::new(self.session, keys.up);
        let wire = self.line.wire(self.down, self.session, keys.down, messages);
        let arrival = Arrival {
            topic: self.topic,
            inbound,
        };
        // The connection with the broker may be lost by now; the wire tells of it.
        let _ = arrive.send(arrival);
        let proven = Proven {
            job: self.job,
            name: self.participant.name,
            instance: self.hello.instance,
        };
        entrance.admit(proven, wire);
    }
}
