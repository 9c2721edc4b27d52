//! What arenas share: where chunks come from, which are kept, and the way from an address to one.
//!
//! A slot describes a chunk. Slots are never freed before the store, so a word of the map may be
//! followed whatever became of the chunk; whether the slot still is about that address is decided
//! under its arena's lock. Lock order: `arenas`, the arenas' own, `shelf`, upstream's.

use super::{Arena, GRANULE};
use crate::error::{Error, Result};
use crate::os::PAGE_BYTES;
use crate::resource::address_map::AddressMap;
use crate::resource::fork::{self, ForkLocks};
use crate::resource::{Block, Request, Resource};
use crate::sync::front::Front;
use crate::sync::{AtomicPtr, AtomicUsize, Lock, Ordering::Relaxed};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// A chunk as the threads that cut from it see it.
pub(super) struct Slot {
    pub front: Front,
    /// The arena it is about, or null.
    pub owner: AtomicPtr<Arena>,
    /// Index among the arena's chunks.
    pub index: AtomicUsize,
}

impl Slot {
    pub(super) const fn new() -> Self {
        Slot {
            front: Front::new(),
            owner: AtomicPtr::new(std::ptr::null_mut()),
            index: AtomicUsize::new(0),
        }
    }
}

/// A slot of a store that the holder keeps alive.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotRef(NonNull<Slot>);

// SAFETY: slots are atomics, and live as long as the store, which whoever has a `SlotRef` holds.
unsafe impl Send for SlotRef {}

impl SlotRef {
    pub(super) fn pointer(self) -> *mut Slot {
        self.0.as_ptr()
    }
}

impl Deref for SlotRef {
    type Target = Slot;

    #[inline]
    fn deref(&self) -> &Slot {
        // SAFETY: slots are boxes that only the store's `drop` frees.
        unsafe { self.0.as_ref() }
    }
}

/// Memory for a chunk that nothing is cut from.
#[derive(Clone, Copy)]
pub(super) struct Raw {
    pub base: NonNull<u8>,
    pub bytes: usize,
    /// Its first granules, up to this one, were used before.
    pub used_granules: usize,
    /// Its table says that no block starts in its first granules, up to this one.
    pub wiped_granules: usize,
}

// SAFETY: owned memory that nothing points into.
unsafe impl Send for Raw {}

#[derive(Default)]
struct Shelf {
    /// Chunks to use again, by size; no list is empty.
    idle: BTreeMap<usize, Vec<Raw>>,
    idle_bytes: usize,
    slots: Vec<NonNull<Slot>>,
    spare: Vec<SlotRef>,
}

// SAFETY: the slots are owned by the shelf.
unsafe impl Send for Shelf {}

impl Shelf {
    fn take_idle(&mut self, size: usize) -> Option<Raw> {
        let Entry::Occupied(mut list) = self.idle.entry(size) else {
            return None;
        };
        let raw = list.get_mut().pop();
        if list.get().is_empty() {
            list.remove();
        }
        self.idle_bytes -= raw.map_or(0, |raw| raw.bytes);
        raw
    }
}

/// An arena by its address; it takes itself off the list before it is freed.
struct Member(*const Arena);

// SAFETY: only followed while the list is locked, which keeps the arena alive.
unsafe impl Send for Member {}

pub(in crate::resource) struct Store {
    upstream: Arc<dyn Resource>,
    map: AddressMap<12>,
    shelf: Lock<Shelf>,
    arenas: Lock<Vec<Member>>,
    /// Most bytes of idle chunks to keep.
    keep_bytes: usize,
    /// Bytes drawn from upstream. Read by reports only, so `Relaxed` suffices.
    drawn_bytes: AtomicUsize,
}

impl Store {
    pub(in crate::resource) fn new(
        upstream: Arc<dyn Resource>,
        keep_bytes: usize,
    ) -> Result<Arc<Self>> {
        crate::resource::may_divide(&*upstream)?;
        let map = AddressMap::new()
            .ok_or_else(|| Error::out_of_memory(1 << 21, "no address space for an arena's map"))?;
        let store = fork::shared(Store {
            upstream,
            map,
            shelf: Lock::default(),
            arenas: Lock::default(),
            keep_bytes,
            drawn_bytes: AtomicUsize::new(0),
        });
        Ok(store)
    }

    pub(in crate::resource) fn upstream(&self) -> &Arc<dyn Resource> {
        &self.upstream
    }

    /// The slot that the page of `address` was last mapped to.
    #[inline]
    pub(super) fn slot_at(&self, address: usize) -> Option<SlotRef> {
        NonNull::new(self.map.get(address) as *mut Slot).map(SlotRef)
    }

    /// Map every page from `start` on; false if there is no memory for the map's tables.
    pub(super) fn map(&self, start: usize, bytes: usize, slot: SlotRef) -> bool {
        let word = slot.pointer() as u64;
        (0..bytes)
            .step_by(PAGE_BYTES)
            .all(|offset| self.map.set(start + offset, word))
    }

    pub(super) fn take_slot(&self, owner: *const Arena, index: usize) -> SlotRef {
        let mut shelf = self.shelf.lock();
        let slot = shelf.spare.pop().unwrap_or_else(|| {
            let slot = NonNull::from(Box::leak(Box::new(Slot::new())));
            shelf.slots.push(slot);
            SlotRef(slot)
        });
        slot.index.store(index, Relaxed);
        slot.owner.store(owner.cast_mut(), Relaxed);
        slot
    }

    /// Take slots back that nobody can cut from any more.
    pub(super) fn give_slots(&self, slots: impl Iterator<Item = SlotRef>) {
        let mut shelf = self.shelf.lock();
        for slot in slots {
            slot.owner.store(std::ptr::null_mut(), Relaxed);
            shelf.spare.push(slot);
        }
    }

    /// Memory for a chunk: one that is kept, or a new one. Called without an arena's lock.
    pub(super) fn take(&self, bytes: usize) -> Result<Raw> {
        if let Some(raw) = self.take_idle(bytes) {
            return Ok(raw);
        }
        let block = self.draw(Request::new(bytes, PAGE_BYTES, false)?)?;
        Ok(Raw {
            base: block.address,
            bytes,
            used_granules: if block.reused { bytes / GRANULE } else { 0 },
            wiped_granules: 0,
        })
    }

    /// A chunk that is kept, of this size or at most an eighth more.
    pub(super) fn take_idle(&self, bytes: usize) -> Option<Raw> {
        let mut shelf = self.shelf.lock();
        let (&size, _) = shelf.idle.range(bytes..=bytes + bytes / 8).next()?;
        shelf.take_idle(size)
    }

    /// Keep a chunk for the next one who needs it, if there is room.
    pub(super) fn keep(&self, raw: Raw) {
        {
            let mut shelf = self.shelf.lock();
            if shelf.idle_bytes.saturating_add(raw.bytes) <= self.keep_bytes {
                shelf.idle_bytes += raw.bytes;
                shelf.idle.entry(raw.bytes).or_default().push(raw);
                return;
            }
        }
        self.hand_back(raw.base);
    }

    /// New memory from upstream.
    pub(super) fn draw(&self, request: Request) -> Result<Block> {
        let block = self.upstream.allocate(request)?;
        self.drawn_bytes.fetch_add(block.size, Relaxed);
        Ok(block)
    }

    pub(in crate::resource) fn drawn_bytes(&self) -> usize {
        self.drawn_bytes.load(Relaxed)
    }

    /// Give memory back to upstream.
    pub(super) fn hand_back(&self, base: NonNull<u8>) {
        // SAFETY: drawn from upstream for a chunk in which nothing is alive and that no slot is
        // about any more.
        let bytes = unsafe { self.upstream.deallocate(base) };
        self.drawn_bytes.fetch_sub(bytes, Relaxed);
    }

    pub(in crate::resource) fn idle_bytes(&self) -> usize {
        self.shelf.lock().idle_bytes
    }

    /// Give idle chunks back to upstream until at most `target` bytes of them are kept, and let
    /// upstream keep what is left of the target; returns the bytes that went to the kernel.
    pub(in crate::resource) fn trim(&self, target: usize) -> usize {
        let before = self.upstream.statistics().resident_bytes;
        self.hand_idle_back(target);
        let kept = self.idle_bytes();
        self.upstream.trim(target.saturating_sub(kept));
        let after = self.upstream.statistics().resident_bytes;
        before.saturating_sub(after) as usize
    }

    /// Give idle chunks back to upstream until at most `target` bytes of them are kept; returns how
    /// many bytes.
    pub(super) fn hand_idle_back(&self, target: usize) -> usize {
        let mut surplus = Vec::new();
        {
            let mut shelf = self.shelf.lock();
            while shelf.idle_bytes > target {
                let Some((&size, _)) = shelf.idle.last_key_value() else {
                    break;
                };
                surplus.extend(shelf.take_idle(size));
            }
        }
        for raw in &surplus {
            self.hand_back(raw.base);
        }
        surplus.iter().map(|raw| raw.bytes).sum()
    }

    /// Have `arena` locked at every fork until it leaves.
    pub(super) fn join(&self, arena: &Arc<Arena>) {
        let mut arenas = self.arenas.lock();
        arena.member.store(arenas.len(), Relaxed);
        arenas.push(Member(Arc::as_ptr(arena)));
    }

    pub(super) fn leave(&self, arena: &Arena) {
        let mut arenas = self.arenas.lock();
        let index = arena.member.load(Relaxed);
        debug_assert!(std::ptr::eq(arenas[index].0, arena));
        arenas.swap_remove(index);
        if let Some(moved) = arenas.get(index) {
            // SAFETY: an arena on the list is alive while the list is locked.
            unsafe { &*moved.0 }.member.store(index, Relaxed);
        }
    }

    /// Idle bytes as counted and as found.
    pub(super) fn idle_as_found(&self) -> (usize, usize) {
        let shelf = self.shelf.lock();
        let lists = shelf.idle.values().flatten();
        (shelf.idle_bytes, lists.map(|raw| raw.bytes).sum())
    }
}

impl ForkLocks for Store {
    fn lock_all(&self) {
        self.arenas.hold();
        // SAFETY: held above, by this thread.
        for member in unsafe { self.arenas.held() } {
            // SAFETY: an arena on the list is alive while the list is locked.
            unsafe { &*member.0 }.lock_for_fork();
        }
        self.shelf.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: `lock_all` on this thread called `hold`.
        unsafe { self.shelf.release() };
        // SAFETY: as above.
        for member in unsafe { self.arenas.held() } {
            // SAFETY: as in `lock_all`.
            let arena = unsafe { &*member.0 };
            // SAFETY: `lock_all` on this thread locked it.
            unsafe { arena.unlock_after_fork() };
        }
        // SAFETY: as above.
        unsafe { self.arenas.release() };
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let shelf = std::mem::take(self.shelf.get_mut());
        for raw in shelf.idle.into_values().flatten() {
            self.hand_back(raw.base);
        }
        for slot in shelf.slots {
            // SAFETY: leaked by `take_slot`; whoever had a `SlotRef` held the store.
            drop(unsafe { Box::from_raw(slot.as_ptr()) });
        }
    }
}
