//! Where a data set is. An URL may have a password or a token in it: only who fetches it sees that, nothing that is written or
//! shown does.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What stands in a secret's place.
const MASK: &str = "***";

/// Query parameters that are secrets, in small letters and without `-` and `_`; and so is what ends like one of the second list.
const SECRET: [&str; 15] = [
    "token",
    "sig",
    "signature",
    "secret",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "pass",
    "apikey",
    "awsaccesskeyid",
    "accesskey",
    "jwt",
    "sas",
    "authorization",
];
const SECRET_ENDS: [&str; 7] = [
    "token",
    "signature",
    "secret",
    "password",
    "apikey",
    "credential",
    "accesskey",
];

/// Parameters that may be secrets or choose a file: secrets are long and look like no file's name.
const SECRET_IF_LONG: [&str; 6] = ["key", "auth", "code", "session", "sessionid", "access"];
const LONG: usize = 16;

/// A dataset: an http(s) URL, a file or folder, or `builtin:digits`. Two that differ in secrets only are equal; written to a file
/// or shown, it has none, and what is read back is found in the cache of downloads by that.
#[derive(Clone)]
pub struct Dataset {
    given: String,
    masked: String,
}

impl Dataset {
    /// As it was given, secrets included: for who fetches it, and nobody else.
    pub fn reveal(&self) -> &str {
        &self.given
    }

    /// Without secrets.
    pub fn as_str(&self) -> &str {
        &self.masked
    }
}

impl<T: Into<String>> From<T> for Dataset {
    fn from(given: T) -> Self {
        let given = given.into();
        let masked = mask(&given);
        Self { given, masked }
    }
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.masked)
    }
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.masked, f)
    }
}

impl PartialEq for Dataset {
    fn eq(&self, other: &Self) -> bool {
        self.masked == other.masked
    }
}

impl Eq for Dataset {}

impl PartialEq<str> for Dataset {
    fn eq(&self, other: &str) -> bool {
        self.masked == other
    }
}

impl PartialOrd for Dataset {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Dataset {
    fn cmp(&self, other: &Self) -> Ordering {
        self.masked.cmp(&other.masked)
    }
}

impl Hash for Dataset {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.masked.hash(state);
    }
}

impl Serialize for Dataset {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.masked.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Dataset {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

/// A URL without its user and password and without the values of parameters that are secrets. Any other text stays as it is.
pub fn mask(text: &str) -> String {
    let Some(at) = text.find("://") else {
        return text.to_owned();
    };
    let (scheme, rest) = text.split_at(at + 3);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (mut authority, mut path) = rest.split_at(end);
    // A password with a slash in it, which should have been escaped: then what stands before the slash is no port.
    let port = authority.rsplit_once(':').map(|(_, port)| port);
    if !authority.contains('@')
        && port.is_some_and(|port| !port.bytes().all(|digit| digit.is_ascii_digit()) && !port.ends_with(']'))
        && let Some(at) = rest.rfind('@')
    {
        let host = rest[at..]
            .find(['/', '?', '#'])
            .map_or(rest.len(), |end| at + end);
        (authority, path) = rest.split_at(host);
    }
    let mut masked = scheme.to_owned();
    match authority.rsplit_once('@') {
        Some((_, host)) => {
            masked.push_str(MASK);
            masked.push('@');
            masked.push_str(host);
        }
        None => masked.push_str(authority),
    }
    let (before, fragment) = match path.split_once('#') {
        Some((before, _)) => (before, true),
        None => (path, false),
    };
    match before.split_once('?') {
        Some((path, query)) => {
            let parameters: Vec<String> = query.split('&').map(mask_parameter).collect();
            masked.push_str(path);
            masked.push('?');
            masked.push_str(&parameters.join("&"));
        }
        None => masked.push_str(before),
    }
    // A server never sees it.
    if fragment {
        masked.push_str("#…");
    }
    masked
}

/// The same of every URL in a text, whatever stands around them.
pub(super) fn mask_all(text: &str) -> String {
    // As one first: a secret may have in it what ends a URL elsewhere.
    let masked = mask(text);
    if masked.matches("://").count() < 2 {
        return masked;
    }
    let mut all = String::new();
    for part in masked.split_inclusive([' ', '"', '\'', ',', '<', '>']) {
        let url = part.trim_end_matches([' ', '"', '\'', ',', '<', '>']);
        all.push_str(&mask(url));
        all.push_str(&part[url.len()..]);
    }
    all
}

fn mask_parameter(parameter: &str) -> String {
    let Some((name, value)) = parameter.split_once('=') else {
        return parameter.to_owned();
    };
    let plain: String = name
        .chars()
        .filter(|c| !matches!(c, '-' | '_'))
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let secret = SECRET.contains(&plain.as_str())
        || SECRET_ENDS.iter().any(|end| plain.ends_with(end))
        || (SECRET_IF_LONG.contains(&plain.as_str()) && value.len() >= LONG && !value.contains(['.', '/']));
    if secret && !value.is_empty() {
        format!("{name}={MASK}")
    } else {
        parameter.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_of_a_url_are_masked_and_nothing_else_is() {
        for (url, masked) in [
            ("http://bob:hunter2@host:80/a.npz", "http://***@host:80/a.npz"),
            ("https://bob@host/a@b.npz", "https://***@host/a@b.npz"),
            ("http://bob:hun/ter@2@host/a.npz", "http://***@host/a.npz"),
            ("http://bob:hun#ter2@host", "http://***@host"),
            (
                "https://host/a.npz?token=x&v=1",
                "https://host/a.npz?token=***&v=1",
            ),
            (
                "https://host/a?sig=x&se=2&api_key=y",
                "https://host/a?sig=***&se=2&api_key=***",
            ),
            (
                "https://s3/a?X-Amz-Signature=f&X-Amz-Credential=g&X-Amz-Date=1&X-Amz-Security-Token=h",
                "https://s3/a?X-Amz-Signature=***&X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Security-Token=***",
            ),
            (
                "https://host/a?access_token=x#token=y",
                "https://host/a?access_token=***#…",
            ),
            ("https://host/a?key=0123456789abcdef0", "https://host/a?key=***"),
            ("s3://id:secret@bucket/a", "s3://***@bucket/a"),
        ] {
            assert_eq!(mask(url), masked);
            // What was masked stays so.
            assert_eq!(mask(masked), masked);
        }
        for plain in [
            "https://host:8443/data/mnist.npz?v=1&name=a&key=train/images.npz",
            "http://[::1]:80/a@b",
            "builtin:digits",
            "/data/mnist",
            "user@host:data?token=x",
        ] {
            assert_eq!(mask(plain), plain);
            assert_eq!(mask_all(plain), plain);
        }
        // What follows a secret may be a part of it, so it goes too.
        assert_eq!(
            mask_all(r#"["http://a:b@h/x","https://c:d@h/y?token=z", "e"]"#),
            r#"["http://***@h/x","https://***@h/y?token=***"#
        );
    }

    #[test]
    fn what_is_written_or_shown_has_no_secret_and_is_the_same_dataset() {
        let dataset = Dataset::from("http://bob:hunter2@host/a.npz");
        assert_eq!(dataset.reveal(), "http://bob:hunter2@host/a.npz");
        let written = serde_json::to_string(&dataset).expect("JSON");
        for shown in [&written, &format!("{dataset}"), &format!("{dataset:?}")] {
            assert!(
                shown.contains("***@host") && !shown.contains("hunter2"),
                "{shown}"
            );
        }
        assert_eq!(
            serde_json::from_str::<Dataset>(&written).expect("a dataset"),
            dataset
        );
    }
}
