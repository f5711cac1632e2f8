//! Where daemons' control sockets are.
//!
//! | who runs the daemon | folder |
//! | --- | --- |
//! | root | `/run/lifl` |
//! | a user with a runtime folder | `$XDG_RUNTIME_DIR/lifl` |
//! | any other user | `lifl-<uid>` in the folder for temporary files |
//!
//! `lifl.sock` is `lifl-daemon`'s; `run-<pid>.sock` is that of a daemon inside `lifl run`.

use std::os::unix::fs::MetadataExt;
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

/// Whether only root and this user can put sockets into a folder: in a folder for everybody's temporary files, anybody
/// may have made it before us.
pub fn is_trusted(folder: &Path) -> bool {
    let Ok(found) = std::fs::symlink_metadata(folder) else {
        return false;
    };
    let owner = Uid::from_raw(found.uid());
    found.is_dir() && (owner.is_root() || owner == geteuid()) && found.mode() & 0o022 == 0
}

fn run_sockets(folder: &Path) -> Vec<PathBuf> {
    if !is_trusted(folder) {
        return Vec::new();
    }
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
    let runs = folders.iter().flat_map(|folder| run_sockets(folder));
    daemon_sockets().into_iter().chain(runs).collect()
}

/// The sockets at which `lifl-daemon` is expected, the system's first.
pub fn daemon_sockets() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(SYSTEM_FOLDER), own_folder()];
    folders.dedup();
    let trusted = folders.into_iter().filter(|folder| is_trusted(folder));
    trusted.map(|folder| folder.join(DAEMON_SOCKET)).collect()
}
