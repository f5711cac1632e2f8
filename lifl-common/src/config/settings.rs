//! Everything of a job but its tree.
//!
//! In a job file each thing stands once. Among worker files some fields count from one file only and others must
//! agree:
//!
//! | fields | whose |
//! | --- | --- |
//! | `rounds`, `maxRunTime` | the coordinator's, else the top's |
//! | other `hyperparameters` | the trainers', which must agree |
//! | `dataset` | each trainer's own; models are judged on the top's, unless the trainers agree on one |
//! | `optimizer` | the top's, but `fedprox` the trainers' |
//! | `aggGoal`, `selector` | each aggregator's own |
//! | `baseModel.name`, `lifl` | of any file; files that have it must agree |
//!
//! Where a file whose word does not count says something else, that is noted.

use std::path::PathBuf;

use super::algorithms;
use super::document::Document;
use super::problem::{Findings, Place, ProblemKind};
use super::raw::{self, FlameFile, Hyperparameters, Lifl, Model, ModelName, ModelSize};
use super::spec::{DataSource, ModelSpec, Optimizer, Partition, Timing, TrainingSpec, UpdateKind};
use super::{Overrides, data};
use crate::update::DType;

/// A job without its names and its tree.
pub(super) struct Settings {
    pub(super) rounds: u32,
    pub(super) seed: u64,
    pub(super) timing: Timing,
    pub(super) updates: UpdateKind,
    pub(super) model: ModelSpec,
    pub(super) base_model: Option<PathBuf>,
    pub(super) training: TrainingSpec,
    pub(super) optimizer: Optimizer,
    pub(super) data: Option<DataSource>,
    pub(super) quorum: u32,
    pub(super) round_timeout_s: Option<f64>,
    pub(super) grace_time_s: f64,
    pub(super) spin_us: u32,
    pub(super) max_run_time_s: u64,
}

/// Which files count for what.
pub(super) struct Sources<'d> {
    /// Every file.
    pub(super) all: Vec<&'d Document>,
    /// The coordinator's, else the top's.
    pub(super) lead: &'d Document,
    /// The top's.
    pub(super) top: &'d Document,
    /// The trainers'.
    pub(super) trainers: Vec<&'d Document>,
}

impl Settings {
    /// The settings, as far as the files are right about them; `trainers` is how many there are.
    pub(super) fn new(
        sources: &Sources<'_>,
        overrides: &Overrides,
        trainers: usize,
        findings: &mut Findings,
    ) -> Self {
        let lifl = Extra {
            documents: &sources.all,
        };
        let model = lifl.agreed("model", |lifl| lifl.model.as_ref(), findings);
        let timing = lifl.agreed("timing", |lifl| lifl.timing.as_ref(), findings);
        let updates = lifl.agreed("updates", |lifl| lifl.updates.as_ref(), findings);
        let seed = lifl.agreed("seed", |lifl| lifl.seed.as_ref(), findings);
        let quorum = quorum(&lifl, trainers, findings);
        let round_timeout = lifl.agreed("roundTimeout", |lifl| lifl.round_timeout.as_ref(), findings);
        let grace_time = lifl.agreed("graceTime", |lifl| lifl.grace_time.as_ref(), findings);
        let spin = lifl.agreed("spinMicros", |lifl| lifl.spin_micros.as_ref(), findings);
        let model = match model.map(|(model, _)| model) {
            None | Some(Model::Named(ModelName::Cnn)) => ModelSpec::Cnn,
            Some(Model::Named(ModelName::Softmax)) => ModelSpec::Softmax,
            Some(Model::Named(ModelName::Mlp)) => ModelSpec::Mlp { hidden: 200 },
            Some(Model::Sized(ModelSize::Mlp(size))) => ModelSpec::Mlp { hidden: size.hidden },
            Some(Model::Sized(ModelSize::Synthetic(size))) => ModelSpec::Synthetic {
                parameters: size.parameters,
                dtype: size.dtype.map_or(DType::F32, DType::from),
            },
        };
        let base_models = sources.all.iter().filter_map(|document| {
            let name = document
                .raw
                .base_model
                .as_ref()?
                .name
                .as_ref()
                .filter(|name| !name.is_empty())?;
            Some((name, document.at("baseModel").key("name")))
        });
        Self {
            rounds: rounds(sources, overrides, findings),
            seed: overrides.seed.or(seed.map(|(&seed, _)| seed)).unwrap_or(1),
            timing: overrides
                .timing
                .unwrap_or_else(|| timing.map_or(Timing::Lazy, |(&timing, _)| timing.into())),
            updates: updates.map_or(UpdateKind::Weights, |(&updates, _)| updates.into()),
            base_model: agree(base_models, findings).map(|(name, _)| PathBuf::from(name)),
            training: training(sources, findings),
            optimizer: optimizer(sources, findings),
            data: data::understand(sources, overrides, &model, trainers, findings),
            model,
            quorum,
            round_timeout_s: round_timeout.map(|(&seconds, _)| seconds),
            grace_time_s: grace_time.map_or(30.0, |(&seconds, _)| seconds),
            spin_us: spin.map_or(0, |(&micros, _)| micros),
            max_run_time_s: leads(sources, "maxRunTime", |raw| raw.max_run_time, findings).unwrap_or(300),
        }
    }
}

/// How many trainers a round's model needs; no more than there are.
fn quorum(lifl: &Extra<'_>, trainers: usize, findings: &mut Findings) -> u32 {
    let Some((&quorum, place)) = lifl.agreed("quorum", |lifl| lifl.quorum.as_ref(), findings) else {
        return 1;
    };
    if trainers > 0 && quorum as usize > trainers {
        findings
            .add(ProblemKind::Invalid, &place, quorum.to_string())
            .expected(format!("at most {trainers}, the job's trainers"));
    }
    quorum
}

fn rounds(sources: &Sources<'_>, overrides: &Overrides, findings: &mut Findings) -> u32 {
    if let Some(rounds) = overrides.rounds {
        if rounds == 0 {
            let place = Place::overriding("rounds");
            findings
                .add(ProblemKind::Invalid, &place, "0")
                .expected("at least 1");
        }
        return rounds;
    }
    let given = |raw: &FlameFile| raw.hyperparameters.as_ref().and_then(|given| given.rounds);
    leads(sources, "rounds", given, findings).unwrap_or(1)
}

/// What the leading file says. If others say something else, that is noted.
fn leads<T: PartialEq>(
    sources: &Sources<'_>,
    name: &str,
    get: fn(&FlameFile) -> Option<T>,
    findings: &mut Findings,
) -> Option<T> {
    let value = get(&sources.lead.raw);
    let mut others = sources.all.iter().filter_map(|document| get(&document.raw));
    if others.any(|other| value.as_ref() != Some(&other)) {
        findings.note(format!(
            "{name} is what {} says; what other files say is not used",
            sources.lead.place.file_name()
        ));
    }
    value
}

/// What the trainers' files say, which must agree. If others say something else, that is noted.
fn trainers_agree<'d, T: PartialEq>(
    sources: &Sources<'d>,
    name: &str,
    get: impl Fn(&'d Document) -> Option<(T, Place)>,
    findings: &mut Findings,
) -> Option<(T, Place)> {
    let agreed = agree(
        sources.trainers.iter().filter_map(|document| get(document)),
        findings,
    );
    let value = agreed.as_ref().map(|(value, _)| value);
    let mut others = sources.all.iter().filter_map(|document| get(document));
    if others.any(|(other, _)| value != Some(&other)) {
        findings.note(format!(
            "{name} is what the trainers' files say; what other files say is not used"
        ));
    }
    agreed
}

fn training(sources: &Sources<'_>, findings: &mut Findings) -> TrainingSpec {
    let mut field = |name: &str, get: fn(&Hyperparameters) -> Option<f64>| {
        let given = |document: &Document| {
            let value = get(document.raw.hyperparameters.as_ref()?)?;
            Some((value, document.at("hyperparameters").key(name)))
        };
        trainers_agree(sources, name, given, findings).map(|(value, _)| value)
    };
    // An f64 holds every u32.
    let epochs = field("epochs", |given| given.epochs.map(f64::from));
    let batch_size = field("batchSize", |given| given.batch_size.map(f64::from));
    let learning_rate = field("learningRate", |given| given.learning_rate);
    let weight_decay = field("weightDecay", |given| given.weight_decay);
    TrainingSpec {
        epochs: epochs.map_or(1, |epochs| epochs as u32),
        batch_size: batch_size.map_or(16, |size| size as u32),
        learning_rate: learning_rate.unwrap_or(0.01),
        weight_decay: weight_decay.unwrap_or(0.0),
        proximal_mu: proximal_mu(sources, findings),
    }
}

/// The top's optimizer. FedProx is no optimizer of the top's.
fn optimizer(sources: &Sources<'_>, findings: &mut Findings) -> Optimizer {
    let of = |document: &Document| algorithms::optimizer(document.raw.optimizer.as_ref());
    let optimizer = of(sources.top);
    let mut others = sources.all.iter();
    if others.any(|document| document.raw.optimizer.is_some() && of(document) != optimizer) {
        findings.note(format!(
            "how the top makes the model is what optimizer in {} says; what other files say of it is not used",
            sources.top.place.file_name()
        ));
    }
    optimizer
}

/// FedProx's μ is the trainers'.
fn proximal_mu(sources: &Sources<'_>, findings: &mut Findings) -> f64 {
    let given = |document: &Document| {
        let optimizer = document.raw.optimizer.as_ref()?;
        Some((algorithms::proximal_mu(Some(optimizer)), document.at("optimizer")))
    };
    let of_trainers = sources.trainers.iter().filter_map(|document| given(document));
    let mu = agree(of_trainers, findings).map_or(0.0, |(mu, _)| mu);
    let mut others = sources.all.iter().filter_map(|document| given(document));
    if others.any(|(other, _)| other > 0.0 && other != mu) {
        findings.note("fedprox is what the trainers' files say; what other files say of it is not used");
    }
    mu
}

/// The `lifl` sections of the files.
pub(super) struct Extra<'d> {
    pub(super) documents: &'d [&'d Document],
}

impl<'d> Extra<'d> {
    /// A field on which all sections that have it must agree.
    pub(super) fn agreed<T: PartialEq>(
        &self,
        name: &str,
        get: fn(&'d Lifl) -> Option<&'d T>,
        findings: &mut Findings,
    ) -> Option<(&'d T, Place)> {
        let given = self.documents.iter().filter_map(|document| {
            let value = get(document.raw.lifl.as_ref()?)?;
            Some((value, document.at("lifl").key(name)))
        });
        agree(given, findings)
    }
}

/// The first of the values; each that differs from it is reported.
fn agree<T: PartialEq>(
    given: impl Iterator<Item = (T, Place)>,
    findings: &mut Findings,
) -> Option<(T, Place)> {
    let mut first: Option<(T, Place)> = None;
    for (value, place) in given {
        match &first {
            None => first = Some((value, place)),
            Some((known, at)) if *known != value => {
                let found = format!("not what {} says", at.file_name());
                findings
                    .add(ProblemKind::Conflict, &place, found)
                    .expected("the same in all these files");
            }
            Some(_) => {}
        }
    }
    first
}

impl From<raw::Timing> for Timing {
    fn from(timing: raw::Timing) -> Self {
        match timing {
            raw::Timing::Eager => Self::Eager,
            raw::Timing::Lazy => Self::Lazy,
        }
    }
}

impl From<raw::Updates> for UpdateKind {
    fn from(updates: raw::Updates) -> Self {
        match updates {
            raw::Updates::Weights => Self::Weights,
            raw::Updates::Deltas => Self::Deltas,
        }
    }
}

impl From<raw::Partition> for Partition {
    fn from(partition: raw::Partition) -> Self {
        match partition {
            raw::Partition::Iid {} => Self::Iid,
            raw::Partition::Shards { per_trainer } => Self::Shards { per_trainer },
            raw::Partition::Dirichlet { alpha } => Self::Dirichlet { alpha },
        }
    }
}

impl From<raw::Float> for DType {
    fn from(float: raw::Float) -> Self {
        match float {
            raw::Float::F64 => Self::F64,
            raw::Float::F32 => Self::F32,
            raw::Float::F16 => Self::F16,
            raw::Float::BF16 => Self::BF16,
        }
    }
}
