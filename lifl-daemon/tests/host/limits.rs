//! A daemon where control groups and resource limits leave little.

use lifl_common::arena::Layout;
use lifl_common::client::Client;
use lifl_common::control::ErrorCode;
use nix::sys::signal::Signal;

use crate::cgroup::Group;
use crate::process::{Daemon, connect, is_root, job, refused, within, worker};

/// The end of a daemon that is started by that command.
fn end(daemon: &mut Daemon, command: std::process::Command) -> (Option<i32>, String) {
    daemon.spawn(command);
    let status = daemon.wait();
    (status.code(), daemon.log())
}

#[test]
fn without_a_thread_it_does_not_start_and_says_which_limit() {
    let Some(group) = Group::new("pids") else { return };
    for most in [1, 2, 3, 10] {
        let mut daemon = Daemon::new("");
        group.set("pids.max", "pids.max", most);
        let command = group.command("", &daemon.command("exec \"$@\"", &["--plane", "relay"]));
        let (code, log) = end(&mut daemon, command);
        assert_eq!(code, Some(3), "{log}");
        let by = format!("pids.max of cgroup {} allows {most}", group.name());
        assert!(log.contains(&by) && log.contains("TasksMax"), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[tokio::test]
async fn one_that_runs_lives_on_where_no_thread_can_be_had() {
    let Some(group) = Group::new("pids") else { return };
    let mut daemon = Daemon::new("");
    // Itself, one for tasks, two for what blocks, four for a user's descriptors, the log's, and two that add credit.
    group.set("pids.max", "pids.max", 11);
    let command = group.command("", &daemon.command("exec \"$@\"", &["--plane", "relay"]));
    daemon.spawn(command);
    daemon.listening().await;
    let socket = daemon.socket();
    let (mut parent, id, _up) = job(&socket, "few").await;
    let (mut child, _down) = worker(&socket, id, "trainer-1").await;
    let layout = Layout {
        slots: 1,
        slot_bytes: 4096,
    };
    within(child.create_arena(layout)).await.expect("an arena");
    // Fewer than there are.
    group.set("pids.max", "pids.max", 1);
    // A name to look up, and an address that the gateway may not have.
    let _ = within(parent.open_gateway(None, Some("localhost:1".to_owned()), 4096)).await;
    within(connect(&socket)).await;
    assert!(within(Client::connect(&socket)).await.is_ok());
    // Again enough: whatever waited for a thread has one.
    group.set("pids.max", "pids.max", 11);
    within(child.create_arena(layout)).await.expect("an arena");
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    daemon.terminate();
}

#[tokio::test]
async fn who_needs_a_thread_that_cannot_be_had_is_told_and_others_are_served() {
    if !is_root() {
        return;
    }
    let Some(group) = Group::new("pids") else { return };
    let mut daemon = Daemon::new("");
    // Room for both users' threads to begin with.
    group.set("pids.max", "pids.max", 32);
    let command = group.command("", &daemon.command("exec \"$@\"", &["--plane", "relay"]));
    daemon.spawn(command);
    daemon.listening().await;
    let socket = daemon.socket();
    let (_parent, id, _up) = job(&socket, "few").await;
    let (mut child, _down) = worker(&socket, id, "trainer-1").await;
    // Until threads without anything to do have ended.
    let threads = format!("/proc/{}/task", daemon.pid());
    let has_errands = || {
        let tasks = std::fs::read_dir(&threads).expect("a process").flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.into_iter().any(|name| name.trim() == "errands")
    };
    within(async {
        while has_errands() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    group.set("pids.max", "pids.max", 1);
    let layout = Layout {
        slots: 1,
        slot_bytes: 4096,
    };
    let (code, why) = refused(within(child.create_arena(layout)).await);
    assert_eq!(code, ErrorCode::Full, "{why}");
    let by = format!("pids.max of cgroup {} allows 1", group.name());
    assert!(why.contains("thread") && why.contains(&by), "{why}");
    let mut other = within(connect(&socket)).await;
    let (code, why) = refused(within(other.register(id, "trainer", "trainer-2")).await);
    assert!(code == ErrorCode::Full && why.contains(&by), "{why}");
    // What needs no thread is answered, to the same and to others.
    within(child.status(None)).await.expect("answered");
    within(connect(&socket))
        .await
        .status(None)
        .await
        .expect("answered");
    group.set("pids.max", "pids.max", 32);
    within(child.create_arena(layout)).await.expect("an arena");
    within(other.register(id, "trainer", "trainer-2"))
        .await
        .expect("registered");
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    daemon.terminate();
}

#[test]
fn too_few_descriptors_are_named() {
    for most in [5, 8, 16, 24] {
        let mut daemon = Daemon::new("");
        let shell = format!("ulimit -n {most}; exec \"$@\"");
        let command = daemon.command(&shell, &["--plane", "relay"]);
        let (code, log) = end(&mut daemon, command);
        assert_eq!(code, Some(3), "{log}");
        assert!(log.contains(&format!("RLIMIT_NOFILE allows {most}")), "{log}");
        assert!(!log.contains("panicked"), "{log}");
    }
}

#[tokio::test]
async fn the_pool_is_half_of_what_the_group_leaves() {
    let Some(group) = Group::new("memory") else { return };
    let mut daemon = Daemon::new("");
    group.set("memory.limit_in_bytes", "memory.max", 200 << 20);
    let command = group.command("", &daemon.command("exec \"$@\"", &["--plane", "relay"]));
    daemon.spawn(command);
    daemon.listening().await;
    let pool = connect(&daemon.socket()).await.welcome().pool_bytes;
    assert!((50 << 20..=100 << 20).contains(&pool), "{pool}");
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
}
