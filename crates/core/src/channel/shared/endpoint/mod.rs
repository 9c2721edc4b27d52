//! Sending and receiving: trying, and waiting for the other side.

mod waiting;

use super::attachment::{Attachment, Gone, Role};
use super::block::Block;
use super::blocks::{Run, UNIT_BYTES};
use super::descriptor::{CARRIES_BLOCK, Descriptor};
use super::ring::{Front, Record, Refused};
use crate::error::{Error, Result};
use crate::os::shared;
use crate::resource::fork;
use crate::resource::shared_memory::holding::Holding;
use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use std::ptr::NonNull;
use std::sync::Arc;
use waiting::MAX_SPIN;

/// The bit of `active` that says that nothing begins any more.
const CLOSED: u32 = 1 << 31;
/// The bit of `active` that says that the end was counted out, which is done once.
const FINISHED: u32 = 1 << 30;

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// Try again.
    Ready,
    /// The time has passed.
    TimedOut,
    /// A signal arrived, or may have: look at what it wants, then wait on.
    Interrupted,
}

/// What a sender waits for; a receiver waits for none of it.
#[derive(Clone, Copy, Default)]
pub struct Needed<'a> {
    /// Bytes of the message.
    pub bytes: usize,
    /// Resources that it refers to, and how often.
    pub parcels: &'a [(Arc<Holding>, usize)],
}

impl From<usize> for Needed<'_> {
    fn from(bytes: usize) -> Self {
        Needed {
            bytes,
            parcels: &[],
        }
    }
}

/// One end of a channel in this process, open until it is dropped.
pub struct Endpoint {
    attachment: Arc<Attachment>,
    role: Role,
    /// In which process it was opened last; a forked child opens its own when it first uses it.
    generation: AtomicU64,
    /// Operations in progress, whether it was closed, and whether it was counted out.
    active: AtomicU32,
    /// How long to spin before sleeping, in nanoseconds; follows what waits take. A guess only.
    spin: AtomicU32,
    /// Sleeps that a spin might have saved; counted for the same guess.
    short_sleeps: AtomicU32,
}

/// An operation in progress: the end is not closed under it.
struct Active<'a>(&'a Endpoint);

impl Drop for Active<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.0.active.fetch_sub(1, Ordering::AcqRel) == CLOSED + 1 {
            self.0.try_finish();
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
    }
}

impl Endpoint {
    /// Open an end.
    pub fn new(attachment: Arc<Attachment>, role: Role) -> Result<Self> {
        attachment.change_role(role, true)?;
        attachment.retain();
        let spin = if shared::processor_count() > 1 {
            MAX_SPIN
        } else {
            0
        };
        Ok(Endpoint {
            attachment,
            role,
            generation: AtomicU64::new(fork::generation()),
            active: AtomicU32::new(0),
            spin: AtomicU32::new(spin),
            short_sleeps: AtomicU32::new(0),
        })
    }

    /// What it is attached by.
    pub fn attachment(&self) -> &Arc<Attachment> {
        &self.attachment
    }

    /// Begin an operation; the slot to act in. In a forked child the end is opened here.
    #[inline]
    fn enter(&self) -> Result<(Active<'_>, usize)> {
        let before = self.active.fetch_add(1, Ordering::AcqRel);
        let active = Active(self);
        if before & CLOSED != 0 {
            return Err(self.closed());
        }
        let now = fork::generation();
        if self.generation.load(Ordering::Relaxed) != now
            && self.generation.swap(now, Ordering::AcqRel) != now
        {
            self.attachment.change_role(self.role, true)?;
            self.attachment.retain();
        }
        let slot = self.attachment.slot()?;
        Ok((active, slot))
    }

    #[cold]
    fn closed(&self) -> Error {
        let noun = match self.role {
            Role::Sender => "sender",
            Role::Receiver => "receiver",
        };
        Error::closed(format!("this {noun} is closed"))
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.active.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Close it; those who wait here are told. What is in progress in other threads ends first.
    pub fn close(&self) {
        match self.active.fetch_or(CLOSED, Ordering::AcqRel) {
            0 => self.try_finish(),
            before if before & CLOSED == 0 => self.attachment.wake_everybody(),
            _ => {}
        }
    }

    /// It is closed. Unless something is in progress, or was when somebody else got here, count the
    /// end out. Whoever calls a closed end gets here too.
    #[cold]
    fn try_finish(&self) {
        let finished = self.active.compare_exchange(
            CLOSED,
            CLOSED | FINISHED,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if finished.is_err() {
            return;
        }
        let opened_here = self.generation.load(Ordering::Relaxed) == fork::generation();
        if opened_here && self.attachment.is_here() {
            let _ = self.attachment.change_role(self.role, false);
            self.attachment.let_go();
        }
    }

    #[cold]
    fn lost(&self, method: &str, whom: &str, (gone, process): (Gone, u32)) -> Error {
        let how = match gone {
            Gone::Closed => "was closed",
            Gone::Died => "died",
        };
        Error::disconnected(format!(
            "{method}: the last {whom} of this channel, of process {process}, {how}"
        ))
    }

    #[cold]
    fn corrupted(index: usize) -> Error {
        Error::corrupted(format!(
            "segment: the record at granule {index} is none that any sender writes: a process \
             has overwritten it"
        ))
    }

    // === sending ================================================================================

    /// Longest message that lies in the ring itself.
    #[inline]
    pub fn inline_bytes(&self) -> usize {
        self.attachment.segment().header().inline_bytes as usize
    }

    /// Longest message.
    pub fn max_bytes(&self) -> usize {
        let units = self.attachment.segment().header().unit_count as usize;
        units * UNIT_BYTES
    }

    #[inline]
    fn check_receivers(&self, method: &str) -> Result<()> {
        self.attachment.probe_now_and_then()?;
        match self.attachment.gone(Role::Receiver) {
            None => Ok(()),
            Some(gone) => Err(self.lost(method, "receiver", gone)),
        }
    }

    /// Send a message of `length` bytes in the ring, which `write` fills; false if there is no room.
    #[inline]
    pub fn try_send(
        &self,
        kind: u8,
        length: usize,
        write: impl FnOnce(NonNull<u8>),
    ) -> Result<bool> {
        debug_assert!(kind < CARRIES_BLOCK && length <= self.inline_bytes());
        let (_active, slot) = self.enter()?;
        self.check_receivers("send")?;
        self.put(kind, slot, length, write)
    }

    #[inline]
    fn put(
        &self,
        kind: u8,
        slot: usize,
        length: usize,
        write: impl FnOnce(NonNull<u8>),
    ) -> Result<bool> {
        let segment = self.attachment.segment();
        let ring = segment.ring();
        let record = match ring.claim(kind, slot, length) {
            Ok(record) => record,
            Err(Refused::Full) => return Ok(false),
            Err(Refused::Corrupted(index)) => return Err(Self::corrupted(index)),
        };
        write(segment.record_bytes(ring.index_of(record)));
        ring.publish(record);
        self.attachment.note_message();
        Ok(true)
    }

    /// A block for a message of `length` bytes; `None` if there is none now.
    pub fn try_reserve(&self, length: usize) -> Result<Option<Block>> {
        let (_active, slot) = self.enter()?;
        self.check_receivers("send")?;
        if length > self.max_bytes() {
            return Err(Error::invalid(
                "message",
                format!(
                    "must be at most {} bytes long, as the channel was created with that capacity, \
                     got {length}",
                    self.max_bytes()
                ),
            ));
        }
        let count = length.div_ceil(UNIT_BYTES).max(1);
        let segment = self.attachment.segment();
        let Some(claim) = segment.blocks().claim(count, slot) else {
            return Ok(None);
        };
        if claim.is_hollow {
            segment.back(claim.run).inspect_err(|_| {
                segment.blocks().free_hollow(claim.run);
                self.attachment.note_block();
            })?;
        }
        Ok(Some(self.block(claim.run, length)))
    }

    /// Send the first `length` bytes of a block; gives it back if there is no room in the ring.
    pub fn try_commit(&self, kind: u8, block: Block, length: usize) -> Result<Option<Block>> {
        debug_assert!(kind < CARRIES_BLOCK && length <= block.run().count * UNIT_BYTES);
        let (_active, slot) = self.enter()?;
        if !block.is_of(&self.attachment) {
            return Err(Error::invalid(
                "slot",
                "must have been reserved by this sender in this process",
            ));
        }
        self.check_receivers("send")?;
        let descriptor = Descriptor::new(self.attachment.segment(), block.run(), length);
        let sent = self.put(kind | CARRIES_BLOCK, slot, Descriptor::BYTES, |at| {
            // SAFETY: the record has room for a descriptor, and was claimed for it.
            unsafe { descriptor.write(at) };
        })?;
        if sent {
            block.forget();
            Ok(None)
        } else {
            Ok(Some(block))
        }
    }

    /// Send bytes in the ring; false if there is no room.
    #[inline]
    pub fn try_send_bytes(&self, kind: u8, bytes: &[u8]) -> Result<bool> {
        self.try_send(kind, bytes.len(), |at| {
            // SAFETY: the record was claimed for so many bytes, and nobody else has it.
            unsafe {
                at.as_ptr()
                    .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
            };
        })
    }

    /// Send pieces at offsets of a message of `length` bytes in the ring; false if there is no room.
    pub fn try_send_pieces<'a>(
        &self,
        kind: u8,
        length: usize,
        pieces: impl Iterator<Item = (usize, &'a [u8])>,
    ) -> Result<bool> {
        self.try_send(kind, length, |at| {
            for (offset, bytes) in pieces {
                assert!(offset + bytes.len() <= length);
                // SAFETY: within the record, which was claimed for `length` bytes.
                let at = unsafe { at.add(offset) };
                // SAFETY: as above.
                unsafe { at.as_ptr().copy_from(bytes.as_ptr(), bytes.len()) };
            }
        })
    }

    // === receiving ==============================================================================

    /// What can be received now.
    #[inline]
    pub fn peek(&self) -> Result<Option<Offer>> {
        let _active = self.enter()?;
        match self.attachment.segment().ring().front() {
            Front::Data(record) => self.offer(record).map(Some),
            Front::Corrupted(index) => Err(Self::corrupted(index)),
            Front::Empty | Front::Pending(_) => self.nothing(),
        }
    }

    #[inline]
    fn offer(&self, record: Record) -> Result<Offer> {
        let kind = record.word.kind() & !CARRIES_BLOCK;
        let is_block = record.word.kind() & CARRIES_BLOCK != 0;
        let mut length = record.word.length();
        if is_block {
            let ring = self.attachment.segment().ring();
            let at = self
                .attachment
                .segment()
                .record_bytes(ring.index_of(record));
            // SAFETY: every record has at least a granule, which is longer than a descriptor.
            let descriptor = unsafe { Descriptor::read(at) };
            length = descriptor.length();
        }
        Ok(Offer {
            record,
            kind,
            length,
            is_block,
        })
    }

    /// Whether nobody has taken a message.
    pub(super) fn is_there(&self, offer: Offer) -> bool {
        // What was read of it before is not read after this.
        fence(Ordering::Acquire);
        self.attachment.segment().ring().is_unchanged(offer.record)
    }

    #[cold]
    fn nothing(&self) -> Result<Option<Offer>> {
        // One who asks now and then, and never waits, learns of the dead here.
        self.attachment.probe_now_and_then()?;
        let Some(gone) = self.attachment.gone(Role::Sender) else {
            return Ok(None);
        };
        // What was sent before the last sender went is seen now.
        match self.attachment.segment().ring().front() {
            Front::Data(record) => self.offer(record).map(Some),
            Front::Pending(_) => Ok(None),
            _ => Err(self.lost("receive", "sender", gone)),
        }
    }

    /// Receive a message that lies in the ring: `read` gets its bytes. `None` if another was quicker.
    #[inline]
    pub fn accept<T>(
        &self,
        offer: Offer,
        read: impl FnOnce(NonNull<u8>) -> T,
    ) -> Result<Option<T>> {
        debug_assert!(!offer.is_block);
        let (_active, slot) = self.enter()?;
        let segment = self.attachment.segment();
        let ring = segment.ring();
        let Some(record) = ring.take(offer.record, slot) else {
            return Ok(None);
        };
        let done = read(segment.record_bytes(ring.index_of(record)));
        ring.release(record);
        self.attachment.note_room();
        Ok(Some(done))
    }

    /// Receive a message that lies in the ring into `place`, as long as it is at most.
    #[inline]
    pub fn accept_into(&self, offer: Offer, place: &mut [u8]) -> Result<bool> {
        let length = offer.length.min(place.len());
        let done = self.accept(offer, |at| {
            // SAFETY: the record has `offer.length` bytes, and this process has taken it.
            unsafe {
                place
                    .as_mut_ptr()
                    .copy_from_nonoverlapping(at.as_ptr(), length)
            };
        })?;
        Ok(done.is_some())
    }

    /// Receive a message that lies in a block. `None` if another was quicker.
    pub fn accept_block(&self, offer: Offer) -> Result<Option<Block>> {
        debug_assert!(offer.is_block);
        let (_active, slot) = self.enter()?;
        let segment = self.attachment.segment();
        let ring = segment.ring();
        let Some(record) = ring.take(offer.record, slot) else {
            return Ok(None);
        };
        // SAFETY: as in `offer`; taken by this process, so nobody writes there.
        let descriptor = unsafe { Descriptor::read(segment.record_bytes(ring.index_of(record))) };
        let run = descriptor.run(segment);
        let run = run.filter(|run| segment.blocks().transfer(*run, slot));
        ring.release(record);
        self.attachment.note_room();
        let Some(run) = run else {
            return Err(Error::corrupted(
                "segment: a message names a block that is not there: a process has overwritten it",
            ));
        };
        Ok(Some(self.block(run, descriptor.length())))
    }

    fn block(&self, run: Run, length: usize) -> Block {
        Block::new(Arc::clone(&self.attachment), run, length)
    }
}

/// A message that can be received.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub(super) record: Record,
    /// What the sender said it is.
    pub kind: u8,
    /// Bytes of it.
    pub length: usize,
    /// Whether they lie in a block.
    pub is_block: bool,
}
