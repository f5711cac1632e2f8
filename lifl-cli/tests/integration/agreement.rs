//! Any tree, either timing and either plane give the flat average; equal seeds give equal runs.

use lifl_common::config::JobSpec;
use lifl_common::update::{DType, Schema, Tensors, TensorsMut};
use safetensors::SafeTensors;
use zerocopy::FromBytes;

use crate::support::{Finished, Job, Place, can_have};

/// The job as the run understood it.
fn job_of(finished: &Finished) -> JobSpec {
    let text = std::fs::read(finished.run.join("job.json")).expect("the run's job");
    serde_json::from_slice(&text).expect("a job")
}

/// One tensor's numbers, from a model's data or an update's.
fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let bytes = bytes.to_vec();
    match dtype {
        DType::F32 => bytes
            .chunks(4)
            .map(|b| f64::from(f32::read_from_bytes(b).expect("four")))
            .collect(),
        DType::F64 => bytes
            .chunks(8)
            .map(|b| f64::read_from_bytes(b).expect("eight"))
            .collect(),
        DType::BF16 => bytes
            .chunks(2)
            .map(|b| f64::from(half::bf16::from_le_bytes([b[0], b[1]])))
            .collect(),
        other => panic!("{other}"),
    }
}

/// What every trainer makes of the job's first model, in this process.
fn updates(job: &JobSpec, schema: &Schema) -> Vec<(u64, Vec<u8>)> {
    let mut model = vec![0_u64; schema.data_bytes().div_ceil(8)];
    let model = &mut zerocopy::IntoBytes::as_mut_bytes(&mut model[..])[..schema.data_bytes()];
    lifl_learn::initial(&job.model, job.seed, TensorsMut::new(schema, model));
    job.trainers()
        .map(|trainer| {
            let mut weights = vec![0_u64; schema.data_bytes().div_ceil(8)];
            let weights = &mut zerocopy::IntoBytes::as_mut_bytes(&mut weights[..])[..schema.data_bytes()];
            let mut learner = lifl_learn::for_trainer(job, trainer, job.part_of(trainer)).expect("a learner");
            let trained = learner.train(1, Tensors::new(schema, model), TensorsMut::new(schema, weights));
            (trained.expect("trained").samples, weights.to_vec())
        })
        .collect()
}

/// The run's model must be the flat average of its trainers' updates: `tolerance` relative to each tensor's largest
/// magnitude.
fn assert_flat_average(finished: &Finished, tolerance: f64) {
    let job = job_of(finished);
    let schema = lifl_learn::schema(&job.model).expect("a schema");
    let updates = updates(&job, &schema);
    let samples: f64 = updates.iter().map(|(samples, _)| *samples as f64).sum();
    let file = std::fs::read(finished.run.join("model.safetensors")).expect("a model");
    let model = SafeTensors::deserialize(&file).expect("safetensors");
    for (tensor, range) in schema.iter() {
        let mut flat = vec![0.0; tensor.elements().expect("small")];
        for (weight, update) in &updates {
            for (sum, x) in flat.iter_mut().zip(numbers(tensor.dtype, &update[range.clone()])) {
                *sum += *weight as f64 / samples * x;
            }
        }
        let found = numbers(tensor.dtype, model.tensor(&tensor.name).expect("there").data());
        let largest = flat.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        let worst = flat
            .iter()
            .zip(&found)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        assert!(
            worst <= tolerance * largest,
            "{}: {worst} of {largest}",
            tensor.name
        );
        assert!(largest > 0.0, "{}: nothing was learnt", tensor.name);
    }
}

/// Every combination of tree, timing and what goes up, on that plane.
fn all_agree(plane: &str, jobs: &[Job], tolerance: f64) {
    if !can_have(plane) {
        return;
    }
    for job in jobs {
        for timing in ["eager", "lazy"] {
            let job = Job {
                rounds: 1,
                ..job.clone().with("timing", timing)
            };
            let place = Place::new(&job.file());
            let finished = place.finish(&["--plane", plane]).success();
            assert_eq!(finished.one("job_started")["plane"], plane);
            assert_flat_average(&finished, tolerance);
        }
    }
}

fn trees(job: impl Fn(&[u32]) -> Job) -> Vec<Job> {
    [&[1, 2, 5][..], &[1, 2, 3, 7]].into_iter().map(job).collect()
}

#[test]
fn networks_through_the_kernel_agree_with_flat_fedavg() {
    all_agree("sockmap", &trees(|levels| Job::digits(levels, "cnn")), 1e-6);
}

#[test]
fn networks_through_the_relay_agree_with_flat_fedavg() {
    all_agree("relay", &trees(|levels| Job::digits(levels, "cnn")), 1e-6);
}

#[test]
fn deltas_give_the_model_that_weights_give() {
    all_agree(
        "relay",
        &trees(|levels| Job::digits(levels, "mlp").with("updates", "deltas")),
        1e-6,
    );
}

#[test]
fn other_element_types_agree_within_their_rounding() {
    all_agree(
        "relay",
        &trees(|levels| Job::synthetic(levels, 10_001, "F64")),
        1e-12,
    );
    // One rounding a level, of 8 significant bits.
    all_agree(
        "relay",
        &trees(|levels| Job::synthetic(levels, 10_001, "BF16")),
        3.0 / 256.0,
    );
}

#[test]
fn uneven_shares_weigh_by_their_samples() {
    let job = Job::digits(&[1, 2, 4], "softmax").with(
        "partition",
        serde_json::json!({ "sort": "dirichlet", "alpha": 0.3 }),
    );
    all_agree("relay", &[job], 1e-6);
}

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    let job = Job::digits(&[1, 2, 4, 8], "cnn").with("timing", "lazy");
    let run = |seed: &str| {
        let place = Place::new(&job.file());
        place.finish(&["--seed", seed]).success();
        place.model()
    };
    let first = run("7");
    assert!(first == run("7"), "the same seed gave another model");
    assert!(first != run("8"), "another seed gave the same model");
}
