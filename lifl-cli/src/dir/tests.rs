//! What is opened of what others may have put there, and whose folders are used.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::{Gid, geteuid, mkfifo};
use tempfile::TempDir;

use super::*;

/// A user and a group that no machine has.
const OTHER: u32 = 4_205_001;

fn folder() -> (TempDir, Dir) {
    let outer = tempfile::tempdir().expect("a folder");
    let dir = Dir::at(outer.path()).expect("a folder");
    (outer, dir)
}

/// Where users' folders can be given to others; says so where not.
fn is_root() -> bool {
    let root = geteuid().is_root();
    if !root {
        let required = std::env::var_os("LIFL_REQUIRE_KERNEL").is_some();
        assert!(!required, "LIFL_REQUIRE_KERNEL is set and this is not root");
        eprintln!("SKIPPED: not root");
    }
    root
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("there").mode() & 0o7777
}

/// As root has it that nobody called through sudo, in no container.
fn of_root() -> Trust {
    Trust {
        uids: vec![0],
        groups: vec![Gid::from_raw(0)],
        root: true,
        container: false,
    }
}

/// As that user has it.
fn of_user(uid: u32) -> Trust {
    Trust {
        uids: vec![0, uid],
        groups: vec![Gid::from_raw(uid)],
        root: false,
        container: false,
    }
}

#[test]
fn nothing_but_a_file_is_opened_and_nobody_waits() {
    let (outer, dir) = folder();
    let victim = outer.path().join("victim");
    fs::write(&victim, "precious").expect("written");
    let at = |name: &str| outer.path().join(name);
    symlink(&victim, at("link")).expect("linked");
    symlink(at("nowhere"), at("dangling")).expect("linked");
    symlink("link", at("link-to-link")).expect("linked");
    mkfifo(&at("fifo"), Mode::S_IRWXU).expect("made");
    fs::create_dir(at("folder")).expect("made");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("bound");
    for (name, what) in [
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
        ("link-to-link", "symbolic link"),
        ("fifo", "FIFO"),
        ("folder", "folder"),
        ("socket", "FIFO or a socket"),
        ("../x", "not the name of a file"),
        ("a/b", "not the name of a file"),
        ("..", "not the name of a file"),
        ("", "not the name of a file"),
    ] {
        let opened = [dir.open(name), dir.open_or_create(name), dir.append(name)];
        for error in opened.map(|opened| opened.expect_err(name)) {
            let is_folder = name == "folder" && error.raw_os_error() == Some(Errno::EISDIR as i32);
            assert!(is_folder || error.to_string().contains(what), "{name}: {error}");
        }
        assert!(dir.create_new(name).is_err(), "{name}");
        assert!(
            dir.read(name, 100).is_err() && dir.tail(name, 100).is_err(),
            "{name}"
        );
    }
    assert!(!at("nowhere").exists());
    assert_eq!(fs::read(&victim).expect("there"), b"precious");
}

#[test]
fn a_file_with_another_name_is_read_but_not_written() {
    let (outer, dir) = folder();
    fs::write(outer.path().join("victim"), "precious").expect("written");
    dir.link("victim", "log").expect("linked");
    assert_eq!(dir.read("log", 8).expect("read"), b"precious");
    for error in [dir.append("log"), dir.open_or_create("log")].map(|opened| opened.expect_err("2 names")) {
        assert!(error.to_string().contains("2 names"), "{error}");
    }
}

#[test]
fn what_is_made_is_its_users_alone() {
    let (outer, dir) = folder();
    drop((
        dir.create_new("a").expect("made"),
        dir.append("b").expect("made"),
        dir.make_folder("c").expect("made"),
    ));
    assert_eq!(
        ["a", "b", "c"].map(|name| mode(&outer.path().join(name))),
        [0o600, 0o600, 0o700]
    );
}

#[test]
fn long_files_are_refused_or_read_from_their_end() {
    let (outer, dir) = folder();
    fs::write(outer.path().join("a"), "0123456789").expect("written");
    assert_eq!(dir.read("a", 10).expect("read"), b"0123456789");
    let error = dir.read("a", 9).expect_err("longer").to_string();
    assert!(error.contains("10 bytes") && error.contains('9'), "{error}");
    assert_eq!(dir.tail("a", 3).expect("read"), b"789");
    // As large as no memory, without a block on the disk.
    let huge = fs::File::create(outer.path().join("huge")).expect("made");
    huge.set_len(1 << 42).expect("sparse");
    assert!(dir.read("huge", 1 << 20).is_err());
}

#[test]
fn a_folder_that_is_moved_away_is_still_the_one_that_is_written_to() {
    let (outer, _) = folder();
    let (path, moved) = (outer.path().join("run"), outer.path().join("moved"));
    let dir = Trust::new(&[]).make(&path).expect("made");
    fs::rename(&path, &moved).expect("moved");
    fs::create_dir(&path).expect("made");
    dir.create_new("a")
        .expect("made")
        .write_all(b"a")
        .expect("written");
    dir.make_folder("logs").expect("made");
    dir.rename("a", "b").expect("renamed");
    assert_eq!(fs::read_dir(&path).expect("there").count(), 0);
    let mut names = dir.names().expect("read");
    names.sort();
    assert_eq!(names, ["b", "logs"]);
    assert!(moved.join("b").exists() && moved.join("logs").exists());
}

#[test]
fn a_subfolder_that_is_a_link_or_more_peoples_is_refused() {
    let (outer, dir) = folder();
    fs::create_dir(outer.path().join("elsewhere")).expect("made");
    symlink("elsewhere", outer.path().join("logs")).expect("linked");
    assert!(dir.make_folder("logs").is_err());
    set_mode(&outer.path().join("elsewhere"), 0o777);
    let error = dir.make_folder("elsewhere").expect_err("everybody's").to_string();
    assert!(error.contains("may write to it"), "{error}");
}

#[test]
fn own_links_and_links_of_root_lead_to_the_folder() {
    let (outer, _) = folder();
    let disk = outer.path().join("disk");
    fs::create_dir_all(disk.join("deep")).expect("made");
    symlink("disk/deep", outer.path().join("runs")).expect("linked");
    symlink(&disk, outer.path().join("absolute")).expect("linked");
    let trust = Trust::new(&[]);
    let real = fs::canonicalize(&disk).expect("there");
    let made = trust
        .make(&outer.path().join("runs/../../absolute/./deep/a/b"))
        .expect("made");
    assert_eq!(made.path(), real.join("deep/a/b"));
    assert_eq!(
        (mode(&disk.join("deep/a")), mode(&disk.join("deep/a/b"))),
        (0o755, 0o700)
    );
    symlink("round", outer.path().join("round")).expect("linked");
    assert!(trust.make(&outer.path().join("round/a")).is_err());
    let error = trust.open(&outer.path().join("none")).expect_err("not there");
    assert!(matches!(error, FolderError::System { .. }), "{error}");
    fs::write(outer.path().join("file"), "").expect("written");
    let error = trust.make(&outer.path().join("file/a")).expect_err("a file");
    assert!(matches!(error, FolderError::NotAFolder(_)), "{error}");
}

#[test]
fn names_that_are_taken_are_passed_over() {
    let (outer, _) = folder();
    let parent = outer.path().join("runs");
    let names = || ["job", "job-2", "job-3"].map(str::to_owned).into_iter();
    let trust = Trust::new(&[]);
    let made: Vec<_> = (0..3)
        .map(|_| {
            trust
                .make_fresh(&parent, names())
                .expect("made")
                .path()
                .to_owned()
        })
        .collect();
    assert!(made[0].ends_with("job") && made[1].ends_with("job-2") && made[2].ends_with("job-3"));
    assert!(trust.make_fresh(&parent, names()).is_err());
}

#[test]
fn folders_that_others_may_write_to_are_refused_with_what_helps() {
    let (outer, _) = folder();
    let (above, run) = (outer.path().join("above"), outer.path().join("above/run"));
    fs::create_dir(&above).expect("made");
    let trust = Trust {
        root: true,
        ..of_user(nix::unistd::geteuid().as_raw())
    };
    set_mode(&above, 0o777);
    // One may be made there, which is held, but none is used that is there already; root makes none further below.
    let user = of_user(nix::unistd::geteuid().as_raw());
    for who in [&trust, &user] {
        drop(who.make(&run).expect("its own"));
        let error = who.open(&run).expect_err("everybody's").to_string();
        assert!(
            error.contains("above (mode 777)") && error.contains("chmod o-w"),
            "{error}"
        );
        fs::remove_dir(&run).expect("empty");
    }
    let error = trust
        .make(&run.join("below"))
        .expect_err("everybody's")
        .to_string();
    assert!(error.contains("above (mode 777)"), "{error}");
    assert!(!run.exists());
    // As /tmp is.
    set_mode(&above, 0o1777);
    drop(trust.make(&run).expect("sticky"));
    set_mode(&run, 0o1777);
    let error = trust.open(&run).expect_err("everybody's").to_string();
    assert!(
        error.contains("run (mode 1777)") && error.contains("chmod go-w"),
        "{error}"
    );
}

#[test]
fn folders_of_others_are_refused_by_name_wherever_they_are_on_the_way() {
    if !is_root() {
        return;
    }
    let (outer, _) = folder();
    let (theirs, run) = (outer.path().join("theirs"), outer.path().join("theirs/deep/run"));
    fs::create_dir_all(&run).expect("made");
    chown(&theirs, Some(OTHER), Some(OTHER)).expect("given away");
    let refused = |result: Result<Dir, FolderError>, folder: &Path| {
        let error = result.expect_err("another user's");
        let FolderError::Foreign { path, owner } = &error else {
            panic!("{error}")
        };
        assert_eq!((path.as_path(), *owner), (folder, OTHER));
        assert!(error.to_string().contains("--trust-owner 4205001"), "{error}");
    };
    let theirs = fs::canonicalize(theirs).expect("there");
    refused(of_root().open(&run), &theirs);
    refused(of_root().make(&run.join("new")), &theirs);
    refused(
        of_root().make_fresh(&theirs, std::iter::once("new".to_owned())),
        &theirs,
    );
    assert!(!run.join("new").exists() && !theirs.join("new").exists());
    // Who called sudo, or whom the administrator names.
    let trusting = Trust {
        uids: vec![0, OTHER],
        ..of_root()
    };
    assert_eq!(
        trusting.open(&run).expect("trusted").path(),
        theirs.join("deep/run")
    );
    // A link of theirs, in a folder of root's.
    let link = outer.path().join("link");
    symlink("/", &link).expect("linked");
    std::os::unix::fs::lchown(&link, Some(OTHER), Some(OTHER)).expect("given away");
    let link = fs::canonicalize(outer.path()).expect("there").join("link");
    refused(of_root().open(&link), &link);
}

#[test]
fn an_ordinary_user_may_work_in_a_folder_that_is_shared_with_a_group_of_theirs() {
    if !is_root() {
        return;
    }
    let (outer, _) = folder();
    let (shared, run) = (outer.path().join("shared"), outer.path().join("shared/run"));
    fs::create_dir(&shared).expect("made");
    chown(&shared, Some(OTHER), Some(OTHER + 7)).expect("given away");
    set_mode(&shared, 0o2775);
    let mut colleague = of_user(OTHER + 1);
    assert!(matches!(colleague.make(&run), Err(FolderError::Foreign { .. })));
    colleague.groups.push(Gid::from_raw(OTHER + 7));
    drop(colleague.make(&run).expect("shared"));
    // The run's own folder is nobody else's.
    set_mode(&run, 0o770);
    chown(&run, Some(OTHER + 1), Some(OTHER + 7)).expect("given away");
    assert!(matches!(colleague.open(&run), Err(FolderError::Writable { .. })));
    chown(&run, Some(OTHER + 1), Some(OTHER + 1)).expect("given away");
    drop(colleague.open(&run).expect("of a group of the user's own"));
    // root shares no group.
    assert!(matches!(of_root().open(&run), Err(FolderError::Foreign { .. })));
}

/// A mount of that user's folder, in a mount namespace of this thread's own.
#[test]
fn in_a_container_a_folder_that_was_handed_in_is_used() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    if !is_root() {
        return;
    }
    let (outer, _) = folder();
    let (work, run) = (outer.path().join("work"), outer.path().join("work/runs/run"));
    fs::create_dir(&work).expect("made");
    let in_container = Trust {
        container: true,
        ..of_root()
    };
    let tried = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("a namespace");
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private");
        let options = format!("mode=755,uid={OTHER}");
        mount(
            Some("tmpfs"),
            &work,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("mounted");
        assert!(matches!(of_root().make(&run), Err(FolderError::Foreign { .. })));
        drop(in_container.make(&run).expect("handed in"));
        // Another user's below it was not.
        fs::create_dir(work.join("other")).expect("made");
        chown(work.join("other"), Some(OTHER + 1), None).expect("given away");
        assert!(matches!(
            in_container.make(&work.join("other/run")),
            Err(FolderError::Foreign { .. })
        ));
    });
    tried.join().expect("tried");
}
