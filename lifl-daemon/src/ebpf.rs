//! What both SK_MSG programs need of the kernel and of aya: to be loaded and attached, to have their log read, and, where
//! they cannot be had, a reason and a remedy.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aya::maps::sock::SockMapFd;
use aya::maps::{Map, MapData, MapError, RingBuf, SockHash};
use aya::programs::sk_msg::SkMsgLinkId;
use aya::programs::{ProgramError, SkMsg};
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use lifl_common::kernel::{LOG_ALL, LogRecord, MAP_LOG};
use lifl_common::limits;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use zerocopy::FromBytes;

use crate::chain::{causes, error_chain};
use crate::errands::Foreign;
use crate::plane::support;

/// A loaded program with those of its maps that nobody has taken. Dropping it detaches the program.
pub(crate) struct Program {
    ebpf: Ebpf,
    name: &'static str,
    link: Option<SkMsgLinkId>,
}

impl Program {
    /// Loads an object, its maps with that many entries; a map with a path is taken from there, or made and pinned there.
    pub(crate) fn load(
        object: &[u8],
        name: &'static str,
        entries: &[(&'static str, u32)],
        pins: &[(&'static str, PathBuf)],
    ) -> Result<Self, LoadError> {
        // The program makes no log record that nobody would see.
        let all: &'static u8 = match tracing::enabled!(target: "ebpf", tracing::Level::DEBUG) {
            true => &1,
            false => &0,
        };
        let mut loader = unused_loader().take().unwrap_or_else(new_loader);
        loader.override_global(LOG_ALL, all, false);
        for &(map, entries) in entries {
            loader.map_max_entries(map, entries);
        }
        for (map, path) in pins {
            loader.map_pin_path(map, path.clone());
        }
        let ebpf = loader.load(object)?;
        // What a loader has been told of a map it keeps for all objects.
        if entries.is_empty() && pins.is_empty() {
            *unused_loader() = Some(loader);
        }
        Ok(Self {
            ebpf,
            name,
            link: None,
        })
    }

    /// Takes one of its maps.
    pub(crate) fn map<M: TryFrom<Map, Error = MapError>>(&mut self, name: &str) -> Result<M, LoadError> {
        let map = self.ebpf.take_map(name).ok_or_else(|| MapError::InvalidName {
            name: name.to_owned(),
        })?;
        Ok(map.try_into()?)
    }

    /// Has the kernel run it on every send of a socket in that map.
    pub(crate) fn attach(&mut self, sockets: &SockMapFd) -> Result<(), LoadError> {
        let program = self.program()?;
        program.load()?;
        self.link = Some(program.attach(sockets)?);
        Ok(())
    }

    /// Passes on what it logs, until `stop`: `write` makes a line of a record.
    pub(crate) fn read_log(
        &mut self,
        stop: &CancellationToken,
        write: fn(&LogRecord),
    ) -> Result<(), LoadError> {
        let log: RingBuf<MapData> = self.map(MAP_LOG)?;
        // SAFETY: the ring buffer owns its map, whose descriptor stays open and the same until it is dropped.
        let log = unsafe { AsyncFd::register_with_interest(log, Interest::READABLE) };
        let log = log.map_err(io::Error::from)?;
        tokio::spawn(stop.clone().run_until_cancelled_owned(read_log(log, write)));
        Ok(())
    }

    /// The kernel's number of it.
    pub(crate) fn id(&self) -> Result<u32, ProgramError> {
        let program: &SkMsg = self
            .ebpf
            .program(self.name)
            .ok_or(ProgramError::NotLoaded)?
            .try_into()?;
        Ok(program.info()?.id())
    }

    /// Takes it off the map's sockets.
    pub(crate) fn detach(mut self) -> Result<(), ProgramError> {
        let Some(link) = self.link.take() else {
            return Ok(());
        };
        self.program()?.detach(link)
    }

    /// Leaves it on the map's sockets, and on those that come into the map.
    pub(crate) fn leave(mut self) -> Result<(), ProgramError> {
        let Some(link) = self.link.take() else {
            return Ok(());
        };
        // The map keeps the program. Dropping the link would take it away.
        std::mem::forget(self.program()?.take_link(link)?);
        Ok(())
    }

    fn program(&mut self) -> Result<&mut SkMsg, ProgramError> {
        self.ebpf
            .program_mut(self.name)
            .ok_or(ProgramError::NotLoaded)?
            .try_into()
    }
}

/// A loader that has been told of no map, for the next object: making one reads the types of the whole kernel, more than a third
/// of a start's processor time.
fn unused_loader() -> MutexGuard<'static, Option<EbpfLoader<'static>>> {
    static UNUSED: Mutex<Option<EbpfLoader<'static>>> = Mutex::new(None);
    UNUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A loader for objects that ask for no type of the kernel's.
fn new_loader() -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    loader
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A removal of an entry: that it was not there is no error, for that is what removing it was for.
pub(crate) fn unless_missing(removed: Result<(), MapError>) -> Result<(), MapError> {
    let missing = match &removed {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => true,
        Err(MapError::SyscallError(error)) => {
            matches!(error.io_error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL))
        }
        _ => false,
    };
    if missing { Ok(()) } else { removed }
}

/// Puts a client's socket into a map, and closes the descriptor: a duplicate kept by the daemon would keep a dead worker's entry
/// alive, and what is sent to that would be lost without a word.
///
/// It waits for the socket's lock, which its worker may hold for as long as it likes: not for a task that serves others.
pub(crate) fn insert_socket<K: Pod>(map: OwnedFd, key: K, socket: Foreign) -> Result<(), MapError> {
    let inserted = MapData::from_fd(map)
        .map(Map::SockHash)
        .and_then(SockHash::<_, K>::try_from)
        .and_then(|mut sockets| sockets.insert(key, socket.as_fd().as_raw_fd(), 0));
    socket.close_here();
    inserted
}

async fn read_log(mut log: AsyncFd<RingBuf<MapData>>, write: fn(&LogRecord)) {
    let mut lines = Lines::default();
    loop {
        match log.readable_mut().await {
            Ok(mut ready) => {
                while let Some(record) = ready.get_inner_mut().next() {
                    let Ok(record) = LogRecord::read_from_bytes(&record) else {
                        continue;
                    };
                    if let Some(left_out) = lines.next(Instant::now()) {
                        if left_out > 0 {
                            warn!(target: "ebpf", left_out, "lines of the program were left out: too many in a second");
                        }
                        write(&record);
                    }
                }
                ready.clear_ready();
            }
            Err(error) => break error!(%error, "the program's log cannot be read"),
        }
    }
}

/// How many lines of a program there may be: what it refuses is its senders' doing, and they may send without end.
#[derive(Debug, Default)]
struct Lines {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Lines {
    const EACH_SECOND: u32 = 50;

    /// Whether there may be one line more: then how many were left out before it.
    fn next(&mut self, now: Instant) -> Option<u64> {
        let over = |since: Instant| now.saturating_duration_since(since) >= Duration::from_secs(1);
        if self.since.is_none_or(over) {
            (self.since, self.written) = (Some(now), 0);
        }
        if self.written == Self::EACH_SECOND {
            self.left_out += 1;
            return None;
        }
        self.written += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

/// What loading can fail with, before it is put into words.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("the program cannot be loaded")]
    Ebpf(#[from] EbpfError),
    #[error("the program's maps cannot be used")]
    Map(#[from] MapError),
    #[error("the program is refused")]
    Program(#[from] ProgramError),
    #[error("the daemon's own descriptors for the program cannot be made")]
    Io(#[from] io::Error),
    #[error("the daemon can have no thread more, for what waits in the kernel")]
    Thread(#[source] io::Error),
}

impl LoadError {
    /// Why the program cannot be had, in one line, and what to do; `instead` is what works without it.
    pub(crate) fn explain(&self, instead: &str) -> (String, String) {
        debug!(error = error_chain(self), "an SK_MSG program cannot be loaded");
        let capabilities = support::effective_capabilities();
        let missing = support::missing_capabilities(capabilities);
        if let Self::Thread(_) = self {
            (error_chain(self), limits::explain_threads())
        } else if self.has_at_its_bottom(libc::EACCES) && !support::may_load_any(capabilities) {
            (
                "the kernel's verifier refuses the program to a process without CAP_PERFMON".to_owned(),
                format!("start the daemon as root (sudo lifl-daemon) or with that capability, {instead}"),
            )
        } else if !self.has_at_its_bottom(libc::EPERM) {
            (
                error_chain(self),
                format!("report this kernel and message, {instead}"),
            )
        } else if missing.is_empty() {
            (
                "the kernel refuses eBPF programs to this process (a container or kernel lockdown does that)"
                    .to_owned(),
                format!("run the daemon on the host, {instead}"),
            )
        } else {
            (
                format!("this process lacks {}", missing.join(" and ")),
                format!("start the daemon as root (sudo lifl-daemon), {instead}"),
            )
        }
    }

    /// Whether that error number is at the bottom of it. `EPERM` is the system call's, `EACCES` the verifier's.
    fn has_at_its_bottom(&self, errno: i32) -> bool {
        causes(self).any(|cause| {
            let io = cause.downcast_ref::<io::Error>();
            io.is_some_and(|io| io.raw_os_error() == Some(errno))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_so_many_lines_and_the_next_says_how_many_it_lacked() {
        let mut lines = Lines::default();
        let begun = Instant::now();
        let written = (0..1_000).filter(|_| lines.next(begun).is_some()).count();
        assert_eq!(written, Lines::EACH_SECOND as usize);
        let later = begun + Duration::from_secs(1);
        assert_eq!(lines.next(later), Some(1_000 - u64::from(Lines::EACH_SECOND)));
        assert_eq!(lines.next(later), Some(0));
    }
}
