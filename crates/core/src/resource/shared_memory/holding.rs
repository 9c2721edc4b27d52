//! One process at a segment: its slot, the lock that dies with it, and which blocks it holds.
//!
//! A slot's byte of the file is locked by an open file description that only this process has, so
//! the kernel unlocks it when the process ends, however it ends. Whoever can lock the byte of a used
//! slot takes back what its owner had.
//!
//! A forked child shares its parent's blocks, and holds them as its parent does. Its slot is taken,
//! locked and written down before the fork; afterwards the parent closes its copy of the descriptor,
//! so that the lock ends with the child.

use super::holders::{Parcel, SLOT_COUNT};
use super::segment::Segment;
use crate::error::{Error, Result};
use crate::os::shared;
use crate::resource::fork::{self, ForkLocks};
use crate::sync::{Lock, Ordering};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// The slot of the process that made the segment, and of nobody else.
const MAKER: usize = 0;

/// A slot, and the descriptor with its lock.
struct Seat {
    slot: usize,
    /// Closing it unlocks the slot.
    _lock: OwnedFd,
}

struct State {
    /// `None` in a child that found no slot, or had nothing to hold.
    seat: Option<Seat>,
    /// How often this process uses each block, by its first page.
    held: HashMap<u32, u32>,
    /// While a fork is in progress: the child's.
    for_child: Option<Seat>,
    /// The forks before the process that this is.
    generation: u64,
}

/// This process at a segment.
pub struct Holding {
    segment: Segment,
    state: Lock<State>,
}

impl ForkLocks for Holding {
    fn lock_all(&self) {
        self.state.hold();
        // SAFETY: held above, by this thread.
        let state = unsafe { self.state.held() };
        if state.held.is_empty() {
            return;
        }
        state.for_child = self.take_seat(MAKER + 1..SLOT_COUNT).ok();
        let holders = self.segment.holders();
        for page in state.held.keys() {
            match &state.for_child {
                Some(seat) => holders.hold(*page, seat.slot),
                // It cannot be told when the child ends: what it shares is never used again.
                None => holders.hold_for_good(*page),
            }
        }
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: held by `lock_all` on this thread.
        let state = unsafe { self.state.held() };
        let for_child = state.for_child.take();
        if state.generation != fork::generation() {
            state.generation = fork::generation();
            state.seat = for_child;
        }
        // SAFETY: as above.
        unsafe { self.state.release() };
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if state.generation != fork::generation() {
            return;
        }
        if let Some(seat) = state.seat.take() {
            self.segment.holders().reap(seat.slot);
            self.segment.slots()[seat.slot].store(0, Ordering::Release);
        }
    }
}

impl Holding {
    /// Attach this process to a segment that it has made.
    pub fn found(segment: Segment) -> Result<Arc<Self>> {
        Self::sit(segment, MAKER..MAKER + 1)
    }

    /// Attach this process to another's segment.
    pub fn join(segment: Segment) -> Result<Arc<Self>> {
        Self::sit(segment, MAKER + 1..SLOT_COUNT)
    }

    fn sit(segment: Segment, slots: Range<usize>) -> Result<Arc<Self>> {
        let holding = Holding {
            segment,
            state: Lock::new(State {
                seat: None,
                held: HashMap::new(),
                for_child: None,
                generation: fork::generation(),
            }),
        };
        let seat = holding.take_seat(slots)?;
        holding.state.lock().seat = Some(seat);
        let holding = fork::shared(holding);
        Ok(holding)
    }

    /// The segment.
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Whether the process that made it, and hands out its blocks, is there.
    pub fn has_maker(&self) -> bool {
        // The file's own descriptor has no locks, so this process's are seen too.
        let locked = shared::is_locked_elsewhere(self.segment.file(), MAKER as u64, 1);
        locked.unwrap_or(true)
    }

    /// Which segment it is, among all.
    pub fn id(&self) -> u64 {
        self.segment.header().id
    }

    /// The number by which this process knows the segment's file.
    pub fn descriptor(&self) -> i32 {
        self.segment.file().as_raw_fd()
    }

    /// A slot that nobody has, locked.
    fn take_seat(&self, slots: Range<usize>) -> Result<Seat> {
        let failed = |error: std::io::Error| {
            Error::unsupported(format!("shared memory: attaching: {error}"))
        };
        let lock = shared::open_again(self.segment.file()).map_err(failed)?;
        for round in 0..2 {
            for slot in slots.clone() {
                let used = &self.segment.slots()[slot];
                let is_free = || used.load(Ordering::Acquire) == 0;
                if !is_free() || !shared::try_lock(&lock, slot as u64).map_err(failed)? {
                    continue;
                }
                if is_free() {
                    used.store(1, Ordering::Release);
                    return Ok(Seat { slot, _lock: lock });
                }
                shared::unlock(&lock, slot as u64);
            }
            if round == 0 {
                self.reap_dead();
            }
        }
        Err(Error::unsupported(format!(
            "shared memory: {SLOT_COUNT} processes hold blocks of this resource already, and no \
             more can"
        )))
    }

    /// Take back what processes had that died.
    pub fn reap_dead(&self) {
        // A descriptor of its own, so that this process's slot is seen to be locked.
        let Ok(lock) = shared::open_again(self.segment.file()) else {
            return;
        };
        for (slot, used) in self.segment.slots().iter().enumerate() {
            let is_used = || used.load(Ordering::Acquire) != 0;
            if is_used() && shared::try_lock(&lock, slot as u64).unwrap_or(false) {
                if is_used() {
                    self.segment.holders().reap(slot);
                    used.store(0, Ordering::Release);
                }
                shared::unlock(&lock, slot as u64);
            }
        }
    }

    fn seated(state: &State) -> Result<usize> {
        let seat = state.seat.as_ref().map(|seat| seat.slot);
        seat.ok_or_else(|| {
            Error::unsupported(
                "shared memory: this forked process is not attached to what its parent had",
            )
        })
    }

    /// Begin a block that is free.
    pub fn begin(&self, page: u32, pages: u32) -> Result<()> {
        let mut state = self.state.lock();
        let slot = Self::seated(&state)?;
        self.segment.holders().begin(page, pages, slot);
        *state.held.entry(page).or_insert(0) += 1;
        Ok(())
    }

    /// Whether this process has a slot, so that it can hold blocks.
    pub fn is_seated(&self) -> bool {
        self.state.lock().seat.is_some()
    }

    /// Have a slot, which a forked child may not have yet.
    pub fn be_seated(&self) -> Result<()> {
        self.seat(&mut self.state.lock())
    }

    fn seat(&self, state: &mut State) -> Result<()> {
        if state.seat.is_none() {
            state.seat = Some(self.take_seat(MAKER + 1..SLOT_COUNT)?);
        }
        Ok(())
    }

    /// One more use of a block.
    pub fn hold(&self, page: u32) -> Result<()> {
        let mut state = self.state.lock();
        self.seat(&mut state)?;
        let slot = Self::seated(&state)?;
        let uses = state.held.entry(page).or_insert(0);
        *uses += 1;
        if *uses == 1 {
            self.segment.holders().hold(page, slot);
        }
        Ok(())
    }

    /// One use less; false if this process does not hold it.
    pub fn release(&self, page: u32) -> bool {
        let mut state = self.state.lock();
        let Some(uses) = state.held.get_mut(&page) else {
            return false;
        };
        *uses -= 1;
        if *uses == 0 {
            state.held.remove(&page);
            if let Ok(slot) = Self::seated(&state) {
                self.segment.holders().release(page, slot);
            }
        }
        true
    }

    /// Whether this process holds the block that begins at a page.
    pub fn holds(&self, page: u32) -> bool {
        self.state.lock().held.contains_key(&page)
    }

    /// Blocks that this process holds.
    pub fn held_count(&self) -> usize {
        self.state.lock().held.len()
    }

    /// A parcel of a block that this process holds; `None` if too many are on their way.
    pub fn lend(&self, page: u32, given: bool) -> Result<Option<Parcel>> {
        let slot = Self::seated(&self.state.lock())?;
        Ok(self.segment.holders().lend(page, slot, given))
    }

    /// Hold the block of a parcel and take the parcel; false if it is not there any more.
    pub fn accept(&self, parcel: Parcel) -> Result<bool> {
        let page = parcel.page();
        let holders = self.segment.holders();
        if page as usize >= self.segment.header().page_count() || !holders.is_waiting(parcel) {
            return Ok(false);
        }
        self.hold(page)?;
        let is_taken = holders.take(parcel);
        if !is_taken {
            self.release(page);
        }
        Ok(is_taken)
    }

    /// Where a block is and how many bytes it has; `None` if none begins there.
    pub fn place(&self, page: u32) -> Option<(NonNull<u8>, usize)> {
        let pages = self.segment.holders().pages(page) as usize;
        let end = (page as usize).checked_add(pages)?;
        let is_sound = pages > 0 && end <= self.segment.header().page_count();
        let bytes = pages * crate::os::PAGE_BYTES;
        is_sound.then(|| (self.segment.address_of(page as usize), bytes))
    }
}

/// One use of a block of another process, or of this one; ended by dropping it.
pub struct Hold {
    holding: Arc<Holding>,
    page: u32,
}

impl Hold {
    /// Take the parcel's block; `None` if the parcel is not there any more.
    pub fn accept(holding: &Arc<Holding>, parcel: Parcel) -> Result<Option<Self>> {
        let accepted = holding.accept(parcel)?;
        Ok(accepted.then(|| Hold {
            holding: Arc::clone(holding),
            page: parcel.page(),
        }))
    }

    /// The segment it is of.
    pub fn holding(&self) -> &Arc<Holding> {
        &self.holding
    }

    /// Its first page.
    pub fn page(&self) -> u32 {
        self.page
    }

    /// Where the block is, and how many bytes it has.
    pub fn place(&self) -> Option<(NonNull<u8>, usize)> {
        self.holding.place(self.page)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holding.release(self.page);
    }
}
