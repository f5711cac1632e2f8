//! Compiles `lifl-ebpf` to the objects that the daemon carries.
//!
//! A plain build takes the objects as they lie in the repository, so that it needs neither a nightly compiler nor
//! LLVM. `--check` proves that they are what the source compiles to: the same compiler gives the same bytes, wherever
//! the checkout, the registry and the target folder are.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

const TARGET: &str = "bpfel-unknown-none";
const PROFILE: &str = "bpf";
/// Each program of the crate, and its object.
const OBJECTS: [(&str, &str); 3] = [
    ("lifl-ebpf", "lifl-ebpf/lifl.bpf.o"),
    ("lifl-flame", "lifl-ebpf/flame.bpf.o"),
    ("lifl-bare", "lifl-ebpf/bare.bpf.o"),
];
/// What made the objects, beside them.
const TOOLCHAIN: &str = "lifl-ebpf/bpf.toolchain";

/// How to build.
#[derive(Args)]
pub(crate) struct Options {
    /// Build elsewhere, and fail unless the results are the carried objects.
    #[arg(long)]
    check: bool,
    /// Which compiler to use.
    #[arg(long, value_enum, default_value_t)]
    toolchain: Choice,
}

impl Options {
    pub(crate) fn check() -> Self {
        Self {
            check: true,
            toolchain: Choice::Auto,
        }
    }
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// Debian's where it is installed, since the carried object is built with it; else the nightly.
    #[default]
    Auto,
    /// Debian 12's rustc-web and cargo-web, with the source in rust-web-src.
    Debian,
    /// rustup's nightly, with its component rust-src.
    Nightly,
}

/// A compiler that can build `core` from source.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
}

pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

pub(crate) fn build(options: &Options) -> Result<()> {
    let toolchain = toolchain(options.toolchain)?;
    let made_with = toolchain.describe()?;
    println!("building with {}", made_with.trim().replace('\n', ", "));
    let target = workspace().join("target/ebpf");
    toolchain.compile(&target)?;
    for (program, carried) in OBJECTS {
        let built = target.join(TARGET).join(PROFILE).join(program);
        let object = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
        if options.check {
            compare(carried, &object, &made_with)?;
        } else {
            write(carried, &object)?;
            println!("{carried}: {} bytes", object.len());
        }
    }
    if !options.check {
        write(TOOLCHAIN, made_with.as_bytes())?;
    }
    Ok(())
}

fn compare(path: &str, object: &[u8], made_with: &str) -> Result<()> {
    let carried = fs::read(workspace().join(path)).with_context(|| format!("cannot read {path}"))?;
    if carried == object {
        println!("{path} is what the source compiles to ({} bytes)", object.len());
        return Ok(());
    }
    let carried_with = fs::read_to_string(workspace().join(TOOLCHAIN)).unwrap_or_default();
    let indent = |lines: &str| lines.trim().replace('\n', "\n    ");
    if carried_with != made_with {
        bail!(
            "{path} differs from what the source compiles to here, but it was made with another toolchain:\n    \
             {}\n  and this is\n    {}\n  which may be all of the difference; use the same, or rebuild it: \
             cargo xtask build-ebpf",
            indent(&carried_with),
            indent(made_with)
        );
    }
    bail!("{path} is not what the source compiles to; rebuild and commit it: cargo xtask build-ebpf")
}

fn write(path: &str, bytes: &[u8]) -> Result<()> {
    fs::write(workspace().join(path), bytes).with_context(|| format!("cannot write {path}"))
}

fn toolchain(choice: Choice) -> Result<Toolchain> {
    let found = match choice {
        Choice::Debian => debian(),
        Choice::Nightly => nightly(),
        Choice::Auto => debian().or_else(|debian| {
            nightly().with_context(|| format!("no compiler for eBPF: either\n  {debian}\nor"))
        }),
    }?;
    ensure!(
        on_path("bpf-linker").is_some(),
        "bpf-linker is not there; with Debian 12's compiler:\n  \
         sudo apt-get install llvm-22-dev libpolly-22-dev && LLVM_PREFIX=/usr/lib/llvm-22 cargo install \
         bpf-linker --version 0.13.0 --no-default-features --features llvm-22\nwith another:\n  \
         cargo install bpf-linker"
    );
    Ok(found)
}

fn debian() -> Result<Toolchain> {
    let found = Toolchain {
        cargo: "/usr/bin/cargo".into(),
        rustc: "/usr/bin/rustc".into(),
    };
    ensure!(
        found.cargo.exists() && found.rustc.exists() && found.has_source(),
        "Debian 12's compiler with its source: sudo apt-get install rustc-web cargo-web rust-web-src"
    );
    Ok(found)
}

fn nightly() -> Result<Toolchain> {
    let which = |tool| {
        let mut rustup = Command::new("rustup");
        clean(&mut rustup);
        let path = output(rustup.args(["which", "--toolchain", "nightly", tool]))?;
        anyhow::Ok(PathBuf::from(path.trim()))
    };
    let missing = "rustup's nightly: rustup toolchain install nightly --component rust-src";
    let found = Toolchain {
        cargo: which("cargo").context(missing)?,
        rustc: which("rustc").context(missing)?,
    };
    ensure!(
        found.has_source(),
        "rustup's nightly has no source: rustup component add rust-src --toolchain nightly"
    );
    Ok(found)
}

impl Toolchain {
    fn sysroot(&self) -> Result<PathBuf> {
        let mut rustc = Command::new(&self.rustc);
        clean(&mut rustc);
        Ok(output(rustc.args(["--print", "sysroot"]))?.trim().into())
    }

    fn has_source(&self) -> bool {
        let library = "lib/rustlib/src/rust/library/core/src/lib.rs";
        self.sysroot().is_ok_and(|sysroot| sysroot.join(library).exists())
    }

    /// Versions, a line each: what may make an object differ.
    fn describe(&self) -> Result<String> {
        let mut rustc = Command::new(&self.rustc);
        clean(&mut rustc);
        let verbose = output(rustc.arg("-vV"))?;
        let field = |name| {
            verbose
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap_or("unknown")
                .trim()
        };
        let linker = output(Command::new("bpf-linker").arg("--version"))?;
        Ok(format!(
            "rustc {} ({})\nLLVM {}\n{}\n",
            field("release:"),
            field("commit-hash:"),
            field("LLVM version:"),
            linker.lines().next().unwrap_or("bpf-linker unknown").trim()
        ))
    }

    /// Compiles all programs.
    fn compile(&self, target: &Path) -> Result<()> {
        let mut cargo = Command::new(&self.cargo);
        clean(&mut cargo);
        cargo
            .current_dir(workspace())
            .env("RUSTC", &self.rustc)
            // Debian's compiler is a stable one; building `core` is not.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags()?)
            .args([
                "build",
                "--locked",
                "--package",
                "lifl-ebpf",
                "--profile",
                PROFILE,
            ])
            .args(["-Z", "build-std=core", "--target", TARGET, "--target-dir"])
            .arg(target);
        let status = cargo
            .status()
            .with_context(|| format!("cannot start {}", self.cargo.display()))?;
        ensure!(status.success(), "lifl-ebpf does not compile ({status})");
        Ok(())
    }

    /// Compiler flags that keep this machine's paths out of the objects.
    fn flags(&self) -> Result<OsString> {
        let home = env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home
            .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
            .context("no home folder")?;
        let mut flags = OsString::new();
        for (from, to) in [
            (self.sysroot()?, "/rust"),
            (home, "/cargo"),
            (workspace().into(), "/lifl"),
        ] {
            if !flags.is_empty() {
                flags.push("\x1f");
            }
            flags.push("--remap-path-prefix=");
            flags.push(from);
            flags.push("=");
            flags.push(to);
        }
        Ok(flags)
    }
}

/// Takes away what the cargo that runs this task, or its user, has set to choose another compiler or other flags.
fn clean(command: &mut Command) {
    let kept = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "RUSTUP_HOME",
        "RUST_BACKTRACE",
    ];
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let about_rust = text.starts_with("CARGO") || text.starts_with("RUST");
        if about_rust && !kept.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
}

pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

pub(crate) fn on_path(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|folder| folder.join(tool))
        .find(|tool| tool.is_file())
}
