//! Memory that is there, and lanes for work of different urgency.

use crate::argument::bytes;
use crate::errors::to_py;
use crate::resource::{Resource, with_base};
use moirai_core::resource as core;
use pyo3::prelude::*;
use std::sync::Arc;

/// A fixed amount of memory: prefaulted, locked, handed out without the kernel.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct RealtimeResource(Arc<core::realtime::RealtimeResource>);

#[pymethods]
impl RealtimeResource {
    #[new]
    #[pyo3(signature = (realtime_bytes, *, allow_unlocked=false))]
    fn new(
        py: Python<'_>,
        realtime_bytes: &Bound<'_, PyAny>,
        allow_unlocked: bool,
    ) -> PyResult<PyClassInitializer<Self>> {
        let bytes = bytes("realtime_bytes", realtime_bytes)?;
        let core = py.detach(|| core::realtime::RealtimeResource::new(bytes, allow_unlocked));
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::new(core.clone(), None);
        Ok(with_base(RealtimeResource(core), base))
    }

    /// Bytes that blocks may take together.
    #[getter]
    fn capacity_bytes(&self) -> usize {
        self.0.capacity_bytes()
    }

    /// Whether the kernel must leave the memory where it is; not so in a forked child.
    #[getter]
    fn is_locked(&self) -> bool {
        self.0.is_locked()
    }
}

/// A resource for each lane; a block goes back to the lane it came from.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct PriorityResource {
    /// The resource of each lane, the most urgent first.
    #[pyo3(get)]
    lanes: Vec<Py<Resource>>,
}

#[pymethods]
impl PriorityResource {
    #[new]
    fn new(
        realtime: &Bound<'_, Resource>,
        high: &Bound<'_, Resource>,
        normal: &Bound<'_, Resource>,
        background: &Bound<'_, Resource>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let lanes = [realtime, high, normal, background];
        let cores = lanes.map(|lane| Arc::clone(lane.get().core()));
        let core = core::priority::PriorityResource::of_lanes(cores).map_err(to_py)?;
        let lanes = lanes.map(|lane| lane.clone().unbind()).into();
        let base = Resource::new(Arc::new(core), None);
        Ok(with_base(PriorityResource { lanes }, base))
    }
}
