//! The bump pointer of a chunk as one word: what is left, where it starts, how many were cut.
//!
//! A block is claimed by one compare-and-swap of this word, and everything that decides whether the
//! claim is right is in it. A thread that stalls between reading the word and the swap can
//! therefore do no harm, whatever became of the chunk meanwhile: if the word is the same again, so
//! is the room it describes.

/// Bytes of a granule: blocks start and end at multiples of it.
pub(super) const GRANULE: usize = crate::resource::DEFAULT_ALIGNMENT;
/// Granules that a chunk has fewer of.
pub(super) const MAX_GRANULES: usize = 1 << 24;

const LEFT_SHIFT: u32 = 40;
const OFFSET_SHIFT: u32 = 16;
const OFFSET_MASK: u64 = MAX_GRANULES as u64 - 1;
const REUSED: u64 = 1 << 15;
const COUNT_MASK: u64 = REUSED - 1;

/// 24 bits of granules left, 24 bits of the first free granule's index, whether this memory was used
/// before, 15 bits of blocks cut since they were last counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(pub u64);

/// Nothing is left: nothing can be cut. No open word is this, as granule 0 is the table's.
pub(super) const SHUT: Word = Word(0);

/// Keeps everything of a word but its count.
pub(super) const ROOM_MASK: u64 = !COUNT_MASK;

impl Word {
    /// Room from granule `offset` to granule `end`.
    pub(super) fn open(offset: usize, end: usize, reused: bool) -> Self {
        debug_assert!(0 < offset && offset <= end && end < MAX_GRANULES);
        let left = (end - offset) as u64;
        let reused = if reused { REUSED } else { 0 };
        Word(left << LEFT_SHIFT | (offset as u64) << OFFSET_SHIFT | reused)
    }

    /// The word once `granules` are cut from its front; `None` if they are not left, or if the
    /// count is full.
    #[inline]
    pub(super) fn cut(self, granules: usize) -> Option<Word> {
        let granules = granules as u64;
        if self.0 >> LEFT_SHIFT < granules || self.0 & COUNT_MASK == COUNT_MASK {
            return None;
        }
        Some(Word(
            self.0 - (granules << LEFT_SHIFT) + (granules << OFFSET_SHIFT) + 1,
        ))
    }

    #[inline]
    pub(super) fn offset(self) -> usize {
        (self.0 >> OFFSET_SHIFT & OFFSET_MASK) as usize
    }

    /// The granule behind the last one left.
    #[cfg(test)]
    fn end(self) -> usize {
        self.offset() + (self.0 >> LEFT_SHIFT) as usize
    }

    #[inline]
    pub(super) fn reused(self) -> bool {
        self.0 & REUSED != 0
    }

    #[inline]
    pub(super) fn count(self) -> u64 {
        self.0 & COUNT_MASK
    }

    /// The same room with nothing counted.
    pub(super) fn counted(self) -> Word {
        Word(self.0 & ROOM_MASK)
    }
}

#[cfg(test)]
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
