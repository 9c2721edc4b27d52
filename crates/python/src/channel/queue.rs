//! What `moirai.channels.Queue` is made of: a line whose limit may change, and a count of tasks.

use super::operation::{Operation, Single, Work};
use super::wait::block;
use super::waker::{Line, wake_all};
use crate::argument::timeout;
use moirai_core::channel::{Deque, Side, Store};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::sync::Arc;

/// A queue whose limit may change; 0 or less is no limit.
#[pyclass(frozen, module = "moirai.channels")]
pub struct BareQueue {
    line: Arc<Line<Deque<Py<PyAny>>>>,
}

fn limit(maxsize: isize) -> usize {
    match usize::try_from(maxsize) {
        Ok(0) | Err(_) => usize::MAX,
        Ok(maxsize) => maxsize,
    }
}

#[pymethods]
impl BareQueue {
    #[new]
    fn new(maxsize: isize) -> Self {
        BareQueue {
            line: Line::shared(Deque::new(limit(maxsize))),
        }
    }

    /// Put an item in; Timeout if there is no room in time.
    fn put(&self, py: Python<'_>, item: Py<PyAny>, timeout_seconds: Option<f64>) -> PyResult<()> {
        let mut operation = Single::new(&*self.line, Work::Send(Some(item)));
        if operation.attempt(py)?.is_some() {
            return Ok(());
        }
        let limit = timeout("timeout", timeout_seconds)?;
        block(py, &mut operation, limit).map(drop)
    }

    /// Take the oldest item; Timeout if there is none in time.
    fn get(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        let mut operation = Single::new(&*self.line, Work::Receive);
        if let Some(item) = operation.attempt(py)? {
            return Ok(item);
        }
        let limit = timeout("timeout", timeout_seconds)?;
        block(py, &mut operation, limit)
    }

    /// Have another limit from now on.
    fn set_maxsize(&self, py: Python<'_>, maxsize: isize) {
        self.line.store().set_limit(limit(maxsize));
        wake_all(py, self.line.call_all(Side::Senders));
    }

    /// Refuse further items; what is in it stays.
    fn close(&self, py: Python<'_>) {
        wake_all(py, self.line.close());
    }

    fn __len__(&self) -> usize {
        self.line.store().count()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // SAFETY: as for a channel; the line has a lock of its own besides.
        unsafe { self.line.store().visit(|message| visit.call(message)) }
    }

    fn __clear__(&self) {
        while self.line.pop().is_ok() {}
    }
}
