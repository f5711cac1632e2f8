//! Job files: Flame's terms in, a job that cannot be wrong out.
//!
//! ```text
//! paths ─files─▶ values ─validate─▶ documents ─draft─▶ roles, channels ─channels, tree─▶ workers ┐
//!        json     (against the      (raw types)                                                  ├─▶ JobSpec
//!                  schema)               └────────────────── settings ───────────────────────────┘
//! ```
//!
//! [`load`] takes a *job file* (Flame's schema, job and model in one: it has `roles`), or the *worker files* of one
//! job (each has `role` and `taskid`), or the files that *Flame's control plane* is given (`schema.json`, `job.json`,
//! `modelSpec.json`, `dataSpec.json`, `dataset*.json`), or folders of them. What Flame has no field for stands under `lifl`. Paths in a
//! file (`dataset`, `baseModel.name`) are kept as they are, so relative ones are relative to the current directory.
//!
//! Every step reports all that it finds wrong and goes on with the rest, as far as what follows could not be a mere
//! consequence.

mod algorithms;
mod brokers;
mod channels;
mod control_plane;
mod control_plane_files;
mod data;
mod dataset;
mod datasets;
mod document;
mod draft;
mod files;
mod flame_support;
mod json;
mod problem;
mod raw;
mod raw_control_plane;
mod settings;
mod spec;
mod topology;
mod tree;
mod validate;
mod variants;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use document::{Document, FileKind};
use problem::{Findings, Place};
use settings::{Settings, Sources};
use tree::Tree;

pub use dataset::{Dataset, mask};
pub use draft::is_name;
pub use problem::{ConfigError, Problem, ProblemKind};
pub use spec::{
    Adaptive, Brokers, DataSource, Group, JobSpec, Kind, ModelSpec, Optimizer, Partition, SampleShape,
    Timing, TrainingSpec, Transport, UpdateKind, WorkerSpec,
};

/// Bytes of the largest file that is read.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
/// Workers of the largest job.
pub const MAX_WORKERS: usize = crate::update::MAX_TRAINERS as usize;
/// Levels of aggregators of the deepest tree: top, middle, leaf.
pub const MAX_LEVELS: usize = 3;
/// The dataset that needs no file.
pub const DIGITS: &str = "builtin:digits";

/// What the command line says instead of the files.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Rounds to run.
    pub rounds: Option<u32>,
    /// What every random choice comes from.
    pub seed: Option<u64>,
    /// When aggregators fold.
    pub timing: Option<Timing>,
    /// The dataset: an http(s) URL, a file or folder, or [`DIGITS`].
    pub data: Option<String>,
    /// Among files that are variants of one worker, the one with this transport.
    pub prefer: Option<Transport>,
}

/// A job, and what there is to say about its files.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The job.
    pub job: JobSpec,
    /// What of the files means nothing here, each once.
    pub notes: Vec<String>,
}

/// Reads a job from its file, from its workers' files, or from folders of these (searched for `*.json`, in the
/// order of their paths).
///
/// # Errors
/// If anything is wrong with the files, or in them; all that is.
pub fn load(paths: &[PathBuf], overrides: &Overrides) -> Result<Loaded, ConfigError> {
    let mut findings = Findings::default();
    let job = understand(paths, overrides, &mut findings);
    let notes = findings.into_notes()?;
    match job {
        Some(job) => Ok(Loaded { job, notes }),
        None => Err(nothing(paths)),
    }
}

/// The JSON Schema of job and worker files, generated from the types that they are read into. Those of the files that
/// Flame's control plane is given are among its definitions: `DesignSchema`, `DesignJob`, `DesignModel`, `RoleData` (of
/// which a `dataSpec.json` is a list) and `Dataset`.
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::generate::SchemaSettings::default().into_generator();
    generator.subschema_for::<raw_control_plane::DesignSchema>();
    generator.subschema_for::<raw_control_plane::DesignJob>();
    generator.subschema_for::<raw_control_plane::DesignModel>();
    generator.subschema_for::<raw_control_plane::RoleData>();
    generator.subschema_for::<raw_control_plane::Dataset>();
    generator.root_schema_for::<raw::FlameFile>().to_value()
}

/// The job, if nothing is wrong with it.
fn understand(paths: &[PathBuf], overrides: &Overrides, findings: &mut Findings) -> Option<JobSpec> {
    let parsed = files::read(paths, findings);
    let all_read = !findings.any();
    // Generated from the types, so it is the same for all files that this process reads.
    static SCHEMA: LazyLock<serde_json::Value> = LazyLock::new(schema);
    let schema = &*SCHEMA;
    let documents: Vec<Document> = if control_plane_files::recognise(&parsed) {
        control_plane::assemble(parsed, schema, findings)
            .into_iter()
            .collect()
    } else {
        let documents = parsed.into_iter();
        documents
            .filter_map(|file| Document::new(file, schema, findings))
            .collect()
    };
    if findings.full() {
        return None;
    }
    for document in &documents {
        flame_support::check(document, findings);
    }
    let documents = variants::choose(&documents, overrides.prefer, findings)?;
    let first = documents.first().copied()?;
    let job_file = documents
        .iter()
        .copied()
        .find(|document| document.kind == FileKind::Job);
    let draft = match job_file {
        Some(job_file) if documents.len() > 1 => {
            findings
                .add(
                    ProblemKind::Conflict,
                    &job_file.place,
                    "a job file among other files",
                )
                .expected("one job file alone, or worker files only");
            return None;
        }
        Some(job_file) => draft::from_job_file(job_file, findings),
        None => draft::from_worker_files(&documents, first, all_read, findings),
    };
    let links = channels::understand(&draft, findings);
    let tree = if links.sound {
        Tree::new(&draft, &links, findings)
    } else {
        None
    };
    // What is wrong in a role or a channel may have taken its groups away.
    let groups_known = documents.iter().all(|document| {
        ["roles", "channels", "groupAssociation"]
            .iter()
            .all(|key| !findings.any_at(&document.at(key)))
    });
    let mut workers = match &tree {
        Some(tree) if groups_known => tree.workers(&draft, findings),
        _ => Vec::new(),
    };
    check_data_roles(first, tree.as_ref(), findings);
    let sources = sources(&documents, first, tree.as_ref());
    let trainers = workers
        .iter()
        .filter(|worker| worker.kind == Kind::Trainer)
        .count();
    let settings = Settings::new(&sources, overrides, trainers, findings);
    let brokers = brokers::understand(&documents, findings);
    note_data_consumers(first, tree.as_ref(), findings);
    let job = draft.job.filter(|_| !workers.is_empty())?;
    for worker in &mut workers {
        let jobs = settings.data.as_ref().map(|data| &data.dataset);
        let replaced = overrides.data.is_some() || jobs.is_none();
        worker.dataset = worker.dataset.take().filter(|own| !replaced && Some(own) != jobs);
    }
    Some(JobSpec {
        name: job.name.unwrap_or_else(|| job.id.clone()),
        id: job.id,
        rounds: settings.rounds,
        seed: settings.seed,
        timing: settings.timing,
        updates: settings.updates,
        workers,
        brokers,
        model: settings.model,
        samples: SampleShape::default(),
        base_model: settings.base_model,
        training: settings.training,
        optimizer: settings.optimizer,
        data: settings.data,
        quorum: settings.quorum,
        round_timeout_s: settings.round_timeout_s,
        grace_time_s: settings.grace_time_s,
        spin_us: settings.spin_us,
        max_run_time_s: settings.max_run_time_s,
    })
}

/// Which files count for what; without a tree, no worker file is known to be a trainer's.
fn sources<'d>(documents: &[&'d Document], first: &'d Document, tree: Option<&Tree<'_>>) -> Sources<'d> {
    let of = |role: Option<&str>| -> Vec<&'d Document> {
        let Some(role) = role else { return Vec::new() };
        let of_role = |document: &&&Document| document.raw.role.as_deref() == Some(role);
        documents.iter().filter(of_role).copied().collect()
    };
    let top = of(tree.map(|tree| tree.top().name.as_str()))
        .first()
        .copied()
        .unwrap_or(first);
    let coordinator = tree.and_then(Tree::coordinator).map(|role| role.name.as_str());
    let lead = of(coordinator).first().copied().unwrap_or(top);
    let mut trainers = of(tree.map(|tree| tree.trainer().name.as_str()));
    if first.kind == FileKind::Job {
        trainers.push(first);
    }
    Sources {
        all: documents.to_vec(),
        lead,
        top,
        trainers,
    }
}

/// Where a file says who has which dataset, the trainers must be those who have them.
fn check_data_roles(document: &Document, tree: Option<&Tree<'_>>, findings: &mut Findings) {
    let (Some(assigned), Some(tree)) = (&document.assigned, tree) else {
        return;
    };
    let trainer = tree.trainer().name.as_str();
    let mut told: Vec<&str> = Vec::new();
    for other in assigned.iter().filter(|assigned| assigned.role != trainer) {
        if !told.contains(&other.role.as_str()) {
            told.push(&other.role);
            let found = format!(
                "datasets for role {:?}, which does not train",
                problem::shorten(&other.role)
            );
            findings
                .add(ProblemKind::Unknown, &other.place, found)
                .one_of(&other.role, [trainer]);
        }
    }
    let place = document.at("dataset");
    let any = assigned.iter().any(|assigned| assigned.role == trainer);
    if !any && !document.data_told && !findings.any_at(&place) {
        findings
            .add(
                ProblemKind::Missing,
                &place,
                format!("no datasets for role {trainer}, which trains"),
            )
            .expected("datasetGroups of that role");
    }
}

/// Only trainers get data, whatever a role's `isDataConsumer` says.
fn note_data_consumers(document: &Document, tree: Option<&Tree<'_>>, findings: &mut Findings) {
    let Some(tree) = tree else { return };
    for role in document.raw.roles.iter().flatten() {
        let trains = role.name == tree.trainer().name;
        if role.is_data_consumer.is_some_and(|consumes| consumes != trains) {
            findings.note("isDataConsumer is not used: trainers get data, and only they");
        }
    }
}

/// There was not even a file to find something wrong in.
fn nothing(paths: &[PathBuf]) -> ConfigError {
    let mut findings = Findings::default();
    let place = match paths.first() {
        Some(path) => Place::file(&Arc::<Path>::from(path.as_path())),
        None => Place::overriding("paths"),
    };
    findings
        .add(ProblemKind::Missing, &place, "no job")
        .expected("a job file, worker files, or a folder of them");
    match findings.into_notes() {
        Err(error) => error,
        Ok(_) => ConfigError {
            problems: Vec::new(),
            omitted: 0,
        },
    }
}
