//! One process at a segment: its slot, the lock that dies with it, and what it does for the dead.
//!
//! A slot's byte of the file is locked by an open file description that only this process has, so
//! the kernel unlocks it when the process ends, however it ends, and no number of a process is ever
//! mistaken for another's. Whoever finds a used slot unlocked puts in order what its owner left,
//! under the roster's lock, which is one of the same kind: each step may be done twice, so one who
//! is killed doing it is followed by another.
//!
//! A fork leaves the child with the mapping and with nothing in the segment: it attaches anew, with
//! a slot of its own, when it first uses the channel.

use super::blocks::Run;
use super::descriptor::Descriptor;
use super::doorbell::Doorbell;
use super::gate::Gate;
use super::layout::Slot;
use super::ring::Record;
use super::segment::{ROSTER, Segment, reap_names};
use super::word::{SLOT_COUNT, State};
use crate::error::{Error, Result};
use crate::os::{self, shared};
use crate::resource::fork::{self, ForkLocks};
use crate::sync::{AtomicU32, AtomicU64, AtomicUsize, Lock, Ordering};
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often one who waits looks whether the others are alive, in milliseconds.
pub const PROBE_MILLISECONDS: u64 = 40;

/// What a slot has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It sends.
    Sender,
    /// It receives.
    Receiver,
}

/// How the last of a role went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gone {
    /// It was closed.
    Closed,
    /// Its process died.
    Died,
}

/// This process at a segment.
pub struct Attachment {
    segment: Segment,
    /// The slot of the process of `generation`. Written before it, with `Release`.
    slot: AtomicUsize,
    /// The forks before the process that attached; another number: not attached in this process.
    generation: AtomicU64,
    /// The descriptor with the locks, `None` in a child that has not attached; also held by the one
    /// thread that has the roster's lock, as those of one descriptor do not exclude each other.
    locks: Lock<Option<OwnedFd>>,
    /// Handles, open ends and blocks of this process: the last one that goes detaches.
    users: AtomicUsize,
    /// When the others were looked at last, in milliseconds. Not ordered with anything.
    probed: AtomicU64,
    doorbell: Doorbell,
}

impl ForkLocks for Attachment {
    fn lock_all(&self) {
        self.locks.hold();
        self.doorbell.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: held by `lock_all` on this thread.
        unsafe { self.doorbell.release(!self.is_here()) };
        if !self.is_here() {
            // The parent's lock must end with the parent: a child has no part in it.
            // SAFETY: as above.
            drop(unsafe { self.locks.held() }.take());
        }
        // SAFETY: as above.
        unsafe { self.locks.release() };
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.is_here() {
            self.detach();
        }
    }
}

impl Attachment {
    /// Create a segment and attach to it.
    pub fn create(name: Option<&str>, capacity: usize) -> Result<Arc<Self>> {
        reap_names();
        let attachment = Self::new(Segment::create(name, capacity)?);
        attachment.join()?;
        // The first slot is taken: nobody finds it without an owner.
        attachment.segment.publish()?;
        Ok(Self::register(attachment))
    }

    /// Attach to the segment of this name.
    pub fn open(name: &str) -> Result<Arc<Self>> {
        reap_names();
        let attachment = Self::new(Segment::open(name)?);
        attachment.join()?;
        Ok(Self::register(attachment))
    }

    /// Attach to the segment in this file.
    pub fn adopt(file: OwnedFd) -> Result<Arc<Self>> {
        let attachment = Self::new(Segment::adopt(file, None)?);
        attachment.join()?;
        Ok(Self::register(attachment))
    }

    fn new(segment: Segment) -> Self {
        Attachment {
            segment,
            slot: AtomicUsize::new(0),
            generation: AtomicU64::new(u64::MAX),
            locks: Lock::new(None),
            users: AtomicUsize::new(1),
            probed: AtomicU64::new(0),
            doorbell: Doorbell::default(),
        }
    }

    fn register(self) -> Arc<Self> {
        let attachment = Arc::new(self);
        let weak: Weak<dyn ForkLocks> = Arc::downgrade(&attachment) as Weak<dyn ForkLocks>;
        fork::register(weak);
        attachment
    }

    /// The segment it is attached to.
    #[inline]
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// Whether it is this process that is attached, not one that it was forked from.
    #[inline]
    pub fn is_here(&self) -> bool {
        self.generation.load(Ordering::Acquire) == fork::generation()
    }

    /// Number of the forks before this process; with it, what belongs to a parent is told apart.
    #[inline]
    pub fn generation(&self) -> u64 {
        fork::generation()
    }

    /// This process's slot; a forked child attaches here.
    #[inline]
    pub fn slot(&self) -> Result<usize> {
        if !self.is_here() {
            self.join()?;
        }
        Ok(self.slot.load(Ordering::Relaxed))
    }

    /// One more that needs it.
    #[inline]
    pub fn retain(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// One less; the last detaches, in the process that attached.
    #[inline]
    pub fn let_go(&self) {
        if self.users.fetch_sub(1, Ordering::AcqRel) == 1 && self.is_here() {
            self.detach();
        }
    }

    fn entry(&self) -> Result<&Slot> {
        Ok(&self.segment.slots()[self.slot()?])
    }

    // === coming and going =======================================================================

    fn join(&self) -> Result<()> {
        let failed = |error: std::io::Error| Error::unsupported(format!("attaching: {error}"));
        let mut locks = self.locks.lock();
        if locks.is_some() && self.is_here() {
            return Ok(());
        }
        let file = shared::open_again(self.segment.file()).map_err(failed)?;
        shared::lock(&file, ROSTER).map_err(failed)?;
        let joined = self.join_locked(&file).inspect_err(|_| {
            shared::unlock(&file, ROSTER);
        });
        let slot = joined?;
        shared::unlock(&file, ROSTER);
        *locks = Some(file);
        if self.generation.load(Ordering::Relaxed) != u64::MAX {
            self.segment.populate();
        }
        self.slot.store(slot, Ordering::Relaxed);
        self.generation.store(fork::generation(), Ordering::Release);
        Ok(())
    }

    /// Find a slot, under the roster's lock.
    fn join_locked(&self, file: &OwnedFd) -> Result<usize> {
        let failed = |error: std::io::Error| Error::unsupported(format!("attaching: {error}"));
        let is_new = self.generation.load(Ordering::Relaxed) == u64::MAX;
        let name = self.segment.name().unwrap_or_default().to_owned();
        let used = self.segment.slots().iter().any(is_used);
        if is_new && used && self.segment.name().is_some() {
            if !self.segment.is_named_still() {
                return Err(Error::disconnected(format!(
                    "open: the channel {name:?} was closed by everybody else"
                )));
            }
            if !shared::is_locked_elsewhere(file, 0, ROSTER).map_err(failed)? {
                self.segment.unlink();
                return Err(Error::disconnected(format!(
                    "open: everybody who had the channel {name:?} died"
                )));
            }
        }
        self.reap_dead(file, None);
        for (index, slot) in self.segment.slots().iter().enumerate() {
            if is_used(slot) || !shared::try_lock(file, index as u64).map_err(failed)? {
                continue;
            }
            slot.process
                .store(os::locked::process_id(), Ordering::Relaxed);
            slot.senders.store(0, Ordering::Relaxed);
            slot.receivers.store(0, Ordering::Relaxed);
            slot.armed.store(0, Ordering::Relaxed);
            slot.used.store(1, Ordering::Release);
            return Ok(index);
        }
        Err(Error::unsupported(format!(
            "attaching: {SLOT_COUNT} handles are attached to this channel already, and no more can be"
        )))
    }

    /// Leave in order. What cannot be had in time is left to those who find the slot unlocked.
    fn detach(&self) {
        let mut locks = self.locks.lock();
        let Some(file) = locks.take() else { return };
        let mine = self.slot.load(Ordering::Relaxed);
        for _ in 0..50 {
            if shared::try_lock(&file, ROSTER).unwrap_or(false) {
                self.clear(mine, false);
                if !shared::is_locked_elsewhere(&file, 0, ROSTER).unwrap_or(true) {
                    self.segment.unlink();
                }
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(file);
    }

    /// Do something under the roster's lock.
    fn with_roster<T>(&self, body: impl FnOnce(&OwnedFd) -> T) -> Result<T> {
        self.slot()?;
        let locks = self.locks.lock();
        let Some(file) = locks.as_ref() else {
            return Err(Error::closed("the channel is closed"));
        };
        shared::lock(file, ROSTER)
            .map_err(|error| Error::unsupported(format!("locking the roster: {error}")))?;
        let done = body(file);
        shared::unlock(file, ROSTER);
        Ok(done)
    }

    /// Open or close a sender or a receiver of this process.
    pub fn change_role(&self, role: Role, open: bool) -> Result<()> {
        let slot = self.slot()?;
        self.with_roster(|_| {
            let entry = &self.segment.slots()[slot];
            let count = match role {
                Role::Sender => &entry.senders,
                Role::Receiver => &entry.receivers,
            };
            let now = count.load(Ordering::Relaxed);
            let next = if open { now + 1 } else { now.saturating_sub(1) };
            count.store(next, Ordering::Relaxed);
            self.count_roles(Some((role, slot)), Gone::Closed);
        })
    }

    // === roles ==================================================================================

    /// Add up who is here, after a slot changed, and tell everybody. Under the roster's lock.
    fn count_roles(&self, changed: Option<(Role, usize)>, how: Gone) {
        let roles = &self.segment.control().roles;
        let slots = self.segment.slots();
        let sum = |count: fn(&Slot) -> &AtomicU32| -> u32 {
            let used = slots.iter().filter(|slot| is_used(slot));
            used.map(|slot| count(slot).load(Ordering::Relaxed)).sum()
        };
        let process = |role: Role| match changed {
            Some((changed, slot)) if changed == role => {
                Some(slots[slot].process.load(Ordering::Relaxed))
            }
            _ => None,
        };
        let settle = |now: u32,
                      total: &AtomicU32,
                      gone: &AtomicU32,
                      last: &AtomicU32,
                      ever: &AtomicU32,
                      process: Option<u32>| {
            total.store(now, Ordering::Relaxed);
            if now > 0 {
                ever.store(1, Ordering::Relaxed);
                gone.store(0, Ordering::Release);
            } else if ever.load(Ordering::Relaxed) != 0 && gone.load(Ordering::Relaxed) == 0 {
                last.store(process.unwrap_or(0), Ordering::Relaxed);
                gone.store(how as u32 + 1, Ordering::Release);
            }
        };
        settle(
            sum(|slot| &slot.senders),
            &roles.senders,
            &roles.senders_gone,
            &roles.sender_process,
            &roles.sender_ever,
            process(Role::Sender),
        );
        settle(
            sum(|slot| &slot.receivers),
            &roles.receivers,
            &roles.receivers_gone,
            &roles.receiver_process,
            &roles.receiver_ever,
            process(Role::Receiver),
        );
        self.wake_everybody();
    }

    /// Whether all of a role that ever was are gone, how, and the process of the last.
    #[inline]
    pub fn gone(&self, role: Role) -> Option<(Gone, u32)> {
        let roles = &self.segment.control().roles;
        let (gone, process) = match role {
            Role::Sender => (&roles.senders_gone, &roles.sender_process),
            Role::Receiver => (&roles.receivers_gone, &roles.receiver_process),
        };
        match gone.load(Ordering::Acquire) {
            0 => None,
            1 => Some((Gone::Closed, process.load(Ordering::Relaxed))),
            _ => Some((Gone::Died, process.load(Ordering::Relaxed))),
        }
    }

    /// Senders or receivers that are open now.
    pub fn role_count(&self, role: Role) -> usize {
        let roles = &self.segment.control().roles;
        let count = match role {
            Role::Sender => &roles.senders,
            Role::Receiver => &roles.receivers,
        };
        count.load(Ordering::Relaxed) as usize
    }

    // === the dead ===============================================================================

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
        Ok(())
    }

    /// Clear the slots whose owners died. Under the roster's lock.
    fn reap_dead(&self, file: &OwnedFd, mine: Option<usize>) {
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
    fn clear(&self, index: usize, died: bool) {
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
        if senders > 0 {
            self.count_roles(Some((Role::Sender, index)), how);
        }
        if receivers > 0 {
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
                    ring.finish_taken(record);
                }
                _ => {}
            }
        });
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

    // === waking =================================================================================

    /// After a message was published.
    #[inline]
    pub fn note_message(&self) {
        let gate = &self.segment.control().messages;
        if gate.is_waited_at() {
            self.wake(gate, ARMED_FOR_MESSAGES);
        }
    }

    /// After room was made in the ring. A sender is woken once it can go on for a while, rather
    /// than for each message; its naps are short.
    #[inline]
    pub fn note_room(&self) {
        let gate = &self.segment.control().room;
        if gate.is_waited_at() && self.segment.ring().is_roomy() {
            self.wake(gate, ARMED_FOR_ROOM);
        }
    }

    /// After a block was freed; the same. With no message under way nothing else would wake it.
    pub fn note_block(&self) {
        let gate = &self.segment.control().room;
        if gate.is_waited_at()
            && (self.segment.ring().is_empty() || self.segment.blocks().is_roomy())
        {
            self.wake(gate, ARMED_FOR_ROOM);
        }
    }

    #[cold]
    fn wake(&self, gate: &Gate, armed: u32) {
        if gate.wake(|word| shared::wake_shared(word, 1) > 0) {
            self.ring_doorbells(armed);
        }
    }

    /// Have all who wait, in every process, look again.
    pub fn wake_everybody(&self) {
        let control = self.segment.control();
        for (gate, armed) in [
            (&control.messages, ARMED_FOR_MESSAGES),
            (&control.room, ARMED_FOR_ROOM),
        ] {
            if gate.is_waited_at() && gate.wake(|word| shared::wake_shared(word, u32::MAX) > 0) {
                self.ring_doorbells(armed);
            }
        }
    }

    fn ring_doorbells(&self, armed: u32) {
        for (index, slot) in self.segment.slots().iter().enumerate() {
            if is_used(slot) && slot.armed.fetch_and(!armed, Ordering::AcqRel) & armed != 0 {
                let number = slot.doorbell.load(Ordering::Relaxed);
                self.doorbell.ring(self.segment.header().id, index, number);
            }
        }
    }

    /// The descriptor that becomes readable when this process's event loops are to look again.
    pub fn doorbell_fd(&self) -> Result<i32> {
        let slot = self.slot()?;
        let (fd, number) = self.doorbell.open(self.segment.header().id, slot)?;
        self.entry()?.doorbell.store(number, Ordering::Relaxed);
        Ok(fd)
    }

    /// Silence the doorbell.
    pub fn drain_doorbell(&self) {
        self.doorbell.drain();
    }

    /// Ask to be rung for a message, or for room. Look once more afterwards.
    pub fn arm(&self, role: Role) -> Result<()> {
        let control = self.segment.control();
        let (gate, armed) = match role {
            Role::Receiver => (&control.messages, ARMED_FOR_MESSAGES),
            Role::Sender => (&control.room, ARMED_FOR_ROOM),
        };
        self.entry()?.armed.fetch_or(armed, Ordering::AcqRel);
        gate.arm();
        Ok(())
    }
}

const ARMED_FOR_MESSAGES: u32 = 1;
const ARMED_FOR_ROOM: u32 = 2;

fn is_used(slot: &Slot) -> bool {
    slot.used.load(Ordering::Acquire) != 0
}
