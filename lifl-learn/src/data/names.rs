//! What a dataset's name means.

use lifl_common::config::Dataset;

/// The dataset that needs no file.
pub const BUILTIN_DIGITS: &str = "builtin:digits";

/// Whether such a dataset is downloaded.
pub fn is_url(dataset: &Dataset) -> bool {
    names_url(dataset.as_str())
}

/// Whether such a dataset is a file or a folder.
pub fn is_path(dataset: &str) -> bool {
    dataset != BUILTIN_DIGITS && !names_url(dataset)
}

fn names_url(dataset: &str) -> bool {
    let scheme = dataset
        .split_once("://")
        .map(|(scheme, _)| scheme.to_ascii_lowercase());
    matches!(scheme.as_deref(), Some("http" | "https"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_from_paths() {
        for url in ["https://example.org/mnist.npz", "HTTP://example.org/mnist.npz"] {
            assert!(is_url(&url.into()) && !is_path(url), "{url}");
        }
        for path in ["/data/mnist", "file:///data"] {
            assert!(is_path(path) && !is_url(&path.into()), "{path}");
        }
        assert!(!is_path(BUILTIN_DIGITS) && !is_url(&BUILTIN_DIGITS.into()));
    }
}
