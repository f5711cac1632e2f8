//! Control groups, version 1 and 2 (`Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/`): which of them hold this
//! process, and what their files say.
//!
//! A limit of any group between a process's own and the root holds for it, so each is looked for on the whole way up. In a
//! container only a part of that way may be visible, or under other names:
//!
//! ```text
//!   /proc/self/cgroup     0::/docker/f00          the group, as seen from the root of this process's cgroup namespace
//!   /proc/self/mountinfo  … /docker /sys/fs/…     a mount, and the group that is its root, as seen from there
//!                         /docker/f00 relative to /docker   ─▶  /sys/fs/cgroup/f00, and /sys/fs/cgroup above it
//! ```
//!
//! A mount that was made outside of the namespace has a root such as `/../..`: the group lies two levels below it, under names
//! that only the tree has, and is found by its processes.

use std::fs;
use std::path::{Path, PathBuf};

/// Most groups that are looked into for one that has no visible name.
const MOST_SEARCHED: usize = 4096;

/// Numbers from here on mean "no limit": version 1 writes the largest number of whole pages.
const UNLIMITED: u64 = 1 << 60;

/// Which hierarchy a group belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// One of version 1, with these controllers.
    V1(Vec<String>),
    /// The unified one.
    V2,
}

impl Hierarchy {
    pub(super) fn is_v2(&self) -> bool {
        *self == Self::V2
    }

    /// Whether that controller's files may be found there. Those of version 2 are there or not: no list says so for all levels.
    pub(super) fn may_have(&self, controller: &str) -> bool {
        match self {
            Self::V1(controllers) => controllers.iter().any(|own| own == controller),
            Self::V2 => true,
        }
    }
}

/// The group that holds this process in one hierarchy, and those above it, as far as they are visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Groups {
    pub(super) hierarchy: Hierarchy,
    /// From the innermost to the outermost.
    pub(super) levels: Vec<Group>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Its name for people.
    pub(super) name: String,
    folder: PathBuf,
}

impl Group {
    /// A file's only number; `None` if there is no such file, or it says `max`.
    pub(super) fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.trim().parse().ok()
    }

    /// A file's only number as a limit; `None` where there is none.
    pub(super) fn limit(&self, file: &str) -> Option<u64> {
        self.number(file).filter(|&limit| limit < UNLIMITED)
    }

    /// The number behind a word at the beginning of a line.
    pub(super) fn field(&self, file: &str, name: &str) -> Option<u64> {
        field(&self.text(file)?, name)
    }

    pub(super) fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folder.join(file)).ok()
    }
}

/// The number behind a word at the beginning of a line.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let number = (words.next() == Some(name)).then(|| words.next())??;
        number.parse().ok()
    })
}

/// The groups that hold the process `pid`, which must be the one that `/proc/self` below `root` is about.
pub(super) fn groups(root: &Path, pid: u32) -> Vec<Groups> {
    let read = |file| fs::read_to_string(root.join(file)).unwrap_or_default();
    let mounts: Vec<Mount> = read("proc/self/mountinfo")
        .lines()
        .filter_map(Mount::parse)
        .collect();
    let memberships = read("proc/self/cgroup");
    let found = memberships
        .lines()
        .filter_map(membership)
        .filter_map(|(hierarchy, path)| {
            let of_it = mounts.iter().filter(|mount| mount.shows(&hierarchy));
            let ways = of_it.filter_map(|mount| levels(root, mount, path, pid));
            // Of several mounts the one that shows most.
            let levels = ways.max_by_key(Vec::len)?;
            Some(Groups { hierarchy, levels })
        });
    found.collect()
}

/// A line of `/proc/self/cgroup`: `4:memory:/path` or `0::/path`.
fn membership(line: &str) -> Option<(Hierarchy, &str)> {
    let mut parts = line.splitn(3, ':');
    let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let hierarchy = match (number, controllers) {
        ("0", "") => Hierarchy::V2,
        // One with a name has no controllers.
        (_, named) if named.is_empty() || named.starts_with("name=") => return None,
        (_, controllers) => Hierarchy::V1(controllers.split(',').map(str::to_owned).collect()),
    };
    Some((hierarchy, path.strip_suffix(" (deleted)").unwrap_or(path)))
}

#[derive(Debug)]
struct Mount {
    /// The group that is its root.
    root: String,
    folder: String,
    v2: bool,
    options: String,
}

impl Mount {
    /// A line of `/proc/self/mountinfo` (proc(5)), if it is of control groups:
    /// `36 35 98:0 /root /folder options optional… - type source super,options`.
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
        let kind = right.next()?;
        if kind != "cgroup" && kind != "cgroup2" {
            return None;
        }
        Some(Self {
            root: unescape(left.next()?),
            folder: unescape(left.next()?),
            v2: kind == "cgroup2",
            options: right.nth(1).unwrap_or("").to_owned(),
        })
    }

    fn shows(&self, hierarchy: &Hierarchy) -> bool {
        match hierarchy {
            Hierarchy::V2 => self.v2,
            Hierarchy::V1(controllers) => {
                let has = |controller: &String| self.options.split(',').any(|option| option == controller);
                !self.v2 && controllers.iter().all(has)
            }
        }
    }
}

/// Octal escapes of what would end a field: `\040` is a space.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A group's path from the root of the cgroup namespace: so many levels up, and names down from there.
fn split(path: &str) -> (usize, Vec<&str>) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let up = parts.iter().take_while(|&&part| part == "..").count();
    (up, parts[up..].to_vec())
}

/// The visible groups from the one at `path` up to the mount's root; `None` if that group does not lie below it.
fn levels(root: &Path, mount: &Mount, path: &str, pid: u32) -> Option<Vec<Group>> {
    let (up, names) = split(path);
    let (root_up, root_names) = split(&mount.root);
    let top = root.join(mount.folder.trim_start_matches('/'));
    let visible = |names: &[&str]| chain(&top, &mount.root, names);
    if root_up == up {
        return visible(names.strip_prefix(root_names.as_slice())?);
    }
    if root_up < up || !root_names.is_empty() {
        return None;
    }
    // The root lies above the namespace's: the levels between have names that are not told.
    let mut budget = MOST_SEARCHED;
    let between = find(&top, root_up - up, &names, pid, &mut budget);
    let below = between.unwrap_or_default();
    visible(&below.iter().map(String::as_str).collect::<Vec<_>>())
}

/// The names down to the group that lies `depth` levels and then `names` below a folder and has the process.
fn find(folder: &Path, depth: usize, names: &[&str], pid: u32, budget: &mut usize) -> Option<Vec<String>> {
    if depth == 0 {
        let own = names
            .iter()
            .fold(folder.to_owned(), |folder, name| folder.join(name));
        let processes = fs::read_to_string(own.join("cgroup.procs")).ok()?;
        let here = processes.lines().any(|line| line.trim().parse() == Ok(pid));
        return here.then(|| names.iter().map(ToString::to_string).collect());
    }
    for entry in fs::read_dir(folder).ok()?.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        *budget = budget.checked_sub(1)?;
        if let Some(mut below) = find(&entry.path(), depth - 1, names, pid, budget) {
            below.insert(0, entry.file_name().to_string_lossy().into_owned());
            return Some(below);
        }
    }
    None
}

/// The group at `names` below a mount's root, and all above it up to that root; `None` if it is not there.
fn chain(top: &Path, root: &str, names: &[&str]) -> Option<Vec<Group>> {
    let groups: Vec<Group> = (0..=names.len())
        .rev()
        .map(|depth| {
            let below = &names[..depth];
            let mut name = root.trim_end_matches('/').to_owned();
            for part in below {
                name = format!("{name}/{part}");
            }
            Group {
                name: if name.is_empty() { "/".to_owned() } else { name },
                folder: below
                    .iter()
                    .fold(top.to_owned(), |folder, part| folder.join(part)),
            }
        })
        .collect();
    groups.first()?.folder.is_dir().then_some(groups)
}
