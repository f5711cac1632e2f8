//! Job files, worker files, and the files of Flame's control plane.

use std::fs;
use std::path::PathBuf;

use lifl_common::config::{self, JobSpec, Kind, Overrides, Transport};

use crate::input::folder;

/// What stands before each file of an input with several; the file's name follows, up to the end of the line.
const MARK: &[u8] = b"=== ";

/// The longest file name that is taken from an input.
const NAME_BYTES: usize = 32;

/// The bytes are one file, or several with `=== NAME` on a line before each. Either they are a job that keeps its
/// promises and that a run's folder gives back unchanged, or there are problems, which can be shown.
pub fn config(data: &[u8]) {
    let folder = folder();
    let mut paths = Vec::new();
    for (n, (name, content)) in files(data).into_iter().enumerate() {
        // In a folder of its own: the same name may come again, and what a file is may depend on its name.
        let own = folder.path().join(n.to_string());
        fs::create_dir(&own).expect("a folder");
        let path = own.join(format!("{name}.json"));
        fs::write(&path, content).expect("a file");
        paths.push(path);
    }
    let plain = load(&paths, &Overrides::default());
    let preferring = Overrides {
        rounds: Some(3),
        seed: Some(1),
        prefer: Some(Transport::P2p),
        ..Overrides::default()
    };
    load(&paths, &preferring);
    // A folder stands for the files in it, in the order of their paths, which up to ten is that of the input.
    if let Some(job) = plain.filter(|_| paths.len() <= 10) {
        assert_eq!(
            load(&[folder.path().to_owned()], &Overrides::default()),
            Some(job)
        );
    }
}

fn load(paths: &[PathBuf], overrides: &Overrides) -> Option<JobSpec> {
    match config::load(paths, overrides) {
        Ok(loaded) => {
            keeps_its_promises(&loaded.job);
            let text = serde_json::to_string(&loaded.job).expect("a job is JSON");
            let again: JobSpec = serde_json::from_str(&text).expect("a run's job.json");
            assert_eq!(again, loaded.job);
            Some(loaded.job)
        }
        Err(error) => {
            assert!(!error.problems.is_empty());
            let lines = error.problems.len() + usize::from(error.omitted > 0);
            assert_eq!(error.to_string().lines().count(), lines, "{error}");
            None
        }
    }
}

/// What the rest of LIFL relies on in a job that was loaded.
fn keeps_its_promises(job: &JobSpec) {
    assert!(job.rounds >= 1 && job.workers.len() <= config::MAX_WORKERS);
    assert!((1..=config::MAX_LEVELS as u32).contains(&job.levels()));
    assert_eq!(
        job.workers
            .iter()
            .filter(|worker| worker.kind == Kind::Top)
            .count(),
        1
    );
    let shares: Vec<Option<u32>> = job.trainers().map(|trainer| trainer.share).collect();
    assert!(!shares.is_empty());
    assert!(
        (0..).zip(&shares).all(|(n, share)| *share == Some(n)),
        "{shares:?}"
    );
    let mut names: Vec<&str> = job.workers.iter().map(|worker| worker.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), job.workers.len(), "names are unique");
    for worker in &job.workers {
        assert_eq!(worker.up.is_none(), worker.kind == Kind::Top);
        assert_eq!(worker.down.is_none(), worker.kind == Kind::Trainer);
        let above = |other: &config::WorkerSpec| other.level + 1 == worker.level && other.down == worker.up;
        assert!(
            worker.up.is_none() || job.workers.iter().any(above),
            "{}",
            worker.name
        );
    }
    let shared: u32 = job.datasets().iter().map(|(_, trainers)| trainers).sum();
    assert!(job.data.is_none() || shared as usize == shares.len());
    for trainer in job.trainers().take(100) {
        let (part, parts) = job.part_of(trainer);
        assert!(part < parts);
    }
}

/// The files of an input, with their names.
fn files(data: &[u8]) -> Vec<(String, &[u8])> {
    if !data.starts_with(MARK) {
        return vec![("job".to_owned(), data)];
    }
    let mut files = Vec::new();
    let mut rest = &data[MARK.len()..];
    while !rest.is_empty() {
        let line = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
        let name: String = rest[..line.min(NAME_BYTES)]
            .iter()
            .map(|&byte| char::from(byte))
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .collect();
        let body = &rest[(line + 1).min(rest.len())..];
        let next = body
            .windows(MARK.len() + 1)
            .position(|window| window[0] == b'\n' && window[1..] == *MARK);
        let (content, after) = match next {
            Some(at) => (&body[..at + 1], &body[at + 1 + MARK.len()..]),
            None => (body, &[][..]),
        };
        files.push((name, content));
        rest = after;
    }
    files
}
