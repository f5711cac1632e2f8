//! How frames travel on a node.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a daemon's reason for the relay begins, when it was to choose and cannot have the kernel's plane. Then come why, and after
/// a semicolon what to do.
pub const NO_KERNEL_PLANE: &str = "no kernel plane: ";

/// What stands in a daemon's reason for the kernel's plane where what waits there for workers that do not read is not bounded. Then
/// come why, and after a semicolon what to do.
pub const UNBOUNDED: &str = "unread frames are not bounded: ";

/// Whether a daemon's reason for its plane is one that its administrator should read.
pub fn is_warning(reason: &str) -> bool {
    reason.starts_with(NO_KERNEL_PLANE) || reason.contains(UNBOUNDED)
}

/// The two ways for a frame from one worker to another.
///
/// | | worker's socket | the daemon gets |
/// | --- | --- | --- |
/// | `sockmap` | near end of a TCP pair on 127.0.0.1; both ends stay with the worker | a duplicate of the near end, which it closes after registration |
/// | `relay` | one end of a Unix stream pair | the other end, which it keeps |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaneKind {
    /// Through the kernel: the SK_MSG program.
    Sockmap,
    /// Through the daemon.
    Relay,
}

impl fmt::Display for PlaneKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sockmap => "sockmap",
            Self::Relay => "relay",
        })
    }
}
