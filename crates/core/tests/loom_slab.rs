//! Models of the slab's magazines and depot: every interleaving of two threads. Run by `make loom`.
//!
//! The sources are the slab's own, compiled here against loom's atomics; only the lock around the
//! depot and the run behind it are the model's.
#![cfg(loom)]

// What the sources name `crate::sync` and `super::classes`.
use moirai_core::sync;
#[allow(dead_code)]
#[path = "../src/resource/slab/classes.rs"]
mod classes;
#[allow(dead_code)]
#[path = "../src/resource/slab/depot.rs"]
mod depot;
#[allow(dead_code)]
#[path = "../src/resource/slab/magazine.rs"]
mod magazine;

use classes::Classes;
use depot::Depot;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use magazine::{Counts, Magazine, Pair};

/// Small magazines, so that a model reaches the depot with few blocks.
const ROUNDS: usize = classes::MIN_ROUNDS;
/// Enough for two threads that each have five out and one left over in a magazine.
const BLOCKS: usize = 12;

/// A class of the slab: its depot, and a run that still has all its blocks.
struct Class {
    depot: Depot,
    run: Vec<*mut u8>,
}

struct Slab {
    class: Mutex<Class>,
    /// Blocks that new magazines hold.
    rounds: AtomicUsize,
    counts: [Counts; 2],
    /// Whether a block is handed out; its address is its index plus one.
    out: [AtomicBool; BLOCKS],
}

// SAFETY: the pointers are numbers here, and are never followed.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    fn new() -> Self {
        let run = (1..=BLOCKS).map(|number| number as *mut u8).collect();
        Slab {
            class: Mutex::new(Class {
                depot: Depot::new(),
                run,
            }),
            rounds: AtomicUsize::new(ROUNDS),
            counts: Default::default(),
            out: std::array::from_fn(|_| AtomicBool::new(false)),
        }
    }

    /// What the slab does for a request: own magazines, then the depot, then the run.
    fn allocate(&self, pair: &mut Pair, counts: &Counts) -> *mut u8 {
        let popped = pair.pop(counts).or_else(|| {
            let mut class = self.class.lock().unwrap();
            let rounds = self.rounds.load(Ordering::Relaxed);
            if !class.depot.fill(&mut pair.loaded, rounds) {
                pair.loaded.make_room(rounds);
                pair.loaded.rounds[0] = class.run.pop().expect("the run has enough");
                pair.loaded.count = 1;
                pair.loaded.fresh = 1;
            }
            pair.pop(counts)
        });
        let (block, _) = popped.expect("just filled");
        let was_out = self.out[block as usize - 1].swap(true, Ordering::Relaxed);
        assert!(!was_out, "a block is handed out twice");
        block
    }

    /// What the slab does for a free: own magazines, then the depot, and from there to the run.
    fn deallocate(&self, pair: &mut Pair, counts: &Counts, block: *mut u8) {
        self.out[block as usize - 1].store(false, Ordering::Relaxed);
        if pair.push(counts, block) {
            return;
        }
        let mut class = self.class.lock().unwrap();
        let rounds = self.rounds.load(Ordering::Relaxed);
        if let Some(mut oldest) = class.depot.unload(&mut pair.previous, rounds) {
            class.run.extend(oldest.blocks());
            oldest.count = 0;
            oldest.fresh = 0;
            class.depot.keep(oldest, rounds);
        }
        assert!(pair.push(counts, block));
    }
}

fn empty_pair() -> Pair {
    Pair {
        loaded: Magazine::empty(0),
        previous: Magazine::empty(0),
    }
}

/// Every block is in exactly one place when the threads have ended.
fn assert_complete(slab: &Slab, pairs: &[Pair]) {
    let class = slab.class.lock().unwrap();
    let resting = pairs
        .iter()
        .flat_map(|pair| pair.loaded.blocks().chain(pair.previous.blocks()));
    let mut found: Vec<usize> = resting
        .chain(class.depot.blocks())
        .chain(class.run.iter().copied())
        .map(|block| block as usize)
        .collect();
    found.sort_unstable();
    let all: Vec<usize> = (1..=BLOCKS).collect();
    assert_eq!(found, all, "a block is lost, or in two places");
}

fn run_model(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Two threads meet at the lock and at the counters only; more switches show nothing new.
    builder.preemption_bound = Some(3);
    builder.check(model);
}

#[test]
fn a_block_is_with_one_thread_at_a_time_and_none_is_lost() {
    run_model(|| {
        let slab = Arc::new(Slab::new());
        let work = |index: usize| {
            let slab = Arc::clone(&slab);
            move || {
                let counts = &slab.counts[index];
                let mut pair = empty_pair();
                // Two magazines of two rounds: the fifth free unloads one into the depot, and the
                // fifth request afterwards takes one out, which may be the other thread's.
                for _ in 0..2 {
                    let five: Vec<_> = (0..5).map(|_| slab.allocate(&mut pair, counts)).collect();
                    for block in five {
                        slab.deallocate(&mut pair, counts, block);
                    }
                }
                pair
            }
        };
        let other = thread::spawn(work(1));
        let pairs = [work(0)(), other.join().unwrap()];
        assert_complete(&slab, &pairs);
    });
}

#[test]
fn blocks_freed_by_another_thread_come_back_through_the_depot() {
    run_model(|| {
        let slab = Arc::new(Slab::new());
        let mut pair = empty_pair();
        let counts = &slab.counts[0];
        let blocks: Vec<usize> = (0..5)
            .map(|_| slab.allocate(&mut pair, counts) as usize)
            .collect();
        let freeing = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || {
                let counts = &slab.counts[1];
                let mut pair = empty_pair();
                for block in blocks {
                    slab.deallocate(&mut pair, counts, block as *mut u8);
                }
                pair
            })
        };
        // The next block is new from the run, or one the other thread has unloaded.
        let sixth = slab.allocate(&mut pair, counts);
        slab.deallocate(&mut pair, counts, sixth);
        let other = freeing.join().unwrap();
        assert_complete(&slab, &[pair, other]);
        let sum = |count: fn(&Counts) -> &sync::AtomicU64| -> u64 {
            let of = |counts| count(counts).load(Ordering::Relaxed);
            slab.counts.iter().map(of).sum()
        };
        assert_eq!(sum(|counts| &counts.allocated), 6);
        assert_eq!(sum(|counts| &counts.freed), 6);
        // A block that came back through the depot is not new.
        assert!((5..=6).contains(&sum(|counts| &counts.misses)));
    });
}

#[test]
fn magazines_may_change_their_capacity_while_blocks_come_and_go() {
    run_model(|| {
        let slab = Arc::new(Slab::new());
        let work = |index: usize| {
            let slab = Arc::clone(&slab);
            move || {
                let counts = &slab.counts[index];
                let mut pair = empty_pair();
                for rounds in [3, 1] {
                    let five: Vec<_> = (0..5).map(|_| slab.allocate(&mut pair, counts)).collect();
                    // Both threads write it, so either may find the other's.
                    slab.rounds.store(rounds, Ordering::Relaxed);
                    for block in five {
                        slab.deallocate(&mut pair, counts, block);
                    }
                }
                pair
            }
        };
        let other = thread::spawn(work(1));
        let pairs = [work(0)(), other.join().unwrap()];
        for pair in &pairs {
            for magazine in [&pair.loaded, &pair.previous] {
                assert!(magazine.count as usize <= magazine.rounds.len());
                assert!(magazine.rounds.len() <= 3);
            }
        }
        assert_complete(&slab, &pairs);
    });
}

/// The first extra class.
const EXTRA: usize = classes::STANDARD_COUNT;

#[test]
fn whoever_finds_a_new_class_finds_its_size() {
    run_model(|| {
        let sizes = Arc::new(Classes::new());
        let tuning = {
            let sizes = Arc::clone(&sizes);
            thread::spawn(move || {
                // As `set_extra` does it, for the one size that is looked at.
                sizes.give(EXTRA, 1088);
                sizes.serve(17, EXTRA);
                sizes.serve(17, classes::standard_class(1088));
            })
        };
        let class = sizes.of(1050);
        assert!([1088, 1280].contains(&sizes.block_bytes(class)));
        tuning.join().unwrap();
        assert_eq!(sizes.block_bytes(sizes.of(1050)), 1280);
        assert!(sizes.block_bytes(class) >= 1050, "a class keeps its size");
    });
}

#[test]
fn a_report_never_sees_more_than_happened() {
    run_model(|| {
        let slab = Arc::new(Slab::new());
        let working = {
            let slab = Arc::clone(&slab);
            thread::spawn(move || {
                let counts = &slab.counts[0];
                let mut pair = empty_pair();
                for _ in 0..2 {
                    let block = slab.allocate(&mut pair, counts);
                    slab.deallocate(&mut pair, counts, block);
                }
                pair
            })
        };
        // Single writer, so each counter only grows; the sums are exact once the thread has ended.
        let counts = &slab.counts[0];
        let first = counts.allocated.load(Ordering::Relaxed);
        let second = counts.allocated.load(Ordering::Relaxed);
        assert!(first <= second && second <= 2);
        assert!(counts.misses.load(Ordering::Relaxed) <= 1);
        let pair = working.join().unwrap();
        assert_eq!(counts.allocated.load(Ordering::Relaxed), 2);
        assert_eq!(counts.freed.load(Ordering::Relaxed), 2);
        assert_complete(&slab, &[pair]);
    });
}
