//! What a run leaves: the job as understood, metrics, checkpoints, the last model, the workers' logs.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use lifl_common::config::JobSpec;

/// A run's folder.
#[derive(Clone, Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Makes the folder: `out`, which must be new or empty, or else `runs/<job>-<UTC time>` below the current one.
    ///
    /// # Errors
    /// If it is in use or cannot be made.
    pub(super) fn create(out: Option<&Path>, job: &JobSpec) -> anyhow::Result<Self> {
        let path = match out {
            Some(out) => out.to_owned(),
            None => fresh(
                Path::new("runs"),
                &format!(
                    "{}-{}",
                    file_name(&job.name),
                    jiff::Timestamp::now().strftime("%Y%m%d-%H%M%S")
                ),
            ),
        };
        if fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_some()) {
            bail!(
                "the run folder {} is not empty: give --out another",
                path.display()
            );
        }
        fs::create_dir_all(path.join("logs")).with_context(|| format!("cannot make {}", path.display()))?;
        // Workers are started with this path and need not be where we are.
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot find {}", path.display()))?;
        let folder = Self { path };
        let text = serde_json::to_vec_pretty(job).context("the job is not JSON")?;
        folder.write("job.json", &text)?;
        Ok(folder)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A worker's log.
    pub(super) fn log(&self, worker: &str) -> PathBuf {
        self.path.join("logs").join(format!("{worker}.log"))
    }

    /// The last lines of a worker's log.
    pub(super) fn log_tail(&self, worker: &str, count: usize) -> String {
        let text = fs::read(self.log(worker)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Writes a round's model, an image as it lies in its slot.
    ///
    /// # Errors
    /// If the disk is full, or the folder is gone.
    pub(super) fn checkpoint(&self, round: u32, image: &[u8]) -> anyhow::Result<()> {
        self.write(&format!("model-{round}.safetensors"), image)
    }

    /// Makes the last model `model.safetensors`.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub(super) fn last_model(&self, round: u32, image: &[u8]) -> anyhow::Result<()> {
        let last = self.path.join("model.safetensors");
        // The same bytes need no second copy on the disk.
        if fs::hard_link(self.path.join(format!("model-{round}.safetensors")), &last).is_ok() {
            return Ok(());
        }
        self.write("model.safetensors", image)
    }

    /// Writes beside and renames, so that a file is whole or not there.
    fn write(&self, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
        let (path, beside) = (self.path.join(name), self.path.join(format!(".{name}.part")));
        let written = File::create(&beside).and_then(|mut file| file.write_all(bytes));
        let renamed = written.and_then(|()| fs::rename(&beside, &path));
        if renamed.is_err() {
            let _ = fs::remove_file(&beside);
        }
        renamed.with_context(|| format!("cannot write {} ({} bytes)", path.display(), bytes.len()))
    }
}

/// A path in `parent` that is not there yet.
fn fresh(parent: &Path, name: &str) -> PathBuf {
    let numbered = (2..).map(|n| parent.join(format!("{name}-{n}")));
    let mut paths = std::iter::once(parent.join(name)).chain(numbered);
    paths
        .find(|path| !path.exists())
        .unwrap_or_else(|| parent.join(name))
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
