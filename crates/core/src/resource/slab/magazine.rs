//! Magazines: full or empty racks of blocks that a thread takes from and puts back to without a
//! lock, and exchanges with the depot when both of its own run out.
//!
//! A magazine gets its room when it is exchanged, never while it has blocks: a class's capacity may
//! change at any time, and each thread takes it over at its next exchange. Source: Bonwick and Adams,
//! "Magazines and Vmem" (2001), §3. Left out: growing magazines by contention; who tunes a slab says.

use super::classes::CLASS_COUNT;
use crate::sync::{AtomicU64, Ordering::Relaxed};

/// A rack of free blocks. Invariant: `fresh <= count <= rounds`; rounds below `fresh` are blocks
/// that were never used before.
pub(super) struct Magazine {
    pub count: u32,
    pub fresh: u32,
    pub rounds: Box<[*mut u8]>,
}

impl Magazine {
    /// A magazine that has room for `rounds` blocks; none is legal.
    pub(super) fn empty(rounds: usize) -> Self {
        let rounds = vec![std::ptr::null_mut(); rounds].into_boxed_slice();
        Magazine {
            count: 0,
            fresh: 0,
            rounds,
        }
    }

    /// Have room for exactly `rounds` blocks; there is none in it.
    pub(super) fn make_room(&mut self, rounds: usize) {
        debug_assert_eq!(self.count, 0);
        if self.rounds.len() != rounds {
            *self = Magazine::empty(rounds);
        }
    }

    /// The blocks in it.
    pub(super) fn blocks(&self) -> impl Iterator<Item = *mut u8> {
        self.rounds[..self.count as usize].iter().copied()
    }

    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.count as usize == self.rounds.len()
    }
}

/// A thread's two magazines of one class; without room until the class is used.
pub(super) struct Pair {
    pub loaded: Magazine,
    pub previous: Magazine,
}

/// What passed through a thread's magazines of one class.
///
/// Written by the owning thread only, read by reports: `Relaxed` loads and stores suffice.
#[derive(Default)]
pub(super) struct Counts {
    pub allocated: AtomicU64,
    pub freed: AtomicU64,
    pub misses: AtomicU64,
}

/// Add to a counter that only the calling thread writes.
#[inline]
pub(super) fn bump(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

impl Pair {
    /// A block and whether it was used before; `None` if both magazines are empty.
    #[inline]
    pub(super) fn pop(&mut self, counts: &Counts) -> Option<(*mut u8, bool)> {
        if self.loaded.count == 0 {
            if self.previous.count == 0 {
                return None;
            }
            std::mem::swap(&mut self.loaded, &mut self.previous);
        }
        let magazine = &mut self.loaded;
        magazine.count -= 1;
        let index = magazine.count;
        let address = magazine.rounds[index as usize];
        bump(&counts.allocated);
        let reused = index >= magazine.fresh;
        if !reused {
            magazine.fresh = index;
            bump(&counts.misses);
        }
        Some((address, reused))
    }

    /// Put a block back; false if both magazines are full.
    #[inline]
    pub(super) fn push(&mut self, counts: &Counts, address: *mut u8) -> bool {
        if self.loaded.is_full() {
            if self.previous.is_full() {
                return false;
            }
            std::mem::swap(&mut self.loaded, &mut self.previous);
        }
        let magazine = &mut self.loaded;
        magazine.rounds[magazine.count as usize] = address;
        magazine.count += 1;
        bump(&counts.freed);
        true
    }
}

/// A thread's magazines for one slab. Only that thread touches `pairs`; others read `counts`.
pub(super) struct ThreadCache {
    pub pairs: [Pair; CLASS_COUNT],
    pub counts: [Counts; CLASS_COUNT],
}

impl ThreadCache {
    pub(super) fn new() -> Box<Self> {
        Box::new(ThreadCache {
            pairs: std::array::from_fn(|_| Pair {
                loaded: Magazine::empty(0),
                previous: Magazine::empty(0),
            }),
            counts: std::array::from_fn(|_| Counts::default()),
        })
    }
}
