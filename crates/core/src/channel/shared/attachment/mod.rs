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

mod dead;
mod roles;
mod waking;

use super::doorbell::Doorbell;
use super::layout::Slot;
use super::reference::Reference;
use super::segment::{ROSTER, Segment, reap_names};
use super::word::SLOT_COUNT;
use crate::channel::live::{self, KeepsMemory};
use crate::error::{Error, Result};
use crate::os::{self, shared};
use crate::resource::fork::{self, ForkLocks};
use crate::resource::shared_memory::guests;
use crate::resource::shared_memory::holding::Holding;
use crate::resource::shared_memory::sent::Carrier;
use crate::sync::{AtomicU64, AtomicUsize, Lock, Ordering};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often one who waits looks whether the others are alive, in milliseconds.
pub const PROBE_MILLISECONDS: u64 = 75;

/// Most units that are taken to give the memory behind them back: nobody else gets these meanwhile.
const TRIM_UNITS: usize = 16;

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
    /// What dead receivers took of segments that this process does not know: to be taken back once
    /// the locks are released.
    strays: Lock<Vec<Reference>>,
    /// Segments of others that something was received of, so that the next message finds them.
    kept: Lock<Vec<Arc<Holding>>>,
}

impl ForkLocks for Attachment {
    fn lock_all(&self) {
        self.locks.hold();
        self.doorbell.hold();
        self.strays.hold();
        self.kept.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: held by `lock_all` on this thread.
        unsafe { self.kept.release() };
        // SAFETY: as above.
        unsafe { self.strays.release() };
        // SAFETY: as above.
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

impl Carrier for Attachment {
    fn is_attached(&self) -> bool {
        // Who has the lock is attached, or about to leave.
        self.is_here() && self.locks.try_lock().is_none_or(|locks| locks.is_some())
    }

    fn has_others(&self) -> bool {
        let Some(locks) = self.locks.try_lock() else {
            return true;
        };
        let file = locks.as_ref().unwrap_or(self.segment.file());
        shared::is_locked_elsewhere(file, 0, ROSTER).unwrap_or(false)
    }

    fn can_be_received(&self) -> bool {
        self.gone(Role::Receiver).is_none() && self.has_others()
    }
}

impl KeepsMemory for Attachment {
    fn idle_bytes(&self) -> usize {
        if self.is_attached() {
            self.segment.idle_bytes()
        } else {
            0
        }
    }

    fn trim(&self) -> usize {
        let before = self.segment.backed_bytes();
        let mut next = Some(0);
        while let Some(from) = next {
            // Who has the lock does not leave meanwhile; let go of for others between two stretches.
            let locks = self.locks.lock();
            if locks.is_none() || !self.is_here() {
                break;
            }
            let owner = self.slot.load(Ordering::Relaxed);
            let give_back = |run| self.segment.unback(run);
            next = (self.segment.blocks()).hollow(from, TRIM_UNITS, owner, give_back);
            drop(locks);
            self.note_block();
        }
        before.saturating_sub(self.segment.backed_bytes())
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
            strays: Lock::default(),
            kept: Lock::default(),
        }
    }

    fn register(self) -> Arc<Self> {
        guests::prepare();
        let attachment = fork::shared(self);
        let weak: Weak<dyn KeepsMemory> = Arc::downgrade(&attachment) as Weak<dyn KeepsMemory>;
        live::enter(weak);
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

    /// A segment that it stays attached to.
    pub(super) fn kept(&self, id: u64) -> Option<Arc<Holding>> {
        let kept = self.kept.lock();
        kept.iter()
            .find(|holding| holding.id() == id)
            .map(Arc::clone)
    }

    /// Stay attached to a segment while its maker lives, for the next message of it.
    pub(super) fn keep(&self, holding: &Arc<Holding>) {
        let mut kept = self.kept.lock();
        if !kept.iter().any(|other| Arc::ptr_eq(other, holding)) {
            kept.push(Arc::clone(holding));
        }
    }

    /// Let go of segments whose makers are gone. What is still viewed keeps itself.
    fn forget_orphans(&self) {
        let mut kept = self.kept.lock();
        let (orphans, others) = kept
            .drain(..)
            .partition::<Vec<_>, _>(|holding| !holding.has_maker());
        *kept = others;
        drop(kept);
        drop(orphans);
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
        let kept = std::mem::take(&mut *self.kept.lock());
        drop(kept);
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
}

fn is_used(slot: &Slot) -> bool {
    slot.used.load(Ordering::Acquire) != 0
}
