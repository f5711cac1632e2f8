//! The rounds: announced to the workers, waited for, measured; each round's model written out and evaluated while
//! the next round runs.
//!
//! A round is decided when the top's `Model` frame has come, whatever happens to the top then: until that frame nobody's
//! update has been given back, so that a successor can make the round anew.
//!
//! Any process of the job's user can register and send frames. Whose frame decides anything is looked up in the
//! [membership](Membership), and what the top says of its model is held against what is known of the trainers.
//!
//! ```text
//!   model lent ──▶ evaluated ──▶ its event told ──▶ written out, if it is time ──▶ given back
//! ```
//!
//! In this order, so that a run which is killed at any moment and resumed has told of every round.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use lifl_common::arena::{Layout, PeerArena};
use lifl_common::config::Kind;
use lifl_common::control::{DeadLetter, Event as DaemonEvent, GatewayStatus, JobTraffic, Status};
use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::update::{Cover, Metadata, Tensors, image};
use lifl_worker::coordinator::liveness::Liveness;
use lifl_worker::coordinator::membership::Membership;
use lifl_worker::coordinator::pairing::{pair, select};
use tokio::task::JoinHandle;

use super::awake::Awake;
use super::daemon::Node;
use super::deaths::{Clock, Life};
use super::memory_peak::Peak;
use super::report::{Event, LevelTime, Reporter, human_bytes};
use super::workers::Workers;
use super::{Run, levels};
use crate::exit::{Because, Cause, Failure, Outcome};
use lifl_learn::{Evaluation, Evaluator};

/// A round's new model, as the top lent it.
struct NewModel {
    frame: Frame,
    arena: Arc<PeerArena>,
    /// What the optimizer remembers with it, lent in front of it.
    state: Option<(Frame, Arc<PeerArena>)>,
    /// When the round began, by the node's clock.
    begun_ns: u64,
    seconds: f64,
    moved: JobTraffic,
    /// The trainers that were to be in it.
    asked: Vec<usize>,
}

/// A round's outcome, as it lies in the top's arenas.
#[derive(Clone)]
struct Decided {
    model: (Frame, Arc<PeerArena>),
    state: Option<(Frame, Arc<PeerArena>)>,
}

/// What became of it.
enum Examined {
    Evaluated(Box<Evaluated>),
    /// It has been written out, where it was time; or why its checkpoint could not be.
    Written(Box<NewModel>, Option<String>),
}

/// A round's new model, and how good it is.
struct Evaluated {
    model: NewModel,
    metadata: Metadata,
    evaluation: Option<Evaluation>,
    evaluator: Option<Evaluator>,
}

/// Frames that are read ahead at a death: what others send without end is not read to its end.
const MOST_UNREAD: usize = 1 << 16;

pub(super) struct Rounds<'r, 'j> {
    pub(super) run: &'r mut Run<'j>,
    pub(super) workers: Workers,
    pub(super) reporter: &'r mut Reporter,
    pub(super) roster: Membership,
    /// By worker.
    pub(super) lives: Vec<Life>,
    /// Which round runs, or is next; 0 before the first.
    pub(super) round: u32,
    /// Time as far as this process has been running.
    pub(super) awake: Awake,
    pub(super) clock: Clock,
    pub(super) watch: Liveness,
    /// Frames that are to be sent.
    pub(super) outgoing: Vec<Frame>,
    /// Frames that have been read and not been dealt with.
    unread: VecDeque<Frame>,
    /// Those of workers that the daemon has not told of yet: the two ways are not in step.
    early: Vec<Frame>,
    /// Who is the top, and who was.
    tops: Vec<WorkerId>,
    /// Whose frames of which kind have been told of in the round that runs: what was not expected, and failures.
    told: HashSet<(WorkerId, u16)>,
    evaluator: Option<Evaluator>,
    examining: Option<JoinHandle<anyhow::Result<Examined>>>,
    /// Of the tops, the dead ones' too: what they made last is still wanted.
    arenas: HashMap<ArenaId, Arc<PeerArena>>,
    /// The last round that is decided: its model, and what the optimizer remembers with it. They lie in the top's arena as
    /// they are until the next round is decided, whether the top lives or not.
    decided: Option<Decided>,
    moved_before: JobTraffic,
    /// Remote workers that are dead, and whose proxies are to leave.
    pub(super) to_drop: Vec<usize>,
    last: Option<Evaluation>,
    /// Whether an update has gone into the model, in this run or in those that it goes on from.
    anything_folded: bool,
    peak: Peak,
}

/// What the coordinator waits for.
enum News {
    /// A top's: a model, or what the optimizer remembers with it.
    Frame(Frame),
    /// Anything else, already dealt with.
    Other,
}

impl<'r, 'j> Rounds<'r, 'j> {
    pub(super) fn new(
        run: &'r mut Run<'j>,
        workers: Workers,
        reporter: &'r mut Reporter,
        evaluator: Option<Evaluator>,
        samples: Vec<u64>,
    ) -> Self {
        let roster = Membership::new(run.id, Arc::new(run.job.clone()), samples);
        let lives = run.job.workers.iter().map(|_| Life::started()).collect();
        Self {
            run,
            workers,
            reporter,
            roster,
            lives,
            round: 0,
            awake: Awake::default(),
            clock: Clock::start(Duration::ZERO),
            watch: Liveness::default(),
            outgoing: Vec::new(),
            unread: VecDeque::new(),
            early: Vec::new(),
            tops: Vec::new(),
            told: HashSet::new(),
            evaluator,
            examining: None,
            arenas: HashMap::new(),
            decided: None,
            moved_before: JobTraffic::default(),
            to_drop: Vec::new(),
            last: None,
            anything_folded: false,
            peak: Peak::default(),
        }
    }

    pub(super) fn into_workers(self) -> Workers {
        self.workers
    }

    /// Everything from the workers' start to the last model.
    pub(super) async fn all(&mut self, node: &Node) -> Outcome {
        let job = self.run.job;
        self.wait_for_workers().await?;
        self.announce_job(node).await?;
        for round in self.run.first_round..=job.rounds {
            self.one_round(round).await?;
        }
        self.examined().await?;
        self.finish().await
    }

    async fn wait_for_workers(&mut self) -> Outcome {
        let all = self.run.job.registrations() as usize - 1;
        self.reporter.begin("starting", all as u64);
        loop {
            let ready = self.roster.ready_count();
            self.reporter.position(ready as u64, "workers ready".to_owned());
            if ready == all {
                return Ok(());
            }
            self.between_rounds().await?;
        }
    }

    /// What the daemon has of this job.
    pub(super) async fn status(&mut self) -> Outcome<Status> {
        self.run
            .client
            .status(Some(self.run.job_id))
            .await
            .because(Cause::Job)
    }

    /// The same, unless that would have to wait for a daemon that is being started anew.
    pub(super) async fn status_now(&mut self) -> Outcome<Option<Status>> {
        let job = self.run.job_id;
        self.run.client.status_now(Some(job)).await.because(Cause::Job)
    }

    /// What has moved so far; `None` as for the status.
    async fn traffic(&mut self) -> Outcome<Option<JobTraffic>> {
        self.run.client.traffic_now().await.because(Cause::Job)
    }

    async fn announce_job(&mut self, node: &Node) -> Outcome {
        let status = self.status().await?;
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
        self.moved_before = self.traffic().await?.unwrap_or_default();
        let event = Event::JobStarted {
            job: self.run.job.name.clone(),
            run: self.run.folder.path().display().to_string(),
            daemon: node.socket.display().to_string(),
            own_daemon: node.is_own(),
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

    async fn one_round(&mut self, round: u32) -> Outcome {
        self.round = round;
        self.plan_round(round).await?;
        self.clock = Clock::start(self.awake.time());
        self.told.clear();
        self.outgoing.extend(self.roster.announce());
        self.flush().await?;
        let mut state: Option<Frame> = None;
        let (frame, decided) = loop {
            match self.news().await? {
                News::Frame(frame) if frame.round != round => {}
                News::Frame(frame) if frame.kind == FrameKind::State as u16 => state = Some(frame),
                News::Frame(frame) => match self.decided(frame, state.take()).await {
                    Ok(decided) => break (frame, decided),
                    Err(error) => self.bad_model(&frame, &error),
                },
                News::Other => {}
            }
            self.look(true).await?;
        };
        let seconds = self.clock.seconds();
        let asked = self.asked();
        self.round_finished();
        // What moved while no daemon was there to tell counts for the round after.
        let now = self.traffic().await?.unwrap_or(self.moved_before);
        let moved = since(&now, &self.moved_before);
        self.moved_before = now;
        let Decided {
            model: (_, arena),
            state,
        } = decided.clone();
        self.decided = Some(decided);
        self.examined().await?;
        self.examine(NewModel {
            frame,
            arena,
            state,
            begun_ns: self.clock.begun_ns,
            seconds,
            moved,
            asked,
        });
        Ok(())
    }

    /// Holds a model that a top has lent against what is known of the round.
    async fn decided(&mut self, frame: Frame, state: Option<Frame>) -> anyhow::Result<Decided> {
        let (arena, state) = (
            self.lent(&frame).await?,
            match state.filter(|state| state.from == frame.from) {
                Some(state) => Some((state, self.lent(&state).await?)),
                None => None,
            },
        );
        let bytes = arena.object(frame.key, frame.length)?;
        let (metadata, _) = image::check(bytes, &self.run.schema).context("it is not the job's")?;
        ensure!(
            metadata.generation == frame.key.generation && metadata.round <= frame.round,
            "it is of round {}",
            metadata.round
        );
        let covers = if metadata.round == frame.round {
            metadata.cover.count()
        } else {
            0
        };
        let most = self.roster.samples_of(&metadata.cover);
        ensure!(
            frame.covers == covers && metadata.samples <= most,
            "it is said to be of {} trainers with {} samples, and is of {covers} with {most}",
            frame.covers,
            metadata.samples
        );
        Ok(Decided {
            model: (frame, arena),
            state,
        })
    }

    /// The arena that an object lies in which its owner has lent.
    async fn lent(&mut self, frame: &Frame) -> anyhow::Result<Arc<PeerArena>> {
        ensure!(
            frame.key.arena.owner() == frame.from,
            "{} is not in an arena of its own",
            frame.key
        );
        let arena = self.arena(frame.key.arena).await;
        let arena = arena.map_err(|failure| failure.error)?;
        arena.object(frame.key, frame.length)?;
        Ok(arena)
    }

    /// A top has lent what is no model of the round: it is of no use.
    fn bad_model(&mut self, frame: &Frame, error: &anyhow::Error) {
        tracing::warn!(from = %frame.from, round = frame.round, "a model that is none: {error:#}");
        // One that is dead has a successor, or will have.
        if let Some(index) = self.roster.index(frame.from) {
            self.end_stuck(index, "its model is not the job's");
        }
    }

    /// An arena of the top, mapped at the first use.
    async fn arena(&mut self, id: ArenaId) -> Outcome<Arc<PeerArena>> {
        if let Some(arena) = self.arenas.get(&id) {
            return Ok(Arc::clone(arena));
        }
        let arena = self.run.client.open_arena(id).await.because(Cause::Job)?;
        let arena = Arc::new(arena);
        self.arenas.insert(id, Arc::clone(&arena));
        Ok(arena)
    }

    /// Pairs those who are there, when all aggregators' places are taken and there are enough trainers.
    async fn plan_round(&mut self, round: u32) -> Outcome {
        let job = self.run.job;
        loop {
            let aggregators = self.roster.awaited(|spec| spec.kind != Kind::Trainer);
            let coming = self.roster.awaited(|spec| spec.kind == Kind::Trainer);
            if aggregators == 0 {
                let mut pairs = pair(&job.workers, |index| self.roster.is_present(index));
                select(&job.workers, &mut pairs, job.seed, round);
                let trainers = self.roster.plan(round, pairs);
                if trainers >= job.quorum {
                    return Ok(());
                }
                if coming == 0 {
                    let error = match trainers {
                        0 => anyhow!(
                            "round {round}: no trainer that is left has a way to the top; {}",
                            self.trainers_words()
                        ),
                        some => anyhow!(
                            "round {round}: {some} trainers can take part, its quorum is {}: lower lifl.quorum, or see why \
                             the others are gone",
                            job.quorum
                        ),
                    };
                    return Err(Failure::new(Cause::Job, error));
                }
            }
            self.between_rounds().await?;
        }
    }

    /// Deals with what comes while no round runs.
    async fn between_rounds(&mut self) -> Outcome {
        self.news().await?;
        self.look(false).await
    }

    /// Sends what is to be sent.
    async fn flush(&mut self) -> Outcome {
        let sent = self.run.frames.send(&self.outgoing).await;
        self.outgoing.clear();
        match sent {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::warn!("the frame socket failed: {error}");
                Err(self.daemon_gone().await)
            }
        }
    }

    /// How long it may be until the clock is looked at again.
    pub(super) fn pause(&self) -> Duration {
        Duration::from_millis(100).max(Duration::from_millis(2) * self.lives.len() as u32)
    }

    /// Waits for whatever comes next, and deals with it unless it is a top's frame about a round.
    async fn news(&mut self) -> Outcome<News> {
        let pause = self.pause();
        let frame = match self.unread.pop_front() {
            Some(frame) => Some(frame),
            None => tokio::select! {
                frame = self.run.frames.recv() => {
                    let Ok(Some(frame)) = frame else { return Err(self.daemon_gone().await) };
                    Some(frame)
                }
                event = self.run.client.event() => {
                    let event = event.because(Cause::Job)?;
                    self.daemon_event(event)?;
                    None
                }
                (index, how) = self.workers.exited() => {
                    self.read_all();
                    self.process_ended(index, &how)?;
                    None
                }
                examined = done(&mut self.examining) => {
                    self.examining = None;
                    match examined.because(Cause::Job)? {
                        Examined::Evaluated(evaluated) => self.report(*evaluated)?,
                        Examined::Written(model, failed) => self.give_back(&model, failed).await?,
                    }
                    None
                }
                () = tokio::time::sleep(pause) => None,
            },
        };
        if let Some(frame) = frame {
            if let Some(letter) = DeadLetter::returned(&frame, self.run.id) {
                self.daemon_event(DaemonEvent::DeadLetter(letter))?;
            } else {
                match FrameKind::from_number(frame.kind) {
                    Some(FrameKind::Ready) => self.ready(frame).await?,
                    Some(FrameKind::Pong) => self.pong(&frame),
                    Some(FrameKind::Nothing) => self.failed(&frame)?,
                    Some(FrameKind::Refuse) => self.refused(&frame)?,
                    Some(FrameKind::Model | FrameKind::State) if self.tops.contains(&frame.from) => {
                        return Ok(News::Frame(frame));
                    }
                    kind => {
                        if self.told.insert((frame.from, kind.map_or(0, |kind| kind as u16))) {
                            tracing::warn!(?kind, from = %frame.from, "not expected");
                        }
                    }
                }
            }
        }
        for index in std::mem::take(&mut self.to_drop) {
            let name = &self.run.job.workers[index].name;
            self.run.client.drop_worker(name).await.because(Cause::Job)?;
        }
        // A round that is decided is not begun anew.
        if self.unread.is_empty() {
            self.restart_lost().await?;
        }
        self.flush().await?;
        self.peak.sample(self.workers.pids());
        Ok(News::Other)
    }

    /// Reads what the dead have said before they died, so that it counts before their death does. That the socket has failed is
    /// found by whoever waits for it. What decides nothing is not kept, however much of it comes.
    fn read_all(&mut self) {
        for _ in 0..MOST_UNREAD {
            let Ok(Some(frame)) = self.run.frames.try_recv() else {
                return;
            };
            match FrameKind::from_number(frame.kind) {
                Some(FrameKind::Pong) => self.pong(&frame),
                Some(FrameKind::Model | FrameKind::State) if !self.tops.contains(&frame.from) => {}
                Some(
                    FrameKind::Ready
                    | FrameKind::Model
                    | FrameKind::State
                    | FrameKind::Nothing
                    | FrameKind::Refuse,
                ) if self.unread.len() < MOST_UNREAD => self.unread.push_back(frame),
                _ => {}
            }
        }
    }

    /// A worker says that it stirs.
    fn pong(&mut self, frame: &Frame) {
        if self.roster.index(frame.from).is_some() {
            self.watch.heard(frame.from, frame.round);
        }
    }

    /// A trainer, or its proxy, says that it has nothing to give in the round: its log says why.
    fn failed(&mut self, frame: &Frame) -> Outcome {
        let index = self.roster.index(frame.from);
        let trainer = index.filter(|&index| self.run.job.workers[index].kind == Kind::Trainer);
        let (Some(index), true) = (trainer, frame.round == self.round) else {
            return Ok(());
        };
        if !self.told.insert((frame.from, frame.kind)) {
            return Ok(());
        }
        let worker = self.run.job.workers[index].name.clone();
        let event = Event::TrainerFailed {
            round: frame.round,
            why: self.run.folder.last_words(&worker),
            worker,
        };
        self.reporter.event(&event).because(Cause::Job)
    }

    /// A parent says that it has refused a child's update.
    fn refused(&mut self, frame: &Frame) -> Outcome {
        let refusal = Refusal::from_number(frame.refusal).filter(|refusal| refusal.is_senders_fault());
        let child = u32::try_from(frame.value).ok().map(WorkerId);
        let (Some(refusal), Some(child)) = (refusal, child) else {
            return Ok(());
        };
        let child_index = self.roster.index(child);
        let parent = child_index.and_then(|index| self.roster.parent(index));
        if frame.round != self.round || parent.is_none() || parent != self.roster.index(frame.from) {
            return Ok(());
        }
        if let Some(index) = child_index
            && self.told.insert((child, frame.kind))
        {
            let event = Event::UpdateRefused {
                worker: self.run.job.workers[index].name.clone(),
                round: frame.round,
                why: refusal.to_string(),
            };
            self.reporter.event(&event).because(Cause::Job)?;
        }
        Ok(())
    }

    /// A worker can begin.
    async fn ready(&mut self, frame: Frame) -> Outcome {
        let id = frame.from;
        if self.roster.index(id).is_none() {
            if !self.early.iter().any(|known| known.from == id) {
                self.early.push(frame);
            }
            return Ok(());
        }
        let Some(index) = self.roster.ready(id) else {
            return Ok(());
        };
        if self.run.job.workers[index].kind == Kind::Top {
            self.tops.push(id);
            self.map_top(id).await?;
        }
        if self.round == 0 {
            return Ok(());
        }
        self.successor_ready(index)
    }

    /// On the relay plane the frame socket closes with the daemon: what the control connection says tells more.
    async fn daemon_gone(&mut self) -> Failure {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(1), self.run.client.event()).await;
            let error = match event {
                Ok(Ok(event)) => match self.daemon_event(event) {
                    Ok(()) => continue,
                    Err(failure) => return failure,
                },
                Ok(Err(error)) => anyhow::Error::new(error),
                Err(_) => anyhow!("the frame socket was closed"),
            };
            return Failure::new(Cause::Job, error);
        }
    }

    fn daemon_event(&mut self, event: DaemonEvent) -> Outcome {
        match event {
            DaemonEvent::PeerJoined { worker, name } => {
                if let Some(index) = self.roster.joined(worker, &name) {
                    self.lives[index].registered = true;
                }
                let ready = self.early.extract_if(.., |frame| frame.from == worker);
                self.unread.extend(ready);
            }
            DaemonEvent::PeerLost(lost) => {
                self.early.retain(|frame| frame.from != lost.worker);
                self.read_all();
                if let Some(index) = self.roster.left(lost.worker) {
                    self.connection_closed(index)?;
                }
            }
            DaemonEvent::Living { first, last, workers } => {
                tracing::info!("the daemon is back");
                self.watch.reset();
                let gone = |id: &WorkerId| workers.binary_search(id).is_err();
                self.read_all();
                for id in self.roster.ids(first, last).into_iter().filter(gone) {
                    if let Some(index) = self.roster.left(id) {
                        self.connection_closed(index)?;
                    }
                }
            }
            DaemonEvent::DeadLetter(letter) => {
                tracing::debug!(to = %letter.to, kind = letter.kind, "not delivered: {}", letter.refusal);
            }
            DaemonEvent::JobEnded { reason } => {
                return Err(Failure::new(
                    Cause::Job,
                    anyhow!("the daemon ended the job: {reason}"),
                ));
            }
        }
        Ok(())
    }

    /// Starts a successor. A top's begins with the last round's model, which is written out for it.
    pub(super) async fn start_successor(&mut self, index: usize) -> Outcome {
        let top = self.run.job.workers[index].kind == Kind::Top;
        if let Some(decided) = self.decided.clone().filter(|_| top) {
            let folder = self.run.folder.clone();
            let written = tokio::task::spawn_blocking(move || {
                let (frame, arena) = &decided.model;
                let state = decided.state.as_ref();
                let state = state.map(|(frame, arena)| arena.object(frame.key, frame.length));
                folder.checkpoint(
                    frame.round,
                    arena.object(frame.key, frame.length)?,
                    state.transpose()?,
                )?;
                anyhow::Ok(frame.round)
            });
            let written = written.await.context("the top's successor has no model");
            let checkpoint = written.and_then(|written| written.context("the top's successor has no model"));
            self.workers.begin_from(checkpoint.because(Cause::Job)?);
            // What the dead top had is read no more.
            self.arenas.clear();
        }
        self.workers.start_one(index).because(Cause::Job)
    }

    /// Whether the last round's model is being written out.
    pub(super) fn is_examining(&self) -> bool {
        self.examining.is_some()
    }

    /// Maps a new top's arenas while it lives: what it makes may be wanted when it does not.
    async fn map_top(&mut self, id: WorkerId) -> Outcome {
        let Some(status) = self.status_now().await? else {
            return Ok(());
        };
        let top = status.workers.iter().find(|worker| worker.worker == id);
        for arena in top.into_iter().flat_map(|top| &top.arenas) {
            // It may be gone already.
            if let Err(failure) = self.arena(arena.arena).await {
                tracing::debug!("{:#}", failure.error);
            }
        }
        Ok(())
    }

    /// The job's trainers, but for those that the selector did not take into the round.
    fn asked(&self) -> Vec<usize> {
        let workers = &self.run.job.workers;
        let selects = workers.iter().any(|worker| worker.select.is_some());
        let asked = |&index: &usize| {
            let takes_part = self.roster.takes_part(index) || !self.roster.is_present(index);
            workers[index].kind == Kind::Trainer && (!selects || takes_part)
        };
        (0..workers.len()).filter(asked).collect()
    }

    /// Begins to evaluate a new model, beside the rounds.
    fn examine(&mut self, model: NewModel) {
        let evaluator = self.evaluator.take();
        let schema = self.run.schema.clone();
        self.examining = Some(tokio::task::spawn_blocking(move || {
            let bytes = model.arena.object(model.frame.key, model.frame.length)?;
            let (metadata, offset) =
                image::check(bytes, &schema).context("the top's model is not the job's")?;
            let tensors = Tensors::new(&schema, &bytes[offset..][..schema.data_bytes()]);
            let evaluation = evaluator
                .as_ref()
                .map(|evaluator| evaluator.evaluate(tensors))
                .transpose()?;
            Ok(Examined::Evaluated(Box::new(Evaluated {
                model,
                metadata,
                evaluation,
                evaluator,
            })))
        }));
    }

    /// Begins to write it out, if it is time and there is any work in it.
    fn write_out(&mut self, model: NewModel) {
        let folder = self.run.folder.clone();
        let round = model.frame.round;
        let at_end = round == self.run.job.rounds;
        let every = self.run.checkpoint_every;
        let due = every > 0 && (round.is_multiple_of(every) || at_end);
        // What is of no use is not kept as the result.
        let of_use = self.anything_folded && !(at_end && self.no_result().is_some());
        let (checkpoint, last) = (due && of_use, at_end && of_use);
        let keep = self.run.keep_checkpoints;
        self.examining = Some(tokio::task::spawn_blocking(move || {
            let mut failed = None;
            if checkpoint || last {
                let bytes = model.arena.object(model.frame.key, model.frame.length)?;
                if checkpoint {
                    let state = model.state.as_ref();
                    let state = state.map(|(frame, arena)| arena.object(frame.key, frame.length));
                    match folder.checkpoint(round, bytes, state.transpose()?) {
                        Ok(_) => keep.into_iter().for_each(|keep| folder.prune(round, keep)),
                        // The job can do without: the next one may have room.
                        Err(error) => failed = Some(format!("{error:#}")),
                    }
                }
                if last {
                    folder.last_model(round, bytes, checkpoint && failed.is_none())?;
                }
            }
            Ok(Examined::Written(Box::new(model), failed))
        }));
    }

    /// Waits until the model that is being examined, if any, has been.
    async fn examined(&mut self) -> Outcome {
        while self.examining.is_some() {
            self.between_rounds().await?;
        }
        Ok(())
    }

    /// Gives a model back that has been written out.
    async fn give_back(&mut self, model: &NewModel, checkpoint_failed: Option<String>) -> Outcome {
        let release = |lent: &Frame| Frame {
            to: lent.from,
            from: self.run.id,
            kind: FrameKind::Release as u16,
            round: lent.round,
            key: lent.key,
            ..Frame::default()
        };
        let state = model.state.iter().map(|(state, _)| release(state));
        let releases: Vec<Frame> = [release(&model.frame)].into_iter().chain(state).collect();
        self.run
            .frames
            .send(&releases)
            .await
            .context("the frame socket failed")
            .because(Cause::Job)?;
        if let Some(error) = checkpoint_failed {
            let round = model.frame.round;
            let event = Event::CheckpointFailed { round, error };
            self.reporter.event(&event).because(Cause::Job)?;
        }
        Ok(())
    }

    /// Tells of a model's round, and has it written out.
    fn report(&mut self, evaluated: Evaluated) -> Outcome {
        let Evaluated {
            mut model,
            metadata,
            evaluation,
            evaluator,
        } = evaluated;
        self.evaluator = evaluator;
        self.last = evaluation;
        // A model's round is 0 until something has been folded into it.
        self.anything_folded = metadata.round > 0;
        let frame = model.frame;
        // A model that no update changed is the round's before, and says so.
        let changed = metadata.round == frame.round;
        let cover = if changed {
            &metadata.cover
        } else {
            &Cover::default()
        };
        let workers = &self.run.job.workers;
        let missing = std::mem::take(&mut model.asked).into_iter();
        let missing = missing.map(|index| &workers[index]);
        let missing = missing.filter(|worker| worker.share.is_none_or(|share| !cover.contains(share)));
        let left_out: Vec<String> = missing.map(|worker| worker.name.clone()).collect();
        let event = Event::Round {
            round: frame.round,
            seconds: model.seconds,
            loss: evaluation.map(|evaluation| evaluation.loss),
            accuracy: evaluation.map(|evaluation| evaluation.accuracy),
            train_loss: metadata.loss.filter(|_| changed),
            trainers: cover.count(),
            left_out,
            samples: if changed { metadata.samples } else { 0 },
            updates_folded: if changed { metadata.folded } else { 0 },
            bytes_referenced: model.moved.bytes_referenced,
            bytes_copied: if changed { metadata.bytes_copied } else { 0 },
            bytes_received: model.moved.gateway.bytes_received,
            bytes_sent: model.moved.gateway.bytes_sent,
            levels: self
                .level_times(&metadata, model.begun_ns)
                .filter(|_| changed)
                .unwrap_or_default(),
        };
        self.reporter.event(&event).because(Cause::Job)?;
        if !changed {
            self.reporter.say(&format!(
                "warning: round {}: no update was folded, the model is as it was",
                frame.round
            ));
        }
        let accuracy = evaluation.map_or(String::new(), |it| {
            format!("accuracy {:.2} %", it.accuracy * 100.0)
        });
        self.reporter.position(u64::from(frame.round), accuracy);
        self.write_out(model);
        Ok(())
    }

    /// Why the job's work has come to nothing, if it has.
    fn no_result(&self) -> Option<String> {
        if !self.anything_folded {
            return Some(format!(
                "no update was folded in any round, the model is the one that the job began with; {}",
                self.trainers_words()
            ));
        }
        let loss = self.last.map(|evaluation| evaluation.loss);
        let loss = loss.filter(|loss| !loss.is_finite())?;
        Some(format!(
            "the last model is of no use, its loss on the test set is {loss}: a lower learningRate may help"
        ))
    }

    /// What the logs of some trainers end with, each end once.
    fn trainers_words(&self) -> String {
        const MOST: usize = 3;
        let mut said: Vec<String> = Vec::new();
        let mut ends: HashSet<String> = HashSet::new();
        for trainer in self.run.job.trainers() {
            let words = self.run.folder.last_words(&trainer.name);
            if said.len() < MOST && !words.is_empty() && ends.insert(words.clone()) {
                said.push(format!("{}: {words}", trainer.name));
            }
        }
        if said.is_empty() {
            return "the trainers' logs are empty".to_owned();
        }
        format!("the trainers' logs end:\n{}", said.join("\n"))
    }

    /// When each level was done with a round, if the model tells of all of them.
    fn level_times(&self, metadata: &Metadata, begun_ns: u64) -> Option<Vec<LevelTime>> {
        let roles = levels(self.run.job).into_iter().map(|level| level.role);
        let roles: Vec<String> = roles.rev().collect();
        let times = roles.into_iter().zip(&metadata.made);
        let times: Vec<LevelTime> = times
            .map(|(role, &made)| LevelTime {
                role,
                seconds: made.saturating_sub(begun_ns) as f64 / 1e9,
            })
            .collect();
        (times.len() == self.run.job.levels() as usize + 1).then_some(times)
    }

    async fn finish(&mut self) -> Outcome {
        self.peak.sample_now(self.workers.pids());
        let status = self.status_now().await?;
        let jobs = status.iter().flat_map(|status| &status.jobs);
        let mut own = jobs.filter(|job| job.job == self.run.job_id);
        let arenas = own.next().map_or(0, |job| job.arena_peak_bytes);
        self.reporter.end();
        if let Some(why) = self.no_result() {
            return Err(Failure::new(Cause::Job, anyhow!(why)));
        }
        let event = Event::JobFinished {
            rounds: self.run.job.rounds,
            seconds: self.run.started.elapsed().as_secs_f64(),
            loss: self.last.map(|evaluation| evaluation.loss),
            accuracy: self.last.map(|evaluation| evaluation.accuracy),
            peak_memory_bytes: arenas + self.peak.bytes(),
            run: self.run.folder.path().display().to_string(),
        };
        self.reporter.event(&event).because(Cause::Job)
    }
}

/// What came to it since.
fn since(now: &JobTraffic, before: &JobTraffic) -> JobTraffic {
    let gateway = GatewayStatus {
        bytes_received: now
            .gateway
            .bytes_received
            .saturating_sub(before.gateway.bytes_received),
        bytes_sent: now.gateway.bytes_sent.saturating_sub(before.gateway.bytes_sent),
    };
    JobTraffic {
        // What a worker had sent goes when it does.
        bytes_referenced: now.bytes_referenced.saturating_sub(before.bytes_referenced),
        gateway,
        awaited: 0,
    }
}

/// Waits for the examination; for ever when there is none.
async fn done(examining: &mut Option<JoinHandle<anyhow::Result<Examined>>>) -> anyhow::Result<Examined> {
    match examining {
        Some(examining) => examining.await.context("the new model could not be examined")?,
        None => std::future::pending().await,
    }
}
