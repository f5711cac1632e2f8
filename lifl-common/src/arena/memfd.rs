//! Memfds of huge or ordinary pages, and their seals.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};

/// A huge page's size: the only one that arenas use.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// The kernel's seals that make an arena: nobody new may write, nobody may change its size or add seals.
pub const ARENA_SEALS: i32 =
    libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;

/// The seals without which a reader does not map: a cut would be a `SIGBUS`, a write a torn read.
pub(super) const READER_SEALS: i32 = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SHRINK;

/// Makes a memfd of `bytes` bytes, of huge pages or of ordinary ones. Nothing is reserved yet.
///
/// # Errors
/// What `memfd_create` or `ftruncate` answers: `EINVAL`/`ENODEV` where the kernel has no huge pages.
pub fn create(name: &str, bytes: u64, huge: bool) -> io::Result<File> {
    let name = CString::new(name.replace('\0', "?")).expect("no NUL is left");
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if huge {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let file = File::from(memfd_create(name.as_c_str(), flags)?);
    file.set_len(bytes)?;
    Ok(file)
}

/// Opens a memfd once more: an open file of its own, which the kernel counts. (It does not count the one that
/// `memfd_create` gives.)
///
/// # Errors
/// What `open(2)` answers: `EACCES` for another user's.
pub fn reopen(memfd: BorrowedFd<'_>, write: bool) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    File::options().read(true).write(write).open(path)
}

/// Lets no other user open a memfd that it does not have open.
///
/// # Errors
/// What `fchmod(2)` answers.
pub fn keep_private(memfd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fchmod(memfd, Mode::S_IRUSR | Mode::S_IWUSR)?)
}

/// Whether nobody has a memfd open or mapped but through this file, which must be [reopened](reopen) for writing, as all
/// others must be that are to be seen. `O_PATH` descriptors are not.
///
/// The kernel gives a write lease on a file only to the sole opener of it (`check_conflicting_open` in `fs/locks.c`).
///
/// # Errors
/// If the kernel gives no leases on such files, or not to this user.
pub fn is_sole_opener(memfd: BorrowedFd<'_>) -> io::Result<bool> {
    let lease = |kind: libc::c_int| {
        // SAFETY: takes two numbers; the descriptor is open.
        match unsafe { libc::fcntl(memfd.as_raw_fd(), libc::F_SETLEASE, kind) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // Whoever opens it at this moment has the kernel signal the lease's holder: by one that is ignored.
    // SAFETY: takes two numbers; the descriptor is open.
    unsafe { libc::fcntl(memfd.as_raw_fd(), F_SETSIG, libc::SIGURG) };
    match lease(libc::F_WRLCK) {
        Ok(()) => lease(libc::F_UNLCK).map(|()| true),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// `F_SETSIG` in `include/uapi/asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// Seals an arena for good. Its owner must have mapped it before: mappings made later cannot be written.
///
/// # Errors
/// What `fcntl(F_ADD_SEALS)` answers.
pub fn seal(memfd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl(
        memfd,
        FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(ARENA_SEALS)),
    )?;
    Ok(())
}

/// The seals that a memfd has.
///
/// # Errors
/// What `fcntl(F_GET_SEALS)` answers: `EINVAL` for what is no memfd.
pub fn seals(memfd: impl AsFd) -> io::Result<i32> {
    Ok(fcntl(memfd.as_fd(), FcntlArg::F_GET_SEALS)?)
}

/// Reserves all of a memfd's huge pages, so that a shortage is an error here and not a `SIGBUS` later.
///
/// A shared hugetlb mapping reserves for the file, and the file keeps the reservation when the mapping goes
/// (`Documentation/mm/hugetlbfs_reserv.rst`).
///
/// # Errors
/// `ENOMEM` if fewer huge pages are free.
pub fn reserve(memfd: &File, bytes: u64) -> io::Result<()> {
    let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    memmap2::MmapOptions::new()
        .len(length)
        .map_raw(memfd.as_raw_fd())
        .map(drop)
}
