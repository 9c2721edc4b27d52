//! Operations as coroutines: done at the first step if that is possible, else in Python's part,
//! `moirai._event_loop`, which waits in the loop.

use super::operation::Operation;
use super::waker::{LoopDoorbell, Waker};
use crate::errors::{Closed, Disconnected};
use moirai_core::sync::Lock;
use pyo3::exceptions::{PyRuntimeError, PyStopAsyncIteration, PyStopIteration};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::Arc;
use std::time::Duration;

type Boxed = Box<dyn Operation + Send>;

enum State {
    New(Boxed),
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
    pub(super) fn new(
        operation: impl Operation + Send + 'static,
        timeout: Option<Duration>,
        iterates: bool,
    ) -> Self {
        Pending {
            state: Lock::new(State::New(Box::new(operation))),
            timeout,
            iterates,
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
    fn step(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.take() {
            State::New(mut operation) => match operation.attempt(py) {
                Ok(Some(done)) => Err(PyStopIteration::new_err((done,))),
                Ok(None) => {
                    let coroutine = self.wait(py, operation)?;
                    self.resume(py, coroutine, "send", (py.None(),))
                }
                Err(error) => Err(self.failed(py, error)),
            },
            State::Waiting(coroutine) => self.resume(py, coroutine, "send", (py.None(),)),
            State::Over => Err(PyRuntimeError::new_err(
                "cannot reuse already awaited coroutine",
            )),
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

    fn resume<'py>(
        &self,
        py: Python<'py>,
        coroutine: Py<PyAny>,
        method: &str,
        arguments: impl pyo3::call::PyCallArgs<'py>,
    ) -> PyResult<Py<PyAny>> {
        match coroutine.call_method1(py, method, arguments) {
            Ok(suspended) => {
                *self.state.lock() = State::Waiting(coroutine);
                Ok(suspended)
            }
            Err(error) => Err(self.failed(py, error)),
        }
    }
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
        self.step(py)
    }

    /// Go on, as a coroutine does.
    fn send(&self, py: Python<'_>, value: Py<PyAny>) -> PyResult<Py<PyAny>> {
        drop(value);
        self.step(py)
    }

    /// Raise inside, as in a coroutine.
    #[pyo3(signature = (*arguments))]
    fn throw(&self, py: Python<'_>, arguments: &Bound<'_, PyTuple>) -> PyResult<Py<PyAny>> {
        let coroutine = match self.take() {
            State::Waiting(coroutine) => coroutine,
            // Python's part raises it before it begins.
            State::New(operation) => self.wait(py, operation)?,
            State::Over => {
                return Err(PyRuntimeError::new_err(
                    "cannot reuse already awaited coroutine",
                ));
            }
        };
        self.resume(py, coroutine, "throw", arguments.clone())
    }

    /// End it, as a coroutine.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        match self.take() {
            State::Waiting(coroutine) => coroutine.call_method0(py, "close").map(drop),
            State::New(_) | State::Over => Ok(()),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.state.try_lock().as_deref() {
            Some(State::New(operation)) => operation.visit(&visit),
            Some(State::Waiting(coroutine)) => visit.call(coroutine),
            Some(State::Over) | None => Ok(()),
        }
    }

    fn __clear__(&self) {
        drop(self.take());
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
