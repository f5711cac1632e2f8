//! Data sets as they come: of any image size and number of classes; from a URL, through proxies, with own certificates, with
//! secrets that nothing keeps.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use crate::support::{self, Finished, Job, Place, Started, resume};

/// An archive of so many samples of MNIST's shape, which a network can tell apart by their brightness.
fn npz(train: usize, test: usize) -> Vec<u8> {
    npz_of((train, test), &[28, 28], 10)
}

/// The same of images of that shape and so many classes, with labels as NumPy has them by default.
fn npz_of((train, test): (usize, usize), image: &[usize], classes: usize) -> Vec<u8> {
    let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
    let each: usize = image.iter().product();
    let sides: String = image.iter().map(|side| format!(", {side}")).collect();
    for (part, n) in [("train", train), ("test", test)] {
        let class = |i: usize| i % classes;
        let pixels: Vec<u8> = (0..n * each)
            .map(|i| (class(i / each) * (250 / classes)) as u8)
            .collect();
        let labels: Vec<u8> = (0..n).flat_map(|i| (class(i) as i64).to_le_bytes()).collect();
        for (name, descr, shape, data) in [
            ("x", "|u1", format!("({n}{sides})"), pixels),
            ("y", "<i8", format!("({n}, 1)"), labels),
        ] {
            let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
            zip.start_file(format!("{name}_{part}.npy"), SimpleFileOptions::default())
                .expect("an entry");
            zip.write_all(b"\x93NUMPY\x01\x00").expect("memory");
            zip.write_all(&(header.len() as u16).to_le_bytes())
                .expect("memory");
            zip.write_all(header.as_bytes()).expect("memory");
            zip.write_all(&data).expect("memory");
        }
    }
    zip.finish().expect("an archive").into_inner()
}

/// A server on this machine, or a proxy: it answers every request with that.
struct Server {
    port: u16,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(answer: Vec<u8>) -> Self {
        Self::serving(move |stream| exchange(stream, &answer))
    }

    fn of_file(file: &[u8]) -> Self {
        let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", file.len());
        Self::new([head.as_bytes(), file].concat())
    }

    fn serving(serve: impl Fn(TcpStream) -> io::Result<String> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&requests);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // A client may hang up.
                if let Ok(request) = serve(stream) {
                    kept.lock().expect("no panic").push(request);
                }
            }
        });
        Self { port, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("no panic").clone()
    }
}

/// Reads one request's head and answers it.
fn exchange(mut stream: impl Read + Write, answer: &[u8]) -> io::Result<String> {
    let mut request = String::new();
    let mut reader = BufReader::new(&mut stream);
    while reader.read_line(&mut request)? > 2 {}
    stream.write_all(answer)?;
    stream.flush()?;
    Ok(request)
}

/// A job of a top and two trainers on that data set, for one round.
fn place(dataset: &str, max_run_time: u64) -> Place {
    let mut job = Job::digits(&[1, 2], "softmax");
    job.lifl = serde_json::json!({ "model": "softmax" });
    job.dataset = Some(dataset.to_owned());
    job.max_run_time = max_run_time;
    job.rounds = 1;
    Place::new(&job.file())
}

/// A command without what the machine's own surroundings say of proxies and certificates, with a cache of its own.
fn alone(mut command: Command, place: &Place) -> Command {
    for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command
        .env_remove("SSL_CERT_FILE")
        .env_remove("SSL_CERT_DIR")
        .env("XDG_CACHE_HOME", place.folder.path().join("cache"));
    command
}

fn finish(place: &Place, variables: &[(&str, &str)]) -> Finished {
    let mut command = alone(place.command(&[]), place);
    command.envs(variables.iter().copied());
    Started::new(command, place.run(), &place.folder.path().join("start")).wait()
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path());
    entries
        .flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] })
        .collect()
}

#[test]
fn secrets_of_a_url_are_in_no_file_and_a_run_goes_on_without_them() {
    let server = Server::of_file(&npz(40, 10));
    let url = format!(
        "http://bob:hunter2@127.0.0.1:{}/mnist.npz?token=t0ken&v=1",
        server.port
    );
    let place = place(&url, 60);
    let finished = finish(&place, &[]).success();
    let request = server.requests().remove(0);
    assert!(request.contains("token=t0ken"), "{request}");
    // bob:hunter2
    assert!(
        request
            .to_ascii_lowercase()
            .contains("authorization: basic ym9iomh1bnrlcji="),
        "{request}"
    );
    let secret = |text: &str| text.contains("hunter2") || text.contains("t0ken");
    assert!(!secret(&finished.stderr) && !secret(&format!("{:?}", finished.events)));
    for path in files(place.folder.path()) {
        // The job file is the user's own.
        if path != place.job {
            let text = String::from_utf8_lossy(&fs::read(&path).expect("a file")).into_owned();
            assert!(
                !secret(&text) && !secret(&path.to_string_lossy()),
                "{}",
                path.display()
            );
        }
    }
    // From what was kept, with the server asked no more.
    for name in ["model.safetensors", "checkpoint-1.json"] {
        fs::remove_file(place.run().join(name)).expect("removed");
    }
    let again = alone(resume(&place.run(), &[]), &place);
    Started::new(again, place.run(), &place.folder.path().join("resume"))
        .wait()
        .success();
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn plain_http_goes_through_a_proxy_as_a_get_and_no_proxy_is_heeded() {
    let proxy = Server::of_file(&npz(40, 10));
    let through = format!("http://alice:s3cret@127.0.0.1:{}", proxy.port);
    let there = place("http://data.invalid/mnist.npz", 60);
    finish(&there, &[("http_proxy", &through)]).success();
    let request = proxy.requests().remove(0);
    assert!(
        request.starts_with("GET http://data.invalid/mnist.npz HTTP/1."),
        "{request}"
    );
    // alice:s3cret
    assert!(
        request.contains("Proxy-Authorization: Basic YWxpY2U6czNjcmV0"),
        "{request}"
    );

    let server = Server::of_file(&npz(40, 10));
    let direct = place(&format!("http://127.0.0.1:{}/mnist.npz", server.port), 60);
    finish(
        &direct,
        &[("HTTP_PROXY", &through), ("NO_PROXY", "localhost,127.0.0.1")],
    )
    .success();
    assert_eq!((server.requests().len(), proxy.requests().len()), (1, 1));
}

#[test]
fn a_proxy_that_fails_is_named_without_its_password() {
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port")
        .port();
    let proxy = format!("http://alice:s3cret@127.0.0.1:{port}");
    for (url, variable) in [
        ("http://data.invalid/a.npz", "http_proxy"),
        ("https://data.invalid/a.npz", "HTTPS_PROXY"),
    ] {
        let place = place(url, 60);
        let finished = finish(&place, &[(variable, &proxy)]);
        let finished = finished.refused(3, &[url, variable, &format!("127.0.0.1:{port}"), "--data PATH"]);
        assert!(!finished.stderr.contains("s3cret"), "{}", finished.stderr);
    }
}

#[test]
fn a_certificate_authority_of_ones_own_counts() {
    let tls = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
    let certificates = CertificateDer::pem_file_iter(tls.join("server.pem"))
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .expect("certificates");
    let key = PrivateKeyDer::from_pem_file(tls.join("server.key")).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .expect("a server's certificate");
    let config = Arc::new(config);
    let file = npz(40, 10);
    let answer = [
        format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", file.len()).as_bytes(),
        &file,
    ]
    .concat();
    let server = Server::serving(move |stream| {
        let connection = ServerConnection::new(Arc::clone(&config)).map_err(io::Error::other)?;
        exchange(StreamOwned::new(connection, stream), &answer)
    });
    let url = format!("https://localhost:{}/mnist.npz", server.port);
    let refused = place(&url, 60);
    finish(&refused, &[]).refused(3, &[&url, "SSL_CERT_FILE"]);
    let ca = tls.join("ca.pem");
    let trusted = place(&url, 60);
    finish(&trusted, &[("SSL_CERT_FILE", ca.to_str().expect("a path"))]).success();
    let empty = place(&url, 60);
    finish(&empty, &[("SSL_CERT_FILE", "/nonexistent/ca.pem")]).refused(3, &["SSL_CERT_FILE"]);
}

#[test]
fn the_jobs_time_counts_while_data_is_fetched_and_a_signal_ends_it() {
    // A server that says nothing more.
    let silent = || {
        Server::serving(|mut stream| {
            stream.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n")?;
            thread::sleep(Duration::from_secs(60));
            Ok(String::new())
        })
    };
    let server = silent();
    let late = place(&format!("http://127.0.0.1:{}/mnist.npz", server.port), 1);
    let begun = Instant::now();
    finish(&late, &[]).refused(5, &["maxRunTime"]);
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());

    let server = silent();
    let stopped = place(&format!("http://127.0.0.1:{}/mnist.npz", server.port), 60);
    let command = alone(stopped.command(&[]), &stopped);
    let run = Started::new(command, stopped.run(), &stopped.folder.path().join("start"));
    let cache = stopped.folder.path().join("cache/lifl");
    while !fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.path().extension().is_some_and(|e| e == "part"))
    {
        assert!(begun.elapsed() < support::PATIENCE, "no download");
        thread::sleep(Duration::from_millis(5));
    }
    let begun = Instant::now();
    let pid = nix::unistd::Pid::from_raw(run.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
    assert_eq!(run.wait().code(), Some(130));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn a_download_that_broke_off_is_told_with_its_url_and_not_kept() {
    let whole = npz(40, 10);
    let broken = Server::new([b"HTTP/1.0 200 OK\r\n\r\n", &whole[..500]].concat());
    let url = format!("http://127.0.0.1:{}/mnist.npz", broken.port);
    let place = place(&url, 60);
    finish(&place, &[]).refused(2, &[&url, "no data set", "--data PATH"]);
    finish(&place, &[]).refused(2, &[&url]);
    assert_eq!(broken.requests().len(), 2, "asked anew");
    let page = Server::new(b"HTTP/1.0 200 OK\r\n\r\n<!DOCTYPE html><html>Sign in</html>".to_vec());
    let place = self::place(&format!("http://127.0.0.1:{}/mnist.npz", page.port), 60);
    finish(&place, &[]).refused(2, &["HTML page", "login"]);
}

/// Shapes of the tensors in a run's last model, by their names.
fn shapes(model: &[u8]) -> std::collections::BTreeMap<String, Vec<usize>> {
    let model = safetensors::SafeTensors::deserialize(model).expect("a model");
    let shapes = model.tensors().into_iter();
    shapes
        .map(|(name, tensor)| (name, tensor.shape().to_vec()))
        .collect()
}

#[test]
fn a_network_takes_its_size_and_classes_from_the_data() {
    for (model, image, classes, expected) in [
        (
            "cnn",
            &[12, 14, 3][..],
            12,
            [
                ("conv1.kernel", vec![3, 3, 3, 32]),
                ("dense.kernel", vec![128, 12]),
            ],
        ),
        (
            "softmax",
            &[8, 8],
            47,
            [("dense.kernel", vec![64, 47]), ("dense.bias", vec![47])],
        ),
        (
            "mlp",
            &[3, 5],
            2,
            [("hidden.kernel", vec![15, 200]), ("dense.bias", vec![10])],
        ),
    ] {
        let folder = tempfile::tempdir().expect("a folder");
        let data = folder.path().join("data.npz");
        fs::write(&data, npz_of((96, 48), image, classes)).expect("written");
        let mut job = Job::digits(&[1, 2], model);
        job.lifl = serde_json::json!({ "model": model });
        job.dataset = Some(data.to_str().expect("a path").to_owned());
        let place = Place::new(&job.file());
        for command in ["validate", "plan"] {
            let output = support::lifl()
                .arg(command)
                .arg(&place.job)
                .output()
                .expect("started");
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        place.finish(&[]).success();
        let whole = place.model();
        let found = shapes(&whole);
        for (name, shape) in expected {
            assert_eq!(found.get(name), Some(&shape), "{model}");
        }
        // A run that goes on has the same size.
        for name in ["model.safetensors", "model-2.safetensors", "checkpoint-2.json"] {
            fs::remove_file(place.run().join(name)).expect("removed");
        }
        place.start_resume(&[]).wait().success();
        assert_eq!(place.model(), whole);
        // Its model is a base model for the same data, and not for other data.
        let mut file = job.file();
        file["baseModel"] = serde_json::json!({ "name": place.run().join("model.safetensors") });
        Place::new(&file).finish(&[]).success();
        fs::write(&data, npz_of((20, 10), &[20, 20], 10)).expect("written");
        Place::new(&file)
            .finish(&[])
            .refused(2, &["baseModel", "another shape"]);
    }
}

#[test]
fn data_that_does_not_fit_is_named_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("small.npz"), npz_of((20, 10), &[8, 8], 10)).expect("written");
    fs::write(path("large.npz"), npz_of((20, 10), &[20, 20], 10)).expect("written");
    let mut job = Job::digits(&[1, 2], "cnn");
    job.lifl = serde_json::json!({ "model": "cnn" });
    job.dataset = path("small.npz").to_str().map(str::to_owned);
    let too_small = Place::new(&job.file());
    too_small.finish(&[]).refused(2, &["8 × 8", "cnn", "mlp"]);
    let output = support::lifl()
        .arg("validate")
        .arg(&too_small.job)
        .output()
        .expect("started");
    assert_eq!(output.status.code(), Some(2));

    // Worker files: each trainer has data of its own.
    let channel = &job.file()["channels"][0];
    let workers = path("workers");
    fs::create_dir(&workers).expect("made");
    for (taskid, role, dataset) in [
        ("0", "top-aggregator", "large.npz"),
        ("1", "trainer", "large.npz"),
        ("2", "trainer", "small.npz"),
    ] {
        let worker = serde_json::json!({
            "taskid": taskid, "role": role, "job": { "id": "j" }, "channels": [channel],
            "groupAssociation": { "channel-0": "default" }, "dataset": path(dataset), "lifl": { "model": "softmax" },
        });
        fs::write(workers.join(format!("{taskid}.json")), worker.to_string()).expect("written");
    }
    let output = support::lifl()
        .arg("validate")
        .arg(&workers)
        .output()
        .expect("started");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    for says in ["trainer-2", "small.npz", "8 × 8", "20 × 20"] {
        assert!(text.contains(says), "no {says} in: {text}");
    }
}
