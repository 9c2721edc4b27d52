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

    fn refuse(&self, bytes: usize, used: usize) -> Error {
        let limit = self.budget.limit();
        Error::out_of_memory(
            bytes,
            format!("{used} bytes are in use of a limit of {limit}"),
        )
    }

    fn make_room(&self) {
        let room = self.budget.limit() - self.budget.used().min(self.budget.limit());
        if self.upstream.cached_bytes() > room {
            self.upstream.trim(room);
        }
    }

    /// Admit requests of `bytes` together, draw their blocks, and count them; or change nothing.
    #[inline]
    fn admit<B: AsRef<[Block]>>(&self, bytes: usize, draw: impl Fn() -> Result<B>) -> Result<B> {
        self.reserve(bytes)
            .map_err(|used| self.refuse(bytes, used))?;
        self.make_room();
        let drawn = draw().or_else(|_| {
            self.upstream.trim(0);
            (self.on_limit)();
            draw()
        });
        let blocks = match drawn {
            Ok(blocks) => blocks,
            Err(error) => {
                self.budget.release(bytes);
                return Err(error);
            }
        };
        // Blocks are larger than the requests; their rounding must fit as well.
        let block_bytes: usize = blocks.as_ref().iter().map(|block| block.size).sum();
        if let Err(used) = self.reserve(block_bytes - bytes) {
            for block in blocks.as_ref() {
                // SAFETY: nobody has seen the block yet.
                unsafe { self.upstream.deallocate(block.address) };
            }
            self.budget.release(bytes);
            return Err(self.refuse(bytes, used - bytes));
        }
        for block in blocks.as_ref() {
            self.counters.allocated(block.size, block.reused);
        }
        Ok(blocks)
    }
}

impl Adaptor for LimitAdaptor {
    fn title(&self) -> &'static str {
        "LimitAdaptor"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    #[inline]
    fn pass(&self, request: Request) -> Result<Block> {
        let draw = || self.upstream.allocate(request).map(|block| [block]);
        self.admit(request.size(), draw).map(|[block]| block)
    }

    /// The sum is admitted at once, so that of two groups that do not both fit one succeeds.
    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        // More than there are addresses for saturates; upstream then refuses it.
        let bytes = requests
            .iter()
            .fold(0usize, |sum, request| sum.saturating_add(request.size()));
        self.admit(bytes, || self.upstream.allocate_group(requests))
    }

    #[inline]
    fn came_back(&self, size: usize) {
        self.counters.freed(size);
        self.budget.release(size);
    }

    fn counted(&self) -> Option<Statistics> {
        Some(self.counters.read())
    }

    fn examine(&self, report: &mut HealthReport) {
        self.counters.check(self.title(), report);
        let in_use = self.counters.read().current_bytes as usize;
        let (reserved, limit) = (self.budget.used(), self.budget.limit());
        // Reserved before it is counted as in use, and so on the way back: 0 when nothing goes on.
        let under_way = reserved.saturating_sub(in_use) as u64;
        report.count("limit.under_way_bytes", under_way);
        report.expect(reserved <= limit, || {
            format!("LimitAdaptor: {reserved} bytes are in use of a limit of {limit}")
        });
    }
}
