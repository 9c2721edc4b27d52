//! How long a task may take, and the token by which it learns that it is to end.

use super::call::{apart, current_future};
use super::future::{CancelledError, Future, Outcome};
use super::pool::moment;
use super::{Shared, TaskHandle};
use crate::errors::Timeout;
use moirai_core::executor::timer::{Key, NEVER};
use moirai_core::os::now_nanoseconds;
use moirai_core::sync::{AtomicBool, Mutex, Ordering};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::cell::Cell;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// The time limits of one task, as `submit` was given them.
#[derive(Clone, Copy, Default)]
pub(super) struct Terms {
    /// For its run, from its start.
    pub(super) timeout: Option<Duration>,
    /// For its end, on the monotonic clock.
    pub(super) deadline_nanoseconds: Option<u64>,
}

impl Terms {
    pub(super) fn is_none(&self) -> bool {
        self.timeout.is_none() && self.deadline_nanoseconds.is_none()
    }
}

/// Terms, and the entry in the executor's timer, which is there until the task ends.
pub(super) struct Limits {
    terms: Terms,
    /// Locked for moments, in which no Python code runs.
    entry: Mutex<Option<Key>>,
    /// Whether whoever took the task has begun it, or looks whether it may. `SeqCst`: set before the
    /// look at the clock, so that who finds it unset after a deadline knows that it is not begun.
    is_begun: AtomicBool,
}

impl Limits {
    fn entry(&self) -> MutexGuard<'_, Option<Key>> {
        self.entry
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    /// The deadline counts from now on, if there is one.
    pub(super) fn count_deadline(&self, shared: &Shared) {
        let Some(deadline) = self.terms.deadline_nanoseconds else {
            return;
        };
        let mut entry = self.entry();
        if let Some(key) = *entry {
            *entry = shared.timer.move_to(key, deadline).or(Some(key));
        }
    }

    /// The task is to begin now; false if its deadline has passed.
    #[cold]
    pub(super) fn begin(&self, shared: &Shared) -> bool {
        self.is_begun.store(true, Ordering::SeqCst);
        let now = now_nanoseconds();
        if self.terms.deadline_nanoseconds.is_some_and(|it| it <= now) {
            self.is_begun.store(false, Ordering::SeqCst);
            return false;
        }
        let Some(timeout) = self.terms.timeout else {
            return true;
        };
        let nanoseconds = u64::try_from(timeout.as_nanos()).unwrap_or(NEVER);
        let due = now.saturating_add(nanoseconds);
        let mut entry = self.entry();
        if let Some(key) = *entry
            && due < key.due_nanoseconds()
        {
            *entry = shared.timer.move_to(key, due).or(Some(key));
        }
        true
    }

    /// It has ended.
    #[cold]
    pub(super) fn end(&self, shared: &Shared) {
        let key = self.entry().take();
        let kept = key.and_then(|key| shared.timer.remove(key));
        // A reference to a future, which others have too.
        drop(kept);
    }

    fn is_begun(&self) -> bool {
        self.is_begun.load(Ordering::SeqCst)
    }

    fn due_nanoseconds(&self) -> Option<u64> {
        let due = self.entry().map(|key| key.due_nanoseconds());
        due.filter(|due| *due != NEVER)
    }
}

/// Give a task that nobody has seen yet its limits. Its deadline does not count yet: the timer's thread
/// is to be started before, if this gives the number of the start, and the task is not there if that
/// fails.
pub(super) fn limit(
    py: Python<'_>,
    shared: &Shared,
    future: &Py<Future>,
    terms: Terms,
) -> Option<u64> {
    future.get().limit(Limits {
        terms,
        entry: Mutex::new(None),
        is_begun: AtomicBool::new(false),
    });
    if let Some(limits) = future.get().limits() {
        let mut entry = limits.entry();
        *entry = Some(shared.timer.add(NEVER, future.clone_ref(py)));
    }
    shared.timer.needs_thread()
}

fn overtime(py: Python<'_>, message: &'static str) -> Outcome {
    Outcome::Failure(Timeout::new_err(message).into_value(py).into_any())
}

/// What becomes of a task whose deadline passed while it waited.
pub(super) fn not_begun(py: Python<'_>) -> Outcome {
    overtime(
        py,
        "deadline: it passed before the task began; the task is not run",
    )
}

/// Of a task that ends now, whether or not the timer has come to it: what is due comes of it.
pub(super) fn overdue(py: Python<'_>, future: &Future) -> Option<Outcome> {
    let due = future.limits()?.due_nanoseconds()?;
    let message = "the task has not ended in the time it was given; its call has ended";
    (due <= now_nanoseconds()).then(|| overtime(py, message))
}

/// The time of a task is over: its future fails, now, whoever is at it.
fn expire(slf: &Bound<'_, Future>, shared: &Shared) {
    let future = slf.get();
    let call = shared.claim(future.task());
    if call.is_some() {
        shared.died();
    } else if future.task().is_over() || !future.limits().is_some_and(Limits::is_begun) {
        return; // or whoever has taken it will not begin it, and ends it
    }
    let outcome = if call.is_some() {
        not_begun(slf.py())
    } else {
        let message = "the task has not ended in the time it was given; its call goes on";
        overtime(slf.py(), message)
    };
    let counts = [&shared.tally.failed, &shared.tally.timed_out];
    future.finish(slf, outcome, &counts);
}

thread_local! {
    /// Whose time limits this thread waits for, if any.
    static KEEPER: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

/// Whether this thread waits for the time limits of an executor.
pub(super) fn is_keeper(shared: &Shared) -> bool {
    std::ptr::eq(KEEPER.get(), shared)
}

/// What the thread that waits for time limits has of an executor.
#[pyclass(frozen, module = "moirai.executor")]
pub struct TimerHandle {
    pub(super) shared: Arc<Shared>,
    /// The start that it is for.
    pub(super) start: u64,
}

#[pymethods]
impl TimerHandle {
    /// Take no more calls; as `BareExecutor.close`.
    fn close(&self) {
        self.shared.close();
    }

    /// End tasks whose time is over, until the executor is closed and none has a time limit.
    fn work(&self, py: Python<'_>) {
        let shared = &self.shared;
        if !shared.timer.enter(self.start) {
            return;
        }
        KEEPER.set(&raw const **shared);
        while let Some(due) = py.detach(|| shared.timer.wait()) {
            for future in due {
                expire(future.bind(py), shared);
            }
        }
        KEEPER.set(std::ptr::null());
    }
}

/// Who says that a task is to end.
enum Asked {
    /// Nobody does.
    Never,
    Task(TaskHandle),
    /// A function without arguments that says so of a call which is no task here.
    Elsewhere(Py<PyAny>),
}

/// By which the function of a task learns that it is to end. Any thread may use it.
#[pyclass(frozen, module = "moirai.executor")]
pub struct CancelToken {
    asked: Asked,
    due_nanoseconds: Option<u64>,
}

impl CancelToken {
    fn is_late(&self) -> bool {
        self.due_nanoseconds
            .is_some_and(|due| due <= now_nanoseconds())
    }

    fn is_asked(&self, py: Python<'_>) -> PyResult<bool> {
        match &self.asked {
            Asked::Never => Ok(false),
            Asked::Task(task) => Ok(task.is_asked_to_end()),
            Asked::Elsewhere(asked) => asked.bind(py).call0()?.is_truthy(),
        }
    }
}

#[pymethods]
impl CancelToken {
    #[new]
    #[pyo3(signature = (is_asked = None, deadline = None))]
    fn new(is_asked: Option<Py<PyAny>>, deadline: Option<f64>) -> PyResult<Self> {
        let due_nanoseconds = deadline.map(moment).transpose()?;
        Ok(CancelToken {
            asked: is_asked.map_or(Asked::Never, Asked::Elsewhere),
            due_nanoseconds: due_nanoseconds.filter(|due| *due != NEVER),
        })
    }

    /// Whether the task is asked to end, or its time is over.
    #[getter]
    fn is_cancelled(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.is_late() || self.is_asked(py)?)
    }

    /// Seconds until the task's time is over, or None if that is not limited.
    #[getter]
    fn remaining_seconds(&self) -> Option<f64> {
        let left = self.due_nanoseconds?.saturating_sub(now_nanoseconds());
        Some(left as f64 / 1e9)
    }

    /// Raise what ends the task, if it is to end.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_asked(py)? {
            return Err(CancelledError::new_err(()));
        }
        if self.is_late() {
            let message = "the task has not ended in the time it was given";
            return Err(Timeout::new_err(message));
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.asked {
            Asked::Elsewhere(asked) => visit.call(asked),
            Asked::Never | Asked::Task(_) => Ok(()),
        }
    }
}

/// The token of the task that this thread is running, the innermost one; None: it runs none.
#[pyfunction]
pub fn task_token(py: Python<'_>) -> Option<CancelToken> {
    let future = current_future(py)?;
    let future = future.get();
    Some(CancelToken {
        asked: Asked::Task(future.task().clone()),
        due_nanoseconds: future.limits().and_then(Limits::due_nanoseconds),
    })
}

/// Call a function as if this thread ran no task: the token is not that of the task it runs.
#[pyfunction]
#[pyo3(signature = (function, /, *arguments, **keywords))]
pub fn call_outside_tasks<'py>(
    function: &Bound<'py, PyAny>,
    arguments: &Bound<'py, PyTuple>,
    keywords: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    apart(|| function.call(arguments, keywords))
}
