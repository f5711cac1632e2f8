//! Lines for standard output and standard error, which may be closed, full, or read by nobody: writing never fails, never
//! waits for a reader and never ends the process. What cannot be written is dropped and counted, and the count is told as
//! soon as something can be written again.
//!
//! ```text
//!   any thread ──line──▶ bounded queue ──▶ a thread of its own ──write(2)──▶ pipe, terminal, socket, file
//!                  └── full: dropped, counted           └── fails: dropped, counted
//! ```
//!
//! A [direct](Sink::direct) sink writes to a regular file without that thread: there no reader is waited for.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{SFlag, fstat};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;

use crate::privileges;

/// Bytes of a log's lines that wait to be written, at most.
pub const LOG_BYTES: usize = 4 << 20;

/// How long a log is waited for at the end of the process, while nothing of it can be written.
pub const LAST_LINES: Duration = Duration::from_secs(1);

/// What a pipe takes without making its writer wait, where it takes anything.
const AT_ONCE: usize = 4096;

/// Which lines a log has: as `RUST_LOG` says, in the form `level` or `target=level`, several with commas between them; as
/// `default` says where it is not set, or is not of that form.
pub fn filter(default: &str) -> Targets {
    chosen(std::env::var("RUST_LOG").ok().as_deref(), default)
}

fn chosen(told: Option<&str>, default: &str) -> Targets {
    // A comma too many, or a space, is not what anybody meant to be a rule.
    let told = told.map(|told| {
        let parts = told.split(',').map(str::trim);
        parts
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(",")
    });
    let told = told.filter(|told| !told.is_empty());
    let told = told.and_then(|told| told.parse().ok());
    told.or_else(|| default.parse().ok()).unwrap_or_default()
}

/// Where lines go. Clones are the same sink.
#[derive(Clone)]
pub struct Sink(Arc<Shared>);

/// Tells of so many lines that could not be written, in a line without its end.
pub type Note = fn(u64) -> String;

struct Shared {
    to: Box<dyn AsFd + Send + Sync>,
    /// Whether a regular file is written to by whoever has a line.
    direct: bool,
    room_bytes: usize,
    note: Mutex<Note>,
    state: Mutex<State>,
    /// A line has come, or one has been dealt with.
    changed: Condvar,
    /// Counts writes that took something.
    progress: AtomicU64,
}

#[derive(Default)]
struct State {
    writer: Writer,
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The thread has a line in hand.
    busy: bool,
    torn: Torn,
    /// Lines lost since that was told last, and in all.
    untold: u64,
    lost: u64,
}

/// Whether what was written last has no end of line.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Torn(bool);

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Writer {
    /// There has been no line yet.
    #[default]
    None,
    /// The sink's own thread.
    Thread,
    /// Whoever has a line: a regular file.
    Caller,
    /// Whoever has a line, where that is possible without waiting: there can be no thread.
    CallerAtOnce,
}

impl Sink {
    /// One that writes on a thread of its own, which is started with the first line. At most `room_bytes` of lines wait.
    pub fn new(to: impl AsFd + Send + Sync + 'static, room_bytes: usize, note: Note) -> Self {
        Self::with(Box::new(to), false, room_bytes, note)
    }

    /// One that writes on a thread of its own unless it writes to a regular file.
    pub fn direct(to: impl AsFd + Send + Sync + 'static, room_bytes: usize, note: Note) -> Self {
        Self::with(Box::new(to), true, room_bytes, note)
    }

    fn with(to: Box<dyn AsFd + Send + Sync>, direct: bool, room_bytes: usize, note: Note) -> Self {
        Self(Arc::new(Shared {
            to,
            direct,
            room_bytes,
            note: Mutex::new(note),
            state: Mutex::default(),
            changed: Condvar::new(),
            progress: AtomicU64::new(0),
        }))
    }

    /// Has lost lines told otherwise from now on.
    pub fn tell_by(&self, note: Note) {
        *self.0.note.lock().unwrap_or_else(PoisonError::into_inner) = note;
    }

    /// Writes a line, which has its end, or drops it.
    pub fn line(&self, line: impl Into<Vec<u8>>) {
        let line = line.into();
        let shared = &self.0;
        let mut state = shared.state();
        if state.writer == Writer::None {
            state.writer = self.writer();
        }
        match state.writer {
            Writer::None | Writer::Thread => {
                if state.bytes + line.len() > shared.room_bytes {
                    state.lose();
                    return;
                }
                state.bytes += line.len();
                state.lines.push_back(line);
                shared.changed.notify_all();
            }
            Writer::Caller | Writer::CallerAtOnce => {
                let wait = match state.writer {
                    Writer::Caller => Wait::ForRoom,
                    _ => Wait::No,
                };
                let (untold, torn) = (state.untold, state.torn);
                let put = shared.put(&line, untold, torn, wait);
                state.account(put, untold);
            }
        }
    }

    fn writer(&self) -> Writer {
        let shared = &self.0;
        let is_file = || {
            let kind = fstat(shared.to.as_fd()).map(|found| found.st_mode & SFlag::S_IFMT.bits());
            kind == Ok(SFlag::S_IFREG.bits())
        };
        if shared.direct && is_file() {
            return Writer::Caller;
        }
        let shared = Arc::clone(shared);
        let thread = std::thread::Builder::new().name("lifl-log".to_owned());
        match thread.spawn(move || shared.serve()) {
            Ok(_) => Writer::Thread,
            Err(_) => Writer::CallerAtOnce,
        }
    }

    /// Waits until all lines are written or lost, but not longer than `patience` while nothing can be written. Says whether
    /// they are.
    pub fn flush(&self, patience: Duration) -> bool {
        let shared = &self.0;
        let progress = || shared.progress.load(Ordering::Relaxed);
        let (mut last, mut since) = (progress(), Instant::now());
        let mut state = shared.state();
        while state.busy || !state.lines.is_empty() {
            if progress() != last {
                (last, since) = (progress(), Instant::now());
            }
            let Some(left) = patience
                .checked_sub(since.elapsed())
                .filter(|left| !left.is_zero())
            else {
                return false;
            };
            let waited = shared.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Lines that were dropped so far.
    pub fn lost(&self) -> u64 {
        self.0.state().lost
    }
}

impl State {
    fn lose(&mut self) {
        self.untold += 1;
        self.lost += 1;
    }

    /// Counts what became of a line, before which so many had been lost.
    fn account(&mut self, put: Put, untold: u64) {
        if put.told {
            // Others may have been lost meanwhile.
            self.untold -= untold;
        }
        if !put.written {
            self.lose();
        }
        self.torn = put.torn;
    }
}

/// What became of a line.
struct Put {
    /// The note about lines lost before it is written, where one was due.
    told: bool,
    written: bool,
    torn: Torn,
}

/// Whether a write waits until there is room.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    ForRoom,
    No,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: writes what is queued, for as long as the process lives.
    fn serve(&self) {
        // It may have been started by a thread with privileges, and needs none.
        let _ = privileges::keep_only(0);
        let mut state = self.state();
        loop {
            let Some(line) = state.lines.pop_front() else {
                state.busy = false;
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy = true;
            let (untold, torn) = (state.untold, state.torn);
            drop(state);
            let put = self.put(&line, untold, torn, Wait::ForRoom);
            state = self.state();
            state.bytes -= line.len();
            state.account(put, untold);
        }
    }

    /// Writes a line, after what is due before it.
    fn put(&self, line: &[u8], untold: u64, torn: Torn, wait: Wait) -> Put {
        let mut before = Vec::new();
        if torn.0 {
            before.push(b'\n');
        }
        if untold > 0 {
            let note = *self.note.lock().unwrap_or_else(PoisonError::into_inner);
            before.extend(note(untold).into_bytes());
            before.push(b'\n');
        }
        let told = match self.write(&before, wait) {
            Ok(()) => true,
            Err(written) => {
                return Put {
                    told: false,
                    written: false,
                    torn: Torn(if written > 0 {
                        before[written - 1] != b'\n'
                    } else {
                        torn.0
                    }),
                };
            }
        };
        match self.write(line, wait) {
            Ok(()) => Put {
                told,
                written: true,
                torn: Torn(false),
            },
            Err(written) => Put {
                told,
                written: false,
                torn: Torn(written > 0),
            },
        }
    }

    /// Writes all of it; else gives how many bytes of it were written.
    fn write(&self, bytes: &[u8], wait: Wait) -> Result<(), usize> {
        let mut written = 0;
        while written < bytes.len() {
            if wait == Wait::No && !has_room(&*self.to, PollTimeout::ZERO) {
                return Err(written);
            }
            let piece = match wait {
                Wait::ForRoom => &bytes[written..],
                Wait::No => &bytes[written..bytes.len().min(written + AT_ONCE)],
            };
            match nix::unistd::write(&*self.to, piece) {
                Ok(0) => return Err(written),
                Ok(count) => {
                    written += count;
                    self.progress.fetch_add(1, Ordering::Relaxed);
                }
                Err(Errno::EINTR) => {}
                // Another process has made this terminal or pipe non-blocking.
                Err(Errno::EAGAIN) if wait == Wait::ForRoom => {
                    has_room(&*self.to, PollTimeout::NONE);
                }
                Err(_) => return Err(written),
            }
        }
        Ok(())
    }
}

/// Whether something can be written, or would fail at once.
fn has_room(to: &dyn AsFd, timeout: PollTimeout) -> bool {
    let mut polled = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
    poll(&mut polled, timeout).is_ok_and(|ready| ready > 0)
}

/// Writes all of it, waiting for a reader if need be: for what somebody has asked for and waits for.
///
/// # Errors
/// What the kernel says: the reader is gone (`BrokenPipe`), the disk is full.
pub fn write_all(to: &impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                has_room(to, PollTimeout::NONE);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// What clap says of a command line, in colours for a terminal.
pub fn rendered(error: &clap::Error, terminal: bool) -> String {
    let text = error.render();
    match terminal {
        true => text.ansi().to_string(),
        false => text.to_string(),
    }
}

/// Has panics told by a sink: the usual hook writes to standard error itself, and would wait for its reader.
pub fn tell_panics(sink: Sink) {
    std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let trace = std::backtrace::Backtrace::capture();
        let trace = match trace.status() {
            std::backtrace::BacktraceStatus::Captured => format!("{trace}\n"),
            _ => String::new(),
        };
        sink.line(format!("thread {name} {info}\n{trace}"));
        // It may be the last that this process does.
        sink.flush(LAST_LINES);
    }));
}

/// As a writer of tracing's events, each of which it writes in one go.
impl<'a> MakeWriter<'a> for Sink {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use nix::unistd::pipe;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn note(lost: u64) -> String {
        format!("({lost} lost)")
    }

    fn told(text: &str) -> u64 {
        let notes = text
            .lines()
            .filter_map(|line| line.strip_prefix('(')?.strip_suffix(" lost)"));
        notes.map(|count| count.parse::<u64>().expect("a number")).sum()
    }

    #[test]
    fn the_environment_chooses_what_is_logged() {
        use tracing::Level;

        let shown =
            |told, target, level| chosen(told, "warn,lifl_verdict=error").would_enable(target, &level);
        assert!(shown(None, "lifl_cli::work", Level::WARN) && !shown(None, "lifl_cli::work", Level::INFO));
        assert!(!shown(None, "lifl_verdict", Level::WARN));
        let told = Some("info,lifl_cli::work=debug");
        assert!(shown(told, "lifl_cli::work::trainer", Level::DEBUG));
        assert!(shown(told, "aya", Level::INFO) && !shown(told, "aya", Level::DEBUG));
        assert!(
            shown(Some("ebpf=debug"), "ebpf", Level::DEBUG)
                && !shown(Some("ebpf=debug"), "aya", Level::ERROR)
        );
        let untidy = Some(" info, lifl_cli::work=debug,,");
        assert!(shown(untidy, "lifl_cli::work", Level::DEBUG) && shown(untidy, "aya", Level::INFO));
        for nothing in ["", " ", ",", " , "] {
            let shown = |level| shown(Some(nothing), "lifl_cli", level);
            assert!(shown(Level::WARN) && !shown(Level::INFO), "{nothing:?}");
        }
        let unknown = Some("lifl_cli=loud");
        assert!(shown(unknown, "lifl_cli", Level::WARN) && !shown(unknown, "lifl_cli", Level::INFO));
    }

    #[test]
    fn a_pipe_that_nobody_reads_stops_nobody_and_what_was_lost_is_told() {
        let (reader, writer) = pipe().expect("a pipe");
        let sink = Sink::new(writer, 10_000, note);
        let line = format!("{}\n", "x".repeat(99));
        let mut lines = 0;
        loop {
            sink.line(line.clone());
            lines += 1;
            if !sink.flush(Duration::from_millis(50)) {
                break;
            }
        }
        assert_eq!(sink.lost(), 0, "the pipe had room for what is in it");
        // More than the queue holds.
        for _ in 0..1000 {
            sink.line(line.clone());
        }
        lines += 1000;
        let lost = sink.lost();
        assert!((900..1000).contains(&lost), "{lost}");
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            File::from(reader).read_to_string(&mut text).expect("read");
            text
        });
        assert!(sink.flush(PATIENCE), "now somebody reads");
        sink.line("the last\n");
        assert!(sink.flush(PATIENCE));
        assert_eq!(sink.lost(), lost);
        close(&sink);
        let text = reading.join().expect("read");
        assert_eq!(told(&text), lost);
        let whole = text.lines().filter(|read| *read == line.trim_end()).count() as u64;
        assert_eq!(whole + lost, lines);
        assert!(text.ends_with("the last\n"));
    }

    /// A sink's descriptor lives as long as the sink's thread, which is the process's: the reader's end of file comes by this.
    fn close(sink: &Sink) {
        let null = File::options().write(true).open("/dev/null").expect("open");
        // SAFETY: dup2 onto a descriptor that the sink goes on to own; only what it refers to changes.
        let status = unsafe {
            nix::libc::dup2(
                std::os::fd::AsRawFd::as_raw_fd(&null),
                std::os::fd::AsRawFd::as_raw_fd(&sink.0.to.as_fd()),
            )
        };
        assert!(status >= 0);
    }

    #[test]
    fn what_fails_is_counted_and_fails_nothing() {
        let (reader, writer) = pipe().expect("a pipe");
        drop(reader);
        let full = File::options().write(true).open("/dev/full").expect("open");
        for sink in [
            Sink::new(writer, 1000, note),
            Sink::new(full.try_clone().expect("another"), 1000, note),
            Sink::direct(full, 1000, note),
        ] {
            for _ in 0..3 {
                sink.line("gone\n");
            }
            assert!(sink.flush(PATIENCE));
            assert_eq!(sink.lost(), 3);
        }
    }

    #[test]
    fn a_torn_line_is_ended_before_the_next() {
        let file = tempfile::tempfile().expect("a file");
        let sink = Sink::direct(file.try_clone().expect("another"), 1000, note);
        sink.line("whole\n");
        let torn = Put {
            told: false,
            written: false,
            torn: Torn(true),
        };
        sink.0.state().account(torn, 0);
        sink.line("next\n");
        let mut text = String::new();
        let mut file = file;
        io::Seek::rewind(&mut file).expect("rewound");
        file.read_to_string(&mut text).expect("read");
        assert_eq!(text, "whole\n\n(1 lost)\nnext\n");
    }

    #[test]
    fn without_a_thread_only_what_fits_at_once_is_written() {
        let (reader, writer) = pipe().expect("a pipe");
        let sink = Sink::new(writer, 1000, note);
        sink.0.state().writer = Writer::CallerAtOnce;
        for _ in 0..1000 {
            sink.line("x".repeat(999) + "\n");
        }
        let lost = sink.lost();
        assert!(lost > 900 && lost < 1000, "{lost}");
        drop::<OwnedFd>(reader);
    }
}
