//! Sending and receiving: trying, and waiting for the other side.

use super::attachment::{Attachment, Gone, PROBE_MILLISECONDS, Role};
use super::blocks::{Run, UNIT_BYTES};
use super::descriptor::{CARRIES_BLOCK, Descriptor};
use super::gate::Gate;
use super::ring::{Front, Record, Refused};
use crate::error::{Error, Result};
use crate::os::{WaitEnd, shared};
use crate::resource::fork;
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest spin before a sleep, in nanoseconds.
const MAX_SPIN: u32 = 50_000;
/// The bit of `active` that says that nothing begins any more.
const CLOSED: u32 = 1 << 31;
/// Shortest spin that is worth one.
const MIN_SPIN: u32 = 500;
/// Short sleeps before a long spin is tried.
const SLEEPS_TO_A_SPIN: u32 = 16;

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

/// One end of a channel in this process, open until it is dropped.
pub struct Endpoint {
    attachment: Arc<Attachment>,
    role: Role,
    /// In which process it was opened last; a forked child opens its own when it first uses it.
    generation: AtomicU64,
    /// Operations in progress, and whether it was closed.
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
            self.0.finish();
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
            0 => self.finish(),
            before if before & CLOSED == 0 => self.attachment.wake_everybody(),
            _ => {}
        }
    }

    /// Nothing is in progress, and nothing begins.
    #[cold]
    fn finish(&self) {
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

    // === waiting ================================================================================

    /// Wait until there may be a message or room. `again` if an interruption was looked into.
    ///
    /// `needed_bytes` is what a sender wants to send; a receiver passes 0.
    pub fn wait(
        &self,
        needed_bytes: usize,
        deadline: Option<Instant>,
        again: bool,
    ) -> Result<Waited> {
        let control = self.attachment.segment().control();
        match self.role {
            Role::Receiver => self.wait_at(&control.messages, || self.has_news(), deadline, again),
            Role::Sender => self.wait_at(
                &control.room,
                || self.has_room(needed_bytes),
                deadline,
                again,
            ),
        }
    }

    fn has_news(&self) -> bool {
        let front = self.attachment.segment().ring().front();
        self.is_closed()
            || matches!(front, Front::Data(_) | Front::Corrupted(_))
            || (front == Front::Empty && self.attachment.gone(Role::Sender).is_some())
    }

    fn has_room(&self, needed_bytes: usize) -> bool {
        if self.is_closed() || self.attachment.gone(Role::Receiver).is_some() {
            return true;
        }
        let segment = self.attachment.segment();
        if needed_bytes > segment.header().inline_bytes as usize {
            let count = needed_bytes.div_ceil(UNIT_BYTES);
            return segment.ring().can_claim(Descriptor::BYTES)
                && segment.blocks().could_claim(count);
        }
        segment.ring().can_claim(needed_bytes)
    }

    fn wait_at(
        &self,
        gate: &Gate,
        is_ready: impl Fn() -> bool,
        deadline: Option<Instant>,
        again: bool,
    ) -> Result<Waited> {
        let started = Instant::now();
        let left = |now: Instant| deadline.map(|deadline| deadline.saturating_duration_since(now));
        if left(started).is_some_and(|left| left.is_zero()) {
            return Ok(Waited::TimedOut);
        }
        if !again && self.spin(started, &is_ready) {
            return Ok(Waited::Ready);
        }
        self.attachment.probe_now_and_then()?;
        let count = gate.announce();
        if is_ready() {
            return Ok(Waited::Ready);
        }
        let nap = Duration::from_millis(PROBE_MILLISECONDS);
        let nap = left(Instant::now()).map_or(nap, |left| left.min(nap));
        let end = shared::wait_on_shared(gate.word(), count, nap);
        if started.elapsed() < Duration::from_nanos(2 * u64::from(MAX_SPIN)) {
            self.note_short_sleep();
        }
        if is_ready() {
            return Ok(Waited::Ready);
        }
        if end == WaitEnd::TimedOut {
            self.attachment.probe()?;
            if is_ready() {
                return Ok(Waited::Ready);
            }
        }
        Ok(match left(Instant::now()) {
            Some(left) if left.is_zero() => Waited::TimedOut,
            _ => Waited::Interrupted,
        })
    }

    /// Whether it was ready before the spin ended; a spin that helped is a reason for longer ones.
    fn spin(&self, started: Instant, is_ready: &impl Fn() -> bool) -> bool {
        let spin = self.spin.load(Ordering::Relaxed);
        if spin == 0 {
            return false;
        }
        let limit = Duration::from_nanos(u64::from(spin));
        loop {
            for _ in 0..16 {
                if is_ready() {
                    self.spin.store((spin * 2).min(MAX_SPIN), Ordering::Relaxed);
                    return true;
                }
                std::hint::spin_loop();
            }
            if started.elapsed() >= limit {
                self.spin.store((spin / 2).max(MIN_SPIN), Ordering::Relaxed);
                return false;
            }
        }
    }

    /// After a sleep that was short: a spin might have done, so try a long one now and then. Not
    /// each time: where both sides share a processor, the other needs it.
    fn note_short_sleep(&self) {
        let count = self.short_sleeps.fetch_add(1, Ordering::Relaxed);
        if count % SLEEPS_TO_A_SPIN == 0 && self.spin.load(Ordering::Relaxed) > 0 {
            self.spin.store(MAX_SPIN, Ordering::Relaxed);
        }
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
        let run = self.attachment.segment().blocks().claim(count, slot);
        Ok(run.map(|run| self.block(run, length)))
    }

    /// Send the first `length` bytes of a block; gives it back if there is no room in the ring.
    pub fn try_commit(&self, kind: u8, block: Block, length: usize) -> Result<Option<Block>> {
        debug_assert!(kind < CARRIES_BLOCK && length <= block.run.count * UNIT_BYTES);
        let (_active, slot) = self.enter()?;
        if !block.is_here() || !Arc::ptr_eq(&block.attachment, &self.attachment) {
            return Err(Error::invalid(
                "slot",
                "must have been reserved by this sender in this process",
            ));
        }
        self.check_receivers("send")?;
        let descriptor = Descriptor::new(self.attachment.segment(), block.run, length);
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

    #[cold]
    fn nothing(&self) -> Result<Option<Offer>> {
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
        self.attachment.retain();
        Block {
            attachment: Arc::clone(&self.attachment),
            run,
            length,
            generation: fork::generation(),
        }
    }
}

/// A message that can be received.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    record: Record,
    /// What the sender said it is.
    pub kind: u8,
    /// Bytes of it.
    pub length: usize,
    /// Whether they lie in a block.
    pub is_block: bool,
}

/// A block that this process has: reserved to be sent, or received. Freed when dropped.
pub struct Block {
    attachment: Arc<Attachment>,
    /// Of no units once somebody else has it.
    run: Run,
    length: usize,
    /// The forks before the process that has it: a child has no part in what its parent has.
    generation: u64,
}

impl Block {
    /// Where its bytes are.
    pub fn address(&self) -> NonNull<u8> {
        self.attachment.segment().unit_bytes(self.run.start)
    }

    /// Bytes of the message.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Write bytes at an offset. Only before it is sent.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        assert!(
            offset
                .checked_add(bytes.len())
                .is_some_and(|end| end <= self.run.count * UNIT_BYTES)
        );
        // SAFETY: within the run, which this process alone has.
        let at = unsafe { self.address().add(offset) };
        // SAFETY: as above; the bytes come from elsewhere, as nobody borrows a block.
        unsafe { at.as_ptr().copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// Read bytes at an offset.
    pub fn read(&self, offset: usize, place: &mut [u8]) {
        assert!(
            offset
                .checked_add(place.len())
                .is_some_and(|end| end <= self.length)
        );
        // SAFETY: within the message.
        let at = unsafe { self.address().add(offset) };
        // SAFETY: as above.
        unsafe { place.as_mut_ptr().copy_from(at.as_ptr(), place.len()) };
    }

    fn is_here(&self) -> bool {
        self.generation == fork::generation() && self.attachment.is_here()
    }

    /// Somebody else has it now.
    fn forget(mut self) {
        self.run.count = 0;
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if !self.is_here() {
            return;
        }
        if self.run.count > 0 {
            self.attachment.segment().blocks().free(self.run);
            self.attachment.note_block();
        }
        self.attachment.let_go();
    }
}
