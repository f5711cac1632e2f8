//! The coordinator's decisions.

pub mod liveness;
pub mod membership;
pub mod pairing;
