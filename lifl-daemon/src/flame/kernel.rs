//! The kernel's part: the SK_MSG program `flame_verdict` of `lifl-ebpf`, attached to a map of the workers' sockets.
//!
//! What the program could not hand over because the receiver is not registered yet comes out of here, with its sender.
//!
//! ```text
//!  begin ──▶ may send ── Joining::insert: the socket, then the daemon's descriptor of it is closed ── finish ──▶ worker
//!              what is sent to it is held                                                           handed over
//! ```
//!
//! What waits in the kernel for workers that do not read is bounded ([`credit`]).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use aya::maps::{HashMap, MapData, MapError, SockHash};
use aya::programs::ProgramError;
use lifl_common::client::loopback_pair;
use lifl_common::flame::{
    Address, HEADER_BYTES, HOLD, LOG_CLOSED, LOG_FULL, LOG_GONE, LOG_LENGTH, LOG_NO_MEMORY, LOG_TAKEN,
    LONGEST_REFERENCE_BYTES, MAP_SENDERS, MAP_SOCKETS, MAP_WORKERS, MESSAGE_BYTES, PROGRAM, REFUSE, Sender,
    Worker,
};
use lifl_common::kernel::{Connection, LogRecord, MAP_CREDITS, MAP_INBOXES};
use nix::sys::socket::Shutdown;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use zerocopy::transmute;

use super::router::{HELD_FOR_USER, QUEUED_OF_USER, QUEUED_OF_WORKER};
use super::rules::show_id;
use super::wire::Message;
use crate::ebpf::{LoadError, Program, insert_socket, unless_missing};
use crate::errands::Foreign;
use crate::plane::credit::{self, Bounds, Credits, Slots};
use crate::plane::own_connection;

/// What `cargo xtask build-ebpf` made of `lifl-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../lifl-ebpf/flame.bpf.o");

/// Messages that wait for the daemon before it stops taking them out of the kernel.
const QUEUE: usize = 1024;

type AddressBytes = [u8; size_of::<Address>()];
type ConnectionBytes = [u8; size_of::<Connection>()];
type SenderBytes = [u8; size_of::<Sender>()];
type WorkerBytes = [u8; size_of::<Worker>()];

/// A map's entry that cannot be changed or read.
#[derive(Debug, thiserror::Error)]
#[error("map {map}: an entry cannot be {what}")]
pub(super) struct EntryError {
    map: &'static str,
    what: &'static str,
    #[source]
    source: MapError,
}

/// The loaded program with its maps. Dropping it detaches the program.
pub(super) struct Kernel {
    program: Program,
    sockets: SockHash<MapData, AddressBytes>,
    senders: HashMap<MapData, ConnectionBytes, SenderBytes>,
    workers: HashMap<MapData, AddressBytes, WorkerBytes>,
    credits: Arc<Credits>,
    /// Where the messages to each of those who are in the maps are counted.
    slots: std::collections::HashMap<Address, Slots>,
    /// The map of sockets, for threads that put some there.
    sockets_fd: Arc<OwnedFd>,
    /// The far end of the pair whose near end is in the map for held references, and both of that for refused ones.
    _pairs: [OwnedFd; 3],
    _stop: DropGuard,
}

impl Kernel {
    /// Loads and attaches the program. `capacity` workers can be registered, and as many remembered.
    ///
    /// Must be called within a tokio runtime that drives I/O.
    pub(super) fn load(capacity: u32) -> Result<(Self, mpsc::Receiver<(Address, Message)>), LoadError> {
        // As many as may wait where the daemon hands over. With the page for its padding a message takes the kernel about 6 KiB.
        let bounds = Bounds {
            receivers: capacity,
            message_bytes: MESSAGE_BYTES as u32,
            of_receiver: QUEUED_OF_WORKER as u64,
            of_user: QUEUED_OF_USER as u64,
            held_of_user: HELD_FOR_USER as u64,
        };
        let entries = [
            (MAP_SOCKETS, capacity.saturating_add(2)),
            (MAP_SENDERS, capacity),
            (MAP_WORKERS, capacity.saturating_mul(2)),
            (MAP_INBOXES, bounds.entries()),
            (MAP_CREDITS, bounds.entries()),
        ];
        // First: it may load a program that asks for less.
        let unread = credit::sockets();
        let mut program = Program::load(OBJECT, PROGRAM, &entries, &[])?;
        let mut sockets: SockHash<_, AddressBytes> = program.map(MAP_SOCKETS)?;
        let senders = program.map(MAP_SENDERS)?;
        let workers = program.map(MAP_WORKERS)?;
        let sockets_fd = Arc::new(sockets.fd().as_fd().try_clone_to_owned()?);
        let credits = Arc::new(Credits::of(&mut program, bounds, unread)?);
        program.attach(sockets.fd())?;
        let (near, far) = loopback_pair()?;
        credits.add_own(&own_connection(&near).map_err(io::Error::other)?)?;
        let hold: AddressBytes = transmute!(HOLD);
        sockets.insert(hold, near.as_raw_fd(), 0)?;
        let (refusing, refusing_far) = loopback_pair()?;
        let refuse: AddressBytes = transmute!(REFUSE);
        sockets.insert(refuse, refusing.as_raw_fd(), 0)?;
        nix::sys::socket::shutdown(refusing.as_raw_fd(), Shutdown::Write).map_err(io::Error::from)?;
        let near = std::net::TcpStream::from(near);
        let near = tokio::net::TcpStream::from_std(near)?;
        let stop = CancellationToken::new();
        program.read_log(&stop, write_log)?;
        let (held, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(read_held(near, held, Arc::clone(&credits))),
        );
        let kernel = Self {
            program,
            sockets,
            senders,
            workers,
            credits,
            slots: std::collections::HashMap::new(),
            sockets_fd,
            _pairs: [far, refusing, refusing_far],
            _stop: stop.drop_guard(),
        };
        Ok((kernel, receiver))
    }

    /// Why what waits for workers that do not read is not bounded; `None` if it is.
    pub(super) fn unbounded(&self) -> Option<&str> {
        self.credits.unbounded()
    }

    /// Adds all of a worker but its socket, and but that it may be sent to. Its user's amounts count for `uid` of the address.
    pub(super) fn begin(
        &mut self,
        address: Address,
        since: u64,
        connection: Connection,
    ) -> Result<Joining, EntryError> {
        let slots = self.credits.add(address.uid, &connection);
        let slots = slots.map_err(failed(MAP_CREDITS, "added"))?;
        self.slots.insert(address, slots);
        let by: ConnectionBytes = transmute!(connection);
        let sender: SenderBytes = transmute!(Sender {
            address,
            since,
            held: self.credits.held(slots),
            reserved: 0,
        });
        // What it sends must never be nobody's: who it is comes before its socket.
        if let Err(source) = self.senders.insert(by, sender, 0) {
            let _ = self.take_back(address, connection);
            return Err(failed(MAP_SENDERS, "added")(source));
        }
        Ok(Joining {
            key: transmute!(address),
            sockets: Arc::clone(&self.sockets_fd),
        })
    }

    /// Lets a worker be sent to whose socket is in the map.
    pub(super) fn finish(&mut self, address: Address, since: u64) -> Result<(), EntryError> {
        let Some(&Slots { inbox, account }) = self.slots.get(&address) else {
            return Ok(());
        };
        self.set(
            address,
            Worker {
                live: 1,
                changed: since,
                inbox,
                account,
                ..Worker::default()
            },
        )
    }

    /// Takes back what was [begun](Self::begin), as if it had not been tried: nobody is gone.
    pub(super) fn take_back(&mut self, address: Address, connection: Connection) -> Result<(), EntryError> {
        let sender: ConnectionBytes = transmute!(connection);
        let steps = [
            self.forget_socket(address),
            unless_missing(self.senders.remove(&sender)).map_err(failed(MAP_SENDERS, "removed")),
        ];
        self.give_back_slots(address);
        steps.into_iter().fold(Ok(()), Result::and)
    }

    /// Takes a socket out of its map that was put there when its worker had been taken back.
    pub(super) fn forget_socket(&mut self, address: Address) -> Result<(), EntryError> {
        let key: AddressBytes = transmute!(address);
        unless_missing(self.sockets.remove(&key)).map_err(failed(MAP_SOCKETS, "removed"))
    }

    fn give_back_slots(&mut self, address: Address) {
        if let Some(slots) = self.slots.remove(&address) {
            self.credits.remove(slots);
        }
    }

    /// Takes a worker off the maps. Those who were there before the change of that number are refused what they send to
    /// it from here on, until [`forget`](Self::forget).
    pub(super) fn remove(
        &mut self,
        address: Address,
        connection: Connection,
        change: u64,
    ) -> Result<(), EntryError> {
        let gone = Worker {
            changed: change,
            ..Worker::default()
        };
        // Each is tried, whatever becomes of the others. A closed socket has left its map by itself.
        let steps = [self.set(address, gone), self.take_back(address, connection)];
        steps.into_iter().fold(Ok(()), Result::and)
    }

    /// Forgets that there was such a worker: what is sent to it is held again.
    pub(super) fn forget(&mut self, address: Address) -> Result<(), EntryError> {
        let key: AddressBytes = transmute!(address);
        unless_missing(self.workers.remove(&key)).map_err(failed(MAP_WORKERS, "removed"))
    }

    fn set(&mut self, address: Address, worker: Worker) -> Result<(), EntryError> {
        let worker: WorkerBytes = transmute!(worker);
        let key: AddressBytes = transmute!(address);
        self.workers
            .insert(key, worker, 0)
            .map_err(failed(MAP_WORKERS, "changed"))
    }

    /// What a worker has sent.
    pub(super) fn counters(&self, address: Address) -> Result<Worker, EntryError> {
        let key: AddressBytes = transmute!(address);
        let worker = self.workers.get(&key, 0);
        let worker: WorkerBytes = worker.map_err(failed(MAP_WORKERS, "read"))?;
        Ok(transmute!(worker))
    }

    /// Takes the program off all sockets.
    pub(super) fn detach(self) -> Result<(), ProgramError> {
        self.program.detach()
    }
}

/// A worker whose socket is still to be put into the kernel's map.
#[derive(Debug)]
pub(super) struct Joining {
    key: AddressBytes,
    sockets: Arc<OwnedFd>,
}

impl Joining {
    /// Puts it there, and closes the daemon's descriptor of it. From here on the program sees what is written to it. As
    /// [`insert_socket`]: not for the router's task.
    pub(super) fn insert(self, socket: Foreign) -> Result<(), EntryError> {
        let map = self.sockets.as_fd().try_clone_to_owned();
        let inserted = map
            .map_err(MapError::IoError)
            .and_then(|map| insert_socket(map, self.key, socket));
        inserted.map_err(failed(MAP_SOCKETS, "added"))
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("program", &self.program)
            .finish_non_exhaustive()
    }
}

fn failed(map: &'static str, what: &'static str) -> impl FnOnce(MapError) -> EntryError {
    move |source| EntryError { map, what, source }
}

/// A line of the program's for this process's log.
fn write_log(record: &LogRecord) {
    match describe(record) {
        (tracing::Level::DEBUG, line) => tracing::debug!(target: "ebpf", "{line}"),
        (_, line) => tracing::warn!(target: "ebpf", "{line}"),
    }
}

/// How much a record matters, and what it says.
fn describe(record: &LogRecord) -> (tracing::Level, String) {
    let [uid, from, to, bytes, _] = record.values;
    let from = format!("worker {} of user {uid}", show_id(from));
    let refused = |why: &str| {
        let line = format!("refused {bytes} bytes of {from} to {}: {why}", show_id(to));
        (tracing::Level::WARN, line)
    };
    match record.event {
        LOG_TAKEN => {
            let line = format!("a reference of {bytes} bytes of {from} to {}", show_id(to));
            (tracing::Level::DEBUG, line)
        }
        LOG_GONE => refused("that worker is gone"),
        LOG_CLOSED => refused("that worker's socket is closed"),
        LOG_NO_MEMORY => refused("the kernel has no memory for the message"),
        LOG_FULL => refused("too many wait for that worker, or all of that user's, and are unread"),
        LOG_LENGTH => {
            let bytes = to;
            let line = format!(
                "refused {bytes} bytes of {from}: a reference has {HEADER_BYTES} to {LONGEST_REFERENCE_BYTES}"
            );
            (tracing::Level::WARN, line)
        }
        event => {
            let line = format!("a record of the unknown kind {event}: {:?}", record.values);
            (tracing::Level::WARN, line)
        }
    }
}

/// Passes on what the program could not hand over.
async fn read_held(
    mut socket: tokio::net::TcpStream,
    held: mpsc::Sender<(Address, Message)>,
    credits: Arc<Credits>,
) {
    let mut bytes = [0; MESSAGE_BYTES];
    loop {
        let read: io::Result<usize> = socket.read_exact(&mut bytes).await;
        if let Err(error) = read {
            break tracing::error!(%error, "the socket for held references failed");
        }
        let (sender, message) = Message::unstamp(&bytes);
        if held.send((sender, message)).await.is_err() {
            break;
        }
        credits.taken(sender.uid);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::plane::connection;
    use crate::sock_diag::testing::{Pair, pair};

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A user whom no test's processes have.
    const ONE: u32 = 1_234_567;
    const OTHER: u32 = ONE + 1;

    /// The program for so many workers; `None` where this machine cannot have it.
    fn load(capacity: u32) -> Option<(Kernel, mpsc::Receiver<(Address, Message)>)> {
        Kernel::load(capacity)
            .inspect_err(|error| {
                eprintln!("NOT RUN: {error}");
                assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
            })
            .ok()
    }

    /// A registered worker's end of its connection, and the daemon's.
    fn worker(kernel: &mut Kernel, uid: u32, id: u32) -> (TcpStream, TcpStream) {
        let Pair {
            near,
            far,
            local,
            remote,
        } = pair();
        let address = Address { uid, id };
        let joining = kernel
            .begin(address, 1, connection(local, remote))
            .expect("begun");
        let copy = near.try_clone().expect("a copy");
        joining.insert(Foreign::new(uid, copy.into())).expect("inserted");
        kernel.finish(address, 1).expect("registered");
        near.set_read_timeout(Some(PATIENCE)).expect("set");
        (near, far)
    }

    fn reference(to: u32) -> Vec<u8> {
        [&to.to_le_bytes()[..], &[0x0a, 1, b'x', 0x18, 1, 0x20, 1]].concat()
    }

    /// Sends references to a worker until one is refused: how many were not.
    fn fill(sender: &mut TcpStream, to: u32) -> usize {
        for sent in 0..10 * QUEUED_OF_USER {
            if let Err(error) = sender.write_all(&reference(to)) {
                assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
                return sent;
            }
        }
        panic!("nothing is refused");
    }

    /// Sends until it is taken again.
    fn send_again(sender: &mut TcpStream, to: u32) {
        let begun = Instant::now();
        while sender.write_all(&reference(to)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "still refused");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn receive(worker: &mut TcpStream) {
        let mut bytes = [0; MESSAGE_BYTES];
        assert_eq!(worker.read(&mut bytes).expect("a message in time"), MESSAGE_BYTES);
    }

    #[tokio::test]
    async fn references_for_who_does_not_read_are_bounded_for_a_worker_and_a_user_and_others_go_on() {
        const DEAF: u32 = 6;
        let Some((mut kernel, _held)) = load(16) else {
            return;
        };
        let (mut sender, _far) = worker(&mut kernel, ONE, 1);
        let mut deaf: Vec<_> = (0..DEAF).map(|n| worker(&mut kernel, ONE, 10 + n)).collect();
        let (mut theirs, _their_far) = worker(&mut kernel, OTHER, 1);
        let (mut reader, _reader_far) = worker(&mut kernel, OTHER, 10);
        let first = fill(&mut sender, 10);
        // So many CPUs may each let one through.
        assert!(
            (QUEUED_OF_WORKER / 2..=QUEUED_OF_WORKER + 64).contains(&first),
            "{first} for one"
        );
        let all: usize = first + (1..DEAF).map(|n| fill(&mut sender, 10 + n)).sum::<usize>();
        assert!(
            (QUEUED_OF_USER / 2..=QUEUED_OF_USER + 64).contains(&all),
            "{all} for one user's"
        );
        for _ in 0..100 {
            theirs.write_all(&reference(10)).expect("another user's");
            receive(&mut reader);
        }
        // All that was taken is there, and when it has been read there is room again.
        for _ in 0..first {
            receive(&mut deaf[0].0);
        }
        send_again(&mut sender, 10);
        receive(&mut deaf[0].0);
        // What was for those who leave is nobody's any more.
        for (n, worker) in (0..DEAF).zip(deaf) {
            let local = |stream: &TcpStream| match stream.local_addr() {
                Ok(std::net::SocketAddr::V4(address)) => address,
                other => panic!("{other:?}"),
            };
            let connection = connection(local(&worker.0), local(&worker.1));
            let address = Address { uid: ONE, id: 10 + n };
            kernel.remove(address, connection, 2).expect("removed");
            kernel.forget(address).expect("forgotten");
        }
        let (mut late, _late_far) = worker(&mut kernel, ONE, 20);
        send_again(&mut sender, 20);
        receive(&mut late);
    }

    /// The daemon is busy, or kept so: what is to be held waits in the kernel.
    #[tokio::test(flavor = "multi_thread")]
    async fn references_that_wait_to_be_held_are_bounded_for_their_senders_user() {
        let Some((mut kernel, mut held)) = load(4) else {
            return;
        };
        let (mut sender, _far) = worker(&mut kernel, ONE, 1);
        let (mut theirs, _their_far) = worker(&mut kernel, OTHER, 1);
        let sent = fill(&mut sender, 99);
        assert!(
            (HELD_FOR_USER / 2..=HELD_FOR_USER + QUEUE + 64).contains(&sent),
            "{sent} wait"
        );
        theirs.write_all(&reference(99)).expect("another user's");
        for n in 0..=sent {
            let taken = tokio::time::timeout(PATIENCE, held.recv())
                .await
                .expect("in time");
            let from = taken.expect("open").0.uid;
            assert_eq!(from, if n < sent { ONE } else { OTHER });
        }
        send_again(&mut sender, 99);
        let taken = tokio::time::timeout(PATIENCE, held.recv())
            .await
            .expect("in time");
        assert_eq!(taken.expect("open").0, Address { uid: ONE, id: 1 });
    }

    /// The ids as the ends of the taskids that stand in the workers' configs, and one reason.
    #[test]
    fn a_record_of_the_program_is_a_line_with_ids_as_people_know_them_and_one_reason() {
        let id = |bytes: [u8; 2]| u32::from_le_bytes([bytes[0], bytes[1], 0, 0]);
        let record = |event| LogRecord {
            event,
            values: [1000, id([0xa7, 0x45]), id([0x01, 0xfe]), 69, 0],
        };
        assert_eq!(
            describe(&record(LOG_GONE)).1,
            "refused 69 bytes of worker …a745 of user 1000 to …01fe: that worker is gone"
        );
        let reasons = [LOG_GONE, LOG_CLOSED, LOG_NO_MEMORY, LOG_FULL].map(|event| describe(&record(event)).1);
        for line in &reasons {
            assert!(line.contains("…a745") && line.contains("…01fe"), "{line}");
            assert_eq!(line.matches(": ").count(), 1, "{line}");
        }
        let too_long = LogRecord {
            event: LOG_LENGTH,
            values: [1000, id([0xa7, 0x45]), 2048, 0, 0],
        };
        assert_eq!(
            describe(&too_long).1,
            "refused 2048 bytes of worker …a745 of user 1000: a reference has 4 to 1013"
        );
    }
}
