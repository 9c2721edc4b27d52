//! What `moirai.channels.Queue` is made of: a line whose limit may change, and a count of tasks.

use super::operation::{Operation, Single, Work};
use super::wait::block;
use super::waker::{Line, Waker, wake_all};
use crate::argument::timeout;
use crate::errors::Timeout;
use moirai_core::channel::{Deque, Side, Store, Tasks};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::sync::Arc;
use std::time::Duration;

/// A queue whose limit may change; 0 or less is no limit.
#[pyclass(frozen, generic, module = "moirai.channels")]
pub struct BareQueue {
    line: Arc<Line<Deque<Py<PyAny>>>>,
    tasks: Arc<Tasks<Waker>>,
}

fn limit(maxsize: isize) -> usize {
    match usize::try_from(maxsize) {
        Ok(0) | Err(_) => usize::MAX,
        Ok(maxsize) => maxsize,
    }
}

impl BareQueue {
    fn tasks_done(&self, py: Python<'_>, count: usize) -> bool {
        match self.tasks.done(count) {
            Some(woken) => {
                wake_all(py, woken);
                true
            }
            None => false,
        }
    }
}

/// Waiting for the last task. Everybody is called at once, so a call is never to be passed on.
struct Join<'a> {
    tasks: &'a Tasks<Waker>,
    ticket: Option<u64>,
    /// How often everybody had been let go when this began.
    given_up: u64,
}

impl Operation for Join<'_> {
    fn attempt(&mut self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let over = self.tasks.unfinished() == 0 || self.tasks.given_up() != self.given_up;
        Ok(over.then(|| py.None()))
    }

    fn join(&mut self, waker: &dyn Fn() -> Waker) {
        self.ticket = Some(self.tasks.join(self.ticket, waker()));
    }

    fn leave(&mut self, _: Python<'_>) {
        if let Some(ticket) = self.ticket.take() {
            self.tasks.leave(ticket);
        }
    }

    fn timed_out(&self, _: Python<'_>, waited: Duration) -> PyErr {
        let left = self.tasks.unfinished();
        Timeout::new_err(format!("join: {left} items left after {waited:?}"))
    }

    fn told(&self, _: Python<'_>, error: PyErr) -> PyErr {
        error
    }

    fn visit(&self, _: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        Ok(())
    }
}

#[pymethods]
impl BareQueue {
    #[new]
    fn new(maxsize: isize) -> Self {
        BareQueue {
            line: Line::shared_and_live(Deque::new(limit(maxsize))),
            tasks: Tasks::shared(),
        }
    }

    /// Put an item in; Timeout if there is no room in time.
    fn put(&self, py: Python<'_>, item: Py<PyAny>, timeout_seconds: Option<f64>) -> PyResult<()> {
        let limit = timeout("timeout", timeout_seconds)?;
        let mut operation = Single::new(&*self.line, Work::Send(Some(item)));
        // Counted before it can be taken and dealt with.
        self.tasks.add();
        let outcome = match operation.attempt(py) {
            Ok(Some(_)) => return Ok(()),
            Ok(None) => block(py, &mut operation, limit),
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            self.tasks_done(py, 1);
        }
        outcome.map(drop)
    }

    /// Take the oldest item; Timeout if there is none in time.
    fn get(&self, py: Python<'_>, timeout_seconds: Option<f64>) -> PyResult<Py<PyAny>> {
        let limit = timeout("timeout", timeout_seconds)?;
        let mut operation = Single::new(&*self.line, Work::Receive);
        block(py, &mut operation, limit)
    }

    /// Have another limit from now on.
    fn set_maxsize(&self, py: Python<'_>, maxsize: isize) {
        self.line.store().set_limit(limit(maxsize));
        wake_all(py, self.line.call_all(Side::Senders));
    }

    /// Refuse further items; `immediate` drops what is in it, and lets go whoever joins.
    fn shutdown(&self, py: Python<'_>, immediate: bool) {
        wake_all(py, self.line.close());
        if immediate {
            while let Ok((item, _)) = self.line.pop() {
                self.tasks_done(py, 1);
                drop(item);
            }
            wake_all(py, self.tasks.give_up());
        }
    }

    /// An item was dealt with; false if none was left to be.
    fn task_done(&self, py: Python<'_>) -> bool {
        self.tasks_done(py, 1)
    }

    /// Wait until every item has been dealt with.
    fn join(&self, py: Python<'_>) -> PyResult<()> {
        let mut operation = Join {
            tasks: &self.tasks,
            ticket: None,
            given_up: self.tasks.given_up(),
        };
        block(py, &mut operation, None).map(drop)
    }

    /// Items that were not dealt with yet.
    #[getter]
    fn unfinished_tasks(&self) -> usize {
        self.tasks.unfinished()
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
