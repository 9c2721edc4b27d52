//! The slab: equal blocks cut from 64 KiB runs, per-thread magazines in front of a depot.
//!
//! Blocks have no header: a table from each 64 KiB of address space to its run says which class an
//! address belongs to, so that a foreign address is recognised without being read. Sources:
//! Bonwick, "The Slab Allocator" (1994); Bonwick and Adams, "Magazines and Vmem" (2001). Left out:
//! object construction (blocks are bytes).
//!
//! Lock order: a class, then upstream's to give back; nothing is drawn from upstream with a class
//! locked, since a limit there may run code that frees blocks of this slab. Threads touch only
//! their own magazines; a thread's magazines go back when it ends. In a forked child the magazines
//! of the parent's other threads stay unused.

mod classes;
mod depot;
mod magazine;
mod run;

use super::address_map::AddressMap;
use super::background::{self, Ages};
use super::fork::{self, ForkLocks};
use super::{Block, Group, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::sync::Lock;
use crate::sync::{AtomicBool, AtomicU64, Ordering::Relaxed};
use classes::{CLASS_COUNT, RUN_BYTES, alignment, block_bytes, class_of, magazine_rounds};
use depot::Depot;
use magazine::{Counts, Magazine, Pair, ThreadCache};
use run::Run;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

pub use classes::MAX_BLOCK_BYTES;

/// Ticks that a run with free blocks rests before its free pages are given back.
const REST_TICKS: u64 = 4;

/// Runs looked at to find one that is nearly full.
const RUNS_COMPARED: usize = 32;

/// The part of a class that its lock guards.
struct Class {
    index: usize,
    depot: Depot,
    runs: Vec<*mut Run>,
    partial: Vec<*mut Run>,
    colour: usize,
    purged_bytes: usize,
}

// SAFETY: runs are boxes owned by the class; the pointers are only followed under its lock.
unsafe impl Send for Class {}

struct Shared {
    id: u64,
    upstream: Arc<dyn Resource>,
    /// From an address to its `Run` (shifted left by 8) and class; 0: not in a run.
    units: AddressMap<16>,
    classes: [Lock<Class>; CLASS_COUNT],
    /// Every thread's cache; boxes, so that they outlive the thread until they are retired.
    caches: Lock<Vec<NonNull<ThreadCache>>>,
    /// Counts of retired caches and of threads that have none any more.
    retired: [Retired; CLASS_COUNT],
    passed: super::statistics::Counters,
    /// Bytes and blocks out of the runs and the depot, and passed upstream: for the peaks.
    out_bytes: AtomicU64,
    out_count: AtomicU64,
    peak_bytes: AtomicU64,
    peak_count: AtomicU64,
    invalid_frees: AtomicU64,
    purged_total: AtomicU64,
    tick: AtomicU64,
    /// Whether a tick may find something to give back. `Relaxed`: `Bell` has the fences.
    dirty: AtomicBool,
}

// SAFETY: caches are only dereferenced by their own thread or, for counters, atomically; `Shared`
// frees them when no thread can reach them any more.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

#[derive(Default)]
struct Retired {
    allocated: AtomicU64,
    freed: AtomicU64,
    misses: AtomicU64,
}

/// The slab as a resource. Any thread may use it.
pub struct SlabResource {
    shared: Arc<Shared>,
}

// ---- the calling thread's caches ----

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
    fn cache(self: &Arc<Self>) -> Option<*mut ThreadCache> {
        let slot = FAST.with(|slots| slots[self.id as usize % SLOTS].get());
        if slot.id == self.id {
            Some(slot.cache)
        } else {
            self.find_cache()
        }
    }

    #[cold]
    fn find_cache(self: &Arc<Self>) -> Option<*mut ThreadCache> {
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
    unsafe fn flush(&self, cache: NonNull<ThreadCache>) {
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

    fn retire(&self, cache: NonNull<ThreadCache>) {
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

    // ---- classes, runs, depot ----

    fn went_out(&self, class: usize, blocks: usize) {
        let bytes = (blocks * block_bytes(class)) as u64;
        let out = self.out_bytes.fetch_add(bytes, Relaxed) + bytes;
        self.peak_bytes.fetch_max(out, Relaxed);
        let count = self.out_count.fetch_add(blocks as u64, Relaxed) + blocks as u64;
        self.peak_count.fetch_max(count, Relaxed);
    }

    fn came_in(&self, class: usize, blocks: usize) {
        self.out_bytes
            .fetch_sub((blocks * block_bytes(class)) as u64, Relaxed);
        self.out_count.fetch_sub(blocks as u64, Relaxed);
    }

    /// A new run of `class`, in no list yet. No lock is held: upstream may be a limit that has the
    /// interpreter collect garbage first, and with it blocks of this very class.
    fn draw_run(&self, class: usize, colour: usize) -> Result<*mut Run> {
        let block = self
            .upstream
            .allocate(Request::new(RUN_BYTES, RUN_BYTES, false)?)?;
        let run = Box::into_raw(Box::new(Run::new(block.address, class, colour)));
        let word = ((run as u64) << 8) | (class as u64 + 1);
        if !self.units.set(block.address.as_ptr() as usize, word) {
            // SAFETY: made above, seen by nobody.
            drop(unsafe { Box::from_raw(run) });
            // SAFETY: drawn above, seen by nobody.
            unsafe { self.upstream.deallocate(block.address) };
            return Err(Error::out_of_memory(
                RUN_BYTES,
                "no address space for the slab's table",
            ));
        }
        Ok(run)
    }

    fn return_run(&self, class: &mut Class, run: *mut Run) {
        let (base, index, purged) = {
            // SAFETY: runs in the lists are live boxes, and the class's lock is held.
            let run = unsafe { &*run };
            (run.base, run.index, run.purged_bytes())
        };
        unlist_partial(class, run);
        class.runs.swap_remove(index);
        if let Some(&moved) = class.runs.get(index) {
            // SAFETY: as above.
            unsafe { (*moved).index = index };
        }
        class.purged_bytes -= purged;
        self.units.set(base.as_ptr() as usize, 0);
        // SAFETY: made by `draw_run`, removed from every list.
        drop(unsafe { Box::from_raw(run) });
        // SAFETY: drawn from upstream, and every block of it is free.
        unsafe { self.upstream.deallocate(base) };
    }

    /// Fill an empty magazine from the depot or the runs; false if neither has a block.
    fn refill(&self, class: &mut Class, magazine: &mut Magazine) -> bool {
        debug_assert_eq!(magazine.count, 0);
        if class.depot.fill(magazine) {
            self.went_out(class.index, magazine.count as usize);
            return true;
        }
        let Some(run) = fullest(class) else {
            return false;
        };
        // SAFETY: a live run of this class, whose lock is held.
        let run_ref = unsafe { &mut *run };
        let purged = run_ref.purged_bytes();
        let before = run_ref.free_count;
        // Half a magazine: the other half is room for what comes back.
        let wanted = (magazine.rounds.len() / 2).max(1);
        magazine.fresh = run_ref.take(&mut magazine.rounds, wanted) as u32;
        run_ref.touched = self.tick.load(Relaxed);
        magazine.count = (before - run_ref.free_count) as u32;
        class.purged_bytes -= purged - run_ref.purged_bytes();
        if run_ref.free_count == 0 {
            unlist_partial(class, run);
        }
        self.went_out(class.index, magazine.count as usize);
        true
    }

    /// Return every block of a magazine to its run.
    fn empty_magazine(&self, class: &mut Class, magazine: &mut Magazine) {
        let count = magazine.count as usize;
        for &address in &magazine.rounds[..count] {
            self.put(class, address);
        }
        magazine.count = 0;
        magazine.fresh = 0;
        self.came_in(class.index, count);
    }

    fn put(&self, class: &mut Class, address: *mut u8) {
        let word = self.units.get(address as usize);
        let run = (word >> 8) as *mut Run;
        debug_assert!(!run.is_null());
        // SAFETY: the block was handed out by this class, so its run is live; the lock is held.
        let run_ref = unsafe { &mut *run };
        if !run_ref.put(address as usize) {
            self.invalid_frees.fetch_add(1, Relaxed);
            return;
        }
        run_ref.touched = self.tick.load(Relaxed);
        if run_ref.is_empty() {
            if run_ref.partial_index.is_none() {
                list_partial(class, run);
            }
            self.return_run(class, run);
        } else if run_ref.partial_index.is_none() {
            list_partial(class, run);
        }
    }

    #[cold]
    fn allocate_slow(
        &self,
        cache: Option<*mut ThreadCache>,
        class: usize,
    ) -> Result<(*mut u8, bool)> {
        let colour = {
            let mut guard = self.classes[class].lock();
            if let Some(taken) = self.take_locked(&mut guard, cache) {
                return Ok(taken);
            }
            guard.colour = guard.colour.wrapping_add(1);
            guard.colour
        };
        let drawn = self.draw_run(class, colour);
        let mut guard = self.classes[class].lock();
        let refusal = match drawn {
            Ok(run) => {
                list_run(&mut guard, run);
                None
            }
            Err(error) => Some(error),
        };
        // What other threads freed meanwhile, or the limit's collection did, serves as well.
        let taken = self.take_locked(&mut guard, cache);
        taken.ok_or_else(|| refusal.expect("a run was listed under this lock"))
    }

    /// A block of a class whose lock is held, by way of the calling thread's magazines if it has
    /// some; `None` if depot and runs have none either.
    fn take_locked(
        &self,
        class: &mut Class,
        cache: Option<*mut ThreadCache>,
    ) -> Option<(*mut u8, bool)> {
        if let Some(cache) = cache {
            // SAFETY: the calling thread's own cache.
            let (pair, counts) = unsafe { own(cache, class.index) };
            // What was freed on this thread while a run was drawn lies in its magazines.
            return pair.pop(counts).or_else(|| {
                self.refill(class, &mut pair.loaded)
                    .then(|| pair.pop(counts).expect("just refilled"))
            });
        }
        let mut magazine = Magazine::empty(class.index);
        if !self.refill(class, &mut magazine) {
            return None;
        }
        magazine.count -= 1;
        let address = magazine.rounds[magazine.count as usize];
        let reused = magazine.count >= magazine.fresh;
        let retired = &self.retired[class.index];
        self.empty_magazine(class, &mut magazine);
        retired.allocated.fetch_add(1, Relaxed);
        if !reused {
            retired.misses.fetch_add(1, Relaxed);
        }
        Some((address, reused))
    }

    #[cold]
    fn deallocate_slow(&self, cache: Option<*mut ThreadCache>, class: usize, address: *mut u8) {
        let mut guard = self.classes[class].lock();
        if let Some(cache) = cache {
            // SAFETY: the calling thread's own cache.
            let (pair, counts) = unsafe { own(cache, class) };
            self.came_in(class, pair.previous.count as usize);
            if let Some(oldest) = guard.depot.unload(&mut pair.previous, class) {
                self.drain(&mut guard, oldest);
            }
            let taken = pair.push(counts, address);
            debug_assert!(taken);
        } else {
            self.put(&mut guard, address);
            self.came_in(class, 1);
            self.retired[class].freed.fetch_add(1, Relaxed);
        }
        drop(guard);
        self.wake();
    }

    /// Return the blocks of a magazine of the depot, which is not counted as out, to their runs.
    fn drain(&self, class: &mut Class, mut magazine: Magazine) {
        self.went_out_quietly(class.index, magazine.count as usize);
        self.empty_magazine(class, &mut magazine);
        class.depot.keep(magazine);
    }

    fn went_out_quietly(&self, class: usize, blocks: usize) {
        self.out_bytes
            .fetch_add((blocks * block_bytes(class)) as u64, Relaxed);
        self.out_count.fetch_add(blocks as u64, Relaxed);
    }

    fn wake(&self) {
        self.dirty.store(true, Relaxed);
        background::wake();
    }

    /// Drain depots down to `keep_low_water`'s need and give rested pages back.
    fn give_back(&self, everything: bool) -> usize {
        let now = self.tick.load(Relaxed);
        let mut given = 0;
        let mut waiting = false;
        for class in &self.classes {
            let mut class = class.lock();
            for magazine in class.depot.unneeded(everything) {
                self.drain(&mut class, magazine);
            }
            waiting |= class.depot.has_blocks();
            let mut purged = 0;
            for &run in &class.partial {
                // SAFETY: a live run of this class, whose lock is held.
                let run = unsafe { &mut *run };
                if everything || now.saturating_sub(run.touched) == REST_TICKS {
                    purged += run.purge();
                }
                waiting |= now.saturating_sub(run.touched) < REST_TICKS;
            }
            class.purged_bytes += purged;
            given += purged;
        }
        self.purged_total.fetch_add(given as u64, Relaxed);
        if !waiting {
            self.dirty.store(false, Relaxed);
        }
        given
    }

    /// (allocated, freed, misses) blocks of each class, over all threads.
    fn class_counts(&self) -> [(u64, u64, u64); CLASS_COUNT] {
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
    fn own_cache(&self) -> Option<NonNull<ThreadCache>> {
        let find = |owned: &Owned| {
            let owned = owned.0.borrow();
            let found = owned.iter().find(|(id, _, _)| *id == self.id);
            found.map(|(_, _, cache)| *cache)
        };
        OWNED.try_with(find).ok().flatten()
    }

    /// Look at a class whose lock is held; returns how many blocks are out of runs and depot.
    ///
    /// Blocks in the depot and in the calling thread's magazines must each be on one list, and used
    /// as their run sees it. `own` is the calling thread's cache.
    fn check_class(
        &self,
        class: &Class,
        own_cache: Option<NonNull<ThreadCache>>,
        report: &mut HealthReport,
    ) -> usize {
        let mut used = 0;
        let mut purged = 0;
        for (index, &run) in class.runs.iter().enumerate() {
            // SAFETY: a live run of this class, whose lock is held.
            let run = unsafe { &*run };
            used += run.used_count();
            purged += run.purged_bytes();
            let sound = run.index == index
                && run.class() == class.index
                && run.counts_agree()
                && run.partial_index.is_some() == (run.free_count > 0);
            report.expect(sound, || {
                format!("slab: run {index} of class {} is inconsistent", class.index)
            });
        }
        report.expect(purged == class.purged_bytes, || {
            format!("slab: purged bytes of class {} disagree", class.index)
        });
        let mut resting: Vec<*mut u8> = class.depot.blocks().collect();
        let racked = resting.len();
        if let Some(cache) = own_cache {
            // SAFETY: the calling thread's own cache, which nothing else borrows now.
            let (pair, _) = unsafe { own(cache.as_ptr(), class.index) };
            resting.extend(pair.loaded.blocks().chain(pair.previous.blocks()));
        }
        let resting_count = resting.len();
        let strays = resting.iter().filter(|address| {
            let word = self.units.get(**address as usize);
            let run = (word >> 8) as *const Run;
            // SAFETY: the map holds live runs; those of this class are guarded by its lock.
            (word & 0xff) as usize != class.index + 1
                || !unsafe { &*run }.is_used(**address as usize)
        });
        let stray_count = strays.count();
        resting.sort_unstable();
        resting.dedup();
        report.expect(stray_count == 0, || {
            format!(
                "slab: {stray_count} resting blocks of class {} are none, or free in their run too",
                class.index
            )
        });
        report.expect(resting.len() == resting_count, || {
            format!(
                "slab: {} blocks of class {} are on two lists",
                resting_count - resting.len(),
                class.index
            )
        });
        report.expect(used >= racked, || {
            format!(
                "slab: class {} has more in its depot than its runs gave",
                class.index
            )
        });
        used - racked.min(used)
    }

    /// Bytes of the runs, and of their pages that were given back.
    fn run_bytes(&self) -> (usize, usize) {
        self.classes.iter().fold((0, 0), |(runs, purged), class| {
            let class = class.lock();
            (
                runs + class.runs.len() * RUN_BYTES,
                purged + class.purged_bytes,
            )
        })
    }
}

/// The class that serves a request, or `None`: it goes upstream.
#[inline]
fn class_for(request: &Request) -> Option<usize> {
    if request.size() > MAX_BLOCK_BYTES {
        return None;
    }
    let mut class = class_of(request.size());
    if request.alignment() > super::DEFAULT_ALIGNMENT {
        while class < CLASS_COUNT && alignment(class) < request.alignment() {
            class += 1;
        }
    }
    (class < CLASS_COUNT).then_some(class)
}

/// A thread's magazines of a class, and their counts.
///
/// # Safety
/// `cache` is the calling thread's own; the borrow ends before the cache is used again.
#[inline]
unsafe fn own<'a>(cache: *mut ThreadCache, class: usize) -> (&'a mut Pair, &'a Counts) {
    // SAFETY: the caller's promise; only the owner borrows `pairs`.
    let pair = unsafe { &mut (*cache).pairs[class] };
    // SAFETY: a live cache; `counts` is only ever borrowed shared.
    let counts = unsafe { &(*cache).counts[class] };
    (pair, counts)
}

/// The fullest of the runs that became partly free lately: emptier ones may so become empty.
fn fullest(class: &Class) -> Option<*mut Run> {
    // SAFETY: live runs of this class, whose lock is held.
    let free = |run: &&*mut Run| unsafe { (***run).free_count };
    class
        .partial
        .iter()
        .rev()
        .take(RUNS_COMPARED)
        .min_by_key(free)
        .copied()
}

/// Add a run with all its blocks to its class, whose lock is held.
fn list_run(class: &mut Class, run: *mut Run) {
    // SAFETY: made by `draw_run`, in no list yet: the caller is its only user.
    unsafe { (*run).index = class.runs.len() };
    class.runs.push(run);
    list_partial(class, run);
}

fn list_partial(class: &mut Class, run: *mut Run) {
    // SAFETY: a live run of this class, whose lock is held.
    unsafe { (*run).partial_index = Some(class.partial.len()) };
    class.partial.push(run);
}

fn unlist_partial(class: &mut Class, run: *mut Run) {
    // SAFETY: a live run of this class, whose lock is held.
    let Some(index) = (unsafe { (*run).partial_index.take() }) else {
        return;
    };
    class.partial.swap_remove(index);
    if let Some(&moved) = class.partial.get(index) {
        // SAFETY: as above.
        unsafe { (*moved).partial_index = Some(index) };
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for cache in self.caches.get_mut().drain(..) {
            // SAFETY: leaked by `find_cache`; threads compare ids before they follow their pointer,
            // and this slab's id is never given again.
            drop(unsafe { Box::from_raw(cache.as_ptr()) });
        }
        for class in &mut self.classes {
            for run in class.get_mut().runs.drain(..) {
                // SAFETY: made by `draw_run`; every block keeps the slab alive, so none is out.
                let run = unsafe { Box::from_raw(run) };
                // SAFETY: drawn from upstream by `draw_run`.
                unsafe { self.upstream.deallocate(run.base) };
            }
        }
    }
}

impl Ages for Shared {
    fn age(&self) {
        self.tick.fetch_add(1, Relaxed);
        if self.dirty.load(Relaxed) {
            self.give_back(false);
        }
    }

    fn keeps(&self) -> bool {
        self.dirty.load(Relaxed)
    }
}

impl ForkLocks for Shared {
    fn lock_all(&self) {
        self.caches.hold();
        for class in &self.classes {
            class.hold();
        }
    }

    unsafe fn unlock_all(&self) {
        for class in &self.classes {
            // SAFETY: `lock_all` on this thread called `hold`.
            unsafe { class.release() };
        }
        // SAFETY: as above.
        unsafe { self.caches.release() };
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl SlabResource {
    /// A slab that draws its runs, and what is too large for it, from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Result<Self> {
        let units = AddressMap::new()
            .ok_or_else(|| Error::out_of_memory(1 << 19, "no address space for the slab's map"))?;
        let shared = Arc::new(Shared {
            id: NEXT_ID.fetch_add(1, Relaxed),
            upstream,
            units,
            classes: std::array::from_fn(|index| {
                Lock::new(Class {
                    index,
                    depot: Depot::new(),
                    runs: Vec::new(),
                    partial: Vec::new(),
                    colour: 0,
                    purged_bytes: 0,
                })
            }),
            caches: Lock::new(Vec::new()),
            retired: std::array::from_fn(|_| Retired::default()),
            passed: Default::default(),
            out_bytes: AtomicU64::new(0),
            out_count: AtomicU64::new(0),
            peak_bytes: AtomicU64::new(0),
            peak_count: AtomicU64::new(0),
            invalid_frees: AtomicU64::new(0),
            purged_total: AtomicU64::new(0),
            tick: AtomicU64::new(0),
            dirty: AtomicBool::new(false),
        });
        let locks: Weak<dyn ForkLocks> = Arc::downgrade(&shared) as Weak<dyn ForkLocks>;
        fork::register(locks);
        let ages: Weak<dyn Ages> = Arc::downgrade(&shared) as Weak<dyn Ages>;
        background::register(ages);
        Ok(SlabResource { shared })
    }

    fn pass_upstream(&self, request: Request) -> Result<Block> {
        let block = self.shared.upstream.allocate(request)?;
        self.count_passed_upstream(&block);
        Ok(block)
    }

    fn count_passed_upstream(&self, block: &Block) {
        let shared = &*self.shared;
        shared.passed.allocated(block.size, block.reused);
        let out = shared.out_bytes.fetch_add(block.size as u64, Relaxed) + block.size as u64;
        if out > shared.peak_bytes.load(Relaxed) {
            shared.peak_bytes.fetch_max(out, Relaxed);
        }
        let count = shared.out_count.fetch_add(1, Relaxed) + 1;
        if count > shared.peak_count.load(Relaxed) {
            shared.peak_count.fetch_max(count, Relaxed);
        }
    }

    fn free_upstream(&self, address: NonNull<u8>) -> usize {
        // SAFETY: our caller's promise; the address is in none of our runs.
        let size = unsafe { self.shared.upstream.deallocate(address) };
        self.count_freed_upstream(size);
        size
    }

    fn count_freed_upstream(&self, size: usize) {
        let shared = &*self.shared;
        if size > 0 {
            shared.passed.freed(size);
            shared.out_bytes.fetch_sub(size as u64, Relaxed);
            shared.out_count.fetch_sub(1, Relaxed);
        }
    }

    /// Take a block of `class` out, and whether it was used before.
    #[inline]
    fn take_out(&self, class: usize) -> Result<(NonNull<u8>, bool)> {
        let cache = self.shared.cache();
        let popped = match cache {
            Some(cache) => {
                // SAFETY: the calling thread's own cache.
                let (pair, counts) = unsafe { own(cache, class) };
                pair.pop(counts)
            }
            None => None,
        };
        let (address, reused) = match popped {
            Some(popped) => popped,
            None => self.shared.allocate_slow(cache, class)?,
        };
        // SAFETY: blocks of runs are never null.
        Ok((unsafe { NonNull::new_unchecked(address) }, reused))
    }

    /// Put a block of one of our runs back.
    #[inline]
    fn put_back(&self, class: usize, address: NonNull<u8>) -> usize {
        let cache = self.shared.cache();
        let pushed = match cache {
            Some(cache) => {
                // SAFETY: the calling thread's own cache.
                let (pair, counts) = unsafe { own(cache, class) };
                pair.push(counts, address.as_ptr())
            }
            None => false,
        };
        if !pushed {
            self.shared.deallocate_slow(cache, class, address.as_ptr());
        }
        block_bytes(class)
    }
}

// SAFETY: blocks are the disjoint blocks of runs, or upstream's; zeroed ones are written below.
unsafe impl Resource for SlabResource {
    fn name(&self) -> &'static str {
        "SlabResource"
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        let Some(class) = class_for(&request) else {
            return self.pass_upstream(request);
        };
        let (address, reused) = self.take_out(class)?;
        if request.zeroed() {
            // SAFETY: the block holds `size` bytes, and nobody has seen it yet.
            unsafe { address.write_bytes(0, request.size()) };
        }
        Ok(Block {
            address,
            size: block_bytes(class),
            reused,
        })
    }

    /// What goes upstream goes at once, and first: it is what a limit there may refuse.
    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let goes_up = |request: &&Request| class_for(request).is_none();
        let passed: Vec<Request> = requests.iter().filter(goes_up).copied().collect();
        let mut large = Group::with_capacity(self, passed.len());
        if !passed.is_empty() {
            for block in self.shared.upstream.allocate_group(&passed)? {
                self.count_passed_upstream(&block);
                large.add(block);
            }
        }
        let mut small = Group::with_capacity(self, requests.len() - passed.len());
        for request in requests.iter().filter(|request| !goes_up(request)) {
            small.add(self.allocate(*request)?);
        }
        let (mut large, mut small) = (large.keep().into_iter(), small.keep().into_iter());
        let next = |request| {
            let blocks = if goes_up(&request) {
                &mut large
            } else {
                &mut small
            };
            blocks.next().expect("a block for each request")
        };
        Ok(requests.iter().map(next).collect())
    }

    #[inline]
    fn draw(&self, size: usize) -> Option<NonNull<u8>> {
        if size.wrapping_sub(1) < MAX_BLOCK_BYTES {
            return self
                .take_out(class_of(size))
                .ok()
                .map(|(address, _)| address);
        }
        self.allocate(Request::bytes(size).ok()?)
            .ok()
            .map(|block| block.address)
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        let word = self.shared.units.get(address.as_ptr() as usize);
        if word == 0 {
            return self.free_upstream(address);
        }
        self.put_back((word & 0xff) as usize - 1, address)
    }

    #[inline]
    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        let word = self.shared.units.get(address.as_ptr() as usize);
        if word == 0 {
            // SAFETY: the caller's promise; the address is in none of our runs.
            let size = unsafe { self.shared.upstream.take_back(address) }?;
            self.count_freed_upstream(size);
            return Some(size);
        }
        Some(self.put_back((word & 0xff) as usize - 1, address))
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        match self.shared.units.get(address.as_ptr() as usize) {
            // SAFETY: the caller's promise; the address is in none of our runs.
            0 => unsafe { self.shared.upstream.block_bytes(address) },
            word => block_bytes((word & 0xff) as usize - 1),
        }
    }

    #[inline]
    fn owns(&self, address: NonNull<u8>) -> Ownership {
        if self.shared.units.get(address.as_ptr() as usize) != 0 {
            Ownership::Yes
        } else {
            self.shared.upstream.owns(address)
        }
    }

    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        let request = Request::bytes(size)?;
        // SAFETY: the caller's promise.
        let old_size = unsafe { self.block_bytes(address) };
        let is_ours = self.shared.units.get(address.as_ptr() as usize) != 0;
        if is_ours && (old_size / 2..=old_size).contains(&request.size()) {
            return Ok(Block {
                address,
                size: old_size,
                reused: true,
            });
        }
        if is_ours || request.size() <= MAX_BLOCK_BYTES {
            // SAFETY: the caller's promise.
            return unsafe { super::move_block(self, address, request) };
        }
        // SAFETY: the caller's promise; the block is upstream's.
        let block = unsafe { self.shared.upstream.reallocate(address, size) }?;
        self.count_freed_upstream(old_size);
        self.count_passed_upstream(&block);
        Ok(block)
    }

    fn statistics(&self) -> Statistics {
        let shared = &*self.shared;
        let passed = shared.passed.read();
        let below = shared.upstream.statistics();
        let (run_bytes, purged) = shared.run_bytes();
        let mut own = Statistics::default();
        for (class, (allocated, freed, misses)) in shared.class_counts().into_iter().enumerate() {
            let bytes = block_bytes(class) as u64;
            own.current_count += allocated.saturating_sub(freed);
            own.current_bytes += allocated.saturating_sub(freed) * bytes;
            own.total_count += allocated;
            own.total_bytes += allocated * bytes;
            own.misses += misses.min(allocated);
        }
        let total_count = own.total_count + passed.total_count;
        let total_bytes = own.total_bytes + passed.total_bytes;
        let misses = own.misses + passed.misses;
        let free_in_runs = (run_bytes as u64)
            .saturating_sub(purged as u64)
            .saturating_sub(own.current_bytes);
        // Blocks resting in magazines count as out, but no more can be in use than was handed out.
        let peak = |counter: &AtomicU64, current: u64, total: u64| {
            counter.load(Relaxed).clamp(current, total.max(current))
        };
        let current_bytes = own.current_bytes + passed.current_bytes;
        let current_count = own.current_count + passed.current_count;
        Statistics {
            current_bytes,
            current_count,
            peak_bytes: peak(&shared.peak_bytes, current_bytes, total_bytes),
            peak_count: peak(&shared.peak_count, current_count, total_count),
            total_bytes,
            total_count,
            hits: total_count - misses,
            misses,
            resident_bytes: below.resident_bytes.saturating_sub(purged as u64),
            cached_bytes: below.cached_bytes + free_in_runs,
            reused_bytes: below.reused_bytes,
            reused_pages: below.reused_pages,
            decommitted_bytes: below.decommitted_bytes + shared.purged_total.load(Relaxed),
            invalid_frees: below.invalid_frees + shared.invalid_frees.load(Relaxed),
        }
    }

    fn cached_bytes(&self) -> usize {
        self.shared.upstream.cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        let shared = &self.shared;
        if let Some(cache) = shared.cache().and_then(NonNull::new) {
            // SAFETY: the calling thread's own cache.
            unsafe { shared.flush(cache) };
        }
        shared.give_back(true) + shared.upstream.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        let shared = &*self.shared;
        let own = shared.own_cache();
        let counts = shared.class_counts();
        let mut out = 0;
        for (class, (allocated, freed, _)) in shared.classes.iter().zip(counts) {
            let class = class.lock();
            report.expect(freed <= allocated, || {
                format!(
                    "slab: {freed} blocks of class {} came back, {allocated} were handed out",
                    class.index
                )
            });
            out += shared.check_class(&class, own, report) * block_bytes(class.index);
        }
        let passed = shared.passed.read().current_bytes;
        let counted = shared.out_bytes.load(Relaxed);
        report.count("slab.out_bytes", out as u64);
        report.expect(counted == out as u64 + passed, || {
            format!(
                "slab: {counted} bytes are counted as out, {} found",
                out as u64 + passed
            )
        });
        shared.upstream.check(report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(&self.shared.upstream)
    }

    fn held_upstream(&self) -> Option<(u64, u64)> {
        let shared = &*self.shared;
        let runs = shared.classes.iter().map(|class| class.lock().runs.len());
        let run_count = runs.sum::<usize>() as u64;
        let passed = shared.passed.read();
        Some((
            run_count * RUN_BYTES as u64 + passed.current_bytes,
            run_count + passed.current_count,
        ))
    }
}

const _: () = assert!(magazine_rounds(CLASS_COUNT - 1) >= 2);
