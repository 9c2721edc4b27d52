//! A channel: a store of messages, those who wait at its two sides, and who may still use them.
//!
//! Handing over: a push that learns that receivers wait takes the first out of their line and has it
//! woken. It gets no message of its own: whoever comes first takes it, which keeps a channel fast
//! while its ends run, and the one who was called goes back to the front of the line. Whoever waits
//! joins the line first and tries once more then, so a push either is seen by that try, or sees the
//! line. Every push calls at most one; every call ends in a try, or is passed on.

use super::waiters::Waiters;
use super::{Missed, Refused, Ring, Store};
use crate::sync::{AtomicU8, Lock, Ordering};

/// A side of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Those who send.
    Senders,
    /// Those who receive.
    Receivers,
}

/// Who ended a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody closed it as a whole.
    Closed,
    /// The last handle of this side was closed.
    Side(Side),
}

const CLOSED: u8 = 1;
const SENDERS_GONE: u8 = 2;
const RECEIVERS_GONE: u8 = 4;

/// Handles of each side that are open.
#[derive(Default)]
struct Handles {
    senders: usize,
    receivers: usize,
}

/// How full a channel is, and who waits.
#[derive(Clone, Copy, Debug)]
pub struct Census {
    /// Messages in it.
    pub count: usize,
    /// Messages it takes before a sender waits.
    pub limit: usize,
    /// Senders that wait.
    pub senders_waiting: usize,
    /// Receivers that wait.
    pub receivers_waiting: usize,
    /// Open handles that send.
    pub senders: usize,
    /// Open handles that receive.
    pub receivers: usize,
}

/// Messages `T` from any thread to any thread; `W` wakes one who waits.
pub struct Channel<T: Send + 'static, W: Send + 'static, S: Store<T> = Ring<T>> {
    store: S,
    senders: Waiters<W>,
    receivers: Waiters<W>,
    handles: Lock<Handles>,
    /// Why the store is closed; set before it is, so whoever finds it closed finds the reason.
    ended: AtomicU8,
    messages: std::marker::PhantomData<fn(T) -> T>,
}

impl<T: Send + 'static, W: Send + 'static, S: Store<T>> Channel<T, W, S> {
    /// A channel over an empty store.
    pub fn new(store: S) -> Self {
        Channel {
            store,
            senders: Waiters::default(),
            receivers: Waiters::default(),
            handles: Lock::new(Handles::default()),
            ended: AtomicU8::new(0),
            messages: std::marker::PhantomData,
        }
    }

    /// Where the messages are.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Put a message in without waiting; the receiver to be woken, if one waits.
    #[inline]
    pub fn push(&self, message: T) -> Result<Option<W>, Refused<T>> {
        if self.store.push(message)? {
            return Ok(self.call(Side::Receivers));
        }
        Ok(None)
    }

    /// Take a message without waiting; the sender to be woken, if one waits.
    #[inline]
    pub fn pop(&self) -> Result<(T, Option<W>), Missed> {
        let (message, senders_wait) = self.store.pop()?;
        if senders_wait {
            return Ok((message, self.call(Side::Senders)));
        }
        Ok((message, None))
    }

    /// Wait in line at a side; [`Waiters::join`] says how. Then try once more before sleeping.
    pub fn join(&self, side: Side, ticket: Option<u64>, waker: W) -> u64 {
        let mark = |waiting| self.mark(side, waiting);
        self.line(side).join(ticket, waker, mark)
    }

    /// Take the first out of the line of a side, to be woken.
    pub fn call(&self, side: Side) -> Option<W> {
        self.line(side).call(|waiting| self.mark(side, waiting))
    }

    /// Leave the line. If the ticket was called already, the next one, to be woken in its place.
    pub fn leave(&self, side: Side, ticket: u64) -> Option<W> {
        let mark = |waiting| self.mark(side, waiting);
        if self.line(side).leave(ticket, mark) {
            None
        } else {
            self.call(side)
        }
    }

    fn line(&self, side: Side) -> &Waiters<W> {
        match side {
            Side::Senders => &self.senders,
            Side::Receivers => &self.receivers,
        }
    }

    fn mark(&self, side: Side, waiting: bool) {
        match side {
            Side::Senders => self.store.mark_senders(waiting),
            Side::Receivers => self.store.mark_receivers(waiting),
        }
    }

    /// Take no message any more. What is in it can be received. Everybody who waits, to be woken.
    pub fn close(&self) -> Vec<W> {
        self.end(CLOSED)
    }

    fn end(&self, reason: u8) -> Vec<W> {
        self.ended.fetch_or(reason, Ordering::AcqRel);
        self.store.close();
        let mut all = self.call_all(Side::Receivers);
        all.extend(self.call_all(Side::Senders));
        all
    }

    /// Take everybody out of the line of a side, to be woken.
    pub fn call_all(&self, side: Side) -> Vec<W> {
        self.line(side).call_all(|waiting| self.mark(side, waiting))
    }

    /// Why `side` can do no more, if it cannot: for whoever found the channel closed.
    pub fn ended(&self, side: Side) -> Option<Ended> {
        let ended = self.ended.load(Ordering::Acquire);
        let other = match side {
            Side::Senders => (RECEIVERS_GONE, Side::Receivers),
            Side::Receivers => (SENDERS_GONE, Side::Senders),
        };
        if ended == 0 {
            None
        } else if ended & CLOSED != 0 {
            Some(Ended::Closed)
        } else if ended & other.0 != 0 {
            Some(Ended::Side(other.1))
        } else {
            Some(Ended::Side(side))
        }
    }

    /// Count one more handle of a side; false if the side has ended.
    pub fn open_handle(&self, side: Side) -> bool {
        let gone = match side {
            Side::Senders => SENDERS_GONE | CLOSED,
            Side::Receivers => RECEIVERS_GONE,
        };
        let mut handles = self.handles.lock();
        if self.ended.load(Ordering::Acquire) & gone != 0 {
            return false;
        }
        match side {
            Side::Senders => handles.senders += 1,
            Side::Receivers => handles.receivers += 1,
        }
        true
    }

    /// Count one handle less. With the last one its side ends: everybody who waits, to be woken, and
    /// what nobody will receive, to be dropped.
    pub fn close_handle(&self, side: Side) -> (Vec<W>, Vec<T>) {
        let last = {
            let mut handles = self.handles.lock();
            let count = match side {
                Side::Senders => &mut handles.senders,
                Side::Receivers => &mut handles.receivers,
            };
            *count -= 1;
            let last = *count == 0;
            if last {
                // Under the lock, so that no handle is opened of a side that has ended.
                let gone = match side {
                    Side::Senders => SENDERS_GONE,
                    Side::Receivers => RECEIVERS_GONE,
                };
                self.ended.fetch_or(gone, Ordering::AcqRel);
            }
            last
        };
        if !last {
            return (Vec::new(), Vec::new());
        }
        let woken = self.end(0);
        let mut lost = Vec::new();
        if side == Side::Receivers {
            while let Ok((message, _)) = self.store.pop() {
                lost.push(message);
            }
        }
        (woken, lost)
    }

    /// How full it is, and who waits. Each number is right at a moment of its own.
    pub fn census(&self) -> Census {
        let (senders, receivers) = {
            let handles = self.handles.lock();
            (handles.senders, handles.receivers)
        };
        Census {
            count: self.store.count(),
            limit: self.store.limit(),
            senders_waiting: self.senders.count(),
            receivers_waiting: self.receivers.count(),
            senders,
            receivers,
        }
    }
}

#[cfg(not(loom))]
impl<T, W, S> crate::resource::fork::ForkLocks for Channel<T, W, S>
where
    T: Send + 'static,
    W: Send + 'static,
    S: Store<T> + Send + Sync,
{
    fn lock_all(&self) {
        self.handles.hold();
        self.senders.hold();
        self.receivers.hold();
        self.store.hold();
    }

    unsafe fn unlock_all(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.store.release() };
        // SAFETY: as above.
        unsafe { self.receivers.release() };
        // SAFETY: as above.
        unsafe { self.senders.release() };
        // SAFETY: as above.
        unsafe { self.handles.release() };
    }
}

#[cfg(not(loom))]
impl<T, W, S> Channel<T, W, S>
where
    T: Send + 'static,
    W: Send + 'static,
    S: Store<T> + Send + Sync + 'static,
{
    /// A channel over an empty store, whole after a fork.
    pub fn shared(store: S) -> std::sync::Arc<Self> {
        crate::resource::fork::shared(Self::new(store))
    }
}

#[cfg(not(loom))]
impl<T, W> super::live::KeepsMemory for Channel<T, W, super::Deque<T>>
where
    T: Send + 'static,
    W: Send + 'static,
{
    fn idle_bytes(&self) -> usize {
        self.store.spare_bytes()
    }

    fn trim(&self) -> usize {
        self.store.trim()
    }
}

#[cfg(not(loom))]
impl<T: Send + 'static, W: Send + 'static> Channel<T, W, super::Deque<T>> {
    /// As [`Channel::shared`], and asked for the places that a long line left behind.
    pub fn shared_and_live(store: super::Deque<T>) -> std::sync::Arc<Self> {
        let channel = Self::shared(store);
        let weak: std::sync::Weak<Self> = std::sync::Arc::downgrade(&channel);
        super::live::enter(weak);
        channel
    }
}
