//! Two-level segregated fit: which granules are free, found and merged in bounded time.
//!
//! Source: Masmano, Ripoll, Crespo, Real, "TLSF: a New Dynamic Memory Allocator for Real-Time
//! Systems" (2004). Unlike there, nothing lies in the blocks: each granule has a tag beside the
//! memory, so that writing past a block's end hurts no list, and a free of what is no block is seen.
//!
//! Sizes and positions are in granules. Plain data; the caller has the lock.

/// Sizes in a doubling that have lists of their own.
const STEPS: usize = 16;
const STEPS_LOG: u32 = STEPS.ilog2();
/// Doublings: the first holds the sizes below [`STEPS`], one list each.
const DOUBLINGS: usize = (MAX_GRANULES.ilog2() - STEPS_LOG + 2) as usize;
/// The most granules there may be.
pub(crate) const MAX_GRANULES: u32 = SIZE;
/// Blocks looked at in the list of sizes of which only some suffice, before giving up.
const LOOKS: usize = 32;

const START: u32 = 1 << 31;
const USED: u32 = 1 << 30;
const SIZE: u32 = USED - 1;
const NONE: u32 = u32::MAX;

/// What is known of a granule.
///
/// The first granule of a block has `START`, the block's size and whether it is `USED`; the last
/// (if it is another) the size alone. What other granules have means nothing, but never `START`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Tag {
    word: u32,
    /// First granule of a free block: neighbours in its list, or `NONE`.
    next: u32,
    previous: u32,
}

/// The lists, and how much is free.
///
/// Invariants, checked by `check`: the blocks tile the tags, no two neighbours are both free, each
/// free block is in the list of its size and in no other, a bit is set where a list is not empty.
pub(crate) struct Tlsf {
    doublings: u32,
    steps: [u16; DOUBLINGS],
    heads: [[u32; STEPS]; DOUBLINGS],
    free: u32,
}

/// The list that holds free blocks of `size`.
fn list_of(size: u32) -> (usize, usize) {
    if size < STEPS as u32 {
        return (0, size as usize);
    }
    let log = size.ilog2();
    let step = (size >> (log - STEPS_LOG)) as usize - STEPS;
    ((log - STEPS_LOG + 1) as usize, step)
}

/// The first list of which every block has at least `size`; `None` if there is none so large.
fn list_from(size: u32) -> Option<(usize, usize)> {
    if size < STEPS as u32 {
        return Some((0, size as usize));
    }
    let rounded = size + (1 << (size.ilog2() - STEPS_LOG)) - 1;
    (rounded <= SIZE).then(|| list_of(rounded))
}

impl Tlsf {
    /// Lists for as many granules as there are tags, all free, in one block.
    pub(crate) fn new(tags: &mut [Tag]) -> Self {
        let mut lists = Tlsf {
            doublings: 0,
            steps: [0; DOUBLINGS],
            heads: [[NONE; STEPS]; DOUBLINGS],
            free: 0,
        };
        tags.fill(Tag::default());
        lists.insert(tags, 0, tags.len() as u32);
        lists
    }

    /// Granules that are free.
    pub(crate) fn free(&self) -> u32 {
        self.free
    }

    /// Take `size` granules from a multiple of `alignment`; returns the first.
    pub(crate) fn take(&mut self, tags: &mut [Tag], size: u32, alignment: u32) -> Option<u32> {
        if size > self.free {
            return None;
        }
        let block = self.find(tags, size, alignment)?;
        let block_size = tags[block as usize].word & SIZE;
        self.remove(tags, block);
        let first = block.next_multiple_of(alignment);
        if first > block {
            self.insert(tags, block, first - block);
        }
        let end = block + block_size;
        if first + size < end {
            self.insert(tags, first + size, end - first - size);
        }
        mark(tags, first, size, USED);
        Some(first)
    }

    /// Free the block that starts at `first`; returns its size, or `None` if no used one does.
    pub(crate) fn give_back(&mut self, tags: &mut [Tag], first: u32) -> Option<u32> {
        let size = used_size(tags, first)?;
        let (mut start, mut end) = (first, first + size);
        tags[first as usize].word = 0;
        if let Some(next) = tags.get(end as usize)
            && next.word & USED == 0
        {
            let next_size = next.word & SIZE;
            self.remove(tags, end);
            tags[end as usize].word = 0;
            end += next_size;
        }
        if start > 0 {
            let before = tags[start as usize - 1].word;
            let previous = start - (before & SIZE);
            if tags[previous as usize].word & USED == 0 {
                self.remove(tags, previous);
                start = previous;
            }
        }
        self.insert(tags, start, end - start);
        Some(size)
    }

    /// A free block that holds `size` granules from a multiple of `alignment`.
    fn find(&self, tags: &[Tag], size: u32, alignment: u32) -> Option<u32> {
        let padded = size.checked_add(alignment - 1)?;
        if let Some((doubling, step)) = list_from(padded)
            && let Some(block) = self.first_from(doubling, step)
        {
            return Some(block);
        }
        // In the lists below some blocks may suffice, by their size or where they lie.
        let lists = [list_of(padded.min(SIZE)), list_of(size)];
        lists.into_iter().find_map(|(doubling, step)| {
            let mut block = self.heads[doubling][step];
            for _ in 0..LOOKS {
                let tag = tags.get(block as usize)?;
                let end = block + (tag.word & SIZE);
                if block.next_multiple_of(alignment) + size <= end {
                    return Some(block);
                }
                block = tag.next;
            }
            None
        })
    }

    /// The first block of the first list that is not empty, from a list on.
    fn first_from(&self, doubling: usize, step: usize) -> Option<u32> {
        let here = self.steps[doubling] & (u16::MAX << step);
        let (doubling, steps) = if here != 0 {
            (doubling, here)
        } else {
            let above = self.doublings & u32::MAX.checked_shl(doubling as u32 + 1).unwrap_or(0);
            let doubling = above.trailing_zeros() as usize;
            (doubling, *self.steps.get(doubling)?)
        };
        Some(self.heads[doubling][steps.trailing_zeros() as usize])
    }

    fn insert(&mut self, tags: &mut [Tag], first: u32, size: u32) {
        let (doubling, step) = list_of(size);
        let head = std::mem::replace(&mut self.heads[doubling][step], first);
        mark(tags, first, size, 0);
        let tag = &mut tags[first as usize];
        tag.next = head;
        tag.previous = NONE;
        if let Some(tag) = tags.get_mut(head as usize) {
            tag.previous = first;
        }
        self.steps[doubling] |= 1 << step;
        self.doublings |= 1 << doubling;
        self.free += size;
    }

    fn remove(&mut self, tags: &mut [Tag], first: u32) {
        let Tag {
            word,
            next,
            previous,
        } = tags[first as usize];
        let size = word & SIZE;
        if let Some(tag) = tags.get_mut(next as usize) {
            tag.previous = previous;
        }
        if let Some(tag) = tags.get_mut(previous as usize) {
            tag.next = next;
        } else {
            let (doubling, step) = list_of(size);
            self.heads[doubling][step] = next;
            if next == NONE {
                self.steps[doubling] &= !(1 << step);
                if self.steps[doubling] == 0 {
                    self.doublings &= !(1 << doubling);
                }
            }
        }
        self.free -= size;
    }

    /// What breaks an invariant, a sentence each; and (used blocks, used granules).
    pub(crate) fn check(&self, tags: &[Tag]) -> (Vec<String>, (u64, u64)) {
        let mut findings = Vec::new();
        let (mut used_count, mut used, mut free, mut free_count) = (0, 0, 0, 0);
        let mut at = 0;
        let mut after_free = false;
        while let Some(tag) = tags.get(at as usize) {
            let size = tag.word & SIZE;
            let end = at as usize + size as usize;
            if tag.word & START == 0 || size == 0 || end > tags.len() {
                findings.push(format!("no block starts at granule {at}"));
                return (findings, (used_count, used));
            }
            if size > 1 && tags[end - 1].word != size {
                findings.push(format!(
                    "the block at granule {at} has another size at its end"
                ));
            }
            if tags[at as usize + 1..end]
                .iter()
                .any(|tag| tag.word & START != 0)
            {
                findings.push(format!("a block starts inside the one at granule {at}"));
            }
            if tag.word & USED != 0 {
                used_count += 1;
                used += u64::from(size);
            } else {
                free += size;
                free_count += 1;
                if after_free {
                    findings.push(format!("two free neighbours at granule {at}"));
                }
            }
            after_free = tag.word & USED == 0;
            at = end as u32;
        }
        if free != self.free {
            findings.push(format!(
                "{} granules are counted as free, {free} found",
                self.free
            ));
        }
        let listed = self.check_lists(tags, free_count, &mut findings);
        if listed != free_count {
            findings.push(format!(
                "{free_count} free blocks were found, {listed} are listed"
            ));
        }
        (findings, (used_count, used))
    }

    /// How many free blocks are listed; stops at more than there are.
    fn check_lists(&self, tags: &[Tag], most: usize, findings: &mut Vec<String>) -> usize {
        let mut listed = 0;
        for doubling in 0..DOUBLINGS {
            for step in 0..STEPS {
                let (mut at, mut before) = (self.heads[doubling][step], NONE);
                let bit = self.steps[doubling] & (1 << step) != 0;
                if bit != (at != NONE) || (bit && self.doublings & (1 << doubling) == 0) {
                    findings.push(format!("the bit of list {doubling}.{step} is wrong"));
                }
                while let Some(tag) = tags.get(at as usize) {
                    let own = tag.word & START != 0
                        && tag.word & USED == 0
                        && list_of(tag.word & SIZE) == (doubling, step)
                        && tag.previous == before;
                    if !own || listed > most {
                        findings.push(format!("list {doubling}.{step} is broken at granule {at}"));
                        break;
                    }
                    listed += 1;
                    (before, at) = (at, tag.next);
                }
            }
        }
        listed
    }
}

/// Write a block's size to its ends.
fn mark(tags: &mut [Tag], first: u32, size: u32, state: u32) {
    tags[(first + size) as usize - 1].word = size;
    tags[first as usize].word = START | state | size;
}

/// Size of the used block that starts at `first`.
pub(crate) fn used_size(tags: &[Tag], first: u32) -> Option<u32> {
    let word = tags.get(first as usize)?.word;
    (word & (START | USED) == START | USED).then_some(word & SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sound(lists: &Tlsf, tags: &[Tag]) {
        assert_eq!(lists.check(tags).0, Vec::<String>::new());
    }

    #[test]
    fn each_size_is_in_the_list_that_says_so() {
        for size in (1..70_000).chain([SIZE - 1, SIZE]) {
            let (doubling, step) = list_of(size);
            assert!(doubling < DOUBLINGS && step < STEPS, "{size}");
            assert!(size == 1 || list_of(size - 1) <= (doubling, step));
            if let Some(from) = list_from(size) {
                assert!(from >= (doubling, step));
                assert!(
                    size == 1 || list_of(size - 1) < from,
                    "{size}: too small ones are in it"
                );
            }
        }
    }

    #[test]
    fn all_of_it_can_be_taken_at_once_and_again() {
        for count in [1, 2, 15, 16, 17, 1000, 65_537] {
            let mut tags = vec![Tag::default(); count as usize];
            let mut lists = Tlsf::new(&mut tags);
            for _ in 0..2 {
                assert_eq!(lists.take(&mut tags, count, 1), Some(0));
                assert_eq!(lists.take(&mut tags, 1, 1), None);
                sound(&lists, &tags);
                assert_eq!(lists.give_back(&mut tags, 0), Some(count));
                assert_eq!(lists.give_back(&mut tags, 0), None, "a second free is seen");
                sound(&lists, &tags);
            }
        }
    }

    #[test]
    fn an_aligned_block_may_fill_the_whole() {
        let mut tags = vec![Tag::default(); 1024];
        let mut lists = Tlsf::new(&mut tags);
        assert_eq!(lists.take(&mut tags, 1024, 1024), Some(0));
    }

    #[test]
    fn what_is_no_block_is_not_freed() {
        let mut tags = vec![Tag::default(); 100];
        let mut lists = Tlsf::new(&mut tags);
        let first = lists.take(&mut tags, 10, 1).unwrap();
        for wrong in [first + 1, first + 9, first + 10, 99, 100, u32::MAX] {
            assert_eq!(lists.give_back(&mut tags, wrong), None);
        }
        sound(&lists, &tags);
    }

    proptest! {
        #[test]
        fn blocks_are_apart_aligned_and_found_while_there_is_room(
            steps in prop::collection::vec((any::<bool>(), 1u32..300, 0u32..6, any::<usize>()), 1..200),
        ) {
            let mut tags = vec![Tag::default(); 2000];
            let mut lists = Tlsf::new(&mut tags);
            let mut live: Vec<(u32, u32)> = Vec::new();
            for (take, size, log, which) in steps {
                let alignment = 1 << log;
                if take {
                    if let Some(first) = lists.take(&mut tags, size, alignment) {
                        prop_assert_eq!(first % alignment, 0);
                        prop_assert!(first + size <= 2000);
                        let apart = |other: &(u32, u32)| {
                            first + size <= other.0 || other.0 + other.1 <= first
                        };
                        prop_assert!(live.iter().all(apart));
                        live.push((first, size));
                    } else {
                        // Good fit: no hole has room for the size rounded up to its list.
                        live.sort_unstable();
                        let ends = live.iter().map(|block| block.0 + block.1);
                        let starts = live.iter().map(|block| block.0).chain([2000]);
                        let hole = std::iter::once(0).chain(ends).zip(starts).map(|(a, b)| b - a).max();
                        prop_assert!(hole.unwrap() < (size + alignment) + (size + alignment) / 8);
                    }
                } else if !live.is_empty() {
                    let (first, size) = live.swap_remove(which % live.len());
                    prop_assert_eq!(lists.give_back(&mut tags, first), Some(size));
                }
                let used: u32 = live.iter().map(|block| block.1).sum();
                let (findings, (count, granules)) = lists.check(&tags);
                prop_assert_eq!(findings, Vec::<String>::new());
                prop_assert_eq!((count, granules), (live.len() as u64, u64::from(used)));
                prop_assert_eq!(lists.free(), 2000 - used);
            }
            for (first, _) in live {
                lists.give_back(&mut tags, first);
            }
            prop_assert_eq!(lists.take(&mut tags, 2000, 1), Some(0), "everything merged again");
        }
    }
}
