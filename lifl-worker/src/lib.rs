//! The workers' protocol, once: trainer, aggregator and coordinator as state machines that do no I/O.
//!
//! Each takes inputs (a frame, a lost peer, an object that can be read now, a timer) and gives outputs (send this frame, open
//! that arena, start that worker). Time is a value that is passed in. No socket, clock, file, process or environment is
//! touched there: shells do that, over the [`node_link`], the session with the gateway, or in one
//! process ([`local`]).

pub mod aggregator;
pub mod coordinator;
pub mod local;
pub mod node_link;
pub mod parent;
pub mod trainer;
pub mod update_info;
