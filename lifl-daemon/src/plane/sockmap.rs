//! The plane in the kernel: the SK_MSG program of `lifl-ebpf`, attached to a map of the workers' sockets.
//!
//! The maps are this module's alone ([`lifl_common::kernel`]). A worker's entries are made and removed in an order
//! in which no frame can be misjudged or lost: who sends on its socket, the socket, and last that it may be sent to, once it is
//! open in nobody's hands but the worker's; and back from its socket on.
//!
//! ```text
//!  begin_register ──▶ may send ── insert: the socket, then the daemon's descriptor of it is closed ── finish_register ──▶ joined
//!                       frames to it: UnknownWorker                                           taken, or WorkerGone
//! ```
//!
//! Where the maps are [pinned](super::pins), the plane outlives the daemon: it begins with the workers that it finds
//! ([`recover`](super::recover)) and, if some are registered when it ends, leaves them and the program in place.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::maps::{MapData, MapError};
use aya::programs::ProgramError;
use lifl_common::client::FrameSocket;
use lifl_common::frame::{Frame, Refusal};
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::{
    ABI, Connection, Counters, LOG_CUT, LOG_REFUSED, LogRecord, MAP_COUNTERS, MAP_CREDITS, MAP_INBOXES,
    MAP_MEMBERS, MAP_SENDERS, MAP_SOCKETS, MAP_STATE, MAPS, Member, PROGRAM, Receiver, Sender, State,
};
use lifl_common::plane::{PlaneKind, UNBOUNDED};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, error, warn};
use zerocopy::transmute;

use super::credit::{self, Bounds, Credits, Slots};
use super::pins::{PinError, Pins, StateBytes};
use super::socket::{check_tcp, own_netns};
use super::{DEAD_LETTERS, Examined, Identity, Joining, Options, PlaneError, SocketError, support};
use crate::chain::error_chain;
use crate::ebpf::{LoadError, Program, unless_missing};

/// What `cargo xtask build-ebpf` made of `lifl-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../lifl-ebpf/lifl.bpf.o");

// The maps' keys and values as aya takes them: plain bytes, which the ABI types turn into at no cost.
pub(super) type ConnectionBytes = [u8; size_of::<Connection>()];
pub(super) type SenderBytes = [u8; size_of::<Sender>()];
pub(super) type ReceiverBytes = [u8; size_of::<Receiver>()];
type CountersBytes = [u8; size_of::<Counters>()];

/// The loaded program with its maps. Dropping it detaches the program, unless the maps are pinned and workers are
/// registered.
pub struct Sockmap {
    /// `None` once the plane has ended.
    program: Option<Program>,
    pub(super) sockets: aya::maps::SockHash<MapData, u32>,
    pub(super) senders: aya::maps::HashMap<MapData, ConnectionBytes, SenderBytes>,
    pub(super) members: aya::maps::HashMap<MapData, u32, ReceiverBytes>,
    pub(super) counters: aya::maps::HashMap<MapData, u32, CountersBytes>,
    state_map: aya::maps::Array<MapData, StateBytes>,
    /// What `state_map` says.
    pub(super) state: State,
    pub(super) workers: HashMap<WorkerId, Registered>,
    pub(super) holders: HashMap<Connection, WorkerId>,
    pub(super) credits: Credits,
    capacity: u32,
    pub(super) netns: u64,
    pub(super) pins: Option<Pins>,
    /// Why the maps are not pinned, where they were to be.
    unpinned: Option<String>,
    /// Ends the tasks that read its dead letters and its log.
    _stop: DropGuard,
}

/// A worker in the maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Registered {
    pub(super) connection: Connection,
    pub(super) receiver: Receiver,
    /// Whether it may be sent to.
    pub(super) joined: bool,
}

impl Registered {
    pub(super) fn slots(&self) -> Slots {
        Slots {
            inbox: self.receiver.inbox,
            account: self.receiver.account,
        }
    }
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
        let (pins, unpinned) = match options.pin.as_deref().map(Pins::hold) {
            None => (None, None),
            Some(Ok(pins)) => (Some(pins), None),
            Some(Err(PinError::Unavailable(reason))) => (None, Some(reason)),
            Some(Err(error)) => return Err(error.into()),
        };
        let found = match &pins {
            Some(pins) => find_state(pins, netns, &options)?,
            None => None,
        };
        let mut plane = match Self::load_and_attach(&options, netns, found, pins.as_ref()) {
            Ok(plane) => plane,
            Err(error) => {
                if let (Some(pins), None) = (pins, found)
                    && let Err(error) = pins.remove()
                {
                    warn!("{}", error_chain(&error));
                }
                return Err(unavailable(&error));
            }
        };
        plane.0.recover()?;
        // Only now: a plane that is dropped without workers takes its pins away.
        plane.0.pins = pins;
        plane.0.unpinned = unpinned;
        Ok(plane)
    }

    fn load_and_attach(
        options: &Options,
        netns: u64,
        found: Option<State>,
        pins: Option<&Pins>,
    ) -> Result<(Self, mpsc::Receiver<Frame>), LoadError> {
        let mut state = found.unwrap_or_default();
        if state.max_workers == 0 {
            state.max_workers = options.max_workers;
        }
        let capacity = state.max_workers;
        // The dead-letter socket takes one entry more.
        let bounds = Bounds::of_frames(capacity);
        let entries = [
            (MAP_SOCKETS, capacity.saturating_add(1)),
            (MAP_SENDERS, capacity),
            (MAP_MEMBERS, capacity),
            (MAP_COUNTERS, capacity),
            (MAP_INBOXES, bounds.entries()),
            (MAP_CREDITS, bounds.entries()),
        ];
        let paths: Vec<_> = pins
            .iter()
            .flat_map(|pins| MAPS.map(|map| (map, pins.path(map))))
            .collect();
        // First: it may load a program that asks for less.
        let unread = credit::sockets();
        let mut program = Program::load(OBJECT, PROGRAM, &entries, &paths)?;
        let mut sockets: aya::maps::SockHash<_, u32> = program.map(MAP_SOCKETS)?;
        let senders = program.map(MAP_SENDERS)?;
        let members = program.map(MAP_MEMBERS)?;
        let counters = program.map(MAP_COUNTERS)?;
        let mut state_map: aya::maps::Array<_, StateBytes> = program.map(MAP_STATE)?;
        let credits = Credits::of(&mut program, bounds, unread)?;
        program.attach(sockets.fd())?;

        let (dead_letter_socket, near) = FrameSocket::pair_for(PlaneKind::Sockmap)?;
        let own = check_tcp(&near).and_then(|found| found.within(netns));
        credits.add_own(&own.map_err(io::Error::other)?)?;
        // In the place of the last daemon's, if that is not quite closed yet.
        sockets.insert(WorkerId::NONE.0, near.as_raw_fd(), 0)?;
        let stop = CancellationToken::new();
        let (dead_letters, receiver) = mpsc::channel(DEAD_LETTERS);
        program.read_log(&stop, write_log)?;
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(read_dead_letters(dead_letter_socket, dead_letters)),
        );
        state = State {
            magic: State::MAGIC,
            abi: ABI,
            netns,
            ..state
        };
        state_map.set(0, state_bytes(state), 0)?;
        let sockmap = Self {
            program: Some(program),
            sockets,
            senders,
            members,
            counters,
            state_map,
            state,
            workers: HashMap::new(),
            holders: HashMap::new(),
            credits,
            capacity,
            netns,
            pins: None,
            unpinned: None,
            _stop: stop.drop_guard(),
        };
        Ok((sockmap, receiver))
    }

    /// The kernel's number of the loaded program.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn program_id(&self) -> Result<u32, ProgramError> {
        self.program.as_ref().ok_or(ProgramError::NotLoaded)?.id()
    }

    /// Where its maps outlive the daemon, if they do.
    pub(super) fn pinned(&self) -> Option<&Path> {
        self.pins.as_ref().map(Pins::folder)
    }

    /// Why this plane, for people.
    pub(super) fn reason(&self) -> String {
        let handed = "the kernel hands the frames over";
        let mut reason = match (&self.pins, &self.unpinned) {
            (Some(pins), _) => format!("{handed}, pinned in {}", pins.folder().display()),
            (None, Some(reason)) => format!("{handed}; jobs end with this daemon, for {reason}"),
            (None, None) => handed.to_owned(),
        };
        if let Some(why) = self.unbounded() {
            reason = format!("{reason}; {UNBOUNDED}{why}");
        }
        reason
    }

    /// Why frames that nobody reads are not bounded, and after a semicolon what to do; `None` if they are.
    pub fn unbounded(&self) -> Option<&str> {
        self.credits.unbounded()
    }

    /// Workers that it holds.
    pub(super) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Changes what the next daemon is to know.
    pub(super) fn keep(&mut self, change: impl FnOnce(&mut State)) -> Result<(), PlaneError> {
        let mut state = self.state;
        change(&mut state);
        self.state_map
            .set(0, state_bytes(state), 0)
            .map_err(failed(MAP_STATE, "change an entry"))?;
        self.state = state;
        Ok(())
    }

    /// Adds all of a worker but its socket, and but what others are judged by who send to it: until it has
    /// [joined](Self::finish_register) their frames come back.
    pub(super) fn begin_register(
        &mut self,
        worker: WorkerId,
        member: Member,
        Examined { socket, found }: Examined,
    ) -> Result<Joining, PlaneError> {
        if worker == WorkerId::NONE {
            return Err(PlaneError::Nobody);
        }
        if self.workers.contains_key(&worker) {
            return Err(PlaneError::WorkerTaken(worker));
        }
        let connection = found.and_then(|found| match found {
            Identity::Tcp(found) => found.within(self.netns),
            Identity::Unix { .. } => Err(SocketError::NotConnected),
        });
        let in_socket = |source| PlaneError::Socket { worker, source };
        let connection = connection.map_err(in_socket)?;
        let socket = socket.ok_or_else(|| in_socket(SocketError::NotConnected))?;
        if let Some(&holder) = self.holders.get(&connection) {
            return Err(PlaneError::SocketTaken { worker, holder });
        }
        if self.workers.len() >= self.capacity as usize {
            return Err(PlaneError::Full {
                capacity: self.capacity,
            });
        }
        let sockets = self.sockets.fd().as_fd().try_clone_to_owned();
        let sockets = sockets.map_err(|error| PlaneError::Socket {
            worker,
            source: SocketError::Syscall {
                call: "fcntl(F_DUPFD_CLOEXEC) of the map",
                source: error,
            },
        })?;
        // Before the number is used: whoever comes after this daemon must not use it again.
        self.keep(|state| state.last_worker = state.last_worker.max(worker.0))?;
        let slots = self
            .credits
            .add(member.uid, &connection)
            .map_err(failed(MAP_CREDITS, "add an entry"))?;
        let receiver = Receiver {
            member,
            inbox: slots.inbox,
            account: slots.account,
        };
        let registered = Registered {
            connection,
            receiver,
            joined: false,
        };
        self.workers.insert(worker, registered);
        self.holders.insert(connection, worker);
        if let Err(error) = self.insert(worker, member.job, connection) {
            if let Err(error) = self.unregister(worker) {
                error!(%worker, error = error_chain(&error), "cannot take back a registration that failed");
            }
            return Err(error);
        }
        Ok(Joining {
            worker,
            socket,
            sockets,
        })
    }

    fn insert(&mut self, worker: WorkerId, job: JobId, connection: Connection) -> Result<(), PlaneError> {
        let action = "add an entry";
        let counters: CountersBytes = transmute!(Counters::default());
        self.counters
            .insert(worker.0, counters, 0)
            .map_err(failed(MAP_COUNTERS, action))?;
        let connection: ConnectionBytes = transmute!(connection);
        let sender: SenderBytes = transmute!(Sender { worker, job });
        self.senders
            .insert(connection, sender, 0)
            .map_err(failed(MAP_SENDERS, action))
    }

    /// The worker's socket is in the map, and the daemon has closed its own duplicate of it: from here on it may be sent to. What is
    /// sent finds it open, or leaves the map with its last descriptor and comes back.
    pub(super) fn finish_register(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        let Some(registered) = self.workers.get_mut(&worker) else {
            return Ok(());
        };
        registered.joined = true;
        let receiver: ReceiverBytes = transmute!(registered.receiver);
        self.members
            .insert(worker.0, receiver, 0)
            .map_err(failed(MAP_MEMBERS, "add an entry"))
    }

    /// Takes a socket out of its map whose worker is not registered.
    pub(super) fn forget_socket(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        unless_missing(self.sockets.remove(&worker.0)).map_err(failed(MAP_SOCKETS, "remove an entry"))
    }

    pub(super) fn unregister(&mut self, worker: WorkerId) -> Result<(), PlaneError> {
        let Some(registered) = self.workers.remove(&worker) else {
            return Ok(());
        };
        self.holders.remove(&registered.connection);
        let connection: ConnectionBytes = transmute!(registered.connection);
        // Each is tried, whatever becomes of the others. A closed socket has left its map by itself.
        let removed = [
            (MAP_SOCKETS, self.sockets.remove(&worker.0)),
            (MAP_SENDERS, self.senders.remove(&connection)),
            (MAP_MEMBERS, self.members.remove(&worker.0)),
            (MAP_COUNTERS, self.counters.remove(&worker.0)),
        ]
        .into_iter()
        .map(|(map, removed)| unless_missing(removed).map_err(failed(map, "remove an entry")))
        .fold(Ok(()), Result::and);
        // After the socket: another's count begins where this one's ends.
        self.credits.remove(registered.slots());
        removed
    }

    pub(super) fn counters(&self, worker: WorkerId) -> Result<Option<Counters>, PlaneError> {
        if !self.workers.contains_key(&worker) {
            return Ok(None);
        }
        let counters = self
            .counters
            .get(&worker.0, 0)
            .map_err(failed(MAP_COUNTERS, "read an entry"))?;
        Ok(Some(transmute!(counters)))
    }

    /// As [`Plane::shutdown`](super::Plane::shutdown).
    ///
    /// # Errors
    /// If the program cannot be detached, or a pin stays.
    pub fn shutdown(mut self) -> Result<(), PlaneError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), PlaneError> {
        let Some(program) = self.program.take() else {
            return Ok(());
        };
        let Some(pins) = self.pins.take() else {
            return program.detach().map_err(PlaneError::Detach);
        };
        if !self.workers.is_empty() {
            return program.leave().map_err(PlaneError::Detach);
        }
        let detached = program.detach().map_err(PlaneError::Detach);
        pins.remove()?;
        detached
    }
}

impl Drop for Sockmap {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            error!("the plane cannot be taken down: {}", error_chain(&error));
        }
    }
}

/// What pinned maps say, if they can be used. Maps that nobody uses any more are made anew when they have the wrong
/// size; then only the numbers are kept.
fn find_state(pins: &Pins, netns: u64, options: &Options) -> Result<Option<State>, PlaneError> {
    let Some(state) = pins.found()? else {
        // Left by a daemon that died before its first worker.
        pins.clear()?;
        return Ok(None);
    };
    let used = super::recover::has_sockets(&pins.path(MAP_SOCKETS))?;
    if used && state.netns != netns {
        let folder = pins.folder().to_owned();
        return Err(PinError::OtherNetns { folder }.into());
    }
    if used && state.max_workers != options.max_workers {
        warn!(
            "the pinned maps hold {} workers: --max-workers {} will hold when the jobs that use them have ended",
            state.max_workers, options.max_workers
        );
    }
    if used || state.max_workers == options.max_workers {
        return Ok(Some(state));
    }
    pins.clear()?;
    Ok(Some(State {
        max_workers: options.max_workers,
        ..state
    }))
}

fn state_bytes(state: State) -> StateBytes {
    transmute!(state)
}

/// A map's refusal, as this plane's.
pub(super) fn failed(map: &'static str, action: &'static str) -> impl FnOnce(MapError) -> PlaneError {
    move |source| PlaneError::Map { map, action, source }
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

/// A line of the program's for this process's log.
fn write_log(record: &LogRecord) {
    let [a, b, c, d, _] = record.values;
    match record.event {
        // A socket that was never a worker's, or is none any more.
        LOG_REFUSED if a == 0 => {
            debug!(target: "ebpf", "refused a frame of nobody's (it says {b}) to worker {c}")
        }
        LOG_REFUSED => {
            let refusal = u16::try_from(d).ok().and_then(Refusal::from_number);
            let reason = refusal.map_or_else(|| format!("refusal {d}"), |refusal| refusal.to_string());
            warn!(target: "ebpf", "refused a frame of worker {a} (it says {b}) to worker {c}: {reason}");
        }
        LOG_CUT => {
            warn!(target: "ebpf", "cut off {a} bytes that a write ended with after its last whole frame");
        }
        event => warn!(target: "ebpf", event, values = ?record.values, "a record of an unknown kind"),
    }
}

pub(super) fn unavailable(error: &LoadError) -> PlaneError {
    let (reason, remedy) = error.explain("or use the relay plane (--plane relay)");
    PlaneError::Unavailable { reason, remedy }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::time::Duration;

    use lifl_common::frame::Refusal;

    use super::*;
    use crate::errands::Foreign;

    /// A plane for two workers; `None` where this machine cannot have it.
    fn plane() -> Option<(Sockmap, mpsc::Receiver<Frame>)> {
        let options = Options {
            max_workers: 2,
            pin: None,
        };
        Sockmap::load(options)
            .inspect_err(|error| {
                eprintln!("NOT RUN: {error}");
                assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{error}");
            })
            .ok()
    }

    fn member() -> Member {
        Member {
            job: JobId(1),
            uid: 0,
            flags: 0,
        }
    }

    fn register(plane: &mut Sockmap, worker: WorkerId, socket: OwnedFd) {
        let socket = crate::plane::examine(PlaneKind::Sockmap, Foreign::new(0, socket));
        let joining = plane.begin_register(worker, member(), socket);
        joining.expect("begun").insert().expect("inserted");
        plane.finish_register(worker).expect("registered");
    }

    fn frame(to: u32, from: u32) -> Frame {
        Frame {
            to: WorkerId(to),
            from: WorkerId(from),
            round: 7,
            ..Frame::default()
        }
    }

    #[tokio::test]
    async fn a_socket_that_is_in_the_map_but_nobodys_gets_its_frames_back_unstamped() {
        let Some((mut plane, mut dead_letters)) = plane() else {
            return;
        };
        let (mut socket, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        register(&mut plane, WorkerId(1), registered);
        let connection: ConnectionBytes = transmute!(plane.workers[&WorkerId(1)].connection);
        plane.senders.remove(&connection).expect("an entry");

        let frame = frame(1, 1);
        socket.send(&[frame]).await.expect("sent");
        let wait = tokio::time::timeout(Duration::from_secs(10), dead_letters.recv());
        let refusal = Refusal::UnknownSender as u16;
        assert_eq!(wait.await.expect("in time"), Some(Frame { refusal, ..frame }));
    }

    /// What is sent to a worker that is just coming or leaving: it comes back, whatever its user's errands wait for.
    #[tokio::test]
    async fn a_frame_is_taken_only_for_a_socket_that_nobody_but_its_worker_has() {
        let Some((mut plane, mut dead_letters)) = plane() else {
            return;
        };
        // All threads of the user that registers are busy.
        let uid = 4_300_020;
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let gate = std::sync::Arc::new(std::sync::Mutex::new(gate));
        for _ in 0..8 {
            let gate = std::sync::Arc::clone(&gate);
            crate::errands::run(uid, move || {
                let _ = gate.lock().expect("no panic").recv();
            });
        }
        let (mut one, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        register(&mut plane, WorkerId(1), registered);
        let (mut two, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        let socket = crate::plane::examine(PlaneKind::Sockmap, Foreign::new(uid, registered));
        let joining = plane
            .begin_register(WorkerId(2), member(), socket)
            .expect("begun");
        joining.insert().expect("inserted");
        let expect_back = async |dead_letters: &mut mpsc::Receiver<Frame>, refusal: Refusal| {
            let back = tokio::time::timeout(Duration::from_secs(10), dead_letters.recv()).await;
            let back = back.expect("in time").expect("open");
            assert_eq!((back.to, back.refusal), (WorkerId(2), refusal as u16));
        };
        // Nobody has been told of it yet, nor would be of its end.
        one.send(&[frame(2, 1)]).await.expect("sent");
        expect_back(&mut dead_letters, Refusal::UnknownWorker).await;
        plane.finish_register(WorkerId(2)).expect("registered");
        one.send(&[frame(2, 1)]).await.expect("sent");
        let taken = tokio::time::timeout(Duration::from_secs(10), two.recv()).await;
        assert_eq!(taken.expect("in time").expect("read"), Some(frame(2, 1)));
        drop(two);
        one.send(&[frame(2, 1)]).await.expect("sent");
        expect_back(&mut dead_letters, Refusal::WorkerGone).await;
        drop(release);
    }

    /// A seccomp filter without `AF_NETLINK`, as containers have.
    #[test]
    fn where_nothing_tells_what_is_unread_the_planes_reason_says_so() {
        use seccompiler::{
            BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
            SeccompRule,
        };
        let reason = std::thread::spawn(|| {
            let netlink = SeccompCondition::new(
                0,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::Eq,
                libc::AF_NETLINK as u64,
            );
            let rule = SeccompRule::new(vec![netlink.expect("a condition")]).expect("a rule");
            let filter = SeccompFilter::new(
                [(libc::SYS_socket, vec![rule])].into_iter().collect(),
                SeccompAction::Allow,
                SeccompAction::Errno(libc::EAFNOSUPPORT as u32),
                std::env::consts::ARCH.try_into().expect("a known processor"),
            );
            let filter: BpfProgram = filter.expect("a filter").try_into().expect("a program");
            seccompiler::apply_filter(&filter).expect("applied to this thread");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("a runtime")
                .block_on(async { plane().map(|(plane, _)| plane.reason()) })
        });
        let Some(reason) = reason.join().expect("the thread's work") else {
            return;
        };
        assert!(
            reason.contains(UNBOUNDED) && reason.contains("AF_NETLINK"),
            "{reason}"
        );
        assert!(lifl_common::plane::is_warning(&reason));
        let bounded = crate::plane::credit::sockets().map(drop);
        assert_eq!(bounded, Ok(()), "this machine's kernel tells");
    }

    /// A frame that nobody takes must not end its sender's socket, which `SK_DROP` would.
    #[tokio::test]
    async fn without_a_daemon_the_sender_gets_its_dead_letters_itself_and_can_send_on() {
        let Some((mut plane, _dead_letters)) = plane() else {
            return;
        };
        let (mut one, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        register(&mut plane, WorkerId(1), registered);
        let (mut two, registered) = FrameSocket::pair_for(PlaneKind::Sockmap).expect("a pair");
        register(&mut plane, WorkerId(2), registered);
        plane.sockets.remove(&WorkerId::NONE.0).expect("an entry");

        let (nowhere, forged, good) = (frame(9, 1), frame(2, 2), frame(2, 1));
        one.send(&[nowhere, forged, good]).await.expect("sent");
        let wait = tokio::time::timeout(Duration::from_secs(10), two.recv());
        assert_eq!(wait.await.expect("in time").expect("read"), Some(good));
        for (frame, refusal) in [(nowhere, Refusal::UnknownWorker), (forged, Refusal::ForgedSource)] {
            let wait = tokio::time::timeout(Duration::from_secs(10), one.recv());
            let back = Frame {
                refusal: refusal as u16,
                stamp: WorkerId(1),
                ..frame
            };
            assert_eq!(wait.await.expect("in time").expect("read"), Some(back));
        }
        let counters = plane
            .counters(WorkerId(1))
            .expect("readable")
            .expect("registered");
        assert_eq!((counters.frames, counters.refused), (1, 2));
    }
}
