//! The plane in the kernel: the SK_MSG program of `lifl-ebpf`, attached to a map of the workers' sockets.
//!
//! The maps are this module's alone ([`lifl_common::kernel`]). A worker's entries are made and removed in an order
//! in which no frame can be misjudged: what is known of it first, its socket last; and back.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};

use aya::maps::MapData;
use aya::programs::ProgramError;
use lifl_common::client::FrameSocket;
use lifl_common::frame::Frame;
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{
    Connection, Counters, MAP_COUNTERS, MAP_MEMBERS, MAP_SENDERS, MAP_SOCKETS, Member, PROGRAM, Sender,
};
use lifl_common::plane::PlaneKind;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::error;
use zerocopy::transmute;

use super::socket::{check_tcp, own_netns};
use super::{DEAD_LETTERS, Options, PlaneError, support};
use crate::chain::error_chain;
use crate::ebpf::{LoadError, Program, is_missing};

/// What `cargo xtask build-ebpf` made of `lifl-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../lifl-ebpf/lifl.bpf.o");

// The maps' keys and values as aya takes them: plain bytes, which the ABI types turn into at no cost.
type ConnectionBytes = [u8; size_of::<Connection>()];
type SenderBytes = [u8; size_of::<Sender>()];
type MemberBytes = [u8; size_of::<Member>()];
type CountersBytes = [u8; size_of::<Counters>()];

/// The loaded program with its maps. Dropping it detaches the program.
pub struct Sockmap {
    program: Program,
    sockets: aya::maps::SockHash<MapData, u32>,
    senders: aya::maps::HashMap<MapData, ConnectionBytes, SenderBytes>,
    members: aya::maps::HashMap<MapData, u32, MemberBytes>,
    counters: aya::maps::HashMap<MapData, u32, CountersBytes>,
    workers: HashMap<WorkerId, Connection>,
    holders: HashMap<Connection, WorkerId>,
    capacity: u32,
    netns: u64,
    /// Ends the tasks that read its dead letters and its log.
    _stop: DropGuard,
}

impl Sockmap {
    /// Loads the program, attaches it, and starts to read its dead letters and its log.
    ///
    /// Must be called within a tokio runtime that drives I/O.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] with the reason, if this kernel or this process cannot have it.
    pub fn load(options: Options) -> Result<(Self, mpsc::Receiver<Frame>), PlaneError> {
        if let Some((release, version)) = support::kernel()
            && version < support::OLDEST_KERNEL
        {
            let (major, minor) = support::OLDEST_KERNEL;
            return Err(PlaneError::Unavailable {
                reason: format!("kernel {release} is older than {major}.{minor}"),
                remedy: "run a newer kernel, or use the relay plane (--plane relay)".to_owned(),
            });
        }
        let netns = own_netns().map_err(|source| PlaneError::Unavailable {
            reason: format!(
                "the kernel does not name its network namespaces: {}",
                error_chain(&source)
            ),
            remedy: "use the relay plane (--plane relay)".to_owned(),
        })?;
        Self::load_and_attach(options, netns).map_err(|error| unavailable(&error))
    }

    fn load_and_attach(options: Options, netns: u64) -> Result<(Self, mpsc::Receiver<Frame>), LoadError> {
        let capacity = options.max_workers;
        // The dead-letter socket takes one entry more.
        let entries = [
            (MAP_SOCKETS, capacity.saturating_add(1)),
            (MAP_SENDERS, capacity),
            (MAP_MEMBERS, capacity),
            (MAP_COUNTERS, capacity),
        ];
        let mut program = Program::load(OBJECT, PROGRAM, &entries)?;
        let mut sockets: aya::maps::SockHash<_, u32> = program.map(MAP_SOCKETS)?;
        let senders = program.map(MAP_SENDERS)?;
        let members = program.map(MAP_MEMBERS)?;
        let counters = program.map(MAP_COUNTERS)?;
        program.attach(sockets.fd())?;

        let (dead_letter_socket, near) = FrameSocket::pair_for(PlaneKind::Sockmap)?;
        sockets.insert(WorkerId::NONE.0, near.as_raw_fd(), 0)?;
        let stop = CancellationToken::new();
        let (dead_letters, receiver) = mpsc::channel(DEAD_LETTERS);
        program.read_log(&stop)?;
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(read_dead_letters(dead_letter_socket, dead_letters)),
        );
        let sockmap = Self {
            program,
            sockets,
            senders,
            members,
            counters,
            workers: HashMap::new(),
            holders: HashMap::new(),
            capacity,
            netns,
            _stop: stop.drop_guard(),
        };
        Ok((sockmap, receiver))
    }

    /// The kernel's number of the loaded program.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn program_id(&self) -> Result<u32, ProgramError> {
        self.program.id()
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
        if self.workers.contains_key(&worker) {
            return Err(PlaneError::WorkerTaken(worker));
        }
        let connection =
            check_tcp(&socket, self.netns).map_err(|source| PlaneError::Socket { worker, source })?;
        if let Some(&holder) = self.holders.get(&connection) {
            return Err(PlaneError::SocketTaken { worker, holder });
        }
        if self.workers.len() >= self.capacity as usize {
            return Err(PlaneError::Full {
                capacity: self.capacity,
            });
        }
        self.workers.insert(worker, connection);
        self.holders.insert(connection, worker);
        let inserted = self.insert(worker, job, connection, &socket);
        if inserted.is_err()
            && let Err(error) = self.unregister(worker)
        {
            error!(%worker, error = error_chain(&error), "cannot take back a registration that failed");
        }
        // `socket` closes here: a duplicate kept by the daemon would keep a dead worker's entry alive.
        inserted
    }

    fn insert(
        &mut self,
        worker: WorkerId,
        job: JobId,
        connection: Connection,
        socket: &OwnedFd,
    ) -> Result<(), PlaneError> {
        let failed = |map| {
            move |source| PlaneError::Map {
                map,
                action: "add an entry",
                source,
            }
        };
        let counters: CountersBytes = transmute!(Counters::default());
        self.counters
            .insert(worker.0, counters, 0)
            .map_err(failed(MAP_COUNTERS))?;
        let member: MemberBytes = transmute!(Member { job });
        self.members
            .insert(worker.0, member, 0)
            .map_err(failed(MAP_MEMBERS))?;
        let connection: ConnectionBytes = transmute!(connection);
        let sender: SenderBytes = transmute!(Sender { worker, job });
        self.senders
            .insert(connection, sender, 0)
            .map_err(failed(MAP_SENDERS))?;
        self.sockets
            .insert(worker.0, socket.as_raw_fd(), 0)
            .map_err(failed(MAP_SOCKETS))
    }

    pub(super) fn unregister(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        let Some(connection) = self.workers.remove(&worker) else {
            return Ok(());
        };
        self.holders.remove(&connection);
        let connection: ConnectionBytes = transmute!(connection);
        // Each is tried, whatever becomes of the others. A closed socket has left its map by itself.
        [
            (MAP_SOCKETS, self.sockets.remove(&worker.0)),
            (MAP_SENDERS, self.senders.remove(&connection)),
            (MAP_MEMBERS, self.members.remove(&worker.0)),
            (MAP_COUNTERS, self.counters.remove(&worker.0)),
        ]
        .into_iter()
        .map(|(map, removed)| match removed {
            Err(source) if !is_missing(&source) => Err(PlaneError::Map {
                map,
                action: "remove an entry",
                source,
            }),
            _ => Ok(()),
        })
        .fold(Ok(()), Result::and)
    }

    pub(super) fn counters(&self, worker: WorkerId) -> Result<Option<Counters>, PlaneError> {
        if !self.workers.contains_key(&worker) {
            return Ok(None);
        }
        let counters = self
            .counters
            .get(&worker.0, 0)
            .map_err(|source| PlaneError::Map {
                map: MAP_COUNTERS,
                action: "read an entry",
                source,
            })?;
        Ok(Some(transmute!(counters)))
    }

    /// As [`Plane::shutdown`](super::Plane::shutdown).
    ///
    /// # Errors
    /// If the program cannot be detached.
    pub fn shutdown(self) -> Result<(), PlaneError> {
        self.program.detach().map_err(PlaneError::Detach)
    }
}

impl fmt::Debug for Sockmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockmap")
            .field("workers", &self.workers)
            .field("capacity", &self.capacity)
            .finish_non_exhaustive()
    }
}

/// Passes on what the program could not deliver.
async fn read_dead_letters(mut socket: FrameSocket, dead_letters: mpsc::Sender<Frame>) {
    loop {
        match socket.recv().await {
            // With nobody to read them they are still drained: without this socket the program could only drop.
            Ok(Some(frame)) => _ = dead_letters.send(frame).await,
            Ok(None) => break error!("the dead-letter socket was closed"),
            Err(error) => break error!(%error, "the dead-letter socket failed"),
        }
    }
}

fn unavailable(error: &LoadError) -> PlaneError {
    let (reason, remedy) = error.explain("or use the relay plane (--plane relay)");
    PlaneError::Unavailable { reason, remedy }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_in_the_map_but_nobodys_gets_its_frames_back_unstamped() {
        let (mut plane, mut dead_letters) = match Sockmap::load(Options { max_workers: 2 }) {
            Ok(loaded) => loaded,
            Err(error) => {
                eprintln!("NOT RUN: {error}");
                assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
                return;
            }
        };
        let (mut socket, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        plane
            .register(WorkerId(1), JobId(1), registered)
            .expect("registered");
        let connection: ConnectionBytes = transmute!(plane.workers[&WorkerId(1)]);
        plane.senders.remove(&connection).expect("an entry");

        let frame = Frame {
            to: WorkerId(1),
            from: WorkerId(1),
            round: 7,
            ..Frame::default()
        };
        socket.send(&[frame]).await.expect("sent");
        let wait = tokio::time::timeout(Duration::from_secs(10), dead_letters.recv());
        let refusal = lifl_common::frame::Refusal::UnknownSender as u16;
        assert_eq!(wait.await.expect("in time"), Some(Frame { refusal, ..frame }));
    }
}
