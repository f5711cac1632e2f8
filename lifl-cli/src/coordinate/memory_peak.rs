//! How much memory a run takes: sampled while it runs.

use std::fs;
use std::time::{Duration, Instant};

/// How often it is looked at, at the most.
const PAUSE: Duration = Duration::from_millis(100);

/// Of the time, what looking may take: with thousands of workers a look takes a while.
const SHARE: u32 = 50;

/// Private (anonymous) memory of a process in bytes; 0 when it is gone. Shared memory is counted by the daemon.
fn private_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// The most private memory that this process and its workers took together, as far as it was sampled.
#[derive(Debug, Default)]
pub(super) struct Peak {
    bytes: u64,
    next: Option<Instant>,
}

impl Peak {
    /// Looks, if it is time to.
    pub(super) fn sample(&mut self, workers: impl Iterator<Item = u32>) {
        let now = Instant::now();
        if self.next.is_none_or(|next| next <= now) {
            self.sample_now(workers);
            self.next = Some(now + PAUSE.max(now.elapsed() * SHARE));
        }
    }

    pub(super) fn sample_now(&mut self, workers: impl Iterator<Item = u32>) {
        let sum: u64 = workers.chain([std::process::id()]).map(private_bytes).sum();
        self.bytes = self.bytes.max(sum);
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}
