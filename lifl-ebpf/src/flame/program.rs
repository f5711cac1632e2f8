//! Hands each reference of a Flame worker to the worker that it names, as one message of a fixed size.
//!
//! Runs once for every `sendmsg` of a registered worker's socket:
//!
//! ```text
//!                             receiver registered
//!  sendmsg ── receiver's id ──────────────────────▶ padded to 1,024 bytes ─▶ SOCKETS[uid, id]
//!      │            │  not registered yet
//!      │            ├────────────────────────────▶ padded, stamped with its sender ─▶ SOCKETS[HOLD]: the daemon
//!      │            │  gone
//!      └────────────┴────────────────────────────▶ SOCKETS[REFUSE], which is shut down: the `send` fails with EPIPE
//!     too short or too long
//! ```
//!
//! Why padded: Flame's receiver takes what one `recv(1024)` returns for one message. Protobuf skips fields that it does
//! not know, and the padding is such a field ([`lifl_common::flame`]).
//!
//! Why not `SK_DROP`, whose `EACCES` Flame's own manager gives: the kernel then fails every later send on that socket, too
//! (`net/ipv4/tcp_bpf.c` keeps the verdict). A redirect that fails is an error of that one send.

use core::ptr;

use aya_ebpf::bindings::{BPF_F_INGRESS, sk_action};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_msg_pull_data};
use aya_ebpf::macros::{map, sk_msg};
use aya_ebpf::maps::{HashMap, SockHash};
use aya_ebpf::programs::SkMsgContext;
use aya_log_ebpf::{debug, warn};
use lifl_common::flame::{
    Address, HEADER_BYTES, HOLD, LONGEST_REFERENCE_BYTES, MESSAGE_BYTES, PADDING_TAG, REFUSE, STAMP_BYTES,
    Sender, Worker, is_gone,
};
use lifl_common::kernel::{Connection, DEFAULT_MAX_WORKERS};
use lifl_ebpf::{add, connection, opaque};

/// The workers' sockets, and the daemon's own under [`HOLD`] and [`REFUSE`].
#[map]
static SOCKETS: SockHash<Address> = SockHash::with_max_entries(DEFAULT_MAX_WORKERS + 2, 0);

/// Whose a sending socket is.
#[map]
static SENDERS: HashMap<Connection, Sender> = HashMap::with_max_entries(DEFAULT_MAX_WORKERS, 0);

/// Who is registered or was, and what each has sent.
#[map]
static WORKERS: HashMap<Address, Worker> = HashMap::with_max_entries(2 * DEFAULT_MAX_WORKERS, 0);

const MESSAGE: u32 = MESSAGE_BYTES as u32;
const HEADER: u32 = HEADER_BYTES as u32;
const LONGEST: u32 = LONGEST_REFERENCE_BYTES as u32;

/// The program; its name is [`lifl_common::flame::PROGRAM`].
#[sk_msg]
pub(crate) fn flame_verdict(ctx: SkMsgContext) -> u32 {
    let msg = ctx.msg;
    // SAFETY: an entry that the daemon replaces meanwhile may be read as the next: one reference goes to, or comes from,
    // the worker that has the id now.
    let Some(sender) = (unsafe { SENDERS.get(connection(msg)) }) else {
        return sk_action::SK_DROP;
    };
    let (sender, since) = (sender.address, sender.since);
    let bytes = ctx.size();
    if !(HEADER..=LONGEST).contains(&bytes) {
        return refuse(&ctx, sender, u32::MAX, bytes);
    }
    if ctx.data() + HEADER_BYTES > ctx.data_end() {
        // What was sent without a copy must be pulled to be looked at; for the rest that would only cost.
        // SAFETY: `msg` is the kernel's context for this call.
        unsafe { bpf_msg_pull_data(msg, 0, HEADER, 0) };
    }
    let data = ctx.data();
    if data + HEADER_BYTES > ctx.data_end() {
        return refuse(&ctx, sender, u32::MAX, bytes);
    }
    // SAFETY: the 4 bytes from `data` were just compared with `data_end`.
    let id = unsafe { ptr::read_unaligned(data as *const u32) };
    let receiver = Address {
        uid: sender.uid,
        id: u32::from_le(id),
    };
    // SAFETY: as for the sender.
    let to = match unsafe { WORKERS.get(receiver) } {
        None => HOLD,
        Some(worker) if worker.live == 1 => receiver,
        Some(worker) if is_gone(worker, since) => return refuse(&ctx, sender, receiver.id, bytes),
        Some(_) => HOLD,
    };
    let verdict = SOCKETS.redirect_msg(&ctx, to, u64::from(BPF_F_INGRESS)) as u32;
    if verdict != sk_action::SK_PASS || !pad(&ctx, bytes, sender, to.uid == HOLD.uid) {
        return refuse(&ctx, sender, receiver.id, bytes);
    }
    if let Some(worker) = WORKERS.get_ptr_mut(sender) {
        // SAFETY: the map's values are 8-aligned and live as long as this call.
        unsafe {
            let counter = if to.uid == HOLD.uid {
                &raw mut (*worker).held
            } else {
                &raw mut (*worker).sent
            };
            add(counter, 1);
            ptr::write_volatile(&raw mut (*worker).last_ns, bpf_ktime_get_ns());
        }
    }
    log_taken(sender.id, receiver.id, bytes);
    sk_action::SK_PASS
}

/// Makes a message of `bytes` bytes one of [`MESSAGE_BYTES`], and says whether that went well.
#[inline(always)]
fn pad(ctx: &SkMsgContext, bytes: u32, sender: Address, stamped: bool) -> bool {
    let room = MESSAGE - bytes;
    if ctx.push_data(bytes, room, 0).is_err() {
        return false;
    }
    // What was pushed is a piece of its own, and only that is looked at: nothing is copied.
    // SAFETY: the context is this call's.
    if unsafe { bpf_msg_pull_data(ctx.msg, bytes, MESSAGE, 0) } != 0 {
        return false;
    }
    let (data, end) = (ctx.data(), ctx.data_end());
    // Less than MESSAGE_BYTES, since no reference is empty; the verifier does not remember.
    let room = opaque(room as usize) & (MESSAGE_BYTES - 1);
    // It is old kernel memory until it is written. The last word may overlap the one before.
    let mut at = 0;
    while opaque(at) + 8 <= room {
        if !put(data, end, at, 0_u64) {
            return false;
        }
        at += 8;
    }
    let length = room - 3;
    let header = [PADDING_TAG, (length & 0x7f) as u8 | 0x80, (length >> 7) as u8];
    put(data, end, room - 8, 0_u64)
        && put(data, end, 0, header)
        && (!stamped || put(data, end, room - STAMP_BYTES, sender))
}

/// Writes into what lies between `data` and `end`, and says whether it has such a place. Compared each
/// time, since the verifier knows no bounds of a place that is not a constant.
#[inline(always)]
fn put<T>(data: usize, end: usize, at: usize, value: T) -> bool {
    let place = data + (at & (MESSAGE_BYTES - 1));
    if place + size_of::<T>() > end {
        return false;
    }
    // SAFETY: as many bytes from `place` were just compared with the end. Volatile, so that no call to memset
    // comes of many.
    unsafe { ptr::write_volatile(place as *mut Unaligned<T>, Unaligned(value)) };
    true
}

/// A value at any address.
#[repr(C, packed)]
struct Unaligned<T>(T);

/// The sender's `send` fails with `EPIPE`.
#[inline(always)]
fn refuse(ctx: &SkMsgContext, sender: Address, receiver: u32, bytes: u32) -> u32 {
    if let Some(worker) = WORKERS.get_ptr_mut(sender) {
        // SAFETY: as where references are counted.
        unsafe { add(&raw mut (*worker).refused, 1) };
    }
    log_refused(sender.uid, sender.id, receiver, bytes);
    // Not into its receive queue, but out on its connection: that is what is shut down.
    SOCKETS.redirect_msg(ctx, REFUSE, 0) as u32
}

// Logging has subprograms to itself, for the verifier's sake: see LIFL's own program.

#[inline(never)]
fn log_taken(from: u32, to: u32, bytes: u32) {
    debug!((), "a reference of {} bytes from {:x} to {:x}", bytes, from, to);
}

#[inline(never)]
fn log_refused(uid: u32, from: u32, to: u32, bytes: u32) {
    warn!(
        (),
        "refused {} bytes of worker {:x} of user {} to {:x}: it is gone, or so many bytes are no reference",
        bytes,
        from,
        uid,
        to
    );
}

/// What the kernel reads to allow helpers that are for GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
