use std::collections::BTreeSet;

use lifl_common::id::{ArenaId, Generation};
use proptest::prelude::*;

use super::*;

const COORDINATOR: WorkerId = WorkerId(1);
const TRAINER: WorkerId = WorkerId(2);
const LEAF: WorkerId = WorkerId(3);
const SUCCESSOR: WorkerId = WorkerId(4);
const STRANGER: WorkerId = WorkerId(5);

/// A model of that round, as the top, or the top's successor, has it.
fn model_key(round: u32, top: u32) -> Key {
    Key {
        arena: ArenaId(400 + top),
        slot: 0,
        generation: Generation(u64::from(round)),
    }
}

fn update_key(generation: u64) -> Key {
    Key {
        arena: ArenaId(8),
        slot: 0,
        generation: Generation(generation),
    }
}

fn frame(from: WorkerId, kind: FrameKind, round: u32, key: Key) -> Input {
    Input::Frame(Frame {
        to: TRAINER,
        from,
        kind: kind as u16,
        round,
        key,
        ..Frame::default()
    })
}

fn begin(round: u32, parent: WorkerId) -> Input {
    Input::Frame(Frame {
        to: TRAINER,
        from: COORDINATOR,
        kind: FrameKind::Begin as u16,
        round,
        value: u64::from(parent.0),
        ..Frame::default()
    })
}

fn model(round: u32, lender: WorkerId) -> Input {
    frame(lender, FrameKind::Model, round, model_key(round, 0))
}

fn lent(round: u32, lender: WorkerId) -> LentModel {
    LentModel {
        round,
        key: model_key(round, 0),
        length: 0,
        lender,
    }
}

fn trained(round: u32, generation: u64) -> Input {
    Input::Trained(Frame {
        round,
        key: update_key(generation),
        samples: 600,
        ..Frame::default()
    })
}

fn release(from: WorkerId, generation: u64) -> Input {
    frame(from, FrameKind::Release, 0, update_key(generation))
}

fn refuse(from: WorkerId, generation: u64, refusal: u16) -> Input {
    Input::Frame(Frame {
        from,
        kind: FrameKind::Refuse as u16,
        key: update_key(generation),
        refusal,
        ..Frame::default()
    })
}

/// What a trainer wants done, told shortly.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Said {
    Overtaken(u32),
    Train(u32, WorkerId),
    /// A frame to that worker: kind, round and the generation of its key.
    Send(WorkerId, FrameKind, u32, u64),
    Settled(u64, Option<Refusal>),
}

use FrameKind::{Nothing, Pong, Release, Update};
use Said::{Overtaken, Send, Settled, Train};

struct Stage(Trainer);

impl Stage {
    fn new() -> Self {
        Self(Trainer::new(TRAINER, COORDINATOR))
    }

    /// In the first round, which trains on the leaf's model.
    fn training() -> Self {
        let mut stage = Self::new();
        stage.after(begin(1, LEAF));
        assert_eq!(stage.after(model(1, LEAF)), [Train(1, LEAF)]);
        stage
    }

    /// In the first round, with an update (1) that the leaf has.
    fn pending() -> Self {
        let mut stage = Self::training();
        assert_eq!(
            stage.after(trained(1, 1)),
            [Send(LEAF, Release, 1, 1), Send(LEAF, Update, 1, 1)]
        );
        stage
    }

    fn after(&mut self, input: Input) -> Vec<Said> {
        self.0.handle(input);
        let outputs = std::iter::from_fn(|| self.0.poll_output());
        let said = outputs.map(|output| match output {
            Output::Overtaken(round) => Overtaken(round),
            Output::Train(model) => Train(model.round, model.lender),
            Output::Settled { key, refusal, .. } => Settled(key.generation.0, refusal),
            Output::Send(frame) => {
                assert_eq!(frame.from, TRAINER);
                let kind = FrameKind::from_number(frame.kind).expect("a kind");
                Send(frame.to, kind, frame.round, frame.key.generation.0)
            }
        });
        said.collect()
    }
}

#[test]
fn a_round_is_announced_its_model_trained_on_and_the_update_settled() {
    let mut stage = Stage::new();
    assert_eq!(
        stage.after(Input::Ready),
        [Send(COORDINATOR, FrameKind::Ready, 0, 0)]
    );
    assert_eq!(stage.after(Input::Ready), [], "it is there once");
    assert_eq!(stage.after(begin(1, LEAF)), []);
    assert!(stage.0.awaits(1));
    assert_eq!(stage.after(model(1, LEAF)), [Train(1, LEAF)]);
    assert_eq!(stage.0.model(), Some(lent(1, LEAF)));
    assert_eq!(
        stage.after(trained(1, 1)),
        [Send(LEAF, Release, 1, 1), Send(LEAF, Update, 1, 1)]
    );
    assert!(!stage.0.awaits(1));
    assert_eq!(stage.after(release(LEAF, 1)), [Settled(1, None)]);
    assert!(stage.0.update().is_none());
}

#[test]
fn the_parent_that_was_named_begins_the_next_round_by_its_model() {
    let mut stage = Stage::pending();
    assert_eq!(
        stage.after(model(2, LEAF)),
        [],
        "the last update's slot is not free"
    );
    assert_eq!(stage.after(release(LEAF, 1)), [Settled(1, None), Train(2, LEAF)]);
}

#[test]
fn a_model_that_is_there_before_its_round_waits_and_a_strangers_goes_back() {
    let mut stage = Stage::new();
    assert_eq!(stage.after(model(1, LEAF)), []);
    assert_eq!(stage.after(model(1, STRANGER)), []);
    assert_eq!(
        stage.after(begin(1, LEAF)),
        [Send(STRANGER, Release, 1, 1), Train(1, LEAF)]
    );
    assert_eq!(stage.after(model(1, STRANGER)), [Send(STRANGER, Release, 1, 1)]);
    assert_eq!(stage.after(model(3, STRANGER)), [], "it might become the parent");
    assert_eq!(
        stage.after(model(4, STRANGER)),
        [Send(STRANGER, Release, 3, 3)],
        "each lender's last"
    );
    assert_eq!(
        stage.after(model(0, LEAF)),
        [Send(LEAF, Release, 0, 0)],
        "an old round's"
    );
}

#[test]
fn the_parents_successor_is_lent_the_same_update_and_decides_alone() {
    let mut stage = Stage::pending();
    assert_eq!(stage.after(Input::PeerLost(LEAF)), []);
    assert_eq!(stage.after(begin(1, SUCCESSOR)), [Send(SUCCESSOR, Update, 1, 1)]);
    assert_eq!(
        stage.after(begin(1, SUCCESSOR)),
        [Send(SUCCESSOR, Update, 1, 1)],
        "said again, it is answered again"
    );
    assert_eq!(stage.after(release(LEAF, 1)), [], "it was dead when that came");
    assert_eq!(stage.after(release(SUCCESSOR, 1)), [Settled(1, None)]);
    assert_eq!(stage.after(release(SUCCESSOR, 1)), [], "replayed");
    assert_eq!(
        stage.after(begin(1, STRANGER)),
        [Send(STRANGER, Nothing, 1, 0)],
        "another successor waits for nothing"
    );
}

#[test]
fn a_parent_that_begins_the_round_anew_after_a_refusal_hears_that_nothing_comes() {
    let mut stage = Stage::pending();
    let late = Refusal::Late;
    assert_eq!(
        stage.after(refuse(LEAF, 1, late as u16)),
        [Settled(1, Some(late))]
    );
    assert_eq!(
        stage.after(model(1, LEAF)),
        [Send(LEAF, Nothing, 1, 0), Send(LEAF, Release, 1, 1)]
    );
}

#[test]
fn a_parent_that_dies_unheard_of_is_lent_nothing_any_more() {
    let mut stage = Stage::pending();
    assert_eq!(stage.after(begin(1, SUCCESSOR)), [Send(SUCCESSOR, Update, 1, 1)]);
    assert_eq!(stage.after(Input::PeerLost(LEAF)), [], "the successor has it");
    assert_eq!(
        stage.after(refuse(SUCCESSOR, 1, Refusal::NotFinite as u16)),
        [Settled(1, Some(Refusal::NotFinite))]
    );
}

#[test]
fn a_successor_during_training_gets_the_model_back_and_the_update() {
    let mut stage = Stage::training();
    assert_eq!(stage.after(Input::PeerLost(LEAF)), []);
    assert_eq!(stage.0.model(), None, "its lender is gone");
    assert_eq!(stage.after(begin(1, SUCCESSOR)), []);
    assert_eq!(stage.after(model(1, SUCCESSOR)), []);
    assert_eq!(stage.after(model(1, SUCCESSOR)), [], "replayed");
    assert_eq!(
        stage.after(trained(1, 1)),
        [Send(SUCCESSOR, Release, 1, 1), Send(SUCCESSOR, Update, 1, 1)]
    );
}

#[test]
fn a_parent_whose_successor_is_faster_than_the_news_of_its_death_gets_its_model_back() {
    let mut stage = Stage::training();
    stage.after(begin(1, SUCCESSOR));
    assert_eq!(stage.after(model(1, SUCCESSOR)), [Send(LEAF, Release, 1, 1)]);
    assert_eq!(stage.after(Input::PeerLost(LEAF)), []);
    assert_eq!(stage.0.model(), Some(lent(1, SUCCESSOR)));
}

#[test]
fn a_new_tops_copy_of_the_model_is_not_needed_during_training() {
    let mut stage = Stage::training();
    let copy = frame(LEAF, FrameKind::Model, 1, model_key(1, 1));
    assert_eq!(stage.after(copy), [Send(LEAF, Release, 1, 1)]);
    assert_eq!(stage.0.model(), Some(lent(1, LEAF)), "the first is still read");
}

#[test]
fn an_update_that_comes_late_is_lent_to_who_handed_its_model_down() {
    let mut stage = Stage::training();
    assert_eq!(stage.after(begin(2, SUCCESSOR)), [Overtaken(1)]);
    assert_eq!(stage.after(model(2, SUCCESSOR)), [], "one training at a time");
    assert_eq!(
        stage.after(trained(1, 1)),
        [Send(LEAF, Release, 1, 1), Send(LEAF, Update, 1, 1)]
    );
    assert_eq!(
        stage.after(refuse(LEAF, 1, Refusal::Late as u16)),
        [Settled(1, Some(Refusal::Late)), Train(2, SUCCESSOR)]
    );
}

#[test]
fn an_update_that_comes_late_and_whose_parent_is_gone_does_not_count() {
    let mut stage = Stage::training();
    stage.after(begin(2, SUCCESSOR));
    stage.after(Input::PeerLost(LEAF));
    assert_eq!(stage.after(trained(1, 1)), [Settled(1, Some(Refusal::RoundOver))]);
}

#[test]
fn an_update_whose_parent_is_gone_is_given_up_when_the_next_round_begins() {
    let mut stage = Stage::pending();
    stage.after(Input::PeerLost(LEAF));
    let orphaned = Settled(1, Some(Refusal::RoundOver));
    assert_eq!(stage.after(begin(2, SUCCESSOR)), [orphaned]);
    assert_eq!(stage.after(release(LEAF, 1)), [], "settled once");

    let mut stage = Stage::pending();
    assert_eq!(stage.after(begin(2, SUCCESSOR)), [], "its parent still has it");
    assert_eq!(stage.after(Input::PeerLost(LEAF)), [orphaned]);
}

#[test]
fn an_update_that_was_not_delivered_is_lent_again_when_the_round_is_announced_again() {
    let mut stage = Stage::pending();
    assert_eq!(stage.after(Input::Undelivered(LEAF)), []);
    assert_eq!(stage.after(release(LEAF, 1)), [], "it cannot have it");
    assert_eq!(stage.after(begin(1, LEAF)), [Send(LEAF, Update, 1, 1)]);
    stage.after(Input::Undelivered(LEAF));
    assert_eq!(
        stage.after(begin(2, LEAF)),
        [Settled(1, Some(Refusal::RoundOver))]
    );
}

#[test]
fn where_training_fails_parent_and_coordinator_hear_of_it() {
    let mut stage = Stage::training();
    assert_eq!(
        stage.after(Input::Nothing(1)),
        [
            Send(LEAF, Release, 1, 1),
            Send(LEAF, Nothing, 1, 0),
            Send(COORDINATOR, Nothing, 1, 0)
        ]
    );
    assert_eq!(stage.after(Input::Nothing(1)), [], "said once");
    assert_eq!(
        stage.after(begin(1, SUCCESSOR)),
        [Send(SUCCESSOR, Nothing, 1, 0)],
        "the coordinator knows"
    );
    assert_eq!(
        stage.after(model(1, SUCCESSOR)),
        [Send(SUCCESSOR, Nothing, 1, 0), Send(SUCCESSOR, Release, 1, 1)],
        "it asks again"
    );
    assert_eq!(
        stage.after(trained(1, 1)),
        [Settled(1, Some(Refusal::NotExpected))],
        "too late"
    );
}

#[test]
fn late_training_that_fails_is_told_to_who_handed_its_model_down() {
    let mut stage = Stage::training();
    stage.after(begin(2, SUCCESSOR));
    assert_eq!(
        stage.after(Input::Nothing(1)),
        [
            Send(LEAF, Release, 1, 1),
            Send(LEAF, Nothing, 1, 0),
            Send(COORDINATOR, Nothing, 1, 0)
        ]
    );
    assert!(stage.0.awaits(2));
    assert_eq!(stage.after(Input::Nothing(3)), [], "a round that has not begun");
}

#[test]
fn a_model_whose_owner_has_just_died_is_replaced_by_its_successors() {
    let mut stage = Stage::training();
    assert_eq!(stage.after(Input::GivenUp(1)), [Send(LEAF, Release, 1, 1)]);
    assert!(stage.0.awaits(1));
    let copy = frame(LEAF, FrameKind::Model, 1, model_key(1, 1));
    assert_eq!(stage.after(copy), [Train(1, LEAF)]);
    assert_eq!(stage.after(Input::GivenUp(1)), [Send(LEAF, Release, 1, 1)]);
    assert_eq!(stage.after(Input::GivenUp(1)), [], "there is nothing to give up");
}

#[test]
fn training_for_a_round_that_is_over_can_be_given_up() {
    let mut stage = Stage::training();
    assert_eq!(stage.after(model(2, LEAF)), [Overtaken(1)]);
    assert_eq!(
        stage.after(Input::GivenUp(1)),
        [Send(LEAF, Release, 1, 1), Train(2, LEAF)]
    );
}

#[test]
fn a_model_that_has_been_sent_on_goes_back_before_the_update() {
    let mut stage = Stage::training();
    assert_eq!(stage.after(Input::ModelRead(1)), [Send(LEAF, Release, 1, 1)]);
    assert_eq!(stage.after(Input::ModelRead(1)), [], "given back once");
    assert_eq!(stage.0.model(), None);
    stage.after(begin(1, SUCCESSOR));
    assert_eq!(
        stage.after(model(1, SUCCESSOR)),
        [Send(SUCCESSOR, Release, 1, 1)],
        "it has been read"
    );
    assert_eq!(stage.after(trained(1, 1)), [Send(SUCCESSOR, Update, 1, 1)]);
}

#[test]
fn an_update_may_come_before_its_model_was_asked_for_but_only_one_a_round() {
    let mut stage = Stage::new();
    stage.after(begin(1, LEAF));
    assert_eq!(stage.after(trained(1, 1)), [Send(LEAF, Update, 1, 1)]);
    assert_eq!(
        stage.after(trained(1, 2)),
        [Settled(2, Some(Refusal::NotExpected))]
    );
    assert_eq!(
        stage.after(trained(7, 3)),
        [Settled(3, Some(Refusal::NotExpected))],
        "of no round that there is"
    );
    assert_eq!(stage.after(model(1, LEAF)), [Send(LEAF, Release, 1, 1)]);
}

#[test]
fn nobody_but_the_coordinator_announces_and_asks() {
    let mut stage = Stage::new();
    for kind in [FrameKind::Begin, FrameKind::Ping] {
        assert_eq!(stage.after(frame(STRANGER, kind, 1, Key::NONE)), []);
    }
    assert_eq!(stage.0.round(), 0);
    stage.after(begin(2, LEAF));
    assert_eq!(stage.after(begin(1, STRANGER)), [], "a later round runs");
    let impossible = Frame {
        from: COORDINATOR,
        kind: FrameKind::Begin as u16,
        round: 3,
        value: u64::MAX,
        ..Frame::default()
    };
    assert_eq!(stage.after(Input::Frame(impossible)), []);
    for kind in [0, 99, FrameKind::Child as u16, FrameKind::Taken as u16] {
        let frame = Frame {
            from: COORDINATOR,
            kind,
            round: 5,
            ..Frame::default()
        };
        assert_eq!(stage.after(Input::Frame(frame)), []);
    }
    assert_eq!(stage.0.round(), 2);
}

#[test]
fn nobody_but_its_holder_decides_on_an_update() {
    let mut stage = Stage::pending();
    assert_eq!(stage.after(release(STRANGER, 1)), []);
    assert_eq!(stage.after(release(LEAF, 2)), [], "another object");
    assert_eq!(
        stage.after(refuse(LEAF, 1, 999)),
        [Settled(1, Some(Refusal::BadKey))],
        "a reason that nobody knows"
    );
}

#[test]
fn whoever_is_asked_says_in_which_round_it_has_answered_last() {
    let ping = || frame(COORDINATOR, FrameKind::Ping, 0, Key::NONE);
    let mut stage = Stage::training();
    assert_eq!(stage.after(ping()), [Send(COORDINATOR, Pong, 0, 0)]);
    stage.after(trained(1, 1));
    assert_eq!(stage.after(ping()), [Send(COORDINATOR, Pong, 1, 0)]);
}

/// What can happen to a trainer, in any order, as its shell, its peers and strangers may have it.
#[derive(Clone, Copy, Debug)]
enum Event {
    Begin(u32, WorkerId),
    Model(u32, u32, WorkerId),
    /// A verdict, and whether it is on the last update that was made.
    Verdict(WorkerId, bool, bool),
    Lost(WorkerId),
    Undelivered(WorkerId),
    Ping(WorkerId),
    ModelRead,
    /// Of the round that is trained for, if that is so, or of any.
    Trained(Option<u32>),
    Nothing(Option<u32>),
    GivenUp,
}

const LAST_ROUND: u32 = 6;

fn event() -> impl Strategy<Value = Event> {
    let worker = || prop_oneof![4 => Just(LEAF), 3 => Just(SUCCESSOR), 1 => Just(STRANGER)];
    let round = || 0..LAST_ROUND;
    prop_oneof![
        4 => (round(), worker()).prop_map(|(round, parent)| Event::Begin(round, parent)),
        6 => (round(), 0..2_u32, worker()).prop_map(|(round, top, lender)| Event::Model(round, top, lender)),
        4 => (worker(), any::<bool>(), prop::bool::weighted(0.8))
            .prop_map(|(from, taken, last)| Event::Verdict(from, taken, last)),
        2 => worker().prop_map(Event::Lost),
        1 => worker().prop_map(Event::Undelivered),
        1 => worker().prop_map(Event::Ping),
        1 => Just(Event::ModelRead),
        5 => prop::option::weighted(0.1, round()).prop_map(Event::Trained),
        1 => prop::option::weighted(0.3, round()).prop_map(Event::Nothing),
        1 => Just(Event::GivenUp),
    ]
}

/// A shell with one slot, which keeps account of what is on loan.
struct Shell {
    trainer: Trainer,
    /// Models that others have lent and not got back.
    lent: BTreeSet<(WorkerId, u64, u32)>,
    training: Option<LentModel>,
    /// The slot's update, and who was lent it last.
    update: Option<(Key, Option<WorkerId>)>,
    made: u64,
    settled: u64,
}

impl Shell {
    fn loan(lender: WorkerId, key: Key) -> (WorkerId, u64, u32) {
        (lender, key.generation.0, key.arena.0)
    }

    fn event(&mut self, event: Event) {
        let input = match event {
            Event::Begin(round, parent) => begin(round, parent),
            Event::Model(round, top, lender) => {
                let key = model_key(round, top);
                self.lent.insert(Self::loan(lender, key));
                frame(lender, FrameKind::Model, round, key)
            }
            Event::Verdict(from, taken, last) => {
                let generation = self.made - u64::from(!last && self.made > 0);
                let decides = self.update == Some((update_key(generation), Some(from)));
                let input = if taken {
                    release(from, generation)
                } else {
                    refuse(from, generation, Refusal::Late as u16)
                };
                let before = self.settled;
                self.input(input);
                assert_eq!(self.settled - before, u64::from(decides), "decided by who has it");
                return;
            }
            Event::Lost(worker) => {
                self.lent.retain(|(lender, ..)| *lender != worker);
                self.without(worker);
                Input::PeerLost(worker)
            }
            Event::Undelivered(worker) => {
                self.without(worker);
                Input::Undelivered(worker)
            }
            Event::Ping(worker) => frame(worker, FrameKind::Ping, 0, Key::NONE),
            Event::ModelRead => {
                let Some(model) = self.training else { return };
                Input::ModelRead(model.round)
            }
            Event::Trained(round) => {
                let asked = self.training.map(|model| model.round);
                let Some(round) = round.or(asked).filter(|_| self.update.is_none()) else {
                    return;
                };
                self.training.take_if(|model| model.round == round);
                self.made += 1;
                self.update = Some((update_key(self.made), None));
                trained(round, self.made)
            }
            Event::Nothing(round) => {
                let asked = self.training.map(|model| model.round);
                let Some(round) = round.or(asked) else { return };
                self.training.take_if(|model| model.round == round);
                Input::Nothing(round)
            }
            Event::GivenUp => {
                let Some(model) = self.training.take() else {
                    return;
                };
                Input::GivenUp(model.round)
            }
        };
        self.input(input);
    }

    /// That worker has our update no longer.
    fn without(&mut self, worker: WorkerId) {
        if let Some((_, holder)) = &mut self.update {
            holder.take_if(|holder| *holder == worker);
        }
    }

    fn input(&mut self, input: Input) {
        self.trainer.handle(input);
        while let Some(output) = self.trainer.poll_output() {
            match output {
                Output::Overtaken(_) => {}
                Output::Train(model) => {
                    assert!(self.training.replace(model).is_none(), "one training at a time");
                    assert!(self.update.is_none(), "its slot is not free");
                    assert!(
                        self.lent.contains(&Self::loan(model.lender, model.key)),
                        "not lent"
                    );
                }
                Output::Settled { key, .. } => {
                    let (own, _) = self.update.take().expect("an update is settled once");
                    assert_eq!(own, key);
                    self.settled += 1;
                }
                Output::Send(frame) => match FrameKind::from_number(frame.kind) {
                    Some(FrameKind::Release) => {
                        let loan = Self::loan(frame.to, frame.key);
                        assert!(
                            self.lent.remove(&loan),
                            "{loan:?} goes back twice, or was not lent"
                        );
                    }
                    Some(FrameKind::Update) => {
                        let (key, holder) = self.update.as_mut().expect("an update that is there");
                        assert_eq!(*key, frame.key, "two updates at a time");
                        *holder = Some(frame.to);
                    }
                    _ => {}
                },
            }
        }
        let pending = self
            .trainer
            .update()
            .map(|update| (update.key(), update.holder()));
        assert_eq!(pending, self.update, "who has the update");
        if self.training.is_some() {
            let model = self.trainer.model();
            let lent = model.is_none_or(|model| self.lent.contains(&Self::loan(model.lender, model.key)));
            assert!(lent, "it trains on a model that was given back");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    /// Whatever comes: never two updates outstanding for the slot, every lent model given back exactly once, and an update ends
    /// as taken, refused or orphaned exactly once, by who has it alone.
    #[test]
    fn loans_are_settled_exactly_once(events in proptest::collection::vec(event(), 0..80)) {
        let mut shell = Shell {
            trainer: Trainer::new(TRAINER, COORDINATOR),
            lent: BTreeSet::new(),
            training: None,
            update: None,
            made: 0,
            settled: 0,
        };
        for event in events {
            shell.event(event);
        }
        // A later round begins, the shell ends what it does, and who has the update is gone.
        shell.event(Event::Begin(LAST_ROUND, COORDINATOR));
        shell.event(Event::GivenUp);
        if let Some((_, Some(holder))) = shell.update {
            // Who is gone gets nothing back; all other loans are checked below.
            prop_assert!(!shell.lent.iter().any(|(lender, ..)| *lender == holder));
            shell.event(Event::Lost(holder));
        }
        prop_assert!(shell.lent.is_empty(), "{:?} are kept", shell.lent);
        prop_assert_eq!(shell.made, shell.settled);
    }
}
