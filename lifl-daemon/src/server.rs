//! The control socket: who may connect, and the tasks that carry packets to the registry and back.
//!
//! ```text
//!   listener ──accept──▶ one task a connection ──commands──▶ registry task ──▶ plane, pool
//!                              ▲                                  │
//!                              └────────── bounded queue ─────────┘
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lifl_common::control::packet::{MAX_BYTES, PacketError, PacketSocket};
use lifl_common::control::paths;
use lifl_common::control::{ErrorCode, Message, Reply, Request};
use lifl_common::frame::Frame;
use lifl_common::plane::PlaneKind;
use lifl_common::watch::watch;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockname, getsockopt,
    listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::fchownat;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::Watch;
use crate::accounts;
use crate::chain::error_chain;
use crate::errands::{self, Foreign};
use crate::flame::Desk;
use crate::gateway::Opened;
use crate::limits;
use crate::mailbox::{Account, Accounts, Letter, Mailbox};
use crate::plane;
use crate::refusals::{may_log, plain};
use crate::registry::quota::{Quotas, Use, Want};
use crate::registry::reattach::CHECK;
use crate::registry::{Beside, ConnId, Outgoing, Peer, Registry};
use crate::turns::Turns;

/// Bytes in the kernel that wait for one client. It takes them twice, for its own part of each packet.
const SEND_BUFFER: usize = MAX_BYTES / 2 + 1024;

/// How long a client may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the daemon takes to turn somebody away.
const TURNED_AWAY: Duration = Duration::from_millis(100);

/// How often it is looked who still has the memory of workers that have left.
const DEPARTURES: Duration = Duration::from_millis(20);

/// How long clients have to leave when the daemon ends.
const DRAIN: Duration = Duration::from_secs(3);

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another daemon is there.
    #[error("another daemon listens at {0}: stop it, or give --socket another path")]
    InUse(PathBuf),
    /// No address can hold its path.
    #[error(
        "the control socket's path {path} has {bytes} bytes, and may have {}: give --socket a shorter one",
        paths::MAX_PATH_BYTES
    )]
    TooLong {
        /// The socket.
        path: PathBuf,
        /// The path's bytes.
        bytes: usize,
    },
    /// What was handed over is something else.
    #[error("the socket that the service manager hands over is not one to listen at: {0}")]
    NotAListener(&'static str),
    /// A call failed.
    #[error("{call} for the control socket {path} failed")]
    System {
        /// The call.
        call: &'static str,
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A listening control socket; its file goes when it does, unless it was handed over.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: AsyncFd<OwnedFd>,
    path: PathBuf,
    own: bool,
}

impl Listener {
    /// [Listens](listen_at) at `path`.
    pub(crate) fn bind(path: &Path, mode: u32, group: Option<nix::unistd::Gid>) -> Result<Self, ListenError> {
        let fd = listen_at(path, mode, group)?;
        // Only now: epoll would find a socket that does not listen yet hung up, and tokio would remember that for good.
        let fd = watch(fd).map_err(|source| ListenError::System {
            call: "epoll_ctl",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            fd,
            path: path.to_owned(),
            own: true,
        })
    }

    /// Takes a socket that listens already. Its file, mode and group are its maker's affair.
    pub(crate) fn take(fd: OwnedFd) -> Result<Self, ListenError> {
        let failed = |call, source| ListenError::System {
            call,
            path: PathBuf::from("that was handed over"),
            source,
        };
        let option = |errno: Errno| failed("getsockopt", errno.into());
        let address: Result<UnixAddr, _> = getsockname(fd.as_raw_fd());
        let Some(path) = address.ok().and_then(|address| Some(address.path()?.to_owned())) else {
            return Err(ListenError::NotAListener("it is no Unix socket with a path"));
        };
        if getsockopt(&fd, sockopt::SockType).map_err(option)? != SockType::SeqPacket {
            return Err(ListenError::NotAListener(
                "its type is not SOCK_SEQPACKET (ListenSequentialPacket= in a unit)",
            ));
        }
        if !getsockopt(&fd, sockopt::AcceptConn).map_err(option)? {
            return Err(ListenError::NotAListener("it does not listen"));
        }
        let set = |errno: Errno| failed("fcntl", errno.into());
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(set)?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(set)?;
        let fd = watch(fd).map_err(|source| failed("epoll_ctl", source))?;
        Ok(Self { fd, path, own: false })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    async fn accept(&self) -> io::Result<(Line, Peer)> {
        let fd = loop {
            let mut ready = self.fd.readable().await?;
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let accept = |fd: &AsyncFd<OwnedFd>| {
                // accept4 takes a descriptor before it looks whether somebody waits: without this it would fail for want of
                // one when nobody does.
                match is_waited_for(fd.get_ref())? {
                    true => accept4(fd.as_raw_fd(), flags).map_err(io::Error::from),
                    false => Err(io::ErrorKind::WouldBlock.into()),
                }
            };
            match ready.try_io(accept) {
                Ok(accepted) => break accepted?,
                Err(_would_block) => continue,
            }
        };
        // SAFETY: accept4 has just made this descriptor for this call; nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Room for a packet: what more waits for who does not read is counted by its mailbox.
        setsockopt(&fd, sockopt::SndBuf, &SEND_BUFFER)?;
        let credentials = getsockopt(&fd.as_fd(), sockopt::PeerCredentials)?;
        let peer = Peer::new(credentials.pid(), credentials.uid());
        Ok((Line::new(PacketSocket::new(fd)?, peer), peer))
    }
}

/// The daemon's end of a client's connection. What lies unread in it when it is closed is the client's to wait for.
struct Line {
    /// `None` only once it is being dropped.
    socket: Option<PacketSocket>,
    uid: u32,
}

impl Line {
    fn new(socket: PacketSocket, peer: Peer) -> Self {
        Self {
            socket: Some(socket),
            uid: peer.uid,
        }
    }

    fn socket(&self) -> &PacketSocket {
        self.socket.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(socket) = self.socket.take() {
            errands::close_own(self.uid, socket.into_inner());
        }
    }
}

/// The way to the registry for this process's own proxies. Nothing beyond the process has it: whoever comes through it need
/// not show who it is.
#[derive(Clone, Debug)]
pub(crate) struct Lobby(mpsc::Sender<(u32, PacketSocket)>);

/// Connections of the daemon's own that wait to be accepted.
const LOBBY: usize = 64;

/// The way in, and where those come out that took it.
pub(crate) fn lobby() -> (Lobby, mpsc::Receiver<(u32, PacketSocket)>) {
    let (enter, entered) = mpsc::channel(LOBBY);
    (Lobby(enter), entered)
}

impl Lobby {
    /// A connection with the registry, for a job of that user's.
    ///
    /// # Errors
    /// If the process is out of descriptors, or the daemon ends.
    pub(crate) async fn enter(&self, uid: u32) -> io::Result<PacketSocket> {
        let (near, far) = PacketSocket::pair()?;
        let sent = self.0.send((uid, far)).await;
        sent.map_err(|_| io::Error::other("the daemon is stopping"))?;
        Ok(near)
    }
}

/// Makes a socket that listens at `path`, whose folder is made if need be. A socket file that nobody listens at is replaced.
///
/// # Errors
/// If the folder cannot be used or written to, or another daemon listens there.
pub fn listen_at(path: &Path, mode: u32, group: Option<nix::unistd::Gid>) -> Result<OwnedFd, ListenError> {
    let failed = |call, source| ListenError::System {
        call,
        path: path.to_owned(),
        source,
    };
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > paths::MAX_PATH_BYTES {
        return Err(ListenError::TooLong {
            path: path.to_owned(),
            bytes,
        });
    }
    make_folder(folder).map_err(|source| failed("mkdir", source))?;
    // Made beside and put in its place when it is complete: whoever finds a socket there that nobody listens at
    // may be sure that its daemon is gone.
    let beside = Temporary::new(folder);
    let address = UnixAddr::new(&beside.0).map_err(|errno| failed("sockaddr_un", errno.into()))?;
    let fd = new_socket().map_err(|errno| failed("socket", errno.into()))?;
    bind(fd.as_raw_fd(), &address).map_err(|errno| failed("bind", errno.into()))?;
    // Through a descriptor: where others may write to the folder, the name may be a link to something else by now.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let file = open(&beside.0, flags, Mode::empty()).map_err(|errno| failed("open", errno.into()))?;
    let found = fstat(&file).map_err(|errno| failed("fstat", errno.into()))?;
    if SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
        return Err(failed(
            "open",
            io::Error::other("somebody has put another file in its place"),
        ));
    }
    if group.is_some() {
        let changed = fchownat(&file, "", None, group, AtFlags::AT_EMPTY_PATH);
        changed.map_err(|errno| failed("chown", errno.into()))?;
    }
    let permissions = std::fs::Permissions::from_mode(mode);
    let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(by_descriptor, permissions).map_err(|source| failed("chmod", source))?;
    listen(&fd, Backlog::MAXCONN).map_err(|errno| failed("listen", errno.into()))?;
    match std::fs::hard_link(&beside.0, path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if is_listened_at(path).map_err(|source| failed("connect", source))? {
                return Err(ListenError::InUse(path.to_owned()));
            }
            std::fs::rename(&beside.0, path).map_err(|source| failed("rename", source))?;
        }
        Err(source) => return Err(failed("link", source)),
    }
    Ok(fd)
}

/// Whether somebody waits to be accepted.
fn is_waited_for(listener: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut polled, PollTimeout::ZERO)? > 0)
}

fn new_socket() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
}

/// Whether a daemon is behind a socket's file. Only a refusal says no: a daemon too busy to accept is one.
fn is_listened_at(path: &Path) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is a file that is not a socket",
        ));
    }
    let probe = new_socket()?;
    Ok(connect(probe.as_raw_fd(), &UnixAddr::new(path)?) != Err(Errno::ECONNREFUSED))
}

/// A name beside a socket's, which is gone when this is.
struct Temporary(PathBuf);

impl Temporary {
    fn new(folder: &Path) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        Self(folder.join(format!(".{pid}-{count}")))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed, it is not there.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if !self.own {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), "the control socket's file stays: {error}");
        }
    }
}

fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        // A folder for everybody's files is an administrator's choice; one of ours must be ours.
        let ours = paths::places().iter().any(|place| place.folder == folder);
        if ours && !paths::is_trusted(folder) {
            return Err(io::Error::other(
                "it is another user's, or others may write to it: remove it",
            ));
        }
        return Ok(());
    }
    std::fs::create_dir_all(folder)?;
    // The system's folder is for all users, the socket's own mode decides; a user's is for that user.
    let mode = if nix::unistd::geteuid().is_root() {
        0o755
    } else {
        0o700
    };
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(mode))
}

enum Command {
    Connected(ConnId, Peer, Mailbox, CancellationToken),
    /// A request, and its place among those of its user that are under way.
    Request(ConnId, Request, Beside, OwnedSemaphorePermit),
    /// What somebody else than the registry answers.
    Answer(ConnId, Reply),
    Closed(ConnId),
}

/// What the registry is served beside.
pub(crate) struct Others {
    /// Frames that the plane did not deliver.
    pub(crate) dead_letters: mpsc::Receiver<Frame>,
    /// Proxies that have come through the lobby.
    pub(crate) own: mpsc::Receiver<(u32, PacketSocket)>,
    /// Doors that the gateway has opened, or could not.
    pub(crate) opened: mpsc::UnboundedReceiver<Opened>,
    /// Flame's workers, where they are served.
    pub(crate) flame: Option<Desk>,
    /// Who is told how the daemon is.
    pub(crate) watch: Option<Watch>,
}

/// How many may be connected, in all and of each user.
pub(crate) struct Connections {
    max: u32,
    quotas: Quotas,
    of: Arc<Mutex<HashMap<u32, u32>>>,
    accounts: Accounts,
}

impl Connections {
    pub(crate) fn new(max: u32, quotas: Quotas) -> Self {
        Self {
            max,
            quotas,
            of: Arc::default(),
            accounts: Accounts::default(),
        }
    }

    /// A place for a connection, for as long as the result lives.
    ///
    /// # Errors
    /// Why there is none, for the one who asks.
    fn admit(&self, peer: Peer) -> Result<Place, String> {
        // The daemon's own, which come of its gateway, are as many as a job has workers there.
        let uid = (!peer.is_own()).then_some(peer.account);
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(uid) = uid {
            if of.values().sum::<u32>() >= self.max {
                return Err(format!(
                    "the daemon has {} connections, as many as it may: end another job, or start it with a larger \
                     --max-workers",
                    self.max
                ));
            }
            let used = Use {
                connections: of.get(&uid).copied().unwrap_or(0),
                ..Use::default()
            };
            let admitted = self.quotas.admit(uid, &used, Want::Connection);
            admitted.map_err(|error| error.to_string())?;
            if used.connections >= self.quotas.descriptors_of(uid) {
                return Err(limits::descriptors());
            }
            *of.entry(uid).or_default() += 1;
        }
        Ok(Place {
            uid,
            of: Arc::clone(&self.of),
            account: self.accounts.of(peer.account),
        })
    }
}

/// A connection's place; dropping it makes room.
struct Place {
    uid: Option<u32>,
    of: Arc<Mutex<HashMap<u32, u32>>>,
    account: Arc<Account>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(uid) = self.uid else { return };
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = of.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                of.remove(&uid);
            }
        }
    }
}

/// A descriptor that is kept so that there is one to turn somebody away with when there are no others.
struct Spare(Option<File>);

impl Spare {
    fn new() -> Self {
        Self(File::open("/dev/null").ok())
    }

    /// Takes the descriptor of the one who was turned away, which another thread is just closing.
    async fn regain() -> Self {
        const LOOK: Duration = Duration::from_millis(1);
        let mut spare = Self::new();
        let mut looks = 0;
        while spare.0.is_none() && looks < 100 {
            tokio::time::sleep(LOOK).await;
            spare = Self::new();
            looks += 1;
        }
        spare
    }
}

/// Serves until `shutdown`, then lets clients leave and gives the registry back.
pub(crate) async fn serve(
    listener: Listener,
    mut registry: Registry,
    Others {
        mut dead_letters,
        mut opened,
        own,
        flame,
        watch,
    }: Others,
    connections: Connections,
    shutdown: CancellationToken,
) -> Registry {
    let commands = Turns::new();
    let tasks = TaskTracker::new();
    let accepting = shutdown.child_token();
    tasks.spawn(accept(
        listener,
        own,
        commands.clone(),
        tasks.clone(),
        connections,
        registry.plane_kind(),
        accepting,
    ));
    let mut mailboxes: HashMap<ConnId, (Mailbox, CancellationToken)> = HashMap::new();
    let mut errands_done = registry.take_done();
    let mut draining = false;
    let mut jobs_stay = false;
    let mut check = tokio::time::interval(CHECK);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut departures = tokio::time::interval(DEPARTURES);
    departures.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut retrying: Option<JoinHandle<()>> = None;
    let (mut beat, mut tell) = match watch {
        Some(Watch { every, tell }) => (tokio::time::interval(every), Some(tell)),
        None => (tokio::time::interval(Duration::MAX), None),
    };
    let drained = tokio::time::sleep(Duration::MAX);
    tokio::pin!(drained);
    loop {
        tokio::select! {
            command = commands.next() => match command {
                Command::Connected(id, peer, mailbox, kick) => {
                    registry.connected(id, peer);
                    mailboxes.insert(id, (mailbox, kick));
                }
                Command::Request(id, Request::Flame { after }, ..) => {
                    if let Some(Peer { uid, account, .. }) = registry.may_ask(id) {
                        let (flame, answers) = (flame.clone(), commands.clone());
                        tasks.spawn(async move {
                            let page = match flame {
                                Some(flame) => flame.page(uid, after).await,
                                None => None,
                            };
                            let _ = answers.push(account, Command::Answer(id, Reply::Flame { page }));
                        });
                    }
                }
                Command::Request(id, request, beside, _under_way) => registry.request(id, request, beside),
                Command::Answer(id, reply) => registry.reply(id, reply, None),
                Command::Closed(id) => {
                    if let Some((mailbox, _)) = mailboxes.remove(&id) {
                        mailbox.clear();
                    }
                    registry.closed(id);
                }
            },
            Some(done) = errands_done.recv() => registry.done(done),
            _ = departures.tick(), if registry.has_departed() => registry.check_departed(),
            Some(frame) = dead_letters.recv() => registry.dead_letter(&frame),
            Some(opened) = opened.recv() => registry.gateway_opened(opened),
            () = shutdown.cancelled(), if !draining => {
                draining = true;
                jobs_stay = registry.leave_jobs();
                drained.as_mut().reset(tokio::time::Instant::now() + DRAIN);
            }
            _ = beat.tick(), if tell.is_some() => {
                if let Some(tell) = &mut tell {
                    tell(&registry.vitals());
                }
            }
            now = check.tick() => {
                if errands::have_stuck() && retrying.as_ref().is_none_or(JoinHandle::is_finished) {
                    retrying = Some(tokio::task::spawn_blocking(errands::retry));
                }
                registry.refresh();
                if registry.awaits() {
                    registry.check_awaited(now);
                }
            }
            () = &mut drained, if draining => {
                tracing::warn!(left = registry.connections(), "clients did not leave in time");
                break;
            }
        }
        for Outgoing { to, message, fd } in registry.take_outbox() {
            if let Some((mailbox, kick)) = mailboxes.get(&to)
                && !kick.is_cancelled()
                && mailbox.push(Letter { message, fd }).is_err()
            {
                kick.cancel();
                mailbox.clear();
                let uid = registry.uid_of(to);
                if let Some(dropped) = may_log(uid) {
                    tracing::warn!(uid, dropped, "a client does not read its messages: disconnected");
                }
            }
        }
        if draining && registry.is_deserted(jobs_stay) {
            break;
        }
    }
    if jobs_stay {
        tracing::info!("jobs go on without this daemon, until the next one is started");
    }
    for (_, kick) in mailboxes.values() {
        kick.cancel();
    }
    commands.close();
    tasks.close();
    tasks.wait().await;
    registry
}

async fn accept(
    listener: Listener,
    mut own: mpsc::Receiver<(u32, PacketSocket)>,
    commands: Turns<Command>,
    tasks: TaskTracker,
    connections: Connections,
    plane: PlaneKind,
    shutdown: CancellationToken,
) {
    let mut spare = Spare::new();
    let mut last = 0;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
            Some((uid, socket)) = own.recv() => {
                let peer = Peer::own(uid);
                Ok((Line::new(socket, peer), peer))
            }
        };
        accounts::refresh();
        let (line, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_out_of_descriptors(&error) && spare.0.is_some() => {
                // Who waits to be accepted would wait for ever: it is told, with the descriptor that was kept for this.
                spare.0 = None;
                let Ok(Ok((line, peer))) = tokio::time::timeout(TURNED_AWAY, listener.accept()).await else {
                    spare = Spare::new();
                    continue;
                };
                spare = Spare::new();
                if spare.0.is_none() {
                    turn_away(line, peer, limits::descriptors()).await;
                    spare = Spare::regain().await;
                    continue;
                }
                // Some have become free meanwhile.
                (line, peer)
            }
            Err(error) => {
                // What is connected must go on, so wait for somebody to leave.
                tracing::error!("accept on the control socket failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                if spare.0.is_none() {
                    spare = Spare::new();
                }
                continue;
            }
        };
        let place = match connections.admit(peer) {
            Ok(place) => place,
            Err(why) => {
                turn_away(line, peer, why).await;
                continue;
            }
        };
        last += 1;
        let id = ConnId(last);
        let mailbox = Mailbox::new(Arc::clone(&place.account));
        let kick = CancellationToken::new();
        let connected = Command::Connected(id, peer, mailbox.clone(), kick.clone());
        if commands.push(peer.account, connected).is_err() {
            return;
        }
        let commands = commands.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = kick.cancelled() => {}
                () = converse(line.socket(), (id, peer, plane), &commands, &mailbox, &place.account) => {}
            }
            // Who hears that there is room again finds it.
            drop((line, place));
            let _ = commands.push(peer.account, Command::Closed(id));
        });
    }
}

fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// Tells somebody who cannot be let in why. It does not wait for anybody: there is room for one packet.
async fn turn_away(line: Line, peer: Peer, message: String) {
    if let Some(dropped) = may_log(peer.uid) {
        tracing::warn!(
            pid = peer.pid,
            uid = peer.uid,
            dropped,
            "connection refused: {}",
            plain(&message)
        );
    }
    let code = ErrorCode::Full;
    let reply = Message::Reply(Reply::Error { code, message });
    let _ = tokio::time::timeout(TURNED_AWAY, line.socket().send(&reply, &[])).await;
}

/// A client's request, or what is wrong with its packet, and the descriptors beside it. From here on whoever drops those does
/// not wait for them.
type Asked = (Result<Request, PacketError>, Vec<Foreign>, OwnedSemaphorePermit);

/// Waits for a client's next packet, and for its place among its user's; `None` when it has left. Cancel-safe.
///
/// The places are why one user's thousands of connections do not keep the runtime's threads from another's one.
async fn next_packet(socket: &PacketSocket, peer: Peer, account: &Account) -> io::Result<Option<Asked>> {
    loop {
        socket.readable().await?;
        errands::until_closed(peer.uid).await;
        let place = Arc::clone(&account.requests).acquire_owned().await;
        let place = place.map_err(io::Error::other)?;
        let mut packet = match socket.try_recv_packet() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            packet => packet?,
        };
        let request = (!packet.is_end()).then(|| packet.message());
        let foreign = packet.fds.drain(..);
        let foreign: Vec<Foreign> = foreign.map(|fd| Foreign::new(peer.uid, fd)).collect();
        return Ok(request.map(|request| (request, foreign, place)));
    }
}

/// Has the first descriptor looked at, a worker's socket, on a thread of its user's. Of one that comes back only the identity is
/// needed.
///
/// # Errors
/// Why there is no thread for that.
async fn examined(
    plane: PlaneKind,
    peer: Peer,
    request: &Request,
    mut fds: Vec<Foreign>,
) -> Result<Beside, String> {
    if fds.is_empty() {
        return Ok(Beside::default());
    }
    let socket = fds.remove(0);
    let look = match request {
        Request::Reattach { .. } => plane::identify,
        _ => plane::examine,
    };
    let socket = errands::answer(peer.uid, move || look(plane, socket)).await?;
    Ok(Beside {
        socket: Some(socket),
        fds,
    })
}

/// Whether descriptors belong beside a request.
fn takes_descriptors(request: &Request) -> bool {
    matches!(request, Request::Register { .. } | Request::Reattach { .. })
}

/// Carries one client's packets until it leaves or misbehaves. One request is under way at a time, so that answers
/// come in the requests' order and nobody fills the registry's queue alone.
async fn converse(
    socket: &PacketSocket,
    (id, peer, plane): (ConnId, Peer, PlaneKind),
    commands: &Turns<Command>,
    mailbox: &Mailbox,
    account: &Account,
) {
    let hello = tokio::time::sleep(HELLO_TIMEOUT);
    tokio::pin!(hello);
    let mut silent = true;
    let mut unanswered = false;
    loop {
        tokio::select! {
            () = mailbox.filled() => {
                let Some(Letter { message, fd }) = mailbox.take() else { continue };
                let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
                if let Err(error) = socket.send(&*message, &fds).await {
                    tracing::debug!(pid = peer.pid, "cannot be answered: {}", error_chain(&error));
                    return;
                }
                unanswered &= !matches!(*message, Message::Reply(_));
            }
            packet = next_packet(socket, peer, account), if !unanswered => match packet {
                Ok(Some((Ok(request), fds, under_way))) => {
                    silent = false;
                    unanswered = true;
                    let refused = |code, message| Command::Answer(id, Reply::Error { code, message });
                    let command = match takes_descriptors(&request) || fds.is_empty() {
                        true => match examined(plane, peer, &request, fds).await {
                            Ok(beside) => Command::Request(id, request, beside, under_way),
                            Err(why) => refused(ErrorCode::Full, why),
                        },
                        false => {
                            let message = "this request takes no descriptor beside it".to_owned();
                            refused(ErrorCode::BadRequest, message)
                        }
                    };
                    if commands.push(peer.account, command).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(pid = peer.pid, "control socket: {error}");
                    return;
                }
                Ok(Some((Err(error), ..))) => {
                    let (code, message) = match error {
                        PacketError::NoDescriptors => (ErrorCode::Full, limits::descriptors()),
                        error => (ErrorCode::BadPacket, error.told()),
                    };
                    if let Some(dropped) = may_log(peer.uid) {
                        let message = plain(&message);
                        tracing::warn!(pid = peer.pid, uid = peer.uid, dropped, "bad packet: {message}");
                    }
                    let reply = Message::Reply(Reply::Error { code, message });
                    let _ = tokio::time::timeout(Duration::from_secs(1), socket.send(&reply, &[])).await;
                    return;
                }
            },
            () = &mut hello, if silent => {
                if let Some(dropped) = may_log(peer.uid) {
                    tracing::warn!(pid = peer.pid, uid = peer.uid, dropped, "said nothing: disconnected");
                }
                return;
            }
        }
    }
}
