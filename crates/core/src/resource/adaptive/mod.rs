//! A resource that routes each size class to the part that suits its workload.
//!
//! The [`Pattern`] of requests is the evidence, [`judge`] reads it, and a table of one byte a size
//! class is what a request pays for: nothing else of the decision lies on its way. Blocks go back to
//! the part they came from, so a switch moves nothing.

mod judge;

use super::composite::{Choose, Composite, distinct};
use super::fork;
use super::pattern::{CLASS_COUNT, Pattern, Sample, class_of};
use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::Result;
use crate::os;
use crate::sync::{AtomicU8, Lock, Ordering::Relaxed};
use judge::Judge;
use std::ptr::NonNull;
use std::sync::Arc;

pub use judge::{Decision, Effect, Outcome, Rules, Standing, Workload};

/// Which part serves which size class.
pub struct Routes {
    /// Read by requests, written by verdicts. A block remembers its part by its address, so that a
    /// request may still go by the old entry: `Relaxed`.
    parts: Arc<[AtomicU8; CLASS_COUNT]>,
}

impl Choose for Routes {
    const NAME: &'static str = "AdaptiveResource";

    #[inline]
    fn choose(&self, size: usize) -> usize {
        self.parts[class_of(size)].load(Relaxed) as usize
    }
}

/// A part for each workload, and the table that is kept by what is asked.
pub struct AdaptiveResource {
    parts: Composite<Routes>,
    routes: Arc<[AtomicU8; CLASS_COUNT]>,
    pattern: Pattern,
    judge: Arc<Lock<Judge>>,
}

impl AdaptiveResource {
    /// A resource for each of [`Workload::ALL`], of which no two draw from the same one. All classes
    /// begin with the one for `initial`.
    pub fn new(parts: [Arc<dyn Resource>; 3], initial: Workload, rules: Rules) -> Result<Self> {
        distinct(&parts, &Workload::ALL.map(Workload::name))?;
        let routes = || AtomicU8::new(initial as u8);
        let routes: Arc<[AtomicU8; CLASS_COUNT]> = Arc::new(std::array::from_fn(|_| routes()));
        let choice = Routes {
            parts: Arc::clone(&routes),
        };
        let judge = fork::shared(Lock::new(Judge::new(rules, initial)));
        Ok(AdaptiveResource {
            parts: Composite::new(choice, parts.into()),
            routes,
            pattern: Pattern::new(rules.window_nanoseconds, rules.long_nanoseconds),
            judge,
        })
    }

    /// What was asked.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// The latest decisions, the oldest first, and how many there were in all.
    pub fn decisions(&self) -> (Vec<Decision>, u64) {
        self.judge.lock().decisions()
    }

    /// What is known of each class that a verdict was given on, by size.
    pub fn standings(&self) -> Vec<Standing> {
        self.judge.lock().standings()
    }

    #[cold]
    fn sample(&self, request: Request) -> Result<Block> {
        let source = self.parts.choice().choose(request.size());
        let before = os::now_nanoseconds();
        let block = self.parts.parts()[source].allocate(request)?;
        let now = os::now_nanoseconds();
        let mut sample = Sample::new(request.size(), source, block.reused, now);
        sample.nanoseconds = now - before;
        self.pattern.began(block.address, sample);
        if self.pattern.is_look_due(now) {
            self.look(now);
        }
        Ok(block)
    }

    fn look(&self, now: u64) {
        let mut judge = self.judge.lock();
        for (class, evidence) in self.pattern.look(now) {
            if let Some(part) = judge.hear(class, evidence, now) {
                self.routes[class].store(part as u8, Relaxed);
                self.pattern.restart(class, os::now_nanoseconds());
            }
        }
    }

    /// Note the end of a block that may be a sampled one, and how long its free takes.
    #[cold]
    fn end<R>(&self, address: NonNull<u8>, free: impl FnOnce() -> R) -> R {
        let before = os::now_nanoseconds();
        let sample = self.pattern.ended(address, before);
        let Some(sample) = sample else {
            return free();
        };
        let before = os::now_nanoseconds();
        let freed = free();
        self.pattern.took(&sample, os::now_nanoseconds() - before);
        freed
    }
}

// SAFETY: blocks are those of the parts, which promise the same and share no memory.
unsafe impl Resource for AdaptiveResource {
    fn name(&self) -> &'static str {
        Routes::NAME
    }

    #[inline]
    fn allocate(&self, request: Request) -> Result<Block> {
        if self.pattern.asked(request.size()) {
            return self.sample(request);
        }
        self.parts.allocate(request)
    }

    fn allocate_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let blocks = self.parts.allocate_group(requests)?;
        let now = os::now_nanoseconds();
        for (request, block) in requests.iter().zip(&blocks) {
            if self.pattern.asked(request.size()) {
                // Its lifetime counts; the time of its call is not known apart from the group's.
                let source = self.parts.choice().choose(request.size());
                let sample = Sample::new(request.size(), source, block.reused, now);
                self.pattern.began(block.address, sample);
            }
        }
        if self.pattern.is_look_due(now) {
            self.look(now);
        }
        Ok(blocks)
    }

    #[inline]
    fn draw(&self, size: usize) -> Option<NonNull<u8>> {
        // Before it is counted: what is refused here has no class.
        let request = Request::bytes(size).ok()?;
        if self.pattern.asked(request.size()) {
            return self.sample(request).ok().map(|block| block.address);
        }
        self.parts.draw(request.size())
    }

    #[inline]
    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        let free = || unsafe { self.parts.deallocate(address) };
        if self.pattern.may_be_sampled(address) {
            return self.end(address, free);
        }
        free()
    }

    #[inline]
    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        // SAFETY: the caller's promise.
        let free = || unsafe { self.parts.take_back(address) };
        // Only a block of ours is in the book.
        if self.pattern.may_be_sampled(address) {
            return self.end(address, free);
        }
        free()
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        // SAFETY: the caller's promise.
        unsafe { self.parts.block_bytes(address) }
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        self.parts.owns(address)
    }

    fn statistics(&self) -> Statistics {
        self.parts.statistics()
    }

    fn cached_bytes(&self) -> usize {
        self.parts.cached_bytes()
    }

    fn trim(&self, target_bytes: usize) -> usize {
        self.parts.trim(target_bytes)
    }

    fn check(&self, report: &mut HealthReport) {
        self.pattern.check(report);
        self.parts.check(report);
    }

    fn sources(&self) -> Vec<&Arc<dyn Resource>> {
        self.parts.sources()
    }

    fn has_lanes(&self) -> bool {
        self.parts.has_lanes()
    }

    unsafe fn reallocate(&self, address: NonNull<u8>, size: usize) -> Result<Block> {
        // SAFETY: the caller's promise.
        let block = unsafe { self.parts.reallocate(address, size) }?;
        if self.pattern.may_be_sampled(address) {
            self.pattern.forget(address);
        }
        Ok(block)
    }
}
