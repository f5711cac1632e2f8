//! An error with its causes, in one line: for logs, and for answers to clients.

use std::error::Error;

/// An error with its causes, each said once. Newlines become spaces, and very long texts lose their middle.
pub(crate) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1).map(ToString::to_string) {
        // Some errors say their cause themselves.
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    shorten(&text.replace('\n', " "))
}

/// The error, its cause, the cause's, and so on.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}

/// A verifier's words can be megabytes; what it objects to stands at their end.
fn shorten(text: &str) -> String {
    const KEPT: usize = 400;
    let count = text.chars().count();
    if count <= 2 * KEPT {
        return text.to_owned();
    }
    let head: String = text.chars().take(KEPT).collect();
    let tail: String = text.chars().skip(count - KEPT).collect();
    format!("{head} … {tail}")
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Outer(String, #[source] io::Error);

    #[test]
    fn a_cause_is_said_once_and_a_long_text_keeps_both_ends() {
        let outer = |text: &str| Outer(text.to_owned(), io::Error::other("refused\nby the kernel"));
        assert_eq!(error_chain(&outer("no plane")), "no plane: refused by the kernel");
        assert_eq!(
            error_chain(&outer("no plane: refused\nby the kernel")),
            "no plane: refused by the kernel"
        );
        let long = error_chain(&outer(&"x".repeat(1_000_000)));
        assert!(
            long.starts_with("xxx") && long.ends_with("by the kernel") && long.len() < 1000,
            "{long}"
        );
    }
}
