//! A limit on what a resource may hold: trim first, then ask for help, then refuse.

use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::resource::statistics::Counters;
use crate::sync::Budget;
use std::ptr::NonNull;
use std::sync::Arc;

/// Called, without any lock held, when a request would be refused; frees what it can.
pub type OnLimit = Box<dyn Fn() + Send + Sync>;

/// Refuses requests that would take the blocks drawn through it above `limit` bytes.
///
/// Block bytes in use never exceed the limit, and upstream's kept memory is trimmed so that both
/// together do not either, as far as the block being given and upstream's own rounding allow.
pub struct LimitAdaptor {
    upstream: Arc<dyn Resource>,
    budget: Budget,
    counters: Counters,
    on_limit: OnLimit,
}

impl LimitAdaptor {
    /// Limit what is drawn from `upstream` to `limit` bytes.
    pub fn new(upstream: Arc<dyn Resource>, limit: usize, on_limit: OnLimit) -> Self {
        LimitAdaptor {
            upstream,
            budget: Budget::new(limit),
            counters: Counters::default(),
            on_limit,
        }
    }

    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.budget.limit()
    }

    fn reserve(&self, bytes: usize) -> std::result::Result<(), usize> {
        if self.budget.reserve(bytes).is_ok() {
            return Ok(());
        }
        self.upstream.trim(0);
        (self.on_limit)();
        self.budget.reserve(bytes)
    }

    fn refuse(&self, request: Request, used: usize) -> Error {
        let limit = self.budget.limit();
        Error::out_of_memory(
            request.size(),
            format!("{used} bytes are in use of a limit of {limit}"),
        )
    }

    fn make_room(&self) {
        let room = self.budget.limit() - self.budget.used().min(self.budget.limit());
        if self.upstream.cached_bytes() > room {
            self.upstream.trim(room);
        }
    }

    fn draw(&self, request: Request) -> Result<Block> {
        self.upstream.allocate(request).or_else(|_| {
            self.upstream.trim(0);
            (self.on_limit)();
            self.upstream.allocate(request)
        })
    }
}

// SAFETY: blocks are upstream's, handed through unchanged.
unsafe impl Resource for LimitAdaptor {
    fn name(&self) -> &'static str {
        "LimitAdaptor"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        self.reserve(request.size())
            .map_err(|used| self.refuse(request, used))?;
        self.make_room();
        let block = match self.draw(request) {
            Ok(block) => block,
            Err(error) => {
                self.budget.release(request.size());
                return Err(error);
            }
        };
        // The block is larger than the request; its rounding must fit as well.
        let rounding = block.size - request.size();
        if let Err(used) = self.reserve(rounding) {
            // SAFETY: nobody has seen the block yet.
            unsafe { self.upstream.deallocate(block.address) };
            self.budget.release(request.size());
            return Err(self.refuse(request, used - request.size()));
        }
        self.counters.allocated(block.size, block.reused);
        Ok(block)
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        let size = unsafe { self.upstream.deallocate(address) };
        if size > 0 {
            self.counters.freed(size);
            self.budget.release(size);
        }
        size
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { self.upstream.block_bytes(address) }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        // SAFETY: the caller's promise.
        let size = unsafe { self.upstream.take_back(address) }?;
        if size > 0 {
            self.counters.freed(size);
            self.budget.release(size);
        }
        Some(size)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.upstream.owns(address)
    }

    fn statistics(&self) -> Statistics {
        let below = self.upstream.statistics();
        Statistics {
            resident_bytes: below.resident_bytes,
            cached_bytes: below.cached_bytes,
            reused_bytes: below.reused_bytes,
            reused_pages: below.reused_pages,
            decommitted_bytes: below.decommitted_bytes,
            invalid_frees: below.invalid_frees,
            ..self.counters.read()
        }
    }

    fn cached_bytes(&self) -> usize {
        self.upstream.cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        self.upstream.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.counters.check(self.name(), report);
        let used = self.budget.used();
        report.expect(used <= self.budget.limit(), || {
            format!(
                "LimitAdaptor: {used} bytes are in use of a limit of {}",
                self.budget.limit()
            )
        });
        self.upstream.check(report);
    }

    fn upstream(&self) -> Option<&Arc<dyn Resource>> {
        Some(&self.upstream)
    }
}
