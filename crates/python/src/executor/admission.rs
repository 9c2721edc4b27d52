//! Whether a task may be queued: a limit on how many wait to begin, and what follows where it is met.

use super::limits::is_keeper;
use super::queueing::refusal;
use super::{RUNNING, Shared};
use crate::attached::add;
use crate::errors::{InvalidArgument, Timeout};
use moirai_core::executor::room::{Room, Turn};
use moirai_core::os::{is_first_thread, now_nanoseconds};
use pyo3::import_exception;
use pyo3::prelude::*;
use std::time::Duration;

import_exception!(queue, Full);

/// How long the first thread sleeps before it looks for a signal that came just before it slept.
const NAP: Duration = Duration::from_millis(500);

/// What whoever finds no room does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WhenFull {
    Block,
    Raise,
    CallerRuns,
}

/// By their names in Python.
pub(super) const WHEN_FULL: [(&str, WhenFull); 3] = [
    ("block", WhenFull::Block),
    ("raise", WhenFull::Raise),
    ("caller_runs", WhenFull::CallerRuns),
];

/// The limit of an executor.
pub(super) struct Bound {
    room: Room,
    when_full: WhenFull,
}

/// What is to be done with tasks that are about to be queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// Queue so many; their room is taken.
    Queue(usize),
    /// Run one in this thread.
    Here,
}

impl Bound {
    pub(super) fn new(limit: usize, when_full: WhenFull) -> Self {
        Bound {
            room: Room::new(limit),
            when_full,
        }
    }

    pub(super) fn close(&self) {
        self.room.close();
    }

    pub(super) fn give_back(&self, count: usize) {
        self.room.give_back(count);
    }
}

/// Whether this thread is at a task of the executor. It never waits for room: it may be the one that
/// is to make it.
fn is_inside(shared: &Shared) -> bool {
    std::ptr::eq(RUNNING.get().0, shared)
}

/// Take room for tasks: for all of them if `whole`, otherwise for one at least. What is called back
/// when a task's time is over takes it even if there is none.
pub(super) fn admit(
    py: Python<'_>,
    shared: &Shared,
    count: usize,
    whole: bool,
    deadline_nanoseconds: Option<u64>,
) -> PyResult<Admitted> {
    let Some(bound) = &shared.bound else {
        return Ok(Admitted::Queue(count));
    };
    let whole = whole || bound.when_full == WhenFull::Raise;
    if whole && bound.room.take(count) {
        return Ok(Admitted::Queue(count));
    }
    if !whole {
        let taken = bound.room.take_up_to(count);
        if taken > 0 {
            return Ok(Admitted::Queue(taken));
        }
    }
    match bound.when_full {
        WhenFull::Block | WhenFull::CallerRuns if is_keeper(shared) => {
            // It would hold up the ends of others.
            bound.room.take_beyond(count);
            Ok(Admitted::Queue(count))
        }
        WhenFull::Raise => {
            add(py, &shared.tally.refused, count as u64);
            Err(Full::new_err(format!(
                "max_pending: {} of {} tasks wait already, no room for {count}",
                bound.room.taken_count(),
                bound.room.limit()
            )))
        }
        WhenFull::Block if !is_inside(shared) => {
            if whole && count > bound.room.limit() {
                return Err(InvalidArgument::new_err(format!(
                    "calls: must be at most {} (max_pending), got {count}",
                    bound.room.limit()
                )));
            }
            let count = if whole { count } else { 1 };
            wait(py, shared, bound, count, deadline_nanoseconds)?;
            Ok(Admitted::Queue(count))
        }
        _ => Ok(Admitted::Here),
    }
}

/// Stand in line until there is room.
fn wait(
    py: Python<'_>,
    shared: &Shared,
    bound: &Bound,
    count: usize,
    deadline_nanoseconds: Option<u64>,
) -> PyResult<()> {
    let place = bound.room.stand_in_line(count);
    let longest = is_first_thread().then_some(NAP);
    loop {
        let left = deadline_nanoseconds
            .map(|deadline| Duration::from_nanos(deadline.saturating_sub(now_nanoseconds())));
        let nap = match (left, longest) {
            (Some(left), Some(longest)) => Some(left.min(longest)),
            (left, longest) => left.or(longest),
        };
        let stopped = match py.detach(|| place.wait(nap)) {
            Turn::Taken => return Ok(()),
            Turn::Closed => return Err(refusal(shared)),
            Turn::Waits if left.is_some_and(|left| left.is_zero()) => {
                add(py, &shared.tally.refused, 1);
                Some(Timeout::new_err(
                    "deadline: it passed while the submitter waited for room; nothing is queued",
                ))
            }
            Turn::Waits => py.check_signals().err(),
        };
        if let Some(error) = stopped {
            bound.room.leave(&place);
            return Err(error);
        }
    }
}
