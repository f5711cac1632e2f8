//! Requests of several users, without sockets or processes.

use std::os::unix::net::UnixStream;

use lifl_common::control::{JobTraffic, Status};
use lifl_common::plane::PlaneKind;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::plane::{self, choose};
use crate::pool::HugePages;

/// A registry on the relay plane, with connections of users of the test's choice.
struct Bench {
    registry: Registry,
    far: Vec<UnixStream>,
}

impl Bench {
    fn new() -> Self {
        let chosen = choose(
            plane::Request::Relay,
            plane::Options {
                max_workers: 16,
                pin: None,
            },
        )
        .expect("a relay");
        assert_eq!(chosen.plane.kind(), PlaneKind::Relay);
        let facts = Facts {
            plane_reason: "test".into(),
            max_workers: 16,
        };
        let pool = Pool::new(1 << 20, HugePages::Never);
        let options = GatewayOptions::default();
        // Nobody runs it: what the registry lets through is not answered.
        let (lobby, _) = crate::server::lobby();
        let (gateway, ..) = gateway::gateway(lobby, &options, CancellationToken::new());
        Self {
            registry: Registry::new(facts, Quotas::unlimited(), chosen.plane, pool, gateway, options),
            far: Vec::new(),
        }
    }

    /// A connection that has said hello.
    fn user(&mut self, conn: u64, uid: u32) {
        self.registry.connected(ConnId(conn), Peer::new(1, uid));
        self.ask(conn, Request::Hello { protocol: PROTOCOL })
            .expect("welcome");
    }

    fn ask(&mut self, conn: u64, request: Request) -> Result<Reply, (ErrorCode, String)> {
        let mut fds = Vec::new();
        if matches!(request, Request::Register { .. }) {
            let (near, far) = UnixStream::pair().expect("a pair");
            fds.push(Foreign::new(0, far.into()));
            self.far.push(near);
        }
        self.registry.request(ConnId(conn), request, fds);
        let outbox = self.registry.take_outbox();
        let mine = outbox.into_iter().filter(|outgoing| outgoing.to == ConnId(conn));
        let mut reply = mine.filter_map(|outgoing| match outgoing.message {
            Message::Reply(reply) => Some(reply),
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
        match self.ask(
            conn,
            Request::Status {
                job: None,
                after: None,
            },
        ) {
            Ok(Reply::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }
}

fn register(job: JobId, name: &str) -> Request {
    Request::Register {
        job,
        role: "trainer".into(),
        name: name.into(),
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
    let (code, message) = bench.ask(2, register(job, "intruder")).expect_err("another user");
    assert_eq!(code, ErrorCode::Denied, "{message}");
    bench.ask(3, register(job, "by-root")).expect("root may");
    bench.ask(4, register(job, "own")).expect("the same user may");
    let (code, _) = bench
        .ask(
            2,
            Request::EndJob {
                reason: "mine".into(),
            },
        )
        .expect_err("not its job");
    assert_eq!(code, ErrorCode::Denied);
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
    let (code, message) = bench.ask(3, Request::Traffic {}).expect_err("in no job");
    assert_eq!(code, ErrorCode::BadRequest, "{message}");
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
    let second = match bench.ask(1, Request::Status { job: None, after }) {
        Ok(Reply::Status(status)) => status,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        (second.jobs.len(), second.workers.len(), second.users.len()),
        (0, 8, 0)
    );
}

#[tokio::test]
async fn nothing_of_a_job_is_kept_once_all_have_left() {
    let mut bench = Bench::new();
    bench.user(1, 1000);
    bench.user(2, 1000);
    let job = bench.job(1);
    bench.ask(2, register(job, "a")).expect("registered");
    let layout = Layout {
        slots: 1,
        slot_bytes: 4096,
    };
    bench.ask(2, Request::CreateArena { layout }).expect("an arena");
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
    let layout = Layout {
        slots: 1,
        slot_bytes: 4096,
    };
    let Ok(Reply::ArenaCreated { arena, .. }) = bench.ask(1, Request::CreateArena { layout }) else {
        panic!("no arena")
    };
    assert_eq!(
        bench
            .ask(2, Request::OpenArena { arena })
            .expect_err("not sealed")
            .0,
        ErrorCode::BadRequest
    );
    assert_eq!(
        bench
            .ask(2, Request::SealArena { arena })
            .expect_err("not its own")
            .0,
        ErrorCode::NotFound
    );
    bench.ask(1, Request::SealArena { arena }).expect("sealed");
    bench.ask(2, Request::OpenArena { arena }).expect("opened");
}
