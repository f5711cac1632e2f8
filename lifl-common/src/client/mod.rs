//! The worker's side: a connection to the daemon, a socket for frames, arenas.

mod connection;
mod reconnect;
mod socket;
#[cfg(test)]
mod tests;

pub use connection::{Client, ClientError, CreatedArena, Registration};
pub use socket::{FrameSocket, loopback_pair};
