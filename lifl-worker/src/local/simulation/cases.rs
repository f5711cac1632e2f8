//! The jobs that are simulated: some thousand among the tests, and as many as one likes by `cargo xtask simulate`.

use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;
use crate::coordinator::membership::Membership;
use crate::coordinator::pairing::pair;

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
    let disturbance = (any::<u64>(), 0_u32..12, 0_u32..4, 0_u32..3, training);
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
            let (seed, deaths, freezes, daemon_deaths, training) = disturbance;
            let disturbance = Disturbance {
                seed,
                deaths,
                freezes,
                daemon_deaths,
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
    let deepest = levels.len() - 1;
    let group = |level: usize| {
        Some(Group {
            channel: format!("channel-{level}"),
            group: "default".to_owned(),
        })
    };
    let worker = |level: usize, number: u32| WorkerSpec {
        name: format!("worker-{level}-{number}"),
        role: format!("role-{level}"),
        task_id: None,
        kind: match level {
            0 => Kind::Top,
            level if level == deepest => Kind::Trainer,
            _ => Kind::Aggregator,
        },
        level: level as u32,
        up: level.checked_sub(1).and_then(group),
        down: group(level).filter(|_| level < deepest),
        transport: Transport::Shm,
        agg_goal: (goals && level + 1 == deepest).then(|| (levels[deepest] / levels[level]).max(2) - 1),
        select: None,
        share: (level == deepest).then_some(number),
        dataset: None,
    };
    let numbers = |(level, &count): (usize, &u32)| (0..count).map(move |number| (level, number));
    let workers = levels.iter().enumerate().flat_map(numbers);
    JobSpec {
        id: "simulated".to_owned(),
        name: "simulated".to_owned(),
        rounds: 5,
        seed: 7,
        timing,
        updates,
        workers: workers.map(|(level, number)| worker(level, number)).collect(),
        brokers: Brokers::default(),
        model: ModelSpec::Synthetic {
            parameters: PARAMETERS as u64,
            dtype: DType::F32,
        },
        samples: SampleShape::default(),
        base_model: None,
        training: TrainingSpec {
            epochs: 1,
            batch_size: 1,
            learning_rate: 0.1,
            weight_decay: 0.0,
            proximal_mu: 0.0,
        },
        optimizer: Optimizer::FedAvg,
        data: None,
        quorum: 1,
        round_timeout_s: None,
        grace_time_s: 2.0,
        spin_us: 0,
        max_run_time_s: 300,
    }
}

/// It may have an update of the round before whose parent died before it passed the verdict on.
#[test]
fn an_aggregator_with_nobody_to_aggregate_is_told_that_the_round_begins() {
    let job = Arc::new(job(&[1, 2, 1], Timing::Lazy, UpdateKind::Weights, false));
    let mut membership = Membership::new(COORDINATOR, Arc::clone(&job), vec![1; 4]);
    for (at, spec) in job.workers.iter().enumerate() {
        let id = WorkerId(10 + at as u32);
        membership.joined(id, &spec.name);
        membership.ready(id);
    }
    membership.plan(1, pair(&job.workers, |_| true));
    let begins = membership.announce().into_iter();
    let begins = begins.filter(|frame| frame.kind == FrameKind::Begin as u16);
    let begins: Vec<(WorkerId, u64)> = begins.map(|frame| (frame.to, frame.value)).collect();
    assert!(begins.contains(&(WorkerId(12), 0)), "{begins:?}");
    assert_eq!(begins.len(), job.workers.len());
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
        freezes: 0,
        daemon_deaths: 0,
        overflows: false,
        training: Duration::from_millis(training_ms),
    }
}
