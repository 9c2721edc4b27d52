//! Arenas as classes: typed arrays, batches, savepoints.

use crate::argument::bytes;
use crate::buffer::{Batch, Buffer};
use crate::errors::to_py;
use crate::numpy::array;
use crate::resource::{DETACH_BYTES, Resource};
use moirai_core::resource::arena as core;
use pyo3::PyClass;
use pyo3::prelude::*;
use std::sync::Arc;

/// A resource that cuts blocks one after the other from chunks; the base of every arena.
#[pyclass(frozen, subclass, extends = Resource, module = "moirai.memory")]
pub struct Arena;

#[pymethods]
impl Arena {
    /// An array of its own block, which lives as long as the array and its views.
    #[pyo3(signature = (shape, dtype=None, *, zeroed=false))]
    fn array<'py>(
        slf: &Bound<'py, Self>,
        shape: &Bound<'py, PyAny>,
        dtype: Option<&Bound<'py, PyAny>>,
        zeroed: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let items = array::items(slf.py(), dtype)?;
        let lengths = array::Shape::of(shape)?;
        let size = lengths
            .bytes(items.item_bytes)
            .ok_or_else(|| array::too_large(shape))?;
        let base = slf.as_super();
        let lane = base.get().lane(slf.py(), None)?;
        let buffer = Buffer::draw(base, size, 1, zeroed, lane)?;
        buffer.into_array(slf.py(), items, &lengths)
    }

    /// `count` blocks of `size_bytes`, cut in one step and given back together.
    #[pyo3(signature = (count, size_bytes, *, zeroed=false))]
    fn allocate_batch(
        slf: &Bound<'_, Self>,
        count: &Bound<'_, PyAny>,
        size_bytes: &Bound<'_, PyAny>,
        zeroed: bool,
    ) -> PyResult<Batch> {
        let count = bytes("count", count)?;
        let size = bytes("size_bytes", size_bytes)?;
        let resource = Arc::clone(slf.as_super().get().core());
        let draw = || core::allocate_batch(resource, count, size, zeroed);
        let batch = if count.saturating_mul(size) > DETACH_BYTES {
            slf.py().detach(draw)
        } else {
            draw()
        };
        let resource = slf.as_super().clone().unbind();
        Ok(Batch::new(batch.map_err(to_py)?, count, size, resource))
    }
}

pub(crate) fn arena<T>(class: T, base: Resource) -> PyClassInitializer<T>
where
    T: PyClass<BaseType = Arena>,
{
    PyClassInitializer::from(base)
        .add_subclass(Arena)
        .add_subclass(class)
}

/// A moment of an arena to go back to; forgotten when the last reference to it is gone.
#[pyclass(frozen, module = "moirai.memory")]
pub struct Savepoint(core::Savepoint);

/// An arena: blocks are cut from chunks, and everything is given back by a reset or a rollback.
#[pyclass(frozen, subclass, extends = Arena, module = "moirai.memory")]
pub struct ArenaResource(Arc<core::ArenaResource>);

#[pymethods]
impl ArenaResource {
    #[new]
    #[pyo3(signature = (upstream, *, chunk_bytes))]
    fn new(
        upstream: &Bound<'_, Resource>,
        chunk_bytes: &Bound<'_, PyAny>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let chunk = bytes("chunk_bytes", chunk_bytes)?;
        let core = core::ArenaResource::new(Arc::clone(upstream.get().core()), chunk);
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::above(core.clone(), upstream);
        Ok(arena(ArenaResource(core), base))
    }

    /// Remember this moment.
    fn savepoint(&self) -> Savepoint {
        Savepoint(self.0.savepoint())
    }

    /// Go back to a savepoint; the blocks that had to be left to their views.
    #[pyo3(signature = (savepoint, *, retire=false))]
    fn rollback(&self, savepoint: &Savepoint, retire: bool) -> PyResult<u64> {
        self.0.rollback(&savepoint.0, retire).map_err(to_py)
    }

    /// Start over, with the chunks warm; the blocks that had to be left to their views.
    #[pyo3(signature = (*, retire=false))]
    fn reset(&self, retire: bool) -> PyResult<u64> {
        self.0.reset(retire).map_err(to_py)
    }
}

/// An arena for each thread, made on first use and given back when the thread ends.
#[pyclass(frozen, subclass, extends = Arena, module = "moirai.memory")]
pub struct ThreadLocalArena(Arc<core::ThreadLocalArena>);

#[pymethods]
impl ThreadLocalArena {
    #[new]
    #[pyo3(signature = (upstream, *, chunk_bytes))]
    fn new(
        upstream: &Bound<'_, Resource>,
        chunk_bytes: &Bound<'_, PyAny>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let chunk = bytes("chunk_bytes", chunk_bytes)?;
        let core = core::ThreadLocalArena::new(Arc::clone(upstream.get().core()), chunk);
        let core = Arc::new(core.map_err(to_py)?);
        let base = Resource::above(core.clone(), upstream);
        Ok(arena(ThreadLocalArena(core), base))
    }

    /// Arenas made so far: the most threads that had one at once.
    #[getter]
    fn arena_count(&self) -> usize {
        self.0.arena_count()
    }

    /// Remember this moment of the calling thread's arena.
    fn savepoint(&self) -> PyResult<Savepoint> {
        self.0.savepoint().map(Savepoint).map_err(to_py)
    }

    /// Go back to a savepoint of the calling thread; the blocks left to their views.
    #[pyo3(signature = (savepoint, *, retire=false))]
    fn rollback(&self, savepoint: &Savepoint, retire: bool) -> PyResult<u64> {
        self.0.rollback(&savepoint.0, retire).map_err(to_py)
    }

    /// Start the calling thread's arena over; the blocks left to their views.
    #[pyo3(signature = (*, retire=false))]
    fn reset(&self, retire: bool) -> PyResult<u64> {
        self.0.reset(retire).map_err(to_py)
    }
}
