//! One arena: blocks are cut from the front of the current chunk, and counted when they die.
//!
//! Cutting takes no lock: one compare-and-swap of the current chunk's word, and a byte in its table.
//! What is cut that way is counted later, whenever the lock is taken for something else: the word
//! says how many blocks and how far. Everything else is done under the arena's lock, which is
//! never held while upstream is called.

use super::GRANULE;
use super::state::{Aftermath, Chunk, State, Use};
use super::store::{Raw, Slot, SlotRef, Store};
use super::table::{Table, table_granules};
use super::timeline::{Place, Position};
use crate::error::{Error, Result};
use crate::os::PAGE_BYTES;
use crate::resource::{Block, HealthReport, Ownership, Request, Statistics};
use crate::sync::Lock;
use crate::sync::Quota;
use crate::sync::front::{SHUT, Word};
use crate::sync::{AtomicPtr, AtomicUsize, Ordering, Ordering::Relaxed};
use std::ptr::NonNull;
use std::sync::Arc;

/// How large an arena's chunks are.
#[derive(Clone, Copy, Debug)]
pub(in crate::resource) enum Growth {
    /// All the same.
    Even(usize),
    /// The first of this size. Later ones are a small share of what is held, so that what the last
    /// one leaves unused is small too; but larger for larger blocks, of which half a one is left
    /// over at the end of each: their geometric mean with what is held keeps both wastes equal.
    From(usize),
}

/// Largest chunk that an arena grows by.
const LARGEST_STEP: usize = 1 << 20;
/// The share of what is held that an arena grows by.
const SHARE: usize = 32;

impl Growth {
    fn next(self, held_bytes: usize, block_bytes: usize) -> usize {
        match self {
            Growth::Even(bytes) => bytes,
            Growth::From(first) if held_bytes == 0 => first,
            Growth::From(_) => {
                let mean = held_bytes.saturating_mul(block_bytes).isqrt();
                let wanted = mean.max(held_bytes / SHARE);
                let most = held_bytes.clamp(PAGE_BYTES, LARGEST_STEP);
                1 << wanted.clamp(PAGE_BYTES, most).ilog2()
            }
        }
    }
}

pub(in crate::resource) struct Arena {
    store: Arc<Store>,
    growth: Growth,
    quota: Option<Arc<Quota>>,
    /// The slot of the chunk being cut from, or [`SHUT_SLOT`]. `Release` after the slot's word was
    /// opened; a stale one does no harm, see [`crate::sync::front`].
    current: AtomicPtr<Slot>,
    state: Lock<State>,
    /// Its place in the store's list; guarded by that list's lock.
    pub(super) member: AtomicUsize,
}

/// Granules that blocks are cut on for before the arena goes back to the start of what is empty.
const NEARBY: usize = PAGE_BYTES / GRANULE;

/// Stands for the current chunk when there is none: nothing can be cut from it.
static SHUT_SLOT: Slot = Slot::new();

fn shut_slot() -> *mut Slot {
    std::ptr::from_ref(&SHUT_SLOT).cast_mut()
}

impl Arena {
    pub(in crate::resource) fn new(
        store: Arc<Store>,
        growth: Growth,
        quota: Option<Arc<Quota>>,
    ) -> Arc<Self> {
        let arena = Arc::new(Arena {
            store,
            growth,
            quota,
            current: AtomicPtr::new(shut_slot()),
            state: Lock::new(State::new()),
            member: AtomicUsize::new(0),
        });
        arena.store.join(&arena);
        arena
    }

    // ---- cutting ----

    #[inline]
    pub(in crate::resource) fn allocate(&self, request: Request) -> Result<Block> {
        let granules = request.size().div_ceil(GRANULE);
        let cut = if request.alignment() <= GRANULE {
            self.cut(granules)
        } else {
            None
        };
        let Some(block) = cut else {
            return self.allocate_slow(granules, request);
        };
        if request.zeroed() {
            // SAFETY: the block holds the request, and nobody has seen it yet.
            unsafe { block.address.write_bytes(0, request.size()) };
        }
        Ok(block)
    }

    /// Cut a block from the current chunk if it is there and has the room.
    #[inline]
    fn cut(&self, granules: usize) -> Option<Block> {
        let slot = self.current.load(Ordering::Acquire);
        // SAFETY: a slot of the store, which lives as long, or the static one.
        let slot = unsafe { &*slot };
        let claim = slot.front.claim(granules)?;
        // SAFETY: the claimed block is alive, so its chunk is.
        unsafe { Table::at(claim.base) }.set(claim.granule, granules);
        let address = (claim.base + claim.granule * GRANULE) as *mut u8;
        Some(Block {
            // SAFETY: chunks are not at address 0.
            address: unsafe { NonNull::new_unchecked(address) },
            size: granules * GRANULE,
            reused: claim.reused,
        })
    }

    #[cold]
    fn allocate_slow(&self, granules: usize, request: Request) -> Result<Block> {
        let (block, zero) = self.obtain(granules, request)?;
        if request.zeroed() && !zero {
            // SAFETY: the block holds the request, and nobody has seen it yet.
            unsafe { block.address.write_bytes(0, request.size()) };
        }
        Ok(block)
    }

    /// A block from the current chunk, a new one, or upstream, and whether it is zero.
    fn obtain(&self, granules: usize, request: Request) -> Result<(Block, bool)> {
        let mut drawn: Option<Raw> = None;
        loop {
            let mut state = self.state.lock();
            if state.ended {
                drop(state);
                self.keep(drawn);
                return Err(ended());
            }
            if let Some(block) = self.cut_locked(&mut state, granules, request.alignment()) {
                drop(state);
                self.keep(drawn);
                return Ok((block, false));
            }
            let block_bytes = granules * GRANULE;
            let next = || self.growth.next(state.held_bytes, block_bytes);
            let bytes = drawn.map_or_else(next, |raw| raw.bytes);
            if deserves_own(granules, request.alignment(), bytes) {
                drop(state);
                self.keep(drawn);
                return self.allocate_own(granules, request);
            }
            if let Some(raw) = drawn.take() {
                let aftermath = self.change_chunk(&mut state, raw);
                let block = self.cut_locked(&mut state, granules, request.alignment());
                drop(state);
                self.settle(aftermath);
                // A new chunk holds what deserves no own one; only the map may lack memory.
                return Ok((block.ok_or_else(no_map)?, false));
            }
            drop(state);
            match self.take(bytes) {
                Ok(raw) => drawn = Some(raw),
                // Upstream may have the block's bytes where it has no whole chunk.
                Err(_) => return self.allocate_own(granules, request),
            }
        }
    }

    /// Memory for a chunk. If upstream refuses, what became idle meanwhile serves, or goes back.
    fn take(&self, bytes: usize) -> Result<Raw> {
        self.store.take(bytes).or_else(|error| {
            self.drop_unused();
            if let Some(raw) = self.store.take_idle(bytes) {
                return Ok(raw);
            }
            if self.store.hand_idle_back(0) == 0 {
                return Err(error);
            }
            self.store.take(bytes)
        })
    }

    /// A block from upstream; if it refuses, once more when it has got back what is idle.
    fn draw(&self, request: Request) -> Result<Block> {
        self.store.draw(request).or_else(|error| {
            self.drop_unused();
            if self.store.hand_idle_back(0) == 0 {
                return Err(error);
            }
            self.store.draw(request)
        })
    }

    fn keep(&self, raw: Option<Raw>) {
        if let Some(raw) = raw {
            self.store.keep(raw);
        }
    }

    /// Cut with the lock held: also what needs more than the default alignment, lies across the
    /// border between used and unused memory, or came when the word's count was full.
    fn cut_locked(&self, state: &mut State, granules: usize, alignment: usize) -> Option<Block> {
        let index = state.current?;
        let mut word = self.shut(state, index);
        if let Some((floor, kept_bytes)) = state.floor(index, 0) {
            if self.quota.is_none() && word.offset() - floor >= NEARBY {
                state.chunks[index].note_used(word.offset());
                word = state.chunks[index].room_from(floor);
                state.counted_granule = floor;
                state.uncut(index, kept_bytes);
            }
        }
        let chunk = &mut state.chunks[index];
        let start = chunk.base + word.offset() * GRANULE;
        let offset = (start.next_multiple_of(alignment) - chunk.base) / GRANULE;
        let end = offset.checked_add(granules);
        let Some(end) = end.filter(|end| *end <= chunk.end_granule()) else {
            chunk.slot.front.open(word);
            return None;
        };
        let slot = chunk.slot;
        if !chunk.ready_to(end, |start, bytes| self.store.map(start, bytes, slot)) {
            chunk.slot.front.open(word);
            return None;
        }
        let reused = matches!(chunk.usage, Use::Bump { used_granules, .. } if end <= used_granules);
        chunk.table().set(offset, granules);
        let address = NonNull::new((chunk.base + offset * GRANULE) as *mut u8)?;
        let size = granules * GRANULE;
        chunk.cut_count += 1;
        chunk.cut_bytes += size;
        let room = chunk.room_from(end);
        chunk.slot.front.open(room);
        state.counted_granule = end;
        state.timeline.top().live += 1;
        state.counts.cut_count += 1;
        state.counts.cut_bytes += size as u64;
        state.counts.hits += u64::from(reused);
        Some(Block {
            address,
            size,
            reused,
        })
    }

    /// Give a block a chunk of its own.
    fn allocate_own(&self, granules: usize, request: Request) -> Result<(Block, bool)> {
        // A page at least, so that no two such blocks start in one page of the map.
        let size = (granules * GRANULE).max(PAGE_BYTES);
        let request = Request::new(size, request.alignment(), request.zeroed())?;
        let block = self.draw(request)?;
        let bound = {
            let mut state = self.state.lock();
            self.bind_own(&mut state, block, granules * GRANULE)
        };
        bound.inspect_err(|_| self.store.hand_back(block.address))?;
        Ok((block, request.zeroed()))
    }

    fn bind_own(&self, state: &mut State, block: Block, charged_bytes: usize) -> Result<()> {
        if state.ended {
            return Err(ended());
        }
        let serial = state.timeline.top().serial;
        let index = self.spare_chunk(state);
        let slot = state.chunks[index].slot;
        let base = block.address.as_ptr() as usize;
        if !self.store.map(base, 1, slot) {
            return Err(no_map());
        }
        state.spare.pop();
        let chunk = &mut state.chunks[index];
        chunk.usage = Use::Own { serial };
        (chunk.base, chunk.bytes) = (base, block.size);
        (chunk.cut_count, chunk.freed_count) = (1, 0);
        chunk.cut_bytes = charged_bytes;
        state.hold(block.size);
        state.timeline.top().live += 1;
        state.counts.cut_count += 1;
        state.counts.cut_bytes += block.size as u64;
        state.counts.hits += u64::from(block.reused);
        Ok(())
    }

    // ---- chunks ----

    /// Index of a chunk that is about nothing; it stays the last of the spare ones.
    fn spare_chunk(&self, state: &mut State) -> usize {
        if let Some(&index) = state.spare.last() {
            return index;
        }
        let index = state.chunks.len();
        state.chunks.push(Chunk {
            slot: self.store.take_slot(self, index),
            usage: Use::Nothing,
            base: 0,
            bytes: 0,
            cut_count: 0,
            freed_count: 0,
            cut_bytes: 0,
        });
        state.spare.push(index);
        index
    }

    /// Cut from `raw` from now on.
    fn change_chunk(&self, state: &mut State, raw: Raw) -> Aftermath {
        let index = self.spare_chunk(state);
        let slot = state.chunks[index].slot;
        let base = raw.base.as_ptr() as usize;
        state.spare.pop();
        let shut = self.shut_current(state);
        let aftermath = self.leave(state, shut);
        let turn = state.next_turn;
        state.next_turn += 1;
        let chunk = &mut state.chunks[index];
        chunk.usage = Use::Bump {
            turn,
            used_granules: raw.used_granules,
            wiped_granules: raw.wiped_granules,
            ready_granules: 0,
        };
        (chunk.base, chunk.bytes) = (base, raw.bytes);
        (chunk.cut_count, chunk.freed_count, chunk.cut_bytes) = (0, 0, 0);
        let first = chunk.first_granule();
        slot.front.bind(base, SHUT);
        state.hold(raw.bytes);
        self.open(state, index, first);
        aftermath
    }

    /// Make the chunk at `index` the current one, to be cut from `granule` on.
    fn open(&self, state: &mut State, index: usize, granule: usize) {
        let chunk = &state.chunks[index];
        let room = chunk.room_from(granule);
        chunk.slot.front.open(room);
        self.current.store(chunk.slot.pointer(), Ordering::Release);
        state.current = Some(index);
        state.counted_granule = granule;
    }

    /// Let nothing be cut from the current chunk, and count what was; returns its room.
    fn shut(&self, state: &mut State, index: usize) -> Word {
        let word = state.chunks[index].slot.front.shut();
        state.count(index, word);
        word.counted()
    }

    /// Shut the current chunk, if there is one.
    fn shut_current(&self, state: &mut State) -> Option<(usize, Word)> {
        let index = state.current?;
        Some((index, self.shut(state, index)))
    }

    /// Undo [`Arena::shut_current`].
    fn reopen(&self, state: &State, shut: Option<(usize, Word)>) {
        if let Some((index, room)) = shut {
            state.chunks[index].slot.front.open(room);
        }
    }

    /// Leave the current chunk, which is shut, if there is one; what is alive in it stays.
    fn leave(&self, state: &mut State, shut: Option<(usize, Word)>) -> Aftermath {
        let Some((index, room)) = shut else {
            return Aftermath::default();
        };
        state.current = None;
        self.current.store(shut_slot(), Ordering::Release);
        let chunk = &mut state.chunks[index];
        chunk.note_used(room.offset());
        if chunk.live_count() == 0 {
            state.unbind(index, false)
        } else {
            Aftermath::default()
        }
    }

    fn settle(&self, aftermath: Aftermath) {
        if let Some((raw, upstream)) = aftermath.chunk {
            if upstream {
                self.store.hand_back(raw.base);
            } else {
                self.store.keep(raw);
            }
        }
        self.uncharge(aftermath.uncharged);
    }

    fn uncharge(&self, bytes: usize) {
        if let Some(quota) = &self.quota {
            if bytes > 0 {
                quota.release(bytes);
            }
        }
    }

    // ---- blocks that come back ----

    /// The slot that `address` is about, if it is one of this arena's.
    #[inline]
    fn slot_of(&self, address: usize) -> Option<SlotRef> {
        let slot = self.store.slot_at(address)?;
        std::ptr::eq(slot.owner.load(Relaxed), self).then_some(slot)
    }

    /// Take a block back; `None` if `address` is no live block of this arena.
    #[inline]
    pub(in crate::resource) fn take_back(&self, address: NonNull<u8>) -> Option<usize> {
        let slot = self.slot_of(address.as_ptr() as usize)?;
        self.take_back_in(slot, address)
    }

    /// The same, if the slot that `address` is about is known to be this arena's.
    #[inline]
    pub(super) fn take_back_in(&self, slot: SlotRef, address: NonNull<u8>) -> Option<usize> {
        let address = address.as_ptr() as usize;
        // Filled in place: it is empty nearly always, and moving it would cost more than the rest.
        let mut aftermath = Aftermath::default();
        let mut state = self.state.lock();
        let size = self.free(&mut state, slot, address, &mut aftermath)?;
        drop(state);
        if !aftermath.is_empty() {
            self.settle(aftermath);
        }
        Some(size)
    }

    /// Take a block back; 0, and counted, if `address` is none.
    #[inline]
    pub(in crate::resource) fn deallocate(&self, address: NonNull<u8>) -> usize {
        self.take_back(address).unwrap_or_else(|| {
            self.state.lock().counts.invalid_frees += 1;
            0
        })
    }

    #[inline]
    fn free(
        &self,
        state: &mut State,
        slot: SlotRef,
        address: usize,
        aftermath: &mut Aftermath,
    ) -> Option<usize> {
        let index = slot.index.load(Relaxed);
        let (size, granule) = state.block_at(index, address)?;
        state.note_peak();
        state.counts.freed_count += 1;
        state.counts.freed_bytes += size as u64;
        let chunk = &mut state.chunks[index];
        chunk.freed_count += 1;
        match chunk.usage {
            Use::Own { serial } => {
                state.timeline.freed_own(serial);
                *aftermath = state.unbind(index, true);
            }
            Use::Bump { turn, .. } => {
                chunk.table().clear(granule);
                let position = Position { turn, granule };
                if state.current == Some(index) {
                    state.timeline.freed(position);
                    self.sink(state, index, aftermath);
                } else if chunk.live_count() > 0 {
                    state.timeline.freed(position);
                } else {
                    let granule = chunk.first_granule();
                    let retired = state.timeline.retired(Position { turn, granule });
                    state.timeline.freed(position);
                    *aftermath = state.unbind(index, retired);
                }
            }
            Use::Nothing => return None,
        }
        Some(size)
    }

    /// Cut again from where nothing behind is alive.
    ///
    /// Not at every free: within [`NEARBY`] granules the next blocks are as warm as the last ones.
    /// But what is charged comes back at once, and memory that was never used before is used no
    /// further than it must.
    #[inline]
    fn sink(&self, state: &mut State, index: usize, aftermath: &mut Aftermath) {
        let word = state.chunks[index].slot.front.look();
        let Some((floor, kept_bytes)) = state.floor(index, word.count()) else {
            return;
        };
        let above = word.offset() - floor;
        if above == 0 || above < NEARBY && word.reused() && self.quota.is_none() {
            return;
        }
        let chunk = &mut state.chunks[index];
        chunk.note_used(word.offset());
        // A block cut meanwhile is alive: then the word is another, and it stays.
        if chunk.slot.front.replace(word, chunk.room_from(floor)) {
            state.count(index, word);
            state.counted_granule = floor;
            aftermath.uncharged = state.uncut(index, kept_bytes);
        }
    }

    /// Usable size of the block at `address`; 0 if it is none.
    pub(in crate::resource) fn block_bytes(&self, address: NonNull<u8>) -> usize {
        let address = address.as_ptr() as usize;
        let Some(slot) = self.slot_of(address) else {
            return 0;
        };
        let state = self.state.lock();
        let found = state.block_at(slot.index.load(Relaxed), address);
        found.map_or(0, |(size, _)| size)
    }

    pub(in crate::resource) fn owns(&self, address: NonNull<u8>) -> Ownership {
        if self.block_bytes(address) > 0 {
            Ownership::Yes
        } else {
            Ownership::No
        }
    }

    // ---- savepoints ----

    /// Remember this moment; the number names it.
    pub(super) fn savepoint(&self) -> u64 {
        let mut state = self.state.lock();
        let place = self.now(&mut state);
        state.timeline.save(place)
    }

    /// Count what was cut; returns where the next block will be cut.
    fn now(&self, state: &mut State) -> Place {
        let Some(index) = state.current else {
            return state.next_chunk();
        };
        let word = state.chunks[index].slot.front.take_count();
        state.count(index, word);
        let chunk = &state.chunks[index];
        let position = Position {
            turn: chunk.turn().unwrap_or(0),
            granule: word.offset(),
        };
        Place {
            position,
            chunk: index,
            cut_bytes: chunk.cut_bytes,
        }
    }

    /// Forget a savepoint; what came after it counts for the one before.
    pub(super) fn release(&self, savepoint: u64) {
        self.state.lock().timeline.release(savepoint);
    }

    /// Go back to a savepoint, or to the beginning for 0; returns the live blocks given up.
    ///
    /// The work does not grow with what was cut since, but with the savepoints made since.
    pub(super) fn rollback(&self, savepoint: u64, retire: bool) -> Result<u64> {
        let mut state = self.state.lock();
        let Some(span) = state.timeline.find(savepoint) else {
            return Err(Error::invalid(
                "savepoint",
                "must be one that can still be rolled back to, got one that ended with a \
                 rollback to an earlier one or with a reset",
            ));
        };
        let shut = self.shut_current(&mut state);
        let (live, retired) = state.timeline.live_from(span);
        if live > 0 && !retire {
            self.reopen(&state, shut);
            return Err(still_alive(live));
        }
        let aftermath = if live == 0 && retired == 0 {
            self.rewind(&mut state, span, shut)
        } else {
            let aftermath = self.leave(&mut state, shut);
            let place = state.next_chunk();
            state.timeline.retire(span, place);
            aftermath
        };
        drop(state);
        self.settle(aftermath);
        Ok(live)
    }

    /// Cut from where the span at `span` starts; nothing is alive from there on. The current chunk
    /// is shut.
    fn rewind(&self, state: &mut State, span: usize, shut: Option<(usize, Word)>) -> Aftermath {
        let place = state.timeline.span(span).place;
        state.timeline.rewind(span);
        let target = state.chunks.get(place.chunk);
        let there = target.is_some_and(|chunk| chunk.turn() == Some(place.position.turn));
        if !there {
            return self.leave(state, shut);
        }
        let mut aftermath = match shut {
            Some((index, room)) if index == place.chunk => {
                state.chunks[index].note_used(room.offset());
                Aftermath::default()
            }
            _ => self.leave(state, shut),
        };
        aftermath.uncharged += state.uncut(place.chunk, place.cut_bytes);
        self.open(state, place.chunk, place.position.granule);
        aftermath
    }

    /// Start over; returns the live blocks given up. Savepoints end.
    pub(super) fn reset(&self, retire: bool) -> Result<u64> {
        self.rollback(0, retire)
    }

    /// Cut nothing any more and leave every live block to its views; returns how many.
    pub(in crate::resource) fn end(&self) -> u64 {
        let mut state = self.state.lock();
        state.ended = true;
        let shut = self.shut_current(&mut state);
        let aftermath = self.leave(&mut state, shut);
        let live = state.counts.cut_count - state.counts.freed_count;
        drop(state);
        self.settle(aftermath);
        live
    }

    /// Give up every live block, and keep no chunk.
    pub(super) fn rest(&self) {
        let mut state = self.state.lock();
        let shut = self.shut_current(&mut state);
        let aftermath = self.leave(&mut state, shut);
        let place = state.next_chunk();
        if let Some(first) = state.timeline.find(0) {
            state.timeline.retire(first, place);
        }
        drop(state);
        self.settle(aftermath);
    }

    // ---- reports ----

    /// What this arena did; what it holds is `resident_bytes`.
    pub(in crate::resource) fn statistics(&self) -> Statistics {
        let mut state = self.state.lock();
        self.now(&mut state);
        state.note_peak();
        let counts = &state.counts;
        Statistics {
            current_bytes: counts.cut_bytes - counts.freed_bytes,
            current_count: counts.cut_count - counts.freed_count,
            peak_bytes: counts.peak_bytes,
            peak_count: counts.peak_count,
            total_bytes: counts.cut_bytes,
            total_count: counts.cut_count,
            hits: counts.hits,
            misses: counts.cut_count - counts.hits,
            resident_bytes: state.held_bytes as u64,
            cached_bytes: state.unused_bytes() as u64,
            invalid_frees: counts.invalid_frees,
            ..Statistics::default()
        }
    }

    /// Bytes of the current chunk if nothing in it is alive.
    pub(in crate::resource) fn unused_bytes(&self) -> usize {
        self.state.lock().unused_bytes()
    }

    /// Most bytes of chunks held at once.
    pub(in crate::resource) fn peak_held_bytes(&self) -> usize {
        self.state.lock().peak_held_bytes
    }

    /// Let go of the current chunk if nothing in it is alive.
    pub(in crate::resource) fn drop_unused(&self) {
        let mut state = self.state.lock();
        if state.unused_bytes() == 0 {
            return;
        }
        let shut = self.shut_current(&mut state);
        // Something may have been cut between the look and the shutting.
        let alive = shut.is_some_and(|(index, _)| state.chunks[index].live_count() > 0);
        if alive {
            self.reopen(&state, shut);
            return;
        }
        let aftermath = self.leave(&mut state, shut);
        drop(state);
        self.settle(aftermath);
    }

    pub(in crate::resource) fn check(&self, report: &mut HealthReport) {
        let mut state = self.state.lock();
        let shut = self.shut_current(&mut state);
        state.check(report);
        self.reopen(&state, shut);
    }

    // ---- fork ----

    pub(super) fn lock_for_fork(&self) {
        self.state.hold();
    }

    /// # Safety
    /// This thread, or the one it was forked from, called [`Arena::lock_for_fork`].
    pub(super) unsafe fn unlock_after_fork(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.state.release() };
    }
}

/// Whether a block is better off with a chunk of its own than in a new chunk of `chunk_bytes`.
fn deserves_own(granules: usize, alignment: usize, chunk_bytes: usize) -> bool {
    let room = chunk_bytes / GRANULE - table_granules(chunk_bytes);
    let padding = alignment / GRANULE - 1;
    let bytes = granules * GRANULE;
    granules + padding > room || bytes >= PAGE_BYTES && bytes > chunk_bytes / 2
}

fn ended() -> Error {
    Error::closed("the arena has ended")
}

fn no_map() -> Error {
    Error::out_of_memory(1 << 21, "no memory for the arena's map")
}

fn still_alive(live: u64) -> Error {
    let blocks = if live == 1 { "block is" } else { "blocks are" };
    Error::invalid(
        "retire",
        format!("must be true while views keep blocks alive, got false: {live} {blocks} alive"),
    )
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.store.leave(self);
        let state = self.state.get_mut();
        if let Some(index) = state.current {
            let word = state.chunks[index].slot.front.shut();
            state.count(index, word);
        }
        let mut left = Vec::new();
        let mut uncharged = 0;
        for chunk in &state.chunks {
            let Some(mut raw) = chunk.raw() else {
                continue;
            };
            // Blocks that were never given back die here; their entries do not.
            if chunk.live_count() > 0 {
                raw.wiped_granules = 0;
            }
            left.push((raw, chunk.turn().is_none()));
            uncharged += chunk.cut_bytes;
        }
        for (raw, own) in left {
            if own {
                self.store.hand_back(raw.base);
            } else {
                self.store.keep(raw);
            }
        }
        self.uncharge(uncharged);
        let slots = std::mem::take(&mut self.state.get_mut().chunks);
        self.store
            .give_slots(slots.into_iter().map(|chunk| chunk.slot));
    }
}
