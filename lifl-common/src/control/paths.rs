//! Where daemons' control sockets are.
//!
//! | who runs the daemon | folder |
//! | --- | --- |
//! | root | `/run/lifl` |
//! | a user with a runtime folder | `$XDG_RUNTIME_DIR/lifl` |
//! | any other user | `lifl-<uid>` in the folder for temporary files |
//!
//! `lifl.sock` is `lifl-daemon`'s; `run-<pid>.sock` is that of a daemon inside `lifl run`.

use std::path::{Path, PathBuf};

use nix::unistd::{Uid, geteuid};

/// The name of `lifl-daemon`'s socket in its folder.
pub const DAEMON_SOCKET: &str = "lifl.sock";

const SYSTEM_FOLDER: &str = "/run/lifl";

/// The folder for a socket of this process.
pub fn own_folder() -> PathBuf {
    if geteuid().is_root() {
        PathBuf::from(SYSTEM_FOLDER)
    } else {
        user_folder(geteuid())
    }
}

fn user_folder(uid: Uid) -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| Path::new(folder).is_absolute()) {
        Some(folder) => PathBuf::from(folder).join("lifl"),
        None => std::env::temp_dir().join(format!("lifl-{uid}")),
    }
}

/// The socket of the daemon inside the `lifl run` of that process.
pub fn own_daemon(pid: u32) -> PathBuf {
    own_folder().join(format!("run-{pid}.sock"))
}

/// The sockets of daemons inside `lifl run`, of this user.
pub fn own_daemons() -> Vec<PathBuf> {
    run_sockets(&own_folder())
}

fn run_sockets(folder: &Path) -> Vec<PathBuf> {
    let is_run = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("run-") && name.ends_with(".sock"))
    };
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_run).collect();
    sockets.sort();
    sockets
}

/// The sockets of daemons that this user may find, the system's first. They may be stale: connecting tells.
pub fn candidates() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(SYSTEM_FOLDER), own_folder()];
    folders.dedup();
    let sockets = |folder: PathBuf| std::iter::once(folder.join(DAEMON_SOCKET)).chain(run_sockets(&folder));
    folders.into_iter().flat_map(sockets).collect()
}

/// The sockets at which `lifl-daemon` is expected, the system's first.
pub fn daemon_sockets() -> Vec<PathBuf> {
    let mut sockets = vec![
        Path::new(SYSTEM_FOLDER).join(DAEMON_SOCKET),
        own_folder().join(DAEMON_SOCKET),
    ];
    sockets.dedup();
    sockets
}
