//! Chaos: whole jobs whose workers, and daemon, are killed, stopped and delayed at random for as long as one likes, and whose
//! every update must be in the model exactly once, or named as left out.
//!
//! A few seconds of it are among the tests, in a program of their own: what the machine has is counted, so no other test may run
//! beside them. `cargo xtask chaos` has more. What happens is drawn from a seed, but not when it strikes: a seed gives the same
//! jobs and the same order of blows, and need not give the same end.

#[expect(dead_code, reason = "made for all the tests of whole runs")]
mod support;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use lifl_common::config::JobSpec;
use lifl_common::update::{Schema, Tensors, TensorsMut};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use serde_json::Value;

use support::node::Node;
use support::{Finished, Job, PATIENCE, Place, Started, can_have, named_workers};

/// How long each plane's chaos is to last, and what it is drawn from.
const SECONDS: &str = "LIFL_CHAOS_SECONDS";
const SEED: &str = "LIFL_CHAOS_SEED";

/// Among the tests.
const SHORT: Duration = Duration::from_secs(12);

/// An element of the model may be so far from that of an undisturbed job with the same participants.
const TOLERANCE: f64 = 1e-6;

/// A worker that dies oftener in one round is given up, which would end the job if it were the top.
const MOST_DEATHS_IN_A_ROUND: usize = 2;

/// How long a daemon lives at the least. Whoever hangs when it comes has to be given up by it first ([`support::node::GRACE`]): daemons that
/// die sooner than that, one after the other, keep such a worker's place for ever.
const DAEMON_LIVES: Duration = Duration::from_secs(5);

/// What the machine has is counted: one chaos at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[test]
fn workers_and_daemons_die_on_the_sockmap() {
    if can_have("sockmap") {
        chaos(true);
    }
}

#[test]
fn workers_die_on_the_relay() {
    chaos(false);
}

/// What has been done to a job, and what came of it.
#[derive(Debug, Default)]
struct Tally {
    jobs: u32,
    rounds: u64,
    killed: u64,
    stopped: u64,
    delayed: u64,
    daemons_killed: u64,
    lost: u64,
    replaced: u64,
    given_up: u64,
    updates: u64,
    left_out: u64,
    largest_difference: f64,
}

/// One job after the other, until the time is over.
fn chaos(pinned: bool) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poison| poison.into_inner());
    let number = |name| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().expect(name))
    };
    let seed = number(SEED).unwrap_or_else(rand_seed);
    let time = number(SECONDS).map_or(SHORT, Duration::from_secs);
    let plane = if pinned { "sockmap" } else { "relay" };
    println!("{plane}: chaos of seed {seed} for {time:.0?}");
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let before = huge_pages();
    let mut tally = Tally::default();
    let begun = Instant::now();
    while begun.elapsed() < time {
        let mut node = Node::start(pinned.then_some("chaos"));
        node.wait_until_it_listens();
        one_job(&mut node, &mut chance, pinned, &mut tally);
        nothing_is_left(node, &before);
    }
    println!("{plane}: seed {seed}: {tally:#?}");
}

/// A seed that nobody chose.
fn rand_seed() -> u64 {
    std::time::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_nanos() as u64)
}

/// A job of three levels, from its beginning to the check of its model.
fn one_job(node: &mut Node, chance: &mut ChaCha8Rng, daemons: bool, tally: &mut Tally) {
    let dtype = ["F32", "F64"][chance.random_range(0..2)];
    let timing = ["lazy", "eager"][chance.random_range(0..2)];
    // Models on either side of where arenas have huge pages.
    let mut job = Job::synthetic(&[1, 2, 4, 8], chance.random_range(10_000..400_000), dtype)
        .with("timing", timing)
        .with("spinMicros", [0, 50][chance.random_range(0..2)])
        .with("roundTimeout", 1.0)
        .with("graceTime", 1.0);
    job.rounds = 200;
    let seed = chance.random::<u32>().to_string();
    let mut place = Place::new(&job.file());
    // Whoever wants to know what went wrong finds it there.
    place.keep(true);
    println!(
        "  {dtype}, {timing}, seed {seed}: {}",
        place.folder.path().display()
    );
    let options = ["--checkpoint-every", "0", "--seed", &seed];
    let mut run = place.start_at(&node.socket(), &options);
    run.wait_for("job_started");
    let mut blows = Blows {
        spared: None,
        chance,
        daemons,
        deaths: HashMap::new(),
        resurrection: None,
        tally,
    };
    while run.is_running() {
        blows.strike(&place, &run, node);
        std::thread::sleep(Duration::from_millis(blows.chance.random_range(5..80)));
    }
    if blows.resurrection.is_some() {
        node.again();
    }
    let finished = run.wait().success();
    check(&finished, &place, tally);
    place.keep(false);
}

/// Who is hurt next.
struct Blows<'a> {
    chance: &'a mut ChaCha8Rng,
    /// Whether the daemon may be killed; if it is another one's successor, since when it lives.
    daemons: bool,
    spared: Option<Instant>,
    /// How many rounds were reported when each worker was made to die.
    deaths: HashMap<String, Vec<usize>>,
    /// When the dead daemon's successor is started.
    resurrection: Option<Instant>,
    tally: &'a mut Tally,
}

impl Blows<'_> {
    fn strike(&mut self, place: &Place, run: &Started, node: &mut Node) {
        if self.resurrection.is_some_and(|when| when <= Instant::now()) {
            self.resurrection = None;
            self.spared = Some(Instant::now());
            node.again();
        }
        let spared = self.spared.is_some_and(|since| since.elapsed() < DAEMON_LIVES);
        let mortal = self.daemons && self.resurrection.is_none() && !spared;
        if mortal && self.chance.random_ratio(1, 8) {
            node.kill();
            self.tally.daemons_killed += 1;
            let away = Duration::from_millis(self.chance.random_range(0..1500));
            self.resurrection = Some(Instant::now() + away);
            return;
        }
        let workers = named_workers(&place.run());
        if workers.is_empty() {
            return;
        }
        let round = run
            .events()
            .iter()
            .filter(|event| event["event"] == "round")
            .count();
        let (name, pid) = &workers[self.chance.random_range(0..workers.len())];
        let deaths = self.deaths.entry(name.clone()).or_default();
        // A round is reported while the next one runs.
        deaths.retain(|then| then + 1 >= round);
        if deaths.len() >= MOST_DEATHS_IN_A_ROUND {
            return;
        }
        match self.chance.random_range(0..20) {
            // Until the coordinator ends it.
            0 => {
                deaths.push(round);
                self.tally.stopped += u64::from(send(*pid, Signal::SIGSTOP));
            }
            1..=5 => {
                if send(*pid, Signal::SIGSTOP) {
                    self.tally.delayed += 1;
                    std::thread::sleep(Duration::from_millis(self.chance.random_range(1..300)));
                    send(*pid, Signal::SIGCONT);
                }
            }
            _ => {
                deaths.push(round);
                self.tally.killed += u64::from(send(*pid, Signal::SIGKILL));
            }
        }
    }
}

/// Sends a signal to a process that may have gone by itself; says whether it was there.
fn send(pid: i32, signal: Signal) -> bool {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) => true,
        Err(Errno::ESRCH) => false,
        Err(errno) => panic!("{signal} to {pid}: {errno}"),
    }
}

/// Every update is in the model once, or named as left out; and the model is the average of those that are in it.
fn check(finished: &Finished, place: &Place, tally: &mut Tally) {
    let text = fs::read(finished.run.join("job.json")).expect("the run's job");
    let job: JobSpec = serde_json::from_slice(&text).expect("a job");
    let trainers: Vec<&str> = job.trainers().map(|trainer| trainer.name.as_str()).collect();
    let rounds = finished.all("round");
    assert_eq!(rounds.len(), job.rounds as usize);
    let mut flat = FlatAverage::new(&job);
    for (number, round) in (1..).zip(&rounds) {
        assert_eq!(round["round"], number, "{round}");
        let left_out: BTreeSet<&str> = strings(&round["left_out"]).collect();
        assert_eq!(
            left_out.len(),
            strings(&round["left_out"]).count(),
            "one twice: {round}"
        );
        let shares = 0..trainers.len() as u32;
        let within: Vec<u32> = shares
            .filter(|&share| !left_out.contains(trainers[share as usize]))
            .collect();
        assert_eq!(
            within.len() + left_out.len(),
            trainers.len(),
            "an unknown one: {round}"
        );
        assert_eq!(round["trainers"], within.len(), "{round}");
        let samples = flat.round(number, &within);
        assert_eq!(round["samples"], samples, "{round}");
        tally.updates += within.len() as u64;
        tally.left_out += left_out.len() as u64;
    }
    let difference = flat.difference(&place.model());
    assert!(difference <= TOLERANCE, "the model is off by {difference:e}");
    tally.largest_difference = tally.largest_difference.max(difference);
    tally.jobs += 1;
    tally.rounds += rounds.len() as u64;
    let lost = finished.all("worker_lost");
    tally.given_up += lost.iter().filter(|lost| lost["restarting"] == false).count() as u64;
    tally.lost += lost.len() as u64;
    tally.replaced += finished.all("worker_replaced").len() as u64;
}

fn strings(list: &Value) -> impl Iterator<Item = &str> {
    list.as_array()
        .expect("a list")
        .iter()
        .map(|name| name.as_str().expect("a name"))
}

/// The same job without a tree, in this process: FedAvg (McMahan et al. 2017, algorithm 1) over each round's participants, summed
/// in 64 bits. Between rounds the model is of the job's type, as trainers get it.
struct FlatAverage<'a> {
    job: &'a JobSpec,
    schema: Schema,
    model: Vec<u8>,
}

impl<'a> FlatAverage<'a> {
    fn new(job: &'a JobSpec) -> Self {
        let schema = lifl_learn::schema(&job.model).expect("a schema");
        let mut model = vec![0; schema.data_bytes()];
        lifl_learn::initial(&job.model, job.seed, TensorsMut::new(&schema, &mut model));
        Self { job, schema, model }
    }

    /// A round with those trainers; gives the samples behind it. With none the model stays.
    fn round(&mut self, round: u32, shares: &[u32]) -> u64 {
        let mut sum = vec![0.0; numbers(&self.schema, &self.model).len()];
        let mut samples = 0;
        for &share in shares {
            let mut trainers = self.job.trainers();
            let trainer = trainers.find(|trainer| trainer.share == Some(share));
            let trainer = trainer.expect("a trainer");
            let part = self.job.part_of(trainer);
            let mut learner = lifl_learn::for_trainer(self.job, trainer, part).expect("a learner");
            let mut update = vec![0; self.model.len()];
            let model = Tensors::new(&self.schema, &self.model);
            let trained = learner.train(round, model, TensorsMut::new(&self.schema, &mut update));
            let weight = trained.expect("trained").samples;
            for (sum, x) in sum.iter_mut().zip(numbers(&self.schema, &update)) {
                *sum += x * weight as f64;
            }
            samples += weight;
        }
        if samples > 0 {
            let mean = sum.into_iter().map(|sum| sum / samples as f64);
            self.model = match size(&self.schema) {
                8 => mean.flat_map(f64::to_le_bytes).collect(),
                _ => mean.flat_map(|x| (x as f32).to_le_bytes()).collect(),
            };
        }
        samples
    }

    /// How far the farthest element of a model is from this one.
    fn difference(&self, model: &[u8]) -> f64 {
        let file = SafeTensors::deserialize(model).expect("safetensors");
        assert_eq!(file.len(), 1);
        let (_, tensor) = file.tensors().remove(0);
        let (ours, theirs) = (
            numbers(&self.schema, &self.model),
            numbers(&self.schema, tensor.data()),
        );
        assert_eq!(ours.len(), theirs.len());
        let pairs = ours.iter().zip(theirs);
        // A NaN is as far as can be.
        pairs
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, |most, x| if x <= most { most } else { x })
    }
}

/// Bytes of an element of a model of one type.
fn size(schema: &Schema) -> usize {
    schema.regions()[0].dtype.bytes()
}

fn numbers(schema: &Schema, bytes: &[u8]) -> Vec<f64> {
    match size(schema) {
        8 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|eight| f64::from_le_bytes(*eight))
            .collect(),
        _ => bytes
            .as_chunks()
            .0
            .iter()
            .map(|four| f32::from_le_bytes(*four).into())
            .collect(),
    }
}

/// Ends the daemon: no job, worker, memory, pin, socket's file or huge page may remain. That no worker's process does, the run's
/// end has shown.
fn nothing_is_left(mut node: Node, before: &[String]) {
    node.wait_until_it_listens();
    node.wait_until_nothing_is_registered();
    node.wait_until_it_has_no_memory();
    node.end();
    let begun = Instant::now();
    loop {
        let now = huge_pages();
        if now == before {
            return;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "huge pages: {before:?} before, {now:?} now"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The kernel's counts of its huge pages.
fn huge_pages() -> Vec<String> {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let lines = text.lines().filter(|line| line.starts_with("HugePages_"));
    lines.map(str::to_owned).collect()
}
