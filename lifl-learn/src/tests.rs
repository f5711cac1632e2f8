//! Tests of learning as a job does it: several trainers, one average.

use std::process::Command;

use lifl_common::config::{DataSource, Partition};
use lifl_common::update::DType;
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::*;
use crate::data::{self, BUILTIN_DIGITS, Source};

const SEED: u64 = 11;

fn training(learning_rate: f64) -> TrainingSpec {
    TrainingSpec {
        epochs: 1,
        batch_size: 32,
        learning_rate,
        weight_decay: 0.0,
        proximal_mu: 0.0,
    }
}

fn digits(train_samples: u64) -> Source {
    let source = DataSource {
        dataset: BUILTIN_DIGITS.into(),
        sha256: None,
        train_samples: Some(train_samples),
        test_samples: Some(500),
        partition: Partition::Iid,
    };
    data::open(&source, SEED).expect("digits")
}

fn fresh(model: &ModelSpec) -> (Schema, Vec<u8>) {
    let schema = schema(model).expect("a schema");
    let mut weights = vec![0; schema.data_bytes()];
    initial(model, SEED, TensorsMut::new(&schema, &mut weights));
    (schema, weights)
}

fn train_once(learner: &mut dyn Learner, round: u32, model: &[u8]) -> (Trained, Vec<u8>) {
    let schema = learner.schema().clone();
    let mut weights = vec![0; model.len()];
    let trained = learner
        .train(
            round,
            Tensors::new(&schema, model),
            TensorsMut::new(&schema, &mut weights),
        )
        .expect("a trained model");
    (trained, weights)
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    <[F32]>::ref_from_bytes(bytes)
        .expect("whole floats")
        .iter()
        .map(|x| x.get())
}

/// Two trainers' federated average; gives the first and last training loss and the last accuracy.
fn federate(model: &ModelSpec, rounds: u32) -> (f64, f64, f64) {
    const TRAINERS: u32 = 2;
    let source = digits(1000);
    let (schema, mut global) = fresh(model);
    let mut learners: Vec<Box<dyn Learner>> = (0..TRAINERS)
        .map(|share| {
            let samples = source.train_share(share, TRAINERS).expect("a share");
            build(model, &training(0.2), Some(samples), share, SEED).expect("a learner")
        })
        .collect();
    let mut losses = Vec::new();
    for round in 1..=rounds {
        let mut sums = vec![0.0; schema.elements()];
        let mut loss = 0.0;
        for learner in &mut learners {
            let (trained, weights) = train_once(&mut **learner, round, &global);
            assert_eq!(
                (trained.samples, trained.bytes_copied),
                (500, schema.data_bytes() as u64)
            );
            loss += trained.loss.expect("a loss") / f64::from(TRAINERS);
            for (sum, weight) in sums.iter_mut().zip(floats(&weights)) {
                *sum += weight / TRAINERS as f32;
            }
        }
        losses.push(loss);
        global = sums.into_iter().flat_map(f32::to_le_bytes).collect();
    }
    let evaluator = Evaluator::new(model, source.test()).expect("an evaluator");
    let evaluation = evaluator
        .evaluate(Tensors::new(&schema, &global))
        .expect("an evaluation");
    assert_eq!(evaluation.samples, 500);
    (losses[0], losses[losses.len() - 1], evaluation.accuracy)
}

#[test]
fn networks_learn_and_convolution_learns_best() {
    const ROUNDS: u32 = 8;
    let mut accuracies = Vec::new();
    for model in [ModelSpec::Softmax, ModelSpec::Mlp { hidden: 64 }, ModelSpec::Cnn] {
        let (first, last, accuracy) = federate(&model, ROUNDS);
        assert!(last < 0.7 * first, "{model:?}: loss {first} to {last}");
        accuracies.push(accuracy);
    }
    let [softmax, mlp, cnn] = accuracies[..] else {
        panic!("three models")
    };
    assert!(softmax > 0.5 && mlp > 0.5, "softmax {softmax}, mlp {mlp}");
    assert!(cnn > 0.85 && cnn > softmax + 0.08, "cnn {cnn}, softmax {softmax}");
}

#[test]
fn the_convolution_network_is_flames() {
    let (schema, weights) = fresh(&ModelSpec::Cnn);
    // Keras' summary of it: 320 + 18,496 + 16,010.
    assert_eq!(schema.elements(), 34_826);
    let kernel = schema.get("dense.kernel").expect("the last layer").1;
    let bound = (6.0_f32 / 1610.0).sqrt();
    assert!(floats(&weights[kernel.clone()]).all(|w| w.abs() <= bound));
    assert!(floats(&weights[kernel]).any(|w| w.abs() > 0.99 * bound));
    let bias = schema.get("conv2.bias").expect("a bias").1;
    assert!(floats(&weights[bias]).all(|w| w == 0.0));
}

#[test]
fn training_depends_on_seed_share_and_round_alone() {
    for model in [
        ModelSpec::Cnn,
        ModelSpec::Synthetic {
            parameters: 5000,
            dtype: DType::F32,
        },
    ] {
        let (_, global) = fresh(&model);
        assert_eq!(global, fresh(&model).1);
        let samples = digits(64).train_share(0, 1).expect("samples");
        let learner = |share, seed| {
            build(&model, &training(0.1), Some(samples.clone()), share, seed).expect("a learner")
        };
        let weights = |share, seed, round| train_once(&mut *learner(share, seed), round, &global).1;
        let first = weights(0, SEED, 1);
        assert_eq!(first, weights(0, SEED, 1));
        assert_ne!(first, weights(1, SEED, 1));
        assert_ne!(first, weights(0, SEED + 1, 1));
        assert_ne!(first, weights(0, SEED, 2));
        // A learner that has trained other rounds is no other: a restarted trainer goes on as the old one would have.
        let mut used = learner(0, SEED);
        train_once(&mut *used, 7, &global);
        assert_eq!(first, train_once(&mut *used, 1, &global).1);
    }
}

#[test]
fn threads_change_no_bit() {
    const NAME: &str = "tests::threads_change_no_bit";
    const CHILD: &str = "LIFL_TEST_TRAINING_DIGEST";
    if std::env::var_os(CHILD).is_some() {
        // The number of threads is fixed as a process starts, so this test runs itself once for each.
        for model in [
            ModelSpec::Cnn,
            ModelSpec::Synthetic {
                parameters: 200_000,
                dtype: DType::F32,
            },
        ] {
            let samples = digits(128).train_share(0, 1).expect("samples");
            let mut learner = build(&model, &training(0.1), Some(samples), 0, SEED).expect("a learner");
            let (trained, weights) = train_once(&mut *learner, 1, &fresh(&model).1);
            let digest = weights
                .iter()
                .fold(0_u64, |d, &b| (d ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
            println!("\ndigest {digest:016x} {trained:?}");
        }
        return;
    }
    let with_threads = |threads: &str| {
        let this = std::env::current_exe().expect("this test's path");
        let child = Command::new(this)
            .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
            .env(CHILD, "1")
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .expect("this test again");
        let out = String::from_utf8_lossy(&child.stdout).into_owned();
        let digests: Vec<String> = out
            .lines()
            .filter(|l| l.starts_with("digest"))
            .map(String::from)
            .collect();
        assert_eq!(digests.len(), 2, "{out}");
        digests
    };
    let one = with_threads("1");
    assert_eq!(one, with_threads("2"));
    assert_eq!(one, with_threads("3"));
}

#[test]
fn weight_decay_shrinks_what_nothing_else_moves() {
    let model = ModelSpec::Softmax;
    let (schema, global) = fresh(&model);
    let samples = digits(32).train_share(0, 1).expect("samples");
    let spec = |weight_decay| TrainingSpec {
        weight_decay,
        ..training(0.1)
    };
    let run = |decay| {
        let mut learner = build(&model, &spec(decay), Some(samples.clone()), 0, SEED).expect("a learner");
        train_once(&mut *learner, 1, &global).1
    };
    let kernel = schema.get("dense.kernel").expect("the kernel").1;
    let (plain, decayed) = (run(0.0), run(0.5));
    let old = floats(&global[kernel.clone()]);
    // One step: w - 0.1·gradient against that minus 0.1·0.5·w.
    for ((old, plain), decayed) in old
        .zip(floats(&plain[kernel.clone()]))
        .zip(floats(&decayed[kernel]))
    {
        assert!(
            (plain - decayed - 0.05 * old).abs() < 1e-6,
            "{old}: {plain} and {decayed}"
        );
    }
}

#[test]
fn what_cannot_learn_is_refused() {
    let samples = || digits(32).train_share(0, 1).expect("samples");
    let model = ModelSpec::Softmax;
    assert!(matches!(
        build(&model, &training(0.1), None, 0, 0),
        Err(LearnError::NoSamples)
    ));
    let no_batch = TrainingSpec {
        batch_size: 0,
        ..training(0.1)
    };
    assert!(matches!(
        build(&model, &no_batch, Some(samples()), 0, 0),
        Err(LearnError::EmptyBatch)
    ));
    let integers = ModelSpec::Synthetic {
        parameters: 4,
        dtype: DType::I32,
    };
    assert!(matches!(schema(&integers), Err(LearnError::NotFloat(DType::I32))));
    let synthetic = ModelSpec::Synthetic {
        parameters: 4,
        dtype: DType::F32,
    };
    assert!(matches!(
        Evaluator::new(&synthetic, samples()),
        Err(LearnError::NothingToEvaluate)
    ));

    let model = ModelSpec::Mlp { hidden: 8 };
    let (schema, global) = fresh(&model);
    let mut learner = build(
        &model,
        &training(1e30),
        Some(digits(96).train_share(0, 1).expect("samples")),
        4,
        SEED,
    )
    .expect("a learner");
    let mut weights = vec![0; global.len()];
    let error = learner
        .train(
            3,
            Tensors::new(&schema, &global),
            TensorsMut::new(&schema, &mut weights),
        )
        .expect_err("no number")
        .to_string();
    assert!(
        error.contains("share 4 in round 3") && error.contains("learningRate"),
        "{error}"
    );
}
