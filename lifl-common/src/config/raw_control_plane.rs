//! The files that Flame's control plane is given for a job, as they are written, beside what they have in common with
//! [job files](super::raw).

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::raw::{BaseModel, Broker, Channel, Hyperparameters, Lifl, Registry, Role, Sorted};

/// `schema.json`: the roles and how they are connected.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DesignSchema {
    /// For people.
    #[expect(dead_code, reason = "for people")]
    name: Option<String>,
    /// For people.
    #[expect(dead_code, reason = "for people")]
    description: Option<String>,
    /// Not used.
    pub(super) revision: Option<Value>,
    /// The roles, and how many workers play them.
    #[schemars(required)]
    pub(super) roles: Option<Vec<Role>>,
    /// How the roles are connected.
    #[schemars(required)]
    pub(super) channels: Option<Vec<Channel>>,
    /// Not supported.
    pub(super) connectors: Option<Value>,
}

/// `job.json`: the job's names and limits, and where the rest stands.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DesignJob {
    /// Its id; the design's when not given.
    pub(super) id: Option<String>,
    /// Its name for people.
    pub(super) name: Option<String>,
    /// The design's id.
    pub(super) design_id: Option<String>,
    /// Not used.
    pub(super) user_id: Option<Value>,
    /// Not used.
    pub(super) schema_revision: Option<Value>,
    /// Not used.
    pub(super) code_revision: Option<Value>,
    /// Not used.
    pub(super) priority: Option<Value>,
    /// Transport of the channels that name none; `shm` when not given.
    pub(super) backend: Option<String>,
    /// Where the transports `p2p` and `mqtt` are reached.
    pub(super) brokers: Option<Vec<Broker>>,
    /// Seconds after which the job is ended; 300 when not given.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub(super) max_run_time: Option<u64>,
    /// The file that says who has which dataset, relative to this one.
    pub(super) data_spec_path: Option<String>,
    /// The file that says what is trained, relative to this one.
    pub(super) model_spec_path: Option<String>,
    /// What stands in a `dataSpec.json`, here.
    pub(super) data_spec: Option<Vec<RoleData>>,
    /// What stands in a `modelSpec.json`, here.
    pub(super) model_spec: Option<DesignModel>,
    /// What Flame has no field for, and ignores.
    pub(super) lifl: Option<Lifl>,
}

/// `modelSpec.json`: what is trained, and how.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct DesignModel {
    /// The model to start from.
    pub(super) base_model: Option<BaseModel>,
    /// What trainers do, and for how long.
    pub(super) hyperparameters: Option<Hyperparameters>,
    /// How the top makes the new model of what has come.
    pub(super) optimizer: Option<Sorted>,
    /// Who takes part in a round.
    pub(super) selector: Option<Sorted>,
    /// Which of its samples a trainer uses: `default`, which is all.
    pub(super) datasampler: Option<Sorted>,
    /// What is done to updates for privacy: `default`, which is nothing.
    pub(super) privacy: Option<Sorted>,
    /// Where models are kept: `dummy`, which is the run's folder.
    pub(super) registry: Option<Registry>,
    /// Python packages; not used.
    pub(super) dependencies: Option<Vec<String>>,
}

/// An entry of `dataSpec.json`: the datasets of a role, one worker each.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RoleData {
    /// The role.
    pub(super) role: String,
    /// By group, the ids of its datasets.
    pub(super) dataset_groups: BTreeMap<String, Vec<String>>,
}

/// `dataset….json`: one dataset.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Dataset {
    /// Its id in `dataSpec.json`. Flame's own files have none, since its database gives them.
    pub(super) id: Option<String>,
    /// An http(s) URL, a file or folder (relative to the current directory), or `builtin:digits`.
    pub(super) url: String,
    /// Where it is, `default/eu/uk`; its parts may name a group of `dataSpec.json`.
    pub(super) realm: Option<String>,
    /// For people.
    #[expect(dead_code, reason = "for people")]
    name: Option<String>,
    /// For people.
    #[expect(dead_code, reason = "for people")]
    description: Option<String>,
    /// Not used.
    pub(super) user_id: Option<Value>,
    /// Not used.
    pub(super) data_format: Option<Value>,
    /// Not used.
    pub(super) compute_id: Option<Value>,
    /// Not used.
    pub(super) is_public: Option<Value>,
}
