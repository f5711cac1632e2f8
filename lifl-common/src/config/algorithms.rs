//! Fields of `{sort, kwargs}`: which sorts there are, and what their arguments may be.

use serde_json::{Map, Value};

use super::document::Document;
use super::flame_support::Choice;
use super::json;
use super::problem::{Findings, Place, ProblemKind, shorten};
use super::raw::Sorted;
use super::spec::{Adaptive, Optimizer};

const OPTIMIZER: Choice = Choice {
    what: "optimizer",
    supported: &["fedavg", "fedadagrad", "fedadam", "fedyogi", "fedprox"],
    flames: &["fedbuff", "feddyn", "scaffold", "fedgft"],
};
const SELECTOR: Choice = Choice {
    what: "selector",
    supported: &["default", "random"],
    flames: &["oort", "fedbuff"],
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

struct Argument {
    name: &'static str,
    /// What it may be.
    range: Range,
    /// Whether Flame has no default for it.
    required: bool,
}

/// What a number may be.
#[derive(Clone, Copy)]
enum Range {
    /// From 0 to below 1.
    Fraction,
    /// Above 0.
    Positive,
    /// Not below 0.
    NotNegative,
    /// A whole number of at least 1.
    Count,
}

impl Range {
    fn holds(self, value: &Value) -> bool {
        let number = value.as_f64().filter(|number| number.is_finite());
        match self {
            Self::Fraction => number.is_some_and(|number| (0.0..1.0).contains(&number)),
            Self::Positive => number.is_some_and(|number| number > 0.0),
            Self::NotNegative => number.is_some_and(|number| number >= 0.0),
            Self::Count => count(value).is_some_and(|count| count > 0),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Fraction => "a number from 0 to below 1",
            Self::Positive => "a number above 0",
            Self::NotNegative => "a number not below 0",
            Self::Count => "a whole number from 1 to 4294967295",
        }
    }
}

const fn optional(name: &'static str, range: Range) -> Argument {
    Argument {
        name,
        range,
        required: false,
    }
}

const fn required(name: &'static str, range: Range) -> Argument {
    Argument {
        name,
        range,
        required: true,
    }
}

/// The arguments of a supported sort.
fn arguments(sort: &str) -> &'static [Argument] {
    match sort {
        "fedadagrad" | "fedadam" | "fedyogi" => {
            const {
                &[
                    optional("beta_1", Range::Fraction),
                    optional("beta_2", Range::Fraction),
                    optional("eta", Range::Positive),
                    optional("tau", Range::Positive),
                ]
            }
        }
        "fedprox" => const { &[required("mu", Range::NotNegative)] },
        "random" => const { &[required("k", Range::Count)] },
        _ => &[],
    }
}

/// Refuses sorts that are not supported, and arguments that they do not take.
pub(super) fn check(document: &Document, findings: &mut Findings) {
    let raw = &document.raw;
    let sorted = [
        (&OPTIMIZER, raw.optimizer.as_ref()),
        (&SELECTOR, raw.selector.as_ref()),
        (&DATASAMPLER, raw.datasampler.as_ref()),
        (&PRIVACY, raw.privacy.as_ref()),
    ];
    for (choice, sorted) in sorted {
        if let Some(sorted) = sorted {
            check_sorted(choice, sorted, &document.at(choice.what), findings);
        }
    }
}

fn check_sorted(choice: &Choice, sorted: &Sorted, place: &Place, findings: &mut Findings) {
    let sort = name(sorted).unwrap_or(choice.supported[0]);
    // What was wrong with it has been said, or that it is not supported is: its arguments are not news.
    if findings.any_at(&place.key("sort")) {
        return;
    }
    let before = findings.count();
    choice.check("", sort, &place.key("sort"), findings);
    if findings.count() > before {
        return;
    }
    let known = arguments(sort);
    let at = place.key("kwargs");
    for (key, value) in sorted.kwargs.iter().flatten() {
        match known.iter().find(|argument| argument.name == key) {
            Some(argument) if argument.range.holds(value) => {}
            Some(argument) => {
                findings
                    .add(ProblemKind::Invalid, &at.key(key), shorten(&value.to_string()))
                    .expected(argument.range.words());
            }
            None => {
                let found = format!(
                    "argument {}, of value {}, of {} {sort} is not supported",
                    shorten(key),
                    shorten(&value.to_string()),
                    choice.what
                );
                let problem = findings.add(ProblemKind::Unsupported, &at.key(key), found);
                if known.is_empty() {
                    problem.expected("no arguments");
                } else {
                    problem.one_of(key, known.iter().map(|argument| argument.name));
                }
            }
        }
    }
    for argument in known.iter().filter(|argument| argument.required) {
        let given = sorted
            .kwargs
            .as_ref()
            .and_then(|kwargs| kwargs.get(argument.name));
        if given.is_none() && !findings.any_at(&at.key(argument.name)) {
            findings
                .add(
                    ProblemKind::Missing,
                    &at.key(argument.name),
                    format!("missing: {} {sort} has no default for it", choice.what),
                )
                .expected(argument.range.words());
        }
    }
}

/// Its name; `None` for the default.
fn name(sorted: &Sorted) -> Option<&str> {
    sorted.sort.as_deref().filter(|name| !name.is_empty())
}

fn number(kwargs: Option<&Map<String, Value>>, name: &str) -> Option<f64> {
    kwargs?.get(name)?.as_f64()
}

/// The top's optimizer of a field that was checked.
pub(super) fn optimizer(sorted: Option<&Sorted>) -> Optimizer {
    let kwargs = sorted.and_then(|sorted| sorted.kwargs.as_ref());
    let default = Adaptive::default();
    let rates = Adaptive {
        beta_1: number(kwargs, "beta_1").unwrap_or(default.beta_1),
        beta_2: number(kwargs, "beta_2").unwrap_or(default.beta_2),
        eta: number(kwargs, "eta").unwrap_or(default.eta),
        tau: number(kwargs, "tau").unwrap_or(default.tau),
    };
    match sorted.and_then(name) {
        Some("fedadagrad") => Optimizer::FedAdagrad(rates),
        Some("fedadam") => Optimizer::FedAdam(rates),
        Some("fedyogi") => Optimizer::FedYogi(rates),
        _ => Optimizer::FedAvg,
    }
}

/// The trainers' FedProx of a field that was checked; 0 for another optimizer.
pub(super) fn proximal_mu(sorted: Option<&Sorted>) -> f64 {
    let fedprox = sorted.filter(|sorted| name(sorted) == Some("fedprox"));
    number(fedprox.and_then(|sorted| sorted.kwargs.as_ref()), "mu").unwrap_or(0.0)
}

/// How many children an aggregator selects, by a field that was checked; `None` for all.
pub(super) fn select(sorted: Option<&Sorted>) -> Option<u32> {
    let random = sorted.filter(|sorted| name(sorted) == Some("random"))?;
    count(random.kwargs.as_ref()?.get("k")?)
}

fn count(value: &Value) -> Option<u32> {
    u32::try_from(json::whole(value)?.as_u64()?).ok()
}
