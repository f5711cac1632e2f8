//! `lifl attach`: follows a run until it ends, and ends as it has.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::mem;

use anyhow::{Context, anyhow};
use lifl_daemon::signals::Ending as Asked;

use super::detach::{BEGUN, LOG};
use super::{ALONE, runtime};
use crate::cli::AttachArgs;
use crate::coordinate::LOCK;
use crate::coordinate::report::{Event, METRICS, describe};
use crate::exit::{Because, Cause, Failure, Outcome};
use crate::output::{self, outln};
use crate::runs::{LOOK_AGAIN, RunAt};

/// Follows a run.
pub(crate) fn attach(args: &AttachArgs) -> Outcome {
    let run = RunAt::find(args.run.as_deref())?;
    let runtime = runtime(ALONE)?;
    runtime.block_on(async {
        let mut asked = Asked::watch().because(Cause::Machine)?;
        let mut follower = Follower::new(&run, args.report.json);
        loop {
            // Asked before its files are read: whoever has ended has written all that it will.
            let live = run.is_live().because(Cause::Machine)?;
            follower.look(&run)?;
            if !live {
                return ended(&run);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_AGAIN) => {}
                _ = asked.asked() => {
                    let path = run.path().display();
                    let error = anyhow!("detached; the run goes on: `lifl attach {path}`, `lifl stop {path}`");
                    return Err(Failure::new(Cause::Interrupted, error));
                }
            }
        }
    })
}

/// The run's end as this command's.
fn ended(run: &RunAt) -> Outcome {
    let path = run.path().display();
    let (cause, error) = match run.ending() {
        Some(ending) if ending.exit_code == 0 => return Ok(()),
        Some(ending) => (
            Cause::of(ending.exit_code),
            ending.error.unwrap_or_else(|| "the run has failed".to_owned()),
        ),
        None => (
            Cause::Job,
            format!("the run has died without a word (killed?): go on with it by `lifl run --resume {path}`"),
        ),
    };
    Err(Failure::new(cause, anyhow!(error)))
}

/// What of a run's files has been shown.
struct Follower {
    json: bool,
    events: Tail,
    log: Tail,
    /// Lines that were shown as events, which the log has too.
    shown: HashSet<String>,
}

impl Follower {
    fn new(run: &RunAt, json: bool) -> Self {
        Self {
            json,
            events: Tail::new(METRICS, |text| last_begin(text, begins)),
            log: match is_of_this_run(run) {
                true => Tail::new(LOG, |text| last_begin(text, |line, _| line.starts_with(BEGUN))),
                false => Tail::new(LOG, str::len),
            },
            shown: HashSet::new(),
        }
    }

    /// Shows what is new.
    fn look(&mut self, run: &RunAt) -> Outcome {
        // In this order: a line of the log that is an event is one already.
        let log = self.log.read(run).because(Cause::Machine)?;
        let events = self.events.read(run).because(Cause::Machine)?;
        for line in events.lines() {
            // Of another version of this program, perhaps: it is passed on, but cannot be described.
            let text = serde_json::from_str::<Event>(line)
                .ok()
                .and_then(|event| describe(&event));
            if self.json {
                outln!("{line}")?;
            } else if let Some(text) = &text {
                outln!("{text}")?;
            }
            self.shown
                .extend(text.iter().flat_map(|text| text.lines()).map(str::to_owned));
        }
        for line in log.lines() {
            if !line.starts_with(BEGUN) && !self.shown.contains(line) {
                output::log().line(format!("{line}\n"));
            }
        }
        Ok(())
    }
}

/// Whether the log is of the run that has, or had last, the folder's lock, and not of one before it.
fn is_of_this_run(run: &RunAt) -> bool {
    let modified = |name| run.dir().open(name).ok()?.metadata().ok()?.modified().ok();
    modified(LOG)
        .zip(modified(LOCK))
        .is_some_and(|(log, lock)| log >= lock)
}

/// Whether an event is the first of a run, by itself and the line before it.
fn begins(line: &str, before: &str) -> bool {
    let is = |line: &str, name: &str| line.starts_with(&format!(r#"{{"event":"{name}""#));
    is(line, "resumed") || (is(line, "job_started") && !is(before, "resumed"))
}

/// Where the last line begins that is a beginning; the text's begin if there is none.
fn last_begin(text: &str, is_begin: impl Fn(&str, &str) -> bool) -> usize {
    let (mut at, mut found, mut before) = (0, 0, "");
    for line in text.split_inclusive('\n') {
        if is_begin(line, before) {
            found = at;
        }
        at += line.len();
        before = line;
    }
    found
}

/// A file to which lines are added, and which need not be there yet.
struct Tail {
    name: &'static str,
    file: Option<File>,
    /// Where to begin in what is there at first.
    from: Option<fn(&str) -> usize>,
    /// A line whose end is not there yet.
    rest: Vec<u8>,
}

impl Tail {
    fn new(name: &'static str, from: fn(&str) -> usize) -> Self {
        Self {
            name,
            file: None,
            from: Some(from),
            rest: Vec::new(),
        }
    }

    /// The whole lines that have come.
    fn read(&mut self, run: &RunAt) -> anyhow::Result<String> {
        if self.file.is_none() {
            match run.dir().open(self.name) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
                Err(error) => {
                    let path = run.path().join(self.name);
                    return Err(error).with_context(|| format!("cannot open {}", path.display()));
                }
            }
        }
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut self.rest)
                .with_context(|| format!("cannot read {}", self.name))?;
        }
        let end = self
            .rest
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        let rest = self.rest.split_off(end);
        let text = String::from_utf8_lossy(&mem::replace(&mut self.rest, rest)).into_owned();
        match self.from.take() {
            Some(from) => Ok(text[from(&text)..].to_owned()),
            None => Ok(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_run_in_a_folder_is_shown() {
        let line = |name: &str| format!("{{\"event\":\"{name}\"}}\n");
        let first = line("job_started") + &line("round");
        let again = line("resumed") + &line("job_started") + &line("round");
        assert_eq!(last_begin(&first, begins), 0);
        assert_eq!(last_begin(&(first.clone() + &again), begins), first.len());
        assert_eq!(last_begin("", begins), 0);
    }
}
