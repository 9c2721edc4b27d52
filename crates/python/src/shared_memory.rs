//! `SharedMemoryResource`: memory that other processes can be given.

use crate::argument::bytes;
use crate::errors::to_py;
use crate::resource::{Resource, with_base};
use moirai_core::resource as core;
use moirai_core::resource::shared_memory::sent;
use pyo3::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Blocks that a SharedChannel sends by reference.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct SharedMemoryResource(Arc<core::shared_memory::SharedMemoryResource>);

#[pymethods]
impl SharedMemoryResource {
    #[new]
    fn new(
        py: Python<'_>,
        capacity_bytes: &Bound<'_, PyAny>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let capacity = bytes("capacity_bytes", capacity_bytes)?;
        let core = py.detach(|| core::shared_memory::SharedMemoryResource::new(capacity));
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::new(core.clone(), None);
        Ok(with_base(SharedMemoryResource(core), base))
    }

    /// Bytes that blocks may take together.
    #[getter]
    fn capacity_bytes(&self) -> usize {
        self.0.capacity_bytes()
    }

    /// Bytes that were freed here and are held by other processes, or on their way to them.
    #[getter]
    fn lingering_bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.lingering_bytes())
    }
}

/// Wait until others have received what was sent by reference; how many are left.
#[pyfunction]
pub fn linger(py: Python<'_>, seconds: f64) -> PyResult<usize> {
    const SLICE: Duration = Duration::from_millis(50);
    let started = Instant::now();
    let limit = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let count = py.detach(|| sent::linger(left.min(SLICE)));
        if count == 0 || left.is_zero() {
            return Ok(count);
        }
        py.check_signals()?;
    }
}
