//! Slots: where each item of a pool sits, in which phase, and in which of its turns.

use super::{Kind, NotHeld};
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

/// One time that an item is handed out. Numbers are never used twice in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// The slot of the item.
    pub slot: u32,
    /// Counted over all slots, from 1.
    pub number: u64,
}

/// Where an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The slot has no item.
    Vacant,
    /// At rest; the slot is on the idle stack.
    Idle,
    /// In the pool's own hands: being made, looked at, reset, or granted and not taken yet.
    Busy,
    /// With the caller, who releases it.
    InUse,
    /// With the caller through a lease; the slot keeps a reference.
    Leased,
}

pub(super) struct Slot<K: Kind> {
    /// Present unless the item was given away for the length of its turn.
    pub item: Option<K::Item>,
    pub tag: Option<K::Tag>,
    pub note: Option<Box<K::Note>>,
    pub phase: Phase,
    /// Whether the item stays in the slot during its turns.
    pub kept: bool,
    key: usize,
    /// Number of the first turn and of the present one.
    birth: u64,
    turn: u64,
}

/// Addresses differ in their middle bits; one multiplication spreads them.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(usize::from(byte) ^ self.0 as usize);
        }
    }

    #[inline]
    fn write_usize(&mut self, key: usize) {
        // Fibonacci hashing (Knuth, TAOCP 3, 6.4); the rotation brings the good bits down.
        self.0 = (key as u64)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(32);
    }
}

/// Invariants: `vacant` holds the slots in phase `Vacant`; `by_key[key]` is the slot of that key.
pub(super) struct Slots<K: Kind> {
    entries: Vec<Slot<K>>,
    vacant: Vec<u32>,
    by_key: HashMap<usize, u32, BuildHasherDefault<AddressHasher>>,
    /// Turns below it began before a fork.
    first_turn: u64,
    next_turn: u64,
}

impl<K: Kind> Slots<K> {
    pub(super) fn new(first_turn: u64) -> Self {
        Slots {
            entries: Vec::new(),
            vacant: Vec::new(),
            by_key: HashMap::default(),
            first_turn,
            next_turn: first_turn,
        }
    }

    /// Put an item (or, given away at once, none) into a vacant slot, unless its key is here.
    pub(super) fn occupy(
        &mut self,
        item: Option<K::Item>,
        key: usize,
        kept: bool,
    ) -> Result<u32, Option<K::Item>> {
        if key != 0 && self.by_key.contains_key(&key) {
            return Err(item);
        }
        let entry = Slot {
            item,
            tag: None,
            note: None,
            phase: Phase::Busy,
            kept,
            key,
            birth: self.next_turn,
            turn: 0,
        };
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.entries[slot as usize] = entry;
                slot
            }
            None => {
                self.entries.push(entry);
                u32::try_from(self.entries.len() - 1).expect("fewer than 2^32 items")
            }
        };
        if key != 0 {
            self.by_key.insert(key, slot);
        }
        Ok(slot)
    }

    /// Empty a slot.
    #[allow(clippy::type_complexity)]
    pub(super) fn vacate(
        &mut self,
        slot: u32,
    ) -> (Option<K::Item>, Option<K::Tag>, Option<Box<K::Note>>) {
        let entry = &mut self.entries[slot as usize];
        entry.phase = Phase::Vacant;
        self.vacant.push(slot);
        if entry.key != 0 {
            self.by_key.remove(&entry.key);
        }
        (entry.item.take(), entry.tag.take(), entry.note.take())
    }

    #[inline]
    pub(super) fn begin_turn(&mut self, slot: u32) -> Turn {
        let number = self.next_turn;
        self.next_turn += 1;
        self.entries[slot as usize].turn = number;
        Turn { slot, number }
    }

    pub(super) fn next_turn(&self) -> u64 {
        self.next_turn
    }

    #[inline]
    pub(super) fn entry(&mut self, slot: u32) -> &mut Slot<K> {
        &mut self.entries[slot as usize]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot<K>> {
        self.entries.iter()
    }

    #[inline]
    pub(super) fn by_key(&self, key: usize) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// The slot of a turn that is the present one of its slot.
    #[inline]
    pub(super) fn current(&self, turn: Turn) -> Result<u32, NotHeld> {
        if turn.number < self.first_turn {
            return Err(NotHeld::Inherited);
        }
        match self.entries.get(turn.slot as usize) {
            Some(entry) if entry.turn == turn.number && entry.phase != Phase::Vacant => {
                Ok(turn.slot)
            }
            _ => Err(NotHeld::Returned),
        }
    }

    /// The slot of a present turn in a certain phase.
    pub(super) fn find(&self, turn: Turn, phase: Phase) -> Result<u32, NotHeld> {
        let slot = self.current(turn)?;
        if self.entries[slot as usize].phase == phase {
            Ok(slot)
        } else {
            Err(NotHeld::Returned)
        }
    }

    /// The slot of a turn whose item is out.
    #[inline]
    pub(super) fn find_held(&self, turn: Turn) -> Result<u32, NotHeld> {
        let slot = self.current(turn)?;
        match self.entries[slot as usize].phase {
            Phase::InUse | Phase::Leased => Ok(slot),
            Phase::Vacant | Phase::Idle | Phase::Busy => Err(NotHeld::Returned),
        }
    }

    /// Whether the item in a slot is the one whose first turn was `birth`.
    pub(super) fn was_born(&self, slot: u32, birth: Turn) -> bool {
        self.entries[slot as usize].birth == birth.number
    }

    /// (turn, slot) of each item that is out.
    pub(super) fn held(&self) -> Vec<(u64, u32)> {
        let held = |entry: &Slot<K>| matches!(entry.phase, Phase::InUse | Phase::Leased);
        let numbered = (0u32..).zip(&self.entries);
        numbered
            .filter(|(_, entry)| held(entry))
            .map(|(slot, entry)| (entry.turn, slot))
            .collect()
    }

    /// Keys of what is out, or on its way back.
    pub(super) fn keys_in_use(&self) -> HashSet<usize> {
        let out =
            |entry: &&Slot<K>| entry.key != 0 && matches!(entry.phase, Phase::InUse | Phase::Busy);
        self.entries
            .iter()
            .filter(out)
            .map(|entry| entry.key)
            .collect()
    }
}
