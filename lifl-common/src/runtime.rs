//! Tokio runtimes whose threads are all there when they are returned.
//!
//! Tokio starts threads when it needs them and panics where the system refuses one; what a multi-threaded runtime has by then
//! waits for ever. So the threads are tried first, where a refusal is an error with the limit and the remedy, and then
//! started at once and kept:
//!
//! ```text
//!   descriptors left? ──▶ so many threads can be had at a time? ──▶ built ──▶ threads for blocking work started ──▶ returned
//! ```

use std::io::{self, Write};
use std::panic;
use std::sync::mpsc;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use crate::limits::{self, Limit};
use tokio::runtime::{Builder, Runtime};

/// Descriptors that a runtime with its timers, sockets and signals takes, and some to work with.
const DESCRIPTORS: u64 = 24;

/// How long threads have to begin, or to be gone.
const DEADLINE: Duration = Duration::from_secs(5);

/// The exit code of a program that lacks something of the machine.
const MACHINE: i32 = 3;

/// Why there is no runtime.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No threads.
    #[error("this process needs {threads} threads more, which the system refuses: {limit}")]
    Threads {
        /// How many.
        threads: usize,
        /// The limit, and how to raise it.
        limit: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No descriptors.
    #[error("this process needs {need} descriptors, {} allows {} and {} are open: {}", limit.by, limit.allowed, limit.used, limit.remedy)]
    Descriptors {
        /// How many more.
        need: u64,
        /// The limit.
        limit: Limit,
    },
    /// What a runtime waits with.
    #[error("no tokio runtime")]
    Build(#[source] io::Error),
}

/// Which threads a runtime has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads {
    /// That run tasks; 0 for the calling one alone.
    pub workers: usize,
    /// For work that blocks, there from the beginning and kept.
    pub blocking: usize,
    /// For work that blocks, at most; where the system refuses one of these, work waits for those that there are.
    pub most_blocking: usize,
    /// Of the program's own, which come and go: tried with the others, and left free.
    pub spare: usize,
}

impl Threads {
    /// Threads beside the calling one.
    pub fn count(self) -> usize {
        self.workers + self.blocking
    }
}

/// Builds a runtime. Each of its threads calls `on_start` first. To be called while the process has nothing to lose: where the
/// system takes a thread back between the trial and the start, the process ends with code 3 and says so.
///
/// # Errors
/// If the system refuses the threads or descriptors that it takes.
pub fn start(threads: Threads, on_start: impl Fn() + Send + Sync + 'static) -> Result<Runtime, RuntimeError> {
    if let Some(limit) = limits::descriptors().filter(|limit| limit.left() < DESCRIPTORS) {
        return Err(RuntimeError::Descriptors {
            need: DESCRIPTORS,
            limit,
        });
    }
    let refused = |source| RuntimeError::Threads {
        threads: threads.count() + threads.spare,
        limit: limits::explain_threads(),
        source,
    };
    try_threads(threads.count() + threads.spare).map_err(refused)?;
    let mut builder = match threads.workers {
        0 => Builder::new_current_thread(),
        workers => {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(workers);
            builder
        }
    };
    builder
        .enable_all()
        .max_blocking_threads(threads.most_blocking.max(threads.blocking).max(1))
        // For ever: a thread that is given up may not be had again.
        .thread_keep_alive(Duration::from_secs(u64::from(u32::MAX)))
        .on_thread_start(on_start);
    without_panic(|| {
        let runtime = builder.build().map_err(RuntimeError::Build)?;
        start_blocking(&runtime, threads.blocking).map_err(refused)?;
        Ok(runtime)
    })
}

/// Has the runtime start so many threads for blocking work.
fn start_blocking(runtime: &Runtime, threads: usize) -> io::Result<()> {
    let (begun, beginning) = mpsc::channel();
    let gate = Arc::new(RwLock::new(()));
    // No poison: nobody panics with the lock.
    let closed = gate.write();
    for _ in 0..threads {
        let (begun, gate) = (begun.clone(), Arc::clone(&gate));
        runtime.spawn_blocking(move || {
            let _ = begun.send(());
            drop(gate.read());
        });
    }
    let deadline = Instant::now() + DEADLINE;
    let all = (0..threads).all(|_| {
        let left = deadline.saturating_duration_since(Instant::now());
        beginning.recv_timeout(left).is_ok()
    });
    drop(closed);
    if all {
        Ok(())
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

/// Whether so many threads can be had at a time; when it returns they are gone again.
///
/// # Errors
/// The system's answer to the first that cannot.
pub fn try_threads(threads: usize) -> io::Result<()> {
    let before = own_threads();
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write();
    let mut waiting = Vec::with_capacity(threads);
    let mut refused = Ok(());
    for _ in 0..threads {
        let gate = Arc::clone(&gate);
        match std::thread::Builder::new().spawn(move || drop(gate.read())) {
            Ok(thread) => waiting.push(thread),
            Err(error) => {
                refused = Err(error);
                break;
            }
        }
    }
    drop(closed);
    for thread in waiting {
        let _ = thread.join();
    }
    // A thread that has been joined counts until the kernel has buried it.
    let deadline = Instant::now() + DEADLINE;
    while own_threads() > before && Instant::now() < deadline {
        std::thread::yield_now();
    }
    refused
}

fn own_threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// Runs what panics, and may never come back from the panic, where the system refuses a thread: the process ends then.
fn without_panic<T>(run: impl FnOnce() -> T) -> T {
    let before = panic::take_hook();
    panic::set_hook(Box::new(|refused| {
        let payload = refused.payload();
        let why = payload.downcast_ref::<String>().map(String::as_str);
        let why = why.or(payload.downcast_ref::<&str>().copied());
        let why = why.unwrap_or("no thread can be made");
        let name = std::env::args().next().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default();
        let _ = writeln!(io::stderr(), "{name}: {why}: {}", limits::explain_threads());
        std::process::exit(MACHINE);
    }));
    let done = run();
    panic::set_hook(before);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_were_tried_are_gone() {
        let before = own_threads();
        try_threads(5).expect("five threads");
        // Other tests have threads of their own.
        assert!(own_threads() <= before + 64);
    }

    #[test]
    fn all_threads_are_there_when_it_returns_and_no_more_come() {
        let runtime = start(
            Threads {
                workers: 2,
                blocking: 3,
                most_blocking: 3,
                spare: 0,
            },
            || {},
        )
        .expect("a runtime");
        let metrics = runtime.metrics();
        assert_eq!(metrics.num_workers(), 2);
        let done = runtime.block_on(async {
            let tasks: Vec<_> = (0..20).map(|n| tokio::task::spawn_blocking(move || n)).collect();
            let mut sum = 0;
            for task in tasks {
                sum += task.await.expect("done");
            }
            sum
        });
        assert_eq!(done, 190);
    }
}
