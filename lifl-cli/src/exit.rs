//! How a command ends: its exit code, and the error behind it.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use lifl_common::arena::ArenaError;
use lifl_common::client::ClientError;
use lifl_common::control::ErrorCode;
use lifl_common::limits;
use lifl_learn::LearnError;

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

/// Why a process has failed, or could not be started: the machine, where it or its daemon lacks something that a job needs, else
/// the job.
pub(crate) fn cause_of(error: &anyhow::Error) -> Cause {
    let lacks = |cause: &(dyn Error + 'static)| {
        let of_daemon = cause.downcast_ref::<ClientError>().is_some_and(|error| {
            matches!(
                error,
                ClientError::Refused {
                    code: ErrorCode::Full,
                    ..
                } | ClientError::HugePages { .. }
                    | ClientError::Silent { .. }
                    | ClientError::Busy { .. }
            )
        });
        let of_data = matches!(cause.downcast_ref(), Some(LearnError::Threads { .. }));
        let of_memory = matches!(cause.downcast_ref(), Some(ArenaError::System { .. }));
        let of_system = cause
            .downcast_ref::<io::Error>()
            .and_then(limits::explain_refusal);
        of_daemon || of_data || of_memory || of_system.is_some()
    };
    match error.chain().any(lacks) {
        true => Cause::Machine,
        false => Cause::Job,
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

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_worker_that_is_refused_memory_lacks_something_of_the_machine_and_one_that_is_refused_a_name_does_not()
     {
        let refused = |code| ClientError::Refused {
            code,
            message: String::new(),
        };
        let wrapped = |error: ClientError| anyhow::Error::new(error).context("cannot have an arena");
        assert_eq!(cause_of(&wrapped(refused(ErrorCode::Full))), Cause::Machine);
        assert_eq!(cause_of(&wrapped(refused(ErrorCode::Denied))), Cause::Job);
        let no_pages = ClientError::HugePages {
            why: String::new(),
            source: Box::new(refused(ErrorCode::Failed)),
        };
        assert_eq!(cause_of(&wrapped(no_pages)), Cause::Machine);
        let no_memory = io::Error::from_raw_os_error(nix::libc::ENOMEM);
        assert_eq!(cause_of(&no_memory.into()), Cause::Machine);
        assert_eq!(cause_of(&anyhow!("the top said nothing")), Cause::Job);
    }
}
