//! Transactions as classes: what they share, and the arena of each.

use crate::arena::{Arena, arena};
use crate::argument::bytes;
use crate::errors::to_py;
use crate::resource::Resource;
use moirai_core::resource::transaction as core;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;

/// What transactions have in common: chunks, counts, and the recorder.
#[pyclass(frozen, module = "moirai.memory")]
pub struct TransactionStore {
    core: Arc<core::TransactionStore>,
    /// The resource chunks come from.
    #[pyo3(get)]
    upstream: Py<Resource>,
}

#[pymethods]
impl TransactionStore {
    #[new]
    #[pyo3(signature = (upstream, *, keep_bytes, record_every))]
    fn new(
        upstream: &Bound<'_, Resource>,
        keep_bytes: &Bound<'_, PyAny>,
        record_every: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let keep = bytes("keep_bytes", keep_bytes)?;
        let every = bytes("record_every", record_every)? as u64;
        let source = Arc::clone(upstream.get().core());
        let core = core::TransactionStore::new(source, keep, every).map_err(to_py)?;
        Ok(TransactionStore {
            core,
            upstream: upstream.clone().unbind(),
        })
    }

    /// Every count by name.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.core.counts();
        let dict = PyDict::new(py);
        dict.set_item("created", counts.created)?;
        dict.set_item("commits", counts.commits)?;
        dict.set_item("rollbacks", counts.rollbacks)?;
        dict.set_item("outliving_blocks", counts.outliving)?;
        dict.set_item("current_bytes", counts.current_bytes)?;
        dict.set_item("peak_bytes", counts.peak_bytes)?;
        dict.set_item("held_bytes", counts.held_bytes)?;
        dict.set_item("idle_bytes", counts.idle_bytes)?;
        Ok(dict)
    }

    /// (events, bytes asked for, held, given by malloc) of the last recording, or None.
    fn compare_with_malloc(&self, py: Python<'_>) -> Option<(usize, usize, usize, usize)> {
        let found = py.detach(|| self.core.compare_with_malloc())?;
        Some((
            found.event_count,
            found.asked_bytes,
            found.held_bytes,
            found.malloc_bytes,
        ))
    }

    /// Give unused chunks back until at most `target_bytes` are kept, upstream's included.
    fn trim(&self, py: Python<'_>, target_bytes: &Bound<'_, PyAny>) -> PyResult<usize> {
        let target = bytes("target_bytes", target_bytes)?;
        Ok(py.detach(|| self.core.trim(target)))
    }
}

/// The memory of one transaction.
#[pyclass(frozen, subclass, extends = Arena, module = "moirai.memory")]
pub struct TransactionArena(Arc<core::TransactionArena>);

#[pymethods]
impl TransactionArena {
    #[new]
    #[pyo3(signature = (store, *, initial_bytes, limit_bytes, label, parent=None))]
    fn new(
        store: &Bound<'_, TransactionStore>,
        initial_bytes: &Bound<'_, PyAny>,
        limit_bytes: &Bound<'_, PyAny>,
        label: String,
        parent: Option<&Bound<'_, TransactionArena>>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let terms = core::Terms {
            first_bytes: bytes("initial_bytes", initial_bytes)?,
            limit_bytes: bytes("limit_bytes", limit_bytes)?,
        };
        let parent = parent.map(|parent| Arc::clone(&parent.get().0));
        let begun = core::TransactionArena::begin(&store.get().core, terms, label, parent);
        let core = begun.map_err(to_py)?;
        let upstream = store.get().upstream.bind(store.py());
        let base = Resource::above(core.clone(), upstream);
        Ok(arena(TransactionArena(core), base))
    }

    /// Whether it was neither committed nor rolled back.
    #[getter]
    fn active(&self) -> bool {
        self.0.is_active()
    }

    /// Bytes it uses, those of transactions inside it included.
    #[getter]
    fn used_bytes(&self) -> usize {
        self.0.used_bytes()
    }

    /// Most bytes it used, or would have used had nothing been refused.
    #[getter]
    fn wanted_bytes(&self) -> usize {
        self.0.wanted_bytes()
    }

    /// Bytes of the chunks it holds.
    #[getter]
    fn held_bytes(&self) -> usize {
        self.0.held_bytes()
    }

    /// End it and keep what it made; the blocks that are alive.
    fn _commit(&self) -> PyResult<u64> {
        self.0.commit().map_err(to_py)
    }

    /// End it and what it made; the blocks that are left to their views.
    fn _rollback(&self) -> PyResult<u64> {
        self.0.rollback().map_err(to_py)
    }
}
