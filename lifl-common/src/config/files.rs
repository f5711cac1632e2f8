//! From the paths that a person gives to parsed files: folders searched, sizes bounded.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::problem::{Findings, Place, ProblemKind, shorten};
use super::{MAX_FILE_BYTES, MAX_WORKERS, json};

/// A file's value, before it is held against the schema.
pub(super) struct Parsed {
    pub(super) file: Arc<Path>,
    pub(super) value: Value,
}

/// Reads all files at the paths, and below those that are folders: those in the order of their names.
pub(super) fn read(paths: &[PathBuf], findings: &mut Findings) -> Vec<Parsed> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let before = files.len();
            if let Err((folder, error)) = search(path, &mut files) {
                let place = Place::file(&Arc::from(folder));
                findings.add(
                    ProblemKind::Unreadable,
                    &place,
                    format!("cannot read this folder: {error}"),
                );
            } else if files.len() == before {
                let place = Place::file(&Arc::from(path.as_path()));
                findings
                    .add(ProblemKind::Missing, &place, "no file in this folder")
                    .expected("worker files or a job file, *.json");
            }
        } else {
            files.push(path.clone());
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

/// Adds the folder's `*.json` files, and its folders', sorted by path. Stops soon after there are too many.
fn search(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), (PathBuf, io::Error)> {
    let at_folder = |error| (folder.to_owned(), error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(at_folder)? {
        let entry = entry.map_err(at_folder)?;
        entries.push((entry.path(), entry.file_type().map_err(at_folder)?));
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (path, file_type) in entries {
        if files.len() > MAX_WORKERS + 1 {
            break;
        }
        // A link to a folder is not followed: it may lead back.
        if file_type.is_dir() {
            search(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "json") && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
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
            Some(Parsed { file, value })
        }
        Err(error) => {
            let (line, column) = (error.line(), error.column());
            let message = error.to_string();
            let cause = message.strip_suffix(&format!(" at line {line} column {column}"));
            let found = format!(
                "not JSON at {line}:{column}: {}",
                shorten(cause.unwrap_or(&message))
            );
            findings.add(ProblemKind::Unreadable, &place, found);
            None
        }
    }
}

/// All of a file; `None` if that is too much.
fn read_bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut text)?;
    Ok((text.len() as u64 <= MAX_FILE_BYTES).then_some(text))
}
