//! The depot: a class's full and empty magazines, which threads exchange whole.
//!
//! Guarded by the class's lock. Blocks in it are out of their runs, and not handed out.

use super::magazine::Magazine;

/// Full magazines a depot keeps before blocks go back to their runs, and empty ones before they
/// are freed.
const MAGAZINES: usize = 8;

/// Full and empty magazines. Invariant: those in `full` have blocks, those in `empty` have none.
pub(super) struct Depot {
    full: Vec<Magazine>,
    empty: Vec<Magazine>,
    /// Fewest full magazines since the last look: that many were not needed.
    low_water: usize,
}

impl Depot {
    pub(super) fn new() -> Self {
        Depot {
            full: Vec::new(),
            empty: Vec::new(),
            low_water: 0,
        }
    }

    /// Exchange an empty magazine for one with blocks; false if there is none.
    ///
    /// `rounds` is what magazines of the class should hold, here and below.
    pub(super) fn fill(&mut self, magazine: &mut Magazine, rounds: usize) -> bool {
        debug_assert_eq!(magazine.count, 0);
        let Some(full) = self.full.pop() else {
            return false;
        };
        self.low_water = self.low_water.min(self.full.len());
        self.keep(std::mem::replace(magazine, full), rounds);
        true
    }

    /// Exchange a full magazine for an empty one. What is too many then comes back, the oldest.
    pub(super) fn unload(&mut self, magazine: &mut Magazine, rounds: usize) -> Option<Magazine> {
        debug_assert!(magazine.is_full());
        let mut empty = self.empty.pop().unwrap_or_else(|| Magazine::empty(rounds));
        empty.make_room(rounds);
        let full = std::mem::replace(magazine, empty);
        if full.count == 0 {
            // It had no room: a thread's magazines start so.
            return None;
        }
        self.full.push(full);
        (self.full.len() > MAGAZINES).then(|| self.full.remove(0))
    }

    /// Keep a magazine that has no blocks, unless it is of another size than new ones.
    pub(super) fn keep(&mut self, magazine: Magazine, rounds: usize) {
        debug_assert_eq!(magazine.count, 0);
        if self.empty.len() < MAGAZINES && magazine.rounds.len() == rounds {
            self.empty.push(magazine);
        }
    }

    /// Magazines that nobody needed since the last call, the oldest first; or all.
    pub(super) fn unneeded(&mut self, everything: bool) -> Vec<Magazine> {
        let count = if everything {
            self.full.len()
        } else {
            self.low_water
        };
        let unneeded = self.full.drain(..count).collect();
        self.low_water = self.full.len();
        unneeded
    }

    /// Every block in it.
    pub(super) fn blocks(&self) -> impl Iterator<Item = *mut u8> {
        self.full.iter().flat_map(Magazine::blocks)
    }

    pub(super) fn has_blocks(&self) -> bool {
        !self.full.is_empty()
    }
}
