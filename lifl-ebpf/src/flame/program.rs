//! Hands each reference of a Flame worker to the worker that it names, as one message of a fixed size.
//!
//! Runs once for every `sendmsg` of a registered worker's socket:
//!
//! ```text
//!                             receiver registered
//!  sendmsg ── receiver's id ──────────────────────▶ padded to 1,024 bytes ─▶ SOCKETS[uid, id]
//!      │            │  not registered yet
//!      │            ├────────────────────────────▶ padded, stamped with its sender ─▶ SOCKETS[HOLD]: the daemon
//!      │            │  gone, or nobody reads
//!      └────────────┴────────────────────────────▶ SOCKETS[REFUSE], which is shut down: the `send` fails with EPIPE
//!     too short or too long
//! ```
//!
//! How many references may wait for a receiver, for its user's workers, and for the daemon to hold, is in the maps
//! ([`lifl_common::kernel::MAP_CREDITS`]).
//!
//! Why padded: Flame's receiver takes what one `recv(1024)` returns for one message. Protobuf skips fields that it does
//! not know, and the padding is such a field ([`lifl_common::flame`]).
//!
//! Why not `SK_DROP`, whose `EACCES` Flame's own manager gives: the kernel then fails every later send on that socket, too
//! (`net/ipv4/tcp_bpf.c` keeps the verdict). A redirect that fails is an error of that one send.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_INGRESS, sk_action};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_msg_pull_data};
use aya_ebpf::macros::{map, sk_msg};
use aya_ebpf::maps::{HashMap, SockHash};
use aya_ebpf::programs::SkMsgContext;
use lifl_common::flame::{
    Address, HEADER_BYTES, HOLD, LOG_CLOSED, LOG_FULL, LOG_GONE, LOG_LENGTH, LOG_NO_MEMORY, LOG_TAKEN,
    LONGEST_REFERENCE_BYTES, MESSAGE_BYTES, PADDING_TAG, REFUSE, STAMP_BYTES, Sender, Worker, is_gone,
};
use lifl_common::kernel::DEFAULT_MAX_WORKERS;
use lifl_ebpf::{ConnectionKey, add, connection, count_message, eight_times, has_room, log, logs_all, word};

/// The workers' sockets, and the daemon's own under [`HOLD`] and [`REFUSE`].
#[map]
static SOCKETS: SockHash<u64> = SockHash::with_max_entries(DEFAULT_MAX_WORKERS + 2, 0);

/// Whose a sending socket is.
#[map]
static SENDERS: HashMap<ConnectionKey, Sender> = HashMap::with_max_entries(DEFAULT_MAX_WORKERS, 0);

/// Who is registered or was, and what each has sent.
#[map]
static WORKERS: HashMap<u64, Worker> = HashMap::with_max_entries(2 * DEFAULT_MAX_WORKERS, 0);

/// An address as the maps' key.
#[inline(always)]
fn key(address: Address) -> u64 {
    word(address.uid, address.id)
}

const _: () = assert!(offset_of!(Address, uid) == 0 && offset_of!(Address, id) == 4);

const MESSAGE: u32 = MESSAGE_BYTES as u32;
const HEADER: u32 = HEADER_BYTES as u32;
const LONGEST: u32 = LONGEST_REFERENCE_BYTES as u32;
const STAMP: u32 = STAMP_BYTES as u32;

/// Which no map of slots has: what is held counts in one only. (A number and no `Option`: verifiers follow, for who lacks
/// `CAP_PERFMON`, how a pointer's test would go on if it were mispredicted.)
const NO_SLOT: u32 = u32::MAX;

/// The program; its name is [`lifl_common::flame::PROGRAM`].
#[sk_msg]
pub(crate) fn flame_verdict(ctx: SkMsgContext) -> u32 {
    let msg = ctx.msg;
    // SAFETY: an entry that the daemon replaces meanwhile may be read as the next: one reference goes to, or comes from,
    // the worker that has the id now.
    let Some(sender) = (unsafe { SENDERS.get(connection(msg)) }) else {
        return sk_action::SK_DROP;
    };
    let (sender, since, held) = (sender.address, sender.since, sender.held);
    let bytes = ctx.size();
    if !(HEADER..=LONGEST).contains(&bytes) {
        return refuse(&ctx, sender, LOG_LENGTH, bytes, 0);
    }
    if ctx.data() + HEADER_BYTES > ctx.data_end() {
        // What was sent without a copy must be pulled to be looked at; for the rest that would only cost.
        // SAFETY: `msg` is the kernel's context for this call.
        unsafe { bpf_msg_pull_data(msg, 0, HEADER, 0) };
    }
    let data = ctx.data();
    if data + HEADER_BYTES > ctx.data_end() {
        return refuse(&ctx, sender, LOG_NO_MEMORY, u32::MAX, bytes);
    }
    // SAFETY: the 4 bytes from `data` were just compared with `data_end`.
    let id = unsafe { ptr::read_unaligned(data as *const u32) };
    let receiver = Address {
        uid: sender.uid,
        id: u32::from_le(id),
    };
    // SAFETY: as for the sender.
    let (to, inbox, account) = match unsafe { WORKERS.get(key(receiver)) } {
        None => (HOLD, held, NO_SLOT),
        Some(worker) if worker.live == 1 => (receiver, worker.inbox, worker.account),
        Some(worker) if is_gone(worker, since) => {
            return refuse(&ctx, sender, LOG_GONE, receiver.id, bytes);
        }
        Some(_) => (HOLD, held, NO_SLOT),
    };
    if !has_room(inbox, true) || account != NO_SLOT && !has_room(account, true) {
        return refuse(&ctx, sender, LOG_FULL, receiver.id, bytes);
    }
    let verdict = SOCKETS.redirect_msg(&ctx, key(to), u64::from(BPF_F_INGRESS)) as u32;
    if verdict != sk_action::SK_PASS {
        return refuse(&ctx, sender, LOG_CLOSED, receiver.id, bytes);
    }
    if !pad(&ctx, bytes, sender, to.uid == HOLD.uid) {
        return refuse(&ctx, sender, LOG_NO_MEMORY, receiver.id, bytes);
    }
    count_message(inbox);
    count_message(account);
    if let Some(worker) = WORKERS.get_ptr_mut(key(sender)) {
        // SAFETY: the map's values are 8-aligned and live as long as this call.
        unsafe {
            if to.uid == HOLD.uid {
                add::<{ offset_of!(Worker, held) }, _>(worker, 1);
            } else {
                add::<{ offset_of!(Worker, sent) }, _>(worker, 1);
            }
            ptr::write_volatile(&raw mut (*worker).last_ns, bpf_ktime_get_ns());
        }
    }
    if logs_all() {
        log(LOG_TAKEN, sender.uid, sender.id, receiver.id, bytes);
    }
    sk_action::SK_PASS
}

/// Makes a message of `bytes` bytes one of [`MESSAGE_BYTES`], and says whether that went well.
///
/// Each store is at a constant distance from where the kernel says that the data begins, and there is no loop: older verifiers
/// walk one for every value that its bound may have, and let only `CAP_PERFMON` add a variable to a packet's pointer.
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
    let length = room - 3;
    // It is old kernel memory until it is written.
    if !put_byte(data, end, PADDING_TAG.into())
        || !put_byte(data + 1, end, length & 0x7f | 0x80)
        || !put_byte(data + 2, end, length >> 7)
    {
        return false;
    }
    let mut place = data + 3;
    'filled: {
        // 128 words.
        eight_times!(eight_times!({
            if !put_word(place, end, 0) || !put_word(place + 8, end, 0) {
                break 'filled;
            }
            place += 16;
        }));
    }
    // Fewer than eight bytes are left. The last eight, which may overlap those before, are looked at by themselves: the
    // padding is longer than a header and a stamp.
    // SAFETY: as above.
    if unsafe { bpf_msg_pull_data(ctx.msg, MESSAGE - STAMP, MESSAGE, 0) } != 0 {
        return false;
    }
    let (data, end) = (ctx.data(), ctx.data_end());
    put_word(data, end, if stamped { key(sender) } else { 0 })
}

/// Writes eight bytes at a place of the message, if they lie before the end, and says whether they do.
#[inline(always)]
fn put_word(place: usize, end: usize, value: u64) -> bool {
    if place + size_of::<u64>() > end {
        return false;
    }
    // SAFETY: the eight bytes from `place` were just compared with the end. One store, where the compiler would make eight, since
    // they may lie at any address, or a call to memset of many.
    unsafe { asm!("*(u64 *)({0} + 0) = {1}", in(reg) place, in(reg) value, options(nostack)) };
    true
}

/// As [`put_word`], one byte.
#[inline(always)]
fn put_byte(place: usize, end: usize, value: u32) -> bool {
    if place + size_of::<u8>() > end {
        return false;
    }
    // SAFETY: the byte at `place` was just compared with the end.
    unsafe { asm!("*(u8 *)({0} + 0) = {1}", in(reg) place, in(reg) value, options(nostack)) };
    true
}

/// The sender's `send` fails with `EPIPE`. The log gets the event with what it lists after user and sender.
#[inline(always)]
fn refuse(ctx: &SkMsgContext, sender: Address, event: u32, c: u32, d: u32) -> u32 {
    if let Some(worker) = WORKERS.get_ptr_mut(key(sender)) {
        // SAFETY: as where references are counted.
        unsafe { add::<{ offset_of!(Worker, refused) }, _>(worker, 1) };
    }
    log(event, sender.uid, sender.id, c, d);
    // Not into its receive queue, but out on its connection: that is what is shut down.
    SOCKETS.redirect_msg(ctx, key(REFUSE), 0) as u32
}

/// What the kernel reads to allow helpers that are for GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
