//! Who may be registered, and as whom. One function judges; it looks at nothing but what it is given.
//!
//! | the registration | is |
//! | --- | --- |
//! | names no process, or no socket of it | refused |
//! | names a socket that is not connected to our port | refused |
//! | names a process of another user than the socket's, or comes from another user's connection | refused |
//! | came before one that was granted for the same socket, and had to wait | refused |
//! | names a registered socket again, under its id | nothing new |
//! | names a registered socket under another id | a move, if the caller is known to be its user or the connection is new; else refused |
//! | wants an id whose holder is gone, or is the same process | replaces the holder |
//! | wants an id whose holder lives | refused: the one who has it keeps it |
//!
//! The caller can be unknown: Flame's SDK closes its connection at once, and a kernel may forget with that whose it was
//! ([`owner`](super::owner)). Then the socket's own user counts, which is known for certain. So somebody else's guess could
//! at most misplace a worker among its own user's, and only while its connection is new.
//!
//! Why a new connection may be moved at all: a process that connects, registers and closes in quick succession uses one
//! descriptor number again and again, and an earlier registration can be read when the number stands for a later
//! connection. The one that was meant for that comes soon after.

use std::fmt;

use super::owner::{Descriptor, Process};
use super::wire::Registration;

/// What a registration wants, and what of it the kernel says at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// How many registrations had come before it, by the order of their connections.
    pub(super) number: u64,
    pub(super) registration: Registration,
    /// Whose the connection is that it came on, if the kernel knows.
    pub(super) caller: Option<u32>,
    /// What the descriptor is that it names.
    pub(super) descriptor: Descriptor,
}

/// Who has the id that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) process: Process,
    /// Whether that very process still runs.
    pub(super) runs: bool,
}

/// How a claim is granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ruling {
    /// As a new worker.
    Register,
    /// In place of the holder, which is let go.
    Replace,
    /// The socket gives up the id that it had.
    Move,
    /// It is registered so already.
    Nothing,
}

/// Why a claim is not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Neither 10 nor 12 bytes came in time.
    NotARegistration { bytes: usize },
    /// There is no such process.
    NoProcess,
    /// It has nothing under that number.
    NoDescriptor,
    /// It has something else there.
    NotASocket,
    /// A socket, but not one that is connected to us.
    NotConnectedHere,
    /// So many claims to sockets that are not connected here wait already.
    TooEarly { of_user: usize },
    /// The process is another user's than the socket.
    OtherProcess { process: u32, socket: u32 },
    /// The caller is another user.
    OtherCaller { caller: u32, socket: u32 },
    /// The socket is registered, and who calls is not known.
    RegisteredAs { id: u32 },
    /// The id is a living worker's.
    Taken(Process),
    /// An earlier registration of the socket, or of the id, does not come to its end.
    UnderWay,
    /// It had to wait, and one that came after it has registered the socket.
    Overtaken,
    /// The kernel does not let us.
    Kernel(String),
    /// Nobody to put the socket into the kernel's map.
    NoThread(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotARegistration { bytes } => {
                write!(f, "{bytes} bytes are no registration, which has 10 or 12")
            }
            Self::NoProcess => f.write_str("there is no such process"),
            Self::NoDescriptor => f.write_str("the process has no such descriptor"),
            Self::NotASocket => f.write_str("the descriptor is not a socket"),
            Self::NotConnectedHere => {
                f.write_str("the socket is not connected to the daemon's port for workers")
            }
            Self::TooEarly { of_user } => write!(
                f,
                "{of_user} registrations of that process's user wait already for sockets that are not connected to the daemon"
            ),
            Self::OtherProcess { process, socket } => {
                write!(f, "the process is user {process}'s, the socket user {socket}'s")
            }
            Self::OtherCaller { caller, socket } => {
                write!(f, "the caller is user {caller}, the socket is user {socket}'s")
            }
            Self::RegisteredAs { id } => {
                write!(
                    f,
                    "the socket is registered as {}, and it is not known who calls",
                    show_id(*id)
                )
            }
            Self::Taken(holder) => write!(
                f,
                "the id is that of process {} ({}), which runs: two taskids of user {} end with the same two bytes, \
                 change one",
                holder.pid, holder.name, holder.uid
            ),
            Self::UnderWay => f.write_str(
                "an earlier registration of this socket or id is still under way: its process keeps the socket locked",
            ),
            Self::Overtaken => f.write_str("a later registration of the same socket was granted meanwhile"),
            Self::Kernel(why) | Self::NoThread(why) => f.write_str(why),
        }
    }
}

/// An id as the end of a taskid.
pub(super) fn show_id(id: u32) -> String {
    let [a, b, c, d] = id.to_le_bytes();
    if c == 0 && d == 0 {
        format!("…{a:02x}{b:02x}")
    } else {
        format!("{id:#x}")
    }
}

/// Judges a claim to a socket that is connected to us: by the process that it names, the socket's user, whether its
/// connection is new, the id that it is registered under, and who else has the id that is wanted.
pub(super) fn judge(
    claim: &Claim,
    process: &Process,
    socket_uid: u32,
    is_new: bool,
    registered: Option<u32>,
    holder: Option<&Holder>,
) -> Result<Ruling, Refusal> {
    if process.uid != socket_uid {
        return Err(Refusal::OtherProcess {
            process: process.uid,
            socket: socket_uid,
        });
    }
    if let Some(caller) = claim.caller
        && caller != socket_uid
    {
        return Err(Refusal::OtherCaller {
            caller,
            socket: socket_uid,
        });
    }
    if registered == Some(claim.registration.id) {
        return Ok(Ruling::Nothing);
    }
    if let (Some(id), None, false) = (registered, claim.caller, is_new) {
        return Err(Refusal::RegisteredAs { id });
    }
    match holder {
        Some(holder) if holder.runs && !is_same(&holder.process, process) => {
            Err(Refusal::Taken(holder.process.clone()))
        }
        _ if registered.is_some() => Ok(Ruling::Move),
        Some(_) => Ok(Ruling::Replace),
        None => Ok(Ruling::Register),
    }
}

fn is_same(a: &Process, b: &Process) -> bool {
    (a.pid, a.started) == (b.pid, b.started)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const USER: u32 = 1000;

    fn process(pid: u32) -> Process {
        Process {
            pid,
            uid: USER,
            name: "python3".into(),
            started: 7,
        }
    }

    fn claim() -> Claim {
        Claim {
            number: 1,
            registration: Registration { pid: 1, fd: 3, id: 9 },
            caller: Some(USER),
            descriptor: Descriptor::Socket { inode: 5 },
        }
    }

    #[test]
    fn other_users_register_nothing() {
        assert_eq!(
            judge(&claim(), &process(1), USER, false, None, None),
            Ok(Ruling::Register)
        );
        let other = Claim {
            caller: Some(1001),
            ..claim()
        };
        assert!(matches!(
            judge(&other, &process(1), USER, false, None, None),
            Err(Refusal::OtherCaller { .. })
        ));
        let root = Claim {
            caller: Some(0),
            ..claim()
        };
        assert!(matches!(
            judge(&root, &process(1), USER, false, None, None),
            Err(Refusal::OtherCaller { .. })
        ));
        assert!(matches!(
            judge(&claim(), &process(1), 1001, false, None, None),
            Err(Refusal::OtherProcess { .. })
        ));
    }

    #[test]
    fn a_living_holder_keeps_its_id() {
        let holder = |pid, runs| Holder {
            process: process(pid),
            runs,
        };
        let refused =
            judge(&claim(), &process(1), USER, false, None, Some(&holder(2, true))).expect_err("taken");
        assert!(refused.to_string().contains("process 2 (python3)"), "{refused}");
        assert_eq!(
            judge(&claim(), &process(1), USER, false, None, Some(&holder(2, false))),
            Ok(Ruling::Replace)
        );
        assert_eq!(
            judge(&claim(), &process(1), USER, false, None, Some(&holder(1, true))),
            Ok(Ruling::Replace),
            "itself"
        );
    }

    #[test]
    fn a_registered_socket_is_moved_by_its_known_user_only() {
        assert_eq!(
            judge(&claim(), &process(1), USER, false, Some(9), None),
            Ok(Ruling::Nothing)
        );
        assert_eq!(
            judge(&claim(), &process(1), USER, false, Some(8), None),
            Ok(Ruling::Move)
        );
        let unknown = Claim {
            caller: None,
            ..claim()
        };
        assert_eq!(
            judge(&unknown, &process(1), USER, false, Some(8), None),
            Err(Refusal::RegisteredAs { id: 8 })
        );
        assert_eq!(
            judge(&unknown, &process(1), USER, false, None, None),
            Ok(Ruling::Register)
        );
        assert_eq!(
            judge(&unknown, &process(1), USER, true, Some(8), None),
            Ok(Ruling::Move)
        );
    }

    #[test]
    fn an_id_is_shown_as_the_taskid_ends() {
        assert_eq!(show_id(u32::from_le_bytes([0xa7, 0x45, 0, 0])), "…a745");
        assert_eq!(show_id(0x0102_0304), "0x1020304");
    }

    proptest! {
        /// Whatever is claimed: nobody gets a socket or an id of another user, or takes a living process's id.
        #[test]
        fn nobody_takes_what_is_anothers(
            caller in proptest::option::of(0_u32..3),
            process_uid in 0_u32..3,
            socket_uid in 0_u32..3,
            is_new: bool,
            registered in proptest::option::of(8_u32..10),
            holder in proptest::option::of((1_u32..3, any::<bool>())),
        ) {
            let claim = Claim { caller, ..claim() };
            let named = Process { uid: process_uid, ..process(1) };
            let holder = holder.map(|(pid, runs)| Holder { process: process(pid), runs });
            if judge(&claim, &named, socket_uid, is_new, registered, holder.as_ref()).is_ok_and(|ruling| ruling != Ruling::Nothing) {
                prop_assert_eq!(process_uid, socket_uid);
                prop_assert!(caller.is_none_or(|caller| caller == socket_uid));
                prop_assert!(holder.is_none_or(|holder| !holder.runs || holder.process.pid == 1));
                prop_assert!(caller.is_some() || is_new || registered.is_none());
            }
        }
    }
}
