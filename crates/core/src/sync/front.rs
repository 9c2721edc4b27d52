//! The front of a chunk: where blocks are cut from it, without a lock.
//!
//! What is left, where it starts and how many blocks were cut are one word, and a block is claimed by
//! one compare-and-swap of it. Everything that decides whether a claim is right is in the word, so a
//! thread that stalls between reading it and the swap does no harm, whatever became of the chunk
//! meanwhile: if the word is the same again, so is the room it describes.

use super::{AtomicU64, AtomicUsize, Ordering};

/// Granules that a chunk has fewer of.
pub const MAX_GRANULES: usize = 1 << 24;

const LEFT_SHIFT: u32 = 40;
const OFFSET_SHIFT: u32 = 16;
const OFFSET_MASK: u64 = MAX_GRANULES as u64 - 1;
const REUSED: u64 = 1 << 15;
const COUNT_MASK: u64 = REUSED - 1;

/// 24 bits of granules left, 24 bits of the first free granule's index, whether this memory was used
/// before, 15 bits of blocks cut since they were last counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(u64);

/// Nothing is left: nothing can be cut. No open word is this, as no room starts at granule 0.
pub const SHUT: Word = Word(0);

impl Word {
    /// Room from granule `offset`, at least 1, to granule `end`.
    pub fn open(offset: usize, end: usize, reused: bool) -> Self {
        debug_assert!(0 < offset && offset <= end && end < MAX_GRANULES);
        let left = (end - offset) as u64;
        let reused = if reused { REUSED } else { 0 };
        Word(left << LEFT_SHIFT | (offset as u64) << OFFSET_SHIFT | reused)
    }

    /// The word once `granules` are cut from its front; `None` if they are not left, or if the
    /// count is full.
    #[inline]
    fn cut(self, granules: usize) -> Option<Word> {
        let granules = granules as u64;
        if self.0 >> LEFT_SHIFT < granules || self.0 & COUNT_MASK == COUNT_MASK {
            return None;
        }
        Some(Word(
            self.0 - (granules << LEFT_SHIFT) + (granules << OFFSET_SHIFT) + 1,
        ))
    }

    /// The first granule that is left.
    #[inline]
    pub fn offset(self) -> usize {
        (self.0 >> OFFSET_SHIFT & OFFSET_MASK) as usize
    }

    /// The granule behind the last one left.
    #[cfg(test)]
    fn end(self) -> usize {
        self.offset() + (self.0 >> LEFT_SHIFT) as usize
    }

    /// Whether this room was used before.
    #[inline]
    pub fn reused(self) -> bool {
        self.0 & REUSED != 0
    }

    /// Blocks cut since they were last counted.
    #[inline]
    pub fn count(self) -> u64 {
        self.0 & COUNT_MASK
    }

    /// The same room with nothing counted.
    pub fn counted(self) -> Word {
        Word(self.0 & !COUNT_MASK)
    }
}

/// A block that was claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Where the chunk starts.
    pub base: usize,
    /// The block's first granule.
    pub granule: usize,
    /// Whether its memory was used before.
    pub reused: bool,
}

/// The front of a chunk.
///
/// Any number of threads may claim. Everything else is for whoever holds the lock of the chunk's
/// owner, and the base changes only while the front is shut and nothing claimed is alive.
pub struct Front {
    /// Stored with `Release` after `base`; swapped with `Acquire` before `base` is read.
    word: AtomicU64,
    /// `Relaxed`: ordered by `word`.
    base: AtomicUsize,
}

impl Default for Front {
    fn default() -> Self {
        Self::new()
    }
}

impl Front {
    /// A front that is shut.
    #[cfg(not(loom))]
    pub const fn new() -> Self {
        Front {
            word: AtomicU64::new(SHUT.0),
            base: AtomicUsize::new(0),
        }
    }

    /// A front that is shut.
    #[cfg(loom)]
    pub fn new() -> Self {
        Front {
            word: AtomicU64::new(SHUT.0),
            base: AtomicUsize::new(0),
        }
    }

    /// Claim `granules`; `None` if they are not left, or if the count is full.
    #[inline]
    pub fn claim(&self, granules: usize) -> Option<Claim> {
        let mut word = Word(self.word.load(Ordering::Relaxed));
        loop {
            let after = word.cut(granules)?;
            let swapped = self.word.compare_exchange_weak(
                word.0,
                after.0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => break,
                Err(seen) => word = Word(seen),
            }
        }
        // The claim is alive, so the front stays about this chunk.
        Some(Claim {
            base: self.base.load(Ordering::Relaxed),
            granule: word.offset(),
            reused: word.reused(),
        })
    }

    /// Be about the chunk at `base`, with `room` to cut from.
    pub fn bind(&self, base: usize, room: Word) {
        self.base.store(base, Ordering::Relaxed);
        self.open(room);
    }

    /// Let blocks be cut from `room`.
    #[inline]
    pub fn open(&self, room: Word) {
        self.word.store(room.0, Ordering::Release);
    }

    /// Let no block be cut; returns the room and the count.
    #[inline]
    pub fn shut(&self) -> Word {
        Word(self.word.swap(SHUT.0, Ordering::AcqRel))
    }

    /// The room and the count now.
    #[inline]
    pub fn look(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    /// Start counting anew; returns the room and the count so far.
    #[inline]
    pub fn take_count(&self) -> Word {
        Word(self.word.fetch_and(!COUNT_MASK, Ordering::AcqRel))
    }

    /// Open another room unless something was cut since `word` was seen; whether it was opened.
    #[inline]
    pub fn replace(&self, word: Word, room: Word) -> bool {
        self.word
            .compare_exchange(word.0, room.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_word_gives_what_it_has_and_no_more() {
        let word = Word::open(16, 20, true);
        let after = word.cut(3).unwrap();
        assert_eq!((after.offset(), after.end(), after.count()), (19, 20, 1));
        assert!(after.reused());
        assert_eq!(after.cut(2), None);
        assert_eq!(after.cut(1).unwrap().cut(1), None);
        assert_eq!(SHUT.cut(1), None);
    }

    #[test]
    fn a_full_count_is_refused_rather_than_carried() {
        let mut word = Word::open(1, MAX_GRANULES - 1, false);
        let mut count = 0;
        while let Some(next) = word.cut(1) {
            (word, count) = (next, count + 1);
        }
        assert_eq!(count, COUNT_MASK);
        assert!(!word.reused());
        assert_eq!(word.counted().cut(1).unwrap().offset(), word.offset() + 1);
    }

    #[test]
    fn the_largest_chunk_fits() {
        let word = Word::open(1, MAX_GRANULES - 1, true);
        let after = word.cut(MAX_GRANULES - 2).unwrap();
        assert_eq!(
            (after.offset(), after.end()),
            (MAX_GRANULES - 1, MAX_GRANULES - 1)
        );
        assert_eq!(after.cut(1), None);
    }
}
