//! What a service manager does with the daemon, done by the test: it hands a socket over, listens to what it is told, and
//! starts the daemon as a user with few capabilities. And what the daemon has kept once it is up.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lifl_common::arena::Layout;
use lifl_common::client::Client;
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::plane::PlaneKind;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use crate::process::{Daemon, PATIENCE, connect, has, is_root, job, within, worker};

/// The end at which the daemon's words come in.
struct Ear(UnixDatagram);

impl Ear {
    fn at(path: &Path) -> Self {
        let ear = UnixDatagram::bind(path).expect("bound");
        ear.set_read_timeout(Some(PATIENCE)).expect("set");
        Self(ear)
    }

    /// Waits until something is said that begins so; what was said.
    fn hear(&self, what: &str) -> String {
        let begun = Instant::now();
        let mut buffer = [0; 4096];
        loop {
            let length = self
                .0
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("no {what}: {error}"));
            let text = String::from_utf8_lossy(&buffer[..length]);
            if let Some(line) = text.lines().find(|line| line.starts_with(what)) {
                return line.to_owned();
            }
            assert!(begun.elapsed() < PATIENCE, "no {what}");
        }
    }
}

fn listener(path: &Path, kind: SockType) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    bind(fd.as_raw_fd(), &UnixAddr::new(path).expect("short")).expect("bound");
    fd
}

/// Starts the daemon with those sockets, and says so in its environment.
fn activate(
    daemon: &mut Daemon,
    sockets: &[&OwnedFd],
    notify: &Path,
    watchdog: Option<Duration>,
    more: &[&str],
) {
    let mut command = daemon.command("LISTEN_PID=$$ exec \"$@\"", more);
    command
        .env("LISTEN_FDS", sockets.len().to_string())
        .env("NOTIFY_SOCKET", notify);
    if let Some(watchdog) = watchdog {
        command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
    }
    let from: Vec<i32> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
    let hand_over = move || {
        // First out of the way, since one of them may have a number that another is to get.
        let mut away = [0; 4];
        for (away, &fd) in away.iter_mut().zip(&from) {
            // SAFETY: numbers only; async-signal-safe, as what runs between fork and exec must be.
            *away = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 100) };
        }
        for (to, &fd) in (3..).zip(&away[..from.len()]) {
            // SAFETY: as above. The copy stays open over exec.
            if unsafe { libc::dup2(fd, to) } < 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure does system calls on numbers and allocates nothing.
    unsafe { command.pre_exec(hand_over) };
    daemon.spawn(command);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_handed_over_is_served_over_restarts_and_its_file_stays() {
    let mut daemon = Daemon::new("");
    let ear = Ear::at(&daemon.folder.path().join("notify"));
    let notify = daemon.folder.path().join("notify");
    let path = daemon.folder.path().join("handed.sock");
    let handed = listener(&path, SockType::SeqPacket);
    listen(&handed, Backlog::MAXCONN).expect("listens");
    let mut first = None;
    for restart in 0..3 {
        // Who comes between two daemons waits for the next one, and is not refused.
        let early = tokio::spawn({
            let path = path.clone();
            async move { Client::connect(&path).await }
        });
        activate(&mut daemon, &[&handed], &notify, None, &["--plane", "relay"]);
        let ear = &ear;
        tokio::task::block_in_place(|| ear.hear("READY=1"));
        let client = within(early).await.expect("no panic").expect("served");
        let pid = client.welcome().pid;
        assert_ne!(
            first.replace(pid),
            Some(pid),
            "the same daemon after restart {restart}"
        );
        drop(client);
        daemon.signal(Signal::SIGTERM);
        tokio::task::block_in_place(|| ear.hear("STOPPING=1"));
        let status = daemon.wait();
        assert!(status.success(), "{status}: {}", daemon.log());
        assert!(path.exists(), "the socket's file is its maker's");
        assert!(!daemon.socket().exists(), "and no other was made");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registrys_task_answers_for_itself_and_says_what_there_is() {
    let mut daemon = Daemon::new("");
    let notify = daemon.folder.path().join("notify");
    let ear = Ear::at(&notify);
    activate(
        &mut daemon,
        &[],
        &notify,
        Some(Duration::from_secs(1)),
        &["--plane", "relay", "--huge-pages", "never"],
    );
    tokio::task::block_in_place(|| ear.hear("READY=1"));
    let (mut client, _, _registration) = job(&daemon.socket(), "seen").await;
    let layout = Layout {
        slots: 3,
        slot_bytes: 1 << 20,
    };
    client.create_arena(layout).await.expect("an arena");
    let text = tokio::task::block_in_place(|| ear.hear("STATUS=plane relay, 1 jobs, 1 workers, 3 of"));
    assert!(text.ends_with("MiB in arenas"), "{text}");
    for _ in 0..3 {
        tokio::task::block_in_place(|| ear.hear("WATCHDOG=1"));
    }
    // A daemon that does not run does not answer: then the manager's time runs out.
    daemon.signal(Signal::SIGSTOP);
    ear.0.set_read_timeout(Some(Duration::from_secs(1))).expect("set");
    let mut buffer = [0; 4096];
    tokio::task::block_in_place(|| {
        let begun = Instant::now();
        while ear.0.recv(&mut buffer).is_ok() {
            assert!(begun.elapsed() < PATIENCE, "it speaks on");
        }
    });
    daemon.signal(Signal::SIGCONT);
    ear.0.set_read_timeout(Some(PATIENCE)).expect("set");
    tokio::task::block_in_place(|| ear.hear("WATCHDOG=1"));
    drop(client);
    daemon.terminate();
}

#[tokio::test]
async fn what_is_handed_over_must_be_one_socket_to_listen_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let notify = folder.path().join("notify");
    let _ear = Ear::at(&notify);
    let path = |name: &str| folder.path().join(name);
    let stream = listener(&path("stream"), SockType::Stream);
    listen(&stream, Backlog::MAXCONN).expect("listens");
    let deaf = listener(&path("deaf"), SockType::SeqPacket);
    let datagram = listener(&path("datagram"), SockType::Datagram);
    let tcp = OwnedFd::from(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound"));
    let file = OwnedFd::from(fs::File::open("/dev/null").expect("open"));
    let good = listener(&path("good"), SockType::SeqPacket);
    listen(&good, Backlog::MAXCONN).expect("listens");
    let cases: [(&[&OwnedFd], i32, &str); 6] = [
        (&[&stream], 3, "its type is not SOCK_SEQPACKET"),
        (&[&datagram], 3, "its type is not SOCK_SEQPACKET"),
        (&[&deaf], 3, "it does not listen"),
        (&[&tcp], 3, "it is no Unix socket with a path"),
        (&[&file], 3, "it is no Unix socket with a path"),
        (&[&good, &stream], 2, "hands over 2 sockets"),
    ];
    for (sockets, code, message) in cases {
        let mut daemon = Daemon::new("");
        activate(&mut daemon, sockets, &notify, None, &["--plane", "relay"]);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(code), "{message}: {}", daemon.log());
        assert!(daemon.log().contains(message), "{message}: {}", daemon.log());
    }
}

#[tokio::test]
async fn wrong_settings_are_named_with_their_place_and_nothing_is_started() {
    let mut daemon = Daemon::new("pool_mib = 64\n\n[quota.user.root]\npool_mb = 5\n");
    let output = daemon.command("exec \"$@\"", &[]).output().expect("run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    let place = format!("{}:4: quota.user.root", daemon.settings().display());
    assert!(
        text.contains(&place) && text.contains("did you mean pool_mib?"),
        "{text}"
    );
    fs::remove_file(daemon.settings()).expect("removed");
    let output = daemon.command("exec \"$@\"", &[]).output().expect("run");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("daemon.toml cannot be read"), "{text}");
    // The command line wins over the file.
    fs::write(daemon.settings(), "pool_mib = 64\nmax_workers = 77").expect("written");
    let command = daemon.command("exec \"$@\"", &["--plane", "relay", "--pool-mib", "32"]);
    daemon.spawn(command);
    daemon.listening().await;
    let welcome = connect(&daemon.socket()).await.welcome().clone();
    assert_eq!((welcome.pool_bytes, welcome.max_workers), (32 << 20, 77));
    daemon.terminate();
}

/// The masks of each thread of a process, by the names in `/proc/PID/status`.
pub(crate) fn threads(pid: u32, name: &str) -> BTreeSet<u64> {
    let masks = threads_words(pid, name);
    let mask = |words: String| u64::from_str_radix(&words, 16).expect("a mask");
    masks.into_iter().map(mask).collect()
}

/// What all threads of a process say under that name in their status.
pub(crate) fn threads_words(pid: u32, name: &str) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let words = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.expect("a thread").path().join("status")).expect("a status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .expect(name);
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    tasks.map(words).collect()
}

pub(crate) const SETS: [&str; 5] = ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"];

/// A job from its beginning to a worker's death, on whatever the daemon has left.
pub(crate) async fn everything_works(socket: &Path) {
    let (mut parent, id, mut up) = job(socket, "served").await;
    let (mut child, mut down) = worker(socket, id, "trainer-1").await;
    let layout = Layout {
        slots: 1,
        slot_bytes: 4 << 20,
    };
    let created = child.create_arena(layout).await.expect("an arena");
    parent.open_arena(created.arena.id()).await.expect("opened");
    let update = Frame {
        to: up.worker,
        from: down.worker,
        kind: FrameKind::Update as u16,
        length: 5,
        ..Frame::default()
    };
    within(down.frames.send(&[update])).await.expect("sent");
    assert_eq!(within(up.frames.recv()).await.expect("read"), Some(update));
    let status = parent.status(Some(id)).await.expect("a status");
    let sender = status
        .workers
        .iter()
        .find(|worker| worker.worker == down.worker)
        .expect("listed");
    assert_eq!(sender.counters.frames, 1, "the map cannot be read");
    let gone = down.worker;
    drop((child, down, created));
    within(async { while parent.status(Some(id)).await.expect("a status").workers.len() > 1 {} }).await;
    // Taken off the map, and not only closed: the number is unknown then.
    let late = Frame {
        to: gone,
        from: up.worker,
        ..Frame::default()
    };
    within(up.frames.send(&[late])).await.expect("sent");
    within(async {
        loop {
            use lifl_common::control::Event;
            if let Event::DeadLetter(letter) = parent.event().await.expect("an event") {
                break assert_eq!(letter.refusal, lifl_common::frame::Refusal::UnknownWorker);
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_daemon_that_root_starts_keeps_no_capability_in_any_thread_and_does_all_it_should() {
    if !is_root() {
        return;
    }
    let pins = format!("/sys/fs/bpf/lifl-test-host-{}", std::process::id());
    let mut daemon = Daemon::new("");
    let command = daemon.command("exec \"$@\"", &["--pin", &pins]);
    daemon.spawn(command);
    daemon.listening().await;
    daemon.logged("listening").await;
    let client = connect(&daemon.socket()).await;
    if !has(&daemon, &client, PlaneKind::Sockmap) {
        return;
    }
    let welcome = client.welcome();
    assert_eq!((welcome.uid, welcome.capabilities.as_slice()), (0, [].as_slice()));
    assert!(welcome.pinned, "{}", welcome.plane_reason);
    drop(client);
    for set in SETS {
        assert_eq!(threads(daemon.pid(), set), BTreeSet::from([0]), "{set}");
    }
    assert_eq!(threads(daemon.pid(), "NoNewPrivs"), BTreeSet::from([1]));
    assert_eq!(threads(daemon.pid(), "Seccomp"), BTreeSet::from([2]));
    everything_works(&daemon.socket()).await;
    for set in SETS {
        assert_eq!(threads(daemon.pid(), set), BTreeSet::from([0]), "{set}, later");
    }
    // A daemon that ends before it has seen its last worker go leaves the pins to the next one.
    let mut client = connect(&daemon.socket()).await;
    within(async { while !client.status(None).await.expect("a status").workers.is_empty() {} }).await;
    daemon.terminate();
    assert!(!Path::new(&pins).exists(), "pins are left");
}

/// As in the unit: two capabilities for a user that has no others, to load and to give up.
#[tokio::test]
async fn two_capabilities_are_enough_for_a_user_and_are_given_up() {
    if !is_root() {
        return;
    }
    let mut daemon = Daemon::new("");
    std::os::unix::fs::chown(daemon.folder.path(), Some(65534), Some(65534)).expect("given");
    let shell = "exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+bpf,+net_admin \
                 --bounding-set=-all,+bpf,+net_admin --ambient-caps=-all,+bpf,+net_admin --no-new-privs -- \"$@\"";
    let command = daemon.command(shell, &[]);
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
        (65534, [].as_slice())
    );
    drop(client);
    for set in &SETS[..4] {
        assert_eq!(threads(daemon.pid(), set), BTreeSet::from([0]), "{set}");
    }
    everything_works(&daemon.socket()).await;
    daemon.terminate();
}

/// Flame's workers are other users' processes, and their connections must be taken out of them: that one right stays.
#[tokio::test]
async fn with_flames_workers_one_capability_stays_and_is_enough() {
    if is_root() {
        let sets = ["CapEff", "CapPrm", "CapBnd"];
        serve_flame(0, "exec \"$@\"", "root", &sets).await;
        serve_flame(0, "exec \"$@\"", "nobody", &sets).await;
    }
}

/// As in `flame.conf`.
#[tokio::test]
async fn three_capabilities_are_enough_for_a_user_with_flames_workers_and_one_stays() {
    if is_root() {
        let shell = "exec setpriv --reuid 65533 --regid 65533 --clear-groups \
                     --inh-caps=-all,+bpf,+net_admin,+sys_ptrace \
                     --bounding-set=-all,+bpf,+net_admin,+sys_ptrace \
                     --ambient-caps=-all,+bpf,+net_admin,+sys_ptrace --no-new-privs -- \"$@\"";
        serve_flame(65533, shell, "", &["CapEff", "CapPrm"]).await;
    }
}

async fn serve_flame(uid: u32, shell: &str, user: &str, sets: &[&str]) {
    let free = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        listener.local_addr().expect("bound").port()
    };
    let (skmsg, rpc) = (free(), free());
    let ports = [skmsg, rpc].map(|port| format!("127.0.0.1:{port}"));
    let mut daemon = Daemon::new("");
    let mut more = vec!["--flame", "--flame-skmsg", &ports[0], "--flame-rpc", &ports[1]];
    if uid == 0 {
        more.extend(["--user", user]);
    }
    std::os::unix::fs::chown(daemon.folder.path(), Some(uid), Some(uid)).expect("given");
    let command = daemon.command(shell, &more);
    daemon.spawn(command);
    daemon.listening().await;
    daemon.logged("listening for Flame").await;
    let mut client = connect(&daemon.socket()).await;
    assert_eq!(client.welcome().capabilities, ["CAP_SYS_PTRACE"]);
    for set in sets {
        // The log's thread has none at all, nor the one that adds credit.
        let mut kept = threads(daemon.pid(), set);
        kept.remove(&0);
        assert_eq!(kept, BTreeSet::from([1 << 19]), "{set}");
    }
    // As Flame's SDK does it: "descriptor 5 of process $$ is my connection, and I am 7".
    let script = format!(
        "exec 5<>/dev/tcp/127.0.0.1/{skmsg}; \
         le() {{ printf '\\\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24)); }}; \
         printf \"$(le $$)$(le 5)\\x07\\x00\" > /dev/tcp/127.0.0.1/{rpc}; exec sleep 600"
    );
    let mut theirs = std::process::Command::new("bash");
    let mut theirs = theirs
        .args(["-c", &script])
        .uid(65534)
        .gid(65534)
        .spawn()
        .expect("starts");
    let begun = Instant::now();
    let page = loop {
        let page = client.flame().await.expect("asked").expect("served");
        if !page.workers.is_empty() {
            break page;
        }
        assert!(begun.elapsed() < PATIENCE, "not registered: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let worker = &page.workers[0];
    assert_eq!((worker.uid, worker.id, worker.pid), (65534, 7, theirs.id()));
    theirs.kill().expect("killed");
    theirs.wait().expect("reaped");
    daemon.terminate();
}

/// What `systemd-analyze` says of the units as they lie in the repository.
#[test]
fn the_units_are_right_and_the_service_is_little_exposed() {
    let folder = tempfile::tempdir().expect("a folder");
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd");
    let mut names = Vec::new();
    for entry in fs::read_dir(units).expect("units") {
        let path = entry.expect("a unit").path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name")
            .to_owned();
        if !["service", "socket", "mount"]
            .iter()
            .any(|kind| name.ends_with(kind))
        {
            continue;
        }
        // The program is not installed here.
        let text = fs::read_to_string(&path).expect("a unit");
        let text = text.replace("/usr/bin/lifl-daemon", env!("CARGO_BIN_EXE_lifl-daemon"));
        fs::write(folder.path().join(&name), text).expect("written");
        names.push(name);
    }
    assert_eq!(names.len(), 3, "{names:?}");
    let analyze = |arguments: &[&str]| {
        let mut command = std::process::Command::new("systemd-analyze");
        command.args(arguments).current_dir(folder.path()).output()
    };
    let mut verify = vec!["verify", "--man=no"];
    let paths: Vec<String> = names.iter().map(|name| format!("./{name}")).collect();
    verify.extend(paths.iter().map(String::as_str));
    let verified = match analyze(&verify) {
        Ok(verified) => verified,
        Err(error) => {
            eprintln!("NOT RUN: systemd-analyze: {error}");
            assert!(
                std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(),
                "install systemd"
            );
            return;
        }
    };
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && said.is_empty(), "{said}");
    let exposure = [
        "security",
        "--offline=true",
        "--threshold=29",
        "./lifl-daemon.service",
    ];
    let exposed = analyze(&exposure).expect("run");
    let said = String::from_utf8_lossy(&exposed.stdout);
    assert!(exposed.status.success(), "not below 3.0: {said}");
}

#[tokio::test]
async fn a_signal_that_was_blocked_when_it_was_started_ends_it_in_order() {
    let mut daemon = Daemon::new("");
    let mut command = daemon.command("exec \"$@\"", &["--plane", "relay"]);
    let block = || SigSet::all().thread_block().map_err(std::io::Error::from);
    // SAFETY: between fork and exec it makes nothing but a system call.
    unsafe { command.pre_exec(block) };
    daemon.spawn(command);
    daemon.listening().await;
    daemon.terminate();
}
