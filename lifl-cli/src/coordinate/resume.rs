//! What a run goes on from that was killed, interrupted or failed: its folder, its job, its last whole checkpoint.
//!
//! Nothing else is needed: aggregators have no state over rounds but the optimizer's, which is in the checkpoint, and
//! whatever is drawn by chance (data, order, selection) comes from the seed and the round's number.

use std::path::Path;

use anyhow::Context;
use lifl_common::config::JobSpec;
use lifl_common::update::{Schema, image};

use super::folder::{LAST_MODEL, Latest, RunFolder};
use super::report::Event;
use crate::checkpoint;
use crate::dir::{Dir, Trust};
use crate::exit::{Because, Cause, Outcome};

/// A run's folder, opened to go on in it.
#[derive(Debug)]
pub struct Resumed {
    pub(super) folder: RunFolder,
    /// The last round that is done and has a checkpoint; `None` to begin at the first.
    pub(super) from: Option<u32>,
    /// What was found not to be whole.
    pub(super) skipped: Vec<String>,
    rounds: u32,
    finished: bool,
}

impl Resumed {
    /// Opens a run's folder; nobody else can from then on. Gives the run's job too.
    ///
    /// # Errors
    /// If it is no run's folder, not to be used, its job cannot be read, or another run works in it.
    pub fn open(path: &Path, trust: &Trust) -> Outcome<(Self, JobSpec)> {
        let (folder, job) = RunFolder::open(path, trust).because(Cause::Config)?;
        let schema = lifl_learn::schema(&job).because(Cause::Config)?;
        let last = whole_model(folder.dir(), &schema);
        let mut resumed = Self {
            folder,
            from: None,
            skipped: Vec::new(),
            rounds: job.rounds,
            finished: matches!(last, Ok(true)),
        };
        if resumed.finished {
            return Ok((resumed, job));
        }
        resumed
            .skipped
            .extend(last.err().map(|error| format!("{error:#}")));
        let Latest { checkpoint, skipped } = resumed.folder.latest().because(Cause::Config)?;
        resumed.skipped.extend(skipped);
        // All rounds were done, and only the end was missing.
        if let Some(round) = checkpoint
            && round >= job.rounds
        {
            resumed.finished = resumed.folder.link_last_model(round);
        }
        resumed.from = checkpoint;
        Ok((resumed, job))
    }

    /// What there is to say of a run that has nothing left to do; `None` of any other.
    pub fn finished(&self) -> Option<Event> {
        self.finished.then(|| Event::AlreadyFinished {
            run: self.folder.path().display().to_string(),
            rounds: self.rounds,
        })
    }

    /// The user whose the folder is.
    pub(crate) fn owner(&self) -> Option<u32> {
        self.folder.dir().owner().ok()
    }

    /// What there is to say of one that goes on.
    pub(super) fn event(&self) -> Event {
        Event::Resumed {
            run: self.folder.path().display().to_string(),
            round: self.from.map_or(1, |round| round + 1),
            checkpoint: self.from.map(checkpoint::description_name),
            skipped: self.skipped.clone(),
        }
    }
}

/// Whether a run's last model is there; an error if it is and is not what a run leaves.
fn whole_model(folder: &Dir, schema: &Schema) -> anyhow::Result<bool> {
    let path = folder.path().join(LAST_MODEL);
    let file = match folder.read(LAST_MODEL, image::image_bytes(schema) as u64) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    image::check(&file, schema).with_context(|| format!("{} is not whole", path.display()))?;
    Ok(true)
}
