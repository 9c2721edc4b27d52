//! The calling thread's magazines, found without a search, and given back when it ends.

use super::classes::CLASS_COUNT;
use super::magazine::{Counts, Pair, ThreadCache};
use super::shared::Shared;
use crate::sync::{AtomicU64, Ordering::Relaxed};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

#[derive(Default)]
pub(super) struct Retired {
    pub allocated: AtomicU64,
    pub freed: AtomicU64,
    pub misses: AtomicU64,
}

/// The cache used last, by slab id: found without a search.
#[derive(Clone, Copy)]
struct Slot {
    id: u64,
    cache: *mut ThreadCache,
}

const SLOTS: usize = 4;

/// All caches of a thread; its drop, at the thread's end, returns them.
struct Owned(RefCell<Vec<OwnedCache>>);

/// A cache of the thread, by slab id.
type OwnedCache = (u64, Weak<Shared>, NonNull<ThreadCache>);

thread_local! {
    static FAST: [Cell<Slot>; SLOTS] = const {
        [const { Cell::new(Slot { id: 0, cache: std::ptr::null_mut() }) }; SLOTS]
    };
    static OWNED: Owned = const { Owned(RefCell::new(Vec::new())) };
}

impl Drop for Owned {
    fn drop(&mut self) {
        FAST.with(|slots| {
            for slot in slots {
                slot.set(Slot {
                    id: 0,
                    cache: std::ptr::null_mut(),
                });
            }
        });
        for (_, shared, cache) in self.0.take() {
            if let Some(shared) = shared.upgrade() {
                shared.retire(cache);
            }
        }
    }
}

impl Shared {
    /// The calling thread's cache; `None` while the thread is ending.
    #[inline]
    pub(super) fn cache(self: &Arc<Self>) -> Option<*mut ThreadCache> {
        let slot = FAST.with(|slots| slots[self.id as usize % SLOTS].get());
        if slot.id == self.id {
            Some(slot.cache)
        } else {
            self.find_cache()
        }
    }

    #[cold]
    pub(super) fn find_cache(self: &Arc<Self>) -> Option<*mut ThreadCache> {
        let cache = OWNED
            .try_with(|owned| {
                let mut owned = owned.0.borrow_mut();
                owned.retain(|(_, shared, _)| shared.strong_count() > 0);
                if let Some((_, _, cache)) = owned.iter().find(|(id, _, _)| *id == self.id) {
                    return *cache;
                }
                let cache = NonNull::from(Box::leak(ThreadCache::new()));
                self.caches.lock().push(cache);
                owned.push((self.id, Arc::downgrade(self), cache));
                cache
            })
            .ok()?;
        let slot = Slot {
            id: self.id,
            cache: cache.as_ptr(),
        };
        FAST.with(|slots| slots[self.id as usize % SLOTS].set(slot));
        Some(cache.as_ptr())
    }

    /// Empty a cache of the calling thread into the runs.
    ///
    /// # Safety
    /// `cache` is the calling thread's own (or of a thread that is gone).
    pub(super) unsafe fn flush(&self, cache: NonNull<ThreadCache>) {
        for class in 0..CLASS_COUNT {
            // SAFETY: the caller's promise makes us the only user of the magazines.
            let pair = unsafe { &mut (*cache.as_ptr()).pairs[class] };
            if pair.loaded.count == 0 && pair.previous.count == 0 {
                continue;
            }
            let mut guard = self.classes[class].lock();
            self.empty_magazine(&mut guard, &mut pair.loaded);
            self.empty_magazine(&mut guard, &mut pair.previous);
        }
    }

    pub(super) fn retire(&self, cache: NonNull<ThreadCache>) {
        // SAFETY: called by the owning thread at its end, or for it.
        unsafe { self.flush(cache) };
        let mut caches = self.caches.lock();
        // SAFETY: the cache was leaked by `find_cache` and is removed from the list below.
        let cache_box = unsafe { Box::from_raw(cache.as_ptr()) };
        for (counts, retired) in cache_box.counts.iter().zip(&self.retired) {
            retired
                .allocated
                .fetch_add(counts.allocated.load(Relaxed), Relaxed);
            retired.freed.fetch_add(counts.freed.load(Relaxed), Relaxed);
            retired
                .misses
                .fetch_add(counts.misses.load(Relaxed), Relaxed);
        }
        caches.retain(|entry| *entry != cache);
    }

    /// (allocated, freed, misses) blocks of each class, over all threads.
    pub(super) fn class_counts(&self) -> [(u64, u64, u64); CLASS_COUNT] {
        let caches = self.caches.lock();
        std::array::from_fn(|class| {
            let retired = &self.retired[class];
            let mut sums = (
                retired.allocated.load(Relaxed),
                retired.freed.load(Relaxed),
                retired.misses.load(Relaxed),
            );
            for cache in caches.iter() {
                // SAFETY: caches in the list are live, and `counts` is never borrowed mutably.
                let counts = unsafe { &(*cache.as_ptr()).counts[class] };
                sums.0 += counts.allocated.load(Relaxed);
                sums.1 += counts.freed.load(Relaxed);
                sums.2 += counts.misses.load(Relaxed);
            }
            sums
        })
    }

    /// The calling thread's cache, if it has one.
    pub(super) fn own_cache(&self) -> Option<NonNull<ThreadCache>> {
        let find = |owned: &Owned| {
            let owned = owned.0.borrow();
            let found = owned.iter().find(|(id, _, _)| *id == self.id);
            found.map(|(_, _, cache)| *cache)
        };
        OWNED.try_with(find).ok().flatten()
    }
}

/// A thread's magazines of a class, and their counts.
///
/// # Safety
/// `cache` is the calling thread's own; the borrow ends before the cache is used again.
#[inline]
pub(super) unsafe fn own<'a>(cache: *mut ThreadCache, class: usize) -> (&'a mut Pair, &'a Counts) {
    // SAFETY: the caller's promise; only the owner borrows `pairs`.
    let pair = unsafe { &mut (*cache).pairs[class] };
    // SAFETY: a live cache; `counts` is only ever borrowed shared.
    let counts = unsafe { &(*cache).counts[class] };
    (pair, counts)
}
