//! The files of a control plane's job by what they are: told by their content, sought where the job's file names them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::files::{self, Parsed};
use super::problem::{Findings, Place, ProblemKind, shorten};

/// What a file of a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Schema,
    Job,
    Model,
    Data,
    Dataset,
}

impl Part {
    /// What Flame calls the file.
    fn name(self) -> &'static str {
        match self {
            Self::Schema => "schema.json",
            Self::Job => "job.json",
            Self::Model => "modelSpec.json",
            Self::Data => "dataSpec.json",
            Self::Dataset => "dataset.json",
        }
    }

    /// What must be in it.
    fn content(self) -> &'static str {
        match self {
            Self::Schema => "with roles and channels",
            Self::Job => "with name and backend",
            Self::Model => "with hyperparameters",
            Self::Data => "with role and datasetGroups",
            Self::Dataset => "with url",
        }
    }
}

/// What a file is by its content, else by its name. `None` for job files, worker files, and anything else.
fn part_of(parsed: &Parsed) -> Option<Part> {
    let value = &parsed.value;
    let has = |keys: &[&str]| {
        keys.iter()
            .any(|key| value.get(key).is_some_and(|member| !member.is_null()))
    };
    if let Value::Array(entries) = value {
        let says = |key| entries.iter().any(|entry| entry.get(key).is_some());
        return (says("datasetGroups") || says("role") || stem(&parsed.file) == "dataspec")
            .then_some(Part::Data);
    }
    if !value.is_object() || has(&["taskid", "job"]) || (has(&["role"]) && !has(&["datasetGroups"])) {
        return None;
    }
    const JOB: &[&str] = &[
        "designId",
        "dataSpecPath",
        "modelSpecPath",
        "dataSpec",
        "modelSpec",
        "schemaRevision",
        "codeRevision",
        "priority",
    ];
    let by_content = [
        (Part::Schema, &["roles", "channels"][..]),
        (Part::Data, &["datasetGroups", "fromSystem", "fromUser"]),
        (Part::Dataset, &["url", "dataFormat"]),
        (Part::Job, JOB),
        (
            Part::Model,
            &["hyperparameters", "optimizer", "selector", "baseModel"],
        ),
    ];
    if let Some((part, _)) = by_content.into_iter().find(|(_, keys)| has(keys)) {
        return Some(part);
    }
    match stem(&parsed.file).as_str() {
        "schema" => Some(Part::Schema),
        "job" => Some(Part::Job),
        "modelspec" => Some(Part::Model),
        "dataspec" => Some(Part::Data),
        name if name.starts_with("dataset") => Some(Part::Dataset),
        _ => None,
    }
}

fn stem(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default();
    stem.to_string_lossy().to_ascii_lowercase()
}

/// Whether the files are those of a control plane: one of them is a part that is of no use alone, and none is a job
/// or worker file.
pub(super) fn recognise(files: &[Parsed]) -> bool {
    let of_worker_or_job = |file: &Parsed| {
        let has = |key| file.value.get(key).is_some();
        has("taskid") || has("job") || (has("role") && !has("datasetGroups"))
    };
    !files.iter().any(of_worker_or_job) && files.iter().filter_map(part_of).any(|part| part != Part::Schema)
}

/// The files by what they are.
pub(super) struct Parts {
    /// Of the first of them.
    pub(super) folder: Option<Arc<Path>>,
    by_part: BTreeMap<Part, Vec<Parsed>>,
}

impl Parts {
    pub(super) fn sort(files: Vec<Parsed>, findings: &mut Findings) -> Self {
        let mut parts = Self {
            folder: files.first().map(|file| {
                let folder = file.file.parent().filter(|folder| !folder.as_os_str().is_empty());
                Arc::from(folder.unwrap_or(Path::new(".")))
            }),
            by_part: BTreeMap::new(),
        };
        for file in files {
            match part_of(&file) {
                Some(part) => parts.by_part.entry(part).or_default().push(file),
                None => {
                    findings
                        .add(
                            ProblemKind::Unknown,
                            &Place::file(&file.file),
                            "not a part of a job that is known here",
                        )
                        .expected("schema.json, job.json, modelSpec.json, dataSpec.json or dataset*.json of one job");
                }
            }
        }
        parts
    }

    pub(super) fn take(&mut self, part: Part) -> Vec<Parsed> {
        self.by_part.remove(&part).unwrap_or_default()
    }

    /// The one file of that sort; a second one is a conflict, and none is missed.
    pub(super) fn one(&mut self, part: Part, folder: &Place, findings: &mut Findings) -> Option<Parsed> {
        // An empty list is of a file that could not be had, which has been told.
        let told = self.by_part.contains_key(&part);
        let mut files = self.take(part).into_iter();
        let Some(one) = files.next() else {
            if told {
                return None;
            }
            findings
                .add(ProblemKind::Missing, folder, format!("no {} here", part.name()))
                .expected(format!("a file {}", part.content()));
            return None;
        };
        for other in files {
            let found = format!("a second {}", part.name());
            findings
                .add(ProblemKind::Conflict, &Place::file(&other.file), found)
                .expected(format!("{} alone", one.file.display()));
        }
        Some(one)
    }

    /// Of the files of that sort, keeps the one that the job names, or reads it.
    pub(super) fn follow(
        &mut self,
        part: Part,
        path: Option<&str>,
        job: &Place,
        key: &str,
        findings: &mut Findings,
    ) {
        let (Some(path), Some(job_file)) = (path.filter(|path| !path.is_empty()), &job.file) else {
            return;
        };
        let named = job_file.parent().unwrap_or(Path::new("")).join(path);
        let same = |file: &Parsed| match (file.file.canonicalize(), named.canonicalize()) {
            (Ok(a), Ok(b)) => a == b,
            _ => false,
        };
        let files = self.take(part);
        let kept = match files.into_iter().find(same) {
            Some(file) => Some(file),
            // It was among the files that were given, and what is wrong with it has been said.
            None if findings.any_at(&Place::file(&Arc::from(named.as_path()))) => None,
            None if named.is_file() => files::read_one(&named, findings),
            None => {
                let found = format!("no file {:?}", shorten(&named.display().to_string()));
                findings
                    .add(ProblemKind::Missing, &job.key(key), found)
                    .expected(format!("the path of a file {}", part.content()));
                None
            }
        };
        match kept {
            Some(file) => {
                self.by_part.insert(part, vec![file]);
            }
            // Something has been said about it.
            None => {
                self.by_part.insert(part, Vec::new());
            }
        }
    }
}
