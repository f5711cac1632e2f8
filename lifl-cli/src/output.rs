//! Standard output, which may be closed under us: `lifl schema | head` is no reason to panic.

/// `println!`, but a closed standard output is nobody's fault.
macro_rules! outln {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}

pub(crate) use outln;
