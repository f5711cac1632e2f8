//! How far a download is.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How far a download is, for whoever waits for it.
#[derive(Debug, Default)]
pub struct Progress {
    pub(super) received: AtomicU64,
    /// All that there is; 0 while that is not known.
    pub(super) total: AtomicU64,
    pub(super) downloading: AtomicBool,
    /// Whether another process downloads the same file.
    pub(super) waiting: AtomicBool,
    notes: Mutex<Vec<String>>,
}

impl Progress {
    /// Bytes that have come, and all that there are, if the server said so; `None` while nothing is downloaded.
    pub fn downloaded(&self) -> Option<(u64, Option<u64>)> {
        let total = Some(self.total.load(Ordering::Relaxed)).filter(|&total| total > 0);
        self.downloading
            .load(Ordering::Relaxed)
            .then(|| (self.received.load(Ordering::Relaxed), total))
    }

    /// Whether another process downloads the file and this one waits for it.
    pub fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    /// What there was to say since it was last asked for.
    pub fn notes(&self) -> Vec<String> {
        self.notes
            .lock()
            .map(|mut notes| std::mem::take(&mut *notes))
            .unwrap_or_default()
    }

    #[cfg(feature = "download")]
    pub(super) fn note(&self, note: String) {
        tracing::warn!("{note}");
        if let Ok(mut notes) = self.notes.lock() {
            notes.push(note);
        }
    }
}
