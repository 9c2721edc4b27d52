//! How many tasks may wait to begin: room for many is taken at once or not at all.
//!
//! Who finds no room may stand in line. The line is served in order, so that whoever needs room for
//! many is not passed by those who need less. One lock, held for moments, by bounded executors only.

use crate::sync::parker::{Parked, Parker};
use crate::sync::{AtomicU32, Lock, Ordering};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// What came of waiting in line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The room was taken for whoever waits.
    Taken,
    /// There will be none: the room was closed.
    Closed,
    /// Not yet; it stands in line still.
    Waits,
}

const WAITS: u32 = 0;
const TAKEN: u32 = 1;
const CLOSED: u32 = 2;

/// A place in the line.
pub struct Place {
    count: usize,
    parker: Parker,
    /// Written under the lock of the line; `Release`, so that whoever sees it need not lock.
    turn: AtomicU32,
}

impl Place {
    fn turn(&self) -> Turn {
        match self.turn.load(Ordering::Acquire) {
            WAITS => Turn::Waits,
            TAKEN => Turn::Taken,
            _ => Turn::Closed,
        }
    }

    fn tell(&self, turn: u32) {
        self.turn.store(turn, Ordering::Release);
        self.parker.call();
    }

    /// Sleep until it is served, for so long at most, or until a signal arrives. For one thread.
    pub fn wait(&self, timeout: Option<Duration>) -> Turn {
        if self.turn() == Turn::Waits && self.parker.park(timeout) == Parked::Called {
            debug_assert_ne!(self.turn(), Turn::Waits);
        }
        self.turn()
    }
}

struct State {
    /// Below 0 while more is taken than there is.
    free: isize,
    line: VecDeque<Arc<Place>>,
    is_closed: bool,
}

/// Room for so many tasks. Any thread may call any method at any time.
///
/// Invariant: `free` and what was taken and not given back make up `limit`; the first in line does
/// not fit into `free`.
pub struct Room {
    limit: usize,
    state: Lock<State>,
}

impl Room {
    /// All of it free.
    pub fn new(limit: usize) -> Self {
        let state = State {
            free: limit as isize,
            line: VecDeque::new(),
            is_closed: false,
        };
        Room {
            limit,
            state: Lock::new(state),
        }
    }

    /// How many it is for.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How many are in it.
    pub fn taken_count(&self) -> usize {
        (self.limit as isize - self.state.lock().free) as usize
    }

    /// Take room for `count`, all or nothing; nobody in line is passed.
    pub fn take(&self, count: usize) -> bool {
        let mut state = self.state.lock();
        let fits = state.line.is_empty() && count as isize <= state.free;
        if fits {
            state.free -= count as isize;
        }
        fits
    }

    /// Take room for `count`, whether there is any or not, for one who must not wait.
    pub fn take_beyond(&self, count: usize) {
        self.state.lock().free -= count as isize;
    }

    /// Take room for `count` at most, and none if somebody stands in line; for how many.
    pub fn take_up_to(&self, count: usize) -> usize {
        let mut state = self.state.lock();
        if !state.line.is_empty() {
            return 0;
        }
        let taken = (count as isize).min(state.free).max(0);
        state.free -= taken;
        taken as usize
    }

    /// Stand in line for room for `count`, which `limit` can hold. It may be served already.
    pub fn stand_in_line(&self, count: usize) -> Arc<Place> {
        debug_assert!(count <= self.limit);
        let place = Arc::new(Place {
            count,
            parker: Parker::default(),
            turn: AtomicU32::new(WAITS),
        });
        let mut state = self.state.lock();
        if state.is_closed {
            place.tell(CLOSED);
        } else {
            state.line.push_back(Arc::clone(&place));
            serve(&mut state);
        }
        place
    }

    /// Leave the line, and give back what was taken meanwhile.
    pub fn leave(&self, place: &Arc<Place>) {
        let mut state = self.state.lock();
        if place.turn() == Turn::Taken {
            state.free += place.count as isize;
        } else {
            state.line.retain(|other| !Arc::ptr_eq(other, place));
        }
        // Who stood behind may fit where this one did not.
        serve(&mut state);
    }

    /// So many have begun, or never will.
    pub fn give_back(&self, count: usize) {
        let mut state = self.state.lock();
        state.free += count as isize;
        debug_assert!(state.free <= self.limit as isize);
        serve(&mut state);
    }

    /// Send everybody in line away, and whoever comes to it.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.is_closed = true;
        for place in state.line.drain(..) {
            place.tell(CLOSED);
        }
    }
}

fn serve(state: &mut State) {
    let fits = |state: &State, place: &Place| place.count as isize <= state.free;
    while state.line.front().is_some_and(|it| fits(state, it)) {
        if let Some(place) = state.line.pop_front() {
            state.free -= place.count as isize;
            place.tell(TAKEN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_taken_at_once_or_not_at_all() {
        let room = Room::new(3);
        assert!(room.take(2));
        assert!(!room.take(2));
        assert_eq!(room.taken_count(), 2);
        assert_eq!(room.take_up_to(2), 1);
        assert_eq!(room.take_up_to(2), 0);
        room.give_back(3);
        assert_eq!((room.taken_count(), room.limit()), (0, 3));
    }

    #[test]
    fn what_was_taken_beyond_the_limit_is_given_back_before_others_fit() {
        let room = Room::new(1);
        assert!(room.take(1));
        room.take_beyond(2);
        assert_eq!((room.taken_count(), room.take_up_to(1)), (3, 0));
        let place = room.stand_in_line(1);
        room.give_back(2);
        assert_eq!(place.wait(Some(Duration::ZERO)), Turn::Waits);
        room.give_back(1);
        assert_eq!(place.wait(None), Turn::Taken);
        room.give_back(1);
        assert_eq!(room.taken_count(), 0);
    }

    #[test]
    fn nobody_in_line_is_passed() {
        let room = Room::new(3);
        assert!(room.take(2));
        let many = room.stand_in_line(3);
        let few = room.stand_in_line(1);
        assert!(!room.take(1));
        assert_eq!(few.wait(Some(Duration::ZERO)), Turn::Waits);
        room.give_back(2);
        assert_eq!(many.wait(None), Turn::Taken);
        assert_eq!(few.wait(Some(Duration::ZERO)), Turn::Waits);
        room.give_back(3);
        assert_eq!(few.wait(None), Turn::Taken);
        assert_eq!(room.taken_count(), 1);
    }

    #[test]
    fn who_leaves_the_line_lets_the_next_in() {
        let room = Room::new(2);
        assert!(room.take(1));
        let many = room.stand_in_line(2);
        let few = room.stand_in_line(1);
        room.leave(&many);
        assert_eq!(few.wait(None), Turn::Taken);
        room.leave(&few);
        assert_eq!(room.taken_count(), 1);
    }

    #[test]
    fn closing_sends_everybody_away() {
        let room = Room::new(1);
        assert!(room.take(1));
        let place = room.stand_in_line(1);
        room.close();
        assert_eq!(place.wait(None), Turn::Closed);
        assert_eq!(room.stand_in_line(1).wait(None), Turn::Closed);
        room.leave(&place);
        room.give_back(1);
        assert_eq!(room.taken_count(), 0);
    }

    #[test]
    fn threads_never_hold_more_than_the_limit() {
        use crate::sync::AtomicUsize;
        let room = Arc::new(Room::new(4));
        let held = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (1..=4)
            .map(|count| {
                let (room, held) = (Arc::clone(&room), Arc::clone(&held));
                std::thread::spawn(move || {
                    for _ in 0..2000 {
                        if !room.take(count) {
                            let place = room.stand_in_line(count);
                            while place.wait(None) == Turn::Waits {}
                        }
                        assert!(held.fetch_add(count, Ordering::Relaxed) + count <= 4);
                        held.fetch_sub(count, Ordering::Relaxed);
                        room.give_back(count);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(room.taken_count(), 0);
    }
}
