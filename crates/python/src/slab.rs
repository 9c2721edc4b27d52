//! Resources with a slab in them, as classes over one base that can be tuned.

use crate::argument::{byte_counts, bytes, count};
use crate::errors::to_py;
use crate::resource::Resource;
use moirai_core::resource::slab::{ClassInfo, HasSlab, MAX_BLOCK_BYTES};
use pyo3::PyClass;
use pyo3::prelude::*;
use std::sync::Arc;

/// A resource with size classes; the base of SlabResource and PoolResource.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct Slab(Arc<dyn HasSlab>);

/// (block bytes, standard, requests, rounds of a magazine, runs, blocks so far, blocks out).
type ClassTuple = (usize, bool, Option<(usize, usize)>, usize, usize, u64, u64);

fn class_tuple(class: ClassInfo) -> ClassTuple {
    (
        class.block_bytes,
        class.is_standard,
        class.requests,
        class.magazine_rounds,
        class.run_count,
        class.total_count,
        class.current_count,
    )
}

#[pymethods]
impl Slab {
    /// Every class, the smallest first, as a tuple.
    fn class_tuples(&self, py: Python<'_>) -> Vec<ClassTuple> {
        let classes = py.detach(|| self.0.slab().classes());
        classes.into_iter().map(class_tuple).collect()
    }

    /// Have extra classes of exactly these sizes serve requests from now on.
    fn set_extra_classes(&self, py: Python<'_>, sizes: &Bound<'_, PyAny>) -> PyResult<()> {
        let sizes = byte_counts("sizes", sizes)?;
        py.detach(|| self.0.slab().set_extra_classes(&sizes))
            .map_err(to_py)
    }

    /// Have the magazines of a class hold `rounds` blocks.
    #[pyo3(signature = (block_bytes, *, rounds))]
    fn set_magazine(
        &self,
        py: Python<'_>,
        block_bytes: &Bound<'_, PyAny>,
        rounds: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let block = bytes("block_bytes", block_bytes)?;
        let rounds = count("rounds", rounds, 0..=MAX_BLOCK_BYTES)?;
        py.detach(|| self.0.slab().set_magazine(block, rounds))
            .map_err(to_py)
    }

    /// Draw a run of a class before it is needed, with its pages in memory.
    fn draw_ahead(&self, py: Python<'_>, block_bytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let block = bytes("block_bytes", block_bytes)?;
        py.detach(|| self.0.slab().draw_ahead(block)).map_err(to_py)
    }
}

/// A class over `core`; `base` is over the same.
pub(crate) fn slab<T>(class: T, core: Arc<dyn HasSlab>, base: Resource) -> PyClassInitializer<T>
where
    T: PyClass<BaseType = Slab>,
{
    PyClassInitializer::from(base)
        .add_subclass(Slab(core))
        .add_subclass(class)
}
