//! Descriptors in tokio's hands.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::unix::AsyncFd;

/// Watches a non-blocking descriptor for being readable and writable.
///
/// # Errors
/// If epoll refuses it.
///
/// # Panics
/// Outside of a tokio runtime that drives I/O.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd answers with the same open descriptor for as long as it lives, which is as long as the
    // AsyncFd that it moves into.
    let watched = unsafe { AsyncFd::register(fd) };
    Ok(watched?)
}
