//! What a job is given beside its files, looked at before anything starts: data sets and the base model.

use anyhow::anyhow;
use lifl_common::config::{DataSource, JobSpec, SampleShape, Transport, WorkerSpec};
use serde_json::{Value, json};

use crate::base_model::{self, BaseModelError};
use crate::exit::{Because, Cause, Failure, Outcome};
use lifl_learn::data::{self, DataError};

/// The data sets of a job, each with the number of trainers that share it; the one that models are judged on first, whether
/// anybody trains on it or not.
pub(crate) fn sources(job: &JobSpec) -> Vec<(DataSource, u32)> {
    let mut sources = job.datasets();
    if let Some(data) = &job.data {
        match sources.iter().position(|(known, _)| known == data) {
            Some(at) => sources.swap(0, at),
            None => sources.insert(0, (data.clone(), 1)),
        }
    }
    sources
}

/// What the job's networks take in and give out: the images of all its data sets must be of one shape, and there are as many
/// classes as any of them has.
///
/// # Errors
/// If a trainer's images are of another shape than the job's.
pub(crate) fn shape(job: &JobSpec, found: &[(DataSource, SampleShape)]) -> Outcome<SampleShape> {
    let Some(((first, shape), others)) = found.split_first() else {
        return Ok(job.samples);
    };
    let mut shape = *shape;
    for (source, other) in others {
        if !shape.same_image(other) {
            let whose = job
                .trainers()
                .find(|trainer| job.data_of(trainer).as_ref() == Some(source));
            let error = anyhow!(
                "{}: its data set {} has images of {other} pixels, the job's, {}, of {shape}: give all trainers images of one shape",
                whose.map_or("the job", |trainer| &trainer.name),
                source.dataset,
                first.dataset
            );
            return Err(Failure::new(Cause::Config, error));
        }
        shape.classes = shape.classes.max(other.classes);
    }
    Ok(shape)
}

/// Why no worker comes by way of an MQTT broker.
pub(crate) const NO_MQTT: &str = "this lifl was built without MQTT: build it with the cargo feature mqtt, or give the channel the \
                                  backend p2p";

/// Makes sure that this program was built with the transports that the job's workers come by.
///
/// # Errors
/// If it was not.
pub(crate) fn check_transports(job: &JobSpec) -> Outcome {
    let needs = |worker: &&WorkerSpec| worker.transport == Transport::Mqtt && cfg!(not(feature = "mqtt"));
    match job.workers.iter().find(needs) {
        Some(worker) => Err(Failure::new(
            Cause::Machine,
            anyhow!("{}: {NO_MQTT}", worker.name),
        )),
        None => Ok(()),
    }
}

/// The cause that a fault of the data has.
pub(crate) fn data_failure(error: DataError) -> Failure {
    let of_machine = matches!(
        error,
        DataError::Download { .. }
            | DataError::Cache { .. }
            | DataError::NoCache
            | DataError::NoDownloads(_)
            | DataError::NotBuiltIn
    );
    Failure::new(if of_machine { Cause::Machine } else { Cause::Config }, error)
}

/// Looks at all that is on this machine; what would have to be downloaded is not. Sets the job's shape of samples, and gives what
/// there is to note.
///
/// # Errors
/// If something is wrong with it; `problem` is told of it as an event.
pub(crate) fn look(job: &mut JobSpec, problem: impl Fn(&Value)) -> Outcome<Vec<String>> {
    check_transports(job)?;
    let (mut notes, mut found, mut unknown) = (Vec::new(), Vec::new(), false);
    for (source, trainers) in sources(job) {
        if !data::is_here(&source) {
            notes.push(format!(
                "{} is looked at when the job is run: it is not downloaded yet",
                source.dataset
            ));
            unknown = true;
            continue;
        }
        let prepared = data::prepare(&source, trainers, &data::Progress::default()).map_err(|error| {
            problem(&event("dataset", &source.dataset.to_string(), &error));
            data_failure(error)
        })?;
        found.push((source, prepared.shape));
    }
    job.samples = shape(job, &found)?;
    let schema = lifl_learn::schema(&*job).because(Cause::Config)?;
    if let Some(path) = &job.base_model {
        match base_model::check(path, &schema) {
            Ok(()) => {}
            Err(BaseModelError::Tensors { .. }) if unknown => {
                notes.push(
                    "baseModel is compared with the job's model when the data set has been downloaded"
                        .to_owned(),
                );
            }
            Err(error) => {
                problem(&error.event());
                return Err(Failure::new(Cause::Config, error));
            }
        }
    }
    Ok(notes)
}

/// A fault of an input as an event for programs, like those about a job's files.
pub(crate) fn event(path: &str, file: &str, error: &(dyn std::error::Error + 'static)) -> Value {
    let cause = error
        .source()
        .map_or(String::new(), |source| format!(": {source}"));
    json!({
        "event": "problem",
        "problem": {
            "kind": "invalid",
            "file": file,
            "path": path,
            "found": format!("{error}{cause}"),
            "expected": null,
            "hint": null,
        },
    })
}
