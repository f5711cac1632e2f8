use std::path::PathBuf;

use super::*;

const PID: u32 = 4242;

/// A machine's files in a folder for the time of a test.
struct Machine {
    root: tempfile::TempDir,
}

impl Machine {
    fn new(memberships: &str, mountinfo: &str) -> Self {
        let machine = Self {
            root: tempfile::tempdir().expect("a folder"),
        };
        machine.write("proc/self/cgroup", memberships);
        machine.write("proc/self/mountinfo", mountinfo);
        machine
    }

    fn write(&self, path: &str, text: &str) {
        let path: PathBuf = self.root.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(path, text).expect("written");
    }

    fn read(&self) -> Cgroups {
        Cgroups::read(self.root.path(), PID)
    }
}

const V2: &str = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

#[test]
fn the_tightest_of_all_levels_counts_less_what_is_in_use() {
    let machine = Machine::new("0::/a/b\n", V2);
    for (file, text) in [
        ("a/b/memory.max", "max\n"),
        ("a/b/memory.high", "9000000\n"),
        ("a/b/memory.current", "1000000\n"),
        ("a/memory.max", "8000000\n"),
        ("a/memory.current", "7000000\n"),
        (
            "a/memory.stat",
            "anon 1\nfile 900000\ninactive_file 400000\nactive_file 100000\nslab_reclaimable 500000\n",
        ),
        ("a/b/pids.max", "max\n"),
        ("a/pids.max", "10\n"),
        ("a/pids.current", "4\n"),
    ] {
        machine.write(&format!("sys/fs/cgroup/{file}"), text);
    }
    let memory = machine.read().memory().expect("a limit");
    assert_eq!(
        (memory.allowed, memory.used, memory.left()),
        (8_000_000, 6_000_000, 2_000_000)
    );
    assert_eq!(memory.by, "memory.max of cgroup /a");
    let tasks = machine.read().tasks().expect("a limit");
    assert_eq!(
        (tasks.allowed, tasks.left(), tasks.by.as_str()),
        (10, 6, "pids.max of cgroup /a")
    );

    machine.write("sys/fs/cgroup/a/b/memory.current", "8500000\n");
    assert_eq!(
        machine.read().memory().expect("a limit").by,
        "memory.high of cgroup /a/b"
    );
}

#[test]
fn without_limits_there_are_none() {
    let machine = Machine::new("0::/\n", V2);
    machine.write("sys/fs/cgroup/cgroup.procs", "");
    let groups = machine.read();
    assert_eq!(
        (
            groups.memory(),
            groups.tasks(),
            groups.huge_pages(),
            groups.cpus()
        ),
        (None, None, None, None)
    );
    for (memberships, mounts) in [
        ("", ""),
        ("0::/x\n", ""),
        ("garbage\n::\n", "garbage\n - \n"),
        ("0::/gone\n", V2),
    ] {
        let groups = Machine::new(memberships, mounts).read();
        assert_eq!(
            (groups.memory(), groups.oom_kills()),
            (None, None),
            "{memberships:?}"
        );
    }
}

/// Version 1 in a container of Docker: each hierarchy's mount shows the container's group only, or all of them.
#[test]
fn version_1_in_a_container_and_on_the_host() {
    const MEMBERSHIPS: &str = "5:pids:/docker/f00\n4:memory:/docker/f00\n3:cpu,cpuacct:/docker/f00\n2:hugetlb:/docker/f00\n1:name=systemd:/docker/f00\n0::/system.slice\n";
    for (root, folder) in [("/docker/f00", ""), ("/", "docker/f00/")] {
        let mounts: String = ["pids", "memory", "cpu,cpuacct", "hugetlb"]
            .iter()
            .map(|name| {
                format!(
                    "40 32 0:30 {root} /sys/fs/cgroup/{name} ro,nosuid master:11 - cgroup cgroup rw,{name}\n"
                )
            })
            .collect();
        let machine = Machine::new(MEMBERSHIPS, &mounts);
        for (controller, file, text) in [
            ("memory", "memory.limit_in_bytes", "314572800\n"),
            ("memory", "memory.usage_in_bytes", "114572800\n"),
            (
                "memory",
                "memory.stat",
                "cache 5\nhierarchical_memory_limit 314572800\ntotal_inactive_file 40000000\ntotal_active_file 60000000\n",
            ),
            (
                "memory",
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            ),
            ("pids", "pids.max", "7\n"),
            ("pids", "pids.current", "9\n"),
            ("cpu,cpuacct", "cpu.cfs_quota_us", "150000\n"),
            ("cpu,cpuacct", "cpu.cfs_period_us", "100000\n"),
            ("hugetlb", "hugetlb.2MB.limit_in_bytes", "8388608\n"),
            ("hugetlb", "hugetlb.2MB.usage_in_bytes", "2097152\n"),
            (
                "hugetlb",
                "hugetlb.2MB.rsvd.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("hugetlb", "hugetlb.2MB.rsvd.usage_in_bytes", "4194304\n"),
        ] {
            machine.write(&format!("sys/fs/cgroup/{controller}/{folder}{file}"), text);
        }
        let groups = machine.read();
        let memory = groups.memory().expect("a limit");
        assert_eq!((memory.allowed, memory.used), (314_572_800, 14_572_800));
        assert_eq!(memory.by, "memory.limit_in_bytes of cgroup /docker/f00");
        assert_eq!(groups.tasks().map(|limit| limit.left()), Some(0));
        assert_eq!(groups.cpus().map(|(cores, _)| cores), Some(1.5));
        assert_eq!(groups.oom_kills(), Some(3));
        // Promised pages count, those that the other limit counts too.
        assert_eq!(
            groups.huge_pages().map(|limit| (limit.allowed, limit.used)),
            Some((8_388_608, 4_194_304))
        );
    }
}

#[test]
fn unlimited_numbers_of_version_1_are_no_limits() {
    let mounts = "40 32 0:30 / /m rw - cgroup cgroup rw,memory\n41 32 0:31 / /c rw - cgroup cgroup rw,cpu\n";
    let machine = Machine::new("4:memory:/x\n3:cpu:/x\n", mounts);
    machine.write("m/x/memory.limit_in_bytes", "9223372036854771712\n");
    machine.write(
        "m/x/memory.stat",
        "hierarchical_memory_limit 9223372036854771712\n",
    );
    machine.write("c/x/cpu.cfs_quota_us", "-1\n");
    machine.write("c/x/cpu.cfs_period_us", "100000\n");
    let groups = machine.read();
    assert_eq!((groups.memory(), groups.cpus()), (None, None));
    // A pod's limit, of which the container sees this line only.
    machine.write("m/x/memory.stat", "hierarchical_memory_limit 1048576\n");
    let memory = machine.read().memory().expect("a limit");
    assert_eq!(
        (memory.allowed, memory.by.as_str()),
        (1_048_576, "hierarchical_memory_limit in memory.stat of cgroup /x")
    );
}

#[test]
fn a_group_of_version_1_without_a_say_over_those_below_sets_no_limit() {
    let machine = Machine::new(
        "4:memory:/a/b\n",
        "40 32 0:30 / /m rw - cgroup cgroup rw,memory\n",
    );
    machine.write("m/a/b/memory.limit_in_bytes", "9223372036854771712\n");
    machine.write("m/a/memory.limit_in_bytes", "4096\n");
    machine.write("m/a/memory.use_hierarchy", "0\n");
    assert_eq!(machine.read().memory(), None);
    machine.write("m/a/memory.use_hierarchy", "1\n");
    assert_eq!(machine.read().memory().map(|limit| limit.allowed), Some(4096));
}

/// Some controllers with version 1, others with 2, as on a machine between the two.
#[test]
fn both_versions_side_by_side() {
    let mounts =
        "40 32 0:30 / /v1/memory rw - cgroup cgroup rw,memory\n41 32 0:31 / /v2 rw - cgroup2 none rw\n";
    let machine = Machine::new("4:memory:/job\n0::/job\n", mounts);
    machine.write("v1/memory/job/memory.limit_in_bytes", "5000\n");
    machine.write("v2/job/hugetlb.2MB.max", "0\n");
    machine.write("v2/job/hugetlb.2MB.current", "0\n");
    machine.write("v2/job/cpu.max", "50000 100000\n");
    let groups = machine.read();
    assert_eq!(groups.memory().map(|limit| limit.allowed), Some(5000));
    assert_eq!(
        groups.huge_pages().map(|limit| (limit.allowed, limit.by)),
        Some((0, "hugetlb.2MB.max of cgroup /job".to_owned()))
    );
    assert_eq!(groups.cpus(), Some((0.5, "cpu.max of cgroup /job".to_owned())));
}

/// A mount from outside of the cgroup namespace: the group has no name in it, and is found by its processes.
#[test]
fn a_group_without_a_visible_name_is_found() {
    let machine = Machine::new(
        "0::/in\n",
        "31 23 0:28 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    );
    for other in ["p/q/in", "p/r/in", "o/q"] {
        machine.write(&format!("sys/fs/cgroup/{other}/cgroup.procs"), "1\n42\n");
        machine.write(&format!("sys/fs/cgroup/{other}/memory.max"), "1\n");
    }
    machine.write("sys/fs/cgroup/p/s/in/cgroup.procs", "7\n4242\n");
    machine.write("sys/fs/cgroup/p/s/memory.max", "777\n");
    let memory = machine.read().memory().expect("a limit");
    assert_eq!(
        (memory.allowed, memory.by.as_str()),
        (777, "memory.max of cgroup /../../p/s")
    );

    // Nobody there has it: of what is visible only the root holds for it.
    machine.write("sys/fs/cgroup/p/s/in/cgroup.procs", "7\n");
    machine.write("sys/fs/cgroup/memory.max", "9999\n");
    assert_eq!(machine.read().memory().map(|limit| limit.allowed), Some(9999));
}

#[test]
fn a_group_that_no_mount_shows_has_no_limits() {
    for (path, root) in [
        ("/../other", "/"),
        ("/other", "/mine"),
        ("/", "/../mine"),
        ("/minefield", "/mine"),
    ] {
        let machine = Machine::new(
            &format!("0::{path}\n"),
            &format!("31 23 0:28 {root} /cg rw - cgroup2 cgroup2 rw\n"),
        );
        machine.write("cg/memory.max", "1\n");
        machine.write("cg/other/memory.max", "1\n");
        assert_eq!(machine.read().memory(), None, "{path} in {root}");
    }
}

#[test]
fn of_several_mounts_the_one_that_shows_most_counts() {
    let mounts = "31 23 0:28 /a/b /inner rw - cgroup2 cgroup2 rw\n32 23 0:28 / /with\\040space rw - cgroup2 cgroup2 rw\n";
    let machine = Machine::new("0::/a/b\n", mounts);
    machine.write("inner/memory.max", "max\n");
    machine.write("with space/a/b/memory.max", "max\n");
    machine.write("with space/a/memory.max", "12\n");
    assert_eq!(machine.read().memory().map(|limit| limit.allowed), Some(12));
}

#[test]
fn kills_are_counted_by_the_group_or_the_machine() {
    let machine = Machine::new("0::/a\n", V2);
    machine.write(
        "sys/fs/cgroup/a/memory.events",
        "low 0\nhigh 0\nmax 9\noom 2\noom_kill 5\noom_group_kill 0\n",
    );
    machine.write("proc/vmstat", "nr_free_pages 1\noom_kill 8\n");
    assert_eq!(machine.read().oom_kills(), Some(5));
    fs::remove_file(machine.root.path().join("sys/fs/cgroup/a/memory.events")).expect("removed");
    assert_eq!(
        machine.read().oom_kills(),
        Some(8),
        "the root's group has no such file"
    );
    assert!(oom_kills().is_some(), "this kernel counts");
}

#[test]
fn who_may_exceed_the_limit_of_processes() {
    let status = |uid: u32, capabilities: &str| {
        format!("Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapEff:\t{capabilities}\n")
    };
    assert!(may_exceed(&status(0, "0000000000000000")));
    assert!(may_exceed(&status(1000, "0000000001000000")) && may_exceed(&status(1000, "0000000000200000")));
    assert!(!may_exceed(&status(1000, "000001fffedfffff")));
}

#[test]
fn this_process_has_what_it_has() {
    assert!(cpus() >= 1 && cpus() <= std::thread::available_parallelism().map_or(1, usize::from));
    let descriptors = descriptors().expect("a limit");
    assert!(descriptors.used >= 3 && descriptors.left() > 0, "{descriptors}");
    assert!(available_memory().is_some_and(|bytes| bytes > 0));
    if let Some(limit) = Cgroups::current().memory() {
        assert!(limit.allowed > 0 && !limit.by.is_empty(), "{limit}");
    }
}
