//! Drives the coordinator's state machine: passes it what comes from frames, daemon and processes, and does what it wants done.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use lifl_common::arena::Layout;
use lifl_common::config::Kind;
use lifl_common::control::{Event as DaemonEvent, GatewayStatus, JobTraffic, Status};
use lifl_common::frame::Frame;
use lifl_common::id::WorkerId;
use lifl_learn::Known;
use lifl_worker::coordinator::{
    Coordinator, Event as Decision, Failure as JobFailure, Input, MOST_DEATHS, Output, Synchronous,
    WorkerEvent,
};

use super::daemon::Node;
use super::memory_peak::Peak;
use super::models::Models;
use super::report::{Event, Reporter, human_bytes};
use super::running_clock::RunningClock;
use super::workers::Workers;
use super::{Run, levels};
use crate::clock::monotonic_ns;
use crate::exit::{Because, Cause, Failure, Outcome};

/// Frames that are read ahead at a death: what others send without end is not read to its end.
const MOST_UNREAD: usize = 1 << 16;

/// How often the clock and the memory that is in use are looked at, at the least.
const PAUSE: Duration = Duration::from_millis(100);

/// What an input may take for each worker.
const PAUSE_A_WORKER: Duration = Duration::from_millis(2);

pub(super) struct Driver<'r, 'j> {
    run: &'r mut Run<'j>,
    node: &'r Node,
    workers: Workers,
    reporter: &'r mut Reporter,
    coordinator: Coordinator,
    models: Models,
    clock: RunningClock,
    round_begun: Instant,
    round_begun_ns: u64,
    moved_before: JobTraffic,
    peak: Peak,
    /// Who has left because the machine, or its daemon, lacks something.
    lacking: BTreeSet<usize>,
}

impl<'r, 'j> Driver<'r, 'j> {
    pub(super) fn new(
        run: &'r mut Run<'j>,
        node: &'r Node,
        workers: Workers,
        reporter: &'r mut Reporter,
        known: Known,
    ) -> Self {
        let policy = Box::new(Synchronous::new(run.job));
        let job = run.job.clone().into();
        Self {
            coordinator: Coordinator::new(run.id, job, policy, known.samples, run.first_round),
            models: Models::new(run, known.evaluator),
            run,
            node,
            workers,
            reporter,
            clock: RunningClock::default(),
            round_begun: Instant::now(),
            round_begun_ns: monotonic_ns(),
            moved_before: JobTraffic::default(),
            peak: Peak::default(),
            lacking: BTreeSet::new(),
        }
    }

    pub(super) fn into_workers(self) -> Workers {
        self.workers
    }

    /// Everything from the workers' start to the last model.
    pub(super) async fn all(&mut self) -> Outcome {
        let all = self.run.job.registrations() - 1;
        self.reporter.begin("starting", all.into());
        loop {
            if self.coordinator.round() == 0 {
                let ready = self.coordinator.ready_count() as u64;
                self.reporter.position(ready, "workers ready".to_owned());
            }
            let input = self.next_input().await?;
            self.handle(input);
            if self.do_outputs().await? {
                return self.finish().await;
            }
            self.peak.sample(self.workers.pids());
        }
    }

    /// Waits for whatever comes next. What a worker has sent is passed on before its loss is.
    async fn next_input(&mut self) -> Outcome<Input> {
        let until = self.coordinator.timeout();
        let until = until.map(|when| when.saturating_sub(self.clock.time()));
        let pause = until.unwrap_or(PAUSE).clamp(Duration::from_millis(1), PAUSE);
        let input = tokio::select! {
            frame = self.run.frames.recv() => match frame {
                Ok(Some(frame)) => Input::Frame(frame),
                _ => return Err(self.daemon_gone().await),
            },
            event = self.run.client.event() => Input::Daemon(event.because(Cause::Job)?),
            (worker, exit) = self.workers.exited() => {
                if exit.code == Some(Cause::Machine as i32) {
                    self.lacking.insert(worker);
                }
                Input::Exited { worker, how: exit.how }
            }
            examined = self.models.examined() => examined.because(Cause::Job)?,
            () = tokio::time::sleep(pause) => Input::Timeout,
        };
        let loses = matches!(
            input,
            Input::Exited { .. } | Input::Daemon(DaemonEvent::PeerLost(_) | DaemonEvent::Living { .. })
        );
        if loses {
            self.read_ahead();
        }
        Ok(input)
    }

    fn read_ahead(&mut self) {
        for _ in 0..MOST_UNREAD {
            // That the socket has failed is found by whoever waits for it.
            let Ok(Some(frame)) = self.run.frames.try_recv() else {
                return;
            };
            self.handle(Input::Frame(frame));
        }
    }

    fn handle(&mut self, input: Input) {
        let grace = Duration::from_secs_f64(self.run.job.grace_time_s);
        let pause = PAUSE.max(PAUSE_A_WORKER * self.run.job.workers.len() as u32);
        if self.clock.tick((pause * 3 / 2).max(grace / 4)) {
            self.coordinator.handle(self.clock.time(), Input::Suspended);
        }
        self.coordinator.handle(self.clock.time(), input);
    }

    /// Does what the coordinator wants done. Gives whether the job is done.
    async fn do_outputs(&mut self) -> Outcome<bool> {
        let mut frames: Vec<Frame> = Vec::new();
        loop {
            let output = self.coordinator.poll_output();
            if let Some(Output::Send(frame)) = output {
                frames.push(frame);
                continue;
            }
            if let Err(error) = self.run.frames.send(&frames).await {
                tracing::warn!("the frame socket failed: {error}");
                return Err(self.daemon_gone().await);
            }
            frames.clear();
            match output {
                None => return Ok(false),
                Some(Output::Done(result)) => {
                    result.map_err(|failure| self.failure(failure))?;
                    return Ok(true);
                }
                Some(output) => self.do_output(output).await?,
            }
        }
    }

    async fn do_output(&mut self, output: Output) -> Outcome {
        match output {
            Output::Start(worker) => {
                let result = self.start_successor(worker).await;
                let result = result.map_err(|error| format!("{error:#}"));
                self.handle(Input::Started { worker, result });
            }
            Output::Kill(worker) => self.workers.kill(worker),
            Output::DropProxy(worker) => {
                let name = &self.run.job.workers[worker].name;
                self.run.client.drop_worker(name).await.because(Cause::Job)?;
            }
            Output::AskStatus => {
                let status = self.status_now().await?;
                let counters = |status: Status| {
                    let workers = status.workers.into_iter();
                    workers.map(|worker| (worker.worker, worker.counters)).collect()
                };
                self.handle(Input::Status(status.map(counters)));
            }
            Output::FindHolder(worker) => {
                let status = self.status_now().await?;
                let name = &self.run.job.workers[worker].name;
                let mut registered = status.iter().flat_map(|status| &status.workers);
                let holder = registered
                    .find(|other| other.name == *name)
                    .map(|other| other.pid);
                self.handle(Input::NameTaken { worker, holder });
            }
            Output::MapArenas(top) => self.map_arenas(top).await?,
            Output::CheckModel(lent) => {
                let checked = self.models.check(&mut self.run.client, &lent).await;
                self.handle(Input::Checked(checked.map_err(|error| format!("{error:#}"))));
            }
            Output::Decided {
                changed, left_out, ..
            } => {
                let seconds = self.round_begun.elapsed().as_secs_f64();
                // What moved while no daemon was there to tell counts for the round after.
                let now = self.run.client.traffic_now().await.because(Cause::Job)?;
                let now = now.unwrap_or(self.moved_before);
                let moved = since(&now, &self.moved_before);
                self.moved_before = now;
                let workers = left_out.into_iter().map(|worker| self.name(worker));
                let left_out = workers.collect();
                let levels = levels(self.run.job);
                self.models
                    .decided(changed, left_out, seconds, self.round_begun_ns, &moved, levels);
            }
            Output::Evaluate(_) => self.models.evaluate(),
            Output::Write { round, useful } => self.models.write(round, useful),
            Output::Report(event) => self.report(event).await?,
            // `do_outputs` has done these.
            Output::Send(_) | Output::Done(_) => {}
        }
        Ok(())
    }

    /// What the daemon has of this job; `None` instead of waiting for a daemon that is being started anew.
    async fn status_now(&mut self) -> Outcome<Option<Status>> {
        let job = self.run.job_id;
        self.run.client.status_now(Some(job)).await.because(Cause::Job)
    }

    async fn map_arenas(&mut self, id: WorkerId) -> Outcome {
        let status = self.status_now().await?;
        let workers = status.iter().flat_map(|status| &status.workers);
        for arena in workers
            .filter(|worker| worker.worker == id)
            .flat_map(|top| &top.arenas)
        {
            // It may be gone already.
            if let Err(error) = self.models.arena(&mut self.run.client, arena.arena).await {
                tracing::debug!("{error:#}");
            }
        }
        Ok(())
    }

    /// Starts a successor. A top's begins with the last round's model, which is written out for it.
    async fn start_successor(&mut self, worker: usize) -> anyhow::Result<()> {
        if self.run.job.workers[worker].kind == Kind::Top
            && let Some(round) = self.models.restore_point().await?
        {
            self.workers.begin_from(round);
        }
        self.workers.start_one(worker)
    }

    /// On the relay plane the frame socket closes with the daemon: what the control connection says tells more.
    async fn daemon_gone(&mut self) -> Failure {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(1), self.run.client.event()).await;
            let error = match event {
                Ok(Ok(event)) => {
                    self.handle(Input::Daemon(event));
                    while let Some(output) = self.coordinator.poll_output() {
                        if let Output::Done(Err(failure)) = output {
                            return self.failure(failure);
                        }
                    }
                    continue;
                }
                Ok(Err(error)) => anyhow::Error::new(error),
                Err(_) => anyhow!("the frame socket was closed"),
            };
            return Failure::new(Cause::Job, error);
        }
    }

    fn name(&self, worker: usize) -> String {
        self.run.job.workers[worker].name.clone()
    }

    /// Tells of an event.
    async fn report(&mut self, event: Decision) -> Outcome {
        let (worker, round, what) = match event {
            Decision::AllReady => return self.announce_job().await,
            Decision::RoundBegins(_) => {
                (self.round_begun, self.round_begun_ns) = (Instant::now(), monotonic_ns());
                return Ok(());
            }
            Decision::RoundDone(round) => return self.report_round(round),
            Decision::CheckpointFailed(round, error) => {
                let event = Event::CheckpointFailed { round, error };
                return self.reporter.event(&event).because(Cause::Job);
            }
            Decision::Worker { worker, round, what } => (self.name(worker), round, what),
        };
        let last_words = |worker: &str| self.run.folder.last_words(worker);
        let event = match what {
            WorkerEvent::Killed(reason) => {
                let line = format!("round {round}: {worker} is ended: {reason}");
                self.reporter.say(&line);
                return Ok(());
            }
            WorkerEvent::NotStarted { error, given_up } => {
                let then = match given_up {
                    true => "going on without it",
                    false => "trying again",
                };
                let line = format!("round {round}: {worker}: {error}; {then}");
                self.reporter.say(&line);
                return Ok(());
            }
            WorkerEvent::Lost { how, restarting } => Event::WorkerLost {
                round,
                how,
                last_words: last_words(&worker),
                restarting,
                worker,
            },
            WorkerEvent::Replaced => Event::WorkerReplaced { worker, round },
            WorkerEvent::Failed => Event::TrainerFailed {
                round,
                why: last_words(&worker),
                worker,
            },
            WorkerEvent::UpdateRefused(refusal) => Event::UpdateRefused {
                worker,
                round,
                why: refusal.to_string(),
            },
        };
        self.reporter.event(&event).because(Cause::Job)
    }

    async fn announce_job(&mut self) -> Outcome {
        let status = self
            .run
            .client
            .status(Some(self.run.job_id))
            .await
            .because(Cause::Job)?;
        let arenas = || status.workers.iter().flat_map(|worker| &worker.arenas);
        let large = arenas().filter(|arena| arena.layout.suits_huge_pages());
        let pages = large.map(|arena| arena.page_bytes).min();
        let note = match pages {
            None => Some(format!(
                "every arena is smaller than {}",
                human_bytes(Layout::LARGE_BYTES)
            )),
            Some(_) => arenas().find_map(|arena| arena.note.clone()),
        };
        let traffic = self.run.client.traffic_now().await.because(Cause::Job)?;
        self.moved_before = traffic.unwrap_or_default();
        let event = Event::JobStarted {
            job: self.run.job.name.clone(),
            run: self.run.folder.path().display().to_string(),
            daemon: self.node.socket.display().to_string(),
            own_daemon: self.node.is_own(),
            plane: status.daemon.plane,
            plane_reason: status.daemon.plane_reason,
            page_bytes: pages.unwrap_or(Layout::SLOT_ALIGN),
            page_note: note,
            tree: levels(self.run.job),
        };
        self.reporter.end();
        self.reporter.event(&event).because(Cause::Job)?;
        self.reporter.begin("round", u64::from(self.run.job.rounds));
        Ok(())
    }

    /// Tells of a round whose model has been evaluated.
    fn report_round(&mut self, round: u32) -> Outcome {
        let Some((event, changed)) = self.models.round_event() else {
            return Ok(());
        };
        self.reporter.event(&event).because(Cause::Job)?;
        if !changed {
            self.reporter.say(&format!(
                "warning: round {round}: no update was folded, the model is as it was"
            ));
        }
        let evaluation = self.models.evaluation();
        let accuracy = evaluation.map_or(String::new(), |it| {
            format!("accuracy {:.2} %", it.accuracy * 100.0)
        });
        self.reporter.position(u64::from(round), accuracy);
        Ok(())
    }

    fn failure(&mut self, failure: JobFailure) -> Failure {
        self.reporter.end();
        let cause = match &failure {
            // What the machine lacks for the first round, it lacks for another run too.
            JobFailure::WorkerGone { worker, round: 0, .. } if self.lacking.contains(worker) => {
                Cause::Machine
            }
            _ => Cause::Job,
        };
        let error = match failure {
            JobFailure::WorkerGone { worker, round, how } => {
                let name = self.name(worker);
                let log = self.run.folder.log_tail(&name, 5);
                let when = match round {
                    0 => "before the first round".to_owned(),
                    _ => format!(
                        "in round {round}, {} times without having finished one",
                        MOST_DEATHS + 1
                    ),
                };
                anyhow!("{name} is gone {when} ({how}); the end of its log:\n{log}")
            }
            JobFailure::NameTaken { worker, holder } => anyhow!(
                "{} cannot be replaced: process {holder}, which is not of this run, has registered under its name; end that \
                 process, and go on with lifl run --resume {}",
                self.name(worker),
                self.run.folder.path().display()
            ),
            JobFailure::TopNotStarted { error } => anyhow!(error),
            JobFailure::TooFewTrainers { round, trainers: 0 } => anyhow!(
                "round {round}: no trainer that is left has a way to the top; {}",
                self.trainers_words()
            ),
            JobFailure::TooFewTrainers { round, trainers } => anyhow!(
                "round {round}: {trainers} trainers can take part, its quorum is {}: lower lifl.quorum, or see why the others \
                 are gone",
                self.run.job.quorum
            ),
            JobFailure::NothingFolded => anyhow!(
                "no update was folded in any round, the model is the one that the job began with; {}",
                self.trainers_words()
            ),
            JobFailure::NotFinite { loss } => anyhow!(
                "the last model is of no use, its loss on the test set is {loss}: a lower learningRate may help"
            ),
            JobFailure::JobEnded { reason } => anyhow!("the daemon ended the job: {reason}"),
        };
        Failure::new(cause, error)
    }

    /// What the logs of some trainers end with, each end once.
    fn trainers_words(&self) -> String {
        const MOST: usize = 3;
        let mut ends: Vec<(String, String)> = Vec::new();
        for trainer in self.run.job.trainers() {
            let words = self.run.folder.last_words(&trainer.name);
            let known = words.is_empty() || ends.iter().any(|(_, end)| *end == words);
            if ends.len() < MOST && !known {
                ends.push((trainer.name.clone(), words));
            }
        }
        if ends.is_empty() {
            return "the trainers' logs are empty".to_owned();
        }
        let ends: Vec<String> = ends.iter().map(|(name, end)| format!("{name}: {end}")).collect();
        format!("the trainers' logs end:\n{}", ends.join("\n"))
    }

    async fn finish(&mut self) -> Outcome {
        self.peak.sample_now(self.workers.pids());
        let status = self.status_now().await?;
        let jobs = status.iter().flat_map(|status| &status.jobs);
        let mut own = jobs.filter(|job| job.job == self.run.job_id);
        let arenas = own.next().map_or(0, |job| job.arena_peak_bytes);
        self.reporter.end();
        let evaluation = self.models.evaluation();
        let event = Event::JobFinished {
            rounds: self.run.job.rounds,
            seconds: self.run.started.elapsed().as_secs_f64(),
            loss: evaluation.map(|evaluation| evaluation.loss),
            accuracy: evaluation.map(|evaluation| evaluation.accuracy),
            peak_memory_bytes: arenas + self.peak.bytes(),
            run: self.run.folder.path().display().to_string(),
        };
        self.reporter.event(&event).because(Cause::Job)
    }
}

/// What came to it since.
fn since(now: &JobTraffic, before: &JobTraffic) -> JobTraffic {
    let (gateway, earlier) = (&now.gateway, &before.gateway);
    JobTraffic {
        // What a worker had sent goes when it does.
        bytes_referenced: now.bytes_referenced.saturating_sub(before.bytes_referenced),
        gateway: GatewayStatus {
            bytes_received: gateway.bytes_received.saturating_sub(earlier.bytes_received),
            bytes_sent: gateway.bytes_sent.saturating_sub(earlier.bytes_sent),
        },
        awaited: 0,
    }
}
