//! What is trained and judged on, among what the files say of datasets.

use std::collections::BTreeSet;

use super::document::Document;
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::settings::{Extra, Sources};
use super::spec::{DataSource, ModelSpec, Partition};
use super::{DIGITS, Overrides};

/// The job's data, as far as the files are right about it; `trainers` is how many there are.
pub(super) fn understand(
    sources: &Sources<'_>,
    overrides: &Overrides,
    model: &ModelSpec,
    trainers: usize,
    findings: &mut Findings,
) -> Option<DataSource> {
    let lifl = Extra {
        documents: &sources.all,
    };
    let sha256 = lifl.agreed("sha256", |lifl| lifl.sha256.as_ref(), findings);
    let train_samples = lifl.agreed("trainSamples", |lifl| lifl.train_samples.as_ref(), findings);
    let test_samples = lifl.agreed("testSamples", |lifl| lifl.test_samples.as_ref(), findings);
    let partition = lifl.agreed("partition", |lifl| lifl.partition.as_ref(), findings);
    if let Some((hash, place)) = &sha256
        && (hash.len() != 64 || !hash.bytes().all(|digit| digit.is_ascii_hexdigit()))
    {
        findings
            .add(ProblemKind::Invalid, place, format!("{:?}", shorten(hash)))
            .expected("64 hex digits");
    }

    let of_trainers: Vec<(&String, Place)> = sources
        .trainers
        .iter()
        .flat_map(|document| datasets(document))
        .collect();
    let several = overrides.data.is_none()
        && of_trainers
            .iter()
            .any(|(dataset, _)| *dataset != of_trainers[0].0);
    let in_files = if several {
        // The top judges, in Flame too.
        datasets(sources.top)
            .into_iter()
            .next()
            .or_else(|| of_trainers.first().cloned())
    } else {
        of_trainers.first().cloned()
    };
    note_datasets(
        sources,
        &of_trainers,
        in_files.as_ref().filter(|_| several),
        findings,
    );
    let dataset = match &overrides.data {
        Some(dataset) => Some((dataset, Place::overriding("data"))),
        None => in_files.clone(),
    };
    if matches!(model, ModelSpec::Synthetic { .. }) {
        let options = [
            sha256.is_some(),
            train_samples.is_some(),
            test_samples.is_some(),
            partition.is_some(),
        ];
        if dataset.is_some() || options.contains(&true) {
            findings
                .note("the dataset and what is said about it are not used: a synthetic model needs no data");
        }
        return None;
    }
    let Some((dataset, place)) = dataset else {
        let place = sources.trainers.first()?.at("dataset");
        // Where a file says who has which dataset, its trainers are looked for there.
        let assigned = sources.all.iter().any(|document| document.assigned.is_some());
        let model_unsure = sources
            .all
            .iter()
            .any(|document| findings.any_at(&document.at("lifl").key("model")));
        if !model_unsure && !assigned && !findings.any_at(&place) {
            let found = "missing: every model but a synthetic one needs data";
            let expected = format!("an http(s) URL, a file or folder, or {DIGITS}");
            findings
                .add(ProblemKind::Missing, &place, found)
                .expected(expected);
        }
        return None;
    };
    check_dataset(dataset, &place, findings);
    let mut checked = BTreeSet::from([dataset]);
    for (other, place) in of_trainers.iter().filter(|_| several) {
        if checked.insert(other) {
            check_dataset(other, place, findings);
        }
    }
    if let Some((_, place)) = &sha256
        && several
    {
        let found = format!("one hash for {} datasets", checked.len());
        findings
            .add(ProblemKind::Conflict, place, found)
            .expected("no sha256, or one dataset");
    }
    let replaced = in_files.as_ref().is_none_or(|(in_files, _)| *in_files != dataset);
    if sha256.is_some() && replaced {
        findings.note("lifl.sha256 is not used: it is not of the dataset given on the command line");
    } else if let Some((_, place)) = &sha256
        && !several
        && dataset == DIGITS
    {
        let found = format!("a hash, and {DIGITS}, which is no file");
        findings
            .add(ProblemKind::Conflict, place, found)
            .expected("no sha256, or another dataset");
    }
    let sharing =
        |(dataset, _): &(&String, Place)| of_trainers.iter().filter(|(other, _)| other == dataset).count();
    let sharing = if several {
        of_trainers.iter().map(sharing).max().unwrap_or(0)
    } else {
        trainers
    };
    if let Some((samples, place)) = &train_samples
        && **samples < sharing as u64
    {
        let found = format!("{samples} samples for {sharing} trainers");
        findings
            .add(ProblemKind::Invalid, place, found)
            .expected("at least one sample each");
    }
    Some(DataSource {
        dataset: dataset.as_str().into(),
        sha256: sha256
            .filter(|_| !replaced)
            .map(|(hash, _)| hash.to_ascii_lowercase()),
        train_samples: train_samples.map(|(&samples, _)| samples),
        test_samples: test_samples.map(|(&samples, _)| samples),
        partition: partition.map_or(Partition::Iid, |(&partition, _)| partition.into()),
    })
}

/// The datasets that a file names: its own, or those of workers that it stands for.
fn datasets(document: &Document) -> Vec<(&String, Place)> {
    let own = document
        .raw
        .dataset
        .as_ref()
        .filter(|dataset| !dataset.is_empty());
    let own = own.map(|dataset| (dataset, document.at("dataset")));
    let assigned = document.assigned.iter().flatten();
    own.into_iter()
        .chain(assigned.map(|assigned| (&assigned.url, assigned.url_place.clone())))
        .collect()
}

/// Notes datasets that nobody uses, and whose test samples models are judged on where that is not plain.
fn note_datasets(
    sources: &Sources<'_>,
    of_trainers: &[(&String, Place)],
    judged_on: Option<&(&String, Place)>,
    findings: &mut Findings,
) {
    if let Some((dataset, _)) = judged_on {
        findings.note(format!(
            "trainers have datasets of their own; models are judged on the test samples of {}",
            shorten(dataset)
        ));
    }
    let used = |dataset: &String| {
        of_trainers.iter().any(|(other, _)| *other == dataset)
            || judged_on.is_some_and(|(other, _)| *other == dataset)
    };
    let mut all = sources.all.iter().flat_map(|document| datasets(document));
    if all.any(|(dataset, _)| !used(dataset)) {
        findings.note("dataset is what the trainers' files say; what other files say is not used");
    }
}

fn check_dataset(dataset: &str, place: &Place, findings: &mut Findings) {
    let found = |what: &str| format!("{what} {:?}", shorten(dataset));
    if dataset.starts_with("builtin:") {
        if dataset != DIGITS {
            findings
                .add(ProblemKind::Unknown, place, found("unknown dataset"))
                .one_of(dataset, [DIGITS]);
        }
    } else if let Some((scheme, _)) = dataset.split_once("://") {
        if !matches!(scheme, "http" | "https") {
            findings
                .add(ProblemKind::Unsupported, place, found("dataset at"))
                .expected(format!("an http(s) URL, a file or folder, or {DIGITS}"));
        }
    } else if dataset.is_empty() || dataset.contains('\0') {
        findings
            .add(ProblemKind::Invalid, place, found("dataset"))
            .expected(format!("an http(s) URL, a file or folder, or {DIGITS}"));
    }
}
