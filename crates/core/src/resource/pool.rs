//! The general-purpose composition: a slab for small blocks in front of a heap for large ones.

use super::large_object::{LargeObjectResource, Options};
use super::slab::{HasSlab, SlabResource};
use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::Result;
use std::ptr::NonNull;
use std::sync::Arc;

/// `SlabResource(LargeObjectResource(...))` under one name; what `moirai run` uses.
pub struct PoolResource {
    slab: SlabResource,
}

impl PoolResource {
    /// A pool whose large-object heap is made as `options` say.
    pub fn new(options: Options) -> Result<Self> {
        let large: Arc<dyn Resource> = Arc::new(LargeObjectResource::new(options)?);
        Ok(PoolResource {
            slab: SlabResource::new(large)?,
        })
    }
}

impl HasSlab for PoolResource {
    fn slab(&self) -> &SlabResource {
        &self.slab
    }
}

// SAFETY: everything is the slab's.
unsafe impl Resource for PoolResource {
    fn name(&self) -> &'static str {
        "PoolResource"
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        self.slab.allocate(request)
    }

    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        self.slab.allocate_group(requests)
    }

    #[inline]
    fn draw(&self, size: usize) -> Option<NonNull<u8>> {
        self.slab.draw(size)
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { self.slab.deallocate(address) }
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { self.slab.block_bytes(address) }
    }

    #[inline]
    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        // SAFETY: the caller's promise.
        unsafe { self.slab.take_back(address) }
    }

    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        // SAFETY: the caller's promise.
        unsafe { self.slab.reallocate(address, size) }
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.slab.owns(address)
    }

    fn statistics(&self) -> Statistics {
        self.slab.statistics()
    }

    fn cached_bytes(&self) -> usize {
        self.slab.cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        self.slab.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.slab.check(report);
    }
}
