//! An adaptor that knows its live blocks by address, for resources that cannot tell themselves.
//!
//! Needed where frees of foreign addresses arrive, which is when a resource is installed for the
//! whole process. Costs a hash set's insert and remove a block.

use super::adaptor::Adaptor;
use super::fork::{self, ForkLocks};
use super::{Block, HealthReport, Ownership, Request, Resource};
use crate::error::Result;
use crate::sync::Lock;
use std::collections::HashSet;
use std::ptr::NonNull;
use std::sync::Arc;

const SHARDS: usize = 16;

/// Remembers the address of every live block drawn through it.
pub struct LedgerAdaptor {
    upstream: Arc<dyn Resource>,
    shards: Arc<Shards>,
}

#[derive(Default)]
struct Shards([Lock<HashSet<usize>>; SHARDS]);

impl ForkLocks for Shards {
    fn lock_all(&self) {
        self.0.iter().for_each(Lock::hold);
    }

    unsafe fn unlock_all(&self) {
        for shard in &self.0 {
            // SAFETY: `lock_all` on this thread called `hold`.
            unsafe { shard.release() };
        }
    }
}

impl LedgerAdaptor {
    /// Remember what is drawn from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Self {
        let shards = fork::shared(Shards::default());
        LedgerAdaptor { upstream, shards }
    }

    /// `upstream` itself if it knows its blocks, else a ledger over it.
    pub fn where_needed(upstream: Arc<dyn Resource>) -> Arc<dyn Resource> {
        let foreign = NonNull::<u8>::dangling();
        match upstream.owns(foreign) {
            Ownership::Unknown => Arc::new(LedgerAdaptor::new(upstream)),
            Ownership::Yes | Ownership::No => upstream,
        }
    }

    fn list(&self, block: &Block) {
        let address = block.address.as_ptr() as usize;
        self.shard(block.address).lock().insert(address);
    }

    fn shard(&self, address: NonNull<u8>) -> &Lock<HashSet<usize>> {
        &self.shards.0[(address.as_ptr() as usize >> 6) % SHARDS]
    }
}

fn known(listed: bool) -> Ownership {
    if listed {
        Ownership::Yes
    } else {
        Ownership::No
    }
}

impl Adaptor for LedgerAdaptor {
    fn title(&self) -> &'static str {
        self.upstream.name()
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
        let block = self.upstream.allocate(request)?;
        self.list(&block);
        Ok(block)
    }

    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let blocks = self.upstream.allocate_group(requests)?;
        blocks.iter().for_each(|block| self.list(block));
        Ok(blocks)
    }

    fn leaving(&self, address: NonNull<u8>) -> Ownership {
        let mut shard = self.shard(address).lock();
        known(shard.remove(&(address.as_ptr() as usize)))
    }

    fn knows(&self, address: NonNull<u8>) -> Ownership {
        let shard = self.shard(address).lock();
        known(shard.contains(&(address.as_ptr() as usize)))
    }

    fn examine(&self, report: &mut HealthReport) {
        let known: usize = self.shards.0.iter().map(|shard| shard.lock().len()).sum();
        report.count("ledger.blocks", known as u64);
    }
}
