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

mod caches;
mod check;
mod class;
mod classes;
mod depot;
mod magazine;
mod run;
mod shared;
mod tuning;

use super::{Block, Group, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::Result;
use crate::sync::{AtomicU64, Ordering::Relaxed};
use caches::own;
use classes::{RUN_BYTES, aligned_class};
use shared::Shared;
use std::ptr::NonNull;
use std::sync::Arc;

pub use classes::{EXTRA_CLASSES, MAX_BLOCK_BYTES, MIN_ROUNDS, max_rounds};
pub use tuning::{ClassInfo, HasSlab};

/// The slab as a resource. Any thread may use it.
pub struct SlabResource {
    shared: Arc<Shared>,
}

impl SlabResource {
    /// A slab that draws its runs, and what is too large for it, from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Result<Self> {
        let shared = Shared::new(upstream)?;
        Ok(SlabResource { shared })
    }

    /// The class that serves a request, or `None`: it goes upstream.
    #[inline]
    fn class_for(&self, request: &Request) -> Option<usize> {
        if request.size() > MAX_BLOCK_BYTES {
            return None;
        }
        if request.alignment() > super::DEFAULT_ALIGNMENT {
            return aligned_class(request.size(), request.alignment());
        }
        Some(self.shared.sizes.of(request.size()))
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
        self.shared.sizes.block_bytes(class)
    }
}

// SAFETY: blocks are the disjoint blocks of runs, or upstream's; zeroed ones are written below.
unsafe impl Resource for SlabResource {
    fn name(&self) -> &'static str {
        "SlabResource"
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        let Some(class) = self.class_for(&request) else {
            return self.pass_upstream(request);
        };
        let (address, reused) = self.take_out(class)?;
        if request.zeroed() {
            // SAFETY: the block holds `size` bytes, and nobody has seen it yet.
            unsafe { address.write_bytes(0, request.size()) };
        }
        Ok(Block {
            address,
            size: self.shared.sizes.block_bytes(class),
            reused,
        })
    }

    /// What goes upstream goes at once, and first: it is what a limit there may refuse.
    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let goes_up = |request: &&Request| self.class_for(request).is_none();
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
                .take_out(self.shared.sizes.of(size))
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
            word => self.shared.sizes.block_bytes((word & 0xff) as usize - 1),
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
            let bytes = shared.sizes.block_bytes(class) as u64;
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
        report.expect(shared.sizes.is_sound(), || {
            "slab: a request goes to a class that does not hold it, or two classes are equal".into()
        });
        let mut out = 0;
        for (class, (allocated, freed, _)) in shared.classes.iter().zip(counts) {
            let class = class.lock();
            report.expect(freed <= allocated, || {
                format!(
                    "slab: {freed} blocks of class {} came back, {allocated} were handed out",
                    class.index
                )
            });
            out += shared.check_class(&class, own, report) * shared.sizes.block_bytes(class.index);
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
