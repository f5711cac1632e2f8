//! Runs the fuzz targets under libFuzzer, each for so long, and says what came of it.
//!
//! ```text
//!   fuzz/corpus/TARGET ──────┐                       ┌──▶ target/fuzz/found/TARGET   inputs that reach something new
//!                            ├──▶ libFuzzer, ASan ───┤
//!   target/fuzz/found/TARGET ┘                       └──▶ fuzz/artifacts/TARGET      inputs that break something
//!
//!   --keep: both corpora, minimised ──▶ fuzz/corpus/TARGET, as much of it as a corpus may have
//! ```

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::ebpf::workspace;

/// What one allocation may take. Datasets may be larger, but not ones that are unpacked from an input.
const MALLOC_LIMIT_MB: u32 = 256;

/// What a target may take in all, with the sanitizer's own.
const RSS_LIMIT_MB: u32 = 2048;

/// An input that takes longer hangs.
const TIMEOUT_S: u32 = 10;

/// What `fuzz/tests/replay.rs` lets a corpus have.
const CORPUS_FILES: usize = 200;
const CORPUS_BYTES: u64 = 1 << 20;

/// The longest input of each target: what its format needs to get everywhere, and no more.
const MAX_LEN: [(&str, u32); 8] = [
    ("config", 8 << 10),
    ("control_packet", 4 << 10),
    ("flame_wire", 4 << 10),
    ("frame", 4 << 10),
    ("idx", 16 << 10),
    ("image", 8 << 10),
    ("npz", 16 << 10),
    ("session", 4 << 10),
];

/// How to fuzz.
#[derive(Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Afterwards minimise each corpus, with what was found, into fuzz/corpus.
    #[arg(long)]
    keep: bool,
    /// Which targets; all of them when none is named.
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(MAX_LEN.map(|(name, _)| name)))]
    targets: Vec<String>,
}

/// What came of a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    runs: u64,
    /// Edges of the program that were reached.
    coverage: u64,
    /// What libFuzzer tells apart beyond that: how often, with which values.
    features: u64,
    new_inputs: u64,
    peak_mb: u64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    check_tools()?;
    println!("building the targets");
    let built = cargo_fuzz("build").status().context("cannot start rustup")?;
    ensure!(built.success(), "the targets cannot be built ({built})");
    let named =
        |name: &&str| options.targets.is_empty() || options.targets.iter().any(|target| target == name);
    let mut broken = Vec::new();
    for target in MAX_LEN.iter().map(|(name, _)| *name).filter(named) {
        let found = found(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        let before = artifacts(target);
        let seconds = format!("-max_total_time={}", options.seconds);
        let (status, log) = fuzz(
            target,
            &[&found, &corpus(target)],
            &[&seconds, "-print_final_stats=1"],
        )?;
        let text = fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let outcome = Outcome::of(&text);
        let crashes: Vec<PathBuf> = artifacts(target).difference(&before).cloned().collect();
        println!(
            "{target}: {} runs, coverage {} ({} features), {} new inputs, at most {} MB, {} crashes",
            outcome.runs,
            outcome.coverage,
            outcome.features,
            outcome.new_inputs,
            outcome.peak_mb,
            crashes.len()
        );
        for crash in &crashes {
            println!("  {}", crash.display());
        }
        if !status.success() {
            println!("  {status}; what it said: {}", log.display());
            broken.push(target);
        } else if options.keep {
            keep(target)?;
        }
    }
    if let [first, ..] = broken[..] {
        bail!(
            "broken: {}; to see one again: cargo +nightly fuzz run --features libfuzzer --codegen-units 8 --target-dir target/fuzz \
             {first} FILE; once it is mended, the file belongs into fuzz/corpus/{first}",
            broken.join(", ")
        );
    }
    Ok(())
}

/// What is needed beyond a plain build's.
fn check_tools() -> Result<()> {
    let nightly = rustup().args(["rustc", "--version"]).output();
    ensure!(
        nightly.is_ok_and(|output| output.status.success()),
        "fuzzing needs rustup's nightly, for the sanitizer and the coverage: rustup toolchain install nightly"
    );
    let tool = rustup().args(["cargo", "fuzz", "--version"]).output();
    ensure!(
        tool.is_ok_and(|output| output.status.success()),
        "fuzzing needs cargo-fuzz: cargo install cargo-fuzz --locked"
    );
    let compiler = std::env::var_os("CXX").unwrap_or("c++".into());
    ensure!(
        Command::new(&compiler).arg("--version").output().is_ok(),
        "fuzzing needs a C++ compiler for libFuzzer, and {} is none: sudo apt-get install g++",
        compiler.display()
    );
    Ok(())
}

/// Something of the nightly toolchain, whatever this program was started with.
fn rustup() -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly"]).current_dir(workspace());
    for variable in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
        command.env_remove(variable);
    }
    command
}

fn cargo_fuzz(what: &str) -> Command {
    let mut command = rustup();
    command.args([
        "cargo",
        "fuzz",
        what,
        "--features",
        "libfuzzer",
        "--codegen-units",
        "8",
        "--target-dir",
    ]);
    command.arg(folder());
    command
}

/// Runs a target on corpora; gives its log, in which libFuzzer's report is.
fn fuzz(target: &str, corpora: &[&Path], flags: &[&str]) -> Result<(ExitStatus, PathBuf)> {
    let log = folder().join(format!("{target}.log"));
    let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let max_len = MAX_LEN
        .iter()
        .find(|(name, _)| *name == target)
        .map_or(4096, |(_, len)| *len);
    let mut command = cargo_fuzz("run");
    command.arg(target).args(corpora).arg("--").args(flags).args([
        format!("-max_len={max_len}"),
        format!("-timeout={TIMEOUT_S}"),
        format!("-rss_limit_mb={RSS_LIMIT_MB}"),
        format!("-malloc_limit_mb={MALLOC_LIMIT_MB}"),
    ]);
    let status = command
        .stdout(file.try_clone().context("cannot share the log")?)
        .stderr(file)
        .status()
        .context("cannot start rustup")?;
    Ok((status, log))
}

/// Minimises what lies in the repository and what was found, and keeps as much as a corpus may have: inputs with a name
/// (`seed-…`, `found-…`) always, and of the rest those that reach most. What counts is which code is reached and not how
/// often: with that a corpus would be ten times as large.
fn keep(target: &str) -> Result<()> {
    let merged = folder().join("merged").join(target);
    let _ = fs::remove_dir_all(&merged);
    fs::create_dir_all(&merged).with_context(|| format!("cannot make {}", merged.display()))?;
    let (corpus, found) = (corpus(target), found(target));
    let cover = ["-set_cover_merge=1", "-use_counters=0"];
    let (status, log) = fuzz(target, &[&merged, &corpus, &found], &cover)?;
    ensure!(
        status.success(),
        "the corpus cannot be minimised: {}",
        log.display()
    );

    let (mut files, mut bytes, mut contents) = (0, 0, HashSet::new());
    for path in list(&corpus)? {
        let data = read(&path)?;
        if is_named(&path) {
            (files, bytes) = (files + 1, bytes + data.len() as u64);
            contents.insert(data);
        } else {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    let mut rest = Vec::new();
    for path in list(&merged)? {
        let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
        let written = written.with_context(|| format!("cannot read {}", path.display()))?;
        rest.push((written, path));
    }
    // libFuzzer writes first what adds most.
    rest.sort();
    let (mut kept, mut left) = (0, 0);
    for (_, path) in rest {
        let data = read(&path)?;
        if !contents.insert(data.clone()) {
            continue;
        }
        if files == CORPUS_FILES || bytes + data.len() as u64 > CORPUS_BYTES {
            left += 1;
            continue;
        }
        let to = corpus.join(path.file_name().unwrap_or_default());
        fs::write(&to, &data).with_context(|| format!("cannot write {}", to.display()))?;
        (files, bytes, kept) = (files + 1, bytes + data.len() as u64, kept + 1);
    }
    println!(
        "  fuzz/corpus/{target}: {files} files, {bytes} bytes; {kept} of them found, {left} more left out"
    );
    Ok(())
}

/// libFuzzer names an input by the SHA-1 of its content, people in words.
fn is_named(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.len() != 40 || !name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Outcome {
    /// Reads libFuzzer's report: the last status line (`#N DONE cov: C ft: F …`), and the final statistics.
    fn of(log: &str) -> Self {
        let mut outcome = Self::default();
        for line in log.lines() {
            let mut words = line.split_whitespace();
            let number = |word: Option<&str>| word.and_then(|word| word.parse().ok());
            if line.starts_with('#') {
                while let Some(word) = words.next() {
                    match word {
                        "cov:" => outcome.coverage = number(words.next()).unwrap_or(outcome.coverage),
                        "ft:" => outcome.features = number(words.next()).unwrap_or(outcome.features),
                        _ => {}
                    }
                }
                continue;
            }
            let value = match words.next() {
                Some("stat::number_of_executed_units:") => &mut outcome.runs,
                Some("stat::new_units_added:") => &mut outcome.new_inputs,
                Some("stat::peak_rss_mb:") => &mut outcome.peak_mb,
                _ => continue,
            };
            *value = number(words.next()).unwrap_or(0);
        }
        outcome
    }
}

fn folder() -> PathBuf {
    workspace().join("target/fuzz")
}

fn found(target: &str) -> PathBuf {
    folder().join("found").join(target)
}

fn corpus(target: &str) -> PathBuf {
    workspace().join("fuzz/corpus").join(target)
}

fn artifacts(target: &str) -> HashSet<PathBuf> {
    list(&workspace().join("fuzz/artifacts").join(target))
        .unwrap_or_default()
        .into_iter()
        .collect()
}

fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn a_report_of_libfuzzer_is_read() {
        let log = "INFO: Seed: 7\n#2\tINITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                   #64\tNEW    cov: 20 ft: 31 corp: 2/9b lim: 4 exec/s: 0 rss: 41Mb\n\
                   #99\tDONE   cov: 21 ft: 33 corp: 3/9b lim: 4 exec/s: 9 rss: 42Mb\nDone 99 runs in 11 second(s)\n\
                   stat::number_of_executed_units: 99\nstat::average_exec_per_sec:     9\n\
                   stat::new_units_added:          2\nstat::peak_rss_mb:              42\n";
        let expected = Outcome {
            runs: 99,
            coverage: 21,
            features: 33,
            new_inputs: 2,
            peak_mb: 42,
        };
        assert_eq!(Outcome::of(log), expected);
    }

    #[test]
    fn inputs_with_a_name_are_told_from_those_with_a_hash() {
        assert!(is_named(Path::new("fuzz/corpus/idx/seed-bomb")));
        assert!(!is_named(Path::new("da39a3ee5e6b4b0d3255bfef95601890afd80709")));
    }

    #[test]
    fn every_program_has_a_length() {
        let programs = list(&workspace().join("fuzz/fuzz_targets")).expect("the programs");
        let names = programs
            .iter()
            .map(|path| path.file_stem().unwrap_or(OsStr::new("")));
        assert!(names.eq(MAX_LEN.map(|(name, _)| OsStr::new(name))));
    }
}
