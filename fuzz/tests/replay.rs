//! Every file of the corpora, through its target, with the ordinary compiler: what the fuzzer has found once stays
//! found.
//!
//! Each input has a time and a memory that it may take. The memory is counted here, since no sanitizer does it.

#[expect(dead_code, reason = "it is a program too, whose `main` is not called here")]
#[path = "../examples/seeds.rs"]
mod seeds;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use lifl_fuzz::{TARGETS, Target};

/// Bytes that one input may have allocated at a time. libFuzzer holds a single allocation to the same.
const MEMORY: usize = 256 << 20;

/// An input that takes longer is a way to keep a process busy.
const TIME: Duration = Duration::from_secs(10);

/// What the files of one corpus may be, so that the repository stays small and this test short.
const FILES: usize = 200;
const BYTES: u64 = 1 << 20;

/// Tests of one process share its memory's count.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Counting {
    now: AtomicUsize,
    most: AtomicUsize,
}

#[global_allocator]
static MEMORY_COUNT: Counting = Counting {
    now: AtomicUsize::new(0),
    most: AtomicUsize::new(0),
};

// SAFETY: all is passed to the system's allocator as it came, and what that gives is given on; `realloc` and
// `alloc_zeroed` are the trait's own, which call these two. Counting touches no allocated memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = self.now.fetch_add(layout.size(), Relaxed) + layout.size();
        self.most.fetch_max(now, Relaxed);
        // SAFETY: the caller keeps to what `alloc` demands of it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        self.now.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `at` is from `alloc` above, and so from the system's, with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

fn folder(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(of)
}

/// The files of a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    files
}

fn replay(target: &Target) {
    let _one = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = folder("corpus").join(target.name);
    let inputs = files(&folder);
    assert!(
        !inputs.is_empty(),
        "{}: no inputs: the corpus is lost",
        folder.display()
    );
    assert!(
        inputs.len() <= FILES,
        "{}: {} files, at most {FILES}: minimise it",
        folder.display(),
        inputs.len()
    );
    let mut bytes = 0;
    let mut failed = Vec::new();
    for input in &inputs {
        let data = fs::read(input).unwrap_or_else(|error| panic!("{}: {error}", input.display()));
        bytes += data.len() as u64;
        let before = MEMORY_COUNT.now.load(Relaxed);
        MEMORY_COUNT.most.store(before, Relaxed);
        let begun = Instant::now();
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&data))).is_err() {
            failed.push(format!("{}: what it said is above", input.display()));
        }
        let (time, memory) = (
            begun.elapsed(),
            MEMORY_COUNT.most.load(Relaxed).saturating_sub(before),
        );
        if time > TIME {
            failed.push(format!("{}: took {time:.1?}, at most {TIME:?}", input.display()));
        }
        if memory > MEMORY {
            failed.push(format!(
                "{}: had {memory} bytes, at most {MEMORY}",
                input.display()
            ));
        }
    }
    assert!(failed.is_empty(), "{}:\n{}", target.name, failed.join("\n"));
    assert!(
        bytes <= BYTES,
        "{}: {bytes} bytes, at most {BYTES}: minimise it",
        folder.display()
    );
    println!("{}: {} inputs, {bytes} bytes", target.name, inputs.len());
}

macro_rules! replays {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            let named = |target: &&Target| target.name == stringify!($name);
            replay(TARGETS.iter().find(named).expect("a target of that name"));
        })*

        /// A target without a program, a corpus or a replay is as good as none.
        #[test]
        fn every_target_has_a_program_a_corpus_and_a_replay() {
            let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
            let stems = |of: &str| -> BTreeSet<String> {
                let stem = |path: PathBuf| path.file_stem().expect("a name").to_string_lossy().into_owned();
                files(&folder(of)).into_iter().map(stem).collect()
            };
            assert_eq!(stems("fuzz_targets"), names);
            assert_eq!(stems("corpus"), names);
            assert_eq!(BTreeSet::from([$(stringify!($name).to_owned()),*]), names);
        }
    };
}

replays!(config control_packet flame_wire frame idx image npz session);

/// The messages are made from their types, so that a field more is missed by the compiler; the rest is read back as it is made.
#[test]
fn what_the_corpora_begin_with_can_be_made_anew() {
    let _alone = ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let folder = tempfile::tempdir().expect("a folder");
    seeds::write_all(folder.path());
    for target in TARGETS {
        let made = fs::read_dir(folder.path().join(target.name))
            .expect("a corpus")
            .count();
        assert!(made > 0, "{}", target.name);
    }
}
