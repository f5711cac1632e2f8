//! The pool: how much shared memory arenas may take, and of which pages.
//!
//! Under `auto` an arena that [suits](Layout::suits_huge_pages) huge pages gets them when they can be had: free ones, or, if this
//! process may, surplus ones. Those
//! the kernel makes for one memfd and takes back when it goes, so nothing is left to return, whoever dies and how.
//! Otherwise the arena gets ordinary pages, and its owner is told why.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lifl_common::arena::{Layout, memfd};
use lifl_common::limits::{Cgroups, Limit};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::limits;
use crate::registry::quota::QuotaError;

/// Which pages arenas get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Huge ones for arenas of 1 MiB and more where they can be had, ordinary ones elsewhere.
    Auto,
    /// Huge ones for these, or the request fails.
    Always,
    /// Ordinary ones.
    Never,
}

/// Why an arena cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The ceiling.
    #[error(
        "the pool has {free_mib} MiB left of {ceiling_mib} MiB, the arena needs {need_mib} MiB: \
         raise --pool-mib, or end another job"
    )]
    Full {
        /// What is asked for.
        need_mib: u64,
        /// What is left.
        free_mib: u64,
        /// The ceiling.
        ceiling_mib: u64,
    },
    /// A layout without slots or beyond all memory.
    #[error("{slots} slots of {slot_bytes} bytes make no arena: slots are a multiple of 4096 bytes")]
    Layout {
        /// Its slots.
        slots: u32,
        /// Bytes of each.
        slot_bytes: u64,
    },
    /// `--huge-pages always`, and there are none.
    #[error("{0}")]
    NoHugePages(String),
    /// Nobody to make it.
    #[error("{0}")]
    NoThread(String),
    /// Its user's quota.
    #[error(transparent)]
    Quota(#[from] QuotaError),
    /// A limit of this process or machine.
    #[error("no memory of {mib} MiB can be made: {limit}")]
    Limit {
        /// Its size.
        mib: u64,
        /// Which, and what to do.
        limit: String,
    },
    /// The kernel refuses a memfd.
    #[error("no memfd of {bytes} bytes can be made")]
    Memfd {
        /// Its size.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// An arena's memory.
#[derive(Debug)]
pub(crate) struct Allocation {
    /// The memfd, opened for the daemon.
    pub(crate) memfd: File,
    /// The same, opened for its owner.
    pub(crate) handed: OwnedFd,
    /// Its bytes, which count against the ceiling.
    pub(crate) bytes: u64,
    /// Bytes of its pages.
    pub(crate) page_bytes: u64,
    /// Why they are not huge, when they are not and might have been.
    pub(crate) note: Option<String>,
}

/// All arenas' memory.
#[derive(Debug)]
pub(crate) struct Pool {
    ceiling_bytes: u64,
    used_bytes: u64,
    huge_pages: HugePages,
    kernel: KernelPool,
    /// Whether huge pages are to be expected, when it was last looked.
    expected: Arc<AtomicBool>,
}

impl Pool {
    pub(crate) fn new(ceiling_bytes: u64, huge_pages: HugePages) -> Self {
        let pool = Self {
            ceiling_bytes,
            used_bytes: 0,
            huge_pages,
            kernel: KernelPool::default(),
            expected: Arc::default(),
        };
        pool.refresher()();
        pool
    }

    pub(crate) fn ceiling_bytes(&self) -> u64 {
        self.ceiling_bytes
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Whether huge pages are to be expected.
    pub(crate) fn expects_huge_pages(&self) -> bool {
        self.expected.load(Relaxed)
    }

    /// Sets bytes aside for an arena, which is then [made](Plan::make) elsewhere. `admit` says whether its user may have so many
    /// bytes more.
    pub(crate) fn plan(
        &mut self,
        name: String,
        layout: Layout,
        pages: Pages,
        admit: impl Fn(u64) -> Result<(), QuotaError>,
    ) -> Result<Plan, PoolError> {
        let Layout { slots, slot_bytes } = layout;
        let bad_layout = || PoolError::Layout { slots, slot_bytes };
        if slots == 0 {
            return Err(bad_layout());
        }
        let plain_bytes = layout.memfd_bytes(false).ok_or_else(bad_layout)?;
        let (mut huge_bytes, mut note) = (None, None);
        if pages == Pages::Ordinary {
            if self.huge_pages == HugePages::Always {
                return Err(PoolError::NoHugePages(
                    "the daemon gives huge pages only (--huge-pages always), which this worker cannot use: start it with \
                     --huge-pages auto, or raise the worker's hugetlb limit"
                        .to_owned(),
                ));
            }
            note = Some(
                "its worker could not use huge pages: its control group allows fewer (hugetlb.2MB.max)"
                    .to_owned(),
            );
        } else if self.huge_pages != HugePages::Never && layout.suits_huge_pages() {
            let bytes = layout.memfd_bytes(true).ok_or_else(bad_layout)?;
            let room = admit(bytes).map_err(PoolError::from);
            match room.and_then(|()| self.check_room(bytes)) {
                Ok(()) => huge_bytes = Some(bytes),
                Err(error) if self.huge_pages == HugePages::Always => return Err(error),
                Err(error) => note = Some(error.to_string()),
            }
        }
        let bytes = match huge_bytes {
            // Never fewer than of ordinary pages.
            Some(bytes) => bytes,
            None => {
                admit(plain_bytes)?;
                self.check_room(plain_bytes)?;
                plain_bytes
            }
        };
        self.used_bytes += bytes;
        Ok(Plan {
            name,
            bytes,
            huge_bytes,
            plain_bytes,
            note,
            always: self.huge_pages == HugePages::Always,
            most_surplus: self.ceiling_bytes / memfd::HUGE_PAGE_BYTES,
            kernel: self.kernel.clone(),
        })
    }

    /// Makes memory for an arena, here and now.
    #[cfg(test)]
    fn allocate(
        &mut self,
        name: &str,
        layout: Layout,
        admit: impl Fn(u64) -> Result<(), QuotaError>,
    ) -> Result<Allocation, PoolError> {
        let plan = self.plan(name.to_owned(), layout, Pages::Usual, admit)?;
        let made = plan.make();
        self.free(plan.bytes() - made.as_ref().map_or(0, |made| made.bytes));
        made
    }

    /// Looks anew whether huge pages are to be expected. Reads files: not for the registry's task.
    pub(crate) fn refresher(&self) -> impl FnOnce() + Send + use<> {
        let (kernel, expected) = (self.kernel.clone(), Arc::clone(&self.expected));
        let never = self.huge_pages == HugePages::Never;
        move || {
            let allowed = Cgroups::current()
                .huge_pages()
                .is_none_or(|limit| limit.left() >= memfd::HUGE_PAGE_BYTES);
            expected.store(!never && allowed && kernel.has_some(), Relaxed);
        }
    }

    /// Takes over arenas that a daemon before this one made; they may be more than there is room for.
    pub(crate) fn adopt(&mut self, bytes: u64) {
        self.used_bytes = self.used_bytes.saturating_add(bytes);
    }

    /// Whether there is room for so many bytes.
    pub(crate) fn has_room(&self, bytes: u64) -> Result<(), PoolError> {
        self.check_room(bytes)
    }

    /// An arena is gone.
    pub(crate) fn free(&mut self, bytes: u64) {
        self.used_bytes = self.used_bytes.saturating_sub(bytes);
    }

    fn check_room(&self, bytes: u64) -> Result<(), PoolError> {
        let free = self.ceiling_bytes.saturating_sub(self.used_bytes);
        if bytes <= free {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        Err(PoolError::Full {
            need_mib: bytes.div_ceil(1 << 20),
            free_mib: mib(free),
            ceiling_mib: mib(self.ceiling_bytes),
        })
    }
}

/// Which pages an arena is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// Huge ones, where they are wanted and to be had.
    Usual,
    /// Ordinary ones, for a worker that has been given huge ones and cannot use them.
    Ordinary,
}

/// An arena whose bytes are set aside.
#[derive(Debug)]
pub(crate) struct Plan {
    name: String,
    bytes: u64,
    huge_bytes: Option<u64>,
    plain_bytes: u64,
    note: Option<String>,
    always: bool,
    /// Surplus pages that the kernel may be let make: no more than the pool has, whoever holds those that there are.
    most_surplus: u64,
    kernel: KernelPool,
}

impl Plan {
    /// What is set aside.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it. The kernel may have to look for memory: not for the registry's task.
    pub(crate) fn make(&self) -> Result<Allocation, PoolError> {
        let mut note = self.note.clone();
        if let Some(bytes) = self.huge_bytes {
            match self.huge(bytes) {
                Ok(memfd) => return opened(&memfd, bytes, memfd::HUGE_PAGE_BYTES, None),
                Err(error) if self.always => return Err(error),
                Err(error) => note = Some(error.to_string()),
            }
        }
        let bytes = self.plain_bytes;
        let memfd = memfd::create(&self.name, bytes, false).map_err(|source| refused(bytes, source))?;
        opened(&memfd, bytes, Layout::SLOT_ALIGN, note)
    }

    fn huge(&self, bytes: u64) -> Result<File, PoolError> {
        let need = bytes / memfd::HUGE_PAGE_BYTES;
        // A page beyond the limit of a control group is no error of any call, but a SIGBUS of who touches it.
        let groups = Cgroups::current();
        if let Some(limit) = groups.huge_pages().filter(|limit| limit.left() < bytes) {
            return Err(PoolError::NoHugePages(too_few(need, &limit)));
        }
        let memfd =
            memfd::create(&self.name, bytes, true).map_err(|source| match refused(bytes, source) {
                PoolError::Memfd { source, .. } => {
                    PoolError::NoHugePages(format!(
                        "the kernel has no huge pages of 2 MiB ({source}): raise vm.nr_hugepages or pass --huge-pages never"
                    ))
                }
                limit => limit,
            })?;
        let _surplus = self.kernel.allow_surplus(need, self.most_surplus);
        match memfd::reserve(&memfd, bytes) {
            // What others were promised meanwhile is in use by now.
            Ok(()) => match groups.huge_pages().filter(|limit| limit.used > limit.allowed) {
                Some(limit) => Err(PoolError::NoHugePages(too_few(need, &limit))),
                None => Ok(memfd),
            },
            Err(_) => {
                let free = self.kernel.free();
                Err(PoolError::NoHugePages(format!(
                    "the arena needs {need} huge pages of 2 MiB, {free} are free: raise vm.nr_hugepages or pass --huge-pages never"
                )))
            }
        }
    }
}

/// A memfd as an arena: opened once for the daemon and once for its owner, so that the kernel can tell whether anybody but the
/// daemon still has it.
fn opened(memfd: &File, bytes: u64, page_bytes: u64, note: Option<String>) -> Result<Allocation, PoolError> {
    let private = memfd::keep_private(memfd.as_fd());
    let open = || memfd::reopen(memfd.as_fd(), true);
    let opened = private.and_then(|()| Ok((open()?, open()?)));
    let (own, handed) = opened.map_err(|source| refused(bytes, source))?;
    Ok(Allocation {
        memfd: own,
        handed: handed.into(),
        bytes,
        page_bytes,
        note,
    })
}

/// That a control group allows fewer huge pages than an arena needs.
fn too_few(need: u64, limit: &Limit) -> String {
    format!(
        "the arena needs {need} huge pages of 2 MiB, {} allows {} and {} are in use: {}",
        limit.by,
        limit.allowed / memfd::HUGE_PAGE_BYTES,
        limit.used.div_ceil(memfd::HUGE_PAGE_BYTES),
        limit.remedy
    )
}

/// Why the kernel gives no memfd.
fn refused(bytes: u64, source: io::Error) -> PoolError {
    match limits::explain(&source, bytes) {
        Some(limit) => PoolError::Limit {
            mib: bytes.div_ceil(1 << 20),
            limit,
        },
        None => PoolError::Memfd { bytes, source },
    }
}

/// The kernel's pool of huge pages.
#[derive(Clone, Debug)]
struct KernelPool {
    folder: PathBuf,
}

impl Default for KernelPool {
    fn default() -> Self {
        Self {
            folder: PathBuf::from("/sys/kernel/mm/hugepages/hugepages-2048kB"),
        }
    }
}

impl KernelPool {
    fn read(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(name))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Whether there are some, or could be.
    fn has_some(&self) -> bool {
        self.read("nr_hugepages").is_some()
            && (self.free() + self.allowed_surplus() > 0 || self.may_allow_surplus())
    }

    /// Huge pages that are neither in use nor promised.
    fn free(&self) -> u64 {
        let free = self.read("free_hugepages").unwrap_or(0);
        free.saturating_sub(self.read("resv_hugepages").unwrap_or(0))
    }

    /// Surplus pages that the kernel would make by itself.
    fn allowed_surplus(&self) -> u64 {
        let limit = self.read(SURPLUS_LIMIT).unwrap_or(0);
        limit.saturating_sub(self.read("surplus_hugepages").unwrap_or(0))
    }

    fn may_allow_surplus(&self) -> bool {
        let limit = self.folder.join(SURPLUS_LIMIT);
        fs::OpenOptions::new().write(true).open(limit).is_ok()
    }

    /// Lets the kernel make what is missing to `pages` free ones, for as long as the result lives. `None` if nothing
    /// is missing, or this process may not.
    fn allow_surplus(&self, pages: u64, most: u64) -> Option<SurplusAllowed> {
        let path = self.folder.join(SURPLUS_LIMIT);
        // Other daemons wait: each must put back the limit that it found.
        let lock = lock(&path)?;
        let missing = pages.saturating_sub(self.free());
        if missing <= self.allowed_surplus() {
            return None;
        }
        let limit = self.read(SURPLUS_LIMIT)?;
        let needed = self.read("surplus_hugepages")?.saturating_add(missing);
        if needed > most.max(limit) {
            return None;
        }
        fs::write(&path, needed.to_string()).ok()?;
        Some(SurplusAllowed {
            path,
            limit,
            _lock: lock,
        })
    }
}

/// How many surplus pages there may be (`Documentation/admin-guide/mm/hugetlbpage.rst`). Those that are there stay when
/// it is lowered, until their memfd goes.
const SURPLUS_LIMIT: &str = "nr_overcommit_hugepages";

/// The lock of those daemons that change the limit; `None` if it is not to be had.
///
/// It lies on a file that only they may open. Where that cannot be had, on the limit's own, which every user may lock: so it
/// is tried for a while only.
fn lock(limit: &Path) -> Option<Flock<File>> {
    let there = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(LOCK);
    let own = there
        .or_else(|_| {
            let mut made = File::options();
            made.read(true).write(true).create_new(true).mode(0o600);
            made.open(LOCK)
        })
        .and_then(|file| Ok((file.metadata()?.mode() & 0o077 == 0).then_some(file)));
    let mut file = match own {
        Ok(Some(own)) => own,
        _ => File::open(limit).ok()?,
    };
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Some(lock),
            Err((unlocked, Errno::EWOULDBLOCK)) if begun.elapsed() < LOCK_WAIT => {
                file = unlocked;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err((_, errno)) => {
                tracing::warn!("vm.{SURPLUS_LIMIT} is not changed: another process has its lock ({errno})");
                return None;
            }
        }
    }
}

/// What daemons lock that change the limit.
const LOCK: &str = "/run/lifl/huge-pages.lock";

/// How long to wait for that.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// The raised limit; dropping it puts back the one before.
#[derive(Debug)]
struct SurplusAllowed {
    path: PathBuf,
    limit: u64,
    _lock: Flock<File>,
}

impl Drop for SurplusAllowed {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.path, self.limit.to_string()) {
            tracing::warn!(
                limit = self.limit,
                "vm.{SURPLUS_LIMIT} cannot be put back: {error}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bytes: u64) -> Layout {
        Layout::for_objects(1, bytes).expect("a layout")
    }

    #[test]
    fn the_ceiling_holds_and_names_the_numbers() {
        let mut pool = Pool::new(3 << 20, HugePages::Never);
        let first = pool.allocate("a", layout(2 << 20), |_| Ok(())).expect("fits");
        let error = pool
            .allocate("b", layout(2 << 20), |_| Ok(()))
            .expect_err("too much")
            .to_string();
        assert!(
            error.contains("1 MiB left of 3 MiB") && error.contains("needs 2 MiB"),
            "{error}"
        );
        pool.free(first.bytes);
        assert!(pool.allocate("b", layout(2 << 20), |_| Ok(())).is_ok());
    }

    #[test]
    fn no_slots_and_endless_slots_are_refused() {
        let mut pool = Pool::new(u64::MAX, HugePages::Never);
        for layout in [
            Layout {
                slots: 0,
                slot_bytes: 4096,
            },
            Layout {
                slots: 1,
                slot_bytes: 5,
            },
            Layout {
                slots: u32::MAX,
                slot_bytes: u64::MAX - 4095,
            },
        ] {
            assert!(
                matches!(
                    pool.allocate("a", layout, |_| Ok(())),
                    Err(PoolError::Layout { .. })
                ),
                "{layout:?}"
            );
        }
    }

    #[test]
    fn without_huge_pages_auto_says_so_and_always_fails() {
        let nowhere = || KernelPool {
            folder: PathBuf::from("/nonexistent"),
        };
        // More than any kernel's pool holds.
        let layout = layout(1 << 45);
        let mut auto = Pool {
            kernel: nowhere(),
            ..Pool::new(u64::MAX, HugePages::Auto)
        };
        let allocation = auto.allocate("a", layout, |_| Ok(())).expect("ordinary pages");
        assert_eq!(allocation.page_bytes, 4096);
        assert!(
            allocation
                .note
                .is_some_and(|note| note.contains("vm.nr_hugepages"))
        );
        let mut always = Pool {
            kernel: nowhere(),
            ..Pool::new(u64::MAX, HugePages::Always)
        };
        assert!(matches!(
            always.allocate("a", layout, |_| Ok(())),
            Err(PoolError::NoHugePages(_))
        ));
    }

    #[test]
    fn a_small_arena_has_ordinary_pages() {
        for huge_pages in [HugePages::Auto, HugePages::Always] {
            let mut pool = Pool::new(1 << 20, huge_pages);
            let arena = pool.allocate("a", layout(5000), |_| Ok(())).expect("fits");
            assert_eq!((arena.page_bytes, arena.bytes, arena.note), (4096, 8192, None));
        }
        assert!(!layout((1 << 20) - 4096).suits_huge_pages());
        assert!(layout(1 << 20).suits_huge_pages());
    }

    /// Nobody gives huge pages back: they go with their memfd's last user, who may outlive the daemon.
    #[test]
    fn huge_pages_last_as_long_as_their_memfd_and_the_limit_is_put_back() {
        let kernel = KernelPool::default();
        if !kernel.may_allow_surplus() {
            eprintln!("NOT RUN: this user may not change vm.{SURPLUS_LIMIT}");
            assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
            return;
        }
        let (limit, before) = (kernel.read(SURPLUS_LIMIT), persistent_pages());
        // More than are free, so that the kernel must make some.
        let bytes = (kernel.free() + 4) * memfd::HUGE_PAGE_BYTES;
        let mut pool = Pool::new(u64::MAX, HugePages::Always);
        let arena = pool
            .allocate("arena", layout(bytes), |_| Ok(()))
            .expect("made by the kernel");
        assert_eq!(kernel.read(SURPLUS_LIMIT), limit);
        drop(pool);
        let reader = memmap2::MmapOptions::new()
            .len(bytes as usize)
            .map_raw(&arena.memfd)
            .expect("mapped");
        // SAFETY: the mapping is `bytes` long and nobody else has it.
        unsafe { reader.as_mut_ptr().write_bytes(1, bytes as usize) };
        drop((reader, arena));
        assert_eq!(persistent_pages(), before, "none was added for good");
    }

    /// Pages that stay until somebody takes them away.
    fn persistent_pages() -> u64 {
        let meminfo = fs::read_to_string("/proc/meminfo").expect("meminfo");
        let field = |name: &str| -> u64 {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|number| number.trim().parse().ok()).expect(name)
        };
        field("HugePages_Total:") - field("HugePages_Surp:")
    }
}
