//! A client and somebody at the socket who does not answer, or late. Time is the runtime's, and passes when nobody has anything
//! to do.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket};
use tokio::time::Instant;

use super::{Client, ClientError};
use crate::arena::{Layout, memfd};
use crate::control::packet::PacketSocket;
use crate::control::{ErrorCode, Message, PROTOCOL, Reply, Request, Status, Welcome};
use crate::id::{ArenaId, JobId, WorkerId};
use crate::plane::PlaneKind;

fn listener(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket");
    bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("short")).expect("bound");
    listen(&listener, Backlog::new(8).expect("in range")).expect("listens");
    listener
}

fn welcome() -> Welcome {
    Welcome {
        protocol: PROTOCOL,
        version: String::new(),
        pid: 1,
        plane: PlaneKind::Relay,
        plane_reason: String::new(),
        pinned: false,
        pool_bytes: 0,
        pool_used_bytes: 0,
        huge_pages: false,
        max_workers: 1,
        workers: 0,
        awaited: 0,
        uid: 0,
        capabilities: Vec::new(),
    }
}

/// A daemon that greets, registers, and answers each other request after a time of its own; after the last, at once.
async fn slow_daemon(listener: OwnedFd, delays: Vec<u64>) {
    let mut delays = delays.into_iter();
    let socket = accepted(&listener).await;
    while let Ok(Some((request, _))) = socket.recv::<Request>().await {
        let reply = match request {
            Request::Hello { .. } => Reply::Welcome(welcome()),
            Request::Register { .. } => registered(),
            _ => {
                let delay = delays.next().unwrap_or(0);
                tokio::time::sleep(Duration::from_secs(delay)).await;
                Reply::Status(Status {
                    daemon: welcome(),
                    jobs: Vec::new(),
                    workers: Vec::new(),
                    more: false,
                    users: Vec::new(),
                })
            }
        };
        let _ = socket.send(&Message::Reply(reply), &[]).await;
    }
}

fn registered() -> Reply {
    Reply::Registered {
        worker: WorkerId(2),
        owner: WorkerId(1),
    }
}

async fn accepted(listener: &OwnedFd) -> PacketSocket {
    let accepted = loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK) {
            Ok(accepted) => break accepted,
            Err(Errno::EAGAIN) => tokio::time::sleep(Duration::from_millis(1)).await,
            Err(errno) => panic!("{errno}"),
        }
    };
    // SAFETY: accept4 has just made it, and nobody else knows it.
    PacketSocket::new(unsafe { OwnedFd::from_raw_fd(accepted) }).expect("watched")
}

/// A daemon that gives huge pages which cannot be used, and to the request for others answers with an error, or is gone.
async fn daemon_of_huge_pages(listener: OwnedFd, refuses: bool) {
    let socket = accepted(&listener).await;
    while let Ok(Some((request, _))) = socket.recv::<Request>().await {
        let empty = memfd::create("test", 0, false).expect("a memfd");
        let (reply, fds) = match request {
            Request::Hello { .. } => (Reply::Welcome(welcome()), vec![]),
            Request::CreateArena { instead_of: None, .. } => {
                let created = Reply::ArenaCreated {
                    arena: ArenaId(8),
                    page_bytes: memfd::HUGE_PAGE_BYTES,
                    note: None,
                };
                (created, vec![empty.as_raw_fd()])
            }
            Request::CreateArena { .. } if refuses => {
                let refused = Reply::Error {
                    code: ErrorCode::Full,
                    message: "the pool is full".to_owned(),
                };
                (refused, vec![])
            }
            Request::CreateArena { .. } => return,
            _ => (registered(), vec![]),
        };
        let _ = socket.send(&Message::Reply(reply), &fds).await;
    }
}

#[tokio::test]
async fn only_a_refusal_of_ordinary_pages_is_told_as_a_lack_of_huge_ones() {
    for refuses in [true, false] {
        let (_folder, path) = place();
        tokio::spawn(daemon_of_huge_pages(listener(&path), refuses));
        let mut client = Client::connect(&path).await.expect("connected");
        client.register(JobId(1), "top", "t").await.expect("registered");
        let layout = Layout::for_objects(1, 1 << 20).expect("small");
        let error = client.create_arena(layout).await.expect_err("no arena");
        let expected = match refuses {
            true => matches!(error, ClientError::HugePages { .. }),
            false => matches!(error, ClientError::Gone { .. }),
        };
        assert!(expected, "{error}");
    }
}

fn is_silent(error: &ClientError, at: &Path) -> bool {
    let text = error.to_string();
    let own = format!("process {}", std::process::id());
    let says = |part: &str| text.contains(part);
    matches!(error, ClientError::Silent { .. })
        && says(&at.display().to_string())
        && says(&own)
        && says("kill -CONT")
        && says("restart lifl-daemon")
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_never_answers_is_given_up_by_name_with_a_remedy() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lifl.sock");
    let _listener = listener(&path);
    let begun = Instant::now();
    let error = Client::connect(&path).await.expect_err("nobody answers");
    assert!(is_silent(&error, &path), "{error}");
    assert!(
        begun.elapsed() <= Duration::from_secs(11),
        "{:?}",
        begun.elapsed()
    );
}

fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("lifl.sock");
    (folder, path)
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_falls_silent_is_given_up_and_its_late_answer_taken_for_none() {
    let (_folder, path) = place();
    tokio::spawn(slow_daemon(listener(&path), vec![12]));
    let mut client = Client::connect(&path).await.expect("connected");
    let begun = Instant::now();
    let error = client.status(None).await.expect_err("too late");
    assert!(is_silent(&error, &path), "{error}");
    assert!(
        begun.elapsed() <= Duration::from_secs(11),
        "{:?}",
        begun.elapsed()
    );
    client
        .status(None)
        .await
        .expect("its own answer, after the late one");
}

#[tokio::test(start_paused = true)]
async fn a_coordinator_does_without_a_status_while_the_daemon_is_silent() {
    let (_folder, path) = place();
    tokio::spawn(slow_daemon(listener(&path), vec![1000]));
    let mut client = Client::connect(&path).await.expect("connected");
    client.register(JobId(1), "top", "t").await.expect("registered");
    let begun = Instant::now();
    for _ in 0..20 {
        assert_eq!(client.status_now(None).await.expect("no error"), None);
    }
    assert!(begun.elapsed() <= Duration::from_secs(3), "{:?}", begun.elapsed());
    // As its loop waits for events, in which the late answer comes.
    let waited = tokio::time::timeout(Duration::from_secs(1000), client.event()).await;
    assert!(waited.is_err(), "{waited:?}");
    let status = client.status_now(None).await.expect("no error");
    assert!(status.is_some(), "it answers again");
}

#[tokio::test(start_paused = true)]
async fn a_worker_waits_for_a_daemon_that_is_slow_but_not_for_ever() {
    for (delay, is_waited_for) in [(120_u64, true), (1000, false)] {
        let (_folder, path) = place();
        tokio::spawn(slow_daemon(listener(&path), vec![delay]));
        let mut client = Client::connect(&path).await.expect("connected");
        client
            .register(JobId(1), "trainer", "t")
            .await
            .expect("registered");
        let status = client.status(None).await;
        assert_eq!(status.is_ok(), is_waited_for, "{delay} s: {status:?}");
        if let Err(error) = status {
            assert!(is_silent(&error, &path), "{error}");
        }
    }
}
