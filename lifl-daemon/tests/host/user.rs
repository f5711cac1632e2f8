//! What root's daemon becomes before it serves anybody, and what it leaves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lifl_common::plane::PlaneKind;
use nix::sys::signal::Signal;
use nix::unistd::User;

use crate::process::{Daemon, PATIENCE, connect, has, is_root, job};
use crate::supervised::{SETS, everything_works, threads, threads_words};

const SURPLUS_LIMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

fn nobody() -> User {
    User::from_name("nobody")
        .expect("asked")
        .expect("every system has it")
}

fn pins(test: &str) -> String {
    format!("/sys/fs/bpf/lifl-test-{test}-{}", std::process::id())
}

/// Nothing of root's is left in any thread of a daemon.
fn is_that_users(pid: u32, uid: u32, gid: u32) {
    for (what, id) in [("Uid", uid), ("Gid", gid)] {
        let all = [id; 4].map(|id| id.to_string()).join(" ");
        assert_eq!(threads_words(pid, what), BTreeSet::from([all]), "{what}");
    }
    let groups = threads_words(pid, "Groups");
    assert_eq!(groups, BTreeSet::from([gid.to_string()]), "its own groups only");
    for set in SETS {
        assert_eq!(threads(pid, set), BTreeSet::from([0]), "{set}");
    }
    assert_eq!(threads(pid, "NoNewPrivs"), BTreeSet::from([1]));
    assert_eq!(threads(pid, "Seccomp"), BTreeSet::from([2]));
}

/// The processes that a daemon has started.
fn children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("a process");
    children
        .split_whitespace()
        .map(|pid| pid.parse().expect("a pid"))
        .collect()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn roots_daemon_becomes_another_user_serves_as_before_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let (user, pins) = (nobody(), pins("user"));
    let owner_before = fs::metadata(SURPLUS_LIMIT).map(|found| found.uid()).ok();
    let mut daemon = Daemon::new("");
    let command = daemon.command("exec \"$@\"", &["--user", "nobody", "--pin", &pins]);
    daemon.spawn(command);
    daemon.listening().await;
    daemon.logged("listening").await;
    let client = connect(&daemon.socket()).await;
    if !has(&daemon, &client, PlaneKind::Sockmap) {
        return;
    }
    let welcome = client.welcome();
    assert_eq!(
        (welcome.uid, welcome.capabilities.as_slice()),
        (user.uid.as_raw(), [].as_slice())
    );
    assert!(welcome.pinned, "{}", welcome.plane_reason);
    assert!(
        welcome.huge_pages || owner_before.is_none(),
        "it may have huge pages made"
    );
    drop(client);
    is_that_users(daemon.pid(), user.uid.as_raw(), user.gid.as_raw());
    // What cleans up is root's, without what root may.
    let cleaners = children(daemon.pid());
    assert_eq!(cleaners.len(), 1, "{cleaners:?}");
    wait_until("the cleaner keeps capabilities", || {
        threads(cleaners[0], "CapEff") == BTreeSet::from([1])
    });
    everything_works(&daemon.socket()).await;
    is_that_users(daemon.pid(), user.uid.as_raw(), user.gid.as_raw());
    let mut client = connect(&daemon.socket()).await;
    wait_until_no_worker(&mut client).await;
    drop(client);
    daemon.terminate();
    assert!(!daemon.socket().exists(), "the socket is left");
    assert!(!Path::new(&pins).exists(), "pins are left");
    assert!(
        !Path::new(&format!("/proc/{}", cleaners[0])).exists(),
        "the cleaner is left"
    );
    assert_eq!(
        fs::metadata(SURPLUS_LIMIT).map(|found| found.uid()).ok(),
        owner_before
    );
}

async fn wait_until_no_worker(client: &mut lifl_common::client::Client) {
    let begun = Instant::now();
    while !client.status(None).await.expect("a status").workers.is_empty() {
        assert!(begun.elapsed() < PATIENCE, "workers are left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Pins of a daemon that had root's uid, and of one that was killed, are taken over; `--reset` takes them away.
#[tokio::test]
async fn jobs_outlive_such_daemons_and_the_change_from_root() {
    if !is_root() {
        return;
    }
    let pins = pins("upgrade");
    let mut daemon = Daemon::new("grace = 60\n");
    let mut uids = Vec::new();
    let mut held = None;
    for user in ["root", "nobody", "nobody", "root"] {
        let command = daemon.command("exec \"$@\"", &["--user", user, "--pin", &pins]);
        daemon.spawn(command);
        daemon.listening().await;
        let client = connect(&daemon.socket()).await;
        if !has(&daemon, &client, PlaneKind::Sockmap) {
            return;
        }
        uids.push(client.welcome().uid);
        if uids.len() == 1 {
            held = Some(job(&daemon.socket(), "held").await);
        } else {
            assert_eq!(client.welcome().awaited, 1, "{user}: {}", daemon.log());
        }
        drop(client);
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        assert!(Path::new(&pins).exists(), "{user}: a job goes on");
    }
    assert_eq!(uids, [0, nobody().uid.as_raw(), nobody().uid.as_raw(), 0]);
    drop(held);
    let reset = std::process::Command::new(env!("CARGO_BIN_EXE_lifl-daemon"))
        .args(["--reset", "--pin", &pins])
        .output()
        .expect("run");
    assert!(reset.status.success() && !Path::new(&pins).exists(), "{reset:?}");
}

#[tokio::test]
async fn the_socket_of_such_a_daemon_goes_even_if_it_is_killed() {
    if !is_root() {
        return;
    }
    let mut daemon = Daemon::start("", &["--user", "nobody", "--plane", "relay"]).await;
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    wait_until("the socket is left", || !daemon.socket().exists());
}

#[tokio::test]
async fn a_user_that_is_not_there_is_refused_with_the_remedy() {
    if !is_root() {
        return;
    }
    let mut daemon = Daemon::new("");
    let command = daemon.command("exec \"$@\"", &["--user", "no-such-user"]);
    daemon.spawn(command);
    assert_eq!(daemon.wait().code(), Some(2));
    assert!(
        daemon.log().contains("useradd --system no-such-user"),
        "{}",
        daemon.log()
    );
    assert!(!daemon.socket().exists());
}

/// With and without a user lifl, by a file of users of the test's own in a mount namespace.
#[tokio::test]
async fn it_becomes_user_lifl_where_there_is_one_and_says_so_where_not() {
    const UID: u32 = 4_206_001;
    if !is_root() {
        return;
    }
    let users = fs::read_to_string("/etc/passwd").expect("users");
    let others: Vec<&str> = users.lines().filter(|line| !line.starts_with("lifl:")).collect();
    let without = format!("{}\n", others.join("\n"));
    let with = format!("{without}lifl:x:{UID}:{UID}::/:/usr/sbin/nologin\n");
    for (users, uid) in [(with, UID), (without, 0)] {
        let mut daemon = Daemon::new("");
        let file = daemon.folder.path().join("passwd");
        fs::write(&file, users).expect("written");
        let shell = format!(
            "mount --bind {} /etc/passwd || exit 9; for a; do [[ $a = --user=root ]] || with+=(\"$a\"); done; \
             exec \"${{with[@]}}\"",
            file.display()
        );
        let in_namespace =
            format!("exec unshare --mount --propagation private bash -c '{shell}' bash \"$@\"");
        let command = daemon.command(&in_namespace, &["--plane", "relay"]);
        daemon.spawn(command);
        daemon.listening().await;
        daemon.logged("listening").await;
        let client = connect(&daemon.socket()).await;
        assert_eq!(client.welcome().uid, uid, "{}", daemon.log());
        assert_eq!(client.welcome().capabilities, [""; 0]);
        let said = daemon.log().contains("useradd --system lifl");
        assert_eq!(said, uid == 0, "{}", daemon.log());
        drop(client);
        daemon.terminate();
        assert!(!daemon.socket().exists());
    }
}
