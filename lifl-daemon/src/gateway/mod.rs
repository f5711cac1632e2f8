//! The gateway: workers that are not on the node's shared memory reach their jobs through it.
//!
//! A job's maker has it opened and names who may come; it gets a token, from which each participant's secret is derived, and
//! whoever proves to know the secret of one that is named is let in. For each worker there is a [`proxy`]: a worker of the job
//! in this process. What is said on the wire is in [`lifl_common::session`].
//!
//! ```text
//!   registry ── open, expect, drop, close ──▶ ┌ one task: jobs ┐ ◀── who is that? proven, wire ── listener (one an address)
//!            ◀───────────── opened ────────── └── and proxies ─┘
//!                                                 │ wire
//!                                                 ▼
//!                            proxy (one a worker) ── control socket, frames, an arena ──▶ as any worker
//! ```
//!
//! Jobs that name the same address share its listener, which closes with the last of them. Each job that uses MQTT has its
//! own connection with the broker.

#[cfg(feature = "mqtt")]
mod broker;
mod listener;
mod newcomers;
mod proxy;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lifl_common::control::{ErrorCode, RemoteWorker, Reply};
use lifl_common::id::JobId;
use lifl_common::session::Broker;
use lifl_common::session::handshake::Participant;
use lifl_common::session::reach::{Exposed, Reach};
use lifl_common::session::{GRACE, JobToken, Message, ParticipantId, Traffic, Wire};
use lifl_common::update::Schema;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

#[cfg(feature = "mqtt")]
use self::broker::Service;
use self::listener::Listener;
use self::newcomers::Newcomers;
use self::proxy::{Proxy, ProxyConfig};
use crate::registry::ConnId;
use crate::server::Lobby;

/// How long a worker that is turned away has to take the answer.
const FAREWELL: Duration = Duration::from_secs(1);

/// What everybody hears who is not let in: nobody can tell by it which jobs and names there are.
const REFUSAL: &str =
    "not let in: no participant of a job that is open here, or not version 3 of the session protocol";
const _: () = assert!(lifl_common::session::VERSION == 3, "REFUSAL names it");

/// Wires that wait for a proxy which is busy: the newest counts.
const WIRES: usize = 4;

/// How a gateway is to be.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Addresses, beside the loopback's, on which jobs may have it listen; an unspecified one allows all.
    pub allowed: Vec<IpAddr>,
    /// MQTT brokers that jobs may have it connect with.
    pub brokers: Brokers,
    /// Whether models may go unencrypted beyond private networks.
    pub insecure: bool,
    /// How long a proxy waits for a broken session to be taken up again.
    pub grace: Duration,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        Self {
            allowed: Vec::new(),
            brokers: Brokers::default(),
            insecure: false,
            grace: GRACE,
        }
    }
}

/// MQTT brokers that jobs may name.
#[derive(Clone, Debug)]
pub enum Brokers {
    /// Any: the daemon's jobs are all of the user whose daemon it is.
    Any,
    /// Those. A job has to name one as it is named here.
    These(Vec<Broker>),
}

impl Default for Brokers {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

impl GatewayOptions {
    /// Whether jobs may have the gateway listen there.
    pub(crate) fn admits(&self, address: IpAddr) -> bool {
        let allows = |allowed: &IpAddr| allowed.is_unspecified() || *allowed == address;
        address.is_loopback() || self.allowed.iter().any(allows)
    }

    /// Whether jobs may have the gateway connect with that broker.
    pub(crate) fn admits_broker(&self, broker: &Broker) -> bool {
        match &self.brokers {
            Brokers::Any => true,
            Brokers::These(brokers) => brokers.contains(broker),
        }
    }

    /// Whether models may go unencrypted over the networks of what is allowed; says which of it is beyond the loopback.
    ///
    /// # Errors
    /// If one of them is beyond private networks, and `insecure` does not say that it may be.
    pub fn check_reach(&self) -> Result<Vec<IpAddr>, Exposed> {
        let mut beyond = Vec::new();
        for &address in &self.allowed {
            if Reach::permit(address, self.insecure)? != Reach::Loopback {
                beyond.push(address);
            }
        }
        Ok(beyond)
    }
}

/// A job's wish.
#[derive(Debug)]
pub(crate) struct OpenRequest {
    pub(crate) conn: ConnId,
    pub(crate) job: JobId,
    /// Whose that is.
    pub(crate) uid: u32,
    pub(crate) p2p: Option<SocketAddr>,
    pub(crate) mqtt: Option<Broker>,
    pub(crate) object_bytes: u64,
    pub(crate) traffic: Arc<Traffic>,
}

/// What came of it: the reply to the connection that asked.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) conn: ConnId,
    pub(crate) job: JobId,
    pub(crate) reply: Reply,
}

enum Command {
    Open(OpenRequest),
    Expect(JobId, Vec<RemoteWorker>),
    Drop(JobId, String),
    Close(JobId),
    /// Somebody says that it is that participant.
    Identify(ParticipantId, oneshot::Sender<Option<Known>>),
    /// A participant has proved itself.
    Admit(Proven, Box<Wire>),
    /// The job's broker was reached, or was not.
    Reached(JobId, Result<(), String>),
}

/// A participant that a job expects.
#[derive(Debug)]
struct Known {
    job: JobId,
    participant: Participant,
}

/// Who has proved itself.
#[derive(Debug)]
struct Proven {
    job: JobId,
    name: String,
    instance: u64,
}

/// How those come in who are at the gateway's addresses and brokers.
#[derive(Clone, Debug)]
struct Entrance {
    commands: mpsc::UnboundedSender<Command>,
}

impl Entrance {
    /// Who has that id, if anybody is expected who does.
    async fn identify(&self, participant: ParticipantId) -> Option<Known> {
        let (answer, known) = oneshot::channel();
        self.commands.send(Command::Identify(participant, answer)).ok()?;
        known.await.ok().flatten()
    }

    fn admit(&self, proven: Proven, wire: Wire) {
        // At the gateway's end nobody is let in any more.
        let _ = self.commands.send(Command::Admit(proven, Box::new(wire)));
    }
}

/// The registry's hold on the gateway.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    commands: mpsc::UnboundedSender<Command>,
}

impl Handle {
    /// Opens it for a job; the answer comes as [`Opened`].
    pub(crate) fn open(&self, request: OpenRequest) {
        self.tell(Command::Open(request));
    }

    pub(crate) fn expect(&self, job: JobId, workers: Vec<RemoteWorker>) {
        self.tell(Command::Expect(job, workers));
    }

    pub(crate) fn drop_worker(&self, job: JobId, name: String) {
        self.tell(Command::Drop(job, name));
    }

    /// The job has ended: nobody is let in any more. Its proxies hear of it as all workers do.
    pub(crate) fn close(&self, job: JobId) {
        self.tell(Command::Close(job));
    }

    fn tell(&self, command: Command) {
        // It ends after the registry only.
        let _ = self.commands.send(command);
    }
}

/// A job that the gateway is open for.
struct OpenJob {
    uid: u32,
    token: JobToken,
    object_bytes: u64,
    traffic: Arc<Traffic>,
    schema: Arc<OnceLock<Arc<Schema>>>,
    expected: HashMap<String, Expected>,
    /// The answer that waits for the broker, and to whom it goes.
    opening: Option<(ConnId, Reply)>,
    /// The connection with the broker ends with it.
    open: CancellationToken,
    proxies: TaskTracker,
}

struct Expected {
    role: String,
    proxy: Option<RunningProxy>,
}

/// A proxy at work.
struct RunningProxy {
    instance: u64,
    wires: mpsc::Sender<Wire>,
    leave: CancellationToken,
}

fn failed(conn: ConnId, job: JobId, message: String) -> Opened {
    let code = ErrorCode::Failed;
    let reply = Reply::Error { code, message };
    Opened { conn, job, reply }
}

struct Gateway {
    lobby: Lobby,
    grace: Duration,
    #[cfg_attr(not(feature = "mqtt"), expect(dead_code, reason = "of brokers only"))]
    insecure: bool,
    jobs: HashMap<JobId, OpenJob>,
    /// Whom all jobs expect, by what they say first.
    participants: HashMap<ParticipantId, (JobId, String)>,
    newcomers: Newcomers,
    listeners: HashMap<SocketAddr, (Listener, HashSet<JobId>)>,
    commands: mpsc::UnboundedSender<Command>,
    tasks: TaskTracker,
    /// All of the gateway's tasks end with it.
    stop: CancellationToken,
}

/// The gateway, whose proxies come to the registry through `lobby`: the registry's hold on it, its answers, and the task that
/// is to be run. That ends when `stop` is cancelled, with everything that it started.
pub(crate) fn gateway(
    lobby: Lobby,
    options: &GatewayOptions,
    stop: CancellationToken,
) -> (
    Handle,
    mpsc::UnboundedReceiver<Opened>,
    impl Future<Output = ()> + use<>,
) {
    let (commands, inbox) = mpsc::unbounded_channel();
    let (answers, opened) = mpsc::unbounded_channel();
    let gateway = Gateway {
        lobby,
        grace: options.grace,
        insecure: options.insecure,
        jobs: HashMap::new(),
        participants: HashMap::new(),
        newcomers: Newcomers::new(),
        listeners: HashMap::new(),
        commands: commands.clone(),
        tasks: TaskTracker::new(),
        stop,
    };
    (Handle { commands }, opened, gateway.run(inbox, answers))
}

impl Gateway {
    async fn run(
        mut self,
        mut inbox: mpsc::UnboundedReceiver<Command>,
        answers: mpsc::UnboundedSender<Opened>,
    ) {
        let stop = self.stop.clone();
        loop {
            let command = tokio::select! {
                () = stop.cancelled() => break,
                Some(command) = inbox.recv() => command,
            };
            match command {
                Command::Open(request) => {
                    let (conn, job) = (request.conn, request.job);
                    match self.open(request).await {
                        Ok(None) => {}
                        Ok(Some(reply)) => {
                            let _ = answers.send(Opened { conn, job, reply });
                        }
                        Err(message) => {
                            let _ = answers.send(failed(conn, job, message));
                        }
                    }
                }
                Command::Reached(id, reached) => {
                    let job = self.jobs.get_mut(&id);
                    let Some((conn, reply)) = job.and_then(|job| job.opening.take()) else {
                        continue;
                    };
                    let opened = match reached {
                        Ok(()) => Opened { conn, job: id, reply },
                        Err(message) => {
                            self.close(id);
                            failed(conn, id, message)
                        }
                    };
                    let _ = answers.send(opened);
                }
                Command::Expect(job, workers) => {
                    let Some(open) = self.jobs.get_mut(&job) else {
                        continue;
                    };
                    for RemoteWorker { name, role } in workers {
                        let id = open.token.participant(&name).id();
                        self.participants.insert(id, (job, name.clone()));
                        // One that is named again keeps its proxy.
                        let expected = Expected { role, proxy: None };
                        open.expected.entry(name).or_insert(expected);
                    }
                }
                Command::Drop(job, name) => {
                    let expected = self.jobs.get(&job).and_then(|job| job.expected.get(&name));
                    if let Some(running) = expected.and_then(|expected| expected.proxy.as_ref()) {
                        running.leave.cancel();
                    }
                }
                Command::Close(job) => self.close(job),
                Command::Identify(participant, answer) => {
                    // Who has left needs no answer.
                    let _ = answer.send(self.identify(participant));
                }
                Command::Admit(proven, wire) => self.admit(proven, *wire),
            }
        }
        for (listener, _) in self.listeners.into_values() {
            listener.close();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Opens the gateway for a job; the answer, unless that has to wait for the broker.
    async fn open(&mut self, request: OpenRequest) -> Result<Option<Reply>, String> {
        let token = JobToken::new();
        let mut listening = None;
        if let Some(address) = request.p2p {
            let address = self.listen(address).await?;
            if let Some((_, jobs)) = self.listeners.get_mut(&address) {
                jobs.insert(request.job);
            }
            listening = Some(address);
        }
        let (p2p, mqtt) = (
            listening.map(|at| at.to_string()),
            request.mqtt.as_ref().map(Broker::to_string),
        );
        tracing::info!(job = %request.job, p2p, mqtt, "gateway opened");
        let reply = Reply::GatewayOpened {
            token: token.to_hex(),
            p2p: listening,
        };
        let open = self.stop.child_token();
        let (now, later) = match request.mqtt {
            None => (Some(reply), None),
            Some(broker) => {
                self.serve(request.job, broker, token, open.clone());
                (None, Some((request.conn, reply)))
            }
        };
        self.jobs.insert(
            request.job,
            OpenJob {
                uid: request.uid,
                token,
                object_bytes: request.object_bytes,
                traffic: request.traffic,
                schema: Arc::default(),
                expected: HashMap::new(),
                opening: later,
                open,
                proxies: TaskTracker::new(),
            },
        );
        Ok(now)
    }

    /// Says that it cannot connect with a job's broker.
    #[cfg(not(feature = "mqtt"))]
    fn serve(&self, job: JobId, broker: Broker, _token: JobToken, _open: CancellationToken) {
        let why = format!(
            "this lifl-daemon was built without MQTT, so it cannot connect with {broker}: build it with the cargo feature mqtt, or give \
             the channels the backend p2p"
        );
        let _ = self.commands.send(Command::Reached(job, Err(why)));
    }

    /// Connects with a job's broker.
    #[cfg(feature = "mqtt")]
    fn serve(&self, job: JobId, broker: Broker, token: JobToken, open: CancellationToken) {
        let service = Service {
            broker: broker.clone(),
            insecure: self.insecure,
            job,
            token,
            entrance: self.entrance(),
            tasks: self.tasks.clone(),
            open,
        };
        let commands = self.commands.clone();
        let reached = move |reached: Result<(), String>| {
            let reached = reached.map_err(|why| {
                format!(
                    "the MQTT broker at {broker} is not reached: {why}; start it, or give the broker of sort mqtt \
                     another host"
                )
            });
            let _ = commands.send(Command::Reached(job, reached));
        };
        self.tasks.spawn(service.serve(reached));
    }

    fn entrance(&self) -> Entrance {
        Entrance {
            commands: self.commands.clone(),
        }
    }

    fn identify(&self, participant: ParticipantId) -> Option<Known> {
        let (job, name) = self.participants.get(&participant)?;
        let secret = self.jobs.get(job)?.token.participant(name);
        Some(Known {
            job: *job,
            participant: Participant {
                name: name.clone(),
                secret,
            },
        })
    }

    /// Listens at an address, unless the gateway does so already. Gives the address with its true port.
    async fn listen(&mut self, address: SocketAddr) -> Result<SocketAddr, String> {
        if self.listeners.contains_key(&address) {
            return Ok(address);
        }
        let (entrance, newcomers) = (self.entrance(), self.newcomers.clone());
        let open = self.stop.child_token();
        let listener = Listener::bind(address, entrance, newcomers, &self.tasks, open).await;
        let listener = listener.map_err(|error| {
            format!(
                "the gateway cannot listen at {address}: {error}; stop what has that address, or give the broker of \
                 sort p2p another host"
            )
        })?;
        let address = listener.address();
        self.listeners.insert(address, (listener, HashSet::new()));
        Ok(address)
    }

    fn close(&mut self, job: JobId) {
        let Some(closed) = self.jobs.remove(&job) else {
            return;
        };
        self.participants.retain(|_, (of, _)| *of != job);
        // The proxies' last words go over the line to the broker.
        self.tasks.spawn(async move {
            closed.proxies.close();
            closed.proxies.wait().await;
            closed.open.cancel();
        });
        tracing::info!(%job, "gateway closed");
        let deserted = self.listeners.extract_if(|_, (_, jobs)| {
            jobs.remove(&job);
            jobs.is_empty()
        });
        for (_, (listener, _)) in deserted {
            listener.close();
        }
    }

    /// Lets a worker in that has proved itself, or turns it away by name.
    fn admit(&mut self, proven: Proven, wire: Wire) {
        let Proven {
            job: id,
            name,
            instance,
        } = proven;
        let Some(job) = self.jobs.get_mut(&id) else {
            return self.turn_away(wire, "the job is over".to_owned());
        };
        let Some(expected) = job.expected.get_mut(&name) else {
            return self.turn_away(wire, format!("the job expects no worker called {name:?}"));
        };
        if let Some(running) = &expected.proxy {
            if running.instance != instance {
                let reason = format!("another process came as {name} before");
                return self.turn_away(wire, reason);
            }
            if let Err(error) = running.wires.try_send(wire) {
                let closed = matches!(error, mpsc::error::TrySendError::Closed(_));
                let (mpsc::error::TrySendError::Closed(wire) | mpsc::error::TrySendError::Full(wire)) = error;
                if closed {
                    self.turn_away(wire, format!("{name} was given up"));
                }
            }
            return;
        }
        let (wires, inbox) = mpsc::channel(WIRES);
        let leave = self.stop.child_token();
        let _ = wires.try_send(wire);
        expected.proxy = Some(RunningProxy {
            instance,
            wires,
            leave: leave.clone(),
        });
        let config = ProxyConfig {
            lobby: self.lobby.clone(),
            job: id,
            uid: job.uid,
            role: expected.role.clone(),
            name,
            object_bytes: job.object_bytes,
            grace: self.grace,
            traffic: Arc::clone(&job.traffic),
            schema: Arc::clone(&job.schema),
            wires: inbox,
            leave,
        };
        let proxy = job.proxies.track_future(Proxy::run(config));
        self.tasks.spawn(proxy);
    }

    fn turn_away(&self, wire: Wire, reason: String) {
        self.tasks.spawn(async move {
            let bye = Message::Bye { last: true, reason };
            let _ = tokio::time::timeout(FAREWELL, wire.close(&bye)).await;
        });
    }
}
