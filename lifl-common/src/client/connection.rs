//! A process's connection to its daemon.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use super::FrameSocket;
use crate::arena::{ArenaError, Layout, OwnedArena, PeerArena};
use crate::control::packet::{PacketError, PacketSocket};
use crate::control::{
    ErrorCode, Event, FlamePage, Message, PROTOCOL, RemoteWorker, Reply, Request, Status, Welcome,
};
use crate::id::{ArenaId, JobId, WorkerId};
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
    /// The daemon is gone.
    #[error("the daemon closed the control socket")]
    Closed,
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
}

/// A connection to the daemon. Requests are answered in order; events that come in between wait for
/// [`event`](Self::event).
#[derive(Debug)]
pub struct Client {
    socket: PacketSocket,
    events: VecDeque<Event>,
    welcome: Welcome,
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
        let connected = PacketSocket::connect(path);
        let socket = connected.map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let hello = Request::Hello { protocol: PROTOCOL };
        socket.send(&hello, &[]).await?;
        let welcome = match socket.recv::<Message>().await?.ok_or(ClientError::Closed)?.0 {
            Message::Reply(Reply::Welcome(welcome)) => welcome,
            Message::Reply(Reply::Error { code, message }) => {
                return Err(ClientError::Refused { code, message });
            }
            _ => return Err(ClientError::Unexpected { request: "hello" }),
        };
        if welcome.protocol != PROTOCOL {
            return Err(ClientError::Protocol {
                theirs: welcome.protocol,
            });
        }
        Ok(Self {
            socket,
            events: VecDeque::new(),
            welcome,
        })
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
        Ok(expect_reply!(self, request, &[], (Reply::JobCreated { job }, _) => job))
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
        let (reply, fds) = self.request(&Request::CreateArena { layout }, &[]).await?;
        let Reply::ArenaCreated {
            arena: id,
            page_bytes,
            note,
        } = reply
        else {
            return Err(ClientError::Unexpected {
                request: "create_arena",
            });
        };
        let file = only(fds).ok_or(ClientError::Unexpected {
            request: "create_arena",
        })?;
        let arena = OwnedArena::new(&file, id, layout)?;
        expect_reply!(self, Request::SealArena { arena: id }, &[], (Reply::Done {}, _) => ());
        Ok(CreatedArena {
            arena,
            page_bytes,
            note,
        })
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
    /// If it made none.
    pub async fn end_job(&mut self, reason: &str) -> Result<(), ClientError> {
        let request = Request::EndJob {
            reason: reason.to_owned(),
        };
        expect_reply!(self, request, &[], (Reply::Done {}, _) => ());
        Ok(())
    }

    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// If the daemon is gone.
    pub async fn event(&mut self) -> Result<Event, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        match self.socket.recv::<Message>().await?.ok_or(ClientError::Closed)?.0 {
            Message::Event(event) => Ok(event),
            Message::Reply(_) => Err(ClientError::Unexpected { request: "none" }),
        }
    }

    /// Sends a request and waits for its answer.
    async fn request(
        &mut self,
        request: &Request,
        fds: &[RawFd],
    ) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        self.socket.send(request, fds).await?;
        loop {
            let (message, fds) = self.socket.recv::<Message>().await?.ok_or(ClientError::Closed)?;
            match message {
                Message::Event(event) => self.events.push_back(event),
                Message::Reply(Reply::Error { code, message }) => {
                    return Err(ClientError::Refused { code, message });
                }
                Message::Reply(reply) => return Ok((reply, fds)),
            }
        }
    }
}

/// The one descriptor that belongs beside an answer.
fn only(fds: Vec<OwnedFd>) -> Option<File> {
    let mut fds = fds.into_iter();
    let first = fds.next()?;
    fds.next().is_none().then(|| File::from(first))
}
