//! A ring of fixed capacity that many threads push to and pop from without a lock.
//!
//! After Vyukov's bounded MPMC queue (2010), with the lap in the position as in crossbeam's
//! `ArrayQueue`, which saves a division. Each slot has a stamp that says whose turn it is: the
//! position of the push that may write it, or one more once it is written.
//!
//! What is added, and why no crate is used: two bits beside the positions. `CLOSED` lies in the tail,
//! so that closing falls before or after each push, never inside. `WAITING` in the tail says that
//! receivers wait, in the head that senders do: since it is in the word that every push changes by
//! compare-and-swap, a push learns of a waiting receiver without a fence, and a receiver that set it
//! sees every push that did not. And messages can be visited in place, as a garbage collector must.

use super::{Missed, Refused, Store};
use crate::sync::{AtomicUsize, Ordering, SharedCell, spin};
use std::mem::MaybeUninit;

const WAITING: usize = 1;
const CLOSED: usize = 2;
/// Where the position begins in the head and the tail.
const SHIFT: u32 = 2;

struct Slot<T> {
    /// `p`: free for the push at position `p`; `p + 1`: holds its message. Stored with `Release`
    /// after the message was moved, loaded with `Acquire` before it is.
    stamp: AtomicUsize,
    message: SharedCell<MaybeUninit<T>>,
}

/// Two cache lines, since processors fetch lines in pairs.
#[repr(align(128))]
struct Apart<T>(T);

/// A bounded queue of messages.
///
/// Invariants: `head <= tail <= head + one_lap` as positions, where a position is a lap (multiples of
/// `one_lap`, a power of two greater than the capacity) and an index below the capacity.
pub struct Ring<T> {
    /// Position of the next pop, and `WAITING` for senders. `AcqRel` where it is changed: a sender
    /// that marks it and then looks sees every pop that did not see the mark.
    head: Apart<AtomicUsize>,
    /// Position of the next push, `WAITING` for receivers, `CLOSED`. As for `head`.
    tail: Apart<AtomicUsize>,
    slots: Box<[Slot<T>]>,
    one_lap: usize,
}

// SAFETY: a message is touched only by the thread that the stamps give its slot to.
unsafe impl<T: Send> Send for Ring<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Ring<T> {}

impl<T> Ring<T> {
    /// The most messages a ring can hold.
    pub const MAX_CAPACITY: usize = 1 << 30;

    /// An empty ring for `capacity` messages, 1 to [`Ring::MAX_CAPACITY`].
    pub fn new(capacity: usize) -> Self {
        assert!((1..=Self::MAX_CAPACITY).contains(&capacity));
        let slot = |index| Slot {
            stamp: AtomicUsize::new(index),
            message: SharedCell::new(MaybeUninit::uninit()),
        };
        Ring {
            head: Apart(AtomicUsize::new(0)),
            tail: Apart(AtomicUsize::new(0)),
            slots: (0..capacity).map(slot).collect(),
            one_lap: (capacity + 1).next_power_of_two(),
        }
    }

    #[inline(always)]
    fn slot(&self, position: usize) -> &Slot<T> {
        let index = position & (self.one_lap - 1);
        debug_assert!(index < self.slots.len());
        // SAFETY: positions come from `after`, so their index is below the capacity.
        unsafe { self.slots.get_unchecked(index) }
    }

    /// The position behind `position`, which begins a lap after the last slot.
    #[inline(always)]
    fn after(&self, position: usize) -> usize {
        let index = position & (self.one_lap - 1);
        if index + 1 < self.slots.len() {
            position + 1
        } else {
            (position - index).wrapping_add(self.one_lap)
        }
    }

    /// Messages that were pushed before `position`.
    fn ordinal(&self, position: usize) -> usize {
        let index = position & (self.one_lap - 1);
        (position / self.one_lap) * self.slots.len() + index
    }

    /// Messages taken in since the ring was made.
    pub fn total_pushed(&self) -> usize {
        self.ordinal(self.tail.0.load(Ordering::Acquire) >> SHIFT)
    }

    /// Messages taken out since the ring was made.
    pub fn total_popped(&self) -> usize {
        self.ordinal(self.head.0.load(Ordering::Acquire) >> SHIFT)
    }

    fn mark(word: &AtomicUsize, waiting: bool) {
        if waiting {
            word.fetch_or(WAITING, Ordering::AcqRel);
        } else {
            word.fetch_and(!WAITING, Ordering::AcqRel);
        }
    }
}

impl<T> Store<T> for Ring<T> {
    #[inline]
    fn push(&self, message: T) -> Result<bool, Refused<T>> {
        let mut rounds = 0;
        let mut tail = self.tail.0.load(Ordering::Acquire);
        loop {
            if tail & CLOSED != 0 {
                return Err(Refused::Closed(message));
            }
            let position = tail >> SHIFT;
            let slot = self.slot(position);
            let stamp = slot.stamp.load(Ordering::Acquire);
            if stamp == position {
                let next = (self.after(position) << SHIFT) | (tail & WAITING);
                let claim = self.tail.0.compare_exchange_weak(
                    tail,
                    next,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                match claim {
                    Ok(_) => {
                        // SAFETY: the stamp and the claim give this slot to this thread alone.
                        slot.message
                            .with_mut(|place| unsafe { (*place).write(message) });
                        slot.stamp.store(position + 1, Ordering::Release);
                        return Ok(tail & WAITING != 0);
                    }
                    Err(seen) => {
                        tail = seen;
                        continue;
                    }
                }
            }
            // The message of a lap ago is still there: no room, unless it is being taken just now.
            if stamp.wrapping_add(self.one_lap) == position.wrapping_add(1) {
                let head = self.head.0.load(Ordering::Acquire) >> SHIFT;
                if head.wrapping_add(self.one_lap) == position {
                    return Err(Refused::Full(message));
                }
            }
            spin(rounds);
            rounds += 1;
            tail = self.tail.0.load(Ordering::Acquire);
        }
    }

    #[inline]
    fn pop(&self) -> Result<(T, bool), Missed> {
        let mut rounds = 0;
        let mut head = self.head.0.load(Ordering::Acquire);
        loop {
            let position = head >> SHIFT;
            let slot = self.slot(position);
            let stamp = slot.stamp.load(Ordering::Acquire);
            if stamp == position + 1 {
                let next = (self.after(position) << SHIFT) | (head & WAITING);
                let claim = self.head.0.compare_exchange_weak(
                    head,
                    next,
                    Ordering::AcqRel,
                    Ordering::Acquire,
                );
                match claim {
                    Ok(_) => {
                        // SAFETY: the claim gives this slot to this thread alone.
                        let message = slot.message.with_mut(|place| unsafe { place.read() });
                        // SAFETY: the stamp said that a message is there; it is moved out once.
                        let message = unsafe { message.assume_init() };
                        slot.stamp
                            .store(position.wrapping_add(self.one_lap), Ordering::Release);
                        return Ok((message, head & WAITING != 0));
                    }
                    Err(seen) => {
                        head = seen;
                        continue;
                    }
                }
            }
            // Nothing was written this lap: empty, unless it is being written just now.
            if stamp == position {
                let tail = self.tail.0.load(Ordering::Acquire);
                if tail >> SHIFT == position {
                    return Err(if tail & CLOSED == 0 {
                        Missed::Empty
                    } else {
                        Missed::Closed
                    });
                }
            }
            spin(rounds);
            rounds += 1;
            head = self.head.0.load(Ordering::Acquire);
        }
    }

    fn mark_receivers(&self, waiting: bool) {
        Self::mark(&self.tail.0, waiting);
    }

    fn mark_senders(&self, waiting: bool) {
        Self::mark(&self.head.0, waiting);
    }

    fn close(&self) {
        self.tail.0.fetch_or(CLOSED, Ordering::AcqRel);
    }

    fn count(&self) -> usize {
        loop {
            let tail = self.tail.0.load(Ordering::Acquire);
            let head = self.head.0.load(Ordering::Acquire);
            // A tail that did not move meanwhile belongs to this head.
            if self.tail.0.load(Ordering::Acquire) == tail {
                return self.ordinal(tail >> SHIFT) - self.ordinal(head >> SHIFT);
            }
            spin(0);
        }
    }

    fn limit(&self) -> usize {
        self.slots.len()
    }

    unsafe fn visit<E>(&self, mut see: impl FnMut(&T) -> Result<(), E>) -> Result<(), E> {
        let tail = self.tail.0.load(Ordering::Acquire) >> SHIFT;
        let mut position = self.head.0.load(Ordering::Acquire) >> SHIFT;
        while position != tail {
            let slot = self.slot(position);
            debug_assert_eq!(slot.stamp.load(Ordering::Acquire), position + 1);
            slot.message.with(|place| {
                // SAFETY: no push or pop is going on, and the caller promises that none begins.
                let message = unsafe { &*place };
                // SAFETY: then every slot between head and tail holds a message.
                see(unsafe { message.assume_init_ref() })
            })?;
            position = self.after(position);
        }
        Ok(())
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        while self.pop().is_ok() {}
    }
}
