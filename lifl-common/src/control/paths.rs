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

/// The sockets of daemons that this user may find, the system's first. They may be stale: connecting tells.
pub fn candidates() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(SYSTEM_FOLDER), own_folder()];
    folders.dedup();
    let mut found = Vec::new();
    for folder in folders {
        let daemon = folder.join(DAEMON_SOCKET);
        let mut others: Vec<PathBuf> = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "sock") && *path != daemon)
            .collect();
        others.sort();
        found.push(daemon);
        found.extend(others);
    }
    found
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
