//! `lifl-daemon` as a process, on a machine with users, limits and a service manager.

mod full;
mod greedy;
mod output;
mod process;
mod supervised;
mod user;
mod users;
