//! What an arena knows of its chunks, under its lock: what each is about, and what was counted.

use super::GRANULE;
use super::store::{Raw, SlotRef};
use super::table::{Table, table_granules};
use super::timeline::{Place, Position, Timeline};
use crate::os::PAGE_BYTES;
use crate::resource::HealthReport;
use crate::sync::front::{SHUT, Word};
use std::ptr::NonNull;

/// Granules that are made ready at once: a page of the table.
const READY_STEP: usize = PAGE_BYTES;

/// What a slot is about.
pub(super) enum Use {
    Nothing,
    /// A chunk to cut blocks from.
    Bump {
        /// The number of its turn as the current chunk.
        turn: u64,
        /// Granules up to this one were used before this turn.
        used_granules: usize,
        /// Granules up to this one are wiped in the table.
        wiped_granules: usize,
        /// Granules up to this one are wiped, and their pages mapped: blocks are cut there.
        ready_granules: usize,
    },
    /// One block that has the chunk for itself, cut for the span of this serial.
    Own {
        serial: u64,
    },
}

pub(super) struct Chunk {
    pub(super) slot: SlotRef,
    pub(super) usage: Use,
    pub(super) base: usize,
    pub(super) bytes: usize,
    /// Blocks cut, as far as counted, and blocks freed.
    pub(super) cut_count: u64,
    pub(super) freed_count: u64,
    /// Bytes of the blocks cut: what the quota is charged for it.
    pub(super) cut_bytes: usize,
}

impl Chunk {
    pub(super) fn table(&self) -> Table {
        // SAFETY: called for a bound chunk only, which lives until it is unbound.
        unsafe { Table::at(self.base) }
    }

    pub(super) fn first_granule(&self) -> usize {
        table_granules(self.bytes)
    }

    pub(super) fn end_granule(&self) -> usize {
        self.bytes / GRANULE
    }

    /// The number of its turn, if blocks are cut from it.
    pub(super) fn turn(&self) -> Option<u64> {
        match self.usage {
            Use::Bump { turn, .. } => Some(turn),
            Use::Own { .. } | Use::Nothing => None,
        }
    }

    /// Its memory, as it is when nothing in it is alive; `None` if it is about nothing.
    pub(super) fn raw(&self) -> Option<Raw> {
        let (used_granules, wiped_granules) = match self.usage {
            Use::Bump {
                used_granules,
                wiped_granules,
                ..
            } => (used_granules, wiped_granules),
            Use::Own { .. } => (0, 0),
            Use::Nothing => return None,
        };
        Some(Raw {
            base: NonNull::new(self.base as *mut u8)?,
            bytes: self.bytes,
            used_granules,
            wiped_granules,
        })
    }

    /// Live blocks, if all that were cut are counted.
    pub(super) fn live_count(&self) -> u64 {
        self.cut_count - self.freed_count
    }

    /// The word to go on cutting at `offset` with.
    ///
    /// Memory that was used before and memory that was not are separate rooms, so that every block
    /// is one or the other; and no room goes beyond what is ready.
    pub(super) fn room_from(&self, offset: usize) -> Word {
        let Use::Bump {
            used_granules,
            ready_granules,
            ..
        } = self.usage
        else {
            return SHUT;
        };
        let reused = offset < used_granules;
        let end = if reused {
            used_granules.min(ready_granules)
        } else {
            ready_granules
        };
        Word::open(offset, end.max(offset), reused)
    }

    /// Make ready the granules up to `end` at least; `map` maps so many bytes from an address, and
    /// says whether it could.
    pub(super) fn ready_to(&mut self, end: usize, map: impl FnOnce(usize, usize) -> bool) -> bool {
        let (base, table, last) = (self.base, self.table(), self.end_granule());
        let Use::Bump {
            wiped_granules,
            ready_granules,
            ..
        } = &mut self.usage
        else {
            return false;
        };
        if *ready_granules >= end {
            return true;
        }
        let pages = end.next_multiple_of(PAGE_BYTES / GRANULE);
        let to = pages.max(*ready_granules + READY_STEP).min(last);
        if !map(
            base + *ready_granules * GRANULE,
            (to - *ready_granules) * GRANULE,
        ) {
            return false;
        }
        if *wiped_granules < to {
            // SAFETY: granules of the chunk that nothing was ever cut from.
            unsafe { table.wipe(*wiped_granules, to) };
            *wiped_granules = to;
        }
        *ready_granules = to;
        true
    }

    /// Note that this turn used the granules up to `offset`.
    pub(super) fn note_used(&mut self, offset: usize) {
        if let Use::Bump { used_granules, .. } = &mut self.usage {
            *used_granules = (*used_granules).max(offset);
        }
    }

    /// Live blocks and their bytes as the table has them. A thread that has just cut a block may
    /// not have entered it yet.
    fn walk(&self) -> (u64, u64) {
        let Use::Bump { ready_granules, .. } = self.usage else {
            return (0, 0);
        };
        let mut patience = 10_000;
        loop {
            let (count, granules) = self.table().walk(self.first_granule(), ready_granules);
            if count >= self.live_count() || patience == 0 {
                return (count, granules * GRANULE as u64);
            }
            patience -= 1;
            std::thread::yield_now();
        }
    }
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) cut_bytes: u64,
    pub(super) cut_count: u64,
    pub(super) freed_bytes: u64,
    pub(super) freed_count: u64,
    pub(super) hits: u64,
    pub(super) peak_bytes: u64,
    pub(super) peak_count: u64,
    pub(super) invalid_frees: u64,
}

pub(super) struct State {
    pub(super) chunks: Vec<Chunk>,
    /// Indices of the chunks that are about nothing.
    pub(super) spare: Vec<usize>,
    pub(super) current: Option<usize>,
    /// The current chunk's offset up to which bytes were counted.
    pub(super) counted_granule: usize,
    pub(super) next_turn: u64,
    pub(super) timeline: Timeline,
    pub(super) counts: Counts,
    pub(super) held_bytes: usize,
    pub(super) peak_held_bytes: usize,
    pub(super) ended: bool,
}

/// What is left to do when the lock is released.
#[derive(Default)]
pub(super) struct Aftermath {
    /// A chunk in which nothing is alive, and whether upstream gets it.
    pub(super) chunk: Option<(Raw, bool)>,
    /// Bytes that the quota is not charged for any more.
    pub(super) uncharged: usize,
}

impl Aftermath {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.chunk.is_none() && self.uncharged == 0
    }
}

impl State {
    pub(super) fn new() -> Self {
        State {
            chunks: Vec::new(),
            spare: Vec::new(),
            current: None,
            counted_granule: 0,
            next_turn: 1,
            timeline: Timeline::new(),
            counts: Counts::default(),
            held_bytes: 0,
            peak_held_bytes: 0,
            ended: false,
        }
    }

    /// Count what was cut from the current chunk, whose word was `word`.
    pub(super) fn count(&mut self, index: usize, word: Word) {
        debug_assert_ne!(word, SHUT);
        let count = word.count();
        let bytes = (word.offset() - self.counted_granule) * GRANULE;
        self.counted_granule = word.offset();
        let chunk = &mut self.chunks[index];
        chunk.cut_count += count;
        chunk.cut_bytes += bytes;
        self.timeline.top().live += count as i64;
        self.counts.cut_count += count;
        self.counts.cut_bytes += bytes as u64;
        if word.reused() {
            self.counts.hits += count;
        }
    }

    /// Blocks and bytes cut from the current chunk since the last count.
    pub(super) fn uncounted(&self) -> (u64, u64) {
        let Some(index) = self.current else {
            return (0, 0);
        };
        let word = self.chunks[index].slot.front.look();
        let bytes = (word.offset() - self.counted_granule) * GRANULE;
        (word.count(), bytes as u64)
    }

    /// From where nothing in the current chunk is alive, and the bytes cut before: its start, or the
    /// last savepoint. `None` if something is. `uncounted` blocks were cut since the last count.
    #[inline]
    pub(super) fn floor(&mut self, index: usize, uncounted: u64) -> Option<(usize, usize)> {
        let chunk = &self.chunks[index];
        let top = self.timeline.top();
        let since_here = chunk.turn() == Some(top.place.position.turn);
        let nothing_here = chunk.cut_count + uncounted == chunk.freed_count;
        let nothing_since = since_here && top.live + uncounted as i64 == 0;
        if !nothing_here && !nothing_since {
            return None;
        }
        let (granule, cut_bytes) = if since_here {
            (top.place.position.granule, top.place.cut_bytes)
        } else {
            (0, 0)
        };
        Some((granule.max(chunk.first_granule()), cut_bytes))
    }

    /// Called before blocks are freed: a peak is what was alive before a free, or is now.
    #[inline]
    pub(super) fn note_peak(&mut self) {
        let (count, bytes) = self.uncounted();
        let counts = &mut self.counts;
        let count = counts.cut_count + count - counts.freed_count;
        let bytes = counts.cut_bytes + bytes - counts.freed_bytes;
        counts.peak_count = counts.peak_count.max(count);
        counts.peak_bytes = counts.peak_bytes.max(bytes);
    }

    pub(super) fn hold(&mut self, bytes: usize) {
        self.held_bytes += bytes;
        self.peak_held_bytes = self.peak_held_bytes.max(self.held_bytes);
    }

    /// Where the first block of the next chunk will be cut.
    pub(super) fn next_chunk(&self) -> Place {
        Place {
            position: Position {
                turn: self.next_turn,
                granule: 0,
            },
            chunk: usize::MAX,
            cut_bytes: 0,
        }
    }

    /// Size and granule of the live block at `address`, if the chunk at `index` has one there.
    #[inline]
    pub(super) fn block_at(&self, index: usize, address: usize) -> Option<(usize, usize)> {
        let chunk = self.chunks.get(index)?;
        let inside = address.wrapping_sub(chunk.base);
        match chunk.usage {
            Use::Own { .. } if inside == 0 => Some((chunk.bytes, 0)),
            Use::Bump { ready_granules, .. } if inside < chunk.bytes && inside % GRANULE == 0 => {
                let granule = inside / GRANULE;
                if granule < chunk.first_granule() || granule >= ready_granules {
                    return None;
                }
                let granules = chunk.table().get(granule);
                (granules > 0).then_some((granules * GRANULE, granule))
            }
            _ => None,
        }
    }

    /// Let go of a chunk in which nothing is alive, and that is not the current one.
    pub(super) fn unbind(&mut self, index: usize, upstream: bool) -> Aftermath {
        let chunk = &mut self.chunks[index];
        let raw = chunk.raw();
        chunk.usage = Use::Nothing;
        self.held_bytes -= chunk.bytes;
        self.spare.push(index);
        Aftermath {
            chunk: raw.map(|raw| (raw, upstream)),
            uncharged: std::mem::take(&mut chunk.cut_bytes),
        }
    }

    /// Note that of the bytes cut from a chunk only `kept_bytes` are cut any more; returns how many
    /// bytes the quota is not charged for any more.
    pub(super) fn uncut(&mut self, index: usize, kept_bytes: usize) -> usize {
        let chunk = &mut self.chunks[index];
        std::mem::replace(&mut chunk.cut_bytes, kept_bytes) - kept_bytes
    }

    /// Bytes of the current chunk if nothing in it is alive.
    pub(super) fn unused_bytes(&self) -> usize {
        let Some(index) = self.current else {
            return 0;
        };
        let chunk = &self.chunks[index];
        let word = chunk.slot.front.look();
        if chunk.cut_count + word.count() == chunk.freed_count {
            chunk.bytes
        } else {
            0
        }
    }

    /// Whether the structures agree. The current chunk is shut and counted.
    pub(super) fn check(&self, report: &mut HealthReport) {
        let (mut live, mut live_bytes, mut held) = (0, 0, 0);
        for (index, chunk) in self.chunks.iter().enumerate() {
            let (count, bytes) = match chunk.usage {
                Use::Nothing => continue,
                Use::Own { .. } => (1, chunk.bytes as u64),
                Use::Bump { .. } => chunk.walk(),
            };
            report.expect(count == chunk.live_count(), || {
                format!(
                    "arena: chunk {index} has {count} live blocks, {} are counted",
                    chunk.live_count()
                )
            });
            let needed = count > 0 || self.current == Some(index);
            report.expect(needed, || {
                format!("arena: chunk {index} is kept for nothing")
            });
            live += count;
            live_bytes += bytes;
            held += chunk.bytes;
        }
        let counts = &self.counts;
        let counted = (
            counts.cut_count - counts.freed_count,
            counts.cut_bytes - counts.freed_bytes,
            self.held_bytes,
        );
        report.expect((live, live_bytes, held) == counted, || {
            format!(
                "arena: live blocks, their bytes and bytes held are {live}, {live_bytes} and                  {held}, counted as {counted:?}"
            )
        });
        let in_spans = self.timeline.live();
        report.expect(in_spans == live as i64, || {
            format!("arena: spans count {in_spans} live blocks, there are {live}")
        });
        if let Some(disorder) = self.timeline.disorder() {
            report.findings.push(disorder);
        }
        let first = self.timeline.find(0).unwrap_or(0);
        let retired = live.saturating_sub(self.timeline.live_from(first).0);
        report.count(
            "arena.chunks",
            (self.chunks.len() - self.spare.len()) as u64,
        );
        report.count("arena.live_blocks", live);
        report.count("arena.retired_blocks", retired);
        report.count("arena.savepoints", self.timeline.savepoint_count() as u64);
    }
}
