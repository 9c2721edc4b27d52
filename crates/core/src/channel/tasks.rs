//! Tasks that are to be done, and those who wait until all are.

use super::waiters::Waiters;
use crate::sync::{AtomicU64, AtomicUsize, Ordering};

/// A count of tasks, with a line of those who wait for none to be left.
///
/// Whoever waits joins the line and then looks; whoever does the last task counts it and then calls
/// the line. The lock of the line orders the two, so one of them notices the other.
pub struct Tasks<W: 'static> {
    /// `AcqRel`: who sees the last task done sees what was done.
    unfinished: AtomicUsize,
    /// How often everybody was let go, whatever was left. `AcqRel` as above.
    given_up: AtomicU64,
    joiners: Waiters<W>,
}

impl<W> Default for Tasks<W> {
    fn default() -> Self {
        Tasks {
            unfinished: AtomicUsize::new(0),
            given_up: AtomicU64::new(0),
            joiners: Waiters::default(),
        }
    }
}

impl<W> Tasks<W> {
    /// One more is to be done.
    pub fn add(&self) {
        self.unfinished.fetch_add(1, Ordering::AcqRel);
    }

    /// `count` were done; those to be woken. `None` if so many were not left: then nothing changes.
    pub fn done(&self, count: usize) -> Option<Vec<W>> {
        let before = self
            .unfinished
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                left.checked_sub(count)
            });
        match before {
            Ok(before) if before == count => Some(self.joiners.call_all(|_| {})),
            Ok(_) => Some(Vec::new()),
            Err(_) => None,
        }
    }

    /// Tasks that are left.
    pub fn unfinished(&self) -> usize {
        self.unfinished.load(Ordering::Acquire)
    }

    /// Let everybody go, whatever is left; those to be woken.
    pub fn give_up(&self) -> Vec<W> {
        self.given_up.fetch_add(1, Ordering::AcqRel);
        self.joiners.call_all(|_| {})
    }

    /// How often everybody was let go.
    pub fn given_up(&self) -> u64 {
        self.given_up.load(Ordering::Acquire)
    }

    /// Wait in line; then look once more before sleeping.
    pub fn join(&self, ticket: Option<u64>, waker: W) -> u64 {
        self.joiners.join(ticket, waker, |_| {})
    }

    /// Leave the line.
    pub fn leave(&self, ticket: u64) {
        self.joiners.leave(ticket, |_| {});
    }
}

#[cfg(not(loom))]
impl<W: Send> crate::resource::fork::ForkLocks for Tasks<W> {
    fn lock_all(&self) {
        self.joiners.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.joiners.release() };
    }
}

#[cfg(not(loom))]
impl<W: Send> Tasks<W> {
    /// No tasks yet; whole after a fork.
    pub fn shared() -> std::sync::Arc<Self> {
        crate::resource::fork::shared(Self::default())
    }
}
