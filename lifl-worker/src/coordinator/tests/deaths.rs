//! Who dies, hangs or cannot be started, and what becomes of the round.

use super::*;

#[test]
fn an_aggregators_successor_takes_its_place_in_the_round() {
    // By worker: its parent, and its children in folding order.
    let places = [
        (TOP, None, vec![1, 2]),
        (MIDDLE, Some(TOP), vec![3]),
        (LEAF, Some(MIDDLE), vec![5, 7]),
    ];
    for (worker, parent, children) in places {
        let mut driver = Driver::running(job());
        driver.disconnect(worker);
        assert_eq!(
            driver.take(),
            [],
            "nothing is told before all that it had to say is in its log"
        );
        driver.exit(worker);
        assert_eq!(
            driver.take(),
            [lost(worker, 1, KILLED, true), Output::Start(worker)]
        );
        driver.started(worker);
        driver.join(worker);
        let outputs = driver.take();
        let told = frames(&outputs);
        let ids = &driver.ids;
        let own = u64::from(ids[worker].0);
        for &child in &children {
            assert!(
                told.contains(&(ids[child], FrameKind::Begin, own)),
                "{worker}: its child hears"
            );
            assert!(told.contains(&(ids[worker], FrameKind::Child, ids[child].0.into())));
        }
        if let Some(parent) = parent {
            assert!(
                told.contains(&(ids[parent], FrameKind::Child, own)),
                "{worker}: its parent hears"
            );
        }
        let replaced = Output::Report(Event::Worker {
            worker,
            round: 1,
            what: WorkerEvent::Replaced,
        });
        let mut expected = vec![replaced];
        if worker == TOP {
            expected.insert(0, Output::MapArenas(ids[TOP]));
        }
        assert_eq!(others(outputs), expected);
        driver.decide(1);
        assert!(
            driver.take().contains(&Output::Evaluate(1)),
            "{worker}: the round goes on"
        );
    }
}

#[test]
fn a_dead_trainers_place_is_empty_until_the_next_round() {
    let mut driver = Driver::running(job());
    driver.die(5);
    let outputs = driver.take();
    let leaf = driver.ids[LEAF];
    assert_eq!(
        frames(&outputs)[0],
        (leaf, FrameKind::Child, 0),
        "nobody is waited for there"
    );
    assert_eq!(others(outputs), [lost(5, 1, KILLED, true), Output::Start(5)]);
    driver.started(5);
    driver.join(5);
    assert_eq!(frames(&driver.take()), [], "its successor has not the update");
    driver.decide(1);
    let own = u64::from(driver.ids[5].0);
    assert!(
        frames(&driver.take()).contains(&(leaf, FrameKind::Child, own)),
        "in round 2 it is there"
    );
}

#[test]
fn before_the_first_round_a_death_ends_the_job() {
    let mut driver = Driver::new(job(), 1);
    driver.join(TOP);
    driver.die(5);
    let failure = Failure::WorkerGone {
        worker: 5,
        round: 0,
        how: KILLED.to_owned(),
    };
    assert_eq!(driver.take().pop(), Some(Output::Done(Err(failure))));
    driver.die(TOP);
    assert_eq!(driver.take(), [], "nothing comes after the end");
}

#[test]
fn an_aggregator_that_dies_between_rounds_is_awaited() {
    let mut driver = Driver::running(job());
    driver.decide(1);
    driver.take();
    driver.decide(2);
    // Round 1's model is still being examined: round 3 has not begun.
    driver.die(LEAF);
    driver.started(LEAF);
    driver.examine();
    driver.take();
    driver.join(LEAF);
    let outputs = driver.take();
    let begins = Output::Report(Event::RoundBegins(3));
    assert!(outputs.contains(&begins), "{outputs:?}");
}

#[test]
fn a_top_that_dies_after_it_has_lent_the_model_has_decided_the_round() {
    let mut driver = Driver::running(job());
    let (frame, metadata) = driver.model(1);
    driver.handle(Input::Frame(frame));
    driver.die(TOP);
    let starts = |driver: &mut Driver| driver.take().contains(&Output::Start(TOP));
    assert!(!starts(&mut driver), "a round that is decided is not begun anew");
    driver.handle(Input::Checked(Ok(metadata)));
    assert!(
        !starts(&mut driver),
        "the successor begins with what is being written"
    );
    driver.examine();
    assert!(starts(&mut driver));
    driver.started(TOP);
    driver.join(TOP);
    let outputs = driver.take();
    assert!(outputs.contains(&Output::Report(Event::RoundBegins(2))));
    let is_of_round_1 = |output: &Output| matches!(output, Output::Send(frame) if frame.round == 1);
    assert!(
        !outputs.iter().any(is_of_round_1),
        "nobody is asked for round 1 again"
    );
}

#[test]
fn a_dead_tops_model_that_cannot_be_read_leaves_the_round_to_its_successor() {
    let mut driver = Driver::running(job());
    let (frame, _) = driver.model(1);
    driver.handle(Input::Frame(frame));
    driver.die(TOP);
    driver.take();
    driver.handle(Input::Checked(Err("its arena is gone".to_owned())));
    assert_eq!(driver.take(), [Output::Start(TOP)]);
    driver.started(TOP);
    driver.join(TOP);
    driver.decide(1);
    assert!(driver.take().contains(&Output::Evaluate(1)));
}

#[test]
fn whoever_dies_too_often_is_given_up() {
    let mut driver = Driver::running(job());
    for _ in 0..MOST_DEATHS {
        driver.replace(LEAF);
    }
    driver.take();
    driver.die(LEAF);
    let outputs = driver.take();
    let middle = driver.ids[MIDDLE];
    assert_eq!(
        frames(&outputs)[0],
        (middle, FrameKind::Child, 0),
        "its parent waits no more"
    );
    assert_eq!(
        others(outputs),
        [lost(LEAF, 1, KILLED, false)],
        "nobody is started"
    );
    driver.decide(1);
    let told = frames(&driver.take());
    let leaf = u64::from(driver.ids[4].0);
    for trainer in TRAINERS {
        let own = u64::from(driver.ids[trainer].0);
        assert!(
            told.contains(&(driver.ids[4], FrameKind::Child, own)),
            "the other leaf has all"
        );
    }
    assert!(told.contains(&(driver.ids[5], FrameKind::Begin, leaf)));
}

#[test]
fn whoever_finishes_a_round_may_die_as_often_again() {
    let mut driver = Driver::running(job());
    for round in 1..=3 {
        for _ in 0..MOST_DEATHS {
            driver.replace(LEAF);
        }
        driver.decide(round);
        driver.examine();
    }
    assert_eq!(driver.take().pop(), Some(Output::Done(Ok(()))));
}

#[test]
fn a_top_that_dies_too_often_ends_the_job() {
    let mut driver = Driver::running(job());
    for _ in 0..MOST_DEATHS {
        driver.replace(TOP);
    }
    driver.die(TOP);
    let failure = Failure::WorkerGone {
        worker: TOP,
        round: 1,
        how: KILLED.to_owned(),
    };
    assert_eq!(driver.take().pop(), Some(Output::Done(Err(failure))));
}

#[test]
fn a_process_that_cannot_be_started_is_tried_again_for_a_while() {
    for worker in [LEAF, TOP] {
        let mut driver = Driver::running(job());
        driver.die(worker);
        for attempt in 1..=MOST_DEATHS {
            assert_eq!(
                driver.take().pop(),
                Some(Output::Start(worker)),
                "attempt {attempt}"
            );
            driver.handle(Input::Started {
                worker,
                result: Err("no process is left".to_owned()),
            });
            assert!(!driver.outputs.contains(&Output::Start(worker)), "not at once");
            let given_up = attempt == MOST_DEATHS;
            let outputs = others(driver.take());
            let expected = match (worker, given_up) {
                (TOP, true) => Output::Done(Err(Failure::TopNotStarted {
                    error: "no process is left".to_owned(),
                })),
                _ => Output::Report(Event::Worker {
                    worker,
                    round: 1,
                    what: WorkerEvent::NotStarted {
                        error: "no process is left".to_owned(),
                        given_up,
                    },
                }),
            };
            assert_eq!(outputs, [expected]);
            driver.pass(Duration::from_secs(1));
        }
        assert_eq!(driver.take(), [], "it has been given up");
    }
}

#[test]
fn a_process_that_has_disconnected_has_two_seconds_to_end() {
    let mut driver = Driver::running(job());
    driver.disconnect(LEAF);
    driver.pass(Duration::from_millis(1999));
    assert_eq!(driver.take(), []);
    driver.pass(Duration::from_millis(1));
    assert_eq!(driver.take(), [Output::Kill(LEAF)]);
    driver.killed(LEAF);
    let how = "its connection to the daemon was closed, so it was ended";
    assert_eq!(driver.take(), [lost(LEAF, 1, how, true), Output::Start(LEAF)]);
}

#[test]
fn a_process_whose_connection_outlives_it_is_replaced_when_both_are_gone() {
    let mut driver = Driver::running(job());
    driver.exit(LEAF);
    assert_eq!(driver.take(), [lost(LEAF, 1, KILLED, true)]);
    driver.disconnect(LEAF);
    assert_eq!(driver.take(), [Output::Start(LEAF)]);
}

#[test]
fn what_a_process_that_is_to_be_killed_has_died_of_before_is_told() {
    let mut driver = Driver::running(job());
    driver.disconnect(LEAF);
    driver.pass(Duration::from_secs(2));
    driver.take();
    let how = "it was killed by SIGSEGV, core dumped";
    driver.handle(Input::Exited {
        worker: LEAF,
        how: Some(how.to_owned()),
    });
    assert_eq!(driver.take(), [lost(LEAF, 1, how, true), Output::Start(LEAF)]);
}

#[test]
fn a_name_that_outlives_its_process_is_looked_up() {
    let how = "process 7, which is not of this run, has registered under its name";
    for worker in [5, LEAF] {
        let mut driver = Driver::running(job());
        driver.exit(worker);
        driver.take();
        driver.pass(Duration::from_millis(4999));
        assert_eq!(driver.take(), []);
        driver.pass(Duration::from_millis(1));
        assert_eq!(driver.take(), [Output::FindHolder(worker)]);
        driver.pass(Duration::from_secs(10));
        assert_eq!(driver.take(), [], "once");
        driver.handle(Input::NameTaken { worker, holder: None });
        driver.pass(Duration::from_secs(5));
        assert_eq!(driver.take(), [Output::FindHolder(worker)], "the daemon was away");
        let holder = 7;
        driver.handle(Input::NameTaken {
            worker,
            holder: Some(holder),
        });
        let expected = match worker {
            LEAF => Output::Done(Err(Failure::NameTaken { worker, holder })),
            _ => lost(worker, 1, how, false),
        };
        assert_eq!(driver.take(), [expected]);
        driver.disconnect(worker);
        driver.decide(1);
        let starts = driver.take().contains(&Output::Start(worker));
        assert!(!starts, "{worker} is given up");
    }
}

#[test]
fn a_name_that_is_free_again_is_its_successors() {
    let mut driver = Driver::running(job());
    driver.exit(LEAF);
    driver.pass(Duration::from_secs(5));
    driver.disconnect(LEAF);
    driver.take();
    driver.handle(Input::NameTaken {
        worker: LEAF,
        holder: Some(7),
    });
    assert_eq!(driver.take(), [], "it was, and is not any more");
    driver.started(LEAF);
    driver.join(LEAF);
    driver.decide(1);
    assert!(driver.take().contains(&Output::Evaluate(1)));
}

#[test]
fn a_successor_that_does_not_become_ready_is_killed() {
    let mut driver = Driver::running(job());
    driver.die(LEAF);
    driver.started(LEAF);
    driver.register(LEAF);
    driver.take();
    driver.now += Duration::from_secs(30);
    driver.handle(Input::Timeout);
    let killed = Output::Report(Event::Worker {
        worker: LEAF,
        round: 1,
        what: WorkerEvent::Killed(KillReason::NotReady),
    });
    let outputs = driver.take();
    assert_eq!(outputs[..2], [killed, Output::Kill(LEAF)]);
    driver.disconnect(LEAF);
    driver.killed(LEAF);
    let how = "it did not become ready, so it was ended";
    assert_eq!(driver.take()[..], [lost(LEAF, 1, how, true), Output::Start(LEAF)]);
}

#[test]
fn a_remote_worker_that_is_gone_is_not_started_again() {
    let mut job = job();
    job.workers[5].transport = Transport::P2p;
    let mut driver = Driver::new(job, 1);
    // It is registered by its proxy alone.
    driver.job.workers[5].name = proxy_name("w5");
    driver.all_join();
    let outputs = driver.take();
    assert!(outputs.contains(&Output::Report(Event::RoundBegins(1))));
    driver.exit(5);
    let leaf = driver.ids[LEAF];
    let outputs = driver.take();
    assert!(frames(&outputs).contains(&(leaf, FrameKind::Child, 0)));
    assert_eq!(others(outputs), [Output::DropProxy(5), lost(5, 1, KILLED, false)]);
    driver.disconnect(5);
    driver.decide(1);
    let outputs = driver.take();
    assert!(outputs.contains(&Output::Evaluate(1)) && !outputs.contains(&Output::Start(5)));
}

#[test]
fn a_remote_workers_process_is_killed_when_its_session_is_over() {
    let mut job = job();
    job.workers[5].transport = Transport::P2p;
    let mut driver = Driver::new(job, 1);
    driver.job.workers[5].name = proxy_name("w5");
    driver.all_join();
    driver.take();
    driver.disconnect(5);
    driver.pass(Duration::from_secs(2));
    assert_eq!(others(driver.take()), [Output::DropProxy(5), Output::Kill(5)]);
    driver.killed(5);
    let how = "its session with the gateway was over, so it was ended";
    assert_eq!(driver.take(), [lost(5, 1, how, false)]);
}

#[test]
fn who_sends_nothing_for_the_grace_time_is_killed() {
    let mut driver = Driver::running(job());
    driver.pass(Duration::from_secs(30));
    assert_eq!(
        driver.take(),
        [Output::AskStatus],
        "the round lasts for the grace time"
    );
    driver.status(|_| 7);
    let asked = frames(&driver.take());
    assert_eq!(asked.len(), 9, "all are asked");
    assert!(asked.iter().all(|(_, kind, _)| *kind == FrameKind::Ping));
    // All but the leaf send something now and then.
    for look in 1..=11 {
        driver.pass(Duration::from_secs(3));
        assert_eq!(driver.take(), [Output::AskStatus], "ten times in the grace time");
        driver.status(|worker| if worker == LEAF { 7 } else { 7 + look });
        let killed = others(driver.take());
        if look <= 10 {
            assert_eq!(killed, [], "look {look}");
            continue;
        }
        let report = Event::Worker {
            worker: LEAF,
            round: 1,
            what: WorkerEvent::Killed(KillReason::Hangs),
        };
        assert_eq!(killed, [Output::Report(report), Output::Kill(LEAF)]);
    }
    driver.pass(Duration::from_secs(3));
    driver.take();
    driver.status(|_| 7);
    assert_eq!(others(driver.take()), [], "it is killed once");
}

#[test]
fn nobody_hangs_while_the_coordinator_or_the_daemon_is_away() {
    let mut driver = Driver::running(job());
    let silent = |driver: &mut Driver, away: fn(&mut Driver)| {
        for look in 0..30 {
            driver.pass(Duration::from_secs(30));
            assert_eq!(others(driver.take()), [Output::AskStatus], "look {look}");
            away(driver);
            assert_eq!(others(driver.take()), [], "look {look}");
        }
    };
    silent(&mut driver, |driver| driver.handle(Input::Status(None)));
    silent(&mut driver, |driver| {
        driver.handle(Input::Suspended);
        driver.status(|_| 7);
    });
}

#[test]
fn a_daemon_that_is_back_tells_who_is_gone() {
    let mut driver = Driver::running(job());
    let mut living = driver.ids.clone();
    living.sort_unstable();
    let gone = driver.ids[LEAF];
    living.retain(|id| *id != gone);
    let (first, last) = (WorkerId(0), WorkerId(u32::MAX));
    let workers = living;
    driver.handle(Input::Daemon(DaemonEvent::Living { first, last, workers }));
    assert_eq!(driver.take(), []);
    driver.exit(LEAF);
    assert_eq!(driver.take(), [lost(LEAF, 1, KILLED, true), Output::Start(LEAF)]);
    for worker in [TOP, MIDDLE, 5] {
        driver.exit(worker);
        let starts = driver.take().contains(&Output::Start(worker));
        assert!(!starts, "{worker} is still registered");
    }
}

#[test]
fn a_successor_that_is_ready_before_the_daemon_tells_of_it_counts() {
    let mut driver = Driver::running(job());
    driver.die(LEAF);
    driver.started(LEAF);
    driver.take();
    driver.frame(WorkerId(driver.last_id + 1), FrameKind::Ready, 0);
    assert_eq!(driver.take(), []);
    driver.register(LEAF);
    let replaced = Output::Report(Event::Worker {
        worker: LEAF,
        round: 1,
        what: WorkerEvent::Replaced,
    });
    assert!(driver.take().contains(&replaced));
}

#[test]
fn a_trainer_whose_connection_outlives_it_into_the_next_round_is_not_waited_for() {
    let mut driver = Driver::running(job());
    driver.exit(5);
    driver.decide(1);
    driver.take();
    driver.disconnect(5);
    let told = frames(&driver.take());
    assert!(
        told.contains(&(driver.ids[LEAF], FrameKind::Child, 0)),
        "{told:?}"
    );
}
