//! What the sockmap plane needs of a machine, asked of the machine.

use std::fs;

/// The oldest kernel with the sockmap fixes that the job boundary rests on (two threads sending on one socket
/// could share a verdict before `cd9733f5d75c`).
pub const OLDEST_KERNEL: (u32, u32) = (5, 15);

/// The capabilities that loading takes, with their numbers in `include/uapi/linux/capability.h`.
pub const CAPABILITIES: [(&str, u32); 2] = [("CAP_BPF", 39), ("CAP_NET_ADMIN", 12)];

/// The capability that stands for both.
const SYS_ADMIN: u32 = 21;

/// The running kernel's release as it calls itself, with its major and minor number.
pub fn kernel() -> Option<(String, (u32, u32))> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .ok()?
        .trim()
        .to_owned();
    let version = parse_release(&release)?;
    Some((release, version))
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The calling thread's effective capabilities, a bit for each; 0 where `/proc` does not tell.
pub fn effective_capabilities() -> u64 {
    effective_in(&fs::read_to_string("/proc/thread-self/status").unwrap_or_default())
}

/// The effective capabilities of all threads of this process together.
pub fn process_capabilities() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let masks = tasks.map(|task| {
        // A thread may end meanwhile.
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        effective_in(&status)
    });
    masks.fold(0, |all, mask| all | mask)
}

/// The names of the capabilities in a mask, as `capabilities(7)` has them.
pub fn names_of(mask: u64) -> Vec<String> {
    let name = |number: u32| {
        let known = caps::all()
            .into_iter()
            .find(|cap| u32::from(cap.index()) == number);
        known.map_or_else(|| format!("capability {number}"), |cap| cap.to_string())
    };
    (0..u64::BITS)
        .filter(|number| mask & (1 << number) != 0)
        .map(name)
        .collect()
}

fn effective_in(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Those of [`CAPABILITIES`] that are not in the mask.
pub fn missing_capabilities(effective: u64) -> Vec<&'static str> {
    let has = |number: u32| effective & (1 << number) != 0;
    let lacks = |&(_, number): &(&str, u32)| !(has(number) || has(SYS_ADMIN));
    CAPABILITIES
        .into_iter()
        .filter(lacks)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_releases_that_distributions_make() {
        assert_eq!(parse_release("6.1.0-37-amd64"), Some((6, 1)));
        assert_eq!(parse_release("5.15.167.4-microsoft-standard-WSL2"), Some((5, 15)));
        assert_eq!(parse_release("unknown"), None);
    }

    #[test]
    fn names_capabilities_as_their_manual_does() {
        assert_eq!(names_of(1 << 12 | 1 << 39), ["CAP_NET_ADMIN", "CAP_BPF"]);
        assert_eq!(names_of(1 << 63), ["capability 63"]);
        assert!(names_of(0).is_empty());
        assert_eq!(
            effective_in("Name:\tx\nCapEff:\t0000008000001000\n"),
            1 << 12 | 1 << 39
        );
        // The threads of a test have what the one that asks has.
        assert_eq!(
            process_capabilities() & effective_capabilities(),
            effective_capabilities()
        );
    }

    #[test]
    fn names_what_is_missing() {
        assert_eq!(missing_capabilities(0), ["CAP_BPF", "CAP_NET_ADMIN"]);
        assert_eq!(missing_capabilities(1 << 12), ["CAP_BPF"]);
        assert!(missing_capabilities(1 << 21).is_empty());
        assert!(missing_capabilities(1 << 12 | 1 << 39).is_empty());
    }
}
