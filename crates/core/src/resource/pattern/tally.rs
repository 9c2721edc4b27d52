//! Exact counts of requests by size, kept by each thread for itself.
//!
//! A thread's tally is found in two loads and written by that thread alone, so counting costs no
//! atomic read-modify-write. The tally of a thread that ended serves the next new thread: there are
//! never more than threads asked at once, and no count is lost.

use super::super::fork::ForkLocks;
use super::{CLASS_COUNT, class_of};
use crate::sync::{AtomicU32, AtomicU64, Lock, Ordering::Relaxed};
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Weak};

/// Bytes of a line: what sizes are rounded up to where they are counted one by one.
pub(super) const LINE_BYTES: usize = 64;
/// Sizes up to this many lines (16 KiB) are counted one by one, larger ones by class.
pub(super) const LINES: usize = 256;

/// What one thread asked for. Only that thread writes; reports read, so `Relaxed` suffices.
pub(super) struct Tally {
    lines: [AtomicU64; LINES],
    larger: [Counted; CLASS_COUNT],
    /// Requests until the next sample, and what the gap after it is drawn from.
    countdown: AtomicU32,
    random: AtomicU64,
}

#[derive(Default)]
struct Counted {
    requests: AtomicU64,
    bytes: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    counter.store(counter.load(Relaxed) + value, Relaxed);
}

impl Tally {
    fn new(seed: u64) -> Self {
        Tally {
            lines: std::array::from_fn(|_| AtomicU64::new(0)),
            larger: std::array::from_fn(|_| Counted::default()),
            countdown: AtomicU32::new(1),
            random: AtomicU64::new(seed | 1),
        }
    }

    /// Count a request; whether it is to be sampled, as one in `mean_gap` requests is.
    #[inline]
    pub(super) fn count(&self, size: usize, mean_gap: &AtomicU32) -> bool {
        let line = (size - 1) / LINE_BYTES;
        if let Some(counter) = self.lines.get(line) {
            add(counter, 1);
        } else {
            let counted = &self.larger[class_of(size)];
            add(&counted.requests, 1);
            add(&counted.bytes, size as u64);
        }
        let left = self.countdown.load(Relaxed) - 1;
        self.countdown.store(left, Relaxed);
        if left == 0 {
            self.rewind(mean_gap.load(Relaxed));
        }
        left == 0
    }

    /// Let a sample be drawn after one to `2 * mean - 1` more requests, all equally likely.
    #[cold]
    fn rewind(&self, mean: u32) {
        // Marsaglia, "Xorshift RNGs" (2003): the triple (13, 7, 17).
        let mut random = self.random.load(Relaxed);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        self.random.store(random, Relaxed);
        let choices = u64::from(2 * mean - 1);
        self.countdown.store((random % choices) as u32 + 1, Relaxed);
    }

    /// Requests of a class so far, and their bytes: rounded up to lines where those are counted.
    pub(super) fn of_class(&self, class: usize) -> (u64, u64) {
        let counted = &self.larger[class];
        let mut sum = (counted.requests.load(Relaxed), counted.bytes.load(Relaxed));
        let past = (1usize << class).min(LINES);
        let first = if class == 0 {
            0
        } else {
            past.min(1 << (class - 1))
        };
        for line in first..past {
            let requests = self.lines[line].load(Relaxed);
            sum.0 += requests;
            sum.1 += requests * ((line + 1) * LINE_BYTES) as u64;
        }
        sum
    }

    pub(super) fn of_lines(&self, lines: usize) -> u64 {
        self.lines[lines - 1].load(Relaxed)
    }
}

/// The tallies of every thread.
pub(super) struct Tallies {
    id: u64,
    pub(super) list: Lock<List>,
}

pub(super) struct List {
    /// Every tally ever made; the first is that of threads that are ending.
    pub(super) all: Vec<Arc<Tally>>,
    /// Those that no thread has.
    free: Vec<Arc<Tally>>,
}

/// What a thread has of one `Tallies`; its drop, at the thread's end, gives it back.
struct Held {
    id: u64,
    tallies: Weak<Tallies>,
    tally: Arc<Tally>,
}

impl Drop for Held {
    fn drop(&mut self) {
        LAST.set((0, std::ptr::null()));
        if let Some(tallies) = self.tallies.upgrade() {
            tallies.list.lock().free.push(Arc::clone(&self.tally));
        }
    }
}

thread_local! {
    /// The tally used last, by id; valid while `HELD` has it, and forgotten before that lets go.
    static LAST: Cell<(u64, *const Tally)> = const { Cell::new((0, std::ptr::null())) };
    static HELD: RefCell<Vec<Held>> = const { RefCell::new(Vec::new()) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl ForkLocks for Tallies {
    fn lock_all(&self) {
        self.list.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.list.release() };
    }
}

impl Tallies {
    pub(super) fn new() -> Self {
        let list = List {
            all: vec![Arc::new(Tally::new(1))],
            free: Vec::new(),
        };
        Tallies {
            id: NEXT_ID.fetch_add(1, Relaxed),
            list: Lock::new(list),
        }
    }

    /// Run `body` with the calling thread's tally.
    #[inline(always)]
    pub(super) fn own<R>(self: &Arc<Self>, body: impl FnOnce(&Tally) -> R) -> R {
        let (id, tally) = LAST.get();
        if id == self.id {
            // SAFETY: this thread's `HELD` owns it, and forgets `LAST` before it lets go. `body` is
            // this module's or its parent's and ends no thread.
            return body(unsafe { &*tally });
        }
        match self.find() {
            Some(tally) => body(&tally),
            None => {
                // The thread is ending: one tally for all of those, under the lock.
                let list = self.list.lock();
                body(&list.all[0])
            }
        }
    }

    #[cold]
    fn find(self: &Arc<Self>) -> Option<Arc<Tally>> {
        let find = |held: &RefCell<Vec<Held>>| {
            let mut held = held.borrow_mut();
            let gone = held
                .iter()
                .position(|held| held.tallies.strong_count() == 0);
            if let Some(index) = gone {
                held.swap_remove(index);
            }
            let known = held.iter().find(|held| held.id == self.id);
            let tally = known
                .map(|held| Arc::clone(&held.tally))
                .unwrap_or_else(|| {
                    let tally = self.take();
                    held.push(Held {
                        id: self.id,
                        tallies: Arc::downgrade(self),
                        tally: Arc::clone(&tally),
                    });
                    tally
                });
            LAST.set((self.id, Arc::as_ptr(&tally)));
            tally
        };
        HELD.try_with(find).ok()
    }

    fn take(&self) -> Arc<Tally> {
        let mut list = self.list.lock();
        list.free.pop().unwrap_or_else(|| {
            let seed = (list.all.len() as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let tally = Arc::new(Tally::new(seed));
            list.all.push(Arc::clone(&tally));
            tally
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_counted_once_whoever_asks() {
        let (tallies, gap) = (Arc::new(Tallies::new()), AtomicU32::new(4));
        let sizes = [1, 64, 65, 16_384, 16_385, 1 << 20, (1 << 20) + 1];
        for _ in 0..3 {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for size in sizes {
                            tallies.own(|tally| tally.count(size, &gap));
                        }
                    });
                }
            });
        }
        let list = tallies.list.lock();
        assert!(list.all.len() <= 5, "ended threads' tallies serve new ones");
        let sum = |class| {
            let counts = list.all.iter().map(|tally| tally.of_class(class));
            counts.fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
        };
        assert_eq!(sum(class_of(1)), (24, 24 * 64));
        assert_eq!(sum(class_of(65)), (12, 12 * 128));
        assert_eq!(sum(class_of(16_384)), (12, 12 * 16_384));
        assert_eq!(sum(class_of(16_385)), (12, 12 * 16_385));
        assert_eq!(sum(class_of((1 << 20) + 1)), (12, 12 * ((1 << 20) + 1)));
        let requests: u64 = (0..CLASS_COUNT).map(|class| sum(class).0).sum();
        assert_eq!(requests, 12 * sizes.len() as u64);
    }

    #[test]
    fn gaps_have_the_mean_that_was_asked_for() {
        let tally = Tally::new(7);
        for mean in [1, 2, 64] {
            let mut sum = 0;
            for _ in 0..10_000 {
                tally.rewind(mean);
                let gap = tally.countdown.load(Relaxed);
                assert!((1..2 * mean).contains(&gap));
                sum += gap;
            }
            assert!(sum.abs_diff(10_000 * mean) <= 10_000 * mean / 20);
        }
    }
}
