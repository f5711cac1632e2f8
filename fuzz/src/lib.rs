//! What LIFL reads from others, as fuzz targets: each takes any bytes and asserts what must hold of them.
//!
//! The bodies are here, once. `fuzz_targets` holds a program for each, which libFuzzer drives; `tests/replay.rs` gives
//! them every file of `corpus`, with the ordinary compiler, in every `cargo test`.
//!
//! ```text
//!             libFuzzer ──any bytes──┐
//!                                    ├──▶ TARGETS ──▶ the product's own functions ──▶ assertions
//!   corpus/NAME/* ──every cargo test─┘
//! ```
//!
//! A target never repeats what the product does: it goes through the door that strangers' bytes go through (the socket,
//! the file), and holds the outcome against a property, or against a second, simpler way to the same answer.
#![cfg_attr(
    not(feature = "targets"),
    doc = "\n\nBuilt without the feature `targets` there is nothing here."
)]

#[cfg(feature = "targets")]
mod config;
#[cfg(feature = "targets")]
mod control;
#[cfg(feature = "targets")]
mod data;
#[cfg(feature = "targets")]
mod flame;
#[cfg(feature = "targets")]
mod frame;
#[cfg(feature = "targets")]
mod image;
#[cfg(feature = "targets")]
mod input;
#[cfg(feature = "targets")]
mod session;

#[cfg(feature = "targets")]
pub use self::{
    config::config, control::control_packet, data::idx, data::npz, flame::flame_wire, frame::frame,
    image::image, session::session,
};

/// A target: any bytes in, and a panic if they make something untrue.
#[cfg(feature = "targets")]
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, which its program and its corpus have too.
    pub name: &'static str,
    /// Its body.
    pub run: fn(&[u8]),
}

/// All targets.
#[cfg(feature = "targets")]
pub const TARGETS: [Target; 8] = [
    Target {
        name: "config",
        run: config,
    },
    Target {
        name: "control_packet",
        run: control_packet,
    },
    Target {
        name: "flame_wire",
        run: flame_wire,
    },
    Target {
        name: "frame",
        run: frame,
    },
    Target {
        name: "idx",
        run: idx,
    },
    Target {
        name: "image",
        run: image,
    },
    Target {
        name: "npz",
        run: npz,
    },
    Target {
        name: "session",
        run: session,
    },
];
