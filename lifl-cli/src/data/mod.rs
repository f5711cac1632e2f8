//! Samples to learn from.
mod samples;
pub use samples::{CLASSES, PIXELS, SIDE, Samples};
