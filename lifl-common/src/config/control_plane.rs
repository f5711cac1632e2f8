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

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::control_plane_files::{Part, Parts};
use super::datasets::{self, Assigned};
use super::document::{Document, FileKind};
use super::files::Parsed;
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::{FlameFile, Job};
use super::raw_control_plane::{Dataset, DesignJob, DesignModel, DesignSchema, RoleData};
use super::validate;

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
    let data_told = data.is_none();
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
        data_told,
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

/// Reads a part, without what is wrong in it.
fn read<T: DeserializeOwned>(
    file: Parsed,
    schema: &Value,
    name: &str,
    findings: &mut Findings,
) -> Option<(T, Place)> {
    let Parsed { file, mut value } = file;
    let place = Place::file(&file);
    validate::validate(
        schema,
        validate::definition(schema, name),
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
            // Of what validation has taken out, it has told.
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
    let definition = validate::definition(schema, "RoleData");
    entries
        .into_iter()
        .filter_map(|(mut value, place)| {
            validate::validate(schema, definition, &mut value, &place, findings);
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
