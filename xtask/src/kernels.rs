//! Runs the kernel's part of the tests, and jobs, under other kernels than this machine's: Debian's, in QEMU.

mod guest;
mod initramfs;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::ci::cargo;
use crate::ebpf::{on_path, output, workspace};

/// A kernel of Debian's, and the suite that has it.
#[derive(Clone, Copy)]
struct Kernel {
    /// Major and minor number.
    series: &'static str,
    /// Where its archive is below the mirror, and the suite there.
    archive: &'static str,
    suite: &'static str,
    /// What its guest runs.
    check: &'static str,
}

/// The one below the floor, and those above it that Debian has.
const KERNELS: [Kernel; 3] = [
    Kernel {
        series: "5.10",
        archive: "debian",
        suite: "bullseye",
        check: include_str!("kernels/refused.sh"),
    },
    Kernel {
        series: "6.1",
        archive: "debian",
        suite: "bookworm",
        check: include_str!("kernels/check.sh"),
    },
    Kernel {
        series: "6.12",
        archive: "debian-security",
        suite: "bookworm-security",
        check: include_str!("kernels/check.sh"),
    },
];

/// Boots Debian's kernels under QEMU, with this machine's programs, and runs there what depends on a kernel.
///
/// On 6.1 and 6.12: the daemon's test programs `planes` and `flame` as root, a daemon with nothing but what systemd's unit
/// grants, a job on its kernel plane, and one on the relay. On 5.10, which is below the floor: that doctor and daemon
/// refuse it by name, and that a job runs on the relay.
///
/// A guest has an initramfs of busybox and the programs under test; it needs no disk, no network and no KVM, is 10 to 40 times
/// slower than its host, and leaves nothing behind. Its console is shown, and kept in target/kernels. Each kernel is the newest
/// cloud kernel of its series in Debian's archive, which is asked anew each time.
///
/// Needs, on Debian or Ubuntu: apt-get install --no-install-recommends qemu-system-x86 busybox-static
///
/// Where that, or the archive, cannot be had, a line says what is missing and nothing is run; with LIFL_REQUIRE_KERNEL=1, as
/// in CI, this task fails instead.
///
/// Examples:
///
///   cargo xtask kernels
///
///   cargo xtask kernels --kernel 6.1 --filter padded
///
///   cargo xtask kernels --kernel 6.12 --script my-script.sh      (/bin has lifl, lifl-daemon, planes, flame, setpriv)
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Options {
    /// Only this series; may be given more than once.
    #[arg(long, value_name = "SERIES", value_parser = KERNELS.map(|kernel| kernel.series))]
    kernel: Vec<String>,
    /// Only those tests of `planes` and `flame` whose names contain this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// A script for the guest's shell in place of the usual one.
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// How long one guest may take.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Where Debian's archives are.
    #[arg(long, value_name = "URL", default_value = "http://deb.debian.org")]
    mirror: String,
}

impl Options {
    pub(crate) fn ci() -> Self {
        Self {
            kernel: Vec::new(),
            filter: String::new(),
            script: None,
            seconds: 600,
            mirror: "http://deb.debian.org".to_owned(),
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let chosen =
        |kernel: &&Kernel| options.kernel.is_empty() || options.kernel.iter().any(|k| k == kernel.series);
    let kernels: Vec<&Kernel> = KERNELS.iter().filter(chosen).collect();
    let folder = workspace().join("target/kernels");
    let images = missing().map_or(Ok(()), |what| bail!(what)).and_then(|()| {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        kernels
            .iter()
            .map(|kernel| fetch(kernel, options, &folder))
            .collect::<Result<Vec<_>>>()
    });
    let images = match images {
        Ok(images) => images,
        Err(error) if env::var_os("LIFL_REQUIRE_KERNEL").is_none() => {
            println!("=== other kernels: NOT RUN, {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error.context("other kernels cannot be run")),
    };
    let programs = programs()?;
    for (kernel, image) in kernels.iter().zip(images) {
        let check = match &options.script {
            Some(script) => {
                fs::read_to_string(script).with_context(|| format!("cannot read {}", script.display()))?
            }
            None => kernel.check.to_owned(),
        };
        println!("=== Linux {} ({})", kernel.series, image.package);
        let guest = guest::Guest {
            image: &image,
            programs: &programs,
            check: &check,
            environment: &[("KERNEL", kernel.series), ("FILTER", &options.filter)],
            console: folder.join(format!("{}.log", kernel.series)),
            limit: Duration::from_secs(options.seconds),
        };
        guest
            .run()
            .with_context(|| format!("under Linux {}", kernel.series))?;
    }
    Ok(())
}

/// What this machine lacks, with the remedy.
fn missing() -> Option<String> {
    let tools = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("setpriv", "util-linux"),
        ("apt-get", "apt"),
        ("dpkg-deb", "dpkg"),
        ("ldd", "libc-bin"),
    ];
    let missing: Vec<(&str, &str)> = tools
        .into_iter()
        .filter(|(tool, _)| on_path(tool).is_none())
        .collect();
    if missing.is_empty() {
        return None;
    }
    let (tools, packages): (Vec<&str>, Vec<&str>) = missing.into_iter().unzip();
    Some(format!(
        "{} not found: sudo apt-get install --no-install-recommends {}",
        tools.join(" and "),
        packages.join(" ")
    ))
}

/// A kernel that was fetched.
struct Image {
    package: String,
    vmlinuz: PathBuf,
    /// Where `lib/modules` is.
    root: PathBuf,
}

/// The newest cloud kernel of a series, unpacked; it is downloaded once.
fn fetch(kernel: &Kernel, options: &Options, folder: &Path) -> Result<Image> {
    let apt = Apt::new(kernel, options, folder)?;
    let pattern = format!(
        r"^linux-image-{}\.[0-9].*-cloud-amd64$",
        kernel.series.replace('.', r"\.")
    );
    let found = apt.run("apt-cache", &["search", "--names-only", &pattern])?;
    let names = found.lines().filter_map(|line| line.split_whitespace().next());
    let package = names
        .max_by_key(|name| numbers(name))
        .with_context(|| format!("{} has no cloud kernel of {}", apt.url, kernel.series))?
        .to_owned();
    let root = folder.join(&package);
    if !root.join("boot").exists() {
        let downloads = folder.join(format!("download-{package}"));
        fs::create_dir_all(&downloads)?;
        apt.run_in(&downloads, "apt-get", &["download", "-qq", &package])?;
        let deb = fs::read_dir(&downloads)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("{package} was not downloaded"))?;
        let unpacked = downloads.join("root");
        output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&unpacked))?;
        fs::rename(&unpacked, &root).with_context(|| format!("cannot make {}", root.display()))?;
        fs::remove_dir_all(&downloads)?;
    }
    let vmlinuz = fs::read_dir(root.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
        })
        .with_context(|| format!("{package} has no vmlinuz"))?;
    Ok(Image {
        package,
        vmlinuz,
        root,
    })
}

/// The numbers in a name, by which versions are ordered.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// apt with one suite and folders of its own: the machine's own lists stay as they are, and nobody need be root.
struct Apt {
    url: String,
    settings: Vec<String>,
}

impl Apt {
    fn new(kernel: &Kernel, options: &Options, folder: &Path) -> Result<Self> {
        let own = folder.join(format!("apt-{}", kernel.suite));
        for below in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(own.join(below))?;
        }
        let url = format!("{}/{}", options.mirror, kernel.archive);
        let sources = own.join("sources.list");
        let line = format!(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg arch=amd64] {url} {} main\n",
            kernel.suite
        );
        fs::write(&sources, line)?;
        let set = |name: &str, value: String| ["-o".to_owned(), format!("{name}={value}")];
        let settings = [
            set("Dir::Etc::sourcelist", sources.display().to_string()),
            set("Dir::Etc::sourceparts", "-".to_owned()),
            set("Dir::State::lists", own.join("lists").display().to_string()),
            set("Dir::Cache", own.join("cache").display().to_string()),
            set("APT::Sandbox::User", String::new()),
            set("Acquire::Languages", "none".to_owned()),
            set("Acquire::Retries", "3".to_owned()),
        ];
        let apt = Self {
            url,
            settings: settings.concat(),
        };
        apt.run("apt-get", &["update", "-qq"])
            .with_context(|| format!("the suite {} of {} cannot be had", kernel.suite, apt.url))?;
        Ok(apt)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_in(Path::new("."), program, arguments)
    }

    fn run_in(&self, folder: &Path, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        output(command.args(&self.settings).args(arguments).current_dir(folder))
    }
}

/// The programs that a guest gets, by their names there.
fn programs() -> Result<Vec<(String, PathBuf)>> {
    let built = cargo(["build", "--release", "--bins"])
        .status()
        .context("cannot start cargo")?;
    ensure!(built.success(), "the programs cannot be built");
    let tests = [
        "test",
        "--release",
        "--package",
        "lifl-daemon",
        "--test",
        "planes",
        "--test",
        "flame",
        "--no-run",
        "--message-format",
        "json",
    ];
    let mut programs: Vec<(String, PathBuf)> = Vec::new();
    for line in output(&mut cargo(tests))?.lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo's messages")?;
        let test = message["target"]["kind"][0] == "test";
        if let (true, Some(name), Some(path)) = (
            test,
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
        ) {
            programs.push((name.to_owned(), path.into()));
        }
    }
    ensure!(
        programs.len() == 2,
        "cargo named {} test programs instead of two",
        programs.len()
    );
    let target = programs[0]
        .1
        .ancestors()
        .nth(2)
        .context("no target folder")?
        .to_owned();
    for name in ["lifl", "lifl-daemon"] {
        programs.push((name.to_owned(), target.join(name)));
    }
    for name in ["bash", "setpriv", "busybox"] {
        let path = on_path(name).with_context(|| format!("{name} is not there"))?;
        programs.push((name.to_owned(), path));
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_series_has_the_largest_numbers() {
        let names = [
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.38+deb12-cloud-amd64",
        ];
        assert_eq!(names.into_iter().max_by_key(|name| numbers(name)), Some(names[1]));
        assert!(numbers("linux-image-6.1.0-9-cloud-amd64") < numbers("linux-image-6.1.0-56-cloud-amd64"));
    }
}
