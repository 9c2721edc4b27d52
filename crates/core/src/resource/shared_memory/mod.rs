//! Blocks that other processes can hold too: pages of a file in memory, which has no name.
//!
//! [`holders`] is the lock-free part, over words wherever they lie; [`layout`] says where that is,
//! [`segment`] is the file, [`holding`] a process at it. Only the process that made a segment hands
//! out its blocks, by two-level segregated fit with tags in its own memory; the others hold what was
//! sent to them, [`guests`]. A block that was given back here is used again when the last process
//! has let go of it. What is under way is in [`sent`]. [`build`] keeps unlike builds apart, here and
//! in the segments of channels.
//!
//! The file is sparse and of fixed, sealed length, mapped once by everybody. Memory comes and goes in
//! chunks, so a block either has all its memory or is not handed out.

pub mod build;
pub mod guests;
pub mod holders;
pub mod holding;
pub mod layout;
pub mod segment;
pub mod sent;

use super::fork::{self, ForkLocks};
use super::statistics::Counters;
use super::tlsf::{self, Tag, Tlsf};
use super::{Block, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::os::{self, PAGE_BYTES};
use crate::sync::{AtomicU64, Lock, Ordering::Relaxed};
use holding::Holding;
use layout::{CHUNK_BYTES, CHUNK_PAGES, Header};
use segment::Segment;
use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;

/// Blocks that are looked at, for each that is handed out, whether the others have let go of them.
const LOOKS: usize = 8;
/// How often it is looked whether the others are alive, in milliseconds.
const PROBE_MILLISECONDS: u64 = 40;

/// The segment that this process hands blocks out of.
struct Heap {
    holding: Arc<Holding>,
    tags: Vec<Tag>,
    lists: Tlsf,
    /// Whether a chunk has its memory.
    backed: Vec<bool>,
    /// Pages of each chunk that are out.
    used: Vec<u32>,
    /// Blocks that were given back here while others held them.
    lingering: VecDeque<u32>,
    probed: u64,
}

impl Heap {
    fn new(capacity: usize) -> Result<Self> {
        let holding = Holding::found(Segment::create(capacity)?)?;
        guests::add(&holding);
        let pages = holding.segment().header().page_count();
        let mut tags = vec![Tag::default(); pages];
        let lists = Tlsf::new(&mut tags);
        Ok(Heap {
            holding,
            tags,
            lists,
            backed: vec![false; pages / CHUNK_PAGES],
            used: vec![0; pages / CHUNK_PAGES],
            lingering: VecDeque::new(),
            probed: 0,
        })
    }

    fn page_at(&self, address: NonNull<u8>) -> Option<u32> {
        let offset = self.holding.segment().offset_of(address)?;
        (offset % PAGE_BYTES == 0).then_some((offset / PAGE_BYTES) as u32)
    }

    /// Pages of the block that begins here, if it is one and was not given back.
    fn pages_of(&self, page: u32) -> Option<u32> {
        tlsf::used_size(&self.tags, page).filter(|_| !self.lingering.contains(&page))
    }

    /// The chunks that pages lie in, each with how many of them.
    fn chunks(page: u32, pages: u32) -> impl Iterator<Item = (usize, u32)> {
        let (start, end) = (page as usize, (page + pages) as usize);
        (start / CHUNK_PAGES..end.div_ceil(CHUNK_PAGES)).map(move |chunk| {
            let first = start.max(chunk * CHUNK_PAGES);
            let last = end.min((chunk + 1) * CHUNK_PAGES);
            (chunk, (last - first) as u32)
        })
    }

    /// Take pages, with memory: the first, and whether any of the memory was there before.
    fn take(&mut self, pages: u32, alignment: u32) -> std::io::Result<Option<(u32, bool)>> {
        let Some(page) = self.lists.take(&mut self.tags, pages, alignment) else {
            return Ok(None);
        };
        let mut was_there = false;
        for (chunk, _) in Self::chunks(page, pages) {
            if self.backed[chunk] {
                was_there = true;
                continue;
            }
            if let Err(error) = self.holding.segment().back(chunk) {
                self.lists.give_back(&mut self.tags, page);
                return Err(error);
            }
            self.backed[chunk] = true;
        }
        for (chunk, count) in Self::chunks(page, pages) {
            self.used[chunk] += count;
        }
        Ok(Some((page, was_there)))
    }

    fn give_back(&mut self, page: u32) {
        let pages = self.lists.give_back(&mut self.tags, page);
        for (chunk, count) in Self::chunks(page, pages.unwrap_or(0)) {
            self.used[chunk] -= count;
        }
    }

    /// Look at some that linger, and use those again that nobody holds any more.
    fn settle(&mut self, looks: usize) {
        for _ in 0..looks.min(self.lingering.len()) {
            let Some(page) = self.lingering.pop_front() else {
                return;
            };
            if self.holding.segment().holders().is_free(page) {
                self.give_back(page);
            } else {
                self.lingering.push_back(page);
            }
        }
    }

    fn backed_bytes(&self) -> usize {
        self.backed.iter().filter(|backed| **backed).count() * CHUNK_BYTES
    }

    fn cached_bytes(&self) -> usize {
        let used: usize = self.used.iter().map(|pages| *pages as usize).sum();
        self.backed_bytes() - used * PAGE_BYTES
    }
}

#[derive(Default)]
struct State {
    /// Made when first needed; a forked child makes its own.
    heap: Option<Heap>,
    /// What this process has of those it was forked from.
    inherited: Vec<Arc<Holding>>,
    generation: u64,
}

struct Shared {
    capacity: usize,
    state: Lock<State>,
    counters: Counters,
    reused_bytes: AtomicU64,
    decommitted_bytes: AtomicU64,
    invalid_frees: AtomicU64,
}

impl ForkLocks for Shared {
    fn lock_all(&self) {
        self.state.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: held by `lock_all` on this thread.
        let state = unsafe { self.state.held() };
        if state.generation != fork::generation() {
            state.generation = fork::generation();
            // Its parent goes on to hand these blocks out; the child only has what is out.
            let heap = state.heap.take();
            state.inherited.extend(heap.map(|heap| heap.holding));
        }
        // SAFETY: as above.
        unsafe { self.state.release() };
    }
}

/// Where a block is, among all processes.
pub struct Place {
    /// The segment.
    pub holding: Arc<Holding>,
    /// The block's first page.
    pub page: u32,
}

/// Memory that other processes can be given, as a resource.
pub struct SharedMemoryResource {
    shared: Arc<Shared>,
}

impl SharedMemoryResource {
    /// Up to `capacity` bytes, rounded up to chunks, in blocks of whole pages.
    pub fn new(capacity: usize) -> Result<Self> {
        // What cannot be is refused now.
        let heap = Heap::new(capacity)?;
        let shared = fork::shared(Shared {
            capacity,
            state: Lock::new(State {
                heap: Some(heap),
                inherited: Vec::new(),
                generation: fork::generation(),
            }),
            counters: Counters::default(),
            reused_bytes: AtomicU64::new(0),
            decommitted_bytes: AtomicU64::new(0),
            invalid_frees: AtomicU64::new(0),
        });
        Ok(SharedMemoryResource { shared })
    }

    /// Bytes that blocks may take together.
    pub fn capacity_bytes(&self) -> usize {
        self.shared.capacity.next_multiple_of(CHUNK_BYTES)
    }

    /// Bytes that were given back here and are held by other processes, or on their way.
    pub fn lingering_bytes(&self) -> usize {
        sent::sweep();
        let mut state = self.shared.state.lock();
        let Some(heap) = &mut state.heap else {
            return 0;
        };
        heap.holding.reap_dead();
        heap.settle(usize::MAX);
        let pages = heap.lingering.iter();
        let pages = pages.filter_map(|page| tlsf::used_size(&heap.tags, *page));
        pages.map(|pages| pages as usize * PAGE_BYTES).sum()
    }

    /// The block that begins at an address, if it is out.
    pub fn place(&self, address: NonNull<u8>) -> Option<Place> {
        let state = self.shared.state.lock();
        if let Some(heap) = &state.heap
            && let Some(page) = heap.page_at(address)
        {
            heap.pages_of(page)?;
            let holding = Arc::clone(&heap.holding);
            return Some(Place { holding, page });
        }
        inherited_at(&state, address)
    }

    fn take(&self, request: &Request) -> Result<(Arc<Holding>, u32, u32, bool)> {
        let pages = request.size().div_ceil(PAGE_BYTES);
        let alignment = (request.alignment() / PAGE_BYTES).max(1) as u32;
        let mut state = self.shared.state.lock();
        if state.heap.is_none() {
            state.heap = Some(Heap::new(self.shared.capacity)?);
        }
        let Some(heap) = &mut state.heap else {
            unreachable!("made above")
        };
        if !heap.lingering.is_empty() {
            let now = os::now_milliseconds();
            if now.wrapping_sub(heap.probed) >= PROBE_MILLISECONDS {
                heap.probed = now;
                heap.holding.reap_dead();
            }
            heap.settle(LOOKS);
        }
        let refused = |error: std::io::Error| {
            Error::out_of_memory(
                request.size(),
                format!("shared memory is not there: {error}"),
            )
        };
        let wanted = u32::try_from(pages).ok();
        let wanted = wanted.filter(|pages| (*pages as usize) <= heap.tags.len());
        let mut taken = None;
        if let Some(pages) = wanted {
            taken = heap.take(pages, alignment).map_err(refused)?;
            if taken.is_none() && !heap.lingering.is_empty() {
                heap.holding.reap_dead();
                heap.settle(usize::MAX);
                taken = heap.take(pages, alignment).map_err(refused)?;
            }
        }
        let Some((page, was_there)) = taken else {
            let free = heap.lists.free() as usize * PAGE_BYTES;
            let lingering = heap.lingering.len();
            return Err(Error::out_of_memory(
                request.size(),
                format!(
                    "{free} of {} bytes are free, in no hole that is large enough; {lingering} \
                     blocks were given back here, but other processes hold them",
                    heap.tags.len() * PAGE_BYTES
                ),
            ));
        };
        Ok((Arc::clone(&heap.holding), page, pages as u32, was_there))
    }

    /// Give a block back; its size, or `None` if it is none.
    fn give_back(&self, address: NonNull<u8>) -> Option<usize> {
        let mut state = self.shared.state.lock();
        if let Some(heap) = &mut state.heap
            && let Some(page) = heap.page_at(address)
        {
            let pages = heap.pages_of(page)?;
            heap.lingering.push_back(page);
            let holding = Arc::clone(&heap.holding);
            // Who forks meanwhile has no part in it: the lock of the blocks is taken before this one.
            drop(state);
            holding.release(page);
            let mut state = self.shared.state.lock();
            if let Some(heap) = &mut state.heap
                && Arc::ptr_eq(&heap.holding, &holding)
                && let Some(index) = heap.lingering.iter().rposition(|it| *it == page)
                && holding.segment().holders().is_free(page)
            {
                heap.lingering.remove(index);
                heap.give_back(page);
            }
            return Some(pages as usize * PAGE_BYTES);
        }
        let place = inherited_at(&state, address)?;
        drop(state);
        let (_, bytes) = place.holding.place(place.page)?;
        if !place.holding.release(place.page) {
            return None;
        }
        if place.holding.held_count() == 0 {
            let mut state = self.shared.state.lock();
            let kept = |it: &Arc<Holding>| !Arc::ptr_eq(it, &place.holding);
            state.inherited.retain(kept);
        }
        Some(bytes)
    }
}

fn inherited_at(state: &State, address: NonNull<u8>) -> Option<Place> {
    state.inherited.iter().find_map(|holding| {
        let offset = holding.segment().offset_of(address)?;
        let page = (offset / PAGE_BYTES) as u32;
        let is_one = offset % PAGE_BYTES == 0 && holding.holds(page);
        is_one.then(|| Place {
            holding: Arc::clone(holding),
            page,
        })
    })
}

// SAFETY: blocks are disjoint runs of pages of a mapping that lives as long as the resource, or as
// this process holds one of them; zeroed ones are fresh or written below.
unsafe impl Resource for SharedMemoryResource {
    fn name(&self) -> &'static str {
        "SharedMemoryResource"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let (holding, page, pages, was_there) = self.take(&request)?;
        // Nobody else has the pages; not under the lock, as the blocks have their own.
        holding.begin(page, pages)?;
        let address = holding.segment().address_of(page as usize);
        let size = pages as usize * PAGE_BYTES;
        if request.zeroed() && was_there {
            // SAFETY: the block has at least so many bytes, and nobody has seen it yet.
            unsafe { address.write_bytes(0, request.size()) };
        }
        self.shared.counters.allocated(size, was_there);
        if was_there {
            self.shared.reused_bytes.fetch_add(size as u64, Relaxed);
        }
        Ok(Block {
            address,
            size,
            reused: was_there,
        })
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        if let Some(size) = self.give_back(address) {
            self.shared.counters.freed(size);
            return size;
        }
        self.shared.invalid_frees.fetch_add(1, Relaxed);
        0
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        let place = self.place(address);
        let place = place.and_then(|place| place.holding.place(place.page));
        place.map_or(0, |(_, bytes)| bytes)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        match self.place(address) {
            Some(_) => Ownership::Yes,
            None => Ownership::No,
        }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        let is_inside = |holding: &Arc<Holding>| holding.segment().offset_of(address).is_some();
        let state = self.shared.state.lock();
        let heap = state.heap.iter().map(|heap| &heap.holding);
        // An address inside that is no block is ours to complain about.
        let is_ours = heap.chain(&state.inherited).any(is_inside);
        drop(state);
        // SAFETY: the caller's promise.
        is_ours.then(|| unsafe { self.deallocate(address) })
    }

    fn statistics(&self) -> Statistics {
        let counted = self.shared.counters.read();
        let state = self.shared.state.lock();
        let (resident, cached) = state.heap.as_ref().map_or((0, 0), |heap| {
            let tables = heap.holding.segment().header().table_bytes();
            (heap.backed_bytes() + tables, heap.cached_bytes())
        });
        let reused = self.shared.reused_bytes.load(Relaxed);
        Statistics {
            resident_bytes: resident as u64,
            cached_bytes: cached as u64,
            reused_bytes: reused,
            reused_pages: reused / PAGE_BYTES as u64,
            decommitted_bytes: self.shared.decommitted_bytes.load(Relaxed),
            invalid_frees: self.shared.invalid_frees.load(Relaxed),
            ..counted
        }
    }

    fn cached_bytes(&self) -> usize {
        let state = self.shared.state.lock();
        state.heap.as_ref().map_or(0, Heap::cached_bytes)
    }

    /// Chunks without a block in them go back to the kernel, the highest first.
    fn trim(&self, target_bytes: usize) -> usize {
        sent::sweep();
        let mut state = self.shared.state.lock();
        let Some(heap) = &mut state.heap else {
            return 0;
        };
        heap.holding.reap_dead();
        heap.settle(usize::MAX);
        let mut cached = heap.cached_bytes();
        let before = cached;
        for chunk in (0..heap.backed.len()).rev() {
            if cached <= target_bytes {
                break;
            }
            if heap.backed[chunk] && heap.used[chunk] == 0 && heap.holding.segment().unback(chunk) {
                heap.backed[chunk] = false;
                cached -= CHUNK_BYTES;
            }
        }
        let returned = before - cached;
        self.shared
            .decommitted_bytes
            .fetch_add(returned as u64, Relaxed);
        returned
    }

    fn check(&self, report: &mut HealthReport) {
        let lingering_bytes = self.lingering_bytes();
        report.count("shared_memory.lingering_bytes", lingering_bytes as u64);
        let state = self.shared.state.lock();
        let Some(heap) = &state.heap else { return };
        let (findings, (count, pages)) = heap.lists.check(&heap.tags);
        let findings = findings
            .iter()
            .map(|finding| format!("shared_memory: {finding}"));
        report.findings.extend(findings);
        report.count("shared_memory.used_bytes", pages * PAGE_BYTES as u64);
        let holders = heap.holding.segment().holders();
        report.count("shared_memory.sent_count", holders.parcel_count() as u64);
        let used: u64 = heap.used.iter().map(|pages| u64::from(*pages)).sum();
        report.expect(used == pages, || {
            format!("shared_memory: {used} pages are counted as used, {pages} found")
        });
        let unbacked = heap.used.iter().zip(&heap.backed);
        let unbacked = unbacked.filter(|(used, backed)| **used > 0 && !**backed);
        let unbacked = unbacked.count();
        report.expect(unbacked == 0, || {
            format!("shared_memory: {unbacked} chunks with blocks have no memory")
        });
        let lost = heap.lingering.iter();
        let lost = lost.filter(|page| tlsf::used_size(&heap.tags, **page).is_none());
        let lost = lost.count();
        report.expect(lost == 0, || {
            format!("shared_memory: {lost} blocks are waited for that are not out")
        });
        let out = count - heap.lingering.len() as u64;
        let counted = self.shared.counters.read().current_count;
        // Others may come and go while this looks; a forked child has its parent's blocks too.
        report.expect(!state.inherited.is_empty() || out <= counted + 1, || {
            format!("shared_memory: {counted} blocks are counted, {out} found")
        });
        let header = heap.holding.segment().header();
        let sound = Header::check(header, header.segment_bytes);
        report.expect(sound.is_ok(), || format!("{sound:?}"));
    }

    fn shared_memory(&self) -> Option<&SharedMemoryResource> {
        Some(self)
    }
}
