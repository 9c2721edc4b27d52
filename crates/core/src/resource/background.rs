//! One quiet thread that lets kept memory age, for all resources of the process.
//!
//! It sleeps without waking while no resource keeps anything. `stop` ends it; the next resource
//! that keeps something starts it again. A forked child starts its own when it needs one.

use crate::os;
use crate::sync::Bell;
use crate::sync::Lock;
use crate::sync::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Time between two looks at what has aged.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// Something that keeps memory and lets it age.
pub(crate) trait Ages: Send + Sync {
    /// Give back what is old enough. Called about every [`TICK`] while anything is kept.
    fn age(&self);
    /// Whether anything is kept that could age; stored before `wake` is called.
    fn keeps(&self) -> bool;
}

struct Ticker {
    bell: Bell,
    stopping: AtomicBool,
}

static KEEPERS: Lock<Vec<Weak<dyn Ages>>> = Lock::new(Vec::new());
/// The running thread's ticker, or null. Tickers are leaked: one a start, a few words each.
static CURRENT: AtomicPtr<Ticker> = AtomicPtr::new(std::ptr::null_mut());
/// Held while the thread is started or stopped; every ticker ever made, so that none is lost.
static TICKERS: Lock<Vec<&'static Ticker>> = Lock::new(Vec::new());

/// Let `keeper` age for as long as it lives.
pub(crate) fn register(keeper: Weak<dyn Ages>) {
    let mut keepers = KEEPERS.lock();
    keepers.retain(|entry| entry.strong_count() > 0);
    keepers.push(keeper);
}

/// Make sure that the thread looks at the keepers again. One load when it is awake anyway.
#[inline]
pub(crate) fn wake() {
    let ticker = CURRENT.load(Ordering::Acquire);
    if ticker.is_null() {
        start();
    } else {
        // SAFETY: tickers are leaked, so the pointer stays valid.
        unsafe { &*ticker }.bell.ring();
    }
}

/// End the thread. It starts again when a resource next keeps memory.
pub fn stop() {
    let _tickers = TICKERS.lock();
    let ticker = CURRENT.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if !ticker.is_null() {
        // SAFETY: tickers are leaked.
        let ticker = unsafe { &*ticker };
        ticker.stopping.store(true, Ordering::SeqCst);
        ticker.bell.ring_always();
    }
}

/// Before a fork: take this module's locks.
pub(super) fn fork_lock() {
    TICKERS.hold();
    KEEPERS.hold();
}

/// After a fork: release them; in the child the thread does not exist any more.
///
/// # Safety
/// This thread (or the one it is a copy of) called [`fork_lock`] just before.
pub(super) unsafe fn fork_unlock(in_child: bool) {
    if in_child {
        CURRENT.store(std::ptr::null_mut(), Ordering::Release);
    }
    // SAFETY: `fork_lock` called `hold`.
    unsafe { KEEPERS.release() };
    // SAFETY: as above.
    unsafe { TICKERS.release() };
}

#[cold]
fn start() {
    // Whoever finds the lock taken leaves it to the other thread, which is about to look.
    let Some(mut tickers) = TICKERS.try_lock() else {
        return;
    };
    if !CURRENT.load(Ordering::Acquire).is_null() {
        return;
    }
    let ticker: &'static Ticker = Box::leak(Box::new(Ticker {
        bell: Bell::new(),
        stopping: AtomicBool::new(false),
    }));
    tickers.push(ticker);
    CURRENT.store(std::ptr::from_ref(ticker).cast_mut(), Ordering::Release);
    if !os::spawn_quiet("moirai-decay", move || run(ticker)) {
        // No thread to be had: memory still ages at the next cap or trim. Try again at next wake.
        CURRENT.store(std::ptr::null_mut(), Ordering::Release);
    }
}

fn keepers() -> Vec<Arc<dyn Ages>> {
    KEEPERS.lock().iter().filter_map(Weak::upgrade).collect()
}

fn run(ticker: &'static Ticker) {
    loop {
        ticker.bell.sleep_unless(|| {
            ticker.stopping.load(Ordering::SeqCst) || keepers().iter().any(|keeper| keeper.keeps())
        });
        if ticker.stopping.load(Ordering::SeqCst) {
            return;
        }
        ticker.bell.wait_timeout(TICK);
        if ticker.stopping.load(Ordering::SeqCst) {
            return;
        }
        for keeper in keepers() {
            keeper.age();
        }
    }
}
