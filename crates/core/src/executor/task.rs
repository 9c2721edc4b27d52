//! A call that is made once, by whoever takes it first, or by nobody.
//!
//! What is to be called lies in the task while it is pending. Taking it is one compare-and-swap, so
//! it does not matter how many queues and waiters know the task: a queue may hold one that is over,
//! and it holds nothing but this word then.

use crate::sync::{AtomicU32, Ordering, SharedCell};

/// Where a task stands. The order of the numbers is that of a task's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Nobody has taken it.
    Pending,
    /// Somebody is at it.
    Running,
    /// Withdrawn before anybody took it.
    Cancelled,
    /// Its outcome is there.
    Finished,
}

const STAGE: u32 = 0b11;
const PENDING: u32 = 0;
const RUNNING: u32 = 1;
const CANCELLED: u32 = 2;
const FINISHED: u32 = 3;
const WATCHED: u32 = 0b100;
const LOCKED: u32 = 0b1000;
const EMPTY: u32 = 0b10000;
const ASKED: u32 = 0b100000;

/// Who has to be told of the end, as it was known at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audience {
    /// Somebody waits, or is to be called back.
    pub watched: bool,
}

/// What came of a cancellation.
#[derive(Debug)]
pub enum Cancel<C> {
    /// It is cancelled: the call, to be dropped, and who is to be told.
    Done(Option<C>, Audience),
    /// Somebody has taken it, or it is over.
    Late,
    /// Nothing changed: whoever cancels it has to have its lock.
    Locked,
}

/// One call, its state and who watches it. Any thread may call any method at any time.
pub struct Task<C> {
    /// The stage (two bits) and flags that, but for EMPTY, only ever get set. `Release` at the end,
    /// `Acquire` when read: who sees the end sees the outcome that was stored before it.
    word: AtomicU32,
    /// Which worker is at it, from 1; 0: none. A hint for whoever waits, so `Relaxed` suffices.
    runner: AtomicU32,
    /// Full while pending. Taken by the one thread that ends that stage.
    call: SharedCell<Option<C>>,
}

// SAFETY: `call` is written before the task is shared, and then only by the one thread whose
// compare-and-swap ended the stage Pending; what is taken may be sent.
unsafe impl<C: Send> Sync for Task<C> {}
// SAFETY: as above; a task that is moved is referred to by nobody.
unsafe impl<C: Send> Send for Task<C> {}

impl<C> Task<C> {
    fn at(word: u32, call: Option<C>) -> Self {
        Task {
            word: AtomicU32::new(word),
            runner: AtomicU32::new(0),
            call: SharedCell::new(call),
        }
    }

    /// A task that waits to be taken.
    pub fn new(call: C) -> Self {
        Self::at(PENDING, Some(call))
    }

    /// A task that waits until whoever has it begins it; there is no call to take.
    pub fn by_hand() -> Self {
        Self::at(PENDING, None)
    }

    /// Begin one that is made by hand. False: somebody did, or it is over.
    pub fn begin(&self) -> bool {
        self.leave_pending(RUNNING, 0).is_ok()
    }

    /// A task that is made, or run, by whoever has it: nobody takes it.
    pub fn empty() -> Self {
        Self::at(RUNNING | EMPTY, None)
    }

    /// Let an empty task wait to be taken; gives the call back if it is not empty any more.
    pub fn fill(&self, call: C) -> Result<(), C> {
        let swap = self.word.compare_exchange(
            RUNNING | EMPTY,
            RUNNING,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if swap.is_err() {
            return Err(call);
        }
        self.call.with_mut(|place| {
            // SAFETY: the swap above succeeds once in a task's life, and nobody touches the call
            // in the stage Running but whoever ended Pending, which has not begun.
            unsafe { *place = Some(call) };
        });
        self.word.fetch_and(!STAGE, Ordering::Release);
        Ok(())
    }

    /// Where it stands.
    #[inline]
    pub fn stage(&self) -> Stage {
        match self.word.load(Ordering::Acquire) & STAGE {
            PENDING => Stage::Pending,
            RUNNING => Stage::Running,
            CANCELLED => Stage::Cancelled,
            _ => Stage::Finished,
        }
    }

    /// Whether it is over.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.word.load(Ordering::Acquire) & STAGE >= CANCELLED
    }

    /// Whether nobody has taken it yet.
    #[inline]
    pub fn is_pending(&self) -> bool {
        self.word.load(Ordering::Relaxed) & STAGE == PENDING
    }

    /// The word as it is now, or as it was where it is left as it is, since the stage has ended or
    /// one of `refuse` is set.
    fn leave_pending(&self, stage: u32, refuse: u32) -> Result<u32, u32> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if word & STAGE != PENDING || word & refuse != 0 {
                return Err(word);
            }
            let after = (word & !STAGE) | stage;
            let swap =
                self.word
                    .compare_exchange_weak(word, after, Ordering::AcqRel, Ordering::Relaxed);
            match swap {
                Ok(_) => return Ok(after),
                Err(seen) => word = seen,
            }
        }
    }

    fn take_call(&self) -> Option<C> {
        self.call.with_mut(|call| {
            // SAFETY: the caller's compare-and-swap ended the stage Pending, which happens once.
            unsafe { (*call).take() }
        })
    }

    /// Take it, to make the call. `None`: somebody else did, or it is over.
    #[inline]
    pub fn claim(&self) -> Option<C> {
        self.leave_pending(RUNNING, 0).ok()?;
        self.take_call()
    }

    /// Withdraw it, if nobody has taken it; `has_lock` says whether the caller has its lock.
    pub fn cancel(&self, has_lock: bool) -> Cancel<C> {
        match self.leave_pending(CANCELLED, if has_lock { 0 } else { LOCKED }) {
            Ok(word) => Cancel::Done(self.take_call(), audience(word)),
            Err(word) if word & STAGE == PENDING => Cancel::Locked,
            Err(_) => Cancel::Late,
        }
    }

    /// It is over, by whoever took it: its outcome was stored, or it is cancelled after all. `None`,
    /// with nothing changed: it has a lock that whoever ends it has to have
    /// ([`Task::finish_locked`]).
    #[inline]
    pub fn finish(&self, cancelled: bool) -> Option<Audience> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            debug_assert_eq!(word & STAGE, RUNNING);
            if word & LOCKED != 0 {
                return None;
            }
            let after = (word & !STAGE) | if cancelled { CANCELLED } else { FINISHED };
            let swap =
                self.word
                    .compare_exchange_weak(word, after, Ordering::AcqRel, Ordering::Relaxed);
            match swap {
                Ok(_) => return Some(audience(after)),
                Err(seen) => word = seen,
            }
        }
    }

    /// As [`Task::finish`], by one who has the lock.
    pub fn finish_locked(&self, cancelled: bool) -> Audience {
        let step = if cancelled { CANCELLED } else { FINISHED } - RUNNING;
        let before = self.word.fetch_add(step, Ordering::AcqRel);
        debug_assert_eq!(before & STAGE, RUNNING);
        audience(before)
    }

    /// Somebody is about to wait for the end. False: it is over already.
    pub fn watch(&self) -> bool {
        self.word.fetch_or(WATCHED, Ordering::AcqRel) & STAGE < CANCELLED
    }

    /// From now on nobody ends it without its lock. False: it is over already.
    pub fn lock_end(&self) -> bool {
        self.word.fetch_or(LOCKED, Ordering::AcqRel) & STAGE < CANCELLED
    }

    /// Whoever is at it, or will be, is asked to end soon.
    pub fn ask_to_end(&self) {
        self.word.fetch_or(ASKED, Ordering::AcqRel);
    }

    /// Whether somebody asked.
    #[inline]
    pub fn is_asked_to_end(&self) -> bool {
        self.word.load(Ordering::Acquire) & ASKED != 0
    }

    /// Whether nobody may end it without its lock.
    pub fn has_lock(&self) -> bool {
        self.word.load(Ordering::Acquire) & LOCKED != 0
    }

    /// The worker `index` is at it.
    #[inline]
    pub fn run_by(&self, index: usize) {
        self.runner.store(index as u32 + 1, Ordering::Relaxed);
    }

    /// Which worker is or was at it.
    pub fn runner(&self) -> Option<usize> {
        let runner = self.runner.load(Ordering::Relaxed);
        (runner > 0).then(|| runner as usize - 1)
    }
}

fn audience(word: u32) -> Audience {
    Audience {
        watched: word & WATCHED != 0,
    }
}
