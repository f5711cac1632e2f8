//! An epoch of one trainer, for each built-in network, in batches of 32.
//!
//! Threads are those of the environment's `RAYON_NUM_THREADS`, as a trainer's.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lifl_common::config::{DataSource, ModelSpec, Partition, TrainingSpec};
use lifl_common::update::{Tensors, TensorsMut};
use lifl_learn::data::{self, BUILTIN_DIGITS};

/// As many as each of eight trainers has of the digits.
const SAMPLES: u64 = 1024;

const SEED: u64 = 1;

fn epochs(criterion: &mut Criterion) {
    let source = DataSource {
        dataset: BUILTIN_DIGITS.into(),
        sha256: None,
        train_samples: Some(SAMPLES),
        test_samples: Some(1),
        partition: Partition::Iid,
    };
    let source = data::open(&source, SEED).expect("digits");
    let training = TrainingSpec {
        epochs: 1,
        batch_size: 32,
        learning_rate: 0.1,
        weight_decay: 0.0,
        proximal_mu: 0.0,
    };
    let mut group = criterion.benchmark_group("epoch");
    group.throughput(Throughput::Elements(SAMPLES)).sample_size(20);
    for (name, model) in [
        ("softmax", ModelSpec::Softmax),
        ("mlp", ModelSpec::Mlp { hidden: 128 }),
        ("cnn", ModelSpec::Cnn),
    ] {
        let samples = source.train_share(0, 1).expect("one share");
        let mut learner = lifl_learn::build(&model, &training, Some(samples), 0, SEED).expect("a learner");
        let schema = learner.schema().clone();
        let mut first = vec![0; schema.data_bytes()];
        learner.initial(SEED, TensorsMut::new(&schema, &mut first));
        let mut trained = first.clone();
        group.bench_function(name, |b| {
            b.iter(|| {
                let weights = TensorsMut::new(&schema, &mut trained);
                learner
                    .train(1, Tensors::new(&schema, &first), weights)
                    .expect("finite")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, epochs);
criterion_main!(benches);
