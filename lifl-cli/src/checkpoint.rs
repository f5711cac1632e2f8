//! A checkpoint on the disk: what a job goes on from.
//!
//! ```text
//!   model-7.safetensors   state-7.safetensors   checkpoint-7.json
//!          │                     │                     │
//!          └─ written beside, synced, renamed ─┘       └─ the same, last: this rename makes the checkpoint
//! ```
//!
//! `checkpoint-<round>.json` names the files with their lengths and SHA-256, so that one that was cut off or changed is
//! found out. Without it there is no checkpoint, whatever else lies there. SHA-256 and not a mere checksum because it is
//! cheap enough beside the writing (1.8 GB/s on one core that has instructions for it), and because anybody can check the
//! files with `sha256sum`. The coordinator [writes](crate::coordinate) checkpoints, a top [begins](crate::work) from one.

use std::io::{self, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::dir::Dir;

/// The format that this program writes and reads.
const VERSION: u32 = 1;

/// The most that a description can have: it names two files.
const DESCRIPTION_BYTES: u64 = 64 << 10;

/// Bytes that are read and hashed at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What `checkpoint-<round>.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Checkpoint {
    version: u32,
    /// The round that it is the result of.
    pub(crate) round: u32,
    /// SHA-256 of the `job.json` beside it, in hex.
    pub(crate) job: String,
    pub(crate) model: Part,
    /// What the optimizer remembers; `None` if it remembers nothing, or nothing yet.
    pub(crate) state: Option<Part>,
}

/// One of its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Part {
    /// Its name, in the same folder.
    pub(crate) file: String,
    pub(crate) bytes: u64,
    /// Its SHA-256, in hex.
    pub(crate) sha256: String,
}

/// Why a checkpoint is not whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckpointError {
    /// A file of it cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Made with another `job.json` than the one beside it.
    #[error("it was made with another job.json")]
    OtherJob,
    /// Its description is damaged.
    #[error("{} is damaged", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// Another program's.
    #[error("{} is of version {found}, this lifl knows {VERSION}", path.display())]
    Version { path: PathBuf, found: u32 },
    /// It says something else than its name.
    #[error("{} is damaged: it names round {round} and {file:?}", path.display())]
    Names { path: PathBuf, round: u32, file: String },
    /// A file of another length.
    #[error("{} is cut off or not the checkpoint's: {found} bytes of {expected}", path.display())]
    Length {
        path: PathBuf,
        found: u64,
        expected: u64,
    },
    /// A file of the right length, but not what was written.
    #[error("{} was changed: its SHA-256 is {found}, not {expected}", path.display())]
    Changed {
        path: PathBuf,
        found: String,
        expected: String,
    },
}

/// The name of a round's model.
pub(crate) fn model_name(round: u32) -> String {
    format!("model-{round}.safetensors")
}

/// The name of what the optimizer remembers after a round.
pub(crate) fn state_name(round: u32) -> String {
    format!("state-{round}.safetensors")
}

/// The name of a checkpoint's description.
pub(crate) fn description_name(round: u32) -> String {
    format!("checkpoint-{round}.json")
}

/// The round of a checkpoint's description, by its file's name.
pub(crate) fn round_of(name: &str) -> Option<u32> {
    let round = name
        .strip_prefix("checkpoint-")?
        .strip_suffix(".json")?
        .parse()
        .ok()?;
    (name == description_name(round)).then_some(round)
}

impl Checkpoint {
    pub(crate) fn new(round: u32, job: String, model: Part, state: Option<Part>) -> Self {
        Self {
            version: VERSION,
            round,
            job,
            model,
            state,
        }
    }

    /// Reads a round's description, without a look at the files that it names.
    ///
    /// # Errors
    /// If it is not there, damaged, or of another version.
    pub(crate) fn read(folder: &Dir, round: u32) -> Result<Self, CheckpointError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let name = description_name(round);
        let path = || folder.path().join(&name);
        let text = folder.read(&name, DESCRIPTION_BYTES);
        let text = text.map_err(|source| CheckpointError::Read { path: path(), source })?;
        let syntax = |source| CheckpointError::Syntax { path: path(), source };
        let Version { version } = serde_json::from_slice(&text).map_err(syntax)?;
        if version != VERSION {
            return Err(CheckpointError::Version {
                path: path(),
                found: version,
            });
        }
        let checkpoint: Self = serde_json::from_slice(&text).map_err(syntax)?;
        let state = checkpoint.state.as_ref();
        let strange = [
            (checkpoint.round != round).then(|| description_name(checkpoint.round)),
            (checkpoint.model.file != model_name(round)).then(|| checkpoint.model.file.clone()),
            state
                .map(|state| state.file.clone())
                .filter(|file| *file != state_name(round)),
        ];
        match strange.into_iter().flatten().next() {
            Some(file) => Err(CheckpointError::Names {
                path: path(),
                round: checkpoint.round,
                file,
            }),
            None => Ok(checkpoint),
        }
    }

    /// Reads all of its files, in `folder`, and compares them with what was written.
    ///
    /// # Errors
    /// If one is missing, cut off or changed.
    pub(crate) fn verify(&self, folder: &Dir) -> Result<(), CheckpointError> {
        [Some(&self.model), self.state.as_ref()]
            .into_iter()
            .flatten()
            .try_for_each(|part| part.verify(folder))
    }
}

impl Part {
    fn verify(&self, folder: &Dir) -> Result<(), CheckpointError> {
        let path = folder.path().join(&self.file);
        let read = |source| CheckpointError::Read {
            path: path.clone(),
            source,
        };
        let mut file = folder.open(&self.file).map_err(read)?;
        let found = file.metadata().map_err(read)?.len();
        if found != self.bytes {
            return Err(CheckpointError::Length {
                path,
                found,
                expected: self.bytes,
            });
        }
        let mut hash = Hash::new();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match file.read(&mut piece).map_err(read)? {
                0 => break,
                n => hash.update(&piece[..n]),
            }
        }
        let found = hash.hex();
        if found != self.sha256 {
            return Err(CheckpointError::Changed {
                path,
                found,
                expected: self.sha256.clone(),
            });
        }
        Ok(())
    }
}

/// SHA-256 in the making.
pub(crate) struct Hash(Sha256);

impl Hash {
    pub(crate) fn new() -> Self {
        Self(Sha256::new())
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn hex(self) -> String {
        let hash = self.0.finalize();
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Of all these bytes.
    pub(crate) fn of(bytes: &[u8]) -> String {
        let mut hash = Self::new();
        hash.update(bytes);
        hash.hex()
    }
}
