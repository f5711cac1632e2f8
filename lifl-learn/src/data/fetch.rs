//! Datasets from a URL: downloaded once, kept, and used by every later run.
//!
//! ```text
//! (nothing) ──lock──▶ NAME.part ──a data set, and hashes right──▶ NAME ──found bad──▶ fetched anew, once
//!                        └──anything else──▶ (nothing)
//! ```
//!
//! The file's lock makes processes that start together download once; the rename makes a file under its name a whole one. A file
//! that is there and sound is used as it is, without a lock: the cache may be one that this user cannot write to.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use lifl_common::config::{Dataset, mask};
use sha2::{Digest, Sha256};

use super::error::DataError;
use super::files::{self, Files};
use super::progress::Progress;
use super::{http, idx};

/// The longest download: a hundred times MNIST.
const MOST_BYTES: u64 = 1 << 30;

/// Whether the file that the URL names is in this user's cache.
pub(super) fn is_kept(url: &Dataset) -> bool {
    cache_folder().is_ok_and(|cache| cache.join(file_name(url.as_str())).is_file())
}

/// The data set that the URL names, from this user's cache.
///
/// # Errors
/// If it cannot be downloaded, is no data set, or not the file of that SHA-256.
pub(super) fn read(url: &Dataset, sha256: Option<&str>, progress: &Progress) -> Result<Files, DataError> {
    let cache = Cache {
        folder: cache_folder()?,
        most_bytes: MOST_BYTES,
    };
    cache.read(url, sha256, progress, &files::read)
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

/// The folder of downloads.
struct Cache {
    folder: PathBuf,
    most_bytes: u64,
}

impl Cache {
    /// What `parse` makes of the file that the URL names.
    fn read<T>(
        &self,
        url: &Dataset,
        sha256: Option<&str>,
        progress: &Progress,
        parse: &dyn Fn(&Path) -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        let path = self.folder.join(file_name(url.as_str()));
        let bad = match kept(&path, url, sha256, parse) {
            Some(Ok(data)) => return Ok(data),
            Some(Err(error)) => Some((identity(&path), error)),
            None => None,
        };
        let cannot = |what| DataError::cache(&self.folder, what);
        fs::create_dir_all(&self.folder).map_err(cannot("make the folder for downloads"))?;
        let lock_path = with_suffix(&path, ".lock");
        let lock = File::create(&lock_path).map_err(cannot("write to the folder of downloads"))?;
        if lock.try_lock().is_err() {
            progress.waiting.store(true, Ordering::Relaxed);
            lock.lock().map_err(DataError::io(&lock_path, "lock it"))?;
            progress.waiting.store(false, Ordering::Relaxed);
        }
        // Another process may have put it there, or another one in the place of the bad one, meanwhile.
        let known_bad = bad.as_ref().and_then(|(identity, _)| *identity);
        if (bad.is_none() || identity(&path) != known_bad)
            && let Some(Ok(data)) = kept(&path, url, sha256, parse)
        {
            return Ok(data);
        }
        if let Some((_, error)) = &bad {
            progress.note(format!(
                "the kept download of {url} is not what it should be and is fetched anew: {error}"
            ));
        }
        let part = with_suffix(&path, ".part");
        let fetched = self.fetch(url, sha256, &part, progress, parse).and_then(|data| {
            fs::rename(&part, &path).map_err(cannot("put the download there"))?;
            Ok(data)
        });
        progress.downloading.store(false, Ordering::Relaxed);
        if fetched.is_err() {
            // Best effort: the next download begins by emptying it.
            let _ = fs::remove_file(&part);
        }
        fetched
    }

    /// Downloads all of `url` into `part`, and makes sure that it is what it should be.
    fn fetch<T>(
        &self,
        url: &Dataset,
        sha256: Option<&str>,
        part: &Path,
        progress: &Progress,
        parse: &dyn Fn(&Path) -> Result<T, DataError>,
    ) -> Result<T, DataError> {
        self.download(url, part, progress)?;
        if let Some(expected) = sha256 {
            check_hash(part, url, expected)?;
        }
        parse(part).map_err(|error| DataError::NoDataSet {
            url: url.clone(),
            found: match error {
                // The file is gone when this is read.
                DataError::Format { found, .. } => found,
                other => other.to_string().replace(&*part.to_string_lossy(), "it"),
            },
        })
    }

    fn download(&self, url: &Dataset, part: &Path, progress: &Progress) -> Result<(), DataError> {
        let failed = |source: http::Failed| DataError::Download {
            url: url.clone(),
            source,
        };
        if url.reveal() == url.as_str() && url.as_str().contains("***") {
            let error = "its password or token is not kept with a run: start a run with the whole URL, which puts the file into the \
                         cache, and resume this one then";
            return Err(failed(error.into()));
        }
        progress.received.store(0, Ordering::Relaxed);
        progress.total.store(0, Ordering::Relaxed);
        progress.downloading.store(true, Ordering::Relaxed);
        let mut answer = http::get(url.reveal()).map_err(failed)?;
        let too_large = || failed(format!("it is larger than {} bytes", self.most_bytes).into());
        if answer.length.is_some_and(|length| length > self.most_bytes) {
            return Err(too_large());
        }
        if let Some(encoding) = &answer.encoding
            && !matches!(
                encoding.to_ascii_lowercase().as_str(),
                "gzip" | "x-gzip" | "identity" | ""
            )
        {
            let error = format!("the server packs it with {encoding}, which nobody asked for");
            return Err(failed(error.into()));
        }
        progress
            .total
            .store(answer.length.unwrap_or(0), Ordering::Relaxed);
        let mut file = File::create(part).map_err(DataError::cache(part, "make it"))?;
        let mut buffer = vec![0; 64 << 10];
        let mut received = 0_u64;
        loop {
            let n = match answer.body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return Err(failed(
                        format!("it broke off after {received} bytes: {error}").into(),
                    ));
                }
            };
            received += n as u64;
            if received > self.most_bytes {
                return Err(too_large());
            }
            file.write_all(&buffer[..n])
                .map_err(DataError::cache(part, "write to it"))?;
            progress.received.store(received, Ordering::Relaxed);
        }
        if let Some(length) = answer.length.filter(|&length| length != received) {
            return Err(failed(
                format!("it broke off after {received} of {length} bytes").into(),
            ));
        }
        file.flush().map_err(DataError::cache(part, "write to it"))
    }
}

/// What is made of the file that is there; `None` if there is none.
fn kept<T>(
    path: &Path,
    url: &Dataset,
    sha256: Option<&str>,
    parse: &dyn Fn(&Path) -> Result<T, DataError>,
) -> Option<Result<T, DataError>> {
    if !path.is_file() {
        return None;
    }
    let hash = sha256.map_or(Ok(()), |expected| check_hash(path, url, expected));
    Some(hash.and_then(|()| parse(path)))
}

/// Which file is there, to tell whether it is still the same one.
fn identity(path: &Path) -> Option<(u64, i64, i64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec()))
}

/// Makes sure that a file has that SHA-256: as it came, or, if a server packed it on its way, without that.
fn check_hash(path: &Path, url: &Dataset, expected: &str) -> Result<(), DataError> {
    let file = File::open(path).map_err(DataError::io(path, "open it"))?;
    let found = hash(file).map_err(DataError::io(path, "read it"))?;
    let same = |found: &str| found.eq_ignore_ascii_case(expected);
    if same(&found) {
        return Ok(());
    }
    // What cannot be unpacked has no other hash.
    let unpacked = idx::open(path)?.take(MOST_BYTES);
    if hash(unpacked).is_ok_and(|found| same(&found)) {
        return Ok(());
    }
    Err(DataError::Checksum {
        url: url.clone(),
        found,
        expected: expected.to_ascii_lowercase(),
    })
}

fn hash(mut file: impl Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The last part of a URL without secrets, for people, behind its hash, so that no two URLs share a file: what is written into a
/// run's folder finds the file again.
fn file_name(url: &str) -> String {
    let url = mask(url);
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
