//! `priority`: requests and arrays of a context go to one lane.
//!
//! Two context variables are set together: the lane, which `Resource.allocate` reads, and NumPy's
//! handler, exchanged for one that draws from the same resource in that lane. NumPy looks its own
//! variable up for each array, so both follow the context wherever it runs: asyncio switches tasks
//! on a thread without telling anyone, and a copy of ours, kept in the thread, would go stale.

use super::entered::Entered;
use super::scope::steered;
use crate::lane;
use moirai_core::resource::priority::Lane;
use pyo3::prelude::*;

/// Sends the requests of the current context to one lane between enter and exit.
///
/// May be entered again, also in other threads and tasks, before it is left.
#[pyclass(frozen, subclass, name = "priority", module = "moirai.memory")]
pub struct Priority {
    lane: Lane,
    entered: Entered,
}

#[pymethods]
impl Priority {
    #[new]
    fn new(priority: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Priority {
            lane: lane::from_priority("priority", priority)?,
            entered: Entered::default(),
        })
    }

    fn __enter__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let (py, this) = (slf.py(), slf.get());
        let number = (this.lane as u8).into_pyobject(py)?.into_any().unbind();
        let handler = steered(py, this.lane)?;
        let handler = handler
            .as_ref()
            .map(|(variable, capsule)| (*variable, capsule));
        this.entered
            .set(py, (lane::variable(py)?, &number), handler)?;
        Ok(slf.clone())
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(
        &self,
        py: Python<'_>,
        _exception: &Bound<'_, pyo3::types::PyTuple>,
    ) -> PyResult<()> {
        self.entered.leave(py, "priority")
    }
}
