//! What all sides of LIFL agree on.
//!
//! Without the `std` feature this crate holds only what the kernel programs share with user space: [`id`]s, the
//! [`frame`], the [`kernel`] map values, and what [`flame`]'s workers send. With it come the [`arena`]s that updates lie in, the [`update`]
//! format, the [`control`] messages between a worker and its daemon, the worker's [`client`], the two [`plane`]s
//! that frames travel on, [`session`]s of workers that are on neither, the job file ([`config`]), and what the system
//! allows ([`limits`]).
#![cfg_attr(not(feature = "std"), no_std)]

pub mod flame;
pub mod frame;
pub mod id;
pub mod kernel;

#[cfg(feature = "std")]
pub mod arena;
#[cfg(feature = "std")]
pub mod client;
#[cfg(feature = "std")]
pub mod config;
#[cfg(feature = "std")]
pub mod control;
#[cfg(feature = "std")]
pub mod file_kind;
#[cfg(feature = "std")]
pub mod limits;
#[cfg(feature = "std")]
pub mod plane;
#[cfg(feature = "std")]
pub mod random;
#[cfg(feature = "std")]
pub mod runtime;
#[cfg(feature = "std")]
pub mod session;
#[cfg(feature = "std")]
pub mod update;
#[cfg(feature = "std")]
pub mod watch;
