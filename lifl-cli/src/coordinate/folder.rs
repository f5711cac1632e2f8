//! What a run leaves: the job as understood, metrics, checkpoints, the last model, the workers' logs.
//!
//! Its files are opened below its descriptor ([`Dir`]): whatever others put at its path meanwhile, the run works on in its own.
//! Folders are for their user alone (0700), and so are files (0600): they hold models and logs.
//!
//! A folder has one run at a time: whoever works in it holds a lock on it, which goes with the process however that
//! ends. Every file but metrics and logs is written beside, synced and renamed, so that it is whole or not there;
//! [checkpoints](crate::checkpoint) say so for three files at once.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use lifl_common::config::{self, Dataset, JobSpec};
use lifl_common::id::Generation;
use lifl_common::update::image;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;

use crate::checkpoint::{self, Checkpoint, CheckpointError, Hash, Part};
use crate::clock;
use crate::dir::{Dir, FolderError, Trust};
use lifl_learn::data;

const JOB_VERSION: u32 = 1;

pub(crate) const JOB: &str = "job.json";

/// The most that it can have: the largest job that is loaded has a tenth of it.
const JOB_BYTES: u64 = 64 << 20;

/// The last model, once the run is done.
pub(super) const LAST_MODEL: &str = "model.safetensors";

pub(crate) const LOCK: &str = ".lock";

/// How much of a log's end its last lines are looked for in.
const LOG_TAIL_BYTES: u64 = 64 << 10;

/// How long a process that was killed may take to be gone, and its lock with it: the kernel takes its memory apart first.
const DYING: Duration = Duration::from_secs(3);

/// How often it is looked for meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Bytes that are hashed and written at a time: they are still in the cache for the second.
const PIECE_BYTES: usize = 1 << 20;

/// A run's folder. Clones share its lock.
#[derive(Clone, Debug)]
pub(super) struct RunFolder {
    dir: Dir,
    logs: Dir,
    /// SHA-256 of its `job.json`.
    job_sha256: String,
    _lock: Arc<Flock<File>>,
}

/// The newest checkpoint that is whole.
#[derive(Debug)]
pub(super) struct Latest {
    /// Its round; `None` if there is none.
    pub(super) checkpoint: Option<u32>,
    /// What is wrong with the newer ones.
    pub(super) skipped: Vec<String>,
}

/// `job.json`: the job, with a version in front.
#[derive(Serialize)]
struct JobFile<'a> {
    version: u32,
    #[serde(flatten)]
    job: &'a JobSpec,
}

impl RunFolder {
    /// Makes the folder: `out`, which must be new or empty, or else `runs/<job>-<UTC time>` below the current one.
    ///
    /// # Errors
    /// If it is in use, not to be used, or cannot be made.
    pub(super) fn create(out: Option<&Path>, job: &JobSpec, trust: &Trust) -> anyhow::Result<Self> {
        let dir = match out {
            Some(out) => trust.make(out)?,
            None => {
                // 20260131-235959
                let now = clock::utc().replace(['-', ':', 'Z'], "").replace('T', "-");
                let name = format!("{}-{now}", file_name(&job.name));
                let numbered = (2..).map(|n| format!("{name}-{n}"));
                trust.make_fresh(Path::new("runs"), std::iter::once(name.clone()).chain(numbered))?
            }
        };
        let names = dir.names();
        let names = names.with_context(|| format!("cannot read {}", dir.path().display()))?;
        if !names.is_empty() {
            bail!(
                "the run folder {} is not empty: give --out another",
                dir.path().display()
            );
        }
        let lock = lock(&dir)?;
        if dir.length(JOB).is_some() {
            bail!(
                "another run has just used {}: give --out another",
                dir.path().display()
            );
        }
        let here = std::env::current_dir().context("the current folder is gone")?;
        let file = JobFile {
            version: JOB_VERSION,
            job: &anchored(job, &here),
        };
        let text = serde_json::to_vec_pretty(&file).context("the job is not JSON")?;
        let folder = Self {
            logs: make_logs(&dir)?,
            dir,
            job_sha256: Hash::of(&text),
            _lock: Arc::new(lock),
        };
        folder.write(JOB, &[&text])?;
        folder.sync()?;
        Ok(folder)
    }

    /// Opens the folder of a run that has ended, however it did, with its job.
    ///
    /// # Errors
    /// If it is no run's folder, not to be used, a run works in it, or its job cannot be read.
    pub(super) fn open(path: &Path, trust: &Trust) -> anyhow::Result<(Self, JobSpec)> {
        let dir = match trust.open(path) {
            Ok(dir) => dir,
            Err(FolderError::System { path, source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(not_a_folder(&path));
            }
            Err(FolderError::NotAFolder(path)) => return Err(not_a_folder(&path)),
            Err(error) => {
                return Err(anyhow::Error::new(error)
                    .context("--resume takes the folder that a run left, which it named as \"run folder\""));
            }
        };
        if dir.length(JOB).is_none() {
            bail!(
                "{} is not the folder of a run, it has no job.json: give --resume the folder that a run left",
                dir.path().display()
            );
        }
        let lock = lock(&dir)?;
        let (job, job_sha256) = read_job(&dir)?;
        let folder = Self {
            logs: make_logs(&dir)?,
            dir,
            job_sha256,
            _lock: Arc::new(lock),
        };
        folder.sweep();
        Ok((folder, job))
    }

    /// Where it is, for messages.
    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The folder itself.
    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Opens a worker's log to add to it: a run that goes on, and a successor, add to what was said before.
    ///
    /// # Errors
    /// If it cannot be made, or is something else than a log.
    pub(super) fn open_log(&self, worker: &str) -> anyhow::Result<File> {
        let name = log_name(worker);
        let opened = self.logs.append(&name);
        opened.with_context(|| format!("cannot open {}/{name}", self.logs.path().display()))
    }

    /// The last lines of a worker's log.
    pub(super) fn log_tail(&self, worker: &str, count: usize) -> String {
        let text = self.logs.tail(&log_name(worker), LOG_TAIL_BYTES);
        let text = text.unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// The line that a worker's log ends with, but for the hint that Rust adds to a panic; empty if it has said nothing.
    pub(super) fn last_words(&self, worker: &str) -> String {
        let tail = self.log_tail(worker, 20);
        let said = |line: &&str| !line.trim().is_empty() && !line.starts_with("note: run with");
        tail.lines().rev().find(said).unwrap_or_default().to_owned()
    }

    /// Writes a round's checkpoint, from which a top can begin: its model and what the optimizer remembers, images as
    /// they lie in their slots.
    ///
    /// # Errors
    /// If the disk is full, or the folder is gone; nothing of it is left then.
    pub(super) fn checkpoint(&self, round: u32, model: &[u8], state: Option<&[u8]>) -> anyhow::Result<()> {
        let names = [checkpoint::model_name(round), checkpoint::state_name(round)];
        let description = checkpoint::description_name(round);
        let write = || -> anyhow::Result<()> {
            let model = self.write_image(&names[0], model)?;
            let state = state
                .map(|state| self.write_image(&names[1], state))
                .transpose()?;
            // First the names of what it describes, then its own.
            self.sync()?;
            let checkpoint = Checkpoint::new(round, self.job_sha256.clone(), model, state);
            let text = serde_json::to_vec_pretty(&checkpoint).context("a checkpoint is not JSON")?;
            self.write(&description, &[&text])?;
            self.sync()
        };
        write().inspect_err(|_| {
            for name in [&description].into_iter().chain(&names) {
                let _ = self.dir.remove(name);
            }
        })
    }

    /// Removes checkpoints of rounds up to that one, but for so many of the newest of them.
    pub(super) fn prune(&self, round: u32, keep: NonZeroU32) {
        let rounds = self.rounds().into_iter().filter(|&old| old <= round);
        for old in rounds.skip(keep.get() as usize) {
            // The description first: without it nobody looks for the others.
            for name in [
                checkpoint::description_name(old),
                checkpoint::model_name(old),
                checkpoint::state_name(old),
            ] {
                let _ = self.dir.remove(&name);
            }
        }
    }

    /// The newest checkpoint that is whole. All of its bytes are read.
    ///
    /// # Errors
    /// If there are some and all were made with another `job.json` than the one that is there.
    pub(super) fn latest(&self) -> anyhow::Result<Latest> {
        let mut skipped = Vec::new();
        let mut other_jobs = None;
        for round in self.rounds() {
            match self.whole(round) {
                Ok(()) => {
                    return Ok(Latest {
                        checkpoint: Some(round),
                        skipped,
                    });
                }
                Err(error) => {
                    if matches!(error, CheckpointError::OtherJob) {
                        other_jobs.get_or_insert(round);
                    }
                    let error = anyhow::Error::from(error);
                    skipped.push(format!("the checkpoint of round {round} is not whole: {error:#}"));
                }
            }
        }
        if let Some(round) = other_jobs {
            bail!(
                "{} was changed since the checkpoint of round {round} was made: put it back as it was, or begin another run \
                 with {} as its baseModel",
                self.path().join(JOB).display(),
                self.path().join(checkpoint::model_name(round)).display()
            );
        }
        Ok(Latest {
            checkpoint: None,
            skipped,
        })
    }

    /// Whether a checkpoint is whole, and this job's.
    fn whole(&self, round: u32) -> Result<(), CheckpointError> {
        let checkpoint = Checkpoint::read(&self.dir, round)?;
        if checkpoint.job != self.job_sha256 {
            return Err(CheckpointError::OtherJob);
        }
        checkpoint.verify(&self.dir)
    }

    /// Makes the last model `model.safetensors`; `checkpointed` if that round's [checkpoint](Self::checkpoint) has just
    /// been written.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub(super) fn last_model(&self, round: u32, image: &[u8], checkpointed: bool) -> anyhow::Result<()> {
        if !(checkpointed && self.link_last_model(round)) {
            self.write_image(LAST_MODEL, image)?;
        }
        self.sync()
    }

    /// Makes a checkpoint's model the last one: the same bytes need no second copy on the disk. Says whether it did.
    pub(super) fn link_last_model(&self, round: u32) -> bool {
        let beside = beside(LAST_MODEL);
        let _ = self.dir.remove(&beside);
        let linked = self.dir.link(&checkpoint::model_name(round), &beside);
        linked.and_then(|()| self.dir.rename(&beside, LAST_MODEL)).is_ok()
    }

    /// The rounds of which there are checkpoints, whole or not, the newest first.
    fn rounds(&self) -> Vec<u32> {
        let names = self.dir.names().unwrap_or_default();
        let mut rounds: Vec<u32> = names
            .iter()
            .filter_map(|name| checkpoint::round_of(name))
            .collect();
        rounds.sort_unstable_by(|a, b| b.cmp(a));
        rounds
    }

    /// Removes what a process that was killed was writing.
    fn sweep(&self) {
        for name in self.dir.names().unwrap_or_default() {
            if name.starts_with('.') && name.ends_with(".part") {
                let _ = self.dir.remove(&name);
            }
        }
    }

    /// Writes an image as it lies in its slot, but for the slot's generation, which says nothing outside of the arena:
    /// equal models are equal files.
    fn write_image(&self, name: &str, bytes: &[u8]) -> anyhow::Result<Part> {
        let schema = image::schema(bytes)?;
        let (mut metadata, data) = image::check(bytes, &schema)?;
        metadata.generation = Generation(0);
        metadata.info.made.clear();
        let header = image::header(&schema, &metadata);
        self.write(name, &[&header, &bytes[data]])
    }

    /// Writes beside, syncs and renames, so that a file is whole or not there. Its name is only sure to last after
    /// [`sync`](Self::sync).
    fn write(&self, name: &str, parts: &[&[u8]]) -> anyhow::Result<Part> {
        let beside = beside(name);
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let write = || -> io::Result<String> {
            // What a process that was killed has left of it.
            let _ = self.dir.remove(&beside);
            let mut file = self.dir.create_new(&beside)?;
            let mut hash = Hash::new();
            for piece in parts.iter().flat_map(|part| part.chunks(PIECE_BYTES)) {
                hash.update(piece);
                file.write_all(piece)?;
            }
            file.sync_all()?;
            self.dir.rename(&beside, name)?;
            Ok(hash.hex())
        };
        // Asked before the half-written file is removed, and gives its room back.
        let written = write().map_err(|error| self.explain(name, bytes, error));
        let sha256 = written.inspect_err(|_| {
            let _ = self.dir.remove(&beside);
        })?;
        Ok(Part {
            file: name.to_owned(),
            bytes,
            sha256,
        })
    }

    /// Why a file could not be written, with the numbers and what helps.
    fn explain(&self, name: &str, bytes: u64, error: io::Error) -> anyhow::Error {
        let what = format!(
            "cannot write {} ({bytes} bytes)",
            self.path().join(name).display()
        );
        let written = self.dir.length(&beside(name)).unwrap_or(0);
        let remedy = match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
            Errno::ENOSPC => {
                let free = nix::sys::statvfs::fstatvfs(&self.dir);
                let free = free.map_or(0, |disk| disk.blocks_available() * disk.fragment_size());
                format!(
                    "its file system is full, {} bytes were free for it: make room there, or keep fewer checkpoints \
                     (--keep-checkpoints, --checkpoint-every)",
                    free.saturating_add(written)
                )
            }
            Errno::EDQUOT => "the user's disk quota is used up: make room, or keep fewer checkpoints \
                              (--keep-checkpoints, --checkpoint-every)"
                .to_owned(),
            Errno::EFBIG => "files may not be so large here: raise the limit (`ulimit -f`)".to_owned(),
            _ => return anyhow::Error::new(error).context(what),
        };
        anyhow::Error::new(error).context(format!("{what}: {remedy}"))
    }

    /// Makes names last.
    fn sync(&self) -> anyhow::Result<()> {
        let synced = self.dir.sync();
        synced.with_context(|| format!("cannot sync {}", self.path().display()))
    }
}

/// Locks a run's folder until the process ends.
fn lock(folder: &Dir) -> anyhow::Result<Flock<File>> {
    let path = folder.path().join(LOCK);
    let file = folder.open_or_create(LOCK);
    let mut file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let begun = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                // For whoever comes second; it does no harm if it cannot be written.
                let pid = format!("{}\n", std::process::id());
                let _ = lock.set_len(0).and_then(|()| lock.write_all(pid.as_bytes()));
                return Ok(lock);
            }
            Err((back, Errno::EWOULDBLOCK)) if begun.elapsed() < DYING => {
                file = back;
                std::thread::sleep(LOOK_AGAIN);
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let _ = (&mut file).take(20).read_to_string(&mut pid);
                bail!(
                    "another `lifl run` works in {} (process {}): wait for its end, or stop it",
                    folder.path().display(),
                    pid.trim()
                );
            }
            Err((_, error)) => {
                return Err(anyhow::Error::new(error).context(format!("cannot lock {}", path.display())));
            }
        }
    }
}

/// The job of a run, and its file's SHA-256.
fn read_job(folder: &Dir) -> anyhow::Result<(JobSpec, String)> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: Option<u32>,
    }
    let path = folder.path().join(JOB);
    let text = folder.read(JOB, JOB_BYTES);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    let damaged = || format!("{} is damaged: this run cannot be resumed", path.display());
    let Version { version } = serde_json::from_slice(&text).with_context(damaged)?;
    match version {
        Some(JOB_VERSION) => {}
        Some(version) => bail!(
            "{} is of version {version}, this lifl knows {JOB_VERSION}: resume with the lifl that began the run",
            path.display()
        ),
        None => bail!(
            "{} has no version: it is not the job of a run that can be resumed (a job file is run with `lifl run PATH`)",
            path.display()
        ),
    }
    let job: JobSpec = serde_json::from_slice(&text).with_context(damaged)?;
    if job.top().is_none() || job.trainers().next().is_none() || job.rounds == 0 {
        return Err(anyhow!("it has no top, no trainer or no round")).with_context(damaged);
    }
    check_job(&job).with_context(damaged)?;
    Ok((job, Hash::of(&text)))
}

/// The job with paths that do not depend on the current folder: it may be resumed from another.
fn anchored(job: &JobSpec, here: &Path) -> JobSpec {
    let mut job = job.clone();
    // Without normalizing: names that differ stay different.
    let dataset = |dataset: &mut Dataset| {
        if let Some(path) = here.join(dataset.as_str()).to_str()
            && data::is_path(dataset.as_str())
        {
            *dataset = path.into();
        }
    };
    job.base_model = job.base_model.map(|path| here.join(path));
    let datasets = job
        .workers
        .iter_mut()
        .filter_map(|worker| worker.dataset.as_mut());
    let own = job.data.as_mut().map(|data| &mut data.dataset);
    datasets.chain(own).for_each(dataset);
    job
}

fn not_a_folder(path: &Path) -> anyhow::Error {
    anyhow!(
        "{} is no folder: give --resume the folder that a run left, which it named as \"run folder\"",
        path.display()
    )
}

/// Whether a job that was read is one that [`config::load`] makes, as far as files and times go.
fn check_job(job: &JobSpec) -> anyhow::Result<()> {
    let mut names = HashSet::new();
    for worker in &job.workers {
        let name = &worker.name;
        if !config::is_name(name) {
            bail!("{name:?} is not the name of a worker");
        }
        if !names.insert(name) {
            bail!("two workers are called {name:?}");
        }
    }
    let seconds = [Some(job.grace_time_s), job.round_timeout_s];
    for seconds in seconds.into_iter().flatten() {
        if Duration::try_from_secs_f64(seconds).is_err() {
            bail!("{seconds} s is no time to wait");
        }
    }
    Ok(())
}

fn make_logs(dir: &Dir) -> anyhow::Result<Dir> {
    let logs = dir.make_folder("logs");
    logs.with_context(|| format!("cannot use {}/logs", dir.path().display()))
}

fn log_name(worker: &str) -> String {
    format!("{worker}.log")
}

/// The name under which a file is written until it is whole.
fn beside(name: &str) -> String {
    format!(".{name}.part")
}

/// A job's name as part of a file's.
fn file_name(name: &str) -> String {
    name.chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests;
