//! What several targets make of their bytes.

use std::time::Duration;

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

/// Whatever takes longer than this hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Cuts a stream into pieces. Each size in turn, from 0 for one byte to 255 for 256, and again from the first.
pub(crate) fn pieces<'a>(sizes: &[u8], mut stream: &'a [u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut sizes = sizes.iter().cycle();
    while !stream.is_empty() {
        let size = sizes.next().map_or(stream.len(), |&size| usize::from(size) + 1);
        let (piece, rest) = stream.split_at(size.min(stream.len()));
        pieces.push(piece);
        stream = rest;
    }
    pieces
}

/// Cuts off a part with its length in front, in two bytes, little endian; of what is shorter, all there is.
pub(crate) fn part(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = input.split_first_chunk::<2>() else {
        return (&[], &[]);
    };
    let length = usize::from(u16::from_le_bytes(*length));
    rest.split_at(length.min(rest.len()))
}

/// A runtime for one input: with it go all its tasks.
pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A folder for one input's files, in memory where there is such a place.
pub(crate) fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a folder for the input's files")
}
