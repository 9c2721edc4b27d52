//! Waiting for a task: run it if nobody has begun it, help with what it needs, then sleep.

use super::future::Future;
use super::{RUNNING, Ran, Shared, current_worker, let_leave, run, running};
use crate::argument::timeout;
use crate::attached::add;
use crate::errors::Disconnected;
use moirai_core::executor::Worker;
use moirai_core::os::{is_first_thread, stack_left};
use moirai_core::sync::parker::{Parked, Parker};
use moirai_core::sync::spin;
use pyo3::exceptions::PyRecursionError;
use pyo3::prelude::*;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tasks that a thread runs within each other by waiting, whatever stack it has left: each needs its
/// piece of it.
const DEEP: u32 = 100;
/// How much of its stack a thread has to have left to run more of them. Python's own limit of
/// recursion comes long before that, where it has not been raised.
const STACK_LEFT: f64 = 0.5;
/// The same for tasks that are only likely to be needed.
const DEEPEST_RELATED: u32 = 20;
/// Looks at a task before the thread that waits for it sleeps.
const LOOKS: u32 = 128;
/// What a worker takes from the end of its last task to its rest.
const WORKER_LEAVES_NANOSECONDS: u64 = 1_000;
/// How long the first thread sleeps before it looks for a signal that came just before it slept.
/// Only Python's main thread handles signals; the others sleep undisturbed.
const NAP: Duration = Duration::from_millis(500);
/// Without an interpreter lock, what a thread has made is freed by itself, if others have done with
/// it: in its sleep, large results too. It wakes after this time, then after twice as long.
const FIRST_NAP: Option<Duration> = if cfg!(Py_GIL_DISABLED) {
    Some(Duration::from_millis(10))
} else {
    None
};

fn may_go_deeper(depth: u32) -> bool {
    depth < DEEP || stack_left() > STACK_LEFT
}

/// Run the task in this thread if it may be, and, in a worker, what it is likely to need.
pub(super) fn help(py: Python<'_>, future: &Future) -> PyResult<()> {
    let Some(shared) = future.shared() else {
        return Ok(());
    };
    if shared.is_inherited() {
        return Err(inherited());
    }
    let (whose, depth) = RUNNING.get();
    if std::ptr::eq(whose, &raw const **shared) {
        if may_go_deeper(depth) {
            help_inside(py, shared, future, depth);
        } else if future.task().is_pending() {
            // All who might take it may wait like this.
            return Err(PyRecursionError::new_err(
                "tasks that wait within each other leave too little of this thread's stack to run \
                 the next in it",
            ));
        }
        return Ok(());
    }
    if !shared.outsiders_help || !may_go_deeper(depth) || !shared.scheduler.take_seat() {
        return Ok(());
    }
    // With a seat, this thread counts as one that is at a task.
    let helped = running(shared, || {
        if shared.scheduler.worker_count() == 1 {
            return help_in_order(py, shared, future);
        }
        claim(py, shared, future, None);
        Ok(())
    });
    shared.scheduler.give_seat();
    helped
}

/// Run the task if nobody has begun it.
fn claim(
    py: Python<'_>,
    shared: &Shared,
    future: &Future,
    worker: Option<&Worker<super::TaskHandle>>,
) {
    let task = future.task();
    if !task.is_pending() {
        return;
    }
    let taken = worker.and_then(|it| it.take_back(|other| other.is(task)));
    let ran = run(py, shared, task, worker.map(Worker::index));
    if matches!(ran, Ran::Late) {
        return;
    }
    if !matches!(ran, Ran::Expired) {
        add(py, &shared.tally.helped, 1);
    }
    if taken.is_none() {
        shared.died();
    }
}

/// In a task of the same executor, which has a seat.
fn help_inside(py: Python<'_>, shared: &Shared, future: &Future, depth: u32) {
    let worker: Option<Rc<_>> = current_worker(shared);
    claim(py, shared, future, worker.as_deref());
    let Some(worker) = worker else { return };
    while depth < DEEPEST_RELATED && !future.task().is_over() {
        let Some(task) = worker.take_related(future.task().runner()) else {
            return;
        };
        match run(py, shared, &task, Some(worker.index())) {
            Ran::Late => shared.scheduler.buried(),
            Ran::Expired => {}
            _ => add(py, &shared.tally.helped, 1),
        }
    }
}

/// With one worker only: tasks run one at a time, in order, so whatever comes first is run.
fn help_in_order(py: Python<'_>, shared: &Shared, future: &Future) -> PyResult<()> {
    while future.task().is_pending() {
        let Some(task) = shared.scheduler.take_first() else {
            return Ok(());
        };
        match run(py, shared, &task, None) {
            Ran::Late => shared.scheduler.buried(),
            Ran::Expired => {}
            Ran::Done => add(py, &shared.tally.helped, 1),
            Ran::Interrupted(stop) => {
                add(py, &shared.tally.helped, 1);
                // Another task got what was meant for the program.
                if is_first_thread() && !task.is(future.task()) {
                    return Err(stop);
                }
            }
        }
    }
    Ok(())
}

fn inherited() -> PyErr {
    Disconnected::new_err(
        "the task was queued by the parent of this process, whose workers are not here: \
         submit it again",
    )
}

/// Sleep until the task is over, with the interpreter released. False: not in time.
pub(super) fn park(py: Python<'_>, future: &Future, seconds: Option<f64>) -> PyResult<bool> {
    // concurrent.futures takes less than nothing for nothing.
    let seconds = seconds.map(|given| if given < 0.0 { 0.0 } else { given });
    let limit = timeout("timeout", seconds)?;
    if future.shared().is_some_and(|shared| shared.is_inherited()) {
        return Err(inherited());
    }
    let task = future.task();
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    if limit.is_some_and(|limit| limit.is_zero()) {
        return Ok(task.is_over());
    }
    let soon = || {
        let found = (0..LOOKS).any(|round| {
            spin(round & 31);
            task.is_over()
        });
        if found {
            let_leave(WORKER_LEAVES_NANOSECONDS);
        }
        found
    };
    if py.detach(soon) {
        return Ok(true);
    }
    let parker = Arc::new(Parker::default());
    if !future.call_at_end(py, &parker) {
        return Ok(true);
    }
    let mut longest = FIRST_NAP.or(is_first_thread().then_some(NAP));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            future.leave(py, &parker);
            return Ok(task.is_over());
        }
        let nap = match (left, longest) {
            (Some(left), Some(longest)) => Some(left.min(longest)),
            (left, longest) => left.or(longest),
        };
        if py.detach(|| parker.park(nap)) == Parked::Called {
            return Ok(true);
        }
        if FIRST_NAP.is_some() {
            longest = longest.map(|nap| (2 * nap).min(NAP));
            // Running anything lets the interpreter free it.
            py.eval(c"None", None, None)?;
        }
        if let Err(signal) = py.check_signals() {
            future.leave(py, &parker);
            return Err(signal);
        }
    }
}
