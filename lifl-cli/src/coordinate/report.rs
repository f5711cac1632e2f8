//! What a run tells: events for programs, lines and a bar for people, and the same events in the run's folder.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lifl_common::plane::{PlaneKind, is_warning};
use serde::{Deserialize, Serialize};

use super::folder::RunFolder;
use crate::commands::detach::Detachment;
use crate::dir::Dir;
use crate::output;

/// The file of a run's events in its folder.
pub(crate) const METRICS: &str = "metrics.jsonl";

/// How far back from the end of that file a line is looked for.
const LONGEST_LINE_BYTES: u64 = 16 << 20;

/// One thing that happened, as `lifl run --json` prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run goes on in its folder. Rounds from `round` on that stand before it in `metrics.jsonl` are run again.
    Resumed {
        /// The run's folder.
        run: String,
        /// The round that it goes on with.
        round: u32,
        /// The checkpoint that it goes on from; `None` to begin anew.
        checkpoint: Option<String>,
        /// What is wrong with newer checkpoints.
        skipped: Vec<String>,
    },
    /// There is nothing to go on with: all rounds are done.
    AlreadyFinished {
        /// The run's folder.
        run: String,
        /// The job's rounds.
        rounds: u32,
    },
    /// The workers are there and the first round begins.
    JobStarted {
        /// The job's name.
        job: String,
        /// The run's folder.
        run: String,
        /// The daemon's socket.
        daemon: String,
        /// Whether that daemon lives in this process.
        own_daemon: bool,
        /// How frames travel.
        plane: PlaneKind,
        /// Why so.
        plane_reason: String,
        /// Bytes of the pages that arenas lie in which [suit](lifl_common::arena::Layout::suits_huge_pages) huge ones, the smaller
        /// where they differ; of the others if there are none.
        page_bytes: u64,
        /// Why they are not huge, when they are not and might have been.
        page_note: Option<String>,
        /// The workers.
        tree: Vec<Level>,
    },
    /// A worker died; the job goes on.
    WorkerLost {
        /// Its name.
        worker: String,
        /// In which round.
        round: u32,
        /// What its end was.
        how: String,
        /// The last line of its log.
        last_words: String,
        /// Whether another is started in its place; if not, the job goes on without.
        restarting: bool,
    },
    /// A trainer has nothing to give in a round; it goes on with the next.
    TrainerFailed {
        /// Its name.
        worker: String,
        /// In which round.
        round: u32,
        /// The last line of its log.
        why: String,
    },
    /// An update was not taken, by the fault of whoever made it.
    UpdateRefused {
        /// Its maker's name.
        worker: String,
        /// In which round.
        round: u32,
        /// What is wrong with it.
        why: String,
    },
    /// Another has taken a dead worker's place.
    WorkerReplaced {
        /// Its name, which is the dead one's too.
        worker: String,
        /// In which round.
        round: u32,
    },
    /// A round's checkpoint could not be written; the job goes on without it.
    CheckpointFailed {
        /// Which.
        round: u32,
        /// Why, and what helps.
        error: String,
    },
    /// A round is over.
    Round {
        /// Which, from 1.
        round: u32,
        /// From the first frame to the new model.
        seconds: f64,
        /// Mean loss on the test set.
        loss: Option<f64>,
        /// Share of the test set that is classified right.
        accuracy: Option<f64>,
        /// Mean loss in training.
        train_loss: Option<f64>,
        /// Trainers whose updates are in the new model.
        trainers: u32,
        /// The job's other trainers, but for those that the selector did not take.
        left_out: Vec<String>,
        /// Samples behind it.
        samples: u64,
        /// Updates and aggregates folded, on all levels.
        updates_folded: u64,
        /// Bytes of the objects that frames referred to, as the plane counted.
        bytes_referenced: u64,
        /// Bytes of models and updates that were copied between workers.
        bytes_copied: u64,
        /// Bytes that came from workers through the gateway.
        bytes_received: u64,
        /// Bytes that went to workers through the gateway.
        bytes_sent: u64,
        /// The critical path, from the trainers up: when the last of each level had made what went into the model. Empty
        /// where some of it was made on another machine.
        levels: Vec<LevelTime>,
    },
    /// The job is done.
    JobFinished {
        /// Rounds done.
        rounds: u32,
        /// From the command to the last model.
        seconds: f64,
        /// Of the last round.
        loss: Option<f64>,
        /// Of the last round.
        accuracy: Option<f64>,
        /// The most memory that arenas and processes took together.
        peak_memory_bytes: u64,
        /// The run's folder.
        run: String,
    },
    /// The job is not done.
    JobFailed {
        /// The process's exit code.
        exit_code: u8,
        /// What happened.
        error: String,
    },
}

/// The workers of one role.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// The role.
    pub role: String,
    /// How many.
    pub workers: usize,
}

/// When a level was done with a round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LevelTime {
    /// The role.
    pub role: String,
    /// Since the round began.
    pub seconds: f64,
}

/// Where events go.
pub struct Reporter {
    json: bool,
    metrics: Option<Metrics>,
    /// Held until the last event is in it: nobody takes a run for ended before.
    folder: Option<RunFolder>,
    bar: Option<ProgressBar>,
    detachment: Option<Detachment>,
}

impl Reporter {
    /// With `json`, events go to standard output and nothing else does; people's lines go to standard error. Where they cannot be
    /// written they are dropped: the run goes on.
    pub fn new(json: bool) -> Self {
        if json {
            output::tell_events();
        }
        Self {
            json,
            metrics: None,
            folder: None,
            bar: None,
            detachment: None,
        }
    }

    /// Events are also added to the run's `metrics.jsonl` from here on.
    ///
    /// # Errors
    /// If that file cannot be made.
    pub(super) fn keep_metrics(&mut self, run: &RunFolder) -> anyhow::Result<()> {
        let metrics = Metrics::open(run.dir());
        let metrics = metrics.with_context(|| format!("cannot open {}/{METRICS}", run.path().display()))?;
        self.metrics = Some(metrics);
        self.folder = Some(run.clone());
        Ok(())
    }

    /// Has the run go to the background when it has begun.
    pub(crate) fn detach(&mut self, detachment: Detachment) {
        self.detachment = Some(detachment);
    }

    /// A line for people.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.json => output::log().line(format!("{line}\n")),
            None => output::told().line(format!("{line}\n")),
        }
    }

    /// Shows how far something of known length is: a bar on a terminal, nothing elsewhere.
    pub fn begin(&mut self, what: &'static str, length: u64) {
        self.end();
        if self.json || self.detachment.is_some() || !io::stdout().is_terminal() {
            return;
        }
        let style = ProgressStyle::with_template("{prefix:>8} [{bar:32}] {pos}/{len}  {msg}");
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(Terminal::default()), 20);
        let bar = ProgressBar::with_draw_target(Some(length), target).with_prefix(what);
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        self.bar = Some(bar);
    }

    /// Whether there is such a bar.
    pub fn has_bar(&self) -> bool {
        self.bar.is_some()
    }

    /// Where it is.
    pub fn position(&self, position: u64, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_position(position);
            bar.set_message(message);
        }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Something that is wrong with what the job was given, as an event where those were asked for; for people it is the command's
    /// error.
    pub fn problem(&self, event: &serde_json::Value) {
        if self.json {
            output::told().line(format!("{event}\n"));
        }
    }

    /// Tells everybody of an event.
    ///
    /// # Errors
    /// If the event is no JSON; that standard output cannot be written is no error, nor is a full disk: lines that have no
    /// room in the metrics file are added when there is some.
    pub fn event(&mut self, event: &Event) -> anyhow::Result<()> {
        let line = serde_json::to_string(event).context("an event is not JSON")?;
        if let Some(metrics) = &mut self.metrics
            && let Some(error) = metrics.add(&line)
        {
            self.say(&format!(
                "metrics.jsonl cannot be written now ({error}): its lines are kept for later"
            ));
        }
        if self.json {
            output::told().line(line + "\n");
        } else if let Some(text) = describe(event) {
            self.say(&text);
        }
        if let Event::JobStarted { .. } = event
            && let Some(folder) = &self.folder
            && let Some(detachment) = self.detachment.take()
        {
            detachment.complete(folder.dir());
            // Its log is for people; events are in its metrics.
            self.json = false;
            output::tell_lines();
        }
        Ok(())
    }
}

/// The terminal that a bar is drawn on, by way of the sink that lines go to: a terminal that is stopped (Ctrl-S) or gone holds
/// nobody up.
#[derive(Debug, Default)]
struct Terminal {
    /// What is drawn since the last flush.
    drawn: Mutex<String>,
}

impl Terminal {
    fn draw(&self, text: &str) -> io::Result<()> {
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        drawn.push_str(text);
        Ok(())
    }

    /// Moves the cursor by that many places; the letters are those of ECMA-48.
    fn shift(&self, count: usize, letter: char) -> io::Result<()> {
        match count {
            0 => Ok(()),
            count => self.draw(&format!("\x1b[{count}{letter}")),
        }
    }
}

impl indicatif::TermLike for Terminal {
    fn width(&self) -> u16 {
        const USUAL: u16 = 80;
        terminal_size::terminal_size_of(io::stdout()).map_or(USUAL, |(width, _)| width.0)
    }

    fn move_cursor_up(&self, count: usize) -> io::Result<()> {
        self.shift(count, 'A')
    }

    fn move_cursor_down(&self, count: usize) -> io::Result<()> {
        self.shift(count, 'B')
    }

    fn move_cursor_right(&self, count: usize) -> io::Result<()> {
        self.shift(count, 'C')
    }

    fn move_cursor_left(&self, count: usize) -> io::Result<()> {
        self.shift(count, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.draw(text)?;
        self.draw("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.draw(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.draw("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        let drawn = std::mem::take(&mut *self.drawn.lock().unwrap_or_else(PoisonError::into_inner));
        if !drawn.is_empty() {
            output::told().line(drawn);
        }
        Ok(())
    }
}

/// The run's `metrics.jsonl`: whole lines, at whatever moment a process is killed or the disk is full.
struct Metrics {
    file: File,
    /// Bytes of whole lines in it.
    length: u64,
    /// Lines that are not in it yet.
    pending: String,
}

impl Metrics {
    /// Opens it to add to it; the part of a line at its end, which a process left that was killed, goes.
    fn open(run: &Dir) -> io::Result<Self> {
        let file = run.append(METRICS)?;
        let end = file.metadata()?.len();
        let from = end.saturating_sub(LONGEST_LINE_BYTES);
        let mut text = Vec::new();
        (&file).seek(SeekFrom::Start(from))?;
        (&file).take(LONGEST_LINE_BYTES).read_to_end(&mut text)?;
        let last = text.iter().rposition(|byte| *byte == b'\n');
        let length = match last {
            Some(at) => from + at as u64 + 1,
            None if from == 0 => 0,
            None => return Err(io::Error::other("its last line has no end: move it away")),
        };
        file.set_len(length)?;
        Ok(Self {
            file,
            length,
            pending: String::new(),
        })
    }

    /// Adds a line, and those that had no room before. Gives the error of the first that had none.
    fn add(&mut self, line: &str) -> Option<io::Error> {
        let first = self.pending.is_empty();
        self.pending.push_str(line);
        self.pending.push('\n');
        match self.file.write_all(self.pending.as_bytes()) {
            Ok(()) => {
                self.length += self.pending.len() as u64;
                self.pending.clear();
                None
            }
            Err(error) => {
                // A part may have had room.
                let _ = self.file.set_len(self.length);
                first.then_some(error)
            }
        }
    }
}

/// An event in words for people; `None` if it is told otherwise.
pub(crate) fn describe(event: &Event) -> Option<String> {
    let text = match event {
        Event::Resumed {
            run,
            round,
            checkpoint,
            skipped,
        } => {
            let mut text: String = skipped.iter().map(|what| format!("warning: {what}\n")).collect();
            text.push_str(&match checkpoint {
                Some(checkpoint) => format!("resumed from {checkpoint} in {run}, with round {round}"),
                None => format!("no checkpoint in {run} to go on from: beginning at round {round}"),
            });
            text
        }
        Event::AlreadyFinished { run, rounds } => {
            format!("nothing left to do: all {rounds} rounds are done, model in {run}")
        }
        Event::CheckpointFailed { round, error } => {
            format!("warning: round {round} has no checkpoint, the job goes on: {error}")
        }
        Event::JobStarted {
            job,
            run,
            daemon,
            own_daemon,
            plane,
            plane_reason,
            page_bytes,
            page_note,
            tree,
        } => {
            let tree: Vec<String> = tree
                .iter()
                .map(|level| format!("{} {}", level.workers, level.role))
                .collect();
            let whose = if *own_daemon { "own daemon" } else { "daemon" };
            // An own daemon has its user's rights, as a rule none; one that serves everybody was to have more.
            let warning = if !own_daemon && is_warning(plane_reason) {
                "WARNING, "
            } else {
                ""
            };
            format!(
                "job {job}: {}\nplane {plane}: {warning}{plane_reason} ({whose} at {daemon})\nmemory in pages of {}{}\nrun folder {run}",
                tree.join(", "),
                human_bytes(*page_bytes),
                page_note
                    .as_ref()
                    .map_or(String::new(), |note| format!(": {note}")),
            )
        }
        Event::WorkerLost {
            worker,
            round,
            how,
            last_words,
            restarting,
        } => {
            let then = if *restarting {
                "starting another"
            } else {
                "going on without it"
            };
            format!("round {round}: {worker} is gone ({how}); {then}. Its log ends: {last_words}")
        }
        Event::TrainerFailed { worker, round, why } => {
            format!("round {round}: {worker} has no update. Its log ends: {why}")
        }
        Event::UpdateRefused { worker, round, why } => {
            format!("round {round}: the update of {worker} is refused: {why}")
        }
        Event::WorkerReplaced { worker, round } => {
            format!("round {round}: another {worker} has taken over")
        }
        Event::Round {
            round,
            seconds,
            loss,
            accuracy,
            train_loss,
            trainers,
            left_out,
            updates_folded,
            bytes_referenced,
            ..
        } => {
            let mut text = format!("round {round:>3}  {seconds:>7.3} s");
            if let Some(accuracy) = accuracy {
                text.push_str(&format!("  accuracy {:>6.2} %", accuracy * 100.0));
            }
            if let Some(loss) = loss {
                text.push_str(&format!("  loss {loss:.4}"));
            }
            if let Some(loss) = train_loss {
                text.push_str(&format!("  train loss {loss:.4}"));
            }
            let referenced = human_bytes(*bytes_referenced);
            text.push_str(&format!(
                "  {trainers} trainers, {updates_folded} folded, {referenced} referenced"
            ));
            if !left_out.is_empty() {
                text.push_str(&format!("; without {}", some_of(left_out)));
            }
            text
        }
        Event::JobFinished {
            rounds,
            seconds,
            accuracy,
            peak_memory_bytes,
            run,
            ..
        } => {
            let accuracy = accuracy.map_or(String::new(), |share| {
                format!(", accuracy {:.2} %", share * 100.0)
            });
            let memory = human_bytes(*peak_memory_bytes);
            format!("done: {rounds} rounds in {seconds:.1} s{accuracy}, peak memory {memory}; model in {run}")
        }
        Event::JobFailed { .. } => return None,
    };
    Some(text)
}

/// The first few names, and how many more there are.
fn some_of(names: &[String]) -> String {
    const FEW: usize = 5;
    let mut text = names[..names.len().min(FEW)].join(", ");
    if names.len() > FEW {
        text.push_str(&format!(" and {} more", names.len() - FEW));
    }
    text
}

/// Bytes as people read them.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() == 0.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        let read = [0, 512, 4096, 2 << 20, 243_300_000].map(human_bytes);
        assert_eq!(read, ["0 B", "512 B", "4 KiB", "2 MiB", "232.0 MiB"]);
    }
}
