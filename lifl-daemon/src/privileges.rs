//! What the daemon's process may do, and when it gives that up.
//!
//! ```text
//!   main thread:    what it was started with ── the daemon listens ──▶ RUNNING
//!   other threads:  RUNNING, from their first instruction on
//! ```
//!
//! Capabilities are a thread's. Everything that takes them (loading programs, making and attaching maps, the control
//! socket's group, mounting a BPF filesystem) is done by the main thread while the daemon starts. Everything afterwards
//! is done by others or by nobody: they have given up theirs when they begin. So there is no moment at which a request
//! is served with more than [`running`] has, and no signal needs to be sent to all threads.
//!
//! `lifl-daemon` that root starts becomes another user besides, before any of this: the binary's `user` says how. A
//! [filter](restrict_system_calls) holds back system calls that nobody here needs.
//!
//! What a running daemon needs was measured on Linux 6.18: nothing. Maps are changed through descriptors that are open,
//! and `bpf(2)` asks for `CAP_BPF` only to make maps and programs. Before Linux 5.19 it asked each time, unless
//! `kernel.unprivileged_bpf_disabled` is 0 (`c8644cd0efe7`, "refine kernel.unprivileged_bpf_disabled behaviour").

mod system_calls;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

use crate::plane::support;
pub use system_calls::{FilterError, restrict_system_calls};

/// The kernel from which on `bpf(2)` lets whoever has a map's descriptor change the map.
const MAPS_BY_DESCRIPTOR: (u32, u32) = (5, 19);

/// What a daemon that runs needs, a bit for each capability. `flame`: it serves Flame's workers of all users, whose
/// connections it takes out of their processes (`pidfd_getfd(2)`).
pub fn running(flame: bool) -> u64 {
    let by_descriptor = support::kernel().is_none_or(|(_, version)| version >= MAPS_BY_DESCRIPTOR);
    let bpf = (!by_descriptor).then_some(Capability::CAP_BPF);
    let ptrace = flame.then_some(Capability::CAP_SYS_PTRACE);
    let needed = bpf.into_iter().chain(ptrace);
    needed.fold(0, |mask, capability| mask | capability.bitmask())
}

/// Has this process and its children never get more than they have, by whatever they execute. Of the calling thread and
/// those that it starts: to be called first.
///
/// # Errors
/// If the kernel is older than `PR_SET_NO_NEW_PRIVS`.
pub fn no_more() -> nix::Result<()> {
    nix::sys::prctl::set_no_new_privs()
}

/// Gives up what the calling thread has beyond `kept`, a bit for each capability, in all of its sets. From the bounding
/// set only who has `CAP_SETPCAP` can take; for others it stays as it is, and [`no_more`] makes it mean nothing.
///
/// # Errors
/// If the kernel refuses, which it never does for what a thread has.
pub fn keep_only(kept: u64) -> Result<(), CapsError> {
    let kept = |capability: &Capability| kept & capability.bitmask() != 0;
    caps::clear(None, CapSet::Ambient)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !kept(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    let permitted = caps::read(None, CapSet::Permitted)?;
    let permitted: CapsHashSet = permitted.into_iter().filter(kept).collect();
    caps::set(None, CapSet::Effective, &permitted)?;
    caps::set(None, CapSet::Permitted, &permitted)?;
    caps::clear(None, CapSet::Inheritable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flame_takes_one_capability_and_new_kernels_none_for_maps() {
        let ptrace = Capability::CAP_SYS_PTRACE.bitmask();
        assert_eq!(running(true) & !running(false), ptrace);
        if support::kernel().is_some_and(|(_, version)| version >= MAPS_BY_DESCRIPTOR) {
            assert_eq!(running(false), 0);
        }
    }

    /// On a thread of its own, since it cannot be undone.
    #[test]
    fn a_thread_keeps_what_is_kept_and_nothing_else_and_its_children_too() {
        let sets = || {
            [
                CapSet::Effective,
                CapSet::Permitted,
                CapSet::Inheritable,
                CapSet::Ambient,
            ]
            .map(|set| caps::read(None, set).expect("read"))
        };
        let before = caps::read(None, CapSet::Permitted).expect("read");
        let kept = Capability::CAP_NET_ADMIN;
        let on_thread = move || {
            keep_only(kept.bitmask()).expect("given up");
            std::thread::spawn(sets).join().expect("read")
        };
        let [effective, permitted, inheritable, ambient] =
            std::thread::spawn(on_thread).join().expect("the thread's work");
        let expected: CapsHashSet = before
            .into_iter()
            .filter(|&capability| capability == kept)
            .collect();
        assert_eq!((&effective, &permitted), (&expected, &expected));
        assert!(inheritable.is_empty() && ambient.is_empty());
    }
}
