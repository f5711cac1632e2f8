//! A folder that is held by its descriptor, and files that are opened by their names in it.
//!
//! Whoever may write to a folder, or to one above it, can put a symbolic link, another name of somebody's file or a FIFO
//! where a file is expected, or another folder where this one was. So a run's files are opened relative to the folder's
//! descriptor, by a single name, without following a link and without waiting; what is opened must be a regular file,
//! and one that is written in place must have no other name. Which folders are used at all, `find` decides.

mod find;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::dir::Dir as Entries;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, mkdirat};
use nix::unistd::{LinkatFlags, UnlinkatFlags, geteuid, linkat, unlinkat};

pub use find::{FolderError, Trust};

/// Permission bits of a file: models and logs are their user's own.
const FILE_MODE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Permission bits of a folder.
const FOLDER_MODE: Mode = Mode::S_IRWXU;

/// A folder. Clones share its descriptor.
#[derive(Clone, Debug)]
pub struct Dir {
    fd: Arc<OwnedFd>,
    /// Where it was when it was opened, for messages.
    path: PathBuf,
}

/// Why a file is not opened.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it is a symbolic link, and none is followed here: put the file itself in its place")]
    Link,
    #[error("it is {0}, where a file is expected: remove it")]
    Kind(&'static str),
    #[error("it has {0} names (hard links), of which another would be written too: put a copy in its place")]
    Names(u64),
    #[error("it has {found} bytes, more than the {most} that it can have")]
    Large { found: u64, most: u64 },
    #[error("{0:?} is not the name of a file in a folder")]
    Name(String),
    #[error("others than the owner of the folder that it is in may write to it: remove it")]
    Foreign,
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        Self::other(refused)
    }
}

impl Dir {
    /// The folder of a descriptor; `path` is what it is called in messages.
    ///
    /// # Errors
    /// If the descriptor is of something else.
    pub fn of(fd: OwnedFd, path: &Path) -> io::Result<Self> {
        if kind(&fstat(&fd)?) != SFlag::S_IFDIR {
            return Err(Errno::ENOTDIR.into());
        }
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
        })
    }

    /// The folder at a path that whoever calls has made or trusts.
    ///
    /// # Errors
    /// If it is not there, or no folder.
    pub fn at(path: &Path) -> io::Result<Self> {
        Self::of(File::open(path)?.into(), path)
    }

    /// Where it was when it was opened, for messages: it may be elsewhere now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A copy of its descriptor, for another process.
    ///
    /// # Errors
    /// If this process has no descriptor left.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.fd.try_clone()
    }

    /// The user whose it is.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn owner(&self) -> io::Result<u32> {
        Ok(fstat(&self.fd)?.st_uid)
    }

    /// Opens a file to read it. It may have other names.
    ///
    /// # Errors
    /// If it is not there, or no regular file.
    pub fn open(&self, name: &str) -> io::Result<File> {
        Ok(self.open_as(name, OFlag::O_RDONLY)?.0)
    }

    /// Makes a file to write it.
    ///
    /// # Errors
    /// If something has that name.
    pub fn create_new(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        Ok(self.open_as(name, flags)?.0)
    }

    /// Opens a file to read it and to write it in place, and makes it if it is not there.
    ///
    /// # Errors
    /// If it is no regular file, or one that has other names.
    pub fn open_or_create(&self, name: &str) -> io::Result<File> {
        self.open_in_place(name, OFlag::empty())
    }

    /// As [`open_or_create`](Self::open_or_create), to write at its end whatever others write.
    ///
    /// # Errors
    /// As there.
    pub fn append(&self, name: &str) -> io::Result<File> {
        self.open_in_place(name, OFlag::O_APPEND)
    }

    fn open_in_place(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let (file, found) = self.open_as(name, OFlag::O_RDWR | OFlag::O_CREAT | flags)?;
        if found.st_nlink > 1 {
            return Err(Refused::Names(found.st_nlink).into());
        }
        Ok(file)
    }

    fn open_as(&self, name: &str, flags: OFlag) -> io::Result<(File, FileStat)> {
        // Without O_NONBLOCK the open itself would wait for a FIFO's other end, and for whoever has a lease.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let fd = openat(&self.fd, single(name)?, flags, FILE_MODE).map_err(|errno| match errno {
            Errno::ELOOP => Refused::Link.into(),
            // A FIFO that nobody reads, or a socket.
            Errno::ENXIO => Refused::Kind("a FIFO or a socket").into(),
            errno => io::Error::from(errno),
        })?;
        let found = fstat(&fd)?;
        if kind(&found) != SFlag::S_IFREG {
            return Err(Refused::Kind(called(kind(&found))).into());
        }
        Ok((fd.into(), found))
    }

    /// Reads a whole file of at most so many bytes.
    ///
    /// # Errors
    /// If it is not there, no regular file, or longer.
    pub fn read(&self, name: &str, most_bytes: u64) -> io::Result<Vec<u8>> {
        let file = self.open(name)?;
        let found = file.metadata()?.len();
        let mut bytes = Vec::new();
        if found <= most_bytes {
            file.take(most_bytes + 1).read_to_end(&mut bytes)?;
        }
        match found.max(bytes.len() as u64) {
            found if found > most_bytes => Err(Refused::Large {
                found,
                most: most_bytes,
            }
            .into()),
            _ => Ok(bytes),
        }
    }

    /// The end of a file, at most so many bytes of it.
    ///
    /// # Errors
    /// If it is not there, or no regular file.
    pub fn tail(&self, name: &str, most_bytes: u64) -> io::Result<Vec<u8>> {
        let mut file = self.open(name)?;
        let from = file.metadata()?.len().saturating_sub(most_bytes);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(most_bytes).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The length of what has that name; `None` if nothing has it.
    pub fn length(&self, name: &str) -> Option<u64> {
        let found = fstatat(&self.fd, single(name).ok()?, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
        u64::try_from(found.st_size).ok()
    }

    /// Gives a file another name, in place of whatever has it.
    ///
    /// # Errors
    /// If it is not there, or a folder has that name.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, single(from)?, &self.fd, single(to)?)?)
    }

    /// Gives a file a second name.
    ///
    /// # Errors
    /// If it is not there, something has that name, or the file system has no hard links.
    pub fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let flags = LinkatFlags::empty();
        Ok(linkat(&self.fd, single(from)?, &self.fd, single(to)?, flags)?)
    }

    /// Takes away a file, or whatever else has that name but a folder.
    ///
    /// # Errors
    /// If nothing has that name.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.fd, single(name)?, UnlinkatFlags::NoRemoveDir)?)
    }

    /// The names in it; those that are not text are left out.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut entries = Entries::openat(&self.fd, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in entries.iter() {
            match entry?.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }

    /// Opens a folder in it.
    ///
    /// # Errors
    /// If it is not there, a link, or others may write to it than to this one.
    pub fn folder(&self, name: &str) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let opened = openat(&self.fd, single(name)?, flags, Mode::empty());
        let fd = opened.map_err(|errno| match errno {
            Errno::ENOTDIR | Errno::ELOOP => io::Error::other("it is no folder: remove it"),
            errno => errno.into(),
        })?;
        let (this, found) = (fstat(&self.fd)?, fstat(&fd)?);
        let owners = [this.st_uid, geteuid().as_raw(), 0];
        let more_may_write = found.st_mode & !this.st_mode & 0o022 != 0;
        if !owners.contains(&found.st_uid) || more_may_write {
            return Err(Refused::Foreign.into());
        }
        Self::of(fd, &self.path.join(name))
    }

    /// Opens a folder in it, and makes it if it is not there.
    ///
    /// # Errors
    /// As [`folder`](Self::folder); or if it cannot be made.
    pub fn make_folder(&self, name: &str) -> io::Result<Self> {
        match mkdirat(&self.fd, single(name)?, FOLDER_MODE) {
            Ok(()) | Err(Errno::EEXIST) => self.folder(name),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes the names in it last.
    ///
    /// # Errors
    /// If the disk has an error.
    pub fn sync(&self) -> io::Result<()> {
        Ok(nix::unistd::fsync(&self.fd)?)
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A name, if it is one and no path.
fn single(name: &str) -> Result<&str, Refused> {
    match name {
        "" | "." | ".." => Err(Refused::Name(name.to_owned())),
        name if name.contains(['/', '\0']) => Err(Refused::Name(name.to_owned())),
        name => Ok(name),
    }
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

fn called(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFDIR => "a folder",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFLNK => "a symbolic link",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    }
}

#[cfg(test)]
mod tests;
