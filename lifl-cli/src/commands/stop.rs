//! `lifl stop`: asks a run to end, and waits until it has.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cli::StopArgs;
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::output::outln;
use crate::runs::{LOOK_AGAIN, RunAt};

/// How long the kernel may take to clear a killed process away, and its lock with it.
const CLEARED: Duration = Duration::from_secs(10);

pub(crate) fn stop(args: &StopArgs) -> Outcome {
    let run = match &args.run {
        Some(run) => RunAt::find(Some(run))?,
        None => RunAt::only()?,
    };
    let Some(coordinator) = run.coordinator().because(Cause::Machine)? else {
        return say(&run, args, "ended", false);
    };
    coordinator.signal(Signal::SIGTERM).because(Cause::Machine)?;
    // One that stands still hears nothing.
    coordinator.signal(Signal::SIGCONT).because(Cause::Machine)?;
    let limit = Duration::from_secs(args.timeout);
    if coordinator.has_ended(limit) {
        wait_for_lock(&run)?;
        return say(&run, args, "stopped", false);
    }
    if !args.kill {
        let error = anyhow!(
            "{} (process {}) has not ended within {} s: it has been asked to and may still, or end it at once with --kill",
            run.path().display(),
            coordinator.pid,
            args.timeout
        );
        return Err(Failure::new(Cause::Job, error));
    }
    coordinator.signal(Signal::SIGKILL).because(Cause::Machine)?;
    if !coordinator.has_ended(CLEARED) {
        let error = anyhow!(
            "process {} does not end, not even killed: it hangs in the kernel",
            coordinator.pid
        );
        return Err(Failure::new(Cause::Job, error));
    }
    wait_for_lock(&run)?;
    say(&run, args, "stopped", true)
}

/// A process is told to have ended before the kernel has closed all its files.
fn wait_for_lock(run: &RunAt) -> Outcome {
    let begun = Instant::now();
    while run.is_live().because(Cause::Machine)? {
        if begun.elapsed() > CLEARED {
            let error = anyhow!("another run works in {} by now", run.path().display());
            return Err(Failure::new(Cause::Job, error));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

fn say(run: &RunAt, args: &StopArgs, event: &str, killed: bool) -> Outcome {
    let path = run.path().display();
    let exit_code = run.ending().map(|ending| ending.exit_code).filter(|_| !killed);
    if args.report.json {
        return outln!(
            "{}",
            json!({ "event": event, "run": path.to_string(), "exit_code": exit_code, "killed": killed })
        );
    }
    let how = match (killed, exit_code) {
        (true, _) => "killed".to_owned(),
        (false, Some(0)) => "it is done".to_owned(),
        (false, Some(code)) => format!("exit code {code}"),
        (false, None) => "it has died without a word".to_owned(),
    };
    match event {
        "ended" => outln!("{path} had ended before: {how}")?,
        _ => outln!("stopped {path}: {how}")?,
    }
    match exit_code {
        Some(0) => Ok(()),
        _ => outln!("go on with it by: lifl run --resume {path}"),
    }
}
