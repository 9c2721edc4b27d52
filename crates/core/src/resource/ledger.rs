//! An adaptor that knows its live blocks by address, for resources that cannot tell themselves.
//!
//! Needed where frees of foreign addresses arrive, which is when a resource is installed for the
//! whole process. Costs a hash set's insert and remove a block.

use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::Result;
use crate::sync::Lock;
use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::Arc;

const SHARDS: usize = 16;

/// Remembers the address of every live block drawn through it.
pub struct LedgerAdaptor {
    upstream: Arc<dyn Resource>,
    shards: [Lock<HashSet<usize>>; SHARDS],
}

impl LedgerAdaptor {
    /// Remember what is drawn from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Self {
        LedgerAdaptor {
            upstream,
            shards: Default::default(),
        }
    }

    /// `upstream` itself if it knows its blocks, else a ledger over it.
    pub fn where_needed(upstream: Arc<dyn Resource>) -> Arc<dyn Resource> {
        let foreign = NonNull::<u8>::dangling();
        match upstream.owns(foreign) {
            Ownership::Unknown => Arc::new(LedgerAdaptor::new(upstream)),
            Ownership::Yes | Ownership::No => upstream,
        }
    }

    fn shard(&self, address: NonNull<u8>) -> &Lock<HashSet<usize>> {
        &self.shards[(address.as_ptr() as usize >> 6) % SHARDS]
    }
}

// SAFETY: blocks are upstream's, handed through unchanged.
unsafe impl Resource for LedgerAdaptor {
    fn name(&self) -> &'static str {
        self.upstream.name()
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let block = self.upstream.allocate(request)?;
        self.shard(block.address)
            .lock()
            .insert(block.address.as_ptr() as usize);
        Ok(block)
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        if !self
            .shard(address)
            .lock()
            .remove(&(address.as_ptr() as usize))
        {
            return 0;
        }
        // SAFETY: a live block of upstream's, and the caller gives it up.
        unsafe { self.upstream.deallocate(address) }
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { self.upstream.block_bytes(address) }
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        if self
            .shard(address)
            .lock()
            .contains(&(address.as_ptr() as usize))
        {
            Ownership::Yes
        } else {
            Ownership::No
        }
    }

    fn statistics(&self) -> Statistics {
        self.upstream.statistics()
    }

    fn cached_bytes(&self) -> usize {
        self.upstream.cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        self.upstream.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        let known: usize = self.shards.iter().map(|shard| shard.lock().len()).sum();
        report.count("ledger.blocks", known as u64);
        self.upstream.check(report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(&self.upstream)
    }
}
