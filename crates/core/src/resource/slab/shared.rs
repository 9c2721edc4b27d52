//! What the threads of a slab share: its classes behind their locks, and its counts.

use super::super::address_map::AddressMap;
use super::super::background::{self, Ages};
use super::super::fork::{self, ForkLocks};
use super::super::{Request, Resource, statistics};
use super::caches::{Retired, own};
use super::class::{Class, fullest, keeps_a_run, list_partial, list_run, unlist_partial};
use super::classes::{CLASS_COUNT, Classes, RUN_BYTES};
use super::magazine::{Magazine, ThreadCache};
use super::run::Run;
use crate::error::{Error, Result};
use crate::sync::{AtomicBool, AtomicU64, Lock, Ordering::Relaxed};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

/// Ticks that a run with free blocks rests before its free pages are given back.
const REST_TICKS: u64 = 4;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

pub(super) struct Shared {
    pub id: u64,
    pub upstream: Arc<dyn Resource>,
    /// From an address to its `Run` (shifted left by 8) and class; 0: not in a run.
    pub units: AddressMap<16>,
    /// Which class serves what.
    pub sizes: Classes,
    /// Keeps those apart who change `sizes`; taken before any class.
    pub tuning: Lock<()>,
    pub classes: [Lock<Class>; CLASS_COUNT],
    /// Every thread's cache; boxes, so that they outlive the thread until they are retired.
    pub caches: Lock<Vec<NonNull<ThreadCache>>>,
    /// Counts of retired caches and of threads that have none any more.
    pub retired: [Retired; CLASS_COUNT],
    pub passed: statistics::Counters,
    /// Bytes and blocks out of the runs and the depot, and passed upstream: for the peaks.
    pub out_bytes: AtomicU64,
    pub out_count: AtomicU64,
    pub peak_bytes: AtomicU64,
    pub peak_count: AtomicU64,
    pub invalid_frees: AtomicU64,
    pub purged_total: AtomicU64,
    pub tick: AtomicU64,
    /// Whether a tick may find something to give back. `Relaxed`: `Bell` has the fences.
    pub dirty: AtomicBool,
}

// SAFETY: caches are only dereferenced by their own thread or, for counters, atomically; `Shared`
// frees them when no thread can reach them any more.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// What a slab over `upstream` begins with, known to forks and to the background thread.
    pub(super) fn new(upstream: Arc<dyn Resource>) -> Result<Arc<Self>> {
        crate::resource::may_divide(&*upstream)?;
        let units = AddressMap::new()
            .ok_or_else(|| Error::out_of_memory(1 << 19, "no address space for the slab's map"))?;
        let shared = fork::shared(Shared {
            id: NEXT_ID.fetch_add(1, Relaxed),
            upstream,
            units,
            sizes: Classes::new(),
            tuning: Lock::new(()),
            classes: std::array::from_fn(|index| Lock::new(Class::new(index))),
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
        let ages: Weak<dyn Ages> = Arc::downgrade(&shared) as Weak<dyn Ages>;
        background::register(ages);
        Ok(shared)
    }

    pub(super) fn went_out(&self, class: usize, blocks: usize) {
        let bytes = (blocks * self.sizes.block_bytes(class)) as u64;
        let out = self.out_bytes.fetch_add(bytes, Relaxed) + bytes;
        self.peak_bytes.fetch_max(out, Relaxed);
        let count = self.out_count.fetch_add(blocks as u64, Relaxed) + blocks as u64;
        self.peak_count.fetch_max(count, Relaxed);
    }

    pub(super) fn came_in(&self, class: usize, blocks: usize) {
        self.out_bytes
            .fetch_sub((blocks * self.sizes.block_bytes(class)) as u64, Relaxed);
        self.out_count.fetch_sub(blocks as u64, Relaxed);
    }

    /// A new run of `class`, in no list yet. No lock is held: upstream may be a limit that has the
    /// interpreter collect garbage first, and with it blocks of this very class.
    pub(super) fn draw_run(&self, class: usize, colour: usize) -> Result<*mut Run> {
        let block = self
            .upstream
            .allocate(Request::new(RUN_BYTES, RUN_BYTES, false)?)?;
        let run = Box::into_raw(Box::new(Run::new(
            block.address,
            class,
            self.sizes.block_bytes(class),
            colour,
        )));
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

    pub(super) fn return_run(&self, class: &mut Class, run: *mut Run) {
        let (index, purged) = {
            // SAFETY: runs in the lists are live boxes, and the class's lock is held.
            let run = unsafe { &*run };
            (run.index, run.purged_bytes())
        };
        unlist_partial(class, run);
        class.runs.swap_remove(index);
        if let Some(&moved) = class.runs.get(index) {
            // SAFETY: as above.
            unsafe { (*moved).index = index };
        }
        class.purged_bytes -= purged;
        // SAFETY: made by `draw_run`, removed from every list, and every block of it is free.
        unsafe { self.dissolve(run) };
    }

    /// Give a run's memory back to upstream.
    ///
    /// # Safety
    /// `run` was made by `draw_run`, is in no list, and none of its blocks is out.
    unsafe fn dissolve(&self, run: *mut Run) {
        // SAFETY: the caller's promise: nobody else knows it.
        let base = unsafe { Box::from_raw(run) }.base;
        self.units.set(base.as_ptr() as usize, 0);
        // SAFETY: drawn from upstream by `draw_run`, and every block of it is free.
        unsafe { self.upstream.deallocate(base) };
    }

    /// Fill an empty magazine from the depot or the runs; false if neither has a block.
    pub(super) fn refill(&self, class: &mut Class, magazine: &mut Magazine) -> bool {
        debug_assert_eq!(magazine.count, 0);
        let rounds = self.sizes.rounds(class.index);
        if class.depot.fill(magazine, rounds) {
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
        magazine.make_room(rounds);
        // Half a magazine: the other half is room for what comes back.
        let wanted = rounds / 2;
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
    pub(super) fn empty_magazine(&self, class: &mut Class, magazine: &mut Magazine) {
        let count = magazine.count as usize;
        for &address in &magazine.rounds[..count] {
            self.put(class, address);
        }
        magazine.count = 0;
        magazine.fresh = 0;
        self.came_in(class.index, count);
    }

    pub(super) fn put(&self, class: &mut Class, address: *mut u8) {
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
            if !run_ref.kept {
                self.return_run(class, run);
            }
        } else if run_ref.partial_index.is_none() {
            list_partial(class, run);
        }
    }

    #[cold]
    pub(super) fn allocate_slow(
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
        // What other threads freed meanwhile, or the limit's collection did, serves as well; a run
        // that is listed without need would stay, empty, until somebody needs it.
        if let Some(taken) = self.take_locked(&mut guard, cache) {
            drop(guard);
            if let Ok(run) = drawn {
                // SAFETY: drawn above, in no list.
                unsafe { self.dissolve(run) };
            }
            return Ok(taken);
        }
        list_run(&mut guard, drawn?);
        let taken = self.take_locked(&mut guard, cache);
        Ok(taken.expect("a run was listed under this lock"))
    }

    /// A block of a class whose lock is held, by way of the calling thread's magazines if it has
    /// some; `None` if depot and runs have none either.
    pub(super) fn take_locked(
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
        let mut magazine = Magazine::empty(0);
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
    pub(super) fn deallocate_slow(
        &self,
        cache: Option<*mut ThreadCache>,
        class: usize,
        address: *mut u8,
    ) {
        let mut guard = self.classes[class].lock();
        if let Some(cache) = cache {
            // SAFETY: the calling thread's own cache.
            let (pair, counts) = unsafe { own(cache, class) };
            self.came_in(class, pair.previous.count as usize);
            if let Some(oldest) = guard
                .depot
                .unload(&mut pair.previous, self.sizes.rounds(class))
            {
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
    pub(super) fn drain(&self, class: &mut Class, mut magazine: Magazine) {
        self.went_out_quietly(class.index, magazine.count as usize);
        self.empty_magazine(class, &mut magazine);
        class.depot.keep(magazine, self.sizes.rounds(class.index));
    }

    pub(super) fn went_out_quietly(&self, class: usize, blocks: usize) {
        self.out_bytes
            .fetch_add((blocks * self.sizes.block_bytes(class)) as u64, Relaxed);
        self.out_count.fetch_add(blocks as u64, Relaxed);
    }

    pub(super) fn wake(&self) {
        self.dirty.store(true, Relaxed);
        background::wake();
    }

    /// Drain depots down to `keep_low_water`'s need and give rested pages back.
    pub(super) fn give_back(&self, everything: bool) -> usize {
        let now = self.tick.load(Relaxed);
        let mut given = 0;
        let mut waiting = false;
        for class in &self.classes {
            let mut class = class.lock();
            for magazine in class.depot.unneeded(everything) {
                self.drain(&mut class, magazine);
            }
            if everything {
                self.let_go(&mut class);
            }
            waiting |= class.depot.has_blocks();
            let mut purged = 0;
            for &run in &class.partial {
                // SAFETY: a live run of this class, whose lock is held.
                let run = unsafe { &mut *run };
                if run.kept {
                    continue;
                }
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

    /// Have a run of `class` in memory that stays, also when it is empty, until the slab is trimmed.
    pub(super) fn draw_ahead(&self, class: usize) -> Result<()> {
        let colour = {
            let mut guard = self.classes[class].lock();
            if keeps_a_run(&guard) {
                return Ok(());
            }
            guard.colour = guard.colour.wrapping_add(1);
            guard.colour
        };
        let run = self.draw_run(class, colour)?;
        {
            // SAFETY: made by `draw_run`, in no list yet: the caller is its only user.
            let run = unsafe { &mut *run };
            run.warm();
            run.kept = true;
        }
        list_run(&mut self.classes[class].lock(), run);
        Ok(())
    }

    /// Keep no run of a class any longer than it is needed.
    fn let_go(&self, class: &mut Class) {
        let kept: Vec<*mut Run> = class
            .runs
            .iter()
            .copied()
            // SAFETY: a live run of this class, whose lock is held.
            .filter(|run| std::mem::take(unsafe { &mut (**run).kept }))
            .collect();
        for run in kept {
            // SAFETY: as above.
            if unsafe { (*run).is_empty() } {
                self.return_run(class, run);
            }
        }
    }

    /// Bytes of the runs, and of their pages that were given back.
    pub(super) fn run_bytes(&self) -> (usize, usize) {
        self.classes.iter().fold((0, 0), |(runs, purged), class| {
            let class = class.lock();
            (
                runs + class.runs.len() * RUN_BYTES,
                purged + class.purged_bytes,
            )
        })
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
        self.tuning.hold();
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
        // SAFETY: as above.
        unsafe { self.tuning.release() };
    }
}
