//! Who looks for work and who sleeps, so that queueing a task wakes one thread, and seldom any.
//!
//! A worker works, looks for work, or sleeps. Whoever queues a task wakes a sleeper only if nobody
//! is looking: whoever looks will find it, or look once more after it has said that it goes to
//! sleep. The last one who looks and finds something wakes the next, if there is more.
//!
//! A sleeper may also wait: it has seen work that it leaves to others, and looks by itself after a
//! while. Which sleeper is woken, if any, is for the caller to say; with one that waits it may be none.

use crate::sync::{AtomicU64, Mutex, Ordering, fence};

const SLEEPING: u64 = 1;
const SEARCHING: u64 = 1 << 32;

fn searching(counts: u64) -> u64 {
    counts >> 32
}

fn sleeping(counts: u64) -> u64 {
    counts & (SEARCHING - 1)
}

/// What there is for one who is about to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Nothing.
    Nothing,
    /// Work that it leaves to others for a while.
    Later,
    /// Work for it.
    Work,
}

/// One who sleeps.
#[derive(Clone, Copy, Debug)]
pub struct Sleeper {
    /// Its number.
    pub who: usize,
    /// Whether it looks again by itself after a while.
    pub waits: bool,
}

/// The sleepers and the seekers of one scheduler. Any thread may call any method at any time.
#[derive(Default)]
pub struct Idle {
    /// How many look for work (high half) and how many sleep (low half): one word, so that whoever
    /// queues a task sees both as of one moment. The fences in `seek` and `sleep` pair up: either
    /// the one sees that nobody looks any more, or the other sees the task.
    counts: AtomicU64,
    /// Who sleeps; its length is the low half of `counts` whenever the lock is free.
    sleepers: Mutex<Vec<Sleeper>>,
}

impl Idle {
    /// Nobody is there yet.
    pub fn new() -> Self {
        Idle {
            counts: AtomicU64::new(0),
            sleepers: Mutex::new(Vec::new()),
        }
    }

    fn sleepers(&self) -> impl std::ops::DerefMut<Target = Vec<Sleeper>> + '_ {
        self.sleepers
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// After a task was queued: who is to be woken for it, if anybody. The one who is named counts
    /// as looking from now on, so that the next task wakes nobody.
    ///
    /// `choose` gives the place of the one to wake among the sleepers, or that of nobody; that only if
    /// there is one who waits.
    #[inline]
    pub fn seek(&self, choose: impl FnOnce(&[Sleeper]) -> Option<usize>) -> Option<usize> {
        fence(Ordering::SeqCst);
        let counts = self.counts.load(Ordering::Relaxed);
        if searching(counts) == 0 && sleeping(counts) > 0 {
            return self.wake(choose);
        }
        None
    }

    #[cold]
    fn wake(&self, choose: impl FnOnce(&[Sleeper]) -> Option<usize>) -> Option<usize> {
        let mut sleepers = self.sleepers();
        if sleepers.is_empty() || searching(self.counts.load(Ordering::Relaxed)) > 0 {
            return None;
        }
        let place = choose(&sleepers)?;
        let woken = sleepers.remove(place);
        self.counts
            .fetch_add(SEARCHING - SLEEPING, Ordering::SeqCst);
        Some(woken.who)
    }

    /// A worker has nothing to do any more, or begins.
    pub fn search(&self) {
        self.counts.fetch_add(SEARCHING, Ordering::SeqCst);
    }

    /// Who looked has found something, or ends. If it was the last and there is more, the answer is
    /// whom to wake, as in [`Idle::seek`].
    pub fn found(
        &self,
        has_more: impl Fn() -> bool,
        choose: impl FnOnce(&[Sleeper]) -> Option<usize>,
    ) -> Option<usize> {
        let before = self.counts.fetch_sub(SEARCHING, Ordering::SeqCst);
        if searching(before) > 1 {
            return None;
        }
        fence(Ordering::SeqCst);
        if has_more() { self.seek(choose) } else { None }
    }

    /// The worker `who`, who looked and found nothing, is about to sleep. `Work`: it looks on. `Later`:
    /// it is to park for a while, then to [`stop waiting`](Idle::stop_waiting). `Nothing`: it is to park
    /// until called. Whoever calls it has it look again.
    pub fn sleep(&self, who: usize, outlook: impl Fn() -> Outlook) -> Outlook {
        {
            let mut sleepers = self.sleepers();
            sleepers.push(Sleeper { who, waits: false });
            self.counts
                .fetch_add(SLEEPING.wrapping_sub(SEARCHING), Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
        let outlook = outlook();
        if outlook == Outlook::Nothing {
            return outlook;
        }
        let mut sleepers = self.sleepers();
        let Some(place) = sleepers.iter().position(|sleeper| sleeper.who == who) else {
            return Outlook::Nothing; // called meanwhile: it does not park for long
        };
        if outlook == Outlook::Later {
            sleepers[place].waits = true;
            return outlook;
        }
        self.rouse(&mut sleepers, place);
        outlook
    }

    /// The worker `who` has waited for a while. True: it looks for work now. False: it was called
    /// meanwhile, or will be in a moment.
    pub fn stop_waiting(&self, who: usize) -> bool {
        let mut sleepers = self.sleepers();
        let Some(place) = sleepers.iter().position(|sleeper| sleeper.who == who) else {
            return false;
        };
        self.rouse(&mut sleepers, place);
        true
    }

    fn rouse(&self, sleepers: &mut Vec<Sleeper>, place: usize) {
        sleepers.remove(place);
        self.counts
            .fetch_add(SEARCHING.wrapping_sub(SLEEPING), Ordering::SeqCst);
    }

    /// Everybody who sleeps, to be woken: something ended.
    pub fn wake_all(&self) -> Vec<usize> {
        let mut sleepers = self.sleepers();
        let woken = std::mem::take(&mut *sleepers);
        let change = (SEARCHING - SLEEPING).wrapping_mul(woken.len() as u64);
        self.counts.fetch_add(change, Ordering::SeqCst);
        woken.into_iter().map(|sleeper| sleeper.who).collect()
    }

    /// How many look for work, and how many sleep.
    pub fn counts(&self) -> (usize, usize) {
        let counts = self.counts.load(Ordering::SeqCst);
        (searching(counts) as usize, sleeping(counts) as usize)
    }
}
