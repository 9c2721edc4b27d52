//! The large-object heap: spans of pages from reserved address space, kept hot while they are
//! needed, given back to the kernel by size and by age.
//!
//! Sources: spans, page map and coalescing as in tcmalloc (Ghemawat); deferred coalescing by exact
//! size as in dlmalloc's fast bins (Lea); colouring from Bonwick, "The Slab Allocator" (1994),
//! applied to large blocks.
//!
//! Large zeroed blocks come as pages that the kernel zeroes, unless blocks of their size were found
//! filled when they were freed: then hot memory is written over, which is cheaper than faulting.
//!
//! How much stays hot: at most the cap. Unless one is given, it is what keeps the whole, used and
//! hot, within the recent peak of use and a slack: memory that was needed at once a moment ago will
//! be needed again, and keeping it raises no peak. The recent peak fades towards what is used. When
//! fresh pages are needed, idle hot ones go first if both together would exceed that.

mod fit;
mod heap;

use super::address_map::AddressMap;
use super::background::{self, Ages};
use super::fork::{self, ForkLocks};
use super::{Block, HealthReport, LAZY_ZERO_BYTES, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::os::numa::Placement;
use crate::os::{self, HugePages};
use crate::sync::Lock;
use crate::sync::{AtomicUsize, Ordering};
use heap::{Heap, Victim};
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

pub use fit::Fit;

/// How a large-object heap behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How a free span is chosen.
    pub fit: Fit,
    /// Where huge pages are asked for.
    pub huge_pages: HugePages,
    /// Most bytes of free memory to keep; `None` follows demand.
    pub cache_cap: Option<usize>,
    /// Free memory older than this goes back to the kernel; `None` keeps it until the cap or a trim.
    pub decay_milliseconds: Option<u64>,
    /// Which nodes pages come from; `None` leaves it to the kernel.
    pub placement: Option<Placement>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            fit: Fit::Best,
            huge_pages: HugePages::Auto,
            cache_cap: None,
            decay_milliseconds: Some(500),
            placement: None,
        }
    }
}

struct Shared {
    options: Options,
    heap: Lock<Heap>,
    map: AddressMap<12>,
    /// Bytes kept, for reports, limits and the tick. `Relaxed`: `Bell` has the fences.
    kept: AtomicUsize,
}

/// The heap as a resource. Any thread may use it; one lock guards it.
pub struct LargeObjectResource {
    shared: Arc<Shared>,
}

impl LargeObjectResource {
    /// A heap that holds nothing yet.
    pub fn new(options: Options) -> Result<Self> {
        if !os::supported() {
            return Err(Error::invalid(
                "LargeObjectResource",
                "needs a kernel with 4 KiB pages",
            ));
        }
        let map = AddressMap::new()
            .ok_or_else(|| Error::out_of_memory(1 << 21, "no address space for the page map"))?;
        let shared = fork::shared(Shared {
            options,
            heap: Lock::new(Heap::new(&options)),
            map,
            kept: AtomicUsize::new(0),
        });
        if options.decay_milliseconds.is_some() {
            let ages: Weak<dyn Ages> = Arc::downgrade(&shared) as Weak<dyn Ages>;
            background::register(ages);
        }
        Ok(LargeObjectResource { shared })
    }
}

impl LargeObjectResource {
    /// Regions whose pages the kernel refused to place as the options say.
    pub fn unplaced_regions(&self) -> usize {
        self.shared.heap.lock().unplaced_regions()
    }
}

impl Shared {
    fn publish(&self, heap: &Heap) {
        self.kept.store(heap.cached_bytes(), Ordering::Relaxed);
    }

    /// Give victims back to the kernel, without the lock, then note it; returns the bytes.
    fn purge(&self, victims: Vec<Victim>) -> usize {
        if victims.is_empty() {
            return 0;
        }
        let done: Vec<(Victim, bool)> = victims
            .into_iter()
            .map(|victim| {
                // SAFETY: a purging span is whole pages that only this thread deals with.
                (victim, unsafe { os::decommit(victim.start, victim.bytes) })
            })
            .collect();
        let mut heap = self.heap.lock();
        heap.end_purge(&self.map, &done);
        self.publish(&heap);
        done.iter()
            .filter(|(_, given)| *given)
            .map(|(victim, _)| victim.bytes)
            .sum()
    }

    /// Take a block; when the kernel refuses, give back all that is kept and try once more.
    fn take(&self, request: &Request, lazy: bool) -> Option<(heap::Taken, Vec<Victim>)> {
        let (size, alignment) = (request.size(), request.alignment());
        {
            let mut heap = self.heap.lock();
            if let Some(taken) = heap.take(&self.map, size, alignment, lazy) {
                let excess = if taken.reused {
                    Vec::new()
                } else {
                    heap.excess_after_fresh()
                };
                self.publish(&heap);
                return Some((taken, excess));
            }
        }
        let everything = self.heap.lock().excess_over(&self.map, 0);
        self.purge(everything);
        let mut heap = self.heap.lock();
        heap.release_empty_regions(&self.map);
        let taken = heap.take(&self.map, size, alignment, lazy);
        self.publish(&heap);
        taken.map(|taken| (taken, Vec::new()))
    }
}

impl Ages for Shared {
    fn age(&self) {
        let Some(decay) = self.options.decay_milliseconds else {
            return;
        };
        let Some(until) = os::now_milliseconds().checked_sub(decay) else {
            return;
        };
        let victims = {
            let mut heap = self.heap.lock();
            let victims = heap.aged(&self.map, until);
            self.publish(&heap);
            victims
        };
        self.purge(victims);
    }

    fn keeps(&self) -> bool {
        self.kept.load(Ordering::Relaxed) > 0
    }
}

impl ForkLocks for Shared {
    fn lock_all(&self) {
        self.heap.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.heap.release() };
    }
}

// SAFETY: spans are disjoint, inside committed memory of the heap's regions, and placed at the
// asked alignment by `Heap::take`; zeroed ones are fresh pages or written below.
unsafe impl Resource for LargeObjectResource {
    fn name(&self) -> &'static str {
        "LargeObjectResource"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let lazy = request.zeroed() && request.size() >= LAZY_ZERO_BYTES;
        let Some((taken, excess)) = self.shared.take(&request, lazy) else {
            return Err(Error::out_of_memory(
                request.size(),
                "the system has no more memory or address space",
            ));
        };
        self.shared.purge(excess);
        let mut zero = !taken.reused;
        if let Some((start, bytes)) = taken.decommit {
            // SAFETY: whole pages of a span that was just taken; nobody has seen the block.
            zero = unsafe { os::decommit(start, bytes) };
        }
        if request.zeroed() && !zero {
            // SAFETY: the block has at least `size` bytes, and nobody has seen it yet.
            unsafe { taken.data.write_bytes(0, request.size()) };
        }
        Ok(Block {
            address: taken.data,
            size: taken.size,
            reused: taken.reused,
        })
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        let shared = &*self.shared;
        let now = os::now_milliseconds();
        let (size, excess) = {
            let mut heap = shared.heap.lock();
            let (size, untouched) = heap.give_back(&shared.map, address.as_ptr() as usize, now);
            let mut excess = heap.excess_after_free(&shared.map);
            excess.extend(untouched);
            shared.publish(&heap);
            (size, excess)
        };
        shared.purge(excess);
        if shared.options.decay_milliseconds.is_some() {
            background::wake();
        }
        size
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        self.shared
            .heap
            .lock()
            .block_bytes(&self.shared.map, address.as_ptr() as usize)
    }

    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        let request = Request::bytes(size)?;
        let resized = {
            let mut heap = self.shared.heap.lock();
            let start = address.as_ptr() as usize;
            let now = os::now_milliseconds();
            let size = heap.resize(&self.shared.map, start, request.size(), now);
            let excess = heap.excess_after_free(&self.shared.map);
            self.shared.publish(&heap);
            (size, excess)
        };
        self.shared.purge(resized.1);
        if let Some(size) = resized.0 {
            return Ok(Block {
                address,
                size,
                reused: true,
            });
        }
        // SAFETY: the caller's promise.
        unsafe { super::move_block(self, address, request) }
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        let address = address.as_ptr() as usize;
        if self.shared.map.get(address) != 0
            && self
                .shared
                .heap
                .lock()
                .block_bytes(&self.shared.map, address)
                > 0
        {
            Ownership::Yes
        } else {
            Ownership::No
        }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        if self.shared.map.get(address.as_ptr() as usize) == 0 {
            return None;
        }
        // SAFETY: the caller's promise.
        Some(unsafe { self.deallocate(address) })
    }

    fn statistics(&self) -> Statistics {
        let heap = self.shared.heap.lock();
        let counts = heap.counts;
        Statistics {
            current_bytes: counts.current_bytes,
            current_count: counts.current_count,
            peak_bytes: counts.peak_bytes,
            peak_count: counts.peak_count,
            total_bytes: counts.total_bytes,
            total_count: counts.total_count,
            hits: counts.hits,
            misses: counts.total_count - counts.hits,
            resident_bytes: heap.resident_bytes() as u64,
            cached_bytes: heap.cached_bytes() as u64,
            reused_bytes: counts.reused_bytes,
            reused_pages: counts.reused_pages,
            decommitted_bytes: counts.decommitted_bytes,
            invalid_frees: counts.invalid_frees,
        }
    }

    fn cached_bytes(&self) -> usize {
        self.shared.kept.load(Ordering::Relaxed)
    }

    fn trim(&self, target_bytes: usize) -> usize {
        let victims = self
            .shared
            .heap
            .lock()
            .excess_over(&self.shared.map, target_bytes);
        let bytes = self.shared.purge(victims);
        if os::address_space_limit().is_some() {
            self.shared
                .heap
                .lock()
                .release_empty_regions(&self.shared.map);
        }
        bytes
    }

    fn check(&self, report: &mut HealthReport) {
        self.shared.heap.lock().check(&self.shared.map, report);
    }
}
