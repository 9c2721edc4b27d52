//! What a program asks of memory: exact counts by size, and samples of how long blocks live, which
//! threads free them, how long the calls take and whether the memory was used before.
//!
//! Counting is each thread's own business ([`tally`]). One request in a while is sampled: its block
//! is marked by address, so that its end is noticed too, and noted in a book under a lock. The mean
//! gap between samples follows the traffic. Source of the idea: tcmalloc's lifetime sampling
//! (Maas et al., "Learning-based Memory Allocation for C++ Server Workloads", 2020). Left out: call
//! stacks.

mod book;
mod tally;

use super::adaptor::Adaptor;
use super::fork;
use super::{Block, HealthReport, Ownership, Request, Resource};
use crate::error::Result;
use crate::os;
use crate::sync::{AtomicU8, AtomicU32, AtomicU64, Lock, Ordering::Relaxed};
use book::Book;
use std::ptr::NonNull;
use std::sync::Arc;
use tally::Tallies;

pub use book::{Evidence, Lifetimes, Sample};

/// Size classes: up to 64 bytes, and one for each doubling up to the largest request.
pub const CLASS_COUNT: usize = (super::MAX_REQUEST.ilog2() - 6 + 1) as usize;

/// The class of a request of `size` bytes, at least 1.
#[inline]
pub fn class_of(size: usize) -> usize {
    (((size - 1) | 63).ilog2() - 5) as usize
}

/// The largest size of a class.
pub fn class_bytes(class: usize) -> usize {
    64 << class
}

/// Marks by which a free is recognised as that of a sampled block, give or take.
const MARKS: usize = 1 << 14;
/// Samples aimed at in a window, and those that make the window end early: traffic has picked up.
const SAMPLES_WANTED: u64 = 128;
const SAMPLES_TOO_MANY: u32 = 512;
/// Longest mean gap between samples: a program that slows down is to be noticed.
const LONGEST_GAP: u64 = 128;

/// What a program asked for in one size class since the pattern began.
#[derive(Clone, Debug)]
pub struct ClassPattern {
    /// Largest size of the class in bytes; the smallest is one more than that of the class before.
    pub max_bytes: usize,
    /// Requests, all of them.
    pub requests: u64,
    /// Bytes of those; up to 16 KiB each is rounded up to a multiple of 64.
    pub bytes: u64,
    /// Threads (or threads one after another) that asked.
    pub threads: usize,
    /// What samples of them showed.
    pub lifetimes: Lifetimes,
}

/// The instrument: whoever hands blocks out tells it of each request, and of the sampled ones more.
pub struct Pattern {
    tallies: Arc<Tallies>,
    /// By a hash of the address, how many sampled blocks are out. Written under the book's lock,
    /// before the block is known to whoever frees it, so `Relaxed` suffices.
    marks: Box<[AtomicU8]>,
    book: Arc<Lock<Book>>,
    mean_gap: AtomicU32,
    /// When somebody is to look next, in nanoseconds of the monotonic clock.
    look_at: AtomicU64,
    requests_at_look: AtomicU64,
    samples_since_look: AtomicU32,
    window_nanoseconds: u64,
}

impl Pattern {
    /// A pattern that is looked at every `window_nanoseconds` while there are requests, and for
    /// which a block that lives for `long_nanoseconds` lives long.
    pub fn new(window_nanoseconds: u64, long_nanoseconds: u64) -> Self {
        let now = os::now_nanoseconds();
        let book = fork::shared(Lock::new(Book::new(now, long_nanoseconds)));
        let tallies = fork::shared(Tallies::new());
        Pattern {
            tallies,
            marks: (0..MARKS).map(|_| AtomicU8::new(0)).collect(),
            book,
            mean_gap: AtomicU32::new(1),
            look_at: AtomicU64::new(now + window_nanoseconds),
            requests_at_look: AtomicU64::new(0),
            samples_since_look: AtomicU32::new(0),
            window_nanoseconds,
        }
    }

    /// Count a request, at least 1 byte; whether it is to be sampled: then call [`Pattern::began`].
    #[inline]
    pub fn asked(&self, size: usize) -> bool {
        let count = |tally: &tally::Tally| tally.count(size, &self.mean_gap);
        self.tallies.own(count)
    }

    fn mark(&self, address: usize) -> &AtomicU8 {
        // Fibonacci hashing of the line; blocks are a line apart at least.
        let line = address / super::DEFAULT_ALIGNMENT;
        &self.marks[line.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (usize::BITS - MARKS.ilog2())]
    }

    /// Note a sampled request and the block that serves it, before anybody has the block.
    pub fn began(&self, address: NonNull<u8>, mut sample: Sample) {
        sample.thread = self.thread();
        self.samples_since_look.fetch_add(1, Relaxed);
        let mut book = self.book.lock();
        let address = address.as_ptr() as usize;
        let mark = self.mark(address);
        if mark.load(Relaxed) < u8::MAX && book.open(address, sample) {
            mark.store(mark.load(Relaxed) + 1, Relaxed);
        }
    }

    /// Whether a block may be a sampled one; before it is freed: then call [`Pattern::ended`].
    #[inline]
    pub fn may_be_sampled(&self, address: NonNull<u8>) -> bool {
        self.mark(address.as_ptr() as usize).load(Relaxed) > 0
    }

    /// A block is about to be freed at `now`; its class, source and number if it was sampled.
    pub fn ended(&self, address: NonNull<u8>, now: u64) -> Option<Sample> {
        let thread = self.thread();
        let mut book = self.book.lock();
        let address = address.as_ptr() as usize;
        let sample = book.close(address, now, thread)?;
        let mark = self.mark(address);
        mark.store(mark.load(Relaxed) - 1, Relaxed);
        Some(sample)
    }

    /// A sampled request was served by a call of so many nanoseconds in all, the free included.
    pub fn took(&self, sample: &Sample, free_nanoseconds: u64) {
        self.book.lock().took(sample, free_nanoseconds);
    }

    /// A block went where its end is not seen as that of a request (it was resized).
    pub fn forget(&self, address: NonNull<u8>) {
        let mut book = self.book.lock();
        let address = address.as_ptr() as usize;
        if book.forget(address) {
            let mark = self.mark(address);
            mark.store(mark.load(Relaxed) - 1, Relaxed);
        }
    }

    /// Report what does not add up.
    pub fn check(&self, report: &mut HealthReport) {
        let book = self.book.lock();
        let marks: usize = self
            .marks
            .iter()
            .map(|mark| mark.load(Relaxed) as usize)
            .sum();
        report.count("pattern.sampled_blocks", book.open_count() as u64);
        report.expect(marks == book.open_count(), || {
            format!(
                "pattern: {marks} marks are set for {} sampled blocks",
                book.open_count()
            )
        });
    }

    /// Something that differs between threads that are there at once.
    fn thread(&self) -> usize {
        self.tallies.own(|tally| std::ptr::from_ref(tally) as usize)
    }

    /// Whether the caller, alone of all threads, is to look now.
    pub fn is_look_due(&self, now: u64) -> bool {
        let due = self.look_at.load(Relaxed);
        let next = now + self.window_nanoseconds;
        let is_due = now >= due || self.samples_since_look.load(Relaxed) > SAMPLES_TOO_MANY;
        is_due
            && self
                .look_at
                .compare_exchange(due, next, Relaxed, Relaxed)
                .is_ok()
    }

    /// See which blocks became old, set the gap between samples by the traffic, and hand over the
    /// evidence on each class of which there is enough.
    pub fn look(&self, now: u64) -> Vec<(usize, Evidence)> {
        let (requests, by_class) = {
            let list = self.tallies.list.lock();
            let by_class: [Vec<u64>; CLASS_COUNT] = std::array::from_fn(|class| {
                let tallies = list.all.iter();
                tallies.map(|tally| tally.of_class(class).0).collect()
            });
            let requests: u64 = by_class.iter().flatten().sum();
            (requests, by_class)
        };
        self.samples_since_look.store(0, Relaxed);
        let before = self.requests_at_look.swap(requests, Relaxed);
        let gap = requests.saturating_sub(before) / SAMPLES_WANTED;
        self.mean_gap
            .store(gap.clamp(1, LONGEST_GAP) as u32, Relaxed);
        let mut book = self.book.lock();
        for address in book.grow_old(now) {
            let mark = self.mark(address);
            mark.store(mark.load(Relaxed) - 1, Relaxed);
        }
        book.hand_over(now, self.window_nanoseconds, &by_class)
    }

    /// Start collecting evidence on a class anew: what serves it has changed.
    pub fn restart(&self, class: usize, now: u64) {
        let requests = self.requests_by_thread(class);
        self.book.lock().restart(class, now, requests);
    }

    fn requests_by_thread(&self, class: usize) -> Vec<u64> {
        let list = self.tallies.list.lock();
        list.all
            .iter()
            .map(|tally| tally.of_class(class).0)
            .collect()
    }

    /// Requests of up to 16 KiB so far: (bytes rounded up to a multiple of 64, count), by bytes.
    pub fn sizes(&self) -> Vec<(usize, u64)> {
        let list = self.tallies.list.lock();
        let count = |lines| list.all.iter().map(|tally| tally.of_lines(lines)).sum();
        (1..=tally::LINES)
            .map(|lines| (lines * tally::LINE_BYTES, count(lines)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Every class that was asked for, by size.
    pub fn classes(&self) -> Vec<ClassPattern> {
        let counts: Vec<(u64, u64, usize)> = {
            let list = self.tallies.list.lock();
            let sum = |class| {
                let counts = list.all.iter().map(|tally| tally.of_class(class));
                counts.fold((0, 0, 0), |(requests, bytes, threads), (more, of_bytes)| {
                    (
                        requests + more,
                        bytes + of_bytes,
                        threads + usize::from(more > 0),
                    )
                })
            };
            (0..CLASS_COUNT).map(sum).collect()
        };
        let book = self.book.lock();
        let pattern = |(class, (requests, bytes, threads)): (usize, _)| ClassPattern {
            max_bytes: class_bytes(class),
            requests,
            bytes,
            threads,
            lifetimes: book.lifetimes(class),
        };
        let all = counts.into_iter().enumerate().map(pattern);
        all.filter(|class| class.requests > 0).collect()
    }
}

/// Notes the pattern of what passes through it on the way to `upstream`.
pub struct PatternAdaptor {
    upstream: Arc<dyn Resource>,
    pattern: Pattern,
}

/// Nanoseconds between two looks of a [`PatternAdaptor`], and what counts as a long life there.
const WINDOW: u64 = 20_000_000;

impl PatternAdaptor {
    /// Note what is drawn from `upstream`.
    pub fn new(upstream: Arc<dyn Resource>) -> Self {
        PatternAdaptor {
            upstream,
            pattern: Pattern::new(WINDOW, WINDOW),
        }
    }

    /// What was noted.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    #[cold]
    fn sample(&self, request: &Request, block: &Block) {
        let now = os::now_nanoseconds();
        let sample = Sample::new(request.size(), 0, block.reused, now);
        self.pattern.began(block.address, sample);
        if self.pattern.is_look_due(now) {
            self.pattern.look(now);
        }
    }
}

impl Adaptor for PatternAdaptor {
    fn title(&self) -> &'static str {
        "PatternAdaptor"
    }

    fn source(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    #[inline]
    fn pass(&self, request: Request) -> Result<Block> {
        let block = self.upstream.allocate(request)?;
        if self.pattern.asked(request.size()) {
            self.sample(&request, &block);
        }
        Ok(block)
    }

    fn pass_group(&self, requests: &[Request]) -> Result<Vec<Block>> {
        let blocks = self.upstream.allocate_group(requests)?;
        for (request, block) in requests.iter().zip(&blocks) {
            if self.pattern.asked(request.size()) {
                self.sample(request, block);
            }
        }
        Ok(blocks)
    }

    fn examine(&self, report: &mut HealthReport) {
        self.pattern.check(report);
    }

    #[inline]
    fn leaving(&self, address: NonNull<u8>) -> Ownership {
        if self.pattern.may_be_sampled(address) {
            self.pattern.ended(address, os::now_nanoseconds());
        }
        Ownership::Unknown
    }
}
