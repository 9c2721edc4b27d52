//! Who holds a block, across processes: a bit for each process, and parcels for what is on its way.
//!
//! Each process has a slot, and sets its slot's bit in a block's entry while it uses the block,
//! however often. A parcel is a word that names a block and the slot that sent it: it stands for a
//! message that nobody has received. Whoever receives sets his bit first and takes the parcel out
//! then, by a compare-and-swap of the exact word; so a block that is on its way or held is seen to be
//! at every instant, and what a killed process had can be taken back by its slot's number.
//!
//! Only who lends counts `lent` up, while he holds the block and before the parcel is there, and notes
//! then which parcel it is. Whoever finds no bit, no parcel, no bit again and `lent` unchanged knows
//! that the block is free; of a block that was lent once he need not look at all parcels.

use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Most processes that hold blocks of a segment at once.
pub const SLOT_COUNT: usize = 63;
/// The bit of a process that found no slot: such a block is never used again.
const UNCOUNTED: u64 = 1 << SLOT_COUNT;
/// Most messages that may be on their way at once.
pub const PARCEL_COUNT: usize = 1024;

const USED: u64 = 1;
const GIVEN: u64 = 2;
const SLOT_SHIFT: u32 = 2;
const PAGE_SHIFT: u32 = 8;
const PAGE_BITS: u32 = 28;
const STAMP_SHIFT: u32 = PAGE_SHIFT + PAGE_BITS;
/// Most pages of a segment.
pub const MAX_PAGES: usize = 1 << PAGE_BITS;

/// What is known of the block that begins at a page.
#[repr(C)]
#[derive(Default)]
pub struct Entry {
    /// A bit for each process that holds it.
    holders: AtomicU64,
    /// A [`Lent`]; ordered by the bits.
    lent: AtomicU32,
    /// Its length. Written before it is lent, read after it was received.
    pages: AtomicU32,
}

/// A message on its way: where its word is, and what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// The index of the word.
    pub index: u32,
    /// The word.
    pub word: u64,
}

impl Parcel {
    /// The first page of the block.
    pub fn page(self) -> u32 {
        (self.word >> PAGE_SHIFT) as u32 & (MAX_PAGES as u32 - 1)
    }

    /// Whether the sender gave the block away.
    pub fn is_given(self) -> bool {
        self.word & GIVEN != 0
    }
}

/// How often a block was lent since it began, and the index of the parcel that was made last.
#[derive(Clone, Copy)]
struct Lent(u32);

impl Lent {
    const INDEX_BITS: u32 = PARCEL_COUNT.ilog2();

    fn count(self) -> u32 {
        self.0 >> Self::INDEX_BITS
    }

    fn last(self) -> u32 {
        self.0 & (PARCEL_COUNT as u32 - 1)
    }

    /// After so many that the count is full it goes on from 2: many.
    fn one_more(self) -> Self {
        let full = u32::MAX >> Self::INDEX_BITS;
        let count = if self.count() == full {
            2
        } else {
            self.count() + 1
        };
        Lent(count << Self::INDEX_BITS | self.last())
    }

    fn noting(self, index: u32) -> Self {
        Lent(self.count() << Self::INDEX_BITS | index)
    }
}

/// One of `count` places; what follows each other lies in another cache line.
fn spread(index: usize, count: usize) -> usize {
    const LINE: usize = 8;
    let index = index % count;
    if count % LINE != 0 {
        return index;
    }
    let lines = count / LINE;
    index % lines * LINE + index / lines
}

/// Counters that all processes share.
#[repr(C)]
#[derive(Default)]
pub struct Marks {
    /// Makes each parcel another one. Only has to differ, so `Relaxed` suffices.
    stamps: AtomicU32,
    /// Above the highest page that was ever used.
    page_front: AtomicU32,
}

/// A view of these words, wherever they lie.
#[derive(Clone, Copy)]
pub struct Holders<'a> {
    entries: &'a [Entry],
    parcels: &'a [AtomicU64],
    marks: &'a Marks,
}

impl<'a> Holders<'a> {
    /// A view of these words.
    pub fn new(entries: &'a [Entry], parcels: &'a [AtomicU64], marks: &'a Marks) -> Self {
        Holders {
            entries,
            parcels,
            marks,
        }
    }

    fn entry(&self, page: u32) -> &Entry {
        &self.entries[page as usize]
    }

    /// A block of `pages` begins here, and `slot` holds it. Only of a block that is free.
    pub fn begin(&self, page: u32, pages: u32, slot: usize) {
        let entry = self.entry(page);
        entry.pages.store(pages, Ordering::Relaxed);
        entry.lent.store(0, Ordering::Relaxed);
        self.marks
            .page_front
            .fetch_max(page + pages, Ordering::Relaxed);
        self.hold(page, slot);
    }

    /// Pages of the block that begins here; 0 if none ever did.
    pub fn pages(&self, page: u32) -> u32 {
        let entry = self.entries.get(page as usize);
        entry.map_or(0, |entry| entry.pages.load(Ordering::Acquire))
    }

    /// `slot` holds the block.
    pub fn hold(&self, page: u32, slot: usize) {
        debug_assert!(slot < SLOT_COUNT);
        let holders = &self.entry(page).holders;
        holders.fetch_or(1 << slot, Ordering::AcqRel);
    }

    /// Somebody whom nobody can tell dead holds the block, for good.
    pub fn hold_for_good(&self, page: u32) {
        self.entry(page)
            .holders
            .fetch_or(UNCOUNTED, Ordering::AcqRel);
    }

    /// `slot` does not hold the block any more.
    pub fn release(&self, page: u32, slot: usize) {
        let holders = &self.entry(page).holders;
        holders.fetch_and(!(1 << slot), Ordering::AcqRel);
    }

    /// Whether nobody holds the block, and it is not on its way. If not, it may be a moment later.
    pub fn is_free(&self, page: u32) -> bool {
        let entry = self.entry(page);
        let before = Lent(entry.lent.load(Ordering::Acquire));
        let is_held = || entry.holders.load(Ordering::Acquire) != 0;
        if is_held() {
            return false;
        }
        // Read again: who has let go of it by now had noted his parcel before.
        let lent = Lent(entry.lent.load(Ordering::Acquire));
        if lent.count() != before.count() {
            return false;
        }
        let is_on_its_way = match lent.count() {
            0 => return true,
            1 => self.word_is_of(lent.last(), page),
            _ => self.parcels_in_use().any(|parcel| parcel.page() == page),
        };
        // Who receives holds it before the parcel is gone: look for bits once more.
        let after = || Lent(entry.lent.load(Ordering::Acquire));
        !is_on_its_way && !is_held() && after().count() == lent.count()
    }

    fn word_is_of(&self, index: u32, page: u32) -> bool {
        let word = self.parcels[index as usize].load(Ordering::Acquire);
        word & USED != 0 && Parcel { index, word }.page() == page
    }

    fn parcels_in_use(&self) -> impl Iterator<Item = Parcel> {
        self.parcels.iter().enumerate().filter_map(|(index, word)| {
            let word = word.load(Ordering::Acquire);
            let index = index as u32;
            (word & USED != 0).then_some(Parcel { index, word })
        })
    }

    /// A parcel of a block that `slot` holds; `None` if too many are on their way.
    pub fn lend(&self, page: u32, slot: usize, given: bool) -> Option<Parcel> {
        let lent = &self.entry(page).lent;
        let change = |change: fn(Lent, u32) -> Lent, index: u32| {
            let mut seen = lent.load(Ordering::Relaxed);
            while let Err(now) = lent.compare_exchange(
                seen,
                change(Lent(seen), index).0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                seen = now;
            }
        };
        change(|lent, _| lent.one_more(), 0);
        let stamp = self.marks.stamps.fetch_add(1, Ordering::Relaxed);
        let word = USED
            | if given { GIVEN } else { 0 }
            | (slot as u64) << SLOT_SHIFT
            | u64::from(page) << PAGE_SHIFT
            | u64::from(stamp) << STAMP_SHIFT;
        let count = self.parcels.len();
        for step in 0..count {
            let index = spread(stamp as usize % count + step, count);
            let place = &self.parcels[index];
            if place.load(Ordering::Relaxed) != 0 {
                continue;
            }
            let claimed = place.compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed);
            if claimed.is_ok() {
                let index = index as u32;
                change(Lent::noting, index);
                return Some(Parcel { index, word });
            }
        }
        None
    }

    /// Whether so many parcels could be made now.
    pub fn can_lend(&self, count: usize) -> bool {
        let is_free = |place: &&AtomicU64| place.load(Ordering::Relaxed) == 0;
        self.parcels.iter().filter(is_free).take(count).count() == count
    }

    /// Whether nobody has taken the parcel.
    pub fn is_waiting(&self, parcel: Parcel) -> bool {
        let place = self.parcels.get(parcel.index as usize);
        place.is_some_and(|place| place.load(Ordering::Acquire) == parcel.word)
    }

    /// Take a parcel out; false if it is not there any more. Who wants the block holds it already.
    pub fn take(&self, parcel: Parcel) -> bool {
        let place = self.parcels.get(parcel.index as usize);
        place.is_some_and(|place| {
            place
                .compare_exchange(parcel.word, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })
    }

    /// For a process that died: what it held and what it had sent is nobody's.
    pub fn reap(&self, slot: usize) {
        for parcel in self.parcels_in_use() {
            if (parcel.word >> SLOT_SHIFT) as usize & SLOT_COUNT == slot {
                self.take(parcel);
            }
        }
        let front = self.marks.page_front.load(Ordering::Acquire) as usize;
        for page in 0..front.min(self.entries.len()) {
            let holders = &self.entries[page].holders;
            if holders.load(Ordering::Relaxed) & 1 << slot != 0 {
                self.release(page as u32, slot);
            }
        }
    }

    /// Parcels that are on their way.
    pub fn parcel_count(&self) -> usize {
        self.parcels_in_use().count()
    }
}
