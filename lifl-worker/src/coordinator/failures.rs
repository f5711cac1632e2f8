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
//! all that it had to say is in its log. A process that has closed its connection and does not end is killed. A name that
//! stays registered though its process has been reaped is another process's, of the same user: without it there is no successor,
//! and the worker is given up, or the job if it is an aggregator.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// How often a worker may die, or fail to start, without having finished a round in between before it is given up.
pub const MOST_DEATHS: u32 = 3;

/// How long to wait before a process is started again that could not be.
const START_AGAIN: Duration = Duration::from_secs(1);

/// How long a process may take to end whose connection is closed.
const LEAVE: Duration = Duration::from_secs(2);

/// How long a name may stay registered whose process has been reaped: the daemon notices a death at once.
const VACANT: Duration = Duration::from_secs(5);

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

/// How far the failover of a worker is, from the first sign of its death until its successor is ready.
#[derive(Debug)]
enum Failover {
    /// It is dead. What is `due`: its process, where it still runs, is killed; its name, where it is still registered, is looked
    /// up; a start that has failed is tried again.
    Lost { due: Option<Duration> },
    /// Its successor's start has been asked for.
    Starting,
    /// Its successor is `due` to be ready.
    NotReady { due: Duration },
}

impl Failover {
    fn due(&self) -> Option<Duration> {
        match self {
            Self::Lost { due } => *due,
            Self::Starting => None,
            Self::NotReady { due } => Some(*due),
        }
    }
}

/// One worker's process and connection.
#[derive(Debug, Default)]
struct Process {
    remote: bool,
    running: bool,
    registered: bool,
    given_up: bool,
    deaths: u32,
    killed: Option<KillReason>,
}

/// What is to be done since a time is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overdue {
    /// Its process is to be killed.
    Kill(KillReason),
    /// Its process has been reaped and its name is still registered: by whom is to be looked up.
    NameHeld,
}

/// The processes and connections of all workers, by their index in the job.
#[derive(Debug)]
pub(super) struct Failures {
    processes: Vec<Process>,
    failovers: BTreeMap<usize, Failover>,
    start_time: Duration,
}

impl Failures {
    /// Of workers whose processes have all been started; by worker whether it is
    /// [remote](lifl_common::config::WorkerSpec::is_remote): such a one is not started again.
    pub(super) fn new(remote: impl Iterator<Item = bool>, grace: Duration) -> Self {
        let process = |remote| Process {
            remote,
            running: true,
            ..Process::default()
        };
        Self {
            processes: remote.map(process).collect(),
            failovers: BTreeMap::new(),
            start_time: START_TIME.max(grace),
        }
    }

    /// Its connection, or its proxy's, is there.
    pub(super) fn registered(&mut self, worker: usize) {
        self.processes[worker].registered = true;
    }

    /// Its connection, or its proxy's, is closed. Gives whether that is the first sign of its death.
    pub(super) fn connection_closed(&mut self, worker: usize, now: Duration) -> bool {
        let process = &mut self.processes[worker];
        process.registered = false;
        let due = process.running.then(|| now + LEAVE);
        self.died(worker, due)
    }

    /// Its process has ended and been reaped. Gives whether that is the first sign of its death.
    pub(super) fn process_ended(&mut self, worker: usize, now: Duration) -> bool {
        let process = &mut self.processes[worker];
        process.running = false;
        let due = process.registered.then(|| now + VACANT);
        self.died(worker, due)
    }

    fn died(&mut self, worker: usize, next: Option<Duration>) -> bool {
        let process = &mut self.processes[worker];
        match self.failovers.get_mut(&worker) {
            Some(Failover::Lost { due }) => *due = next,
            Some(Failover::Starting) => {}
            Some(Failover::NotReady { .. }) | None => {
                process.deaths += 1;
                self.failovers.insert(worker, Failover::Lost { due: next });
                if process.remote || process.deaths > MOST_DEATHS {
                    self.give_up(worker);
                }
                return true;
            }
        }
        false
    }

    /// No successor is started any more.
    pub(super) fn give_up(&mut self, worker: usize) {
        self.processes[worker].given_up = true;
    }

    /// Whether no successor will be started.
    pub(super) fn is_given_up(&self, worker: usize) -> bool {
        self.processes[worker].given_up
    }

    /// Whether its name keeps a successor from being started.
    pub(super) fn is_name_held(&self, worker: usize) -> bool {
        let process = &self.processes[worker];
        let lost = matches!(self.failovers.get(&worker), Some(Failover::Lost { .. }));
        lost && !process.running && process.registered && !process.given_up
    }

    /// Whether a worker has died whose process has not been reaped.
    pub(super) fn is_anyone_dying(&self) -> bool {
        let mut failovers = self.failovers.iter();
        failovers.any(|(&worker, failover)| {
            matches!(failover, Failover::Lost { .. }) && self.processes[worker].running
        })
    }

    /// What the end of a process is called that has ended like that; `None` if the coordinator had it killed.
    pub(super) fn cause_of_death(&self, worker: usize, how: Option<String>) -> String {
        let killed = || match self.processes[worker].killed {
            Some(why) => format!("{why}, so it was ended"),
            None => "it was killed".to_owned(),
        };
        how.unwrap_or_else(killed)
    }

    /// Who is wholly gone, and in whose place another can be started now.
    pub(super) fn startable(&self, now: Duration) -> Vec<usize> {
        let startable = |(&worker, failover): (&usize, &Failover)| {
            let process = &self.processes[worker];
            let gone = !process.running && !process.registered && !process.given_up;
            let lost = matches!(failover, Failover::Lost { due } if due.is_none_or(|due| due <= now));
            (gone && lost).then_some(worker)
        };
        self.failovers.iter().filter_map(startable).collect()
    }

    /// A successor's start has been asked for.
    pub(super) fn starting(&mut self, worker: usize) {
        self.failovers.insert(worker, Failover::Starting);
    }

    /// A successor's process has been started.
    pub(super) fn started(&mut self, worker: usize, now: Duration) {
        let due = now + self.start_time;
        self.failovers.insert(worker, Failover::NotReady { due });
        let process = &mut self.processes[worker];
        (process.running, process.killed) = (true, None);
    }

    /// A successor's process could not be started: it is tried again, or given up.
    pub(super) fn not_started(&mut self, worker: usize, now: Duration) {
        self.processes[worker].deaths += 1;
        let due = Some(now + START_AGAIN);
        self.failovers.insert(worker, Failover::Lost { due });
        if self.processes[worker].deaths > MOST_DEATHS {
            self.give_up(worker);
        }
    }

    /// It can begin.
    pub(super) fn ready(&mut self, worker: usize) {
        if matches!(self.failovers.get(&worker), Some(Failover::NotReady { .. })) {
            self.failovers.remove(&worker);
        }
    }

    /// It has finished a round: it may die as often again.
    pub(super) fn round_finished(&mut self, worker: usize) {
        self.processes[worker].deaths = 0;
    }

    /// It is to be killed. Gives whether its process runs and has not been killed yet.
    pub(super) fn kill(&mut self, worker: usize, why: KillReason) -> bool {
        let process = &mut self.processes[worker];
        let first = process.running && process.killed.is_none();
        if first {
            process.killed = Some(why);
        }
        // It is not to become ready any more.
        self.ready(worker);
        first
    }

    /// Nobody could say by whom its name is held.
    pub(super) fn look_up_again(&mut self, worker: usize, now: Duration) {
        let due = Some(now + VACANT);
        self.failovers.insert(worker, Failover::Lost { due });
    }

    /// Whose time is over: it has not become ready, or has not left.
    pub(super) fn overdue(&mut self, now: Duration) -> Vec<(usize, Overdue)> {
        let mut overdue = Vec::new();
        for (&worker, failover) in &mut self.failovers {
            if failover.due().is_none_or(|due| now < due) {
                continue;
            }
            let process = &self.processes[worker];
            let what = match (&failover, process.running) {
                (Failover::NotReady { .. }, _) => Some(Overdue::Kill(KillReason::NotReady)),
                (_, true) if process.remote => Some(Overdue::Kill(KillReason::SessionOver)),
                (_, true) => Some(Overdue::Kill(KillReason::Disconnected)),
                (_, false) if process.registered && !process.given_up => Some(Overdue::NameHeld),
                (_, false) => None,
            };
            overdue.extend(what.map(|what| (worker, what)));
            if let Failover::Lost { due } = failover {
                *due = None;
            }
        }
        overdue
    }

    /// When something is due at the earliest.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        self.failovers.values().filter_map(Failover::due).min()
    }
}
