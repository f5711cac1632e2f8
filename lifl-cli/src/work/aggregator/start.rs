//! A top that begins where another was: from a checkpoint.

use std::io::Read;

use anyhow::{Context, bail, ensure};
use lifl_common::arena::WritableSlot;
use lifl_common::update::{Metadata, Schema, image};

use super::Aggregator;
use crate::checkpoint::{self, Checkpoint};
use crate::dir::Dir;
use crate::work::ground::Ground;

impl<G: Ground> Aggregator<G> {
    /// Takes that round's checkpoint in the run's folder for the top's model and its optimizer's state. Whoever chose it has
    /// found it whole.
    ///
    /// # Errors
    /// If it cannot be read, or is of another job.
    pub(super) fn restore(&mut self, folder: &Dir, round: u32) -> anyhow::Result<()> {
        let checkpoint = Checkpoint::read(folder, round)?;
        let description = folder.path().join(checkpoint::description_name(round));
        let mut slot = self
            .ground
            .arena()
            .begin()
            .context("a new arena has no free slot")?;
        let model = fill(&mut slot, &self.shared.schema, folder, &checkpoint.model.file)?;
        let key = self.ground.arena().publish(slot);
        self.current = Some(self.own(key));
        let server = self
            .server
            .as_mut()
            .context("only a top begins from a checkpoint")?;
        // Before the first step, which the first new model comes of, there is nothing to remember.
        let due = server.state_schema().filter(|_| model.round > 0);
        match (&checkpoint.state, due) {
            (None, None) => {}
            (Some(state), Some(schema)) => {
                let arena = self.ground.state().context("the top has no second arena")?;
                let mut slot = arena.begin().context("a new arena has no free slot")?;
                let file = &state.file;
                let state = fill(&mut slot, schema, folder, file)?;
                ensure!(
                    state.round == model.round,
                    "{}/{file} is of round {}, its model of {}",
                    folder.path().display(),
                    state.round,
                    model.round
                );
                let key = arena.publish(slot);
                server.restore(key);
            }
            (Some(_), None) => bail!(
                "{} has a state, this job's optimizer has none",
                description.display()
            ),
            (None, Some(_)) => bail!("{} lacks the optimizer's state", description.display()),
        }
        tracing::info!(round = checkpoint.round, checkpoint = %description.display(), "begun from a checkpoint");
        Ok(())
    }
}

/// Reads an image of ours into a slot, and makes it the slot's own.
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
    let (metadata, offset) = image::check(&slot.bytes()[..expected], schema)
        .with_context(|| format!("{} is not the job's", path.display()))?;
    ensure!(
        offset == image::data_offset(schema),
        "{} was not written by this lifl",
        path.display()
    );
    let metadata = Metadata {
        generation: slot.key().generation,
        ..metadata
    };
    image::write_header(slot.bytes_mut(), schema, &metadata);
    Ok(metadata)
}
