//! From the paths that a person gives to parsed files: folders searched, sizes bounded.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::json::{self, NotJson};
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::{MAX_FILE_BYTES, MAX_WORKERS};

/// A file's value, before it is held against the schema.
pub(super) struct Parsed {
    pub(super) file: Arc<Path>,
    pub(super) value: Value,
}

/// Folders that no job file is looked for in: what runs leave, what macOS puts into zip archives, installed packages.
const NOT_SEARCHED: [&str; 3] = ["runs", "__MACOSX", "node_modules"];

/// Reads all files at the paths, and below those that are folders: those in the order of their names.
pub(super) fn read(paths: &[PathBuf], findings: &mut Findings) -> Vec<Parsed> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let place = Place::file(&Arc::from(path.as_path()));
        if is_run_folder(path) {
            findings
                .add(ProblemKind::Invalid, &place, "the folder that a run left")
                .expected("a folder of job files; a run goes on with `lifl run --resume` and its folder");
            continue;
        }
        let before = files.len();
        if let Err(error) = search(path, &mut files, findings) {
            findings.add(
                ProblemKind::Unreadable,
                &place,
                format!("cannot read this folder: {error}"),
            );
        } else if files.len() == before {
            findings
                .add(ProblemKind::Missing, &place, "no file in this folder")
                .expected(
                    "worker files or a job file, *.json; hidden folders and those of runs are not searched",
                );
        }
    }
    // Each worker has a file, and so has the coordinator.
    if files.len() > MAX_WORKERS + 1 {
        let place = Place {
            file: None,
            path: "paths".to_owned(),
        };
        let found = format!("more than {} files", MAX_WORKERS + 1);
        findings.add(ProblemKind::Invalid, &place, found);
        return Vec::new();
    }
    files.iter().filter_map(|file| read_one(file, findings)).collect()
}

/// Adds the folder's `*.json` files, and its folders', sorted by path. Stops soon after there are too many. What is hidden, and
/// what runs and other programs leave, is passed over; what cannot be read below the folder is noted.
fn search(folder: &Path, files: &mut Vec<PathBuf>, findings: &mut Findings) -> io::Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        // `._job.json` of macOS and `.#job.json` of Emacs among them.
        if !name.as_encoded_bytes().starts_with(b".") {
            entries.push((entry.path(), name, entry.file_type()?));
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (path, name, file_type) in entries {
        if files.len() > MAX_WORKERS + 1 {
            break;
        }
        // A link to a folder is not followed: it may lead back.
        if file_type.is_dir() {
            if NOT_SEARCHED.iter().any(|not| name == *not) || is_run_folder(&path) {
                continue;
            }
            if let Err(error) = search(&path, files, findings) {
                findings.note(format!("{} is not searched: {error}", shown(&path)));
            }
        } else if is_job_file(&name) {
            if path.is_file() {
                files.push(path);
            } else if !path.is_dir() {
                findings.note(format!("{} is not read: it is no regular file", shown(&path)));
            }
        }
    }
    Ok(())
}

/// Whether a file of that name may be of a job. The index of a model in several files stands beside it and is not.
fn is_job_file(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_ascii_lowercase();
    name.ends_with(".json") && !name.ends_with(".safetensors.index.json")
}

/// Whether a run of LIFL has left the folder: beside its job stand its metrics, or, if it ended before there were any, its
/// lock and logs.
fn is_run_folder(folder: &Path) -> bool {
    #[derive(Deserialize)]
    struct RunJob {
        #[serde(rename = "version")]
        _version: u32,
        #[serde(rename = "workers")]
        _workers: Vec<IgnoredAny>,
    }
    let job = folder.join("job.json");
    let left = folder.join("metrics.jsonl").is_file()
        || (folder.join(".lock").is_file() && folder.join("logs").is_dir());
    left && job.is_file()
        && matches!(read_bounded(&job), Ok(Some(text)) if serde_json::from_slice::<RunJob>(&text).is_ok())
}

fn shown(path: &Path) -> String {
    shorten(&path.display().to_string())
}

/// Reads one file; what is wrong with it is reported.
pub(super) fn read_one(path: &Path, findings: &mut Findings) -> Option<Parsed> {
    let file = Arc::from(path);
    let place = Place::file(&file);
    let text = match read_bounded(path) {
        Ok(Some(text)) => text,
        Ok(None) => {
            let found = format!("larger than {} MiB", MAX_FILE_BYTES >> 20);
            findings.add(ProblemKind::Unreadable, &place, found);
            return None;
        }
        Err(error) => {
            findings.add(
                ProblemKind::Unreadable,
                &place,
                format!("cannot read this file: {error}"),
            );
            return None;
        }
    };
    match json::parse(&text) {
        Ok((value, twice)) => {
            for path in twice {
                let place = Place {
                    path,
                    ..place.clone()
                };
                findings
                    .add(ProblemKind::Conflict, &place, "given twice")
                    .expected("each field once");
            }
            if value.get("version").is_some_and(Value::is_u64)
                && value.get("workers").is_some_and(Value::is_array)
            {
                findings
                    .add(ProblemKind::Invalid, &place, "the job.json that a run left, not a job file")
                    .expected("the job file of that run; the run itself goes on with `lifl run --resume` and its folder");
                return None;
            }
            Some(Parsed { file, value })
        }
        Err(NotJson { found, expected }) => {
            let problem = findings.add(ProblemKind::Unreadable, &place, found);
            if let Some(expected) = expected {
                problem.expected(expected);
            }
            None
        }
    }
}

/// All of a file; `None` if that is too much.
fn read_bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    // A shell's `<(…)` is a pipe below /dev; to open one that nobody writes to would take for ever.
    let named_pipe = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    if named_pipe && !path.starts_with("/dev") && !path.starts_with("/proc") {
        return Err(io::Error::other("it is a named pipe, not a file"));
    }
    let mut text = Vec::new();
    File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut text)?;
    Ok((text.len() as u64 <= MAX_FILE_BYTES).then_some(text))
}
