//! `lifl-daemon` as a process, on a machine with users, limits and a service manager.

#[path = "../../../lifl-cli/tests/support/cgroup.rs"]
mod cgroup;
mod full;
mod greedy;
mod limits;
mod output;
mod process;
mod supervised;
mod user;
mod users;
