//! What can go wrong in the core, as data; the bindings turn each case into an exception.

use std::fmt;

/// The result of every fallible operation of the core.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure that the caller can act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// An argument is outside its range.
    InvalidArgument {
        /// The argument's name as the caller wrote it.
        argument: &'static str,
        /// What was expected and what came.
        message: String,
    },
    /// A request cannot be met; nothing was allocated.
    OutOfMemory {
        /// Bytes asked for.
        requested_bytes: usize,
        /// Why it cannot be met: the use and the limit, or what the kernel said.
        message: String,
    },
    /// This machine, or what the process is allowed, does not do it.
    Unsupported {
        /// What cannot be done, why, and what would help.
        message: String,
    },
    /// The object was ended by its owner.
    Closed {
        /// What was ended, and how.
        message: String,
    },
    /// The other side is gone.
    Disconnected {
        /// Who is gone, and how.
        message: String,
    },
    /// Shared or stored bytes are not what was written.
    Corrupted {
        /// What was expected and what is there.
        message: String,
    },
}

impl Error {
    /// An [`Error::InvalidArgument`] for `argument`.
    pub fn invalid(argument: &'static str, message: impl Into<String>) -> Self {
        Error::InvalidArgument {
            argument,
            message: message.into(),
        }
    }

    /// An [`Error::OutOfMemory`] for a request of `requested_bytes`.
    pub fn out_of_memory(requested_bytes: usize, message: impl Into<String>) -> Self {
        Error::OutOfMemory {
            requested_bytes,
            message: message.into(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Self {
        Error::Unsupported {
            message: message.into(),
        }
    }

    /// An [`Error::Closed`].
    pub fn closed(message: impl Into<String>) -> Self {
        Error::Closed {
            message: message.into(),
        }
    }

    /// An [`Error::Disconnected`].
    pub fn disconnected(message: impl Into<String>) -> Self {
        Error::Disconnected {
            message: message.into(),
        }
    }

    /// An [`Error::Corrupted`].
    pub fn corrupted(message: impl Into<String>) -> Self {
        Error::Corrupted {
            message: message.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InvalidArgument { argument, message } => {
                write!(formatter, "{argument}: {message}")
            }
            Error::Unsupported { message } => formatter.write_str(message),
            Error::OutOfMemory {
                requested_bytes,
                message,
            } => {
                write!(
                    formatter,
                    "cannot allocate {requested_bytes} bytes: {message}"
                )
            }
            Error::Closed { message }
            | Error::Disconnected { message }
            | Error::Corrupted { message } => formatter.write_str(message),
        }
    }
}

impl std::error::Error for Error {}
