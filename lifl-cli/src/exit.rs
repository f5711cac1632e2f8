//! How a command ends: its exit code, and the error behind it.

use std::process::ExitCode;

/// Why a command did not do what was asked. The number is the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cause {
    /// The command line or the config is wrong.
    Config = 2,
    /// This machine lacks something.
    Machine = 3,
    /// The job failed.
    Job = 4,
    /// The job ran past `maxRunTime`.
    Timeout = 5,
    /// The answer could not be written to standard output.
    Output = 6,
    /// Somebody stopped it.
    Interrupted = 130,
    /// Whoever read the answer has gone; the number is that of a death by SIGPIPE. Nothing is said of it.
    Pipe = 141,
}

/// An error with its cause.
#[derive(Debug)]
pub struct Failure {
    /// What kind.
    pub cause: Cause,
    /// What happened, where, and what to do.
    pub error: anyhow::Error,
}

/// What commands give back.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure of that cause.
    pub fn new(cause: Cause, error: impl Into<anyhow::Error>) -> Self {
        Self {
            cause,
            error: error.into(),
        }
    }
}

impl Cause {
    /// The cause of that exit code, of another process of this program; [`Job`](Self::Job) for any that is none.
    pub(crate) fn of(code: u8) -> Self {
        let all = [
            Self::Config,
            Self::Machine,
            Self::Timeout,
            Self::Output,
            Self::Interrupted,
            Self::Pipe,
        ];
        all.into_iter()
            .find(|cause| *cause as u8 == code)
            .unwrap_or(Self::Job)
    }
}

impl From<Cause> for ExitCode {
    fn from(cause: Cause) -> Self {
        Self::from(cause as u8)
    }
}

/// Gives an error its cause.
pub trait Because<T> {
    /// The error as a failure of that cause.
    ///
    /// # Errors
    /// If it is one.
    fn because(self, cause: Cause) -> Outcome<T>;
}

impl<T, E: Into<anyhow::Error>> Because<T> for Result<T, E> {
    fn because(self, cause: Cause) -> Outcome<T> {
        self.map_err(|error| Failure::new(cause, error))
    }
}
