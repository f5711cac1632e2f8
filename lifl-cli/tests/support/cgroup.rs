//! A control group for the time of a test, of version 1 or 2.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A group of its own; it goes when this is dropped, if its processes have gone before.
pub(crate) struct Group {
    folder: PathBuf,
    v2: bool,
}

impl Group {
    /// One in the hierarchy that has that controller; `None` where this user may not make it.
    ///
    /// # Panics
    /// If `LIFL_REQUIRE_KERNEL` is set and it cannot.
    pub(crate) fn new(controller: &str) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        let mounts = mountinfo.lines().filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (kind, options) = (right.next()?, right.nth(1)?);
            let folder = PathBuf::from(left.split(' ').nth(4)?);
            let v1 = kind == "cgroup" && options.split(',').any(|option| option == controller);
            let v2 = kind == "cgroup2" && {
                let has = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
                has.split_ascii_whitespace().any(|own| own == controller)
            };
            (v1 || v2).then_some((folder, v2))
        });
        for (root, v2) in mounts {
            let name = format!(
                "lifl-test-{}-{}",
                std::process::id(),
                COUNT.fetch_add(1, Ordering::Relaxed)
            );
            if v2 {
                // May be so already, or not be allowed: then the group has no files of it.
                let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
            }
            let group = Self {
                folder: root.join(name),
                v2,
            };
            if fs::create_dir(&group.folder).is_ok() && group.has(controller) {
                return Some(group);
            }
        }
        eprintln!("NOT RUN: no control group with {controller} can be made here");
        assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none());
        None
    }

    fn has(&self, controller: &str) -> bool {
        let mut files = fs::read_dir(&self.folder).expect("a folder").flatten();
        files.any(|file| file.file_name().to_string_lossy().starts_with(controller))
    }

    /// Sets a limit, by its file's name in each version.
    pub(crate) fn set(&self, v1: &str, v2: &str, limit: impl ToString) {
        let file = self.folder.join(if self.v2 { v2 } else { v1 });
        fs::write(&file, limit.to_string()).expect("a limit");
    }

    /// The name that messages have of it.
    pub(crate) fn name(&self) -> String {
        format!("/{}", self.folder.file_name().expect("a name").to_string_lossy())
    }

    /// That command in this group, after a shell has done `before`.
    pub(crate) fn command(&self, before: &str, run: &Command) -> Command {
        let procs = self.folder.join("cgroup.procs");
        let enter = format!("echo $$ > {} && {before} exec \"$@\"", procs.display());
        let mut command = Command::new("bash");
        command
            .args(["-c", &enter, "bash"])
            .arg(run.get_program())
            .args(run.get_args());
        for (name, value) in run.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel lets a group go when its last process has been buried.
        for _ in 0..200 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} stays", self.folder.display());
    }
}
