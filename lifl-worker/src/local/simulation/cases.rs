//! The jobs that are simulated: some thousand among the tests, and as many as one likes by `cargo xtask simulate`.

use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;
use crate::test_job;

/// Among the tests.
const CASES: u32 = 3000;

/// How many seconds jobs are simulated for, and the seed of the first.
const SECONDS: &str = "LIFL_SIMULATE_SECONDS";
const SEED: &str = "LIFL_SIMULATE_SEED";

/// How often a long simulation says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// What the top makes of the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Server {
    /// The model.
    Weights,
    /// What is added to the model; with some trainers' there may be no sum.
    Deltas { overflows: bool },
    /// What FedAdam steps by.
    Adam { deltas: bool },
}

/// A job, and what happens to it.
#[derive(Clone, Debug)]
struct Case {
    levels: Vec<u32>,
    timing: Timing,
    server: Server,
    goals: bool,
    quorum: u32,
    timeout_ms: Option<u32>,
    disturbance: Disturbance,
}

impl Case {
    fn job(&self) -> JobSpec {
        let updates = match self.server {
            Server::Weights | Server::Adam { deltas: false } => UpdateKind::Weights,
            Server::Deltas { .. } | Server::Adam { deltas: true } => UpdateKind::Deltas,
        };
        let mut job = job(&self.levels, self.timing, updates, self.goals);
        job.quorum = self.quorum;
        job.round_timeout_s = self.timeout_ms.map(|timeout| f64::from(timeout) / 1e3);
        if matches!(self.server, Server::Adam { .. }) {
            job.optimizer = Optimizer::FedAdam(Adaptive {
                tau: 0.01,
                ..Adaptive::default()
            });
        }
        job
    }

    fn run(&self) {
        Simulation::new(self.job(), self.disturbance).run();
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let levels = prop_oneof![
        Just(vec![1, 3]),
        Just(vec![1, 2, 4]),
        Just(vec![1, 3, 7]),
        Just(vec![1, 2, 4, 8]),
        Just(vec![1, 1, 2, 5])
    ];
    let server = prop_oneof![
        Just(Server::Weights),
        any::<bool>().prop_map(|overflows| Server::Deltas { overflows }),
        any::<bool>().prop_map(|deltas| Server::Adam { deltas }),
    ];
    let timing = prop_oneof![Just(Timing::Lazy), Just(Timing::Eager)];
    let timeout_ms = prop_oneof![Just(None), Just(Some(1_u32)), Just(Some(30))];
    let training = prop_oneof![Just(1_u64), Just(10), Just(100)];
    let disturbance = (any::<u64>(), 0_u32..12, training);
    let case = (
        levels,
        timing,
        server,
        any::<bool>(),
        1_u32..3,
        timeout_ms,
        disturbance,
    );
    case.prop_map(
        |(levels, timing, server, goals, quorum, timeout_ms, disturbance)| {
            let (seed, deaths, training) = disturbance;
            let disturbance = Disturbance {
                seed,
                deaths,
                overflows: server == Server::Deltas { overflows: true },
                training: Duration::from_millis(training),
            };
            Case {
                levels,
                timing,
                server,
                goals,
                quorum,
                timeout_ms,
                disturbance,
            }
        },
    )
}

/// The case of that number.
fn case_of(seed: u64) -> Case {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(ProptestConfig::default(), random);
    let drawn = any_case().new_tree(&mut runner);
    drawn.expect("nothing is filtered").current()
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.max(CASES),
        ..ProptestConfig::default()
    })]

    #[test]
    fn nothing_is_lost_and_nothing_counts_twice(case in any_case()) {
        case.run();
    }
}

#[test]
#[ignore = "takes as long as it is told: cargo xtask simulate"]
fn for_as_long_as_one_likes() {
    let time = Duration::from_secs(variable(SECONDS).unwrap_or(0));
    let first = variable(SEED).unwrap_or_else(|| RandomState::new().hash_one(0) >> 32);
    let (begun, mut said) = (Instant::now(), Duration::ZERO);
    for seed in first.. {
        let case = case_of(seed);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| case.run())) {
            eprintln!("seed {seed} fails: {case:#?}");
            eprintln!("again: cargo xtask simulate --seconds 0 --seed {seed}");
            resume_unwind(panic);
        }
        let (elapsed, jobs) = (begun.elapsed(), seed - first + 1);
        if elapsed >= time {
            eprintln!(
                "{jobs} jobs, from seed {first} to {seed}, in {} s",
                elapsed.as_secs()
            );
            return;
        }
        if elapsed - said >= SAY_EVERY {
            said = elapsed;
            eprintln!("{jobs} jobs, the last of seed {seed}");
        }
    }
}

/// A job of so many workers on each level. With `goals` the aggregators above trainers wait for all but one.
fn job(levels: &[u32], timing: Timing, updates: UpdateKind, goals: bool) -> JobSpec {
    let mut job = JobSpec {
        rounds: 5,
        timing,
        updates,
        grace_time_s: 2.0,
        ..test_job::job(levels)
    };
    let deepest = levels.len() - 1;
    for worker in job.workers.iter_mut().filter(|_| goals) {
        let level = worker.level as usize;
        worker.agg_goal = (level + 1 == deepest).then(|| (levels[deepest] / levels[level]).max(2) - 1);
    }
    job
}

#[test]
fn many_deaths_in_a_deep_tree() {
    let mut job = job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights, false);
    job.rounds = 61;
    let mut simulation = Simulation::new(job, deaths(1, 200, 10));
    simulation.run();
    assert!(simulation.deaths > 60, "{} died", simulation.deaths);
}

#[test]
fn covers_of_more_trainers_than_one_word_names_are_told_whole() {
    let mut job = job(&[1, 2, 4, 8], Timing::Lazy, UpdateKind::Weights, false);
    job.rounds = 11;
    for share in job.workers.iter_mut().filter_map(|worker| worker.share.as_mut()) {
        *share *= 40;
    }
    Simulation::new(job, deaths(5, 20, 1)).run();
}

#[test]
fn equal_seeds_replay() {
    let job = || job(&[1, 2, 4, 8], Timing::Eager, UpdateKind::Weights, true);
    let run = |seed| Simulation::new(job(), deaths(seed, 9, 20)).run();
    let first = run(3);
    assert_eq!(first, run(3));
    assert_ne!(first.0, run(4).0);
}

/// Nothing but so many deaths.
fn deaths(seed: u64, deaths: u32, training_ms: u64) -> Disturbance {
    Disturbance {
        seed,
        deaths,
        overflows: false,
        training: Duration::from_millis(training_ms),
    }
}
