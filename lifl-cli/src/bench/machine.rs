//! The machine: what its memory can be read at, and what processes have used.

use std::fs;
use std::time::Instant;

use anyhow::Context;
use memmap2::{Advice, MmapMut};
use nix::sys::resource::{Usage, UsageWho, getrusage};
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use zerocopy::FromBytes;

/// What a thread reads at a time.
const CHUNK: usize = 1 << 20;

/// How often the memory is read for its bandwidth.
const READS: usize = 7;

/// Bytes that are read for a bandwidth when no bench has some already: far more than any cache.
const PROBE_BYTES: usize = 1 << 30;

/// Threads for reading.
pub(super) fn threads(count: usize) -> anyhow::Result<ThreadPool> {
    ThreadPoolBuilder::new()
        .num_threads(count)
        .build()
        .with_context(|| format!("no {count} threads"))
}

/// As many as the machine has for this process.
pub(super) fn cores() -> usize {
    lifl_common::limits::cpus()
}

/// Memory such as arenas have it: in large pages where the machine gives them, and touched. Of small floats, whatever their
/// type.
pub(super) fn buffer(pool: &ThreadPool, bytes: usize, seed: usize) -> anyhow::Result<MmapMut> {
    let mut map = MmapMut::map_anon(bytes.max(1)).with_context(|| format!("no {bytes} bytes of memory"))?;
    // Refused by kernels without them, where ordinary ones have to do.
    let _ = map.advise(Advice::HugePage);
    let high = 0x3D + (seed & 1) as u8;
    pool.install(|| {
        map.par_chunks_mut(CHUNK).for_each(|chunk| {
            for (i, byte) in chunk.iter_mut().enumerate() {
                *byte = if i % 2 == 1 { high } else { (i / 7 + seed) as u8 };
            }
        });
    });
    Ok(map)
}

/// Bytes that can be read in a second: the median of several passes over all of the buffers.
pub(super) fn read_bandwidth(pool: &ThreadPool, buffers: &[&[u8]]) -> f64 {
    let bytes: usize = buffers.iter().map(|buffer| buffer.len()).sum();
    let mut seconds: Vec<f64> = (0..READS)
        .map(|_| {
            let begun = Instant::now();
            std::hint::black_box(pool.install(|| read(buffers)));
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    bytes as f64 / seconds[READS / 2]
}

/// [`read_bandwidth`] of memory that is only there for that, with all cores.
pub(super) fn probe() -> anyhow::Result<f64> {
    let pool = threads(cores())?;
    let memory = buffer(&pool, PROBE_BYTES, 0)?;
    Ok(read_bandwidth(&pool, &[&memory]))
}

fn read(buffers: &[&[u8]]) -> u64 {
    let arch = Arch::new();
    let chunks: Vec<&[u8]> = buffers.iter().flat_map(|buffer| buffer.chunks(CHUNK)).collect();
    let sums = chunks.into_par_iter().map(|chunk| arch.dispatch(Sum(chunk)));
    sums.reduce(|| 0, u64::wrapping_add)
}

/// The cheapest use of every byte: a sum that vectors do.
struct Sum<'a>(&'a [u8]);

impl NullaryFnOnce for Sum<'_> {
    type Output = u64;

    #[inline(always)]
    fn call(self) -> u64 {
        let (words, _) = <[u64]>::ref_from_prefix(self.0).unwrap_or((&[], &[]));
        let mut sum = 0_u64;
        for word in words {
            sum = sum.wrapping_add(*word);
        }
        sum
    }
}

/// User and system seconds of this process, or of its children that have ended.
pub(super) fn cpu_seconds(who: UsageWho) -> f64 {
    let of = |usage: Usage| {
        let times = [usage.user_time(), usage.system_time()];
        let seconds = times.map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6);
        seconds.iter().sum()
    };
    getrusage(who).map_or(0.0, of)
}

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    /// User and system time.
    pub(super) cpu_seconds: f64,
    /// How often it slept and was woken.
    pub(super) switches: u64,
    /// Memory that is its own.
    pub(super) private_bytes: u64,
}

/// CPU time of a process and its children, as far as they are there.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TreeCpu {
    /// User and system time.
    pub(super) seconds: f64,
    pub(super) processes: usize,
}

/// What a process and its children have used.
pub(super) fn cpu_of_tree(root: u32) -> TreeCpu {
    let children = fs::read_dir(format!("/proc/{root}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let children = children.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: String = children.collect();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    // Threads come and go in such a while: what has gone counts in the process, whose account is kept in ticks.
    let all = children.chain([root]).filter_map(process_cpu_seconds);
    all.fold(TreeCpu::default(), |sum, seconds| TreeCpu {
        seconds: sum.seconds + seconds,
        processes: sum.processes + 1,
    })
}

/// User and system time of a process, of its threads that have ended too; `None` if it is gone.
fn process_cpu_seconds(pid: u32) -> Option<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // After the name, which may have anything in it, come the fields from the third on (man 5 proc): the 14th and the 15th.
    let (_, fields) = text.rsplit_once(')')?;
    let ticks = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok());
    // USER_HZ, which is the same on every architecture that Rust's Linux runs on.
    Some(ticks.sum::<f64>() / 100.0)
}

/// What one process has used, all of its threads.
pub(super) fn used_by(pid: u32) -> Used {
    let folder = format!("/proc/{pid}/task");
    let mut used = Used::default();
    for task in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Nanoseconds on a CPU come first (Documentation/scheduler/sched-stats.rst).
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let nanos = text.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok());
        used.cpu_seconds += nanos.unwrap_or(0.0) / 1e9;
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        used.switches += field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    used.private_bytes = field(&status, "RssAnon:").unwrap_or(0) * 1024;
    used
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Memory that can be had without swapping, in bytes.
pub(super) fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    field(&text, "MemAvailable:").unwrap_or(0) * 1024
}

/// The most that this process has had since [`forget_peak`].
pub(super) fn peak_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    field(&status, "VmHWM:").unwrap_or(0) * 1024
}

/// Begins to measure the peak anew; where the kernel does not let it, the peak is that of all that was before.
pub(super) fn forget_peak() {
    // Documentation/filesystems/proc.rst: "5" resets the peak resident set size.
    let _ = fs::write("/proc/self/clear_refs", "5");
}
