//! Which blocks of a chunk are live, and how large each is: one byte a granule, at the chunk's start.
//!
//! A block's first granule holds its length: 1 to 126 granules as they are, longer ones as 127 with
//! the length behind it in five digits of seven bits, whose top bit is set. So no byte inside a
//! block can be taken for a start, and an address is judged exactly.
//!
//! A table is wiped as the front comes near, not at once: a large chunk costs only what is used of
//! it. Invariant: among the bytes that are wiped, none behind the front says that a block starts.

use super::GRANULE;
use crate::sync::{AtomicU8, Ordering::Relaxed};

const LONG: u8 = 127;
const DIGITS: usize = 5;
const DIGIT: u8 = 0x80;

/// Granules of a chunk of `bytes` that its table takes.
pub(super) const fn table_granules(bytes: usize) -> usize {
    (bytes / GRANULE).div_ceil(GRANULE)
}

/// The table of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Table(*mut u8);

impl Table {
    /// The table of the chunk that starts at `base`.
    ///
    /// # Safety
    /// A live chunk starts there, whose first [`table_granules`] granules are nobody else's.
    pub(super) unsafe fn at(base: usize) -> Self {
        Table(base as *mut u8)
    }

    #[inline]
    fn byte(&self, granule: usize) -> &AtomicU8 {
        // SAFETY: the granule lies in the chunk, and the table has a byte for each.
        let byte = unsafe { self.0.add(granule) };
        // SAFETY: as above; the byte is only ever accessed as an atomic while blocks are cut.
        unsafe { AtomicU8::from_ptr(byte) }
    }

    /// Say that a live block of `granules` starts at `granule`. `Relaxed`: whoever frees the block
    /// got it from whoever cut it.
    #[inline]
    pub(super) fn set(&self, granule: usize, granules: usize) {
        if granules < LONG as usize {
            self.byte(granule).store(granules as u8, Relaxed);
        } else {
            self.set_long(granule, granules);
        }
    }

    #[cold]
    fn set_long(&self, granule: usize, granules: usize) {
        for digit in 0..DIGITS {
            let value = (granules >> (7 * digit) & 0x7f) as u8;
            self.byte(granule + 1 + digit).store(DIGIT | value, Relaxed);
        }
        self.byte(granule).store(LONG, Relaxed);
    }

    /// Granules of the live block that starts at `granule`; 0 if none does.
    #[inline]
    pub(super) fn get(&self, granule: usize) -> usize {
        match self.byte(granule).load(Relaxed) {
            LONG => {
                let digit = |place: usize| {
                    let value = self.byte(granule + 1 + place).load(Relaxed) & !DIGIT;
                    usize::from(value) << (7 * place)
                };
                (0..DIGITS).map(digit).sum()
            }
            short @ 1..LONG => usize::from(short),
            _ => 0,
        }
    }

    /// Say that no live block starts at `granule` any more.
    #[inline]
    pub(super) fn clear(&self, granule: usize) {
        self.byte(granule).store(0, Relaxed);
    }

    /// Say that no block starts in granules `from..to`.
    ///
    /// # Safety
    /// They lie in the chunk, and nothing was cut from them since they were last wiped.
    pub(super) unsafe fn wipe(&self, from: usize, to: usize) {
        // SAFETY: the granule lies in the chunk, and the table has a byte for each.
        let start = unsafe { self.0.add(from) };
        // SAFETY: the table's own bytes, which nobody else touches.
        unsafe { start.write_bytes(0, to - from) };
    }

    /// Live blocks that start in granules `from..to`, and their granules.
    pub(super) fn walk(&self, from: usize, to: usize) -> (u64, u64) {
        let (mut count, mut granules) = (0, 0);
        for granule in from..to {
            let length = self.get(granule);
            if length > 0 {
                count += 1;
                granules += length as u64;
            }
        }
        (count, granules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: usize = 1 << 20;

    fn fresh() -> (Vec<u8>, Table) {
        let mut memory = vec![0xffu8; BYTES / GRANULE];
        // SAFETY: the vector has a byte for each granule of such a chunk.
        let table = unsafe { Table::at(memory.as_mut_ptr() as usize) };
        // SAFETY: nobody cuts from this chunk.
        unsafe { table.wipe(0, BYTES / GRANULE) };
        (memory, table)
    }

    #[test]
    fn the_table_takes_one_granule_of_each_sixty_four() {
        assert_eq!(table_granules(4096), 1);
        assert_eq!(table_granules(BYTES), 256);
        assert_eq!(table_granules(65 * 4096), 65);
    }

    proptest! {
        #[test]
        fn every_length_is_read_back_and_no_inner_granule_is_a_start(
            lengths in proptest::collection::vec(1usize..3000, 1..5),
        ) {
            let (_memory, table) = fresh();
            let mut start = 0;
            for &length in &lengths {
                table.set(start, length);
                start += length;
            }
            let total: usize = lengths.iter().sum();
            prop_assert_eq!(table.walk(0, start), (lengths.len() as u64, total as u64));
            let mut start = 0;
            for &length in &lengths {
                prop_assert_eq!(table.get(start), length);
                prop_assert!((start + 1..start + length).all(|inner| table.get(inner) == 0));
                table.clear(start);
                start += length;
            }
            prop_assert_eq!(table.walk(0, start), (0, 0));
        }
    }
}
