//! Datasets from a URL: downloaded once, kept, and used by every later run.
//!
//! ```text
//! (nothing) ──lock──▶ NAME.part ──whole, and hashes right──▶ NAME
//!                        └──anything else──▶ (nothing)
//! ```
//!
//! The file's lock makes processes that start together download once; the rename makes a file under its name a whole
//! one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::error::DataError;

/// The longest download: a hundred times MNIST.
const MOST_BYTES: u64 = 1 << 30;

/// A server that says nothing for so long is taken for gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a dataset's name is a URL.
pub(super) fn is_url(dataset: &str) -> bool {
    let scheme = dataset
        .split_once("://")
        .map(|(scheme, _)| scheme.to_ascii_lowercase());
    matches!(scheme.as_deref(), Some("http" | "https"))
}

/// The file that the URL names, from this user's cache.
///
/// # Errors
/// If it cannot be downloaded, or is not the one of that SHA-256.
pub(super) fn cached(url: &str, sha256: Option<&str>) -> Result<PathBuf, DataError> {
    cached_in(&cache_folder()?, url, sha256, MOST_BYTES)
}

/// `$XDG_CACHE_HOME/lifl`, or `~/.cache/lifl` (XDG Base Directory Specification: a relative one is ignored).
fn cache_folder() -> Result<PathBuf, DataError> {
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Ok(cache.ok_or(DataError::NoCache)?.join("lifl"))
}

fn cached_in(cache: &Path, url: &str, sha256: Option<&str>, most_bytes: u64) -> Result<PathBuf, DataError> {
    fs::create_dir_all(cache).map_err(DataError::io(cache, "make the folder for downloads"))?;
    let path = cache.join(file_name(url));
    let lock_path = with_suffix(&path, ".lock");
    let lock = File::create(&lock_path).map_err(DataError::io(&lock_path, "make it"))?;
    lock.lock().map_err(DataError::io(&lock_path, "lock it"))?;
    if path.exists() {
        match sha256 {
            Some(expected) if !hash_file(&path)?.eq_ignore_ascii_case(expected) => {
                tracing::warn!(path = %path.display(), "the kept download is not the job's: downloading again");
            }
            _ => return Ok(path),
        }
    }
    let part = with_suffix(&path, ".part");
    let fetched = download(url, sha256, &part, most_bytes)
        .and_then(|()| fs::rename(&part, &path).map_err(DataError::io(&path, "put the download there")));
    if fetched.is_err() {
        // Best effort: the next download begins by emptying it.
        let _ = fs::remove_file(&part);
    }
    fetched.map(|()| path)
}

/// The URL's last part, for people, behind its hash, so that no two URLs share a file.
fn file_name(url: &str) -> String {
    let hash = hex(&Sha256::digest(url.as_bytes()));
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let last: String = path
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
        .take(64)
        .collect();
    format!("{}-{last}", &hash[..16])
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Fetches all of `url` into `part`.
fn download(url: &str, sha256: Option<&str>, part: &Path, most_bytes: u64) -> Result<(), DataError> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| DataError::Download {
        url: url.into(),
        source,
    };
    let config = ureq::Agent::config_builder()
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .timeout_per_read(Some(PATIENCE))
        .build();
    let response = ureq::Agent::from(config)
        .get(url)
        .call()
        .map_err(|e| failed(e.into()))?;
    let length = response.body().content_length();
    if length.is_some_and(|length| length > most_bytes) {
        return Err(failed(format!("it is larger than {most_bytes} bytes").into()));
    }
    // One more than allowed, to tell a file of just that size from a larger one.
    let mut body = response
        .into_body()
        .into_with_config()
        .limit(most_bytes + 1)
        .reader();
    let mut file = File::create(part).map_err(DataError::io(part, "make it"))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    let mut received = 0_u64;
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed(e.into())),
        };
        received += n as u64;
        if received > most_bytes {
            return Err(failed(format!("it is larger than {most_bytes} bytes").into()));
        }
        hasher.update(&buffer[..n]);
        file.write_all(&buffer[..n])
            .map_err(DataError::io(part, "write to it"))?;
    }
    if let Some(length) = length.filter(|&length| length != received) {
        return Err(failed(
            format!("the connection closed after {received} of {length} bytes").into(),
        ));
    }
    let found = hex(&hasher.finalize());
    match sha256 {
        Some(expected) if !found.eq_ignore_ascii_case(expected) => Err(DataError::Checksum {
            url: url.into(),
            found,
            expected: expected.into(),
        }),
        _ => Ok(()),
    }
}

fn hash_file(path: &Path) -> Result<String, DataError> {
    let mut file = File::open(path).map_err(DataError::io(path, "open it"))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer).map_err(DataError::io(path, "read it"))? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// A server on this machine that answers every request with the same bytes, and counts them.
    struct Server {
        url: String,
        requests: Arc<AtomicUsize>,
    }

    impl Server {
        fn new(answer: impl Into<Vec<u8>>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let url = format!(
                "http://{}/data/mnist.npz?v=1",
                listener.local_addr().expect("an address")
            );
            let requests = Arc::new(AtomicUsize::new(0));
            let (answer, counter) = (answer.into(), Arc::clone(&requests));
            thread::spawn(move || {
                for stream in listener.incoming().map_while(Result::ok) {
                    counter.fetch_add(1, Ordering::SeqCst);
                    // A client that hangs up early is not the server's concern.
                    let _ = reply(stream, &answer);
                }
            });
            Self { url, requests }
        }

        fn with_body(body: &str) -> Self {
            Self::new(format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            ))
        }

        fn requests(&self) -> usize {
            self.requests.load(Ordering::SeqCst)
        }
    }

    fn reply(mut stream: TcpStream, answer: &[u8]) -> io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
        stream.write_all(answer)
    }

    fn fails(server: &Server, sha256: Option<&str>, what: &str) {
        let cache = tempfile::tempdir().expect("a folder");
        let error = cached_in(cache.path(), &server.url, sha256, 100).expect_err("not a sound download");
        let causes = format!("{:#}", anyhow::Error::from(error));
        assert!(causes.contains(what) && causes.contains(&server.url), "{causes}");
        let left: Vec<String> = fs::read_dir(cache.path())
            .expect("the cache")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.ends_with(".lock"))
            .collect();
        assert!(left.is_empty(), "left {left:?}");
    }

    #[test]
    fn downloads_once_whoever_asks() {
        let server = Server::with_body("hello");
        let cache = tempfile::tempdir().expect("a folder");
        let sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let path = cached_in(cache.path(), &server.url, Some(sha), 5).expect("a download");
                    assert_eq!(fs::read(path).expect("the file"), b"hello");
                });
            }
        });
        assert_eq!(server.requests(), 1);
    }

    #[test]
    fn a_kept_file_of_another_hash_is_fetched_again() {
        let server = Server::with_body("hello");
        let cache = tempfile::tempdir().expect("a folder");
        let path = cached_in(cache.path(), &server.url, None, 100).expect("a download");
        fs::write(&path, "helf").expect("a damaged file");
        let sha = "2CF24DBA5FB0A30E26E83B2AC5B9E29E1B161E5C1FA7425E73043362938B9824";
        let path = cached_in(cache.path(), &server.url, Some(sha), 100).expect("a download");
        assert_eq!(
            (fs::read(path).expect("the file"), server.requests()),
            (b"hello".to_vec(), 2)
        );
    }

    #[test]
    fn what_is_not_the_whole_file_is_not_kept() {
        let cut_off = "HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nhello";
        fails(&Server::new(cut_off), None, "--data PATH");
        fails(
            &Server::new("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
            None,
            "404",
        );
        fails(&Server::with_body("hello"), Some("00"), "2cf24dba");
        fails(&Server::with_body(&"x".repeat(101)), None, "larger than 100");
        let endless = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", "x".repeat(1000));
        fails(&Server::new(endless), None, "larger than 100");
    }

    #[test]
    fn a_server_that_is_not_there_is_named_with_the_remedy() {
        // A port that was free a moment ago.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}/mnist.npz", listener.local_addr().expect("an address"));
        drop(listener);
        fails(
            &Server {
                url,
                requests: Arc::default(),
            },
            None,
            "--data PATH",
        );
    }

    #[test]
    fn knows_a_url() {
        assert!(is_url("https://example.org/mnist.npz") && is_url("HTTP://example.org/mnist.npz"));
        assert!(!is_url("builtin:digits") && !is_url("/data/mnist") && !is_url("file:///data"));
    }

    #[test]
    fn names_say_what_and_tell_urls_apart() {
        let name = file_name("https://example.org/a/mnist.npz?v=1#x");
        assert!(name.ends_with("-mnist.npz"), "{name}");
        assert_ne!(name, file_name("https://example.org/b/mnist.npz?v=1#x"));
        assert!(!file_name("https://example.org/..%2f/").contains('/'));
    }
}
