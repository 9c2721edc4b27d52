//! Waking those who wait: threads by their gate, event loops by their doorbell.

use super::{Attachment, Role, is_used};
use crate::channel::shared::gate::Gate;
use crate::error::Result;
use crate::os::shared;
use crate::sync::Ordering;

const ARMED_FOR_MESSAGES: u32 = 1;
const ARMED_FOR_ROOM: u32 = 2;

impl Attachment {
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
