//! The plane in the daemon, for machines that may not load eBPF programs.
//!
//! Each worker has two tasks here. One reads its frames and puts each into its destination's inbox; the other
//! writes the inbox out.
//!
//! ```text
//!  worker 1 ── reader 1 ── verdict ──▶ inbox 2 ── writer 2 ── worker 2
//!                             │            │           │
//!                             └ refused    └ full      └ closed  ──▶ dead letters
//! ```
//!
//! A reader ends with its worker's stream; the inbox stays until the worker is unregistered, and a frame to it comes
//! back as [`Refusal::WorkerGone`]. What a worker had written before it was unregistered, most often because it died, is
//! still read and handed over: its reader goes on to the stream's end.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use lifl_common::control::packet::recv_with_fds;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::kernel::{self, Counters, Member, Sender};
use lifl_common::watch::watch;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::{DEAD_LETTERS, Examined, Identity, PlaneError, SocketError};
use crate::accounts;
use crate::clock::kernel_ns;
use crate::errands::{self, Foreign};
use crate::refusals;

/// Frames that wait for a worker that does not read.
const INBOX_FRAMES: usize = 65_536;

/// Frames that wait for all workers of one user together: 32 MiB of the daemon's memory.
const USER_FRAMES: usize = 524_288;

/// How long the stream of a worker that is gone may be silent before its end. It is shut: only what lies beside the frames, and takes
/// its time to be closed, can make that so.
const SILENCE: Duration = Duration::from_secs(1);

/// Frames that are read or written at a time.
const BATCH_FRAMES: usize = 64;

/// The relay. Dropping it closes all workers' streams.
#[derive(Debug)]
pub struct Relay {
    table: Arc<Table>,
    capacity: u32,
    stop: CancellationToken,
}

/// What the tasks share.
#[derive(Debug)]
struct Table {
    /// Never locked across an `.await`.
    workers: RwLock<HashMap<WorkerId, Arc<Worker>>>,
    /// Frames that wait for the workers of each user.
    waiting: Mutex<HashMap<u32, Arc<AtomicUsize>>>,
    dead_letters: mpsc::Sender<Frame>,
}

/// One registered worker.
#[derive(Debug)]
struct Worker {
    identity: Sender,
    /// The kernel's number of its stream.
    cookie: u64,
    /// Whose it is.
    uid: u32,
    stream: Arc<Stream>,
    inbox: mpsc::Sender<Frame>,
    /// Frames that wait for its user's workers.
    waiting: Arc<AtomicUsize>,
    sent: Sent,
    gone: CancellationToken,
}

/// [`Counters`] in the making. Each stands for itself: no order between them is promised.
#[derive(Debug, Default)]
struct Sent {
    frames: AtomicU64,
    referenced_bytes: AtomicU64,
    refused: AtomicU64,
    last_ns: AtomicU64,
}

impl Relay {
    /// A relay without workers, and its dead letters.
    pub fn new(max_workers: u32) -> (Self, mpsc::Receiver<Frame>) {
        let (dead_letters, receiver) = mpsc::channel(DEAD_LETTERS);
        let table = Arc::new(Table {
            workers: RwLock::default(),
            waiting: Mutex::default(),
            dead_letters,
        });
        (
            Self {
                table,
                capacity: max_workers,
                stop: CancellationToken::new(),
            },
            receiver,
        )
    }

    pub(super) fn register(
        &mut self,
        worker: WorkerId,
        Member { job, uid, .. }: Member,
        Examined { socket, found }: Examined,
    ) -> Result<(), PlaneError> {
        if worker == WorkerId::NONE {
            return Err(PlaneError::Nobody);
        }
        let in_socket = |source| PlaneError::Socket { worker, source };
        let (Identity::Unix { cookie }, Some(socket)) = (found.map_err(in_socket)?, socket) else {
            return Err(in_socket(SocketError::NotConnected));
        };
        let mut workers = self.table.workers.write().unwrap_or_else(PoisonError::into_inner);
        if workers.contains_key(&worker) {
            return Err(PlaneError::WorkerTaken(worker));
        }
        if let Some(holder) = workers.values().find(|other| other.cookie == cookie) {
            return Err(PlaneError::SocketTaken {
                worker,
                holder: holder.identity.worker,
            });
        }
        if workers.len() >= self.capacity as usize {
            return Err(PlaneError::Full {
                capacity: self.capacity,
            });
        }
        let stream = Arc::new(Stream::new(socket, uid).map_err(in_socket)?);
        let (inbox, queued) = mpsc::channel(INBOX_FRAMES);
        let waiting = self.table.waiting(uid);
        let queued = Inbox {
            frames: queued,
            waiting: Arc::clone(&waiting),
        };
        let gone = self.stop.child_token();
        let entry = Arc::new(Worker {
            identity: Sender { worker, job },
            cookie,
            uid,
            stream: Arc::clone(&stream),
            inbox,
            waiting,
            sent: Sent::default(),
            gone: gone.clone(),
        });
        workers.insert(worker, Arc::clone(&entry));
        let table = Arc::clone(&self.table);
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(read(entry, table)));
        let table = Arc::clone(&self.table);
        tokio::spawn(gone.run_until_cancelled_owned(write(stream, queued, worker, table)));
        Ok(())
    }

    pub(super) fn unregister(&mut self, worker: WorkerId) {
        let mut workers = self.table.workers.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = workers.remove(&worker) {
            // What it has written can still be read to its end; it can write no more.
            if let Err(errno) = shutdown(worker.stream.as_fd().as_raw_fd(), Shutdown::Both) {
                debug!(worker = %worker.identity.worker, %errno, "stream is closed");
            }
            worker.gone.cancel();
        }
    }

    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    pub(super) fn counters(&self, worker: WorkerId) -> Option<Counters> {
        self.table.get(worker).map(|worker| worker.sent.counters())
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The daemon's end of a worker's stream. What its worker puts beside the frames, and what of that lies unread in the stream
/// when it is closed, is the worker's to wait for.
#[derive(Debug)]
struct Stream {
    /// `None` only once it is being dropped.
    fd: Option<AsyncFd<OwnedFd>>,
    uid: u32,
}

impl Stream {
    fn new(socket: Foreign, uid: u32) -> Result<Self, SocketError> {
        let failed = |call| move |source| SocketError::Syscall { call, source };
        fcntl(socket.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
            .map_err(io::Error::from)
            .map_err(failed("fcntl(O_NONBLOCK)"))?;
        let Some(fd) = socket.into_inner() else {
            return Err(SocketError::NotConnected);
        };
        let fd = watch(fd).map_err(failed("epoll_ctl(EPOLL_CTL_ADD)"))?;
        Ok(Self { fd: Some(fd), uid })
    }

    fn watched(&self) -> &AsyncFd<OwnedFd> {
        self.fd.as_ref().expect("there until it is dropped")
    }

    fn as_fd(&self) -> &OwnedFd {
        self.watched().get_ref()
    }

    /// Reads what has come, 0 at the end.
    async fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.watched().readable().await?;
            // Descriptors beside frames are nobody's wish. Not received, they would be closed by the kernel within this very
            // call, for as long as that takes.
            let received = ready.try_io(|fd| recv_with_fds(fd.as_fd(), room));
            let Ok(received) = received else { continue };
            let received = received?;
            if !received.fds.is_empty() {
                for fd in received.fds {
                    errands::close(self.uid, fd);
                }
                errands::until_closed(self.uid).await;
            }
            return Ok(received.length);
        }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !bytes.is_empty() {
            let mut ready = self.watched().writable().await?;
            let written = ready.try_io(|fd| send(fd.as_raw_fd(), bytes, flags).map_err(io::Error::from));
            match written {
                Ok(written) => bytes = &bytes[written?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(fd) = self.fd.take() {
            errands::close_own(self.uid, fd.into_inner());
        }
    }
}

/// Frames that wait for one worker. Dropped, they do not count any more.
struct Inbox {
    frames: mpsc::Receiver<Frame>,
    waiting: Arc<AtomicUsize>,
}

impl Inbox {
    async fn recv_many(&mut self, batch: &mut Vec<Frame>, most: usize) -> usize {
        let count = self.frames.recv_many(batch, most).await;
        self.waiting.fetch_sub(count, Relaxed);
        count
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.frames.close();
        let mut left = 0;
        loop {
            match self.frames.try_recv() {
                Ok(_) => left += 1,
                // Somebody is just putting one in.
                Err(mpsc::error::TryRecvError::Empty) => std::hint::spin_loop(),
                Err(mpsc::error::TryRecvError::Disconnected) => break,
            }
        }
        self.waiting.fetch_sub(left, Relaxed);
    }
}

/// Reads a worker's frames until its stream ends.
async fn read(worker: Arc<Worker>, table: Arc<Table>) {
    let id = worker.identity.worker;
    let mut buffer = [0; BATCH_FRAMES * Frame::BYTES];
    let mut filled = 0;
    loop {
        let left_silent = async {
            worker.gone.cancelled().await;
            tokio::time::sleep(SILENCE).await;
        };
        let read = tokio::select! {
            biased;
            read = worker.stream.read(&mut buffer[filled..]) => read,
            () = left_silent => break debug!(worker = %id, "stream does not end"),
        };
        match read {
            Ok(0) => break debug!(worker = %id, half_a_frame = filled != 0, "stream ended"),
            Ok(n) => filled += n,
            Err(error) => break debug!(worker = %id, %error, "stream failed"),
        }
        let whole = filled - filled % Frame::BYTES;
        for bytes in buffer[..whole].chunks_exact(Frame::BYTES) {
            let Ok(frame) = Frame::read_from_bytes(bytes) else {
                unreachable!("chunks of a frame's size")
            };
            if let Err(refusal) = table.deliver(&worker, frame) {
                worker.sent.refuse();
                if let Some(dropped) = refusals::may_log(worker.uid) {
                    warn!(sender = %id, from = %frame.from, to = %frame.to, %refusal, dropped, "refused a frame");
                }
                table.bury(frame, refusal, id).await;
            }
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Writes a worker's inbox to its stream.
async fn write(stream: Arc<Stream>, mut inbox: Inbox, worker: WorkerId, table: Arc<Table>) {
    let mut batch = Vec::with_capacity(BATCH_FRAMES);
    while inbox.recv_many(&mut batch, BATCH_FRAMES).await > 0 {
        if let Err(error) = stream.write_all(batch.as_bytes()).await {
            debug!(%worker, %error, "stream is closed");
            // From here on `deliver` finds the inbox closed.
            inbox.frames.close();
            break;
        }
        batch.clear();
    }
    for frame in batch {
        table.take_back(frame).await;
    }
    let mut left = Vec::new();
    while inbox.recv_many(&mut left, BATCH_FRAMES).await > 0 {
        for frame in left.drain(..) {
            table.take_back(frame).await;
        }
    }
}

impl Table {
    fn get(&self, worker: WorkerId) -> Option<Arc<Worker>> {
        self.workers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&worker)
            .cloned()
    }

    /// The count of frames that wait for a user's workers.
    fn waiting(&self, uid: u32) -> Arc<AtomicUsize> {
        let mut users = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|_, waiting| Arc::strong_count(waiting) > 1);
        Arc::clone(users.entry(accounts::owner_of(uid)).or_default())
    }

    /// Puts a frame into its destination's inbox, and counts it before anybody can read it.
    fn deliver(&self, sender: &Worker, frame: Frame) -> Result<(), Refusal> {
        let target = self.get(frame.to);
        let member = target.as_ref().map(|target| Member {
            job: target.identity.job,
            uid: 0,
            flags: 0,
        });
        kernel::verdict(&frame, Some(&sender.identity), member.as_ref())?;
        let Some(target) = target else {
            return Err(Refusal::UnknownWorker);
        };
        let place = target.inbox.try_reserve().map_err(|error| match error {
            TrySendError::Full(()) => Refusal::ReceiverFull,
            TrySendError::Closed(()) => Refusal::WorkerGone,
        })?;
        if target.waiting.fetch_add(1, Relaxed) >= USER_FRAMES {
            target.waiting.fetch_sub(1, Relaxed);
            return Err(Refusal::ReceiverFull);
        }
        sender.sent.take(&frame);
        place.send(frame);
        Ok(())
    }

    /// Makes a dead letter of a frame that was taken, but whose destination closed before it was written.
    async fn take_back(&self, frame: Frame) {
        if let Some(sender) = self.get(frame.from) {
            sender.sent.untake(&frame);
        }
        self.bury(frame, Refusal::WorkerGone, frame.from).await;
    }

    async fn bury(&self, frame: Frame, refusal: Refusal, stamp: WorkerId) {
        let dead_letter = Frame {
            refusal: refusal as u16,
            stamp,
            ..frame
        };
        // Fails only when the daemon has stopped reading them, and then nobody wants it.
        _ = self.dead_letters.send(dead_letter).await;
    }
}

impl Sent {
    fn take(&self, frame: &Frame) {
        self.frames.fetch_add(1, Relaxed);
        self.referenced_bytes.fetch_add(lent_bytes(frame), Relaxed);
        self.last_ns.store(kernel_ns(), Relaxed);
    }

    fn untake(&self, frame: &Frame) {
        self.frames.fetch_sub(1, Relaxed);
        self.referenced_bytes.fetch_sub(lent_bytes(frame), Relaxed);
        self.refused.fetch_add(1, Relaxed);
    }

    fn refuse(&self) {
        self.refused.fetch_add(1, Relaxed);
        self.last_ns.store(kernel_ns(), Relaxed);
    }

    fn counters(&self) -> Counters {
        Counters {
            frames: self.frames.load(Relaxed),
            referenced_bytes: self.referenced_bytes.load(Relaxed),
            refused: self.refused.load(Relaxed),
            last_ns: self.last_ns.load(Relaxed),
        }
    }
}

/// Bytes of the object that a frame lends.
fn lent_bytes(frame: &Frame) -> u64 {
    match FrameKind::from_number(frame.kind) {
        Some(FrameKind::Model | FrameKind::Update) => frame.length,
        _ => 0,
    }
}
