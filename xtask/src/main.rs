//! Tasks of LIFL's developers: `cargo xtask --help`.

mod chaos;
mod ci;
mod ebpf;
mod fuzz;
mod install;
mod kernels;
mod simulate;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Tasks of LIFL's developers.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compile the SK_MSG programs to the objects that the daemon carries, lifl-ebpf/*.bpf.o.
    BuildEbpf(ebpf::Options),
    /// Run what CI runs.
    Ci,
    /// Build, and install the programs, systemd's units and the settings.
    Install(install::Options),
    /// Take away what `install` has put there.
    Uninstall(install::Removal),
    /// Kill, stop and delay the workers of jobs, and the daemon, at random: nothing may be lost, nothing left.
    Chaos(chaos::Options),
    /// Simulate jobs, of the shipped coordinator, aggregators and trainers, in which workers die at any moment.
    Simulate(simulate::Options),
    /// Run what depends on the kernel under other kernels, in QEMU.
    Kernels(kernels::Options),
    /// Run the fuzz targets under libFuzzer: needs rustup's nightly and cargo-fuzz.
    Fuzz(fuzz::Options),
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::BuildEbpf(options) => ebpf::build(&options),
        Task::Ci => ci::run(),
        Task::Install(options) => install::install(&options),
        Task::Uninstall(options) => install::uninstall(&options),
        Task::Chaos(options) => chaos::run(&options),
        Task::Simulate(options) => simulate::run(&options),
        Task::Kernels(options) => kernels::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
    }
}
