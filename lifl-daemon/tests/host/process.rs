//! A daemon's process, and users who talk to it.
//!
//! A user is a thread with another uid: Linux keeps credentials by thread, and a socket's are those of the thread that
//! has connected it. The daemon is always another process, since it trusts its own.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use lifl_common::client::{Client, ClientError, Registration};
use lifl_common::control::ErrorCode;
use lifl_common::id::JobId;
use lifl_common::plane::PlaneKind;
use nix::libc;
use nix::sys::signal::{SigHandler, Signal, kill, signal as set_disposition};
use nix::unistd::Pid;

/// How long a test waits for what should come soon.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this test can run: it needs root.
///
/// # Panics
/// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
pub(crate) fn is_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    eprintln!("NOT RUN: only root can be several users");
    assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
    false
}

/// Whether this machine's daemons have that plane.
pub(crate) fn has(daemon: &Daemon, client: &Client, kind: PlaneKind) -> bool {
    let welcome = client.welcome();
    if welcome.plane == kind {
        return true;
    }
    eprintln!("NOT RUN on the {kind} plane: {}", welcome.plane_reason);
    assert!(
        std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(),
        "{}",
        daemon.log()
    );
    false
}

/// Signals that the tests' own starter has ignored, `nohup` or a shell's `&`, would stay ignored.
fn default_signals() -> io::Result<()> {
    for number in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: no handler is installed, so no code runs in one.
        unsafe { set_disposition(number, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// A daemon's process with its folder.
pub(crate) struct Daemon {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) child: Option<Child>,
}

impl Daemon {
    /// One that is not started yet, with that file of settings.
    pub(crate) fn new(settings: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        // Other users are to find the socket.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("set");
        fs::write(folder.path().join("daemon.toml"), settings).expect("written");
        // Where the program is built need not be open to others.
        let program = folder.path().join("lifl-daemon");
        // By another process: a file that this one has open for writing, or one of its forks, cannot be executed.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_lifl-daemon"))
            .arg(&program)
            .status();
        assert!(copied.expect("run").success(), "copied");
        Self { folder, child: None }
    }

    /// One that listens.
    pub(crate) async fn start(settings: &str, more: &[&str]) -> Self {
        let mut daemon = Self::new(settings);
        let command = daemon.command("exec \"$@\"", more);
        daemon.spawn(command);
        daemon.listening().await;
        daemon
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("lifl.sock")
    }

    pub(crate) fn settings(&self) -> PathBuf {
        self.folder.path().join("daemon.toml")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// The command with that and, unless it is among it, without pins and Flame's ports, and with root's uid where root is the
    /// tester; run by a shell that first does something: set a limit, say, then `exec "$@"`.
    pub(crate) fn command(&self, shell: &str, more: &[&str]) -> Command {
        let mut command = Command::new("bash");
        command
            .args(["-c", shell, "bash"])
            .arg(self.folder.path().join("lifl-daemon"))
            .args(["--socket-mode", "666", "--config"])
            .arg(self.settings())
            .arg("--socket")
            .arg(self.socket())
            .args(more)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        // SAFETY: between fork and exec it makes nothing but system calls.
        unsafe { command.pre_exec(default_signals) };
        // What is one for all of the machine only where a test asks for it.
        for (unless, option) in [
            ("--pin", "--no-pin"),
            ("--flame", "--no-flame"),
            ("--user", "--user=root"),
        ] {
            let possible = unless != "--user" || nix::unistd::geteuid().is_root();
            if possible && !more.contains(&unless) {
                command.arg(option);
            }
        }
        command
    }

    pub(crate) fn spawn(&mut self, mut command: Command) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .expect("a log");
        self.child = Some(command.stderr(log).spawn().expect("started"));
    }

    pub(crate) async fn listening(&mut self) {
        let begun = Instant::now();
        while Client::connect(&self.socket()).await.is_err() {
            let ended = self.child.as_mut().expect("started").try_wait().expect("a child");
            assert!(ended.is_none(), "the daemon does not start: {}", self.log());
            assert!(begun.elapsed() < PATIENCE, "does not listen: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("started").id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("a living process");
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("started");
        let begun = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("a child") {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it in order.
    pub(crate) fn terminate(&mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// Waits until the log says that.
    pub(crate) async fn logged(&self, what: &str) {
        let begun = Instant::now();
        while !self.log().contains(what) {
            assert!(
                begun.elapsed() < PATIENCE,
                "not in the log: {what}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Does something as a user, on a thread and in a runtime of its own.
pub(crate) fn as_user<T, F>(uid: u32, what: impl FnOnce() -> F + Send + 'static) -> std::thread::JoinHandle<T>
where
    T: Send + 'static,
    F: Future<Output = T>,
{
    std::thread::spawn(move || {
        for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
            // SAFETY: three numbers, and no memory. The raw call changes this thread only, unlike libc's.
            let status = unsafe { libc::syscall(call, uid, uid, uid) };
            assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(what())
    })
}

pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("in time")
}

pub(crate) async fn connect(socket: &Path) -> Client {
    Client::connect(socket).await.expect("connected")
}

/// A job with its maker registered as coordinator.
pub(crate) async fn job(socket: &Path, name: &str) -> (Client, JobId, Registration) {
    let mut client = connect(socket).await;
    let job = client.create_job(name).await.expect("made");
    let registration = client
        .register(job, "coordinator", "coordinator")
        .await
        .expect("registered");
    (client, job, registration)
}

pub(crate) async fn worker(socket: &Path, job: JobId, name: &str) -> (Client, Registration) {
    let mut client = connect(socket).await;
    let registration = client.register(job, "trainer", name).await.expect("registered");
    (client, registration)
}

#[track_caller]
pub(crate) fn refused<T>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result.err().expect("refused") {
        ClientError::Refused { code, message } => (code, message),
        other => panic!("{other}"),
    }
}
