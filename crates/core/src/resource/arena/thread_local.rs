//! An arena for each thread: made on first use, given back when the thread ends.
//!
//! Threads share chunks that none of them uses, and the way from an address to its arena. The arena
//! of a thread that ended serves the next new thread, so there are never more than threads were
//! there at once; blocks that outlive their thread keep their chunks.

use super::store::SlotRef;
use super::{Arena, Growth, Savepoint, Store, check_store, chunk_bytes, with_upstream};
use crate::error::{Error, Result};
use crate::resource::fork::{self, ForkLocks};
use crate::resource::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::sync::{AtomicU64, Lock, Ordering::Relaxed};
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

struct Shared {
    id: u64,
    store: Arc<Store>,
    growth: Growth,
    arenas: Lock<Arenas>,
}

#[derive(Default)]
struct Arenas {
    /// Every arena ever made; so an address' slot leads to an arena that is there.
    all: Vec<Arc<Arena>>,
    /// Those that no thread has.
    free: Vec<Arc<Arena>>,
    invalid_frees: u64,
}

/// What a thread has of one resource; its drop, at the thread's end, gives it back.
struct Held {
    id: u64,
    shared: Weak<Shared>,
    /// Owned by `shared`, so that a resource ends with its last owner and not with its threads.
    arena: Weak<Arena>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let (Some(shared), Some(arena)) = (self.shared.upgrade(), self.arena.upgrade()) {
            arena.rest();
            shared.arenas.lock().free.push(arena);
        }
    }
}

thread_local! {
    /// The arena used last, by the resource's id: found without a search.
    static LAST: Cell<(u64, *const Arena)> = const { Cell::new((0, std::ptr::null())) };
    static HELD: RefCell<Vec<Held>> = const { RefCell::new(Vec::new()) };
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Shared {
    /// The calling thread's arena; `None` while the thread is ending.
    fn find(self: &Arc<Self>) -> Option<Arc<Arena>> {
        HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            held.retain(|held| held.shared.strong_count() > 0);
            let known = held.iter().find(|held| held.id == self.id);
            if let Some(arena) = known.and_then(|held| held.arena.upgrade()) {
                return arena;
            }
            let arena = self.take();
            held.push(Held {
                id: self.id,
                shared: Arc::downgrade(self),
                arena: Arc::downgrade(&arena),
            });
            arena
        })
        .ok()
    }

    fn take(&self) -> Arc<Arena> {
        let free = self.arenas.lock().free.pop();
        free.unwrap_or_else(|| {
            let arena = Arena::new(Arc::clone(&self.store), self.growth, None);
            self.arenas.lock().all.push(Arc::clone(&arena));
            arena
        })
    }
}

impl ForkLocks for Shared {
    fn lock_all(&self) {
        self.arenas.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.arenas.release() };
    }
}

/// Blocks cut from an arena that only the calling thread cuts from. Frees may come from any thread.
pub struct ThreadLocalArena {
    shared: Arc<Shared>,
}

impl ThreadLocalArena {
    /// Arenas that draw chunks of `bytes` (rounded up to pages) from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>, bytes: usize) -> Result<Self> {
        let growth = Growth::Even(chunk_bytes(bytes)?);
        let shared = fork::shared(Shared {
            id: NEXT_ID.fetch_add(1, Relaxed),
            store: Store::new(upstream, usize::MAX)?,
            growth,
            arenas: Lock::default(),
        });
        Ok(ThreadLocalArena { shared })
    }

    /// Remember this moment of the calling thread's arena.
    pub fn savepoint(&self) -> Result<Savepoint> {
        Ok(Savepoint::of(&self.own()?))
    }

    /// As [`super::ArenaResource::rollback`], for the calling thread's arena.
    pub fn rollback(&self, savepoint: &Savepoint, retire: bool) -> Result<u64> {
        savepoint.roll_back(&self.own()?, retire)
    }

    /// As [`super::ArenaResource::reset`], for the calling thread's arena.
    pub fn reset(&self, retire: bool) -> Result<u64> {
        self.own()?.reset(retire)
    }

    /// Arenas there are: most threads that had one at once.
    pub fn arena_count(&self) -> usize {
        self.shared.arenas.lock().all.len()
    }

    fn own(&self) -> Result<Arc<Arena>> {
        self.shared
            .find()
            .ok_or_else(|| Error::closed("the thread is ending, and gave its arena back"))
    }

    #[cold]
    fn allocate_first(&self, request: Request) -> Result<Block> {
        let shared = &self.shared;
        if let Some(arena) = shared.find() {
            LAST.set((shared.id, Arc::as_ptr(&arena)));
            return arena.allocate(request);
        }
        // The thread is ending: borrow an arena for this block.
        let arena = shared.take();
        let block = arena.allocate(request);
        arena.rest();
        shared.arenas.lock().free.push(arena);
        block
    }

    /// The arena that the page of `address` was last cut for.
    #[inline]
    fn arena_at(&self, address: NonNull<u8>) -> Option<(&Arena, SlotRef)> {
        let slot = self.shared.store.slot_at(address.as_ptr() as usize)?;
        let arena = slot.owner.load(Relaxed);
        // SAFETY: the store is this resource's alone, and its arenas live as long; or null.
        Some((unsafe { arena.as_ref() }?, slot))
    }

    #[inline]
    fn take(&self, address: NonNull<u8>) -> Option<usize> {
        let (arena, slot) = self.arena_at(address)?;
        arena.take_back_in(slot, address)
    }

    fn arenas(&self) -> Vec<Arc<Arena>> {
        self.shared.arenas.lock().all.clone()
    }
}

// SAFETY: as for `ArenaResource`, each of whose promises every thread's arena keeps.
unsafe impl Resource for ThreadLocalArena {
    fn name(&self) -> &'static str {
        "ThreadLocalArena"
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        let (id, arena) = LAST.get();
        if id == self.shared.id {
            // SAFETY: an arena of this resource, which keeps all it ever made.
            return unsafe { &*arena }.allocate(request);
        }
        self.allocate_first(request)
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        self.take(address).unwrap_or_else(|| {
            self.shared.arenas.lock().invalid_frees += 1;
            0
        })
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        let arena = self.arena_at(address);
        arena.map_or(0, |(arena, _)| arena.block_bytes(address))
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        let arena = self.arena_at(address);
        arena.map_or(Ownership::No, |(arena, _)| arena.owns(address))
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        self.take(address)
    }

    fn statistics(&self) -> Statistics {
        let mut sum = Statistics {
            invalid_frees: self.shared.arenas.lock().invalid_frees,
            ..Statistics::default()
        };
        for arena in self.arenas() {
            let own = arena.statistics();
            sum.current_bytes += own.current_bytes;
            sum.current_count += own.current_count;
            sum.peak_bytes += own.peak_bytes;
            sum.peak_count += own.peak_count;
            sum.total_bytes += own.total_bytes;
            sum.total_count += own.total_count;
            sum.hits += own.hits;
            sum.misses += own.misses;
            sum.cached_bytes += own.cached_bytes;
        }
        with_upstream(sum, &self.shared.store)
    }

    fn cached_bytes(&self) -> usize {
        let unused: usize = self.arenas().iter().map(|arena| arena.unused_bytes()).sum();
        let store = &self.shared.store;
        unused + store.idle_bytes() + store.upstream().cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        if self.cached_bytes() > target_bytes {
            for arena in self.arenas() {
                arena.drop_unused();
            }
        }
        self.shared.store.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        let arenas = self.arenas();
        report.count("arena.threads", arenas.len() as u64);
        for arena in arenas {
            arena.check(report);
        }
        check_store(&self.shared.store, report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(self.shared.store.upstream())
    }
}
