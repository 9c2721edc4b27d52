//! A block that a process has, with what gives it back.

use super::attachment::Attachment;
use super::blocks::{Run, UNIT_BYTES};
use crate::resource::fork;
use std::ptr::NonNull;
use std::sync::Arc;

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
    /// A run of this process's.
    pub(super) fn new(attachment: Arc<Attachment>, run: Run, length: usize) -> Self {
        attachment.retain();
        Block {
            attachment,
            run,
            length,
            generation: fork::generation(),
        }
    }

    /// Where it lies in the pool.
    pub(super) fn run(&self) -> Run {
        self.run
    }

    /// Whether this process has it, at this attachment.
    pub(super) fn is_of(&self, attachment: &Arc<Attachment>) -> bool {
        self.is_here() && Arc::ptr_eq(&self.attachment, attachment)
    }

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
    pub(super) fn forget(mut self) {
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
