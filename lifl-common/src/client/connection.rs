//! A process's connection to its daemon; and, where that can be, to the daemon after it.

use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::FrameSocket;
use super::reconnect::{
    ANSWER, Identity, RECONNECT_TIME, Reattached, Reconnect, greet, greet_over, listener_of, within,
};
use crate::arena::{ArenaError, Layout, OwnedArena, PeerArena, memfd};
use crate::control::packet::{PacketError, PacketSocket};
use crate::control::{
    ErrorCode, Event, FlamePage, HeldArena, JobTraffic, Message, PROTOCOL, RemoteWorker, Reply, Request,
    Status, Welcome,
};
use crate::id::{ArenaId, JobId, WorkerId};
use crate::limits::Cgroups;
use crate::plane::PlaneKind;
use crate::session::JobToken;

/// Workers named in one packet: with their roles they must fit.
const EXPECTED_PAGE: usize = 128;

/// What can go wrong between a process and its daemon.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody to talk to.
    #[error("no daemon answers at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Somebody listens and accepts no connection: its backlog stays full.
    #[error(
        "the daemon at {path} is too busy: it has accepted no connection for {} s, and its backlog is full; try again later",
        waited.as_secs()
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long it was tried.
        waited: Duration,
    },
    /// It is connected to, and says nothing: it is stopped, hangs, or is no daemon.
    #[error(
        "the daemon at {path}{} has not answered for {} s: it is stopped or hangs{}; or restart it \
         (`sudo systemctl restart lifl-daemon`)",
        listener.map(|pid| format!(" (process {pid})")).unwrap_or_default(),
        waited.as_secs(),
        listener.map(|pid| format!(", `kill -CONT {pid}` lets one that is stopped go on")).unwrap_or_default()
    )]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        waited: Duration,
        /// The process that listens there, if it can be seen.
        listener: Option<i32>,
    },
    /// The daemon is gone.
    #[error("the daemon closed the control socket")]
    Closed,
    /// The daemon is gone, and what it had of the job with it.
    #[error("the daemon is gone and the job with it: {reason}")]
    Gone {
        /// Why the job does not outlive it.
        reason: &'static str,
    },
    /// No other daemon came.
    #[error("the daemon is gone, and none came back to {path} in {} s", reconnect_time.as_secs())]
    NotReconnected {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        reconnect_time: Duration,
        /// What the last attempt met.
        #[source]
        source: Box<ClientError>,
    },
    /// A broken packet.
    #[error("the daemon's packet cannot be read")]
    Packet(#[from] PacketError),
    /// The daemon says no.
    #[error("{message}")]
    Refused {
        /// For programs.
        code: ErrorCode,
        /// For people.
        message: String,
    },
    /// A daemon of another version.
    #[error("the daemon speaks protocol {theirs}, this program {PROTOCOL}: use both from one release")]
    Protocol {
        /// The daemon's.
        theirs: u32,
    },
    /// An answer to another question.
    #[error("the daemon's answer does not fit the request {request}")]
    Unexpected {
        /// The request.
        request: &'static str,
    },
    /// The frame socket cannot be made.
    #[error("the socket for frames cannot be made")]
    Socket(#[source] io::Error),
    /// An arena cannot be mapped.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The daemon gives huge pages, and this process cannot use them.
    #[error("{why}; and the daemon gives no ordinary pages instead")]
    HugePages {
        /// Why it cannot, and what to do.
        why: String,
        /// What the daemon says.
        #[source]
        source: Box<ClientError>,
    },
}

impl ClientError {
    pub(super) fn silent(path: &Path, waited: Duration, listener: Option<i32>) -> Self {
        Self::Silent {
            path: path.to_owned(),
            waited,
            listener,
        }
    }

    /// Whether the connection is broken.
    fn is_disconnect(&self) -> bool {
        matches!(self, Self::Closed | Self::Packet(PacketError::Io(_)))
    }

    /// Whether it may be otherwise in a moment, with a daemon that is just being started.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Busy { .. } | Self::Silent { .. } | Self::Gone { .. } => true,
            Self::Refused { code, .. } => *code == ErrorCode::NotYet,
            error => error.is_disconnect(),
        }
    }
}

/// How often something is asked again that the daemon does not have yet.
const NOT_YET: Duration = Duration::from_millis(100);

/// How long the daemon may take to register a worker: its socket is looked at and put into the kernel's map outside of the
/// registry's task.
const ANSWER_TO_REGISTER: Duration = Duration::from_secs(60);

/// How long whoever does not wait for a daemon that is away waits for one that is there.
const ANSWER_NOW: Duration = Duration::from_secs(2);

/// How long a worker of a job under way waits for an answer: frames flow without the daemon, and one that was stopped for a while
/// costs no job.
const ANSWER_TO_WORKER: Duration = Duration::from_secs(300);

/// A connection to the daemon. Requests are answered in order; events that come in between wait for
/// [`event`](Self::event).
///
/// A worker of a daemon whose plane is pinned goes on when that daemon is gone: it comes back to the next one by itself,
/// and what it asks or waits for meanwhile takes so much longer.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    link: Link,
    events: VecDeque<Event>,
    welcome: Welcome,
    reconnect_time: Duration,
    /// Whether requests wait for the next daemon.
    waits: bool,
    job_name: Option<String>,
    identity: Option<Arc<Identity>>,
    /// Whether this process may come back to a daemon that is started next.
    reconnects: bool,
    /// Whether this process is a worker, of a job under way.
    is_worker: bool,
    /// Requests that the daemon has and has not answered. It answers in their order: all but the last of these answers come too
    /// late for whoever asked.
    unanswered: u32,
    /// Why nothing of this process outlives the daemon.
    no_reconnect: &'static str,
}

#[derive(Debug)]
enum Link {
    Connected(PacketSocket),
    Reconnecting(Reconnect),
    Lost,
}

/// This process as a worker.
#[derive(Debug)]
pub struct Registration {
    /// Who it is.
    pub worker: WorkerId,
    /// The job's maker as a worker, the coordinator.
    pub owner: WorkerId,
    /// Where its frames come and go.
    pub frames: FrameSocket,
}

/// An arena that was just made.
#[derive(Debug)]
pub struct CreatedArena {
    /// The arena, mapped and sealed.
    pub arena: OwnedArena,
    /// Bytes of the pages behind it.
    pub page_bytes: u64,
    /// Why they are not huge, when they are not.
    pub note: Option<String>,
}

macro_rules! expect_reply {
    ($self:ident, $request:expr, $fds:expr, $pattern:pat => $value:expr) => {{
        let (reply, fds) = $self.request(&$request, $fds).await?;
        match (reply, fds) {
            $pattern => $value,
            _ => {
                return Err(ClientError::Unexpected {
                    request: stringify!($pattern),
                });
            }
        }
    }};
}

impl Client {
    /// Connects and says hello.
    ///
    /// # Errors
    /// If nobody listens at `path`, this user may not connect, or the daemon is of another version.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let (socket, welcome) = greet(path).await?;
        Ok(Self::welcomed(path.to_owned(), socket, welcome))
    }

    /// Says hello over a connection that is there already, of a process with itself: it ends with the daemon.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub async fn over(socket: PacketSocket) -> Result<Self, ClientError> {
        let (socket, welcome) = greet_over(socket).await?;
        let mut client = Self::welcomed(PathBuf::new(), socket, welcome);
        client.reconnects = false;
        client.no_reconnect = "it is of the daemon's own process";
        Ok(client)
    }

    fn welcomed(path: PathBuf, socket: PacketSocket, welcome: Welcome) -> Self {
        let no_reconnect = match (welcome.plane, welcome.pinned) {
            (PlaneKind::Relay, _) => "frames on the relay plane lie in the daemon's memory",
            (_, false) => "its maps are not pinned",
            (_, true) => "this process is not a worker yet",
        };
        Self {
            path,
            link: Link::Connected(socket),
            events: VecDeque::new(),
            welcome,
            reconnect_time: RECONNECT_TIME,
            waits: true,
            job_name: None,
            identity: None,
            reconnects: true,
            is_worker: false,
            unanswered: 0,
            no_reconnect,
        }
    }

    /// How long to wait for the next daemon when this one is gone: a minute, unless this says otherwise.
    pub fn set_reconnect_time(&mut self, reconnect_time: Duration) {
        self.reconnect_time = reconnect_time;
    }

    /// What the daemon said first.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Makes a job, which ends with this connection.
    ///
    /// # Errors
    /// If the daemon refuses.
    pub async fn create_job(&mut self, name: &str) -> Result<JobId, ClientError> {
        let request = Request::CreateJob {
            name: name.to_owned(),
        };
        let job = expect_reply!(self, request, &[], (Reply::JobCreated { job }, _) => job);
        self.job_name = Some(name.to_owned());
        Ok(job)
    }

    /// Makes this process a worker.
    ///
    /// # Errors
    /// If the daemon refuses: no such job, another user's, the name is taken, or the plane is full.
    pub async fn register(
        &mut self,
        job: JobId,
        role: &str,
        name: &str,
    ) -> Result<Registration, ClientError> {
        let (frames, to_daemon) = FrameSocket::pair_for(self.welcome.plane).map_err(ClientError::Socket)?;
        let request = Request::Register {
            job,
            role: role.to_owned(),
            name: name.to_owned(),
        };
        let fds = [to_daemon.as_raw_fd()];
        let (worker, owner) =
            expect_reply!(self, request, &fds, (Reply::Registered { worker, owner }, _) => (worker, owner));
        if self.welcome.pinned && self.reconnects {
            self.identity = Some(Arc::new(Identity {
                worker,
                role: role.to_owned(),
                name: name.to_owned(),
                job_name: self.job_name.clone(),
                socket: to_daemon,
                arenas: Vec::new(),
            }));
        }
        self.is_worker = true;
        Ok(Registration {
            worker,
            owner,
            frames,
        })
    }

    /// Makes this worker's arena, maps it and has it sealed.
    ///
    /// # Errors
    /// If the pool has not so much room, with the numbers.
    pub async fn create_arena(&mut self, layout: Layout) -> Result<CreatedArena, ClientError> {
        loop {
            match self.try_create_arena(layout).await {
                // Nobody knows it yet: the next daemon makes another.
                Err(ClientError::Closed) if self.may_reconnect() => self.connected().await?,
                created => return created,
            }
        }
    }

    async fn try_create_arena(&mut self, layout: Layout) -> Result<CreatedArena, ClientError> {
        let mut given = self.ask_for_arena(layout, None).await?;
        let mut arena = given.map();
        if let Err(error) = &arena
            && given.page_bytes == memfd::HUGE_PAGE_BYTES
        {
            let why = why_unusable(error);
            let refused = given.id;
            drop(given);
            let ordinary = self.ask_for_arena(layout, Some(refused)).await;
            given = ordinary.map_err(|error| match error {
                ClientError::Refused { .. } => ClientError::HugePages {
                    why: why.clone(),
                    source: Box::new(error),
                },
                error => error,
            })?;
            given.note = Some(why);
            arena = given.map();
        }
        let arena = arena?;
        let Given {
            id,
            file,
            page_bytes,
            note,
            ..
        } = given;
        expect_reply!(self, Request::SealArena { arena: id }, &[], (Reply::Done {}, _) => ());
        self.hold(HeldArena { arena: id, layout }, file)?;
        Ok(CreatedArena {
            arena,
            page_bytes,
            note,
        })
    }

    async fn ask_for_arena(
        &mut self,
        layout: Layout,
        instead_of: Option<ArenaId>,
    ) -> Result<Given, ClientError> {
        let request = Request::CreateArena { layout, instead_of };
        let (reply, fds) = self.request(&request, &[]).await?;
        match (reply, only(fds)) {
            (
                Reply::ArenaCreated {
                    arena: id,
                    page_bytes,
                    note,
                },
                Some(file),
            ) => Ok(Given {
                id,
                layout,
                file,
                page_bytes,
                note,
            }),
            _ => Err(ClientError::Unexpected {
                request: "create_arena",
            }),
        }
    }

    /// Keeps an arena's memfd for the next daemon.
    fn hold(&mut self, arena: HeldArena, memfd: File) -> Result<(), ClientError> {
        let Some(identity) = &mut self.identity else {
            return Ok(());
        };
        if Arc::get_mut(identity).is_none() {
            // A task that came back is only just letting go of it.
            let copied: io::Result<Identity> = identity.try_clone();
            *identity = Arc::new(copied.map_err(ClientError::Socket)?);
        }
        if let Some(identity) = Arc::get_mut(identity) {
            identity.arenas.push((arena, memfd));
        }
        Ok(())
    }

    /// Maps another worker's arena for reading.
    ///
    /// # Errors
    /// If there is no such arena, or it is another job's.
    pub async fn open_arena(&mut self, arena: ArenaId) -> Result<PeerArena, ClientError> {
        let (reply, fds) = self.request(&Request::OpenArena { arena }, &[]).await?;
        let Reply::ArenaOpened { owner, layout } = reply else {
            return Err(ClientError::Unexpected {
                request: "open_arena",
            });
        };
        let file = only(fds).ok_or(ClientError::Unexpected {
            request: "open_arena",
        })?;
        Ok(PeerArena::new(&file, arena, owner, layout)?)
    }

    /// Opens the gateway for the job that this connection made. Gives what lets workers in, and where it listens for
    /// TCP.
    ///
    /// # Errors
    /// If the address cannot be had or is not allowed, or the broker cannot be reached.
    pub async fn open_gateway(
        &mut self,
        p2p: Option<SocketAddr>,
        mqtt: Option<String>,
        object_bytes: u64,
    ) -> Result<(JobToken, Option<SocketAddr>), ClientError> {
        let request = Request::OpenGateway {
            p2p,
            mqtt,
            object_bytes,
        };
        let (token, p2p) =
            expect_reply!(self, request, &[], (Reply::GatewayOpened { token, p2p }, _) => (token, p2p));
        self.identity = None;
        self.no_reconnect = "its remote workers come through the daemon's gateway";
        let token = JobToken::from_hex(&token).ok_or(ClientError::Unexpected {
            request: "open_gateway",
        })?;
        Ok((token, p2p))
    }

    /// Names workers that may come through the job's gateway.
    ///
    /// # Errors
    /// If it is not open.
    pub async fn expect_workers(&mut self, workers: &[RemoteWorker]) -> Result<(), ClientError> {
        for page in workers.chunks(EXPECTED_PAGE) {
            let request = Request::ExpectWorkers {
                workers: page.to_vec(),
            };
            expect_reply!(self, request, &[], (Reply::Done {}, _) => ());
        }
        Ok(())
    }

    /// Says that a worker which came through the gateway is dead.
    ///
    /// # Errors
    /// If the gateway is not open.
    pub async fn drop_worker(&mut self, name: &str) -> Result<(), ClientError> {
        let request = Request::DropWorker {
            name: name.to_owned(),
        };
        expect_reply!(self, request, &[], (Reply::Done {}, _) => ());
        Ok(())
    }

    /// Everything that is registered, of one job or of all.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn status(&mut self, job: Option<JobId>) -> Result<Status, ClientError> {
        let mut whole: Option<Status> = None;
        loop {
            let after = whole
                .as_ref()
                .and_then(|status| Some(status.workers.last()?.worker));
            let request = Request::Status { job, after };
            let page = expect_reply!(self, request, &[], (Reply::Status(status), _) => status);
            let more = page.more && !page.workers.is_empty();
            match &mut whole {
                None => whole = Some(page),
                Some(status) => status.workers.extend(page.workers),
            }
            if !more {
                return whole.ok_or(ClientError::Closed);
            }
        }
    }

    /// As [`status`](Self::status), but `None` instead of waiting while there is no daemon, it does not answer, or its workers
    /// are still coming back.
    ///
    /// # Errors
    /// If the connection fails for good.
    pub async fn status_now(&mut self, job: Option<JobId>) -> Result<Option<Status>, ClientError> {
        let status = self.now(async |client| client.status(job).await).await?;
        Ok(status.filter(|status| status.daemon.awaited == 0))
    }

    /// What has moved in this connection's job; `None` as in [`status_now`](Self::status_now).
    ///
    /// # Errors
    /// If the connection fails for good, or has no job.
    pub async fn traffic_now(&mut self) -> Result<Option<JobTraffic>, ClientError> {
        let traffic = self.now(async |client| {
            Ok(expect_reply!(client, Request::Traffic {}, &[], (Reply::Traffic(traffic), _) => traffic))
        });
        Ok(traffic.await?.filter(|traffic| traffic.awaited == 0))
    }

    /// What is asked for, but `None` instead of waiting for a daemon.
    async fn now<T>(
        &mut self,
        ask: impl AsyncFnOnce(&mut Self) -> Result<T, ClientError>,
    ) -> Result<Option<T>, ClientError> {
        if matches!(self.link, Link::Reconnecting(_)) || self.unanswered > 0 {
            // What is late is taken by whoever waits for events.
            return Ok(None);
        }
        self.waits = false;
        let answer = ask(self).await;
        self.waits = true;
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(ClientError::Closed) if self.may_reconnect() => Ok(None),
            // It is stopped, or very slow; the job goes on meanwhile.
            Err(ClientError::Silent { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Flame's workers that this user may see; `None` if the daemon does not serve them.
    ///
    /// # Errors
    /// If the connection fails.
    pub async fn flame(&mut self) -> Result<Option<FlamePage>, ClientError> {
        let mut whole: Option<FlamePage> = None;
        loop {
            let last = whole.as_ref().and_then(|page| page.workers.last());
            let after = last.map(|worker| (worker.uid, worker.id));
            let request = Request::Flame { after };
            let page = expect_reply!(self, request, &[], (Reply::Flame { page }, _) => page);
            let Some(page) = page else { return Ok(whole) };
            let more = page.more && !page.workers.is_empty();
            match &mut whole {
                None => whole = Some(page),
                Some(whole) => whole.workers.extend(page.workers),
            }
            if !more {
                return Ok(whole);
            }
        }
    }

    /// Ends the job that this connection made.
    ///
    /// # Errors
    /// If it made none; or if the daemon is gone: the job ends with this process then.
    pub async fn end_job(&mut self, reason: &str) -> Result<(), ClientError> {
        if !matches!(self.link, Link::Connected(_)) {
            return Err(ClientError::Closed);
        }
        let request = Request::EndJob {
            reason: reason.to_owned(),
        };
        expect_reply!(self, request, &[], (Reply::Done {}, _) => ());
        Ok(())
    }

    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// If the daemon is gone, and no other takes its place.
    pub async fn event(&mut self) -> Result<Event, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let received = match &self.link {
                Link::Connected(socket) => socket.recv::<Message>().await,
                _ => {
                    self.connected().await?;
                    continue;
                }
            };
            match received.map_err(ClientError::from) {
                Ok(Some((Message::Event(event), _))) => return Ok(event),
                Ok(Some((Message::Reply(_), _))) if self.unanswered > 0 => self.unanswered -= 1,
                Ok(Some((Message::Reply(_), _))) => return Err(ClientError::Unexpected { request: "none" }),
                Ok(None) => self.disconnected()?,
                Err(error) if error.is_disconnect() => self.disconnected()?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a request and waits for its answer. What changes nothing is asked again, of the next daemon if need be.
    async fn request(
        &mut self,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let repeatable = matches!(
            request,
            Request::OpenArena { .. } | Request::Status { .. } | Request::Traffic {} | Request::Flame { .. }
        );
        let given_up = Instant::now() + self.reconnect_time;
        loop {
            self.connected().await?;
            match self
                .exchange_within(self.answer_within(request), request, fds)
                .await
            {
                Err(ClientError::Refused {
                    code: ErrorCode::NotYet,
                    ..
                }) if repeatable && Instant::now() < given_up => tokio::time::sleep(NOT_YET).await,
                Err(error) if error.is_disconnect() => {
                    self.disconnected()?;
                    if !repeatable || !self.waits {
                        return Err(ClientError::Closed);
                    }
                }
                answer => return answer,
            }
        }
    }

    /// How long the daemon may take to answer.
    fn answer_within(&self, request: &Request) -> Duration {
        match request {
            // The daemon itself, in whose process this is.
            _ if !self.reconnects => Duration::MAX,
            Request::EndJob { .. } => ANSWER,
            // Whoever asks does something else instead.
            _ if !self.waits => ANSWER_NOW,
            _ if self.is_worker => ANSWER_TO_WORKER,
            Request::Register { .. } => ANSWER_TO_REGISTER,
            _ => ANSWER,
        }
    }

    async fn exchange_within(
        &mut self,
        limit: Duration,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        if let Some(answer) = within(limit, self.exchange(request, fds)).await {
            return answer;
        }
        let listener = match &self.link {
            Link::Connected(socket) => listener_of(socket),
            _ => None,
        };
        Err(ClientError::silent(&self.path, limit, listener))
    }

    async fn exchange(
        &mut self,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let Link::Connected(socket) = &self.link else {
            return Err(ClientError::Closed);
        };
        socket.send(request, fds).await?;
        self.unanswered += 1;
        loop {
            let (message, fds) = socket.recv::<Message>().await?.ok_or(ClientError::Closed)?;
            if let Message::Reply(_) = message {
                self.unanswered = self.unanswered.saturating_sub(1);
            }
            match message {
                Message::Event(event) => self.events.push_back(event),
                Message::Reply(_) if self.unanswered > 0 => {}
                Message::Reply(Reply::Error { code, message }) => {
                    return Err(ClientError::Refused { code, message });
                }
                Message::Reply(reply) => return Ok((reply, fds)),
            }
        }
    }

    fn may_reconnect(&self) -> bool {
        self.identity.is_some() && !matches!(self.link, Link::Lost)
    }

    /// The daemon is gone.
    fn disconnected(&mut self) -> Result<(), ClientError> {
        let Some(identity) = &self.identity else {
            self.link = Link::Lost;
            return Err(self.gone());
        };
        let reconnect = Reconnect::start(self.path.clone(), Arc::clone(identity), self.reconnect_time);
        self.link = Link::Reconnecting(reconnect);
        Ok(())
    }

    /// Waits until there is a daemon. Cancel-safe.
    async fn connected(&mut self) -> Result<(), ClientError> {
        let reattached = match &mut self.link {
            Link::Connected(_) => return Ok(()),
            Link::Lost => return Err(self.gone()),
            Link::Reconnecting(reconnect) => reconnect.wait().await,
        };
        self.link = Link::Lost;
        let Reattached {
            socket,
            welcome,
            events,
        } = reattached?;
        self.link = Link::Connected(socket);
        self.unanswered = 0;
        self.welcome = welcome;
        self.events.extend(events);
        Ok(())
    }

    fn gone(&self) -> ClientError {
        match &self.identity {
            Some(_) => ClientError::Closed,
            None => ClientError::Gone {
                reason: self.no_reconnect,
            },
        }
    }
}

/// An arena's memory, as the daemon gives it.
struct Given {
    id: ArenaId,
    layout: Layout,
    file: File,
    page_bytes: u64,
    note: Option<String>,
}

impl Given {
    /// Maps it. Huge pages are all given now: one that this process's control group does not allow is an error here, and would
    /// be a `SIGBUS` when it is first written. (Ordinary ones have no limit of that kind.)
    fn map(&self) -> Result<OwnedArena, ArenaError> {
        let arena = OwnedArena::new(&self.file, self.id, self.layout)?;
        if self.page_bytes == memfd::HUGE_PAGE_BYTES {
            arena.touch()?;
        }
        Ok(arena)
    }
}

/// Why this process cannot use the huge pages of its arena.
fn why_unusable(error: &ArenaError) -> String {
    match Cgroups::current().huge_pages() {
        Some(limit) => format!(
            "{} allows this worker {} huge pages of 2 MiB, and {} are in use: {}",
            limit.by,
            limit.allowed / memfd::HUGE_PAGE_BYTES,
            limit.used.div_ceil(memfd::HUGE_PAGE_BYTES),
            limit.remedy
        ),
        None => {
            let cause = error.source().map(|source| format!(": {source}"));
            format!(
                "this worker cannot use huge pages: {error}{}",
                cause.unwrap_or_default()
            )
        }
    }
}

/// The one descriptor that belongs beside an answer.
fn only(fds: Vec<OwnedFd>) -> Option<File> {
    let mut fds = fds.into_iter();
    let first = fds.next()?;
    fds.next().is_none().then(|| File::from(first))
}
