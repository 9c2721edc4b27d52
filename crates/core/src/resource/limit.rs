//! A limit on what a resource may hold: trim first, then ask for help, then refuse.

use super::adaptor::Adaptor;
use super::{Block, HealthReport, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::resource::statistics::Counters;
use crate::sync::Budget;
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

impl Adaptor for LimitAdaptor {
    fn title(&self) -> &'static str {
        "LimitAdaptor"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
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

    fn came_back(&self, size: usize) {
        self.counters.freed(size);
        self.budget.release(size);
    }

    fn counted(&self) -> Option<Statistics> {
        Some(self.counters.read())
    }

    fn examine(&self, report: &mut HealthReport) {
        self.counters.check(self.title(), report);
        let used = self.budget.used();
        report.expect(used <= self.budget.limit(), || {
            format!(
                "LimitAdaptor: {used} bytes are in use of a limit of {}",
                self.budget.limit()
            )
        });
    }
}
