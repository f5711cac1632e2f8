//! The server optimizer's step at the top, beside one thread's copy of as many bytes as it moves.
//!
//! A step reads the model, the round's mean and two moments, and writes the new model and the new moments: seven times the
//! model's bytes in 32-bit floats.
//!
//! `LIFL_BENCH_MB` sets the model's megabytes (44, a ResNet-18, unless told), `LIFL_BENCH_THREADS` the threads (the
//! machine's).

mod support;

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifl_aggregate::{ServerOptimizer, State, Threads};
use lifl_common::config::{Adaptive, Optimizer, UpdateKind};
use lifl_common::update::{DType, Schema, TensorSpec};

use support::{number, threads};

fn steps(criterion: &mut Criterion) {
    let elements = number("LIFL_BENCH_MB", 44) * 1_000_000 / DType::F32.bytes();
    let threads = Threads::new(threads()).expect("threads");
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
    // Half of a step's bytes is read, half is written.
    let from = vec![1; 7 * model.len() / 2];
    let mut to = vec![0; from.len()];
    group.bench_function("copy", |b| {
        b.iter(|| to.copy_from_slice(&from));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(3));
    targets = steps
}
criterion_main!(benches);
