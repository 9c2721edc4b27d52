//! A run: 64 KiB cut into equal blocks, with its bookkeeping beside it, not inside it.

use super::classes::{RUN_BYTES, block_alignment};
use crate::os::{self, PAGE_BYTES};
use std::ptr::NonNull;

const WORDS: usize = RUN_BYTES / 64 / 64;
const PAGES: usize = RUN_BYTES / PAGE_BYTES;

/// One run of a class. Invariant: `free_count` is the number of bits set in `free`.
pub(super) struct Run {
    pub base: NonNull<u8>,
    /// First block; behind the colour that spreads the runs of a class over the cache's sets.
    first: usize,
    class: usize,
    block_bytes: usize,
    capacity: usize,
    pub free_count: usize,
    free: [u64; WORDS],
    /// Blocks whose memory is new or was given back: handing one out is a miss.
    fresh: [u64; WORDS],
    /// Pages given back to the kernel while the run was partly free.
    purged: u16,
    /// The background tick at which a block last came or went.
    pub touched: u64,
    /// Place in the class's list of runs, and in its list of runs with free blocks.
    pub index: usize,
    pub partial_index: Option<usize>,
    /// Stays when it is empty, and keeps its pages when it rests; until the slab is trimmed.
    pub kept: bool,
}

impl Run {
    pub(super) fn new(base: NonNull<u8>, class: usize, block_bytes: usize, colour: usize) -> Self {
        let capacity = RUN_BYTES / block_bytes;
        let spare = RUN_BYTES - capacity * block_bytes;
        // A colour keeps the class's alignment, as far as the spare room goes.
        let step = block_alignment(block_bytes);
        let offset = (colour % (spare / step + 1)) * step;
        let mut bits = [0u64; WORDS];
        for index in 0..capacity {
            bits[index / 64] |= 1 << (index % 64);
        }
        Run {
            base,
            first: base.as_ptr() as usize + offset,
            class,
            block_bytes,
            capacity,
            free_count: capacity,
            free: bits,
            fresh: bits,
            purged: 0,
            touched: 0,
            index: 0,
            partial_index: None,
            kept: false,
        }
    }

    pub(super) fn class(&self) -> usize {
        self.class
    }

    /// Have every page in memory before it is needed: no block is fresh then. None is out.
    pub(super) fn warm(&mut self) {
        debug_assert!(self.is_empty());
        // SAFETY: the run is page-aligned memory of upstream's, drawn for this run, with no block
        // out of it.
        unsafe { os::locked::prefault(self.base, RUN_BYTES) };
        self.fresh = [0; WORDS];
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free_count == self.capacity
    }

    pub(super) fn used_count(&self) -> usize {
        self.capacity - self.free_count
    }

    fn address(&self, index: usize) -> *mut u8 {
        (self.first + index * self.block_bytes) as *mut u8
    }

    /// The block that starts at `address`, if one does.
    pub(super) fn index_of(&self, address: usize) -> Option<usize> {
        let offset = address.checked_sub(self.first)?;
        let size = self.block_bytes;
        (offset % size == 0 && offset / size < self.capacity).then(|| offset / size)
    }

    /// Whether `address` is a block of this run that is out of it.
    pub(super) fn is_used(&self, address: usize) -> bool {
        self.index_of(address)
            .is_some_and(|index| self.free[index / 64] & (1 << (index % 64)) == 0)
    }

    /// Move up to `wanted` free blocks to `out`: fresh ones first, used ones on top of them.
    ///
    /// Used ones are preferred; returns how many of the blocks are fresh.
    pub(super) fn take(&mut self, out: &mut [*mut u8], wanted: usize) -> usize {
        let wanted = wanted.min(self.free_count).min(out.len());
        let used_free: usize = (0..WORDS)
            .map(|w| (self.free[w] & !self.fresh[w]).count_ones() as usize)
            .sum();
        let fresh_wanted = wanted.saturating_sub(used_free);
        let mut taken = 0;
        for fresh in [true, false] {
            let until = if fresh { fresh_wanted } else { wanted };
            for word in 0..WORDS {
                while taken < until {
                    let mask = if fresh {
                        self.fresh[word]
                    } else {
                        !self.fresh[word]
                    };
                    let candidates = self.free[word] & mask;
                    if candidates == 0 {
                        break;
                    }
                    let bit = candidates.trailing_zeros() as usize;
                    self.free[word] &= !(1 << bit);
                    out[taken] = self.address(word * 64 + bit);
                    taken += 1;
                }
            }
        }
        debug_assert_eq!(taken, wanted);
        for address in &out[..fresh_wanted] {
            let index = self
                .index_of(*address as usize)
                .expect("one of this run's blocks");
            self.fresh[index / 64] &= !(1 << (index % 64));
            self.unpurge(index);
        }
        self.free_count -= wanted;
        fresh_wanted
    }

    fn pages_of(&self, index: usize) -> std::ops::RangeInclusive<usize> {
        let start = self.first + index * self.block_bytes - self.base.as_ptr() as usize;
        start / PAGE_BYTES..=(start + self.block_bytes - 1) / PAGE_BYTES
    }

    fn unpurge(&mut self, index: usize) {
        for page in self.pages_of(index) {
            self.purged &= !(1 << page);
        }
    }

    /// Take a block back; false if it is no block of this run or is free already.
    pub(super) fn put(&mut self, address: usize) -> bool {
        let Some(index) = self.index_of(address) else {
            return false;
        };
        let (word, bit) = (index / 64, 1u64 << (index % 64));
        if self.free[word] & bit != 0 {
            return false;
        }
        self.free[word] |= bit;
        self.free_count += 1;
        true
    }

    /// Give the pages on which every block is free back to the kernel; returns their bytes.
    pub(super) fn purge(&mut self) -> usize {
        let mut needed: u16 = 0;
        for index in 0..self.capacity {
            if self.free[index / 64] & (1 << (index % 64)) == 0 {
                for page in self.pages_of(index) {
                    needed |= 1 << page;
                }
            }
        }
        let mut given = 0;
        for page in 0..PAGES {
            let bit = 1u16 << page;
            if (needed | self.purged) & bit != 0 {
                continue;
            }
            // SAFETY: `page < PAGES`, so the page lies in the run.
            let start = unsafe { self.base.add(page * PAGE_BYTES) };
            // SAFETY: the page is private anonymous memory of upstream's, drawn for this run, and
            // every block on it is free.
            if !unsafe { os::decommit(start, PAGE_BYTES) } {
                return given;
            }
            self.purged |= bit;
            given += PAGE_BYTES;
        }
        for index in 0..self.capacity {
            let gone = self
                .pages_of(index)
                .all(|page| self.purged & (1 << page) != 0);
            if gone {
                self.fresh[index / 64] |= 1 << (index % 64);
            }
        }
        given
    }

    /// Bytes of the run that were given back while it was partly free.
    pub(super) fn purged_bytes(&self) -> usize {
        self.purged.count_ones() as usize * PAGE_BYTES
    }

    /// Whether the bits agree with the count.
    pub(super) fn counts_agree(&self) -> bool {
        let bits: u32 = self.free.iter().map(|word| word.count_ones()).sum();
        bits as usize == self.free_count
    }
}

#[cfg(test)]
mod tests {
    use super::super::classes::MAX_BLOCK_BYTES;
    use super::*;
    use crate::os::libc_allocate;

    #[test]
    fn a_block_goes_out_once_and_comes_back_once() {
        for block_bytes in (64..=MAX_BLOCK_BYTES).step_by(64) {
            let base = libc_allocate(RUN_BYTES, RUN_BYTES).unwrap();
            let mut run = Run::new(base, 0, block_bytes, 3);
            let mut out = vec![std::ptr::null_mut(); 2000];
            let all = RUN_BYTES / block_bytes;
            assert_eq!(run.take(&mut out, 5000), all);
            assert_eq!(run.free_count, 0);
            let mut addresses: Vec<usize> = out[..all].iter().map(|a| *a as usize).collect();
            addresses.sort_unstable();
            assert!(
                addresses
                    .windows(2)
                    .all(|pair| pair[1] - pair[0] >= block_bytes)
            );
            assert!(addresses[0] >= base.as_ptr() as usize);
            assert!(addresses[all - 1] + block_bytes <= base.as_ptr() as usize + RUN_BYTES);
            assert!(run.put(addresses[0]));
            assert!(!run.put(addresses[0]), "a double free is seen");
            assert!(!run.put(addresses[0] + 1), "an inner address is no block");
            assert_eq!(
                run.take(&mut out, 1),
                0,
                "a block that was used is not fresh"
            );
            assert!(run.counts_agree());
            // SAFETY: allocated above.
            unsafe { os::libc_deallocate(base) };
        }
    }

    #[test]
    fn purging_keeps_pages_with_live_blocks() {
        let base = libc_allocate(RUN_BYTES, RUN_BYTES).unwrap();
        let mut run = Run::new(base, 0, 1024, 0);
        let mut out = vec![std::ptr::null_mut(); 64];
        run.take(&mut out, 64);
        for (index, address) in out.iter().enumerate() {
            // SAFETY: a live block of 1 KiB.
            unsafe { address.write_bytes(7, 1024) };
            if index != 10 {
                assert!(run.put(*address as usize));
            }
        }
        assert_eq!(run.purge(), RUN_BYTES - PAGE_BYTES);
        assert_eq!(run.purge(), 0, "what is gone is not given back twice");
        // SAFETY: block 10 is live.
        assert_eq!(unsafe { out[10].read() }, 7);
        let fresh = run.take(&mut out[..4], 4);
        assert_eq!(
            fresh, 1,
            "the three free blocks beside the live one were kept"
        );
        // SAFETY: allocated above.
        unsafe { os::libc_deallocate(base) };
    }
}
