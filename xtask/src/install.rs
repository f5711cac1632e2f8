//! Puts LIFL where a machine's administrator has programs that no package brought, and takes it away again.
//!
//! Nothing is started or enabled: what comes next is printed. `--destdir` puts everything below another folder, for who
//! makes a package.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::ebpf::workspace;

/// Where to install.
#[derive(Args)]
pub(crate) struct Options {
    /// Where programs and units go: into bin, lib and share below it
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Put everything below this folder in place of /
    #[arg(long, value_name = "FOLDER")]
    destdir: Option<PathBuf>,
}

/// Where an administrator's settings are, whatever the prefix.
const SETTINGS: &str = "/etc/lifl/daemon.toml";

/// The folders with units that systemd looks into, of those that a prefix makes.
const UNIT_FOLDERS: [&str; 3] = [
    "/usr/lib/systemd/system",
    "/usr/local/lib/systemd/system",
    "/etc/systemd/system",
];

/// A file that is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    /// In the repository.
    from: &'static str,
    /// On the machine.
    to: PathBuf,
    mode: u32,
}

impl Options {
    /// Every file but the settings.
    fn entries(&self) -> Vec<Entry> {
        let entry = |from, to: &str, mode| Entry {
            from,
            to: self.prefix.join(to),
            mode,
        };
        vec![
            entry("target/release/lifl", "bin/lifl", 0o755),
            entry("target/release/lifl-daemon", "bin/lifl-daemon", 0o755),
            entry(
                "lifl-daemon/systemd/lifl-daemon.service",
                "lib/systemd/system/lifl-daemon.service",
                0o644,
            ),
            entry(
                "lifl-daemon/systemd/lifl-daemon.socket",
                "lib/systemd/system/lifl-daemon.socket",
                0o644,
            ),
            entry(
                "lifl-daemon/systemd/run-lifl-pins.mount",
                "lib/systemd/system/run-lifl-pins.mount",
                0o644,
            ),
            entry(
                "lifl-daemon/systemd/lifl.sysusers",
                "lib/sysusers.d/lifl.conf",
                0o644,
            ),
            entry(
                "lifl-daemon/systemd/flame.conf",
                "share/doc/lifl-daemon/flame.conf",
                0o644,
            ),
            entry(
                "lifl-daemon/systemd/daemon.toml",
                "share/doc/lifl-daemon/daemon.toml",
                0o644,
            ),
            entry("README.md", "share/doc/lifl-daemon/README.md", 0o644),
        ]
    }

    /// Where that is below the folder in place of /.
    fn placed(&self, path: &Path) -> PathBuf {
        match &self.destdir {
            Some(below) => {
                let inside = path
                    .components()
                    .filter(|part| !matches!(part, Component::RootDir));
                below.join(inside.collect::<PathBuf>())
            }
            None => path.to_owned(),
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.prefix.is_absolute(),
            "--prefix must be an absolute path, not {}",
            self.prefix.display()
        );
        Ok(())
    }
}

/// Builds and installs.
pub(crate) fn install(options: &Options) -> Result<()> {
    options.check()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--locked",
            "-p",
            "lifl-daemon",
            "-p",
            "lifl-cli",
        ])
        .current_dir(workspace())
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the programs do not compile ({status})");
    for entry in options.entries() {
        let content = content(&entry, &options.prefix)?;
        let to = options.placed(&entry.to);
        write(&to, &content, entry.mode)?;
        println!("{}", to.display());
    }
    let settings = options.placed(Path::new(SETTINGS));
    if settings.exists() {
        println!("{} (kept as it is)", settings.display());
    } else {
        write(&settings, &read("lifl-daemon/systemd/daemon.toml")?, 0o644)?;
        println!("{}", settings.display());
    }
    print!("{}", next(options));
    Ok(())
}

/// Takes away what [`install`] has put there. Settings that somebody has changed stay.
pub(crate) fn uninstall(options: &Options) -> Result<()> {
    options.check()?;
    let mut found = 0;
    let mut remove = |path: &Path| match fs::remove_file(path) {
        Ok(()) => {
            found += 1;
            println!("removed {}", path.display());
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot remove {}", path.display())),
    };
    for entry in options.entries() {
        remove(&options.placed(&entry.to))?;
    }
    let settings = options.placed(Path::new(SETTINGS));
    if fs::read(&settings)
        .is_ok_and(|found| read("lifl-daemon/systemd/daemon.toml").is_ok_and(|own| own == found))
    {
        remove(&settings)?;
    }
    if settings.exists() {
        println!("{} stays: it has settings of yours", settings.display());
    }
    // Only when they are empty.
    for folder in [
        options.prefix.join("share/doc/lifl-daemon"),
        PathBuf::from("/etc/lifl"),
    ] {
        let _ = fs::remove_dir(options.placed(&folder));
    }
    ensure!(
        found > 0,
        "nothing of LIFL is installed below {}",
        options.prefix.display()
    );
    if options.destdir.is_none() {
        println!(
            "\nWhat runs goes on until you stop it:\n  \
             sudo systemctl stop lifl-daemon.service lifl-daemon.socket run-lifl-pins.mount\n  \
             sudo systemctl daemon-reload"
        );
    }
    Ok(())
}

/// A file as it is installed: units name the programs where they are.
fn content(entry: &Entry, prefix: &Path) -> Result<Vec<u8>> {
    let content = read(entry.from)?;
    if !entry.from.starts_with("lifl-daemon/systemd/") || prefix == Path::new("/usr") {
        return Ok(content);
    }
    let text = String::from_utf8(content).with_context(|| format!("{} is no text", entry.from))?;
    let share = format!("{}/share/doc", prefix.display());
    let text = text.replace(
        "/usr/bin/lifl-daemon",
        &format!("{}/bin/lifl-daemon", prefix.display()),
    );
    Ok(text.replace("/usr/share/doc", &share).into_bytes())
}

fn read(path: &str) -> Result<Vec<u8>> {
    fs::read(workspace().join(path)).with_context(|| format!("cannot read {path}"))
}

/// Writes beside and renames, so that a program that runs is replaced and not written into.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let Some(folder) = path.parent() else {
        bail!("{} has no folder", path.display())
    };
    let beside = folder.join(".lifl-install");
    let written = fs::create_dir_all(folder)
        .and_then(|()| fs::write(&beside, content))
        .and_then(|()| fs::set_permissions(&beside, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&beside, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&beside);
        let hint = match error.kind() {
            io::ErrorKind::PermissionDenied => " (as root, or give --prefix or --destdir)",
            _ => "",
        };
        anyhow::Error::new(error).context(format!("cannot write {}{hint}", path.display()))
    })
}

/// What an administrator does next.
fn next(options: &Options) -> String {
    if options.destdir.is_some() {
        return String::new();
    }
    let mut text = String::from(
        "\nNext:\n  \
         sudo systemd-sysusers                                  # the user and group lifl\n  \
         sudo systemctl daemon-reload\n  \
         sudo systemctl enable --now lifl-daemon.socket         # the daemon comes with the first job\n  \
         sudo usermod -aG lifl \"$USER\"                          # who may run jobs on it; at the next login\n  \
         lifl doctor\n",
    );
    let units = options.prefix.join("lib/systemd/system");
    if !UNIT_FOLDERS.iter().any(|folder| units == Path::new(folder)) {
        text.push_str(&format!(
            "systemd does not look into {}: `sudo systemctl link` the units there first\n",
            units.display()
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(prefix: &str, destdir: Option<&str>) -> Options {
        Options {
            prefix: prefix.into(),
            destdir: destdir.map(PathBuf::from),
        }
    }

    #[test]
    fn everything_that_a_unit_names_is_installed_where_it_says() {
        for prefix in ["/usr", "/usr/local", "/opt/lifl"] {
            let options = options(prefix, None);
            let entries = options.entries();
            let installed = |path: &str| entries.iter().any(|entry| entry.to == Path::new(path));
            for entry in entries
                .iter()
                .filter(|entry| entry.from.contains("/systemd/lifl-daemon."))
            {
                let text = String::from_utf8(content(entry, &options.prefix).expect("read")).expect("text");
                let mut named = 0;
                for line in text.lines() {
                    let path = line
                        .strip_prefix("ExecStart=")
                        .or(line.strip_prefix("Documentation=file://"));
                    if let Some(path) = path.and_then(|path| path.split(' ').next()) {
                        assert!(installed(path), "{prefix}: {path}");
                        named += 1;
                    }
                }
                assert!(named > 0, "{}", entry.from);
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_installed() {
        let options = options("/usr", None);
        for file in fs::read_dir(workspace().join("lifl-daemon/systemd")).expect("a folder") {
            let name = file.expect("a file").file_name();
            let name = name.to_str().expect("a name");
            assert!(
                options.entries().iter().any(|entry| entry.from.ends_with(name)),
                "{name} is not installed"
            );
        }
    }

    #[test]
    fn a_destdir_takes_the_place_of_the_root() {
        let options = options("/usr/local", Some("/tmp/package"));
        assert_eq!(
            options.placed(Path::new("/etc/lifl/daemon.toml")),
            Path::new("/tmp/package/etc/lifl/daemon.toml")
        );
        assert!(next(&options).is_empty());
    }

    #[test]
    fn who_installs_elsewhere_is_told_how_systemd_finds_the_units() {
        assert!(next(&options("/opt/lifl", None)).contains("systemctl link"));
        let usual = next(&options("/usr/local", None));
        assert!(!usual.contains("systemctl link"), "{usual}");
        assert!(usual.contains("enable --now lifl-daemon.socket"), "{usual}");
        assert!(options("relative", None).check().is_err());
    }
}
