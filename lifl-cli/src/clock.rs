//! The node's clock: the same in all of its processes, and in the plane's counters. And the time of day.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The time of day in UTC, as the log writes it, to the second: `2026-01-31T23:59:59Z`.
pub(crate) fn utc() -> String {
    let mut text = String::new();
    // A string takes all that is written to it.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text.truncate("2026-01-31T23:59:59".len());
    text + "Z"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_day_has_its_form() {
        let form: String = utc()
            .chars()
            .map(|letter| if letter.is_ascii_digit() { '0' } else { letter })
            .collect();
        assert_eq!(form, "0000-00-00T00:00:00Z");
    }
}
