//! Cutting the work: the threads that fold, and the chunks that they take.
//!
//! A chunk is large enough that handing it out costs nothing, and small enough that a thread which the machine took
//! away for a while does not hold up the others. Where the cuts lie changes no bit of any result.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::FoldError;

/// Elements in a chunk.
const CHUNK: usize = 1 << 18;

/// The threads that an aggregator computes with, and the vector instructions that its machine has. Clones share the
/// threads.
#[derive(Clone, Debug)]
pub struct Threads {
    /// `None`: the caller's own thread.
    pool: Option<Arc<rayon::ThreadPool>>,
    arch: pulp::Arch,
}

impl Threads {
    /// How many of so many threads have something to do with so many elements: no more than there are chunks.
    pub fn useful(threads: usize, elements: usize) -> usize {
        threads.min(elements.div_ceil(CHUNK)).max(1)
    }

    /// As many threads as that, or half of them, and so on, where the system refuses some; in the end the caller's own.
    pub fn up_to(mut threads: usize) -> Self {
        loop {
            match Self::new(threads) {
                Ok(threads) => return threads,
                Err(refused) => tracing::warn!("folding on fewer threads: {refused}"),
            }
            threads /= 2;
        }
    }

    /// As many threads as that, at least one; one means the caller's own.
    ///
    /// # Errors
    /// If the machine refuses them.
    pub fn new(threads: usize) -> Result<Self, FoldError> {
        let pool = match threads {
            0 | 1 => None,
            _ => {
                let builder = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("lifl-fold-{index}"));
                Some(Arc::new(
                    builder
                        .build()
                        .map_err(|source| FoldError::Threads { threads, source })?,
                ))
            }
        };
        Ok(Self {
            pool,
            arch: pulp::Arch::new(),
        })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.pool.as_ref().map_or(1, |pool| pool.current_num_threads())
    }

    /// The same threads as on a machine that has only the baseline's vectors.
    #[cfg(test)]
    pub(super) fn without_vectors(self) -> Self {
        Self {
            arch: pulp::Arch::Scalar,
            ..self
        }
    }

    /// Cuts `work` into chunks and gives each to `run` with the index of its first element.
    pub(super) fn each<P: Part>(&self, work: P, run: impl Fn(usize, P) + Sync) {
        self.cut(work, &|(start, part)| run(start, part));
    }

    /// As [`each`](Self::each), compiled for this machine's vectors. Gives `false`, early, as soon as one chunk did.
    ///
    /// What `run` calls must be `inline(always)` to be compiled for those vectors too; a closure given to an
    /// iterator's `for_each` or `fold` is not, a `for` loop is.
    pub(super) fn all<P: Part>(&self, work: P, run: impl Fn(usize, P) -> bool + Sync) -> bool {
        let good = AtomicBool::new(true);
        self.cut(work, &|(start, part)| {
            let run = Run {
                run: &run,
                start,
                part,
            };
            // Relaxed: the flag carries no data, and joining the threads orders its last value before the return.
            if good.load(Ordering::Relaxed) && !self.arch.dispatch(run) {
                good.store(false, Ordering::Relaxed);
            }
        });
        good.into_inner()
    }

    /// `run` is behind a pointer, since each use would else be another copy of all that it inlines.
    fn cut<P: Part>(&self, work: P, run: &(dyn Fn((usize, P)) + Sync)) {
        let mut chunks = Vec::with_capacity(work.len().div_ceil(CHUNK));
        let (mut start, mut rest) = (0, work);
        while rest.len() > CHUNK {
            let (part, tail) = rest.split_at(CHUNK);
            chunks.push((start, part));
            (start, rest) = (start + CHUNK, tail);
        }
        match &self.pool {
            // Not worth waking anybody.
            _ if chunks.is_empty() => run((start, rest)),
            None => chunks.into_iter().chain([(start, rest)]).for_each(run),
            Some(pool) => {
                chunks.push((start, rest));
                pool.install(|| chunks.into_par_iter().for_each(run));
            }
        }
    }
}

/// One chunk's run. A closure in its place would be compiled for the baseline: what calls a closure once does not
/// pass its `inline(always)` on.
struct Run<'a, F, P> {
    run: &'a F,
    start: usize,
    part: P,
}

impl<F: Fn(usize, P) -> bool, P> pulp::NullaryFnOnce for Run<'_, F, P> {
    type Output = bool;

    #[inline(always)]
    fn call(self) -> bool {
        (self.run)(self.start, self.part)
    }
}

/// Work that can be cut between two elements.
pub(super) trait Part: Send + Sized {
    /// Elements in it.
    fn len(&self) -> usize;

    /// The first `mid` elements, and the others.
    fn split_at(self, mid: usize) -> (Self, Self);
}

impl<T: Sync> Part for &[T] {
    fn len(&self) -> usize {
        <[T]>::len(self)
    }

    fn split_at(self, mid: usize) -> (Self, Self) {
        <[T]>::split_at(self, mid)
    }
}

impl<T: Send> Part for &mut [T] {
    fn len(&self) -> usize {
        <[T]>::len(self)
    }

    fn split_at(self, mid: usize) -> (Self, Self) {
        self.split_at_mut(mid)
    }
}

impl<A: Part, B: Part> Part for (A, B) {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn split_at(self, mid: usize) -> (Self, Self) {
        let (a, b) = self.0.split_at(mid);
        let (c, d) = self.1.split_at(mid);
        ((a, c), (b, d))
    }
}
