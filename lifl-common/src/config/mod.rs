//! Job files: Flame's terms in, a job that cannot be wrong out.

mod spec;

pub use spec::{
    DataSource, Group, JobSpec, Kind, ModelSpec, Partition, Timing, TrainingSpec, UpdateKind, WorkerSpec,
};
