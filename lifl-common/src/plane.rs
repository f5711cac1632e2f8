//! How frames travel.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the two ways of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaneKind {
    /// Through the kernel: an SK_MSG program and a sockmap.
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
