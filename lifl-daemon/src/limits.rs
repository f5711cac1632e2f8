//! Limits that the machine sets to this process: what was run into, in numbers, and what to do.

use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// Which limit a failed call has run into; `None` if it failed otherwise. `bytes` is the size that was asked for.
pub(crate) fn explain(error: &io::Error, bytes: u64) -> Option<String> {
    match error.raw_os_error()? {
        libc::EMFILE => Some(descriptors()),
        libc::ENFILE => Some(
            "the machine has no descriptor left: raise fs.file-max (sysctl), or end another job".to_owned(),
        ),
        libc::EFBIG => {
            let limit = getrlimit(Resource::RLIMIT_FSIZE).map_or(0, |(soft, _)| soft);
            Some(format!(
                "the daemon's memory files may have {} MiB each, this one needs {}: raise LimitFSIZE in its unit, or \
                 `ulimit -f`",
                limit >> 20,
                bytes.div_ceil(1 << 20)
            ))
        }
        libc::ENOMEM | libc::ENOSPC => {
            Some("the machine has not so much memory left: end another job, or lower --pool-mib".to_owned())
        }
        _ => None,
    }
}

/// Descriptors that this process may have.
pub(crate) fn open_files() -> u32 {
    let soft = getrlimit(Resource::RLIMIT_NOFILE).map_or(RLIM_INFINITY, |(soft, _)| soft);
    u32::try_from(soft).unwrap_or(u32::MAX)
}

/// That no descriptor is left, with the number that there may be.
pub(crate) fn descriptors() -> String {
    let limit = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((RLIM_INFINITY, _)) | Err(_) => "all descriptors that it may".to_owned(),
        Ok((soft, _)) => format!("all {soft} descriptors that it may"),
    };
    format!(
        "the daemon has {limit} open: end another job, or raise LimitNOFILE in its unit (`ulimit -Hn` without one)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_its_number_and_a_remedy_and_other_errors_are_none() {
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        let text = explain(&io::Error::from_raw_os_error(libc::EMFILE), 0).expect("a limit");
        assert!(
            text.contains(&soft.to_string()) && text.contains("LimitNOFILE"),
            "{text}"
        );
        let text = explain(&io::Error::from_raw_os_error(libc::EFBIG), 5 << 20).expect("a limit");
        assert!(text.contains("needs 5") && text.contains("LimitFSIZE"), "{text}");
        assert_eq!(explain(&io::Error::from_raw_os_error(libc::EINVAL), 0), None);
        assert_eq!(explain(&io::Error::other("x"), 0), None);
    }
}
