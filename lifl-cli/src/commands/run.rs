//! `lifl run`.

use lifl_common::runtime;
use lifl_daemon::signals::Ending;
use tokio_util::sync::CancellationToken;

use super::detach::Detachment;
use super::job::load;
use super::log;
use crate::cli::RunArgs;
use crate::coordinate::daemon::NodeOptions;
use crate::coordinate::report::{Event, Reporter};
use crate::coordinate::{self, Destination, Resumed, RunOptions};
use crate::dir::Trust;
use crate::exit::{Because, Cause, Outcome};
use crate::privileges::Privileges;
use crate::requirements::{self, Requirements};

/// Runs a job until it is done, fails or is interrupted; the last event says which.
pub(crate) fn run(args: &RunArgs) -> Outcome {
    let detachment = args.detached.then(Detachment::prepare);
    // What an own daemon sends back is told to its sender; the program's own words are for a daemon's log.
    log("warn,lifl_verdict=error");
    let mut reporter = Reporter::new(args.report.json);
    if let Some(detachment) = detachment {
        reporter.detach(detachment);
    }
    let outcome = run_with(args, &mut reporter);
    if let Err(failure) = &outcome {
        let (exit_code, error) = (failure.cause as u8, format!("{:#}", failure.error));
        reporter
            .event(&Event::JobFailed { exit_code, error })
            .because(Cause::Job)?;
    }
    outcome
}

fn run_with(args: &RunArgs, reporter: &mut Reporter) -> Outcome {
    let trust = Trust::new(&args.trust_owner);
    let (job, destination) = match &args.resume {
        Some(folder) => {
            let (resumed, job) = Resumed::open(folder, &trust)?;
            if let Some(event) = resumed.finished() {
                return reporter.event(&event).because(Cause::Job);
            }
            (job, Destination::Resumed(resumed))
        }
        None => {
            let loaded = load(&args.paths, &args.choices, args.report)?;
            for note in &loaded.notes {
                reporter.say(&format!("note: {note}"));
            }
            (loaded.job, Destination::New(args.out.clone()))
        }
    };
    let folder_of = match &destination {
        Destination::Resumed(resumed) => resumed.owner(),
        Destination::New(_) => None,
    };
    // Its own daemon's descriptors are this process's.
    lifl_daemon::raise_open_files();
    let schema = lifl_learn::schema(&job).because(Cause::Config)?;
    Requirements::of(&job, &schema).check()?;
    let privileges = Privileges::of(&job, folder_of);
    let options = RunOptions {
        node: NodeOptions {
            daemon: args.daemon.clone(),
            plane: args.plane,
            pool_bytes: args.pool_mib.map(|mib| mib.saturating_mul(1 << 20)),
            huge_pages: args.huge_pages,
            workers: job.registrations(),
            insecure: args.insecure,
        },
        destination,
        trust,
        privileges,
        checkpoint_every: args.checkpoint_every,
        keep_checkpoints: args.keep_checkpoints,
    };
    let runtime = runtime::start(requirements::COORDINATOR, move || privileges.give_up());
    let runtime = runtime.because(Cause::Machine)?;
    let outcome = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut ending = Ending::watch().because(Cause::Machine)?;
        tokio::spawn({
            let shutdown = shutdown.clone();
            async move {
                ending.asked().await;
                shutdown.cancel();
            }
        });
        coordinate::run(&job, &options, reporter, &shutdown).await
    });
    // A download or an evaluation that nobody waits for any more does not hold up the end.
    runtime.shutdown_background();
    outcome
}
