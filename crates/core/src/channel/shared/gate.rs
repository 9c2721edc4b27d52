//! Waiting for the other side, and waking it only if it waits.
//!
//! A waiter notes the count, then says that it waits, then looks once more, then sleeps while the
//! count is the same. A waker does its work first, then looks whether anybody waits; if so it counts
//! up and wakes one. Two fences make sure that one of the two sees the other. The note "somebody
//! waits" is taken back only by a waker that found nobody asleep, and only if nobody renewed it
//! meanwhile, so a process that is killed anywhere leaves at worst one needless wake.

use crate::sync::{AtomicU32, Ordering, fence};

/// The lowest bit of `waiting`: somebody waits. The others count the times it was said.
const WAITING: u32 = 1;

/// Where one side waits for the other.
#[repr(C, align(128))]
pub struct Gate {
    /// Read by every waker after its work; ordered by the fences.
    waiting: AtomicU32,
    /// Counted up before every wake; what a waiter sleeps on.
    count: AtomicU32,
    /// Whether an event loop waits; its own protocol, the same fences.
    armed: AtomicU32,
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Gate {
    /// Nobody waits.
    pub fn new() -> Self {
        Gate {
            waiting: AtomicU32::new(0),
            count: AtomicU32::new(0),
            armed: AtomicU32::new(0),
        }
    }

    /// The word to sleep on.
    pub fn word(&self) -> &AtomicU32 {
        &self.count
    }

    /// Say that somebody is going to wait; the count to sleep on. Look once more before sleeping.
    pub fn announce(&self) -> u32 {
        let count = self.count.load(Ordering::Acquire);
        let mut seen = self.waiting.load(Ordering::Relaxed);
        loop {
            let next = (seen | WAITING).wrapping_add(2);
            let swapped = self.waiting.compare_exchange_weak(
                seen,
                next,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        fence(Ordering::SeqCst);
        count
    }

    /// As [`Gate::announce`], for an event loop, which is rung and does not sleep on the word.
    pub fn arm(&self) {
        self.armed.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Whether somebody waits. Call after the work is done.
    #[inline]
    pub fn is_waited_at(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting.load(Ordering::Relaxed) & WAITING != 0
            || self.armed.load(Ordering::Relaxed) != 0
    }

    /// Wake one who sleeps. `wake` wakes one on the word and says whether there was one. Returns
    /// whether event loops are to be rung.
    #[cold]
    pub fn wake(&self, wake: impl FnOnce(&AtomicU32) -> bool) -> bool {
        // Asked first: once somebody is woken, he may take what there is and arm anew.
        let rings =
            self.armed.load(Ordering::Relaxed) != 0 && self.armed.swap(0, Ordering::AcqRel) != 0;
        let seen = self.waiting.load(Ordering::Relaxed);
        if seen & WAITING != 0 {
            self.count.fetch_add(1, Ordering::AcqRel);
            if !wake(&self.count) {
                let _ = self.waiting.compare_exchange(
                    seen,
                    seen & !WAITING,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
            }
        }
        rings
    }
}
