//! The server optimizer's step at the top, beside one thread's copy of as many bytes as it moves.
//!
//! A step reads the model, the round's mean and two moments, and writes the new model and the new moments: seven times the
//! model's bytes in 32-bit floats.
//!
//! `LIFL_BENCH_MB` sets the model's megabytes (44, a ResNet-18, unless told), `LIFL_BENCH_THREADS` the threads (the
//! machine's).

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifl_cli::aggregate::{ServerOptimizer, State, Threads};
use lifl_common::config::{Adaptive, Optimizer, UpdateKind};
use lifl_common::update::{DType, Schema, TensorSpec};

fn number(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

fn steps(criterion: &mut Criterion) {
    let elements = number("LIFL_BENCH_MB", 44) * 1_000_000 / DType::F32.bytes();
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    let threads = Threads::new(number("LIFL_BENCH_THREADS", cores)).expect("threads");
    let schema = Schema::new(vec![TensorSpec::new("weights", DType::F32, [elements])]).expect("one tensor");
    let schema = Arc::new(schema);
    let floats = |value: f32| value.to_le_bytes().repeat(elements);
    let (model, mut mean) = (floats(0.5), floats(0.25));
    let rates = Adaptive::default();
    let optimizers = [
        ("fedadagrad", Optimizer::FedAdagrad(rates)),
        ("fedadam", Optimizer::FedAdam(rates)),
        ("fedyogi", Optimizer::FedYogi(rates)),
    ];
    let mut group = criterion.benchmark_group("step");
    group.throughput(Throughput::Bytes(7 * model.len() as u64));
    for (name, optimizer) in optimizers {
        let optimizer = ServerOptimizer::new(Arc::clone(&schema), optimizer, UpdateKind::Weights);
        let state = optimizer.state_schema().expect("it remembers").data_bytes();
        let before = 0.125_f32.to_le_bytes().repeat(state / DType::F32.bytes());
        let mut after = vec![0; state];
        group.bench_function(name, |b| {
            b.iter(|| {
                let state = State {
                    before: Some(&before),
                    after: &mut after,
                };
                optimizer
                    .step(&threads, &model, &mut mean, Some(state))
                    .expect("finite");
            });
        });
    }
    let (from, mut to) = (floats(0.5).repeat(7), vec![0; 7 * model.len()]);
    let half = from.len() / 2;
    // Half is read, half is written.
    group.bench_function("copy", |b| {
        b.iter(|| to[..half].copy_from_slice(&from[..half]));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = steps
}
criterion_main!(benches);
