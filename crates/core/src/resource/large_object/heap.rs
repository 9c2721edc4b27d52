//! The spans: who has which pages, what is kept hot, what is cold, and what merges with what.
//!
//! Plain data behind one lock; talks to the kernel only to reserve and commit. Terms:
//! a **region** is a reservation; its pages below the **frontier** are committed and belong to
//! exactly one **span** each. A span is *used*, *quick* (free, hot, not merged yet), *hot* (free,
//! its pages kept), *cold* (free, its pages given back) or *purging* (on its way from hot to cold).
//!
//! Invariants, checked by `check`:
//! - the spans of a region tile `base..frontier`, and no two neighbours are both hot or both cold;
//! - `used_span_bytes + hot_bytes + quick_bytes + purging_bytes + cold_bytes == sum of spans`;
//! - the address map holds a span's id at its first and last page and at the page of its data.

use super::Options;
use super::fit::{Entry, FreeIndex};
use crate::os::numa::{self, Placement};
use crate::os::{self, HugePages, PAGE_BYTES, UNIT_BYTES};
use crate::resource::HealthReport;
use crate::resource::address_map::AddressMap;
use std::collections::BTreeSet;
use std::ptr::NonNull;

/// Spans of at least a huge page live apart, where huge pages are asked for. Giving back less would
/// split huge pages, which come back one small fault at a time: from 1 MiB on, the slowest thousandth
/// of operations took four times as long.
const HUGE_AREA_BYTES: usize = 2 * 1024 * 1024;
/// Blocks of at least this size are given room for colouring.
const COLOUR_FROM_BYTES: usize = 64 * 1024;
/// Distance of two colours: 17 cache lines, so that colours differ in every set of the cache.
const COLOUR_BYTES: usize = 1088;
const MIDDLE_COLOURS: usize = 4;
const HUGE_COLOURS: usize = 16;
/// Free spans up to this many pages wait unmerged, by exact size, to be handed out again.
const QUICK_PAGES: usize = 256 * 1024 / PAGE_BYTES + 1;
/// Bytes that may wait so before all of them are merged.
const QUICK_LIMIT_BYTES: usize = 2 * 1024 * 1024;
/// Hot memory that may stay beyond what the recent peak of use took: at least, and at most. With 16
/// MiB at most, changing sizes over 70 MiB in use fault six times an operation; with 24 not once.
const SLACK_BYTES: (usize, usize) = (8 * 1024 * 1024, 24 * 1024 * 1024);

/// Where a span lives, by what its blocks need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Area {
    /// Multiples of 64 KiB, aligned so: the runs of a slab.
    Unit,
    /// Everything else below [`HUGE_AREA_BYTES`].
    Middle,
    /// The rest.
    Huge,
}
const AREAS: [Area; 3] = [Area::Unit, Area::Middle, Area::Huge];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Used,
    Quick,
    Hot,
    Cold,
    Purging,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    pages: usize,
    region: u32,
    area: Area,
    state: State,
    /// Used: first byte and size of the block.
    data: usize,
    size: usize,
    /// Used: its pages come as they are touched, so that how many did is seen when it is freed.
    lazy: bool,
    /// Free: when it was freed, in milliseconds, averaged by size when spans merge.
    stamp: u64,
    sequence: u64,
}

impl Span {
    fn bytes(&self) -> usize {
        self.pages * PAGE_BYTES
    }

    fn end(&self) -> usize {
        self.start + self.bytes()
    }
}

struct Region {
    base: NonNull<u8>,
    bytes: usize,
    /// Committed bytes from `base`.
    frontier: usize,
    area: Area,
}

struct AreaIndex {
    hot: FreeIndex,
    cold: FreeIndex,
}

/// Counts that the heap alone keeps; see [`crate::resource::Statistics`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub current_bytes: u64,
    pub current_count: u64,
    pub peak_bytes: u64,
    pub peak_count: u64,
    pub total_bytes: u64,
    pub total_count: u64,
    pub hits: u64,
    pub reused_bytes: u64,
    pub reused_pages: u64,
    pub decommitted_bytes: u64,
    pub invalid_frees: u64,
}

/// Pages on their way back to the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Victim {
    id: u32,
    pub start: NonNull<u8>,
    pub bytes: usize,
}

/// A block that was taken, and what is left to do to it without the lock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub data: NonNull<u8>,
    pub size: usize,
    /// Its pages were in use before and were kept.
    pub reused: bool,
    /// It is hot, but lazily zeroed pages were asked for: give these back first.
    pub decommit: Option<(NonNull<u8>, usize)>,
}

pub(super) struct Heap {
    huge_pages: HugePages,
    placement: Option<Placement>,
    unplaced_regions: usize,
    fixed_cap: Option<usize>,
    regions: Vec<Option<Region>>,
    spans: Vec<Span>,
    vacant: Vec<u32>,
    areas: [AreaIndex; 3],
    quick: Vec<Vec<u32>>,
    /// Hot spans, oldest first: (stamp, id).
    by_age: BTreeSet<(u64, u32)>,
    used_bytes: usize,
    /// Of these, what lies in the middle area, where sizes are many and pages small.
    middle_bytes: usize,
    /// The most that was in use; fades towards what is.
    recent_peak_bytes: usize,
    hot_bytes: usize,
    quick_bytes: usize,
    purging_bytes: usize,
    cold_bytes: usize,
    sequence: u64,
    colour: usize,
    zeroing: Zeroing,
    pub counts: Counts,
}

/// Whether large zeroed blocks are filled or left mostly untouched, by size, as seen when freed.
///
/// Filled ones are cheaper from hot memory that is written over; untouched ones from pages that the
/// kernel zeroes when touched. Every [`Zeroing::LOOK_EVERY`]th block is served lazily to look again.
#[derive(Default)]
struct Zeroing {
    /// By the logarithm of the size: whether the last look found the block filled.
    filled: u64,
    served: u64,
}

impl Zeroing {
    const LOOK_EVERY: u64 = 16;

    /// Whether to serve a zeroed block of `size` by pages that the kernel zeroes.
    fn serve_lazily(&mut self, size: usize) -> bool {
        self.served += 1;
        self.filled & (1 << size.ilog2()) == 0 || self.served % Self::LOOK_EVERY == 0
    }

    fn learn(&mut self, size: usize, filled: bool) {
        let bit = 1 << size.ilog2();
        self.filled = if filled {
            self.filled | bit
        } else {
            self.filled & !bit
        };
    }
}

/// Pages looked at to see how much of a lazily zeroed block was touched.
const TOUCH_SAMPLES: usize = 8;

// SAFETY: regions are owned by the heap; their addresses are as good in one thread as in another.
unsafe impl Send for Heap {}

fn pointer(address: usize) -> NonNull<u8> {
    NonNull::new(address as *mut u8).expect("spans do not start at address 0")
}

impl Heap {
    pub(super) fn new(options: &Options) -> Self {
        let index = || AreaIndex {
            hot: FreeIndex::new(options.fit),
            cold: FreeIndex::new(options.fit),
        };
        Heap {
            huge_pages: options.huge_pages,
            placement: options.placement,
            unplaced_regions: 0,
            fixed_cap: options.cache_cap,
            regions: Vec::new(),
            spans: Vec::new(),
            vacant: Vec::new(),
            areas: [index(), index(), index()],
            quick: vec![Vec::new(); QUICK_PAGES + 1],
            by_age: BTreeSet::new(),
            used_bytes: 0,
            middle_bytes: 0,
            recent_peak_bytes: 0,
            hot_bytes: 0,
            quick_bytes: 0,
            purging_bytes: 0,
            cold_bytes: 0,
            sequence: 0,
            colour: 0,
            zeroing: Zeroing::default(),
            counts: Counts::default(),
        }
    }

    pub(super) fn unplaced_regions(&self) -> usize {
        self.unplaced_regions
    }

    /// Free bytes whose pages are kept.
    pub(super) fn cached_bytes(&self) -> usize {
        self.hot_bytes + self.quick_bytes + self.purging_bytes
    }

    /// Bytes held from the kernel.
    pub(super) fn resident_bytes(&self) -> usize {
        self.used_bytes + self.cached_bytes()
    }

    /// Most bytes that may stay hot now: what keeps the whole near the recent peak of use.
    fn cap(&self) -> usize {
        let below_peak = self.recent_peak_bytes - self.used_bytes + self.slack();
        self.fixed_cap.unwrap_or(below_peak)
    }

    /// Hot memory that may stay beyond what the recent peak of use took: three eighths of what the
    /// middle area has in use, within bounds. Less and blocks of random sizes fault; more and memory
    /// is wasted, as it is on large blocks, of which a slack holds none.
    fn slack(&self) -> usize {
        (self.middle_bytes / 8 * 3).clamp(SLACK_BYTES.0, SLACK_BYTES.1)
    }

    fn count_used(&mut self, area: Area, more: usize, less: usize) {
        self.used_bytes = self.used_bytes + more - less;
        if area == Area::Middle {
            self.middle_bytes = self.middle_bytes + more - less;
        }
    }

    // ---- spans and the map ----

    fn entry(&self, id: u32) -> Entry {
        let span = &self.spans[id as usize];
        Entry {
            pages: span.pages,
            start: span.start,
            sequence: span.sequence,
            id,
        }
    }

    fn new_span(&mut self, span: Span) -> u32 {
        if let Some(id) = self.vacant.pop() {
            self.spans[id as usize] = span;
            id
        } else {
            self.spans.push(span);
            (self.spans.len() - 1) as u32
        }
    }

    /// Write a span's ends into the map. Ids are stored plus one: 0 means nothing.
    ///
    /// The leaf of each address was made when the frontier passed it, so this cannot fail.
    fn mark(&self, map: &AddressMap<12>, id: u32) {
        let span = &self.spans[id as usize];
        map.set(span.start, u64::from(id) + 1);
        map.set(span.end() - PAGE_BYTES, u64::from(id) + 1);
    }

    fn retire_id(&mut self, id: u32) {
        self.spans[id as usize].pages = 0;
        self.vacant.push(id);
    }

    fn remove_free(&mut self, id: u32) {
        let (state, area, bytes, stamp) = {
            let span = &self.spans[id as usize];
            (span.state, span.area, span.bytes(), span.stamp)
        };
        let entry = self.entry(id);
        let index = &mut self.areas[area as usize];
        let removed = match state {
            State::Hot => {
                self.hot_bytes -= bytes;
                self.by_age.remove(&(stamp, id));
                index.hot.remove(&entry)
            }
            State::Cold => {
                self.cold_bytes -= bytes;
                index.cold.remove(&entry)
            }
            _ => unreachable!("only hot and cold spans are indexed"),
        };
        debug_assert!(removed);
    }

    fn insert_free(&mut self, map: &AddressMap<12>, id: u32, state: State) {
        self.sequence += 1;
        let sequence = self.sequence;
        let span = &mut self.spans[id as usize];
        span.state = state;
        span.sequence = sequence;
        let (area, bytes, stamp) = (span.area, span.bytes(), span.stamp);
        let entry = self.entry(id);
        let index = &mut self.areas[area as usize];
        if state == State::Hot {
            self.hot_bytes += bytes;
            self.by_age.insert((stamp, id));
            index.hot.insert(&entry);
        } else {
            self.cold_bytes += bytes;
            index.cold.insert(&entry);
        }
        self.mark(map, id);
    }

    /// Make a span free in `state`, merging it with neighbours in the same state.
    fn release_span(&mut self, map: &AddressMap<12>, mut id: u32, state: State) -> u32 {
        let span = self.spans[id as usize];
        for neighbour in [span.start - PAGE_BYTES, span.end()] {
            let word = map.get(neighbour);
            if word == 0 {
                continue;
            }
            let other_id = (word - 1) as u32;
            let other = self.spans[other_id as usize];
            if other.pages == 0 || other.state != state || other.region != span.region {
                continue;
            }
            if other.end() != span.start && other.start != span.end() {
                continue;
            }
            self.remove_free(other_id);
            let own = self.spans[id as usize];
            let total = own.pages + other.pages;
            let weighted =
                own.stamp as u128 * own.pages as u128 + other.stamp as u128 * other.pages as u128;
            let merged = &mut self.spans[other_id as usize];
            merged.start = own.start.min(other.start);
            merged.pages = total;
            merged.stamp = (weighted / total as u128) as u64;
            self.retire_id(id);
            id = other_id;
        }
        self.insert_free(map, id, state);
        id
    }

    /// Cut `id` (not indexed) to `pages`, making the rest a free span in `state`.
    fn split(&mut self, map: &AddressMap<12>, id: u32, pages: usize, state: State) {
        self.spans[id as usize].state = State::Used;
        let span = self.spans[id as usize];
        if span.pages == pages {
            return;
        }
        let rest = Span {
            start: span.start + pages * PAGE_BYTES,
            pages: span.pages - pages,
            ..span
        };
        self.spans[id as usize].pages = pages;
        self.mark(map, id);
        let rest_id = self.new_span(rest);
        self.release_span(map, rest_id, state);
    }

    // ---- regions ----

    fn region_bytes(&self, area: Area, need: usize) -> usize {
        let usual = match (os::address_space_limit(), area) {
            (Some(limit), _) => (limit / 32).clamp(os::HUGE_PAGE_BYTES, 64 << 20),
            (None, Area::Huge) => 64 << 30,
            (None, _) => 16 << 30,
        };
        need.max(usual).next_multiple_of(os::HUGE_PAGE_BYTES)
    }

    fn add_region(&mut self, area: Area, need: usize) -> Option<usize> {
        let need = need.checked_next_multiple_of(os::HUGE_PAGE_BYTES)?;
        let mut bytes = self.region_bytes(area, need);
        let base = loop {
            if let Some(base) = os::reserve(bytes) {
                break base;
            }
            if bytes == need {
                return None;
            }
            bytes = (bytes / 4).next_multiple_of(os::HUGE_PAGE_BYTES).max(need);
        };
        let huge = match (self.huge_pages, area) {
            (HugePages::Never, _) => Some(false),
            (HugePages::Always, _) | (HugePages::Auto, Area::Huge) => Some(true),
            (HugePages::Auto, _) => None,
        };
        if let Some(huge) = huge {
            // SAFETY: the reservation was made above.
            unsafe { os::advise_huge(base, bytes, huge) };
        }
        if let Some(placement) = &self.placement {
            // SAFETY: the reservation was made above. Its pages, not there yet, keep the policy
            // when they are committed, given back and touched again.
            let placed = unsafe { numa::place(base, bytes, placement) };
            self.unplaced_regions += usize::from(placed.is_err());
        }
        let region = Some(Region {
            base,
            bytes,
            frontier: 0,
            area,
        });
        let vacant = self.regions.iter().position(Option::is_none);
        Some(match vacant {
            Some(index) => {
                self.regions[index] = region;
                index
            }
            None => {
                self.regions.push(region);
                self.regions.len() - 1
            }
        })
    }

    /// Commit at least `pages` fresh pages of `area` as one cold span, not indexed.
    fn extend(&mut self, map: &AddressMap<12>, area: Area, pages: usize) -> Option<u32> {
        let need = pages * PAGE_BYTES;
        let fits = |region: &Option<Region>| {
            region
                .as_ref()
                .is_some_and(|region| region.area == area && region.bytes - region.frontier >= need)
        };
        let index = match self.regions.iter().position(fits) {
            Some(index) => index,
            None => self.add_region(area, need)?,
        };
        let Some(id) = self.extend_region(map, index, pages) else {
            self.release_unused_region(index);
            return None;
        };
        let id = self.release_span(map, id, State::Cold);
        self.remove_free(id);
        Some(id)
    }

    /// Unmap a region of which nothing was committed: a request for more than there is must not hold
    /// the address space for it.
    fn release_unused_region(&mut self, index: usize) {
        if let Some(region) = self.regions[index].take_if(|region| region.frontier == 0) {
            // SAFETY: the region is the heap's, and no span lies in it.
            unsafe { os::release(region.base, region.bytes) };
        }
    }

    /// Commit at least `pages` fresh pages of a region that has them, as a cold span, not indexed.
    fn extend_region(&mut self, map: &AddressMap<12>, index: usize, pages: usize) -> Option<u32> {
        let need = pages * PAGE_BYTES;
        let region = self.regions[index].as_mut().expect("found or made above");
        let bytes = need
            .next_multiple_of(os::HUGE_PAGE_BYTES)
            .min(region.bytes - region.frontier);
        let start = region.base.as_ptr() as usize + region.frontier;
        // SAFETY: the range lies in the region, behind its frontier, and is page-aligned.
        if !unsafe { os::commit(pointer(start), bytes) } {
            return None;
        }
        // Make the map's tables now, so that marking spans later cannot fail.
        let leaf = (1usize << 18) * PAGE_BYTES;
        let mut probe = start;
        while probe < start + bytes {
            if !map.set(probe, 0) {
                return None;
            }
            probe = (probe + 1).next_multiple_of(leaf);
        }
        region.frontier += bytes;
        let area = region.area;
        let id = self.new_span(Span {
            start,
            pages: bytes / PAGE_BYTES,
            region: index as u32,
            area,
            state: State::Cold,
            data: 0,
            size: 0,
            lazy: false,
            stamp: 0,
            sequence: 0,
        });
        Some(id)
    }

    /// Unmap regions in which everything is free and cold; returns whether there were any.
    pub(super) fn release_empty_regions(&mut self, map: &AddressMap<12>) -> bool {
        let mut any = false;
        for index in 0..self.regions.len() {
            let Some(region) = &self.regions[index] else {
                continue;
            };
            let base = region.base;
            let word = if region.frontier == 0 {
                0
            } else {
                map.get(base.as_ptr() as usize)
            };
            if word == 0 {
                continue;
            }
            let id = (word - 1) as u32;
            let span = self.spans[id as usize];
            if span.state != State::Cold || span.bytes() != region.frontier {
                continue;
            }
            let bytes = region.bytes;
            self.remove_free(id);
            map.set(span.start, 0);
            map.set(span.end() - PAGE_BYTES, 0);
            self.retire_id(id);
            self.regions[index] = None;
            // SAFETY: the region is the heap's, and its only span was free.
            unsafe { os::release(base, bytes) };
            any = true;
        }
        any
    }

    // ---- allocation ----

    fn area_of(size: usize, alignment: usize) -> Area {
        if alignment == UNIT_BYTES && size < HUGE_AREA_BYTES {
            Area::Unit
        } else if size < HUGE_AREA_BYTES {
            Area::Middle
        } else {
            Area::Huge
        }
    }

    /// Pages for a block and its colour, and extra pages to align its start.
    fn pages_for(area: Area, size: usize, alignment: usize) -> (usize, usize) {
        let colours = match area {
            Area::Unit => return (size.next_multiple_of(UNIT_BYTES) / PAGE_BYTES, 0),
            _ if alignment > 64 || size < COLOUR_FROM_BYTES => 1,
            Area::Middle => MIDDLE_COLOURS,
            Area::Huge => HUGE_COLOURS,
        };
        let pages = (size + (colours - 1) * COLOUR_BYTES).div_ceil(PAGE_BYTES);
        (
            pages,
            if alignment > PAGE_BYTES {
                alignment / PAGE_BYTES - 1
            } else {
                0
            },
        )
    }

    /// Take a block. `lazy` asks for pages that the kernel zeroes when they are touched.
    pub(super) fn take(
        &mut self,
        map: &AddressMap<12>,
        size: usize,
        alignment: usize,
        lazy: bool,
    ) -> Option<Taken> {
        let lazy = lazy && self.zeroing.serve_lazily(size);
        let area = Self::area_of(size, alignment);
        let (pages, extra) = Self::pages_for(area, size, alignment);
        let (id, hot) = self.find(map, area, pages + extra, lazy)?;
        let id = if extra > 0 {
            self.align(map, id, pages, alignment, hot)
        } else {
            id
        };
        Some(self.hand_out(map, id, size, alignment, hot, lazy))
    }

    /// Remove a span of exactly `pages` from the free ones, or make one; says whether it is hot.
    fn find(
        &mut self,
        map: &AddressMap<12>,
        area: Area,
        pages: usize,
        lazy: bool,
    ) -> Option<(u32, bool)> {
        if area == Area::Middle
            && pages <= QUICK_PAGES
            && let Some(id) = self.quick[pages].pop()
        {
            self.quick_bytes -= pages * PAGE_BYTES;
            return Some((id, true));
        }
        let hot = self.areas[area as usize].hot.choose(pages);
        let cold = self.areas[area as usize].cold.choose(pages);
        if let Some(id) = if lazy { cold.or(hot) } else { hot } {
            let was_hot = self.spans[id as usize].state == State::Hot;
            self.remove_free(id);
            self.split(
                map,
                id,
                pages,
                if was_hot { State::Hot } else { State::Cold },
            );
            return Some((id, was_hot));
        }
        let id = match cold {
            Some(id) => {
                self.remove_free(id);
                id
            }
            None => self.extend(map, area, pages)?,
        };
        self.split(map, id, pages, State::Cold);
        Some((id, false))
    }

    /// Cut a span that is too long by the alignment to an aligned one of `pages`.
    fn align(
        &mut self,
        map: &AddressMap<12>,
        id: u32,
        pages: usize,
        alignment: usize,
        hot: bool,
    ) -> u32 {
        let state = if hot { State::Hot } else { State::Cold };
        let span = self.spans[id as usize];
        let front = (span.start.next_multiple_of(alignment) - span.start) / PAGE_BYTES;
        let mut id = id;
        if front > 0 {
            let aligned = Span {
                start: span.start + front * PAGE_BYTES,
                pages: span.pages - front,
                ..span
            };
            self.spans[id as usize].pages = front;
            let front_id = id;
            id = self.new_span(aligned);
            self.mark(map, id);
            self.release_span(map, front_id, state);
        }
        self.split(map, id, pages, state);
        id
    }

    fn hand_out(
        &mut self,
        map: &AddressMap<12>,
        id: u32,
        size: usize,
        alignment: usize,
        hot: bool,
        lazy: bool,
    ) -> Taken {
        let colour = if alignment > 64 { 0 } else { self.colour };
        self.colour = self.colour.wrapping_add(1);
        let span = &mut self.spans[id as usize];
        let colours = ((span.bytes() - size) / COLOUR_BYTES + 1).min(HUGE_COLOURS);
        let data = span.start + (colour % colours) * COLOUR_BYTES;
        let room = span.end() - data;
        span.state = State::Used;
        span.lazy = lazy;
        span.data = data;
        span.size = size.next_multiple_of(64).min(room);
        let span = *span;
        self.mark(map, id);
        map.set(data, u64::from(id) + 1);
        self.count_used(span.area, span.bytes(), 0);
        self.recent_peak_bytes = self.recent_peak_bytes.max(self.used_bytes);
        let reused = hot && !lazy;
        let counts = &mut self.counts;
        counts.current_bytes += span.size as u64;
        counts.current_count += 1;
        counts.peak_bytes = counts.peak_bytes.max(counts.current_bytes);
        counts.peak_count = counts.peak_count.max(counts.current_count);
        counts.total_bytes += span.size as u64;
        counts.total_count += 1;
        if reused {
            counts.hits += 1;
            counts.reused_bytes += span.bytes() as u64;
            counts.reused_pages += span.pages as u64;
        }
        if hot && lazy {
            counts.decommitted_bytes += span.bytes() as u64;
        }
        Taken {
            data: pointer(data),
            size: span.size,
            reused,
            decommit: (hot && lazy).then(|| (pointer(span.start), span.bytes())),
        }
    }

    /// Id of the used span whose block starts at `address`.
    fn used_at(&self, map: &AddressMap<12>, address: usize) -> Option<u32> {
        let id = map.get(address).checked_sub(1)? as u32;
        let span = self.spans.get(id as usize)?;
        (span.pages > 0 && span.state == State::Used && span.data == address).then_some(id)
    }

    /// Size of the live block at `address`, or 0.
    pub(super) fn block_bytes(&self, map: &AddressMap<12>, address: usize) -> usize {
        self.used_at(map, address)
            .map_or(0, |id| self.spans[id as usize].size)
    }

    /// Give the live block at `address` another size where it is; `None`, and nothing done, if it has
    /// no room to grow.
    ///
    /// It grows into the free span behind it, or into fresh pages behind the last span of its region;
    /// not past the size from which blocks live where huge pages are.
    pub(super) fn resize(
        &mut self,
        map: &AddressMap<12>,
        address: usize,
        size: usize,
        now: u64,
    ) -> Option<usize> {
        let id = self.used_at(map, address)?;
        let span = self.spans[id as usize];
        let pages = (address - span.start + size).div_ceil(PAGE_BYTES);
        if pages > span.pages {
            if Self::area_of(size, 64) != span.area {
                return None;
            }
            self.absorb(map, id, pages - span.pages)?;
        } else if pages < span.pages && span.area != Area::Unit {
            self.cut_tail(map, id, pages, now);
        }
        let (old_size, old_bytes) = (span.size, span.bytes());
        let span = &mut self.spans[id as usize];
        span.size = size.next_multiple_of(64).min(span.end() - span.data);
        let span = *span;
        self.count_used(span.area, span.bytes(), old_bytes);
        self.recent_peak_bytes = self.recent_peak_bytes.max(self.used_bytes);
        let counts = &mut self.counts;
        counts.current_bytes = counts.current_bytes - old_size as u64 + span.size as u64;
        counts.peak_bytes = counts.peak_bytes.max(counts.current_bytes);
        counts.total_bytes += span.size as u64;
        counts.total_count += 1;
        counts.hits += 1;
        Some(span.size)
    }

    /// Add `extra` pages to a used span from the free spans behind it.
    fn absorb(&mut self, map: &AddressMap<12>, id: u32, extra: usize) -> Option<()> {
        let Span { region, pages, .. } = self.spans[id as usize];
        let index = region as usize;
        let found = self.free_behind(map, id, extra);
        if found < extra {
            let last = self.spans[id as usize].end() + found * PAGE_BYTES;
            let region = self.regions[index].as_ref()?;
            let frontier = region.base.as_ptr() as usize + region.frontier;
            let room = (region.bytes - region.frontier) / PAGE_BYTES;
            if last != frontier || room < extra - found {
                return None;
            }
            let fresh = self.extend_region(map, index, extra - found)?;
            self.release_span(map, fresh, State::Cold);
        }
        while self.spans[id as usize].pages < pages + extra {
            let missing = pages + extra - self.spans[id as usize].pages;
            let next_id = (map.get(self.spans[id as usize].end()) - 1) as u32;
            self.remove_free(next_id);
            let next = self.spans[next_id as usize];
            let taken = next.pages.min(missing);
            if taken == next.pages {
                self.retire_id(next_id);
            } else {
                let rest = &mut self.spans[next_id as usize];
                rest.start += taken * PAGE_BYTES;
                rest.pages -= taken;
                self.insert_free(map, next_id, next.state);
            }
            self.spans[id as usize].pages += taken;
        }
        self.mark(map, id);
        Some(())
    }

    /// Free pages right behind a span, hot or cold; stops counting when there are `enough`.
    fn free_behind(&self, map: &AddressMap<12>, id: u32, enough: usize) -> usize {
        let own = self.spans[id as usize];
        let mut end = own.end();
        let mut found = 0;
        while found < enough {
            let Some(next_id) = map.get(end).checked_sub(1) else {
                break;
            };
            let next = self.spans[next_id as usize];
            let is_free = matches!(next.state, State::Hot | State::Cold);
            // Behind the frontier the map may speak of a region that is no more.
            if !is_free || next.start != end || next.region != own.region || next.pages == 0 {
                break;
            }
            found += next.pages;
            end = next.end();
        }
        found
    }

    /// Free the pages of a used span behind its first `pages`.
    fn cut_tail(&mut self, map: &AddressMap<12>, id: u32, pages: usize, now: u64) {
        let span = self.spans[id as usize];
        let tail = Span {
            start: span.start + pages * PAGE_BYTES,
            pages: span.pages - pages,
            stamp: now,
            ..span
        };
        self.spans[id as usize].pages = pages;
        self.mark(map, id);
        let tail_id = self.new_span(tail);
        self.release_span(map, tail_id, State::Hot);
    }

    /// Take the block at `address` back; returns its size, or 0 if there is none, and what of it
    /// was hardly touched and need not be kept.
    pub(super) fn give_back(
        &mut self,
        map: &AddressMap<12>,
        address: usize,
        now: u64,
    ) -> (usize, Option<Victim>) {
        let Some(id) = self.used_at(map, address) else {
            self.counts.invalid_frees += 1;
            return (0, None);
        };
        let span = &mut self.spans[id as usize];
        span.stamp = now;
        let span = *span;
        self.count_used(span.area, 0, span.bytes());
        self.counts.current_bytes -= span.size as u64;
        self.counts.current_count -= 1;
        if span.lazy {
            // SAFETY: the span is whole pages of a live region.
            let resident =
                unsafe { os::resident_samples(pointer(span.start), span.bytes(), TOUCH_SAMPLES) };
            self.zeroing.learn(span.size, resident * 2 > TOUCH_SAMPLES);
            if resident == 0 {
                return (span.size, Some(self.purge_span(id)));
            }
        }
        if span.area == Area::Middle && span.pages <= QUICK_PAGES {
            self.spans[id as usize].state = State::Quick;
            self.quick[span.pages].push(id);
            self.quick_bytes += span.bytes();
            if self.quick_bytes > QUICK_LIMIT_BYTES {
                self.merge_quick(map, u64::MAX);
            }
        } else {
            self.release_span(map, id, State::Hot);
        }
        (span.size, None)
    }

    /// Merge the waiting spans that were freed before `until` into the hot ones.
    fn merge_quick(&mut self, map: &AddressMap<12>, until: u64) {
        for pages in 0..self.quick.len() {
            let mut waiting = std::mem::take(&mut self.quick[pages]);
            waiting.retain(|&id| {
                if self.spans[id as usize].stamp >= until {
                    return true;
                }
                self.quick_bytes -= pages * PAGE_BYTES;
                self.release_span(map, id, State::Hot);
                false
            });
            self.quick[pages] = waiting;
        }
    }

    // ---- giving memory back ----

    fn start_purge(&mut self, id: u32) -> Victim {
        self.remove_free(id);
        self.purge_span(id)
    }

    /// Send a span that is in no index on its way to the kernel.
    fn purge_span(&mut self, id: u32) -> Victim {
        let span = &mut self.spans[id as usize];
        span.state = State::Purging;
        let victim = Victim {
            id,
            start: pointer(span.start),
            bytes: span.bytes(),
        };
        self.purging_bytes += victim.bytes;
        victim
    }

    /// Hot spans, oldest first, until at most `limit` bytes stay hot.
    fn purge_to(&mut self, limit: usize) -> Vec<Victim> {
        let mut victims = Vec::new();
        while self.hot_bytes > limit {
            let Some(&(_, id)) = self.by_age.first() else {
                break;
            };
            victims.push(self.start_purge(id));
        }
        victims
    }

    /// What the cap no longer allows to stay hot, after a block came back.
    ///
    /// What waits to be merged counts only for a cap that was given: the other has room for it.
    pub(super) fn excess_after_free(&mut self, map: &AddressMap<12>) -> Vec<Victim> {
        match self.fixed_cap {
            Some(cap) if self.quick_bytes > cap => self.excess_over(map, cap),
            Some(cap) => self.purge_to(cap - self.quick_bytes),
            None => self.purge_to(self.cap()),
        }
    }

    /// What must go so that fresh pages do not raise the peak by what lies idle.
    pub(super) fn excess_after_fresh(&mut self) -> Vec<Victim> {
        let allowed = (self.recent_peak_bytes - self.used_bytes).max(self.slack());
        self.purge_to(allowed)
    }

    /// Everything free, until at most `limit` bytes stay.
    pub(super) fn excess_over(&mut self, map: &AddressMap<12>, limit: usize) -> Vec<Victim> {
        if self.cached_bytes() > limit {
            self.merge_quick(map, u64::MAX);
        }
        self.purge_to(limit)
    }

    /// What was freed at or before `until`; lets the peak fade.
    pub(super) fn aged(&mut self, map: &AddressMap<12>, until: u64) -> Vec<Victim> {
        self.recent_peak_bytes -= (self.recent_peak_bytes - self.used_bytes) / 128;
        self.merge_quick(map, until.saturating_add(1));
        let mut victims = Vec::new();
        while let Some(&(stamp, id)) = self.by_age.first() {
            if stamp > until {
                break;
            }
            victims.push(self.start_purge(id));
        }
        victims
    }

    /// The kernel has the victims' pages (or refused): they are cold (or hot again).
    pub(super) fn end_purge(&mut self, map: &AddressMap<12>, victims: &[(Victim, bool)]) {
        for &(victim, given_back) in victims {
            self.purging_bytes -= victim.bytes;
            if given_back {
                self.counts.decommitted_bytes += victim.bytes as u64;
                self.release_span(map, victim.id, State::Cold);
            } else {
                self.release_span(map, victim.id, State::Hot);
            }
        }
    }

    // ---- health ----

    /// Walk every region and compare with the counts.
    pub(super) fn check(&self, map: &AddressMap<12>, report: &mut HealthReport) {
        let mut sums = [0usize; 5];
        let mut indexed = [[0usize; 2]; 3];
        let mut used_count = 0u64;
        for region in self.regions.iter().flatten() {
            self.check_region(
                map,
                region,
                report,
                &mut sums,
                &mut indexed,
                &mut used_count,
            );
        }
        let [used, quick, hot, cold, purging] = sums;
        for (name, counted, walked) in [
            ("used", self.used_bytes, used),
            ("quick", self.quick_bytes, quick),
            ("hot", self.hot_bytes, hot),
            ("cold", self.cold_bytes, cold),
            ("purging", self.purging_bytes, purging),
        ] {
            report.count(format!("large.{name}_bytes"), walked as u64);
            report.expect(counted == walked, || {
                format!("large: {counted} {name} bytes are counted, {walked} were found")
            });
        }
        report.expect(used_count == self.counts.current_count, || {
            format!(
                "large: {} blocks are counted, {used_count} found",
                self.counts.current_count
            )
        });
        self.check_quick(report);
        let hot_count: usize = indexed.iter().map(|found| found[0]).sum();
        report.expect(self.by_age.len() == hot_count, || {
            format!(
                "large: {hot_count} hot spans were found, {} are listed by age",
                self.by_age.len()
            )
        });
        for area in AREAS {
            let index = &self.areas[area as usize];
            let found = indexed[area as usize];
            report.expect(
                index.hot.len() == found[0] && index.cold.len() == found[1],
                || format!("large: the free index of {area:?} disagrees with the walk"),
            );
        }
    }

    /// The spans that wait unmerged: each on the list of its size, and on it once.
    fn check_quick(&self, report: &mut HealthReport) {
        let mut ids: Vec<u32> = Vec::new();
        for (pages, waiting) in self.quick.iter().enumerate() {
            for id in waiting {
                let span = &self.spans[*id as usize];
                report.expect(span.state == State::Quick && span.pages == pages, || {
                    format!("large: a {:?} span waits among the quick ones", span.state)
                });
            }
            ids.extend(waiting);
        }
        let listed = ids.len();
        ids.sort_unstable();
        ids.dedup();
        report.expect(ids.len() == listed, || {
            format!("large: {} spans wait on two lists", listed - ids.len())
        });
        let bytes: usize = ids.iter().map(|id| self.spans[*id as usize].bytes()).sum();
        report.expect(bytes == self.quick_bytes, || {
            format!(
                "large: {} quick bytes are counted, {bytes} are listed",
                self.quick_bytes
            )
        });
    }

    fn check_region(
        &self,
        map: &AddressMap<12>,
        region: &Region,
        report: &mut HealthReport,
        sums: &mut [usize; 5],
        indexed: &mut [[usize; 2]; 3],
        used_count: &mut u64,
    ) {
        let base = region.base.as_ptr() as usize;
        let mut at = base;
        let mut previous = None;
        while at < base + region.frontier {
            let word = map.get(at);
            let Some(span) = word
                .checked_sub(1)
                .and_then(|id| self.spans.get(id as usize))
            else {
                report.expect(false, || format!("large: no span at offset {}", at - base));
                return;
            };
            let broken = span.start != at || span.pages == 0 || span.area != region.area;
            report.expect(!broken, || {
                format!("large: broken span at offset {}", at - base)
            });
            if broken {
                return;
            }
            let free = matches!(span.state, State::Hot | State::Cold);
            report.expect(!(free && previous == Some(span.state)), || {
                format!(
                    "large: two {:?} neighbours at offset {}",
                    span.state,
                    at - base
                )
            });
            let kind = match span.state {
                State::Used => 0,
                State::Quick => 1,
                State::Hot => 2,
                State::Cold => 3,
                State::Purging => 4,
            };
            sums[kind] += span.bytes();
            if span.state == State::Used {
                *used_count += 1;
            }
            if free {
                let entry = self.entry((word - 1) as u32);
                let index = &self.areas[span.area as usize];
                let hot = span.state == State::Hot;
                indexed[span.area as usize][usize::from(!hot)] += 1;
                let listed = if hot {
                    index.hot.contains(&entry)
                } else {
                    index.cold.contains(&entry)
                };
                report.expect(listed, || {
                    format!("large: free span at offset {} is not indexed", at - base)
                });
            }
            previous = Some(span.state);
            at = span.end();
        }
        report.expect(at == base + region.frontier, || {
            "large: the last span crosses the frontier".to_owned()
        });
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        for region in self.regions.iter().flatten() {
            // SAFETY: every block keeps the resource alive, so no block is left.
            unsafe { os::release(region.base, region.bytes) };
        }
    }
}
