//! Folding updates into one, beside reading them.
//!
//! `bytes_moved` counts each update's bytes once, and nothing else: the aggregate's own are written in the same time, and
//! whoever folds each update by itself has to read and write them again for each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use lifl_common::config::{Timing, UpdateKind};
use lifl_common::update::{DType, Schema, TensorSpec};
use memmap2::MmapMut;
use nix::sys::resource::UsageWho;
use serde_json::{Map, json};

use super::report::{Measured, Reporter, Seconds};
use super::{AggregateArgs, Arrival, Scene, machine};
use lifl_aggregate::{Input, Rule, Threads, WeightedMean, scratch_bytes};

/// Of the memory that can be had, what a case may take.
const MOST_MEMORY: f64 = 0.7;

/// How long a case is measured, and how often at the least and at the most.
const TIME: Duration = Duration::from_secs(2);
const RUNS: std::ops::RangeInclusive<usize> = 5..=200;

pub(super) fn run(args: &AggregateArgs, scene: &Scene, reporter: &mut Reporter<'_>) -> anyhow::Result<()> {
    let cores = machine::cores();
    let threads: Vec<usize> = match &args.threads[..] {
        [] if cores == 1 => vec![1],
        [] => vec![1, cores],
        chosen => chosen.iter().map(|&count| count.max(1) as usize).collect(),
    };
    let filling = machine::threads(cores)?;
    for &bytes in &args.bytes {
        // Whole elements of any type.
        let bytes = bytes as usize / 8 * 8;
        let mut updates: Vec<MmapMut> = Vec::new();
        let mut out = None;
        for &count in &args.updates {
            let case = json!({ "bytes": bytes, "updates": count });
            let room = machine::available_bytes() + (updates.len() * bytes) as u64;
            // The slot, and what an eager aggregate keeps beside it: twice that, of 16-bit floats.
            let needed = (count as u64 + 4) * bytes as u64;
            if needed as f64 > room as f64 * MOST_MEMORY {
                let why = format!("{needed} bytes needed, {room} can be had");
                reporter.skipped("aggregate", &case, &why);
                continue;
            }
            while updates.len() < count as usize {
                scene.check()?;
                updates.push(machine::buffer(&filling, bytes, updates.len())?);
            }
            let out = match &mut out {
                Some(out) => out,
                None => out.insert(machine::buffer(&filling, bytes, 0)?),
            };
            for &threads in &threads {
                let pool = machine::threads(threads)?;
                let data: Vec<&[u8]> = updates[..count as usize]
                    .iter()
                    .map(|update| &update[..])
                    .collect();
                let read = machine::read_bandwidth(&pool, &data);
                reporter.memory(threads, read);
                for &dtype in &args.dtype {
                    for &arrival in &args.timing {
                        scene.check()?;
                        reporter.result(one(&data, out, dtype, arrival, threads, read)?);
                    }
                }
            }
        }
    }
    Ok(())
}

fn one(
    updates: &[&[u8]],
    out: &mut [u8],
    dtype: DType,
    arrival: Arrival,
    threads: usize,
    read: f64,
) -> anyhow::Result<Measured> {
    machine::forget_peak();
    let bytes = out.len();
    let tensor = TensorSpec::new("weights", dtype, [bytes / dtype.bytes()]);
    let schema = Arc::new(Schema::new(vec![tensor])?);
    let timing = match arrival {
        Arrival::Lazy => Timing::Lazy,
        Arrival::Eager | Arrival::EagerTogether => Timing::Eager,
    };
    let mut aggregate = WeightedMean::new(
        Arc::clone(&schema),
        UpdateKind::Weights,
        timing,
        Threads::new(threads)?,
    );
    let inputs: Vec<Input<'_>> = updates
        .iter()
        .zip(600..)
        .map(|(data, samples)| Input { data, samples })
        .collect();
    let together: Vec<&[Input<'_>]> = match arrival {
        // As an aggregator does: the first is not folded alone.
        Arrival::Eager => {
            let (first, others) = inputs.split_at(inputs.len().min(2));
            std::iter::once(first).chain(others.chunks(1)).collect()
        }
        Arrival::Lazy | Arrival::EagerTogether => vec![&inputs[..]],
    };
    let (last, before) = together.split_last().context("no updates")?;
    let mut once = || -> anyhow::Result<f64> {
        let begun = Instant::now();
        aggregate.reset();
        for inputs in before {
            aggregate.fold(out, inputs)?;
        }
        aggregate.finish(out, last)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    // What is touched for the first time is touched here.
    once()?;
    let cpu = machine::cpu_seconds(UsageWho::RUSAGE_SELF);
    let begun = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < *RUNS.start() || (seconds.len() < *RUNS.end() && begun.elapsed() < TIME) {
        seconds.push(once()?);
    }
    let cpu = machine::cpu_seconds(UsageWho::RUSAGE_SELF) - cpu;
    let seconds = Seconds::of(seconds);
    let bytes_moved = (updates.len() * bytes) as u64;
    let arrival = match arrival {
        Arrival::Lazy => "lazy",
        Arrival::Eager => "eager",
        Arrival::EagerTogether => "eager-together",
    };
    let mut more = Map::new();
    more.insert("scratch_bytes".to_owned(), scratch_bytes(&schema, timing).into());
    Ok(Measured {
        bench: "aggregate",
        case: json!({
            "bytes": bytes, "updates": updates.len(), "dtype": dtype.to_string(), "timing": arrival, "threads": threads,
        }),
        share_of_read: Some(bytes_moved as f64 / seconds.median / read),
        cpu_seconds: Some(cpu / seconds.runs as f64),
        peak_memory_bytes: machine::peak_bytes(),
        seconds,
        bytes_moved,
        more,
    })
}
