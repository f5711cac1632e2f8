//! Limits that are reached: the request fails with the numbers and what helps, and nobody else notices.

use lifl_common::arena::Layout;
use lifl_common::client::{Client, ClientError};
use lifl_common::control::ErrorCode;
use lifl_common::frame::Frame;

use crate::process::{Daemon, connect, is_root, job, refused, within, worker};

const PAGE: Layout = Layout {
    slots: 1,
    slot_bytes: 4096,
};

/// The daemon's descriptors, and those of them that are of `/dev/null`, as the one is that it keeps to turn people away.
fn open(daemon: &Daemon) -> (usize, usize) {
    let folder = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("a living process");
    let links: Vec<_> = folder.flatten().map(|fd| std::fs::read_link(fd.path())).collect();
    let null = |link: &&std::io::Result<std::path::PathBuf>| {
        link.as_ref().is_ok_and(|link| link.as_os_str() == "/dev/null")
    };
    (links.len(), links.iter().filter(null).count())
}

#[tokio::test]
async fn without_a_descriptor_left_requests_say_so_and_those_who_are_there_go_on() {
    let mut daemon = Daemon::new("");
    let command = daemon.command(
        "ulimit -n 48; exec \"$@\"",
        &["--plane", "relay", "--huge-pages", "never"],
    );
    daemon.spawn(command);
    daemon.listening().await;
    let socket = daemon.socket();
    let (mut parent, id, mut up) = job(&socket, "small").await;
    let (mut child, mut down) = worker(&socket, id, "trainer-1").await;
    let used = child.status(None).await.expect("a status").daemon.pool_used_bytes;
    // Whoever looked whether the daemon listens has left, and what that took is free again.
    within(async {
        while child.status(None).await.expect("a status").users[0]
            .used
            .connections
            > 2
        {}
    })
    .await;

    let (_, spares) = open(&daemon);
    let mut crowd = Vec::new();
    let (code, message) = loop {
        match within(Client::connect(&socket)).await {
            Ok(client) => crowd.push(client),
            Err(ClientError::Refused { code, message }) => break (code, message),
            Err(other) => panic!("{other}"),
        }
        assert!(crowd.len() < 48, "nobody was refused");
    };
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(
        message.contains("all 48 descriptors") && message.contains("LimitNOFILE"),
        "{message}"
    );
    // The one that turns people away is kept again a moment after it has done so.
    within(async {
        while open(&daemon).0 < 48 || open(&daemon).1 < spares {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (code, message) = refused(child.create_arena(PAGE).await);
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(message.contains("all 48 descriptors"), "{message}");
    let last = crowd.last_mut().expect("a crowd");
    let (code, message) = refused(last.register(id, "trainer", "trainer-2").await);
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(message.contains("all 48 descriptors"), "{message}");

    // Frames need nothing of all that.
    let frame = Frame {
        to: up.worker,
        from: down.worker,
        round: 1,
        ..Frame::default()
    };
    within(down.frames.send(&[frame])).await.expect("sent");
    assert_eq!(within(up.frames.recv()).await.expect("read"), Some(frame));

    // With one descriptor the memory can be made but not handed over: it is given back. The last of the crowd was
    // disconnected, so one is free now or soon.
    let refusals = within(async {
        let mut refusals = 0;
        loop {
            match child.create_arena(PAGE).await {
                Ok(_) => break refusals,
                Err(ClientError::Refused { code, message }) => {
                    assert_eq!(code, ErrorCode::Full, "{message}");
                    let now = child.status(None).await.expect("a status").daemon.pool_used_bytes;
                    assert_eq!(now, used, "what could not be handed over takes memory");
                    refusals += 1;
                    crowd.pop();
                }
                Err(other) => panic!("{other}"),
            }
        }
    })
    .await;
    assert!(refusals > 0);
    drop(crowd);
    within(async { while Client::connect(&socket).await.is_err() {} }).await;
    parent.end_job("over").await.expect("its own");
    daemon.terminate();
}

#[tokio::test]
async fn a_memory_file_larger_than_the_process_may_have_ends_its_request_and_not_the_daemon() {
    let mut daemon = Daemon::new("");
    // bash counts in KiB.
    let command = daemon.command(
        "ulimit -f 2048; exec \"$@\"",
        &["--plane", "relay", "--huge-pages", "never"],
    );
    daemon.spawn(command);
    daemon.listening().await;
    let (mut client, _, _registration) = job(&daemon.socket(), "large").await;
    let layout = Layout {
        slots: 3,
        slot_bytes: 1 << 20,
    };
    let (code, message) = refused(client.create_arena(layout).await);
    assert_eq!(code, ErrorCode::Full, "{message}");
    let (limit, remedy) = ("may have 2 MiB each, this one needs 3", "LimitFSIZE");
    assert!(message.contains(limit) && message.contains(remedy), "{message}");
    let used = client
        .status(None)
        .await
        .expect("a status")
        .daemon
        .pool_used_bytes;
    assert_eq!(used, 0);
    client.create_arena(PAGE).await.expect("small enough");
    daemon.terminate();
}

#[tokio::test]
async fn huge_pages_or_nothing_says_how_many_are_missing_and_takes_nothing() {
    if !is_root() {
        return;
    }
    let mut daemon = Daemon::new("");
    // As a user who cannot have the kernel make some.
    let more = [
        "--plane",
        "relay",
        "--huge-pages",
        "always",
        "--pool-mib",
        "100000000",
    ];
    let command = daemon.command(
        "exec setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\"",
        &more,
    );
    std::os::unix::fs::chown(daemon.folder.path(), Some(65534), Some(65534)).expect("given");
    daemon.spawn(command);
    daemon.listening().await;
    let (mut client, _, _registration) = job(&daemon.socket(), "huge").await;
    let layout = Layout {
        slots: 1,
        slot_bytes: 1 << 45,
    };
    let (code, message) = refused(client.create_arena(layout).await);
    assert_eq!(code, ErrorCode::Full, "{message}");
    assert!(
        message.contains("needs 16777216 huge pages of 2 MiB"),
        "{message}"
    );
    assert!(
        message.contains("vm.nr_hugepages") && message.contains("--huge-pages never"),
        "{message}"
    );
    let status = client.status(None).await.expect("a status");
    assert_eq!((status.daemon.pool_used_bytes, status.daemon.uid), (0, 65534));
    daemon.terminate();
}

#[tokio::test]
async fn a_quota_that_is_used_up_is_told_with_its_numbers_and_its_key() {
    let settings = "[quota]\npool_mib = 2\nworkers = 2\njobs = 1";
    let mut daemon = Daemon::start(settings, &["--plane", "relay", "--huge-pages", "never"]).await;
    let socket = daemon.socket();
    let (mut client, id, _registration) = job(&socket, "first").await;
    let file = daemon.settings().display().to_string();
    let check = |(code, message): (ErrorCode, String), numbers: &str, key: &str| {
        assert_eq!(code, ErrorCode::Full, "{message}");
        let remedy = format!("raise quota.{key} in {file}");
        assert!(
            message.contains(numbers) && message.ends_with(&remedy),
            "{message}"
        );
    };
    let layout = Layout {
        slots: 3,
        slot_bytes: 512 << 10,
    };
    client.create_arena(layout).await.expect("fits");
    let numbers = "has 2 MiB of a quota of 2 MiB, the arena needs 2 MiB";
    check(refused(client.create_arena(layout).await), numbers, "pool_mib");
    let (_second, _) = worker(&socket, id, "trainer-1").await;
    let mut third = connect(&socket).await;
    let late = refused(third.register(id, "trainer", "trainer-2").await);
    check(late, "has 2 workers, and a quota of 2", "workers");
    check(
        refused(third.create_job("second").await),
        "has 1 jobs, and a quota of 1",
        "jobs",
    );
    // `lifl status` shows what counted.
    let users = client.status(None).await.expect("a status").users;
    let own = users[0];
    assert_eq!(own.uid, nix::unistd::geteuid().as_raw());
    assert_eq!(
        (own.used.pool_bytes, own.used.workers, own.used.jobs),
        (3 << 19, 2, 1)
    );
    assert_eq!(
        (own.quota.pool_bytes, own.quota.workers, own.quota.jobs),
        (2 << 20, 2, 1)
    );
    // Room again as soon as one has left.
    drop(client);
    within(async { while third.create_job("second").await.is_err() {} }).await;
    daemon.terminate();
}
