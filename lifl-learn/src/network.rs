//! The networks that trainers learn: their parameters and forward passes.
//!
//! Layouts and names of shapes are Keras': a dense kernel is `[in, out]`, a convolution's `[rows, columns, in, out]`,
//! an image `[height, width, channels]`. So weights can be carried to and from Flame's Keras example by name alone.

use candle_core::{Result, Tensor, bail};
use lifl_common::config::{ModelSpec, SampleShape};
use lifl_common::update::{DType, Schema, TensorSpec, TensorsMut};
use rand::Rng;
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::ops::{conv2d, max_pool_relu};
use super::{LearnError, ModelOf};
use lifl_common::random::{Stream, stream};

/// Channels after the convolution network's second convolution.
const CNN_CHANNELS: usize = 64;

/// Pixels down and across the smallest images that leave the convolution network anything after its second pooling.
pub(super) const CNN_LEAST: u32 = 10;

/// A network of the built-in trainer, for samples of that shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Network {
    layers: Layers,
    samples: SampleShape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layers {
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
    pub(super) fn of(model: ModelOf<'_>) -> Option<Self> {
        let layers = match *model.spec {
            ModelSpec::Softmax => Layers::Softmax,
            ModelSpec::Mlp { hidden } => Layers::Mlp {
                hidden: hidden as usize,
            },
            ModelSpec::Cnn => Layers::Cnn,
            ModelSpec::Synthetic { .. } => return None,
        };
        Some(Self {
            layers,
            samples: model.samples,
        })
    }

    /// What it takes in and gives out.
    pub(super) fn samples(self) -> SampleShape {
        self.samples
    }

    /// Numbers that the last layer takes in: of the convolution network, what is left of the pixels after two convolutions
    /// without padding and two poolings.
    fn features(self) -> usize {
        let left = |side: u32| (side as usize).saturating_sub(2) / 2;
        let left = |side: u32| left(side).saturating_sub(2) / 2;
        match self.layers {
            Layers::Softmax => self.samples.pixels(),
            Layers::Mlp { hidden } => hidden,
            Layers::Cnn => left(self.samples.height)
                .saturating_mul(left(self.samples.width))
                .saturating_mul(CNN_CHANNELS),
        }
    }

    /// The tensors, in the order in which [`forward`](Self::forward) takes them.
    pub(super) fn parameters(self) -> Vec<Parameter> {
        let classes = self.samples.classes as usize;
        let mut parameters = match self.layers {
            Layers::Softmax => Vec::new(),
            Layers::Mlp { hidden } => vec![
                Parameter::new("hidden.kernel", [self.samples.pixels(), hidden]),
                Parameter::new("hidden.bias", [hidden]),
            ],
            Layers::Cnn => vec![
                Parameter::new("conv1.kernel", [3, 3, self.samples.channels as usize, 32]),
                Parameter::new("conv1.bias", [32]),
                Parameter::new("conv2.kernel", [3, 3, 32, CNN_CHANNELS]),
                Parameter::new("conv2.bias", [CNN_CHANNELS]),
            ],
        };
        parameters.extend([
            Parameter::new("dense.kernel", [self.features(), classes]),
            Parameter::new("dense.bias", [classes]),
        ]);
        parameters
    }

    /// The tensors as an update holds them.
    ///
    /// # Errors
    /// If the samples are too small for it, or the tensors too large.
    pub(super) fn schema(self) -> std::result::Result<Schema, LearnError> {
        let SampleShape { height, width, .. } = self.samples;
        if self.layers == Layers::Cnn && height.min(width) < CNN_LEAST {
            return Err(LearnError::SmallImages(self.samples));
        }
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
        (self.layers == Layers::Cnn).then(|| self.features())
    }

    /// The logits `[n, classes]` of `images` `[n, pixels]` under the weights, given in the order of
    /// [`parameters`](Self::parameters). In training, `mask` `[n, dropped]` is what dropout multiplies by.
    pub(super) fn forward(
        self,
        weights: &[Tensor],
        images: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (features, kernel, bias) = match (self.layers, weights) {
            (Layers::Softmax, [kernel, bias]) => (images.clone(), kernel, bias),
            (Layers::Mlp { .. }, [hidden, hidden_bias, kernel, bias]) => (
                images.matmul(hidden)?.broadcast_add(hidden_bias)?.relu()?,
                kernel,
                bias,
            ),
            (Layers::Cnn, [conv1, bias1, conv2, bias2, kernel, bias]) => {
                let [height, width, channels] =
                    [self.samples.height, self.samples.width, self.samples.channels]
                        .map(|side| side as usize);
                let images = images.reshape(((), height, width, channels))?;
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
