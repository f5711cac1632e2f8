//! The model that a top begins with, read into its slot: made from the seed, from the base model's file, or from a checkpoint.

use std::io::Read;

use anyhow::{Context, ensure};
use lifl_common::arena::WritableSlot;
use lifl_common::update::{Metadata, Schema, TensorsMut, image};
use lifl_worker::aggregator::LoadedModel;

use super::Shell;
use crate::checkpoint::{self, Checkpoint};
use crate::dir::Dir;

/// Loads it: a checkpoint's, whoever chose it has found whole, with the optimizer's state.
///
/// # Errors
/// If it cannot be read, or is of another job.
pub(super) fn load_model(
    shell: &Shell<'_>,
    mut slot: WritableSlot,
    state: Option<WritableSlot>,
) -> anyhow::Result<LoadedModel> {
    let (schema, folder) = (&*shell.schema, shell.run);
    let Some(round) = shell.start else {
        first_model(shell, &mut slot)?;
        let metadata = Metadata {
            maker: shell.name.clone(),
            ..Metadata::default()
        };
        return Ok(LoadedModel {
            slot,
            metadata,
            state: None,
        });
    };
    let checkpoint = Checkpoint::read(folder, round)?;
    let description = folder.path().join(checkpoint::description_name(round));
    let metadata = fill(&mut slot, schema, folder, &checkpoint.model.file)?;
    let state = match checkpoint.state {
        None => None,
        Some(written) => {
            let mut state = state.with_context(|| {
                format!(
                    "{} has a state, this job's optimizer has none",
                    description.display()
                )
            })?;
            let schema = lifl_aggregate::state_schema(schema, &shell.job.optimizer);
            let schema = schema.context("this job's optimizer has no state")?;
            let metadata = fill(&mut state, &schema, folder, &written.file)?;
            Some((state, metadata))
        }
    };
    tracing::info!(round = checkpoint.round, checkpoint = %description.display(), "begun from a checkpoint");
    Ok(LoadedModel {
        slot,
        metadata,
        state,
    })
}

/// The job's first model, from the seed or from a file.
fn first_model(shell: &Shell<'_>, slot: &mut WritableSlot) -> anyhow::Result<()> {
    let (job, schema) = (&shell.job, &*shell.schema);
    let data = &mut slot.bytes_mut()[image::data_range(schema)];
    let Some(path) = &job.base_model else {
        if lifl_learn::threads::made(&job.model, 1) > 0 {
            lifl_learn::threads::start(&job.model)?;
        }
        lifl_learn::initial(job, job.seed, TensorsMut::new(schema, data));
        return Ok(());
    };
    let file = std::fs::read(path).with_context(|| format!("cannot read baseModel {}", path.display()))?;
    image::import(&file, TensorsMut::new(schema, data))
        .with_context(|| format!("baseModel {} does not fit the job", path.display()))
}

/// Reads an image of ours into a slot.
fn fill(slot: &mut WritableSlot, schema: &Schema, folder: &Dir, name: &str) -> anyhow::Result<Metadata> {
    let path = folder.path().join(name);
    let read = || format!("cannot read {}", path.display());
    let mut file = folder.open(name).with_context(read)?;
    let (found, expected) = (
        file.metadata().with_context(read)?.len(),
        image::image_bytes(schema),
    );
    ensure!(
        found == expected as u64,
        "{} has {found} bytes, the job's have {expected}",
        path.display()
    );
    file.read_exact(&mut slot.bytes_mut()[..expected])
        .with_context(read)?;
    let (metadata, data) = image::check(&slot.bytes()[..expected], schema)
        .with_context(|| format!("{} is not the job's", path.display()))?;
    ensure!(
        data == image::data_range(schema),
        "{} was not written by this lifl",
        path.display()
    );
    Ok(metadata)
}
