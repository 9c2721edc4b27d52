//! Operations as coroutines: done at the first step if that is possible, else in Python's part,
//! `moirai._event_loop`, which waits in the loop.

use super::Held;
use super::operation::{Operation, Single};
use super::waker::{LoopDoorbell, Waker};
use crate::errors::{Closed, Disconnected};
use moirai_core::sync::Lock;
use pyo3::exceptions::{PyRuntimeError, PyStopAsyncIteration, PyStopIteration};
use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::Arc;
use std::time::Duration;

type Boxed = Box<dyn Operation + Send>;

/// How a step ended, if not by an exception.
enum Step {
    Suspended(Py<PyAny>),
    Done(Py<PyAny>),
}

/// Most operations are done at the first step: those at one channel are not boxed before they wait.
enum State {
    One(Single<Held>),
    Any(Boxed),
    Waiting(Py<PyAny>),
    Over,
}

/// A coroutine that does one operation. The state is taken out while Python code runs.
#[pyclass(frozen, module = "moirai.channels")]
pub struct Pending {
    state: Lock<State>,
    timeout: Option<Duration>,
    /// Whether the end of the channel is the end of an iteration.
    iterates: bool,
}

impl Pending {
    /// At one channel; if it `iterates`, the end of the channel is the end of an iteration.
    pub(super) fn new(operation: Single<Held>, timeout: Option<Duration>, iterates: bool) -> Self {
        Pending {
            state: Lock::new(State::One(operation)),
            timeout,
            iterates,
        }
    }

    pub(super) fn any(
        operation: impl Operation + Send + 'static,
        timeout: Option<Duration>,
    ) -> Self {
        Pending {
            state: Lock::new(State::Any(Box::new(operation))),
            timeout,
            iterates: false,
        }
    }

    fn take(&self) -> State {
        std::mem::replace(&mut *self.state.lock(), State::Over)
    }

    fn failed(&self, py: Python<'_>, error: PyErr) -> PyErr {
        let end = error.is_instance_of::<Closed>(py) || error.is_instance_of::<Disconnected>(py);
        if self.iterates && end {
            return PyStopAsyncIteration::new_err(());
        }
        error
    }

    /// Go on to the next suspension.
    fn step(&self, py: Python<'_>) -> PyResult<Step> {
        match self.take() {
            State::One(mut operation) => match operation.attempt(py) {
                Ok(Some(done)) => Ok(Step::Done(done)),
                Ok(None) => self.begin(py, Box::new(operation)),
                Err(error) => Err(self.failed(py, error)),
            },
            State::Any(mut operation) => match operation.attempt(py) {
                Ok(Some(done)) => Ok(Step::Done(done)),
                Ok(None) => self.begin(py, operation),
                Err(error) => Err(self.failed(py, error)),
            },
            State::Waiting(coroutine) => self.resume(py, coroutine),
            State::Over => Err(reused()),
        }
    }

    #[cold]
    fn begin(&self, py: Python<'_>, operation: Boxed) -> PyResult<Step> {
        let coroutine = self.wait(py, operation)?;
        self.resume(py, coroutine)
    }

    fn resume(&self, py: Python<'_>, coroutine: Py<PyAny>) -> PyResult<Step> {
        let none = py.None();
        let mut result = std::ptr::null_mut();
        // SAFETY: both objects are alive, and `result` is a place for the answer.
        let how = unsafe { ffi::PyIter_Send(coroutine.as_ptr(), none.as_ptr(), &raw mut result) };
        // SAFETY: the answer is a reference of ours, or null after an exception.
        let object = unsafe { Bound::from_owned_ptr_or_opt(py, result) };
        match object {
            None => Err(self.failed(py, PyErr::fetch(py))),
            Some(object) if how == ffi::PySendResult::PYGEN_RETURN => {
                Ok(Step::Done(object.unbind()))
            }
            Some(object) => {
                *self.state.lock() = State::Waiting(coroutine);
                Ok(Step::Suspended(object.unbind()))
            }
        }
    }

    /// As a generator tells it: an exception for the end.
    fn told(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.step(py)? {
            Step::Suspended(suspended) => Ok(suspended),
            Step::Done(done) => Err(PyStopIteration::new_err((done,))),
        }
    }

    fn wait(&self, py: Python<'_>, operation: Boxed) -> PyResult<Py<PyAny>> {
        let waiting = Waiting(Lock::new(Some(operation)));
        let part = py.import("moirai._event_loop")?;
        let seconds = self.timeout.map(|timeout| timeout.as_secs_f64());
        let bell = py.get_type::<LoopDoorbell>();
        let coroutine = part.call_method1("complete", (waiting, bell, seconds))?;
        Ok(coroutine.unbind())
    }
}

fn reused() -> PyErr {
    PyRuntimeError::new_err("cannot reuse already awaited coroutine")
}

#[pymethods]
impl Pending {
    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.told(py)
    }

    /// Go on, as a coroutine does.
    fn send(&self, py: Python<'_>, value: Py<PyAny>) -> PyResult<Py<PyAny>> {
        drop(value);
        self.told(py)
    }

    /// Raise inside, as in a coroutine.
    #[pyo3(signature = (*arguments))]
    fn throw(&self, py: Python<'_>, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let coroutine = match self.take() {
            State::Waiting(coroutine) => coroutine,
            // Python's part raises it before it begins.
            State::One(operation) => self.wait(py, Box::new(operation))?,
            State::Any(operation) => self.wait(py, operation)?,
            State::Over => return Err(reused()),
        };
        match coroutine.call_method1(py, "throw", arguments.clone()) {
            Ok(suspended) => {
                *self.state.lock() = State::Waiting(coroutine);
                Ok(suspended)
            }
            Err(error) => Err(self.failed(py, error)),
        }
    }

    /// End it, as a coroutine.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.take() {
            State::Waiting(coroutine) => coroutine.call_method0(py, "close").map(drop),
            State::One(_) | State::Any(_) | State::Over => Ok(()),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.state.try_lock().as_deref() {
            Some(State::One(operation)) => operation.visit(&visit),
            Some(State::Any(operation)) => operation.visit(&visit),
            Some(State::Waiting(coroutine)) => visit.call(coroutine),
            Some(State::Over) | None => Ok(()),
        }
    }

    fn __clear__(&self) {
        drop(self.take());
    }
}

/// The step as `await` takes it: without an exception for the end, which costs more than all the rest.
unsafe extern "C" fn send_slot(
    this: *mut ffi::PyObject,
    _value: *mut ffi::PyObject,
    result: *mut *mut ffi::PyObject,
) -> ffi::PySendResult {
    Python::attach(|py| {
        // SAFETY: the interpreter calls a slot with an object of its type, borrowed for the call.
        let this = unsafe { Bound::from_borrowed_ptr(py, this) };
        let step = match this.cast::<Pending>() {
            Ok(pending) => pending.get().step(py),
            Err(error) => Err(error.into()),
        };
        let (object, how) = match step {
            Ok(Step::Suspended(object)) => (object.into_ptr(), ffi::PySendResult::PYGEN_NEXT),
            Ok(Step::Done(object)) => (object.into_ptr(), ffi::PySendResult::PYGEN_RETURN),
            Err(error) => {
                error.restore(py);
                (std::ptr::null_mut(), ffi::PySendResult::PYGEN_ERROR)
            }
        };
        // SAFETY: the interpreter passes a place for the result.
        unsafe { result.write(object) };
        how
    })
}

/// Have `await` use [`send_slot`]. PyO3 knows no such slot; once, before there are objects.
pub(crate) fn install_send_slot(py: Python<'_>) {
    let kind = py.get_type::<Pending>().as_type_ptr();
    // SAFETY: the type lives as long as the interpreter, and nobody else looks at it yet.
    let slots = unsafe { (*kind).tp_as_async };
    // SAFETY: a type made from a specification has its own table of these slots.
    if let Some(slots) = unsafe { slots.as_mut() } {
        slots.am_send = Some(send_slot);
    }
}

/// An operation that waits in an event loop; taken out while it is tried.
#[pyclass(frozen, module = "moirai.channels")]
pub struct Waiting(Lock<Option<Boxed>>);

impl Waiting {
    fn with<R>(&self, act: impl FnOnce(&mut Boxed) -> R) -> PyResult<R> {
        let taken = self.0.lock().take();
        let Some(mut operation) = taken else {
            return Err(PyRuntimeError::new_err("coroutine already executing"));
        };
        let result = act(&mut operation);
        *self.0.lock() = Some(operation);
        Ok(result)
    }
}

#[pymethods]
impl Waiting {
    /// Join the line, as number `who` of the bell, and try: (item,), or None.
    fn join(
        &self,
        py: Python<'_>,
        bell: &Bound<'_, LoopDoorbell>,
        who: u64,
    ) -> PyResult<Option<(Py<PyAny>,)>> {
        self.with(|operation| {
            operation.join(&|| Waker::Task(Arc::clone(&bell.get().0), who));
            Ok(operation.attempt(py)?.map(|done| (done,)))
        })?
    }

    /// Try after a call: (item,), or None.
    fn attempt(&self, py: Python<'_>) -> PyResult<Option<(Py<PyAny>,)>> {
        self.with(|operation| {
            let done = operation.attempt(py)?;
            if done.is_some() {
                operation.used();
            }
            Ok(done.map(|done| (done,)))
        })?
    }

    /// What can be had in the last moment, or Timeout.
    fn time_out(&self, py: Python<'_>, waited_seconds: f64) -> PyResult<Py<PyAny>> {
        let waited = Duration::try_from_secs_f64(waited_seconds).unwrap_or_default();
        self.with(|operation| match operation.attempt(py)? {
            Some(done) => Ok(done),
            None => {
                operation.leave(py);
                Err(operation.timed_out(py, waited))
            }
        })?
    }

    /// Leave the line; a call that was not used goes to the next one.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        self.with(|operation| operation.leave(py))
    }

    /// Note on an exception from outside what is left behind.
    fn tell(&self, py: Python<'_>, error: Bound<'_, PyAny>) -> PyResult<()> {
        self.with(|operation| drop(operation.told(py, PyErr::from_value(error))))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.0.try_lock().as_deref() {
            Some(Some(operation)) => operation.visit(&visit),
            _ => Ok(()),
        }
    }
}
