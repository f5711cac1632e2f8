//! A round's policy: who takes part, when it may begin, and when it goes on without those who have not answered.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use lifl_common::config::{JobSpec, WorkerSpec};

use super::pairing::{Pair, pair, select};

/// How often the daemon's counters are looked at while a round is to be closed.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How often in the grace time they are, to see who hangs.
const LOOKS_A_GRACE_TIME: u32 = 10;

/// Whether a round can begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It can.
    Begin,
    /// Not before more trainers are there, which are awaited.
    Wait,
    /// It never can.
    Never,
}

/// What decides about rounds. Times are since the round began, as far as the coordinator has been running.
pub trait RoundPolicy: fmt::Debug + Send {
    /// The parents and children of a round, of those workers who are present.
    fn pair(
        &self,
        round: u32,
        workers: &[WorkerSpec],
        present: &dyn Fn(usize) -> bool,
    ) -> BTreeMap<usize, Pair>;

    /// Whether a round can begin in which so many trainers would take part, while so many more are awaited.
    fn admit(&self, trainers: u32, awaited: usize) -> Admission;

    /// When the daemon's counters are to be looked at next. `closed` is whether the round is closed already.
    fn next_look(&self, looked: Duration, closed: bool) -> Duration;

    /// Whether the round is to be closed, so many trainers having answered: whoever has not is waited for no more.
    fn closes(&self, elapsed: Duration, answered: u32) -> bool;

    /// Whether trainers that still have not answered are to be killed.
    fn kills_stragglers(&self, elapsed: Duration) -> bool;
}

/// Synchronous rounds: each waits for everybody, or for a quorum once `roundTimeout` is over.
#[derive(Clone, Debug)]
pub struct Synchronous {
    seed: u64,
    quorum: u32,
    timeout: Option<Duration>,
    grace: Duration,
}

impl Synchronous {
    /// As the job's file says.
    pub fn new(job: &JobSpec) -> Self {
        Self {
            seed: job.seed,
            quorum: job.quorum,
            timeout: job.round_timeout_s.map(Duration::from_secs_f64),
            grace: Duration::from_secs_f64(job.grace_time_s),
        }
    }
}

impl RoundPolicy for Synchronous {
    fn pair(
        &self,
        round: u32,
        workers: &[WorkerSpec],
        present: &dyn Fn(usize) -> bool,
    ) -> BTreeMap<usize, Pair> {
        let mut pairs = pair(workers, present);
        select(workers, &mut pairs, self.seed, round);
        pairs
    }

    fn admit(&self, trainers: u32, awaited: usize) -> Admission {
        match (trainers >= self.quorum, awaited) {
            (true, _) => Admission::Begin,
            (false, 0) => Admission::Never,
            (false, _) => Admission::Wait,
        }
    }

    fn next_look(&self, looked: Duration, closed: bool) -> Duration {
        let hanging = self.grace.max(looked + self.grace / LOOKS_A_GRACE_TIME);
        // Trainers are asked whether they have answered before the time is over.
        let closing = self.timeout.filter(|_| !closed);
        let closing = closing.map(|timeout| timeout.saturating_sub(LOOK_EVERY).max(looked + LOOK_EVERY));
        closing.map_or(hanging, |closing| closing.min(hanging))
    }

    fn closes(&self, elapsed: Duration, answered: u32) -> bool {
        self.timeout.is_some_and(|timeout| elapsed >= timeout) && answered >= self.quorum
    }

    fn kills_stragglers(&self, elapsed: Duration) -> bool {
        self.timeout
            .is_some_and(|timeout| elapsed > timeout.saturating_add(self.grace))
    }
}
