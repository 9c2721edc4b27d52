//! `BareFuture`: what concurrent.futures needs of a future, with its locks made when asked for.

use super::Shared;
use super::limits::Limits;
use super::maker::{refers, remember, set_attribute};
use super::wait::{self, help};
use super::{Task, TaskHandle};
use crate::argument::number;
use crate::attached::{self, Attached};
use crate::errors::Timeout;
use moirai_core::executor::task::{Audience, Cancel, Stage};
use moirai_core::sync::AtomicU64;
use moirai_core::sync::parker::Parker;
use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{import_exception, intern};
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

import_exception!(concurrent.futures, CancelledError);
import_exception!(concurrent.futures, InvalidStateError);

/// How a task ended. Whoever stores one first, ends it.
#[derive(Default)]
pub(super) enum Outcome {
    #[default]
    None,
    Cancelled,
    Value(Py<PyAny>),
    Failure(Py<PyAny>),
}

/// Who is to be told of the end.
#[derive(Default)]
struct Watchers {
    parkers: Vec<Arc<Parker>>,
    callbacks: Vec<Py<PyAny>>,
    /// Of one made by hand: who is told that it is asked to end.
    asked: Option<Py<PyAny>>,
}

/// What most futures never need.
#[derive(Default)]
struct Watch {
    watchers: Attached<Watchers>,
    condition: Attached<Option<Py<PyAny>>>,
    waiters: OnceLock<Py<PyList>>,
    limits: OnceLock<Limits>,
}

impl Watch {
    fn condition(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let clone = |it: &mut Option<Py<PyAny>>| it.as_ref().map(|it| it.clone_ref(py));
        self.condition.with(py, clone)
    }
}

thread_local! {
    /// What the next future that this thread makes is about: Python's call takes no such thing.
    static NEXT: RefCell<Option<(TaskHandle, Arc<Shared>)>> = const { RefCell::new(None) };
}

/// What the next future that this thread makes is about; None: nothing, it is made by hand.
pub(super) fn announce(about: Option<(TaskHandle, Arc<Shared>)>) {
    NEXT.set(about);
}

/// The state of a call. Its Python class is a concurrent.futures.Future too.
#[pyclass(frozen, subclass, module = "moirai.executor")]
pub struct Future {
    task: TaskHandle,
    shared: Option<Arc<Shared>>,
    outcome: Attached<Outcome>,
    watch: OnceLock<Box<Watch>>,
}

impl Future {
    pub(super) fn task(&self) -> &TaskHandle {
        &self.task
    }

    pub(super) fn shared(&self) -> Option<&Arc<Shared>> {
        self.shared.as_ref()
    }

    fn watch(&self) -> &Watch {
        self.watch.get_or_init(Box::default)
    }

    /// Have a parker called at the end. False: it is over.
    pub(super) fn call_at_end(&self, py: Python<'_>, parker: &Arc<Parker>) -> bool {
        self.add_watcher(py, |watchers| watchers.parkers.push(Arc::clone(parker)))
    }

    /// Add somebody who is to be told of the end. False: it is over.
    fn add_watcher(&self, py: Python<'_>, add: impl FnOnce(&mut Watchers)) -> bool {
        self.watch().watchers.with(py, |watchers| {
            // Within this: who ends it takes the watchers after that.
            let is_watched = self.task.watch();
            if is_watched {
                add(watchers);
            }
            is_watched
        })
    }

    /// Do not call a parker any more.
    pub(super) fn leave(&self, py: Python<'_>, parker: &Arc<Parker>) {
        let leave = |it: &mut Watchers| it.parkers.retain(|other| !Arc::ptr_eq(other, parker));
        self.watch().watchers.with(py, leave);
    }

    /// The time limits of its task, if it has any.
    #[inline]
    pub(super) fn limits(&self) -> Option<&Limits> {
        self.watch.get()?.limits.get()
    }

    /// Before its task is queued.
    pub(super) fn limit(&self, limits: Limits) {
        let refused = self.watch().limits.set(limits);
        debug_assert!(refused.is_ok());
    }

    /// Store the outcome of a task that somebody has taken, count it, and tell everybody. False: it
    /// has one already.
    pub(super) fn finish(
        &self,
        slf: &Bound<'_, Future>,
        outcome: Outcome,
        counts: &[&AtomicU64],
    ) -> bool {
        let (how, cancelled) = match outcome {
            Outcome::Cancelled => ("add_cancelled", true),
            Outcome::Failure(_) => ("add_exception", false),
            _ => ("add_result", false),
        };
        if let Outcome::Value(it) | Outcome::Failure(it) = &outcome {
            refers(slf, it.bind(slf.py()));
        }
        let refused = self.outcome.with(slf.py(), |place| match place {
            Outcome::None => {
                *place = outcome;
                None
            }
            _ => Some(outcome),
        });
        if refused.is_some() {
            return false;
        }
        for count in counts {
            attached::add(slf.py(), count, 1);
        }
        self.end(slf, how, cancelled);
        true
    }

    #[inline]
    fn end(&self, slf: &Bound<'_, Future>, how: &str, cancelled: bool) {
        let audience = match self.task.finish(cancelled) {
            Some(audience) => audience,
            None => {
                let end = || Some(self.task.finish_locked(cancelled));
                let ended = self.end_locked(slf, how, end);
                ended.expect("whoever has a task ends it")
            }
        };
        self.tell(slf, audience);
    }

    /// End it while its condition is held, as those who wait with `concurrent.futures.wait` expect.
    #[cold]
    fn end_locked(
        &self,
        slf: &Bound<'_, Future>,
        how: &str,
        end: impl FnOnce() -> Option<Audience>,
    ) -> Option<Audience> {
        let py = slf.py();
        let watch = self.watch();
        let Some(condition) = watch.condition(py) else {
            return end();
        };
        let condition = condition.bind(py);
        let acquired = condition.call_method0(intern!(py, "acquire"));
        if let Err(error) = &acquired {
            error.clone_ref(py).write_unraisable(py, Some(slf));
        }
        let ended = end();
        if ended.is_some() {
            if let Err(error) = tell_waiters(slf, watch, how, condition) {
                error.write_unraisable(py, Some(slf));
            }
        }
        if acquired.is_ok()
            && let Err(error) = condition.call_method0(intern!(py, "release"))
        {
            error.write_unraisable(py, Some(slf));
        }
        ended
    }

    fn tell(&self, slf: &Bound<'_, Future>, audience: Audience) {
        if let (Some(limits), Some(shared)) = (self.limits(), &self.shared) {
            limits.end(shared);
        }
        if !audience.watched {
            return;
        }
        let watchers = self.watch().watchers.with(slf.py(), std::mem::take);
        for parker in watchers.parkers {
            parker.call();
        }
        for callback in watchers.callbacks {
            call_back(slf, callback.bind(slf.py()));
        }
    }

    fn withdraw(&self, slf: &Bound<'_, Future>) -> bool {
        let mut call = None;
        let audience = match self.task.cancel(false) {
            Cancel::Done(taken, audience) => {
                call = taken;
                Some(audience)
            }
            Cancel::Late => None,
            Cancel::Locked => {
                self.end_locked(slf, "add_cancelled", || match self.task.cancel(true) {
                    Cancel::Done(taken, audience) => {
                        call = taken;
                        Some(audience)
                    }
                    _ => None,
                })
            }
        };
        let Some(audience) = audience else {
            self.ask_to_end(slf);
            return self.task.stage() == Stage::Cancelled;
        };
        if let Some(shared) = &self.shared {
            attached::add(slf.py(), &shared.tally.cancelled, 1);
            shared.give_room(1);
            shared.died();
        }
        self.tell(slf, audience);
        drop(call);
        true
    }

    /// Whoever is at it is to learn that it should end.
    fn ask_to_end(&self, slf: &Bound<'_, Future>) {
        self.task.ask_to_end();
        if !self.is_by_hand() || self.task.is_over() {
            return;
        }
        let take = |it: &mut Watchers| it.asked.take();
        if let Some(asked) = self.watch().watchers.with(slf.py(), take) {
            call_back(slf, asked.bind(slf.py()));
        }
    }

    /// The outcome of one that is over.
    fn outcome(&self, py: Python<'_>) -> PyResult<Result<Py<PyAny>, Py<PyAny>>> {
        self.outcome.with(py, |outcome| match outcome {
            Outcome::Value(value) => Ok(Ok(value.clone_ref(py))),
            Outcome::Failure(error) => Ok(Err(error.clone_ref(py))),
            Outcome::None | Outcome::Cancelled => Err(CancelledError::new_err(())),
        })
    }

    /// Wait until it is over.
    fn wait(slf: &Bound<'_, Future>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let timeout = timeout.map(|value| number("timeout", value)).transpose()?;
        let future = slf.get();
        if future.task.is_over() {
            return Ok(());
        }
        if timeout.is_none() {
            help(slf.py(), future)?;
            if future.task.is_over() {
                return Ok(());
            }
        }
        if wait::park(slf.py(), future, timeout)? {
            return Ok(());
        }
        Err(Timeout::new_err(format!(
            "timeout: the task has not ended within {} s; it goes on",
            timeout.unwrap_or_default()
        )))
    }

    /// Whether its task is one that nobody else runs.
    fn is_by_hand(&self) -> bool {
        self.shared.is_none()
    }

    fn end_by_hand(slf: &Bound<'_, Future>, outcome: Outcome) -> PyResult<()> {
        let future = slf.get();
        if future.is_by_hand() {
            future.task.begin();
            // Now whoever stores an outcome first ends it, unless it was cancelled before.
            if !future.task.is_over() && future.finish(slf, outcome, &[]) {
                return Ok(());
            }
        }
        let state = future.state();
        Err(InvalidStateError::new_err(format!(
            "{state}: the outcome of this future is set by its executor"
        )))
    }
}

fn tell_waiters(
    slf: &Bound<'_, Future>,
    watch: &Watch,
    how: &str,
    condition: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let py = slf.py();
    if let Some(waiters) = watch.waiters.get() {
        for waiter in waiters.bind(py).iter() {
            waiter.call_method1(how, (slf,))?;
        }
    }
    condition.call_method0(intern!(py, "notify_all"))?;
    Ok(())
}

/// Call a function with the future; what it raises is logged, as in concurrent.futures.
fn call_back(slf: &Bound<'_, Future>, callback: &Bound<'_, PyAny>) {
    let py = slf.py();
    let Err(error) = callback.call1((slf,)) else {
        return;
    };
    let log = || -> PyResult<()> {
        let report = py.import("moirai.executor.reporting")?;
        report.call_method1("callback_failed", (slf, error.value(py)))?;
        Ok(())
    };
    if let Err(another) = log() {
        another.write_unraisable(py, Some(slf));
    }
}

#[pymethods]
impl Future {
    #[new]
    fn new() -> Self {
        let (task, shared) = match NEXT.take() {
            Some((task, shared)) => (task, Some(shared)),
            None => (TaskHandle::new(Task::by_hand()), None),
        };
        Future {
            task,
            shared,
            outcome: Attached::new(Outcome::None),
            watch: OnceLock::new(),
        }
    }

    /// Withdraw the task if nobody has begun it, or ask it to end; whether it is cancelled.
    fn cancel(slf: &Bound<'_, Self>) -> bool {
        slf.get().withdraw(slf)
    }

    /// Whether it was withdrawn.
    fn cancelled(&self) -> bool {
        self.task.stage() == Stage::Cancelled
    }

    /// Whether somebody is at it.
    fn running(&self) -> bool {
        self.task.stage() == Stage::Running
    }

    /// Whether it is over.
    fn done(&self) -> bool {
        self.task.is_over()
    }

    /// What the task returned, or its exception raised; waits for the end.
    #[pyo3(signature = (timeout = None))]
    fn result(slf: &Bound<'_, Self>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<Py<PyAny>> {
        Self::wait(slf, timeout)?;
        let outcome = slf.get().outcome(slf.py())?;
        outcome.map_err(|error| PyErr::from_value(error.into_bound(slf.py())))
    }

    /// The exception that the task raised, or None; waits for the end.
    #[pyo3(signature = (timeout = None))]
    fn exception(
        slf: &Bound<'_, Self>,
        timeout: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<Py<PyAny>>> {
        Self::wait(slf, timeout)?;
        Ok(slf.get().outcome(slf.py())?.err())
    }

    /// Call a function with this future at the end, or now if it is over.
    fn add_done_callback(slf: &Bound<'_, Self>, r#fn: Bound<'_, PyAny>) {
        let future = slf.get();
        remember(slf);
        // Another reference, as none may be the last that is dropped among the watchers.
        let callback = r#fn.clone().unbind();
        if !future.add_watcher(slf.py(), |watchers| watchers.callbacks.push(callback)) {
            call_back(slf, &r#fn);
        }
    }

    /// For executors that run a future's task: whether to run it.
    fn set_running_or_notify_cancel(&self) -> PyResult<bool> {
        if self.is_by_hand() && self.task.begin() {
            return Ok(true);
        }
        match self.task.stage() {
            Stage::Cancelled => Ok(false),
            _ => Err(PyRuntimeError::new_err("Future in unexpected state")),
        }
    }

    /// Set the result of a future that was made by hand.
    fn set_result(slf: &Bound<'_, Self>, result: Py<PyAny>) -> PyResult<()> {
        Self::end_by_hand(slf, Outcome::Value(result))
    }

    /// In a forked child, of one that was made by hand: nobody here will end it.
    fn disconnect(slf: &Bound<'_, Self>, exception: Py<PyAny>) -> PyResult<()> {
        let (py, future) = (slf.py(), slf.get());
        if let Some(watch) = future.watch.get() {
            // Threads that are not here may have had its lock, and wait for it.
            let condition = watch.condition.with(py, Option::take);
            let watchers = watch.watchers.with(py, std::mem::take);
            if let Some(waiters) = watch.waiters.get() {
                let waiters = waiters.bind(py);
                waiters.del_slice(0, waiters.len())?;
            }
            drop((condition, watchers));
        }
        future.task.begin();
        if future.task.is_over() || future.finish(slf, Outcome::Failure(exception), &[]) {
            return Ok(());
        }
        // One of those threads has stored the outcome, and was about to say so.
        future.task.finish_locked(false);
        Ok(())
    }

    /// Of one made by hand, which somebody is at: call a function with this future once it is asked
    /// to end, or now if it was.
    fn call_when_asked(slf: &Bound<'_, Self>, r#fn: Py<PyAny>) {
        let future = slf.get();
        remember(slf);
        let mut asked = Some(r#fn);
        let swap = |it: &mut Watchers| std::mem::swap(&mut it.asked, &mut asked);
        // Whoever asks takes it after asking, so one of the two sees the other.
        if future.add_watcher(slf.py(), swap) && future.task.is_asked_to_end() {
            future.ask_to_end(slf);
        }
    }

    /// Of one made by hand, which was asked to end: it ended for that, and is cancelled after all.
    fn set_cancelled(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::end_by_hand(slf, Outcome::Cancelled)
    }

    /// Set the exception of a future that was made by hand.
    fn set_exception(slf: &Bound<'_, Self>, exception: Bound<'_, PyAny>) -> PyResult<()> {
        let py = slf.py();
        let error = PyErr::from_value(exception).into_value(py);
        Self::end_by_hand(slf, Outcome::Failure(error.into_any()))
    }

    #[getter]
    #[pyo3(name = "_state")]
    fn state(&self) -> &'static str {
        match self.task.stage() {
            Stage::Pending => "PENDING",
            Stage::Running => "RUNNING",
            Stage::Cancelled => "CANCELLED_AND_NOTIFIED",
            Stage::Finished => "FINISHED",
        }
    }

    #[getter]
    #[pyo3(name = "_condition")]
    fn condition(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        let (py, future) = (slf.py(), slf.get());
        let watch = future.watch();
        if let Some(condition) = watch.condition(py) {
            return Ok(condition);
        }
        remember(slf);
        let threading = py.import(intern!(py, "threading"))?;
        let made = threading.call_method0(intern!(py, "Condition"))?.unbind();
        let (condition, _superfluous) = watch.condition.with(py, |place| match place {
            Some(condition) => (condition.clone_ref(py), Some(made)),
            None => (place.insert(made).clone_ref(py), None),
        });
        // After the condition is there: whoever finds the lock finds the condition.
        future.task.lock_end();
        Ok(condition)
    }

    #[getter]
    #[pyo3(name = "_waiters")]
    fn waiters(slf: &Bound<'_, Self>) -> Py<PyList> {
        remember(slf);
        let py = slf.py();
        let made = || PyList::empty(py).unbind();
        slf.get().watch().waiters.get_or_init(made).clone_ref(py)
    }

    #[getter]
    #[pyo3(name = "_result")]
    fn peek_result(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.outcome.with(py, |outcome| match outcome {
            Outcome::Value(value) => Some(value.clone_ref(py)),
            _ => None,
        })
    }

    #[getter]
    #[pyo3(name = "_exception")]
    fn peek_exception(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.outcome.with(py, |outcome| match outcome {
            Outcome::Failure(error) => Some(error.clone_ref(py)),
            _ => None,
        })
    }

    fn __setattr__(
        slf: &Bound<'_, Self>,
        name: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        set_attribute(slf, name, Some(value))
    }

    fn __delattr__(slf: &Bound<'_, Self>, name: &Bound<'_, PyAny>) -> PyResult<()> {
        set_attribute(slf, name, None)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let py = slf.py();
        let future = slf.get();
        let kind = slf.get_type().name()?;
        let end = if let Some(value) = future.peek_result(py) {
            format!(" returned {}", value.bind(py).get_type().name()?)
        } else if let Some(error) = future.peek_exception(py) {
            format!(" raised {}", error.bind(py).get_type().name()?)
        } else {
            String::new()
        };
        let state = match future.task.stage() {
            Stage::Pending => "pending",
            Stage::Running => "running",
            Stage::Cancelled => "cancelled",
            Stage::Finished => "finished",
        };
        Ok(format!("<{kind} at {:p} state={state}{end}>", slf.as_ptr()))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let seen = self.outcome.visit(&visit, |outcome| match outcome {
            Outcome::Value(it) | Outcome::Failure(it) => visit.call(it),
            Outcome::None | Outcome::Cancelled => Ok(()),
        });
        seen.unwrap_or(Ok(()))?;
        if let Some(watch) = self.watch.get() {
            let condition = watch.condition.visit(&visit, |it| visit.call(it.as_ref()));
            condition.unwrap_or(Ok(()))?;
            visit.call(watch.waiters.get())?;
            let callbacks = watch.watchers.visit(&visit, |watchers| {
                let mut all = watchers.callbacks.iter().chain(&watchers.asked);
                all.try_for_each(|it| visit.call(it))
            });
            callbacks.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    fn __clear__(&self, py: Python<'_>) {
        let outcome = self.outcome.with(py, std::mem::take);
        let watch = self.watch.get();
        let watchers = watch.map(|it| it.watchers.with(py, std::mem::take));
        drop((outcome, watchers));
    }
}
