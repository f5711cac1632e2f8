//! What the SK_MSG programs share. On any other target than BPF there is nothing here.
#![cfg_attr(target_arch = "bpf", no_std, feature(asm_experimental_arch))]
#![cfg(target_arch = "bpf")]

use core::arch::asm;
use core::mem::offset_of;
use core::ptr;

use aya_ebpf::bindings::sk_msg_md;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, RingBuf};
use lifl_common::kernel::{Connection, Credit, DEFAULT_MAX_WORKERS, Inbox, LogRecord, TELL_EVERY};

/// Slots of receivers, of users, and of the daemon's own socket. The daemon sets how many there are, and has more of them in Flame's
/// program: what each user's workers have it hold.
const SLOTS: u32 = 2 * DEFAULT_MAX_WORKERS + 1;

/// What each was handed ([`lifl_common::kernel::MAP_INBOXES`]).
#[map]
static INBOXES: Array<Inbox> = Array::with_max_entries(SLOTS, 0);

/// What each may be ([`lifl_common::kernel::MAP_CREDITS`]).
#[map]
static CREDITS: Array<Credit> = Array::with_max_entries(SLOTS, 0);

/// Where little is left ([`lifl_common::kernel::MAP_LOW`]). Each slot's record comes when its credit falls below a mark that the
/// daemon sets anew when it has read it, so those of all slots have room.
#[map]
static LOW: RingBuf = RingBuf::with_byte_size(256 << 10, 0);

/// Whether one message more may be handed to a slot: with a daemon that adds credit, or without.
#[inline(always)]
pub fn has_room(slot: u32, with_daemon: bool) -> bool {
    let (Some(inbox), Some(credit)) = (INBOXES.get_ptr_mut(slot), CREDITS.get_ptr(slot)) else {
        return false;
    };
    // SAFETY: the maps' values are 8-aligned and live as long as this call. Others write them meanwhile, each number by itself:
    // so many messages more as there are CPUs may be let through, or the daemon be told twice.
    unsafe {
        let messages = ptr::read_volatile(&raw const (*inbox).messages);
        // The daemon writes them in the other order: a new limit never meets an old mark.
        let limit = if with_daemon {
            read::<{ offset_of!(Credit, allowed) }, _>(credit)
        } else {
            read::<{ offset_of!(Credit, without_daemon) }, _>(credit)
        };
        if messages >= ptr::read_volatile(&raw const (*credit).low) {
            let told = ptr::read_volatile(&raw const (*inbox).told);
            if messages.wrapping_sub(told) >= TELL_EVERY && tell(slot) {
                ptr::write_volatile(&raw mut (*inbox).told, messages);
            }
        }
        messages < limit
    }
}

#[inline(never)]
fn tell(slot: u32) -> bool {
    LOW.output::<u32>(&slot, 0).is_ok()
}

/// Counts a message that is handed to a slot.
#[inline(always)]
pub fn count_message(slot: u32) {
    if let Some(inbox) = INBOXES.get_ptr_mut(slot) {
        // SAFETY: as in `has_room`.
        unsafe { add::<{ offset_of!(Inbox, messages) }, _>(inbox, 1) };
    }
}

/// What goes to the daemon's log ([`lifl_common::kernel::MAP_LOG`]).
#[map]
static LOG: RingBuf = RingBuf::with_byte_size(64 << 10, 0);

/// Whether what goes well is recorded, too ([`lifl_common::kernel::LOG_ALL`]): the daemon writes it before it loads the program.
#[unsafe(no_mangle)]
static LOG_ALL: u8 = 0;

/// Records an event, unless the daemon is behind with reading: that loses lines, and never the frame.
///
/// The record is made where it is read from: two numbers in eight bytes of the stack are refused by verifiers before 6.18, which
/// take the first for a pointer that the second spoils.
#[inline(never)]
pub fn log(event: u32, a: u32, b: u32, c: u32, d: u32) {
    if let Some(mut record) = LOG.reserve::<LogRecord>(0) {
        record.write(LogRecord {
            event,
            values: [a, b, c, d, 0],
        });
        record.submit(0);
    }
}

/// Whether what goes well is to be recorded.
#[inline(always)]
pub fn logs_all() -> bool {
    // SAFETY: a byte of this program's read-only data. Volatile, since the loader changes it.
    unsafe { ptr::read_volatile(&raw const LOG_ALL) == 1 }
}

/// The same code eight times over, without a loop. Where a loop has a counter, verifiers before 6.17 also follow, for who lacks
/// `CAP_PERFMON`, how it would go on if the counter's end were mispredicted, and that is beyond the message.
#[macro_export]
macro_rules! eight_times {
    ($step:expr) => {{
        $step;
        $step;
        $step;
        $step;
        $step;
        $step;
        $step;
        $step;
    }};
}

/// A key as the maps have it, in whole words: two numbers of four bytes that are stored into the same eight of the stack are refused
/// by verifiers before 6.18, which take the first for a pointer that the second spoils.
#[inline(always)]
pub const fn word(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// A [`Connection`] in words.
pub type ConnectionKey = [u64; 2];

const _: () = assert!(
    offset_of!(Connection, local_ip4) == 0
        && offset_of!(Connection, remote_ip4) == 4
        && offset_of!(Connection, local_port) == 8
        && offset_of!(Connection, remote_port) == 12
        && size_of::<Connection>() == size_of::<ConnectionKey>()
);

/// The sending socket's connection.
#[inline(always)]
pub fn connection(msg: *const sk_msg_md) -> ConnectionKey {
    // SAFETY: `msg` is the kernel's context. Each field is read as it stands, since the verifier knows only whole
    // fields of a context: volatile keeps two from being merged into one load.
    unsafe {
        [
            word(
                ptr::read_volatile(&raw const (*msg).local_ip4),
                ptr::read_volatile(&raw const (*msg).remote_ip4),
            ),
            word(
                ptr::read_volatile(&raw const (*msg).local_port),
                ptr::read_volatile(&raw const (*msg).remote_port),
            ),
        ]
    }
}

/// The number at `OFFSET` of a map's value. The offset is a constant of the instruction, as in [`add`].
///
/// # Safety
/// As for [`add`].
#[inline(always)]
unsafe fn read<const OFFSET: usize, T>(value: *const T) -> u64 {
    let mut number = value as u64;
    // SAFETY: reads a place that the caller vouches for.
    unsafe {
        asm!(
            "{0} = *(u64 *)({0} + {offset})",
            inout(reg) number,
            offset = const OFFSET,
            options(nostack, readonly)
        );
    }
    number
}

/// Adds to the number at `OFFSET` of a map's value, where other CPUs may be adding too. The offset is a constant of the
/// instruction: what is added to a pointer at run time, older verifiers let only `CAP_PERFMON` do.
///
/// # Safety
/// `value` is 8-aligned and stays a value of this program's map for the call, and at `OFFSET` it has a `u64`.
#[inline(always)]
pub unsafe fn add<const OFFSET: usize, T>(value: *mut T, n: u64) {
    // SAFETY: one atomic add to a place that the caller vouches for. `core` has no `fetch_add` for this target.
    unsafe {
        asm!(
            "lock *(u64 *)({0} + {offset}) += {1}",
            in(reg) value,
            in(reg) n,
            offset = const OFFSET,
            options(nostack)
        );
    }
}
