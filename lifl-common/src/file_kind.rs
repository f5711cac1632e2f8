//! What a file is that is not what was asked for, told by its first bytes: so that a message can name it, and what to do.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

/// Bytes of a file's beginning that tell what it is: a tar archive says so in byte 257.
pub const START_BYTES: usize = 1024;

/// A format that neither models nor data sets have here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum FileKind {
    LfsPointer,
    Page,
    Xml,
    Json,
    Csv,
    Text,
    Pickle,
    Torch,
    Keras,
    Hdf5,
    Gguf,
    Npy,
    Npz,
    Zip,
    Gzip,
    Tar,
    Packed(&'static str),
    Parquet,
    Arrow,
    Matlab,
    Image,
    Other(&'static str),
}

impl FileKind {
    /// What the file is, for a message that goes on with what it should be.
    pub fn name(self) -> &'static str {
        match self {
            Self::LfsPointer => "a Git LFS pointer in place of the file",
            Self::Page => "an HTML page, perhaps a login or an error page that was downloaded",
            Self::Xml => "XML, perhaps a server's error that was downloaded",
            Self::Json => "JSON",
            Self::Csv => "a table in text (CSV)",
            Self::Text => "text",
            Self::Pickle => "a Python pickle",
            Self::Torch => "a PyTorch file (a zip archive with a pickle in it)",
            Self::Keras => "a Keras archive (.keras)",
            Self::Hdf5 => "an HDF5 file (as Keras's .h5 is)",
            Self::Gguf => "a GGUF file",
            Self::Npy => "one NumPy array (.npy)",
            Self::Npz => "an archive of NumPy arrays (.npz)",
            Self::Zip => "a zip archive",
            Self::Gzip => "gzip data",
            Self::Tar => "a tar archive",
            Self::Packed(what) | Self::Other(what) => what,
            Self::Parquet => "a Parquet file",
            Self::Arrow => "an Arrow file",
            Self::Matlab => "a MATLAB file",
            Self::Image => "one image",
        }
    }

    /// What makes it the file that was meant, whatever that is; `None` where that depends on what was meant.
    pub fn remedy(self) -> Option<&'static str> {
        match self {
            Self::LfsPointer => Some("fetch the file itself with `git lfs pull`"),
            Self::Page | Self::Xml => Some(
                "open its URL in a browser, sign in where it asks for that, and download the file itself",
            ),
            Self::Gzip => Some("unpack it with `gunzip`"),
            Self::Zip => Some("unpack it with `unzip`, and name what was in it"),
            Self::Tar => Some("unpack it with `tar -xf`, and name what was in it"),
            Self::Packed(_) => Some("unpack it, and name what was in it"),
            _ => None,
        }
    }
}

/// What a file is that begins so, if that is one of the formats that are known to be something else.
pub fn recognise(start: &[u8]) -> Option<FileKind> {
    let magic: [(&[u8], FileKind); 23] = [
        (b"version https://git-lfs", FileKind::LfsPointer),
        (b"\x93NUMPY", FileKind::Npy),
        (b"GGUF", FileKind::Gguf),
        (b"\x89HDF\r\n\x1a\n", FileKind::Hdf5),
        (b"\x1f\x8b", FileKind::Gzip),
        (b"PAR1", FileKind::Parquet),
        (b"ARROW1", FileKind::Arrow),
        (b"\x89PNG", FileKind::Image),
        (b"\xff\xd8\xff", FileKind::Image),
        (b"GIF8", FileKind::Image),
        (b"BZh", FileKind::Packed("bzip2 data")),
        (b"\xfd7zXZ\0", FileKind::Packed("xz data")),
        (b"\x28\xb5\x2f\xfd", FileKind::Packed("zstd data")),
        (b"7z\xbc\xaf\x27\x1c", FileKind::Packed("a 7z archive")),
        (b"Rar!", FileKind::Packed("a RAR archive")),
        (b"MATLAB 5.0", FileKind::Matlab),
        (b"SQLite format 3\0", FileKind::Other("an SQLite database")),
        (b"%PDF", FileKind::Other("a PDF document")),
        (b"\x7fELF", FileKind::Other("a program")),
        (b"\xca\xfe\xba\xbe", FileKind::Other("a program")),
        (b"RIFF", FileKind::Other("a sound or video")),
        (b"PK\x05\x06", FileKind::Zip),
        (b"PK\x03\x04", FileKind::Zip),
    ];
    let known = magic.into_iter().find(|(magic, _)| start.starts_with(magic));
    match known {
        Some((_, FileKind::Zip)) => return Some(zip(start)),
        Some((_, foreign)) => return Some(foreign),
        None => {}
    }
    match start {
        // Protocols 2 to 5; older ones have no magic.
        [0x80, 2..=5, ..] => return Some(FileKind::Pickle),
        [_, _, _, _, b'T', b'F', b'L', b'3', ..] => return Some(FileKind::Other("a TensorFlow Lite model")),
        _ if start.get(257..262) == Some(b"ustar") => return Some(FileKind::Tar),
        _ => {}
    }
    text(start)
}

/// What a zip archive is by the name of its first entry (PKZIP's APPNOTE, 4.3.7).
fn zip(start: &[u8]) -> FileKind {
    let length = match start.get(26..28) {
        Some(&[low, high]) => usize::from(u16::from_le_bytes([low, high])),
        _ => 0,
    };
    let name = start.get(30..).unwrap_or_default();
    let name = String::from_utf8_lossy(&name[..length.min(name.len())]);
    if name.ends_with("data.pkl")
        || name.ends_with(".data/serialization_id")
        || name.ends_with("/.format_version")
    {
        FileKind::Torch
    } else if name.ends_with(".npy") {
        FileKind::Npz
    } else if matches!(&*name, "metadata.json" | "config.json" | "model.weights.h5") {
        FileKind::Keras
    } else {
        FileKind::Zip
    }
}

/// What a text is; `None` if it is none.
fn text(start: &[u8]) -> Option<FileKind> {
    let start = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start);
    // The last character may have been cut.
    let known = match std::str::from_utf8(start) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&start[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    if known.is_empty() || known.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        return None;
    }
    let lower = known.trim_start().to_ascii_lowercase();
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| lower.starts_with(prefix));
    Some(
        if begins(&["<!doctype html", "<html", "<head", "<body", "<script", "<!--"]) {
            FileKind::Page
        } else if begins(&["<"]) {
            FileKind::Xml
        } else if begins(&["{", "["]) {
            FileKind::Json
        } else if lower
            .lines()
            .next()
            .is_some_and(|line| line.split([',', ';', '\t']).count() > 1)
        {
            FileKind::Csv
        } else {
            FileKind::Text
        },
    )
}

/// Why a path is no file to read.
#[derive(Debug)]
pub enum Unopened {
    /// It is something else: what, for a message.
    NoFile(&'static str),
    /// It cannot be opened.
    Io(io::Error),
}

/// Opens a file for reading. Whatever stands there, this does not wait: a pipe that nobody writes to is refused, not read.
///
/// # Errors
/// If it is no regular file, or cannot be opened.
pub fn open_file(path: &Path) -> Result<(File, Metadata), Unopened> {
    let metadata = std::fs::metadata(path).map_err(Unopened::Io)?;
    // To open a device may do something; only then is it known that what was looked at is what was opened.
    regular(&metadata)?;
    let mut options = File::options();
    options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let file = options.open(path).map_err(Unopened::Io)?;
    let metadata = file.metadata().map_err(Unopened::Io)?;
    regular(&metadata)?;
    Ok((file, metadata))
}

fn regular(metadata: &Metadata) -> Result<(), Unopened> {
    let kind = metadata.file_type();
    Err(Unopened::NoFile(if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }))
}

/// The first bytes of a file.
///
/// # Errors
/// If it cannot be read.
pub fn start_of(file: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    file.take(START_BYTES as u64).read_to_end(&mut start)?;
    Ok(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_how_they_begin() {
        let zip = |name: &str| {
            let mut start = b"PK\x03\x04".to_vec();
            start.resize(26, 0);
            start.extend((name.len() as u16).to_le_bytes());
            start.extend([0, 0]);
            start.extend(name.bytes());
            start
        };
        let mut tar = vec![0; 512];
        tar[..5].copy_from_slice(b"train");
        tar[257..262].copy_from_slice(b"ustar");
        for (start, what) in [
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec(),
                FileKind::LfsPointer,
            ),
            (b"\n <!DOCTYPE html>".to_vec(), FileKind::Page),
            (b"\xef\xbb\xbf<HTML>".to_vec(), FileKind::Page),
            (b"<?xml version='1.0'?><Error>".to_vec(), FileKind::Xml),
            (b"{\"weight_map\": {}}".to_vec(), FileKind::Json),
            (b"label,p1,p2\n5,0,0\n".to_vec(), FileKind::Csv),
            (b"5\t0\t0\n".to_vec(), FileKind::Csv),
            ("größer\n".as_bytes()[..4].to_vec(), FileKind::Text),
            (b"\x80\x04\x95".to_vec(), FileKind::Pickle),
            (zip("archive/data.pkl"), FileKind::Torch),
            (zip("x_train.npy"), FileKind::Npz),
            (zip("metadata.json"), FileKind::Keras),
            (zip("train/0.png"), FileKind::Zip),
            (tar, FileKind::Tar),
            (b"PAR1\x15".to_vec(), FileKind::Parquet),
        ] {
            assert_eq!(recognise(&start), Some(what));
        }
        for start in [&b""[..], b"\0\0\x08\x03\0\0", b"\x08\x01\x12\x07pytorch"] {
            assert_eq!(recognise(start), None, "{start:?}");
        }
    }

    #[test]
    fn what_is_no_file_is_named_without_waiting() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let no_file = |path: &Path| match open_file(path) {
            Err(Unopened::NoFile(what)) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(no_file(&pipe), "a pipe");
        assert_eq!(no_file(folder.path()), "a folder");
        assert_eq!(no_file(Path::new("/dev/zero")), "a device");
        assert!(matches!(
            open_file(&folder.path().join("none")),
            Err(Unopened::Io(_))
        ));
    }
}
