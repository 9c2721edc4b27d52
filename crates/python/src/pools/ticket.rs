//! `Ticket`: a place in a pool's queue for one who cannot block a thread.

use moirai_core::sync::{AtomicBool, Ordering};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::time::Duration;

/// The pool behind a ticket.
pub(super) trait Queue: Send + Sync {
    /// What was granted.
    fn take(&self, py: Python<'_>, ticket: u64) -> PyResult<Py<PyAny>>;
    /// Leave the queue, or take what was granted in the last moment.
    fn time_out(&self, py: Python<'_>, ticket: u64, waited: Duration) -> PyResult<Py<PyAny>>;
    /// Leave the queue; what was granted goes to the next one.
    fn cancel(&self, py: Python<'_>, ticket: u64) -> PyResult<()>;
    /// Show the collector what is referred to.
    fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError>;
}

/// A place in a pool's queue. Dropping it gives it, and what was granted, to the next one.
#[pyclass(frozen, module = "moirai.pools")]
pub struct Ticket {
    number: u64,
    queue: Box<dyn Queue>,
    /// Whether it was used up. Swapped, so that only one thread uses it.
    over: AtomicBool,
}

impl Ticket {
    pub(super) fn new(number: u64, queue: Box<dyn Queue>) -> Self {
        Ticket {
            number,
            queue,
            over: AtomicBool::new(false),
        }
    }
}

#[pymethods]
impl Ticket {
    /// The object that was granted; to be called after `wake` was.
    fn take(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.over.store(true, Ordering::Relaxed);
        self.queue.take(py, self.number)
    }

    /// What was granted in the last moment, or Timeout.
    fn time_out(&self, py: Python<'_>, waited_seconds: f64) -> PyResult<Py<PyAny>> {
        self.over.store(true, Ordering::Relaxed);
        let waited = Duration::try_from_secs_f64(waited_seconds).unwrap_or_default();
        self.queue.time_out(py, self.number, waited)
    }

    /// Leave the queue; does nothing the second time.
    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        if self.over.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        self.queue.cancel(py, self.number)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.queue.visit(&visit)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        Python::try_attach(|py| {
            if let Err(error) = self.queue.cancel(py, self.number) {
                error.write_unraisable(py, None);
            }
        });
    }
}
