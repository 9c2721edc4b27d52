//! Which lane a request goes to: a context variable, read for each request where there are lanes.

use crate::errors::InvalidArgument;
use moirai_core::resource::priority::{self, Lane};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyInt;

static CURRENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// The context variable with the lane's number.
pub(crate) fn variable(py: Python<'_>) -> PyResult<&'static Py<PyAny>> {
    CURRENT.get_or_try_init(py, || {
        let class = py.import("contextvars")?.getattr("ContextVar")?;
        Ok(class.call1(("moirai_priority",))?.unbind())
    })
}

/// The lane of the current context: this thread, this asyncio task.
pub(crate) fn current(py: Python<'_>) -> PyResult<Lane> {
    let normal = Lane::Normal as u8;
    let number = variable(py)?.call_method1(py, intern!(py, "get"), (normal,))?;
    Ok(Lane::ALL[number.extract::<usize>(py)?])
}

/// A `Priority` as a lane.
pub(crate) fn from_priority(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Lane> {
    let number = value.cast::<PyInt>().ok();
    let number = number.and_then(|number| number.extract::<usize>().ok());
    let lane = number.and_then(|number| Lane::ALL.get(number).copied());
    lane.ok_or_else(|| {
        let value = value
            .repr()
            .map_or_else(|_| "?".into(), |text| text.to_string());
        InvalidArgument::new_err(format!("{name}: must be a Priority, got {value}"))
    })
}

/// Run `body` with requests of this thread going to `lane`, if it is one.
#[inline]
pub(crate) fn within<R>(lane: Option<Lane>, body: impl FnOnce() -> R) -> R {
    match lane {
        Some(lane) => priority::within(lane, body),
        None => body(),
    }
}

/// Number of the current context's lane.
#[pyfunction]
pub fn current_lane(py: Python<'_>) -> PyResult<u8> {
    current(py).map(|lane| lane as u8)
}
