//! What pools report, as data.

use crate::counts::counts;
use moirai_core::pools::Statistics;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// A snapshot of a pool's counters, taken at one moment.
#[pyclass(frozen, eq, module = "moirai.pools")]
#[derive(PartialEq)]
pub struct PoolStatistics(pub(super) Statistics);

counts! {
    PoolStatistics;
    /// Items handed out.
    acquires,
    /// Of those, items that were idle or came back just then.
    hits,
    /// Of those, items made for the caller.
    misses,
    /// Items made, those of `prefill` included.
    created,
    /// Items the pool gave up: trimmed, too old, unfit, or in surplus.
    destroyed,
    /// Items that could not be made.
    factory_failures,
    /// Items given up because they could not be reset.
    reset_failures,
    /// Items given up because they were found unfit for another turn.
    validation_failures,
    /// Items given up whose destruction raised; they are gone all the same.
    destroy_failures,
    /// Items collected without having been released; their permits came back.
    leaked,
    /// Items taken out for good by their users.
    detached,
    /// Buffers and vectors given up because they came back with views of them alive.
    exported,
    /// Vectors given up because they had grown beyond their cap.
    oversize,
    /// Acquires that had to wait.
    waits,
    /// Acquires that gave up, after a wait or at once.
    timeouts,
    /// Items at rest now.
    idle,
    /// Items out now.
    in_use,
    /// Most items out at once; of several size classes, the sum of their peaks.
    peak_in_use,
    /// Callers that wait now.
    waiting,
    /// Permits taken now.
    permits,
}

/// One item that is out.
#[pyclass(frozen, eq, get_all, module = "moirai.pools")]
#[derive(PartialEq)]
pub struct Acquisition {
    /// Name of the object's type; for a buffer, its size class.
    pub(super) kind: String,
    /// The "file:line" that acquired it; None unless the pool tracks sites.
    pub(super) site: Option<String>,
    /// How long it is out; None as for `site`.
    pub(super) held_seconds: Option<f64>,
}

#[pymethods]
impl Acquisition {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let kind = self.kind.as_str().into_pyobject(py)?.repr()?;
        let site = self.site.as_ref().into_pyobject(py)?.repr()?;
        let seconds = self.held_seconds.into_pyobject(py)?.repr()?;
        Ok(format!(
            "Acquisition(kind={kind}, site={site}, held_seconds={seconds})"
        ))
    }
}
