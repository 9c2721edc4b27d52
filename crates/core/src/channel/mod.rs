//! Channels: messages go in at one side and come out at the other, in order.
//!
//! [`Channel`] is one protocol over a [`Store`]: a [`Ring`] of fixed capacity, which no lock guards,
//! or a [`Deque`] whose limit may change. Messages and wakers are opaque: the core moves them, and
//! returns what is to be woken or dropped, so that nothing foreign runs under a lock.
//!
//! Any number of threads may call at once. A forked child has a copy of the messages; those who
//! waited are its parent's, so its channel has nobody waiting.

pub mod bounded;
pub mod deque;
#[cfg(not(loom))]
pub mod doorbell;
#[cfg(not(loom))]
pub mod live;
pub mod ring;
#[cfg(not(loom))]
pub mod shared;
pub mod tasks;
#[cfg(all(test, not(loom)))]
mod tests;
pub mod waiters;

pub use bounded::{Census, Channel, Ended, Side};
pub use deque::Deque;
#[cfg(not(loom))]
pub use doorbell::Doorbell;
pub use ring::Ring;
pub use tasks::Tasks;

/// Why a message was not taken; it comes back.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused<T> {
    /// There is no room now.
    Full(T),
    /// Nothing is taken any more.
    Closed(T),
}

/// Why there is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// None is there now.
    Empty,
    /// None is there, and none will come.
    Closed,
}

/// Where a channel keeps its messages, and whether somebody waits.
///
/// What the marks promise: a push that begins after `mark_receivers(true)` returned says that
/// receivers wait, and one that began before is seen by a pop that begins after it; so one of the
/// two sides notices the other. Likewise a pop after `mark_senders(true)`. A push after `close`
/// is refused; a pop says `Closed` only if every push that was not refused has been popped.
pub trait Store<T> {
    /// Put a message in; whether receivers wait.
    fn push(&self, message: T) -> Result<bool, Refused<T>>;
    /// Take the oldest message; whether senders wait.
    fn pop(&self) -> Result<(T, bool), Missed>;
    /// Whether receivers wait. Calls do not overlap.
    fn mark_receivers(&self, waiting: bool);
    /// Whether senders wait. Calls do not overlap.
    fn mark_senders(&self, waiting: bool);
    /// Take nothing any more.
    fn close(&self);
    /// Messages in it now.
    fn count(&self) -> usize;
    /// Messages it takes before somebody has to wait; `usize::MAX` if there is no limit.
    fn limit(&self) -> usize;
    /// Call `see` with each message.
    ///
    /// # Safety
    /// No other call is going on, in any thread, until this one returns.
    unsafe fn visit<E>(&self, see: impl FnMut(&T) -> Result<(), E>) -> Result<(), E>;
    /// Take whatever lock there is and keep it, over a fork.
    fn hold(&self) {}
    /// Release what [`Store::hold`] took.
    ///
    /// # Safety
    /// This thread, or the one it was forked from, called `hold`.
    unsafe fn release(&self) {}
}
