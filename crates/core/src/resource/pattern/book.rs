//! The sampled blocks that are out, and what became of the others: by class, since the beginning
//! and since the last time that there was enough evidence for a verdict.

use super::CLASS_COUNT;
use std::collections::HashMap;

/// Sampled blocks that may be out at once; above three quarters of it the oldest are let go.
const OPEN_MAX: usize = 2048;
/// Outcomes that make a verdict.
const OUTCOMES_WANTED: u64 = 8;
/// Evidence that does not suffice after this many windows is too old to be added to.
const STALE_WINDOWS: u64 = 250;
/// Call times kept of each class for their median.
const TIMES_KEPT: usize = 256;
/// Lifetimes are counted by doublings, from below a microsecond to a week and more.
const SPANS: usize = 40;

/// A sampled request and the block that serves it.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The class of the size asked for.
    pub class: usize,
    /// Which source serves it, for whoever has several.
    pub source: usize,
    /// Whether the memory was used before.
    pub reused: bool,
    /// When it was handed out, in nanoseconds of the monotonic clock.
    pub born: u64,
    /// How long the call took.
    pub nanoseconds: u64,
    pub(super) thread: usize,
    /// Whether it was counted as long-lived.
    is_old: bool,
}

impl Sample {
    /// A request of `size` bytes that was served at `born`.
    pub fn new(size: usize, source: usize, reused: bool, born: u64) -> Self {
        Sample {
            class: super::class_of(size),
            source,
            reused,
            born,
            nanoseconds: 0,
            thread: 0,
            is_old: false,
        }
    }
}

/// How sampled blocks of a class ended, all in all.
#[derive(Clone, Debug, Default)]
pub struct Lifetimes {
    /// Sampled blocks that were freed.
    pub ended: u64,
    /// Of those, freed by another thread than the one that asked.
    pub ended_elsewhere: u64,
    /// (microseconds, count): blocks that lived for less than so many and at least half of it.
    pub spans: Vec<(u64, u64)>,
    /// Sampled blocks that were let go while they were out: they lived for as long as they were
    /// watched.
    pub outlived: u64,
    /// Sampled blocks that are out and watched.
    pub open: u64,
}

/// What was seen of a class since its last verdict.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Requests, all of them.
    pub requests: u64,
    /// Over so many seconds.
    pub seconds: f64,
    /// Threads (or threads one after another) that asked.
    pub threads: usize,
    /// Sampled blocks that were freed before they lived long.
    pub short: u64,
    /// Sampled blocks that lived long, whether they were freed or not.
    pub long: u64,
    /// Sampled blocks freed by another thread than the one that asked.
    pub ended_elsewhere: u64,
    /// Sampled requests, and how many of them got memory that was used before.
    pub sampled: u64,
    /// As said.
    pub reused: u64,
    /// Median of the time that a sampled request and its free took together, 0 if there is none.
    pub median_nanoseconds: u64,
    /// Requests of which that is the median.
    pub timed: usize,
}

struct ClassBook {
    ended: u64,
    ended_elsewhere: u64,
    spans: [u64; SPANS],
    outlived: u64,
    open: u64,
    since: u64,
    requests_by_thread: Vec<u64>,
    evidence: Evidence,
    times: Vec<u64>,
}

pub(super) struct Book {
    open: HashMap<usize, Sample>,
    classes: [ClassBook; CLASS_COUNT],
    long_nanoseconds: u64,
}

impl Book {
    pub(super) fn new(now: u64, long_nanoseconds: u64) -> Self {
        Book {
            open: HashMap::new(),
            classes: std::array::from_fn(|_| ClassBook::new(now)),
            long_nanoseconds,
        }
    }

    /// Watch a block; false if its address has a mark already, or too many are watched.
    pub(super) fn open(&mut self, address: usize, sample: Sample) -> bool {
        let class = &mut self.classes[sample.class];
        class.evidence.sampled += 1;
        class.evidence.reused += u64::from(sample.reused);
        if self.open.len() >= OPEN_MAX {
            return false;
        }
        class.open += 1;
        match self.open.insert(address, sample) {
            Some(lost) => {
                self.classes[lost.class].open -= 1;
                false
            }
            None => true,
        }
    }

    /// A watched block ends.
    pub(super) fn close(&mut self, address: usize, now: u64, thread: usize) -> Option<Sample> {
        let sample = self.open.remove(&address)?;
        let class = &mut self.classes[sample.class];
        let lived = now.saturating_sub(sample.born);
        let elsewhere = u64::from(thread != sample.thread);
        class.open -= 1;
        class.ended += 1;
        class.ended_elsewhere += elsewhere;
        class.evidence.ended_elsewhere += elsewhere;
        let microseconds = lived / 1000;
        let span = (u64::BITS - microseconds.leading_zeros()) as usize;
        class.spans[span.min(SPANS - 1)] += 1;
        if !sample.is_old {
            if lived < self.long_nanoseconds {
                class.evidence.short += 1;
            } else {
                class.evidence.long += 1;
            }
        }
        Some(sample)
    }

    pub(super) fn took(&mut self, sample: &Sample, free_nanoseconds: u64) {
        let class = &mut self.classes[sample.class];
        // Those from before the last verdict may be another source's.
        if sample.born >= class.since && class.times.len() < TIMES_KEPT {
            class.times.push(sample.nanoseconds + free_nanoseconds);
        }
    }

    pub(super) fn open_count(&self) -> usize {
        self.open.len()
    }

    pub(super) fn forget(&mut self, address: usize) -> bool {
        let sample = self.open.remove(&address);
        if let Some(sample) = &sample {
            self.classes[sample.class].open -= 1;
        }
        sample.is_some()
    }

    /// Count the watched blocks that became long-lived; returns those that are let go.
    pub(super) fn grow_old(&mut self, now: u64) -> Vec<usize> {
        for sample in self.open.values_mut() {
            if !sample.is_old && now.saturating_sub(sample.born) >= self.long_nanoseconds {
                sample.is_old = true;
                self.classes[sample.class].evidence.long += 1;
            }
        }
        if self.open.len() <= OPEN_MAX / 4 * 3 {
            return Vec::new();
        }
        let old = self.open.iter().filter(|(_, sample)| sample.is_old);
        let let_go: Vec<usize> = old.map(|(address, _)| *address).collect();
        for address in &let_go {
            if let Some(sample) = self.open.remove(address) {
                let class = &mut self.classes[sample.class];
                class.open -= 1;
                class.outlived += 1;
            }
        }
        let_go
    }

    /// The evidence on each class of which there is enough, after `window` nanoseconds or more.
    ///
    /// `requests` are all requests so far by class and thread.
    pub(super) fn hand_over(
        &mut self,
        now: u64,
        window: u64,
        requests: &[Vec<u64>; CLASS_COUNT],
    ) -> Vec<(usize, Evidence)> {
        let mut handed = Vec::new();
        for (index, (class, requests)) in self.classes.iter_mut().zip(requests).enumerate() {
            let elapsed = now.saturating_sub(class.since);
            // A thread's first look at a window may come a little before the last one's end.
            if elapsed < window / 2 {
                continue;
            }
            let outcomes = class.evidence.short + class.evidence.long;
            // Blocks that only die, or grow old, say nothing of requests: there are none.
            if outcomes >= OUTCOMES_WANTED && class.requests_by_thread != *requests {
                handed.push((index, class.verdict(now, requests)));
            } else if elapsed > STALE_WINDOWS * window {
                class.restart(now, requests.clone());
            }
        }
        handed
    }

    pub(super) fn restart(&mut self, class: usize, now: u64, requests: Vec<u64>) {
        self.classes[class].restart(now, requests);
    }

    pub(super) fn lifetimes(&self, class: usize) -> Lifetimes {
        let class = &self.classes[class];
        let spans = class.spans.iter().enumerate();
        Lifetimes {
            ended: class.ended,
            ended_elsewhere: class.ended_elsewhere,
            spans: spans
                .filter(|(_, count)| **count > 0)
                .map(|(span, count)| (1 << span, *count))
                .collect(),
            outlived: class.outlived,
            open: class.open,
        }
    }
}

impl ClassBook {
    fn new(since: u64) -> Self {
        ClassBook {
            ended: 0,
            ended_elsewhere: 0,
            spans: [0; SPANS],
            outlived: 0,
            open: 0,
            since,
            requests_by_thread: Vec::new(),
            evidence: Evidence::default(),
            times: Vec::new(),
        }
    }

    fn verdict(&mut self, now: u64, requests: &[u64]) -> Evidence {
        let mut evidence = std::mem::take(&mut self.evidence);
        let before = |thread: usize| self.requests_by_thread.get(thread).copied().unwrap_or(0);
        let news = requests.iter().enumerate();
        let news: Vec<u64> = news.map(|(thread, count)| count - before(thread)).collect();
        evidence.requests = news.iter().sum();
        evidence.threads = news.iter().filter(|count| **count > 0).count();
        evidence.seconds = now.saturating_sub(self.since) as f64 / 1e9;
        self.times.sort_unstable();
        evidence.timed = self.times.len();
        evidence.median_nanoseconds = self.times.get(self.times.len() / 2).copied().unwrap_or(0);
        self.restart(now, requests.to_vec());
        evidence
    }

    fn restart(&mut self, now: u64, requests: Vec<u64>) {
        self.since = now;
        self.requests_by_thread = requests;
        self.evidence = Evidence::default();
        self.times.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(count: u64) -> [Vec<u64>; CLASS_COUNT] {
        std::array::from_fn(|_| vec![count])
    }

    fn sample(born: u64) -> Sample {
        Sample::new(100, 0, false, born)
    }

    #[test]
    fn lives_are_short_or_long_and_counted_once() {
        let mut book = Book::new(0, 100);
        for address in 0..20 {
            assert!(book.open(address, sample(0)));
        }
        for address in 0..5 {
            assert!(book.close(address, 50, 0).is_some());
        }
        assert!(book.grow_old(100).is_empty(), "nobody is let go yet");
        for address in 5..10 {
            assert!(book.close(address, 200, 1).is_some());
        }
        assert!(book.close(3, 300, 0).is_none(), "it ended before");
        let handed = book.hand_over(1000, 1000, &requests(7));
        assert_eq!(handed.len(), 1);
        let evidence = &handed[0].1;
        assert_eq!((evidence.short, evidence.long), (5, 15));
        assert_eq!((evidence.requests, evidence.ended_elsewhere), (7, 5));
        let lifetimes = book.lifetimes(1);
        assert_eq!((lifetimes.ended, lifetimes.open), (10, 10));
        assert!(
            book.hand_over(2000, 1000, &requests(9)).is_empty(),
            "none are new"
        );
    }

    #[test]
    fn old_blocks_are_let_go_when_many_are_watched() {
        let mut book = Book::new(0, 100);
        for address in 0..OPEN_MAX {
            let born = if address % 2 == 0 { 0 } else { 1000 };
            assert!(book.open(address, sample(born)));
        }
        assert!(!book.open(OPEN_MAX, sample(0)), "that many are watched");
        assert_eq!(book.grow_old(200).len(), OPEN_MAX / 2);
        assert_eq!(book.open_count(), OPEN_MAX / 2);
        assert_eq!(book.lifetimes(1).outlived, OPEN_MAX as u64 / 2);
        assert!(!book.forget(0) && book.forget(1));
    }

    #[test]
    fn evidence_waits_for_requests_and_grows_stale() {
        let mut book = Book::new(0, 100);
        for address in 0..20 {
            book.open(address, sample(0));
        }
        book.grow_old(100);
        // Nobody asked since the beginning as far as the counts say: no verdict on requests.
        let none: [Vec<u64>; CLASS_COUNT] = std::array::from_fn(|_| Vec::new());
        assert!(book.hand_over(1000, 1000, &none).is_empty());
        assert_eq!(book.hand_over(2000, 1000, &requests(1)).len(), 1);
        book.open(99, sample(2000));
        book.close(99, 2010, 0);
        let stale = 2000 + (STALE_WINDOWS + 1) * 1000;
        assert!(book.hand_over(stale, 1000, &requests(2)).is_empty());
        assert_eq!(
            book.classes[1].evidence.short, 0,
            "a single old outcome is forgotten"
        );
    }

    #[test]
    fn an_address_that_is_watched_already_keeps_its_mark() {
        let mut book = Book::new(0, 100);
        assert!(book.open(7, sample(0)));
        assert!(!book.open(7, Sample::new(5000, 0, false, 1)));
        assert_eq!((book.lifetimes(1).open, book.open_count()), (0, 1));
        assert_eq!(
            book.close(7, 2, 0).unwrap().class,
            super::super::class_of(5000)
        );
    }

    #[test]
    fn the_median_is_that_of_requests_since_the_last_verdict() {
        let mut book = Book::new(1000, 1_000_000);
        for (address, (born, time)) in [(900, 9999), (1001, 10), (1002, 20), (1003, 30)]
            .into_iter()
            .cycle()
            .take(12)
            .enumerate()
        {
            let mut sample = sample(born);
            sample.nanoseconds = time;
            book.open(address, sample);
            let sample = book.close(address, 1100, 0).unwrap();
            book.took(&sample, 5);
        }
        let handed = book.hand_over(3000, 1000, &requests(1));
        assert_eq!((handed[0].1.median_nanoseconds, handed[0].1.timed), (25, 9));
    }
}
