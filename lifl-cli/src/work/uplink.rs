//! The way up of a worker beyond the node's shared memory: sessions with the gateway, one after the other.
//!
//! ```text
//!            connected, let in                    broken
//!   away ────────────────────────▶ in session ─────────────▶ away ── for too long ──▶ an error
//!     └── refused: back-off ─┘                                └── turned away for good ──▶ an error
//! ```
//!
//! What was said and may not have arrived is said again in the next session; transfers go on where they broke.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use lifl_common::config::Transport;
use lifl_common::frame::Refusal;
use lifl_common::session::reach::Reach;
use lifl_common::session::{
    Broken, Exchange, GRACE, HELLO_TIMEOUT, Happened, Malformed, Message, Object, Patience, Room, Secret,
    Source, UpdateHeader, Wire, random, tcp,
};
#[cfg(feature = "mqtt")]
use lifl_common::session::{Broker, mqtt};
use tokio::task::JoinHandle;

/// The first pause after a broken session; each that was of no use doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How long a gateway behind a broker has to answer a hello.
#[cfg(feature = "mqtt")]
const BROKER_PATIENCE: Duration = Duration::from_secs(3);

const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// How a gateway is reached.
#[derive(Clone, Debug)]
pub(super) enum Dial {
    /// Over TCP.
    Tcp(SocketAddr),
    /// Through a broker, which may be beyond private networks if the second field says so.
    #[cfg(feature = "mqtt")]
    Mqtt(Broker, bool),
}

/// Who the worker is to the gateway.
#[derive(Clone, Debug)]
struct Identity {
    name: String,
    secret: Secret,
    /// Tells this process from another of the same name.
    instance: u64,
}

/// What comes from above.
#[derive(Debug)]
pub(super) enum FromAbove {
    /// A model is to be had: [`Uplink::accept`] it when there is room.
    Offered,
    /// It is here.
    Model(Object, Room),
    /// What became of the update of that round; `None`: accepted.
    Verdict(u32, Option<Refusal>),
    /// The job is over.
    Ended(String),
}

/// A worker's sessions.
#[derive(Debug)]
pub(super) struct Uplink {
    dial: Dial,
    identity: Identity,
    exchange: Exchange,
    wire: Option<Wire>,
    connecting: Option<JoinHandle<Result<Wire, Broken>>>,
    patience: Patience,
    pause: Duration,
    ready: bool,
    offered: Option<Object>,
    /// The last round in which there was no update.
    nothing: Option<u32>,
    /// Why there was no session the last time.
    last: Option<String>,
}

impl Dial {
    /// From a worker's transport and the address that it was given, which may be beyond private networks if it is
    /// `insecure`.
    pub(super) fn new(transport: Transport, address: &str, insecure: bool) -> anyhow::Result<Self> {
        match transport {
            Transport::P2p => {
                let address: SocketAddr = address
                    .parse()
                    .with_context(|| format!("{address} is no address"))?;
                Reach::permit(address.ip(), insecure)?;
                Ok(Self::Tcp(address))
            }
            #[cfg(not(feature = "mqtt"))]
            Transport::Mqtt => bail!(crate::inputs::NO_MQTT),
            #[cfg(feature = "mqtt")]
            Transport::Mqtt => {
                let broker = Broker::parse(address);
                let broker = broker.with_context(|| format!("{address} is no broker"))?;
                Ok(Self::Mqtt(broker, insecure))
            }
            Transport::Shm => bail!("no gateway is reached by shared memory"),
        }
    }

    async fn connect(self, identity: Identity) -> Result<Wire, Broken> {
        // A broker loses what is published while the gateway is away from it: that is better said soon again.
        let answer = match self {
            Self::Tcp(_) => HELLO_TIMEOUT,
            #[cfg(feature = "mqtt")]
            Self::Mqtt(..) => BROKER_PATIENCE,
        };
        let Identity {
            name,
            secret,
            instance,
        } = identity;
        let connected = async {
            let mut wire = match self {
                Self::Tcp(address) => tcp::connect(address, &secret, &name, instance).await?,
                #[cfg(feature = "mqtt")]
                Self::Mqtt(broker, insecure) => {
                    let dialled = mqtt::dial(&broker, insecure, &secret, &name, instance, answer);
                    let (wire, driver) = dialled.await?;
                    tokio::spawn(driver);
                    wire
                }
            };
            let welcomed = tokio::time::timeout(answer, wire.welcomed()).await;
            welcomed.unwrap_or(Err(Broken::Silent(answer)))?;
            Ok(wire)
        };
        let connected = tokio::time::timeout(HELLO_TIMEOUT + answer, connected).await;
        connected.unwrap_or(Err(Broken::Silent(HELLO_TIMEOUT)))
    }
}

impl Uplink {
    /// Of a worker of that name.
    pub(super) fn new(dial: Dial, secret: Secret, name: &str) -> Self {
        Self {
            dial,
            identity: Identity {
                name: name.to_owned(),
                secret,
                instance: u64::from_le_bytes(random()),
            },
            exchange: Exchange::default(),
            wire: None,
            connecting: None,
            patience: Patience::new(),
            pause: Duration::ZERO,
            ready: false,
            offered: None,
            nothing: None,
            last: None,
        }
    }

    /// Tells the coordinator that this worker can begin.
    pub(super) fn ready(&mut self) {
        self.ready = true;
        self.say(&Message::Ready);
    }

    /// The model that is to be had and was not accepted yet.
    pub(super) fn offered(&self) -> Option<Object> {
        self.offered
    }

    /// Takes the model that is to be had.
    pub(super) fn accept(&mut self, room: Room) {
        if let (Some(object), Some(wire)) = (self.offered.take(), &mut self.wire) {
            self.exchange.accept(wire, object, room);
        }
    }

    /// Sends an update up. Its source must stay as it is until the verdict.
    pub(super) fn update(&mut self, header: UpdateHeader, source: Source) {
        self.exchange
            .offer(self.wire.as_mut(), Message::Update(header), source);
    }

    /// There is no update in that round.
    pub(super) fn nothing(&mut self, round: u32) {
        self.nothing = Some(round);
        self.say(&Message::Nothing(round));
    }

    fn say(&mut self, message: &Message) {
        if let Some(wire) = &mut self.wire {
            wire.send(message);
        }
    }

    /// Waits for whatever comes next. Cancel-safe.
    ///
    /// # Errors
    /// If the gateway turns us away, or has not been reached for too long.
    pub(super) async fn next(&mut self) -> anyhow::Result<FromAbove> {
        loop {
            let Some(wire) = &mut self.wire else {
                self.connect().await?;
                continue;
            };
            let broken = match self.exchange.next(wire).await {
                Ok(Happened::Offered(Message::Model(object))) => {
                    self.offered = Some(object);
                    return Ok(FromAbove::Offered);
                }
                Ok(Happened::Received { object, room }) => return Ok(FromAbove::Model(object, room)),
                Ok(Happened::Message(Message::Verdict { round, refusal })) => {
                    if self.exchange.sending() == Some(round) {
                        self.exchange.withdraw();
                    }
                    let refusal = match refusal {
                        0 => None,
                        number => Some(Refusal::from_number(number).unwrap_or(Refusal::BadKey)),
                    };
                    return Ok(FromAbove::Verdict(round, refusal));
                }
                Ok(Happened::Message(Message::End(reason))) => return Ok(FromAbove::Ended(reason)),
                // Who trains waits for as long as the gateway does.
                Ok(Happened::Sent(_) | Happened::Overdue) => continue,
                Ok(Happened::Offered(other) | Happened::Message(other)) => {
                    Malformed::Unexpected(other.name()).into()
                }
                Err(broken) => broken,
            };
            self.wire = None;
            self.offered = None;
            self.failed(broken)?;
        }
    }

    async fn connect(&mut self) -> anyhow::Result<()> {
        let (pause, dial, identity) = (self.pause, &self.dial, &self.identity);
        let connecting = self.connecting.get_or_insert_with(|| {
            let (dial, identity) = (dial.clone(), identity.clone());
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                dial.connect(identity).await
            })
        });
        let connected = tokio::select! {
            connected = connecting => connected.context("the connecting task failed")?,
            () = tokio::time::sleep_until(self.patience.ends(GRACE)) => {
                let why = self.last.as_deref().unwrap_or("it does not answer");
                bail!("the gateway was not reached for {} s: {why}", GRACE.as_secs());
            }
        };
        self.connecting = None;
        match connected {
            Ok(mut wire) => {
                tracing::info!("session with the gateway open");
                if self.ready {
                    wire.send(&Message::Ready);
                }
                if let Some(round) = self.nothing {
                    wire.send(&Message::Nothing(round));
                }
                self.patience.opened(&self.exchange, &mut wire);
                self.exchange.resume(&mut wire);
                self.wire = Some(wire);
            }
            Err(broken) => self.failed(broken)?,
        }
        Ok(())
    }

    fn failed(&mut self, broken: Broken) -> anyhow::Result<()> {
        if let Broken::Exposed(exposed) = broken {
            return Err(exposed).context("no session with the gateway");
        }
        if broken.is_final() {
            return Err(broken).context("the gateway turned us away");
        }
        let of_use = self.patience.broken(&self.exchange);
        self.pause = if of_use {
            FIRST_PAUSE
        } else {
            (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
        };
        let error = anyhow::Error::from(broken);
        tracing::warn!(
            "no session with the gateway, again in {:?}: {error:#}",
            self.pause
        );
        self.last = Some(format!("{error:#}"));
        Ok(())
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        if let Some(connecting) = &self.connecting {
            connecting.abort();
        }
    }
}
