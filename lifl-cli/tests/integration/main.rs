//! Whole runs of the program, each as its user starts it. What the tests are about is in the modules' names.

mod agreement;
mod bad_input;
mod bench;
#[path = "../support/cgroup.rs"]
mod cgroup;
mod data;
mod environment;
mod faults;
mod gateway;
mod hostile;
mod limits;
mod mqtt;
mod optimizers;
mod restart;
mod resume;
mod root;
mod runs;
#[path = "../support/mod.rs"]
mod support;
