//! The networks that trainers learn: their layers, parameters and first weights.
//!
//! Layouts and names of shapes are Keras': a dense kernel is `[in, out]`, a convolution's `[rows, columns, in, out]`,
//! an image `[height, width, channels]`. So weights can be carried to and from Flame's Keras example by name alone.

use lifl_common::config::{ModelSpec, SampleShape};
use lifl_common::update::{DType, Schema, TensorSpec, TensorsMut};
use rand::Rng;
use zerocopy::FromBytes;
use zerocopy::little_endian::F32;

use super::layers::{Conv, Dense, Dropout, Layer, MaxPoolRelu, Parameter, Relu};
use super::model::Model;
use crate::{CNN_LEAST, LearnError, ModelOf};
use lifl_common::random::{Stream, stream};

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

/// Half the width of Glorot and Bengio's (2010) uniform distribution, `sqrt(6 / (fan_in + fan_out))`, as Keras
/// takes it; biases are 0.
fn initial_bound(parameter: &Parameter) -> f32 {
    match parameter.shape.as_slice() {
        [field @ .., fan_in, fan_out] => {
            let field: usize = field.iter().product();
            (6.0 / (field * (fan_in + fan_out)) as f32).sqrt()
        }
        _ => 0.0,
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

    /// The layers. Of the convolution network the samples are [large enough](Self::schema).
    pub(super) fn layers(self) -> Vec<Box<dyn Layer>> {
        let [height, width, channels, classes] = [
            self.samples.height,
            self.samples.width,
            self.samples.channels,
            self.samples.classes,
        ]
        .map(|number| number as usize);
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        match self.layers {
            Layers::Softmax => {}
            Layers::Mlp { hidden } => {
                layers.push(Box::new(Dense {
                    kernel: "hidden.kernel",
                    bias: "hidden.bias",
                    inputs: self.samples.pixels(),
                    outputs: hidden,
                }));
                layers.push(Box::new(Relu { numbers: hidden }));
            }
            Layers::Cnn => {
                let mut sides = [height, width];
                for (kernel, bias, inputs, outputs) in [
                    ("conv1.kernel", "conv1.bias", channels, 32),
                    ("conv2.kernel", "conv2.bias", 32, 64),
                ] {
                    let conv = Conv::new(kernel, sides, [3, 3, inputs, outputs]);
                    let [height, width] = conv.sides();
                    sides = [height / 2, width / 2];
                    layers.push(Box::new(conv));
                    layers.push(Box::new(MaxPoolRelu {
                        bias,
                        height,
                        width,
                        channels: outputs,
                    }));
                }
                layers.push(Box::new(Dropout::new(
                    sides[0].saturating_mul(sides[1]).saturating_mul(64),
                )));
            }
        }
        let features = layers
            .last()
            .map_or(self.samples.pixels(), |layer| layer.outputs());
        layers.push(Box::new(Dense {
            kernel: "dense.kernel",
            bias: "dense.bias",
            inputs: features,
            outputs: classes,
        }));
        layers
    }

    /// The tensors, in the order of the layers that they belong to.
    pub(super) fn parameters(self) -> Vec<Parameter> {
        Model::parameters(&self.layers())
    }

    /// The tensors as an update holds them.
    ///
    /// # Errors
    /// If the samples are too small for it, or the tensors too large.
    pub(super) fn schema(self) -> Result<Schema, LearnError> {
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
            let bound = initial_bound(parameter);
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
}
