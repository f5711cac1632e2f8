//! The gateway: the door for workers that are not on the node's shared memory.
//!
//! A job's maker has it opened and names who may come; it gets a token, and whoever presents that and such a name is let
//! in. For each worker there is a [`proxy`]: a worker of the job in this process. What is said on the wire is in
//! [`lifl_common::session`].
//!
//! ```text
//!   registry ── open, expect, drop, close ──▶ ┌ one task: jobs ┐ ◀── hello, wire ── listener (one an address)
//!            ◀───────────── opened ────────── └── and proxies ─┘
//!                                                 │ wire
//!                                                 ▼
//!                            proxy (one a worker) ── control socket, frames, an arena ──▶ as any worker
//! ```
//!
//! Jobs that name the same address share its listener, which closes with the last of them. Each job that uses MQTT has its
//! own connection with the broker.

mod broker;
mod listener;
mod proxy;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lifl_common::control::{ErrorCode, RemoteWorker, Reply};
use lifl_common::id::JobId;
use lifl_common::session::mqtt::Broker;
use lifl_common::session::{GRACE, Hello, JobToken, Message, Traffic, VERSION, Wire};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::broker::Service;
use self::listener::Listener;
use self::proxy::{Proxy, Stand};
use crate::registry::ConnId;
use crate::server::Lobby;

/// How long a worker that is turned away has to take the answer.
const FAREWELL: Duration = Duration::from_secs(1);

/// Wires that wait for a proxy which is busy: the newest counts.
const WIRES: usize = 4;

/// How a gateway is to be.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Addresses, beside the loopback's, on which jobs may have it listen; an unspecified one allows all.
    pub allowed: Vec<IpAddr>,
    /// How long a proxy waits for a broken session to be taken up again.
    pub grace: Duration,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        Self {
            allowed: Vec::new(),
            grace: GRACE,
        }
    }
}

impl GatewayOptions {
    /// Whether jobs may have the gateway listen there.
    pub(crate) fn admits(&self, address: IpAddr) -> bool {
        let allows = |allowed: &IpAddr| allowed.is_unspecified() || *allowed == address;
        address.is_loopback() || self.allowed.iter().any(allows)
    }
}

/// A job's wish.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) conn: ConnId,
    pub(crate) job: JobId,
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
    Open(Door),
    Expect(JobId, Vec<RemoteWorker>),
    Drop(JobId, String),
    Close(JobId),
    /// Somebody has said hello.
    Admit(Hello, Wire),
    /// The job's broker was reached, or was not.
    Reached(JobId, Result<(), String>),
}

/// The registry's hold on the gateway.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    commands: mpsc::UnboundedSender<Command>,
}

impl Handle {
    /// Opens it for a job; the answer comes as [`Opened`].
    pub(crate) fn open(&self, door: Door) {
        self.tell(Command::Open(door));
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
    token: JobToken,
    object_bytes: u64,
    traffic: Arc<Traffic>,
    expected: HashMap<String, Expected>,
    /// The answer that waits for the broker, and to whom it goes.
    opening: Option<(ConnId, Reply)>,
    /// The connection with the broker ends with it.
    open: CancellationToken,
    proxies: TaskTracker,
}

struct Expected {
    role: String,
    proxy: Option<Standing>,
}

/// A proxy at work.
struct Standing {
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
    jobs: HashMap<JobId, OpenJob>,
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
        jobs: HashMap::new(),
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
                Command::Open(door) => {
                    let (conn, job) = (door.conn, door.job);
                    match self.open(door).await {
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
                    if let Some(job) = self.jobs.get_mut(&job) {
                        let named = workers.into_iter().map(|RemoteWorker { name, role }| {
                            let expected = Expected { role, proxy: None };
                            (name, expected)
                        });
                        job.expected.extend(named);
                    }
                }
                Command::Drop(job, name) => {
                    let expected = self.jobs.get(&job).and_then(|job| job.expected.get(&name));
                    if let Some(standing) = expected.and_then(|expected| expected.proxy.as_ref()) {
                        standing.leave.cancel();
                    }
                }
                Command::Close(job) => self.close(job),
                Command::Admit(hello, wire) => self.admit(hello, wire),
            }
        }
        for (listener, _) in self.listeners.into_values() {
            listener.close();
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Opens the door; the answer, unless that has to wait for the broker.
    async fn open(&mut self, door: Door) -> Result<Option<Reply>, String> {
        let token = JobToken::new();
        let mut listening = None;
        if let Some(address) = door.p2p {
            let address = self.listen(address).await?;
            if let Some((_, jobs)) = self.listeners.get_mut(&address) {
                jobs.insert(door.job);
            }
            listening = Some(address);
        }
        let (p2p, mqtt) = (
            listening.map(|at| at.to_string()),
            door.mqtt.as_ref().map(Broker::to_string),
        );
        tracing::info!(job = %door.job, p2p, mqtt, "gateway opened");
        let reply = Reply::GatewayOpened {
            token: token.to_hex(),
            p2p: listening,
        };
        let open = self.stop.child_token();
        let (now, later) = match door.mqtt {
            None => (Some(reply), None),
            Some(broker) => {
                self.serve(door.job, broker, token, open.clone());
                (None, Some((door.conn, reply)))
            }
        };
        self.jobs.insert(
            door.job,
            OpenJob {
                token,
                object_bytes: door.object_bytes,
                traffic: door.traffic,
                expected: HashMap::new(),
                opening: later,
                open,
                proxies: TaskTracker::new(),
            },
        );
        Ok(now)
    }

    /// Connects with a job's broker.
    fn serve(&self, job: JobId, broker: Broker, token: JobToken, open: CancellationToken) {
        let service = Service {
            broker: broker.clone(),
            token,
            admit: self.admitting(),
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

    /// What passes on whoever has said hello.
    fn admitting(&self) -> impl Fn(Hello, Wire) + Clone + Send + 'static {
        let commands = self.commands.clone();
        move |hello, wire| {
            let _ = commands.send(Command::Admit(hello, wire));
        }
    }

    /// Listens at an address, unless the gateway does so already. Gives the address with its true port.
    async fn listen(&mut self, address: SocketAddr) -> Result<SocketAddr, String> {
        if self.listeners.contains_key(&address) {
            return Ok(address);
        }
        let listener = Listener::bind(address, self.admitting(), &self.tasks, self.stop.child_token()).await;
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

    /// Lets a worker in, or turns it away by name.
    fn admit(&mut self, hello: Hello, wire: Wire) {
        if hello.version != VERSION {
            let theirs = hello.version;
            return self.turn_away(
                wire,
                format!("the gateway speaks version {VERSION}, you {theirs}"),
            );
        }
        // All are compared, so that the time tells nothing.
        let mut found = None;
        for (&id, job) in &self.jobs {
            if job.token.is(&hello.token) {
                found = Some(id);
            }
        }
        let Some((id, job)) = found.and_then(|id| Some((id, self.jobs.get_mut(&id)?))) else {
            tracing::warn!("a worker without a job's token was turned away");
            return self.turn_away(wire, "no job here has that token".to_owned());
        };
        let Some(expected) = job.expected.get_mut(&hello.name) else {
            let reason = format!("the job expects no worker called {:?}", hello.name);
            return self.turn_away(wire, reason);
        };
        if let Some(standing) = &expected.proxy {
            if standing.instance != hello.instance {
                let reason = format!("another process came as {} before", hello.name);
                return self.turn_away(wire, reason);
            }
            if let Err(error) = standing.wires.try_send(wire) {
                let closed = matches!(error, mpsc::error::TrySendError::Closed(_));
                let (mpsc::error::TrySendError::Closed(wire) | mpsc::error::TrySendError::Full(wire)) = error;
                if closed {
                    self.turn_away(wire, format!("{} was given up", hello.name));
                }
            }
            return;
        }
        let (wires, inbox) = mpsc::channel(WIRES);
        let leave = self.stop.child_token();
        let _ = wires.try_send(wire);
        expected.proxy = Some(Standing {
            instance: hello.instance,
            wires,
            leave: leave.clone(),
        });
        let stand = Stand {
            lobby: self.lobby.clone(),
            job: id,
            role: expected.role.clone(),
            name: hello.name,
            object_bytes: job.object_bytes,
            grace: self.grace,
            traffic: Arc::clone(&job.traffic),
            wires: inbox,
            leave,
        };
        let standing = job.proxies.track_future(Proxy::stand_in(stand));
        self.tasks.spawn(standing);
    }

    fn turn_away(&self, wire: Wire, reason: String) {
        self.tasks.spawn(async move {
            let bye = Message::Bye { last: true, reason };
            let _ = tokio::time::timeout(FAREWELL, wire.close(&bye)).await;
        });
    }
}
