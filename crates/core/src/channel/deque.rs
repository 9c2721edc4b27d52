//! Messages in a deque behind a short lock: for queues whose limit is absent, or may change.

use super::{Missed, Refused, Store};
use crate::sync::Lock;
use std::collections::VecDeque;

/// What is less than a few pages is not worth moving the messages for.
const LEAST_SPARE_BYTES: usize = 32 * 1024;

struct State<T> {
    messages: VecDeque<T>,
    limit: usize,
    closed: bool,
    receivers_wait: bool,
    senders_wait: bool,
}

/// A queue of messages, up to a limit that may change.
pub struct Deque<T: 'static>(Lock<State<T>>);

impl<T> Deque<T> {
    /// An empty queue; `usize::MAX` is no limit.
    pub fn new(limit: usize) -> Self {
        Deque(Lock::new(State {
            messages: VecDeque::new(),
            limit,
            closed: false,
            receivers_wait: false,
            senders_wait: false,
        }))
    }

    /// Have another limit from now on. Messages beyond it stay until they are taken.
    pub fn set_limit(&self, limit: usize) {
        self.0.lock().limit = limit;
    }

    /// Bytes of places that no message is in.
    pub fn spare_bytes(&self) -> usize {
        let state = self.0.lock();
        (state.messages.capacity() - state.messages.len()) * size_of::<T>()
    }

    /// Give the places back that no message is in, if they are many; how many bytes that were.
    pub fn trim(&self) -> usize {
        let messages = &mut self.0.lock().messages;
        let before = messages.capacity();
        if (before - messages.len()) * size_of::<T>() >= LEAST_SPARE_BYTES {
            messages.shrink_to_fit();
        }
        (before - messages.capacity()) * size_of::<T>()
    }
}

impl<T> Store<T> for Deque<T> {
    #[inline]
    fn push(&self, message: T) -> Result<bool, Refused<T>> {
        let mut state = self.0.lock();
        if state.closed {
            return Err(Refused::Closed(message));
        }
        if state.messages.len() >= state.limit {
            return Err(Refused::Full(message));
        }
        state.messages.push_back(message);
        Ok(state.receivers_wait)
    }

    #[inline]
    fn pop(&self) -> Result<(T, bool), Missed> {
        let mut state = self.0.lock();
        match state.messages.pop_front() {
            Some(message) => Ok((message, state.senders_wait)),
            None if state.closed => Err(Missed::Closed),
            None => Err(Missed::Empty),
        }
    }

    fn mark_receivers(&self, waiting: bool) {
        self.0.lock().receivers_wait = waiting;
    }

    fn mark_senders(&self, waiting: bool) {
        self.0.lock().senders_wait = waiting;
    }

    fn close(&self) {
        self.0.lock().closed = true;
    }

    fn count(&self) -> usize {
        self.0.lock().messages.len()
    }

    fn limit(&self) -> usize {
        self.0.lock().limit
    }

    unsafe fn visit<E>(&self, see: impl FnMut(&T) -> Result<(), E>) -> Result<(), E> {
        self.0.lock().messages.iter().try_for_each(see)
    }

    #[cfg(not(loom))]
    fn hold(&self) {
        self.0.hold();
    }

    #[cfg(not(loom))]
    unsafe fn release(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.release() };
    }
}
