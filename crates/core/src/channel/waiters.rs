//! Those who wait at one side of a channel, in order of arrival.
//!
//! A call takes the first out of the line and is one chance to try again, not a message: whoever is
//! called and finds that another was quicker joins again with the same ticket, so in the same place.
//! Whoever is called and does not try must pass the call on, which [`Waiters::leave`] says.

use crate::sync::Lock;
use std::collections::BTreeMap;

struct Line<W> {
    /// By ticket, so oldest first.
    waiting: BTreeMap<u64, W>,
    next_ticket: u64,
    /// The process that they wait in.
    generation: u64,
}

/// A line of wakers.
pub struct Waiters<W: 'static>(Lock<Line<W>>);

#[cfg(not(loom))]
fn generation() -> u64 {
    crate::resource::fork::generation()
}

#[cfg(loom)]
fn generation() -> u64 {
    0
}

impl<W> Default for Waiters<W> {
    fn default() -> Self {
        Waiters(Lock::new(Line {
            waiting: BTreeMap::new(),
            next_ticket: 0,
            generation: generation(),
        }))
    }
}

impl<W> Waiters<W> {
    /// Do something with the line. After a fork the line is the parent's: it is forgotten first.
    ///
    /// `mark` is called, under the lock, with whether anybody waits, if that has changed.
    fn change<R>(&self, mark: impl FnOnce(bool), act: impl FnOnce(&mut Line<W>) -> R) -> R {
        let stale;
        let result;
        {
            let mut line = self.0.lock();
            let waited = !line.waiting.is_empty();
            stale = (line.generation != generation()).then(|| {
                line.generation = generation();
                std::mem::take(&mut line.waiting)
            });
            result = act(&mut line);
            let waits = !line.waiting.is_empty();
            if waits != waited {
                mark(waits);
            }
        }
        drop(stale);
        result
    }

    /// Wait in line, with a new ticket or in the place of an old one. Then try once more before
    /// sleeping.
    pub fn join(&self, ticket: Option<u64>, waker: W, mark: impl FnOnce(bool)) -> u64 {
        let (ticket, before) = self.change(mark, |line| {
            let ticket = ticket.unwrap_or_else(|| {
                line.next_ticket += 1;
                line.next_ticket
            });
            (ticket, line.waiting.insert(ticket, waker))
        });
        drop(before);
        ticket
    }

    /// Take the first out of the line, to be woken.
    #[cold]
    pub fn call(&self, mark: impl FnOnce(bool)) -> Option<W> {
        self.change(mark, |line| Some(line.waiting.pop_first()?.1))
    }

    /// Take everybody out of the line, to be woken.
    pub fn call_all(&self, mark: impl FnOnce(bool)) -> Vec<W> {
        let all = self.change(mark, |line| std::mem::take(&mut line.waiting));
        all.into_values().collect()
    }

    /// Leave the line. False if this ticket was called already: then pass the call on, unless what
    /// it was for was done.
    pub fn leave(&self, ticket: u64, mark: impl FnOnce(bool)) -> bool {
        self.change(mark, |line| line.waiting.remove(&ticket))
            .is_some()
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        let line = self.0.lock();
        if line.generation == generation() {
            line.waiting.len()
        } else {
            0
        }
    }

    /// Take the lock and keep it, over a fork.
    #[cfg(not(loom))]
    pub fn hold(&self) {
        self.0.hold();
    }

    /// Release what [`Waiters::hold`] took.
    ///
    /// # Safety
    /// This thread, or the one it was forked from, called `hold`.
    #[cfg(not(loom))]
    pub unsafe fn release(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.release() };
    }
}
