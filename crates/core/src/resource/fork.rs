//! Keeps every resource's locks consistent over `fork`: all are taken before, released after.
//!
//! A child of a program with threads may otherwise find a lock held by a thread that it does not
//! have. Locks are taken newest resource first, so downstream before upstream, the order in which
//! the allocation paths take them.

use crate::os;
use crate::sync::{AtomicU64, Lock, Ordering};
use std::sync::{Arc, Once, Weak};

/// Something with locks that a fork must not tear.
pub(crate) trait ForkLocks: Send + Sync {
    /// Take every lock and keep it.
    fn lock_all(&self);
    /// Release what `lock_all` took.
    ///
    /// # Safety
    /// The calling thread (or its copy in a child) called `lock_all` just before.
    unsafe fn unlock_all(&self);
}

/// A lock by itself, behind an `Arc`.
impl<T: Send> ForkLocks for Lock<T> {
    fn lock_all(&self) {
        self.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.release() };
    }
}

static REGISTERED: Lock<Vec<Weak<dyn ForkLocks>>> = Lock::new(Vec::new());
static ONCE: Once = Once::new();
/// What `prepare` locked, for the forking thread's `parent` and `child`.
static HELD: Lock<Vec<Arc<dyn ForkLocks>>> = Lock::new(Vec::new());

/// Forks between the first process and this one. Written in a child before it has a second thread,
/// so `Relaxed` suffices.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// A number that differs between a parent and its child, counted since something registered here.
#[inline]
pub(crate) fn generation() -> u64 {
    GENERATION.load(Ordering::Relaxed)
}

/// Something that is shared, and whose locks are taken and released around every fork for as long
/// as it lives.
pub(crate) fn shared<T: ForkLocks + 'static>(locks: T) -> Arc<T> {
    ONCE.call_once(|| os::at_fork(prepare, parent, child));
    let shared = Arc::new(locks);
    let weak: Weak<T> = Arc::downgrade(&shared);
    push_live(&mut REGISTERED.lock(), weak);
    shared
}

/// Add to a list of what may go at any time. What is gone is dropped only when the list would grow,
/// and then there is room for more, so that many additions stay cheap.
pub(crate) fn push_live<T: ?Sized>(list: &mut Vec<Weak<T>>, entry: Weak<T>) {
    if list.len() == list.capacity() {
        list.retain(|entry| entry.strong_count() > 0);
        let live = list.len();
        list.reserve(live.max(16));
    }
    list.push(entry);
}

extern "C" fn prepare() {
    super::background::fork_lock();
    REGISTERED.hold();
    HELD.hold();
    // SAFETY: held above, by this thread.
    let registered = unsafe { REGISTERED.held() };
    // SAFETY: as above.
    let held = unsafe { HELD.held() };
    *held = registered.iter().rev().filter_map(Weak::upgrade).collect();
    for locks in held.iter() {
        locks.lock_all();
    }
}

fn finish(in_child: bool) {
    // SAFETY: `prepare` on this thread held it.
    let held = std::mem::take(unsafe { HELD.held() });
    for locks in held.iter().rev() {
        // SAFETY: `prepare` called `lock_all` on this thread.
        unsafe { locks.unlock_all() };
    }
    // SAFETY: `prepare` held it on this thread.
    unsafe { HELD.release() };
    // SAFETY: as above.
    unsafe { REGISTERED.release() };
    // SAFETY: `prepare` on this thread called `fork_lock`.
    unsafe { super::background::fork_unlock(in_child) };
    // Dropped last: if this was the only reference, the resource's `drop` runs without our locks.
    drop(held);
}

extern "C" fn parent() {
    finish(false);
}

extern "C" fn child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    finish(true);
}
