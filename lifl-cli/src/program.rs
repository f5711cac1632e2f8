//! This program, to be started again: workers, the processes of a bench, a detached run.
//!
//! It is started from `/proc/self/exe`, the file that this process runs: whether that was replaced or removed meanwhile (by
//! an upgrade, say) does not matter, and both ends speak the same protocol. Only where `/proc` is not mounted the path counts
//! by which it was started.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// The file of the process that looks at it.
const SELF: &str = "/proc/self/exe";

/// What it is called in lists of processes, whatever the path that it was started from.
const NAME: &std::ffi::CStr = c"lifl";

/// A command that starts this program again.
///
/// # Errors
/// If its file cannot be found: `/proc` is not mounted, and it is not where it was started from.
pub(crate) fn command() -> anyhow::Result<Command> {
    let mut command = Command::new(file()?);
    use std::os::unix::process::CommandExt as _;
    // `ps` shows a path that a person knows.
    command.arg0(started_as().unwrap_or_else(|| PathBuf::from("lifl")));
    Ok(command)
}

fn file() -> anyhow::Result<PathBuf> {
    // The link itself: what it says is a path, which may lead to another program by now.
    if Path::new(SELF).symlink_metadata().is_ok() {
        return Ok(PathBuf::from(SELF));
    }
    let found = started_as().filter(|path| path.is_file());
    found.context("cannot find this program's own file: mount /proc, or start it by its full path")
}

/// The path by which this process was started, found as the shell finds it.
fn started_as() -> Option<PathBuf> {
    let name = std::env::args_os().next().filter(|name| !name.is_empty())?;
    let path = Path::new(&name);
    if path.is_absolute() {
        return Some(path.to_owned());
    }
    if path.components().count() > 1 {
        return Some(std::env::current_dir().ok()?.join(path));
    }
    in_path(&name, &std::env::var_os("PATH")?)
}

fn in_path(name: &OsStr, folders: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(folders)
        .map(|folder| folder.join(name))
        .find(|path| path.is_absolute() && path.is_file())
}

/// Names this process, which else is called after the link that it was started from. To be called before there are threads,
/// since each has a name of its own.
pub(crate) fn name_process() {
    // It fails for a bad pointer only.
    let _ = nix::sys::prctl::set_name(NAME);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_sought_in_the_folders_of_path() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("lifl"), "").expect("written");
        let path =
            std::env::join_paths([Path::new("/nowhere"), Path::new("."), folder.path()]).expect("joined");
        assert_eq!(
            in_path(OsStr::new("lifl"), &path),
            Some(folder.path().join("lifl"))
        );
        assert_eq!(in_path(OsStr::new("other"), &path), None);
    }

    #[test]
    fn a_program_that_was_removed_starts_again() {
        // What counts is the process's own link, not the path behind it.
        assert_eq!(file().expect("found"), Path::new(SELF));
        assert!(started_as().is_some());
    }
}
