//! Wakes those who wait in one event loop: a file descriptor the loop watches, and who is meant.

use crate::error::Result;
use crate::os::event::Event;
use crate::sync::Lock;
use std::os::fd::{AsRawFd, RawFd};

/// One event loop's bell. The first ring after an answer makes the descriptor readable; those that
/// follow only leave their number, so a busy loop is woken once however often it is rung.
///
/// Any thread rings, the loop's thread answers. A forked child inherits bells of loops it does not
/// run, and nobody who would ring them; so they take no part in `fork`.
pub struct Doorbell {
    event: Event,
    rung: Lock<Vec<u64>>,
}

impl Doorbell {
    /// A bell that was not rung.
    pub fn new() -> Result<Self> {
        Ok(Doorbell {
            event: Event::new()?,
            rung: Lock::new(Vec::new()),
        })
    }

    /// What the loop is to watch for reading.
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Ring for number `who`.
    pub fn ring(&self, who: u64) {
        let first = {
            let mut rung = self.rung.lock();
            rung.push(who);
            rung.len() == 1
        };
        if first {
            self.event.set();
        }
    }

    /// Those that were rung for since the last answer. The descriptor is cleared before they are
    /// read, so that a ring in between is either among them, or sets it again.
    pub fn answer(&self) -> Vec<u64> {
        self.event.clear();
        std::mem::take(&mut *self.rung.lock())
    }
}
