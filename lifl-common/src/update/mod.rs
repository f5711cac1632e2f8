//! Updates: which tensors a job's models have ([`Schema`]), and how one lies in a slot ([`image`]).
//!
//! A model, an update and an aggregate are the same thing: the job's tensors, as a
//! [safetensors](https://github.com/huggingface/safetensors) image. All of a job's have the same layout, so
//! arithmetic on them runs over flat regions of one element type ([`Schema::regions`]). What one says of itself is its
//! [`UpdateInfo`]; whose work is in it, its [`Cover`].

mod cover;
pub mod image;
mod info;
mod schema;

pub use cover::{Cover, MAX_TRAINERS, NoCover};
pub use image::{ImageError, Metadata};
pub use info::UpdateInfo;
pub(crate) use info::{loss_bits, loss_of_bits};
pub use schema::{DType, MAX_TENSORS, Region, Schema, SchemaError, TensorSpec, Tensors, TensorsMut};
