//! The size classes: steps of 64 bytes to 1 KiB, then four to a doubling.

/// Bytes of a run: the unit that the slab draws from upstream, and its alignment.
pub(super) const RUN_BYTES: usize = 64 * 1024;
/// The largest block a slab serves; what is larger goes upstream.
pub const MAX_BLOCK_BYTES: usize = 16 * 1024;
const STEP: usize = 64;
const LINEAR_MAX: usize = 1024;
const LINEAR_COUNT: usize = LINEAR_MAX / STEP;
/// Number of classes: 16 linear ones and 4 for each of the 4 doublings from 1 KiB to 16 KiB.
pub(super) const CLASS_COUNT: usize = LINEAR_COUNT + 4 * 4;

/// The class that serves `size` bytes; `1 <= size <= MAX_BLOCK_BYTES`.
#[inline]
pub(super) fn class_of(size: usize) -> usize {
    debug_assert!((1..=MAX_BLOCK_BYTES).contains(&size));
    if size <= LINEAR_MAX {
        return (size - 1) / STEP;
    }
    // With `size - 1` in [2^k, 2^(k+1)): the two bits below the leading one choose the quarter.
    let last = size - 1;
    let log = last.ilog2();
    let quarter = (last >> (log - 2)) & 3;
    LINEAR_COUNT + 4 * (log as usize - 10) + quarter
}

/// Bytes of a block of `class`.
#[inline]
pub(super) const fn block_bytes(class: usize) -> usize {
    if class < LINEAR_COUNT {
        return (class + 1) * STEP;
    }
    let above = class - LINEAR_COUNT;
    let base = LINEAR_MAX << (above / 4);
    base + base / 4 * (above % 4 + 1)
}

/// Largest power-of-two alignment that every block of `class` has.
#[inline]
pub(super) const fn alignment(class: usize) -> usize {
    1 << block_bytes(class).trailing_zeros()
}

/// Blocks that fit a run.
pub(super) const fn blocks_per_run(class: usize) -> usize {
    RUN_BYTES / block_bytes(class)
}

/// Blocks in a full magazine: about 32 KiB, at least 2 and at most 64.
pub(super) const fn magazine_rounds(class: usize) -> usize {
    let rounds = 32 * 1024 / block_bytes(class);
    if rounds > 64 {
        64
    } else if rounds < 2 {
        2
    } else {
        rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_size_gets_the_smallest_class_that_holds_it() {
        for size in 1..=MAX_BLOCK_BYTES {
            let class = class_of(size);
            assert!(class < CLASS_COUNT, "{size}");
            assert!(block_bytes(class) >= size, "{size}");
            assert!(class == 0 || block_bytes(class - 1) < size, "{size}");
        }
        assert_eq!(block_bytes(CLASS_COUNT - 1), MAX_BLOCK_BYTES);
    }

    #[test]
    fn every_class_is_a_multiple_of_a_cache_line() {
        assert!((0..CLASS_COUNT).all(|class| block_bytes(class) % 64 == 0));
    }
}
