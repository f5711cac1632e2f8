//! The rounds: announced to the workers, waited for, measured; each round's model written out and evaluated while
//! the next round runs.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use lifl_common::arena::PeerArena;
use lifl_common::config::Kind;
use lifl_common::control::{Event as DaemonEvent, GatewayStatus, Status};
use lifl_common::frame::{Frame, FrameKind};
use lifl_common::id::{ArenaId, WorkerId};
use lifl_common::session::proxied;
use lifl_common::update::{Metadata, Tensors, image};
use tokio::task::JoinHandle;

use super::node::Node;
use super::pairing::{pair, select};
use super::peak::Peak;
use super::report::{Event, Reporter};
use super::workers::Workers;
use super::{Run, levels};
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::learn::{Evaluation, Evaluator};
use crate::memory;

/// A round's new model, as the top lent it.
struct NewModel {
    frame: Frame,
    arena: Arc<PeerArena>,
    /// What the optimizer remembers with it, lent in front of it.
    state: Option<(Frame, Arc<PeerArena>)>,
    seconds: f64,
    moved: Moved,
}

/// What the daemon has counted of the job.
#[derive(Clone, Copy, Default)]
struct Moved {
    bytes_referenced: u64,
    gateway: GatewayStatus,
}

/// What became of it.
struct Examined {
    model: NewModel,
    /// Why its checkpoint could not be written, if it could not.
    checkpoint_failed: Option<String>,
    metadata: Metadata,
    evaluation: Option<Evaluation>,
    evaluator: Option<Evaluator>,
}

pub(super) struct Rounds<'r, 'j> {
    run: &'r mut Run<'j>,
    workers: Workers,
    reporter: &'r mut Reporter,
    /// Registered workers by id, as indices into the job's workers.
    ids: HashMap<WorkerId, usize>,
    /// The same of proxies.
    proxies: HashMap<WorkerId, usize>,
    ready: HashSet<WorkerId>,
    gone: HashSet<usize>,
    round: u32,
    evaluator: Option<Evaluator>,
    examining: Option<JoinHandle<anyhow::Result<Examined>>>,
    arenas: HashMap<ArenaId, Arc<PeerArena>>,
    moved_before: Moved,
    /// Remote workers that are dead, and whose proxies are to leave.
    to_drop: Vec<usize>,
    last: Option<Evaluation>,
    peak: Peak,
}

/// What the coordinator waits for.
enum News {
    /// A frame from a worker.
    Frame(Frame),
    /// Anything else, already dealt with.
    Other,
}

impl<'r, 'j> Rounds<'r, 'j> {
    pub(super) fn new(run: &'r mut Run<'j>, workers: Workers, reporter: &'r mut Reporter) -> Self {
        Self {
            run,
            workers,
            reporter,
            ids: HashMap::new(),
            proxies: HashMap::new(),
            ready: HashSet::new(),
            gone: HashSet::new(),
            round: 0,
            evaluator: None,
            examining: None,
            arenas: HashMap::new(),
            moved_before: Moved::default(),
            to_drop: Vec::new(),
            last: None,
            peak: Peak::default(),
        }
    }

    pub(super) fn into_workers(self) -> Workers {
        self.workers
    }

    /// Everything from the workers' start to the last model.
    pub(super) async fn all(&mut self, node: &Node) -> Outcome {
        let job = self.run.job;
        self.evaluator = tokio::task::spawn_blocking({
            let job = job.clone();
            move || crate::learn::evaluator(&job)
        })
        .await
        .context("the test set could not be read")
        .because(Cause::Job)?
        .because(Cause::Config)?;
        self.wait_for_workers().await?;
        self.announce_job(node).await?;
        for round in self.run.first_round..=job.rounds {
            self.one_round(round).await?;
        }
        self.examined().await?;
        self.finish().await
    }

    async fn wait_for_workers(&mut self) -> Outcome {
        let all = memory::registrations(self.run.job) as usize - 1;
        self.reporter.begin("starting", all as u64);
        loop {
            let known = self.ids.keys().chain(self.proxies.keys());
            let ready = known.filter(|id| self.ready.contains(id)).count();
            self.reporter.position(ready as u64, "workers ready".to_owned());
            if ready == all {
                return Ok(());
            }
            if let News::Frame(frame) = self.news().await?
                && frame.kind == FrameKind::Ready as u16
            {
                self.ready.insert(frame.from);
            }
        }
    }

    /// What the daemon has of this job.
    async fn status(&mut self) -> Outcome<Status> {
        self.run
            .client
            .status(Some(self.run.job_id))
            .await
            .because(Cause::Job)
    }

    /// What has moved so far.
    fn moved(&self, status: &Status) -> Moved {
        let referenced = status
            .workers
            .iter()
            .map(|worker| worker.counters.referenced_bytes);
        let job = status.jobs.iter().find(|job| job.job == self.run.job_id);
        Moved {
            bytes_referenced: referenced.sum(),
            gateway: job.and_then(|job| job.gateway).unwrap_or_default(),
        }
    }

    async fn announce_job(&mut self, node: &Node) -> Outcome {
        let status = self.status().await?;
        let arenas = || status.workers.iter().flat_map(|worker| &worker.arenas);
        let pages = arenas().map(|arena| arena.page_bytes).min();
        let note = arenas().find_map(|arena| arena.note.clone());
        self.moved_before = self.moved(&status);
        let event = Event::JobStarted {
            job: self.run.job.name.clone(),
            run: self.run.folder.path().display().to_string(),
            daemon: node.socket.display().to_string(),
            own_daemon: node.is_own(),
            plane: status.daemon.plane,
            plane_reason: status.daemon.plane_reason,
            page_bytes: pages.unwrap_or(0),
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
        let begun = Instant::now();
        let frames = self.plan_round(round)?;
        self.run
            .frames
            .send(&frames)
            .await
            .context("the frame socket failed")
            .because(Cause::Job)?;
        let mut state = None;
        let frame = loop {
            match self.news().await? {
                News::Frame(frame) if frame.kind == FrameKind::State as u16 && frame.round == round => {
                    state = Some(frame);
                }
                News::Frame(frame) if frame.kind == FrameKind::Model as u16 && frame.round == round => {
                    break frame;
                }
                News::Frame(frame) => tracing::warn!(kind = frame.kind, from = %frame.from, "not expected"),
                News::Other => {}
            }
        };
        let seconds = begun.elapsed().as_secs_f64();
        if self
            .ids
            .get(&frame.from)
            .map(|&index| self.run.job.workers[index].kind)
            != Some(Kind::Top)
        {
            return Err(Failure::new(
                Cause::Job,
                anyhow!("{} sent a model but is not the top", frame.from),
            ));
        }
        let status = self.status().await?;
        let now = self.moved(&status);
        let moved = now.since(&self.moved_before);
        self.moved_before = now;
        let arena = self.arena(frame.key.arena).await?;
        let state = match state.filter(|state| state.from == frame.from) {
            Some(state) => Some((state, self.arena(state.key.arena).await?)),
            None => None,
        };
        self.examined().await?;
        self.examine(NewModel {
            frame,
            arena,
            state,
            seconds,
            moved,
        });
        Ok(())
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

    /// Tells everybody who takes part its children and its parent.
    fn plan_round(&self, round: u32) -> Outcome<Vec<Frame>> {
        let workers = &self.run.job.workers;
        let by_index = |ids: &HashMap<WorkerId, usize>| -> HashMap<usize, WorkerId> {
            ids.iter().map(|(&id, &index)| (index, id)).collect()
        };
        // A worker's own id is what it has for its children, its proxy's what it has for its parent.
        let (own, proxies) = (by_index(&self.ids), by_index(&self.proxies));
        let present = |index: usize| {
            let worker = &workers[index];
            let there = (own.contains_key(&index) || !memory::is_local(worker))
                && (proxies.contains_key(&index) || !memory::is_remote(worker));
            there && !self.gone.contains(&index)
        };
        let mut pairs = pair(workers, present);
        select(workers, &mut pairs, self.run.job.seed, round);
        if pairs.is_empty() {
            let error = anyhow!("round {round}: no trainer that is left has a way to the top");
            return Err(Failure::new(Cause::Job, error));
        }
        let mut order: Vec<usize> = pairs.keys().copied().collect();
        order.sort_unstable();
        let from = self.run.id;
        let mut frames = Vec::new();
        for index in order {
            let frame = |to: WorkerId, kind: FrameKind, value: WorkerId, covers| {
                let (kind, value) = (kind as u16, u64::from(value.0));
                Frame {
                    to,
                    from,
                    kind,
                    round,
                    value,
                    covers,
                    ..Frame::default()
                }
            };
            let pair = &pairs[&index];
            let mut parent = pair.parent.map_or(WorkerId::NONE, |parent| own[&parent]);
            if let Some(&proxy) = proxies.get(&index) {
                // The worker's parent is beyond the wire; its proxy's is here.
                frames.push(frame(proxy, FrameKind::Begin, parent, 0));
                parent = WorkerId::NONE;
            }
            if let Some(&id) = own.get(&index) {
                let child = |child| proxies.get(child).copied().unwrap_or_else(|| own[child]);
                let children = pair.children.iter().map(child);
                frames.extend(children.map(|child| frame(id, FrameKind::Child, child, 0)));
                frames.push(frame(id, FrameKind::Begin, parent, pair.children.len() as u32));
            }
        }
        Ok(frames)
    }

    /// Waits for whatever comes next, and deals with it unless it is a frame.
    async fn news(&mut self) -> Outcome<News> {
        let pause = Duration::from_millis(100).max(Duration::from_millis(2) * self.ids.len() as u32);
        tokio::select! {
            frame = self.run.frames.recv() => {
                let frame = frame.context("the frame socket failed").because(Cause::Job)?;
                let frame = frame.context("the frame socket was closed").because(Cause::Job)?;
                return Ok(News::Frame(frame));
            }
            event = self.run.client.event() => {
                let event = event.context("the daemon is gone").because(Cause::Job)?;
                self.daemon_event(event)?;
            }
            (index, status) = self.workers.exited() => self.process_gone(index, &status)?,
            examined = done(&mut self.examining) => {
                self.examining = None;
                self.report(examined.because(Cause::Job)?).await?;
            }
            () = tokio::time::sleep(pause) => {}
        }
        for index in std::mem::take(&mut self.to_drop) {
            let name = &self.run.job.workers[index].name;
            self.run.client.drop_worker(name).await.because(Cause::Job)?;
        }
        self.peak.sample(self.workers.pids());
        Ok(News::Other)
    }

    fn daemon_event(&mut self, event: DaemonEvent) -> Outcome {
        match event {
            DaemonEvent::PeerJoined { worker, name } => {
                let (name, ids) = match proxied(&name) {
                    Some(name) => (name, &mut self.proxies),
                    None => (name.as_str(), &mut self.ids),
                };
                if let Some(index) = self.run.job.workers.iter().position(|spec| spec.name == name) {
                    ids.insert(worker, index);
                }
            }
            DaemonEvent::PeerLost(lost) => {
                if let Some(&index) = self.ids.get(&lost.worker) {
                    self.worker_gone(index, "its connection to the daemon closed")?;
                } else if let Some(&index) = self.proxies.get(&lost.worker) {
                    self.worker_gone(index, "its session with the gateway is over")?;
                }
            }
            DaemonEvent::DeadLetter(letter) => {
                tracing::warn!(to = %letter.to, kind = letter.kind, "not delivered: {}", letter.refusal);
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

    fn process_gone(&mut self, index: usize, status: &str) -> Outcome {
        self.worker_gone(index, status)
    }

    /// A worker is gone. Before the first round that ends the job, and later too if it is the top.
    fn worker_gone(&mut self, index: usize, how: &str) -> Outcome {
        if !self.gone.insert(index) {
            return Ok(());
        }
        let spec = &self.run.job.workers[index];
        if memory::is_remote(spec) {
            self.to_drop.push(index);
        }
        if self.round == 0 || spec.kind == Kind::Top {
            let log = self.run.folder.log_tail(&spec.name, 5);
            let when = if self.round == 0 {
                "before the first round".to_owned()
            } else {
                format!("in round {}", self.round)
            };
            let error = anyhow!("{} is gone {when} ({how}); the end of its log:\n{log}", spec.name);
            return Err(Failure::new(Cause::Job, error));
        }
        let event = Event::WorkerLost {
            worker: spec.name.clone(),
            round: self.round,
            last_words: self.run.folder.log_tail(&spec.name, 1),
        };
        self.reporter.event(&event).because(Cause::Job)
    }

    /// Begins to write out and evaluate a new model, beside the rounds.
    fn examine(&mut self, model: NewModel) {
        let evaluator = self.evaluator.take();
        let schema = self.run.schema.clone();
        let folder = self.run.folder.clone();
        let round = model.frame.round;
        let last = round == self.run.job.rounds;
        let every = self.run.checkpoint_every;
        let checkpoint = every > 0 && (round.is_multiple_of(every) || last);
        let keep = self.run.keep_checkpoints;
        self.examining = Some(tokio::task::spawn_blocking(move || {
            let bytes = model.arena.object(model.frame.key, model.frame.length)?;
            let (metadata, offset) =
                image::check(bytes, &schema).context("the top's model is not the job's")?;
            let mut checkpoint_failed = None;
            if checkpoint {
                let state = model.state.as_ref();
                let state = state.map(|(frame, arena)| arena.object(frame.key, frame.length));
                match folder.checkpoint(round, bytes, state.transpose()?) {
                    Ok(_) => keep.into_iter().for_each(|keep| folder.prune(round, keep)),
                    // The job can do without: the next one may have room.
                    Err(error) => checkpoint_failed = Some(format!("{error:#}")),
                }
            }
            if last {
                folder.last_model(round, bytes, checkpoint && checkpoint_failed.is_none())?;
            }
            let tensors = Tensors::new(&schema, &bytes[offset..][..schema.data_bytes()]);
            let evaluation = evaluator
                .as_ref()
                .map(|evaluator| evaluator.evaluate(tensors))
                .transpose()?;
            Ok(Examined {
                model,
                checkpoint_failed,
                metadata,
                evaluation,
                evaluator,
            })
        }));
    }

    /// Waits until the model that is being examined, if any, has been.
    async fn examined(&mut self) -> Outcome {
        while self.examining.is_some() {
            if let News::Frame(frame) = self.news().await? {
                tracing::warn!(kind = frame.kind, from = %frame.from, "not expected");
            }
        }
        Ok(())
    }

    /// Gives the model back and tells of its round.
    async fn report(&mut self, examined: Examined) -> Outcome {
        let Examined {
            model:
                NewModel {
                    frame,
                    state,
                    seconds,
                    moved,
                    ..
                },
            checkpoint_failed,
            metadata,
            evaluation,
            evaluator,
        } = examined;
        self.evaluator = evaluator;
        self.last = evaluation;
        let release = |lent: &Frame| Frame {
            to: lent.from,
            from: self.run.id,
            kind: FrameKind::Release as u16,
            round: lent.round,
            key: lent.key,
            ..Frame::default()
        };
        let state = state.iter().map(|(state, _)| release(state));
        let releases: Vec<Frame> = [release(&frame)].into_iter().chain(state).collect();
        self.run
            .frames
            .send(&releases)
            .await
            .context("the frame socket failed")
            .because(Cause::Job)?;
        if let Some(error) = checkpoint_failed {
            let round = frame.round;
            let event = Event::CheckpointFailed { round, error };
            self.reporter.event(&event).because(Cause::Job)?;
        }
        // A model that no update changed is the round's before, and says so.
        let changed = metadata.round == frame.round;
        let event = Event::Round {
            round: frame.round,
            seconds,
            loss: evaluation.map(|evaluation| evaluation.loss),
            accuracy: evaluation.map(|evaluation| evaluation.accuracy),
            train_loss: metadata.loss.filter(|_| changed),
            trainers: frame.covers,
            samples: if changed { metadata.samples } else { 0 },
            updates_folded: if changed { metadata.folded } else { 0 },
            bytes_referenced: moved.bytes_referenced,
            bytes_copied: if changed { metadata.bytes_copied } else { 0 },
            bytes_received: moved.gateway.bytes_received,
            bytes_sent: moved.gateway.bytes_sent,
        };
        self.reporter.event(&event).because(Cause::Job)?;
        let accuracy = evaluation.map_or(String::new(), |it| {
            format!("accuracy {:.2} %", it.accuracy * 100.0)
        });
        self.reporter.position(u64::from(frame.round), accuracy);
        Ok(())
    }

    async fn finish(&mut self) -> Outcome {
        self.peak.sample(self.workers.pids());
        let status = self.status().await?;
        let arenas = status
            .jobs
            .iter()
            .find(|job| job.job == self.run.job_id)
            .map_or(0, |job| job.arena_peak_bytes);
        self.reporter.end();
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

impl Moved {
    /// What came to it since.
    fn since(&self, before: &Self) -> Self {
        let gateway = GatewayStatus {
            bytes_received: self.gateway.bytes_received - before.gateway.bytes_received,
            bytes_sent: self.gateway.bytes_sent - before.gateway.bytes_sent,
        };
        Self {
            // What a worker had sent goes when it does.
            bytes_referenced: self.bytes_referenced.saturating_sub(before.bytes_referenced),
            gateway,
        }
    }
}

/// Waits for the examination; for ever when there is none.
async fn done(examining: &mut Option<JoinHandle<anyhow::Result<Examined>>>) -> anyhow::Result<Examined> {
    match examining {
        Some(examining) => examining.await.context("the new model could not be examined")?,
        None => std::future::pending().await,
    }
}
