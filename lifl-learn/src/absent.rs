//! In place of networks and data sets, where they are not built in: whoever asks for one is told so.

use lifl_common::config::{ModelSpec, TrainingSpec};
use lifl_common::update::{Schema, Tensors, TensorsMut};

use crate::data::Samples;
use crate::{Evaluation, LearnError, Learner, ModelOf};

fn not_built_in(model: ModelOf<'_>) -> LearnError {
    LearnError::NotBuiltIn(match model.spec {
        ModelSpec::Softmax => "softmax",
        ModelSpec::Mlp { .. } => "mlp",
        ModelSpec::Cnn => "cnn",
        ModelSpec::Synthetic { .. } => return LearnError::NothingToEvaluate,
    })
}

pub(crate) fn learner(
    model: ModelOf<'_>,
    _training: &TrainingSpec,
    _data: Option<Samples>,
    _share: u32,
    _seed: u64,
) -> Result<Box<dyn Learner>, LearnError> {
    Err(not_built_in(model))
}

pub(crate) fn schema(model: ModelOf<'_>) -> Result<Schema, LearnError> {
    Err(not_built_in(model))
}

pub(crate) fn initial(_model: ModelOf<'_>, _seed: u64, _weights: TensorsMut<'_>) {
    unreachable!("without a schema there is no memory for weights");
}

/// There is none.
pub enum Evaluator {}

impl Evaluator {
    /// Refuses.
    ///
    /// # Errors
    /// Always.
    pub fn new<'a>(model: impl Into<ModelOf<'a>>, _test: Samples) -> Result<Self, LearnError> {
        Err(not_built_in(model.into()))
    }

    /// Cannot be called.
    ///
    /// # Errors
    /// None.
    pub fn evaluate(&self, _model: Tensors<'_>) -> Result<Evaluation, LearnError> {
        match *self {}
    }
}

#[cfg(test)]
mod tests {
    use lifl_common::config::{DataSource, Partition};
    use lifl_common::update::DType;

    use super::*;
    use crate::data;

    #[test]
    fn networks_and_data_are_refused_by_name() {
        let error = crate::schema(&ModelSpec::Cnn)
            .expect_err("no network")
            .to_string();
        assert!(
            error.contains("network cnn") && error.contains("feature learn"),
            "{error}"
        );
        let source = DataSource {
            dataset: data::BUILTIN_DIGITS.into(),
            sha256: None,
            train_samples: None,
            test_samples: None,
            partition: Partition::Iid,
        };
        assert!(data::is_here(&source));
        let error = data::open(&source, 1).expect_err("no data").to_string();
        assert!(error.contains("feature learn"), "{error}");
    }

    #[test]
    fn a_synthetic_model_needs_neither() {
        let model = ModelSpec::Synthetic {
            parameters: 8,
            dtype: DType::F32,
        };
        let schema = crate::schema(&model).expect("a schema");
        let mut weights = vec![0; schema.data_bytes()];
        crate::initial(&model, 1, TensorsMut::new(&schema, &mut weights));
        assert!(weights.iter().any(|&byte| byte != 0));
    }
}
