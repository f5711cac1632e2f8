//! What a redirect costs at the least: two sockets and a program that does nothing but redirect. It is no plane: nobody is
//! checked or counted. `lifl bench handoff` holds the [`Sockmap`](super::Sockmap) against it.

use std::os::fd::{AsRawFd, OwnedFd};

use aya::maps::{MapData, SockHash};

use super::PlaneError;
use super::sockmap::unavailable;
use crate::ebpf::{LoadError, Program};

static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../lifl-ebpf/bare.bpf.o");

/// The program's and its map's names, in `lifl-ebpf/src/bare`.
const PROGRAM: &str = "bare_verdict";
const MAP_SOCKETS: &str = "SOCKETS";

/// Two sockets and the least program between them. Dropping it takes the program off the sockets.
pub struct Bare {
    _program: Program,
    _sockets: SockHash<MapData, u32>,
}

impl Bare {
    /// Has what is sent on either socket handed to the one that its first four bytes number, 0 or 1, in native order.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] with the reason, if this kernel or this process cannot have it.
    pub fn load(sockets: [&OwnedFd; 2]) -> Result<Self, PlaneError> {
        let load = || {
            let mut program = Program::load(OBJECT, PROGRAM, &[], &[])?;
            let mut map: SockHash<_, u32> = program.map(MAP_SOCKETS)?;
            program.attach(map.fd())?;
            for (number, socket) in (0..).zip(sockets) {
                map.insert(number, socket.as_raw_fd(), 0)?;
            }
            Ok(Self {
                _program: program,
                _sockets: map,
            })
        };
        load().map_err(|error: LoadError| unavailable(&error))
    }
}
