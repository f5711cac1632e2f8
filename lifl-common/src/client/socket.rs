//! A worker's end of the plane: frames in, frames out.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
use zerocopy::{FromBytes, IntoBytes};

use crate::frame::Frame;
use crate::plane::PlaneKind;
use crate::watch::watch;

/// Frames that one read takes at most.
const READ_FRAMES: usize = 64;

/// Frames that one write hands over at most. The kernel takes 16 KiB whole or not at all, on both planes.
const WRITE_FRAMES: usize = 256;

/// How often a write is repeated that met a destination just closing: by the next time the kernel has taken the
/// closed socket out of its map, and the frame becomes a dead letter.
const CLOSING_RETRIES: u32 = 16;

/// The socket that a worker's frames travel on.
///
/// Register its other half with the daemon before the first [`send`](Self::send): on the sockmap plane, what is
/// sent earlier goes to the far end, where nobody reads.
#[derive(Debug)]
pub struct FrameSocket {
    near: AsyncFd<OwnedFd>,
    /// The TCP pair's other end, held open: without it the near end reads end-of-file.
    far: Option<OwnedFd>,
    buffer: Box<[u8; READ_FRAMES * Frame::BYTES]>,
    /// Where the unread bytes in `buffer` begin and end.
    start: usize,
    end: usize,
    /// How long to look for a frame before sleeping.
    spin: Duration,
}

impl FrameSocket {
    /// A new socket for that plane, and what the worker passes to the daemon to have it registered.
    ///
    /// Must be called within a tokio runtime that drives I/O.
    ///
    /// # Errors
    /// If a system call fails; the process may be out of descriptors, or the machine without a loopback address.
    pub fn pair_for(kind: PlaneKind) -> io::Result<(Self, OwnedFd)> {
        match kind {
            PlaneKind::Sockmap => {
                let (near, far) = loopback_pair()?;
                let registered = near.try_clone()?;
                Ok((Self::new(near, Some(far))?, registered))
            }
            PlaneKind::Relay => {
                let (near, far) = UnixStream::pair()?;
                near.set_nonblocking(true)?;
                Ok((Self::new(near.into(), None)?, far.into()))
            }
        }
    }

    fn new(near: OwnedFd, far: Option<OwnedFd>) -> io::Result<Self> {
        let near = watch(near)?;
        let buffer = Box::new([0; READ_FRAMES * Frame::BYTES]);
        Ok(Self {
            near,
            far,
            buffer,
            start: 0,
            end: 0,
            spin: Duration::ZERO,
        })
    }

    /// Has [`recv`](Self::recv) look for so long before it sleeps. Whoever waits for something else beside it waits for
    /// that as much longer, once.
    pub fn set_spin(&mut self, spin: Duration) {
        self.spin = spin;
    }

    /// The next frame; `None` when the plane has closed the socket.
    ///
    /// Cancel-safe: a frame that has come in part is kept for the next call.
    ///
    /// # Errors
    /// If the socket fails, or ends within a frame.
    pub async fn recv(&mut self) -> io::Result<Option<Frame>> {
        if !self.spin.is_zero() {
            if let Some(frame) = self.try_recv()? {
                return Ok(Some(frame));
            }
            // What it finds may be the end, or a piece of a frame: then it is waited for below.
            if self.look()
                && let Some(frame) = self.try_recv()?
            {
                return Ok(Some(frame));
            }
        }
        loop {
            if let Some(frame) = self.buffered() {
                return Ok(Some(frame));
            }
            self.make_room();
            let room = &mut self.buffer[self.end..];
            let mut ready = self.near.readable().await?;
            let received = ready
                .try_io(|near| recv(near.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT).map_err(io::Error::from));
            let Ok(received) = received else {
                continue;
            };
            let read = received?;
            if read < room.len() {
                // That was all: whatever comes from now on makes it ready again, and nobody need ask before.
                ready.clear_ready_matching(Ready::READABLE);
            }
            match read {
                0 if self.end == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.end += read,
            }
        }
    }

    /// Looks for something to read, for as long as is to be spun.
    ///
    /// By `poll`, which takes no lock: a reader that tries again and again holds the socket's lock most of the time, and
    /// whoever redirects to it must have that lock (`bpf_tcp_ingress` in `net/ipv4/tcp_bpf.c`), so that the sender would
    /// be put to sleep instead.
    fn look(&self) -> bool {
        let begun = Instant::now();
        let mut near = [PollFd::new(self.near.get_ref().as_fd(), PollFlags::POLLIN)];
        while begun.elapsed() < self.spin {
            if poll(&mut near, PollTimeout::ZERO) != Ok(0) {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    /// The next frame that is there already, whole.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn try_recv(&mut self) -> io::Result<Option<Frame>> {
        if let Some(frame) = self.buffered() {
            return Ok(Some(frame));
        }
        self.make_room();
        // What has come may not have been noticed yet: the socket itself is asked.
        let room = &mut self.buffer[self.end..];
        match recv(self.near.get_ref().as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
            Ok(read) => self.end += read,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(self.buffered())
    }

    /// Moves the unread bytes, a piece of a frame, to the front.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    fn buffered(&mut self) -> Option<Frame> {
        let (frame, _) = Frame::read_from_prefix(&self.buffer[self.start..self.end]).ok()?;
        self.start += Frame::BYTES;
        Some(frame)
    }

    /// Sends the frames in order, waiting while the socket is full.
    ///
    /// Success means that the plane has them. A frame that it refuses, or whose destination is gone, is reported
    /// through the daemon and fails nothing here; while there is no daemon it comes back on this socket
    /// ([`DeadLetter::returned`](crate::control::DeadLetter::returned)). When the future is dropped some of the frames may have been
    /// sent.
    ///
    /// # Errors
    /// If the socket fails: `EPIPE` when the plane has closed it, `ENOMEM` when the kernel's TCP memory is used up.
    pub async fn send(&mut self, frames: &[Frame]) -> io::Result<()> {
        let bytes = frames.as_bytes();
        let mut sent = 0;
        let mut retries = 0;
        while sent < bytes.len() {
            let chunk = &bytes[sent..write_end(sent, bytes.len())];
            let result = self
                .near
                .async_io(Interest::WRITABLE, |fd| {
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(fd.as_raw_fd(), chunk, flags).map_err(io::Error::from)
                })
                .await;
            match result {
                Ok(n) => (sent, retries) = (sent + n, 0),
                Err(error) if self.may_pass(&error) && retries < CLOSING_RETRIES => {
                    retries += 1;
                    tokio::task::yield_now().await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// On the sockmap plane `EPIPE` can mean the destination's end of life instead of this socket's.
    fn may_pass(&self, error: &io::Error) -> bool {
        self.far.is_some() && error.raw_os_error() == Some(Errno::EPIPE as i32)
    }
}

/// Where the write from `sent` ends: after whole frames, or after the frame that an earlier write has begun. (A
/// sockmap takes nothing else: in `net/ipv4/tcp_bpf.c` a corked message is freed after its first redirect.)
fn write_end(sent: usize, bytes: usize) -> usize {
    match sent % Frame::BYTES {
        0 => bytes.min(sent + WRITE_FRAMES * Frame::BYTES),
        begun => sent + Frame::BYTES - begun,
    }
}

/// A TCP connection of this process with itself, on the loopback: (connected end, accepted end), the first
/// non-blocking.
///
/// # Errors
/// If a system call fails; the process may be out of descriptors, or the machine without a loopback address.
pub fn loopback_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let far = loop {
        // Any process of this machine may connect to the listener: take our own connection.
        let (far, peer) = listener.accept()?;
        if peer == near.local_addr()? {
            break far;
        }
    };
    near.set_nonblocking(true)?;
    Ok((near.into(), far.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::id::WorkerId;

    fn frame(n: u32) -> Frame {
        Frame {
            to: WorkerId(n),
            round: n,
            ..Frame::default()
        }
    }

    #[tokio::test]
    async fn frames_arrive_whole_however_they_were_split() {
        let (mut socket, far) = FrameSocket::pair_for(PlaneKind::Relay).expect("a pair");
        let sent: Vec<Frame> = (1..=200).map(frame).collect();
        let bytes = sent.as_bytes().to_vec();
        let writer = std::thread::spawn(move || {
            let mut far = UnixStream::from(far);
            for piece in bytes.chunks(7) {
                far.write_all(piece).expect("written");
            }
        });
        for expected in &sent {
            assert_eq!(socket.recv().await.expect("read").as_ref(), Some(expected));
        }
        assert_eq!(socket.recv().await.expect("end of file"), None);
        writer.join().expect("written");
    }

    #[tokio::test]
    async fn looking_before_sleeping_loses_nothing() {
        for plane in [PlaneKind::Relay, PlaneKind::Sockmap] {
            let (mut socket, far) = FrameSocket::pair_for(plane).expect("a pair");
            socket.set_spin(Duration::from_micros(200));
            // What is registered is the near end on the one plane and the far end on the other.
            let far = socket.far.take().unwrap_or(far);
            let writer = std::thread::spawn(move || {
                let mut far = std::fs::File::from(far);
                for n in 1..=50 {
                    // Some come while it looks, some while it sleeps, some in two pieces.
                    std::thread::sleep(Duration::from_micros(20 * u64::from(n)));
                    let frame = frame(n);
                    let (first, second) = frame.as_bytes().split_at(n as usize);
                    far.write_all(first).expect("written");
                    far.write_all(second).expect("written");
                }
            });
            for n in 1..=50 {
                assert_eq!(socket.recv().await.expect("read"), Some(frame(n)));
            }
            writer.join().expect("written");
            assert_eq!(socket.recv().await.expect("the end"), None);
        }
    }

    #[tokio::test]
    async fn an_end_within_a_frame_is_an_error() {
        let (mut socket, far) = FrameSocket::pair_for(PlaneKind::Relay).expect("a pair");
        UnixStream::from(far)
            .write_all(&frame(1).as_bytes()[..63])
            .expect("written");
        let error = socket.recv().await.expect_err("half a frame");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_begun_frame_is_finished_before_the_next_write() {
        assert_eq!(write_end(0, 640), 640);
        assert_eq!(write_end(0, 64 * 1000), 64 * 256);
        assert_eq!(write_end(100, 640), 128);
    }
}
