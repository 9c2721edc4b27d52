//! Who looks for work and who sleeps, so that queueing a task wakes one thread, and seldom any.
//!
//! A worker works, looks for work, or sleeps. Whoever queues a task wakes a sleeper only if nobody
//! is looking: whoever looks will find it, or look once more after it has said that it goes to
//! sleep. The last one who looks and finds something wakes the next, if there is more.

use crate::sync::{AtomicU64, Mutex, Ordering, fence};

const SLEEPING: u64 = 1;
const SEARCHING: u64 = 1 << 32;

fn searching(counts: u64) -> u64 {
    counts >> 32
}

fn sleeping(counts: u64) -> u64 {
    counts & (SEARCHING - 1)
}

/// The sleepers and the seekers of one scheduler. Any thread may call any method at any time.
#[derive(Default)]
pub struct Idle {
    /// How many look for work (high half) and how many sleep (low half): one word, so that whoever
    /// queues a task sees both as of one moment. The fences in `seek` and `sleep` pair up: either
    /// the one sees that nobody looks any more, or the other sees the task.
    counts: AtomicU64,
    /// Who sleeps; its length is the low half of `counts` whenever the lock is free.
    sleepers: Mutex<Vec<usize>>,
}

impl Idle {
    /// Nobody is there yet.
    pub fn new() -> Self {
        Idle {
            counts: AtomicU64::new(0),
            sleepers: Mutex::new(Vec::new()),
        }
    }

    fn sleepers(&self) -> impl std::ops::DerefMut<Target = Vec<usize>> + '_ {
        self.sleepers
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// After a task was queued: who is to be woken for it, if anybody. The one who is named counts
    /// as looking from now on, so that the next task wakes nobody.
    #[inline]
    pub fn seek(&self) -> Option<usize> {
        fence(Ordering::SeqCst);
        let counts = self.counts.load(Ordering::Relaxed);
        if searching(counts) == 0 && sleeping(counts) > 0 {
            return self.wake();
        }
        None
    }

    #[cold]
    fn wake(&self) -> Option<usize> {
        let mut sleepers = self.sleepers();
        if searching(self.counts.load(Ordering::Relaxed)) > 0 {
            return None;
        }
        let woken = sleepers.pop()?;
        self.counts
            .fetch_add(SEARCHING - SLEEPING, Ordering::SeqCst);
        Some(woken)
    }

    /// A worker has nothing to do any more, or begins.
    pub fn search(&self) {
        self.counts.fetch_add(SEARCHING, Ordering::SeqCst);
    }

    /// Who looked has found something, or ends. If it was the last and there is more, the answer is
    /// whom to wake.
    pub fn found(&self, has_more: impl Fn() -> bool) -> Option<usize> {
        let before = self.counts.fetch_sub(SEARCHING, Ordering::SeqCst);
        if searching(before) > 1 {
            return None;
        }
        fence(Ordering::SeqCst);
        if has_more() { self.seek() } else { None }
    }

    /// The worker `who`, who looked and found nothing, is about to sleep. False: it looks on, for
    /// there is work. True: it is to park until called; whoever calls it has it look again.
    pub fn sleep(&self, who: usize, has_work: impl Fn() -> bool) -> bool {
        {
            let mut sleepers = self.sleepers();
            sleepers.push(who);
            self.counts
                .fetch_add(SLEEPING.wrapping_sub(SEARCHING), Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        if !has_work() {
            return true;
        }
        let mut sleepers = self.sleepers();
        let Some(place) = sleepers.iter().position(|sleeper| *sleeper == who) else {
            return true; // called meanwhile: it does not park for long
        };
        sleepers.remove(place);
        self.counts
            .fetch_add(SEARCHING.wrapping_sub(SLEEPING), Ordering::SeqCst);
        false
    }

    /// Everybody who sleeps, to be woken: something ended.
    pub fn wake_all(&self) -> Vec<usize> {
        let mut sleepers = self.sleepers();
        let woken = std::mem::take(&mut *sleepers);
        let change = (SEARCHING - SLEEPING).wrapping_mul(woken.len() as u64);
        self.counts.fetch_add(change, Ordering::SeqCst);
        woken
    }

    /// How many look for work, and how many sleep.
    pub fn counts(&self) -> (usize, usize) {
        let counts = self.counts.load(Ordering::SeqCst);
        (searching(counts) as usize, sleeping(counts) as usize)
    }
}
