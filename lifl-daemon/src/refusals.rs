//! What is said in the log of users' refused requests: so many lines of each, and how many were left out.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::accounts;

/// Lines of one user at once.
const BURST: u32 = 100;

/// After those, one in so long.
const EACH: Duration = Duration::from_millis(500);

/// Users that are remembered.
const USERS: usize = 4096;

struct Lines {
    left: u32,
    refilled: Instant,
    dropped: u64,
}

impl Lines {
    /// Whether a line may be written now; then with the number of those that might not since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.duration_since(self.refilled).as_nanos() / EACH.as_nanos();
        if earned > 0 {
            self.left = BURST.min(self.left.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.refilled = now;
        }
        if self.left == 0 {
            self.dropped += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

static USERS_LINES: LazyLock<Mutex<HashMap<u32, Lines>>> = LazyLock::new(Mutex::default);

/// Whether another line about that user may be written; then with the number of those that were left out since the last one.
pub(crate) fn may_log(uid: u32) -> Option<u64> {
    let now = Instant::now();
    let mut users = USERS_LINES.lock().unwrap_or_else(PoisonError::into_inner);
    if users.len() >= USERS {
        users.retain(|_, lines| now.duration_since(lines.refilled) < EACH * BURST);
    }
    let lines = users.entry(accounts::owner_of(uid)).or_insert(Lines {
        left: BURST,
        refilled: now,
        dropped: 0,
    });
    lines.take(now)
}

/// A text with what others said in it, for a line of the log: what cannot be seen, or turns the line around, is escaped.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\'' => plain.push(character),
            other => plain.extend(other.escape_debug()),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_so_many_lines_and_the_next_one_says_how_many_were_left_out() {
        let begun = Instant::now();
        let mut lines = Lines {
            left: BURST,
            refilled: begun,
            dropped: 0,
        };
        let written = (0..1000).filter(|_| lines.take(begun).is_some()).count();
        assert_eq!(written, BURST as usize);
        assert_eq!(lines.take(begun + EACH), Some(1000 - u64::from(BURST)));
        assert_eq!(lines.take(begun + EACH), None);
    }

    #[test]
    fn nothing_in_a_line_is_unseen_or_turns_it_around() {
        let told = plain("a \"name\"\u{202e}\u{2028}\n\u{1b}[31m\u{200b}é 中");
        assert_eq!(told, r#"a "name"\u{202e}\u{2028}\n\u{1b}[31m\u{200b}é 中"#);
    }
}
