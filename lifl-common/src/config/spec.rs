//! The job as understood: what every other part of LIFL works from.
//!
//! Only this module's [`load`](super::load) makes one from a person's files; a run's folder holds it as `job.json`, from
//! which a run that goes on reads it back.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::dataset::Dataset;
use crate::update::DType;

/// One job, checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Flame's `job.id`.
    pub id: String,
    /// Flame's `job.name`.
    pub name: String,
    /// Rounds to run, at least 1.
    pub rounds: u32,
    /// What every random choice of the run comes from.
    pub seed: u64,
    /// When an aggregator folds.
    pub timing: Timing,
    /// What trainers send up.
    pub updates: UpdateKind,
    /// The tree's workers without the coordinator: the top first, then level by level, each level in file order.
    pub workers: Vec<WorkerSpec>,
    /// Where the transports that leave the node are reached.
    pub brokers: Brokers,
    /// The model.
    pub model: ModelSpec,
    /// What a network takes in and gives out. A job's files do not say it: whoever runs a job sets it to what the data has.
    #[serde(default, skip_serializing_if = "SampleShape::is_default")]
    pub samples: SampleShape,
    /// A safetensors file to start from (`baseModel.name`), instead of a fresh model.
    pub base_model: Option<PathBuf>,
    /// What trainers do.
    pub training: TrainingSpec,
    /// How the top makes the new model of the round's mean.
    pub optimizer: Optimizer,
    /// Where samples come from; `None` for a model without data. Models are judged on its test samples, and trainers
    /// without [data of their own](WorkerSpec::dataset) train on it.
    pub data: Option<DataSource>,
    /// Trainers whose updates a round's model needs, at least 1: with fewer, the round leaves the model as it was.
    pub quorum: u32,
    /// Seconds after which a round goes on without those who have not answered, once there is a quorum.
    pub round_timeout_s: Option<f64>,
    /// Seconds after which a worker is ended that does not stir, or a trainer that owes an update in spite of the round's end.
    pub grace_time_s: f64,
    /// Microseconds for which a worker that has nothing to do looks for frames before it sleeps.
    #[serde(default)]
    pub spin_us: u32,
    /// Flame's `maxRunTime` in seconds.
    pub max_run_time_s: u64,
}

impl JobSpec {
    /// Levels of aggregators: 1 for a top over trainers, 3 for top, middle and leaf.
    pub fn levels(&self) -> u32 {
        self.aggregators()
            .map(|worker| worker.level + 1)
            .max()
            .unwrap_or(0)
    }

    /// The top; there is one in every job that was loaded.
    pub fn top(&self) -> Option<&WorkerSpec> {
        self.workers.iter().find(|worker| worker.kind == Kind::Top)
    }

    /// The top and the other aggregators, level by level.
    pub fn aggregators(&self) -> impl Iterator<Item = &WorkerSpec> {
        self.workers.iter().filter(|worker| worker.kind != Kind::Trainer)
    }

    /// The datasets that trainers have, each with the number of trainers that share it; the job's own among them only
    /// if somebody trains on it.
    pub fn datasets(&self) -> Vec<(DataSource, u32)> {
        let Some(data) = &self.data else { return Vec::new() };
        let mut datasets: BTreeMap<&Dataset, u32> = BTreeMap::new();
        for trainer in self.trainers() {
            let dataset = trainer.dataset.as_ref().unwrap_or(&data.dataset);
            *datasets.entry(dataset).or_default() += 1;
        }
        let source = |(dataset, trainers): (&Dataset, u32)| {
            let dataset = dataset.clone();
            (
                DataSource {
                    dataset,
                    ..data.clone()
                },
                trainers,
            )
        };
        datasets.into_iter().map(source).collect()
    }

    /// The data of a trainer; `None` for a model without data.
    pub fn data_of(&self, trainer: &WorkerSpec) -> Option<DataSource> {
        let mut data = self.data.clone()?;
        if let Some(own) = &trainer.dataset {
            data.dataset.clone_from(own);
        }
        Some(data)
    }

    /// Which part of its data is a trainer's: its number among those that share the dataset, from 0, and how many they
    /// are. Of another worker that means nothing.
    pub fn part_of(&self, trainer: &WorkerSpec) -> (u32, u32) {
        let sharing = || self.trainers().filter(|other| other.dataset == trainer.dataset);
        let before = sharing().filter(|other| other.share < trainer.share).count();
        (before as u32, sharing().count() as u32)
    }

    /// The trainers, by their share.
    pub fn trainers(&self) -> impl Iterator<Item = &WorkerSpec> {
        self.workers.iter().filter(|worker| worker.kind == Kind::Trainer)
    }
}

/// When an aggregator folds an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Timing {
    /// When it comes: in arrival order, so equal runs agree within rounding.
    Eager,
    /// When all have come: in a fixed order, so equal runs agree bit for bit.
    Lazy,
}

/// What trainers send up, and so what aggregators average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UpdateKind {
    /// The trained weights. Saves the top one pass over the model.
    Weights,
    /// Trained weights minus the round's model, as Flame's trainers send.
    Deltas,
}

/// A worker's place in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Makes the global model.
    Top,
    /// A middle or leaf aggregator.
    Aggregator,
    /// Trains.
    Trainer,
}

/// One group of one channel: the upper ends in it are the possible parents of the lower ends in it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Group {
    /// The channel's name.
    pub channel: String,
    /// The group's.
    pub group: String,
}

/// How updates go up a channel and models come down it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Shared memory of one node; Flame's `local` is the same here.
    #[default]
    #[serde(alias = "local")]
    Shm,
    /// Flame's gRPC endpoint.
    P2p,
    /// An MQTT broker.
    Mqtt,
}

impl Transport {
    /// Its name in a file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::P2p => "p2p",
            Self::Mqtt => "mqtt",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the transports that leave the node are reached, each as `host:port`; `None` where no channel uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Brokers {
    /// Of [`Transport::P2p`].
    pub p2p: Option<String>,
    /// Of [`Transport::Mqtt`].
    pub mqtt: Option<String>,
}

/// One worker of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// Unique in the job: the role with a running number from 1, `leaf-aggregator-2`.
    pub name: String,
    /// Flame's role.
    pub role: String,
    /// Flame's taskid, from a worker file.
    pub task_id: Option<String>,
    /// Its place.
    pub kind: Kind,
    /// Steps from the top, which is 0.
    pub level: u32,
    /// Where it finds its parent; `None` for the top.
    pub up: Option<Group>,
    /// Where it finds its children; `None` for a trainer.
    pub down: Option<Group>,
    /// How its updates go to its parent and models come from it: the transport of the channel of `up`; for the top,
    /// which has none, [`Transport::Shm`].
    pub transport: Transport,
    /// For an aggregator: after how many updates its round is done; all of its children's when not given.
    pub agg_goal: Option<u32>,
    /// For an aggregator: how many of its children, drawn anew for each round, take part; all when not given.
    pub select: Option<u32>,
    /// For a trainer: its number among the trainers, from 0.
    pub share: Option<u32>,
    /// For a trainer with data of its own: the dataset, where it is another than the [job's](JobSpec::data).
    pub dataset: Option<Dataset>,
}

/// Which model is trained, by its built-in trainer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelSpec {
    /// Softmax regression.
    Softmax,
    /// One hidden layer.
    Mlp {
        /// Its width.
        hidden: u32,
    },
    /// The network of Flame's MNIST example.
    Cnn,
    /// That many parameters and no data.
    Synthetic {
        /// Elements of the one tensor.
        parameters: u64,
        /// Their type.
        dtype: DType,
    },
}

/// The shape of a sample and how many classes there are; 28 × 28 grey pixels of ten classes, as MNIST's, when not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleShape {
    /// Pixels down an image.
    pub height: u32,
    /// Pixels across.
    pub width: u32,
    /// Numbers in a pixel: 1 for grey.
    pub channels: u32,
    /// Labels are below this.
    pub classes: u32,
}

impl SampleShape {
    /// Numbers in an image.
    pub fn pixels(&self) -> usize {
        [self.height, self.width, self.channels]
            .into_iter()
            .fold(1_usize, |n, side| n.saturating_mul(side as usize))
    }

    /// Whether samples of the other shape are of this one, whatever their classes.
    pub fn same_image(&self, other: &Self) -> bool {
        (self.height, self.width, self.channels) == (other.height, other.width, other.channels)
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for SampleShape {
    fn default() -> Self {
        Self {
            height: 28,
            width: 28,
            channels: 1,
            classes: 10,
        }
    }
}

impl fmt::Display for SampleShape {
    /// The image: `28 × 28`, `32 × 32 × 3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {}", self.height, self.width)?;
        if self.channels != 1 {
            write!(f, " × {}", self.channels)?;
        }
        Ok(())
    }
}

/// What a trainer does in a round (Flame's `hyperparameters`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingSpec {
    /// Passes over its samples.
    pub epochs: u32,
    /// Samples in a step.
    pub batch_size: u32,
    /// Of plain SGD.
    pub learning_rate: f64,
    /// L2 penalty; 0 for none.
    pub weight_decay: f64,
    /// FedProx's μ (Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks",
    /// MLSys 2020, equation 2): how strongly a trainer is held to the round's model; 0 for FedAvg.
    pub proximal_mu: f64,
}

/// How the top makes the new model of the round's mean (Flame's `optimizer`; FedProx is the
/// [trainers'](TrainingSpec::proximal_mu)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "sort")]
pub enum Optimizer {
    /// The mean is the model.
    #[default]
    FedAvg,
    /// Adaptive, with the sum of squared differences.
    FedAdagrad(Adaptive),
    /// Adaptive, with their exponential mean.
    FedAdam(Adaptive),
    /// Adaptive, with a mean that grows as fast as it falls.
    FedYogi(Adaptive),
}

/// The rates of an adaptive server optimizer (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adaptive {
    /// How much of the mean difference is kept from round to round, from 0 to below 1.
    pub beta_1: f64,
    /// How much of the squared difference is, from 0 to below 1; FedAdagrad keeps all.
    pub beta_2: f64,
    /// The step size, above 0.
    pub eta: f64,
    /// What keeps the step finite where nothing changes, above 0.
    pub tau: f64,
}

impl Default for Adaptive {
    /// Flame's.
    fn default() -> Self {
        Self {
            beta_1: 0.9,
            beta_2: 0.99,
            eta: 1e-2,
            tau: 1e-3,
        }
    }
}

/// Where samples come from and who gets which.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSource {
    /// Flame's `dataset`: an http(s) URL, a file or folder, or `builtin:digits`.
    pub dataset: Dataset,
    /// What the file at a URL must hash to, in hex.
    pub sha256: Option<String>,
    /// Training samples to use, from the front; all of them when not given.
    pub train_samples: Option<u64>,
    /// Test samples to use: of the dataset's own test set, or, where it has none, held out from its end.
    pub test_samples: Option<u64>,
    /// Who gets which.
    pub partition: Partition,
}

/// How the training samples are divided among the trainers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "sort")]
pub enum Partition {
    /// At random, in equal shares.
    Iid,
    /// Sorted by label, cut into `per_trainer` pieces for each trainer, dealt at random (McMahan et al. 2017).
    Shards {
        /// Pieces for each trainer.
        per_trainer: u32,
    },
    /// Each label's samples divided by a Dirichlet draw (Hsu et al. 2019).
    Dirichlet {
        /// The draw's concentration; small is uneven.
        alpha: f64,
    },
}
