//! A place for one thread to sleep until it is called, or a signal arrives.

use super::{AtomicU32, Ordering};
use crate::os::{self, WaitEnd};
use std::time::Duration;

const CALLED: u32 = 1;

/// Why a thread does not sleep any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parked {
    /// It was called.
    Called,
    /// The time has passed.
    TimedOut,
    /// A signal handler ran on this thread: look at what it wants, then sleep on.
    Interrupted,
}

/// One thread parks, any other calls it. A call before the parking is not lost.
///
/// Not std's condition variable, because that hides from its caller that a signal arrived.
#[derive(Default)]
pub struct Parker {
    /// `Release` by the caller, `Acquire` by the sleeper: it sees what was done before the call.
    word: AtomicU32,
}

impl Parker {
    /// Sleep until called; `None` waits for ever.
    pub fn park(&self, timeout: Option<Duration>) -> Parked {
        if self.is_called() {
            return Parked::Called;
        }
        let end = os::wait_on(&self.word, 0, timeout);
        if self.is_called() {
            return Parked::Called;
        }
        match end {
            WaitEnd::TimedOut => Parked::TimedOut,
            WaitEnd::Woken | WaitEnd::Interrupted => Parked::Interrupted,
        }
    }

    /// Whether it was called since it was rearmed.
    pub fn is_called(&self) -> bool {
        self.word.load(Ordering::Acquire) == CALLED
    }

    /// Forget a call, to be called again. For the thread that parks here; what the call told is seen.
    pub fn rearm(&self) {
        self.word.swap(0, Ordering::Acquire);
    }

    /// Call the thread that sleeps or will sleep here.
    pub fn call(&self) {
        self.word.store(CALLED, Ordering::Release);
        os::wake_one(&self.word);
    }
}
