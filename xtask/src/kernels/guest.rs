//! One guest: an initramfs of the programs, QEMU, and what it says on its console.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Image;
use super::initramfs::Initramfs;
use crate::ebpf::{output, workspace};

/// What PID 1 of the guest does before it runs `/etc/check.sh`.
const INIT: &str = include_str!("init.sh");

/// Where it is: like the check, not in a place where the clone's own folder can be.
const INIT_PATH: &str = "/etc/init.sh";

/// The last line of a guest that was not cut short, before its exit code.
const END: &str = "guest: exit ";

/// The job that it runs: lazy, so that its model is the same on each plane.
const JOB: &str = "mnist_two_level_lazy.json";

/// Modules that a machine loads by itself when somebody asks for sockets, in the order of their dependence.
const MODULES: [&str; 2] = ["inet_diag", "tcp_diag"];

pub(super) struct Guest<'a> {
    pub(super) image: &'a Image,
    pub(super) programs: &'a [(String, PathBuf)],
    /// A script for its shell.
    pub(super) check: &'a str,
    pub(super) environment: &'a [(&'a str, &'a str)],
    /// Where its console is kept.
    pub(super) console: PathBuf,
    pub(super) limit: Duration,
}

impl Guest<'_> {
    /// Boots it and waits for its end.
    pub(super) fn run(&self) -> Result<()> {
        let initramfs = self.console.with_extension("cpio");
        self.pack(&initramfs)?;
        let begun = Instant::now();
        let ended = self.boot(&initramfs);
        fs::remove_file(&initramfs)?;
        let code = ended?;
        ensure!(
            code == "0",
            "the guest's check failed ({code}); its console is in {}",
            self.console.display()
        );
        println!("=== done in {:.0?}", begun.elapsed());
        Ok(())
    }

    fn pack(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| format!("cannot make {}", to.display()))?;
        let mut root = Initramfs::new(BufWriter::new(file));
        for folder in ["dev", "proc", "sys", "tmp", "run", "etc", "root"] {
            root.folder(folder)?;
        }
        let mut libraries = BTreeSet::new();
        for (name, path) in self.programs {
            // Symbols are most of a test program, and a guest's memory holds it twice.
            root.file(&format!("bin/{name}"), &stripped(path)?)?;
            libraries.extend(libraries_of(path)?);
            // Where a test program was told that the others are.
            let (here, there) = (path.display().to_string(), format!("/bin/{name}"));
            if here != there {
                root.link(&here, &there)?;
            }
        }
        for library in &libraries {
            root.copy(library, &library.display().to_string())?;
        }
        let applets = output(Command::new("busybox").arg("--list"))?;
        let own = |applet: &&str| self.programs.iter().all(|(name, _)| name != applet);
        for applet in applets.lines().filter(own) {
            root.link(&format!("bin/{applet}"), "busybox")?;
        }
        for module in MODULES {
            if let Some(content) = self.module(module)? {
                root.file(&format!("modules/{module}.ko"), &content)?;
            }
        }
        root.file(
            "etc/passwd",
            b"root:x:0:0::/root:/bin/sh\ntester:x:1000:1000::/tmp:/bin/sh\n",
        )?;
        root.file("etc/group", b"root:x:0:\ntester:x:1000:\n")?;
        let job = workspace().join("configs").join(JOB);
        let job = fs::read_to_string(&job).with_context(|| format!("cannot read {}", job.display()))?;
        // A network that a slow guest can train.
        ensure!(job.contains(r#""model": "cnn""#), "{JOB} has another model");
        root.file(
            "etc/job.json",
            job.replace(r#""model": "cnn""#, r#""model": "softmax""#)
                .as_bytes(),
        )?;
        root.file(INIT_PATH, INIT.as_bytes())?;
        let environment: String = self
            .environment
            .iter()
            .map(|(name, value)| format!("export {name}='{value}'\n"))
            .collect();
        root.file("/etc/check.sh", format!("{environment}{}", self.check).as_bytes())?;
        root.finish()?;
        Ok(())
    }

    /// A module's content; `None` where it is part of the kernel.
    fn module(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let mut folders = vec![self.image.root.join("lib/modules")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let path = entry?.path();
                let file = path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if file == format!("{name}.ko") {
                    return Ok(Some(fs::read(path)?));
                } else if file == format!("{name}.ko.xz") {
                    let unpacked = Command::new("busybox").args(["xz", "-dc"]).arg(&path).output()?;
                    ensure!(unpacked.status.success(), "cannot unpack {}", path.display());
                    return Ok(Some(unpacked.stdout));
                }
            }
        }
        Ok(None)
    }

    /// Runs QEMU until it ends or its time is over; what its check ended with.
    fn boot(&self, initramfs: &Path) -> Result<String> {
        let mut qemu = Command::new("qemu-system-x86_64");
        // Without KVM, which a machine may lack or have only in part: a slow guest shows what only happens to be in time.
        qemu.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "3072",
        ])
        .args(["-nographic", "-no-reboot", "-nic", "none"])
        .arg("-append")
        .arg(format!("console=ttyS0 quiet panic=1 rdinit={INIT_PATH}"))
        .arg("-kernel")
        .arg(&self.image.vmlinuz)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
        let mut qemu = Running(qemu.spawn().context("cannot start qemu-system-x86_64")?);
        let console = qemu.0.stdout.take().context("no console")?;
        let (lines, shown) = mpsc::channel();
        let reader = thread::spawn(move || {
            let mut console = BufReader::new(console);
            let mut line = Vec::new();
            while console.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                if lines.send(plain(&line)).is_err() {
                    break;
                }
                line.clear();
            }
        });
        let mut kept =
            File::create(&self.console).with_context(|| format!("cannot make {}", self.console.display()))?;
        let deadline = Instant::now() + self.limit;
        let mut code = None;
        let mut begun = false;
        loop {
            match shown.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    writeln!(kept, "{line}")?;
                    begun |= line.contains("Linux version");
                    if begun {
                        println!("  {line}");
                    }
                    if let Some((_, ended)) = line.split_once(END) {
                        code = Some(ended.trim().to_owned());
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => bail!(
                    "the guest did not end within {} s (--seconds); its console is in {}",
                    self.limit.as_secs(),
                    self.console.display()
                ),
            }
        }
        // The console is closed, so its reader has ended.
        let _ = reader.join();
        code.with_context(|| format!("the guest died; its console is in {}", self.console.display()))
    }
}

/// QEMU, ended when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program without its symbols, where `strip` is there.
fn stripped(path: &Path) -> Result<Vec<u8>> {
    let copy = tempfile(path)?;
    let done = Command::new("strip").arg("-o").arg(&copy).arg(path).output();
    let from = if done.is_ok_and(|done| done.status.success()) {
        &copy
    } else {
        path
    };
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()));
    let _ = fs::remove_file(&copy);
    content
}

fn tempfile(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .context("no file name")?
        .to_string_lossy()
        .into_owned();
    Ok(workspace()
        .join("target/kernels")
        .join(format!("stripped-{name}")))
}

/// The shared libraries of a program, its interpreter among them.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot start ldd")?;
    // A static program has none, and ldd says so by failing.
    Ok(String::from_utf8_lossy(&listed.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// A console's line without its end and without the sequences that move a cursor.
fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // ESC [ parameters letter
            if chars.next() == Some('[') {
                chars.by_ref().find(char::is_ascii_alphabetic);
            }
        } else if !c.is_control() {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_line_is_text() {
        assert_eq!(plain(b"\x1b[1;31mred\x1b[0m\x1b[K line\r\n"), "red line");
        assert_eq!(plain(b"\x1b"), "");
    }
}
