//! The files that Flame's control plane is given for a job, put together as the job file that they amount to.
//!
//! ```text
//! schema.json     roles, channels ───────────────────────────┐
//! job.json        names, backend, maxRunTime ────────────────┤
//! modelSpec.json  hyperparameters, optimizer, selector, … ───┼─▶ one document
//! dataSpec.json   role → group → dataset ids ──┬─ a worker ──┘
//! dataset*.json   url ─────────────────────────┘  for each
//! ```
//!
//! Which file is which, its content says; its name only where its content does not.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::datasets::{self, Assigned};
use super::document::{Document, FileKind};
use super::files::{self, Parsed};
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::{FlameFile, Job};
use super::raw_parts::{Dataset, DesignJob, DesignModel, DesignSchema, RoleData};
use super::walk;

/// What a file of a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
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

/// Puts the files together. `None` if too little of them can be read to say more about the job.
pub(super) fn assemble(files: Vec<Parsed>, schema: &Value, findings: &mut Findings) -> Option<Document> {
    let mut parts = Parts::sort(files, findings);
    let folder = Place::file(parts.folder.as_ref()?);
    let job = parts.one(Part::Job, &folder, findings);
    let job = job.and_then(|file| read::<DesignJob>(file, schema, "DesignJob", findings));
    let (mut job, job_place) = match job {
        Some((job, place)) => (job, place),
        None => (DesignJob::default(), folder.clone()),
    };
    let inline_model = job
        .model_spec
        .take()
        .map(|model| (model, job_place.key("modelSpec")));
    let inline_data = job.data_spec.take().map(|roles| {
        let place = job_place.key("dataSpec");
        let entries: Vec<_> = roles
            .into_iter()
            .enumerate()
            .map(|(i, role)| (role, place.index(i)))
            .collect();
        (entries, place)
    });
    parts.follow(
        Part::Model,
        job.model_spec_path.as_deref(),
        &job_place,
        "modelSpecPath",
        findings,
    );
    parts.follow(
        Part::Data,
        job.data_spec_path.as_deref(),
        &job_place,
        "dataSpecPath",
        findings,
    );

    let design = parts.one(Part::Schema, &folder, findings);
    let design = design.and_then(|file| read::<DesignSchema>(file, schema, "DesignSchema", findings));
    let model = inline_model.or_else(|| {
        let file = parts.one(Part::Model, &folder, findings)?;
        read::<DesignModel>(file, schema, "DesignModel", findings)
    });
    let data = inline_data.or_else(|| {
        let file = parts.one(Part::Data, &folder, findings)?;
        read_data_spec(file, schema, findings)
    });
    let files = parts.take(Part::Dataset);
    let datasets: Vec<(Dataset, Place)> = files
        .into_iter()
        .filter_map(|file| read::<Dataset>(file, schema, "Dataset", findings))
        .collect();
    note(
        &job,
        design.as_ref().map(|(design, _)| design),
        &datasets,
        findings,
    );
    if let Some((design, place)) = &design
        && let Some(connectors) = design
            .connectors
            .as_ref()
            .filter(|connectors| is_something(connectors))
    {
        let found = format!(
            "connectors {} is not supported yet",
            shorten(&connectors.to_string())
        );
        findings
            .add(ProblemKind::Unsupported, &place.key("connectors"), found)
            .expected("channels");
    }
    let (design, design_place) = design?;
    let (model, model_place) = model.unwrap_or((DesignModel::default(), folder.clone()));
    let (roles_data, data_place) = data.unwrap_or((Vec::new(), folder));
    let assigned = datasets::assign(&roles_data, datasets, &data_place, findings);
    let id = job.id.clone().filter(|id| !id.is_empty());
    let id = id.or_else(|| job.design_id.clone()).or_else(|| job.name.clone());
    if id.is_none() && !findings.any_at(&job_place) {
        findings
            .add(ProblemKind::Missing, &job_place.key("name"), "missing")
            .expected("the job's name");
    }
    let mut places = BTreeMap::new();
    for key in ["backend", "brokers", "maxRunTime", "lifl"] {
        places.insert(key, job_place.key(key));
    }
    for key in ["roles", "channels"] {
        places.insert(key, design_place.key(key));
    }
    for key in [
        "baseModel",
        "hyperparameters",
        "optimizer",
        "selector",
        "datasampler",
        "privacy",
        "registry",
        "dependencies",
    ] {
        places.insert(key, model_place.key(key));
    }
    places.insert("job", job_place.clone());
    places.insert("dataset", data_place);
    Some(Document {
        place: job_place,
        kind: FileKind::Job,
        places,
        assigned: Some(assigned),
        raw: FlameFile {
            job: id.map(|id| Job { id, name: job.name }),
            roles: design.roles,
            channels: design.channels,
            backend: job.backend,
            brokers: job.brokers,
            max_run_time: job.max_run_time,
            lifl: job.lifl,
            hyperparameters: model.hyperparameters,
            base_model: model.base_model,
            optimizer: model.optimizer,
            selector: model.selector,
            datasampler: model.datasampler,
            privacy: model.privacy,
            registry: model.registry,
            dependencies: model.dependencies,
            ..FlameFile::default()
        },
    })
}

/// The datasets of each role, each entry with its place, and the place of all.
type DataSpec = (Vec<(RoleData, Place)>, Place);

/// The files by what they are.
struct Parts {
    /// Of the first of them.
    folder: Option<Arc<Path>>,
    by_part: BTreeMap<Part, Vec<Parsed>>,
}

impl Parts {
    fn sort(files: Vec<Parsed>, findings: &mut Findings) -> Self {
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

    fn take(&mut self, part: Part) -> Vec<Parsed> {
        self.by_part.remove(&part).unwrap_or_default()
    }

    /// The one file of that sort; a second one is a conflict, and none is missed.
    fn one(&mut self, part: Part, folder: &Place, findings: &mut Findings) -> Option<Parsed> {
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
    fn follow(&mut self, part: Part, path: Option<&str>, job: &Place, key: &str, findings: &mut Findings) {
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

/// Reads a part, without what is wrong in it.
fn read<T: DeserializeOwned>(
    file: Parsed,
    schema: &Value,
    name: &str,
    findings: &mut Findings,
) -> Option<(T, Place)> {
    let Parsed { file, mut value } = file;
    let place = Place::file(&file);
    walk::walk(
        schema,
        walk::definition(schema, name),
        &mut value,
        &place,
        findings,
    );
    deserialize(value, &place, findings).map(|part| (part, place))
}

fn deserialize<T: DeserializeOwned>(value: Value, place: &Place, findings: &mut Findings) -> Option<T> {
    match serde_path_to_error::deserialize(value) {
        Ok(part) => Some(part),
        Err(error) => {
            // Of what the walk has taken out, it has told.
            if !findings.any_at(place) {
                findings.add(ProblemKind::Invalid, place, shorten(&error.inner().to_string()));
            }
            None
        }
    }
}

/// Reads who has which dataset: a list of [`RoleData`], one of them alone, or, as older files have it, `fromSystem`
/// with role, group and ids as keys.
fn read_data_spec(file: Parsed, schema: &Value, findings: &mut Findings) -> Option<DataSpec> {
    let Parsed { file, value } = file;
    let place = Place::file(&file);
    let entries: Vec<(Value, Place)> = match value {
        Value::Array(entries) => entries
            .into_iter()
            .enumerate()
            .map(|(i, entry)| (entry, place.index(i)))
            .collect(),
        Value::Object(mut members)
            if members.contains_key("fromSystem") || members.contains_key("fromUser") =>
        {
            let from_system = members.remove("fromSystem");
            for (key, value) in members.iter().filter(|(_, value)| is_something(value)) {
                let found = format!(
                    "{} {} is not supported yet",
                    shorten(key),
                    shorten(&value.to_string())
                );
                findings
                    .add(ProblemKind::Unsupported, &place.key(key), found)
                    .expected("datasetGroups of each role");
            }
            let at = place.key("fromSystem");
            let by_role = match from_system {
                Some(Value::Object(by_role)) => by_role,
                Some(Value::Array(entries)) => {
                    let entries = entries
                        .into_iter()
                        .enumerate()
                        .map(|(i, entry)| (entry, at.index(i)));
                    return Some((read_role_data(entries.collect(), schema, findings), place));
                }
                _ => serde_json::Map::new(),
            };
            by_role
                .into_iter()
                .map(|(role, groups)| {
                    let place = at.key(&role);
                    (
                        serde_json::json!({ "role": role, "datasetGroups": groups }),
                        place,
                    )
                })
                .collect()
        }
        one => vec![(one, place.clone())],
    };
    Some((read_role_data(entries, schema, findings), place))
}

fn read_role_data(
    entries: Vec<(Value, Place)>,
    schema: &Value,
    findings: &mut Findings,
) -> Vec<(RoleData, Place)> {
    let definition = walk::definition(schema, "RoleData");
    entries
        .into_iter()
        .filter_map(|(mut value, place)| {
            walk::walk(schema, definition, &mut value, &place, findings);
            deserialize(value, &place, findings).map(|role| (role, place))
        })
        .collect()
}

/// Whether a field says anything.
fn is_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(members) => !members.is_empty(),
        Value::String(text) => !text.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}

/// Notes what means nothing here.
fn note(
    job: &DesignJob,
    design: Option<&DesignSchema>,
    datasets: &[(Dataset, Place)],
    findings: &mut Findings,
) {
    let of_job = [
        ("userId", &job.user_id),
        ("schemaRevision", &job.schema_revision),
        ("codeRevision", &job.code_revision),
        ("priority", &job.priority),
    ];
    for (name, _) in of_job.into_iter().filter(|(_, value)| value.is_some()) {
        findings.note(format!("{name} is not used: it is for Flame's control plane"));
    }
    if design.is_some_and(|design| design.revision.is_some()) {
        findings.note("revision is not used: it is for Flame's control plane");
    }
    for (dataset, _) in datasets {
        let of_dataset = [
            (
                "userId",
                dataset.user_id.is_some(),
                "it is for Flame's control plane",
            ),
            (
                "dataFormat",
                dataset.data_format.is_some(),
                "a file's content says what it is",
            ),
            (
                "computeId",
                dataset.compute_id.is_some(),
                "all workers run on this node",
            ),
            (
                "isPublic",
                dataset.is_public.is_some(),
                "it is for Flame's control plane",
            ),
        ];
        for (name, _, why) in of_dataset.into_iter().filter(|(_, given, _)| *given) {
            findings.note(format!("{name} is not used: {why}"));
        }
    }
}

/// The datasets of a role, one for each of its workers; `None` if the job has no `dataSpec`.
pub(super) fn assigned<'d>(document: &'d Document, role: &str) -> Option<Vec<&'d Assigned>> {
    let assigned = document.assigned.as_ref()?;
    Some(assigned.iter().filter(|assigned| assigned.role == role).collect())
}
