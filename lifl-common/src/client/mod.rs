//! The worker's side of LIFL: the socket that its frames travel on.

mod socket;

pub use socket::FrameSocket;
