//! Models of who holds a block of shared memory: every interleaving is tried.
//!
//! The source is the resource's own, compiled here against loom's atomics. The words lie in plain
//! vectors, and the bytes of a block are a cell that loom watches for races.
#![cfg(loom)]

// What the source names `crate::sync`.
use moirai_core::sync;
#[allow(dead_code)]
#[path = "../src/resource/shared_memory/holders.rs"]
mod holders;

use holders::{Entry, Holders, Marks, Parcel};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

const PAGE: u32 = 0;
const MAKER: usize = 0;
const OTHER: usize = 1;

struct World {
    entries: Vec<Entry>,
    parcels: Vec<AtomicU64>,
    marks: Marks,
    block: UnsafeCell<u64>,
}

// SAFETY: the cell is only read by who holds the block, and written when it is free; loom checks it.
unsafe impl Sync for World {}
// SAFETY: as above.
unsafe impl Send for World {}

impl World {
    /// A block that its maker has sent once.
    fn sent() -> (Arc<Self>, Parcel) {
        let world = Arc::new(World {
            entries: vec![Entry::default()],
            parcels: (0..2).map(|_| AtomicU64::new(0)).collect(),
            marks: Marks::default(),
            block: UnsafeCell::new(1),
        });
        world.holders().begin(PAGE, 1, MAKER);
        let parcel = world.holders().lend(PAGE, MAKER, false).unwrap();
        (world, parcel)
    }

    fn holders(&self) -> Holders<'_> {
        Holders::new(&self.entries, &self.parcels, &self.marks)
    }

    /// What one who receives does: hold, then take.
    fn accept(&self, parcel: Parcel) -> bool {
        self.holders().hold(PAGE, OTHER);
        let taken = self.holders().take(parcel);
        if !taken {
            self.holders().release(PAGE, OTHER);
        }
        taken
    }

    fn look(&self) {
        // SAFETY: the caller holds the block.
        assert_eq!(self.block.with(|place| unsafe { *place }), 1);
    }

    /// The maker lets go, and uses the block again if it is free.
    fn reuse_if_free(&self) -> bool {
        self.holders().release(PAGE, MAKER);
        let free = self.holders().is_free(PAGE);
        if free {
            // SAFETY: nobody has the block.
            self.block.with_mut(|place| unsafe { *place = 2 });
        }
        free
    }
}

fn bounded(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// One receives, looks and lets go, while the maker looks whether the block is free.
#[test]
fn a_block_is_not_used_again_while_somebody_looks_at_it() {
    bounded(4, || {
        let (world, parcel) = World::sent();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                assert!(world.accept(parcel));
                world.look();
                world.holders().release(PAGE, OTHER);
            })
        };
        let freed = world.reuse_if_free();
        other.join().unwrap();
        assert!(freed || world.holders().is_free(PAGE));
    });
}

/// One receives, sends on and lets go: at each instant somebody or a message has the block.
#[test]
fn a_block_that_is_sent_on_is_never_free() {
    bounded(4, || {
        let (world, parcel) = World::sent();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                assert!(world.accept(parcel));
                let onward = world.holders().lend(PAGE, OTHER, true).unwrap();
                world.holders().release(PAGE, OTHER);
                onward
            })
        };
        assert!(!world.reuse_if_free());
        let onward = other.join().unwrap();
        assert!(onward.is_given());
        assert!(!world.holders().is_free(PAGE));
        assert!(world.accept(onward));
        world.look();
        world.holders().release(PAGE, OTHER);
        assert!(world.holders().is_free(PAGE));
    });
}

/// The sender died: what it had sent is received, or taken back, and not both.
#[test]
fn a_dead_senders_message_is_received_or_taken_back() {
    bounded(4, || {
        let (world, parcel) = World::sent();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let taken = world.accept(parcel);
                if taken {
                    world.look();
                }
                taken
            })
        };
        world.holders().reap(MAKER);
        let free = world.holders().is_free(PAGE);
        if free {
            // SAFETY: nobody has the block.
            world.block.with_mut(|place| unsafe { *place = 2 });
        }
        let taken = other.join().unwrap();
        assert!(!(taken && free));
        assert_eq!(world.holders().is_free(PAGE), !taken);
        assert_eq!(world.holders().parcel_count(), 0);
    });
}

/// A receiver died with the message half taken: whoever clears up after it frees the block once.
#[test]
fn a_dead_receivers_message_is_taken_once() {
    bounded(4, || {
        let (world, parcel) = World::sent();
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.holders().take(parcel))
        };
        let here = world.holders().take(parcel);
        let there = other.join().unwrap();
        assert!(here != there);
        assert!(world.reuse_if_free());
    });
}
