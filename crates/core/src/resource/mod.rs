//! The resource: where blocks come from. One trait, and everything that implements it.
//!
//! Resources compose: one that needs memory takes an `upstream`, an adaptor wraps one and is one.

pub mod adaptive;
pub mod adaptor;
mod address_map;
pub mod arena;
mod background;
pub mod composite;
pub(crate) mod fork;
pub mod large_object;
pub mod ledger;
pub mod libc_heap;
pub mod limit;
pub mod numa;
pub mod pattern;
pub mod pool;
pub mod priority;
pub mod realtime;
pub mod registry;
pub mod shared_memory;
pub mod slab;
pub mod statistics;
pub mod system;
mod tlsf;
pub mod transaction;

use crate::error::{Error, Result};
use std::ptr::NonNull;
use std::sync::Arc;

pub use background::stop as stop_background;

/// Alignment of every block unless more is asked for: a cache line, and an AVX-512 vector.
pub const DEFAULT_ALIGNMENT: usize = 64;
/// The largest alignment a request may ask for: a huge page.
pub const MAX_ALIGNMENT: usize = crate::os::HUGE_PAGE_BYTES;
/// The largest request that is passed to the kernel at all: half of a 48-bit address space.
pub const MAX_REQUEST: usize = 1 << 46;
/// From this size on a zeroed request is served by pages that the kernel zeroes when touched.
pub const LAZY_ZERO_BYTES: usize = 4 * 1024 * 1024;

/// What is asked of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    size: usize,
    alignment: usize,
    zeroed: bool,
}

impl Request {
    /// A request for `size` bytes (0 is served as 1) at a power-of-two `alignment`.
    pub fn new(size: usize, alignment: usize, zeroed: bool) -> Result<Self> {
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(Error::invalid(
                "alignment_bytes",
                format!("must be a power of two from 1 to {MAX_ALIGNMENT}, got {alignment}"),
            ));
        }
        if size > MAX_REQUEST {
            return Err(Error::out_of_memory(
                size,
                format!("a block is at most {MAX_REQUEST} bytes"),
            ));
        }
        let alignment = alignment.max(DEFAULT_ALIGNMENT);
        Ok(Request {
            size: size.max(1),
            alignment,
            zeroed,
        })
    }

    /// A request for `size` bytes, cache-line aligned, contents undefined.
    pub fn bytes(size: usize) -> Result<Self> {
        Self::new(size, DEFAULT_ALIGNMENT, false)
    }

    /// Bytes asked for, at least 1.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Alignment of the block in bytes, at least [`DEFAULT_ALIGNMENT`].
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Whether the first `size` bytes must read as zero.
    pub fn zeroed(&self) -> bool {
        self.zeroed
    }
}

/// What a resource hands out.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// First byte.
    pub address: NonNull<u8>,
    /// Usable bytes; at least what was asked for.
    pub size: usize,
    /// Whether the memory was used before and stayed with the resource (a hit).
    pub reused: bool,
}

/// Whether an address is a block of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// It is.
    Yes,
    /// It is not.
    No,
    /// The resource cannot tell from the address alone.
    Unknown,
}

/// Counts of a resource. Bytes are block bytes: requests rounded up to their block.
///
/// Invariants: `hits + misses == total_count`; `current == allocated - freed`;
/// `cached_bytes <= resident_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes in blocks that are handed out now.
    pub current_bytes: u64,
    /// Blocks that are handed out now.
    pub current_count: u64,
    /// Most bytes handed out at once. A slab counts blocks that rest in a thread's magazines too.
    pub peak_bytes: u64,
    /// Most blocks handed out at once, with the same remark.
    pub peak_count: u64,
    /// Bytes handed out so far.
    pub total_bytes: u64,
    /// Blocks handed out so far.
    pub total_count: u64,
    /// Blocks served from memory that was used before and kept.
    pub hits: u64,
    /// Blocks served from memory new from the kernel (or from libc, which does not say).
    pub misses: u64,
    /// Bytes held from the kernel: handed out or kept, whether touched or not.
    pub resident_bytes: u64,
    /// Bytes held from the kernel that are not handed out.
    pub cached_bytes: u64,
    /// Bytes of kept spans of pages that were handed out again.
    pub reused_bytes: u64,
    /// Pages of kept spans that were handed out again without having been given back.
    pub reused_pages: u64,
    /// Bytes given back to the kernel so far.
    pub decommitted_bytes: u64,
    /// Frees of an address that was not a live block; they are ignored.
    pub invalid_frees: u64,
}

impl Statistics {
    /// The sum of both in every count, peaks included.
    pub fn plus(self, other: Self) -> Self {
        Statistics {
            current_bytes: self.current_bytes + other.current_bytes,
            current_count: self.current_count + other.current_count,
            peak_bytes: self.peak_bytes + other.peak_bytes,
            peak_count: self.peak_count + other.peak_count,
            total_bytes: self.total_bytes + other.total_bytes,
            total_count: self.total_count + other.total_count,
            hits: self.hits + other.hits,
            misses: self.misses + other.misses,
            resident_bytes: self.resident_bytes + other.resident_bytes,
            cached_bytes: self.cached_bytes + other.cached_bytes,
            reused_bytes: self.reused_bytes + other.reused_bytes,
            reused_pages: self.reused_pages + other.reused_pages,
            decommitted_bytes: self.decommitted_bytes + other.decommitted_bytes,
            invalid_frees: self.invalid_frees + other.invalid_frees,
        }
    }
}

/// What a walk over a resource's own structures found.
#[derive(Clone, Debug, Default)]
pub struct HealthReport {
    /// One sentence for each broken invariant; empty when all is well.
    pub findings: Vec<String>,
    /// What was counted on the way.
    pub counts: Vec<(String, u64)>,
}

impl HealthReport {
    /// Note a broken invariant unless `holds`.
    pub fn expect(&mut self, holds: bool, finding: impl FnOnce() -> String) {
        if !holds {
            self.findings.push(finding());
        }
    }

    /// Note a figure.
    pub fn count(&mut self, name: impl Into<String>, value: u64) {
        self.counts.push((name.into(), value));
    }
}

/// Refuse an upstream whose blocks are not to be cut up: a child shares them with the process that
/// it was forked from, and both would cut anew.
pub(crate) fn may_divide(upstream: &dyn Resource) -> Result<()> {
    if upstream.shared_memory().is_some() {
        return Err(Error::invalid(
            "upstream",
            "must not be a SharedMemoryResource, got one: after a fork parent and child would cut \
             up the same blocks; draw from it directly",
        ));
    }
    let mut sources = upstream.sources().into_iter();
    sources.try_for_each(|source| may_divide(&**source))
}

/// Blocks that go back together unless all of them are kept.
struct Group<'a, R: Resource + ?Sized> {
    resource: &'a R,
    blocks: Vec<Block>,
}

impl<'a, R: Resource + ?Sized> Group<'a, R> {
    fn with_capacity(resource: &'a R, count: usize) -> Self {
        Group {
            resource,
            blocks: Vec::with_capacity(count),
        }
    }

    fn add(&mut self, block: Block) {
        self.blocks.push(block);
    }

    fn keep(mut self) -> Vec<Block> {
        std::mem::take(&mut self.blocks)
    }
}

impl<R: Resource + ?Sized> Drop for Group<'_, R> {
    fn drop(&mut self) {
        for block in self.blocks.iter().rev() {
            // SAFETY: drawn from this resource by `add`'s caller, and nobody has seen it yet.
            unsafe { self.resource.deallocate(block.address) };
        }
    }
}

/// A source of memory. Every method may be called by any number of threads at once.
///
/// After `fork` a child may use a resource as before; caches that other threads of the parent held
/// stay unused in the child.
///
/// # Safety
/// An implementation promises that a block is as large and aligned as asked, overlaps no other live
/// block, stays valid until deallocated or until the resource is dropped, and reads as zero over
/// the requested size if that was asked.
pub unsafe trait Resource: Send + Sync {
    /// The name users know it by.
    fn name(&self) -> &'static str;

    /// Hand out a block, or change nothing and say why not.
    fn allocate(&self, request: Request) -> Result<Block>;

    /// Hand out a block for each request, in their order, or none at all and say why not.
    ///
    /// What this does one by one an adaptor that admits or refuses does for the whole at once.
    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let mut group = Group::with_capacity(self, requests.len());
        for request in requests {
            group.add(self.allocate(*request)?);
        }
        Ok(group.keep())
    }

    /// The first byte of a block of `size` bytes at the default alignment, contents undefined.
    ///
    /// The same as `allocate` with less said: for callers that make many small blocks.
    #[inline]
    fn draw(&self, size: usize) -> Option<NonNull<u8>> {
        let request = Request::bytes(size).ok()?;
        self.allocate(request).ok().map(|block| block.address)
    }

    /// Take a block back; returns its size, or 0 if `address` is none of ours (counted, ignored).
    ///
    /// # Safety
    /// Nothing uses the block any more.
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize;

    /// Usable size of a live block.
    ///
    /// # Safety
    /// `address` is a live block of this resource.
    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize;

    /// Whether `address` is a block of this resource; never reads what it points to.
    fn owns(&self, address: NonNull<u8>) -> Ownership;

    /// Take a block back if `address` is one of ours; `None`, and nothing done, if it is not.
    ///
    /// # Safety
    /// If it is a block of this resource, nothing uses it any more.
    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        match self.owns(address) {
            // SAFETY: the caller's promise.
            Ownership::Yes => Some(unsafe { self.deallocate(address) }),
            Ownership::No | Ownership::Unknown => None,
        }
    }

    /// What happened so far.
    fn statistics(&self) -> Statistics;

    /// Bytes held from the kernel but not handed out; cheap, may lag behind other threads.
    fn cached_bytes(&self) -> usize;

    /// Give kept memory back until at most `target_bytes` are kept; returns bytes given back.
    fn trim(&self, target_bytes: usize) -> usize;

    /// Walk the resource's structures and report.
    fn check(&self, report: &mut HealthReport);

    /// Where this resource draws from.
    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        None
    }

    /// The shared memory that its blocks are drawn from and handed through from unchanged, if so.
    fn shared_memory(&self) -> Option<&shared_memory::SharedMemoryResource> {
        None
    }

    /// Everything that this resource draws from directly: its upstream, or its parts.
    fn sources(&self) -> Vec<&Arc<dyn Resource>> {
        self.upstream().into_iter().collect()
    }

    /// Whether the call's lane makes a difference; see [`priority`].
    fn has_lanes(&self) -> bool {
        self.sources().iter().any(|source| source.has_lanes())
    }

    /// (bytes, blocks) that this resource holds from its upstream now; `None` if it does not count
    /// them. Upstream's own counts are at least as large.
    fn held_upstream(&self) -> Option<(u64, u64)> {
        None
    }

    /// Change a block's size, keeping its contents up to the smaller size; may move it.
    ///
    /// # Safety
    /// `address` is a live block of this resource; on success only the result is.
    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        let request = Request::bytes(size)?;
        // SAFETY: the caller's promise.
        let old_size = unsafe { self.block_bytes(address) };
        if request.size() <= old_size && request.size() >= old_size / 2 {
            return Ok(Block {
                address,
                size: old_size,
                reused: true,
            });
        }
        // SAFETY: the caller's promise.
        unsafe { move_block(self, address, request) }
    }
}

/// Copy the block at `address` into a new one and give the old one back.
///
/// # Safety
/// `address` is a live block of `resource`; on success only the result is.
unsafe fn move_block<R: Resource + ?Sized>(
    resource: &R,
    address: NonNull<u8>,
    request: Request,
) -> Result<Block> {
    // SAFETY: the caller's promise.
    let old_size = unsafe { resource.block_bytes(address) };
    let block = resource.allocate(request)?;
    let kept = old_size.min(block.size);
    // SAFETY: both blocks are live, `kept` fits both, and live blocks do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(address.as_ptr(), block.address.as_ptr(), kept) };
    // SAFETY: the caller gave the old block up.
    unsafe { resource.deallocate(address) };
    Ok(block)
}
