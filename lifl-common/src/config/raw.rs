//! Flame's files as they are written: field for field, before anything is understood.
//!
//! These types are also the JSON Schema that `lifl schema` prints and that [`validate`](super::validate) checks a file
//! against, so a range stands here, once. What only Flame knows is a plain string here and judged in
//! [`flame_support`](super::flame_support). Top-level fields are all optional to serde: whatever validation found wrong is taken
//! out, and the rest is still read, so that one try shows all problems.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A job file (`roles`), or the file of one of its workers (`role`, `taskid`, `groupAssociation`).
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schemars(
    title = "LIFL job or worker file",
    extend("oneOf" = [{ "required": ["roles"] }, { "required": ["role", "taskid"] }])
)]
pub(super) struct FlameFile {
    /// The job.
    #[schemars(required)]
    pub(super) job: Option<Job>,
    /// Job files: the roles, and how many workers play them.
    pub(super) roles: Option<Vec<Role>>,
    /// Worker files: the worker's id.
    pub(super) taskid: Option<String>,
    /// Worker files: not used.
    pub(super) task: Option<Value>,
    /// Worker files: its role.
    pub(super) role: Option<String>,
    /// Worker files: its group on each of its channels.
    pub(super) group_association: Option<BTreeMap<String, String>>,
    /// How the roles are connected.
    #[schemars(required)]
    pub(super) channels: Option<Vec<Channel>>,
    /// Transport of the channels that name none; `shm` when not given.
    pub(super) backend: Option<String>,
    /// Where the transports `p2p` and `mqtt` are reached.
    pub(super) brokers: Option<Vec<Broker>>,
    /// What trainers do, and for how long.
    pub(super) hyperparameters: Option<Hyperparameters>,
    /// The model to start from.
    pub(super) base_model: Option<BaseModel>,
    /// An http(s) URL, a file or folder (relative to the current directory), or `builtin:digits`.
    pub(super) dataset: Option<String>,
    /// How the model is made: `fedavg`; `fedadagrad`, `fedadam` or `fedyogi` with `beta_1` (0.9), `beta_2` (0.99), `eta`
    /// (0.01) and `tau` (0.001), at the top; `fedprox` with `mu`, in the trainers.
    pub(super) optimizer: Option<Sorted>,
    /// Who takes part in a round: `default`, which is all; `random`, with `k`, that many of an aggregator's children.
    pub(super) selector: Option<Sorted>,
    /// Which of its samples a trainer uses: `default`, which is all.
    pub(super) datasampler: Option<Sorted>,
    /// What is done to updates for privacy: `default`, which is nothing.
    pub(super) privacy: Option<Sorted>,
    /// Where models are kept: `dummy`, which is the run's folder.
    pub(super) registry: Option<Registry>,
    /// Seconds after which the job is ended; 300 when not given.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub(super) max_run_time: Option<u64>,
    /// Python packages; not used.
    pub(super) dependencies: Option<Vec<String>>,
    /// Not used.
    pub(super) realm: Option<String>,
    /// What Flame has no field for, and ignores.
    pub(super) lifl: Option<Lifl>,
}

/// The job's names.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Job {
    /// Its id.
    pub(super) id: String,
    /// Its name for people; the id when not given.
    pub(super) name: Option<String>,
}

/// One role.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Role {
    /// Its name.
    pub(super) name: String,
    /// For people.
    #[expect(dead_code, reason = "for people")]
    description: Option<String>,
    /// Workers for each entry of `groupAssociation`; 1 when not given.
    #[schemars(range(min = 1))]
    pub(super) replica: Option<u32>,
    /// Whether it needs data; trainers do.
    pub(super) is_data_consumer: Option<bool>,
    /// For each worker, its group on each of the role's channels; when not given, one worker in group `default`
    /// everywhere.
    #[schemars(length(min = 1))]
    pub(super) group_association: Option<Vec<BTreeMap<String, String>>>,
}

/// How two roles are connected.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Channel {
    /// Its name.
    pub(super) name: String,
    /// For people.
    #[expect(dead_code, reason = "for people")]
    description: Option<String>,
    /// The two roles.
    pub(super) pair: [String; 2],
    /// Not used: each channel is.
    pub(super) is_bidirectional: Option<bool>,
    /// Not used: no channel is.
    pub(super) is_unidirectional: Option<bool>,
    /// The channel's groups; ends meet within a group only.
    pub(super) group_by: Option<GroupBy>,
    /// What each role does on it, which says who is the parent: `distribute` and `aggregate` above, `fetch` and
    /// `upload` below.
    pub(super) func_tags: BTreeMap<String, Vec<Tag>>,
    /// Its transport: `shm` (`local` is the same here), `p2p` or `mqtt`; the file's when not given.
    pub(super) backend: Option<String>,
    /// Where its transport is reached, instead of what `brokers` says.
    pub(super) broker_host: Option<String>,
}

impl Channel {
    /// Whether it is one of the coordinator's.
    pub(super) fn coordinates(&self) -> bool {
        self.func_tags
            .values()
            .flatten()
            .any(|tag| tag.side() == Side::Coordination)
    }
}

/// The groups of a channel.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GroupBy {
    /// How groups are told apart.
    #[serde(rename = "type")]
    #[expect(dead_code, reason = "there is one only, and validation has seen to it")]
    kind: Option<GroupKind>,
    /// Their names; any when not given.
    pub(super) value: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum GroupKind {
    Tag,
}

/// What a role does on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Tag {
    Distribute,
    Aggregate,
    Fetch,
    Upload,
    Coordinate,
    CoordinateWithTopAgg,
    CoordinateWithMidAgg,
    CoordinateWithLeafAgg,
    CoordinateWithTrainer,
}

/// Which end of a channel a tag belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    /// The parent's.
    Upper,
    /// The child's.
    Lower,
    /// Either end of one of the coordinator's channels.
    Coordination,
}

impl Tag {
    /// The end that it belongs to.
    pub(super) fn side(self) -> Side {
        match self {
            Self::Distribute | Self::Aggregate => Side::Upper,
            Self::Fetch | Self::Upload => Side::Lower,
            Self::Coordinate
            | Self::CoordinateWithTopAgg
            | Self::CoordinateWithMidAgg
            | Self::CoordinateWithLeafAgg
            | Self::CoordinateWithTrainer => Side::Coordination,
        }
    }
}

/// The address of one transport.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Broker {
    /// Which transport.
    pub(super) sort: Option<String>,
    /// Its address, `host` or `host:port`; the port is 10104 for `p2p` and 1883 for `mqtt` when not given.
    pub(super) host: Option<String>,
}

/// What trainers do, and for how long.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Hyperparameters {
    /// Rounds to run; 1 when not given. Among worker files, the coordinator's count, else the top's.
    #[schemars(range(min = 1))]
    pub(super) rounds: Option<u32>,
    /// Passes over its samples that a trainer makes in a round; 1 when not given.
    #[schemars(range(min = 1))]
    pub(super) epochs: Option<u32>,
    /// Samples in a step; 16 when not given.
    #[schemars(range(min = 1))]
    pub(super) batch_size: Option<u32>,
    /// Of plain SGD; 0.01 when not given.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub(super) learning_rate: Option<f64>,
    /// L2 penalty; 0 when not given.
    #[schemars(extend("minimum" = 0))]
    pub(super) weight_decay: Option<f64>,
    /// Updates after which an aggregator's round is done; all of its children's when not given.
    #[schemars(range(min = 1))]
    pub(super) agg_goal: Option<u32>,
    /// Not supported.
    pub(super) concurrency: Option<Value>,
}

/// The model to start from.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BaseModel {
    /// A safetensors file (relative to the current directory); empty for a fresh model.
    pub(super) name: Option<String>,
    /// Not used.
    pub(super) version: Option<Value>,
}

/// One of several ways of doing a thing.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Sorted {
    /// Which.
    pub(super) sort: Option<String>,
    /// Its arguments.
    pub(super) kwargs: Option<Map<String, Value>>,
}

/// Where models are kept.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Registry {
    /// Which sort of place.
    pub(super) sort: Option<String>,
    /// Its address; not used.
    pub(super) uri: Option<String>,
}

/// What Flame has no field for, and ignores.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Lifl {
    /// What every random choice comes from; 1 when not given.
    pub(super) seed: Option<u64>,
    /// When aggregators fold; `lazy` when not given.
    pub(super) timing: Option<Timing>,
    /// What trainers send; `weights` when not given.
    pub(super) updates: Option<Updates>,
    /// The built-in model; `cnn` when not given.
    pub(super) model: Option<Model>,
    /// Trainers whose updates a round's model needs; 1 when not given.
    #[schemars(range(min = 1))]
    pub(super) quorum: Option<u32>,
    /// Seconds after which a round goes on without those who have not answered, once there is a quorum; never when not given.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1_000_000_000))]
    pub(super) round_timeout: Option<f64>,
    /// Seconds after which a worker is ended that does not stir; 30 when not given.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1_000_000_000))]
    pub(super) grace_time: Option<f64>,
    /// Microseconds for which a worker that has nothing to do looks for frames before it sleeps; 0 when not given.
    #[schemars(range(max = 1000))]
    pub(super) spin_micros: Option<u32>,
    /// What the dataset's file must hash to.
    #[schemars(extend("pattern" = "^[0-9a-fA-F]{64}$"))]
    pub(super) sha256: Option<String>,
    /// Training samples to use, from the front; all when not given.
    #[schemars(range(min = 1))]
    pub(super) train_samples: Option<u64>,
    /// Test samples to use; all when not given.
    #[schemars(range(min = 1))]
    pub(super) test_samples: Option<u64>,
    /// Which trainer gets which samples; `iid` when not given.
    pub(super) partition: Option<Partition>,
}

/// When aggregators fold.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Timing {
    Eager,
    Lazy,
}

/// What trainers send.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Updates {
    Weights,
    Deltas,
}

/// A built-in model, by its name or with its size.
#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Model {
    Named(ModelName),
    Sized(ModelSize),
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum ModelName {
    Softmax,
    Mlp,
    Cnn,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum ModelSize {
    Mlp(MlpSize),
    Synthetic(SyntheticSize),
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MlpSize {
    /// Width of the hidden layer.
    #[schemars(range(min = 1))]
    pub(super) hidden: u32,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SyntheticSize {
    /// Elements of the model's one tensor.
    #[schemars(range(min = 1))]
    pub(super) parameters: u64,
    /// Their type; `F32` when not given.
    pub(super) dtype: Option<Float>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Float {
    F64,
    F32,
    F16,
    BF16,
}

/// Which trainer gets which samples.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(
    rename_all = "camelCase",
    rename_all_fields = "camelCase",
    tag = "sort",
    deny_unknown_fields
)]
pub(super) enum Partition {
    Iid {},
    Shards {
        /// Pieces, sorted by label, for each trainer.
        #[schemars(range(min = 1))]
        per_trainer: u32,
    },
    Dirichlet {
        /// Concentration of the draw; small is uneven.
        #[schemars(extend("exclusiveMinimum" = 0))]
        alpha: f64,
    },
}
