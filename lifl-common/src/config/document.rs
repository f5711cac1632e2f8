//! One file, as far as it can be read.

use std::collections::BTreeMap;

use serde_json::Value;

use super::datasets::Assigned;
use super::files::Parsed;
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::FlameFile;
use super::{draft, validate};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// A whole job.
    Job,
    /// One worker of a job.
    Worker,
}

/// A file in Flame's terms, without what was wrong in it.
pub(super) struct Document {
    pub(super) place: Place,
    pub(super) kind: FileKind,
    pub(super) raw: FlameFile,
    /// Where fields stand that stand in other files.
    pub(super) places: BTreeMap<&'static str, Place>,
    /// Which workers get data, where a file says so.
    pub(super) assigned: Option<Vec<Assigned>>,
    /// Whether no file says so and that has been told.
    pub(super) data_told: bool,
}

impl Document {
    /// Where a field of the outermost object stands.
    pub(super) fn at(&self, key: &str) -> Place {
        self.places
            .get(key)
            .cloned()
            .unwrap_or_else(|| self.place.key(key))
    }

    /// Reports what is wrong with the file, and keeps the rest. `None` only if the schema lets something through
    /// that serde does not.
    pub(super) fn new(parsed: Parsed, schema: &Value, findings: &mut Findings) -> Option<Self> {
        let Parsed { file, mut value } = parsed;
        let place = Place::file(&file);
        let has = |key: &str| value.get(key).is_some_and(|member| !member.is_null());
        let kind = if !has("roles") && (has("role") || has("taskid")) {
            FileKind::Worker
        } else {
            FileKind::Job
        };
        let neither = kind == FileKind::Job && !has("roles") && value.is_object();
        validate::validate(schema, schema, &mut value, &place, findings);
        if neither {
            findings
                .add(ProblemKind::Missing, &place.key("roles"), "missing")
                .expected("roles, as in a job file, or role and taskid, as in a worker file");
        }
        match serde_path_to_error::deserialize(value) {
            Ok(raw) => {
                let document = Self {
                    place,
                    kind,
                    raw,
                    places: BTreeMap::new(),
                    assigned: None,
                    data_told: false,
                };
                draft::check_kind(&document, findings);
                Some(document)
            }
            Err(error) => {
                let at = Place {
                    path: error.path().to_string(),
                    ..place
                };
                findings.add(ProblemKind::Invalid, &at, shorten(&error.inner().to_string()));
                None
            }
        }
    }
}
