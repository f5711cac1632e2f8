//! Failures: what has become of each worker's process and connection, and whether another is started in its place.
//!
//! ```text
//!                its process ends, or its connection             both have ended
//!   at work ─────────────────────────────────────────▶ lost ───────────────────────▶ another is started ── ready ──▶ at work
//!      ▲                                                 └── too often since it finished a round, or remote ──▶ given up
//!      └── hangs: it is killed
//! ```
//!
//! Nobody waits for a worker from the first sign of its death on; the death is told when its process has been reaped, so that
//! all that it had to say is in its log. A process that has closed its connection and does not end is killed.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// How often a worker may die, or fail to start, without having finished a round in between before it is given up.
pub const MOST_DEATHS: u32 = 3;

/// How long to wait before a process is started again that could not be.
const START_AGAIN: Duration = Duration::from_secs(1);

/// How long a process may take to end whose connection is closed.
const LEAVE: Duration = Duration::from_secs(2);

/// How long a successor may take from its start until it is ready, at the least.
const START_TIME: Duration = Duration::from_secs(30);

/// Why a worker's process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillReason {
    /// A successor has had its time to become ready.
    NotReady,
    /// It was asked for a sign of life, and has given none in the grace time.
    Hangs,
    /// A trainer has not answered long after its round was to end.
    Straggles,
    /// A top has lent what is no model of the round.
    BadModel,
    /// Its connection is closed and it has not ended.
    Disconnected,
    /// The same of one beyond the node's shared memory: its session with the gateway is over.
    SessionOver,
}

impl fmt::Display for KillReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "it did not become ready",
            Self::Hangs => "it does not stir",
            Self::Straggles => "it owes an update",
            Self::BadModel => "its model is not the job's",
            Self::Disconnected => "its connection to the daemon was closed",
            Self::SessionOver => "its session with the gateway was over",
        })
    }
}

/// One worker's process and connection.
#[derive(Debug, Default)]
struct Life {
    remote: bool,
    running: bool,
    registered: bool,
    /// It is dead, and no successor has been started.
    lost: bool,
    /// That has been told.
    told: bool,
    given_up: bool,
    /// A start has been asked for that is not answered yet.
    starting: bool,
    deaths: u32,
    /// When it was started as a successor, until it is ready.
    started: Option<Duration>,
    /// When its connection was closed, while its process runs.
    closed: Option<Duration>,
    killed: Option<KillReason>,
    /// No successor is started before that: the last attempt has failed.
    not_before: Duration,
}

/// The processes and connections of all workers, by their index in the job.
#[derive(Debug)]
pub struct Failures {
    lives: Vec<Life>,
    /// Those who are lost and not given up.
    lost: BTreeSet<usize>,
    /// When which worker's state is to be looked at.
    deadlines: BTreeSet<(Duration, usize)>,
    start_time: Duration,
}

impl Failures {
    /// Of workers whose processes have all been started; by worker whether it is
    /// [remote](lifl_common::config::WorkerSpec::is_remote): such a one is not started again.
    pub fn new(remote: impl Iterator<Item = bool>, grace: Duration) -> Self {
        let life = |remote| Life {
            remote,
            running: true,
            ..Life::default()
        };
        Self {
            lives: remote.map(life).collect(),
            lost: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            start_time: START_TIME.max(grace),
        }
    }

    /// Its connection, or its proxy's, is there.
    pub fn registered(&mut self, worker: usize) {
        self.lives[worker].registered = true;
    }

    /// Its connection, or its proxy's, is closed. Gives whether that is the first sign of its death.
    pub fn connection_closed(&mut self, worker: usize, now: Duration) -> bool {
        let life = &mut self.lives[worker];
        life.registered = false;
        if life.running && life.closed.is_none() {
            life.closed = Some(now);
            self.deadlines.insert((now + LEAVE, worker));
        }
        self.died(worker)
    }

    /// Its process has ended and been reaped. Gives whether that is the first sign of its death.
    pub fn process_ended(&mut self, worker: usize) -> bool {
        let life = &mut self.lives[worker];
        life.running = false;
        life.closed = None;
        self.died(worker)
    }

    fn died(&mut self, worker: usize) -> bool {
        let life = &mut self.lives[worker];
        if std::mem::replace(&mut life.lost, true) {
            return false;
        }
        life.deaths += 1;
        life.started = None;
        self.lost.insert(worker);
        if life.remote || life.deaths > MOST_DEATHS {
            self.give_up(worker);
        }
        true
    }

    fn give_up(&mut self, worker: usize) {
        self.lives[worker].given_up = true;
        self.lost.remove(&worker);
    }

    /// Whether no successor will be started.
    pub fn is_given_up(&self, worker: usize) -> bool {
        self.lives[worker].given_up
    }

    /// What is to be told of a death whose process ended like that; nothing if it has been told.
    pub fn tell(&mut self, worker: usize, how: String) -> Option<String> {
        let life = &mut self.lives[worker];
        if std::mem::replace(&mut life.told, true) {
            return None;
        }
        let killed = life.killed.take();
        Some(killed.map_or(how, |why| format!("{why}, so it was ended")))
    }

    /// Who is wholly gone, and in whose place another can be started now.
    pub fn startable(&self, now: Duration) -> Vec<usize> {
        let startable = |&worker: &usize| {
            let life = &self.lives[worker];
            !life.running && !life.registered && !life.starting && life.not_before <= now
        };
        self.lost.iter().copied().filter(startable).collect()
    }

    /// A successor's start has been asked for.
    pub fn starting(&mut self, worker: usize) {
        self.lives[worker].starting = true;
    }

    /// A successor's process has been started.
    pub fn started(&mut self, worker: usize, now: Duration) {
        self.lost.remove(&worker);
        self.deadlines.insert((now + self.start_time, worker));
        let life = &mut self.lives[worker];
        (life.starting, life.lost, life.told, life.running) = (false, false, false, true);
        (life.started, life.killed) = (Some(now), None);
    }

    /// A successor's process could not be started: it is tried again, or given up.
    pub fn not_started(&mut self, worker: usize, now: Duration) {
        let life = &mut self.lives[worker];
        life.starting = false;
        life.deaths += 1;
        life.not_before = now + START_AGAIN;
        if life.deaths > MOST_DEATHS {
            self.give_up(worker);
        } else {
            self.deadlines.insert((now + START_AGAIN, worker));
        }
    }

    /// It can begin.
    pub fn ready(&mut self, worker: usize) {
        self.lives[worker].started = None;
    }

    /// It has finished a round: it may die as often again.
    pub fn round_finished(&mut self, worker: usize) {
        self.lives[worker].deaths = 0;
    }

    /// It is to be killed. Gives whether its process runs and has not been killed yet.
    pub fn kill(&mut self, worker: usize, why: KillReason) -> bool {
        let life = &mut self.lives[worker];
        life.started = None;
        let first = life.running && life.killed.is_none();
        if first {
            life.killed = Some(why);
        }
        first
    }

    /// Who is to be killed now: it has not become ready, or has not left, in its time.
    pub fn overdue(&mut self, now: Duration) -> Vec<(usize, KillReason)> {
        let mut overdue = Vec::new();
        while let Some(&(when, worker)) = self.deadlines.first().filter(|(when, _)| *when <= now) {
            self.deadlines.remove(&(when, worker));
            let life = &mut self.lives[worker];
            let start_time = self.start_time;
            if life.started.take_if(|at| *at + start_time <= now).is_some() {
                overdue.push((worker, KillReason::NotReady));
            }
            if life.closed.take_if(|at| *at + LEAVE <= now).is_some() {
                let why = match life.remote {
                    true => KillReason::SessionOver,
                    false => KillReason::Disconnected,
                };
                overdue.push((worker, why));
            }
        }
        overdue
    }

    /// When something is due at the earliest.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadlines.first().map(|(when, _)| *when)
    }
}
