//! What the tests of whole runs share: job files, the program, its events, and what it may not leave behind.

pub(crate) mod node;

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, Signal, signal as set_disposition};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a test waits for what should come soon.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The program under test.
pub(crate) fn lifl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lifl"));
    // As it is unless told, but for the workers, whose logs then have every round.
    command.env("RUST_LOG", "warn,lifl_verdict=error,lifl_cli::work=debug");
    // SAFETY: between fork and exec it makes nothing but system calls.
    unsafe { command.pre_exec(default_signals) };
    command
}

/// Signals that the tests' own starter has ignored, `nohup` or a shell's `&`, would stay ignored.
fn default_signals() -> io::Result<()> {
    for number in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        // SAFETY: no handler is installed, so no code runs in one.
        unsafe { set_disposition(number, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// A job file in the making: levels of aggregators above the trainers.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// How many on each level, from the top down; the last are the trainers.
    pub(crate) levels: Vec<u32>,
    /// The `lifl` key.
    pub(crate) lifl: Value,
    /// Rounds.
    pub(crate) rounds: u32,
    /// Flame's `dataset`.
    pub(crate) dataset: Option<String>,
    /// Flame's `maxRunTime`.
    pub(crate) max_run_time: u64,
}

impl Job {
    /// A job without data: that many parameters of that type.
    pub(crate) fn synthetic(levels: &[u32], parameters: u64, dtype: &str) -> Self {
        Self {
            levels: levels.to_vec(),
            lifl: json!({ "model": { "synthetic": { "parameters": parameters, "dtype": dtype } } }),
            rounds: 2,
            dataset: None,
            max_run_time: 120,
        }
    }

    /// A small job on generated digits.
    pub(crate) fn digits(levels: &[u32], model: &str) -> Self {
        Self {
            levels: levels.to_vec(),
            lifl: json!({ "model": model, "trainSamples": 400, "testSamples": 100 }),
            rounds: 2,
            dataset: Some("builtin:digits".to_owned()),
            max_run_time: 120,
        }
    }

    /// Sets a field of the `lifl` key.
    pub(crate) fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.lifl[field] = value.into();
        self
    }

    /// The job file.
    pub(crate) fn file(&self) -> Value {
        const ROLES: [&[&str]; 3] = [
            &["top-aggregator", "trainer"],
            &["top-aggregator", "middle-aggregator", "trainer"],
            &[
                "top-aggregator",
                "middle-aggregator",
                "leaf-aggregator",
                "trainer",
            ],
        ];
        let names = ROLES[self.levels.len() - 2];
        let channels: Vec<Value> = names
            .windows(2)
            .enumerate()
            .map(|(n, pair)| {
                json!({
                    "name": format!("channel-{n}"),
                    "pair": pair,
                    "groupBy": { "type": "tag", "value": ["default"] },
                    "funcTags": { pair[0]: ["distribute", "aggregate"], pair[1]: ["fetch", "upload"] },
                })
            })
            .collect();
        let roles: Vec<Value> = names
            .iter()
            .zip(&self.levels)
            .map(|(name, replica)| {
                json!({ "name": name, "replica": replica, "isDataConsumer": *name == "trainer" })
            })
            .collect();
        let mut file = json!({
            "job": { "id": "test", "name": "test" },
            "backend": "shm",
            "roles": roles,
            "channels": channels,
            "hyperparameters": { "rounds": self.rounds, "batchSize": 16, "learningRate": 0.1 },
            "maxRunTime": self.max_run_time,
            "lifl": self.lifl,
        });
        if let Some(dataset) = &self.dataset {
            file["dataset"] = json!(dataset);
        }
        file
    }
}

/// A folder for one run, with its job file.
pub(crate) struct Place {
    /// The folder.
    pub(crate) folder: TempDir,
    /// The job file.
    pub(crate) job: PathBuf,
}

impl Place {
    /// With that job file.
    pub(crate) fn new(file: &Value) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let job = folder.path().join("job.json");
        fs::write(&job, serde_json::to_vec_pretty(file).expect("JSON")).expect("written");
        Self { folder, job }
    }

    /// The run's folder.
    pub(crate) fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// `lifl run --json` on this job with a daemon of its own.
    pub(crate) fn command(&self, more: &[&str]) -> Command {
        self.command_at(Path::new("own"), more)
    }

    /// `lifl run --json` on this job with that daemon.
    pub(crate) fn command_at(&self, daemon: &Path, more: &[&str]) -> Command {
        let mut command = lifl();
        command
            .arg("run")
            .arg(&self.job)
            .args(["--json", "--daemon"])
            .arg(daemon)
            .arg("--out")
            .arg(self.run())
            .args(more);
        command
    }

    /// Runs it to its end.
    pub(crate) fn finish(&self, more: &[&str]) -> Finished {
        let started = self.start(more);
        started.wait()
    }

    /// Starts it.
    pub(crate) fn start(&self, more: &[&str]) -> Started {
        self.start_at(Path::new("own"), more)
    }

    /// Starts it with that daemon.
    pub(crate) fn start_at(&self, daemon: &Path, more: &[&str]) -> Started {
        Started::new(
            self.command_at(daemon, more),
            self.run(),
            &self.folder.path().join("start"),
        )
    }

    /// Starts `lifl run --resume --json` on its run's folder, with a daemon of its own.
    pub(crate) fn start_resume(&self, more: &[&str]) -> Started {
        Started::new(
            resume(&self.run(), more),
            self.run(),
            &self.folder.path().join("resume"),
        )
    }

    /// Keeps the folder when this is dropped, or does not any more.
    pub(crate) fn keep(&mut self, keep: bool) {
        self.folder.disable_cleanup(keep);
    }

    /// The last model.
    pub(crate) fn model(&self) -> Vec<u8> {
        fs::read(self.run().join("model.safetensors")).expect("a model")
    }
}

/// A run under way.
pub(crate) struct Started {
    child: Child,
    run: PathBuf,
    out: PathBuf,
    err: PathBuf,
}

/// `lifl run --resume --json` on a run's folder, with a daemon of its own.
pub(crate) fn resume(run: &Path, more: &[&str]) -> Command {
    let mut command = lifl();
    command
        .args(["run", "--json", "--daemon", "own", "--resume"])
        .arg(run)
        .args(more);
    command
}

impl Started {
    /// Starts a command that works in the folder `run`; what it says goes to files whose names begin with `words`.
    pub(crate) fn new(mut command: Command, run: PathBuf, words: &Path) -> Self {
        let (out, err) = (words.with_extension("out"), words.with_extension("err"));
        command
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).expect("made"))
            .stderr(fs::File::create(&err).expect("made"));
        let child = command.spawn().expect("started");
        Self { child, run, out, err }
    }

    /// Kills everything at once, the coordinator and its daemon first, and waits until all are gone.
    pub(crate) fn kill_everything(self) {
        use nix::sys::signal::{Signal, kill};
        use nix::unistd::Pid;
        let processes = [vec![self.pid()], self.workers("")].concat();
        for pid in processes {
            // Some may have left as the daemon went.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let begun = Instant::now();
        while !self.workers("").is_empty() {
            assert!(begun.elapsed() < PATIENCE, "workers outlive a SIGKILL");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.forget();
    }

    /// The coordinator's process.
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Waits until an event of that name has come.
    pub(crate) fn wait_for(&mut self, name: &str) -> Value {
        self.wait_until(name, |_| true)
    }

    /// Waits until that round is over.
    pub(crate) fn wait_for_round(&mut self, round: u64) {
        self.wait_until("round", |event| event["round"].as_u64() >= Some(round));
    }

    /// Waits until there have been so many events of that name.
    pub(crate) fn wait_for_several(&mut self, name: &str, count: usize) {
        let begun = Instant::now();
        while events(&self.out)
            .iter()
            .filter(|event| event["event"] == name)
            .count()
            < count
        {
            let ended = self.child.try_wait().expect("a child");
            let text = || fs::read_to_string(&self.err).unwrap_or_default();
            assert!(
                ended.is_none() && begun.elapsed() < PATIENCE,
                "not {count} {name}: {}",
                text()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until such a worker's process is there.
    pub(crate) fn wait_for_worker(&self, prefix: &str) -> i32 {
        let begun = Instant::now();
        loop {
            if let Some(&pid) = self.workers(prefix).first() {
                return pid;
            }
            assert!(begun.elapsed() < PATIENCE, "no {prefix}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_until(&mut self, name: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let mut found = events(&self.out).into_iter();
            if let Some(event) = found.find(|event| event["event"] == name && is_it(event)) {
                return event;
            }
            let ended = self.child.try_wait().expect("a child");
            let text = || fs::read_to_string(&self.err).unwrap_or_default();
            assert!(ended.is_none(), "ended before {name}: {}", text());
            assert!(begun.elapsed() < PATIENCE, "no {name}: {}", text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The processes of the workers whose names begin so.
    pub(crate) fn workers(&self, prefix: &str) -> Vec<i32> {
        workers(&self.run, prefix)
    }

    /// What it has said so far.
    pub(crate) fn events(&self) -> Vec<Value> {
        events(&self.out)
    }

    /// Whether it has not ended yet.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// It has been killed, and is reaped.
    pub(crate) fn forget(mut self) {
        self.child.wait().expect("a child");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it takes too long, or leaves a worker or a socket behind.
    pub(crate) fn wait(mut self) -> Finished {
        let pid = self.child.id();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            if begun.elapsed() > PATIENCE * 2 {
                let _ = self.child.kill();
                panic!(
                    "does not end: {}",
                    fs::read_to_string(&self.err).unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let stderr = fs::read_to_string(&self.err).unwrap_or_default();
        assert!(workers(&self.run, "").is_empty(), "workers are left: {stderr}");
        let places = lifl_common::control::paths::places().into_iter();
        for folder in places.map(|place| place.folder).chain(["/run/lifl".into()]) {
            let socket = folder.join(format!("run-{pid}.sock"));
            assert!(!socket.exists(), "{} is left", socket.display());
        }
        Finished {
            status,
            events: events(&self.out),
            stderr,
            run: self.run,
        }
    }
}

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    /// How.
    pub(crate) status: ExitStatus,
    /// What it said on standard output.
    pub(crate) events: Vec<Value>,
    /// What it said on standard error.
    pub(crate) stderr: String,
    /// Its folder.
    pub(crate) run: PathBuf,
}

impl Finished {
    /// Its exit code.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// It must have failed with that code before any job began, and say all of that.
    pub(crate) fn refused(self, code: i32, says: &[&str]) -> Self {
        assert_eq!(self.code(), Some(code), "{}", self.stderr);
        for text in says {
            assert!(self.stderr.contains(text), "no {text:?} in: {}", self.stderr);
        }
        assert!(self.all("job_started").is_empty());
        self
    }

    /// It must have succeeded.
    pub(crate) fn success(self) -> Self {
        assert!(
            self.status.success(),
            "{:?}: {}\n{:#?}",
            self.status,
            self.stderr,
            self.events
        );
        self
    }

    /// The events of that name.
    pub(crate) fn all(&self, name: &str) -> Vec<&Value> {
        self.events
            .iter()
            .filter(|event| event["event"] == name)
            .collect()
    }

    /// The one event of that name.
    pub(crate) fn one(&self, name: &str) -> &Value {
        let all = self.all(name);
        assert_eq!(all.len(), 1, "{name} in {:#?}", self.events);
        all[0]
    }
}

/// Complete lines of a file of events.
fn events(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect()
}

/// Living processes of a run's workers whose names begin so.
pub(crate) fn workers(run: &Path, prefix: &str) -> Vec<i32> {
    let named = named_workers(run).into_iter();
    let mut pids: Vec<i32> = named
        .filter(|(name, _)| name.starts_with(prefix))
        .map(|(_, pid)| pid)
        .collect();
    pids.sort_unstable();
    pids
}

/// Living processes of a run's workers, by their names.
pub(crate) fn named_workers(run: &Path) -> Vec<(String, i32)> {
    let run = run.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let is_worker = words.get(1).is_some_and(|word| word == "worker") && words.contains(&run);
        let named = words.iter().skip_while(|word| *word != "--name").nth(1);
        if let Some(name) = named.filter(|_| is_worker) {
            found.push((name.clone(), pid));
        }
    }
    found.sort_unstable();
    found
}

/// Whether runs on that plane can be tested here; says so loudly where not.
///
/// # Panics
/// If they cannot and `LIFL_REQUIRE_KERNEL` is set.
pub(crate) fn can_have(plane: &str) -> bool {
    if plane == "relay" {
        return true;
    }
    let doctor = lifl().args(["doctor", "--json"]).output().expect("started");
    let able = doctor.status.success();
    if !able {
        let why = String::from_utf8_lossy(&doctor.stderr);
        eprintln!("NOT RUN on the {plane} plane: {why}");
        assert!(std::env::var_os("LIFL_REQUIRE_KERNEL").is_none(), "{why}");
    }
    able
}

/// Sends a signal.
pub(crate) fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("a living process");
}

/// A port of the loopback on which nobody listens now.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    listener.local_addr().expect("bound").port()
}

/// Has a job's channels, from the top down, use those transports, by way of a gateway or a broker on those ports.
pub(crate) fn transports(file: &mut Value, backends: &[&str], p2p: u16, mqtt: u16) {
    file["brokers"] = json!([
        { "sort": "p2p", "host": format!("127.0.0.1:{p2p}") },
        { "sort": "mqtt", "host": format!("127.0.0.1:{mqtt}") },
    ]);
    let channels = file["channels"].as_array_mut().expect("channels");
    assert_eq!(channels.len(), backends.len());
    for (channel, backend) in channels.iter_mut().zip(backends) {
        channel["backend"] = json!(backend);
    }
}

/// Two models of `F32` must agree: no element differs by more than 1e-6 of its tensor's largest magnitude.
pub(crate) fn assert_same_model(one: &[u8], other: &[u8]) {
    let read = |file| safetensors::SafeTensors::deserialize(file).expect("safetensors");
    let (one, other) = (read(one), read(other));
    assert_eq!(one.len(), other.len());
    let numbers = |bytes: &[u8]| -> Vec<f64> {
        let four = bytes.chunks_exact(4).map(|four| four.try_into().expect("four"));
        four.map(|four| f64::from(f32::from_le_bytes(four))).collect()
    };
    for (name, view) in one.tensors() {
        let (a, b) = (
            numbers(view.data()),
            numbers(other.tensor(&name).expect("there").data()),
        );
        let largest = a.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        assert_eq!(a.len(), b.len());
        for (x, y) in a.iter().zip(&b) {
            assert!(
                (x - y).abs() <= 1e-6 * largest,
                "{name}: {x} and {y} of {largest}"
            );
        }
        assert!(largest > 0.0, "{name} is all zeros");
    }
}
