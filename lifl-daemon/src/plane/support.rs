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

/// The calling thread's effective capabilities, a bit for each; 0 if the kernel does not tell.
pub fn effective_capabilities() -> u64 {
    let set = caps::read(None, caps::CapSet::Effective).unwrap_or_default();
    set.into_iter()
        .fold(0, |mask, capability| mask | capability.bitmask())
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

/// Whether the verifier lets a process with that mask load whatever is safe. Without `CAP_PERFMON` it also refuses what
/// could leak addresses or be speculated past, arithmetic on packet pointers in loops among it.
pub(crate) fn may_load_any(effective: u64) -> bool {
    effective & (caps::Capability::CAP_PERFMON.bitmask() | 1 << SYS_ADMIN) != 0
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
    }

    #[test]
    fn what_the_kernel_tells_is_what_proc_shows() {
        let status = fs::read_to_string("/proc/thread-self/status").expect("a status");
        let shown = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let shown = u64::from_str_radix(shown.expect("shown").trim(), 16).expect("a mask");
        assert_eq!(effective_capabilities(), shown);
    }

    #[test]
    fn names_what_is_missing() {
        assert_eq!(missing_capabilities(0), ["CAP_BPF", "CAP_NET_ADMIN"]);
        assert_eq!(missing_capabilities(1 << 12), ["CAP_BPF"]);
        assert!(missing_capabilities(1 << 21).is_empty());
        assert!(missing_capabilities(1 << 12 | 1 << 39).is_empty());
    }
}
