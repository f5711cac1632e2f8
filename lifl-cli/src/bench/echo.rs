//! The other process of a hand-over: it takes what comes, and says when it had it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use lifl_common::arena::PeerArena;
use lifl_common::client::{Client, Registration};
use lifl_common::control::Event;
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::JobId;
use zerocopy::{FromBytes, IntoBytes};

use crate::clock::monotonic_ns;

/// Frames that a stream's sender has on the way at the most, and hands over at a time.
pub(super) const WINDOW: u32 = 512;
const BATCH: usize = 64;

/// How things come.
#[derive(Args, Clone, Debug)]
pub(crate) struct EchoArgs {
    #[command(subcommand)]
    how: How,
}

#[derive(Subcommand, Clone, Debug)]
enum How {
    /// As a worker: references to lent objects.
    Worker {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        job: u32,
        #[arg(long)]
        spin: u32,
    },
    /// As a worker that sends so many frames, as fast as they are taken.
    Stream {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        job: u32,
        #[arg(long)]
        name: String,
        #[arg(long)]
        frames: u32,
    },
    /// Messages as long as frames on the socket that is standard input.
    Bare,
    /// The bytes themselves, through a Unix socket.
    Unix {
        #[arg(long)]
        path: PathBuf,
        #[arg(long)]
        bytes: usize,
    },
    /// The bytes themselves, through TCP.
    Tcp {
        #[arg(long)]
        address: String,
        #[arg(long)]
        bytes: usize,
    },
}

/// Plays the part until the other side is done.
pub(crate) fn echo(args: &EchoArgs) -> anyhow::Result<()> {
    match &args.how {
        How::Worker { socket, job, spin } => asynchronously(worker(socket, JobId(*job), *spin)),
        How::Stream {
            socket,
            job,
            name,
            frames,
        } => asynchronously(stream(socket, JobId(*job), name, *frames)),
        How::Bare => bare(),
        How::Unix { path, bytes } => take_bytes(UnixStream::connect(path)?, *bytes),
        How::Tcp { address, bytes } => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            take_bytes(stream, *bytes)
        }
    }
}

/// On one thread, as workers are.
fn asynchronously(part: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime
        .enable_all()
        .build()
        .context("no tokio runtime")?
        .block_on(part)
}

async fn register(socket: &Path, job: JobId, name: &str) -> anyhow::Result<(Client, Registration)> {
    let mut client = Client::connect(socket).await?;
    let mut registration = client.register(job, "receiver", name).await?;
    let ready = frame(&registration, FrameKind::Ready);
    registration.frames.send(&[ready]).await?;
    Ok((client, registration))
}

/// A frame to the job's maker.
fn frame(registration: &Registration, kind: FrameKind) -> Frame {
    Frame {
        to: registration.owner,
        from: registration.worker,
        kind: kind as u16,
        ..Frame::default()
    }
}

async fn worker(socket: &Path, job: JobId, spin: u32) -> anyhow::Result<()> {
    let (mut client, mut me) = register(socket, job, "receiver").await?;
    me.frames.set_spin(Duration::from_micros(spin.into()));
    let mut lender: Option<Arc<PeerArena>> = None;
    loop {
        let came = tokio::select! {
            came = me.frames.recv() => came?,
            event = client.event() => match event? {
                Event::JobEnded { .. } => return Ok(()),
                _ => continue,
            },
        };
        let Some(came) = came else {
            return Ok(());
        };
        let id = came.key.arena;
        let arena = match lender.as_ref().filter(|arena| arena.id() == id) {
            Some(arena) => Arc::clone(arena),
            None => Arc::clone(lender.insert(Arc::new(client.open_arena(id).await?))),
        };
        // Had: it is where it is said to be, and can be read.
        let object = arena.object(came.key, came.length)?;
        std::hint::black_box((object.first(), object.last()));
        let back = Frame {
            key: came.key,
            value: monotonic_ns(),
            ..frame(&me, FrameKind::Release)
        };
        me.frames.send(&[back]).await?;
    }
}

async fn stream(socket: &Path, job: JobId, name: &str, frames: u32) -> anyhow::Result<()> {
    let (_client, mut me) = register(socket, job, name).await?;
    // The word to begin.
    me.frames.recv().await?.context("the stream was called off")?;
    let one = frame(&me, FrameKind::Nothing);
    let batch = [one; BATCH];
    let mut sent = 0;
    let mut taken = 0;
    while sent < frames {
        while sent - taken >= WINDOW {
            let back = me.frames.recv().await?.context("the stream was called off")?;
            taken += back.covers;
        }
        let now = (frames - sent).min(BATCH as u32);
        me.frames.send(&batch[..now as usize]).await?;
        sent += now;
    }
    while taken < frames {
        let back = me.frames.recv().await?.context("the stream was called off")?;
        taken += back.covers;
    }
    Ok(())
}

/// The minimal loop: a blocking read and a write, nothing between.
fn bare() -> anyhow::Result<()> {
    let socket: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let mut socket = File::from(socket);
    let mut message = [0; Frame::BYTES];
    while read_whole(&mut socket, &mut message)? {
        let back = Frame {
            value: monotonic_ns(),
            // Number 0 of the two.
            ..Frame::default()
        };
        socket.write_all(back.as_bytes())?;
    }
    Ok(())
}

/// `false` when the other side is gone.
pub(super) fn read_whole(from: &mut impl Read, into: &mut [u8]) -> anyhow::Result<bool> {
    match from.read_exact(into) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn take_bytes(mut from: impl Read + Write, bytes: usize) -> anyhow::Result<()> {
    let mut update = vec![0; bytes];
    while read_whole(&mut from, &mut update)? {
        from.write_all(&monotonic_ns().to_ne_bytes())?;
    }
    Ok(())
}

/// When the other side had it, by its answer.
pub(super) fn answered(bytes: &[u8]) -> anyhow::Result<u64> {
    match bytes.len() {
        Frame::BYTES => Ok(Frame::read_from_bytes(bytes).map_or(0, |frame| frame.value)),
        8 => Ok(u64::from_ne_bytes(bytes.try_into()?)),
        other => bail!(
            "an answer of {other} bytes, not {} or {}",
            size_of::<u64>(),
            Frame::BYTES
        ),
    }
}
