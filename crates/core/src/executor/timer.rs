//! Things that are due at a moment, for one thread that sleeps until then.
//!
//! Ordered by time in a tree, so that what is not wanted any more is taken out at once and a million
//! entries cost no more than those that are still of interest.

use crate::os::now_nanoseconds;
use crate::sync::Lock;
use crate::sync::parker::{Parked, Parker};
use std::collections::BTreeMap;
use std::time::Duration;

/// A moment that never comes.
pub const NEVER: u64 = u64::MAX;

/// Which entry, and when it is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    due_nanoseconds: u64,
    number: u64,
}

impl Key {
    /// When it is due, on the monotonic clock.
    pub fn due_nanoseconds(&self) -> u64 {
        self.due_nanoseconds
    }
}

/// Where the thread is that waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thread {
    /// Nobody has started one.
    Nowhere,
    /// On its way, by the number of its start.
    Coming(u64),
    Here,
}

struct State<T> {
    entries: BTreeMap<Key, T>,
    next_number: u64,
    is_closed: bool,
    thread: Thread,
}

/// Entries by the time at which they are due. Any thread may call any method at any time, but one
/// thread only waits.
pub struct Timer<T: 'static> {
    state: Lock<State<T>>,
    parker: Parker,
}

impl<T: 'static> Default for Timer<T> {
    fn default() -> Self {
        Timer {
            state: Lock::new(State {
                entries: BTreeMap::new(),
                next_number: 0,
                is_closed: false,
                thread: Thread::Nowhere,
            }),
            parker: Parker::default(),
        }
    }
}

impl<T: 'static> Timer<T> {
    /// After an entry was added: whether the caller is to start the thread that waits, and the number
    /// that it is to [`Timer::enter`] with; says so once.
    pub fn needs_thread(&self) -> Option<u64> {
        let mut state = self.state.lock();
        if state.thread != Thread::Nowhere {
            return None;
        }
        let start = state.next_number;
        state.next_number += 1;
        state.thread = Thread::Coming(start);
        Some(start)
    }

    /// The thread could not be started, or it is not known whether it was: it is sent away if it
    /// comes, unless it has entered.
    pub fn not_started(&self, start: u64) {
        let mut state = self.state.lock();
        if state.thread == Thread::Coming(start) {
            state.thread = Thread::Nowhere;
        }
    }

    /// Whether the thread of a start is to wait, or to end.
    pub fn enter(&self, start: u64) -> bool {
        let mut state = self.state.lock();
        let is_expected = state.thread == Thread::Coming(start);
        if is_expected {
            state.thread = Thread::Here;
        }
        is_expected
    }

    /// Have `entry` come out when it is due.
    pub fn add(&self, due_nanoseconds: u64, entry: T) -> Key {
        let mut state = self.state.lock();
        let key = Key {
            due_nanoseconds,
            number: state.next_number,
        };
        state.next_number += 1;
        state.entries.insert(key, entry);
        let is_first = state.entries.first_key_value().map(|(key, _)| *key) == Some(key);
        drop(state);
        if is_first {
            self.parker.call();
        }
        key
    }

    /// Take an entry out before it is due; `None` if it has come out.
    pub fn remove(&self, key: Key) -> Option<T> {
        let mut state = self.state.lock();
        let found = state.entries.remove(&key);
        let is_over = state.is_closed && state.entries.is_empty();
        drop(state);
        if is_over {
            self.parker.call();
        }
        found
    }

    /// Have an entry come out at another time; its new key, or `None` if it has come out.
    pub fn move_to(&self, key: Key, due_nanoseconds: u64) -> Option<Key> {
        let mut state = self.state.lock();
        let entry = state.entries.remove(&key)?;
        let moved = Key {
            due_nanoseconds,
            number: key.number,
        };
        state.entries.insert(moved, entry);
        let is_first = state.entries.first_key_value().map(|(key, _)| *key) == Some(moved);
        drop(state);
        if is_first {
            self.parker.call();
        }
        Some(moved)
    }

    /// How many entries there are.
    pub fn count(&self) -> usize {
        self.state.lock().entries.len()
    }

    /// The thread that waits is to end once there are no entries.
    pub fn close(&self) {
        self.state.lock().is_closed = true;
        self.parker.call();
    }

    /// Sleep until something is due, and take it out, the first first; `None`: closed and empty. For
    /// one thread.
    pub fn wait(&self) -> Option<Vec<T>> {
        loop {
            let mut state = self.state.lock();
            let now = now_nanoseconds();
            let mut due = Vec::new();
            while let Some(first) = state.entries.first_entry() {
                if first.key().due_nanoseconds > now {
                    break;
                }
                due.push(first.remove());
            }
            if !due.is_empty() {
                return Some(due);
            }
            if state.is_closed && state.entries.is_empty() {
                // Whoever adds one all the same starts another thread.
                state.thread = Thread::Nowhere;
                return None;
            }
            let next = state.entries.first_key_value();
            let next = next.map(|(key, _)| key.due_nanoseconds);
            drop(state);
            let left = next
                .filter(|next| *next != NEVER)
                .map(|next| Duration::from_nanos(next - now));
            if self.parker.park(left) == Parked::Called {
                // Whatever was told is read after this.
                self.parker.rearm();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_out_when_they_are_due() {
        let timer = Timer::default();
        let start = timer.needs_thread().unwrap();
        assert!(timer.enter(start));
        timer.add(2, "second");
        timer.add(1, "first");
        timer.add(2, "third");
        let never = timer.add(NEVER, "never");
        assert_eq!(timer.wait(), Some(vec!["first", "second", "third"]));
        assert_eq!((timer.count(), never.due_nanoseconds()), (1, NEVER));
        let soon = timer.add(now_nanoseconds() + 1_000_000, "soon");
        assert_eq!(timer.wait(), Some(vec!["soon"]));
        assert_eq!(timer.remove(soon), None);
        timer.close();
        assert_eq!(timer.remove(never), Some("never"));
        assert_eq!(timer.wait(), None);
    }

    #[test]
    fn one_thread_waits_whatever_is_said_of_its_start() {
        let timer = Timer::<()>::default();
        let lost = timer.needs_thread().unwrap();
        assert_eq!(timer.needs_thread(), None);
        timer.not_started(lost);
        let start = timer.needs_thread().unwrap();
        assert!(!timer.enter(lost)); // it was started after all
        assert!(timer.enter(start));
        timer.not_started(start); // it is here nevertheless
        assert_eq!(timer.needs_thread(), None);
        timer.close();
        assert_eq!(timer.wait(), None);
        assert!(timer.needs_thread().is_some());
    }

    #[test]
    fn who_sleeps_is_called_for_an_earlier_entry_and_for_the_end() {
        let timer = std::sync::Arc::new(Timer::default());
        let other = std::sync::Arc::clone(&timer);
        let far = timer.add(NEVER, 0);
        let far = timer.move_to(far, NEVER - 1).unwrap();
        let thread = std::thread::spawn(move || (other.wait(), other.wait()));
        timer.add(now_nanoseconds(), 1);
        while timer.count() > 1 {
            std::thread::yield_now();
        }
        timer.close();
        timer.remove(far);
        assert_eq!(thread.join().unwrap(), (Some(vec![1]), None));
    }
}
