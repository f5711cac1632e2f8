//! A daemon in a process of its own, which a test may kill and start anew.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lifl_daemon::plane::Request;
use lifl_daemon::pool::HugePages;
use lifl_daemon::{Daemon, GatewayOptions, Options};
use nix::sys::signal::Signal;
use tokio_util::sync::CancellationToken;

use super::{PATIENCE, lifl, signal};

/// Where the daemon of a test is to listen, and to pin; nothing for no pins.
const SOCKET: &str = "LIFL_TEST_SOCKET";
const PINS: &str = "LIFL_TEST_PINS";

/// There if it is to give huge pages only.
const ALWAYS_HUGE: &str = "LIFL_TEST_ALWAYS_HUGE";

/// How long it waits for the workers of the daemon before it.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

/// What a [`Node`] has this very program run.
const DAEMON: &str = "support::node::daemon_of_the_other_tests";

/// Not a test: the process that a [`Node`] starts.
#[test]
#[ignore = "started by the other tests, as a daemon of their own"]
fn daemon_of_the_other_tests() {
    let socket = std::env::var_os(SOCKET).expect("started by another test");
    let pin = std::env::var_os(PINS).map(PathBuf::from);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let options = Options {
            socket: socket.into(),
            socket_mode: 0o600,
            socket_group: None,
            plane: if pin.is_some() {
                Request::Sockmap
            } else {
                Request::Relay
            },
            pool_bytes: 1 << 30,
            huge_pages: match std::env::var_os(ALWAYS_HUGE) {
                Some(_) => HugePages::Always,
                None => HugePages::Auto,
            },
            max_workers: 64,
            pin,
            grace: GRACE,
            flame: None,
            gateway: GatewayOptions::default(),
        };
        let shutdown = CancellationToken::new();
        let daemon = Daemon::start(options, shutdown.clone()).expect("started");
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a handler");
        terminate.recv().await;
        daemon.stop().await.expect("stopped");
    });
}

/// A daemon in a process of its own.
pub(crate) struct Node {
    folder: tempfile::TempDir,
    always_huge: bool,
    pins: Option<PathBuf>,
    process: Option<Child>,
}

impl Node {
    pub(crate) fn start(pins: Option<&str>) -> Self {
        Self::start_with(pins, false)
    }

    /// Starts one with --huge-pages always, or auto.
    pub(crate) fn start_with(pins: Option<&str>, always_huge: bool) -> Self {
        let pins = pins.map(|name| format!("/sys/fs/bpf/lifl-test-{}-{name}", std::process::id()));
        let mut node = Self {
            folder: tempfile::tempdir().expect("a folder"),
            always_huge,
            pins: pins.map(PathBuf::from),
            process: None,
        };
        node.again();
        node
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("lifl.sock")
    }

    /// Starts it, without waiting for it to listen.
    pub(crate) fn again(&mut self) {
        let mut command = Command::new(std::env::current_exe().expect("this file"));
        command.args(["--exact", DAEMON, "--ignored", "--nocapture"]);
        command.env(SOCKET, self.socket()).env_remove(PINS);
        if self.always_huge {
            command.env(ALWAYS_HUGE, "1");
        }
        if let Some(pins) = &self.pins {
            command.env(PINS, pins);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.process = Some(command.spawn().expect("started"));
    }

    pub(crate) fn wait_until_it_listens(&mut self) {
        let begun = Instant::now();
        while !self.status().status.success() {
            let ended = self.process.as_mut().expect("a process").try_wait();
            assert!(ended.expect("a child").is_none(), "the daemon does not start");
            assert!(begun.elapsed() < PATIENCE, "the daemon does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it has no job and no worker.
    pub(crate) fn wait_until_nothing_is_registered(&self) {
        let begun = Instant::now();
        loop {
            let status = self.status();
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            let daemon = &status["status"]["daemon"];
            if daemon["workers"] == 0 && daemon["awaited"] == 0 && daemon["pool_used_bytes"] == 0 {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{status:#}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it holds no memory file any more: arenas are its workers'.
    pub(crate) fn wait_until_it_has_no_memory(&self) {
        let pid = self.process.as_ref().expect("a process").id();
        let begun = Instant::now();
        loop {
            let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("a process");
            let files: Vec<PathBuf> = descriptors
                .flatten()
                .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
                .filter(|file| file.to_string_lossy().starts_with("/memfd:"))
                .collect();
            if files.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "it still has {files:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn status(&self) -> Output {
        let mut status = lifl();
        status.args(["status", "--json", "--daemon"]).arg(self.socket());
        status.output().expect("run")
    }

    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("a process");
        process.kill().expect("killed");
        process.wait().expect("reaped");
    }

    /// Ends it in order; nothing may be left.
    pub(crate) fn end(mut self) {
        let mut process = self.process.take().expect("a process");
        signal(i32::try_from(process.id()).expect("a pid"), Signal::SIGTERM);
        assert!(process.wait().expect("reaped").success());
        assert!(!self.socket().exists(), "the socket's file is left");
        if let Some(pins) = &self.pins {
            assert!(!pins.exists(), "{} is left", pins.display());
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if let Some(pins) = &self.pins {
            let _ = lifl_daemon::plane::reset(pins);
        }
    }
}
