//! The half of a resource that every adaptor has: blocks are upstream's, handed through unchanged.
//!
//! An adaptor says what it does when blocks leave and come back; everything else passes through.

use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::Result;
use std::ptr::NonNull;
use std::sync::Arc;

/// A resource over an `upstream` whose blocks it hands through unchanged.
///
/// Any thread may call any method at any time, as for [`Resource`].
pub trait Adaptor: Send + Sync {
    /// The name users know it by.
    fn title(&self) -> &'static str;

    /// Where its blocks come from.
    fn source(&self) -> &Arc<dyn Resource>;

    /// Draw a block from upstream, or change nothing and say why not.
    fn pass(&self, request: Request) -> Result<Block> {
        self.source().allocate(request)
    }

    /// Draw a block for each request from upstream, or none and say why not.
    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        self.source().allocate_group(requests)
    }

    /// A block is about to go back: what the adaptor knows of the address, which it forgets.
    ///
    /// `No` keeps the free from upstream; `Unknown` leaves the answer to upstream.
    fn leaving(&self, _address: NonNull<u8>) -> Ownership {
        Ownership::Unknown
    }

    /// A block of `size` bytes went back to upstream.
    fn came_back(&self, _size: usize) {}

    /// Whether an address is a live block that was drawn through here.
    fn knows(&self, address: NonNull<u8>) -> Ownership {
        self.source().owns(address)
    }

    /// What passed through, if the adaptor counts it itself; else upstream's counts are given.
    fn counted(&self) -> Option<Statistics> {
        None
    }

    /// Report what is wrong with the adaptor itself.
    fn examine(&self, _report: &mut HealthReport) {}
}

/// What passed through an adaptor, and of the memory behind it what only `below` can know.
fn over(passed: Statistics, below: Statistics) -> Statistics {
    Statistics {
        current_bytes: passed.current_bytes,
        current_count: passed.current_count,
        peak_bytes: passed.peak_bytes,
        peak_count: passed.peak_count,
        total_bytes: passed.total_bytes,
        total_count: passed.total_count,
        hits: passed.hits,
        misses: passed.misses,
        ..below
    }
}

// SAFETY: blocks are upstream's, which promises the same, and are handed through unchanged.
unsafe impl<A: Adaptor> Resource for A {
    fn name(&self) -> &'static str {
        self.title()
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        self.pass(request)
    }

    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        self.pass_group(requests)
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        if self.leaving(address) == Ownership::No {
            return 0;
        }
        // SAFETY: the caller's promise.
        let size = unsafe { self.source().deallocate(address) };
        if size > 0 {
            self.came_back(size);
        }
        size
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise; its blocks are upstream's.
        unsafe { self.source().block_bytes(address) }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        let size = match self.leaving(address) {
            Ownership::No => return None,
            // SAFETY: the adaptor knows it as a live block, and the caller gives it up.
            Ownership::Yes => unsafe { self.source().deallocate(address) },
            // SAFETY: the caller's promise.
            Ownership::Unknown => unsafe { self.source().take_back(address) }?,
        };
        if size > 0 {
            self.came_back(size);
        }
        Some(size)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.knows(address)
    }

    fn statistics(&self) -> Statistics {
        match self.counted() {
            Some(passed) => over(passed, self.source().statistics()),
            None => self.source().statistics(),
        }
    }

    fn cached_bytes(&self) -> usize {
        self.source().cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        self.source().trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.examine(report);
        self.source().check(report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(self.source())
    }

    fn shared_memory(&self) -> Option<&super::shared_memory::SharedMemoryResource> {
        self.source().shared_memory()
    }

    fn held_upstream(&self) -> Option<(u64, u64)> {
        let passed = self.counted()?;
        Some((passed.current_bytes, passed.current_count))
    }
}
