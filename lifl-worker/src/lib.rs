//! The workers' protocol, once: trainer, aggregator and coordinator as state machines that do no I/O.
//!
//! Each takes inputs (a frame, a lost peer, an object that can be read now, a timer) and gives outputs (send this frame, open
//! that arena, start that worker). Time is a value that is passed in. No socket, clock, file, process or environment is
//! touched there: shells do that, over the [`node_link`], the [`gateway_link`], and in tests in one process (`local`).

#[cfg(feature = "jobs")]
pub mod aggregator;
#[cfg(feature = "jobs")]
pub mod coordinator;
pub mod gateway_link;
#[cfg(all(test, feature = "jobs"))]
mod local;
pub mod node_link;
pub mod parent;
pub mod slots;
#[cfg(all(test, feature = "jobs"))]
mod test_job;
pub mod trainer;
