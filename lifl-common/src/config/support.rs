//! What Flame has and this has not: refused by name, or, where it means nothing here, noted once.

use super::document::Document;
use super::problem::{Findings, Place, ProblemKind, list, shorten};
use super::raw::{FlameFile, Sorted};
use super::spec::Transport;

/// What a field may name.
struct Choice {
    /// What is chosen, for a message.
    what: &'static str,
    /// What works here.
    supported: &'static [&'static str],
    /// What else Flame knows.
    flames: &'static [&'static str],
}

const BACKEND: Choice = Choice {
    what: "backend",
    supported: &["shm", "local", "p2p", "mqtt"],
    flames: &[],
};
const OPTIMIZER: Choice = Choice {
    what: "optimizer",
    supported: &["fedavg"],
    flames: &[
        "fedadagrad",
        "fedadam",
        "fedyogi",
        "fedbuff",
        "fedprox",
        "feddyn",
        "scaffold",
        "fedgft",
    ],
};
const SELECTOR: Choice = Choice {
    what: "selector",
    supported: &["default"],
    flames: &["random", "oort", "fedbuff"],
};
const DATASAMPLER: Choice = Choice {
    what: "datasampler",
    supported: &["default"],
    flames: &["fedbalancer"],
};
const PRIVACY: Choice = Choice {
    what: "privacy",
    supported: &["default"],
    flames: &["dp"],
};
const REGISTRY: Choice = Choice {
    what: "registry",
    supported: &["dummy"],
    flames: &["local", "mlflow"],
};

impl Choice {
    /// Refuses what is not supported; `of` says whose it is, for a message.
    fn check(&self, of: &str, name: &str, place: &Place, findings: &mut Findings) {
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

    /// Refuses a sort that is not supported, and arguments, which no supported sort takes.
    fn check_sorted(&self, sorted: Option<&Sorted>, place: &Place, findings: &mut Findings) {
        let Some(sorted) = sorted else { return };
        let before = findings.count();
        if let Some(name) = sorted.sort.as_deref().filter(|name| !name.is_empty()) {
            self.check("", name, &place.key("sort"), findings);
        }
        // Of an unsupported sort, its arguments are not news.
        if findings.count() == before {
            for key in sorted.kwargs.iter().flat_map(|kwargs| kwargs.keys()) {
                let sort = sorted
                    .sort
                    .as_deref()
                    .filter(|name| !name.is_empty())
                    .unwrap_or(self.supported[0]);
                let found = format!(
                    "argument {} of {} {sort} is not supported",
                    shorten(key),
                    self.what
                );
                findings
                    .add(ProblemKind::Unsupported, &place.key("kwargs").key(key), found)
                    .expected("no arguments");
            }
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
    let sorted = [
        (&OPTIMIZER, raw.optimizer.as_ref()),
        (&SELECTOR, raw.selector.as_ref()),
        (&DATASAMPLER, raw.datasampler.as_ref()),
        (&PRIVACY, raw.privacy.as_ref()),
    ];
    for (choice, sorted) in sorted {
        choice.check_sorted(sorted, &document.at(choice.what), findings);
    }
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
        let given = [
            ("aggGoal", &hyperparameters.agg_goal, "all updates of a round"),
            ("concurrency", &hyperparameters.concurrency, "synchronous rounds"),
        ];
        for (name, _, instead) in given.into_iter().filter(|(_, value, _)| value.is_some()) {
            findings
                .add(
                    ProblemKind::Unsupported,
                    &place.key(name),
                    format!("{name} is not supported yet"),
                )
                .expected(instead);
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
