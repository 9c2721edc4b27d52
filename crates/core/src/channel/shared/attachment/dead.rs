//! What a process does for those that died: it finds out, and puts in order what they left.

use super::{Attachment, Gone, PROBE_MILLISECONDS, Role, is_used};
use crate::channel::shared::blocks::Run;
use crate::channel::shared::descriptor::Descriptor;
use crate::channel::shared::layout::Slot;
use crate::channel::shared::reference;
use crate::channel::shared::ring::Record;
use crate::channel::shared::segment::ROSTER;
use crate::channel::shared::word::State;
use crate::error::Result;
use crate::os::{self, shared};
use crate::resource::shared_memory::guests;
use crate::sync::Ordering;
use std::cell::RefCell;
use std::os::fd::OwnedFd;

impl Attachment {
    /// Look whether the others are alive, if nobody here has done so for a while.
    #[inline]
    pub fn probe_now_and_then(&self) -> Result<()> {
        let now = os::now_milliseconds();
        if now.wrapping_sub(self.probed.load(Ordering::Relaxed)) < PROBE_MILLISECONDS {
            return Ok(());
        }
        self.probe()
    }

    /// Look whether the others are alive, and put in order what the dead left.
    #[cold]
    pub fn probe(&self) -> Result<()> {
        self.probed.store(os::now_milliseconds(), Ordering::Relaxed);
        self.segment.check_length()?;
        self.forget_orphans();
        let mine = self.slot()?;
        // Somebody else of this process has the lock: he looks, or his work is short.
        let Some(locks) = self.locks.try_lock() else {
            return Ok(());
        };
        let Some(file) = locks.as_ref() else {
            return Ok(());
        };
        let is_dead = |(index, slot): (usize, &Slot)| {
            index != mine
                && is_used(slot)
                && shared::is_locked_elsewhere(file, index as u64, 1).is_ok_and(|locked| !locked)
        };
        if !self.segment.slots().iter().enumerate().any(is_dead) {
            return Ok(());
        }
        if shared::try_lock(file, ROSTER).unwrap_or(false) {
            self.reap_dead(file, Some(mine));
            shared::unlock(file, ROSTER);
        }
        drop(locks);
        self.take_strays();
        Ok(())
    }

    /// Clear the slots whose owners died. Under the roster's lock.
    pub(super) fn reap_dead(&self, file: &OwnedFd, mine: Option<usize>) {
        for (index, slot) in self.segment.slots().iter().enumerate() {
            if Some(index) == mine || !is_used(slot) {
                continue;
            }
            if shared::is_locked_elsewhere(file, index as u64, 1).is_ok_and(|locked| !locked) {
                self.clear(index, true);
            }
        }
    }

    /// Give back what a slot has, and free it. Under the roster's lock; its owner is dead, or asks.
    pub(super) fn clear(&self, index: usize, died: bool) {
        let slot = &self.segment.slots()[index];
        let (senders, receivers) = (
            slot.senders.load(Ordering::Relaxed),
            slot.receivers.load(Ordering::Relaxed),
        );
        self.settle_records(index);
        let carried = self.carried();
        self.segment
            .blocks()
            .reap(index, |run| carried.contains(&run));
        slot.senders.store(0, Ordering::Relaxed);
        slot.receivers.store(0, Ordering::Relaxed);
        slot.armed.store(0, Ordering::Relaxed);
        let how = if died { Gone::Died } else { Gone::Closed };
        if died {
            let deaths = &self.segment.control().roles.deaths;
            deaths.fetch_add(1, Ordering::Relaxed);
        }
        // One that died may have changed its slot without having added up.
        if senders > 0 || died {
            self.count_roles(Some((Role::Sender, index)), how);
        }
        if receivers > 0 || died {
            self.count_roles(Some((Role::Receiver, index)), how);
        }
        slot.used.store(0, Ordering::Release);
        self.wake_everybody();
    }

    /// Claims of a slot become skips; what it took is done, and the block is its to lose.
    fn settle_records(&self, owner: usize) {
        let ring = self.segment.ring();
        ring.walk(|record| {
            if record.word.owner() != owner {
                return;
            }
            match record.word.state() {
                Some(State::Claimed) => {
                    ring.skip_claim(record);
                }
                Some(State::Taken) => {
                    if let Some(run) = self.run_of(record) {
                        self.segment.blocks().transfer(run, owner);
                    }
                    self.take_references(record);
                    ring.finish_taken(record);
                }
                _ => {}
            }
        });
    }

    /// What a dead receiver was about to hold by reference is nobody's.
    fn take_references(&self, record: Record) {
        for reference in reference::in_record(&self.segment, record) {
            match guests::known(reference.address.id) {
                Some(holding) => {
                    holding.segment().holders().take(reference.parcel);
                }
                None => self.strays.lock().push(reference),
            }
        }
    }

    /// The same for segments that must be attached to first. With no lock held.
    fn take_strays(&self) {
        let strays = std::mem::take(&mut *self.strays.lock());
        for reference in strays {
            if let Ok(Some(holding)) = guests::attach(reference.address) {
                holding.segment().holders().take(reference.parcel);
            }
        }
    }

    fn run_of(&self, record: Record) -> Option<Run> {
        if !Descriptor::is_in(record.word) {
            return None;
        }
        let at = self
            .segment
            .record_bytes(self.segment.ring().index_of(record));
        // SAFETY: the record lies within the ring, and its length was found to be a descriptor's.
        let descriptor = unsafe { Descriptor::read(at) };
        descriptor.run(&self.segment)
    }

    /// The runs that messages in the ring carry.
    fn carried(&self) -> Vec<Run> {
        let ring = self.segment.ring();
        let found = RefCell::new(Vec::new());
        ring.walk(|record| {
            if !matches!(record.word.state(), Some(State::Data | State::Taken)) {
                return;
            }
            if let Some(run) = self.run_of(record) {
                found.borrow_mut().push(run);
            }
        });
        found.into_inner()
    }
}
