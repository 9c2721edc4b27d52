//! The only source of atomics and blocking primitives that a loom model may replace.
//!
//! [`Lock`] is for plain data and takes part in `fork`; it is std's mutex, whose state is one word of
//! its own, because locks with a table shared by all (as in `parking_lot`) cannot be made whole in a
//! child that was forked while another thread was inside that table.

pub mod front;
#[cfg(not(loom))]
pub mod parker;

#[cfg(loom)]
pub use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(loom)]
pub use loom::sync::{Condvar, Mutex};
#[cfg(not(loom))]
pub use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(not(loom))]
pub use std::sync::{Condvar, Mutex};

/// Let others go on while what they are about to do is waited for, as the `round`-th time.
#[cfg(loom)]
pub fn spin(_round: u32) {
    loom::thread::yield_now();
}

/// Let others go on while what they are about to do is waited for, as the `round`-th time.
#[cfg(not(loom))]
pub fn spin(round: u32) {
    if round < 64 {
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// Memory that a protocol gives to one thread at a time; a model checks that it does.
#[cfg(loom)]
pub type SharedCell<T> = loom::cell::UnsafeCell<T>;

/// Memory that a protocol gives to one thread at a time; a model checks that it does.
#[cfg(not(loom))]
#[repr(transparent)]
pub struct SharedCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> SharedCell<T> {
    /// A cell with `value`.
    pub const fn new(value: T) -> Self {
        SharedCell(std::cell::UnsafeCell::new(value))
    }

    /// Read through the pointer, which is valid as long as the cell.
    #[inline(always)]
    pub fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    /// Write through the pointer, which is valid as long as the cell.
    #[inline(always)]
    pub fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

/// A pointer that is null until it is published, once, and may be read without a lock from then on.
///
/// All-zero bytes are a valid empty `Published`, so that a table of them can live in fresh pages.
#[repr(transparent)]
pub struct Published<T> {
    /// `Release` on publication, `Acquire` on reading: a reader that sees the pointer sees what it
    /// points to as it was when published.
    pointer: AtomicPtr<T>,
}

impl<T> Published<T> {
    /// Nothing published yet.
    #[cfg(loom)]
    pub fn empty() -> Self {
        Published {
            pointer: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Nothing published yet.
    #[cfg(not(loom))]
    pub const fn empty() -> Self {
        Published {
            pointer: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// The pointer, or null. The pointee lives as long as whoever published it says.
    #[inline]
    pub fn get(&self) -> *mut T {
        self.pointer.load(Ordering::Acquire)
    }

    /// Publish `pointer` if nothing was published before; otherwise give back what was.
    pub fn publish(&self, pointer: *mut T) -> Result<(), *mut T> {
        self.pointer
            .compare_exchange(
                std::ptr::null_mut(),
                pointer,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .map(|_| ())
    }
}

/// Bytes reserved out of a fixed limit; many threads may reserve and release at once.
pub struct Budget {
    limit: usize,
    /// Never above `limit`. `AcqRel` so that a release of memory happens before its reuse.
    used: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes, none of them used.
    pub fn new(limit: usize) -> Self {
        Budget {
            limit,
            used: AtomicUsize::new(0),
        }
    }

    /// The limit given at construction.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes reserved now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// Reserve `bytes`, or change nothing and return the bytes that were in use.
    pub fn reserve(&self, bytes: usize) -> Result<(), usize> {
        let mut used = self.used.load(Ordering::Acquire);
        loop {
            let after = match used.checked_add(bytes) {
                Some(after) if after <= self.limit => after,
                _ => return Err(used),
            };
            match self
                .used
                .compare_exchange_weak(used, after, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Ok(()),
                Err(seen) => used = seen,
            }
        }
    }

    /// Give back `bytes` that [`Budget::reserve`] granted.
    pub fn release(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes);
    }
}

/// Bytes charged to an account and to every account above it, until the account is closed.
///
/// Closing gives back at once, to the accounts above, all that is charged here; what is released
/// later counts here alone. Invariant while an account is open: its `used` is at least the sum of
/// what its open children use, and never above its `limit`.
pub struct Quota {
    limit: usize,
    parent: Option<std::sync::Arc<Quota>>,
    /// Bytes charged; the top bit is set once closed. One word, so that a release goes up or stops
    /// by what it found when it subtracted. `AcqRel` as in [`Budget`].
    used: AtomicUsize,
    /// Most bytes charged at once. Read by reports only, so `Relaxed` suffices.
    peak: AtomicUsize,
}

const QUOTA_CLOSED: usize = 1 << (usize::BITS - 1);

/// Why a [`Quota`] charged nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaRefusal {
    /// The account, or one above it, is closed.
    Closed,
    /// An account has `used` bytes charged of `limit`; `levels_up` says which: 0 is the one asked.
    Full {
        /// Bytes charged to it already.
        used: usize,
        /// Its limit.
        limit: usize,
        /// How far above the account that was asked.
        levels_up: usize,
    },
}

impl Quota {
    /// An account of at most `limit` bytes under `parent`; nothing is charged yet.
    pub fn new(limit: usize, parent: Option<std::sync::Arc<Quota>>) -> Self {
        Quota {
            limit: limit.min(QUOTA_CLOSED - 1),
            parent,
            used: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        }
    }

    /// The limit given at construction.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Bytes charged now, children's included.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire) & !QUOTA_CLOSED
    }

    /// Most bytes charged at once.
    pub fn peak(&self) -> usize {
        self.peak.load(Ordering::Relaxed)
    }

    /// Charge `bytes` here and above, or change nothing and say why not.
    pub fn reserve(&self, bytes: usize) -> Result<(), QuotaRefusal> {
        // From the top down: an account that is closed meanwhile gives back what it has, and not
        // what is only being charged; that is undone below.
        if let Some(parent) = &self.parent {
            parent.reserve(bytes).map_err(|refusal| match refusal {
                QuotaRefusal::Closed => QuotaRefusal::Closed,
                QuotaRefusal::Full {
                    used,
                    limit,
                    levels_up,
                } => QuotaRefusal::Full {
                    used,
                    limit,
                    levels_up: levels_up + 1,
                },
            })?;
        }
        self.charge(bytes).inspect_err(|_| {
            if let Some(parent) = &self.parent {
                parent.release(bytes);
            }
        })
    }

    fn charge(&self, bytes: usize) -> Result<(), QuotaRefusal> {
        let mut used = self.used.load(Ordering::Acquire);
        loop {
            if used & QUOTA_CLOSED != 0 {
                return Err(QuotaRefusal::Closed);
            }
            let after = match used.checked_add(bytes) {
                Some(after) if after <= self.limit => after,
                _ => {
                    return Err(QuotaRefusal::Full {
                        used,
                        limit: self.limit,
                        levels_up: 0,
                    });
                }
            };
            match self
                .used
                .compare_exchange_weak(used, after, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => {
                    if after > self.peak.load(Ordering::Relaxed) {
                        self.peak.fetch_max(after, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                Err(seen) => used = seen,
            }
        }
    }

    /// Give back `bytes` that [`Quota::reserve`] charged.
    pub fn release(&self, bytes: usize) {
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before & !QUOTA_CLOSED >= bytes);
        if before & QUOTA_CLOSED == 0 {
            if let Some(parent) = &self.parent {
                parent.release(bytes);
            }
        }
    }

    /// Charge nothing here any more, and give back what is charged to the accounts above.
    pub fn close(&self) {
        let before = self.used.fetch_or(QUOTA_CLOSED, Ordering::AcqRel);
        if before & QUOTA_CLOSED == 0 {
            if let Some(parent) = &self.parent {
                parent.release(before);
            }
        }
    }
}

/// Wakes one sleeping background thread; ringing while it is awake costs one load.
///
/// Invariant: a ring that comes after the sleeper's last look at its work is never lost, because
/// the sleeper clears `awake` before it looks once more.
pub struct Bell {
    /// Two fences pair it with the caller's own "there is work" flag: store work, fence, load awake
    /// against store awake, fence, load work. One of the two sees the other's store.
    awake: AtomicBool,
    rung: Mutex<bool>,
    condition: Condvar,
}

impl Default for Bell {
    fn default() -> Self {
        Self::new()
    }
}

impl Bell {
    /// A bell whose listener is awake.
    pub fn new() -> Self {
        Bell {
            awake: AtomicBool::new(true),
            rung: Mutex::new(false),
            condition: Condvar::new(),
        }
    }

    /// Wake the listener if it sleeps. Call after the work was stored (`Relaxed` suffices).
    #[inline]
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if !self.awake.load(Ordering::Relaxed) {
            self.ring_slow();
        }
    }

    #[cold]
    fn ring_slow(&self) {
        let mut rung = self
            .rung
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        *rung = true;
        self.condition.notify_one();
    }

    /// Ring whether or not the listener sleeps, also out of a timed wait: for stopping.
    pub fn ring_always(&self) {
        self.ring_slow();
    }

    /// Sleep until rung, unless `has_work` says that there is work already.
    pub fn sleep_unless(&self, has_work: impl Fn() -> bool) {
        self.awake.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !has_work() {
            let mut rung = self
                .rung
                .lock()
                .unwrap_or_else(|poison| poison.into_inner());
            while !*rung {
                rung = self
                    .condition
                    .wait(rung)
                    .unwrap_or_else(|poison| poison.into_inner());
            }
            *rung = false;
        }
        self.awake.store(true, Ordering::Relaxed);
    }

    /// Wait until `timeout` has passed or [`Bell::ring_always`] was called.
    #[cfg(not(loom))]
    pub fn wait_timeout(&self, timeout: std::time::Duration) {
        let rung = self
            .rung
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        let (mut rung, _) = self
            .condition
            .wait_timeout_while(rung, timeout, |rung| !*rung)
            .unwrap_or_else(|poison| poison.into_inner());
        *rung = false;
    }
}

/// A mutex that does not poison; a model has no `fork`.
#[cfg(loom)]
pub struct Lock<T>(Mutex<T>);

#[cfg(loom)]
impl<T> Lock<T> {
    /// A lock around `value`.
    pub fn new(value: T) -> Self {
        Lock(Mutex::new(value))
    }

    /// Wait for the lock.
    pub fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// A mutex that does not poison and can be held over a `fork`.
#[cfg(not(loom))]
pub struct Lock<T: 'static> {
    mutex: Mutex<T>,
    /// The guard of whoever called `hold`; only touched by the thread that holds the mutex.
    held: std::cell::UnsafeCell<Option<std::sync::MutexGuard<'static, T>>>,
}

// SAFETY: `held` is only touched while `mutex` is locked, by the thread that locked it.
#[cfg(not(loom))]
unsafe impl<T: Send> Sync for Lock<T> {}
// SAFETY: as above; a lock that is moved is borrowed by nobody, so nothing is held.
#[cfg(not(loom))]
unsafe impl<T: Send> Send for Lock<T> {}

#[cfg(not(loom))]
impl<T> Lock<T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        Lock {
            mutex: Mutex::new(value),
            held: std::cell::UnsafeCell::new(None),
        }
    }

    /// Wait for the lock.
    #[inline]
    pub fn lock(&self) -> std::sync::MutexGuard<'_, T> {
        self.mutex
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// Take the lock if it is free.
    pub fn try_lock(&self) -> Option<std::sync::MutexGuard<'_, T>> {
        match self.mutex.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(poison)) => Some(poison.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// The value, where no other thread can have the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.mutex
            .get_mut()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// Take the lock and keep it until [`Lock::release`].
    pub fn hold(&self) {
        let guard = self.lock();
        // SAFETY: the guard lives in `self`, next to the mutex it borrows, and `release` drops it
        // before the caller of `hold` lets `self` go.
        let guard = unsafe {
            std::mem::transmute::<std::sync::MutexGuard<'_, T>, std::sync::MutexGuard<'static, T>>(
                guard,
            )
        };
        // SAFETY: this thread has the mutex.
        unsafe { *self.held.get() = Some(guard) };
    }

    /// Release what [`Lock::hold`] took.
    ///
    /// # Safety
    /// This thread, or the one it was forked from, called `hold`.
    pub unsafe fn release(&self) {
        // SAFETY: the caller has the mutex.
        let guard = unsafe { (*self.held.get()).take() };
        drop(guard);
    }

    /// The value while [`Lock::hold`] is in force.
    ///
    /// # Safety
    /// As for `release`, and the borrow ends before `release` is called.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn held(&self) -> &mut T {
        // SAFETY: the caller has the mutex.
        let guard = unsafe { (*self.held.get()).as_mut() };
        guard.expect("hold was called")
    }
}

#[cfg(not(loom))]
impl<T: Default> Default for Lock<T> {
    fn default() -> Self {
        Lock::new(T::default())
    }
}
