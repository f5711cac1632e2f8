//! Which folders a run uses: those that nobody but their user, and root, can put anything into.
//!
//! A path is followed component by component, each opened relative to the one before:
//!
//! | | must belong to | others may write to it |
//! | --- | --- | --- |
//! | the run's folder | root, this user, or who is trusted | never |
//! | a folder above it (for ordinary users: the one that it lies in) | the same | where it is sticky, as /tmp is |
//! | a symbolic link on the way | the same | |
//!
//! A group may write where it is its owner's alone (a group of the user's name, as many systems give each user). An
//! ordinary user's folder may lie in one that is shared with a group of theirs. A run's folder may be made anew in one that
//! everybody may write to: it is itself not, and is held from then on.
//!
//! Trusted are, for root only: who called sudo; in a container, below a mount, the owner of that mount's root, which is
//! whose folder was handed in; and for anybody whom `--trust-owner` names.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Gid, Group, Uid, User, getegid, geteuid, getgroups};

use super::{Dir, FOLDER_MODE, kind};

/// Symbolic links that are followed on the way to a folder, as many as the kernel follows.
const MOST_LINKS: u32 = 40;

/// Folders above a run's.
const PARENT_MODE: Mode = FOLDER_MODE
    .union(Mode::S_IRGRP)
    .union(Mode::S_IXGRP)
    .union(Mode::S_IROTH)
    .union(Mode::S_IXOTH);

const STICKY: u32 = 0o1000;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// File systems whose mode bits are the mount's and not the files' (`include/uapi/linux/magic.h`): FAT, exFAT, NTFS twice,
/// 9P, CIFS and SMB 2.
const WITHOUT_MODES: [i64; 7] = [
    0x4d44,
    0x2011_bab0,
    0x5346_544e,
    0x7366_746e,
    0x0102_1997,
    0xff53_4d42,
    0xfe53_4d42,
];

/// Whose folders are used.
#[derive(Clone, Debug)]
pub struct Trust {
    pub(super) uids: Vec<u32>,
    pub(super) groups: Vec<Gid>,
    pub(super) root: bool,
    pub(super) container: bool,
}

/// Why a folder is not used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another user's.
    #[error(
        "{} belongs to {}, who could put other files in the place of the run's: give a folder of your own, make this one \
         yours with `chown`, or pass `--trust-owner {owner}` if that user may",
        path.display(), Who(*owner)
    )]
    Foreign {
        /// The folder, or the symbolic link.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Others may write to it.
    #[error(
        "others may write to {} (mode {:o}), and put other files in the place of the run's: `chmod {remedy} {}`, or give \
         another folder",
        path.display(), mode & 0o7777, path.display()
    )]
    Writable {
        /// The folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// What to give `chmod`.
        remedy: &'static str,
    },
    /// It is something else.
    #[error("{} is no folder", .0.display())]
    NotAFolder(PathBuf),
    /// A call failed.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

struct Who(u32);

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match user_name(self.0) {
            Some(name) => write!(f, "user {name} (uid {})", self.0),
            None => write!(f, "uid {}", self.0),
        }
    }
}

fn user_name(uid: u32) -> Option<String> {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten()?;
    Some(user.name)
}

impl Trust {
    /// What this process trusts, and those users.
    pub fn new(more: &[u32]) -> Self {
        let (user, root) = (geteuid().as_raw(), geteuid().is_root());
        let caller = || std::env::var("SUDO_UID").ok()?.parse::<u32>().ok();
        let mut uids = vec![0, user];
        uids.extend(root.then(caller).flatten());
        uids.extend(unmapped());
        uids.extend(more);
        let mut groups = getgroups().unwrap_or_default();
        groups.push(getegid());
        Self {
            uids,
            groups,
            root,
            container: root && in_container(),
        }
    }

    /// Opens a run's folder.
    ///
    /// # Errors
    /// If it is not there, or not to be used.
    pub fn open(&self, path: &Path) -> Result<Dir, FolderError> {
        let (walk, missing) = self.walk(path)?;
        if missing.is_empty() {
            return walk.run_folder();
        }
        Err(system("find", path)(Errno::ENOENT))
    }

    /// Opens a run's folder, and makes it, and those above it, if they are not there.
    ///
    /// # Errors
    /// If it is not to be used, or cannot be made.
    pub fn make(&self, path: &Path) -> Result<Dir, FolderError> {
        let (mut walk, mut missing) = self.walk(path)?;
        let Some(last) = missing.pop() else {
            return walk.run_folder();
        };
        for name in missing {
            walk.make(&name, PARENT_MODE)?;
        }
        walk.make(&last, FOLDER_MODE)?;
        walk.run_folder()
    }

    /// Makes a run's folder in `parent`, under the first of the names that nothing has.
    ///
    /// # Errors
    /// As [`make`](Self::make).
    pub fn make_fresh(
        &self,
        parent: &Path,
        mut names: impl Iterator<Item = String>,
    ) -> Result<Dir, FolderError> {
        let (mut walk, missing) = self.walk(&parent.join("."))?;
        for name in missing {
            walk.make(&name, PARENT_MODE)?;
        }
        walk.check_above()?;
        loop {
            let name = names.next().unwrap_or_default();
            match mkdirat(&walk.fd, name.as_str(), FOLDER_MODE) {
                Ok(()) => {
                    walk.enter(OsStr::new(&name))?;
                    return walk.run_folder();
                }
                Err(Errno::EEXIST) if !name.is_empty() => {}
                Err(errno) => return Err(system("make", &walk.path.join(name))(errno)),
            }
        }
    }

    /// Goes as far as there are folders; gives what is not there.
    fn walk(&self, path: &Path) -> Result<(Walk<'_>, Vec<OsString>), FolderError> {
        let here = || {
            std::env::current_dir().map_err(|source| FolderError::System {
                action: "find",
                path: PathBuf::from("."),
                source,
            })
        };
        let path = match path.is_absolute() {
            true => path.to_owned(),
            false => here()?.join(path),
        };
        let mut walk = Walk::begin(self)?;
        let mut ahead: VecDeque<OsString> = names(&path).collect();
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            let is_last = ahead.is_empty();
            let is_made_anew = is_last && !walk.has(&name);
            if !is_made_anew && (self.root || is_last) {
                walk.check_above()?;
            }
            match walk.enter(&name) {
                Ok(None) => {}
                Ok(Some(target)) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(system("find", &path)(Errno::ELOOP));
                    }
                    if target.is_absolute() {
                        walk = Walk::begin(self)?;
                    }
                    for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
                        ahead.push_front(name);
                    }
                }
                Err(FolderError::System { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    // What is made anew is this user's, and is held: others who may write here can at most move it away. The
                    // next run does not find it then.
                    match self.root && !is_last {
                        true => walk.check_above()?,
                        false => walk.check_owner_above()?,
                    }
                    return Ok((walk, std::iter::once(name).chain(ahead).collect()));
                }
                Err(error) => return Err(error),
            }
        }
        Ok((walk, Vec::new()))
    }
}

/// The names in a path, `..` among them.
fn names(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
        _ => None,
    })
}

fn system(action: &'static str, path: &Path) -> impl Fn(Errno) -> FolderError {
    let path = path.to_owned();
    move |errno| FolderError::System {
        action,
        path: path.clone(),
        source: errno.into(),
    }
}

/// A folder on the way.
struct Walk<'t> {
    trust: &'t Trust,
    /// Opened with `O_PATH`: whoever may only pass through it may do that.
    fd: OwnedFd,
    found: FileStat,
    path: PathBuf,
    /// In a container: the owner of the root of the mount that it is on, if somebody handed that in.
    handed_in_by: Option<u32>,
}

impl<'t> Walk<'t> {
    fn begin(trust: &'t Trust) -> Result<Self, FolderError> {
        let path = PathBuf::from("/");
        let opened = open(
            &path,
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        );
        let fd = opened.map_err(system("open", &path))?;
        let found = fstat(&fd).map_err(system("open", &path))?;
        Ok(Self {
            trust,
            fd,
            found,
            path,
            handed_in_by: None,
        })
    }

    /// Goes into the folder of that name, or gives where the symbolic link of that name leads.
    fn enter(&mut self, name: &OsStr) -> Result<Option<PathBuf>, FolderError> {
        let path = match name.as_bytes() {
            b".." => self.path.parent().unwrap_or(Path::new("/")).to_owned(),
            _ => self.path.join(name),
        };
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::empty()).map_err(system("find", &path))?;
        let found = fstat(&fd).map_err(system("find", &path))?;
        match kind(&found) {
            SFlag::S_IFDIR => {}
            SFlag::S_IFLNK => {
                // An ordinary user's, in a folder that is shared with others, may be of the folder's owner.
                let shared = !self.trust.root && found.st_uid == self.found.st_uid;
                if !shared {
                    self.check_owner(&path, &found)?;
                }
                let target = readlinkat(&fd, "").map_err(system("read the link", &path))?;
                return Ok(Some(target.into()));
            }
            _ => return Err(FolderError::NotAFolder(path)),
        }
        if found.st_dev != self.found.st_dev {
            let owner = (self.trust.container && name != "..").then_some(found.st_uid);
            self.handed_in_by = owner;
        }
        (self.fd, self.found, self.path) = (fd, found, path);
        Ok(None)
    }

    /// Makes a folder and goes into it.
    fn make(&mut self, name: &OsStr, mode: Mode) -> Result<(), FolderError> {
        let path = self.path.join(name);
        match mkdirat(&self.fd, name, mode) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(system("make", &path)(errno)),
        }
        match self.enter(name)? {
            None => Ok(()),
            // Somebody has just put it there.
            Some(_) => Err(FolderError::NotAFolder(path)),
        }
    }

    fn check_owner(&self, path: &Path, found: &FileStat) -> Result<(), FolderError> {
        let owner = found.st_uid;
        if self.trust.uids.contains(&owner) || self.handed_in_by == Some(owner) {
            return Ok(());
        }
        Err(FolderError::Foreign {
            path: path.to_owned(),
            owner,
        })
    }

    /// Whether something has that name in it.
    fn has(&self, name: &OsStr) -> bool {
        fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether a group of this user's may write to it.
    fn is_shared(&self) -> bool {
        let group = Gid::from_raw(self.found.st_gid);
        let group_writes = self.found.st_mode & GROUP_WRITES != 0;
        !self.trust.root && group_writes && self.trust.groups.contains(&group)
    }

    /// Whether it is of somebody who is trusted, or shared with this user.
    fn check_owner_above(&self) -> Result<(), FolderError> {
        match self.is_shared() {
            true => Ok(()),
            false => self.check_owner(&self.path, &self.found),
        }
    }

    /// Whether its name can be one that others change: as a folder above a run's.
    fn check_above(&self) -> Result<(), FolderError> {
        let sticky = self.found.st_mode & STICKY != 0;
        let group_writes = self.found.st_mode & GROUP_WRITES != 0;
        let shared = self.is_shared();
        self.check_owner_above()?;
        if sticky || self.without_modes() {
            return Ok(());
        }
        let others = self.found.st_mode & OTHERS_WRITE != 0;
        let group = group_writes && !shared && !is_private(&self.found);
        self.writable(others || group, if others { "o-w" } else { "g-w" })
    }

    /// The folder as a run's.
    fn run_folder(self) -> Result<Dir, FolderError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, ".", flags, Mode::empty()).map_err(system("open", &self.path))?;
        self.check_owner(&self.path, &self.found)?;
        if !self.without_modes() {
            let others = self.found.st_mode & OTHERS_WRITE != 0;
            let group = self.found.st_mode & GROUP_WRITES != 0 && !is_private(&self.found);
            self.writable(others || group, "go-w")?;
        }
        Dir::of(fd, &self.path).map_err(|_| FolderError::NotAFolder(self.path))
    }

    fn writable(&self, writable: bool, remedy: &'static str) -> Result<(), FolderError> {
        match writable {
            false => Ok(()),
            true => Err(FolderError::Writable {
                path: self.path.clone(),
                mode: self.found.st_mode,
                remedy,
            }),
        }
    }

    fn without_modes(&self) -> bool {
        let system = fstatfs(&self.fd).map(|system| i64::from(system.filesystem_type().0 as u32));
        system.is_ok_and(|system| WITHOUT_MODES.contains(&system))
    }
}

/// Whether a folder's group is its owner's alone, or root's: of the same name, or number where there are no names.
fn is_private(found: &FileStat) -> bool {
    if found.st_gid == 0 {
        return true;
    }
    let group = Group::from_gid(Gid::from_raw(found.st_gid)).ok().flatten();
    match (user_name(found.st_uid), group) {
        (Some(user), Some(group)) => user == group.name && group.mem.iter().all(|member| *member == user),
        (None, None) => found.st_uid == found.st_gid,
        _ => false,
    }
}

/// Whose the files appear to be whose owners this user namespace does not know, root among them; `None` in one that
/// knows all.
fn unmapped() -> Option<u32> {
    let map = std::fs::read_to_string("/proc/self/uid_map").ok()?;
    let all = map.split_whitespace().eq(["0", "0", "4294967295"]);
    let overflow = || {
        std::fs::read_to_string("/proc/sys/kernel/overflowuid")
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    (!all).then(overflow).flatten()
}

/// Whether this is a container, as what makes them says: files that only root can make, or what Kubernetes gives.
fn in_container() -> bool {
    let files = ["/.dockerenv", "/run/.containerenv"];
    files.iter().any(|file| Path::new(file).exists()) || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}
