//! An initramfs: the files of a guest, as an archive in the form that the kernel unpacks (cpio "newc",
//! Documentation/driver-api/early-userspace/buffer-format.rst of its source).

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive in the making.
pub(super) struct Initramfs<W> {
    to: W,
    folders: BTreeSet<String>,
    files: BTreeSet<String>,
    entries: u32,
}

impl<W: Write> Initramfs<W> {
    pub(super) fn new(to: W) -> Self {
        Self {
            to,
            folders: BTreeSet::new(),
            files: BTreeSet::new(),
            entries: 0,
        }
    }

    /// A folder, and those above it; an error where a file has its name.
    pub(super) fn folder(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above)?;
        }
        if self.files.contains(path) {
            return Err(taken(path));
        }
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER, &[])
    }

    /// A file that anybody may read and execute; an error where a folder or another file has its name.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.leaf(path, PROGRAM, content)
    }

    /// A copy of one of this machine's files.
    pub(super) fn copy(&mut self, from: &Path, path: &str) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(self.file(path, &content)?)
    }

    pub(super) fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.leaf(path, LINK, to.as_bytes())
    }

    /// Ends the archive.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    /// Something that is no folder. The kernel would unpack one of two things of the same name, and not say which.
    fn leaf(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        if self.folders.contains(path) || !self.files.insert(path.to_owned()) {
            return Err(taken(path));
        }
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above)?;
        }
        self.entry(path, mode, content)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_start_matches('/');
        self.entries += 1;
        // Number, mode, user, group, links, time, size, four device numbers, length of the name with its 0, checksum.
        let (name, size) = (path.len() + 1, content.len());
        let number = self.entries;
        write!(
            self.to,
            "070701{number:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name:08x}{0:08x}",
            0, 1
        )?;
        self.to.write_all(path.as_bytes())?;
        self.to.write_all(&[0])?;
        self.pad(HEADER_BYTES + name)?;
        self.to.write_all(content)?;
        self.pad(size)
    }

    /// Names and contents end at a multiple of four bytes.
    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.to
            .write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

const HEADER_BYTES: usize = 110;

fn taken(path: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::AlreadyExists,
        format!("/{path} is in the archive already"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_things_have_one_name() {
        let mut archive = Initramfs::new(Vec::new());
        archive.file("/check", b"a script").expect("written");
        for (refused, name) in [
            (archive.file("/check/clone/program", b""), "check"),
            (archive.link("check", "/bin/sh"), "check"),
            (archive.folder("check"), "check"),
        ] {
            let error = refused.expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(error.to_string(), "/check is in the archive already");
        }
        archive.file("/clone/program", b"").expect("written");
        archive.file("/clone", b"").expect_err("a folder has its name");
    }

    #[test]
    fn an_archive_has_a_header_before_each_name_and_folders_before_what_is_in_them() {
        let mut bytes = Vec::new();
        let mut archive = Initramfs::new(&mut bytes);
        archive.file("/a/b/c", b"12345").expect("written");
        archive.folder("a/b").expect("written");
        archive.finish().expect("written");
        assert_eq!(bytes.len() % 4, 0);
        let names: Vec<&str> = ["a\0", "a/b\0", "a/b/c\0", "TRAILER!!!\0"].to_vec();
        let mut at = 0;
        for name in names {
            let field = |n: usize| {
                let from = at + 6 + 8 * n;
                let digits = std::str::from_utf8(&bytes[from..from + 8]).expect("text");
                usize::from_str_radix(digits, 16).expect("a number")
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            assert_eq!(field(11), name.len());
            let begins = at + HEADER_BYTES;
            assert_eq!(&bytes[begins..begins + name.len()], name.as_bytes());
            at = (begins + name.len()).next_multiple_of(4) + field(6).next_multiple_of(4);
        }
        assert_eq!(at, bytes.len());
    }
}
