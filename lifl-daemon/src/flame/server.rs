//! The two ports: tasks that carry what comes there to the [`Router`] and back.
//!
//! ```text
//!  10105 ──accept──▶ one task a worker ──references──▶ ┌────────┐ ◀── what the kernel's part holds
//!                          ▲                           │ router │
//!                          └──────── messages ──────── │        │
//!  10106 ──accept──▶ one task a registration ──claim──▶└────────┘ ──▶ errands: a socket into the kernel's map ──▶ the router
//! ```

use std::collections::HashMap;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lifl_common::control::FlamePage;
use lifl_common::flame::{Address, MESSAGE_BYTES};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::owner::{self, Owner};
use super::router::{Conn, ConnId, Inserted, QUEUED_OF_WORKER, Queued, Router};
use super::rules::{Claim, Refusal};
use super::wire::{Message, Registration, Splitter};
use crate::accounts;
use crate::refusals::may_log;
use crate::sock_diag::SocketTable;

/// How long a registration may take to come.
const REGISTRATION: Duration = Duration::from_secs(5);

/// How long after 10 bytes two more may come.
const LONG_FORM: Duration = Duration::from_millis(100);

/// Registrations of one user that may be under way at a time. (All those of unknown callers count as one user's.)
const REGISTRATIONS_OF_USER: u32 = 512;

/// Messages that may lie unread on a worker's connection. So few are under way at once under any congestion window, and
/// they fit into any receive window.
const UNREAD: u32 = 8;

/// How soon a connection is looked at again on which a message has no room yet; the pause doubles up to the second.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(50));

/// How long a stream must be silent for a reference without an end to be whole.
const SILENCE: Duration = Duration::from_millis(20);

/// How long to wait for a descriptor.
const RETRY: Duration = Duration::from_millis(10);

/// How often what waits is looked through.
const SWEEP: Duration = Duration::from_millis(500);

/// What the tasks tell the router.
pub(super) enum Event {
    Connected(ConnId, Conn),
    Reference(ConnId, Message),
    Closed(ConnId),
    Claim(Claim),
    Inserted(Inserted),
    Status {
        uid: u32,
        after: Option<(u32, u32)>,
        reply: oneshot::Sender<FlamePage>,
    },
}

/// The listening sockets.
#[derive(Debug)]
pub(super) struct Ports {
    pub(super) skmsg: Port,
    pub(super) rpc: Port,
}

/// A listening socket, and what it takes to see who calls.
#[derive(Debug)]
pub(super) struct Port {
    listener: TcpListener,
    sockets: Arc<Mutex<SocketTable>>,
}

/// Serves until `shutdown`, then closes all connections and gives the router back.
pub(super) async fn serve(
    ports: Ports,
    mut router: Router,
    mut undelivered: mpsc::Receiver<(Address, Message)>,
    (events, mut inbox): (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    workers_of_user: u32,
    shutdown: CancellationToken,
) -> Router {
    let tasks = TaskTracker::new();
    let accepting = shutdown.child_token();
    tasks.spawn(accepting.clone().run_until_cancelled_owned(accept_workers(
        ports.skmsg,
        events.clone(),
        workers_of_user,
        tasks.clone(),
        accepting.clone(),
    )));
    tasks.spawn(accepting.clone().run_until_cancelled_owned(accept_registrations(
        ports.rpc,
        events,
        tasks.clone(),
        accepting,
    )));
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => break,
            event = inbox.recv() => match event {
                // The end closes all connections. Whose is closed by it is named below.
                _ if shutdown.is_cancelled() => break,
                Some(Event::Connected(id, conn)) => router.connected(id, conn),
                Some(Event::Reference(from, message)) => router.reference(from, message),
                Some(Event::Closed(id)) => router.closed(id),
                Some(Event::Claim(claim)) => router.claim(claim),
                Some(Event::Inserted(inserted)) => router.inserted(inserted),
                // Whoever asked may have left.
                Some(Event::Status { uid, after, reply }) => _ = reply.send(router.status(uid, after)),
                None => break,
            },
            Some((sender, message)) = undelivered.recv() => router.undelivered(sender, message),
            _ = sweep.tick() => router.expire(Instant::now()),
        }
    }
    router.name_left();
    inbox.close();
    tasks.close();
    tasks.wait().await;
    router
}

/// How many of a thing each user has, and that nobody has too many. Subordinate users' count for their owner.
#[derive(Clone, Debug)]
pub(super) struct Quota {
    each: u32,
    taken: Arc<Mutex<HashMap<Option<u32>, u32>>>,
}

/// One of them; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Share {
    quota: Quota,
    user: Option<u32>,
}

impl Quota {
    pub(super) fn new(each: u32) -> Self {
        Self {
            each,
            taken: Arc::default(),
        }
    }

    pub(super) fn take(&self, user: Option<u32>) -> Option<Share> {
        let user = user.map(accounts::owner_of);
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.entry(user).or_default();
        if *taken >= self.each {
            return None;
        }
        *taken += 1;
        Some(Share {
            quota: self.clone(),
            user,
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.quota.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = all.get_mut(&self.user) {
            *taken -= 1;
            if *taken == 0 {
                all.remove(&self.user);
            }
        }
    }
}

impl Port {
    pub(super) fn new(listener: TcpListener, sockets: SocketTable) -> Self {
        Self {
            listener,
            sockets: Arc::new(Mutex::new(sockets)),
        }
    }

    pub(super) fn local(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The next connection, with its far end as the kernel knows it.
    async fn accept(&self) -> (TcpStream, SocketAddrV4, Option<Owner>) {
        loop {
            let accepted = self.listener.accept().await.and_then(|(stream, peer)| {
                let (SocketAddr::V4(peer), SocketAddr::V4(local)) = (peer, stream.local_addr()?) else {
                    return Ok(None);
                };
                let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(Some((stream, peer, owner::owner(&sockets, peer, local)?)))
            });
            match accepted {
                Ok(Some(accepted)) => return accepted,
                Ok(None) => {}
                Err(error) => {
                    // Out of descriptors, most likely: who is connected must go on, so wait for one to leave.
                    tracing::error!("accept for Flame failed: {error}");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

async fn accept_workers(
    port: Port,
    events: mpsc::Sender<Event>,
    each: u32,
    tasks: TaskTracker,
    shutdown: CancellationToken,
) {
    let quota = Quota::new(each);
    for number in 0.. {
        let (stream, peer, owner) = port.accept().await;
        let Some((uid, inode)) = owner
            .and_then(|owner| Some((owner.uid?, owner.inode)))
            .filter(|&(_, inode)| inode != 0)
        else {
            tracing::debug!(%peer, "closed before it was accepted");
            continue;
        };
        let Some(share) = quota.take(Some(uid)).map(Arc::new) else {
            if let Some(dropped) = may_log(uid) {
                tracing::warn!(uid, %peer, each, dropped, "a Flame worker too many of this user: refused (--flame-workers raises the number)");
            }
            continue;
        };
        let id = ConnId(number);
        let (outbox, queued) = mpsc::channel(QUEUED_OF_WORKER);
        let kick = shutdown.child_token();
        let conn = Conn::new((uid, inode), peer, outbox, kick.clone(), Arc::clone(&share));
        if events.send(Event::Connected(id, conn)).await.is_err() {
            return;
        }
        let events = events.clone();
        let receiver = Receiver {
            sockets: Arc::clone(&port.sockets),
            address: peer,
            room: 0,
        };
        tasks.spawn(async move {
            tokio::select! {
                () = kick.cancelled() => {}
                () = converse(stream, id, (uid, peer), &events, queued, receiver) => {}
            }
            let _ = events.send(Event::Closed(id)).await;
            drop(share);
        });
    }
}

/// Carries a worker's references to the router, and messages to the worker, until either side ends.
async fn converse(
    stream: TcpStream,
    id: ConnId,
    (uid, peer): (u32, SocketAddrV4),
    events: &mpsc::Sender<Event>,
    mut queued: mpsc::Receiver<Queued>,
    mut receiver: Receiver,
) {
    // Each message is a segment of its own.
    let _ = stream.set_nodelay(true);
    let (mut from, mut to) = stream.into_split();
    let reading = async {
        let mut splitter = Splitter::default();
        let mut bytes = [0; 16 << 10];
        loop {
            let read = if splitter.is_waiting() {
                match tokio::time::timeout(SILENCE, from.read(&mut bytes)).await {
                    Ok(read) => read,
                    Err(_silent) => {
                        if let Some(message) = splitter.flush()
                            && events.send(Event::Reference(id, message)).await.is_err()
                        {
                            return;
                        }
                        from.read(&mut bytes).await
                    }
                }
            } else {
                from.read(&mut bytes).await
            };
            let length = match read {
                Ok(0) | Err(_) => return,
                Ok(length) => length,
            };
            let mut whole = Vec::new();
            let pushed = splitter.push(&bytes[..length], &mut whole);
            for message in whole {
                if events.send(Event::Reference(id, message)).await.is_err() {
                    return;
                }
            }
            if let Err(error) = pushed {
                if let Some(dropped) = may_log(uid) {
                    tracing::warn!(uid, %peer, dropped, "Flame connection closed: {error}");
                }
                return;
            }
        }
    };
    let writing = async {
        while let Some(queued) = queued.recv().await {
            receiver.has_room(to.as_ref()).await;
            if to.write_all(queued.message.bytes()).await.is_err() {
                // The reader sees the end of it, too.
                break;
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = reading => {}
        () = writing => {}
    }
}

/// The far end of a worker's connection, which takes what one `recv(1024)` returns for one message. A stream has no
/// boundaries: it must never hold a part of a message. So a message is written only when all before it have been sent and
/// few of them are unread: then it goes out whole, in a segment of its own, and no window cuts it.
struct Receiver {
    sockets: Arc<Mutex<SocketTable>>,
    address: SocketAddrV4,
    /// Messages that surely have room.
    room: u32,
}

impl Receiver {
    /// Waits until one message more has room.
    async fn has_room(&mut self, stream: &TcpStream) {
        let (mut pause, longest) = LOOK_AGAIN;
        while self.room == 0 || unsent_bytes(stream) > 0 {
            self.room = UNREAD.saturating_sub(self.unread(stream));
            if self.room == 0 || unsent_bytes(stream) > 0 {
                tokio::time::sleep(pause).await;
                pause = longest.min(2 * pause);
            }
        }
        self.room -= 1;
    }

    /// Messages, or parts of one, that it has not read. Where the kernel does not tell, none: then what is unsent decides.
    fn unread(&self, stream: &TcpStream) -> u32 {
        let Ok(SocketAddr::V4(local)) = stream.local_addr() else {
            return 0;
        };
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let found = sockets.at(self.address, local).ok().flatten();
        found.map_or(0, |found| {
            found.receive_queue_bytes.div_ceil(MESSAGE_BYTES as u32)
        })
    }
}

/// Bytes that were written to a connection and that the kernel has not sent yet; 0 where it does not tell.
fn unsent_bytes(stream: &TcpStream) -> u32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: `SIOCOUTQNSD` writes one int, to a place that outlives the call.
    let status = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCOUTQNSD, &raw mut bytes) };
    if status == 0 {
        u32::try_from(bytes).unwrap_or(0)
    } else {
        0
    }
}

/// `include/uapi/linux/sockios.h`.
const SIOCOUTQNSD: libc::Ioctl = 0x894B;

async fn accept_registrations(
    port: Port,
    events: mpsc::Sender<Event>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
) {
    let quota = Quota::new(REGISTRATIONS_OF_USER);
    for number in 1.. {
        let (stream, peer, owner) = port.accept().await;
        let caller = owner.and_then(|owner| owner.uid);
        let Some(share) = quota.take(caller) else {
            if let Some(dropped) = may_log(caller.unwrap_or(u32::MAX)) {
                tracing::warn!(caller, %peer, dropped, "too many Flame registrations of this user at a time: refused");
            }
            continue;
        };
        let caller = Caller {
            number,
            uid: caller,
            peer,
        };
        let mut bytes = Received::default();
        // As a rule all is there already: the sooner it is looked at, the surer its process has what it names.
        if bytes.take_ready(&stream) {
            drop(stream);
            if let Some(claim) = caller.claim(&bytes)
                && events.send(Event::Claim(claim)).await.is_err()
            {
                return;
            }
            continue;
        }
        let events = events.clone();
        let registering = async move {
            bytes.wait(stream).await;
            if let Some(claim) = caller.claim(&bytes) {
                let _ = events.send(Event::Claim(claim)).await;
            }
            drop(share);
        };
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(registering));
    }
}

/// Who registers.
#[derive(Clone, Copy)]
struct Caller {
    number: u64,
    uid: Option<u32>,
    peer: SocketAddrV4,
}

impl Caller {
    fn claim(self, received: &Received) -> Option<Claim> {
        let bytes = received.filled();
        let Some(registration) = Registration::parse(bytes) else {
            let refusal = Refusal::NotARegistration { bytes: bytes.len() };
            if let Some(dropped) = may_log(self.uid.unwrap_or(u32::MAX)) {
                tracing::warn!(caller = self.uid, peer = %self.peer, dropped, "Flame registration refused: {refusal}");
            }
            return None;
        };
        Some(Claim {
            number: self.number,
            registration,
            caller: self.uid,
            descriptor: owner::descriptor(registration.pid, registration.fd),
        })
    }
}

/// A registration as it comes in, in however many segments.
#[derive(Default)]
struct Received {
    bytes: [u8; Registration::LONG_BYTES],
    length: usize,
}

impl Received {
    fn filled(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Takes what has come; says whether that is all.
    fn take_ready(&mut self, stream: &TcpStream) -> bool {
        while self.length < self.bytes.len() {
            match recv(
                stream.as_raw_fd(),
                &mut self.bytes[self.length..],
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(0) => return true,
                Ok(length) => self.length += length,
                Err(errno) => return errno != Errno::EAGAIN,
            }
        }
        true
    }

    /// Takes what comes in time, and closes the connection.
    async fn wait(&mut self, mut stream: TcpStream) {
        let deadline = tokio::time::Instant::now() + REGISTRATION;
        while self.length < self.bytes.len() {
            // Nothing says that ten bytes are all: wait for the end, but not for long.
            let patience = if self.length == Registration::SHORT_BYTES {
                deadline.min(tokio::time::Instant::now() + LONG_FORM)
            } else {
                deadline
            };
            let room = &mut self.bytes[self.length..];
            match tokio::time::timeout_at(patience, stream.read(room)).await {
                Ok(Ok(length)) if length > 0 => self.length += length,
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    /// A worker that reads in its own time, under a receive window of the system's size and one of the smallest.
    #[tokio::test]
    async fn a_receive_of_a_messages_size_never_gets_a_part_of_one() {
        for receive_buffer in [None, Some(2048)] {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            if let Some(bytes) = receive_buffer {
                setsockopt(&socket, sockopt::RcvBuf, &bytes).expect("set");
            }
            let at = listener.local_addr().expect("bound");
            let (worker, accepted) = tokio::join!(socket.connect(at), listener.accept());
            let (worker, (mut stream, SocketAddr::V4(peer))) =
                (worker.expect("connected"), accepted.expect("accepted"))
            else {
                panic!("an IPv4 address");
            };
            stream.set_nodelay(true).expect("set");
            let mut receiver = Receiver {
                sockets: Arc::new(Mutex::new(SocketTable::open().expect("a socket"))),
                address: peer,
                room: 0,
            };
            const MESSAGES: u8 = 200;
            let writing = async {
                for n in 0..MESSAGES {
                    receiver.has_room(&stream).await;
                    assert!(receiver.unread(&stream) <= UNREAD);
                    stream.write_all(&[n; MESSAGE_BYTES]).await.expect("written");
                }
            };
            let reading = async {
                let mut bytes = [0; MESSAGE_BYTES];
                for n in 0..MESSAGES {
                    // Sometimes as fast as they come, and sometimes all have time to lie there.
                    if n % 16 == 0 {
                        tokio::time::sleep(Duration::from_millis(300)).await;
                    }
                    let read = loop {
                        worker.readable().await.expect("readable");
                        match worker.try_read(&mut bytes) {
                            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                            read => break read.expect("read"),
                        }
                    };
                    assert_eq!((read, bytes[0], bytes[MESSAGE_BYTES - 1]), (MESSAGE_BYTES, n, n));
                }
            };
            tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(writing, reading) })
                .await
                .expect("in time");
        }
    }

    #[test]
    fn nobody_takes_more_than_a_share_and_gives_it_back() {
        let quota = Quota::new(2);
        let first = quota.take(Some(1)).expect("the first");
        let _second = quota.take(Some(1)).expect("the second");
        assert!(quota.take(Some(1)).is_none());
        assert!(quota.take(Some(2)).is_some() && quota.take(None).is_some());
        drop(first);
        assert!(quota.take(Some(1)).is_some());
    }
}
