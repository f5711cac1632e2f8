//! Puts LIFL where a machine's administrator has programs that no package brought, and takes it away again.
//!
//! Nothing is started or enabled: what comes next is printed. `--destdir` puts everything below another folder, for who
//! makes a package.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

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

/// What to take away.
#[derive(Args)]
pub(crate) struct Removal {
    #[command(flatten)]
    options: Options,
    /// Take away the settings, the user and group lifl and /run/lifl too
    #[arg(long)]
    purge: bool,
}

/// Where the daemon's maps are pinned, a filesystem of its own.
const PINS: &str = "/run/lifl/pins";

/// The user of the unit, and the group whose members may connect.
const USER: &str = "lifl";

/// Where an administrator's settings are, whatever the prefix.
const SETTINGS: &str = "/etc/lifl/daemon.toml";

/// The folders with units that systemd looks into, of those that a prefix makes.
const UNIT_FOLDERS: [&str; 3] = [
    "/usr/lib/systemd/system",
    "/usr/local/lib/systemd/system",
    "/etc/systemd/system",
];

/// The programs.
const PROGRAMS: [&str; 2] = ["lifl", "lifl-daemon"];

/// The units, in the order in which they are stopped.
const UNITS: [&str; 3] = ["lifl-daemon.service", "lifl-daemon.socket", "run-lifl-pins.mount"];

/// Prefixes whose folders are not LIFL's.
const SHARED_PREFIXES: [&str; 2] = ["/usr", "/usr/local"];

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
    /// Every file of the repository but the settings.
    fn entries(&self) -> Vec<Entry> {
        let entry = |from, to: &str, mode| Entry {
            from,
            to: self.prefix.join(to),
            mode,
        };
        vec![
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

    /// Where a program goes.
    fn program(&self, name: &str) -> PathBuf {
        self.prefix.join("bin").join(name)
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
    let built = build()?;
    for name in PROGRAMS {
        let from = built
            .get(name)
            .with_context(|| format!("cargo has not built {name}"))?;
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let to = options.placed(&options.program(name));
        write(&to, &content, 0o755)?;
        println!("{}", to.display());
    }
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

/// Builds the programs, and says where cargo has put each: its target folder may be anywhere (`CARGO_TARGET_DIR`,
/// `build.target-dir`), and have a folder for each target (`build.target`).
fn build() -> Result<HashMap<String, PathBuf>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--locked",
            "--message-format",
            "json-render-diagnostics",
        ])
        .args(["-p", "lifl-daemon", "-p", "lifl-cli"])
        .current_dir(workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    ensure!(
        built.status.success(),
        "the programs do not compile ({})",
        built.status
    );
    Ok(executables(&String::from_utf8_lossy(&built.stdout)))
}

/// The programs that cargo's messages name, by name.
fn executables(messages: &str) -> HashMap<String, PathBuf> {
    let messages = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs = messages.filter_map(|message| {
        let path = message["executable"].as_str()?;
        Some((
            message["target"]["name"].as_str()?.to_owned(),
            PathBuf::from(path),
        ))
    });
    programs.collect()
}

/// Where a systemd that runs says so (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";

/// What is asked of systemd before its units go: `booted` is whether it runs.
fn disabling(booted: bool) -> Vec<Vec<&'static str>> {
    let disable = ["disable", "lifl-daemon.service", "lifl-daemon.socket"].to_vec();
    match booted {
        true => vec![[&["stop"][..], &UNITS].concat(), disable],
        false => vec![disable],
    }
}

/// Stops the units and takes them out of what is started at boot; jobs on the daemon end.
fn disable() -> Result<()> {
    for arguments in disabling(Path::new(BOOTED).exists()) {
        println!("systemctl {}", arguments.join(" "));
        match Command::new("systemctl").args(&arguments).status() {
            // Units that are not there any more are no reason to leave the files.
            Ok(status) if !status.success() => println!("systemctl has failed ({status}); going on"),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => println!("there is no systemd here"),
            Err(error) => return Err(error).context("cannot start systemctl"),
        }
    }
    unmount(Path::new(PINS))
}

/// Unmounts what no unit has: without systemd, or where somebody still has it open.
fn unmount(pins: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    if targets.any(|target| Path::new(target) == pins) {
        println!("umount --lazy {}", pins.display());
        let status = Command::new("umount").arg("--lazy").arg(pins).status();
        let status = status.context("cannot start umount")?;
        ensure!(status.success(), "{} cannot be unmounted", pins.display());
    }
    Ok(())
}

/// Takes away the user and the group, which have no other files.
fn remove_user() {
    for (command, database) in [("userdel", "passwd"), ("groupdel", "group")] {
        let there = Command::new("getent")
            .args([database, USER])
            .stdout(Stdio::null())
            .status();
        if there.is_ok_and(|status| status.success()) {
            println!("{command} {USER}");
            let done = Command::new(command).arg(USER).status();
            if !done.is_ok_and(|status| status.success()) {
                println!("{command} has failed; going on");
            }
        }
    }
}

/// Takes away what [`install`] has put there. Settings that somebody has changed stay, unless all is to go.
pub(crate) fn uninstall(Removal { options, purge }: &Removal) -> Result<()> {
    options.check()?;
    let installed = options.prefix.join("lib/systemd/system/lifl-daemon.service");
    if options.destdir.is_none() && installed.exists() {
        disable()?;
    }
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
    for name in PROGRAMS {
        remove(&options.placed(&options.program(name)))?;
    }
    let settings = options.placed(Path::new(SETTINGS));
    if *purge
        || fs::read(&settings)
            .is_ok_and(|found| read("lifl-daemon/systemd/daemon.toml").is_ok_and(|own| own == found))
    {
        remove(&settings)?;
    }
    if settings.exists() {
        println!("{} stays: it has settings of yours", settings.display());
    }
    // Only when they are empty.
    for folder in folders(options) {
        let _ = fs::remove_dir(options.placed(&folder));
    }
    // The user and the pins may be left where no file is: by an earlier removal without --purge.
    ensure!(
        found > 0 || *purge,
        "nothing of LIFL is installed below {}",
        options.prefix.display()
    );
    if options.destdir.is_none() {
        if Path::new(BOOTED).exists() {
            println!("systemctl daemon-reload");
            let _ = Command::new("systemctl").arg("daemon-reload").status();
        }
        if *purge {
            remove_user();
            let folder = Path::new("/run/lifl");
            if folder.exists() {
                fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
                println!("removed {}", folder.display());
            }
        } else {
            println!("The user and group lifl stay: --purge takes them too.");
        }
        println!("What you have put into /etc/systemd/system stays.");
    }
    Ok(())
}

/// Folders that may have been made for LIFL alone, the innermost first.
fn folders(options: &Options) -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("/etc/lifl")];
    let entries = options.entries();
    let files = entries.iter().map(|entry| entry.to.as_path());
    let program = options.program("lifl");
    for file in files.chain([program.as_path()]) {
        let above = file.ancestors().skip(1);
        // A prefix that others share keeps the folders that it has anyway.
        let shared = SHARED_PREFIXES
            .iter()
            .any(|shared| options.prefix == Path::new(shared));
        let own = above.take_while(|folder| match shared {
            true => folder.ends_with("share/doc/lifl-daemon"),
            false => folder.starts_with(&options.prefix),
        });
        folders.extend(own.map(Path::to_owned));
    }
    folders.sort_by_key(|folder| std::cmp::Reverse(folder.components().count()));
    folders.dedup();
    folders
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
            let installed = |path: &str| {
                let path = Path::new(path);
                let program = |name| options.program(name) == path;
                entries.iter().any(|entry| entry.to == path) || PROGRAMS.into_iter().any(program)
            };
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
    fn programs_are_where_cargo_says() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"lifl_common"},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"lifl"},"executable":"/else/where/x86/release/lifl"}"#,
            "\nnot JSON\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = executables(messages);
        assert_eq!(found.len(), 1);
        assert_eq!(found["lifl"], Path::new("/else/where/x86/release/lifl"));
    }

    #[test]
    fn what_is_uninstalled_leaves_no_file_and_no_empty_folder() {
        for prefix in ["/usr/local", "/opt/lifl"] {
            let destdir = tempfile::tempdir().expect("a folder");
            let options = options(prefix, destdir.path().to_str());
            for entry in options.entries() {
                let content = content(&entry, &options.prefix).expect("read");
                write(&options.placed(&entry.to), &content, entry.mode).expect("written");
            }
            for name in PROGRAMS {
                write(&options.placed(&options.program(name)), b"program", 0o755).expect("written");
            }
            let settings = options.placed(Path::new(SETTINGS));
            write(&settings, b"max_workers = 7", 0o644).expect("written");
            let mut removal = Removal {
                options,
                purge: false,
            };
            uninstall(&removal).expect("uninstalled");
            assert!(settings.exists(), "somebody's own settings stay");
            let own = read("lifl-daemon/systemd/daemon.toml").expect("the settings");
            write(&settings, &own, 0o644).expect("written");
            uninstall(&removal).expect("uninstalled");
            assert!(
                !settings.exists() && uninstall(&removal).is_err(),
                "nothing is there"
            );
            write(&settings, b"max_workers = 7", 0o644).expect("written");
            removal.purge = true;
            uninstall(&removal).expect("purged");
            assert!(!settings.exists(), "a purge takes them");
            uninstall(&removal).expect("what is no file is still to be purged");
            let placed = |path: &str| removal.options.placed(Path::new(path));
            assert!(!placed("/etc/lifl").exists() && !placed(prefix).join("share/doc/lifl-daemon").exists());
            assert_eq!(
                placed(prefix).exists(),
                prefix == "/usr/local",
                "a prefix of others stays"
            );
        }
    }

    #[test]
    fn all_units_are_stopped_and_disabled_first() {
        let units: Vec<&str> = options("/usr", None)
            .entries()
            .iter()
            .filter_map(|entry| entry.from.strip_prefix("lifl-daemon/systemd/"))
            .filter(|name| {
                [".service", ".socket", ".mount"]
                    .iter()
                    .any(|kind| name.ends_with(kind))
            })
            .collect();
        assert_eq!(units.len(), UNITS.len());
        for unit in units {
            assert!(UNITS.contains(&unit), "{unit}");
        }
        let stopped = &disabling(true)[0];
        assert_eq!(stopped[0], "stop");
        assert!(UNITS.iter().all(|unit| stopped.contains(unit)), "{stopped:?}");
        for asked in [disabling(true), disabling(false)] {
            let last = asked.last().expect("something is asked");
            assert!(last.starts_with(&["disable"]), "{last:?}");
        }
    }

    /// What a maintainer script of the package calls, in a root of its own where `mountpoint` finds the pins mounted.
    fn script(name: &str, action: &str, root: &Path) -> Vec<String> {
        let stubs = root.join("stubs");
        fs::create_dir_all(&stubs).expect("a folder");
        let calls = root.join("calls");
        for stub in [
            "systemctl",
            "deb-systemd-helper",
            "mountpoint",
            "umount",
            "userdel",
            "groupdel",
            "getent",
        ] {
            let text = format!("#!/bin/sh\necho \"${{0##*/}} $*\" >> {}\n", calls.display());
            write(&stubs.join(stub), text.as_bytes(), 0o755).expect("written");
        }
        let path = workspace().join("lifl-daemon/debian").join(name);
        let text = fs::read_to_string(&path).expect("a script");
        assert_eq!(text.matches("\n#DEBHELPER#\n").count(), 1, "{name}");
        assert_eq!(
            fs::metadata(&path).expect("there").permissions().mode() & 0o111,
            0o111
        );
        let path = format!("{}:/usr/bin:/bin", stubs.display());
        let status = Command::new("sh")
            .args(["-c", &text, name, action])
            .env("PATH", path)
            .env("DPKG_ROOT", root)
            .status();
        assert!(status.expect("a shell").success(), "{name} {action}");
        let calls = fs::read_to_string(calls).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_removed_package_leaves_no_unit_and_no_mount_and_a_purged_one_no_user_and_no_folder() {
        let called = |name: &str, action: &str| {
            let root = tempfile::tempdir().expect("a folder");
            for folder in ["run/systemd/system", "run/lifl/pins", "etc/lifl", "etc/other"] {
                fs::create_dir_all(root.path().join(folder)).expect("a folder");
            }
            let calls = script(name, action, root.path());
            let left = ["run/lifl", "etc/lifl", "etc/other"].map(|folder| root.path().join(folder).exists());
            (calls.join("\n"), left)
        };
        let (calls, _) = called("prerm", "remove");
        for unit in UNITS {
            assert!(calls.contains(unit), "{unit}: {calls}");
        }
        assert!(
            calls.contains("umount") && calls.contains("run/lifl/pins"),
            "{calls}"
        );
        let (calls, left) = called("postrm", "remove");
        assert!(
            calls.starts_with("deb-systemd-helper purge lifl-daemon.service"),
            "{calls}"
        );
        assert!(!calls.contains("userdel"), "{calls}");
        assert_eq!(left, [true, true, true]);
        let (calls, left) = called("postrm", "purge");
        assert!(
            calls.contains("userdel lifl") && calls.contains("groupdel lifl"),
            "{calls}"
        );
        assert_eq!(left, [false, false, true]);
        for (name, action) in [
            ("prerm", "upgrade"),
            ("postrm", "upgrade"),
            ("prerm", "deconfigure"),
        ] {
            assert_eq!(
                called(name, action),
                (String::new(), [true, true, true]),
                "{name} {action}"
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
