//! What Flame has and this has not: refused by name, or, where it means nothing here, noted once.

use super::algorithms;
use super::document::Document;
use super::problem::{Findings, Place, ProblemKind, list, shorten};
use super::raw::FlameFile;
use super::spec::Transport;

/// What a field may name.
pub(super) struct Choice {
    /// What is chosen, for a message.
    pub(super) what: &'static str,
    /// What works here.
    pub(super) supported: &'static [&'static str],
    /// What else Flame knows.
    pub(super) flames: &'static [&'static str],
}

const BACKEND: Choice = Choice {
    what: "backend",
    supported: &["shm", "local", "p2p", "mqtt"],
    flames: &[],
};
const REGISTRY: Choice = Choice {
    what: "registry",
    supported: &["dummy"],
    flames: &["local", "mlflow"],
};

impl Choice {
    /// Refuses what is not supported; `of` says whose it is, for a message.
    pub(super) fn check(&self, of: &str, name: &str, place: &Place, findings: &mut Findings) {
        let what = self.what;
        if self.supported.contains(&name) {
        } else if self.flames.contains(&name) {
            findings
                .add(
                    ProblemKind::Unsupported,
                    place,
                    format!("{of}{what} {name} is not supported yet"),
                )
                .expected(list(self.supported));
        } else {
            findings
                .add(
                    ProblemKind::Unknown,
                    place,
                    format!("{of}unknown {what} {:?}", shorten(name)),
                )
                .one_of(name, self.supported.iter().copied());
        }
    }
}

/// The transport of that name.
pub(super) fn transport(name: &str) -> Option<Transport> {
    match name {
        "shm" | "local" => Some(Transport::Shm),
        "p2p" => Some(Transport::P2p),
        "mqtt" => Some(Transport::Mqtt),
        _ => None,
    }
}

/// Refuses what of a file is not supported, and notes what means nothing here.
pub(super) fn check(document: &Document, findings: &mut Findings) {
    let raw = &document.raw;
    algorithms::check(document, findings);
    if let Some(sort) = raw
        .registry
        .as_ref()
        .and_then(|registry| registry.sort.as_deref())
        && !sort.is_empty()
    {
        REGISTRY.check("", sort, &document.at("registry").key("sort"), findings);
    }
    if let Some(hyperparameters) = &raw.hyperparameters {
        let place = document.at("hyperparameters");
        if let Some(concurrency) = &hyperparameters.concurrency {
            let found = format!(
                "concurrency {} is not supported yet",
                shorten(&concurrency.to_string())
            );
            findings
                .add(ProblemKind::Unsupported, &place.key("concurrency"), found)
                .expected("synchronous rounds");
        }
    }
    // Used or not, a name that nobody knows is a slip.
    if let Some(name) = raw.backend.as_deref().filter(|name| !name.is_empty()) {
        BACKEND.check("", name, &document.at("backend"), findings);
    }
    for (i, channel) in raw.channels.iter().flatten().enumerate() {
        if let Some(name) = channel.backend.as_deref().filter(|name| !name.is_empty()) {
            let place = document.at("channels").index(i).key("backend");
            BACKEND.check(
                &format!("channel {}: ", shorten(&channel.name)),
                name,
                &place,
                findings,
            );
        }
    }
    for (i, broker) in raw.brokers.iter().flatten().enumerate() {
        if let Some(name) = &broker.sort {
            let place = document.at("brokers").index(i).key("sort");
            BACKEND.check("broker of ", name, &place, findings);
        }
    }
    note(raw, findings);
}

fn note(raw: &FlameFile, findings: &mut Findings) {
    if raw
        .dependencies
        .as_ref()
        .is_some_and(|packages| !packages.is_empty())
    {
        findings.note("dependencies is not used: workers need no Python packages");
    }
    if raw.task.is_some() {
        findings.note("task is not used: a worker is named by its role and taskid");
    }
    if raw.realm.as_ref().is_some_and(|realm| !realm.is_empty()) {
        findings.note("realm is not used: all workers run on this node");
    }
    let channels = || raw.channels.iter().flatten();
    if channels().any(|channel| channel.is_bidirectional.is_some()) {
        findings.note("isBidirectional is not used: every channel goes both ways");
    }
    if channels().any(|channel| channel.is_unidirectional.is_some()) {
        findings.note("isUnidirectional is not used: every channel goes both ways");
    }
    if raw
        .registry
        .as_ref()
        .and_then(|registry| registry.uri.as_ref())
        .is_some_and(|uri| !uri.is_empty())
    {
        findings.note("registry.uri is not used: models are kept in the run's folder");
    }
    if let Some(model) = &raw.base_model
        && model.version.is_some()
        && model.name.as_ref().is_some_and(|name| !name.is_empty())
    {
        findings.note("baseModel.version is not used: baseModel.name is a file");
    }
}
