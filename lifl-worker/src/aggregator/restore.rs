//! The model that a top begins with: the job's first, or a checkpoint's with the optimizer's state.

use lifl_common::update::image;

use super::{Aggregator, Error, LoadedModel, Output};

impl Aggregator {
    /// Asks for the top's model.
    pub(super) fn load_model(&mut self) -> Result<(), Error> {
        let Some(top) = &mut self.top else {
            return Ok(());
        };
        let model = self.arena.begin().ok_or(Error::NoFreeSlot)?;
        let state = top.optimizer.begin_state()?;
        self.outputs.push_back(Output::LoadModel { model, state });
        Ok(())
    }

    /// The model is there.
    pub(super) fn model_loaded(&mut self, loaded: LoadedModel) -> Result<(), Error> {
        let LoadedModel {
            mut slot,
            mut metadata,
            state,
        } = loaded;
        let schema = &self.config.schema;
        let Some(top) = self.top.as_mut() else {
            return Ok(());
        };
        let round = metadata.round;
        if round == 0 && !self.rule.is_finite(&slot.bytes()[image::data_range(schema)]) {
            return Err(Error::FirstModelNotFinite);
        }
        metadata.generation = slot.key().generation;
        image::write_header(slot.bytes_mut(), schema, &metadata);
        top.optimizer.restore(round, state)?;
        let key = self.arena.publish(slot);
        let model = self.own_model(round + 1, key);
        if let Some(top) = &mut self.top {
            top.current = Some(model);
        }
        Ok(())
    }
}
