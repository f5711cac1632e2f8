//! The networks that trainers learn: their parameters and forward passes.
//!
//! Layouts and names of shapes are Keras': a dense kernel is `[in, out]`, a convolution's `[rows, columns, in, out]`,
//! an image `[height, width, channels]`. So weights can be carried to and from Flame's Keras example by name alone.

use candle_core::{Result, Tensor, bail};
use lifl_common::config::ModelSpec;
use lifl_common::update::{DType, Schema, TensorSpec, TensorsMut};
use rand::Rng;
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::LearnError;
use super::ops::{conv2d, max_pool_relu};
use crate::data::{CLASSES, PIXELS, SIDE};
use crate::random::{Stream, stream};

/// What the flattened images are before the last layer of the convolution network: 5 × 5 pixels of 64 channels.
const CNN_FEATURES: usize = 5 * 5 * 64;

/// A network of the built-in trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// One dense layer.
    Softmax,
    /// Two dense layers with a ReLU between them.
    Mlp { hidden: usize },
    /// Flame's MNIST example (its `keras/mnist` trainer): 3×3 convolution to 32 channels, pooling, 3×3 convolution
    /// to 64, pooling, dropout of one half, dense.
    Cnn,
}

/// One tensor of a network.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    pub(super) name: &'static str,
    pub(super) shape: Vec<usize>,
}

impl Parameter {
    fn new(name: &'static str, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name,
            shape: shape.into(),
        }
    }

    /// Half the width of Glorot and Bengio's (2010) uniform distribution, `sqrt(6 / (fan_in + fan_out))`, as Keras
    /// takes it; biases are 0.
    fn initial_bound(&self) -> f32 {
        match self.shape.as_slice() {
            [field @ .., fan_in, fan_out] => {
                let field: usize = field.iter().product();
                (6.0 / (field * (fan_in + fan_out)) as f32).sqrt()
            }
            _ => 0.0,
        }
    }
}

impl Network {
    /// The network that the job names; `None` for a model that is none.
    pub(super) fn of(model: &ModelSpec) -> Option<Self> {
        match *model {
            ModelSpec::Softmax => Some(Self::Softmax),
            ModelSpec::Mlp { hidden } => Some(Self::Mlp {
                hidden: hidden as usize,
            }),
            ModelSpec::Cnn => Some(Self::Cnn),
            ModelSpec::Synthetic { .. } => None,
        }
    }

    /// The tensors, in the order in which [`forward`](Self::forward) takes them.
    pub(super) fn parameters(self) -> Vec<Parameter> {
        let dense = |inputs| {
            [
                Parameter::new("dense.kernel", [inputs, CLASSES]),
                Parameter::new("dense.bias", [CLASSES]),
            ]
        };
        let mut parameters = match self {
            Self::Softmax => Vec::new(),
            Self::Mlp { hidden } => vec![
                Parameter::new("hidden.kernel", [PIXELS, hidden]),
                Parameter::new("hidden.bias", [hidden]),
            ],
            Self::Cnn => vec![
                Parameter::new("conv1.kernel", [3, 3, 1, 32]),
                Parameter::new("conv1.bias", [32]),
                Parameter::new("conv2.kernel", [3, 3, 32, 64]),
                Parameter::new("conv2.bias", [64]),
            ],
        };
        parameters.extend(dense(match self {
            Self::Softmax => PIXELS,
            Self::Mlp { hidden } => hidden,
            Self::Cnn => CNN_FEATURES,
        }));
        parameters
    }

    /// The tensors as an update holds them.
    pub(super) fn schema(self) -> std::result::Result<Schema, LearnError> {
        let tensors = self
            .parameters()
            .into_iter()
            .map(|p| TensorSpec::new(p.name, DType::F32, p.shape));
        Ok(Schema::new(tensors.collect())?)
    }

    /// Writes fresh weights.
    ///
    /// # Panics
    /// If `weights` are not this network's.
    pub(super) fn initial(self, seed: u64, mut weights: TensorsMut<'_>) {
        for (i, parameter) in self.parameters().iter().enumerate() {
            let mut random = stream(seed, Stream::Initial, 0, i as u64);
            let bound = parameter.initial_bound();
            let bytes = weights.bytes(parameter.name).map(<[F32]>::mut_from_bytes);
            let Some(Ok(values)) = bytes else {
                panic!("the weights are of another model")
            };
            for value in values {
                value.set(if bound > 0.0 {
                    random.random_range(-bound..bound)
                } else {
                    0.0
                });
            }
        }
    }

    /// Activations for each sample that dropout leaves out some of; `None` for a network without it.
    pub(super) fn dropped(self) -> Option<usize> {
        (self == Self::Cnn).then_some(CNN_FEATURES)
    }

    /// The logits `[n, 10]` of `images` `[n, 784]` under the weights, given in the order of
    /// [`parameters`](Self::parameters). In training, `mask` `[n, dropped]` is what dropout multiplies by.
    pub(super) fn forward(
        self,
        weights: &[Tensor],
        images: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (features, kernel, bias) = match (self, weights) {
            (Self::Softmax, [kernel, bias]) => (images.clone(), kernel, bias),
            (Self::Mlp { .. }, [hidden, hidden_bias, kernel, bias]) => (
                images.matmul(hidden)?.broadcast_add(hidden_bias)?.relu()?,
                kernel,
                bias,
            ),
            (Self::Cnn, [conv1, bias1, conv2, bias2, kernel, bias]) => {
                let images = images.reshape(((), SIDE, SIDE, 1))?;
                let first = max_pool_relu(&conv2d(&images, conv1, false)?, bias1)?;
                let second = max_pool_relu(&conv2d(&first, conv2, true)?, bias2)?;
                (second.flatten_from(1)?, kernel, bias)
            }
            (_, weights) => bail!("{} tensors do not make this network", weights.len()),
        };
        let features = match mask {
            Some(mask) => (features * mask)?,
            None => features,
        };
        features.matmul(kernel)?.broadcast_add(bias)
    }
}
