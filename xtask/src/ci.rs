//! What CI runs, in the order in which a fault is cheapest to find.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::{ebpf, kernels};

pub(crate) fn run() -> Result<()> {
    step("format", cargo(["fmt", "--all", "--check"]))?;
    // All in the release profile: its proc-macros and build scripts are compiled once for everything.
    let clippy = [
        "clippy",
        "--release",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    step("clippy", cargo(clippy))?;
    // A program refuses what it was built without.
    let bare = [
        "clippy",
        "--release",
        "--package",
        "lifl-cli",
        "--no-default-features",
        "--locked",
        "--",
        "-D",
        "warnings",
    ];
    step("clippy without cargo features", cargo(bare))?;
    let mut doc = cargo([
        "doc",
        "--release",
        "--workspace",
        "--no-deps",
        "--document-private-items",
        "--locked",
    ]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    step("docs", doc)?;
    deny()?;
    println!("=== the carried eBPF objects");
    ebpf::build(&ebpf::Options::check())?;
    let mut test = cargo(["test", "--release"]);
    // What the README tells everybody to run. A test that this machine cannot run must fail here, and not pass unseen.
    test.env("LIFL_REQUIRE_KERNEL", "1");
    step("tests", test)?;
    for features in ["", "learn"] {
        let mut bare = cargo(["test", "--release", "--package", "lifl-learn", "--lib"]);
        bare.args(["--no-default-features", "--features", features]);
        step(
            &format!("tests of lifl-learn with the features {features:?}"),
            bare,
        )?;
    }
    // No default member, so not among those.
    step(
        "the tasks' own tests",
        cargo(["test", "--release", "--package", "xtask"]),
    )?;
    println!("=== other kernels");
    kernels::run(&kernels::Options::ci())
}

/// What may be linked (`deny.toml`). cargo-deny takes minutes to build, so it is used where it is, and missed aloud.
fn deny() -> Result<()> {
    let there = |mut command: Command| command.output().is_ok_and(|output| output.status.success());
    if !there(cargo(["deny", "--version"])) {
        println!(
            "=== licenses, bans and sources: NOT CHECKED, cargo-deny is not there: cargo install cargo-deny --locked"
        );
        return Ok(());
    }
    let what_we_say = ["deny", "--locked", "check", "licenses", "bans", "sources"];
    step("licenses, bans and sources", cargo(what_we_say))?;
    if there(cargo(["deny", "--locked", "fetch", "db"])) {
        let advisories = ["deny", "--locked", "check", "--disable-fetch", "advisories"];
        step("advisories", cargo(advisories))
    } else {
        println!(
            "=== advisories: NOT CHECKED, their database cannot be fetched from github.com/RustSec/advisory-db"
        );
        Ok(())
    }
}

pub(crate) fn cargo<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new(
        std::env::var_os("CARGO")
            .as_deref()
            .unwrap_or(OsStr::new("cargo")),
    );
    command.args(arguments).current_dir(ebpf::workspace());
    command
}

fn step(name: &str, mut command: Command) -> Result<()> {
    println!("=== {name}");
    let begun = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{name} failed ({status})");
    println!("=== {name}: done in {:.0?}", begun.elapsed());
    Ok(())
}
