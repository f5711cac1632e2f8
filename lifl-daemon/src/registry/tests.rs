//! Requests of several users, without sockets or processes.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use lifl_common::arena::{Layout, memfd};
use lifl_common::control::{Event, JobTraffic, RemoteWorker, Status};
use lifl_common::plane::PlaneKind;
use tokio_util::sync::CancellationToken;

use super::jobs::MAX_REASON_BYTES;
use super::quota::Quota;
use super::*;
use crate::plane::{self, choose};
use crate::pool::HugePages;

/// A registry on the relay plane, with connections of users of the test's choice.
struct Bench {
    registry: Registry,
    done: mpsc::UnboundedReceiver<Done>,
    far: Vec<UnixStream>,
    /// Arenas that were handed out.
    kept: Vec<OwnedFd>,
}

impl Bench {
    fn new() -> Self {
        Self::of(16, Quotas::unlimited())
    }

    /// Where each user may have so much.
    fn with(default: Quota) -> Self {
        let quotas = Quotas {
            default,
            ..Quotas::unlimited()
        };
        Self::of(16, quotas)
    }

    fn of(max_workers: u32, quotas: Quotas) -> Self {
        let chosen = choose(
            plane::Request::Relay,
            plane::Options {
                max_workers,
                pin: None,
            },
        )
        .expect("a relay");
        assert_eq!(chosen.plane.kind(), PlaneKind::Relay);
        let facts = Facts {
            plane_reason: "test".into(),
            max_workers,
        };
        let pool = Pool::new(1 << 20, HugePages::Never);
        let options = GatewayOptions::default();
        // Nobody runs it: what the registry lets through is not answered.
        let (lobby, _) = crate::server::lobby();
        let (gateway, ..) = gateway::gateway(lobby, &options, CancellationToken::new());
        let mut registry = Registry::new(facts, quotas, chosen.plane, pool, gateway, options);
        Self {
            done: registry.take_done(),
            registry,
            far: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// A connection that has said hello.
    fn user(&mut self, conn: u64, uid: u32) {
        self.registry.connected(ConnId(conn), Peer::new(1, uid));
        self.ask(conn, Request::Hello { protocol: PROTOCOL })
            .expect("welcome");
    }

    fn ask(&mut self, conn: u64, request: Request) -> Result<Reply, (ErrorCode, String)> {
        let mut beside = Beside::default();
        if matches!(request, Request::Register { .. }) {
            let (near, far) = UnixStream::pair().expect("a pair");
            beside.socket = Some(plane::examine(PlaneKind::Relay, Foreign::new(0, far.into())));
            self.far.push(near);
        }
        self.registry.request(ConnId(conn), request, beside);
        let mut outbox = self.registry.take_outbox();
        let answers = |outgoing: &Outgoing| {
            outgoing.to == ConnId(conn) && matches!(*outgoing.message, Message::Reply(_))
        };
        while !outbox.iter().any(answers) {
            // What is begun answers when it is done.
            match self.done.try_recv() {
                Ok(done) => self.registry.done(done),
                Err(_) => std::thread::yield_now(),
            }
            self.registry.check_departed();
            outbox.extend(self.registry.take_outbox());
        }
        for outgoing in &mut outbox {
            self.kept.extend(outgoing.fd.take());
        }
        let mine = outbox.into_iter().filter(|outgoing| outgoing.to == ConnId(conn));
        let mut reply = mine.filter_map(|outgoing| match &*outgoing.message {
            Message::Reply(reply) => Some(reply.clone()),
            Message::Event(_) => None,
        });
        match reply.next_back().expect("every request is answered") {
            Reply::Error { code, message } => Err((code, message)),
            reply => Ok(reply),
        }
    }

    fn job(&mut self, conn: u64) -> JobId {
        match self.ask(
            conn,
            Request::CreateJob {
                name: format!("of {conn}"),
            },
        ) {
            Ok(Reply::JobCreated { job }) => job,
            other => panic!("{other:?}"),
        }
    }

    fn status(&mut self, conn: u64) -> Status {
        self.page(conn, None, None)
    }

    /// The page of a status after that worker.
    fn page(&mut self, conn: u64, job: Option<JobId>, after: Option<WorkerId>) -> Status {
        match self.ask(conn, Request::Status { job, after }) {
            Ok(Reply::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    /// A new arena, and the note with it.
    fn arena(&mut self, conn: u64, request: Request) -> (ArenaId, Option<String>) {
        match self.ask(conn, request) {
            Ok(Reply::ArenaCreated { arena, note, .. }) => (arena, note),
            other => panic!("{other:?}"),
        }
    }

    /// Asks what is to be refused with that code; gives the message.
    fn refused(&mut self, conn: u64, request: Request, code: ErrorCode, why: &str) -> String {
        let (found, message) = self.ask(conn, request).expect_err(why);
        assert_eq!(found, code, "{why}: {message}");
        message
    }
}

fn register(job: JobId, name: &str) -> Request {
    Request::Register {
        job,
        role: "trainer".into(),
        name: name.into(),
    }
}

fn one_slot(slot_bytes: u64) -> Layout {
    Layout { slots: 1, slot_bytes }
}

fn create_arena(slot_bytes: u64) -> Request {
    Request::CreateArena {
        layout: one_slot(slot_bytes),
        instead_of: None,
    }
}

#[tokio::test]
async fn a_job_belongs_to_its_user_and_to_root() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1001);
    bench.user(3, 0);
    bench.user(4, 1000);
    let job = bench.job(1);
    bench.refused(2, register(job, "intruder"), ErrorCode::Denied, "another user");
    bench.ask(3, register(job, "by-root")).expect("root may");
    bench.ask(4, register(job, "own")).expect("the same user may");
    let end = Request::EndJob {
        reason: "mine".into(),
    };
    bench.refused(2, end, ErrorCode::Denied, "not its job");
}

#[tokio::test]
async fn status_hides_other_users_jobs_but_not_from_root() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1001);
    bench.user(3, 0);
    let job = bench.job(1);
    bench.ask(1, register(job, "a")).expect("registered");
    let theirs = bench.status(2);
    assert_eq!(
        (
            theirs.jobs[0].name.as_deref(),
            theirs.jobs[0].workers,
            theirs.workers.len()
        ),
        (None, 1, 0)
    );
    assert_eq!(bench.status(1).workers.len(), 1);
    assert_eq!(bench.status(3).jobs[0].name.as_deref(), Some("of 1"));
}

#[tokio::test]
async fn what_has_moved_in_a_job_is_told_to_those_in_it() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1000);
    bench.user(3, 0);
    let job = bench.job(1);
    bench.ask(2, register(job, "a")).expect("registered");
    for inside in [1, 2] {
        let told = bench.ask(inside, Request::Traffic {}).expect("told");
        assert_eq!(
            told,
            Reply::Traffic(JobTraffic::default()),
            "nothing has moved yet"
        );
    }
    bench.refused(3, Request::Traffic {}, ErrorCode::BadRequest, "in no job");
}

#[tokio::test]
async fn jobs_and_users_are_on_a_statuss_first_page() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    let job = bench.job(1);
    for n in 0..17 {
        let conn = 10 + n;
        bench.user(conn, 1000);
        // More than a relay of sixteen takes are refused.
        let registered = bench.ask(conn, register(job, &format!("w{n}")));
        assert_eq!(registered.is_ok(), n < 16, "{registered:?}");
    }
    let first = bench.status(1);
    assert_eq!(
        (first.jobs.len(), first.jobs[0].workers, first.users.len()),
        (1, 16, 1)
    );
    let after = Some(first.workers[7].worker);
    let second = bench.page(1, None, after);
    assert_eq!(
        (second.jobs.len(), second.workers.len(), second.users.len()),
        (0, 8, 0)
    );
}

#[tokio::test]
async fn a_statuss_pages_fit_into_packets_and_have_all_workers_of_a_job() {
    const WORKERS: u64 = 250;
    let mut bench = Bench::of(512, Quotas::unlimited());
    bench.user(1, 1000);
    bench.user(2, 1000);
    let (job, other) = (bench.job(1), bench.job(2));
    for n in 0..WORKERS {
        let conn = 10 + n;
        bench.user(conn, 1000);
        let (job, name) = if n % 50 == 0 { (other, "other") } else { (job, "w") };
        // Quotes take twice their length in JSON.
        let name = format!("{name}{n}{}", "\"".repeat(100));
        bench.ask(conn, register(job, &name)).expect("registered");
    }
    let mut pages = Vec::new();
    let mut after = None;
    loop {
        let page = bench.page(1, Some(job), after);
        let packet = serde_json::to_vec(&Reply::Status(page.clone())).expect("JSON");
        assert!(
            packet.len() <= lifl_common::control::packet::MAX_BYTES,
            "{}",
            packet.len()
        );
        after = page.workers.last().map(|worker| worker.worker);
        let more = page.more;
        pages.push(page.workers);
        if !more {
            break;
        }
    }
    assert!((2..5).contains(&pages.len()), "{} pages", pages.len());
    let workers = pages.concat();
    assert!(workers.iter().all(|worker| worker.job == job));
    assert!(workers.is_sorted_by_key(|worker| worker.worker));
    assert_eq!(workers.len() as u64, WORKERS - 5);
}

#[tokio::test]
async fn a_name_is_free_again_once_its_worker_has_left() {
    let mut bench = Bench::new();
    for conn in 1..4 {
        bench.user(conn, 1000);
    }
    let job = bench.job(1);
    bench.ask(2, register(job, "a")).expect("registered");
    bench.refused(3, register(job, "a"), ErrorCode::BadRequest, "the name is taken");
    bench.registry.closed(ConnId(2));
    bench.ask(3, register(job, "a")).expect("the name is free");
}

#[tokio::test]
async fn nothing_of_a_job_is_kept_once_all_have_left() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1000);
    let job = bench.job(1);
    bench.ask(2, register(job, "a")).expect("registered");
    bench.ask(2, create_arena(4096)).expect("an arena");
    bench.kept.clear();
    bench.registry.closed(ConnId(1));
    assert_eq!(bench.registry.jobs.len(), 1, "a worker is still there");
    bench.registry.closed(ConnId(2));
    let registry = &bench.registry;
    assert!(registry.jobs.is_empty() && registry.workers.is_empty() && registry.arenas.is_empty());
    assert_eq!(registry.pool.used_bytes(), 0);
}

#[tokio::test]
async fn only_its_owner_has_an_arena_sealed_and_nobody_reads_it_before() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1000);
    let job = bench.job(1);
    bench.ask(1, register(job, "a")).expect("registered");
    bench.ask(2, register(job, "b")).expect("registered");
    let (arena, _) = bench.arena(1, create_arena(4096));
    let open = Request::OpenArena { arena };
    bench.refused(2, open.clone(), ErrorCode::BadRequest, "not sealed");
    let seal = Request::SealArena { arena };
    bench.refused(2, seal.clone(), ErrorCode::NotFound, "not its own");
    bench.ask(1, seal).expect("sealed");
    bench.ask(2, open).expect("opened");
}

#[tokio::test]
async fn an_arena_whose_pages_cannot_be_used_is_replaced_before_anybody_reads_it_and_counted_once() {
    let mut bench = Bench::with(Quota {
        pool_bytes: 12288,
        ..Quota::UNLIMITED
    });
    for conn in [1, 2] {
        bench.user(conn, 1000);
    }
    let job = bench.job(1);
    bench.ask(1, register(job, "a")).expect("registered");
    bench.ask(2, register(job, "b")).expect("registered");
    let instead_of = |arena| Request::CreateArena {
        layout: one_slot(8192),
        instead_of: Some(arena),
    };
    let (arena, _) = bench.arena(1, create_arena(8192));
    // Its owner has let it go.
    bench.kept.clear();
    bench.refused(2, instead_of(arena), ErrorCode::BadRequest, "not its own");
    let (arena, note) = bench.arena(1, instead_of(arena));
    assert!(note.is_some_and(|note| note.contains("hugetlb")));
    assert_eq!(bench.registry.used(1000).pool_bytes, 8192);
    bench.ask(1, Request::SealArena { arena }).expect("sealed");
    bench.refused(1, instead_of(arena), ErrorCode::BadRequest, "others may read it");
}

#[tokio::test]
async fn memory_counts_until_nobody_has_it_whoever_has_left() {
    let mut bench = Bench::with(Quota {
        pool_bytes: 12288,
        ..Quota::UNLIMITED
    });
    let mut conn = 0;
    let mut arena = |bench: &mut Bench| {
        conn += 1;
        bench.user(conn, 1000);
        let job = bench.job(conn);
        bench.ask(conn, register(job, "a")).expect("registered");
        (conn, bench.ask(conn, create_arena(8192)))
    };
    let (first, made) = arena(&mut bench);
    made.expect("an arena");
    let kept = std::mem::take(&mut bench.kept);
    assert_eq!(kept.len(), 1);
    bench.registry.closed(ConnId(first));
    assert_eq!(
        bench.registry.used(1000).pool_bytes,
        8192,
        "somebody has it still"
    );
    let (second, refused) = arena(&mut bench);
    let (code, message) = refused.expect_err("the quota's");
    assert_eq!(code, ErrorCode::Full, "{message}");
    bench.registry.closed(ConnId(second));

    // However it is held: by a mapping, by a descriptor that was opened from it.
    let file = std::fs::File::from(kept.into_iter().next().expect("one"));
    let again = memfd::reopen(file.as_fd(), false).expect("opened");
    // SAFETY: nobody writes to it or cuts it.
    let mapping = unsafe { memmap2::Mmap::map(&file) }.expect("mapped");
    drop(file);
    bench.registry.check_departed();
    assert_eq!(bench.registry.used(1000).pool_bytes, 8192, "mapped and open");
    drop(mapping);
    bench.registry.check_departed();
    assert_eq!(bench.registry.used(1000).pool_bytes, 8192, "open");
    drop(again);
    bench.registry.check_departed();
    assert_eq!(bench.registry.used(1000).pool_bytes, 0);
    assert_eq!(bench.registry.pool.used_bytes(), 0);
    let (_, made) = arena(&mut bench);
    made.expect("room again");
}

#[tokio::test]
async fn a_user_expects_no_more_workers_than_it_may_have() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.job(1);
    let open = Request::OpenGateway {
        p2p: Some("127.0.0.1:0".parse().expect("an address")),
        mqtt: None,
        object_bytes: 4096,
    };
    // Nobody runs the gateway, so nobody answers.
    bench.registry.request(ConnId(1), open, Beside::default());
    let expect = |names: std::ops::Range<u32>| Request::ExpectWorkers {
        workers: names
            .map(|n| RemoteWorker {
                name: format!("w{n}"),
                role: "trainer".into(),
            })
            .collect(),
    };
    bench.ask(1, expect(0..10)).expect("room");
    bench.ask(1, expect(0..10)).expect("the same");
    bench.ask(1, expect(10..16)).expect("as many as the daemon has");
    let message = bench.refused(1, expect(16..17), ErrorCode::Full, "one too many");
    assert!(message.contains("16"), "{message}");
}

#[tokio::test]
async fn descriptors_of_the_daemon_are_shared() {
    let mut bench = Bench::with(Quota {
        descriptors: 7,
        ..Quota::UNLIMITED
    });
    bench.user(1, 1000);
    bench.user(2, 1001);
    let job = bench.job(1);
    bench.ask(1, register(job, "a")).expect("registered");
    for _ in 0..4 {
        bench.ask(1, create_arena(4096)).expect("an arena");
    }
    bench.user(3, 1000);
    let message = bench.refused(3, register(job, "b"), ErrorCode::Full, "too many");
    assert!(message.contains("LimitNOFILE"), "{message}");
    let other = bench.job(2);
    bench
        .ask(2, register(other, "a"))
        .expect("another user's are its own");
}

#[tokio::test]
async fn what_is_too_long_is_cut_and_sent_to_all_as_one() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    let job = bench.job(1);
    for conn in 2..6 {
        bench.user(conn, 1000);
        bench
            .ask(conn, register(job, &format!("w{conn}")))
            .expect("registered");
    }
    let reason = "é".repeat(30_000);
    bench
        .registry
        .request(ConnId(1), Request::EndJob { reason }, Beside::default());
    let told = bench.registry.take_outbox();
    let ended: Vec<&Arc<Message>> = told
        .iter()
        .map(|outgoing| &outgoing.message)
        .filter(|message| matches!(***message, Message::Event(Event::JobEnded { .. })))
        .collect();
    assert_eq!(ended.len(), 4);
    assert!(ended.iter().all(|message| Arc::ptr_eq(message, ended[0])));
    let Message::Event(Event::JobEnded { reason }) = &**ended[0] else {
        panic!("filtered");
    };
    assert_eq!(reason.len(), MAX_REASON_BYTES);
}
