//! What a message says of the block that has its bytes.

use super::blocks::{Run, UNIT_BYTES};
use super::segment::Segment;
use super::word::Word;
use std::ptr::NonNull;

/// The bit of a word's kind that says that the record is a descriptor.
pub const CARRIES_BLOCK: u8 = 8;

/// Where a message's bytes are: the content of its record.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The segment's number; 0 is the one that the ring is in.
    segment: u64,
    /// How far the bytes are from the start of that segment.
    offset: u64,
    /// How many bytes the message has.
    length: u64,
    /// Units of the run.
    unit_count: u32,
    /// Turn of the run.
    turn: u32,
}

impl Descriptor {
    /// Bytes of one.
    pub const BYTES: usize = size_of::<Descriptor>();

    /// Of the first `length` bytes of a run.
    pub fn new(segment: &Segment, run: Run, length: usize) -> Self {
        Descriptor {
            segment: 0,
            offset: segment.unit_offset(run.start) as u64,
            length: length as u64,
            unit_count: run.count as u32,
            turn: run.turn,
        }
    }

    /// Whether a record is one.
    #[inline]
    pub fn is_in(word: Word) -> bool {
        word.kind() & CARRIES_BLOCK != 0 && word.length() == Self::BYTES
    }

    /// # Safety
    /// A record of at least so many bytes is at `at`.
    pub unsafe fn read(at: NonNull<u8>) -> Self {
        // Another process may be at fault and write here: what comes is checked before it is used.
        // SAFETY: the caller's promise; records begin at a cache line.
        unsafe { at.cast::<Descriptor>().read_volatile() }
    }

    /// # Safety
    /// As for `read`, and this process has claimed the record.
    pub unsafe fn write(self, at: NonNull<u8>) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<Descriptor>().write_volatile(self) }
    }

    /// Bytes of the message.
    pub fn length(&self) -> usize {
        self.length as usize
    }

    /// The run, if it lies in this segment and has room for the message.
    pub fn run(&self, segment: &Segment) -> Option<Run> {
        let first = segment.unit_offset(0);
        let offset = usize::try_from(self.offset).ok()?.checked_sub(first)?;
        let count = self.unit_count as usize;
        let start = offset / UNIT_BYTES;
        let end = start.checked_add(count)?;
        let is_sound = self.segment == 0
            && offset % UNIT_BYTES == 0
            && end <= segment.header().unit_count as usize
            && self.length <= (count * UNIT_BYTES) as u64;
        is_sound.then_some(Run {
            start,
            count,
            turn: self.turn,
        })
    }
}
