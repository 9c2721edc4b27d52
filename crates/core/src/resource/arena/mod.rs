//! Arenas: blocks cut one after the other from chunks, given back all at once.
//!
//! A chunk is drawn from upstream and cut from its front. Blocks are counted as they die; a chunk
//! with no live block is used again. A reset or a rollback only moves the front back, and refuses
//! while something behind it is alive; or it leaves those chunks to their views and starts afresh.
//! So nothing that a view shows is ever handed out twice.
//!
//! Sources: Hanson, "Fast allocation and deallocation of memory based on object lifetimes" (1990);
//! obstacks of the GNU C library for going back to a mark. Left out: growing the last block.

mod bump;
mod state;
mod store;
mod table;
mod thread_local;
mod timeline;

use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::os::PAGE_BYTES;
use crate::sync::front::MAX_GRANULES;
use std::ptr::NonNull;
use std::sync::Arc;

pub(in crate::resource) use bump::{Arena, Growth};
pub(in crate::resource) use store::Store;
pub use thread_local::ThreadLocalArena;

/// Bytes of a granule: blocks start and end at multiples of it.
const GRANULE: usize = super::DEFAULT_ALIGNMENT;
/// The largest chunk.
pub const MAX_CHUNK_BYTES: usize = MAX_GRANULES * GRANULE / 2;

/// A moment of an arena that it can go back to; dropping it forgets the moment.
pub struct Savepoint {
    arena: Arc<Arena>,
    number: u64,
}

impl Savepoint {
    fn of(arena: &Arc<Arena>) -> Self {
        Savepoint {
            arena: Arc::clone(arena),
            number: arena.savepoint(),
        }
    }

    fn roll_back(&self, arena: &Arc<Arena>, retire: bool) -> Result<u64> {
        if !Arc::ptr_eq(&self.arena, arena) {
            return Err(Error::invalid(
                "savepoint",
                "must be one of this arena, and of this thread if every thread has its own, got \
                 another's",
            ));
        }
        arena.rollback(self.number, retire)
    }
}

impl Drop for Savepoint {
    fn drop(&mut self) {
        self.arena.release(self.number);
    }
}

/// The bytes of a chunk as it is drawn: whole pages.
pub(in crate::resource) fn chunk_bytes(bytes: usize) -> Result<usize> {
    if !(1..=MAX_CHUNK_BYTES).contains(&bytes) {
        return Err(Error::invalid(
            "chunk_bytes",
            format!("must be from 1 to {MAX_CHUNK_BYTES}, got {bytes}"),
        ));
    }
    Ok(bytes.next_multiple_of(PAGE_BYTES))
}

/// `count` blocks of `size` bytes, cut in one step and given back together.
pub struct Batch {
    /// All of them, one behind the other.
    pub buffer: Buffer,
    /// Bytes from the start of one block to the next.
    pub stride: usize,
}

/// Cut `count` blocks of `size` bytes from `resource` as one.
pub fn allocate_batch(
    resource: Arc<dyn Resource>,
    count: usize,
    size: usize,
    zeroed: bool,
) -> Result<Batch> {
    let stride = size.max(1).checked_next_multiple_of(GRANULE);
    let total = stride.and_then(|stride| stride.checked_mul(count));
    let (Some(stride), Some(total)) = (stride, total) else {
        let message = format!("{count} blocks of {size} bytes are more than any machine has");
        return Err(Error::out_of_memory(usize::MAX, message));
    };
    let buffer = Buffer::new(resource, total, GRANULE, zeroed)?;
    Ok(Batch { buffer, stride })
}

/// Blocks cut from the front of chunks. Any thread may use it; frees may come from any thread.
pub struct ArenaResource {
    store: Arc<Store>,
    arena: Arc<Arena>,
}

impl ArenaResource {
    /// An arena that draws chunks of `chunk_bytes` (rounded up to pages) from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>, bytes: usize) -> Result<Self> {
        let growth = Growth::Even(chunk_bytes(bytes)?);
        let store = Store::new(upstream, usize::MAX)?;
        let arena = Arena::new(Arc::clone(&store), growth, None);
        Ok(ArenaResource { store, arena })
    }

    /// Remember this moment.
    pub fn savepoint(&self) -> Savepoint {
        Savepoint::of(&self.arena)
    }

    /// Go back to `savepoint`, which stays; later ones end. Returns the live blocks given up.
    ///
    /// Refuses while a block cut since is alive, unless `retire`: then the chunks that hold such
    /// blocks are left to them, and go upstream when the last one dies.
    pub fn rollback(&self, savepoint: &Savepoint, retire: bool) -> Result<u64> {
        savepoint.roll_back(&self.arena, retire)
    }

    /// Start over with the chunks warm; every savepoint ends. Refuses or retires as `rollback`.
    pub fn reset(&self, retire: bool) -> Result<u64> {
        self.arena.reset(retire)
    }
}

/// The figures of an arena that stands for all that its store drew from upstream.
fn with_upstream(own: Statistics, store: &Store) -> Statistics {
    let below = store.upstream().statistics();
    Statistics {
        resident_bytes: below.resident_bytes,
        cached_bytes: below.cached_bytes + store.idle_bytes() as u64 + own.cached_bytes,
        reused_bytes: below.reused_bytes,
        reused_pages: below.reused_pages,
        decommitted_bytes: below.decommitted_bytes,
        invalid_frees: below.invalid_frees + own.invalid_frees,
        ..own
    }
}

fn check_store(store: &Store, report: &mut HealthReport) {
    let (counted, found) = store.idle_as_found();
    report.count("arena.idle_bytes", found as u64);
    report.expect(counted == found, || {
        format!("arena: {counted} bytes are counted as idle, {found} found")
    });
    store.upstream().check(report);
}

// SAFETY: blocks are disjoint pieces of live chunks, or upstream's; zeroed ones are written, or
// asked of upstream. A chunk is used again only when nothing in it is alive.
unsafe impl Resource for ArenaResource {
    fn name(&self) -> &'static str {
        "ArenaResource"
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        self.arena.allocate(request)
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        self.arena.deallocate(address)
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        self.arena.block_bytes(address)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.arena.owns(address)
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        self.arena.take_back(address)
    }

    fn statistics(&self) -> Statistics {
        with_upstream(self.arena.statistics(), &self.store)
    }

    fn cached_bytes(&self) -> usize {
        let own = self.store.idle_bytes() + self.arena.unused_bytes();
        own + self.store.upstream().cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        if self.cached_bytes() > target_bytes {
            self.arena.drop_unused();
        }
        self.store.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.arena.check(report);
        check_store(&self.store, report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(self.store.upstream())
    }
}
