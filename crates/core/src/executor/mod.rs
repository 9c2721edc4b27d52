//! Which task runs next, on which thread, and who is woken for it. Tasks are opaque.
//!
//! Workers have a deque each, from which others steal (Chase and Lev, SPAA 2005; the crate
//! `crossbeam-deque`). What comes from outside goes into lanes, by node and priority ([`lanes`]).
//! Who sleeps and who is looking for work is one word ([`idle`]), after the scheduler of Go: whoever
//! queues a task wakes a sleeper only if nobody is looking already. A task's own state is one word
//! too ([`task`]), so that whoever takes it first has it: a worker, or the thread that waits for it; its
//! memory is kept for the next one ([`handle`]).
//! How many may wait ([`room`]) and what is due when ([`timer`]) is kept apart, for those who ask.
//!
//! Left out: preemption, and moving tasks that are queued between nodes before somebody has nothing
//! to do.

#[cfg(not(loom))]
pub mod handle;
pub mod idle;
#[cfg(not(loom))]
mod lanes;
#[cfg(not(loom))]
pub mod latency;
#[cfg(not(loom))]
mod patience;
#[cfg(not(loom))]
mod rehearsal;
#[cfg(not(loom))]
pub mod room;
#[cfg(not(loom))]
mod scheduler;
pub mod task;
#[cfg(not(loom))]
pub mod timer;
#[cfg(not(loom))]
mod worker;

#[cfg(not(loom))]
pub use lanes::{PRIORITY_COUNT, Priority};
#[cfg(not(loom))]
pub use patience::PATIENCE;
#[cfg(not(loom))]
pub use rehearsal::{Rehearsal, Rested, Taken};
#[cfg(not(loom))]
pub use scheduler::{Counts, Queued, Scheduler};
#[cfg(not(loom))]
pub use worker::{Rest, Worker};

#[cfg(all(test, not(loom)))]
mod tests;
