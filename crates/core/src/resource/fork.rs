//! Keeps every resource's locks consistent over `fork`: all are taken before, released after.
//!
//! A child of a program with threads may otherwise find a lock held by a thread that it does not
//! have. Locks are taken newest resource first, so downstream before upstream, the order in which
//! the allocation paths take them.

use crate::os;
use parking_lot::Mutex;
use std::sync::{Once, Weak};

/// Something with locks that a fork must not tear.
pub(crate) trait ForkLocks: Send + Sync {
    /// Take every lock and keep it.
    fn lock_all(&self);
    /// Release what `lock_all` took.
    ///
    /// # Safety
    /// The calling thread (or its copy in a child) called `lock_all` just before.
    unsafe fn unlock_all(&self, in_child: bool);
}

static REGISTERED: Mutex<Vec<Weak<dyn ForkLocks>>> = Mutex::new(Vec::new());
static ONCE: Once = Once::new();
/// What `prepare` locked, for the forking thread's `parent` and `child`.
static HELD: Mutex<Vec<std::sync::Arc<dyn ForkLocks>>> = Mutex::new(Vec::new());

/// Have `locks` taken and released around every fork for as long as it lives.
pub(crate) fn register(locks: Weak<dyn ForkLocks>) {
    ONCE.call_once(|| os::at_fork(prepare, parent, child));
    let mut registered = REGISTERED.lock();
    registered.retain(|entry| entry.strong_count() > 0);
    registered.push(locks);
}

extern "C" fn prepare() {
    super::background::fork_lock();
    let registered = REGISTERED.lock();
    let held: Vec<_> = registered.iter().rev().filter_map(Weak::upgrade).collect();
    std::mem::forget(registered);
    let mut slot = HELD.lock();
    *slot = held;
    for locks in slot.iter() {
        locks.lock_all();
    }
    std::mem::forget(slot);
}

fn finish(in_child: bool) {
    // SAFETY: `prepare` on this thread called `fork_lock`.
    unsafe { super::background::fork_unlock(in_child) };
    // SAFETY: `prepare` on this thread locked `HELD` and forgot the guard.
    let slot = unsafe { &mut *HELD.data_ptr() };
    let held = std::mem::take(slot);
    for locks in held.iter().rev() {
        // SAFETY: `prepare` called `lock_all` on this thread.
        unsafe { locks.unlock_all(in_child) };
    }
    // SAFETY: `prepare` forgot the guard on this thread.
    unsafe { HELD.force_unlock() };
    // SAFETY: as above.
    unsafe { REGISTERED.force_unlock() };
    // Dropped last: if this was the only reference, the resource's `drop` runs without our locks.
    drop(held);
}

extern "C" fn parent() {
    finish(false);
}

extern "C" fn child() {
    finish(true);
}
