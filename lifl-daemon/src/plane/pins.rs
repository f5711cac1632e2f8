//! A folder of a BPF filesystem in which the sockmap's maps outlive the daemon.
//!
//! ```text
//!   absent ──hold──▶ empty ──load──▶ pinned ── the daemon ends, nobody is registered ──▶ absent
//!                                     │  ▲
//!               the daemon is killed, │  │ hold, by the next daemon
//!               or ends with workers  ▼  │
//!                                     left ── reset ──▶ absent
//! ```
//!
//! One daemon holds a folder at a time, by a lock on the folder itself, which the kernel takes back however that daemon
//! ends.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapError};
use lifl_common::kernel::{ABI, MAP_STATE, MAPS, State};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::{Gid, Uid, UnlinkatFlags, chown, geteuid, unlinkat};
use zerocopy::transmute;

/// Where BPF filesystems are mounted.
const BPFFS: &str = "/sys/fs/bpf";

/// [`State`] as aya takes it.
pub(super) type StateBytes = [u8; size_of::<State>()];

/// Why the maps cannot be pinned, or those that are there cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The machine does not let this process pin: the daemon can do without.
    #[error("{0}")]
    Unavailable(String),
    /// Another daemon's.
    #[error("the maps in {folder} are {holder}'s: stop that daemon, or give --pin another folder")]
    Held {
        /// The folder.
        folder: PathBuf,
        /// Whose.
        holder: String,
    },
    /// Another version's.
    #[error(
        "the maps in {folder} are of version {found}, this daemon's are of version {ABI}: start a daemon of that version, or \
         end the jobs that use them and clear them with `lifl-daemon --reset --pin {folder}`"
    )]
    Version {
        /// The folder.
        folder: PathBuf,
        /// Their version.
        found: u32,
    },
    /// Somebody else's, or so old or new that even their version cannot be read.
    #[error(
        "the maps in {folder} are not as any LIFL that this daemon knows makes them: clear them with `lifl-daemon --reset \
         --pin {folder}`, or give --pin another folder"
    )]
    Unknown {
        /// The folder.
        folder: PathBuf,
    },
    /// Sockets are told apart within a network namespace only.
    #[error(
        "the maps in {folder} hold the sockets of another network namespace: start the daemon there, or give --pin another \
         folder"
    )]
    OtherNetns {
        /// The folder.
        folder: PathBuf,
    },
    /// A map that is there cannot be read.
    #[error("the pinned map {path} cannot be read")]
    Map {
        /// Its path.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: MapError,
    },
    /// A call failed.
    #[error("{call} of {path} failed")]
    System {
        /// The call.
        call: &'static str,
        /// Its argument.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A folder for pins that this process holds.
#[derive(Debug)]
pub(super) struct Pins {
    folder: PathBuf,
    lock: Flock<File>,
}

impl Pins {
    /// Makes the folder if need be, and holds it.
    ///
    /// # Errors
    /// [`PinError::Unavailable`] if there can be no such folder, [`PinError::Held`] if another daemon has it.
    pub(super) fn hold(folder: &Path) -> Result<Self, PinError> {
        mount_bpffs(folder)?;
        loop {
            match fs::DirBuilder::new().mode(0o700).create(folder) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(PinError::Unavailable(format!(
                        "{} cannot be made: {error}",
                        folder.display()
                    )));
                }
            }
            match lock(folder) {
                Ok(Some(pins)) => return Ok(pins),
                // Its last holder took it away between the two calls.
                Ok(None) => {}
                Err(PinError::System { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                    let folder = folder.display();
                    return Err(PinError::Unavailable(format!("{folder} is another user's")));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The folder.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where a map is pinned.
    pub(super) fn path(&self, map: &str) -> PathBuf {
        self.folder.join(map)
    }

    /// What the last daemon left; `None` if it left nothing, or died before its maps were complete.
    ///
    /// # Errors
    /// If the maps are of another version, or cannot be read.
    pub(super) fn found(&self) -> Result<Option<State>, PinError> {
        let folder = || self.folder.clone();
        match read_state(&self.folder)? {
            None => Ok(None),
            Some(None) => Err(PinError::Unknown { folder: folder() }),
            Some(Some(State { magic: 0, .. })) => Ok(None),
            Some(Some(state)) if state.magic != State::MAGIC => Err(PinError::Unknown { folder: folder() }),
            Some(Some(state)) if state.abi != ABI => Err(PinError::Version {
                folder: folder(),
                found: state.abi,
            }),
            Some(Some(state)) => Ok(Some(state)),
        }
    }

    /// Takes away the pins of our names: maps that nobody else has are gone with that.
    ///
    /// # Errors
    /// If one stays.
    pub(super) fn clear(&self) -> Result<Vec<PathBuf>, PinError> {
        let mut removed = Vec::new();
        for map in MAPS {
            let path = self.path(map);
            // Below the folder that is held: a daemon that was root's has no way to it any more.
            match unlinkat(&*self.lock, map, UnlinkatFlags::NoRemoveDir) {
                Ok(()) => removed.push(path),
                Err(Errno::ENOENT) => {}
                Err(errno) => {
                    return Err(PinError::System {
                        call: "unlink",
                        path,
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(removed)
    }

    /// Takes away the pins and the folder.
    ///
    /// # Errors
    /// If one stays.
    pub(super) fn remove(self) -> Result<Vec<PathBuf>, PinError> {
        let removed = self.clear()?;
        match fs::remove_dir(&self.folder) {
            Ok(()) => Ok(removed),
            // In a folder of root's, who gave it this one: empty, it is taken away when this process has ended.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() => {
                Ok(removed)
            }
            Err(source) => Err(PinError::System {
                call: "rmdir",
                path: self.folder,
                source,
            }),
        }
    }
}

/// Makes the folder for a daemon that will run as that user, and gives it the folder and the maps that are in it.
///
/// # Errors
/// If there can be no such folder, or a daemon holds it.
pub fn give(folder: &Path, user: Uid, group: Gid) -> Result<(), PinError> {
    let pins = Pins::hold(folder)?;
    let maps = MAPS.iter().map(|map| pins.path(map)).filter(|path| path.exists());
    for path in maps.chain([folder.to_owned()]) {
        chown(&path, Some(user), Some(group)).map_err(|errno| PinError::System {
            call: "chown",
            path,
            source: errno.into(),
        })?;
    }
    Ok(())
}

/// Takes away what daemons left in a folder, of whatever version; says what.
///
/// # Errors
/// If a daemon holds the folder, or there are other things in it.
pub fn reset(folder: &Path) -> Result<Vec<PathBuf>, PinError> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let Some(pins) = lock(folder)? else {
        return Ok(Vec::new());
    };
    // Another version may have other maps beside those that we know: only where it says that they are LIFL's.
    let ours = matches!(read_state(folder)?, Some(Some(state)) if state.magic == State::MAGIC);
    let mut others = Vec::new();
    if ours {
        let failed = |source| PinError::System {
            call: "readdir",
            path: folder.to_owned(),
            source,
        };
        for entry in fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let known = MAPS.iter().any(|map| path.ends_with(map));
            if !known && fs::remove_file(&path).is_ok() {
                others.push(path);
            }
        }
    }
    let mut removed = pins.remove()?;
    removed.extend(others);
    Ok(removed)
}

/// Locks the folder; `None` if it is not there any more.
fn lock(folder: &Path) -> Result<Option<Pins>, PinError> {
    let failed = |call| {
        move |source: io::Error| PinError::System {
            call,
            path: folder.to_owned(),
            source,
        }
    };
    let file = match File::open(folder) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open")(error)),
    };
    let opened = file.metadata().map_err(failed("fstat"))?;
    let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => {
            return Err(PinError::Held {
                folder: folder.to_owned(),
                holder: holder(&opened),
            });
        }
        Err((_, errno)) => return Err(failed("flock")(errno.into())),
    };
    let same =
        fs::metadata(folder).is_ok_and(|there| (there.dev(), there.ino()) == (opened.dev(), opened.ino()));
    Ok(same.then(|| Pins {
        folder: folder.to_owned(),
        lock,
    }))
}

/// Who has the lock on a file, as `/proc/locks` tells.
fn holder(file: &fs::Metadata) -> String {
    let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
    let id = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let pid = locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 1234 00:21:5678 0 EOF"
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&id.as_str())).then(|| fields[4].to_owned())
    });
    pid.map_or_else(
        || "another process".to_owned(),
        |pid| format!("the daemon with pid {pid}"),
    )
}

/// The state map's entry: `None` if there is no such map, `Some(None)` if it is none of ours.
fn read_state(folder: &Path) -> Result<Option<Option<State>>, PinError> {
    let path = folder.join(MAP_STATE);
    if !path.exists() {
        return Ok(None);
    }
    let failed = |source| PinError::Map {
        path: path.clone(),
        source,
    };
    let map = Map::from_map_data(MapData::from_pin(&path).map_err(failed)?).map_err(failed)?;
    let Ok(state) = Array::<_, StateBytes>::try_from(map) else {
        return Ok(Some(None));
    };
    let bytes = state.get(&0, 0).map_err(failed)?;
    Ok(Some(Some(transmute!(bytes))))
}

/// Makes sure that the folder lies on a BPF filesystem, mounting one at the usual place if it may.
fn mount_bpffs(folder: &Path) -> Result<(), PinError> {
    if is_bpffs(folder) {
        return Ok(());
    }
    let folder = folder.display();
    if !Path::new(&folder.to_string()).starts_with(BPFFS) {
        let reason = format!("{folder} is not on a BPF filesystem (`mount -t bpf bpf FOLDER` makes one)");
        return Err(PinError::Unavailable(reason));
    }
    let unavailable = |why: String| {
        PinError::Unavailable(format!(
            "there is no BPF filesystem at {BPFFS}, and it cannot be mounted ({why}): `mount -t bpf bpf {BPFFS}`"
        ))
    };
    // A second mount would hide the first one's pins: one process at a time looks and mounts.
    let beneath = File::open(BPFFS).map_err(|error| unavailable(error.to_string()))?;
    let _lock = Flock::lock(beneath, FlockArg::LockExclusive)
        .map_err(|(_, errno)| unavailable(format!("flock: {errno}")))?;
    if !is_bpffs(Path::new(BPFFS)) {
        mount(
            Some("bpf"),
            BPFFS,
            Some("bpf"),
            MsFlags::empty(),
            Some("mode=0700"),
        )
        .map_err(|errno| unavailable(errno.to_string()))?;
    }
    Ok(())
}

/// Whether a folder, or the one that it is to be made in, is on a BPF filesystem.
fn is_bpffs(folder: &Path) -> bool {
    let there = folder.ancestors().find_map(|folder| statfs(folder).ok());
    there.is_some_and(|there| there.filesystem_type() == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_elsewhere_cannot_have_pins_and_the_reason_says_what_helps() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Pins::hold(&folder.path().join("lifl")).expect_err("no BPF filesystem");
        assert!(matches!(error, PinError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
    }

    #[test]
    fn nothing_is_reset_where_nothing_is() {
        assert!(
            reset(Path::new("/sys/fs/bpf/lifl-none"))
                .expect("reset")
                .is_empty()
        );
    }
}
