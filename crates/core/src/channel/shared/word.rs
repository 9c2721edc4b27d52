//! One word a record: what it is, whose it is, how long it is, and in which lap of the ring.

/// Bytes that a record's length is rounded up to: a cache line.
pub const GRANULE_BYTES: usize = 64;
/// Most processes that are attached at once.
pub const SLOT_COUNT: usize = 128;
/// Longest record.
pub const MAX_LENGTH: usize = (1 << LENGTH_BITS) - 1;

const STATE_BITS: u32 = 3;
const KIND_BITS: u32 = 4;
const OWNER_BITS: u32 = 7;
const LENGTH_BITS: u32 = 18;
const KIND_SHIFT: u32 = STATE_BITS;
const OWNER_SHIFT: u32 = KIND_SHIFT + KIND_BITS;
const LENGTH_SHIFT: u32 = OWNER_SHIFT + OWNER_BITS;
const LAP_SHIFT: u32 = LENGTH_SHIFT + LENGTH_BITS;

/// What a record is in its lap. In another lap than the word's own, the place is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    /// A sender writes it.
    Claimed = 1,
    /// It can be received.
    Data = 2,
    /// Nothing is in it: the end of the ring, or its sender died.
    Skip = 3,
    /// A receiver reads it.
    Taken = 4,
    /// It was received.
    Done = 5,
}

/// 3 bits of state, 4 of kind, 7 of owner, 18 of length in bytes, 32 of lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word(pub u64);

impl Word {
    /// A word of these parts. `owner < SLOT_COUNT`, `length <= MAX_LENGTH`, `kind < 16`.
    #[inline]
    pub fn new(state: State, kind: u8, owner: usize, length: usize, lap: u32) -> Self {
        debug_assert!(kind < 16 && owner < SLOT_COUNT && length <= MAX_LENGTH);
        Word(
            state as u64
                | u64::from(kind) << KIND_SHIFT
                | (owner as u64) << OWNER_SHIFT
                | (length as u64) << LENGTH_SHIFT
                | u64::from(lap) << LAP_SHIFT,
        )
    }

    /// `None` for what no sender writes.
    #[inline]
    pub fn state(self) -> Option<State> {
        match self.0 & ((1 << STATE_BITS) - 1) {
            1 => Some(State::Claimed),
            2 => Some(State::Data),
            3 => Some(State::Skip),
            4 => Some(State::Taken),
            5 => Some(State::Done),
            _ => None,
        }
    }

    /// What the message is, for those who send and receive.
    #[inline]
    pub fn kind(self) -> u8 {
        (self.0 >> KIND_SHIFT) as u8 & ((1 << KIND_BITS) - 1)
    }

    /// The slot of the process that claimed or took it.
    #[inline]
    pub fn owner(self) -> usize {
        (self.0 >> OWNER_SHIFT) as usize & (SLOT_COUNT - 1)
    }

    /// Bytes of the message.
    #[inline]
    pub fn length(self) -> usize {
        (self.0 >> LENGTH_SHIFT) as usize & MAX_LENGTH
    }

    /// Granules that the record takes.
    #[inline]
    pub fn granules(self) -> u64 {
        granules(self.length())
    }

    /// The lap it was written in.
    #[inline]
    pub fn lap(self) -> u32 {
        (self.0 >> LAP_SHIFT) as u32
    }

    /// The same record in another state.
    #[inline]
    pub fn become_state(self, state: State) -> Self {
        Word(self.0 & !((1 << STATE_BITS) - 1) | state as u64)
    }

    /// The same record in another state and of another owner.
    #[inline]
    pub fn become_owned(self, state: State, owner: usize) -> Self {
        let mask = ((SLOT_COUNT as u64) - 1) << OWNER_SHIFT;
        Word(self.0 & !mask | (owner as u64) << OWNER_SHIFT).become_state(state)
    }
}

/// Granules of a record of `length` bytes: at least one.
#[inline]
pub fn granules(length: usize) -> u64 {
    (length.div_ceil(GRANULE_BYTES)).max(1) as u64
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_word_keeps_its_parts_apart() {
        let word = Word::new(State::Claimed, 15, SLOT_COUNT - 1, MAX_LENGTH, u32::MAX);
        assert_eq!(word.state(), Some(State::Claimed));
        assert_eq!((word.kind(), word.owner()), (15, SLOT_COUNT - 1));
        assert_eq!((word.length(), word.lap()), (MAX_LENGTH, u32::MAX));
        let taken = word.become_owned(State::Taken, 3);
        assert_eq!(taken.state(), Some(State::Taken));
        assert_eq!((taken.kind(), taken.owner()), (15, 3));
        assert_eq!((taken.length(), taken.lap()), (MAX_LENGTH, u32::MAX));
        assert_eq!(Word(0).state(), None);
        assert_eq!(Word(6).state(), None);
    }

    #[test]
    fn an_empty_message_takes_a_granule() {
        assert_eq!([granules(0), granules(64), granules(65)], [1, 1, 2]);
    }
}
