//! Downloads from servers on this machine that do what servers do.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;

/// A server on this machine that answers each request as it is told to, and keeps the requests.
struct Server {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A client that hangs up early is not the server's concern.
                let _ = reply(stream, &answer, &kept);
            }
        });
        Self { address, requests }
    }

    fn always(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::new(move |_| answer.clone())
    }

    fn url(&self) -> String {
        format!("http://{}/data/mnist.npz?v=1", self.address)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

fn reply(
    mut stream: TcpStream,
    answer: &impl Fn(&str) -> Vec<u8>,
    requests: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while reader.read_line(&mut request)? > 2 {}
    let answer = answer(&request);
    requests.lock().expect("no panic").push(request);
    stream.write_all(&answer)
}

fn body(body: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn redirect(to: &str) -> Vec<u8> {
    format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        .into_bytes()
}

const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

/// A folder of downloads in which what begins like `hello` and is that long is a data set.
struct Downloads {
    folder: tempfile::TempDir,
    most_bytes: u64,
}

impl Downloads {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            most_bytes: 100,
        }
    }

    fn read(&self, url: &str, sha256: Option<&str>) -> Result<Vec<u8>, DataError> {
        self.read_watched(url, sha256, &Progress::default())
    }

    fn read_watched(
        &self,
        url: &str,
        sha256: Option<&str>,
        progress: &Progress,
    ) -> Result<Vec<u8>, DataError> {
        let cache = Cache {
            folder: self.folder.path().join("lifl"),
            most_bytes: self.most_bytes,
        };
        cache.read(&Dataset::from(url), sha256, progress, &|path: &Path| {
            let bytes = fs::read(path).map_err(DataError::io(path, "read it"))?;
            if bytes.starts_with(b"hello") || bytes.starts_with(b"\x1f\x8b") {
                return Ok(bytes);
            }
            Err(DataError::format(path, "another thing", "hello"))
        })
    }

    fn path(&self, url: &str) -> PathBuf {
        self.folder.path().join("lifl").join(file_name(url))
    }

    /// The files that are kept.
    fn kept(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("lifl"))
            .into_iter()
            .flatten();
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.ends_with(".lock"))
            .collect()
    }
}

fn text(error: DataError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

#[track_caller]
fn fails(url: &str, sha256: Option<&str>, what: &str) {
    let downloads = Downloads::new();
    let causes = text(downloads.read(url, sha256).expect_err("not a sound download"));
    assert!(
        causes.contains(what) && causes.contains(&mask(url)),
        "{causes}, not {what}"
    );
    assert_eq!(downloads.kept(), [] as [String; 0]);
}

#[test]
fn downloads_once_whoever_asks() {
    let server = Server::always(body("hello"));
    let downloads = Downloads::new();
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let bytes = downloads.read(&server.url(), Some(HELLO)).expect("a download");
                assert_eq!(bytes, b"hello");
            });
        }
    });
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn a_kept_file_that_is_not_what_it_should_be_is_fetched_anew_once() {
    let server = Server::always(body("hello"));
    let downloads = Downloads::new();
    downloads.read(&server.url(), None).expect("a download");
    // Of another hash; or none of a data set, as an older lifl kept it.
    for (damaged, sha256) in [
        ("hello?", Some(HELLO.to_ascii_uppercase())),
        ("helf", None),
        ("", None),
    ] {
        let before = server.requests().len();
        fs::write(downloads.path(&server.url()), damaged).expect("a damaged file");
        let progress = Progress::default();
        let bytes = downloads.read_watched(&server.url(), sha256.as_deref(), &progress);
        assert_eq!(bytes.expect("a download"), b"hello");
        assert_eq!(server.requests().len(), before + 1);
        let notes = progress.notes();
        assert!(
            notes[0].contains("fetched anew") && notes[0].contains(&server.url()),
            "{notes:?}"
        );
    }
    // What is sound is not asked for again.
    let before = server.requests().len();
    downloads.read(&server.url(), Some(HELLO)).expect("kept");
    assert_eq!(server.requests().len(), before);
}

#[test]
fn a_kept_file_is_used_in_a_folder_that_nothing_is_written_to() {
    let downloads = Downloads::new();
    let url = "http://127.0.0.1:9/mnist.npz";
    fs::create_dir(downloads.folder.path().join("lifl")).expect("a folder");
    fs::write(downloads.path(url), "hello").expect("a file");
    assert_eq!(downloads.read(url, None).expect("kept"), b"hello");
    let left = fs::read_dir(downloads.folder.path().join("lifl"))
        .expect("there")
        .count();
    assert_eq!(left, 1, "not even a lock");
}

#[test]
fn a_folder_that_cannot_be_made_is_named_with_the_remedy() {
    let downloads = Downloads::new();
    fs::write(downloads.folder.path().join("lifl"), "a file in the way").expect("written");
    let error = text(
        downloads
            .read("http://127.0.0.1:9/x", None)
            .expect_err("no folder"),
    );
    assert!(
        error.contains("XDG_CACHE_HOME") && error.contains("--data PATH"),
        "{error}"
    );
}

#[test]
fn what_is_not_the_whole_file_is_not_kept() {
    let cut_off = "HTTP/1.1 200 OK\r\nContent-Length: 50\r\nConnection: close\r\n\r\nhello";
    fails(&Server::always(cut_off).url(), None, "--data PATH");
    fails(
        &Server::always("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").url(),
        None,
        "there is no such file",
    );
    fails(
        &Server::always(body("hello")).url(),
        Some(&"0".repeat(64)),
        "2cf24dba",
    );
    fails(
        &Server::always(body(&"x".repeat(101))).url(),
        None,
        "larger than 100",
    );
    let endless = format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{}", "x".repeat(1000));
    fails(&Server::always(endless).url(), None, "larger than 100");
    // Without a length, that it broke off can only be seen by what came.
    let broken_off = Server::always("HTTP/1.0 200 OK\r\n\r\nhel");
    fails(&broken_off.url(), None, "is no data set: found another thing");
    let packed = "HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nConnection: close\r\n\r\nhello";
    fails(&Server::always(packed).url(), None, "packs it with br");
}

#[test]
fn after_a_broken_download_the_next_one_is_a_new_one() {
    let sound = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&sound);
    let server = Server::new(move |_| {
        let body = if now.load(Ordering::SeqCst) {
            "hello"
        } else {
            "hel"
        };
        format!("HTTP/1.0 200 OK\r\n\r\n{body}").into_bytes()
    });
    let downloads = Downloads::new();
    downloads.read(&server.url(), None).expect_err("broken off");
    sound.store(true, Ordering::SeqCst);
    assert_eq!(downloads.read(&server.url(), None).expect("a download"), b"hello");
}

#[test]
fn what_a_server_packs_unasked_has_the_hash_of_what_is_in_it() {
    let mut answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n".to_vec();
    answer.extend(super::super::idx::tests::gzip(b"hello"));
    let server = Server::always(answer);
    let downloads = Downloads::new();
    downloads.read(&server.url(), Some(HELLO)).expect("a download");
    fails(&server.url(), Some(&"0".repeat(64)), "SHA-256");
}

#[test]
fn a_server_that_is_not_there_is_named_with_the_remedy() {
    // A port that was free a moment ago.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/mnist.npz", listener.local_addr().expect("an address"));
    drop(listener);
    fails(&url, None, "--data PATH");
}

#[test]
fn redirects_are_followed_but_not_in_circles_and_passwords_stay_where_they_belong() {
    let target = Server::always(body("hello"));
    let to = target.url();
    let server = Server::new(move |request| {
        let path = request.split(' ').nth(1).unwrap_or_default();
        match path {
            "/away" => redirect(&to),
            "/a/near" => redirect("there"),
            "/a/there" => body("hello"),
            "/circle" => redirect("/back"),
            "/back" => redirect("/circle"),
            _ => redirect(&format!("{path}x")),
        }
    });
    let at = |path: &str| format!("http://bob:hunter2@{}{path}", server.address);
    let downloads = Downloads::new();
    downloads.read(&at("/away"), None).expect("a download");
    downloads.read(&at("/a/near"), None).expect("a download");
    let authorized = |request: &&String| {
        request
            .to_ascii_lowercase()
            .contains("authorization: basic ym9iomh1bnrlcji=")
    };
    assert_eq!(
        server.requests().iter().filter(authorized).count(),
        3,
        "{:?}",
        server.requests()
    );
    assert_eq!(
        target.requests().iter().filter(authorized).count(),
        0,
        "{:?}",
        target.requests()
    );
    for (path, what) in [("/circle", "in a circle"), ("/endless", "in a circle, or more")] {
        fails(&at(path), None, what);
    }
    let error = text(downloads.read(&at("/circle"), None).expect_err("a circle"));
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn urls_that_differ_in_secrets_only_share_a_file() {
    let server = Server::always(body("hello"));
    let downloads = Downloads::new();
    let url = |token: &str| format!("http://{}/mnist.npz?token={token}", server.address);
    downloads.read(&url("one"), None).expect("a download");
    // As it stands in a run's folder.
    downloads.read(&mask(&url("one")), None).expect("kept");
    downloads.read(&url("two"), None).expect("kept");
    let requests = server.requests();
    assert!(
        requests.len() == 1 && requests[0].contains("token=one"),
        "{requests:?}"
    );
}

#[test]
fn names_say_what_and_tell_urls_apart() {
    let name = file_name("https://example.org/a/mnist.npz?v=1#x");
    assert!(name.ends_with("-mnist.npz"), "{name}");
    assert_ne!(name, file_name("https://example.org/b/mnist.npz?v=1#x"));
    assert!(!file_name("https://example.org/..%2f/").contains('/'));
}
