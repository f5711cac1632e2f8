//! Where daemons' control sockets are.
//!
//! A daemon listens in the first of these folders that it can have: it makes it if need be, only root and its user may put
//! files there or replace it, and a socket's path there fits into a `sockaddr_un`. Clients look in all of them.
//!
//! | folder | for |
//! | --- | --- |
//! | `/run/lifl` | root's daemons |
//! | `$XDG_RUNTIME_DIR/lifl` | a user with a runtime folder |
//! | `/run/user/<uid>/lifl` | the same, whatever the variable says |
//! | `$TMPDIR/lifl-<uid>` | others |
//! | `/tmp/lifl-<uid>`, `/dev/shm/lifl-<uid>` | where that variable is wrong, or the disk is read-only |
//!
//! `lifl.sock` is `lifl-daemon`'s; `run-<pid>.sock` is that of a daemon inside `lifl run`.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, geteuid};

/// The name of `lifl-daemon`'s socket in its folder.
pub const DAEMON_SOCKET: &str = "lifl.sock";

/// Bytes that the path of a Unix socket may have: `sun_path` less its final zero.
pub const MAX_PATH_BYTES: usize = 107;

const SYSTEM_FOLDER: &str = "/run/lifl";

/// Bytes that the name of a socket may have there: `run-<pid>.sock`, and a bench's has a word more.
const NAME_BYTES: usize = 40;

/// A folder in which a daemon of this user may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder.
    pub folder: PathBuf,
    /// The environment variable that names it, if one does.
    pub variable: Option<&'static str>,
}

/// A place that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Which.
    pub place: Place,
    /// Why.
    pub why: String,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, why } = self;
        match place.variable {
            Some(variable) => write!(f, "{} (of {variable}) {why}", place.folder.display()),
            None => write!(f, "{} {why}", place.folder.display()),
        }
    }
}

/// No place can be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "no folder for a control socket: {}; set XDG_RUNTIME_DIR to a folder of your own that can be written to \
     (`mkdir -m 700 DIR; export XDG_RUNTIME_DIR=DIR`)",
    .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
)]
pub struct NoFolder(pub Vec<PassedOver>);

/// The places for a daemon of this user, the best first.
pub fn places() -> Vec<Place> {
    places_of(
        geteuid(),
        std::env::var_os("XDG_RUNTIME_DIR"),
        std::env::var_os("TMPDIR"),
    )
}

fn places_of(uid: Uid, runtime: Option<OsString>, temporary: Option<OsString>) -> Vec<Place> {
    let named = |folder: PathBuf, variable| Place { folder, variable };
    let system = uid.is_root().then(|| named(PathBuf::from(SYSTEM_FOLDER), None));
    // The specification has relative ones ignored.
    let runtime = runtime.map(PathBuf::from).filter(|folder| folder.is_absolute());
    let runtime = runtime.map(|folder| named(folder.join("lifl"), Some("XDG_RUNTIME_DIR")));
    let usual = named(PathBuf::from(format!("/run/user/{uid}/lifl")), None);
    let own = format!("lifl-{uid}");
    let temporary = temporary.map(PathBuf::from).filter(|folder| folder.is_absolute());
    let temporary = temporary.map(|folder| named(folder.join(&own), Some("TMPDIR")));
    let everybodys = ["/tmp", "/dev/shm"].map(|folder| named(Path::new(folder).join(&own), None));
    let all = system.into_iter().chain(runtime).chain([usual]);
    let mut places: Vec<Place> = Vec::new();
    for place in all.chain(temporary).chain(everybodys) {
        if !places.iter().any(|known| known.folder == place.folder) {
            places.push(place);
        }
    }
    places
}

/// The first place that can be had, made if need be, and those that were passed over for it.
///
/// # Errors
/// If none can be had, with why of each.
pub fn own_folder() -> Result<(PathBuf, Vec<PassedOver>), NoFolder> {
    let mut passed_over = Vec::new();
    for place in places() {
        match take(&place.folder) {
            Ok(()) => return Ok((place.folder, passed_over)),
            Err(why) => passed_over.push(PassedOver { place, why }),
        }
    }
    Err(NoFolder(passed_over))
}

/// Makes a folder for sockets if need be, and tries it.
fn take(folder: &Path) -> Result<(), String> {
    let bytes = folder.as_os_str().as_bytes().len() + 1 + NAME_BYTES;
    if bytes > MAX_PATH_BYTES {
        return Err(format!(
            "is too long: a socket's path may have {MAX_PATH_BYTES} bytes, there it could have {bytes}"
        ));
    }
    // The system's folder is for all users, the socket's own mode decides; any other is for one.
    let system = folder == Path::new(SYSTEM_FOLDER);
    let mode = if system { 0o755 } else { 0o700 };
    match DirBuilder::new().mode(mode).create(folder) {
        Ok(()) if system => {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(folder, permissions).map_err(|error| format!("cannot be opened: {error}"))?;
        }
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err("cannot be made: the folder above it does not exist".to_owned());
        }
        Err(error) => return Err(format!("cannot be made: {error}")),
    }
    look(folder)?;
    // A file, since a disk that is full or read-only, a quota and access lists show only then.
    let probe = folder.join(format!(".{}", std::process::id()));
    let made = File::options().write(true).create_new(true).open(&probe);
    match made {
        Ok(_) => {
            let _ = fs::remove_file(&probe);
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(format!("cannot be written to: {error}")),
    }
}

/// The socket of the daemon inside the `lifl run` of that process.
///
/// # Errors
/// If there is no folder for it.
pub fn own_daemon(pid: u32) -> Result<PathBuf, NoFolder> {
    let (folder, _) = own_folder()?;
    Ok(folder.join(format!("run-{pid}.sock")))
}

/// The sockets of daemons inside `lifl run`, of this user.
pub fn own_daemons() -> Vec<PathBuf> {
    let places = places().into_iter();
    places.flat_map(|place| run_sockets(&place.folder)).collect()
}

/// Whether only root and this user can put sockets into a folder, or another folder in its place: in a folder for everybody's
/// temporary files, anybody may have made it before us.
pub fn is_trusted(folder: &Path) -> bool {
    look(folder).is_ok()
}

/// Why a folder is not [trusted](is_trusted).
fn look(folder: &Path) -> Result<(), String> {
    let unseen = |error: io::Error| format!("cannot be looked at: {error}");
    let found = fs::symlink_metadata(folder).map_err(unseen)?;
    if !found.is_dir() {
        return Err("is no folder: remove it".to_owned());
    }
    let owner = Uid::from_raw(found.uid());
    if !owner.is_root() && owner != geteuid() {
        return Err(format!("belongs to another user (uid {owner})"));
    }
    if found.mode() & 0o022 != 0 {
        return Err(format!(
            "may be written to by others: `chmod go-w {}`",
            folder.display()
        ));
    }
    let whole = folder.canonicalize().map_err(unseen)?;
    // Whose the root is, of which a user namespace may know no name, decides over everything.
    let root = fs::metadata("/").map_err(unseen)?.uid();
    for above in whole.ancestors().skip(1) {
        let found = fs::metadata(above).map_err(unseen)?;
        if may_rename_in(&found, root) {
            return Err(format!(
                "could be replaced by others, who may write to {}",
                above.display()
            ));
        }
    }
    Ok(())
}

/// Whether others than root and this user may rename what this user has in a folder.
fn may_rename_in(folder: &Metadata, root: u32) -> bool {
    const STICKY: u32 = 0o1000;
    let owner = folder.uid();
    let known = owner == 0 || owner == root || owner == geteuid().as_raw();
    !known || (folder.mode() & 0o022 != 0 && folder.mode() & STICKY == 0)
}

fn run_sockets(folder: &Path) -> Vec<PathBuf> {
    if !is_trusted(folder) {
        return Vec::new();
    }
    let is_run = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("run-") && name.ends_with(".sock"))
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut sockets: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_run).collect();
    sockets.sort();
    sockets
}

/// The folders in which this user looks for daemons, the system's first.
fn sought() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(SYSTEM_FOLDER)];
    folders.extend(places().into_iter().map(|place| place.folder));
    folders.dedup();
    folders
}

/// The sockets of daemons that this user may find, the system's first. They may be stale: connecting tells.
pub fn candidates() -> Vec<PathBuf> {
    let folders = sought();
    let runs = folders.iter().flat_map(|folder| run_sockets(folder));
    daemon_sockets().into_iter().chain(runs).collect()
}

/// The sockets at which `lifl-daemon` is expected, the system's first.
pub fn daemon_sockets() -> Vec<PathBuf> {
    let trusted = sought().into_iter().filter(|folder| is_trusted(folder));
    trusted.map(|folder| folder.join(DAEMON_SOCKET)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folders(uid: u32, runtime: Option<&str>, temporary: Option<&str>) -> Vec<String> {
        let places = places_of(
            Uid::from_raw(uid),
            runtime.map(OsString::from),
            temporary.map(OsString::from),
        );
        let folders = places.iter().map(|place| place.folder.display().to_string());
        folders.collect()
    }

    #[test]
    fn there_is_always_another_place() {
        assert_eq!(
            folders(0, Some("/x"), None),
            [
                "/run/lifl",
                "/x/lifl",
                "/run/user/0/lifl",
                "/tmp/lifl-0",
                "/dev/shm/lifl-0"
            ]
        );
        let usual = ["/run/user/7/lifl", "/tmp/lifl-7", "/dev/shm/lifl-7"];
        assert_eq!(folders(7, Some("/run/user/7"), Some("/tmp")), usual);
        // Neither empty nor relative ones count.
        assert_eq!(folders(7, Some(""), Some("tmp")), usual);
    }

    #[test]
    fn a_folder_that_others_could_replace_or_write_to_is_not_taken() {
        let outer = tempfile::tempdir().expect("a folder");
        let set = |folder: &Path, mode| {
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).expect("set");
        };
        let folder = outer.path().join("lifl");
        take(&folder).expect("made");
        assert_eq!(fs::metadata(&folder).expect("there").mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&folder).expect("read").count(), 0);
        set(&folder, 0o770);
        assert!(take(&folder).expect_err("a group's").contains("chmod go-w"));
        set(&folder, 0o700);
        set(outer.path(), 0o777);
        assert!(
            take(&folder)
                .expect_err("replaceable")
                .contains("could be replaced")
        );
        set(outer.path(), 0o1777);
        take(&folder).expect("sticky");
        let link = outer.path().join("link");
        std::os::unix::fs::symlink(&folder, &link).expect("made");
        assert!(take(&link).expect_err("a link").contains("is no folder"));
    }

    #[test]
    fn what_is_wrong_with_a_place_is_told_with_its_variable() {
        let long = Path::new("/tmp").join("x".repeat(90));
        let why = take(&long).expect_err("too long");
        assert!(why.contains("107 bytes"), "{why}");
        let why = take(Path::new("/nowhere/lifl-7")).expect_err("missing");
        assert!(why.contains("does not exist"), "{why}");
        let place = Place {
            folder: PathBuf::from("/nowhere/lifl-7"),
            variable: Some("TMPDIR"),
        };
        let told = NoFolder(vec![PassedOver { place, why }]).to_string();
        assert!(
            told.contains("/nowhere/lifl-7 (of TMPDIR) cannot be made"),
            "{told}"
        );
        assert!(told.contains("export XDG_RUNTIME_DIR"), "{told}");
    }
}
