//! The worker's side: a connection to the daemon, a socket for frames, arenas.

mod comeback;
mod connection;
mod socket;
#[cfg(test)]
mod tests;

pub use connection::{Client, ClientError, CreatedArena, Registration};
pub use socket::{FrameSocket, loopback_pair};
