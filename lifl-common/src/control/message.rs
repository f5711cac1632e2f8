//! The messages. Field names are the wire's.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::arena::Layout;
use crate::frame::{Frame, Refusal};
use crate::id::{ArenaId, JobId, Key, WorkerId};
use crate::kernel::Counters;
use crate::plane::PlaneKind;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// First on every connection. Answered by [`Reply::Welcome`].
    Hello {
        /// The client's [`PROTOCOL`](super::PROTOCOL).
        protocol: u32,
    },
    /// Makes a job that lives as long as this connection. Answered by [`Reply::JobCreated`].
    CreateJob {
        /// Its name, for people.
        name: String,
    },
    /// Makes this connection's process a worker of a job of the same user. Beside it one descriptor: on the sockmap
    /// plane the near end of an established loopback TCP pair, on the relay plane the far end of a Unix stream pair.
    /// Answered by [`Reply::Registered`].
    Register {
        /// The job.
        job: JobId,
        /// Its role, for people.
        role: String,
        /// Its name, unique in the job.
        name: String,
    },
    /// Makes this connection's process the worker again that it was before the daemon was started anew. Beside it, in this
    /// order, the near end of its socket, which proves who it is, and its arenas' memfds. Answered by
    /// [`Reply::Reattached`], with [`Event::Living`] before it.
    Reattach {
        /// Its role, for people.
        role: String,
        /// Its name, unique in the job.
        name: String,
        /// The job's name, from the process that made it.
        job_name: Option<String>,
        /// Its arenas.
        arenas: Vec<HeldArena>,
    },
    /// Makes an arena for this worker. Answered by [`Reply::ArenaCreated`] with the memfd beside it.
    CreateArena {
        /// Its slots.
        #[serde(flatten)]
        layout: Layout,
        /// An arena that this worker has just been given and whose huge pages it cannot use: it goes, and the new one has
        /// ordinary pages.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        instead_of: Option<ArenaId>,
    },
    /// The owner has mapped its arena: seal it. Answered by [`Reply::Done`].
    SealArena {
        /// The arena.
        arena: ArenaId,
    },
    /// To read an arena of the same job. Answered by [`Reply::ArenaOpened`] with the memfd beside it.
    OpenArena {
        /// The arena.
        arena: ArenaId,
    },
    /// Opens the gateway for this connection's job, so that workers beyond the node's shared memory can join it.
    /// Answered by [`Reply::GatewayOpened`] once it is open.
    OpenGateway {
        /// Where it is to listen for TCP.
        p2p: Option<SocketAddr>,
        /// The MQTT broker through which it is to be reached, `host:port`.
        mqtt: Option<String>,
        /// Bytes of a slot for one of the job's updates.
        object_bytes: u64,
    },
    /// Names workers that may come through this connection's job's gateway, besides those named before. Answered by
    /// [`Reply::Done`].
    ExpectWorkers {
        /// The workers.
        workers: Vec<RemoteWorker>,
    },
    /// A worker that came through the gateway is known to be dead: its proxy leaves at once instead of waiting for it.
    /// Answered by [`Reply::Done`].
    DropWorker {
        /// Its name.
        name: String,
    },
    /// What is registered, a page at a time. Answered by [`Reply::Status`].
    Status {
        /// Only the workers of that job.
        job: Option<JobId>,
        /// Workers after that one, in order of their ids.
        after: Option<WorkerId>,
    },
    /// What has moved in this connection's job so far. Answered by [`Reply::Traffic`].
    Traffic {},
    /// Which of Flame's workers are registered, a page at a time. Answered by [`Reply::Flame`].
    Flame {
        /// Workers after the one with that user and id, in that order.
        after: Option<(u32, u32)>,
    },
    /// Ends this connection's job; the job's workers get [`Event::JobEnded`]. Answered by [`Reply::Done`].
    EndJob {
        /// Why, for the workers' logs.
        reason: String,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Welcome(Welcome),
    /// To [`Request::CreateJob`].
    JobCreated {
        /// The job.
        job: JobId,
    },
    /// To [`Request::Register`]. From here on frames can reach the worker.
    Registered {
        /// The worker.
        worker: WorkerId,
        /// The worker of the connection that made the job, [`WorkerId::NONE`] if it has not registered.
        owner: WorkerId,
    },
    /// To [`Request::Reattach`].
    Reattached {
        /// The worker that it is.
        worker: WorkerId,
        /// Its job.
        job: JobId,
    },
    /// To [`Request::CreateArena`].
    ArenaCreated {
        /// The arena.
        arena: ArenaId,
        /// Bytes of the pages behind it.
        page_bytes: u64,
        /// Why the pages are not huge, when they are not.
        note: Option<String>,
    },
    /// To [`Request::OpenArena`].
    ArenaOpened {
        /// Whose it is.
        owner: WorkerId,
        /// Its slots.
        #[serde(flatten)]
        layout: Layout,
    },
    /// To [`Request::OpenGateway`].
    GatewayOpened {
        /// What lets workers in, as hexadecimal digits. Whoever has it is a worker of the job.
        token: String,
        /// Where it listens for TCP.
        p2p: Option<SocketAddr>,
    },
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Traffic`].
    Traffic(JobTraffic),
    /// To [`Request::Flame`].
    Flame {
        /// `None` if the daemon does not serve Flame's workers.
        page: Option<FlamePage>,
    },
    /// Done, nothing to tell.
    Done {},
    /// Not done.
    Error {
        /// For programs.
        code: ErrorCode,
        /// For people: what, where, and what to do.
        message: String,
    },
}

/// An arena that its owner has had since before the daemon was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldArena {
    /// The arena.
    pub arena: ArenaId,
    /// Its slots.
    pub layout: Layout,
}

/// A worker that comes through the gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteWorker {
    /// Its name in the job.
    pub name: String,
    /// Its role, for people.
    pub role: String,
}

/// What kind of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// Not a request: the connection is closed after this answer.
    BadPacket,
    /// A request that does not fit what the connection is, or with wrong values.
    BadRequest,
    /// The thing belongs to another user or another job.
    Denied,
    /// There is no such thing.
    NotFound,
    /// Not there yet: the daemon was started anew, and waits for what was there before. To be asked again.
    NotYet,
    /// A limit is reached.
    Full,
    /// The daemon or its kernel cannot.
    Failed,
}

/// The daemon's first word.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The daemon's [`PROTOCOL`](super::PROTOCOL).
    pub protocol: u32,
    /// The daemon's version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Its plane.
    pub plane: PlaneKind,
    /// Why that plane.
    pub plane_reason: String,
    /// Whether jobs outlive the daemon: workers may come back to the next one.
    pub pinned: bool,
    /// Bytes that arenas may take together.
    pub pool_bytes: u64,
    /// Bytes that they take now.
    pub pool_used_bytes: u64,
    /// Whether arenas get huge pages, as far as the daemon knows before it tries.
    pub huge_pages: bool,
    /// Workers that can be registered at a time.
    pub max_workers: u32,
    /// Workers that are.
    pub workers: u32,
    /// Workers that were there before this daemon, and have not come back yet.
    pub awaited: u32,
    /// Whom its process runs as.
    #[serde(default)]
    pub uid: u32,
    /// The capabilities that its process has, by their names in `capabilities(7)`.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

/// What the daemon says unasked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// To the job's maker: a worker registered.
    PeerJoined {
        /// The worker.
        worker: WorkerId,
        /// Its name.
        name: String,
    },
    /// To the job's other workers: one is gone.
    PeerLost(PeerLost),
    /// To a worker that comes back: of the job's workers with numbers from `first` to `last`, those that live. The others
    /// may have gone while nobody could tell.
    Living {
        /// The first number.
        first: WorkerId,
        /// The last.
        last: WorkerId,
        /// Who lives, in order.
        workers: Vec<WorkerId>,
    },
    /// To the sender of a frame that was not delivered.
    DeadLetter(DeadLetter),
    /// To the job's workers: it has ended.
    JobEnded {
        /// Why.
        reason: String,
    },
}

/// A worker is gone, and its socket with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerLost {
    /// The worker.
    pub worker: WorkerId,
    /// Its name.
    pub name: String,
}

/// A frame that was not delivered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Where it was to go.
    pub to: WorkerId,
    /// That worker's name, when it has one in this job.
    pub to_name: Option<String>,
    /// Its kind, as a number.
    pub kind: u16,
    /// Its round.
    pub round: u32,
    /// Its key.
    pub key: Key,
    /// Why it was not delivered.
    pub refusal: Refusal,
}

impl DeadLetter {
    /// What a frame that came on a worker's own socket is, if it is one that the worker sent itself: the kernel returns
    /// what it refuses to its sender while no daemon reads dead letters.
    pub fn returned(frame: &Frame, own: WorkerId) -> Option<Self> {
        let refusal = Refusal::from_number(frame.refusal)?;
        (frame.from == own && refusal.is_planes()).then_some(Self {
            to: frame.to,
            to_name: None,
            kind: frame.kind,
            round: frame.round,
            key: frame.key,
            refusal,
        })
    }
}

/// A page of what is registered. Of other users' jobs only the counts are shown, but to root.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// As in the daemon's first word.
    pub daemon: Welcome,
    /// The jobs, on the first page.
    pub jobs: Vec<JobStatus>,
    /// The workers, in order of their ids.
    pub workers: Vec<WorkerStatus>,
    /// Whether there are workers after the last of these.
    pub more: bool,
    /// What users have and may have: of the caller, and of all to root. On the first page.
    #[serde(default)]
    pub users: Vec<UserStatus>,
}

/// What a user has, and what it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserStatus {
    /// Who.
    pub uid: u32,
    /// What it has.
    pub used: Amounts,
    /// Its quota; the largest number where there is none.
    pub quota: Amounts,
}

/// What quotas are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// Bytes of arenas.
    pub pool_bytes: u64,
    /// Workers.
    pub workers: u32,
    /// Jobs.
    pub jobs: u32,
    /// Connections to the control socket.
    pub connections: u32,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStatus {
    /// Its id.
    pub job: JobId,
    /// Its name; `None` if it is another user's.
    pub name: Option<String>,
    /// Whose it is.
    pub uid: u32,
    /// Workers registered in it.
    pub workers: u32,
    /// Bytes of its arenas.
    pub arena_bytes: u64,
    /// The most that its arenas took.
    pub arena_peak_bytes: u64,
    /// What went through the gateway, if that is open for it.
    pub gateway: Option<GatewayStatus>,
}

/// What has moved in a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobTraffic {
    /// Bytes that the frames of its workers referred to, of those that are there.
    pub bytes_referenced: u64,
    /// What went through the gateway.
    pub gateway: GatewayStatus,
    /// Workers of the daemon before that are still to come back, as in [`Welcome`]: as long as there are some, not all that
    /// has moved is known.
    pub awaited: u32,
}

/// What went through the gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// Bytes from workers.
    pub bytes_received: u64,
    /// Bytes to workers.
    pub bytes_sent: u64,
}

/// A worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its id.
    pub worker: WorkerId,
    /// Its job.
    pub job: JobId,
    /// Its name.
    pub name: String,
    /// Its role.
    pub role: String,
    /// Its process.
    pub pid: u32,
    /// What it has sent, as the plane counts it.
    pub counters: Counters,
    /// Nanoseconds since its last frame; `None` if it has sent none.
    #[serde(default)]
    pub idle_ns: Option<u64>,
    /// Its arenas.
    pub arenas: Vec<ArenaStatus>,
}

/// A page of Flame's workers. Of other users' nothing is shown, but to root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlamePage {
    /// Who hands their references over: the kernel or the daemon.
    pub plane: PlaneKind,
    /// Where they connect.
    pub skmsg: String,
    /// Connections, registered or not.
    pub connections: u32,
    /// References that wait for workers that are not registered yet.
    pub held: u32,
    /// The workers, by user and id.
    pub workers: Vec<FlameWorkerStatus>,
    /// Whether there are workers after the last of these.
    pub more: bool,
}

/// One of Flame's workers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlameWorkerStatus {
    /// Whose it is.
    pub uid: u32,
    /// Its id on the wire.
    pub id: u32,
    /// The id as its taskid ends, for people.
    pub taskid: String,
    /// Its process.
    pub pid: u32,
    /// That process's name.
    pub name: String,
    /// References that it sent and that were handed over.
    pub sent: u64,
    /// References to workers that were not registered yet.
    pub held: u64,
    /// References that were refused.
    pub refused: u64,
    /// Nanoseconds of its last reference by the plane's clock, 0 for none.
    pub last_ns: u64,
    /// Nanoseconds since then; `None` if there was none.
    #[serde(default)]
    pub idle_ns: Option<u64>,
}

/// An arena.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaStatus {
    /// Its id.
    pub arena: ArenaId,
    /// Its slots.
    #[serde(flatten)]
    pub layout: Layout,
    /// Bytes of the pages behind it.
    pub page_bytes: u64,
    /// Why they are not huge, when they are not and might have been.
    pub note: Option<String>,
    /// Whether its owner has mapped it and the kernel keeps others from writing.
    pub sealed: bool,
}

/// Anything that the daemon sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Message {
    /// An answer.
    Reply(Reply),
    /// News.
    Event(Event),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_frame_of_its_own_that_the_plane_refused_is_a_letter_that_came_back() {
        let own = WorkerId(3);
        let frame = |from: u32, refusal: u16| Frame {
            to: WorkerId(9),
            from: WorkerId(from),
            refusal,
            ..Frame::default()
        };
        let letter = DeadLetter::returned(&frame(3, Refusal::WorkerGone as u16), own).expect("a letter");
        assert_eq!((letter.to, letter.refusal), (WorkerId(9), Refusal::WorkerGone));
        for other in [
            frame(4, Refusal::WorkerGone as u16),
            frame(3, Refusal::NotFinite as u16),
            frame(3, 0),
        ] {
            assert_eq!(DeadLetter::returned(&other, own), None);
        }
    }
}
