//! Counting: shared counters, and the adaptor that counts what passes through it.

use super::adaptor::Adaptor;
use super::fork;
use super::{Block, HealthReport, Request, Resource, Statistics};
use crate::error::Result;
use crate::sync::Lock;
use crate::sync::{AtomicU64, Ordering::Relaxed};
use std::sync::Arc;

/// Exact counters that any thread may bump. Read by reports only, so `Relaxed` suffices.
#[derive(Default)]
pub struct Counters {
    current_bytes: AtomicU64,
    current_count: AtomicU64,
    peak_bytes: AtomicU64,
    peak_count: AtomicU64,
    total_bytes: AtomicU64,
    total_count: AtomicU64,
    hits: AtomicU64,
}

impl Counters {
    /// A block of `size` bytes was handed out.
    pub fn allocated(&self, size: usize, reused: bool) {
        let size = size as u64;
        let bytes = self.current_bytes.fetch_add(size, Relaxed) + size;
        let count = self.current_count.fetch_add(1, Relaxed) + 1;
        if bytes > self.peak_bytes.load(Relaxed) {
            self.peak_bytes.fetch_max(bytes, Relaxed);
        }
        if count > self.peak_count.load(Relaxed) {
            self.peak_count.fetch_max(count, Relaxed);
        }
        self.total_bytes.fetch_add(size, Relaxed);
        self.total_count.fetch_add(1, Relaxed);
        if reused {
            self.hits.fetch_add(1, Relaxed);
        }
    }

    /// A block of `size` bytes came back.
    pub fn freed(&self, size: usize) {
        self.current_bytes.fetch_sub(size as u64, Relaxed);
        self.current_count.fetch_sub(1, Relaxed);
    }

    /// The counts as [`Statistics`]; `misses` is what was no hit.
    pub fn read(&self) -> Statistics {
        let hits = self.hits.load(Relaxed);
        let total_count = self.total_count.load(Relaxed).max(hits);
        Statistics {
            current_bytes: self.current_bytes.load(Relaxed),
            current_count: self.current_count.load(Relaxed),
            peak_bytes: self.peak_bytes.load(Relaxed),
            peak_count: self.peak_count.load(Relaxed),
            total_bytes: self.total_bytes.load(Relaxed),
            total_count,
            hits,
            misses: total_count - hits,
            ..Statistics::default()
        }
    }

    /// Start a new peak at what is in use now; returns the old one as (bytes, count).
    fn restart_peak(&self) -> (u64, u64) {
        let bytes = self
            .peak_bytes
            .swap(self.current_bytes.load(Relaxed), Relaxed);
        let count = self
            .peak_count
            .swap(self.current_count.load(Relaxed), Relaxed);
        (bytes, count)
    }

    /// Report counts that cannot be.
    pub fn check(&self, name: &str, report: &mut HealthReport) {
        let counts = self.read();
        report.count(format!("{name}.current_count"), counts.current_count);
        report.expect(counts.current_count <= counts.total_count, || {
            format!(
                "{name}: {} blocks are out, but only {} were ever handed out",
                counts.current_count, counts.total_count
            )
        });
        report.expect(counts.peak_bytes >= counts.current_bytes, || {
            format!(
                "{name}: the peak of {} bytes is below the {} in use",
                counts.peak_bytes, counts.current_bytes
            )
        });
    }
}

/// What was counted while a scope was open.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScopeCounts {
    /// Bytes in use when it opened.
    pub start_bytes: u64,
    /// Most bytes in use at once while it was open, what was in use before included.
    pub peak_bytes: u64,
    /// Bytes handed out while it was open.
    pub total_bytes: u64,
    /// Blocks handed out while it was open.
    pub total_count: u64,
    /// Bytes in use when it closed (or now) less bytes in use when it opened.
    pub current_bytes: i64,
}

struct OpenScope {
    id: u64,
    start: Statistics,
    peak_bytes: u64,
}

#[derive(Default)]
struct Scopes {
    next_id: u64,
    open: Vec<OpenScope>,
    /// The peaks since construction, folded in whenever a window ends.
    peak_bytes: u64,
    peak_count: u64,
}

/// Counts what passes through it on the way to `upstream`.
///
/// Scopes may nest or overlap, on any thread: each sees everything that passed while it was open.
/// The counters' peak is a window that ends whenever a scope opens or closes; each open scope keeps
/// the largest window it saw.
pub struct StatisticsAdaptor {
    upstream: Arc<dyn Resource>,
    counters: Counters,
    scopes: Arc<Lock<Scopes>>,
}

impl StatisticsAdaptor {
    /// Count what is drawn from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Self {
        let scopes = fork::shared(Lock::<Scopes>::default());
        StatisticsAdaptor {
            upstream,
            counters: Counters::default(),
            scopes,
        }
    }

    fn end_window(&self, scopes: &mut Scopes) {
        let (bytes, count) = self.counters.restart_peak();
        scopes.peak_bytes = scopes.peak_bytes.max(bytes);
        scopes.peak_count = scopes.peak_count.max(count);
        for scope in &mut scopes.open {
            scope.peak_bytes = scope.peak_bytes.max(bytes);
        }
    }

    /// Open a scope; the number names it.
    pub fn open_scope(&self) -> u64 {
        let mut scopes = self.scopes.lock();
        self.end_window(&mut scopes);
        let start = self.counters.read();
        let id = scopes.next_id;
        scopes.next_id += 1;
        scopes.open.push(OpenScope {
            id,
            start,
            peak_bytes: start.current_bytes,
        });
        id
    }

    /// What an open scope has seen so far; `None` if it is not open.
    pub fn scope_counts(&self, id: u64) -> Option<ScopeCounts> {
        let mut scopes = self.scopes.lock();
        self.end_window(&mut scopes);
        let now = self.counters.read();
        let scope = scopes.open.iter().find(|scope| scope.id == id)?;
        Some(ScopeCounts {
            start_bytes: scope.start.current_bytes,
            peak_bytes: scope.peak_bytes,
            total_bytes: now.total_bytes - scope.start.total_bytes,
            total_count: now.total_count - scope.start.total_count,
            current_bytes: now.current_bytes as i64 - scope.start.current_bytes as i64,
        })
    }

    /// Close a scope and say what it saw; `None` if it is not open.
    pub fn close_scope(&self, id: u64) -> Option<ScopeCounts> {
        let counts = self.scope_counts(id)?;
        self.scopes.lock().open.retain(|scope| scope.id != id);
        Some(counts)
    }
}

impl Adaptor for StatisticsAdaptor {
    fn title(&self) -> &'static str {
        "StatisticsAdaptor"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    fn pass(&self, request: Request) -> Result<Block> {
        let block = self.upstream.allocate(request)?;
        self.counters.allocated(block.size, block.reused);
        Ok(block)
    }

    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let blocks = self.upstream.allocate_group(requests)?;
        for block in &blocks {
            self.counters.allocated(block.size, block.reused);
        }
        Ok(blocks)
    }

    fn came_back(&self, size: usize) {
        self.counters.freed(size);
    }

    fn counted(&self) -> Option<Statistics> {
        let scopes = self.scopes.lock();
        let passed = self.counters.read();
        Some(Statistics {
            peak_bytes: passed.peak_bytes.max(scopes.peak_bytes),
            peak_count: passed.peak_count.max(scopes.peak_count),
            ..passed
        })
    }

    fn examine(&self, report: &mut HealthReport) {
        self.counters.check(self.title(), report);
    }
}
