//! What the SK_MSG programs share. On any other target than BPF there is nothing here.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]
#![cfg(target_arch = "bpf")]

use core::arch::asm;
use core::ptr;

use aya_ebpf::bindings::sk_msg_md;
use lifl_common::kernel::Connection;

/// The sending socket's connection.
#[inline(always)]
pub fn connection(msg: *const sk_msg_md) -> Connection {
    // SAFETY: `msg` is the kernel's context. Each field is read as it stands, since the verifier knows only whole
    // fields of a context: volatile keeps two from being merged into one load.
    unsafe {
        Connection {
            local_ip4: ptr::read_volatile(&raw const (*msg).local_ip4),
            remote_ip4: ptr::read_volatile(&raw const (*msg).remote_ip4),
            local_port: ptr::read_volatile(&raw const (*msg).local_port),
            remote_port: ptr::read_volatile(&raw const (*msg).remote_port),
        }
    }
}

/// Adds where other CPUs may be adding too.
///
/// # Safety
/// `counter` is aligned and stays a map value of this program for the call.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, n: u64) {
    // SAFETY: one atomic add to an address that the caller vouches for. `core` has no `fetch_add` for this target.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) counter, in(reg) n, options(nostack)) };
}

/// The number as it is, but to the compiler anybody's guess: what is compared after this is compared in the program
/// too, where the verifier sees it.
#[inline(always)]
pub fn opaque(mut n: usize) -> usize {
    // SAFETY: a comment is no instruction.
    unsafe { asm!("/* {0} */", inout(reg) n, options(nomem, nostack)) };
    n
}
