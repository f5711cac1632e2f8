//! How rounds begin, are closed and decided, and what becomes of their models.

use super::*;

fn begins(round: u32) -> Output {
    Output::Report(Event::RoundBegins(round))
}

#[test]
fn the_first_round_begins_when_all_are_ready() {
    let mut driver = Driver::new(job(), 1);
    for worker in 0..8 {
        driver.join(worker);
    }
    assert_eq!(driver.take(), [Output::MapArenas(driver.ids[TOP])]);
    driver.join(8);
    let outputs = driver.take();
    assert_eq!(outputs[..2], [Output::Report(Event::AllReady), begins(1)]);
    let told = frames(&outputs);
    for worker in 0..9 {
        let kinds = told
            .iter()
            .filter(|(to, kind, _)| *to == driver.ids[worker] && *kind == FrameKind::Begin);
        assert_eq!(kinds.count(), 1, "{worker}");
    }
}

/// It may have an update of the round before whose parent died before it passed the verdict on.
#[test]
fn an_aggregator_with_nobody_to_aggregate_is_told_that_the_round_begins() {
    let mut driver = Driver::new(test_job::job(&[1, 2, 1]), 1);
    driver.all_join();
    let mut told = frames(&driver.take());
    told.retain(|(_, kind, _)| *kind == FrameKind::Begin);
    assert!(told.contains(&(driver.ids[2], FrameKind::Begin, 0)), "{told:?}");
    assert_eq!(told.len(), driver.ids.len());
}

#[test]
fn who_registers_in_a_place_that_its_worker_has_not_takes_no_part() {
    let mut remote = job();
    remote.workers[6].transport = Transport::P2p;
    for (job, name) in [
        (job(), proxy_name("w5")),
        (remote, "w6".to_owned()),
        (job(), "w9".to_owned()),
    ] {
        let mut driver = Driver::new(job, 1);
        let stranger = driver.register_as(&name);
        driver.frame(stranger, FrameKind::Ready, 0);
        driver.all_join();
        if name == "w6" {
            assert_eq!(frames(&driver.take()), [], "its proxy is awaited");
            let proxy = driver.register_as(&proxy_name(&name));
            driver.frame(proxy, FrameKind::Ready, 0);
        }
        let told = frames(&driver.take());
        assert!(!told.is_empty(), "{name}: the round begins");
        let hears =
            |(to, _, value): &&(WorkerId, FrameKind, u64)| *to == stranger || *value == u64::from(stranger.0);
        assert_eq!(told.iter().find(hears), None, "{name}");
        driver.frame(stranger, FrameKind::Nothing, 1);
        assert_eq!(driver.take(), [], "{name}");
    }
}

#[test]
fn a_model_is_evaluated_told_of_written_and_given_back_in_this_order() {
    let mut driver = Driver::running(job());
    let (model, metadata) = driver.model(1);
    let state = Frame {
        kind: FrameKind::State as u16,
        key: Key { slot: 1, ..model.key },
        ..model
    };
    driver.handle(Input::Frame(state));
    driver.handle(Input::Frame(model));
    let state = Some(state);
    assert_eq!(driver.take(), [Output::CheckModel(LentModel { model, state })]);
    driver.handle(Input::Checked(Ok(metadata)));
    let decided = Output::Decided {
        round: 1,
        changed: true,
        left_out: vec![],
    };
    assert_eq!(others(driver.take()), [decided, Output::Evaluate(1), begins(2)]);
    driver.handle(Input::Evaluated { loss: None });
    let written = Output::Write {
        round: 1,
        useful: true,
    };
    let told = Output::Report(Event::RoundDone(1));
    assert_eq!(driver.take(), [told, written]);
    driver.handle(Input::Written {
        error: Some("no room".to_owned()),
    });
    let outputs = driver.take();
    assert_eq!(frames(&outputs), [(driver.ids[TOP], FrameKind::Release, 0); 2]);
    let failed = Event::CheckpointFailed(1, "no room".to_owned());
    assert_eq!(others(outputs), [Output::Report(failed)]);
}

#[test]
fn a_round_waits_with_the_next_until_the_model_before_is_given_back() {
    let mut driver = Driver::running(job());
    driver.decide(1);
    assert!(
        driver.take().contains(&begins(2)),
        "one may be examined meanwhile"
    );
    driver.decide(2);
    let outputs = driver.take();
    assert!(!outputs.contains(&begins(3)) && !outputs.contains(&Output::Evaluate(2)));
    driver.examine();
    let outputs = driver.take();
    assert!(outputs.contains(&begins(3)) && outputs.contains(&Output::Evaluate(2)));
    driver.decide(3);
    driver.examine();
    driver.take();
    driver.examine();
    assert_eq!(driver.take().pop(), Some(Output::Done(Ok(()))));
}

#[test]
fn a_run_that_goes_on_begins_after_its_checkpoint() {
    let mut driver = Driver::new(job(), 3);
    driver.all_join();
    let outputs = driver.take();
    assert!(outputs.contains(&begins(3)));
    let is_of_round = |output: &Output| !matches!(output, Output::Send(frame) if frame.round != 3);
    assert!(outputs.iter().all(is_of_round));
    driver.decide(3);
    driver.examine();
    assert_eq!(driver.take().pop(), Some(Output::Done(Ok(()))));
}

#[test]
fn a_model_counts_only_if_it_is_what_is_known_of_the_round() {
    type Lie = fn(&mut Frame, &mut Metadata);
    let lies: [(&str, Lie); 6] = [
        ("another's arena", |frame, _| frame.key.arena = ArenaId(4)),
        ("another generation", |_, metadata| metadata.generation.0 += 1),
        ("a later round", |_, metadata| metadata.round += 1),
        ("more trainers than the image", |frame, _| frame.covers += 1),
        ("more samples than they have", |_, metadata| {
            metadata.info.samples += 1
        }),
        ("an earlier round with trainers", |_, metadata| {
            metadata.round -= 1
        }),
    ];
    for (lie, tell) in lies {
        let mut driver = Driver::running(job());
        let (mut frame, mut metadata) = driver.model(1);
        tell(&mut frame, &mut metadata);
        driver.handle(Input::Frame(frame));
        driver.handle(Input::Checked(Ok(metadata)));
        let killed = Event::Worker {
            worker: TOP,
            round: 1,
            what: WorkerEvent::Killed(KillReason::BadModel),
        };
        let outputs = driver.take();
        assert!(outputs.contains(&Output::Report(killed)), "{lie}: {outputs:?}");
        assert_eq!(outputs.last(), Some(&Output::Kill(TOP)), "{lie}");
        driver.replace(TOP);
        driver.decide(1);
        assert!(
            driver.take().contains(&Output::Evaluate(1)),
            "{lie}: its successor decides"
        );
    }
}

#[test]
fn a_model_of_another_round_or_of_nobodys_top_is_none() {
    let mut driver = Driver::running(job());
    let (frame, metadata) = driver.model(1);
    let from = driver.ids[LEAF];
    for frame in [
        Frame { round: 2, ..frame },
        Frame { round: 0, ..frame },
        Frame { from, ..frame },
        Frame {
            from: WorkerId(99),
            ..frame
        },
    ] {
        driver.handle(Input::Frame(frame));
    }
    driver.handle(Input::Checked(Ok(metadata)));
    assert_eq!(driver.take(), []);
}

#[test]
fn a_model_that_no_update_changed_leaves_all_out() {
    let mut driver = Driver::running(job());
    let (frame, metadata) = driver.model(1);
    driver.handle(Input::Frame(Frame { covers: 0, ..frame }));
    let metadata = Metadata { round: 0, ..metadata };
    driver.handle(Input::Checked(Ok(metadata)));
    let decided = Output::Decided {
        round: 1,
        changed: false,
        left_out: TRAINERS.collect(),
    };
    assert!(driver.take().contains(&decided));
    driver.handle(Input::Evaluated { loss: None });
    let written = Output::Write {
        round: 1,
        useful: false,
    };
    assert!(driver.take().contains(&written));
}

/// A top lends the model of its last round, of that loss and, or not, of any update.
fn end(folded: bool, loss: f64) -> Option<Output> {
    let mut driver = Driver::new(job(), 3);
    driver.all_join();
    let (frame, metadata) = driver.model(3);
    let (round, covers) = if folded { (3, 4) } else { (0, 0) };
    driver.handle(Input::Frame(Frame { covers, ..frame }));
    driver.handle(Input::Checked(Ok(Metadata { round, ..metadata })));
    driver.take();
    driver.handle(Input::Evaluated { loss: Some(loss) });
    let useful = folded && loss.is_finite();
    assert!(driver.take().contains(&Output::Write { round: 3, useful }));
    driver.handle(Input::Written { error: None });
    driver.take().pop()
}

#[test]
fn a_run_whose_model_is_of_no_use_has_failed() {
    assert_eq!(end(true, 0.1), Some(Output::Done(Ok(()))));
    assert_eq!(end(false, 0.1), Some(Output::Done(Err(Failure::NothingFolded))));
    let Some(Output::Done(Err(Failure::NotFinite { loss }))) = end(true, f64::NAN) else {
        panic!("not finite")
    };
    assert!(loss.is_nan());
}

#[test]
fn goals_and_selectors_say_who_is_left_out() {
    let mut goal = job();
    goal.workers[LEAF].agg_goal = Some(1);
    let mut driver = Driver::running(goal);
    let (frame, mut metadata) = driver.model(1);
    metadata.info.cover = Cover::of(0);
    metadata.info.samples = SAMPLES;
    driver.handle(Input::Frame(Frame { covers: 1, ..frame }));
    driver.handle(Input::Checked(Ok(metadata)));
    let left_out = |outputs: Vec<Output>| {
        outputs.into_iter().find_map(|output| match output {
            Output::Decided { left_out, .. } => Some(left_out),
            _ => None,
        })
    };
    assert_eq!(left_out(driver.take()), Some(vec![6, 7, 8]));

    let mut selects = job();
    (3..5).for_each(|leaf| selects.workers[leaf].select = Some(1));
    let mut driver = Driver::new(selects, 1);
    driver.all_join();
    let told = frames(&driver.take());
    let selected: Vec<usize> = TRAINERS
        .filter(|&trainer| told.iter().any(|(to, ..)| *to == driver.ids[trainer]))
        .collect();
    assert_eq!(selected.len(), 2, "one of each leaf");
    let (frame, mut metadata) = driver.model(1);
    metadata.info.cover = Cover::of(selected[0] as u32 - 5);
    metadata.info.samples = SAMPLES;
    driver.handle(Input::Frame(Frame { covers: 1, ..frame }));
    driver.handle(Input::Checked(Ok(metadata)));
    assert_eq!(
        left_out(driver.take()),
        Some(vec![selected[1]]),
        "the others were not asked"
    );
}

/// A job whose rounds are closed after 10 s with two trainers, and whose trainers are killed 5 s later.
fn timed() -> JobSpec {
    JobSpec {
        round_timeout_s: Some(10.0),
        grace_time_s: 5.0,
        quorum: 2,
        ..job()
    }
}

/// Lets time pass until the daemon is asked at that time, answering before; all workers are alive.
fn pass_to(driver: &mut Driver, seconds: f64) {
    let end = Duration::from_secs_f64(seconds);
    let mut sent = 0;
    while driver.now < end {
        driver.pass(end - driver.now);
        sent += 1;
        let alive = sent + (driver.now.as_millis() as u64);
        if driver.outputs.contains(&Output::AskStatus) {
            driver.outputs.retain(|output| *output != Output::AskStatus);
            driver.status(|_| alive);
        }
    }
}

fn closes(outputs: &[Output]) -> Vec<WorkerId> {
    let closes = frames(outputs).into_iter();
    let closes = closes.filter(|(_, kind, _)| *kind == FrameKind::Close);
    closes.map(|(to, ..)| to).collect()
}

#[test]
fn a_round_is_closed_at_its_time_with_a_quorum() {
    let mut driver = Driver::running(timed());
    for trainer in [5, 6] {
        driver.frame(driver.ids[trainer], FrameKind::Pong, 1);
    }
    pass_to(&mut driver, 9.9);
    assert_eq!(closes(&driver.take()), []);
    pass_to(&mut driver, 10.1);
    let leaves = [driver.ids[3], driver.ids[4]];
    assert_eq!(closes(&driver.take()), leaves, "those above trainers are told");
    pass_to(&mut driver, 12.0);
    assert_eq!(closes(&driver.take()), [], "once");
}

#[test]
fn a_round_without_a_quorum_stays_open_until_there_is_one() {
    let mut driver = Driver::running(timed());
    driver.frame(driver.ids[5], FrameKind::Pong, 1);
    // An answer in another round is none.
    driver.frame(driver.ids[6], FrameKind::Pong, 0);
    pass_to(&mut driver, 12.0);
    assert_eq!(closes(&driver.take()), []);
    driver.frame(driver.ids[6], FrameKind::Pong, 1);
    pass_to(&mut driver, 12.3);
    assert_eq!(closes(&driver.take()).len(), 2);
}

#[test]
fn a_successor_hears_that_the_round_is_closed_when_its_children_have_said_what_they_have() {
    let mut driver = Driver::running(timed());
    for trainer in TRAINERS {
        driver.frame(driver.ids[trainer], FrameKind::Pong, 1);
    }
    pass_to(&mut driver, 10.1);
    driver.replace(LEAF);
    let ready = driver.now.as_secs_f64();
    driver.take();
    pass_to(&mut driver, ready + 0.9);
    assert_eq!(closes(&driver.take()), []);
    pass_to(&mut driver, ready + 1.1);
    assert_eq!(closes(&driver.take()), [driver.ids[LEAF]]);
}

/// It waits for aggregators, which have been told; they may take longer.
#[test]
fn a_successor_that_is_not_above_trainers_is_not_told_that_the_round_is_closed() {
    for worker in [TOP, MIDDLE, 5] {
        let mut driver = Driver::running(timed());
        for trainer in TRAINERS {
            driver.frame(driver.ids[trainer], FrameKind::Pong, 1);
        }
        pass_to(&mut driver, 10.1);
        driver.replace(worker);
        driver.take();
        let ready = driver.now.as_secs_f64();
        pass_to(&mut driver, ready + 1.1);
        assert_eq!(closes(&driver.take()), [], "{worker}");
    }
}

#[test]
fn a_trainer_that_still_owes_its_update_is_killed() {
    let mut driver = Driver::running(timed());
    for trainer in [5, 6, 7] {
        driver.frame(driver.ids[trainer], FrameKind::Pong, 1);
    }
    pass_to(&mut driver, 14.9);
    let kills = |outputs: Vec<Output>| -> Vec<Output> {
        let kills = others(outputs).into_iter();
        kills.filter(|output| matches!(output, Output::Kill(_))).collect()
    };
    assert_eq!(kills(driver.take()), []);
    pass_to(&mut driver, 16.1);
    assert_eq!(kills(driver.take()), [Output::Kill(8)]);
}

#[test]
fn a_round_needs_a_quorum_to_begin() {
    let mut job = job();
    job.quorum = 4;
    let mut driver = Driver::running(job);
    driver.die(5);
    driver.take();
    driver.decide(1);
    assert!(!driver.take().contains(&begins(2)), "the fourth is awaited");
    driver.started(5);
    driver.join(5);
    assert!(driver.take().contains(&begins(2)));
    for _ in 0..MOST_DEATHS {
        driver.replace(5);
    }
    driver.disconnect(5);
    driver.decide(2);
    driver.examine();
    driver.take();
    driver.exit(5);
    assert_eq!(
        driver.outputs[0],
        lost(5, 3, KILLED, false),
        "its death is told of first"
    );
    let failure = Failure::TooFewTrainers {
        round: 3,
        trainers: 3,
    };
    assert_eq!(driver.take().pop(), Some(Output::Done(Err(failure))));
}

#[test]
fn who_fails_or_is_refused_is_told_of_once_a_round() {
    let mut driver = Driver::running(job());
    let (trainer, leaf, other) = (driver.ids[5], driver.ids[LEAF], driver.ids[4]);
    driver.frame(trainer, FrameKind::Nothing, 1);
    driver.frame(trainer, FrameKind::Nothing, 1);
    driver.frame(trainer, FrameKind::Nothing, 2);
    driver.frame(leaf, FrameKind::Nothing, 1);
    let failed = Event::Worker {
        worker: 5,
        round: 1,
        what: WorkerEvent::Failed,
    };
    assert_eq!(driver.take(), [Output::Report(failed)]);
    let refuse = |from: WorkerId, refusal: Refusal| {
        Input::Frame(Frame {
            to: COORDINATOR,
            from,
            kind: FrameKind::Refuse as u16,
            refusal: refusal as u16,
            round: 1,
            value: trainer.0.into(),
            ..Frame::default()
        })
    };
    driver.handle(refuse(other, Refusal::NotFinite));
    driver.handle(refuse(leaf, Refusal::Late));
    assert_eq!(
        driver.take(),
        [],
        "only its parent can say so, and that it was late is no fault"
    );
    driver.handle(refuse(leaf, Refusal::NotFinite));
    driver.handle(refuse(leaf, Refusal::NotFinite));
    let refused = Event::Worker {
        worker: 5,
        round: 1,
        what: WorkerEvent::UpdateRefused(Refusal::NotFinite),
    };
    assert_eq!(driver.take(), [Output::Report(refused)]);
}

#[test]
fn a_daemon_that_ends_the_job_ends_the_run() {
    let mut driver = Driver::running(job());
    let reason = "stopped".to_owned();
    let ended = DaemonEvent::JobEnded {
        reason: reason.clone(),
    };
    driver.handle(Input::Daemon(ended));
    let failure = Failure::JobEnded { reason };
    assert_eq!(driver.take(), [Output::Done(Err(failure))]);
}
