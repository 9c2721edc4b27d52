//! The ring of records, for any number of senders and receivers, without a lock.
//!
//! A word for each granule, apart from the bytes of the messages. A record begins by a
//! compare-and-swap of the word at the tail, so who claims, how much, and in which lap are one
//! atomic step: a process that is killed right before it has claimed nothing, one that is killed
//! right after has left a claim with its name on it. The three positions only say where to look;
//! whoever finds one behind the words moves it on. A word of an earlier lap is a free place, so
//! nothing has to be cleared when the ring comes round.
//!
//! `free <= head <= tail <= free + granules`. From `free` to `head` all records are skipped, taken
//! or done; `free` moves over the done and skipped when a sender needs room.
//!
//! The ring knows words only: whoever claims or takes a record copies its bytes.

use super::word::{State, Word, granules};
use crate::sync::{AtomicU64, Ordering};

/// A position alone in its two cache lines, which are fetched in pairs.
#[repr(C, align(128))]
pub struct Position(AtomicU64);

impl Position {
    /// The start of the first lap.
    pub fn new() -> Self {
        Position(AtomicU64::new(0))
    }

    #[inline]
    fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Move from one place to another, unless somebody else did.
    #[inline]
    fn advance(&self, from: u64, to: u64) {
        let _ = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }
}

impl Default for Position {
    fn default() -> Self {
        Self::new()
    }
}

/// Where to look for the ends of the ring; granules counted since the beginning.
#[repr(C)]
#[derive(Default)]
pub struct Positions {
    /// Where the next record is claimed.
    tail: Position,
    /// Where the next record is received.
    head: Position,
    /// Where the next room is freed.
    free: Position,
}

/// A view of a ring, wherever its words lie.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    positions: &'a Positions,
    words: &'a [AtomicU64],
}

/// A place in the ring and the word in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    position: u64,
    /// The word as it was last seen or written.
    pub word: Word,
}

/// Why nothing can be claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is no room now.
    Full,
    /// A word is none that any sender wrote: the record's index.
    Corrupted(usize),
}

/// What is at the front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Front {
    /// A message.
    Data(Record),
    /// Nothing.
    Empty,
    /// A record that its sender, in this slot, still writes.
    Pending(usize),
    /// A word is none that any sender wrote: the record's index.
    Corrupted(usize),
}

impl<'a> Ring<'a> {
    /// A view of these words; their number is a power of two.
    #[inline]
    pub fn new(positions: &'a Positions, words: &'a [AtomicU64]) -> Self {
        debug_assert!(words.len().is_power_of_two());
        Ring { positions, words }
    }

    #[inline]
    fn count(&self) -> u64 {
        self.words.len() as u64
    }

    #[inline]
    fn index(&self, position: u64) -> usize {
        position as usize & (self.words.len() - 1)
    }

    /// Laps are counted from 1 and come round after 2^32 - 1, so that no lap is that of a word that
    /// was never written.
    #[inline]
    fn lap(&self, position: u64) -> u32 {
        let lap = position >> self.words.len().trailing_zeros();
        (lap % u64::from(u32::MAX)) as u32 + 1
    }

    /// Whether a word was written in the lap of this position. If not, it is of an earlier lap as
    /// long as the tail or the head has not passed the position.
    #[inline]
    fn is_of(&self, word: Word, position: u64) -> bool {
        word.lap() == self.lap(position)
    }

    #[inline]
    fn load(&self, position: u64) -> Word {
        Word(self.words[self.index(position)].load(Ordering::Acquire))
    }

    #[inline]
    fn swap(&self, position: u64, from: Word, to: Word) -> bool {
        self.words[self.index(position)]
            .compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// The index of a record's first granule.
    #[inline]
    pub fn index_of(&self, record: Record) -> usize {
        self.index(record.position)
    }

    /// A record's length must not lead past the end of the ring.
    #[inline]
    fn fits(&self, position: u64, word: Word) -> bool {
        self.index(position) as u64 + word.granules() <= self.count()
    }

    /// Claim a record for `length` bytes.
    pub fn claim(&self, kind: u8, owner: usize, length: usize) -> Result<Record, Refused> {
        let needed = granules(length);
        debug_assert!(needed <= self.count());
        loop {
            let tail = self.positions.tail.get();
            let seen = self.load(tail);
            if self.is_of(seen, tail) {
                if seen.state().is_none() || !self.fits(tail, seen) {
                    return Err(Refused::Corrupted(self.index(tail)));
                }
                self.positions.tail.advance(tail, tail + seen.granules());
                continue;
            }
            if self.positions.tail.get() != tail {
                continue;
            }
            let rest = self.count() - self.index(tail) as u64;
            let padding = if rest < needed { rest } else { 0 };
            if !self.has_room(tail + padding + needed) {
                return Err(Refused::Full);
            }
            let lap = self.lap(tail);
            let (word, taken) = if padding > 0 {
                let bytes = padding as usize * super::word::GRANULE_BYTES;
                (Word::new(State::Skip, 0, owner, bytes, lap), padding)
            } else {
                (Word::new(State::Claimed, kind, owner, length, lap), needed)
            };
            if !self.swap(tail, seen, word) {
                continue;
            }
            self.positions.tail.advance(tail, tail + taken);
            if padding == 0 {
                return Ok(Record {
                    position: tail,
                    word,
                });
            }
        }
    }

    /// Let a claimed record, whose bytes are written, be received.
    #[inline]
    pub fn publish(&self, record: Record) {
        self.store(record, State::Data);
    }

    /// Give a claimed record up.
    #[inline]
    pub fn abandon(&self, record: Record) {
        self.store(record, State::Skip);
    }

    #[inline]
    fn store(&self, record: Record, state: State) {
        let word = record.word.become_state(state);
        self.words[self.index(record.position)].store(word.0, Ordering::Release);
    }

    /// Whether the ring can hold everything up to `end`; frees what was received if that is needed.
    #[inline]
    fn has_room(&self, end: u64) -> bool {
        end <= self.positions.free.get() + self.count() || end <= self.reclaim() + self.count()
    }

    /// Whether a record of `length` bytes could be claimed now.
    pub fn can_claim(&self, length: usize) -> bool {
        let needed = granules(length);
        let tail = self.positions.tail.get();
        let rest = self.count() - self.index(tail) as u64;
        let padding = if rest < needed { rest } else { 0 };
        self.has_room(tail + padding + needed)
    }

    /// Free the records that were received; where free room ends then begins a lap later.
    fn reclaim(&self) -> u64 {
        // A receiver that was killed may have left the head behind what it took.
        self.front();
        let start = self.positions.free.get();
        let head = self.positions.head.get();
        let mut free = start;
        while free < head {
            let word = self.load(free);
            let is_over = matches!(word.state(), Some(State::Done | State::Skip));
            if !is_over || !self.is_of(word, free) || !self.fits(free, word) {
                break;
            }
            free += word.granules();
        }
        self.positions.free.advance(start, free);
        self.positions.free.get()
    }

    /// What can be received next.
    #[inline]
    pub fn front(&self) -> Front {
        loop {
            let head = self.positions.head.get();
            let word = self.load(head);
            if !self.is_of(word, head) {
                if self.positions.head.get() != head {
                    continue;
                }
                return Front::Empty;
            }
            if !self.fits(head, word) {
                return Front::Corrupted(self.index(head));
            }
            match word.state() {
                Some(State::Data) => {
                    return Front::Data(Record {
                        position: head,
                        word,
                    });
                }
                Some(State::Claimed) => return Front::Pending(word.owner()),
                Some(State::Skip | State::Taken | State::Done) => {
                    self.positions.head.advance(head, head + word.granules());
                }
                None => return Front::Corrupted(self.index(head)),
            }
        }
    }

    /// Take what [`Ring::front`] found; `None` if somebody else did.
    #[inline]
    pub fn take(&self, found: Record, owner: usize) -> Option<Record> {
        let word = found.word.become_owned(State::Taken, owner);
        if !self.swap(found.position, found.word, word) {
            return None;
        }
        let position = found.position;
        self.positions
            .head
            .advance(position, position + word.granules());
        Some(Record { position, word })
    }

    /// Done with a record that was taken: its room may be used again.
    #[inline]
    pub fn release(&self, record: Record) {
        self.store(record, State::Done);
    }

    /// Whether enough is free for those who wait for room to go on for a while.
    #[inline]
    pub fn is_roomy(&self) -> bool {
        let head = self.positions.head.get();
        self.positions.tail.get().saturating_sub(head) <= self.count() / 2
    }

    /// Whether nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.positions.tail.get() <= self.positions.head.get()
    }

    /// Call `visit` with every record from the first that is not free to the last that was claimed.
    /// Records may come and go meanwhile: none is left out that is there all the time, and some may
    /// be visited twice.
    pub fn walk(&self, mut visit: impl FnMut(Record)) {
        let mut position = self.positions.free.get();
        loop {
            let word = self.load(position);
            if self.is_of(word, position) {
                if word.state().is_none() || !self.fits(position, word) {
                    return;
                }
                visit(Record { position, word });
                position += word.granules();
                continue;
            }
            // Either nothing is here yet, or what was here was freed and the place claimed anew.
            let free = self.positions.free.get();
            if free <= position {
                return;
            }
            position = free;
        }
    }

    /// Whether a record that was visited is still as it was.
    pub fn is_unchanged(&self, record: Record) -> bool {
        self.load(record.position) == record.word
    }

    /// For a process that died: turn its claim into a skip. False if it is not as it was seen.
    pub fn skip_claim(&self, record: Record) -> bool {
        debug_assert_eq!(record.word.state(), Some(State::Claimed));
        self.swap(
            record.position,
            record.word,
            record.word.become_state(State::Skip),
        )
    }

    /// For a process that died: what it took is done. False if it is not as it was seen.
    pub fn finish_taken(&self, record: Record) -> bool {
        debug_assert_eq!(record.word.state(), Some(State::Taken));
        self.swap(
            record.position,
            record.word,
            record.word.become_state(State::Done),
        )
    }
}
