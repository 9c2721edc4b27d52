//! Waiting for the other side: a spin as long as it has paid off lately, then a sleep.

use super::{Endpoint, Needed, Waited};
use crate::channel::shared::attachment::{PROBE_MILLISECONDS, Role};
use crate::channel::shared::blocks::UNIT_BYTES;
use crate::channel::shared::descriptor::Descriptor;
use crate::channel::shared::gate::Gate;
use crate::channel::shared::ring::Front;
use crate::error::Result;
use crate::os::{WaitEnd, shared};
use crate::resource::shared_memory::holding::Holding;
use crate::sync::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest spin before a sleep, in nanoseconds.
pub(super) const MAX_SPIN: u32 = 50_000;
/// Shortest spin that is worth one.
const MIN_SPIN: u32 = 500;
/// Short sleeps before a long spin is tried.
const SLEEPS_TO_A_SPIN: u32 = 16;

impl Endpoint {
    /// Wait until there may be a message or room. `again` if an interruption was looked into.
    ///
    /// `needed` is what a sender wants to send; a receiver passes 0.
    pub fn wait(
        &self,
        needed: Needed<'_>,
        deadline: Option<Instant>,
        again: bool,
    ) -> Result<Waited> {
        let control = self.attachment.segment().control();
        match self.role {
            Role::Receiver => self.wait_at(&control.messages, || self.has_news(), deadline, again),
            Role::Sender => self.wait_at(&control.room, || self.has_room(needed), deadline, again),
        }
    }

    fn has_news(&self) -> bool {
        let front = self.attachment.segment().ring().front();
        self.is_closed()
            || matches!(front, Front::Data(_) | Front::Corrupted(_))
            || (front == Front::Empty && self.attachment.gone(Role::Sender).is_some())
    }

    fn has_room(&self, needed: Needed<'_>) -> bool {
        let needed_bytes = needed.bytes;
        if self.is_closed() || self.attachment.gone(Role::Receiver).is_some() {
            return true;
        }
        let segment = self.attachment.segment();
        if needed_bytes > segment.header().inline_bytes as usize {
            let count = needed_bytes.div_ceil(UNIT_BYTES);
            return segment.ring().can_claim(Descriptor::BYTES)
                && segment.blocks().could_claim(count);
        }
        let can_lend =
            |(holding, count): &(Arc<Holding>, usize)| holding.segment().holders().can_lend(*count);
        segment.ring().can_claim(needed_bytes) && needed.parcels.iter().all(can_lend)
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
}
