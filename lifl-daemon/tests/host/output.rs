//! A log that cannot be written, and signals: neither ends or stops the daemon.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use lifl_common::client::Client;
use nix::sys::signal::Signal;

use crate::process::{Daemon, connect, job, within, worker};

const RELAY: [&str; 4] = ["--plane", "relay", "--huge-pages", "never"];

/// A daemon whose standard error is that.
async fn logging_to(stderr: Stdio, shell: &str) -> Daemon {
    let mut daemon = Daemon::new("");
    let mut command = daemon.command(shell, &RELAY);
    command.env("RUST_LOG", "trace");
    daemon.child = Some(command.stderr(stderr).spawn().expect("started"));
    daemon.listening().await;
    daemon
}

/// Jobs come and go, and each is told of in the log.
async fn serves(daemon: &Daemon, jobs: u32) {
    for n in 0..jobs {
        let (mut client, id, _registration) = within(job(&daemon.socket(), &format!("job-{n}"))).await;
        let (worker, _) = within(worker(&daemon.socket(), id, "trainer-1")).await;
        drop(worker);
        within(client.end_job("over")).await.expect("its own");
    }
}

#[tokio::test]
async fn a_log_that_cannot_be_written_ends_nothing() {
    let full = File::options().write(true).open("/dev/full").expect("open");
    let (reader, dead) = std::io::pipe().expect("a pipe");
    drop(reader);
    for (stderr, shell) in [
        (Stdio::from(full), "exec \"$@\""),
        (Stdio::from(dead), "exec \"$@\""),
        (Stdio::null(), "exec \"$@\" 2>&-"),
        (Stdio::null(), "exec \"$@\" <&- >&- 2>&-"),
    ] {
        let mut daemon = logging_to(stderr, shell).await;
        serves(&daemon, 3).await;
        daemon.terminate();
    }
}

#[tokio::test]
async fn a_log_that_nobody_reads_stops_nothing_and_is_told_of_when_somebody_does() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let mut daemon = logging_to(writer.into(), "exec \"$@\"").await;
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("a process");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("a size")
            .to_owned();
        line.split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse::<u64>().ok())
            .expect("a number")
    };
    // More than pipe and queue hold.
    let queued = 4 << 10;
    let mut jobs = 0;
    let before = memory();
    while jobs < 3000 {
        serves(&daemon, 100).await;
        jobs += 100;
    }
    assert!(
        memory() < before + queued + 32 * 1024,
        "lines pile up: {} KiB",
        memory()
    );
    let reading = std::thread::spawn(move || read_all(&mut reader));
    daemon.terminate();
    let text = reading.join().expect("read");
    assert!(text.lines().any(|line| line.contains("listening")));
    assert!(text.ends_with('\n'), "no line is torn");
}

fn read_all(reader: &mut PipeReader) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    text
}

#[tokio::test]
async fn help_that_cannot_be_written_is_an_error() {
    let daemon = Daemon::new("");
    let full = File::options().write(true).open("/dev/full").expect("open");
    let mut command = daemon.command("exec \"$@\"", &["--help"]);
    let status = command
        .stdout(full)
        .stderr(Stdio::null())
        .status()
        .expect("started");
    assert_eq!((status.code(), status.signal()), (Some(2), None));
}

#[tokio::test]
async fn a_log_past_the_limit_of_files_ends_nothing() {
    let mut daemon = Daemon::new("");
    // bash counts in KiB.
    let mut command = daemon.command("ulimit -f 4; exec \"$@\"", &RELAY);
    command.env("RUST_LOG", "trace");
    daemon.spawn(command);
    daemon.listening().await;
    serves(&daemon, 100).await;
    assert_eq!(daemon.log().len(), 4 << 10);
    daemon.terminate();
}

#[tokio::test]
async fn signals_that_were_ignored_stay_ignored_and_others_end_it_in_order() {
    let mut daemon = Daemon::new("");
    let command = daemon.command("trap '' HUP INT; exec \"$@\"", &RELAY);
    daemon.spawn(command);
    daemon.listening().await;
    daemon.signal(Signal::SIGHUP);
    daemon.signal(Signal::SIGINT);
    drop(connect(&daemon.socket()).await);
    daemon.terminate();
    let log = daemon.log();
    assert!(
        log.contains("SIGTERM: stopping") && !log.contains("SIGHUP") && !log.contains("SIGINT"),
        "{log}"
    );

    let mut daemon = Daemon::start("", &RELAY).await;
    daemon.signal(Signal::SIGHUP);
    let status = daemon.wait();
    assert!(status.success(), "{status}: {}", daemon.log());
    assert!(daemon.log().contains("SIGHUP: stopping"), "{}", daemon.log());
    assert!(!daemon.socket().exists());
    assert!(Client::connect(&daemon.socket()).await.is_err());
}
