//! Sequences at random: deaths, starts that fail, answers that come late, frames that lie. What must hold whatever happens:
//! each round is begun and decided once, in order, and its model evaluated, told of, written and given back once; nobody is
//! started who runs or is given up; nobody is told anything that is not there; nothing comes after the end; and when all is
//! quiet nobody waits for the dead, and the job goes on to its end.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What has been asked of the driver and is not answered.
#[derive(Default)]
struct Asked {
    starts: Vec<usize>,
    status: bool,
    holder: Option<usize>,
    check: Option<LentModel>,
    evaluate: bool,
    write: bool,
}

struct World {
    driver: Driver,
    running: Vec<bool>,
    given_up: Vec<bool>,
    killed: Vec<bool>,
    asked: Asked,
    begun: u32,
    decided: u32,
    evaluated: u32,
    told: u32,
    written: u32,
    released: u32,
    /// Whom each parent waits for in the round that runs.
    children: BTreeMap<WorkerId, Vec<u64>>,
    naming: BTreeMap<WorkerId, Vec<u64>>,
    sent: u64,
    done: Option<Result<(), Failure>>,
    /// All that has been put out.
    log: Vec<Output>,
}

impl World {
    fn new() -> Self {
        let job = JobSpec {
            round_timeout_s: Some(10.0),
            grace_time_s: 5.0,
            quorum: 2,
            ..job()
        };
        let workers = job.workers.len();
        let mut world = Self {
            driver: Driver::new(job, 1),
            running: vec![true; workers],
            given_up: vec![false; workers],
            killed: vec![false; workers],
            asked: Asked::default(),
            begun: 0,
            decided: 0,
            evaluated: 0,
            told: 0,
            written: 0,
            released: 0,
            children: BTreeMap::new(),
            naming: BTreeMap::new(),
            sent: 0,
            done: None,
            log: Vec::new(),
        };
        world.driver.all_join();
        world.observe();
        world
    }

    fn id(&self, worker: usize) -> Option<WorkerId> {
        Some(self.driver.ids[worker]).filter(|id| *id != WorkerId::NONE)
    }

    /// Holds what has been put out against what must be.
    fn observe(&mut self) {
        for output in self.driver.take() {
            assert_eq!(self.done, None, "{output:?} comes after the end");
            self.log.push(output.clone());
            match output {
                Output::Send(frame) => self.sent(&frame),
                Output::Start(worker) => {
                    assert!(!self.running[worker] && self.id(worker).is_none() && !self.given_up[worker]);
                    assert!(!self.asked.starts.contains(&worker), "{worker} is started twice");
                    self.asked.starts.push(worker);
                }
                Output::Kill(worker) => {
                    assert!(self.running[worker], "{worker} does not run");
                    self.killed[worker] = true;
                }
                Output::DropProxy(_) | Output::MapArenas(_) => {}
                Output::AskStatus => assert!(!std::mem::replace(&mut self.asked.status, true)),
                Output::FindHolder(worker) => {
                    assert!(!self.running[worker] && self.id(worker).is_some() && !self.given_up[worker]);
                    self.asked.holder = Some(worker);
                }
                Output::CheckModel(lent) => assert_eq!(self.asked.check.replace(lent), None),
                Output::Decided { round, .. } => {
                    self.decided += 1;
                    assert_eq!((round, round), (self.decided, self.begun));
                    self.children.clear();
                }
                Output::Evaluate(round) => {
                    self.evaluated += 1;
                    assert_eq!((round, round), (self.evaluated, self.decided));
                    assert_eq!(self.released + 1, round, "the one before is given back");
                    self.asked.evaluate = true;
                }
                Output::Write { round, .. } => {
                    self.written += 1;
                    assert_eq!((round, round), (self.written, self.told));
                    self.asked.write = true;
                }
                Output::Report(event) => self.event(event),
                Output::Done(result) => self.done = Some(result),
            }
        }
    }

    fn sent(&mut self, frame: &Frame) {
        if frame.kind == FrameKind::Release as u16 {
            self.released += 1;
            assert_eq!((frame.round, frame.round), (self.released, self.written));
            return;
        }
        assert!(self.driver.ids.contains(&frame.to), "{frame:?} is to nobody");
        if frame.kind == FrameKind::Child as u16 {
            self.naming.entry(frame.to).or_default().push(frame.value);
        } else if frame.kind == FrameKind::Begin as u16 {
            let children = self.naming.remove(&frame.to).unwrap_or_default();
            assert_eq!(children.len() as u32, frame.covers);
            self.children.insert(frame.to, children);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::RoundBegins(round) => {
                self.begun += 1;
                assert_eq!((round, round), (self.begun, self.decided + 1));
            }
            Event::RoundDone(round) => {
                self.told += 1;
                assert_eq!((round, round), (self.told, self.evaluated));
            }
            Event::Worker { worker, what, .. } => match what {
                WorkerEvent::Lost {
                    restarting: false, ..
                }
                | WorkerEvent::NotStarted { given_up: true, .. } => self.given_up[worker] = true,
                WorkerEvent::Replaced => assert!(!self.given_up[worker]),
                _ => {}
            },
            _ => {}
        }
    }

    /// One thing happens, if it can.
    fn act(&mut self, action: u8, worker: usize, number: u32) {
        let id = self.id(worker);
        match action {
            0 if self.running[worker] => {
                (self.running[worker], self.killed[worker]) = (false, false);
                self.driver.exit(worker);
            }
            1 if id.is_some() => self.driver.disconnect(worker),
            2 if id.is_none() && self.running[worker] => self.driver.join(worker),
            3 => self.lend(),
            4 => self.answer_check(number.is_multiple_of(4)),
            5 => self.answer_examination(),
            6 => self.answer_status(number),
            7 => self.answer_start(number.is_multiple_of(3)),
            8 => self.driver.pass(Duration::from_millis(u64::from(number) * 100)),
            9 => self.driver.handle(Input::Suspended),
            10 => self.daemon_back(number),
            11 => {
                let from = id.unwrap_or(WorkerId(number));
                self.driver.frame(from, FrameKind::Pong, number % 4);
            }
            // Whatever a process of the user's may say.
            12 => self.driver.handle(Input::Frame(Frame {
                to: COORDINATOR,
                from: id.unwrap_or(WorkerId(number)),
                kind: (number % 15) as u16,
                refusal: (number % 27) as u16,
                round: number % 5,
                value: u64::from(number % 40),
                ..Frame::default()
            })),
            // A process of the user's takes a dead worker's name.
            13 if id.is_none() && !self.running[worker] => {
                self.driver.register(worker);
            }
            14 => self.answer_holder((!number.is_multiple_of(3)).then_some(number)),
            _ => {}
        }
        self.observe();
    }

    fn answer_holder(&mut self, holder: Option<u32>) {
        if let Some(worker) = self.asked.holder.take() {
            self.driver.handle(Input::NameTaken { worker, holder });
        }
    }

    /// The top lends what is to be the round's model, as often as one likes.
    fn lend(&mut self) {
        if self.id(TOP).is_some() {
            let (frame, _) = self.driver.model(self.begun);
            self.driver.handle(Input::Frame(frame));
        }
    }

    fn answer_check(&mut self, unreadable: bool) {
        let Some(lent) = self.asked.check.take() else {
            return;
        };
        let (_, honest) = self.driver.model(lent.model.round);
        let checked = if unreadable || lent.model.covers != 4 {
            Err("it is none".to_owned())
        } else {
            Ok(honest)
        };
        self.driver.handle(Input::Checked(checked));
    }

    fn answer_examination(&mut self) {
        if std::mem::take(&mut self.asked.evaluate) {
            self.driver.handle(Input::Evaluated { loss: None });
        } else if std::mem::take(&mut self.asked.write) {
            self.driver.handle(Input::Written { error: None });
        }
    }

    /// With numbers that have changed or not, or without a daemon.
    fn answer_status(&mut self, number: u32) {
        if !std::mem::take(&mut self.asked.status) {
            return;
        }
        match number % 3 {
            0 => self.driver.handle(Input::Status(None)),
            1 => self.driver.status(|_| 0),
            _ => {
                self.sent += 1;
                let sent = self.sent;
                self.driver.status(|_| sent);
            }
        }
    }

    fn answer_start(&mut self, fails: bool) {
        let Some(worker) = self.asked.starts.pop() else {
            return;
        };
        self.running[worker] = !fails;
        let result = if fails {
            Err("no process is left".to_owned())
        } else {
            Ok(())
        };
        self.driver.handle(Input::Started { worker, result });
    }

    /// The daemon has been away: some may have gone meanwhile.
    fn daemon_back(&mut self, number: u32) {
        for (worker, id) in self.driver.ids.iter_mut().enumerate() {
            if (number >> worker) & 0b11 == 0 {
                *id = WorkerId::NONE;
            }
        }
        let mut workers: Vec<WorkerId> = self.driver.ids.clone();
        workers.retain(|id| *id != WorkerId::NONE);
        workers.sort_unstable();
        self.driver.handle(Input::Daemon(DaemonEvent::Living {
            first: WorkerId(0),
            last: WorkerId(u32::MAX),
            workers,
        }));
    }

    /// Everybody does what it should until nothing is left to do.
    fn settle(&mut self) {
        for _ in 0..40 {
            while !self.asked.starts.is_empty() {
                self.answer_start(false);
                self.observe();
            }
            self.answer_check(false);
            self.answer_status(2);
            self.observe();
            for worker in 0..self.running.len() {
                match (self.running[worker], self.id(worker).is_some()) {
                    (true, _) if self.given_up[worker] || self.killed[worker] => self.act(0, worker, 0),
                    (true, false) => self.act(2, worker, 0),
                    (false, true) => self.act(1, worker, 0),
                    (true, true) => {
                        let id = self.driver.ids[worker];
                        // Said again, it changes nothing.
                        self.driver.frame(id, FrameKind::Ready, 0);
                        self.driver.frame(id, FrameKind::Pong, self.begun);
                    }
                    (false, false) => {}
                }
                self.observe();
            }
            self.driver.pass(Duration::from_millis(500));
            self.observe();
        }
    }

    fn run(&mut self) {
        for _ in 0..8 {
            self.settle();
            if self.done.is_some() {
                return;
            }
            if self.begun > self.decided {
                self.nobody_waits_for_the_dead();
            }
            self.lend();
            self.observe();
            self.answer_check(false);
            self.observe();
            for _ in 0..4 {
                self.answer_examination();
                self.observe();
            }
        }
    }

    fn nobody_waits_for_the_dead(&self) {
        for (parent, children) in &self.children {
            if self.driver.ids.contains(parent) {
                let dead = |child: &&u64| {
                    **child != 0 && !self.driver.ids.iter().any(|id| u64::from(id.0) == **child)
                };
                assert_eq!(
                    children.iter().find(dead),
                    None,
                    "{parent} waits for it in {children:?}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_happens_the_job_goes_on_to_its_end(
        actions in proptest::collection::vec((0_u8..15, 0_usize..9, 0_u32..600), 0..120),
    ) {
        let mut world = World::new();
        for (action, worker, number) in actions {
            world.act(action, worker, number);
        }
        world.run();
        let done = world.done.expect("it has an end");
        let rounds = world.driver.job.rounds;
        match done {
            Ok(()) => prop_assert_eq!((world.decided, world.released), (rounds, rounds)),
            Err(Failure::TooFewTrainers { trainers, .. }) => prop_assert!(trainers < 2),
            Err(Failure::WorkerGone { worker, .. }) => prop_assert_eq!(worker, TOP),
            Err(Failure::NameTaken { worker, .. }) => prop_assert!(!TRAINERS.contains(&worker)),
            Err(Failure::TopNotStarted { .. }) => {}
            Err(failure) => prop_assert!(false, "{:?}", failure),
        }
    }

    /// The same inputs give the same outputs.
    #[test]
    fn a_sequence_replays(
        actions in proptest::collection::vec((0_u8..15, 0_usize..9, 0_u32..600), 0..60),
    ) {
        let outputs = |actions: &[(u8, usize, u32)]| {
            let mut world = World::new();
            let mut timeouts = Vec::new();
            for &(action, worker, number) in actions {
                world.act(action, worker, number);
                timeouts.push(world.driver.coordinator.timeout());
            }
            world.run();
            (world.log, timeouts)
        };
        prop_assert_eq!(outputs(&actions), outputs(&actions));
    }
}
