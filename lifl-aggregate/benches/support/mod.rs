//! What the benches of folds and steps are told by the environment.

/// That variable's number; the default where it is not set.
///
/// # Panics
/// If it is no number.
pub(crate) fn number(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

/// `LIFL_BENCH_THREADS`, or as many threads as there are cores.
pub(crate) fn threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    number("LIFL_BENCH_THREADS", cores)
}
