//! Who sends and who receives: counted over all attachments, with how the last of each went.

use super::{Attachment, Gone, Role, is_used};
use crate::channel::shared::layout::Slot;
use crate::error::Result;
use crate::sync::{AtomicU32, Ordering};

impl Attachment {
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

    /// Add up who is here, after a slot changed, and tell everybody. Under the roster's lock.
    pub(super) fn count_roles(&self, changed: Option<(Role, usize)>, how: Gone) {
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
}
