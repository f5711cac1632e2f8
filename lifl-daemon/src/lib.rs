//! LIFL's node daemon, as a library so that `lifl run` can run one inside itself.

pub mod plane;
