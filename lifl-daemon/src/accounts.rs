//! For whom a user's amounts count: a subordinate user's, which `/etc/subuid` gives to another, for that one.
//!
//! Whoever has subordinate uids keeps its groups in a user namespace and can come as any of them (`subuid(5)`). What a user
//! may see and join is judged by its own uid all the same: a container is not its owner.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{LazyLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Who has which subordinate uids.
const SUBUID: &str = "/etc/subuid";

/// The machine's own users.
const PASSWD: &str = "/etc/passwd";

/// How often it is looked whether the files have changed.
const LOOK: Duration = Duration::from_secs(5);

/// A range of subordinate uids, and whose they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    owner: u32,
    first: u32,
    count: u32,
}

impl Range {
    fn has(&self, uid: u32) -> bool {
        uid.checked_sub(self.first)
            .is_some_and(|place| place < self.count)
    }
}

#[derive(Debug)]
struct Owners {
    ranges: Vec<Range>,
    /// `passwd(5)`.
    accounts: String,
    /// When the files were changed, and their lengths.
    seen: Stamps,
    looked: Instant,
}

static OWNERS: LazyLock<RwLock<Owners>> = LazyLock::new(|| {
    RwLock::new(Owners {
        seen: stamps(),
        ..read()
    })
});

/// Changes of the two files, as their times and lengths tell them.
type Stamps = [Option<(i64, i64, u64)>; 2];

/// The user for whom that one's amounts count: its owner, or itself.
pub(crate) fn owner_of(uid: u32) -> u32 {
    let owners = OWNERS.read().unwrap_or_else(PoisonError::into_inner);
    owner_in(&owners.ranges, uid)
}

/// Reads the files again if they have changed: not for the registry's task.
pub(crate) fn refresh() {
    let (looked, seen) = {
        let owners = OWNERS.read().unwrap_or_else(PoisonError::into_inner);
        (owners.looked, owners.seen)
    };
    if looked.elapsed() < LOOK {
        return;
    }
    let now = stamps();
    let changed = (now != seen).then(|| Owners { seen: now, ..read() });
    let mut owners = OWNERS.write().unwrap_or_else(PoisonError::into_inner);
    match changed {
        Some(changed) => *owners = changed,
        None => owners.looked = Instant::now(),
    }
}

/// A user by its name, if it is one of the machine's own; asked of no directory service, which could take its time.
pub(crate) fn name_of(uid: u32) -> String {
    let owners = OWNERS.read().unwrap_or_else(PoisonError::into_inner);
    match name_in(&owners.accounts, uid) {
        Some(name) => format!("user {name}"),
        None => format!("uid {uid}"),
    }
}

fn stamps() -> Stamps {
    [PASSWD, SUBUID].map(|path| {
        let file = fs::metadata(path).ok()?;
        Some((file.mtime(), file.mtime_nsec(), file.len()))
    })
}

fn read() -> Owners {
    let [accounts, subuid] = [PASSWD, SUBUID].map(|path| fs::read_to_string(path).unwrap_or_default());
    Owners {
        ranges: ranges_in(&subuid, &accounts),
        accounts,
        seen: Stamps::default(),
        looked: Instant::now(),
    }
}

/// `passwd(5)`: name, password, uid, and more.
fn name_in(accounts: &str, uid: u32) -> Option<&str> {
    accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then_some(name)
    })
}

/// `subuid(5)`: a login name or uid, the first subordinate uid, how many.
fn ranges_in(subuid: &str, accounts: &str) -> Vec<Range> {
    let range = |line: &str| {
        let mut fields = line.trim().split(':');
        let owner = fields.next().filter(|owner| !owner.is_empty())?;
        let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let owner = uid_in(accounts, owner).or_else(|| owner.parse().ok())?;
        Some(Range { owner, first, count })
    };
    subuid.lines().filter_map(range).collect()
}

fn uid_in(accounts: &str, name: &str) -> Option<u32> {
    accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// One step only: a subordinate user has none of its own.
fn owner_in(ranges: &[Range], uid: u32) -> u32 {
    let range = ranges.iter().find(|range| range.has(uid));
    range.map_or(uid, |range| range.owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_as_the_accounts_name_it() {
        let accounts = "root:x:0:0:root:/root:/bin/sh\nbroken\nalice:x:1000:1000::/home/alice:/bin/sh\n";
        assert_eq!(name_in(accounts, 1000), Some("alice"));
        assert_eq!(name_in(accounts, 1001), None);
        assert_eq!(name_of(0), "user root");
    }

    #[test]
    fn a_subordinate_user_counts_for_its_owner_and_everybody_else_for_itself() {
        let accounts = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n";
        let subuid = "ann:100000:65536\n1001:165536:10\n\nbroken\nbob:7:x\n nobody-such:300000:5\n";
        let ranges = ranges_in(subuid, accounts);
        for (uid, owner) in [
            (100_000, 1000),
            (165_535, 1000),
            (165_536, 1001),
            (165_546, 165_546),
            (99_999, 99_999),
            (1000, 1000),
            (0, 0),
            (u32::MAX, u32::MAX),
            (300_000, 300_000),
        ] {
            assert_eq!(owner_in(&ranges, uid), owner, "{uid}");
        }
    }
}
