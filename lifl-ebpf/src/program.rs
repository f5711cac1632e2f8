//! Hands each frame from the socket that it was sent on to the destination's socket, inside the kernel.
//!
//! Runs on every `sendmsg` of a worker's socket, once for each run of frames to one destination:
//!
//! ```text
//!            fewer than 64 bytes            64 bytes or more
//!  sendmsg ─────────────────────▶ cork    ─────────────────▶ verdict ── taken ───▶ SOCKETS[to]
//!                                   │                           │
//!                                   └── the rest comes ────▶    └────── refused ─▶ SOCKETS[0], with the reason
//!                                                                          │ no daemon
//!                                                                          └─────▶ SOCKETS[sender]
//! ```
//!
//! Who may send to whom, and how much may wait for a receiver and its user, is in the maps, which only the daemon writes
//! ([`lifl_common::kernel`]). A refused frame is
//! redirected and not dropped: after `SK_DROP` the kernel fails every later send on that socket. (It is dropped when neither the
//! daemon nor the sender reads dead letters, and both have as many as may wait.) While there is no
//! daemon to read dead letters, the sender gets its own back: a frame that says that it is from its receiver can be
//! nothing else, since no other socket may send it.
//!
//! A write is one or more whole frames, or a piece of one. Whole frames followed by a piece of one would be corked
//! wrongly: `sk_msg_memcopy_from_iter` in `net/core/skmsg.c` does not notice that the message became shorter, and
//! completes the frame with whatever lay in memory. So such a piece is cut off.

use core::mem::offset_of;
use core::ptr;

use aya_ebpf::bindings::{BPF_F_INGRESS, sk_action};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_msg_apply_bytes, bpf_msg_cork_bytes, bpf_msg_pull_data};
use aya_ebpf::macros::{map, sk_msg};
use aya_ebpf::maps::{Array, HashMap, SockHash};
use aya_ebpf::programs::SkMsgContext;
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::WorkerId;
use lifl_common::kernel::{self, Counters, DEAD_LETTERS, DEFAULT_MAX_WORKERS, Receiver, Sender, State};
use lifl_ebpf::{ConnectionKey, add, connection, count_message, eight_times, has_room, log};

/// The worker's sockets; one more for the dead letters, under 0.
#[map]
static SOCKETS: SockHash<u32> = SockHash::with_max_entries(DEFAULT_MAX_WORKERS + 1, 0);

/// Whose a sending socket is.
#[map]
static SENDERS: HashMap<ConnectionKey, Sender> = HashMap::with_max_entries(DEFAULT_MAX_WORKERS, 0);

/// Who may be sent to.
#[map]
static MEMBERS: HashMap<u32, Receiver> = HashMap::with_max_entries(DEFAULT_MAX_WORKERS, 0);

/// What each worker has sent.
#[map]
static COUNTERS: HashMap<u32, Counters> = HashMap::with_max_entries(DEFAULT_MAX_WORKERS, 0);

/// What the daemon leaves to the next; nothing for the program, but pinned with the rest.
#[map]
static STATE: Array<State> = Array::with_max_entries(1, 0);

/// [`Frame::BYTES`] as the helpers take it.
const FRAME: u32 = Frame::BYTES as u32;

/// The program; its name is [`kernel::PROGRAM`].
#[sk_msg]
pub(crate) fn lifl_verdict(ctx: SkMsgContext) -> u32 {
    let msg = ctx.msg;
    if ctx.size() < FRAME {
        // SAFETY: `msg` is the kernel's context for this call.
        unsafe { bpf_msg_cork_bytes(msg, FRAME) };
        return sk_action::SK_PASS;
    }
    let piece = ctx.size() % FRAME;
    if piece != 0 {
        let cut = ctx.pop_data(ctx.size() - piece, piece, 0);
        log(kernel::LOG_CUT, piece, 0, 0, 0);
        if cut.is_err() {
            return sk_action::SK_DROP;
        }
    }
    let mut data = ctx.data();
    if data + Frame::BYTES > ctx.data_end() {
        // It lies across two pages, or in memory that is not the message's own: this makes it one writable piece.
        // SAFETY: as above.
        let pulled = unsafe { bpf_msg_pull_data(msg, 0, FRAME, 0) };
        data = ctx.data();
        if pulled != 0 || data + Frame::BYTES > ctx.data_end() {
            // No memory for the copy: the only way to tell the sender is to fail its send.
            return sk_action::SK_DROP;
        }
    }
    // SAFETY: the 64 bytes from `data` were just compared with `data_end`.
    let frame = unsafe { head(data) };
    let connection = connection(msg);
    // SAFETY: an entry that the daemon removes meanwhile may be read as another's. No worker id is given out twice
    // and the daemon takes the socket out of SOCKETS first, so the worst of it is one refusal for another reason.
    let (sender, receiver) = unsafe { (SENDERS.get(connection), MEMBERS.get(frame.to.0)) };

    let refusal = match kernel::verdict(&frame, sender, receiver.map(|receiver| &receiver.member)) {
        Ok(()) if receiver.is_none_or(|receiver| !takes_one_more(&ctx, receiver)) => Refusal::ReceiverFull,
        Ok(()) => {
            // SAFETY: the 64 bytes from `data` were compared with `data_end`, and `frame` was read from there.
            let run = unsafe { run(data, ctx.data_end(), &frame) };
            // SAFETY: as above. The verdict is for these alone; the kernel asks again for what follows.
            unsafe { bpf_msg_apply_bytes(msg, run.frames * FRAME) };
            if redirect(&ctx, frame.to) == sk_action::SK_PASS {
                if let (Some(sender), Some(receiver)) = (sender, receiver) {
                    count_taken(sender.worker, &run);
                    count_handed(receiver);
                }
                return sk_action::SK_PASS;
            }
            Refusal::WorkerGone
        }
        Err(refusal) => refusal,
    };
    // Dead letters one by one, each with its reason.
    // SAFETY: as above.
    unsafe { bpf_msg_apply_bytes(msg, FRAME) };
    let stamp = sender.map_or(WorkerId::NONE, |sender| sender.worker);
    // SAFETY: the 64 bytes from `data` were compared with `data_end`, and nothing since moves the message's data.
    unsafe { mark(data, refusal, stamp) };
    if stamp.0 != 0 {
        count_refused(stamp);
    }
    log(
        kernel::LOG_REFUSED,
        stamp.0,
        frame.from.0,
        frame.to.0,
        refusal as u32,
    );
    let with_daemon = redirect(&ctx, WorkerId::NONE) == sk_action::SK_PASS;
    if with_daemon && has_room(DEAD_LETTERS, true) {
        count_message(DEAD_LETTERS);
        return sk_action::SK_PASS;
    }
    // SAFETY: as for the receiver.
    match unsafe { MEMBERS.get(stamp.0) } {
        Some(own) if has_room(own.inbox, with_daemon) && has_room(own.account, with_daemon) => {
            let back = redirect(&ctx, stamp);
            if back == sk_action::SK_PASS {
                count_handed(own);
            }
            back
        }
        _ => sk_action::SK_DROP,
    }
}

/// Whether a receiver and its user have credit for one message more. Nobody adds to it while there is no daemon.
#[inline(always)]
fn takes_one_more(ctx: &SkMsgContext, receiver: &Receiver) -> bool {
    if has_room(receiver.inbox, true) && has_room(receiver.account, true) {
        return true;
    }
    redirect(ctx, WorkerId::NONE) != sk_action::SK_PASS
        && has_room(receiver.inbox, false)
        && has_room(receiver.account, false)
}

#[inline(always)]
fn count_handed(receiver: &Receiver) {
    count_message(receiver.inbox);
    count_message(receiver.account);
}

/// The fields that are decided on, each read by itself: a frame may lie at any address.
///
/// # Safety
/// [`Frame::BYTES`] bytes from `data` are the message's.
#[inline(always)]
unsafe fn head(data: usize) -> Frame {
    let frame = data as *const u8;
    // SAFETY: the offsets are within a frame, and the caller vouches for all of it.
    unsafe {
        Frame {
            to: ptr::read_unaligned(frame.add(offset_of!(Frame, to)).cast()),
            from: ptr::read_unaligned(frame.add(offset_of!(Frame, from)).cast()),
            kind: ptr::read_unaligned(frame.add(offset_of!(Frame, kind)).cast()),
            length: ptr::read_unaligned(frame.add(offset_of!(Frame, length)).cast()),
            ..Frame::default()
        }
    }
}

/// Frames that stand one behind the other and go from one worker to one other, seventeen at most. The kernel does the same work
/// for a run as for a frame: by so many it is small beside the frames' own.
struct Run {
    frames: u32,
    referenced_bytes: u64,
}

/// The run that begins with `first`, as far as it lies in one piece.
///
/// # Safety
/// As for [`head`], up to `end`.
#[inline(always)]
unsafe fn run(data: usize, end: usize, first: &Frame) -> Run {
    let mut run = Run {
        frames: 1,
        referenced_bytes: lent(first),
    };
    let mut next = data;
    'run: {
        macro_rules! one_more {
            () => {
                next += Frame::BYTES;
                if next + Frame::BYTES > end {
                    break 'run;
                }
                // SAFETY: the 64 bytes from `next` were just compared with the end.
                let frame = unsafe { head(next) };
                if (frame.to.0, frame.from.0) != (first.to.0, first.from.0) {
                    break 'run;
                }
                run.frames += 1;
                run.referenced_bytes = run.referenced_bytes.wrapping_add(lent(&frame));
            };
        }
        eight_times!({
            one_more!();
            one_more!();
        });
    }
    run
}

/// Bytes of the object that a frame lends, if it lends one.
#[inline(always)]
fn lent(frame: &Frame) -> u64 {
    let lends = frame.kind == FrameKind::Model as u16 || frame.kind == FrameKind::Update as u16;
    if lends { frame.length } else { 0 }
}

/// Makes the frame a dead letter.
///
/// # Safety
/// As for [`head`].
#[inline(always)]
unsafe fn mark(data: usize, refusal: Refusal, stamp: WorkerId) {
    let frame = data as *mut u8;
    // SAFETY: the offsets are within a frame, and the caller vouches for all of it.
    unsafe {
        ptr::write_unaligned(frame.add(offset_of!(Frame, refusal)).cast(), refusal as u16);
        ptr::write_unaligned(frame.add(offset_of!(Frame, stamp)).cast(), stamp.0);
    }
}

/// To the receive queue of that worker's socket; `SK_DROP` when it has none.
#[inline(always)]
fn redirect(ctx: &SkMsgContext, to: WorkerId) -> u32 {
    SOCKETS.redirect_msg(ctx, to.0, u64::from(BPF_F_INGRESS)) as u32
}

#[inline(always)]
fn count_taken(worker: WorkerId, run: &Run) {
    let Some(counters) = COUNTERS.get_ptr_mut(worker.0) else {
        return;
    };
    // SAFETY: the map's values are 8-aligned `Counters` and live as long as this call.
    unsafe {
        add::<{ offset_of!(Counters, frames) }, _>(counters, run.frames.into());
        if run.referenced_bytes != 0 {
            add::<{ offset_of!(Counters, referenced_bytes) }, _>(counters, run.referenced_bytes);
        }
        ptr::write_volatile(&raw mut (*counters).last_ns, bpf_ktime_get_ns());
    }
}

#[inline(always)]
fn count_refused(worker: WorkerId) {
    let Some(counters) = COUNTERS.get_ptr_mut(worker.0) else {
        return;
    };
    // SAFETY: as in `count_taken`.
    unsafe {
        add::<{ offset_of!(Counters, refused) }, _>(counters, 1);
        ptr::write_volatile(&raw mut (*counters).last_ns, bpf_ktime_get_ns());
    }
}

/// What the kernel reads to allow helpers that are for GPL-compatible programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
