//! The kernel's part: the SK_MSG program `flame_verdict` of `lifl-ebpf`, attached to a map of the workers' sockets.
//!
//! What the program could not hand over because the receiver is not registered yet comes out of here, with its sender.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use aya::maps::{HashMap, MapData, MapError, SockHash};
use aya::programs::ProgramError;
use lifl_common::client::loopback_pair;
use lifl_common::flame::{
    Address, HEADER_BYTES, HOLD, LOG_CLOSED, LOG_GONE, LOG_LENGTH, LOG_NO_MEMORY, LOG_TAKEN,
    LONGEST_REFERENCE_BYTES, MAP_SENDERS, MAP_SOCKETS, MAP_WORKERS, MESSAGE_BYTES, PROGRAM, REFUSE, Sender,
    Worker,
};
use lifl_common::kernel::{Connection, LogRecord};
use nix::sys::socket::Shutdown;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use zerocopy::transmute;

use super::rules::show_id;
use super::wire::Message;
use crate::ebpf::{LoadError, Program, is_missing};

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
    /// The far end of the pair whose near end is in the map for held references, and both of that for refused ones.
    _pairs: [OwnedFd; 3],
    _stop: DropGuard,
}

impl Kernel {
    /// Loads and attaches the program. `capacity` workers can be registered, and as many remembered.
    ///
    /// Must be called within a tokio runtime that drives I/O.
    pub(super) fn load(capacity: u32) -> Result<(Self, mpsc::Receiver<(Address, Message)>), LoadError> {
        let entries = [
            (MAP_SOCKETS, capacity.saturating_add(2)),
            (MAP_SENDERS, capacity),
            (MAP_WORKERS, capacity.saturating_mul(2)),
        ];
        let mut program = Program::load(OBJECT, PROGRAM, &entries, &[])?;
        let mut sockets: SockHash<_, AddressBytes> = program.map(MAP_SOCKETS)?;
        let senders = program.map(MAP_SENDERS)?;
        let workers = program.map(MAP_WORKERS)?;
        program.attach(sockets.fd())?;
        let (near, far) = loopback_pair()?;
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
        tokio::spawn(stop.clone().run_until_cancelled_owned(read_held(near, held)));
        let kernel = Self {
            program,
            sockets,
            senders,
            workers,
            _pairs: [far, refusing, refusing_far],
            _stop: stop.drop_guard(),
        };
        Ok((kernel, receiver))
    }

    /// Lets the socket send and be sent to. From here on the program sees what is written to it.
    pub(super) fn insert(
        &mut self,
        sender: Sender,
        connection: Connection,
        socket: BorrowedFd<'_>,
    ) -> Result<(), EntryError> {
        let address = sender.address;
        let key: AddressBytes = transmute!(address);
        let by: ConnectionBytes = transmute!(connection);
        let since = sender.since;
        let sender: SenderBytes = transmute!(sender);
        // What it sends must never be nobody's: who it is comes before its socket. What is sent to it is held until
        // the last entry stands.
        let steps = self
            .senders
            .insert(by, sender, 0)
            .map_err(failed(MAP_SENDERS, "added"))
            .and_then(|()| {
                self.sockets
                    .insert(key, socket.as_raw_fd(), 0)
                    .map_err(failed(MAP_SOCKETS, "added"))
            })
            .and_then(|()| self.set(address, 1, since));
        if steps.is_err() {
            // As if it had not been tried: nobody is gone.
            let _ = self.remove(address, connection, since);
            let _ = self.forget(address);
        }
        steps
    }

    /// Takes a worker off the maps. Those who were there before the change of that number are refused what they send to
    /// it from here on, until [`forget`](Self::forget).
    pub(super) fn remove(
        &mut self,
        address: Address,
        connection: Connection,
        change: u64,
    ) -> Result<(), EntryError> {
        let key: AddressBytes = transmute!(address);
        let sender: ConnectionBytes = transmute!(connection);
        // Each is tried, whatever becomes of the others. A closed socket has left its map by itself.
        let steps = [
            self.set(address, 0, change),
            unless_missing(self.sockets.remove(&key)).map_err(failed(MAP_SOCKETS, "removed")),
            unless_missing(self.senders.remove(&sender)).map_err(failed(MAP_SENDERS, "removed")),
        ];
        steps.into_iter().fold(Ok(()), Result::and)
    }

    /// Forgets that there was such a worker: what is sent to it is held again.
    pub(super) fn forget(&mut self, address: Address) -> Result<(), EntryError> {
        let key: AddressBytes = transmute!(address);
        unless_missing(self.workers.remove(&key)).map_err(failed(MAP_WORKERS, "removed"))
    }

    fn set(&mut self, address: Address, live: u64, changed: u64) -> Result<(), EntryError> {
        let worker: WorkerBytes = transmute!(Worker {
            live,
            changed,
            ..Worker::default()
        });
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

fn unless_missing(removed: Result<(), MapError>) -> Result<(), MapError> {
    removed.or_else(|error| if is_missing(&error) { Ok(()) } else { Err(error) })
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
async fn read_held(mut socket: tokio::net::TcpStream, held: mpsc::Sender<(Address, Message)>) {
    let mut bytes = [0; MESSAGE_BYTES];
    loop {
        let read: io::Result<usize> = socket.read_exact(&mut bytes).await;
        if let Err(error) = read {
            break tracing::error!(%error, "the socket for held references failed");
        }
        if held.send(Message::unstamp(&bytes)).await.is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let reasons = [LOG_GONE, LOG_CLOSED, LOG_NO_MEMORY].map(|event| describe(&record(event)).1);
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
