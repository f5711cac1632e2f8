//! The child's half of the protocol: once a round it is lent the model, has it trained on, and lends the update that comes of
//! it, until the parent's verdict. A trainer on the node, one beyond a wire, and the gateway's proxy of the latter are this
//! machine in three shells, which hold sockets, arenas, sessions and learners.
//!
//! ```text
//!         Begin (coordinator), if the parent is new;
//!         Model (parent); no update pending                         Release or Refuse (who has the update)
//!   idle ───────────────────────────────────────────▶ training ──▶ pending ─────────────────────────────────▶ idle
//!    ▲                                                  │  ▲ │      │  ▲ │
//!    │          the parent's successor lends the same   └──┘ │      │  └─┘ Begin again: lent to the successor
//!    │                                                       │      │
//!    └────────── Nothing, or given up ───────────────────────┘      │
//!    └────────── the parent is gone and a later round has begun ────┘ orphaned
//! ```
//!
//! Replay is idempotent: a `Begin`, a `Model` or a verdict that comes a second time is answered as the first was, and changes
//! nothing. What other workers than the coordinator and the parent send is given back or ignored. Nothing here depends on time.

use std::collections::VecDeque;

use lifl_common::frame::{Frame, FrameKind, Refusal};
use lifl_common::id::{Key, WorkerId};

use crate::parent::{LentModel, OfferedModels, PendingUpdate};

/// What a trainer is told.
#[derive(Clone, Copy, Debug)]
pub enum Input {
    /// A frame has come.
    Frame(Frame),
    /// Another worker of the job is gone.
    PeerLost(WorkerId),
    /// A frame did not reach that worker, which therefore has nothing of ours any more.
    Undelivered(WorkerId),
    /// The learner is there: the coordinator may count on this worker.
    Ready,
    /// The model of that round's training is not read any more, though the update is still to come.
    ModelRead(u32),
    /// What came of training: the frame that lends the update, which is published and nobody else's yet.
    Trained(Frame),
    /// Nothing comes of that round: training has failed, or took too long.
    Nothing(u32),
    /// That round's training does not take place, or is broken off, and nobody is told: the model cannot be had since its owner
    /// has just died, or the round is over.
    GivenUp(u32),
}

/// What a trainer wants done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// Send a frame.
    Send(Frame),
    /// Train on that model. [`Input::Trained`], [`Input::Nothing`] or [`Input::GivenUp`] ends it.
    Train(LentModel),
    /// A later round has begun than the one that is trained for. It may go on: its update is late, and its parent says so.
    /// Whoever does not want that [gives it up](Input::GivenUp).
    Overtaken(u32),
    /// Nobody has the update any more, so its slot can be written again.
    Settled {
        /// Its round.
        round: u32,
        /// Where it lies.
        key: Key,
        /// Why it does not count; `None` if it does.
        refusal: Option<Refusal>,
    },
}

/// A training that has been asked for and has not ended.
#[derive(Clone, Copy, Debug)]
struct Training {
    model: LentModel,
    /// Who is to get the model back; `None` if it has been given back, or its lender is gone.
    lender: Option<WorkerId>,
    /// Whether the model is [not needed](Input::ModelRead) any more.
    read: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub struct Trainer {
    id: WorkerId,
    coordinator: WorkerId,
    /// The round that runs, and its parent.
    round: u32,
    parent: WorkerId,
    offered: OfferedModels,
    training: Option<Training>,
    update: Option<PendingUpdate>,
    /// The last round in which a parent has had an answer: an update, or that there is none.
    answered: u32,
    ready: bool,
    outputs: VecDeque<Output>,
}

impl Trainer {
    /// A worker of that number in a job of that coordinator's.
    pub fn new(id: WorkerId, coordinator: WorkerId) -> Self {
        Self {
            id,
            coordinator,
            round: 0,
            parent: WorkerId::NONE,
            offered: OfferedModels::default(),
            training: None,
            update: None,
            answered: 0,
            ready: false,
            outputs: VecDeque::new(),
        }
    }

    /// The round that runs; 0 before the first.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Whether the parent still waits for an answer in that round.
    pub fn awaits(&self, round: u32) -> bool {
        round == self.round && round > self.answered
    }

    /// The model that is lent to this worker for the training that runs, unless it has been given back.
    pub fn model(&self) -> Option<LentModel> {
        let training = self.training.as_ref()?;
        training.lender.map(|lender| LentModel {
            lender,
            ..training.model
        })
    }

    /// The update that no parent has decided on.
    #[cfg(test)]
    pub(crate) fn update(&self) -> Option<&PendingUpdate> {
        self.update.as_ref()
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Takes note of one thing that happened.
    pub fn handle(&mut self, input: Input) {
        match input {
            Input::Frame(frame) => self.frame(&frame),
            Input::PeerLost(worker) => {
                self.offered.lost(worker);
                if let Some(training) = &mut self.training {
                    training.lender.take_if(|lender| *lender == worker);
                }
                self.lost_holder(worker);
            }
            Input::Undelivered(worker) => self.lost_holder(worker),
            Input::Ready => {
                if !std::mem::replace(&mut self.ready, true) {
                    self.send(self.coordinator, FrameKind::Ready, Frame::default());
                }
            }
            Input::ModelRead(round) => {
                if let Some(training) = self.training_for(round) {
                    training.read = true;
                    self.release_model();
                }
            }
            Input::Trained(update) => self.trained(update),
            Input::Nothing(round) => self.nothing(round),
            Input::GivenUp(round) => self.end_training(round),
        }
        self.start();
    }

    fn frame(&mut self, frame: &Frame) {
        let from_coordinator = frame.from == self.coordinator;
        match FrameKind::from_number(frame.kind) {
            Some(FrameKind::Begin) if from_coordinator => match u32::try_from(frame.value) {
                Ok(parent) => self.begin(frame.round, WorkerId(parent)),
                Err(_) => tracing::error!(parent = frame.value, "no worker has the number of that parent"),
            },
            Some(FrameKind::Model) => self.offered(LentModel::of(frame)),
            Some(kind @ (FrameKind::Release | FrameKind::Refuse)) => {
                let own = |update: &mut PendingUpdate| update.is_judged_by(frame);
                let Some(update) = self.update.take_if(own) else {
                    // Said twice, by a parent and its successor; or by who does not have it.
                    return tracing::debug!(from = %frame.from, "a verdict on what that worker does not have");
                };
                let refusal = (kind == FrameKind::Refuse)
                    .then(|| Refusal::from_number(frame.refusal).unwrap_or(Refusal::BadKey));
                self.settle(update.round(), update.key(), refusal);
            }
            Some(FrameKind::Ping) if from_coordinator => {
                let round = self.answered;
                self.send_round(self.coordinator, FrameKind::Pong, round);
            }
            _ => tracing::debug!(kind = frame.kind, from = %frame.from, "not for a trainer"),
        }
    }

    /// A round is announced; or the same again, with the same parent or its successor, which is to hear what its predecessor
    /// may have heard.
    fn begin(&mut self, round: u32, parent: WorkerId) {
        if round < self.round {
            return tracing::debug!(round, "announced after a later round");
        }
        let again = round == self.round;
        (self.round, self.parent) = (round, parent);
        if let Some(training) = self.training.filter(|training| training.model.round < round) {
            self.outputs.push_back(Output::Overtaken(training.model.round));
        }
        match &mut self.update {
            Some(update) if update.round() == round => {
                let frame = update.lend_again(parent);
                self.send(parent, FrameKind::Update, frame);
            }
            Some(_) => self.give_up_orphan(),
            None if again && self.answered == round => self.send_round(parent, FrameKind::Nothing, round),
            None => {}
        }
    }

    /// Somebody lends a model. From the parent that the coordinator named last it also says that its round begins.
    fn offered(&mut self, model: LentModel) {
        if model.round > self.round && model.lender == self.parent {
            self.begin(model.round, model.lender);
        }
        let parent = self.parent;
        if let Some(training) = self.training_for(model.round) {
            let replayed = training.model.key == model.key && training.lender == Some(model.lender);
            if replayed {
                return;
            }
            // A new top's copy has the same bytes: the one that is being read will do. Or it is a stranger's.
            let other = training.model.key != model.key || model.lender != parent;
            if training.read || other {
                return self.release(&model);
            }
            // The parent's successor: it is to get it back.
            if let Some(lender) = training.lender.replace(model.lender) {
                self.release(&LentModel { lender, ..model });
            }
            return;
        }
        let answered = (self.round, self.answered) == (model.round, model.round);
        if answered && model.lender == self.parent && self.update.is_none() {
            // A parent that begins the round anew, after our update was refused: it need not wait.
            self.send_round(model.lender, FrameKind::Nothing, model.round);
        }
        let before = if model.round < self.round || model.round <= self.answered {
            self.offered.forget(&model);
            Some(model)
        } else {
            self.offered.offer(model)
        };
        if let Some(before) = before {
            self.release(&before);
        }
    }

    /// Asks for training, when the round's model is there, no other training runs and the last update has been settled.
    fn start(&mut self) {
        for model in self.offered.take_useless(self.round, self.parent) {
            self.release(&model);
        }
        if self.training.is_some() || self.update.is_some() {
            return;
        }
        let Some(model) = self.offered.take(self.round, self.parent) else {
            return;
        };
        if self.awaits(model.round) {
            self.training = Some(Training {
                model,
                lender: Some(model.lender),
                read: false,
            });
            self.outputs.push_back(Output::Train(model));
        } else {
            self.release(&model);
        }
    }

    /// The model goes back, the update goes up.
    fn trained(&mut self, update: Frame) {
        let parent = self.answer(update.round);
        if let Some(parent) = parent.filter(|_| self.update.is_none()) {
            let update = PendingUpdate::new(update, parent);
            self.send(parent, FrameKind::Update, update.frame());
            self.update = Some(update);
        } else {
            // Nobody waits for it.
            let over = update.round < self.round;
            let refusal = if over {
                Refusal::RoundOver
            } else {
                Refusal::NotExpected
            };
            self.settle(update.round, update.key, Some(refusal));
        }
    }

    fn nothing(&mut self, round: u32) {
        if let Some(parent) = self.answer(round) {
            self.send_round(parent, FrameKind::Nothing, round);
            self.send_round(self.coordinator, FrameKind::Nothing, round);
        }
    }

    /// Training for a round is over, and the round is answered. Gives who is to hear the answer: the parent, or, after the
    /// round, who handed its model down, to say that it is late; nobody, if it was answered before or that worker is gone.
    fn answer(&mut self, round: u32) -> Option<WorkerId> {
        let late = self.model().filter(|model| model.round == round);
        self.end_training(round);
        let parent = if round == self.round {
            Some(self.parent)
        } else {
            late.map(|model| model.lender)
        };
        let parent = parent.filter(|_| round > self.answered)?;
        self.answered = round;
        Some(parent)
    }

    fn end_training(&mut self, round: u32) {
        if self.training_for(round).is_some() {
            self.release_model();
            self.training = None;
        }
    }

    fn training_for(&mut self, round: u32) -> Option<&mut Training> {
        self.training
            .as_mut()
            .filter(|training| training.model.round == round)
    }

    /// A worker has our update no longer, if it had it. Its successor in the round is lent the same.
    fn lost_holder(&mut self, worker: WorkerId) {
        if let Some(update) = &mut self.update {
            update.lost(worker);
        }
        self.give_up_orphan();
    }

    fn give_up_orphan(&mut self) {
        let round = self.round;
        if let Some(update) = self.update.take_if(|update| update.is_orphaned(round)) {
            self.settle(update.round(), update.key(), Some(Refusal::RoundOver));
        }
    }

    fn settle(&mut self, round: u32, key: Key, refusal: Option<Refusal>) {
        self.outputs.push_back(Output::Settled { round, key, refusal });
    }

    /// Gives the model that is trained on back, unless that was done before.
    fn release_model(&mut self) {
        if let Some(model) = self.model() {
            self.release(&model);
            if let Some(training) = &mut self.training {
                training.lender = None;
            }
        }
    }

    fn release(&mut self, model: &LentModel) {
        self.send(model.lender, FrameKind::Release, model.release());
    }

    fn send_round(&mut self, to: WorkerId, kind: FrameKind, round: u32) {
        let frame = Frame {
            round,
            ..Frame::default()
        };
        self.send(to, kind, frame);
    }

    fn send(&mut self, to: WorkerId, kind: FrameKind, frame: Frame) {
        let frame = Frame {
            to,
            from: self.id,
            kind: kind as u16,
            ..frame
        };
        self.outputs.push_back(Output::Send(frame));
    }
}

#[cfg(test)]
mod tests;
