//! The gateway link: what ties a worker to its parent where they share no memory. Sessions with the gateway, one after the
//! other; a worker reconnects until it has not reached the gateway for [`GRACE`].
//!
//! ```text
//!            connected, let in                    broken
//!   away ────────────────────────▶ in session ─────────────▶ away ── for too long ──▶ an error
//!     └── refused: back-off ─┘                                └── turned away for good ──▶ an error
//! ```
//!
//! What was sent and may not have arrived is sent again in the next session; transfers go on where they broke.

use std::net::{AddrParseError, SocketAddr};
use std::time::Duration;

use lifl_common::config::Transport;
use lifl_common::frame::Refusal;
use lifl_common::session::reach::{Exposed, Reach};
#[cfg(feature = "mqtt")]
use lifl_common::session::{Broker, mqtt};
use lifl_common::session::{
    Destination, GRACE, HELLO_TIMEOUT, Malformed, Message, Object, ReconnectPolicy, Secret, SessionError,
    Source, TransferEvent, Transfers, Wire, random, tcp,
};
use lifl_common::update::UpdateInfo;
use tokio::task::{JoinError, JoinHandle};

/// The first pause after a broken session; each that was of no use doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// How long a gateway behind a broker has to answer a hello.
#[cfg(feature = "mqtt")]
const BROKER_TIMEOUT: Duration = Duration::from_secs(3);

const LONGEST_PAUSE: Duration = Duration::from_secs(3);

/// Why a worker has no session with the gateway, and will have none.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// No address.
    #[error("{address} is no address of a gateway")]
    Address {
        /// What stands there.
        address: String,
        /// Why it is none.
        #[source]
        source: AddrParseError,
    },
    /// No MQTT broker's `host:port`.
    #[error("{0} is no broker")]
    Broker(String),
    /// The program was built without the feature `mqtt`.
    #[error("this program was built without MQTT")]
    NoMqtt,
    /// Shared memory needs none.
    #[error("no gateway is reached by shared memory")]
    SharedMemory,
    /// Models would go unencrypted over a public network.
    #[error("no session with the gateway")]
    Exposed(#[from] Exposed),
    /// It has said that it is no use to come again.
    #[error("the gateway turned us away")]
    TurnedAway(#[source] SessionError),
    /// It has not been reached for [`GRACE`].
    #[error("the gateway was not reached for {} s: {why}", GRACE.as_secs())]
    NotReached {
        /// Why there was no session the last time.
        why: String,
    },
    /// The task that connects has panicked.
    #[error("the connecting task failed")]
    Task(#[from] JoinError),
}

/// How a gateway is reached.
#[derive(Clone, Debug)]
pub enum GatewayAddress {
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

/// What comes from the gateway.
#[derive(Debug)]
pub enum GatewayEvent {
    /// A model is to be had: [`GatewayLink::accept`] it when there is room.
    Offered,
    /// A model has come, into the room that it was given.
    Model(Object, Destination),
    /// What became of the update of that round; `None`: accepted.
    Verdict(u32, Option<Refusal>),
    /// The job is over.
    Ended(String),
}

/// A worker's sessions.
#[derive(Debug)]
pub struct GatewayLink {
    address: GatewayAddress,
    identity: Identity,
    transfers: Transfers,
    wire: Option<Wire>,
    connecting: Option<JoinHandle<Result<Wire, SessionError>>>,
    reconnect_policy: ReconnectPolicy,
    pause: Duration,
    ready: bool,
    offered: Option<Object>,
    /// The last round in which there was no update.
    nothing: Option<u32>,
    /// Why there was no session the last time.
    last: Option<String>,
}

impl GatewayAddress {
    /// From a worker's transport and the address that it was given, which may be beyond private networks if it is
    /// `insecure`.
    ///
    /// # Errors
    /// If it is no address, or one that models may not be sent to.
    pub fn new(transport: Transport, address: &str, insecure: bool) -> Result<Self, GatewayError> {
        match transport {
            Transport::P2p => {
                let parsed: Result<SocketAddr, _> = address.parse();
                let parsed = parsed.map_err(|source| GatewayError::Address {
                    address: address.to_owned(),
                    source,
                })?;
                Reach::permit(parsed.ip(), insecure)?;
                Ok(Self::Tcp(parsed))
            }
            #[cfg(not(feature = "mqtt"))]
            Transport::Mqtt => Err(GatewayError::NoMqtt),
            #[cfg(feature = "mqtt")]
            Transport::Mqtt => {
                let broker = Broker::parse(address);
                let broker = broker.ok_or_else(|| GatewayError::Broker(address.to_owned()))?;
                Ok(Self::Mqtt(broker, insecure))
            }
            Transport::Shm => Err(GatewayError::SharedMemory),
        }
    }

    async fn connect(self, identity: Identity) -> Result<Wire, SessionError> {
        // A broker loses what is published while the gateway is away from it: that is better said soon again.
        let answer = match self {
            Self::Tcp(_) => HELLO_TIMEOUT,
            #[cfg(feature = "mqtt")]
            Self::Mqtt(..) => BROKER_TIMEOUT,
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
            welcomed.unwrap_or(Err(SessionError::Silent(answer)))?;
            Ok(wire)
        };
        let connected = tokio::time::timeout(HELLO_TIMEOUT + answer, connected).await;
        connected.unwrap_or(Err(SessionError::Silent(HELLO_TIMEOUT)))
    }
}

impl GatewayLink {
    /// Of a worker of that name.
    pub fn new(address: GatewayAddress, secret: Secret, name: &str) -> Self {
        Self {
            address,
            identity: Identity {
                name: name.to_owned(),
                secret,
                instance: u64::from_le_bytes(random()),
            },
            transfers: Transfers::default(),
            wire: None,
            connecting: None,
            reconnect_policy: ReconnectPolicy::new(),
            pause: Duration::ZERO,
            ready: false,
            offered: None,
            nothing: None,
            last: None,
        }
    }

    /// Tells the coordinator that this worker can begin.
    pub fn ready(&mut self) {
        self.ready = true;
        self.say(&Message::Ready);
    }

    /// The model that is to be had and was not accepted yet.
    pub fn offered(&self) -> Option<Object> {
        self.offered
    }

    /// Takes the model that is to be had.
    pub fn accept(&mut self, destination: Destination) {
        if let (Some(object), Some(wire)) = (self.offered.take(), &mut self.wire) {
            self.transfers.accept(wire, object, destination);
        }
    }

    /// Sends an update up. Its source must stay as it is until the verdict.
    pub fn update(&mut self, object: Object, info: UpdateInfo, source: Source) {
        let update = Message::Update(object, info);
        self.transfers.offer(self.wire.as_mut(), update, source);
    }

    /// There is no update in that round.
    pub fn nothing(&mut self, round: u32) {
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
    pub async fn next(&mut self) -> Result<GatewayEvent, GatewayError> {
        loop {
            let Some(wire) = &mut self.wire else {
                self.connect().await?;
                continue;
            };
            let broken = match self.transfers.next(wire).await {
                Ok(TransferEvent::Offered(Message::Model(object))) => {
                    self.offered = Some(object);
                    return Ok(GatewayEvent::Offered);
                }
                Ok(TransferEvent::Received { object, destination }) => {
                    return Ok(GatewayEvent::Model(object, destination));
                }
                Ok(TransferEvent::Message(Message::Verdict { round, refusal })) => {
                    if self.transfers.sending() == Some(round) {
                        self.transfers.withdraw();
                    }
                    let refusal = match refusal {
                        0 => None,
                        number => Some(Refusal::from_number(number).unwrap_or(Refusal::BadKey)),
                    };
                    return Ok(GatewayEvent::Verdict(round, refusal));
                }
                Ok(TransferEvent::Message(Message::End(reason))) => return Ok(GatewayEvent::Ended(reason)),
                // Who trains waits for as long as the gateway does.
                Ok(TransferEvent::Sent(_) | TransferEvent::Overdue) => continue,
                Ok(TransferEvent::Offered(other) | TransferEvent::Message(other)) => {
                    Malformed::Unexpected(other.name()).into()
                }
                Err(broken) => broken,
            };
            self.wire = None;
            self.offered = None;
            self.failed(broken)?;
        }
    }

    async fn connect(&mut self) -> Result<(), GatewayError> {
        let (pause, address, identity) = (self.pause, &self.address, &self.identity);
        let connecting = self.connecting.get_or_insert_with(|| {
            let (address, identity) = (address.clone(), identity.clone());
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                address.connect(identity).await
            })
        });
        let connected = tokio::select! {
            connected = connecting => connected?,
            () = tokio::time::sleep_until(self.reconnect_policy.ends(GRACE)) => {
                let why = self.last.take().unwrap_or_else(|| "it does not answer".to_owned());
                return Err(GatewayError::NotReached { why });
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
                self.reconnect_policy.opened(&self.transfers, &mut wire);
                self.transfers.resume(&mut wire);
                self.wire = Some(wire);
            }
            Err(broken) => self.failed(broken)?,
        }
        Ok(())
    }

    fn failed(&mut self, broken: SessionError) -> Result<(), GatewayError> {
        if let SessionError::Exposed(exposed) = broken {
            return Err(exposed.into());
        }
        if broken.is_final() {
            return Err(GatewayError::TurnedAway(broken));
        }
        let of_use = self.reconnect_policy.broken(&self.transfers);
        self.pause = if of_use {
            FIRST_PAUSE
        } else {
            (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
        };
        let why = with_causes(&broken);
        tracing::warn!("no session with the gateway, again in {:?}: {why}", self.pause);
        self.last = Some(why);
        Ok(())
    }
}

impl Drop for GatewayLink {
    fn drop(&mut self) {
        if let Some(connecting) = &self.connecting {
            connecting.abort();
        }
    }
}

/// An error and what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
