//! One lookup and one redirect: no sender is checked, nothing is counted, nothing is logged.

use aya_ebpf::bindings::{BPF_F_INGRESS, sk_action};
use aya_ebpf::macros::{map, sk_msg};
use aya_ebpf::maps::SockHash;
use aya_ebpf::programs::SkMsgContext;

/// The two sockets.
#[map]
static SOCKETS: SockHash<u32> = SockHash::with_max_entries(2, 0);

/// Hands a message to the socket that its first four bytes name.
#[sk_msg]
pub(crate) fn bare_verdict(ctx: SkMsgContext) -> u32 {
    let data = ctx.data();
    if data + size_of::<u32>() > ctx.data_end() {
        return sk_action::SK_DROP;
    }
    // SAFETY: the four bytes from `data` were just compared with `data_end`; they may lie at any address.
    let to = unsafe { (data as *const u32).read_unaligned() };
    SOCKETS.redirect_msg(&ctx, to, BPF_F_INGRESS.into()) as u32
}

/// What the kernel reads to allow helpers that are for GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
