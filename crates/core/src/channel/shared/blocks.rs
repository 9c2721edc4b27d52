//! Blocks for large messages: runs of units, claimed and freed without a lock.
//!
//! A word for each unit. A run is claimed by a compare-and-swap of its first word, the head, which
//! has the owner and the length, and then of the others, its body, which only point to the head.
//! It is freed the other way round. So whatever belongs to a run has a head with a name on it at
//! every instant, and what a killed process had can be given back by looking at the heads.
//!
//! The lowest run that is long enough is taken. What was freed a moment ago lies low, as long as
//! few are out, so the bytes of a new message go where those of the last ones are in the cache.
//!
//! A free unit may be hollow: the memory behind it was given back. Whoever claims a run is told if a
//! unit of it may be, and has to see to the memory before he writes. What a dead process had counts
//! as hollow, since it may have died before it did.

use super::word::SLOT_COUNT;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a unit.
pub const UNIT_BYTES: usize = 64 * 1024;
/// Most units of a pool.
pub const MAX_UNITS: usize = (1 << LENGTH_BITS) - 1;

const HEAD: u64 = 1;
const BODY: u64 = 2;
const HOLLOW: u64 = 3;
const STATE_MASK: u64 = 7;
const OWNER_SHIFT: u32 = 3;
const LENGTH_SHIFT: u32 = 10;
const LENGTH_BITS: u32 = 22;
const HIGH_SHIFT: u32 = 32;

/// 3 bits of state. A head: 7 bits of owner, 22 of length in units, 32 of turn. A body: the index of
/// its head in the upper 32. A free unit is 0, or `HOLLOW` if the memory behind it may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unit(u64);

impl Unit {
    const FREE: Unit = Unit(0);
    const HOLLOW: Unit = Unit(HOLLOW);

    fn head(owner: usize, count: usize, turn: u32) -> Self {
        debug_assert!(owner < SLOT_COUNT && count <= MAX_UNITS);
        Unit(
            HEAD | (owner as u64) << OWNER_SHIFT
                | (count as u64) << LENGTH_SHIFT
                | u64::from(turn) << HIGH_SHIFT,
        )
    }

    fn body(start: usize) -> Self {
        Unit(BODY | (start as u64) << HIGH_SHIFT)
    }

    fn is_free(self) -> bool {
        self == Unit::FREE || self == Unit::HOLLOW
    }

    fn is_head(self) -> bool {
        self.0 & STATE_MASK == HEAD
    }

    fn owner(self) -> usize {
        (self.0 >> OWNER_SHIFT) as usize & (SLOT_COUNT - 1)
    }

    fn count(self) -> usize {
        (self.0 >> LENGTH_SHIFT) as usize & MAX_UNITS
    }

    fn turn(self) -> u32 {
        (self.0 >> HIGH_SHIFT) as u32
    }
}

/// A run that is out: its first unit, how many it has, and the turn it was claimed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The index of the first unit.
    pub start: usize,
    /// How many units.
    pub count: usize,
    /// A number that the next run at this place does not have.
    pub turn: u32,
}

/// A run that was just claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The run.
    pub run: Run,
    /// Whether memory may be missing behind it: to be had before anything is written there.
    pub is_hollow: bool,
}

/// A view of a pool, wherever its words lie.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    units: &'a [AtomicU64],
    /// Only has to differ from turn to turn, so `Relaxed` suffices.
    turns: &'a AtomicU32,
}

impl<'a> Blocks<'a> {
    /// A view of these words.
    #[inline]
    pub fn new(units: &'a [AtomicU64], turns: &'a AtomicU32) -> Self {
        Blocks { units, turns }
    }

    fn load(&self, index: usize) -> Unit {
        Unit(self.units[index].load(Ordering::Acquire))
    }

    fn swap(&self, index: usize, from: Unit, to: Unit) -> bool {
        self.units[index]
            .compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Claim `count` units in a row; `None` if there are none now.
    pub fn claim(&self, count: usize, owner: usize) -> Option<Claim> {
        debug_assert!(count > 0);
        loop {
            let mut met_another = false;
            let mut start = 0;
            while start + count <= self.units.len() {
                let seen = self.load(start);
                if !seen.is_free() {
                    start += if seen.is_head() {
                        seen.count().max(1)
                    } else {
                        1
                    };
                    continue;
                }
                let taken = (start + 1..start + count).find(|at| !self.load(*at).is_free());
                if let Some(taken) = taken {
                    start = taken;
                    continue;
                }
                let turn = self.turns.fetch_add(1, Ordering::Relaxed);
                let run = Run { start, count, turn };
                if let Some(claim) = self.claim_at(run, owner) {
                    return Some(claim);
                }
                met_another = true;
                start += 1;
            }
            // Whoever was in the way has taken it, or has given it back and lets us go first.
            if !met_another {
                return None;
            }
        }
    }

    /// Whether there are `count` free units in a row.
    pub fn could_claim(&self, count: usize) -> bool {
        let mut free = 0;
        for at in 0..self.units.len() {
            free = if self.load(at).is_free() { free + 1 } else { 0 };
            if free >= count {
                return true;
            }
        }
        false
    }

    fn claim_at(&self, run: Run, owner: usize) -> Option<Claim> {
        let head = Unit::head(owner, run.count, run.turn);
        let mut is_hollow = false;
        for at in run.start..run.start + run.count {
            let wanted = if at == run.start {
                head
            } else {
                Unit::body(run.start)
            };
            let seen = self.load(at);
            if !seen.is_free() || !self.swap(at, seen, wanted) {
                self.clear(run.start, at, is_hollow);
                return None;
            }
            is_hollow |= seen == Unit::HOLLOW;
        }
        Some(Claim { run, is_hollow })
    }

    /// Free the units from `start` to `end`, the head last.
    fn clear(&self, start: usize, end: usize, is_hollow: bool) {
        let free = if is_hollow { Unit::HOLLOW } else { Unit::FREE };
        for at in (start..end).rev() {
            self.units[at].store(free.0, Ordering::Release);
        }
    }

    /// Give a run back. Only by its owner, once.
    pub fn free(&self, run: Run) {
        debug_assert_eq!(self.load(run.start).turn(), run.turn);
        self.clear(run.start, run.start + run.count, false);
    }

    /// Give a run back whose memory could not be had.
    pub fn free_hollow(&self, run: Run) {
        self.clear(run.start, run.start + run.count, true);
    }

    /// Take the next free units from `from` on, `most` at most, have `give_back` let go of the memory
    /// behind them, and free them as hollow if it did. Where to go on; `None` at the end.
    pub fn hollow(
        &self,
        from: usize,
        most: usize,
        owner: usize,
        give_back: impl FnOnce(Run) -> bool,
    ) -> Option<usize> {
        let is_free = |at: &usize| self.load(*at).is_free();
        let start = (from..self.units.len()).find(is_free)?;
        let last = self.units.len().min(start + most);
        let end = (start + 1..last).find(|at| !is_free(at)).unwrap_or(last);
        let run = Run {
            start,
            count: end - start,
            turn: self.turns.fetch_add(1, Ordering::Relaxed),
        };
        if let Some(claim) = self.claim_at(run, owner) {
            let is_given = give_back(run);
            self.clear(start, end, is_given || claim.is_hollow);
        }
        Some(end)
    }

    /// Make a run, which a message carried here, one of `owner`'s. False if no such run is out: what
    /// the message says is not what a sender wrote.
    pub fn transfer(&self, run: Run, owner: usize) -> bool {
        if !self.is_out(run) {
            return false;
        }
        let head = Unit::head(owner, run.count, run.turn);
        self.units[run.start].store(head.0, Ordering::Release);
        true
    }

    /// Whether this run is out, in this turn.
    pub fn is_out(&self, run: Run) -> bool {
        let end = run.start.checked_add(run.count);
        if run.count == 0 || end.is_none_or(|end| end > self.units.len()) {
            return false;
        }
        let seen = self.load(run.start);
        seen.is_head() && seen.count() == run.count && seen.turn() == run.turn
    }

    /// Whether half of the units are free.
    pub fn is_roomy(&self) -> bool {
        self.used_count() * 2 <= self.units.len()
    }

    /// Units that are out.
    pub fn used_count(&self) -> usize {
        (0..self.units.len())
            .filter(|at| !self.load(*at).is_free())
            .count()
    }

    /// Units that are not.
    pub fn free_count(&self) -> usize {
        self.units.len() - self.used_count()
    }

    /// For a process that died: free what it owned, but for the runs that `is_carried` by a message.
    /// Nobody transfers what no message carries, so a run that is seen here changes no more.
    pub fn reap(&self, owner: usize, is_carried: impl Fn(Run) -> bool) -> usize {
        let mut freed = 0;
        for start in 0..self.units.len() {
            let seen = self.load(start);
            if !seen.is_head() || seen.owner() != owner {
                continue;
            }
            let run = Run {
                start,
                count: seen.count(),
                turn: seen.turn(),
            };
            // Seen again: a message that was received since has changed the owner.
            if is_carried(run) || self.load(start) != seen {
                continue;
            }
            // It may have died between the head and the last of the body.
            for at in start + 1..(start + run.count).min(self.units.len()) {
                self.swap(at, Unit::body(start), Unit::HOLLOW);
            }
            self.units[start].store(Unit::HOLLOW.0, Ordering::Release);
            freed += 1;
        }
        freed
    }
}
