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
//! still read and handed over: its reader gets a moment to come to the stream's end.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{self, Counters, Member, Sender};
use nix::sys::socket::{Shutdown, shutdown};
use nix::time::ClockId;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::socket::{SocketError, check_unix};
use super::{DEAD_LETTERS, PlaneError};

/// Frames that wait for a worker that does not read.
const INBOX_FRAMES: usize = 65_536;

/// How long the reader of a worker that is gone has to come to its stream's end.
const DRAIN: Duration = Duration::from_secs(1);

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
    dead_letters: mpsc::Sender<Frame>,
}

/// One registered worker.
#[derive(Debug)]
struct Worker {
    identity: Sender,
    /// The kernel's number of its stream.
    cookie: u64,
    stream: Arc<UnixStream>,
    inbox: mpsc::Sender<Frame>,
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
        job: JobId,
        socket: OwnedFd,
    ) -> Result<(), PlaneError> {
        if worker == WorkerId::NONE {
            return Err(PlaneError::Nobody);
        }
        let in_socket = |source| PlaneError::Socket { worker, source };
        let cookie = check_unix(&socket).map_err(in_socket)?;
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
        let stream = Arc::new(into_stream(socket).map_err(in_socket)?);
        let (inbox, queued) = mpsc::channel(INBOX_FRAMES);
        let gone = self.stop.child_token();
        let entry = Arc::new(Worker {
            identity: Sender { worker, job },
            cookie,
            stream: Arc::clone(&stream),
            inbox,
            sent: Sent::default(),
            gone: gone.clone(),
        });
        workers.insert(worker, Arc::clone(&entry));
        let table = Arc::clone(&self.table);
        let drained = gone.clone();
        let reading = async move {
            tokio::select! {
                () = read(entry, table) => {}
                () = async { drained.cancelled().await; tokio::time::sleep(DRAIN).await } => {}
            }
        };
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(reading));
        let table = Arc::clone(&self.table);
        tokio::spawn(gone.run_until_cancelled_owned(write(stream, queued, worker, table)));
        Ok(())
    }

    pub(super) fn unregister(&mut self, worker: WorkerId) {
        let mut workers = self.table.workers.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = workers.remove(&worker) {
            // What it has written can still be read to its end; it can write no more.
            if let Err(errno) = shutdown(worker.stream.as_raw_fd(), Shutdown::Both) {
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

fn into_stream(socket: OwnedFd) -> Result<UnixStream, SocketError> {
    let stream = std::os::unix::net::UnixStream::from(socket);
    let failed = |call| move |source| SocketError::Syscall { call, source };
    stream
        .set_nonblocking(true)
        .map_err(failed("fcntl(O_NONBLOCK)"))?;
    UnixStream::from_std(stream).map_err(failed("epoll_ctl(EPOLL_CTL_ADD)"))
}

/// Reads a worker's frames until its stream ends.
async fn read(worker: Arc<Worker>, table: Arc<Table>) {
    let id = worker.identity.worker;
    let mut buffer = [0; BATCH_FRAMES * Frame::BYTES];
    let mut filled = 0;
    loop {
        match read_some(&worker.stream, &mut buffer[filled..]).await {
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
                warn!(sender = %id, from = %frame.from, to = %frame.to, %refusal, "refused a frame");
                table.bury(frame, refusal, id).await;
            }
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Writes a worker's inbox to its stream.
async fn write(
    stream: Arc<UnixStream>,
    mut inbox: mpsc::Receiver<Frame>,
    worker: WorkerId,
    table: Arc<Table>,
) {
    let mut batch = Vec::with_capacity(BATCH_FRAMES);
    while inbox.recv_many(&mut batch, BATCH_FRAMES).await > 0 {
        if let Err(error) = write_all(&stream, batch.as_bytes()).await {
            debug!(%worker, %error, "stream is closed");
            // From here on `deliver` finds the inbox closed.
            inbox.close();
            break;
        }
        batch.clear();
    }
    for frame in batch {
        table.take_back(frame).await;
    }
    while let Some(frame) = inbox.recv().await {
        table.take_back(frame).await;
    }
}

async fn read_some(stream: &UnixStream, room: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(room) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Table {
    fn get(&self, worker: WorkerId) -> Option<Arc<Worker>> {
        self.workers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&worker)
            .cloned()
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
        self.last_ns.store(now_ns(), Relaxed);
    }

    fn untake(&self, frame: &Frame) {
        self.frames.fetch_sub(1, Relaxed);
        self.referenced_bytes.fetch_sub(lent_bytes(frame), Relaxed);
        self.refused.fetch_add(1, Relaxed);
    }

    fn refuse(&self) {
        self.refused.fetch_add(1, Relaxed);
        self.last_ns.store(now_ns(), Relaxed);
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

/// The clock of `bpf_ktime_get_ns`.
fn now_ns() -> u64 {
    let now = ClockId::CLOCK_MONOTONIC
        .now()
        .map(Duration::from)
        .unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
