//! The size classes of a slab: the standard ones, and extra ones that get their sizes at run time.
//!
//! Standard are steps of 64 bytes to 1 KiB, then four to a doubling. Which class serves a request is
//! looked up by its size in lines of 64 bytes. A class that once has a size keeps it for the slab's
//! life, whether requests still go to it or not: a thread may have read the class before, and use it
//! any time later.

use crate::sync::{AtomicU8, AtomicU32, Ordering};

/// Bytes of a run: the unit that the slab draws from upstream, and its alignment.
pub(super) const RUN_BYTES: usize = 64 * 1024;
/// The largest block a slab serves; what is larger goes upstream.
pub const MAX_BLOCK_BYTES: usize = 16 * 1024;
/// Extra classes that a slab may have over its life.
pub const EXTRA_CLASSES: usize = 16;
/// Fewest blocks of a magazine.
pub const MIN_ROUNDS: usize = 2;
/// Most blocks of a magazine, and most bytes of them.
const MAX_ROUNDS: usize = 512;
const MAX_MAGAZINE_BYTES: usize = 128 * 1024;

const LINE: usize = 64;
const LINES: usize = MAX_BLOCK_BYTES / LINE;
const LINEAR_MAX: usize = 1024;
const LINEAR_COUNT: usize = LINEAR_MAX / LINE;
/// Number of standard classes: 16 linear ones and 4 for each of the 4 doublings from 1 to 16 KiB.
pub(super) const STANDARD_COUNT: usize = LINEAR_COUNT + 4 * 4;
/// Standard classes first, then the extra ones.
pub(super) const CLASS_COUNT: usize = STANDARD_COUNT + EXTRA_CLASSES;

/// The standard class that serves `size` bytes; `1 <= size <= MAX_BLOCK_BYTES`.
pub(super) fn standard_class(size: usize) -> usize {
    debug_assert!((1..=MAX_BLOCK_BYTES).contains(&size));
    if size <= LINEAR_MAX {
        return (size - 1) / LINE;
    }
    // With `size - 1` in [2^k, 2^(k+1)): the two bits below the leading one choose the quarter.
    let last = size - 1;
    let log = last.ilog2();
    let quarter = (last >> (log - 2)) & 3;
    LINEAR_COUNT + 4 * (log as usize - 10) + quarter
}

/// Bytes of a block of a standard class.
const fn standard_bytes(class: usize) -> usize {
    if class < LINEAR_COUNT {
        return (class + 1) * LINE;
    }
    let above = class - LINEAR_COUNT;
    let base = LINEAR_MAX << (above / 4);
    base + base / 4 * (above % 4 + 1)
}

/// The smallest standard class whose blocks hold `size` bytes and are so aligned, if there is one.
pub(super) fn aligned_class(size: usize, alignment: usize) -> Option<usize> {
    (standard_class(size)..STANDARD_COUNT)
        .find(|class| block_alignment(standard_bytes(*class)) >= alignment)
}

/// Largest power-of-two alignment that all blocks of so many bytes in a run have.
pub(super) const fn block_alignment(block_bytes: usize) -> usize {
    1 << block_bytes.trailing_zeros()
}

/// Whether an extra class may have blocks of so many bytes.
pub(super) fn may_be_extra(bytes: usize) -> bool {
    bytes % LINE == 0
        && (LINEAR_MAX..MAX_BLOCK_BYTES).contains(&bytes)
        && standard_bytes(standard_class(bytes)) != bytes
}

/// Blocks in a full magazine of a class that nobody tuned: about 32 KiB.
const fn standard_rounds(block_bytes: usize) -> usize {
    let rounds = 32 * 1024 / block_bytes;
    if rounds > 64 { 64 } else { rounds }
}

/// Most blocks that a magazine may be told to hold.
pub fn max_rounds(block_bytes: usize) -> usize {
    (MAX_MAGAZINE_BYTES / block_bytes).min(MAX_ROUNDS)
}

/// The classes of one slab. Written with the slab's tuning lock held, read by anyone.
pub(super) struct Classes {
    /// The class that serves a request of so many lines; 0 lines is no request. `Release` when
    /// written, `Acquire` when read: whoever reads a class sees its size too.
    serving: [AtomicU8; LINES + 1],
    /// Bytes of a block; 0 is an extra class that has no size yet. Written once: who knows a class
    /// from `serving`, or from a block of it, may read with `Relaxed`.
    bytes: [AtomicU32; CLASS_COUNT],
    /// Rounds of the magazines that are made from now on: a wish, so `Relaxed` suffices.
    rounds: [AtomicU32; CLASS_COUNT],
}

impl Classes {
    /// The standard classes.
    pub(super) fn new() -> Self {
        let standard = |class| {
            if class < STANDARD_COUNT {
                standard_bytes(class)
            } else {
                0
            }
        };
        Classes {
            serving: std::array::from_fn(|lines| {
                AtomicU8::new(standard_class((lines * LINE).max(1)) as u8)
            }),
            bytes: std::array::from_fn(|class| AtomicU32::new(standard(class) as u32)),
            rounds: std::array::from_fn(|class| match standard(class) {
                0 => AtomicU32::new(0),
                bytes => AtomicU32::new(standard_rounds(bytes) as u32),
            }),
        }
    }

    /// The class that serves `size` bytes now; `1 <= size <= MAX_BLOCK_BYTES`.
    #[inline]
    pub(super) fn of(&self, size: usize) -> usize {
        debug_assert!((1..=MAX_BLOCK_BYTES).contains(&size));
        // Not `div_ceil`, which minds an overflow that cannot be.
        self.serving[(size + LINE - 1) >> LINE.trailing_zeros()].load(Ordering::Acquire) as usize
    }

    /// Bytes of a block of `class`, which has a size.
    #[inline]
    pub(super) fn block_bytes(&self, class: usize) -> usize {
        self.bytes[class].load(Ordering::Relaxed) as usize
    }

    /// Rounds that a new magazine of `class` has.
    pub(super) fn rounds(&self, class: usize) -> usize {
        self.rounds[class].load(Ordering::Relaxed) as usize
    }

    /// Have new magazines of `class` hold so many blocks; `MIN_ROUNDS..=max_rounds(its bytes)`.
    pub(super) fn set_rounds(&self, class: usize, rounds: usize) {
        self.rounds[class].store(rounds as u32, Ordering::Relaxed);
    }

    /// Classes that have a size.
    pub(super) fn sized(&self) -> impl Iterator<Item = usize> {
        (0..CLASS_COUNT).filter(|class| self.block_bytes(*class) != 0)
    }

    /// The class whose blocks have exactly `bytes`, whether requests go to it or not.
    pub(super) fn with_bytes(&self, bytes: usize) -> Option<usize> {
        self.sized().find(|class| self.block_bytes(*class) == bytes)
    }

    /// Smallest and largest request in bytes that go to `class` now, by their size.
    pub(super) fn requests(&self, class: usize) -> Option<(usize, usize)> {
        let goes = |lines: &usize| self.of(lines * LINE) == class;
        let first = (1..=LINES).find(goes)?;
        let last = (1..=LINES).rfind(goes)?;
        Some(((first - 1) * LINE + 1, last * LINE))
    }

    /// Have these extra sizes, and no others, serve requests beside the standard ones.
    ///
    /// Each [`may_be_extra`]. All or nothing: if they need more classes than are left, returns how
    /// many are. The caller holds the lock that keeps writers apart.
    pub(super) fn set_extra(&self, sizes: &[usize]) -> Result<(), usize> {
        debug_assert!(sizes.iter().all(|bytes| may_be_extra(*bytes)));
        let mut wanted: Vec<usize> = sizes.to_vec();
        wanted.sort_unstable();
        wanted.dedup();
        let is_new = |bytes: &&usize| self.with_bytes(**bytes).is_none();
        let free: Vec<usize> = (STANDARD_COUNT..CLASS_COUNT)
            .filter(|class| self.block_bytes(*class) == 0)
            .collect();
        let new: Vec<usize> = wanted.iter().filter(is_new).copied().collect();
        if new.len() > free.len() {
            return Err(free.len());
        }
        for (class, bytes) in free.into_iter().zip(new) {
            self.give(class, bytes);
        }
        for lines in 1..=LINES {
            let size = lines * LINE;
            let standard = standard_class(size);
            let extra = wanted.iter().copied().find(|bytes| *bytes >= size);
            let class = extra
                .filter(|bytes| *bytes < standard_bytes(standard))
                .map_or(standard, |bytes| {
                    self.with_bytes(bytes).expect("it has a class by now")
                });
            if self.of(size) != class {
                self.serve(lines, class);
            }
        }
        Ok(())
    }

    /// Give an extra class its size, once.
    pub(super) fn give(&self, class: usize, bytes: usize) {
        self.bytes[class].store(bytes as u32, Ordering::Relaxed);
        self.set_rounds(class, standard_rounds(bytes));
    }

    /// Have `class`, which has its size, serve requests of so many lines.
    pub(super) fn serve(&self, lines: usize, class: usize) {
        self.serving[lines].store(class as u8, Ordering::Release);
    }

    /// Whether every request goes to a class that holds it, and no two classes are equal.
    pub(super) fn is_sound(&self) -> bool {
        let fits = |lines: usize| self.block_bytes(self.of(lines * LINE)) >= lines * LINE;
        let is_first = |class| self.with_bytes(self.block_bytes(class)) == Some(class);
        (1..=LINES).all(fits) && self.sized().all(is_first)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn each_size_gets_the_smallest_class_that_holds_it() {
        let classes = Classes::new();
        for size in 1..=MAX_BLOCK_BYTES {
            let class = classes.of(size);
            assert!(class < STANDARD_COUNT, "{size}");
            assert!(classes.block_bytes(class) >= size, "{size}");
            assert!(
                class == 0 || classes.block_bytes(class - 1) < size,
                "{size}"
            );
        }
        assert_eq!(classes.block_bytes(STANDARD_COUNT - 1), MAX_BLOCK_BYTES);
    }

    #[test]
    fn every_class_is_a_multiple_of_a_cache_line_and_has_magazines_within_bounds() {
        let classes = Classes::new();
        for class in classes.sized() {
            let bytes = classes.block_bytes(class);
            assert_eq!(bytes % 64, 0);
            assert!((MIN_ROUNDS..=max_rounds(bytes)).contains(&classes.rounds(class)));
        }
        assert_eq!(max_rounds(64), 512);
        assert_eq!(max_rounds(MAX_BLOCK_BYTES), 8);
    }

    #[test]
    fn an_extra_class_serves_what_it_holds_and_its_neighbour_does_not() {
        let classes = Classes::new();
        classes.set_extra(&[5056, 1088, 4672]).unwrap();
        for (size, block) in [
            (1024, 1024),
            (1025, 1088),
            (1088, 1088),
            (1089, 1280),
            (4096, 4096),
            (4097, 4672),
            (4672, 4672),
            (4673, 5056),
            (5057, 5120),
            (5121, 6144),
        ] {
            assert_eq!(classes.block_bytes(classes.of(size)), block, "{size}");
        }
        assert!(classes.is_sound());
        let served = classes.with_bytes(4672).unwrap();
        assert_eq!(classes.requests(served), Some((4097, 4672)));
    }

    #[test]
    fn a_class_keeps_its_size_when_requests_no_longer_go_to_it() {
        let classes = Classes::new();
        classes.set_extra(&[1088]).unwrap();
        let class = classes.with_bytes(1088).unwrap();
        classes.set_extra(&[1152]).unwrap();
        assert_eq!(classes.block_bytes(class), 1088);
        assert_eq!(classes.requests(class), None);
        assert_eq!(classes.block_bytes(classes.of(1088)), 1152);
        classes.set_extra(&[1088]).unwrap();
        assert_eq!(classes.of(1088), class);
    }

    #[test]
    fn more_sizes_than_classes_change_nothing() {
        let classes = Classes::new();
        let extra: Vec<usize> = (0..MAX_BLOCK_BYTES)
            .filter(|bytes| may_be_extra(*bytes))
            .collect();
        classes.set_extra(&extra[..10]).unwrap();
        assert_eq!(classes.set_extra(&extra[8..17]), Err(6));
        assert_eq!(classes.of(extra[9]), STANDARD_COUNT + 9);
        assert_eq!(classes.of(extra[12]), standard_class(extra[12]));
        classes.set_extra(&extra[..EXTRA_CLASSES]).unwrap();
        assert_eq!(classes.set_extra(&extra[1..=EXTRA_CLASSES]), Err(0));
        assert_eq!(classes.set_extra(&[]), Ok(()));
        assert!(classes.is_sound());
    }

    #[test]
    fn only_lines_between_standard_classes_may_be_extra() {
        assert!(may_be_extra(1088) && may_be_extra(1600) && may_be_extra(MAX_BLOCK_BYTES - 64));
        for bytes in [0, 64, 576, 1024, 1100, 1280, 2048, MAX_BLOCK_BYTES, 20_480] {
            assert!(!may_be_extra(bytes), "{bytes}");
        }
    }
}
