//! An event that a poll can wait for: Linux's eventfd.

use crate::error::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Set by any thread, watched through its descriptor, which is readable while it is set.
pub struct Event(OwnedFd);

impl Event {
    /// An event that is not set, closed in programs that this one becomes.
    pub fn new() -> Result<Self> {
        // SAFETY: no preconditions.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if descriptor < 0 {
            let reason = std::io::Error::last_os_error();
            return Err(Error::out_of_memory(0, format!("no eventfd: {reason}")));
        }
        // SAFETY: the kernel just opened it for this caller.
        Ok(Event(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Make the descriptor readable.
    pub fn set(&self) {
        let one: u64 = 1;
        // SAFETY: eight bytes are read from `one`. It cannot fail: the counter never comes near its
        // end, since `clear` takes it back to 0 between two sets that follow each other.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Make the descriptor not readable until the next `set`.
    pub fn clear(&self) {
        let mut count: u64 = 0;
        // SAFETY: at most eight bytes are written to `count`. That it was not set is no failure.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
