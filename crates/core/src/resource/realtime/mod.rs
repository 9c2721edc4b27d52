//! A fixed amount of memory that is there: prefaulted, locked, and handed out without the kernel.
//!
//! Taking and giving back a block is a bounded number of steps (see `tlsf`) under one lock, and
//! touches memory that is in the page table already, the tables included. When it is used up, a
//! request fails; nothing is ever drawn from elsewhere.
//!
//! Any thread may use it; threads that meet wait for each other, which is the only time that the
//! kernel is entered. After a fork the child has its own copy of the memory, which is not locked, and
//! pages that either writes to are copied first: both fault once more on every page.

use super::fork::{self, ForkLocks};
use super::statistics::Counters;
use super::{Block, DEFAULT_ALIGNMENT, HealthReport, Ownership, Request, Resource, Statistics};
use crate::error::{Error, Result};
use crate::os::{self, PAGE_BYTES, locked};
use crate::resource::tlsf::{self, MAX_GRANULES, Tag, Tlsf};
use crate::sync::{AtomicU64, Lock, Ordering::Relaxed};
use std::ptr::NonNull;
use std::sync::Arc;

/// What sizes and positions are multiples of.
const GRANULE: usize = DEFAULT_ALIGNMENT;
/// The most that one resource may hold: 64 GiB.
pub const MAX_BYTES: usize = MAX_GRANULES as usize * GRANULE;

/// The reservation: first the blocks, then a tag for each granule of them.
struct Region {
    base: NonNull<u8>,
    granules: usize,
    bytes: usize,
}

// SAFETY: plain memory, as good in one thread as in another.
unsafe impl Send for Region {}
// SAFETY: the shared part is only numbers.
unsafe impl Sync for Region {}

impl Region {
    fn new(granules: usize) -> Option<Self> {
        let bytes = Self::tags_from(granules) + granules * size_of::<Tag>();
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let base = os::reserve(bytes)?;
        let region = Region {
            base,
            granules,
            bytes,
        };
        // SAFETY: the reservation made above.
        unsafe { os::commit(base, bytes) }.then_some(region)
    }

    /// Where the tags start, in bytes from the base.
    fn tags_from(granules: usize) -> usize {
        (granules * GRANULE).next_multiple_of(PAGE_BYTES)
    }

    /// Have all of it in memory, locked if the process may; says why not.
    fn populate(&self) -> std::io::Result<()> {
        // Huge pages while it is filled, for fewer misses of the TLB. Not afterwards: the kernel
        // would join small ones behind our back, and whoever touches them meanwhile faults.
        // SAFETY: the region is ours.
        unsafe { os::advise_huge(self.base, self.bytes, true) };
        // SAFETY: committed by `new`.
        let locked = unsafe { locked::lock(self.base, self.bytes) };
        if locked.is_err() {
            // SAFETY: committed by `new`, and nothing is in it yet.
            unsafe { locked::prefault(self.base, self.bytes) };
        }
        // SAFETY: as above.
        unsafe { os::advise_huge(self.base, self.bytes, false) };
        locked
    }

    /// The tags.
    ///
    /// # Safety
    /// The caller has the only borrow of them.
    #[allow(clippy::mut_from_ref)]
    unsafe fn tags(&self) -> &mut [Tag] {
        // SAFETY: the tags start inside the region.
        let first = unsafe { self.base.add(Self::tags_from(self.granules)) };
        // SAFETY: page-aligned, zero at first (a valid tag), and `granules` of them fit; the caller
        // excludes other borrows.
        unsafe { std::slice::from_raw_parts_mut(first.cast().as_ptr(), self.granules) }
    }

    /// The granule that starts at `address`, if one does.
    fn granule_at(&self, address: NonNull<u8>) -> Option<u32> {
        let offset = (address.as_ptr() as usize).checked_sub(self.base.as_ptr() as usize)?;
        let inside = offset % GRANULE == 0 && offset / GRANULE < self.granules;
        inside.then_some((offset / GRANULE) as u32)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: every block keeps the resource alive, so none is out.
        unsafe { os::release(self.base, self.bytes) };
    }
}

struct Shared {
    region: Region,
    /// Guards the region's tags as well.
    lists: Lock<Tlsf>,
    counters: Counters,
    invalid_frees: AtomicU64,
    /// The process that locked the region, if one did.
    locked_by: Option<u32>,
}

/// Memory that is there, as a resource.
pub struct RealtimeResource {
    shared: Arc<Shared>,
}

impl ForkLocks for Shared {
    fn lock_all(&self) {
        self.lists.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.lists.release() };
    }
}

impl RealtimeResource {
    /// Memory for `bytes`, rounded up to 64, in blocks; a fifth more is taken for its tables.
    ///
    /// Where the process may not lock so much it is an error, unless `allow_unlocked`.
    pub fn new(bytes: usize, allow_unlocked: bool) -> Result<Self> {
        if !(1..=MAX_BYTES).contains(&bytes) {
            return Err(Error::invalid(
                "realtime_bytes",
                format!("must be from 1 to {MAX_BYTES}, got {bytes}"),
            ));
        }
        let region = Region::new(bytes.div_ceil(GRANULE)).ok_or_else(|| {
            Error::out_of_memory(bytes, "the system has no more memory or address space")
        })?;
        let locked_by = match region.populate() {
            Ok(()) => Some(locked::process_id()),
            Err(_) if allow_unlocked => None,
            Err(error) => return Err(refused(region.bytes, &error)),
        };
        // SAFETY: nobody else has the region yet.
        let lists = Tlsf::new(unsafe { region.tags() });
        let shared = fork::shared(Shared {
            region,
            lists: Lock::new(lists),
            counters: Counters::default(),
            invalid_frees: AtomicU64::new(0),
            locked_by,
        });
        Ok(RealtimeResource { shared })
    }

    /// Bytes that blocks may take together.
    pub fn capacity_bytes(&self) -> usize {
        self.shared.region.granules * GRANULE
    }

    /// Whether the kernel must leave the memory where it is; not so in a forked child.
    pub fn is_locked(&self) -> bool {
        self.shared.locked_by == Some(locked::process_id())
    }
}

fn refused(bytes: usize, error: &std::io::Error) -> Error {
    let limit = match locked::lock_limit() {
        Some(limit) => format!("may lock {limit} bytes"),
        None => "may lock any number".to_owned(),
    };
    let kib = bytes.div_ceil(1024);
    Error::unsupported(format!(
        "realtime_bytes: locking {bytes} bytes, tables included, is refused ({error}); this process \
         {limit} (RLIMIT_MEMLOCK). Raise it: `ulimit -l {kib}` or more before the start, \
         LimitMEMLOCK= of a systemd unit, --ulimit memlock= of a container; or pass \
         allow_unlocked=True to go without"
    ))
}

// SAFETY: blocks are disjoint, aligned runs of granules of the region, which lives as long as the
// resource; zeroed ones are written below.
unsafe impl Resource for RealtimeResource {
    fn name(&self) -> &'static str {
        "RealtimeResource"
    }

    fn allocate(&self, request: Request) -> Result<Block> {
        let shared = &*self.shared;
        let Shared { region, .. } = shared;
        let granules = request.size().div_ceil(GRANULE);
        let size = granules * GRANULE;
        let alignment = (request.alignment() / GRANULE) as u32;
        let taken = {
            let mut lists = shared.lists.lock();
            // SAFETY: the lock is held, which guards them.
            let tags = unsafe { region.tags() };
            let granules = u32::try_from(granules).ok();
            let taken = granules.and_then(|granules| lists.take(tags, granules, alignment));
            if taken.is_some() {
                shared.counters.allocated(size, true);
            }
            taken.ok_or_else(|| lists.free() as usize * GRANULE)
        };
        let first = taken.map_err(|free| {
            let capacity = self.capacity_bytes();
            let hole = "in no hole that is large enough";
            Error::out_of_memory(
                request.size(),
                format!("{free} of {capacity} bytes are free, {hole}; none come from elsewhere"),
            )
        })?;
        // SAFETY: `first` is below the number of granules.
        let address = unsafe { region.base.add(first as usize * GRANULE) };
        if request.zeroed() {
            // SAFETY: the block has at least so many bytes, and nobody has seen it yet.
            unsafe { address.write_bytes(0, request.size()) };
        }
        Ok(Block {
            address,
            size,
            reused: true,
        })
    }

    unsafe fn deallocate(&self, address: NonNull<u8>) -> usize {
        let shared = &*self.shared;
        let given = shared.region.granule_at(address).and_then(|first| {
            let mut lists = shared.lists.lock();
            // SAFETY: the lock is held, which guards them.
            let tags = unsafe { shared.region.tags() };
            let size = lists.give_back(tags, first)? as usize * GRANULE;
            shared.counters.freed(size);
            Some(size)
        });
        if given.is_none() {
            shared.invalid_frees.fetch_add(1, Relaxed);
        }
        given.unwrap_or(0)
    }

    unsafe fn block_bytes(&self, address: NonNull<u8>) -> usize {
        let Some(first) = self.shared.region.granule_at(address) else {
            return 0;
        };
        let _lists = self.shared.lists.lock();
        // SAFETY: the lock is held, which guards them.
        let tags = unsafe { self.shared.region.tags() };
        tlsf::used_size(tags, first).map_or(0, |granules| granules as usize * GRANULE)
    }

    fn owns(&self, address: NonNull<u8>) -> Ownership {
        // SAFETY: looks up the address, whatever it is.
        if unsafe { self.block_bytes(address) } > 0 {
            Ownership::Yes
        } else {
            Ownership::No
        }
    }

    unsafe fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        // An address inside that is no block is ours to complain about.
        self.shared.region.granule_at(address)?;
        // SAFETY: the caller's promise.
        Some(unsafe { self.deallocate(address) })
    }

    fn statistics(&self) -> Statistics {
        Statistics {
            resident_bytes: self.shared.region.bytes as u64,
            invalid_frees: self.shared.invalid_frees.load(Relaxed),
            ..self.shared.counters.read()
        }
    }

    /// None: what is free is reserved, and not to be given back.
    fn cached_bytes(&self) -> usize {
        0
    }

    fn trim(&self, _target_bytes: usize) -> usize {
        0
    }

    fn check(&self, report: &mut HealthReport) {
        let lists = self.shared.lists.lock();
        // SAFETY: the lock is held, which guards them.
        let tags = unsafe { self.shared.region.tags() };
        let (findings, (count, granules)) = lists.check(tags);
        let findings = findings
            .iter()
            .map(|finding| format!("realtime: {finding}"));
        report.findings.extend(findings);
        report.count("realtime.used_bytes", granules * GRANULE as u64);
        let counted = self.shared.counters.read();
        let bytes = granules * GRANULE as u64;
        report.expect(
            (counted.current_count, counted.current_bytes) == (count, bytes),
            || {
                format!(
                    "realtime: {} blocks of {} bytes are counted, {count} of {bytes} found",
                    counted.current_count, counted.current_bytes
                )
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_thousand_blocks_cost_no_page_fault() {
        let resource = RealtimeResource::new(32 << 20, true).unwrap();
        let mut live: Vec<Option<Block>> = vec![None; 64];
        let sizes = [64, 100, 1000, 4096, 20_000, 100_000, 300_000];
        // What watches over the memory (the shadow of AddressSanitizer) is touched before it counts.
        let all = Request::new(resource.capacity_bytes(), 64, true).unwrap();
        let all = resource.allocate(all).unwrap();
        let mut report = HealthReport::default();
        resource.check(&mut report);
        // SAFETY: a live block.
        unsafe { resource.deallocate(all.address) };
        let mut turn = |index: usize| {
            if let Some(old) = live[index % 64].take() {
                // SAFETY: a live block.
                unsafe { resource.deallocate(old.address) };
            }
            let size = sizes[index.wrapping_mul(2_654_435_761) % sizes.len()];
            let request = Request::new(size, 64, index % 3 == 0).unwrap();
            let block = resource.allocate(request).unwrap();
            // SAFETY: a live block of `size` bytes.
            unsafe { block.address.write_bytes(index as u8, size) };
            live[index % 64] = Some(block);
        };
        (0..10_000).for_each(&mut turn);
        let before = locked::thread_minor_faults();
        (0..100_000).for_each(&mut turn);
        assert_eq!(locked::thread_minor_faults() - before, 0);
        for block in live.into_iter().flatten() {
            // SAFETY: a live block.
            unsafe { resource.deallocate(block.address) };
        }
        resource.check(&mut report);
        assert_eq!(report.findings, Vec::<String>::new());
    }

    #[test]
    fn an_ordinary_heap_is_seen_to_fault() {
        // The count above can fail: fresh pages are faults.
        let before = locked::thread_minor_faults();
        let pages = os::map_zeroed(100 * PAGE_BYTES).unwrap();
        // SAFETY: mapped above.
        unsafe { pages.write_bytes(1, 100 * PAGE_BYTES) };
        assert!(locked::thread_minor_faults() > before);
        // SAFETY: mapped above.
        unsafe { os::release(pages, 100 * PAGE_BYTES) };
    }

    #[test]
    fn exhaustion_says_what_is_left_and_frees_are_checked() {
        let resource = RealtimeResource::new(1000, true).unwrap();
        assert_eq!(resource.capacity_bytes(), 1024);
        let block = resource.allocate(Request::bytes(960).unwrap()).unwrap();
        let error = resource.allocate(Request::bytes(65).unwrap()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("65 bytes: 64 of 1024 bytes are free"),
            "{message}"
        );
        assert!(resource.allocate(Request::bytes(1 << 40).unwrap()).is_err());
        let foreign = NonNull::from(&message).cast();
        for wrong in [foreign, NonNull::dangling()] {
            assert_eq!(resource.owns(wrong), Ownership::No);
            // SAFETY: refused, and not followed.
            assert_eq!(unsafe { resource.take_back(wrong) }, None);
            // SAFETY: as above.
            assert_eq!(unsafe { resource.deallocate(wrong) }, 0);
        }
        // SAFETY: inside the block; refused, and not followed.
        let inner = unsafe { block.address.add(64) };
        // SAFETY: as above.
        assert_eq!(unsafe { resource.take_back(inner) }, Some(0));
        // SAFETY: the live block.
        assert_eq!(unsafe { resource.take_back(block.address) }, Some(960));
        assert_eq!(resource.statistics().invalid_frees, 3);
    }

    #[test]
    fn a_size_that_cannot_be_is_refused_by_name() {
        for bytes in [0, MAX_BYTES + 1, usize::MAX] {
            let error = RealtimeResource::new(bytes, true)
                .err()
                .unwrap()
                .to_string();
            assert!(
                error.starts_with("realtime_bytes: must be from 1 to"),
                "{error}"
            );
        }
    }
}
