//! What a frame costs on each plane: the way there and back between two workers, and a stream in batches.
//!
//! Both workers are tasks of one runtime; the sockmap is left out, loudly, where this process may not load it.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifl_common::client::FrameSocket;
use lifl_common::frame::Frame;
use lifl_common::id::{JobId, WorkerId};
use lifl_common::kernel::Member;
use lifl_daemon::plane::{Chosen, Options, Request, choose};
use tokio::runtime::Runtime;

const FRAMES: usize = 10_000;
const BATCH: usize = 10;

/// What both workers are.
const MEMBER: Member = Member {
    job: JobId(1),
    uid: 0,
    flags: 0,
};

/// Two workers of one job. The plane lives as long as they do.
struct Pair {
    _chosen: Chosen,
    one: FrameSocket,
    two: FrameSocket,
}

fn pair(request: Request) -> Option<Pair> {
    let mut chosen = match choose(
        request,
        Options {
            max_workers: 2,
            pin: None,
        },
    ) {
        Ok(chosen) => chosen,
        Err(error) => {
            eprintln!("NOT RUN: {error}");
            return None;
        }
    };
    let mut worker = |id| {
        let (socket, registered) = FrameSocket::pair_for(chosen.plane.kind()).expect("a pair");
        chosen
            .plane
            .register(WorkerId(id), MEMBER, registered)
            .expect("registered");
        socket
    };
    let (one, two) = (worker(1), worker(2));
    Some(Pair {
        _chosen: chosen,
        one,
        two,
    })
}

const fn frame(from: u32, to: u32) -> Frame {
    let mut frame: Frame = zerocopy::transmute!([0_u8; Frame::BYTES]);
    frame.from = WorkerId(from);
    frame.to = WorkerId(to);
    frame
}

fn round_trip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("round trip");
    for request in [Request::Sockmap, Request::Relay] {
        let runtime = Runtime::new().expect("a runtime");
        let _entered = runtime.enter();
        let Some(Pair {
            _chosen,
            mut one,
            mut two,
        }) = pair(request)
        else {
            continue;
        };
        let echo = runtime.spawn(async move {
            while let Ok(Some(_)) = two.recv().await {
                two.send(&[frame(2, 1)]).await.expect("sent");
            }
        });
        group.bench_function(format!("{request:?}"), |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    one.send(&[frame(1, 2)]).await.expect("sent");
                    one.recv().await.expect("read")
                })
            });
        });
        echo.abort();
    }
    group.finish();
}

fn stream(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("10000 frames in batches of 10");
    group
        .throughput(Throughput::Elements(FRAMES as u64))
        .sample_size(20);
    group.measurement_time(Duration::from_secs(3));
    for request in [Request::Sockmap, Request::Relay] {
        let runtime = Runtime::new().expect("a runtime");
        let _entered = runtime.enter();
        let Some(Pair {
            _chosen,
            mut one,
            mut two,
        }) = pair(request)
        else {
            continue;
        };
        group.bench_function(format!("{request:?}"), |bencher| {
            bencher.iter(|| {
                runtime.block_on(async {
                    let send = async {
                        for _ in 0..FRAMES / BATCH {
                            one.send(&[frame(1, 2); BATCH]).await.expect("sent");
                        }
                    };
                    let receive = async {
                        for _ in 0..FRAMES {
                            two.recv().await.expect("read");
                        }
                    };
                    tokio::join!(send, receive)
                })
            });
        });
    }
    group.finish();
}

criterion_group!(benches, round_trip, stream);
criterion_main!(benches);
