//! The command `lifl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lifl_cli::cli::main()
}
