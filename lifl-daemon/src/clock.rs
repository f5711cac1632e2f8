//! The clock of `bpf_ktime_get_ns`, by which both planes say when a frame passed: `CLOCK_MONOTONIC` of the initial time
//! namespace, wherever this process is.

use std::sync::LazyLock;
use std::time::Duration;

use nix::time::ClockId;

/// Nanoseconds by which this process's `CLOCK_MONOTONIC` is ahead of the initial time namespace's.
static AHEAD_NS: LazyLock<i128> = LazyLock::new(|| {
    let offsets = std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
    monotonic_offset_ns(&offsets).unwrap_or(0)
});

/// Now.
pub(crate) fn kernel_ns() -> u64 {
    let now = ClockId::CLOCK_MONOTONIC.now().map(Duration::from);
    let now = now.map_or(0, |now| now.as_nanos().cast_signed());
    u64::try_from(now - *AHEAD_NS).unwrap_or(0)
}

/// Nanoseconds since a frame that passed at `last_ns`; `None` if none has.
pub(crate) fn idle_ns(last_ns: u64) -> Option<u64> {
    (last_ns != 0).then(|| kernel_ns().saturating_sub(last_ns))
}

/// The line for the monotonic clock in `timens_offsets`: its name, or its number, seconds and nanoseconds
/// (`time_namespaces(7)`).
fn monotonic_offset_ns(offsets: &str) -> Option<i128> {
    let mut lines = offsets
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = lines.find(|words| matches!(words.first(), Some(&("monotonic" | "1"))))?;
    let (seconds, nanoseconds) = (
        line.get(1)?.parse::<i128>().ok()?,
        line.get(2)?.parse::<i128>().ok()?,
    );
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_a_time_namespace_is_read() {
        let offsets = "monotonic       -86400         5\nboottime        7         0\n";
        assert_eq!(monotonic_offset_ns(offsets), Some(-86_399_999_999_995));
        assert_eq!(monotonic_offset_ns("1 2 3\n7 0 0\n"), Some(2_000_000_003));
        for none in ["", "boottime 1 2", "monotonic", "monotonic x 0"] {
            assert_eq!(monotonic_offset_ns(none), None, "{none:?}");
        }
    }

    #[test]
    fn no_frame_has_no_age_and_one_of_just_now_a_small_one() {
        assert_eq!(idle_ns(0), None);
        assert!(idle_ns(kernel_ns()).is_some_and(|idle| idle < 10_000_000_000));
    }
}
